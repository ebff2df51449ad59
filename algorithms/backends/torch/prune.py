# SPDX-License-Identifier: Apache-2.0
"""
Simulated pruning of a PyTorch model: hooks on FC modules, nothing in the model's code or weights changes.

Each pruned layer gets a forward pre-hook that computes ``z = x − η`` with small values dropped, and, where η is not
zero, a forward hook that adds ``η·W`` (equation 6 of the SCAP paper). N:M patterns and error mitigation hang on the
same two hooks; :func:`scap_nncf.kernels.reference.mitigated_fc` defines what they compute. Works for any module that
computes an FC layer, inside models wrapped by NNCF, under ``torch.compile`` and for export.
Experts that are fused into 3-D parameters are pruned inside their module's forward
(:mod:`scap_nncf.algorithms.backends.torch.prune_experts`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import nncf
import torch
from torch import nn

from scap_nncf.algorithms.backends.torch import experts
from scap_nncf.algorithms.backends.torch.layers import input_argument
from scap_nncf.algorithms.backends.torch.prune_experts import ExpertsPruner
from scap_nncf.algorithms.backends.torch.residency import execution_device
from scap_nncf.algorithms.backends.torch.weights import column_sums, layer_bias, project
from scap_nncf.algorithms.plan import LayerPlan, Plan, SitePlan, Vector
from scap_nncf.kernels.reference import prune, prune_nm, token_shift, variance_factor
from scap_nncf.kernels.reference.prune import centre

_CONTROLLER = "_scap_controller"
DEPLOYMENT = "_scap_deployment"  # what scap_nncf.deploy did to the model, while it is deployed
# Non-persistent buffers: they follow the module's device and are not in its state dict.
CORRECTION = "scap_mode_correction"  # [OC], what does not depend on the input: η·W, and vectors of the plan
SHIFT, SCORE = "scap_shift", "scap_score"  # [IC]
SCALE = "scap_scale"  # [OC], 1 + γ
COLUMN_SUMS = "scap_column_sums"  # [OC], for the token's own shift
LOW_RANK_IN, LOW_RANK_OUT = "scap_low_rank_in", "scap_low_rank_out"  # [IC, r] and [r, OC]
IN_PLAN = (SHIFT, SCORE, SCALE, LOW_RANK_IN, LOW_RANK_OUT)  # follow from the plan's vectors alone
BUFFERS = (CORRECTION, SHIFT, SCORE, SCALE, COLUMN_SUMS, LOW_RANK_IN, LOW_RANK_OUT)


class Pruner:
    """
    The pruning at the input of one FC layer.

    :param mode: η.
    :param decode_only: prune only tokens that come alone (sequence length 1).
    """

    def __init__(self, layer: LayerPlan, mode: float, decode_only: bool) -> None:
        self.layer = layer
        # a layer that keeps everything is not centred either: its output is that of the dense layer, bit for bit
        self.mode = mode if layer.prunes and "shift" not in layer.vectors else 0.0
        self.threshold = layer.threshold
        self.decode_only = decode_only
        self.enabled = True
        self.forced: bool | None = None  # see `token_policy`
        self.counted: torch.Tensor | None = None
        self.counting = True
        self.zeros: torch.Tensor | int = 0
        self.total = 0
        # a threshold and a scalar mode; what the plan has besides is at most added to the result
        self._by_threshold = replace(layer, vectors=tuple(set(layer.vectors) - {"bias", "scale"})).is_plain
        self._carried: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)  # from pre-hook to post-hook

    def active(self, x: torch.Tensor) -> bool:
        """Whether this call is pruned, from the policy and the shape [..., T, IC]."""
        if not self.enabled:
            return False
        if self.forced is not None:
            return self.forced
        if not self.decode_only:
            return True
        tokens = x.shape[-2] if x.dim() >= 2 else 1
        return tokens == 1

    def pre_hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = input_argument(args, kwargs)
        if not self.active(x):
            return None
        z = prune(x, self.mode, self.threshold) if self._by_threshold else self._select(module, x)
        if self.counting and not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            zeros, tokens = z == 0, z.numel() // max(z.shape[-1], 1)
            if self.counted is not None and self.counted.shape == z.shape[:-1]:
                zeros, tokens = zeros & self.counted.unsqueeze(-1), int(self.counted.sum())
            self.zeros = self.zeros + zeros.sum()  # stays on the device: no synchronisation
            self.total += tokens * z.shape[-1]
        if args:
            return (z, *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: z}

    def _select(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """What the layer reads in place of x [..., IC], with patterns and error mitigation."""
        layer, buffers = self.layer, module._buffers
        u = centre(x, self.mode)
        if SHIFT in buffers:
            u = u - buffers[SHIFT]
        mu = None
        if layer.token_shift is not None and x.numel():
            mu = token_shift(u, layer.token_shift)  # [..., 1]
            u = u - mu
        if layer.pattern is None and SCORE in buffers:  # |x|·‖W‖ is compared, as WINA does
            z = torch.where((u * buffers[SCORE]).abs() <= self.threshold, torch.zeros_like(u), u)
        elif layer.pattern is None:
            z = prune(u, 0.0, self.threshold)
        else:
            z = prune_nm(u, *layer.pattern, buffers.get(SCORE))
        dropped = u - z if LOW_RANK_IN in buffers else None
        self._carried = mu, dropped
        if layer.variance:
            z = z * variance_factor(u, z)
        return z.to(x.dtype)

    def post_hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> Any:
        if not self.active(input_argument(args, kwargs)):
            return None
        buffers, dtype = module._buffers, output.dtype
        (mu, dropped), self._carried = self._carried, (None, None)
        scale = buffers.get(SCALE)
        if scale is not None:
            output = output * scale.to(dtype)
        correction = buffers.get(CORRECTION)
        if correction is not None:
            # packed weights do not show the type that the layer computes in
            output = output + correction.to(dtype)
        sums = buffers.get(COLUMN_SUMS)
        if mu is not None and sums is not None:
            output = output + mu.to(dtype) * sums.to(dtype)
        a, b = buffers.get(LOW_RANK_IN), buffers.get(LOW_RANK_OUT)
        if dropped is not None and a is not None and b is not None:
            output = output + (dropped.to(dtype) @ a.to(dtype)) @ b.to(dtype)
        return output

    def counts(self) -> dict[str, tuple[int, int]]:
        """Zeros and values by layer name."""
        return {self.layer.name: (int(self.zeros), self.total)}

    def reset(self) -> None:
        """Forget the counts."""
        self.zeros, self.total = 0, 0


def named_pruners(model: nn.Module) -> Iterator[tuple[nn.Module, Pruner]]:
    """Every pruned module with its pruner."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, Pruner):
                yield module, owner


def expert_pruners(model: nn.Module) -> Iterator[ExpertsPruner]:
    """The pruner of every module with fused experts that has one."""
    for _, module in experts.named_experts(model):
        run = experts.run_of(module)
        if run is not None:
            yield from (stage for stage in run.stages if isinstance(stage, ExpertsPruner))


def working_copy(model: nn.Module) -> nn.Module:
    """The model itself: hooks are added and removed without a trace."""
    return model


def insert(model: nn.Module, plan: Plan) -> None:
    """
    Attach the pruners of a plan. The plan must fit (see :meth:`Plan.bind`), and the model must have none yet.

    Nothing is attached if anything fails.
    """
    _refuse_deployed(model)
    if plan.algorithm == "cats":
        from scap_nncf.algorithms.backends.torch.gated import insert_gated

        insert_gated(model, plan)
        forget_compiled_code()
        return
    fused = experts.expert_layers(model)
    by_module: dict[str, list[tuple[experts.ExpertLayer, SitePlan, LayerPlan]]] = {}
    for site in plan.sites:
        for layer in site.layers:
            if layer.name in fused:
                by_module.setdefault(fused[layer.name].module_name, []).append((fused[layer.name], site, layer))
    buffers = {
        layer.name: _buffers(model, site, layer, plan.vectors_of(layer))
        for site in plan.sites
        for layer in site.layers
        if layer.name not in fused
    }
    decode_only = plan.prune == "decode"
    of_experts = {name: ExpertsPruner.of_plan(model, name, found, decode_only) for name, found in by_module.items()}
    for name, experts_pruner in of_experts.items():
        experts.attach(model.get_submodule(name), experts_pruner)
    for site in plan.sites:
        for layer in site.layers:
            if layer.name in fused:
                continue
            pruner = Pruner(layer, site.mode, decode_only)
            attach(model.get_submodule(layer.name), pruner, buffers[layer.name])
    forget_compiled_code()


def correction(model: nn.Module, site: SitePlan, layer: LayerPlan) -> torch.Tensor:
    """η·W of one layer, float32 [OC]."""
    return site.mode * column_sums(model, layer.name)


def _buffers(
    model: nn.Module, site: SitePlan, layer: LayerPlan, vectors: Mapping[str, Vector]
) -> dict[str, torch.Tensor]:
    """
    What the hooks of a layer read, float32 on its device: the plan's vectors, with all that does not depend on the
    input put together into one vector that is added.
    """
    given = {kind: torch.from_numpy(value.copy()) for kind, value in vectors.items()}
    held: dict[str, torch.Tensor] = {}
    added: torch.Tensor | None = None
    if "shift" in given and layer.prunes:
        held[SHIFT] = given["shift"]
        added = project(model, layer.name, given["shift"])
    elif site.mode != 0.0 and layer.prunes:
        added = correction(model, site, layer)
    if layer.token_shift is not None:
        held[COLUMN_SUMS] = column_sums(model, layer.name)
    if "score" in given:
        held[SCORE] = given["score"]
    if "low_rank_in" in given:
        held[LOW_RANK_IN], held[LOW_RANK_OUT] = given["low_rank_in"], given["low_rank_out"]
    device = torch.device("cpu") if added is None else added.device
    if "scale" in given:
        gamma = given["scale"].to(device)
        held[SCALE] = 1 + gamma
        for name in (COLUMN_SUMS, LOW_RANK_OUT):
            if name in held:
                held[name] = held[name] * held[SCALE].to(held[name].device)
        added = added * held[SCALE] if added is not None else torch.zeros_like(gamma)
        bias = layer_bias(model, layer.name)  # the layer's own bias is not scaled
        if bias is not None:
            added = added - gamma * bias.float().to(device)
    if "bias" in given:
        added = given["bias"] if added is None else added + given["bias"].to(device)
    if added is not None:
        held[CORRECTION] = added
    return held


def attach(module: nn.Module, pruner: Pruner, buffers: Mapping[str, torch.Tensor]) -> None:
    """Hook a pruner onto its FC module, with what its hooks read (see ``BUFFERS``)."""
    module.register_forward_pre_hook(pruner.pre_hook, with_kwargs=True)
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    # an offloaded module's weights have no device of their own between calls
    device = execution_device(module) or (tensors[0].device if tensors else torch.device("cpu"))
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    for name, value in buffers.items():
        value = value.to(device, dtype if name == CORRECTION else None)
        module.register_buffer(name, value, persistent=False)
    if set(buffers) - {SHIFT, SCORE}:
        module.register_forward_hook(pruner.post_hook, with_kwargs=True)


def remove(model: nn.Module) -> None:
    """Detach every pruner: the model is as it was."""
    _refuse_deployed(model)
    for module in model.modules():
        run = experts.run_of(module)
        for stage in [] if run is None else list(run.stages):
            if isinstance(stage, ExpertsPruner):
                experts.detach(module, stage)
        for hooks, extra in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            ours = [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Pruner)]
            for key in ours:
                del hooks[key]
                extra.pop(key, None)
        for name in [name for name in BUFFERS if name in module._buffers]:
            del module._buffers[name]
            module._non_persistent_buffers_set.discard(name)
    forget_compiled_code()


def forget_compiled_code() -> None:
    """
    Make ``torch.compile`` look at models anew: by default it does not notice hooks that come or go, and a model that
    was compiled and run before would stay as dense, or as sparse, as it was.
    """
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def set_enabled(model: nn.Module, enabled: bool) -> None:
    """Switch all pruning on or off."""
    if DEPLOYMENT in model.__dict__:
        model.__dict__[DEPLOYMENT].set_enabled(enabled)
    for _, pruner in named_pruners(model):
        pruner.enabled = enabled
    for experts_pruner in expert_pruners(model):
        experts_pruner.enabled = enabled


@contextmanager
def token_policy(
    model: nn.Module, prune_all: bool | None = None, counted: torch.Tensor | None = None
) -> Iterator[None]:
    """
    Inside the context, a forward pass stands for tokens that in use would come otherwise: the tokens of a whole text at
    once for tokens that would come one by one.

    :param prune_all: True prunes every token, False none, whatever the policy of the plan and the shape of the input;
        None leaves it to these.
    :param counted: bool [B, T], on the model's device: the tokens that count for the realised sparsity, where a layer
        sees [B, T, IC]; None counts all.
    """
    pruners: list[Any] = [*(pruner for _, pruner in named_pruners(model)), *expert_pruners(model)]
    for pruner in pruners:
        pruner.forced, pruner.counted = prune_all, counted
    try:
        yield
    finally:
        for pruner in pruners:
            pruner.forced, pruner.counted = None, None


def counts(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Zeros and values counted at the input of each pruned layer since the last reset; padding counts as well."""
    deployed = model.__dict__[DEPLOYMENT].counts() if DEPLOYMENT in model.__dict__ else {}
    simulated = {name: count for _, pruner in named_pruners(model) for name, count in pruner.counts().items()}
    for experts_pruner in expert_pruners(model):
        simulated |= experts_pruner.counts()
    return deployed | simulated


def reset_counts(model: nn.Module) -> None:
    """Start counting anew."""
    if DEPLOYMENT in model.__dict__:
        model.__dict__[DEPLOYMENT].reset_counts()
    for _, pruner in named_pruners(model):
        pruner.reset()
    for experts_pruner in expert_pruners(model):
        experts_pruner.reset()


def _refuse_deployed(model: nn.Module) -> None:
    if DEPLOYMENT in model.__dict__:
        msg = "The model is deployed; take it back with scap_nncf.undeploy(model) before its pruning is changed."
        raise nncf.ValidationError(msg)


def store_controller(model: nn.Module, controller: Any) -> None:
    """Keep a controller with the model, or forget it (None)."""
    if controller is None:
        model.__dict__.pop(_CONTROLLER, None)
    else:
        model.__dict__[_CONTROLLER] = controller


def stored_controller(model: nn.Module) -> Any:
    """The controller kept with the model, also behind the wrapper of ``torch.compile``."""
    return getattr(model, "_orig_mod", model).__dict__.get(_CONTROLLER)
