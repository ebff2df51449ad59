# SPDX-License-Identifier: Apache-2.0
"""
Pruning in an OpenVINO graph: plain operations before and after matrix products; weights are not touched.

``z = x − η``, ``kept = Select(|z| <= τ, 0, z)`` feed the product, and ``η·W`` joins its bias (SCAP paper, equation 6).
Layers that read one tensor with one threshold share these nodes. Every node that is inserted has ``/scap/`` in its
friendly name, and the plan is kept in the model's ``rt_info``: all of it is found again after saving and loading. The
vectors of a plan are constants of the graph, in float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import nncf
import numpy as np
import openvino as ov
from openvino import opset13 as opset

from scap_nncf.algorithms.backends.openvino.layers import MARK, Call, FcLayer, find_layers, ir_of, origin, scale_of
from scap_nncf.algorithms.backends.openvino.select import Selected, Selection, make_selected, selection_of
from scap_nncf.algorithms.backends.openvino.weights import column_sums, product
from scap_nncf.algorithms.plan import LayerPlan, Plan, SitePlan, Vector

RT_INFO = ["nncf", "scap"]
_PLAN = [*RT_INFO, "plan"]
_ENABLED = [*RT_INFO, "enabled"]
DEPLOYED = [*RT_INFO, "deployed"]  # where operations that skip weights stand for pruners and products
_CONTROLLER = "_scap_controller"
_COUNTS = "_scap_counts"
_VECTORS = "_scap_vectors"  # of the plan, while its nodes are not in the graph
_HALF = (ov.Type.f16, ov.Type.bf16)
#: Kinds of nodes behind a product; input 0 of each leads back to it.
_BEHIND = ("with_residual", "with_token_shift", "scaled", "corrected")


# -- what the Backend protocol asks for ------------------------------------------------------------------------------


def working_copy(model: Any) -> Any:
    """A clone of an OpenVINO model; an Optimum-Intel model object itself, which is changed in place."""
    return model.clone() if isinstance(model, ov.Model) else model


def insert(model: Any, plan: Plan) -> None:
    """
    Insert the pruning of a fitting plan (see :meth:`Plan.bind`) into a model that has none, and note the plan in its
    ``rt_info``. The model is as it was if anything fails.
    """
    check_plan(plan)
    graph = ir_of(model)
    try:
        attach(graph, plan)
    except BaseException:
        detach(graph)
        raise
    _write_plan(graph, plan)
    note_vectors(graph, plan)
    _changed(model, graph)


def check_plan(plan: Plan) -> None:
    """
    :raises nncf.ParameterNotSupportedError: the plan is of an algorithm that does not prune the input of layers.
    """
    if plan.algorithm == "cats":
        msg = "Plans of CATS are for PyTorch models only; algorithm='scap' takes OpenVINO models as well."
        raise nncf.ParameterNotSupportedError(msg)


def remove(model: Any) -> None:
    """Take all pruning out: the graph computes what it computed before, from the same constants."""
    graph = ir_of(model)
    require_simulated(graph)
    detach(graph)
    _forget_plan(graph)
    graph.__dict__.pop(_VECTORS, None)
    _changed(model, graph)


def set_enabled(model: Any, enabled: bool) -> None:
    """
    Switch all pruning on or off, by inserting or removing its nodes; the plan stays. A model that was compiled before
    is not affected: compile again. (Optimum-Intel model objects do so by themselves.)
    """
    graph = ir_of(model)
    require_simulated(graph)
    if enabled == is_enabled(graph):
        return
    plan = read_plan(graph)
    assert plan is not None  # only a controller calls this, and it comes from a plan
    if enabled:
        attach(graph, plan)
    else:
        note_vectors(graph, plan)
        detach(graph)
    graph.set_rt_info("yes" if enabled else "no", _ENABLED)
    _changed(model, graph)


def counts(model: Any) -> dict[str, tuple[int, int]]:
    """
    Zeros and values at the input of each pruned layer, as last measured by
    :func:`scap_nncf.algorithms.backends.openvino.measure.measure`; empty before. A graph does not count while it runs.
    """
    return dict(ir_of(model).__dict__.get(_COUNTS, {}))


def reset_counts(model: Any) -> None:
    """Forget what was measured."""
    ir_of(model).__dict__.pop(_COUNTS, None)


def store_counts(model: Any, counted: dict[str, tuple[int, int]]) -> None:
    """Keep what was measured with the model object."""
    ir_of(model).__dict__[_COUNTS] = counted


def store_controller(model: Any, controller: Any) -> None:
    """Keep a controller with the model object, or forget it (None)."""
    if controller is None:
        ir_of(model).__dict__.pop(_CONTROLLER, None)
    else:
        ir_of(model).__dict__[_CONTROLLER] = controller


def stored_controller(model: Any) -> Any:
    """
    The controller kept with the model object; for a model that was read from a file, one made of the plan in its
    ``rt_info``; None where the model is dense.

    :raises nncf.ValidationError: the plan in the file is damaged.
    """
    graph = ir_of(model)
    controller = graph.__dict__.get(_CONTROLLER)
    if controller is None:
        plan = read_plan(graph)
        if plan is None:
            return None
        from scap_nncf.algorithms.base import controller_for

        controller = controller_for(plan)(model, plan)
        graph.__dict__[_CONTROLLER] = controller
    return controller


# -- the plan in the model --------------------------------------------------------------------------------------------


def read_plan(graph: ov.Model) -> Plan | None:
    """The plan in a model's ``rt_info``, or None."""
    if not graph.has_rt_info(_PLAN):
        return None
    source = "the plan in the model's rt_info"
    try:
        text = graph.get_rt_info(_PLAN).astype(str)
    except (AttributeError, RuntimeError, UnicodeDecodeError) as error:  # a section instead of a text
        msg = f"{source} is damaged: {error}."
        raise nncf.ValidationError(msg) from error
    plan = Plan.from_json(text, source)
    if not any(layer.vectors for layer in plan.layers):
        return plan
    return replace(plan, vectors=graph.__dict__.get(_VECTORS) or _vectors_in(graph, plan))


def note_vectors(model: Any, plan: Plan) -> None:
    """Keep the vectors of the model's plan with the model object: a graph that was saved dense has none."""
    ir_of(model).__dict__[_VECTORS] = dict(plan.vectors)


def _vectors_in(graph: ov.Model, plan: Plan) -> dict[tuple[str, str], Vector]:
    """The vectors of a plan whose nodes are in the graph."""
    constants: dict[str, Vector] = {}
    for node in graph.get_ordered_ops():
        owner, mark, rest = node.get_friendly_name().rpartition(MARK)
        if mark and rest.startswith("vector.") and node.get_type_name() == "Constant":
            constants[f"{owner}/{rest.removeprefix('vector.')}"] = node.data.astype(np.float32)
    found: dict[tuple[str, str], Vector] = {}
    for site in plan.sites:
        for layer in site.layers:
            for kind in layer.vectors:
                # layers of a site with one selection share its constants
                owners = [layer.name, *(other.name for other in site.layers if kind in ("shift", "score"))]
                value = next((constants[f"{o}/{kind}"] for o in owners if f"{o}/{kind}" in constants), None)
                if value is not None:
                    found[layer.name, kind] = value if kind.startswith("low_rank") else value.reshape(-1)
    return found


def is_enabled(graph: ov.Model) -> bool:
    """Whether the pruning of a model's plan is in its graph."""
    return not graph.has_rt_info(_ENABLED) or graph.get_rt_info(_ENABLED).astype(str) != "no"


def note_plan(model: Any, plan: Plan) -> None:
    """Write a plan into the ``rt_info`` of a sparse model in place of the one that is there, which prunes the same."""
    _write_plan(ir_of(model), plan)
    note_vectors(model, plan)


def _write_plan(graph: ov.Model, plan: Plan) -> None:
    from scap_nncf._version import __version__

    settings = dict(plan.made_by.get("settings") or {})
    graph.set_rt_info(json.dumps(json.loads(plan.to_json()), separators=(",", ":")), _PLAN)
    graph.set_rt_info("yes", _ENABLED)
    graph.set_rt_info(__version__, [*RT_INFO, "scap_nncf_version"])
    graph.set_rt_info(plan.prune, [*RT_INFO, "prune"])
    # for the reader of the XML; everything that counts is in the plan
    for key in ("sparsity", "mode"):
        if key in settings:
            graph.set_rt_info(json.dumps(settings[key]), [*RT_INFO, key])


def _forget_plan(graph: ov.Model) -> None:
    """Remove our part of the ``rt_info``; only a top-level section can be deleted, so NNCF's own is written again."""
    if not graph.has_rt_info(RT_INFO):
        return
    kept = [(path, value) for path, value in _leaves(graph.rt_info["nncf"], ["nncf"]) if path[:2] != RT_INFO]
    del graph.rt_info["nncf"]
    for path, value in kept:
        graph.set_rt_info(value, path)


def _leaves(section: Any, path: list[str]) -> Iterator[tuple[list[str], Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _leaves(value, [*path, key])
        else:
            yield [*path, key], value.value


def _changed(model: Any, graph: ov.Model) -> None:
    graph.__dict__.pop(_COUNTS, None)
    if model is not graph:
        model.clear_requests()  # Optimum-Intel compiles again at the next call


# -- nodes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Prepared:
    """
    What is inserted for a layer, taken from the graph before it changes.

    :param selection: what happens to its input, or None.
    :param vectors: kind → vector of the plan.
    :param correction: η·W [OC], or None where there is no shift.
    :param sums: column sums of W [OC], for the token's own shift.
    """

    selection: Selection | None
    vectors: dict[str, Vector]
    correction: Vector | None
    sums: Vector | None


def attach(graph: ov.Model, plan: Plan) -> None:
    """Insert the nodes of a plan."""
    layers = {layer.name: layer for layer in find_layers(graph)[0]}
    wanted = [(site, plan_of) for site in plan.sites for plan_of in site.layers if plan_of.prunes or plan_of.vectors]
    prepared = {plan_of.name: _prepare(layers[plan_of.name], site, plan_of, plan) for site, plan_of in wanted}
    inserter = _Inserter(graph, plan.prune == "decode", _owners(layers.values(), prepared))
    for _, plan_of in wanted:
        layer = layers[plan_of.name]
        for number, call in enumerate(layer.calls):
            inserter.insert(layer, call, number, prepared[plan_of.name])
    graph.validate_nodes_and_infer_types()


def _prepare(layer: FcLayer, site: SitePlan, plan_of: LayerPlan, plan: Plan) -> _Prepared:
    call, vectors = layer.calls[0], plan.vectors_of(plan_of)
    selection = selection_of(site, plan_of, vectors)
    correction = sums = None
    if selection is not None:
        if "shift" in vectors:
            correction = product(call, layer.in_features, vectors["shift"][None])[0]
        elif selection.mode != 0.0:
            correction = np.float32(selection.mode) * column_sums(call, layer.in_features)
        if selection.token_shift is not None:
            sums = column_sums(call, layer.in_features)
    return _Prepared(selection, vectors, correction, sums)


def _owners(layers: Iterable[FcLayer], prepared: Mapping[str, _Prepared]) -> dict[str, Selection | None]:
    """
    Whose pruner may stand before a node between activation and products (a scale, a quantiser): the selection of the
    first layer that reads it, or None where a reader is not pruned. The other readers get copies of the node.
    """
    found: dict[str, list[Selection | None]] = {}
    nodes: dict[str, ov.Node] = {}
    for layer in layers:
        for call in layer.calls:
            for node in call.chain:
                selection = prepared[layer.name].selection if layer.name in prepared else None
                found.setdefault(node.get_name(), []).append(selection)
                nodes[node.get_name()] = node
    return {
        name: None if None in ways or len(ways) < _products(nodes[name]) else ways[0] for name, ways in found.items()
    }


def _products(node: ov.Node) -> int:
    """How many products read a node, directly or through quantisers and views."""
    readers = [reader.get_node() for reader in node.output(0).get_target_inputs()]
    return sum(1 if reader.get_type_name() == "MatMul" else _products(reader) for reader in readers)


def detach(graph: ov.Model) -> None:
    """Take all inserted nodes out."""
    nodes = {node.get_friendly_name(): node for node in graph.get_ordered_ops()}
    for node in graph.get_ordered_ops():
        kind = _kind(node)
        if kind == "pruned":
            _replace(node, origin(node.output(0)))
        elif kind == "copy":
            _replace(node, nodes[node.get_friendly_name().rpartition(MARK)[0]].output(0))
        elif kind in ("bias", *_BEHIND):
            _replace(node, node.input_value(0))
    graph.validate_nodes_and_infer_types()


def _kind(node: ov.Node) -> str | None:
    """What an inserted node is for; None for any other node."""
    _, mark, rest = node.get_friendly_name().rpartition(MARK)
    return rest.partition(".")[0] if mark else None


def _replace(node: ov.Node, source: Any) -> None:
    output = node.output(0)
    consumers = list(output.get_target_inputs())
    move_names(output, source, consumers)
    for consumer in consumers:
        consumer.replace_source_output(source)


def move_names(old: Any, new: Any, consumers: list[Any]) -> None:
    """Results are named after the tensor they read: the names go with it."""
    if any(consumer.get_node().get_type_name() == "Result" for consumer in consumers):
        names = set(old.get_names())
        old.get_tensor().set_names(set())
        new.get_tensor().set_names(names | set(new.get_names()))


class _Inserter:
    """Inserts pruners and corrections, sharing nodes where layers share them."""

    def __init__(self, graph: ov.Model, decode_only: bool, owners: dict[str, Any]) -> None:
        self._graph = graph
        self._decode_only = decode_only
        self._owners = owners
        self._copies: dict[Any, ov.Node] = {}
        self._selected: dict[Any, Selected] = {}
        self._magnitudes: dict[Any, tuple[Any, ov.Node]] = {}
        self._flags: dict[Any, ov.Node] = {}

    def insert(self, layer: FcLayer, call: Call, number: int, prepared: _Prepared) -> None:
        """All nodes of one call."""
        selected = None
        if prepared.selection is not None:
            selected = self._prune(layer, call, number, prepared.selection)
        self._correct(layer, call, number, prepared, selected)

    def _prune(self, layer: FcLayer, call: Call, number: int, selection: Selection) -> Selected:
        """Feed a call with pruned activations."""
        source = call.source
        key = (call.tensor, selection)
        if key not in self._selected:
            name = _namer(layer, number)
            flag = self._decode_flag(source, call, name) if self._decode_only else None
            if selection.is_plain:
                mode, threshold = selection.mode, selection.threshold
                self._selected[key] = Selected(self._make_pruner(source, call.tensor, mode, threshold, flag, name))
            else:
                width, axis = layer.in_features, call.channel_axis
                self._selected[key] = make_selected(source, width, axis, selection, flag, name)
        feed, target = self._selected[key].pruned.output(0), call.entry
        after = [node.input(_activation_port(node)) for node in call.chain[1:]]
        after.append(call.node.input(1 - call.weight_port))
        for node, port in zip(call.chain, after):
            # what other readers share stays theirs; they share the whole chain or its beginning
            if self._owners[node.get_name()] == selection:
                break
            copy_key = (key, node.get_name())
            if copy_key not in self._copies:
                self._copies[copy_key] = _copy_of(node, feed, len(self._copies))
            feed, target = self._copies[copy_key].output(0), port
        target.replace_source_output(feed)
        return self._selected[key]

    def _make_pruner(
        self, source: Any, tensor: Any, mode: float, threshold: float, flag: ov.Node | None, name: Any
    ) -> ov.Node:
        element = source.get_element_type()
        wide_type = ov.Type.f64 if element == ov.Type.f64 else ov.Type.f32
        if (tensor, mode) not in self._magnitudes:
            # half types are compared in float32, as the reference does
            wide = opset.convert(source, wide_type, name=name("wide")) if element in _HALF else source
            z = wide
            if mode != 0.0:
                centre: Any = opset.constant(np.array(mode), wide_type, name=name("mode"))
                if flag is not None:
                    centre = opset.multiply(centre, opset.convert(flag, wide_type, name=name("f")), name=name("active"))
                z = opset.subtract(wide, centre, name=name("centred"))
            self._magnitudes[tensor, mode] = z, opset.abs(z, name=name("magnitude"))
        z, magnitude = self._magnitudes[tensor, mode]
        limit: Any = opset.constant(np.array(threshold), wide_type, name=name("threshold"))
        if flag is not None:
            nothing = opset.constant(np.array(-1.0), wide_type, name=name("nothing"))
            limit = opset.select(flag, limit, nothing, name=name("limit"))
        # NaN compares false, is kept, and stays visible
        dropped = opset.less_equal(magnitude, limit, name=name("dropped"))
        zero = opset.constant(np.array(0.0), wide_type, name=name("zero"))
        if element not in _HALF:
            return opset.select(dropped, zero, z, name=name("pruned"))
        return opset.convert(opset.select(dropped, zero, z, name=name("kept")), element, name=name("pruned"))

    def _correct(self, layer: FcLayer, call: Call, number: int, prepared: _Prepared, selected: Selected | None) -> None:
        """
        What follows a product: what was dropped by way of the low rank, the token's own shift, the factor of each
        channel, and what does not depend on the input, which joins the layer's constant bias where it has one.
        """
        name = _namer(layer, number)
        first = call.node.output(0)
        consumers = list(first.get_target_inputs())
        element = first.get_element_type()
        column = (-1,) if call.channel_axis == -1 else (-1, 1)
        flag = self._decode_flag(call.source, call, name) if self._decode_only else None
        vectors = {
            kind: opset.constant(v if v.ndim == 2 else v.reshape(column), ov.Type.f32, name=name(f"vector.{kind}"))
            for kind, v in prepared.vectors.items()
            if kind not in ("shift", "score")
        }

        def cast(node: Any, kind: str) -> Any:
            node = node if isinstance(node, ov.Node) else node.get_node()
            same = node.output(0).get_element_type() == element
            return node if same else opset.convert(node, element, name=name(kind))

        def active(node: Any, kind: str) -> Any:
            if flag is None:
                return node
            factor = opset.convert(flag, element, name=name(f"{kind}.g"))
            return opset.multiply(node, factor, name=name(f"active_{kind}"))

        output: Any = first
        if "low_rank_in" in vectors and selected is not None and selected.dropped is not None:
            # zero where tokens stay dense: nothing is dropped
            dropped = cast(selected.dropped, "dropped")
            a, b = cast(vectors["low_rank_in"], "a"), cast(vectors["low_rank_out"], "b")
            if call.channel_axis == -1:
                inner = opset.matmul(dropped, a, False, False, name=name("low_rank.in"))
                residual = opset.matmul(inner, b, False, False, name=name("low_rank.out"))
            else:
                inner = opset.matmul(a, dropped, True, False, name=name("low_rank.in"))
                residual = opset.matmul(b, inner, True, False, name=name("low_rank.out"))
            output = opset.add(output, residual, name=name("with_residual"))
        if prepared.sums is not None and selected is not None and selected.mu is not None:
            sums = opset.constant(prepared.sums.reshape(column), element, name=name("column_sums"))
            output = opset.add(output, opset.multiply(cast(selected.mu, "mu"), sums), name=name("with_token_shift"))
        if "scale" in vectors:  # folds into constant weights when the model is compiled
            gamma = active(cast(vectors["scale"], "gamma"), "scale")
            one = opset.constant(np.array(1.0), element, name=name("one"))
            output = opset.multiply(output, opset.add(gamma, one), name=name("scaled"))
        parts = []
        if prepared.correction is not None:
            value = prepared.correction
            if "scale" in prepared.vectors:
                value = value * (1 + prepared.vectors["scale"])
            parts.append(opset.constant(value.reshape(column), element, name=name("correction")))
        if "bias" in vectors:
            parts.append(cast(vectors["bias"], "plan_bias"))
        if parts:
            vector = active(parts[0] if len(parts) == 1 else opset.add(*parts, name=name("parts")), "correction")
            bias = bias_port(consumers, layer.out_features) if call.channel_axis == -1 else None
            if bias is not None:  # constants fold when the model is compiled: nothing is added at run time
                bias.replace_source_output(opset.add(bias.get_source_output(), vector, name=name("bias")).output(0))
            else:
                output = opset.add(output, vector, name=name("corrected"))
        if output is first:
            return
        for consumer in consumers:
            consumer.replace_source_output(output.output(0))
        move_names(first, output.output(0), consumers)

    def _decode_flag(self, source: Any, call: Call, name: Any) -> ov.Node:
        """
        A boolean scalar: tokens come alone. From the model's own input where it is a decoder; else from the activation.
        """
        inputs = {key: item for item in self._graph.inputs for key in item.get_names()}
        tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
        if tokens is not None and "encoder_hidden_states" not in inputs and tokens.get_partial_shape().rank != 1:
            key, measured, axis, name = ("model", 0), tokens.get_node().output(0), 1, _name_of("decode")
        else:
            key, measured = (source.get_node().get_name(), source.get_index()), source
            axis = -2 if call.channel_axis == -1 else -1
        if key not in self._flags:
            shape = opset.shape_of(measured, name=name("shape"))
            index = opset.constant(np.array(axis), ov.Type.i64, name=name("axis"))
            length = opset.gather(shape, index, opset.constant(np.array(0), ov.Type.i64), name=name("length"))
            self._flags[key] = opset.equal(length, opset.constant(np.array(1), ov.Type.i64), name=name("alone"))
        return self._flags[key]


def _activation_port(node: ov.Node) -> int:
    """The port of a node of a chain where the activation arrives."""
    scale = scale_of(node)
    return 1 if scale is not None and scale == node.input_value(0) else 0


def _copy_of(node: ov.Node, source: Any, number: int) -> ov.Node:
    """The same operation on another activation; its name leads back to the node."""
    name = f"{node.get_friendly_name()}{MARK}copy.{number}"
    inputs = [node.input_value(port) for port in range(node.get_input_size())]
    attributes = node.get_attributes()
    kind = node.get_type_name()
    if kind == "FakeQuantize":
        return opset.fake_quantize(
            source, *inputs[1:], attributes["levels"], attributes["auto_broadcast"].upper(), name=name
        )
    if kind == "FakeConvert":
        return opset.fake_convert(source, *inputs[1:], destination_type=attributes["destination_type"], name=name)
    if kind == "Reshape":
        return opset.reshape(source, inputs[1], attributes["special_zero"], name=name)
    return opset.multiply(source, scale_of(node), attributes["auto_broadcast"].upper(), name=name)


def bias_port(consumers: list[Any], out_features: int) -> Any:
    """The port of a constant bias [OC] of the one addition that reads a product; None where there is none."""
    if len(consumers) != 1:
        return None
    node = consumers[0].get_node()
    if node.get_type_name() != "Add":
        return None
    port = node.input(1 - consumers[0].get_index())
    bias = port.get_source_output()
    constant = bias.get_node()
    if constant.get_type_name() == "Convert":
        constant = constant.input_value(0).get_node()
    shape = bias.get_partial_shape()
    if constant.get_type_name() != "Constant" or shape.is_dynamic:
        return None
    sizes = list(shape.to_shape())
    return port if sizes and sizes[-1] == out_features and all(size == 1 for size in sizes[:-1]) else None


def _namer(layer: FcLayer, number: int) -> Any:
    return _name_of(layer.name if number == 0 else f"{layer.name}({number})")


def _name_of(owner: str) -> Any:
    return lambda kind: f"{owner}{MARK}{kind}"


def is_deployed(graph: ov.Model) -> bool:
    """Whether operations that skip weights stand in a graph, see ``sparse_op``."""
    return graph.has_rt_info(DEPLOYED) and graph.get_rt_info(DEPLOYED).astype(str) != "no"


def require_simulated(graph: ov.Model) -> None:
    """
    :raises nncf.ValidationError: the model is deployed, so that its pruning is not in plain nodes.
    """
    if is_deployed(graph):
        msg = "The OpenVINO model is deployed; undeploy(model) takes it back, then its pruning can be changed."
        raise nncf.ValidationError(msg)


def decode_flag(graph: ov.Model, call: Call, layer_name: str) -> Any:
    """A boolean scalar output: tokens come alone; one for all layers of a decoder."""
    return _Inserter(graph, True, {})._decode_flag(call.source, call, _name_of(layer_name)).output(0)


def require_pruned(model: Any) -> Plan:
    """
    The plan of a sparse model.

    :raises nncf.ValidationError: the model is dense, deployed, or its pruning is switched off.
    """
    graph = ir_of(model)
    require_simulated(graph)
    plan = read_plan(graph)
    if plan is None or not is_enabled(graph):
        why = "has no activation sparsity" if plan is None else "has its pruning switched off; enable it"
        msg = f"The OpenVINO model {why}."
        raise nncf.ValidationError(msg)
    return plan
