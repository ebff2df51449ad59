# SPDX-License-Identifier: Apache-2.0
"""
Meeting a budget with a sparse model: the sparsity that a limit on loss, bytes or time comes to.

.. code-block:: python

    model = nncf.compress(model, algorithm="scap", dataset=texts, tokenizer=tokenizer, budget=Budget(max_loss="1%"))
    print(scap_nncf.get_controller(model).plan.made_by["budget"])
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nncf
import torch
from nncf.common.logging import nncf_logger
from torch import nn

from scap_nncf.algorithms.backends import backend_of, is_optimum_model
from scap_nncf.algorithms.backends.torch.layers import named_fc_layers
from scap_nncf.algorithms.backends.torch.run import attention_mask, forward_sample, without_cache
from scap_nncf.algorithms.budget import (
    MOST,
    Budget,
    BudgetError,
    KernelTable,
    Traffic,
    byte_sparsity,
    least_sparsity,
    most_sparsity,
)
from scap_nncf.algorithms.data import Samples, fingerprint
from scap_nncf.algorithms.plan import Plan
from scap_nncf.algorithms.scap.controller import ScapController
from scap_nncf.algorithms.sites import Layer, Site

#: Stands for any loss beyond measure, so that records stay valid JSON.
BROKEN = 1e9
#: Of the samples, every so many is kept from calibration to judge the loss by.
JUDGES = 4


@dataclass(frozen=True)
class BudgetReport:
    """
    How a budget was met.

    :param budget: in words.
    :param sparsity: mean sparsity of the pruned layers' weights.
    :param bytes_left: share of the dense model's bytes of weights in fully connected layers that a token still reads.
    :param speedup: of these layers, predicted from kernel times of `kernels`.
    :param loss: measured relative rise of the metric; None where the budget needed no measurement.
    :param dense: the dense model's metric.
    :param trials: (sparsity, loss) of each measurement.
    :param seconds: duration.
    """

    budget: str
    sparsity: float
    bytes_left: float
    speedup: float
    kernels: str
    loss: float | None
    dense: float | None
    trials: tuple[tuple[float, float], ...]
    seconds: float

    def __str__(self) -> str:
        loss = "" if self.loss is None else f", {100 * self.loss:+.2f} % in the metric (dense {self.dense:.2f})"
        return (
            f"Budget ({self.budget}): sparsity {self.sparsity:.1%}, {self.bytes_left:.1%} of the bytes left, predicted "
            f"speed-up {self.speedup:.2f}{loss}; {len(self.trials)} measurements, {self.seconds:.0f} s"
        )


def traffic_of(model: Any, sites: Sequence[Site]) -> Traffic:
    """Bytes of weights in the fully connected layers of a model, pruned and not."""
    pruned = {layer.name: layer for site in sites for layer in site.layers}
    shapes = backend_of(model).shapes_of(model)
    others = [Layer(name, "", *shape) for name, shape in shapes.items() if name not in pruned]
    sizes = {layer.name: float(layer.weights) for layer in (*pruned.values(), *others)}
    if isinstance(model, nn.Module) and not is_optimum_model(model):
        for name, module, _ in named_fc_layers(model):
            held = sum(p.numel() * p.element_size() for p in module.parameters(recurse=False) if p.dim() >= 2)
            if held and name in sizes:
                sizes[name] = float(held)
    return Traffic(tuple(sites), tuple(others), sizes)


def split(samples: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """
    Samples to calibrate on and samples to judge by, by their content and not by their order.

    :raises nncf.ValidationError: fewer than four samples.
    """
    if len(samples) < JUDGES:
        msg = f"A budget of loss needs at least {JUDGES} samples, some of them to judge by; got {len(samples)}."
        raise nncf.ValidationError(msg)
    ordered = sorted(samples, key=fingerprint)
    judges = ordered[::JUDGES]
    return [sample for index, sample in enumerate(ordered) if index % JUDGES], judges


@torch.no_grad()
def mean_loss(model: Any, samples: Sequence[Any]) -> float:
    """
    Mean negative log-likelihood of the next token, nats, over samples with `input_ids` [B, T].

    :raises nncf.UnsupportedModelError: the model gives no logits [B, T, V].
    """
    total, count = 0.0, 0
    for index, sample in enumerate(samples):
        ids = sample.get("input_ids") if isinstance(sample, Mapping) else sample
        output = forward_sample(model, without_cache(model, sample), f"sample {index}")
        logits = getattr(output, "logits", None)
        if not isinstance(ids, torch.Tensor) or not isinstance(logits, torch.Tensor) or logits.dim() != 3:
            msg = f"A budget of loss needs a language model and samples with input_ids; got {type(model).__name__}."
            raise nncf.UnsupportedModelError(msg)
        mask = attention_mask(sample)
        for row in range(ids.shape[0]):
            targets = ids[row, 1:].to(logits.device)
            losses = nn.functional.cross_entropy(logits[row, :-1].float(), targets, reduction="none")
            if mask is not None:
                losses = losses[(mask[row, 1:] * mask[row, :-1]).to(losses.device) != 0]
            total += losses.double().sum().item()
            count += losses.numel()
    if count == 0:
        msg = "The samples to judge by have no token to predict; give longer ones."
        raise nncf.ValidationError(msg)
    return total / count


def meet(
    controller: ScapController,
    budget: Budget,
    perplexity: Callable[[], float] | None = None,
    on_trial: Callable[[Plan, float, float], None] | None = None,
) -> BudgetReport:
    """
    Set the sparsity of a calibrated model to what a budget comes to; the allocation stays the controller's.

    :param perplexity: measures the model as it is; for a budget of loss.
    :param on_trial: called with plan, relative loss and seconds after each measurement.
    :raises BudgetError: the budget cannot be met; the model keeps its plan, and the message has what can be reached.
    """
    start = time.perf_counter()
    before = controller.plan
    assert controller.calibration is not None
    traffic = traffic_of(controller.model, controller.calibration.sites)
    table = KernelTable.load(budget.kernels)
    trials: list[tuple[float, float]] = []
    dense: float | None = None
    loss: float | None = None

    def plan_at(sparsity: float) -> Plan:
        return controller.plan_for(sparsity)

    try:
        if budget.max_loss is not None:
            assert perplexity is not None
            with controller.disabled():
                dense = perplexity()

            def measure(sparsity: float) -> float:
                began = time.perf_counter()
                plan = controller.set_sparsity(sparsity)
                rise = min(perplexity() / dense - 1, BROKEN)
                rise = BROKEN if math.isnan(rise) else rise
                trials.append((sparsity, rise))
                nncf_logger.info(f"Budget: sparsity {sparsity:.3f} loses {100 * rise:.2f} %")
                if on_trial is not None:
                    on_trial(plan, rise, time.perf_counter() - began)
                return rise

            sparsity, loss = most_sparsity(measure, float(budget.max_loss), budget.tolerance)
        else:
            sparsity = least_for_limit(budget, traffic, table, plan_at)
        plan = controller.set_sparsity(sparsity)
    except BaseException:
        controller._change(before)
        raise
    report = BudgetReport(
        str(budget),
        byte_sparsity(plan, traffic.sites),
        traffic.left(plan),
        table.speedup(plan, traffic),
        table.source if budget.kernels else "H100",
        loss,
        dense,
        tuple(trials),
        time.perf_counter() - start,
    )
    controller.note(budget=dataclasses.asdict(report))
    nncf_logger.info(str(report))
    return report


def least_for_limit(budget: Budget, traffic: Traffic, table: KernelTable, plan_at: Callable[[float], Plan]) -> float:
    """
    The least sparsity with which a budget of bytes or speed is met.

    :param plan_at: the plan of a sparsity.
    :raises BudgetError: none suffices; the message has what can be reached.
    """
    if budget.bytes is not None:
        share = float(budget.bytes)
        found = least_sparsity(lambda s: traffic.left(plan_at(s)) <= share)
        if found is None:
            raise BudgetError(_unreachable(budget, f"{traffic.left(plan_at(MOST)):.1%} of the bytes are left"))
        return found
    wanted = float(budget.speedup or 1.0)
    found = least_sparsity(lambda s: table.speedup(plan_at(s), traffic) >= wanted)
    if found is None:
        best = table.speedup(plan_at(MOST), traffic)
        raise BudgetError(_unreachable(budget, f"the predicted speed-up is {best:.2f}"))
    return found


def _unreachable(budget: Budget, best: str) -> str:
    return (
        f"The budget of {budget} cannot be met: at a mean sparsity of {MOST:.0%} of the layers that may be pruned, "
        f"{best}. Ask for less, or let more layers be pruned (roles, ignored_scope)."
    )


def compress_to(
    build: Callable[[Any], Any], model: Any, budget: Budget, dataset: Any, tokenizer: Any, subset_size: int | None
) -> Any:
    """
    Compress and meet a budget; a model that cannot is left as it was.

    :param build: compresses the model with calibration samples.
    """
    from scap_nncf.algorithms.scap.controller import get_controller

    samples = list(Samples(dataset, tokenizer, subset_size))
    judges: list[Any] = []
    if budget.max_loss is not None:
        samples, judges = split(samples)
    result = build(samples)
    controller = get_controller(result)
    if not isinstance(controller, ScapController) or controller.calibration is None:
        msg = "A budget needs an algorithm that prunes by calibrated thresholds: algorithm='scap'."
        raise nncf.ParameterNotSupportedError(msg)
    try:
        meet(controller, budget, lambda: math.exp(min(mean_loss(result, judges), 700.0)))
    except BaseException:
        controller.strip()
        raise
    return result
