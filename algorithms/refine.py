# SPDX-License-Identifier: Apache-2.0
"""
Refining a plan: one static vector for the output of each pruned layer, trained against the dense model.

Pruning shifts the mean of what a layer computes, and shifts of many layers add up. A constant on each output takes back
what is the same for all tokens, and costs nothing at run time: it is folded into the layer's bias. It is trained with
the whole sparse model running, on the Kullback-Leibler divergence of its next-token distribution from the dense
model's; a closed-form correction of each layer by itself makes things worse, because the layers are not independent.
(Learned static vectors under activation sparsity: SPON, arXiv 2512.12744.)
"""

from __future__ import annotations

from dataclasses import dataclass

import nncf


@dataclass(frozen=True)
class Refine:
    """
    Settings of :meth:`scap_nncf.get_controller(model).refine`, or of ``nncf.compress(..., refine=Refine())``.

    The output of each pruned layer becomes ``W·prune(x) + b + r·β`` with r the root mean square of the layer's dense
    output and β, one number an output channel, trained from 0 by Adam (0.9, 0.98); the learning rate rises for 5 steps
    and falls to a tenth along a cosine.

    :param steps: optimiser steps at most.
    :param learning_rate: of β.
    :param tokens: tokens a step; samples are taken whole, at least one.
    :param stride: the loss counts every `stride`-th position.
    :param held_out: share of the samples that is not trained on and decides when to stop and which step to keep.
    :param check_every: steps between looks at the held-out loss.
    :param patience: stop after so many looks without a better one.
    :param mixed_precision: matrix products in bfloat16; None where the hardware has them.
    :param seed: of the order of samples.
    """

    steps: int = 50
    learning_rate: float = 3e-3
    tokens: int = 1024
    stride: int = 2
    held_out: float = 0.1
    check_every: int = 10
    patience: int = 3
    mixed_precision: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "tokens", "stride", "check_every", "patience"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                msg = f"Refine: {name} must be a whole number from 1, got {value!r}."
                raise nncf.ValidationError(msg)
        if not isinstance(self.learning_rate, (int, float)) or not 0 < self.learning_rate < 1:
            msg = f"Refine: learning_rate must be a number in (0, 1), got {self.learning_rate!r}."
            raise nncf.ValidationError(msg)
        if not isinstance(self.held_out, (int, float)) or not 0 < self.held_out < 1:
            msg = f"Refine: held_out must be a share in (0, 1), got {self.held_out!r}."
            raise nncf.ValidationError(msg)


@dataclass(frozen=True)
class RefineReport:
    """
    :param steps: steps that were run; `best_step` is the one that was kept, 0 for none.
    :param losses: held-out divergence from the dense model (nats a token) by step.
    :param seconds: duration.
    """

    steps: int
    best_step: int
    losses: dict[int, float]
    seconds: float

    def __str__(self) -> str:
        before, after = self.losses[0], self.losses[self.best_step]
        return (
            f"held-out divergence from the dense model {before:.4f} -> {after:.4f} nats a token "
            f"(step {self.best_step} of {self.steps}, {self.seconds:.0f} s)"
        )
