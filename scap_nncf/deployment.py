# SPDX-License-Identifier: Apache-2.0
"""
Deployment: simulated pruning is replaced by kernels that skip the weights of dropped inputs.

``deploy`` changes a sparse PyTorch model in place; ``undeploy`` gives the simulated model back, bit for bit. Layers
that read one tensor become one launch, gate, up and activation of a gated feed-forward become one launch, and there is
one copy of the weights, input channel by input channel.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import nncf
import torch
from nncf.common.logging import nncf_logger
from nncf.common.utils.helpers import create_table
from torch import nn

from scap_nncf.algorithms.backends import is_optimum_model
from scap_nncf.algorithms.backends.torch.discover import inspect_model
from scap_nncf.algorithms.backends.torch.experts import expert_layers
from scap_nncf.algorithms.backends.torch.gated import GatedPruner
from scap_nncf.algorithms.backends.torch.layers import fc_shape
from scap_nncf.algorithms.backends.torch.prune import DEPLOYMENT, Pruner, expert_pruners, named_pruners
from scap_nncf.algorithms.plan import LayerPlan, Plan, SitePlan
from scap_nncf.algorithms.scap.controller import get_controller
from scap_nncf.algorithms.sites import LeftOut, Site, expert_pool
from scap_nncf.kernels import gated
from scap_nncf.kernels.modules import (
    DeployedGated,
    DeployedGlu,
    FloatProjection,
    PackedProjection,
    Part,
    Projection,
    deployed_layers,
)
from scap_nncf.kernels.packing import QuantWeight, concatenate_outputs
from scap_nncf.packed_weights import CannotTakeOver, PackedEmbedding, TakenOver, take_over

TModel = TypeVar("TModel")

BACKENDS = ("triton", "cpu", "reference")
#: A site drifts when its realised sparsity is further than this from the target, as a share of its inputs.
DRIFT_BOUND = 0.05
#: Fewer counted tokens than this say nothing about a site.
DRIFT_TOKENS = 256


def deploy(
    model: TModel, backend: str = "triton", *, counters: bool = False, min_sparsity: float | None = None
) -> TModel:
    """
    Replace simulated pruning by kernels that skip weights, in place.

    The deployed model computes what the simulation computes, with the same thresholds, modes and token policy; results
    differ by rounding alone. It works with ``generate`` (dynamic and static caches, beams, assisted decoding), under
    ``torch.compile`` and in CUDA graphs. It is for inference: no gradients.

    - Layers of a site run as one launch, those that the plan leaves dense included; a feed-forward
      ``down(act(gate(x)) * up(x))`` is recognised by what it computes and runs as two.
    - Weights are moved, not copied: beside the model there is never more than a second copy of the layers of one site,
      and none afterwards. Move the model to its device before; moving or casting it later works too.
    - ``state_dict`` keeps names and shapes, and ``save_pretrained`` of transformers models saves the dense weights as
      before. The plan is saved by the controller.
    - Layers that no kernel serves stay simulated, and one warning says which and why.
    - Models compressed by ``nncf.compress_weights`` (8 and 4 bits, AWQ included) are taken over as a whole: kernels
      read the packed weights, layers outside of the plan included, and NNCF's function mode, which slows every
      operation down, is off. The layers' own packed weights wait on the CPU for ``undeploy``. So are torchao's
      weight-only tensors (``Int8WeightOnlyConfig``, ``IntxWeightOnlyConfig`` of 4 and 8 bits).

    .. code-block:: python

        model = nncf.compress(model, algorithm="scap", dataset=dataset, sparsity=0.5).cuda()
        scap_nncf.deploy(model)
        model.generate(...)

    OpenVINO models (``openvino.Model``, or a model object of Optimum-Intel) take ``backend="cpu"``: pruner and product
    become one operation that skips weights, q, k and v share one, gate, up and activation too. Saved and read again it
    stays deployed; see docs/cpu-operation.md for what a core needs to run it. Without a C++ compiler the model stays
    simulated, and a warning says so.

    :param model: a model with activation sparsity, see :func:`scap_nncf.compress`.
    :param backend: ``triton`` for GPUs (on a CPU, or without Triton, the plain torch definition runs, with a warning);
        ``cpu`` for kernels compiled at first use; ``reference`` for the plain torch definition everywhere.
    :param counters: count the realised sparsity of every layer on the device, see :func:`drift`. Costs a few
        microseconds a site and token. The operation of OpenVINO models counts always.
    :param min_sparsity: OpenVINO models: layers with less sparsity stay as they are; None takes what was measured to
        pay (``scap_nncf.deploy_openvino.CROSSOVER``).
    :return: the model.
    :raises nncf.ValidationError: the model has no activation sparsity, or is deployed already.
    :raises nncf.ParameterNotSupportedError: unknown backend, or one that does not fit the model.
    :raises nncf.UnsupportedBackendError: neither a PyTorch nor an OpenVINO model.
    """
    if backend not in BACKENDS:
        known = ", ".join(map(repr, BACKENDS))
        msg = f"backend must be one of {known}, got {backend!r}."
        raise nncf.ParameterNotSupportedError(msg)
    if _is_openvino(model):
        if backend != "cpu":
            msg = f"OpenVINO models are deployed with backend='cpu', not {backend!r}."
            raise nncf.ParameterNotSupportedError(msg)
        from scap_nncf.deploy_openvino import deploy_ir

        return deploy_ir(model, min_sparsity)  # type: ignore[no-any-return]
    root = _unwrapped(model)
    controller = get_controller(root)
    if controller is None:
        msg = (
            "The model has no activation sparsity to deploy; calibrate it first with "
            "nncf.compress(model, algorithm='scap', dataset=...)."
        )
        raise nncf.ValidationError(msg)
    if is_deployed(root):
        msg = "The model is deployed already; scap_nncf.undeploy(model) takes it back."
        raise nncf.ValidationError(msg)
    if backend == "cpu":
        _load_cpu_kernels()
    deployment = Deployment(root, backend)
    try:
        _replace_layers(deployment, controller.plan)
    except BaseException:
        deployment.undo()
        raise
    root.__dict__[DEPLOYMENT] = deployment
    if hasattr(root, "save_pretrained"):
        root.__dict__["save_pretrained"] = partial(_save_pretrained, root)
    deployment.set_counting(counters)
    _warn(deployment)
    return model


def undeploy(model: TModel) -> TModel:
    """
    Give the simulated model back, bit for bit, in place.

    :raises nncf.ValidationError: the model is not deployed.
    """
    if _is_openvino(model):
        from scap_nncf.deploy_openvino import undeploy_ir

        return undeploy_ir(model)  # type: ignore[no-any-return]
    deployment_of(model).undo()
    root = _unwrapped(model)
    del root.__dict__[DEPLOYMENT]
    root.__dict__.pop("save_pretrained", None)
    return model


def is_deployed(model: Any) -> bool:
    """Whether :func:`deploy` has changed this model."""
    if _is_openvino(model):
        from scap_nncf.algorithms.backends.openvino import sparse_op

        return sparse_op.is_deployed(model)
    return DEPLOYMENT in getattr(_unwrapped(model), "__dict__", {})


def deployment_of(model: Any) -> Deployment:
    """
    What :func:`deploy` did to the model.

    :raises nncf.ValidationError: the model is not deployed.
    """
    if not is_deployed(model):
        msg = "The model is not deployed; scap_nncf.deploy(model) does that."
        raise nncf.ValidationError(msg)
    return _unwrapped(model).__dict__[DEPLOYMENT]


# -- drift -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerDrift:
    """
    :param sparsity: target.
    :param realised_sparsity: share of inputs that were dropped.
    :param tokens: how many were counted.
    """

    name: str
    role: str
    weights: int
    sparsity: float
    realised_sparsity: float
    tokens: int

    @property
    def drift(self) -> float:
        """Realised minus target."""
        return self.realised_sparsity - self.sparsity


@dataclass(frozen=True)
class DriftReport:
    """Realised against target sparsity of a deployed model in use; ``str()`` is a table of the furthest layers."""

    layers: tuple[LayerDrift, ...]
    bound: float

    @property
    def drifted(self) -> tuple[LayerDrift, ...]:
        """Layers beyond the bound, the furthest first."""
        beyond = [layer for layer in self.layers if layer.tokens >= DRIFT_TOKENS and abs(layer.drift) > self.bound]
        return tuple(sorted(beyond, key=lambda layer: -abs(layer.drift)))

    @property
    def recalibrate(self) -> bool:
        """Whether any layer drifted."""
        return bool(self.drifted)

    @property
    def sparsity(self) -> float:
        """Target, weighted by weight elements."""
        return self._weighted([layer.sparsity for layer in self.layers])

    @property
    def realised_sparsity(self) -> float:
        """Realised, weighted by weight elements."""
        return self._weighted([layer.realised_sparsity for layer in self.layers])

    def _weighted(self, values: Sequence[float]) -> float:
        total = sum(layer.weights for layer in self.layers)
        return sum(layer.weights * value for layer, value in zip(self.layers, values)) / total if total else 0.0

    def __str__(self) -> str:
        furthest = sorted(self.layers, key=lambda layer: -abs(layer.drift))[:10]
        rows: list[list[Any]] = [
            [layer.name, layer.role, f"{layer.sparsity:.3f}", f"{layer.realised_sparsity:.3f}", layer.tokens]
            for layer in furthest
        ]
        rows.append(["all", "", f"{self.sparsity:.3f}", f"{self.realised_sparsity:.3f}", ""])
        return create_table(header=["Layer", "Role", "Target", "Realised", "Tokens"], rows=rows)


def drift(model: Any, bound: float = DRIFT_BOUND) -> DriftReport:
    """
    Realised against target sparsity since the counters were reset, for a model deployed with ``counters=True``.

    Warns to recalibrate when a layer with at least 256 counted tokens is further from its target than `bound`: then
    the activations in use are no longer those of the calibration. Less sparsity than planned costs speed, more costs
    quality.

    :param bound: largest difference of realised and target sparsity, as a share of the inputs.
    :raises nncf.ValidationError: the model is not deployed or has no counters.
    """
    deployment = deployment_of(model)
    counts = deployment.counts()
    if not counts:
        msg = "Nothing is counted; switch it on with scap_nncf.deploy(model, counters=True) and run the model."
        raise nncf.ValidationError(msg)
    controller = get_controller(_unwrapped(model))
    assert controller is not None
    layers = []
    for layer in controller.plan.layers:
        dropped, seen = counts.get(layer.name, (0, 0))
        if seen and layer.threshold >= 0:
            layers.append(
                LayerDrift(
                    layer.name,
                    layer.role,
                    layer.in_features * layer.out_features,
                    layer.sparsity,
                    dropped / seen,
                    seen // layer.in_features,
                )
            )
    report = DriftReport(tuple(layers), bound)
    if report.recalibrate:
        worst = report.drifted[0]
        nncf_logger.warning(
            f"{len(report.drifted)} of {len(report.layers)} layers drifted by more than {bound:.0%} from their target "
            f"sparsity; furthest is {worst.name}: {worst.realised_sparsity:.1%} instead of {worst.sparsity:.1%} over "
            f"{worst.tokens} tokens. Recalibrate with data like that in use."
        )
    return report


# -- what deploy did -------------------------------------------------------------------------------------------------


@dataclass
class Deployment:
    """
    The record of a deployment: what was replaced, and how it is undone.

    :param model: the deployed model.
    :param left: planned layers that stay simulated, and why.
    """

    model: nn.Module
    backend: str
    projections: list[Projection] = field(default_factory=list)
    swaps: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)  # parent, child name, what was there
    left: list[LeftOut] = field(default_factory=list)
    taken: TakenOver | None = None
    decode_only: bool = False

    def __repr__(self) -> str:
        return f"Deployment({self.backend!r}, {len(self.projections)} projections, {len(self.left)} layers simulated)"

    def replace(self, name: str, module: nn.Module) -> None:
        """Put a module where the one of this name is."""
        parent_name, _, child = name.rpartition(".")
        parent = self.model.get_submodule(parent_name)
        module.train(parent.training)
        self.swaps.append((parent, child, parent._modules[child]))  # type: ignore[arg-type]
        parent._modules[child] = module

    def undo(self) -> None:
        """Put everything back as it was."""
        if self.taken is not None:
            self.taken.restore()
            self.taken = None
        while self.swaps:
            parent, child, original = self.swaps.pop()
            original.train(parent.training)
            parent._modules[child] = original
        while self.projections:
            self.projections.pop().release()
            _free_cached_memory(self.model)

    def counts(self) -> dict[str, tuple[int, int]]:
        """Dropped and seen inputs by layer name, where counted."""
        return {name: count for projection in self.projections for name, count in projection.counts().items()}

    def reset_counts(self) -> None:
        """Start counting anew."""
        for projection in self.projections:
            projection.reset_counts()

    def set_counting(self, on: bool) -> None:
        """Switch the counters on or off."""
        for projection in self.projections:
            projection.set_counting(on)

    def set_decode_only(self, on: bool) -> None:
        """Prune tokens that come alone only, or all; for measurements, the plan's policy stays what it is."""
        for projection in self.projections:
            projection.decode_only = on

    def set_enabled(self, enabled: bool) -> None:
        """Switch all pruning on or off; off is the dense model, on the same weights."""
        for projection in self.projections:
            projection.enabled = enabled
            for part in projection.parts:  # the simulation that undeploy gives back
                for _, pruner in named_pruners(part.module):
                    pruner.enabled = enabled


def _replace_layers(deployment: Deployment, plan: Plan) -> None:
    model = deployment.model
    deployment.decode_only = plan.prune == "decode"
    if plan.algorithm == "cats":
        _replace_gated(deployment, plan)
        return
    reasons = {
        layer.name: _simulated_only(layer) or _unsupported_layer(model, layer.name) for layer in plan.layers
    }
    simulated = [name for layer in plan.layers for name in [_simulated_only(layer)] if name is not None]
    try:
        weights = _take_over(deployment, simulated)
        reasons |= {name: None for name in weights if name in reasons}
    except CannotTakeOver as error:
        deployment.undo()
        weights = {}
        reasons = dict.fromkeys(reasons, f"the model is quantised, and no kernel serves {error}")
    deployment.left = [
        LeftOut(name, _kind_of(model, name), reason)
        for name, reason in reasons.items()
        if reason is not None
    ]
    layers = _Layers(deployment, plan, weights)
    standins: dict[str, nn.Module] = {}
    gated_parents: list[tuple[str, gated.GatedFeedForward, Projection]] = []
    for site in _with_dense_layers(model, plan, weights):
        names = [layer for layer in site.layers if reasons.get(layer.name) is None]
        for parent, found, inputs in layers.gated(site, names):
            gated_parents.append((parent, found, layers.project(site, inputs, found.activation)))
            names = [layer for layer in names if layer not in inputs]
        for group in layers.groups(site, names):
            if len(group) == 1 and group[0].threshold < 0 and group[0].name not in weights:
                continue  # a dense layer by itself gains nothing
            projection = layers.project(site, group, None)
            standins.update(zip([layer.name for layer in group], deployed_layers(projection), strict=True))
    for parent, found, projection in gated_parents:
        name = f"{parent}.{found.down}"
        down = standins.pop(name, None) or model.get_submodule(name)
        deployment.replace(parent, DeployedGlu(projection, found.inputs, down, found.down))
    for name, module in standins.items():
        deployment.replace(name, module)
    if deployment.taken is not None:
        deployment.taken.bypass()


def _replace_gated(deployment: Deployment, plan: Plan) -> None:
    """Gated feed-forwards of a CATS plan."""
    model = deployment.model
    pruners = {
        pruner.gate: pruner
        for _, pruner in named_pruners(model)
        if isinstance(pruner, GatedPruner)
    }
    for site in plan.sites:
        planned = {layer.role: layer for layer in site.layers}
        modules = {role: model.get_submodule(layer.name) for role, layer in planned.items()}
        reasons = {role: _unsupported_layer(model, layer.name) for role, layer in planned.items()}
        reasons |= {
            role: "its weights are not stored row by row"
            for role in ("gate", "up")
            if reasons[role] is None and type(modules[role]).__name__ == "Conv1D"
        }
        reason = next((reason for reason in reasons.values() if reason is not None), None)
        parent = site.name.rpartition(".")[0]
        if not parent:
            reason = "the model itself cannot be replaced"
        if reason is not None:
            deployment.left += [LeftOut(layer.name, _kind_of(model, layer.name), reason) for layer in site.layers]
            continue
        down = planned["down"]
        part = Part(down.name, modules["down"], down.out_features, 0.0, down.sparsity)
        use_reference = deployment.backend == "reference"
        projection = FloatProjection([part], 0.0, decode_only=deployment.decode_only, use_reference=use_reference)
        pruner = pruners[site.name]
        projection.enabled = pruner.enabled
        deployment.projections.append(projection)
        _free_cached_memory(model)
        names = tuple(planned[role].name.rpartition(".")[2] for role in ("gate", "up", "down"))
        standin = DeployedGated(
            modules["gate"],
            modules["up"],
            deployed_layers(projection)[0],
            names,  # type: ignore[arg-type]
            down.threshold,
            pruner.activation,
        )
        deployment.replace(parent, standin)


def _simulated_only(layer: LayerPlan) -> str | None:
    """What of a layer's plan no kernel computes, or None."""
    if layer.is_folded:
        return None
    if layer.pattern is not None:
        return "no kernel selects N:M patterns"
    return "no kernel computes its error mitigation"


def _take_over(deployment: Deployment, simulated: Sequence[str]) -> dict[str, QuantWeight]:
    """
    Packed weights of all layers that NNCF or torchao quantised; NNCF's compressed embeddings are replaced.

    :param simulated: why layers have to stay simulated, which needs NNCF's own modules.
    """
    model = deployment.model
    deployment.taken = taken = take_over(model)
    if taken is None:
        return {}
    if simulated:
        raise CannotTakeOver(f"a plan of which {simulated[0]}")
    for name in taken.layers:
        reason = _unsupported_module(model.get_submodule(name))
        if reason is not None:
            msg = f"{name}: {reason}"
            raise CannotTakeOver(msg)
    for name, decompressor in taken.embeddings.items():
        deployment.replace(name, PackedEmbedding(model.get_submodule(name), decompressor))
    taken.pack()
    return taken.weights


def _with_dense_layers(model: nn.Module, plan: Plan, weights: Mapping[str, QuantWeight]) -> list[SitePlan]:
    """
    The sites of the plan, and the layers that it leaves dense where they gain as well: those that read one tensor run
    as one launch, and compressed ones read packed weights.
    """
    planned = {layer.name for layer in plan.layers}
    found: dict[str, SitePlan] = {}  # by the name of a planned layer, or of the first layer
    sites = {layer.name: site for site in plan.sites for layer in site.layers}
    result: list[SitePlan] = []
    for site in _sites_of(model):
        dense = tuple(
            LayerPlan(layer.name, layer.role, layer.in_features, layer.out_features, -1.0, 0.0)
            for layer in site.layers
            if layer.name not in planned
            and (layer.name in weights or _unsupported_layer(model, layer.name) is None)
        )
        owner = next((sites[layer.name] for layer in site.layers if layer.name in planned), None)
        if not dense:
            continue
        if owner is None:
            result.append(SitePlan(dense[0].name, site.block, 0.0, "zero", dense))
        else:
            found[owner.name] = replace(owner, layers=(*owner.layers, *dense))
    covered = planned | {layer.name for site in (*result, *found.values()) for layer in site.layers}
    for name, weight in weights.items():  # outside of the blocks
        if name not in covered:
            layer = LayerPlan(name, "", weight.in_features, weight.out_features, -1.0, 0.0)
            result.append(SitePlan(name, None, 0.0, "zero", (layer,)))
    return [found.get(site.name, site) for site in plan.sites] + result


def _sites_of(model: nn.Module) -> tuple[Site, ...]:
    """All sites of the model's blocks; none where the model cannot be run without the user's data."""
    pruners = [(pruner, pruner.enabled) for pruner in _all_pruners(model)]
    try:
        for pruner, _ in pruners:
            pruner.enabled = False  # the watched pass is not counted
        return inspect_model(model).sites
    except nncf.ValidationError as error:
        nncf_logger.debug(f"deploy: dense layers are not fused: {error}")
        return ()
    finally:
        for pruner, enabled in pruners:
            pruner.enabled = enabled


@dataclass
class _Layers:
    """Groups layers that can share a launch, and makes their projections."""

    deployment: Deployment
    plan: Plan
    weights: dict[str, QuantWeight]  # of compressed layers, until their projection is made

    def project(self, site: SitePlan, layers: Sequence[LayerPlan], activation: str | None) -> Projection:
        """One projection over these layers; their weights move there."""
        model, deployment = self.deployment.model, self.deployment
        parts = [
            Part(
                layer.name,
                model.get_submodule(layer.name),
                # a plan made on a packed transposed weight does not know its width
                self.weights[layer.name].out_features if layer.name in self.weights else layer.out_features,
                layer.threshold,
                layer.sparsity if layer.threshold >= 0 else 0.0,
                self._output_bias(layer),
            )
            for layer in layers
        ]
        mode = _mode(site, layers[0])
        options: dict[str, Any] = {
            "activation": activation,
            "decode_only": deployment.decode_only,
            "use_reference": deployment.backend == "reference",
        }
        projection: Projection
        if layers[0].name in self.weights:
            weights = [self.weights.pop(layer.name) for layer in layers]
            weight = weights[0] if len(weights) == 1 else concatenate_outputs(weights)
            projection = PackedProjection(parts, mode, weight, self._scales().get(layers[0].name), **options)
        else:
            projection = FloatProjection(parts, mode, **options)
        pruners = [pruner for part in parts for _, pruner in named_pruners(part.module)]
        projection.enabled = all(pruner.enabled for pruner in pruners)
        if deployment.backend == "cpu":
            projection.prepare_for_cpu()
        deployment.projections.append(projection)
        _free_cached_memory(model)
        return projection

    def _output_bias(self, layer: LayerPlan) -> torch.Tensor | None:
        """The vector that the plan adds to a layer's output, or None."""
        vector = self.plan.vectors_of(layer).get("bias")
        return None if vector is None else torch.from_numpy(vector.copy())

    def groups(self, site: SitePlan, layers: Sequence[LayerPlan]) -> Iterator[list[LayerPlan]]:
        """Layers of a site that can share a launch."""
        groups: dict[tuple[Any, ...], list[LayerPlan]] = {}
        for layer in layers:
            groups.setdefault((_mode(site, layer), *self._kind(layer)), []).append(layer)
        yield from groups.values()

    def gated(
        self, site: SitePlan, layers: Sequence[LayerPlan]
    ) -> Iterator[tuple[str, gated.GatedFeedForward, list[LayerPlan]]]:
        """Gated feed-forwards whose first layers are among these: name, description, these layers as gate, up."""
        model = self.deployment.model
        by_parent: dict[str, dict[str, LayerPlan]] = {}
        for layer in layers:
            parent, _, child = layer.name.rpartition(".")
            by_parent.setdefault(parent, {})[child] = layer
        for parent, children in by_parent.items():
            if not parent:
                continue  # the model itself cannot be replaced
            module = model.get_submodule(parent)
            candidates = [name for name, child in module.named_children() if fc_shape(child) is not None]
            found = gated.recognise(module, candidates)
            if found is None or any(name not in children for name in found.inputs) or found.down in children:
                continue
            inputs = [children[name] for name in found.inputs]
            kinds = {(_mode(site, layer), layer.out_features, *self._kind(layer)) for layer in inputs}
            if len(kinds) == 1 and inputs[0].name not in self._scales():
                yield parent, found, inputs

    def _kind(self, layer: LayerPlan) -> tuple[Any, ...]:
        if layer.name in self.weights:
            weight = self.weights[layer.name]
            zero = None if weight.zero is None else weight.zero.is_floating_point()
            # a factor of the input belongs to one layer
            return weight.bits, weight.group, zero, layer.name if layer.name in self._scales() else None
        parameter = self.deployment.model.get_submodule(layer.name).weight
        return parameter.dtype, parameter.device

    def _scales(self) -> Mapping[str, torch.Tensor]:
        return self.deployment.taken.scales if self.deployment.taken is not None else {}


def _mode(site: SitePlan, layer: LayerPlan) -> float:
    # a layer that keeps everything is not centred, as in the simulation
    return site.mode if layer.threshold >= 0 else 0.0


def _all_pruners(model: nn.Module) -> list[Any]:
    return [*(pruner for _, pruner in named_pruners(model)), *expert_pruners(model)]


def _kind_of(model: nn.Module, name: str) -> str:
    layer = expert_layers(model).get(name)
    return type(model.get_submodule(name if layer is None else layer.module_name)).__name__


def _unsupported_layer(model: nn.Module, name: str) -> str | None:
    """Why no kernel serves a layer of a plan, or None."""
    if expert_pool(name) is not None and name in expert_layers(model):
        return "no kernel for experts that are fused into one parameter"
    return _unsupported(model.get_submodule(name))


def _unsupported(module: nn.Module) -> str | None:
    """Why no kernel serves a layer with floating-point weights, or None."""
    reason = _unsupported_module(module)
    if reason is not None:
        return reason
    weight = module._parameters.get("weight")
    if weight is None or type(weight) is not nn.Parameter or type(weight.data) is not torch.Tensor:
        return f"its weight is {'computed' if weight is None else type(weight.data).__name__}, not a plain parameter"
    if weight.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        return f"no kernel for {str(weight.dtype).removeprefix('torch.')} weights"
    if weight.is_meta:
        return "its weights are offloaded"
    if weight.is_cuda and weight.dtype == torch.float64:
        return "no GPU kernel for float64"
    if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward and not _is_linear(module):
        return f"{type(module).__name__} computes something else than x @ W + b"
    return None


def _unsupported_module(module: nn.Module) -> str | None:
    """Why a layer cannot be replaced, whatever its weights are, or None."""
    if not isinstance(module, nn.Linear) and type(module).__name__ != "Conv1D":
        return f"no kernel for {type(module).__name__}"
    if "forward" in module.__dict__:
        return "its forward is patched (offloading or another tool)"
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    if any(not isinstance(getattr(hook, "__self__", None), Pruner) for hook in hooks):
        return "it has forward hooks of others"
    return None


def _is_linear(module: nn.Linear) -> bool:
    """Whether a subclass of ``nn.Linear`` computes what its base class computes; tried on two random rows."""
    if set(module._parameters) != {"weight", "bias"} or any(True for _ in module.children()):
        return False
    weight = module.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    with torch.no_grad():
        try:
            result = module.forward(x)
        except Exception:  # it wants other arguments: no plain layer
            return False
        expected = nn.functional.linear(x, weight, module.bias)
    tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 2e-2
    return isinstance(result, torch.Tensor) and torch.allclose(result, expected, tolerance, tolerance)


def _warn(deployment: Deployment) -> None:
    problems = []
    if deployment.backend == "cpu" and any(p.is_cuda for p in deployment.model.parameters()):
        problems.append("the model is on a GPU, where the Triton kernels run")
    if deployment.backend == "triton":
        on_gpu = any(p.is_cuda for p in deployment.model.parameters())
        if not on_gpu:
            problems.append("the model is not on a GPU, so the plain torch definition runs: correct, not fast")
        elif importlib.util.find_spec("triton") is None:
            problems.append("Triton is missing (pip install 'scap-nncf[triton]'): correct, not fast")
    if deployment.left:
        for (kind, reason), count in Counter((item.kind, item.reason) for item in deployment.left).items():
            first = next(item.name for item in deployment.left if (item.kind, item.reason) == (kind, reason))
            more = f" and {count - 1} more" if count > 1 else ""
            problems.append(f"{first}{more} stay simulated: {reason}")
    if problems:
        nncf_logger.warning(f"deploy: {'; '.join(problems)}.")


def _is_openvino(model: Any) -> bool:
    return type(model).__module__.partition(".")[0] == "openvino" or is_optimum_model(model)


def _load_cpu_kernels() -> None:
    from scap_nncf.kernels.cpu import library
    from scap_nncf.kernels.cpu.build import BuildError

    try:
        library.load()
    except BuildError as error:
        nncf_logger.warning(f"deploy: the plain torch definition runs, correct and not fast: {error}.")


def _free_cached_memory(model: nn.Module) -> None:
    # Freed weights are blocks too small for the next projection; without this, reserved memory would grow to twice
    # the model.
    if any(p.is_cuda for p in model.parameters()):
        torch.cuda.empty_cache()


def _save_pretrained(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if deployment_of(model).taken is not None:
        msg = "A deployed model with compressed weights cannot be saved; save it after scap_nncf.undeploy(model)."
        raise nncf.ValidationError(msg)
    if kwargs.get("state_dict") is None:
        # safetensors takes neither views of shared memory nor transposed ones
        kwargs["state_dict"] = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    return type(model).save_pretrained(model, *args, **kwargs)  # type: ignore[attr-defined]


def _unwrapped(model: Any) -> Any:
    return getattr(model, "_orig_mod", model)
