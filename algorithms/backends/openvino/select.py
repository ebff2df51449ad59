# SPDX-License-Identifier: Apache-2.0
"""
N:M selection and error mitigation as standard operations of an OpenVINO graph.

The definition is :func:`scap_nncf.kernels.reference.mitigated_fc`. Ties are kept as there: a stable TopK takes the
lower index first. NaN is not treated: what TopK does with it is not defined.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import nncf
import numpy as np
import openvino as ov
from openvino import opset13 as opset

from scap_nncf.algorithms.plan import LayerPlan, SitePlan, Vector

HALF = (ov.Type.f16, ov.Type.bf16)


@dataclass(frozen=True)
class Selection:
    """What happens to a layer's input; equal ones on one tensor are made once. Vectors are bytes of float32."""

    mode: float
    threshold: float
    pattern: tuple[int, int] | None = None
    token_shift: str | None = None
    variance: bool = False
    shift: bytes | None = None
    score: bytes | None = None

    @property
    def is_plain(self) -> bool:
        """A threshold and a scalar mode."""
        return self == Selection(self.mode, self.threshold)


def selection_of(site: SitePlan, layer: LayerPlan, vectors: dict[str, Vector]) -> Selection | None:
    """None where the layer's input stays as it is."""
    if not layer.prunes:
        return None
    shift, score = vectors.get("shift"), vectors.get("score")
    if score is not None and layer.pattern is None:
        msg = f"{layer.name} compares scores with its threshold, which OpenVINO graphs do not do; use plain magnitudes."
        raise nncf.ParameterNotSupportedError(msg)
    return Selection(
        site.mode if shift is None else 0.0,
        layer.threshold,
        layer.pattern,
        layer.token_shift,
        layer.variance,
        None if shift is None else shift.tobytes(),
        None if score is None else score.tobytes(),
    )


@dataclass(frozen=True)
class Selected:
    """
    Nodes of a selection.

    :param pruned: what the layer reads, in the type of the activation.
    :param dropped: u − z, wide.
    :param mu: the token's own shift, wide, or None.
    """

    pruned: ov.Node
    dropped: ov.Node | None = None
    mu: ov.Node | None = None


def make_selected(
    source: Any, width: int, axis: int, selection: Selection, flag: ov.Node | None, name: Callable[[str], str]
) -> Selected:
    """
    :param source: the activation, rank known.
    :param width: channels.
    :param axis: of the channels, -1 or -2.
    :param flag: a boolean scalar, False where tokens stay dense; None where all are pruned.
    :param name: kind → friendly name. Input 0 of every node (2 of a Select) leads back to the source.
    """
    element = source.get_element_type()
    wide_type = ov.Type.f64 if element == ov.Type.f64 else ov.Type.f32
    shape = (-1,) if axis == -1 else (-1, 1)

    def number(value: float, kind: str) -> ov.Node:
        return opset.constant(np.array(value), wide_type, name=name(kind))

    def active(node: Any, kind: str) -> Any:
        """The node where tokens are pruned, zero where they stay dense."""
        if flag is None:
            return node
        return opset.multiply(node, opset.convert(flag, wide_type, name=name(f"{kind}.flag")), name=name(f"{kind}.on"))

    u: Any = opset.convert(source, wide_type, name=name("wide")) if element in HALF else source
    if selection.shift is not None:
        vector = np.frombuffer(selection.shift, dtype=np.float32).reshape(shape)
        constant = opset.constant(vector, wide_type, name=name("vector.shift"))
        u = opset.subtract(u, active(constant, "shift"), name=name("centred"))
    elif selection.mode != 0.0:
        u = opset.subtract(u, active(number(selection.mode, "mode"), "mode"), name=name("centred"))
    mu = None
    if selection.token_shift is not None:
        mu = active(_token_shift(u, width, axis, selection.token_shift, name), "token")
        u = opset.subtract(u, mu, name=name("token_centred"))
    magnitude: Any = opset.abs(u, name=name("magnitude"))
    if selection.pattern is None:
        limit: Any = number(selection.threshold, "threshold")
        if flag is not None:
            limit = opset.select(flag, limit, number(-1.0, "nothing"), name=name("limit"))
        is_dropped = opset.less_equal(magnitude, limit, name=name("is_dropped"))
    else:
        if selection.score is not None:
            vector = np.frombuffer(selection.score, dtype=np.float32).reshape(shape)
            constant = opset.constant(vector, wide_type, name=name("vector.score"))
            magnitude = opset.multiply(magnitude, constant, name=name("score"))
        is_dropped = _not_among_the_largest(magnitude, width, axis, *selection.pattern, name)
        if flag is not None:
            is_dropped = opset.logical_and(is_dropped, flag, name=name("is_dropped_now"))
    z: Any = opset.select(is_dropped, number(0.0, "zero"), u, name=name("kept"))
    dropped = opset.subtract(u, z, name=name("dropped_part"))
    if selection.variance:
        z = opset.multiply(z, _variance_factor(u, z, axis, wide_type, name), name=name("rescaled"))
    if element in HALF:
        return Selected(opset.convert(z, element, name=name("pruned")), dropped, mu)
    z.set_friendly_name(name("pruned"))
    return Selected(z, dropped, mu)


def _axes(axis: int) -> ov.Node:
    return opset.constant(np.array([axis]), ov.Type.i64)


def _token_shift(u: Any, width: int, axis: int, kind: str, name: Callable[[str], str]) -> ov.Node:
    if kind == "mean":
        return opset.reduce_mean(u, _axes(axis), True, name=name("token_mean"))
    # of an even number the lower one: the largest of the smaller half
    half = opset.constant(np.array((width - 1) // 2 + 1), ov.Type.i64)
    smaller = opset.topk(u, half, axis, "min", "value", index_element_type="i32", name=name("smaller_half"))
    return opset.reduce_max(smaller.output(0), _axes(axis), True, name=name("token_median"))


def _not_among_the_largest(
    magnitude: Any, width: int, axis: int, n: int, m: int, name: Callable[[str], str]
) -> ov.Node:
    """Boolean of the shape of `magnitude`: not one of the n largest of its group of m."""
    groups = magnitude
    rank = magnitude.output(0).get_partial_shape().rank.get_length()
    before = [0] * (rank + axis)  # 0 keeps the size of that axis
    if m != width:
        sizes = [*before, width // m, m] if axis == -1 else [*before, width // m, m, -1]
        groups = opset.reshape(groups, opset.constant(np.array(sizes), ov.Type.i64), True, name=name("groups"))
    count = opset.constant(np.array(n), ov.Type.i64)
    largest = opset.topk(
        groups, count, axis, "max", "value", index_element_type="i32", stable=True, name=name("largest")
    )
    indices = largest.output(1)
    zeros = opset.broadcast(opset.constant(np.array(0), ov.Type.i32), opset.shape_of(groups), name=name("zeros"))
    ones = opset.broadcast(opset.constant(np.array(1), ov.Type.i32), opset.shape_of(indices), name=name("ones"))
    at = opset.constant(np.array(axis), ov.Type.i64)
    kept: Any = opset.scatter_elements_update(zeros, indices, ones, at, name=name("is_kept"))
    if m != width:
        sizes = [*before, width] if axis == -1 else [*before, width, -1]
        kept = opset.reshape(kept, opset.constant(np.array(sizes), ov.Type.i64), True, name=name("channels"))
    return opset.equal(kept, opset.constant(np.array(0), ov.Type.i32), name=name("is_dropped"))


def _variance_factor(u: Any, z: Any, axis: int, wide_type: ov.Type, name: Callable[[str], str]) -> ov.Node:
    def variance(x: Any, kind: str) -> ov.Node:
        mean = opset.reduce_mean(x, _axes(axis), True, name=name(f"{kind}.mean"))
        away = opset.subtract(x, mean, name=name(f"{kind}.away"))
        return opset.reduce_mean(opset.multiply(away, away), _axes(axis), True, name=name(f"{kind}.variance"))

    one = opset.constant(np.array(1.0), wide_type)
    zero = opset.constant(np.array(0.0), wide_type)
    before, after = variance(u, "before"), variance(z, "after")
    usable = opset.greater(after, zero, name=name("varies"))
    ratio = opset.divide(before, opset.select(usable, after, one), name=name("ratio"))
    return opset.sqrt(opset.select(usable, ratio, one), name=name("factor"))
