# SPDX-License-Identifier: Apache-2.0
"""
Between the simulated graph (pruners and matrix products) and the operation that skips weights, both ways.

The operation holds the stock weights byte for byte as constants of bytes, and a description of the nodes that it stands
for: :func:`restore` makes them again.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import nncf
import numpy as np
import openvino as ov
from openvino import opset13 as opset

from scap_nncf.algorithms.backends.openvino.layers import PRUNED, Call, FcLayer, find_layers, ir_of
from scap_nncf.algorithms.backends.openvino.prune import (
    DEPLOYED,
    attach,
    bias_port,
    decode_flag,
    detach,
    move_names,
    read_plan,
    require_pruned,
)
from scap_nncf.algorithms.backends.openvino.weights import column_sums
from scap_nncf.algorithms.plan import LayerPlan, Plan, SitePlan
from scap_nncf.kernels.openvino import operation
from scap_nncf.kernels.openvino.operation import Attributes, decimal, is_sparse_fc

_FLOATS = {ov.Type.f32: "f32", ov.Type.f16: "f16", ov.Type.bf16: "bf16"}
_INTEGERS = {ov.Type.u8: ("u8", 8), ov.Type.i8: ("i8", 8), ov.Type.u4: ("u4", 4), ov.Type.i4: ("i4", 4)}
_TYPES = {**{name: item for item, name in _FLOATS.items()}, **{name: item for item, (name, _) in _INTEGERS.items()}}

# A conversion with this mark is not folded into constants of twice the size; what stands under the key does not count.
_DECOMPRESSION = "decompression_0"


class CannotServe(Exception):
    """The operation cannot stand for a layer; the message says why."""


@dataclass
class Rewritten:
    """
    What :func:`rewrite` did.

    :param layers: names of the layers that the operation computes now.
    :param left: name → why a pruned layer stays as it is.
    """

    layers: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


@dataclass
class _Layer:
    """One layer on its way into the operation; constants as bytes."""

    plan: LayerPlan
    mode: float
    call: Call
    format: str
    group: int
    scale_type: str
    zero_bits: int
    transposed: bool
    weight: Any
    scale: Any
    zero: Any
    stock: dict[str, Any]
    bias: np.ndarray[Any, Any] | None = None
    output: Any = None  # what the operation replaces: the product, or the addition of the bias

    @property
    def source(self) -> tuple[str, int]:
        value = self.call.node.input_value(1 - self.call.weight_port)
        return value.get_node().get_name(), value.get_index()


# -- simulated to deployed ---------------------------------------------------------------------------------------------


def rewrite(model: Any, crossover: Mapping[str, float]) -> Rewritten:
    """
    Put the operation where the plan prunes enough, in place; all other layers stay simulated.

    :param crossover: least sparsity that pays, by storage format (``f32`` to ``i4``).
    :raises nncf.ValidationError: the model is dense, or deployed already.
    :raises BuildError: the extension cannot be built; the model is as it was.
    """
    graph = ir_of(model)
    plan = require_pruned(graph)
    operation.extension()
    done = Rewritten()
    found = {layer.name: layer for layer in find_layers(graph)[0]}
    chosen: list[_Layer] = []
    for site in plan.sites:
        for layer_plan in site.layers:
            if layer_plan.threshold < 0:
                continue
            try:
                layer = _read(site, layer_plan, found[layer_plan.name])
                least = crossover[layer.format]
                if layer_plan.sparsity < least:
                    msg = (
                        f"its sparsity of {layer_plan.sparsity:.0%} is below {least:.0%}, where skipping begins to pay"
                    )
                    raise CannotServe(msg)
            except CannotServe as error:
                done.left[layer_plan.name] = str(error)
            else:
                chosen.append(layer)
    if not chosen:
        return done
    names = {layer.plan.name for layer in chosen}
    sums = {layer.plan.name: column_sums(layer.call, layer.plan.in_features) for layer in chosen if layer.mode != 0.0}
    detach(graph)
    try:
        for layer in chosen:
            _find_bias(layer)
        groups: dict[tuple[Any, ...], list[_Layer]] = {}
        for layer in chosen:
            groups.setdefault((layer.source, layer.mode), []).append(layer)
        for group in groups.values():
            for part in _split(group):
                _replace(graph, plan, part, sums)
        attach(graph, _without(plan, names))
        graph.set_rt_info("cpu", DEPLOYED)
        graph.validate_nodes_and_infer_types()
    except BaseException:
        _undo(graph, plan)
        raise
    done.layers = [layer.plan.name for layer in chosen]
    return done


def _without(plan: Plan, names: set[str]) -> Plan:
    """The plan for the layers that stay simulated."""
    sites = []
    for site in plan.sites:
        rest = tuple(layer for layer in site.layers if layer.name not in names)
        if rest:
            sites.append(replace(site, layers=rest))
    return replace(plan, sites=tuple(sites))


def _read(site: SitePlan, plan: LayerPlan, layer: FcLayer) -> _Layer:
    """
    :raises CannotServe: another way to prune, or weights in a form that is not known.
    """
    if len(layer.calls) != 1:
        msg = f"{len(layer.calls)} products read its weights"
        raise CannotServe(msg)
    if not plan.is_plain:
        msg = "its plan has more than a threshold and a mode"
        raise CannotServe(msg)
    call = layer.calls[0]
    if call.weight_port != 1 or call.channel_axis != -1:
        msg = "its weights come first"
        raise CannotServe(msg)
    activation = call.node.input_value(0)
    if activation.get_element_type() not in _FLOATS:
        msg = f"its activation is {activation.get_element_type().get_type_name()}"
        raise CannotServe(msg)
    port = call.node.input(0)
    while port.get_node().get_name() != call.entry.get_node().get_name():
        before = port.get_source_output().get_node()
        if before.get_type_name() != "Reshape":  # a scale of AWQ, or activations that are quantised
            msg = f"{before.get_type_name()} lies between pruning and product"
            raise CannotServe(msg)
        port = before.input(0)
    if not call.entry.get_source_output().get_node().get_friendly_name().endswith(PRUNED):
        msg = "it has a scale or quantiser of its own between pruning and product"
        raise CannotServe(msg)
    return _read_weight(site.mode, plan, call)


def _read_weight(mode: float, plan: LayerPlan, call: Call) -> _Layer:
    transposed = not call.node.get_attributes()["transpose_b"]
    value = call.node.input_value(1)
    stock: dict[str, Any] = {"matmul": call.node.get_friendly_name(), "to": value.get_element_type().get_type_name()}
    node = value.get_node()
    if node.get_type_name() == "Convert":
        stock["convert"] = node.get_friendly_name()
        stock["marked"] = _DECOMPRESSION in node.get_rt_info()
        node = node.input_value(0).get_node()
    if node.get_type_name() == "Constant" and node.get_element_type() in _FLOATS:
        stock |= {"type": _FLOATS[node.get_element_type()], "shape": list(node.shape), "name": node.get_friendly_name()}
        _check_matrix(stock["shape"], plan, transposed)
        return _Layer(
            plan, mode, call, stock["type"], plan.in_features, "none", 0, transposed, _bytes(node), None, None, stock
        )
    if node.get_type_name() == "Reshape":
        stock["reshape"] = list(node.output(0).shape)
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Multiply":
        msg = f"its weights come through {node.get_type_name()}"
        raise CannotServe(msg)
    stock["compute"] = node.get_element_type().get_type_name()
    scale = _constant(node.input_value(1), stock, "scale")
    node = node.input_value(0).get_node()
    zero = None
    if node.get_type_name() == "Subtract":
        zero = _constant(node.input_value(1), stock, "zero")
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Convert" or node.input_value(0).get_node().get_type_name() != "Constant":
        msg = f"its weights come through {node.get_type_name()}"
        raise CannotServe(msg)
    values = node.input_value(0).get_node()
    if values.get_element_type() not in _INTEGERS:
        msg = f"no kernel for {values.get_element_type().get_type_name()} weights"
        raise CannotServe(msg)
    name, bits = _INTEGERS[values.get_element_type()]
    stock |= {"type": name, "shape": list(values.shape), "name": values.get_friendly_name()}
    shape = stock["shape"]
    _check_matrix(stock.get("reshape", shape), plan, transposed)
    group = _group(shape, stock["scale_shape"], plan, transposed)
    if scale.get_element_type() not in _FLOATS or (
        zero is not None and zero.get_element_type() != values.get_element_type()
    ):
        msg = "its scales or zero points have another type than NNCF gives them"
        raise CannotServe(msg)
    if zero is not None and stock["zero_shape"] != stock["scale_shape"]:
        msg = "its zero points have another shape than its scales"
        raise CannotServe(msg)
    return _Layer(
        plan, mode, call, name, group, _FLOATS[scale.get_element_type()], 0 if zero is None else bits, transposed,
        _bytes(values), _bytes(scale), None if zero is None else _bytes(zero), stock,
    )  # fmt: skip


def _constant(value: Any, stock: dict[str, Any], key: str) -> Any:
    """The constant behind a scale or zero point, with or without a conversion."""
    node = value.get_node()
    if node.get_type_name() == "Convert":
        stock[f"{key}_convert"] = True
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Constant":
        msg = f"its {key} is computed by {node.get_type_name()}"
        raise CannotServe(msg)
    stock[f"{key}_shape"] = list(node.shape)
    stock[f"{key}_type"] = node.get_element_type().get_type_name()
    return node


def _check_matrix(shape: list[int], plan: LayerPlan, transposed: bool) -> None:
    expected = [plan.in_features, plan.out_features] if transposed else [plan.out_features, plan.in_features]
    if list(shape) != expected:
        msg = f"its weights have shape {shape}"
        raise CannotServe(msg)


def _group(shape: list[int], scale: list[int], plan: LayerPlan, transposed: bool) -> int:
    """
    Input channels a scale, of [N, K] with [N, 1], [N, G, g] with [N, G, 1], [K, N] with [1, N], or [G, g, N] with
    [G, 1, N].
    """
    k, n = plan.in_features, plan.out_features
    if transposed:
        known = {(2, (1, n)): k} if len(shape) == 2 else {(3, (shape[0], 1, n)): shape[1]}
    else:
        known = {(2, (n, 1)): k} if len(shape) == 2 else {(3, (n, shape[1], 1)): shape[2]}
    if len(shape) == 2 and scale in ([1], []):  # one scale for all: no kernel reads that
        known = {}
    group = known.get((len(shape), tuple(scale)))
    if group is None:
        msg = f"its weights of shape {shape} have scales of shape {scale}"
        raise CannotServe(msg)
    return int(group)


def _bytes(constant: Any) -> Any:
    """
    A constant's memory as u8, not copied: weights stay mapped from their file. OpenVINO shares writeable arrays alone,
    and hands out read-only ones, hence the way through the address; nobody writes.
    """
    data = constant.data
    memory = (ctypes.c_uint8 * data.nbytes).from_address(data.ctypes.data)
    memory.owner = (constant, data)  # the array keeps the memory alive, and that the constant
    return np.frombuffer(memory, dtype=np.uint8)


def _find_bias(layer: _Layer) -> None:
    """An addition of a constant bias behind the product goes into the operation."""
    output = layer.call.node.output(0)
    layer.output = output
    consumers = list(output.get_target_inputs())
    port = bias_port(consumers, layer.plan.out_features)
    if port is None:
        return
    node = consumers[0].get_node()
    if node.output(0).get_partial_shape() != output.get_partial_shape():
        return
    constant = port.get_source_output().get_node()
    layer.stock["bias"] = {"name": node.get_friendly_name()}
    if constant.get_type_name() == "Convert":
        constant = constant.input_value(0).get_node()
    data = constant.get_tensor_view() if constant.get_element_type() == ov.Type.bf16 else None
    values = constant.data if data is None else _from_bf16(constant)
    layer.bias = np.array(values, dtype=np.float32).reshape(-1)  # a copy: OpenVINO shares writeable arrays alone
    layer.output = node.output(0)


def _from_bf16(constant: Any) -> np.ndarray[Any, Any]:
    bits = constant.data.view(np.uint16).astype(np.uint32) << 16
    return bits.view(np.float32)


def _split(group: list[_Layer]) -> list[list[_Layer]]:
    """Gate and up of a gated feed-forward by themselves, the others of a tensor together."""
    rest = list(group)
    parts = []
    for gate in group:
        found = _gated(gate, rest)
        if found is not None:
            up, activation = found
            gate.stock["activation"] = activation
            parts.append([gate, up])
            rest = [layer for layer in rest if layer is not gate and layer is not up]
    return [*parts, rest] if rest else parts


def _gated(gate: _Layer, others: list[_Layer]) -> tuple[_Layer, dict[str, Any]] | None:
    """The layer that is multiplied with the activation of this one, and what that activation is."""
    if gate not in others:
        return None
    readers = list(gate.output.get_target_inputs())
    if len(readers) != 1:
        return None
    node = readers[0].get_node()
    name = _activation(node)
    after = list(node.output(0).get_target_inputs())
    if name is None or len(after) != 1 or after[0].get_node().get_type_name() != "Multiply":
        return None
    product = after[0].get_node()
    other = product.input_value(1 - after[0].get_index())
    for up in others:
        same = up.output.get_node().get_name() == other.get_node().get_name()
        if up is not gate and same and len(up.output.get_target_inputs()) == 1:
            if up.plan.out_features != gate.plan.out_features:
                return None
            return up, {
                "kind": name,
                "name": node.get_friendly_name(),
                "product": product.get_friendly_name(),
                "gate_first": after[0].get_index() == 0,
            }
    return None


def _activation(node: Any) -> str | None:
    kind = node.get_type_name()
    if kind == "Swish":
        if node.get_input_size() == 1:
            return "silu"
        beta = node.input_value(1).get_node()
        return "silu" if beta.get_type_name() == "Constant" and bool((beta.data == 1).all()) else None
    if kind == "Gelu":
        approximation = str(node.get_attributes().get("approximation_mode", "ERF")).lower()
        return "gelu_tanh" if "tanh" in approximation else "gelu"
    return "relu" if kind == "Relu" else None


def _replace(graph: ov.Model, plan: Plan, layers: list[_Layer], sums: Mapping[str, Any]) -> None:
    """One operation in place of the products of these layers."""
    first = layers[0]
    activation = first.stock.get("activation")
    attributes = Attributes(first.plan.in_features, mode=decimal(np.float32(first.mode)))
    attributes.activation = activation["kind"] if activation else "none"
    attributes.policy = plan.prune == "decode"
    inputs = [first.call.node.input_value(0)]
    if attributes.policy:
        inputs.append(decode_flag(graph, first.call, first.plan.name))
    for layer in layers:
        attributes.names.append(layer.plan.name)
        attributes.out_features.append(layer.plan.out_features)
        attributes.formats.append(layer.format)
        attributes.groups.append(layer.group)
        attributes.scales.append(layer.scale_type)
        attributes.zero_bits.append(layer.zero_bits)
        attributes.transposed.append(int(layer.transposed))
        attributes.thresholds.append(decimal(np.float32(layer.plan.threshold)))
        correction = np.array(layer.mode * sums[layer.plan.name], dtype=np.float32) if layer.mode != 0.0 else None
        attributes.biases.append(int(layer.bias is not None))
        attributes.corrections.append(int(correction is not None))
        for kind, data in (
            ("weight", layer.weight),
            ("scale", layer.scale),
            ("zero", layer.zero),
            ("bias", layer.bias),
            ("correction", correction),
        ):
            if data is not None:
                raw = data.reshape(-1).view(np.uint8)
                constant = ov.op.Constant(raw, shared_memory=True)
                constant.set_friendly_name(f"{layer.plan.name}/sparse/{kind}")
                inputs.append(constant.output(0))
    attributes.stock = json.dumps([layer.stock for layer in layers], separators=(",", ":"))
    node = operation.make_node(inputs, attributes)
    node.set_friendly_name(f"{first.plan.name}/sparse")
    if activation:
        # what is behind the product of both
        product = next(iter(next(iter(first.output.get_target_inputs())).get_node().output(0).get_target_inputs()))
        outputs = [product.get_node().output(0)]
    else:
        outputs = [layer.output for layer in layers]
    for index, old in enumerate(outputs):
        consumers = list(old.get_target_inputs())
        move_names(old, node.output(index), consumers)
        for consumer in consumers:
            consumer.replace_source_output(node.output(index))


# -- deployed to simulated ---------------------------------------------------------------------------------------------


def is_deployed(model: Any) -> bool:
    """Whether operations of ours are in the graph."""
    return any(is_sparse_fc(node) for node in ir_of(model).get_ops())


def restore(model: Any) -> None:
    """
    Make the simulated graph again, in place, from the same weights.

    :raises nncf.ValidationError: the model is not deployed, or an operation's description is damaged.
    """
    graph = ir_of(model)
    nodes = [node for node in graph.get_ordered_ops() if is_sparse_fc(node)]
    if not nodes:
        msg = "The OpenVINO model is not deployed; scap_nncf.deploy(model, backend='cpu') does that."
        raise nncf.ValidationError(msg)
    _undo(graph, read_plan(graph))


def _undo(graph: ov.Model, plan: Plan | None) -> None:
    for node in graph.get_ordered_ops():
        if not is_sparse_fc(node):
            continue
        try:
            _expand(node)
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            msg = f"The operation {node.get_friendly_name()} is damaged, its stock graph cannot be made: {error}"
            raise nncf.ValidationError(msg) from error
    detach(graph)
    if graph.has_rt_info(DEPLOYED):
        graph.set_rt_info("no", DEPLOYED)
    if plan is not None:
        attach(graph, plan)
    graph.validate_nodes_and_infer_types()


def _expand(node: Any) -> None:
    attributes = operation.attributes_of(node)
    described = json.loads(attributes.stock)
    x = node.input_value(0)
    at = 2 if attributes.policy else 1
    results = []
    for index, stock in enumerate(described):
        raw = [node.input_value(at).get_node()]
        at += 1
        for present in (attributes.scales[index] != "none", attributes.zero_bits[index], attributes.biases[index],
                        attributes.corrections[index]):  # fmt: skip
            raw.append(node.input_value(at).get_node() if present else None)
            at += 1 if present else 0
        weight, scale, zero, bias, _ = raw
        value = _stock_weight(stock, weight, scale, zero)
        product = opset.matmul(x, value, False, not attributes.transposed[index], name=stock["matmul"])
        result = product
        if bias is not None:
            vector = np.frombuffer(bias.data.tobytes(), dtype=np.float32)
            constant: Any = opset.constant(vector, ov.Type.f32)
            if product.get_element_type() != ov.Type.f32:
                constant = opset.convert(constant, product.get_element_type())
            result = opset.add(product, constant, name=stock["bias"]["name"])
        results.append(result)
    activation = described[0].get("activation")
    if activation:
        makers = {
            "silu": opset.swish,
            "gelu": lambda v, name: opset.gelu(v, "erf", name=name),
            "gelu_tanh": lambda v, name: opset.gelu(v, "tanh", name=name),
            "relu": opset.relu,
        }
        gate = makers[activation["kind"]](results[0], name=activation["name"])
        factors = (gate, results[1]) if activation["gate_first"] else (results[1], gate)
        results = [opset.multiply(*factors, name=activation["product"])]
    for index, result in enumerate(results):
        old = node.output(index)
        consumers = list(old.get_target_inputs())
        move_names(old, result.output(0), consumers)
        for consumer in consumers:
            consumer.replace_source_output(result.output(0))


def _stock_weight(stock: dict[str, Any], weight: Any, scale: Any, zero: Any) -> Any:
    """The constants with their decompression, as they were."""
    value: Any = _typed(weight, stock["shape"], stock["type"])
    value.set_friendly_name(stock["name"])
    if scale is not None:
        compute = _type(stock["compute"])
        value = opset.convert(value, compute)
        if zero is not None:
            points = _typed(zero, stock["zero_shape"], stock["type"])
            points.set_friendly_name(f"{stock['name']}/zero_point")
            value = opset.subtract(value, opset.convert(points, compute), name=f"{stock['name']}/zero_point/subtract")
        factor: Any = _typed(scale, stock["scale_shape"], stock["scale_type"])
        factor.set_friendly_name(f"{stock['name']}/scale")
        if stock.get("scale_convert"):
            factor = opset.convert(factor, compute)
        value = opset.multiply(value, factor, name=f"{stock['name']}/fq_weights_1")
        if "reshape" in stock:
            value = opset.reshape(value, opset.constant(np.array(stock["reshape"], np.int64)), False)
    if "convert" in stock:
        value = opset.convert(value, _type(stock["to"]), name=stock["convert"])
        if stock.get("marked"):
            value.get_rt_info()[_DECOMPRESSION] = ""
    return value


def _type(name: str) -> ov.Type:
    return _TYPES[name] if name in _TYPES else ov.Type(name)


def _typed(constant: Any, shape: list[int], kind: str) -> Any:
    tensor = ov.Tensor(_type(kind), ov.Shape(shape))
    ctypes.memmove(tensor.data.ctypes.data, constant.data.ctypes.data, constant.data.nbytes)
    return ov.op.Constant(tensor, shared_memory=True)
