# SPDX-License-Identifier: Apache-2.0
"""
Deployment of OpenVINO models on CPUs: the operation that skips weights, in the graph and where a graph is loaded.
"""

from __future__ import annotations

import os
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from nncf.common.logging import nncf_logger

from scap_nncf.extras import require
from scap_nncf.kernels.cpu.build import BuildError

#: Least sparsity of a layer from which skipping pays, by storage format: where the operation meets the fastest stock
#: setting in the measurements of docs/cpu-operation.md, rounded up.
CROSSOVER = {"f32": 0.2, "f16": 0.2, "bf16": 0.2, "u8": 0.2, "i8": 0.2, "u4": 0.25, "i4": 0.25}

_OPERATION = b'type="ScapSparseFC"'


def deploy_ir(model: Any, min_sparsity: float | None = None) -> Any:
    """
    Replace simulated pruning by the operation, in place, where it pays; see :func:`scap_nncf.deploy`.

    :param min_sparsity: least sparsity of a layer; None takes what was measured.
    """
    require("openvino", "openvino", "deploying OpenVINO models")
    from scap_nncf.algorithms.backends.openvino import sparse_op
    from scap_nncf.kernels.openvino import operation

    try:
        operation.extension()
    except BuildError as error:
        _warn_stock(str(error))
        return model
    crossover = CROSSOVER if min_sparsity is None else dict.fromkeys(CROSSOVER, min_sparsity)
    done = sparse_op.rewrite(model, crossover)
    if done.left:
        reasons = Counter(done.left.values())
        text = "; ".join(
            f"{next(name for name, why in done.left.items() if why == reason)}"
            f"{f' and {count - 1} more' if count > 1 else ''}: {reason}"
            for reason, count in reasons.items()
        )
        nncf_logger.warning(f"deploy: {len(done.left)} layers stay simulated. {text}.")
    _add_to_optimum(model)
    _changed(model)
    return model


def undeploy_ir(model: Any) -> Any:
    """Make the simulated graph again, in place; see :func:`scap_nncf.undeploy`."""
    from scap_nncf.algorithms.backends.openvino import sparse_op

    sparse_op.restore(model)
    _changed(model)
    return model


def openvino_extension() -> Path:
    """
    The compiled extension that runs deployed models, built at first use.

    .. code-block:: python

        core.add_extension(scap_nncf.openvino_extension())
        openvino_genai.LLMPipeline(folder, "CPU", extensions=[str(scap_nncf.openvino_extension())])

    ``scap_nncf.load_openvino`` and ``scap_nncf.optimum.from_pretrained`` add it by themselves.

    :raises BuildError: it is not there and cannot be built; the message says why.
    :raises MissingExtraError: openvino is not installed.
    """
    require("openvino", "openvino", "the OpenVINO extension")
    from scap_nncf.kernels.openvino import operation

    return operation.extension()


def holds_operation(file: str | os.PathLike[str]) -> bool:
    """Whether the XML of a model has the operation."""
    path = Path(file)
    return path.is_file() and _OPERATION in path.read_bytes()


def teach(core: Any) -> bool:
    """
    Make a core read models that have the operation. Where the extension cannot be built, they can be read only:
    :func:`stock_if_untaught` then gives the stock graph.

    :return: whether they run as well.
    """
    from scap_nncf.kernels.openvino import operation

    try:
        extension: Any = str(operation.extension())
    except BuildError as error:
        _warn_stock(str(error))
        core.add_extension(_reader())
        return False
    if not _is_taught(core):
        core.add_extension(extension)
        _TAUGHT.append(core)
    return True


def stock_if_untaught(model: Any, runs: bool) -> None:
    """The simulated graph in place of the operation, where it cannot run."""
    if not runs:
        undeploy_ir(model)


_TAUGHT: list[Any] = []


def _is_taught(core: Any) -> bool:
    return any(known is core for known in _TAUGHT)


@cache
def _reader() -> Any:
    from scap_nncf.kernels.openvino import operation

    return operation.reader()


@cache
def _warn_stock(reason: str) -> None:
    nncf_logger.warning(f"The CPU operation is not to be had, the stock graph runs: {reason}.")


def _add_to_optimum(model: Any) -> None:
    """Optimum saves, clones and compiles with a core of its own."""
    if hasattr(model, "ov_models"):
        from optimum.intel.openvino.modeling_base import core

        teach(core)


def _changed(model: Any) -> None:
    if hasattr(model, "clear_requests"):
        model.clear_requests()
