# SPDX-License-Identifier: Apache-2.0
"""The last step of every builder: a plan goes into a model, and a controller is kept with it."""

from __future__ import annotations

from typing import Any

import nncf

from scap_nncf.algorithms.backends import backend_of
from scap_nncf.algorithms.base import controller_for
from scap_nncf.algorithms.plan import Plan
from scap_nncf.algorithms.quantization.config import describe


def insert_plan(model: Any, plan: Plan, calibration: Any = None) -> Any:
    """
    Insert a fitting plan into a model that has none.

    :param calibration: the statistics behind the plan, where they are at hand.
    :return: the compressed model: a PyTorch model itself, a copy of an OpenVINO model.
    """
    backend = backend_of(model)
    model = backend.working_copy(model)
    backend.insert(model, plan)
    backend.store_controller(model, controller_for(plan)(model, plan, calibration))
    return model


def refuse_sparse(model: Any) -> None:
    """
    :raises nncf.ValidationError: the model has activation sparsity.
    """
    if backend_of(model).stored_controller(model) is not None:
        msg = (
            "The model has activation sparsity already; pruning twice would stack. Change it with "
            "scap_nncf.get_controller(model).set_sparsity(...), or take it out first with .strip()."
        )
        raise nncf.ValidationError(msg)


def made_by(config: Any, samples: int) -> dict[str, Any]:
    """The record of how a plan was made."""
    from scap_nncf._version import __version__

    return {
        "scap_nncf": __version__,
        "nncf": nncf.__version__,
        "settings": describe(config),
        "samples": samples,
    }
