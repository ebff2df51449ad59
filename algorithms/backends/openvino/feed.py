# SPDX-License-Identifier: Apache-2.0
"""Feeding an OpenVINO model with whatever a calibration sample is."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import nncf
import numpy as np
import openvino as ov

# What tokenizers return besides the inputs of most models; dropped without a word where the model has no such input.
_TOKENIZER_EXTRAS = ("token_type_ids", "special_tokens_mask", "offset_mapping", "length")


@lru_cache(maxsize=1)
def core() -> ov.Core:
    """One OpenVINO core for all calibrations of the process."""
    return ov.Core()


def compile_exact(model: ov.Model) -> ov.CompiledModel:
    """Compile for the CPU in float32 without dynamic quantisation: what PyTorch would compute."""
    config = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "KV_CACHE_PRECISION": "f32"}
    return core().compile_model(model, "CPU", config)


def input_names(model: ov.Model) -> list[str]:
    """One name of each input, in order."""
    return [item.get_any_name() if item.get_names() else item.get_node().get_friendly_name() for item in model.inputs]


def feed(model: ov.Model, sample: Any, what: str) -> dict[str, np.ndarray[Any, Any]]:
    """
    A sample as arrays by input name. What a sequence model needs besides ``input_ids`` (or ``inputs_embeds``) is filled
    in: attention mask, position and token type ids, ``beam_idx`` and an empty cache.

    :param sample: a mapping of input names, a tuple or list in the order of the inputs, or one tensor.
    :param what: how to name the sample in messages.
    :raises nncf.ValidationError: a wrong or missing name, or a wrong shape; the message says what is expected.
    """
    expected = input_names(model)
    if not isinstance(sample, Mapping):
        values = sample if isinstance(sample, (tuple, list)) else [sample]
        if len(values) > len(expected):
            msg = f"{what} has {len(values)} tensors, but the model has {len(expected)} inputs: {_listed(model)}."
            raise nncf.ValidationError(msg)
        sample = dict(zip(expected, values))
    known = {name: expected[index] for index, item in enumerate(model.inputs) for name in item.get_names()}
    known.update({name: name for name in expected})
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for key, value in sample.items():
        if key in known:
            arrays[known[key]] = _to_array(value, f"{key} of {what}")
        elif key not in _TOKENIZER_EXTRAS:
            msg = f"{what} has {key!r}, which is no input of the model. Its inputs are: {_listed(model)}."
            raise nncf.ValidationError(msg)
    items = dict(zip(expected, model.inputs))
    arrays = {name: _fit(array, items[name], name, what) for name, array in arrays.items()}
    _fill_in(model, arrays)
    missing = [name for name in expected if name not in arrays]
    if missing:
        msg = (
            f"{what} does not feed {', '.join(missing)}; it has {', '.join(map(str, sample)) or 'nothing'}. "
            f"The model's inputs are: {_listed(model)}."
        )
        raise nncf.ValidationError(msg)
    return {name: _fit(arrays[name], items[name], name, what) for name in expected}


def attention_mask(arrays: Mapping[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any] | None:
    """The mask [B, T] of a fed sample, if it has one and masks something out."""
    mask = arrays.get("attention_mask")
    if mask is None or mask.ndim != 2 or bool((mask != 0).all()):
        return None
    return mask != 0


def _fill_in(model: ov.Model, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    tokens = arrays.get("input_ids", arrays.get("inputs_embeds"))
    if tokens is None or tokens.ndim < 2:
        return
    batch, length = tokens.shape[:2]
    mask = arrays.get("attention_mask", np.ones((batch, length), dtype=np.int64))
    positions = np.where(mask != 0, np.cumsum(mask, axis=-1) - 1, 1)[:, -length:]  # as transformers counts them
    known: dict[str, np.ndarray[Any, Any]] = {
        "attention_mask": mask,
        "position_ids": positions,
        "token_type_ids": np.zeros((batch, length), dtype=np.int64),
        "beam_idx": np.arange(batch, dtype=np.int32),
        "cache_position": np.arange(length, dtype=np.int64),
    }
    for item, name in zip(model.inputs, input_names(model)):
        if name in arrays:
            continue
        if name in known:
            arrays[name] = known[name]
        elif name.startswith("past_key_values"):
            # an empty cache: [B, heads, 0, head size], whatever the order of the dimensions
            shape = [d.get_length() if d.is_static else 0 for d in item.get_partial_shape()]
            arrays[name] = np.zeros([batch, *shape[1:]], dtype=np.float32)


def _to_array(value: Any, what: str) -> np.ndarray[Any, Any]:
    if hasattr(value, "detach"):  # a torch tensor; half types have no NumPy form
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
        return np.asarray(value.numpy())
    if isinstance(value, ov.Tensor):
        return np.asarray(value.data)
    array = np.asarray(value)
    if array.dtype == object or array.dtype.kind in "US":
        msg = f"{what} is {type(value).__name__}, expected a tensor or an array of numbers."
        raise nncf.ValidationError(msg)
    return array


def _fit(array: np.ndarray[Any, Any], item: Any, name: str, what: str) -> np.ndarray[Any, Any]:
    if not item.get_partial_shape().compatible(ov.PartialShape(list(array.shape))):
        msg = f"{name} of {what} has shape {list(array.shape)}, the model expects {_shape(item)}."
        raise nncf.ValidationError(msg)
    element = item.get_element_type()
    if element.is_integral() and array.dtype.kind == "f":
        msg = f"{name} of {what} is {array.dtype}, the model expects {element.get_type_name()}."
        raise nncf.ValidationError(msg)
    if element == ov.Type.bf16:
        return array.astype(np.float32)  # converted by the runtime
    return np.ascontiguousarray(array, dtype=element.to_dtype())


def _listed(model: ov.Model) -> str:
    return ", ".join(
        f"{name} {item.get_element_type().get_type_name()} {_shape(item)}"
        for name, item in zip(input_names(model), model.inputs)
    )


def _shape(item: Any) -> str:
    return str(item.get_partial_shape().to_string())
