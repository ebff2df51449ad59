# SPDX-License-Identifier: Apache-2.0
"""Realised sparsity of a pruned OpenVINO model, measured on data. A graph does not count by itself: that would cost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import nncf
import numpy as np
import openvino as ov
from openvino import opset13 as opset

from scap_nncf.algorithms.backends.openvino.collect import EMPTY_DATASET
from scap_nncf.algorithms.backends.openvino.feed import attention_mask, compile_exact, feed
from scap_nncf.algorithms.backends.openvino.layers import find_layers, ir_of, pruner_of
from scap_nncf.algorithms.backends.openvino.prune import require_pruned, store_counts


def measure(model: Any, samples: Iterable[Any]) -> dict[str, tuple[int, int]]:
    """
    Zeros and values at the input of each pruned layer over the samples, padding left out.

    A model that prunes while decoding only is run token by token; else each sample is run at once, as a prompt.
    Outputs that count are added to a clone; the model itself stays as it is, but remembers the result for
    ``controller.statistics()``.

    :return: layer name → (zeros, values).
    :raises nncf.ValidationError: the model is dense or switched off, or a sample does not fit.
    """
    graph = ir_of(model)
    plan = require_pruned(graph)
    clone, outputs = _with_counters(graph)
    request = compile_exact(clone).create_infer_request()
    stateful = bool(graph.get_sinks())
    one_by_one = plan.prune == "decode" and stateful
    totals = {name: np.zeros(2, dtype=np.int64) for name, _, _ in outputs}
    number = 0
    for number, sample in enumerate(samples, 1):
        if stateful:
            request.reset_state()
        arrays = feed(graph, sample, f"sample {number - 1}")
        for step in _steps(arrays) if one_by_one else [arrays]:
            mask = attention_mask(step)
            request.infer(step, share_inputs=True)
            for name, index, width in outputs:
                zeros = request.get_output_tensor(index).data  # float32, zeros of each position
                kept = mask is not None and mask[:, -1:].size == zeros.size
                rows = np.ones(zeros.shape, dtype=bool)
                if mask is not None and mask.size == zeros.size:
                    rows = mask.reshape(zeros.shape)
                elif kept:  # one position of a masked sample, token by token
                    rows = mask[:, -1:].reshape(zeros.shape)  # type: ignore[index]
                totals[name] += (int(zeros[rows].sum(dtype=np.float64)), int(rows.sum()) * width)
    if number == 0:
        raise nncf.ValidationError(EMPTY_DATASET)
    counted = {name: (int(zeros), int(values)) for name, (zeros, values) in totals.items()}
    store_counts(model, counted)
    return counted


def _with_counters(graph: ov.Model) -> tuple[ov.Model, list[tuple[str, int, int]]]:
    """A clone whose only outputs are zeros per position; and layer name, output index, width of each pruned layer."""
    clone = graph.clone()
    results: list[Any] = []
    by_pruner: dict[str, int] = {}
    outputs = []
    for layer in find_layers(clone)[0]:
        for call in layer.calls:
            node = pruner_of(call)
            if node is None:
                continue
            source, pruner = node.output(0), node.get_name()
            if pruner not in by_pruner:
                by_pruner[pruner] = len(results)
                zero = opset.constant(np.array(0), source.get_element_type())
                is_zero = opset.convert(opset.equal(source, zero), "f32")
                axis = opset.constant(np.array([call.channel_axis]), ov.Type.i64)
                results.append(opset.result(opset.reduce_sum(is_zero, axis, False)))
            outputs.append((layer.name, by_pruner[pruner], layer.in_features))
    return ov.Model(results, clone.get_sinks(), clone.get_parameters(), "counters"), outputs


def _steps(arrays: dict[str, np.ndarray[Any, Any]]) -> Iterable[dict[str, np.ndarray[Any, Any]]]:
    """A sample of T tokens as T samples of one, each with the mask up to its token."""
    length = arrays["input_ids" if "input_ids" in arrays else "inputs_embeds"].shape[1]
    for token in range(length):
        step = {}
        for name, value in arrays.items():
            if name == "attention_mask":
                step[name] = np.ascontiguousarray(value[:, : token + 1])
            elif name != "beam_idx" and value.ndim >= 2 and value.shape[1] == length:
                step[name] = np.ascontiguousarray(value[:, token : token + 1])
            else:
                step[name] = value
        yield step
