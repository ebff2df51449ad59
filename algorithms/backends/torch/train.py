# SPDX-License-Identifier: Apache-2.0
"""
Learned error mitigation of a PyTorch model: site by site, on what the dense model feeds it.

Every sample runs once an epoch through the dense model, and at each site a step of AdamW is taken on some of the tokens
that pass, which are then forgotten: memory holds the vectors, their moments and one site's activations.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import nncf
import torch
from nncf.common.logging import nncf_logger
from nncf.common.logging.track_progress import track
from torch import nn

from scap_nncf.algorithms.backends.torch.collect import _without_padding
from scap_nncf.algorithms.backends.torch.layers import input_argument, layer_module
from scap_nncf.algorithms.backends.torch.run import attention_mask, evaluation, forward_sample
from scap_nncf.algorithms.backends.torch.weights import dense_weight
from scap_nncf.algorithms.plan import LayerPlan, Plan, SitePlan, Vector
from scap_nncf.algorithms.scap.histogram import ActivationHistogram
from scap_nncf.algorithms.scap.statistics import bucket_counts
from scap_nncf.kernels.reference import prune, prune_nm, token_shift, variance_factor

if TYPE_CHECKING:
    from scap_nncf.algorithms.mitigation.config import Mitigation

#: Every so many samples one is held out to judge by.
HOLD_OUT = 8
#: Tokens of a sample that a step is taken on, others in each epoch. Neighbours are much alike, and the products with
#: the weights, forward and back, cost three times what the dense model does with the same tokens.
STEP_TOKENS = 128
#: An epoch counts as better when the held-out loss falls at least to this share.
_BETTER = 0.9995


def train_mitigation(
    model: nn.Module, plan: Plan, mitigation: Mitigation, samples: Sequence[Any]
) -> dict[tuple[str, str], Vector]:
    """
    Learn a shift of each channel of a site (L-PTS) and a factor of each output of a layer (LS), as the settings say.

    The loss of a site is the squared error that pruning makes in its layers' results, relative to the size of the
    result, mean over tokens. Every eighth sample is held out; a site stops when its held-out loss rises, and what was
    best there is kept, so that no site gets worse on held-out samples than without learning.

    :param plan: what is pruned, with what is not learned (low rank, variance) in place.
    :return: (layer name, ``shift`` or ``scale``) → vector.
    :raises nncf.ValidationError: the loss of a site is not finite.
    """
    learners = [
        _Learner(model, site, plan, mitigation) for site in plan.sites if any(layer.prunes for layer in site.layers)
    ]
    held_out = list(samples)[HOLD_OUT - 1 :: HOLD_OUT] or list(samples)[-1:]
    rest = [sample for sample in samples if not any(sample is other for other in held_out)] or held_out

    def run(chosen: Sequence[Any], visit: Callable[[_Learner, torch.Tensor], None], description: str) -> None:
        active = {learner.name: learner for learner in learners if not learner.done}
        with _visiting(model, list(active), lambda name, x: visit(active[name], x)) as begin:
            for index, sample in enumerate(track(chosen, total=len(chosen), description=description)):
                begin(sample)
                forward_sample(model, sample, f"sample {index}")

    run(held_out, _Learner.judge, "Measuring before learning")
    for learner in learners:
        learner.end_epoch(mitigation.patience)
    before = [learner.best_loss for learner in learners if learner.best_loss > 0]
    for epoch in range(mitigation.epochs):
        run(rest, _Learner.learn, f"Learning mitigation, epoch {epoch + 1} of at most {mitigation.epochs}")
        run(held_out, _Learner.judge, "Measuring on held-out samples")
        for learner in learners:
            learner.end_epoch(mitigation.patience)
        if all(learner.done for learner in learners):
            break
    after = [learner.best_loss for learner in learners if learner.best_loss > 0]
    if before and after:
        nncf_logger.info(
            f"Relative squared error of a site on held-out samples, mean over {len(after)} sites: "
            f"{statistics.fmean(before):.4f} before, {statistics.fmean(after):.4f} after learning."
        )
    return {key: value for learner in learners for key, value in learner.vectors().items()}


def shifted_histograms(model: nn.Module, plan: Plan, samples: Sequence[Any]) -> dict[str, ActivationHistogram]:
    """
    Layer name → histogram of what is compared with the threshold: the input less the mode or vector, less the token's
    own shift.
    """
    counts: dict[str, torch.Tensor] = {}
    by_site = {site.layers[0].name: site for site in plan.sites}

    def visit(name: str, x: torch.Tensor) -> None:
        for layer in by_site[name].layers:
            held = plan.vectors_of(layer)
            shift = torch.from_numpy(held["shift"]).to(x.device) if "shift" in held else by_site[name].mode
            u = x.float() - shift
            if layer.token_shift is not None:
                u = u - token_shift(u, layer.token_shift)
            if "score" in held:
                u = u * torch.from_numpy(held["score"]).to(u.device)
            counts[layer.name] = counts.get(layer.name, 0) + bucket_counts(u)

    with _visiting(model, list(by_site), visit) as begin:
        for index, sample in enumerate(track(samples, total=len(samples), description="Calibrating thresholds anew")):
            begin(sample)
            forward_sample(model, sample, f"sample {index}")
    return {name: ActivationHistogram(value.cpu().numpy(), False) for name, value in counts.items()}


@contextmanager
def _visiting(
    model: nn.Module, names: Sequence[str], visit: Callable[[str, torch.Tensor], None]
) -> Iterator[Callable[[Any], None]]:
    """Hooks that show rows [n, IC] of what reaches modules of the dense model; yields what begins a sample."""
    mask: list[torch.Tensor | None] = [None]
    handles = []
    try:
        for name in names:

            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                x = _without_padding(input_argument(args, kwargs), mask[0])
                if x.numel():
                    visit(name, x.detach().reshape(-1, x.shape[-1]))

            handles.append(layer_module(model, name).register_forward_pre_hook(hook, prepend=True, with_kwargs=True))

        def begin(sample: Any) -> None:
            mask[0] = attention_mask(sample)

        with evaluation(model):
            yield begin
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Learner:
    """What is learned at one site."""

    model: nn.Module
    site: SitePlan
    plan: Plan
    settings: Mitigation
    shift: torch.Tensor | None = None  # [IC], in units of the channel's root mean square
    scales: dict[str, torch.Tensor] = field(default_factory=dict)  # layer name → γ [OC]
    done: bool = False

    def __post_init__(self) -> None:
        self.name = self.site.layers[0].name
        self.layers = [layer for layer in self.site.layers if layer.prunes]
        self._fixed = {
            layer.name: {kind: torch.from_numpy(v.copy()) for kind, v in self.plan.vectors_of(layer).items()}
            for layer in self.layers
        }
        self._generator = torch.Generator().manual_seed(0)
        self._unit: torch.Tensor | None = None  # [IC], root mean square of each channel
        self._squares: Any = 0
        self._optimiser: torch.optim.Optimizer | None = None
        self._loss, self._tokens = 0.0, 0
        self._best, self._best_loss, self._waited = {}, float("inf"), 0  # type: ignore[var-annotated]

    # -- passes ------------------------------------------------------------------------------------------------------

    def judge(self, x: torch.Tensor) -> None:
        """Add held-out rows [n, IC] to the loss of this epoch."""
        x = x[:: max(1, x.shape[0] // STEP_TOKENS)]
        if self._optimiser is None:
            self._squares = self._squares + x.float().square().sum(0)
        with torch.no_grad():
            self._loss += float(self._errors(x, self._weights(x)).sum())
        self._tokens += x.shape[0]

    def learn(self, x: torch.Tensor) -> None:
        """A step on some of the rows [n, IC]."""
        assert self._optimiser is not None
        rows = x[torch.randperm(x.shape[0], generator=self._generator)[:STEP_TOKENS].to(x.device)]
        with torch.enable_grad():
            loss = self._errors(rows, self._weights(x)).mean()
        self._optimiser.zero_grad()
        loss.backward()
        self._optimiser.step()

    def end_epoch(self, patience: int) -> None:
        """Keep what is best on the held-out rows, and decide whether to go on."""
        if self.done:
            return
        if self._tokens == 0:  # nothing reaches the site
            self.done = True
            return
        loss = self._loss / self._tokens
        if self._optimiser is None:
            if not torch.isfinite(torch.tensor(loss)):
                msg = (
                    f"The error that pruning makes at {self.name} is not finite on the calibration data; check the "
                    "model's dtype and the samples for NaN or Inf."
                )
                raise nncf.ValidationError(msg)
            self._unit = (self._squares / self._tokens).sqrt()
            self._make_parameters(self._unit.device)
        if loss < self._best_loss * _BETTER:
            self._best, self._best_loss, self._waited = self._copy(), loss, 0
        else:
            self._waited += 1
            self.done = self._waited >= patience
        self._loss, self._tokens = 0.0, 0

    @property
    def best_loss(self) -> float:
        """The smallest held-out loss so far; 0 where nothing reached the site."""
        return self._best_loss if self._best_loss < float("inf") else 0.0

    def vectors(self) -> dict[tuple[str, str], Vector]:
        """The best that was found."""
        return {key: value.cpu().numpy() for key, value in self._best.items()}

    # -- inside ------------------------------------------------------------------------------------------------------

    def _make_parameters(self, device: torch.device) -> None:
        parameters = []
        if self.settings.shift == "learned":
            self.shift = torch.zeros(self.layers[0].in_features, device=device, requires_grad=True)
            parameters.append(self.shift)
        if self.settings.scaling:
            self.scales = {
                layer.name: torch.zeros(layer.out_features, device=device, requires_grad=True) for layer in self.layers
            }
            parameters += list(self.scales.values())
        # no decay towards zero: the loss alone decides
        self._optimiser = torch.optim.AdamW(parameters, lr=self.settings.learning_rate, weight_decay=0.0)

    def _shift(self) -> torch.Tensor | float:
        """η, a number or [IC]."""
        if self.shift is None or self._unit is None:
            return self.site.mode
        return self.site.mode + self.shift * self._unit

    def _copy(self) -> dict[tuple[str, str], torch.Tensor]:
        found: dict[tuple[str, str], torch.Tensor] = {}
        shift = self._shift()
        for layer in self.layers:
            if isinstance(shift, torch.Tensor):
                found[layer.name, "shift"] = shift.detach().clone()
            if layer.name in self.scales:
                found[layer.name, "scale"] = self.scales[layer.name].detach().clone()
        return found

    def _weights(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {layer.name: dense_weight(self.model, layer.name).to(x.device) for layer in self.layers}

    def _errors(self, x: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        """Relative squared error of the layers' results of each row, mean over the layers; [n]."""
        x = x.float()
        selected: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}  # layers of a site mostly drop the same values
        total: torch.Tensor | None = None
        for layer in self.layers:
            fixed = {kind: value.to(x.device) for kind, value in self._fixed[layer.name].items()}
            key = (layer.threshold, layer.pattern, layer.name if "score" in fixed else None)
            if key not in selected:
                selected[key] = self._stand_in(x, layer, fixed.get("score"))
            stand_in, dropped = selected[key]
            weight = weights[layer.name]
            exact = x @ weight
            result = stand_in @ weight
            if "low_rank_in" in fixed:
                result = result + (dropped @ fixed["low_rank_in"]) @ fixed["low_rank_out"]
            if layer.name in self.scales:
                result = result * (1 + self.scales[layer.name])
            size = exact.square().sum(-1)
            # results near zero would count without bound
            error = (exact - result).square().sum(-1) / (size + 1e-2 * size.mean() + 1e-12)
            total = error if total is None else total + error
        assert total is not None
        return total / len(self.layers)

    def _stand_in(
        self, x: torch.Tensor, layer: LayerPlan, score: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What stands in for x [n, IC] in the product, shifts given back; and what was dropped."""
        shift = self._shift()
        u = x - shift
        mu: torch.Tensor | float = 0.0
        if layer.token_shift is not None:
            mu = token_shift(u, layer.token_shift)
            u = u - mu
        if layer.pattern is None:
            z = prune(u, 0.0, self._threshold(u, layer))
        else:
            z = prune_nm(u, *layer.pattern, score)
        dropped = u - z
        if layer.variance:
            z = z * variance_factor(u, z)
        return z + mu + shift, dropped

    def _threshold(self, u: torch.Tensor, layer: LayerPlan) -> float:
        """
        τ for u [n, IC]: with another shift the plan's would drop another share of the values, so that of these rows is
        taken.
        """
        if layer.threshold < 0 or (self.settings.shift not in ("token", "learned")):
            return layer.threshold
        size = u.detach().abs().flatten()
        return float(size.kthvalue(max(1, round(layer.sparsity * size.numel()))).values)
