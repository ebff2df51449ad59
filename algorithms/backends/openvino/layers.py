# SPDX-License-Identifier: Apache-2.0
"""
Fully connected (FC) layers of an OpenVINO model: matrix products with constant weights, whatever their format.

A layer is named after the module it was traced from (``__module.model.layers.0.mlp.up_proj/aten::linear/MatMul`` is
``model.layers.0.mlp.up_proj``), so that a plan made on the PyTorch model applies to its IR and the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import nncf
import openvino as ov

#: Part of the friendly name of every node that this package inserts; friendly names survive saving and loading.
MARK = "/scap/"
#: How the name of a node ends whose output is a pruned activation.
PRUNED = f"{MARK}pruned"

# What may stand between stored weights and the matrix product: decompression, layout, code books, fake quantisation.
_DECOMPRESSION = frozenset(
    (
        "Add", "Broadcast", "Concat", "Convert", "ConvertLike", "Divide", "FakeConvert", "FakeQuantize", "Gather",
        "Multiply", "Reshape", "Slice", "Split", "Squeeze", "StridedSlice", "Subtract", "Transpose", "Unsqueeze",
        "VariadicSplit",
    )
)
#: What NNCF puts between an activation and a product, and what it calls the scales of AWQ and SmoothQuant: in a graph,
#: or as a hook of a PyTorch model that was exported afterwards (operation and port, ``0__0.0``).
_QUANTISERS = frozenset(("FakeQuantize", "FakeConvert"))
_SCALE_NAME = re.compile(r".*/awq_mul|.*/nncf_smooth_quant|\d+__\d+\.\d+/aten::mul/Multiply(_\d+)?")
_MODULE_PREFIX = "__module."
_COMPARISONS = frozenset(("Less", "LessEqual", "Greater", "GreaterEqual"))


@dataclass(frozen=True)
class Call:
    """
    One matrix product of a layer. Most layers have one; a module that is called many times has as many.

    :param node: the MatMul.
    :param weight_port: the port where the weights arrive.
    :param entry: the input port where pruned activations have to be fed: that of the MatMul, or of the first node of
        the chain.
    :param channel_axis: -1, or -2 where weights come first; of activation and result alike.
    :param chain: nodes from the entry to the MatMul: views, scales of AWQ and SmoothQuant, quantisers. In PyTorch they
        are inside the layer, or behind the point where modules are pruned.
    """

    node: ov.Node
    weight_port: int
    entry: Any
    channel_axis: int
    chain: tuple[ov.Node, ...] = ()

    @property
    def source(self) -> Any:
        """The activation: what the entry reads, before any pruning of ours."""
        return origin(self.entry.get_source_output())

    @property
    def tensor(self) -> tuple[str, int]:
        """Identifies the activation: unique node name and output index."""
        source = self.source
        return source.get_node().get_name(), source.get_index()


@dataclass(frozen=True)
class FcLayer:
    """An FC layer: all matrix products of one module with the same weights."""

    name: str
    in_features: int
    out_features: int
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Unfit:
    """A matrix product with constant weights that cannot be pruned, and why."""

    name: str
    reason: str


def ir_of(model: Any) -> ov.Model:
    """
    The OpenVINO model itself, also of an Optimum-Intel model object.

    :raises nncf.ParameterNotSupportedError: the object holds several OpenVINO models, or a compiled one.
    """
    if isinstance(model, ov.Model):
        return model
    parts = model.ov_models
    if len(parts) != 1:
        msg = (
            f"{type(model).__name__} holds {len(parts)} OpenVINO models ({', '.join(parts)}); compress each by itself: "
            "model.replace_ov_model(part, nncf.compress(part, ...)) for each part in model.ov_models.values()."
        )
        raise nncf.ParameterNotSupportedError(msg)
    (part,) = parts.values()
    if not isinstance(part, ov.Model):
        msg = f"{type(model).__name__} was loaded with compile_only=True; load it without to change its graph."
        raise nncf.ParameterNotSupportedError(msg)
    return part


def find_layers(model: ov.Model) -> tuple[list[FcLayer], list[Unfit]]:
    """
    FC layers in topological order, and matrix products with constant weights that are none.
    """
    layers: dict[str, FcLayer] = {}
    weights_of: dict[str, tuple[str, int]] = {}
    unfit: list[Unfit] = []
    constant: dict[str, bool] = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul" or MARK in node.get_friendly_name():
            continue
        ports = [port for port in (1, 0) if _is_constant(node.input_value(port), constant)]
        if len(ports) != 1:  # attention products have none, folded constants two
            continue
        found = _read_call(node, ports[0], constant)
        name = module_name(node.get_friendly_name())
        if found is None:
            continue
        if isinstance(found, str):
            unfit.append(Unfit(name, found))
            continue
        call, in_features, out_features = found
        weight = node.input_value(ports[0])
        weight_id = (weight.get_node().get_name(), weight.get_index())
        if name in layers and weights_of[name] == weight_id:
            layers[name] = replace(layers[name], calls=(*layers[name].calls, call))
            continue
        if name in layers:  # several products in one module that is no FC module itself
            name = f"{name}/{node.get_friendly_name().rpartition('/')[2]}"
        layers[name] = FcLayer(name, in_features, out_features, (call,))
        weights_of[name] = weight_id
    return list(layers.values()), unfit


def module_name(friendly_name: str) -> str:
    """
    Module name of a node: of a traced PyTorch model (``__module.a.b/aten::linear/MatMul``), or of an ONNX graph
    (``/a/b/MatMul``); any other name is taken as it is.
    """
    if friendly_name.startswith(_MODULE_PREFIX):
        return friendly_name[len(_MODULE_PREFIX) :].partition("/")[0]
    match = re.fullmatch(r"/(.+)/MatMul(?:_\d+)?", friendly_name)
    return match.group(1).replace("/", ".") if match else friendly_name


def shapes_of(model: Any) -> dict[str, tuple[int, int]]:
    """(in_features, out_features) of every FC layer by name."""
    layers, _ = find_layers(ir_of(model))
    return {layer.name: (layer.in_features, layer.out_features) for layer in layers}


def is_ours(node: ov.Node) -> bool:
    """Whether this package inserted a node."""
    return MARK in node.get_friendly_name()


def origin(output: Any) -> Any:
    """The activation that a pruner reads; any other output is returned as it is."""
    while is_ours(output.get_node()):
        node = output.get_node()
        output = node.input_value(2 if node.get_type_name() == "Select" else 0)
    return output


def pruner_of(call: Call) -> ov.Node | None:
    """The pruner of ours that feeds a call, None where its input is dense."""
    node = call.entry.get_source_output().get_node()
    while is_ours(node) and not node.get_friendly_name().endswith(PRUNED):
        node = node.input_value(0).get_node()
    return node if is_ours(node) else None


def scale_of(node: ov.Node) -> Any:
    """The constant that a scale of AWQ or SmoothQuant multiplies the activation with; None for any other node."""
    if node.get_type_name() != "Multiply" or _SCALE_NAME.fullmatch(node.get_friendly_name()) is None:
        return None
    ports = [port for port in (0, 1) if _is_constant(node.input_value(port), {})]
    return node.input_value(ports[0]) if len(ports) == 1 else None


def looks_pruned(layers: Iterable[FcLayer]) -> list[str]:
    """Names of layers whose input is a ``Select`` on the magnitude of a tensor: pruned by someone else's hooks."""
    return [layer.name for layer in layers if any(_is_foreign_pruner(call.source.get_node()) for call in layer.calls)]


def _is_foreign_pruner(node: ov.Node) -> bool:
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    if is_ours(node):
        return False
    if node.get_type_name() == "Select":
        conditions = [node.input_value(0).get_node()]
    elif node.get_type_name() == "Multiply":  # x · (|x| > τ)
        conditions = [_skip_convert(node.input_value(port).get_node()) for port in (0, 1)]
    else:
        return False
    for condition in conditions:
        condition = _skip_convert(condition)
        if condition.get_type_name() == "LogicalNot":
            condition = condition.input_value(0).get_node()
        if condition.get_type_name() in _COMPARISONS:
            operands = [_skip_convert(condition.input_value(port).get_node()) for port in (0, 1)]
            if any(operand.get_type_name() == "Abs" for operand in operands):
                return True
    return False


def _skip_convert(node: ov.Node) -> ov.Node:
    return node.input_value(0).get_node() if node.get_type_name() == "Convert" else node


def _is_constant(output: Any, known: dict[str, bool]) -> bool:
    """Whether a value depends on constants alone, through decompression operations."""
    node = output.get_node()
    key = node.get_name()
    if key not in known:
        if node.get_type_name() == "Constant":
            known[key] = True
        elif node.get_type_name() in _DECOMPRESSION:
            known[key] = all(_is_constant(node.input_value(i), known) for i in range(node.get_input_size()))
        else:
            known[key] = False
    return known[key]


def _read_call(node: ov.Node, weight_port: int, constant: dict[str, bool]) -> tuple[Call, int, int] | str | None:
    """The call with its shape; a reason why it cannot be pruned; or None where it is no FC layer at all."""
    attributes = node.get_attributes()
    weight = node.input_value(weight_port).get_partial_shape()
    activation_port = 1 - weight_port
    activation = node.input_value(activation_port).get_partial_shape()
    if weight.rank.is_dynamic or weight.is_dynamic or activation.rank.is_dynamic:
        return "its shape is not known"
    shape = [dimension.get_length() for dimension in weight]
    if len(shape) < 2 or len(activation) < 2:
        return "a product with a vector"
    if any(size != 1 for size in shape[:-2]):
        return "experts fused into 3-D weights are not supported yet" if len(shape) == 3 else "weights of rank 4"
    # the summed axis: of the weights [.., IC, OC] or [.., OC, IC], by the transpose flags
    if weight_port == 1:
        out_features, in_features = shape[-2:] if attributes["transpose_b"] else reversed(shape[-2:])
        channel_axis = -2 if attributes["transpose_a"] else -1
    else:
        in_features, out_features = shape[-2:] if attributes["transpose_a"] else reversed(shape[-2:])
        channel_axis = -1 if attributes["transpose_b"] else -2
    if in_features == 1 or out_features == 1:
        return None  # an outer product, as in rotary embeddings, or a plain dot product
    if (channel_axis == -1) != (weight_port == 1):
        return "its activation is transposed"
    entry, chain = _entry(node.input(activation_port), in_features, channel_axis, constant)
    return Call(node, weight_port, entry, channel_axis, chain), in_features, out_features


def _entry(
    port: Any, in_features: int, channel_axis: int, constant: dict[str, bool]
) -> tuple[Any, tuple[ov.Node, ...]]:
    """
    Where to prune: before views that only this product reads, so that tokens keep their axis and layers with a view
    each share one pruner; and before what NNCF does to the input of layers, as in PyTorch. A pruner behind a quantiser
    would also keep the plugin from running the product on integers.

    :return: the port, and the nodes from there to the product.
    """
    chain: list[ov.Node] = []
    while channel_axis == -1:
        node = port.get_source_output().get_node()
        if is_ours(node):
            break
        if node.get_type_name() == "Reshape":
            if len(node.output(0).get_target_inputs()) != 1 or not _keeps_channels(node, in_features):
                break
            before = node.input(0)
        elif node.get_type_name() in _QUANTISERS or scale_of(node) is not None:
            if not _feeds_layers(node, constant):
                break
            before = node.input(1 if _is_constant(node.input_value(0), constant) else 0)
        else:
            break
        chain.insert(0, node)
        port = before
    return port, tuple(chain)


def _keeps_channels(node: ov.Node, in_features: int) -> bool:
    before, after = node.input_value(0).get_partial_shape(), node.output(0).get_partial_shape()
    if before.rank.is_dynamic or after.rank.is_dynamic or len(before) < 2:
        return False
    return bool(before[-1] == ov.Dimension(in_features) and after[-1] == ov.Dimension(in_features))


def _feeds_layers(node: ov.Node, constant: dict[str, bool]) -> bool:
    """Whether all that reads a node are products with constant weights."""
    for reader in node.output(0).get_target_inputs():
        after = reader.get_node()
        if after.get_type_name() == "MatMul":
            if not _is_constant(after.input_value(1 - reader.get_index()), constant):
                return False
        elif not (after.get_type_name() in _QUANTISERS and reader.get_index() == 0 and _feeds_layers(after, constant)):
            return False
    return True
