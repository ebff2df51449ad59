# SPDX-License-Identifier: Apache-2.0
"""Weights of layers in an OpenVINO graph, and their column sums for the bias b + η·W (SCAP paper, equation 6)."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as opset

from scap_nncf.algorithms.backends.openvino.feed import compile_exact
from scap_nncf.algorithms.backends.openvino.layers import Call, find_layers, ir_of, scale_of


def column_sums(call: Call, in_features: int) -> np.ndarray[Any, Any]:
    """
    ``sum over input channels of W[:, n]``: what the layer adds for an input of ones.

    :return: float32 [out_features].
    """
    return product(call, in_features, np.ones((1, in_features), dtype=np.float32))[0]


def dense_weight(model: Any, name: str) -> np.ndarray[Any, Any]:
    """The weights that a layer computes with, whatever their format: float32 [in_features, out_features]."""
    layer = next(layer for layer in find_layers(ir_of(model))[0] if layer.name == name)
    return product(layer.calls[0], layer.in_features, np.eye(layer.in_features, dtype=np.float32))


def product(call: Call, in_features: int, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """
    ``rows @ W``.

    The weights are those of the graph after decompression, whatever their format: the product is run with the graph's
    own constants. A scale that AWQ or SmoothQuant put before the product counts as part of the layer.

    :param rows: float32 [n, in_features].
    :return: float32 [n, out_features].
    """
    # a parameter, although the rows would do as a constant: constant u8 sub-graphs are folded by a path that crashes
    given = rows if call.weight_port == 1 else np.ascontiguousarray(rows.T)
    parameter = opset.parameter(list(given.shape), np.float32, name="rows")
    activation: Any = parameter
    for scale in (scale_of(node) for node in call.chain):
        if scale is None:  # a view, or a quantiser: its range is that of activations, not of these rows
            continue
        activation = opset.multiply(activation, opset.convert(scale, "f32"))
    weight = call.node.input_value(call.weight_port)
    if weight.get_element_type() != ov.Type.f32:
        weight = opset.convert(weight, "f32").output(0)
    attributes = call.node.get_attributes()
    operands = (activation, weight) if call.weight_port == 1 else (weight, activation)
    result = opset.matmul(*operands, attributes["transpose_a"], attributes["transpose_b"])
    compiled = compile_exact(ov.Model([opset.result(result)], [parameter], "product"))
    (values,) = compiled([np.ascontiguousarray(given, dtype=np.float32)]).values()
    values = np.asarray(values, dtype=np.float32)
    values = values.reshape(values.shape[-2:])
    return values if call.weight_port == 1 else np.ascontiguousarray(values.T)
