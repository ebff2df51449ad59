# SPDX-License-Identifier: Apache-2.0
"""
Backends: how sites are found, statistics gathered and pruning inserted in a kind of model.

Each backend is a package with the functions of :class:`Backend`; algorithms speak to models through them only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import nncf
from nncf.common.tensor_statistics.collectors import TensorCollector
from nncf.common.tensor_statistics.statistic_point import StatisticPointsContainer
from nncf.common.utils.backend import BackendType, get_backend

from scap_nncf.algorithms.plan import Plan, SitePlan, Vector
from scap_nncf.algorithms.sites import ModelReport, Site

if TYPE_CHECKING:  # the algorithms import this package
    import numpy as np
    from numpy.typing import NDArray

    from scap_nncf.algorithms.allocation.fisher import Costs
    from scap_nncf.algorithms.mitigation.config import Mitigation
    from scap_nncf.algorithms.refine import Refine, RefineReport
    from scap_nncf.algorithms.scap.histogram import ActivationHistogram


class Backend(Protocol):
    """What a backend package provides as module-level functions."""

    GRADIENTS: bool

    def inspect_model(
        self,
        model: Any,
        sample: Any = None,
        selected_roles: Sequence[str] | None = None,
        ignored_scope: nncf.IgnoredScope | None = None,
        wanted: Sequence[str] = (),
    ) -> ModelReport:
        """Sites of a model and what stays dense."""

    def statistic_points(
        self, sites: Sequence[Site], make_collector: Callable[[], TensorCollector]
    ) -> StatisticPointsContainer:
        """One statistic point a site."""

    def collect(
        self, model: Any, points: StatisticPointsContainer, samples: Iterable[Any], total: int | None = None
    ) -> int:
        """Run the samples, leave statistics in the points; returns the number of samples."""

    def collect_sequential(
        self,
        model: Any,
        sites: Sequence[Site],
        points: StatisticPointsContainer,
        samples: Sequence[Any],
        decide: Callable[[Site, ActivationHistogram], SitePlan | None],
    ) -> int:
        """As `collect`, each site on the pruned output of the sites before it."""

    def collect_costs(
        self,
        model: Any,
        sites: Sequence[Site],
        histograms: Mapping[str, ActivationHistogram],
        modes: Mapping[str, float],
        samples: Sequence[Any],
        seed: int = 0,
        checkpointing: bool = False,
    ) -> Costs:
        """Price of sparsity in each layer, where the backend has gradients."""

    def greedy_paths(
        self,
        model: Any,
        sites: Sequence[Site],
        histograms: Mapping[str, ActivationHistogram],
        samples: Sequence[Any],
    ) -> dict[str, NDArray[np.float64]]:
        """What TEAL's greedy search finds in each block, where blocks can be run by themselves."""

    def train_biases(
        self, model: Any, samples: Sequence[Any], settings: Refine
    ) -> tuple[dict[str, NDArray[np.float32]], RefineReport]:
        """Vectors for the outputs of the pruned layers of a sparse model, where the backend has gradients."""

    def histograms_of(self, points: StatisticPointsContainer) -> dict[str, ActivationHistogram]:
        """What `collect` gathered, by site name."""

    def shapes_of(self, model: Any) -> dict[str, tuple[int, int]]:
        """(in_features, out_features) of every FC layer by name."""

    def dense_weight(self, model: Any, name: str) -> np.ndarray[Any, Any]:
        """The weights that an FC layer computes with, whatever their format: float32 [in_features, out_features]."""

    def train_mitigation(
        self, model: Any, plan: Plan, mitigation: Mitigation, samples: Sequence[Any]
    ) -> dict[tuple[str, str], Vector]:
        """Learned vectors by layer name and kind, where the backend has gradients."""

    def shifted_histograms(self, model: Any, plan: Plan, samples: Sequence[Any]) -> dict[str, ActivationHistogram]:
        """Layer name → histogram of what a threshold is compared with, after all shifts of the plan."""

    def working_copy(self, model: Any) -> Any:
        """The model to change: itself where hooks are removable (torch), a clone where the graph changes (OpenVINO)."""

    def insert(self, model: Any, plan: Plan) -> None:
        """Insert the pruning of a fitting plan, in place, into a model that has none."""

    def remove(self, model: Any) -> None:
        """Take all pruning out, in place; the model is as it was."""

    def set_enabled(self, model: Any, enabled: bool) -> None:
        """Switch all pruning on or off."""

    def counts(self, model: Any) -> dict[str, tuple[int, int]]:
        """Zeros and values counted at the input of each pruned layer since the last reset."""

    def reset_counts(self, model: Any) -> None:
        """Start counting anew."""

    def store_controller(self, model: Any, controller: Any) -> None:
        """Keep a controller with the model, or forget it (None)."""

    def stored_controller(self, model: Any) -> Any:
        """The controller kept with the model, or None."""


def backend_of(model: Any) -> Backend:
    """
    The backend of a model.

    :raises nncf.UnsupportedBackendError: neither a PyTorch module nor an OpenVINO model.
    """
    if is_optimum_model(model):
        from scap_nncf.algorithms.backends import openvino as openvino_backend

        return openvino_backend
    try:
        kind = get_backend(model)
    except nncf.UnsupportedBackendError:
        kind = None
    if kind == BackendType.TORCH:
        from scap_nncf.algorithms.backends import torch as torch_backend

        return torch_backend
    if kind == BackendType.OPENVINO:
        from scap_nncf.algorithms.backends import openvino as openvino_backend

        return openvino_backend
    msg = (
        f"Activation sparsity supports PyTorch modules and OpenVINO models, got {type(model).__name__}"
        f"{'' if kind is None else f' ({kind.value})'}."
    )
    raise nncf.UnsupportedBackendError(msg)


def is_optimum_model(model: Any) -> bool:
    """Whether this is a model object of Optimum-Intel, which holds OpenVINO models; without importing it."""
    modules = {kind.__module__ for kind in type(model).__mro__}
    return any(name.startswith("optimum.intel.openvino") for name in modules) and hasattr(model, "ov_models")
