# SPDX-License-Identifier: Apache-2.0
"""Column sums of weights in an OpenVINO graph, for the fused bias b + η·W of mode centring (SCAP paper, equation 6)."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as opset

from scap_nncf.algorithms.backends.openvino.feed import compile_exact
from scap_nncf.algorithms.backends.openvino.layers import Call, scale_of


def column_sums(call: Call, in_features: int) -> np.ndarray[Any, Any]:
    """
    ``sum over input channels of W[:, n]``: what the layer adds for an input of ones.

    The weights are those of the graph after decompression, whatever their format: the product is run on a vector of
    ones, with the graph's own constants. A scale that AWQ or SmoothQuant put before the product counts as part of the
    layer.

    :return: float32 [out_features].
    """
    # a parameter, although ones would do as a constant: constant u8 sub-graphs are folded by a path that crashes
    shape = [1, in_features] if call.weight_port == 1 else [in_features, 1]
    ones = opset.parameter(shape, np.float32, name="ones")
    activation: Any = ones
    for scale in (scale_of(node) for node in call.chain):
        if scale is None:  # a view, or a quantiser: its range is that of activations, not of ones
            continue
        activation = opset.multiply(activation, opset.convert(scale, "f32"))
    weight = call.node.input_value(call.weight_port)
    if weight.get_element_type() != ov.Type.f32:
        weight = opset.convert(weight, "f32").output(0)
    attributes = call.node.get_attributes()
    operands = (activation, weight) if call.weight_port == 1 else (weight, activation)
    product = opset.matmul(*operands, attributes["transpose_a"], attributes["transpose_b"])
    compiled = compile_exact(ov.Model([opset.result(product)], [ones], "column_sums"))
    (result,) = compiled([np.ones(shape, dtype=np.float32)]).values()
    return np.asarray(result, dtype=np.float32).reshape(-1)
