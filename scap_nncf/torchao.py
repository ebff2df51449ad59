# SPDX-License-Identifier: Apache-2.0
"""
Activation sparsity as a workflow of torchao.

.. code-block:: python

    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    from scap_nncf.torchao import ScapConfig

    quantize_(model, Int8WeightOnlyConfig())
    quantize_(model, ScapConfig(plan="plan"))
    scap_nncf.get_controller(model)
"""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass
from typing import Any

import nncf
from torch import nn

from scap_nncf.algorithms.plan import Plan
from scap_nncf.algorithms.scap.controller import get_controller
from scap_nncf.compress import compress
from scap_nncf.extras import require

_config = require("torchao.core.config", "torchao", "ScapConfig")
_transform = require("torchao.quantization.transform_module", "torchao", "ScapConfig")


@dataclass
class ScapConfig(_config.AOBaseConfig):  # type: ignore[name-defined, misc]
    """
    Apply a plan with ``torchao.quantization.quantize_``, after the weights were quantised.

    The plan says by name which layers are pruned, so it is applied to the model as a whole, at the first layer that the
    ``filter_fn`` of ``quantize_`` lets through; the filter selects nothing beyond that.

    :param plan: a plan, or the folder or file of one (see :func:`scap_nncf.compress`).
    :raises nncf.ValidationError: when applied: the plan does not fit the model, or the model is sparse already.
    """

    plan: Plan | str | os.PathLike[str]

    def __post_init__(self) -> None:
        if not isinstance(self.plan, (Plan, str, os.PathLike)):
            msg = f"plan must be a Plan, or the path of one, got {type(self.plan).__name__}."
            raise nncf.ValidationError(msg)
        self._done: Any = None  # the model of the call that goes on


@_transform.register_quantize_module_handler(ScapConfig)
def _apply(module: nn.Module, config: ScapConfig) -> nn.Module:
    model = _model_of_call(module)
    if config._done is not model or get_controller(model) is None:
        compress(model, plan=config.plan)
        config._done = model
    return module


def _model_of_call(module: nn.Module) -> nn.Module:
    """The model that ``quantize_`` was called with; a handler is given single modules without their names."""
    quantize = require("torchao.quantization", "torchao", "ScapConfig").quantize_
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is quantize.__code__:
            return frame.f_locals["model"]
        frame = frame.f_back
    return module  # the handler was called by itself, on a model
