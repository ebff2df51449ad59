# SPDX-License-Identifier: Apache-2.0
"""From a sparse PyTorch model to a folder with OpenVINO IR."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import nncf
import torch
from nncf.common.logging import nncf_logger
from torch import nn

from scap_nncf.algorithms.backends.torch.experts import expert_layers
from scap_nncf.algorithms.backends.torch.prune import expert_pruners
from scap_nncf.algorithms.plan import Plan
from scap_nncf.algorithms.scap.calibration import CalibrationStatistics
from scap_nncf.algorithms.scap.controller import ScapController, get_controller
from scap_nncf.extras import require
from scap_nncf.openvino_io import MODEL_FILE
from scap_nncf.storage import new_folder

_PURPOSE = "exporting to OpenVINO"


def export_openvino(
    model: nn.Module,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    task: str | None = None,
    *,
    compress_to_fp16: bool = False,
    overwrite: bool = False,
) -> Path:
    """
    Export a PyTorch model, sparse or dense, quantised or not, through Optimum-Intel.

    .. code-block:: python

        model = nncf.compress(model, algorithm="scap", dataset=dataset, sparsity=0.4)
        scap_nncf.export_openvino(model, "smollm2-ov", tokenizer=tokenizer)
        OVModelForCausalLM.from_pretrained("smollm2-ov").generate(...)

    The folder holds what Optimum writes (a stateful model with its KV cache for text generation, configuration,
    tokenizer, and tokenizer models for openvino-tokenizers), and ``plan.json`` with the calibration statistics. The
    plan is in the IR as well, so that ``scap_nncf.get_controller`` works on the model that is read from it.

    The dense graph is exported (pruning switched off), and the pruners are inserted into the IR afterwards. Hooks could
    be traced too, but then every layer would get a pruner of its own, the graph could not be told from hand-written
    code (so no strip, no new sparsity), η·W would be that of the weights before they are stored, and no constant of
    the pruners could be kept in float32 where the weights go to float16.

    Fused experts of a mixture of experts are the exception: their pruning is traced with the model, since the IR has no
    layer of its own for one expert. The plan in the IR covers the other layers.

    The model is not changed; it may be on any device.

    :param model: a transformers model (or what else Optimum exports), on which ``nncf.compress`` was run.
    :param folder: where to write; it must not exist or be empty. It appears only when it is complete.
    :param tokenizer: a tokenizer, processor or image processor to save with the model, or a list of these.
    :param task: Optimum's name of the task, such as ``text-generation-with-past``, ``feature-extraction`` or
        ``image-classification``; None finds it from the class of the model.
    :param compress_to_fp16: store float32 weights as float16. Weights in other formats are stored as they are.
    :param overwrite: replace a folder that this package wrote.
    :return: the folder.
    :raises nncf.ValidationError: the folder is not empty or cannot be written, or the plan does not fit the IR.
    :raises nncf.UnsupportedModelError: Optimum cannot export the model, or the plan fits not what it exports.
    :raises nncf.ParameterNotSupportedError: the plan is one of CATS.
    :raises MissingExtraError: optimum-intel is not installed.
    """
    require("optimum.intel", "optimum", _PURPOSE)
    from scap_nncf.algorithms.backends.openvino.prune import check_plan

    if not isinstance(model, nn.Module):
        msg = f"export_openvino takes a PyTorch model, got {type(model).__name__}; save_openvino takes OpenVINO models."
        raise nncf.ValidationError(msg)
    given = tokenizer if isinstance(tokenizer, (list, tuple)) else [tokenizer]
    preprocessors = [copy.deepcopy(item) for item in given if item is not None]  # the export sets the padding side
    controller = get_controller(model)
    if controller is not None:
        check_plan(controller.plan)  # not after minutes of export
    with new_folder(folder, overwrite) as partial:
        with controller.disabled() if controller is not None else nullcontext(), _experts_traced(model):
            task = _export_dense(model, partial, preprocessors, task, compress_to_fp16)
        gc.collect()  # the traced graph holds a copy of the weights
        if controller is not None:
            _check_scales(model, controller.plan, partial)
            plan, calibration = _without_experts(model, controller.plan, controller.calibration)
            insert_into_folder(partial, plan, calibration)
    return Path(folder)


@contextmanager
def _experts_traced(model: nn.Module) -> Iterator[None]:
    """
    Keep the pruning of fused experts on while the model is traced.

    :raises nncf.UnsupportedModelError: the export has replaced their forward, so the IR would be dense there.
    """
    pruners = list(expert_pruners(model))
    for pruner in pruners:
        pruner.enabled, pruner.traced = True, False
    yield
    untraced = [pruner.module_name for pruner in pruners if not pruner.traced]
    if untraced:
        msg = (
            f"Optimum-Intel exports {type(model).__name__} with a forward of its own for {untraced[0]}, which does not "
            "prune. Leave the experts dense: sparsity={'attn': ...}, or a plan without them."
        )
        raise nncf.UnsupportedModelError(msg)


def _without_experts(
    model: nn.Module, plan: Plan, calibration: CalibrationStatistics | None
) -> tuple[Plan, CalibrationStatistics | None]:
    """What is left to insert into an IR in whose graph fused experts are pruned already."""
    fused = expert_layers(model)
    inside = [layer.name for layer in plan.layers if layer.name in fused]
    if not inside:
        return plan, calibration
    made_by = {**plan.made_by, "expert_layers_in_graph": len(inside)}
    plan = replace(plan, sites=tuple(site for site in plan.sites if site.name not in fused), made_by=made_by)
    if calibration is not None:
        sites = tuple(site for site in calibration.sites if site.name not in fused)
        histograms = {site.name: calibration.histograms[site.name] for site in sites}
        calibration = replace(calibration, sites=sites, histograms=histograms, costs=None)
    return plan, calibration


def insert_into_folder(folder: Path, plan: Plan, calibration: CalibrationStatistics | None = None) -> None:
    """
    Put the pruning of a plan into the dense IR of a folder, and the plan beside it.

    :param folder: has ``openvino_model.xml``; its IR is replaced.
    :raises nncf.ParameterNotSupportedError: the model was exported in several parts.
    :raises nncf.ValidationError: the plan does not fit.
    """
    import openvino

    from scap_nncf.algorithms.backends import openvino as backend
    from scap_nncf.algorithms.backends.openvino.feed import core

    if not (folder / MODEL_FILE).is_file():
        parts = sorted(path.name for path in folder.glob("openvino_*.xml"))
        msg = (
            f"The model is exported in parts ({', '.join(parts)}); pruning is put into models of one part only. "
            "Export the dense model and calibrate each part: nncf.compress(openvino.Core().read_model(part), ...)."
        )
        raise nncf.ParameterNotSupportedError(msg)
    ir = core().read_model(folder / MODEL_FILE)
    backend.insert(ir, plan.bind(backend.shapes_of(ir)))
    openvino.save_model(ir, folder / "sparse.xml", compress_to_fp16=False)
    del ir
    gc.collect()  # the weights are mapped from the file that goes
    for suffix in (".xml", ".bin"):
        (folder / f"sparse{suffix}").replace((folder / MODEL_FILE).with_suffix(suffix))
    ScapController(None, plan, calibration).save(folder)


def _check_scales(model: nn.Module, plan: Plan, folder: Path) -> None:
    """
    SmoothQuant and AWQ multiply the input of layers, and thresholds are those of the input before that. OpenVINO fuses
    such a factor with a layer norm before it, and then the graph no longer has that input.

    :raises nncf.UnsupportedModelError: that has happened to a layer that is pruned.
    """
    from scap_nncf.algorithms.backends.openvino.feed import core
    from scap_nncf.algorithms.backends.openvino.layers import find_layers, scale_of
    from scap_nncf.algorithms.backends.torch.function_hooks import resolve

    pruned = {layer.name for layer in plan.layers if layer.threshold >= 0}
    scaled = pruned & set(resolve(model))
    if not scaled or not (folder / MODEL_FILE).is_file():
        return
    lost = [
        layer.name
        for layer in find_layers(core().read_model(folder / MODEL_FILE))[0]
        if layer.name in scaled and not any(scale_of(node) is not None for node in layer.calls[0].chain)
    ]
    if lost:
        msg = (
            f"The export fuses the factors of SmoothQuant or AWQ into the layer norms before {len(lost)} layers, such "
            f"as {lost[0]}, so their thresholds fit nothing in the graph. Export the unquantised model, then quantise "
            "and prune the OpenVINO model: nncf.compress(ir, algorithm=[Quantization(), Scap(...)], dataset=dataset)."
        )
        raise nncf.UnsupportedModelError(msg)


def _export_dense(
    model: nn.Module, folder: Path, preprocessors: list[Any], task: str | None, compress_to_fp16: bool
) -> str | None:
    convert = require("optimum.exporters.openvino.convert", "optimum", _PURPOSE)
    from optimum.intel import OVConfig

    parameter = next(model.parameters(), None)
    half = parameter is not None and parameter.dtype in (torch.float16, torch.bfloat16)
    # an image or text processor that is not given is not searched for: that would ask the hub
    with _unchanged(model):
        if hasattr(model, "config") and not getattr(model.config, "architectures", None):
            # as save_pretrained does: it tells the task later
            model.config.architectures = [type(model).__name__]  # type: ignore[union-attr]
        try:
            convert.export_from_model(
                model,
                output=folder,
                task=task,
                ov_config=OVConfig(dtype="fp16") if compress_to_fp16 else None,
                preprocessors=preprocessors,
                device="cuda" if parameter is not None and parameter.device.type == "cuda" else "cpu",
                # half weights are kept, and activations are float32, as Optimum's command line does
                patch_16bit_model=half,
            )
        except (ValueError, RuntimeError, KeyError, AttributeError, TypeError, NotImplementedError) as error:
            msg = f"Optimum-Intel cannot export {type(model).__name__}: {type(error).__name__}: {error}"
            raise nncf.UnsupportedModelError(msg) from error
    _export_tokenizer(convert, preprocessors, folder, task)
    return task


def _export_tokenizer(convert: Any, preprocessors: list[Any], folder: Path, task: str | None) -> None:
    """Tokenizer models for openvino-tokenizers, where there is a tokenizer that it can convert."""
    from transformers import PreTrainedTokenizerBase

    tokenizer = next((item for item in preprocessors if isinstance(item, PreTrainedTokenizerBase)), None)
    if tokenizer is None:
        return
    require("openvino_tokenizers", "openvino", _PURPOSE)
    is_generator = (folder / "generation_config.json").is_file()
    convert.export_tokenizer(tokenizer, folder, task=task or ("text-generation" if is_generator else None))
    if not (folder / "openvino_tokenizer.xml").is_file():
        nncf_logger.warning(
            f"openvino-tokenizers cannot convert {type(tokenizer).__name__}: the folder has no openvino_tokenizer.xml; "
            "transformers can use the saved tokenizer."
        )


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """
    Undo what the export does to a model: it sets options of its configuration, leaves it in evaluation mode, and turns
    half-precision parameters into float32.
    """
    tensors: list[tuple[dict[str, Any], str, Any, torch.Tensor]] = [
        (store, name, tensor, tensor.data)  # type: ignore[misc]
        for module in model.modules()
        for store in (module._parameters, module._buffers)
        for name, tensor in store.items()
        if tensor is not None
    ]
    training = [module for module in model.modules() if module.training]
    settings = {id(item): (item, dict(item.__dict__)) for item in _configurations(model)}
    try:
        yield
    finally:
        for store, name, tensor, data in tensors:
            store[name] = tensor
            if tensor.data is not data:
                tensor.data = data
        for module in training:
            module.training = True
        for item, values in settings.values():
            item.__dict__.clear()
            item.__dict__.update(values)


def _configurations(model: nn.Module) -> list[Any]:
    found = [getattr(model, name, None) for name in ("config", "generation_config")]
    return [item for item in found if item is not None]
