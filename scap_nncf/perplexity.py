# SPDX-License-Identifier: Apache-2.0
"""Perplexity of a causal language model on a stream of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import nncf
import torch

# Rows of logits that are turned to float32 at a time: 128 x a vocabulary of 128k x 4 bytes = 64 MB.
_ROWS = 128


@dataclass(frozen=True)
class PerplexityResult:
    """
    :param perplexity: exp(nll).
    :param nll: mean negative log-likelihood of a predicted token, in nats.
    :param tokens: tokens that were predicted (all but the first of each window).
    :param context: tokens a window.
    """

    perplexity: float
    nll: float
    tokens: int
    context: int

    def __str__(self) -> str:
        return f"{self.perplexity:.2f} ({self.tokens} tokens, context {self.context})"


@torch.no_grad()
def perplexity(
    model: Any,
    input_ids: torch.Tensor,
    context: int = 512,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
    """
    Perplexity over windows of `context` tokens that do not overlap; each token but the first of its window is predicted
    from those before it in the window. A shorter window at the end counts too, if it has two tokens or more.

    :param model: a transformers causal LM, or anything that maps `input_ids` to an output with `.logits`
        [1, context, vocabulary]. It is used as it is, on the device it is on.
    :param input_ids: int64 [tokens] or [1, tokens]. No special token is added.
    :param max_tokens: use only so many of the tokens.
    :param progress: called with (tokens done, tokens in all) after each window.
    :raises nncf.ValidationError: if `context` is below 2, the input has another shape, or fewer than two tokens.
    """
    ids = input_ids.reshape(-1) if input_ids.dim() == 2 and input_ids.shape[0] == 1 else input_ids
    if ids.dim() != 1 or ids.is_floating_point():
        msg = f"input_ids is {input_ids.dtype} {list(input_ids.shape)}; expected integers [tokens] or [1, tokens]"
        raise nncf.ValidationError(msg)
    if context < 2:
        msg = f"context is {context}; expected at least 2: the first token of a window is not predicted"
        raise nncf.ValidationError(msg)
    ids = ids[:max_tokens].to(_device_of(model))
    if len(ids) < 2:
        msg = f"{len(ids)} tokens are too few to predict any; expected at least 2"
        raise nncf.ValidationError(msg)
    total, count = 0.0, 0
    for start in range(0, len(ids), context):
        window = ids[start : start + context]
        if len(window) < 2:
            break
        logits = model(input_ids=window.unsqueeze(0)).logits[0, :-1]  # [len(window) - 1, vocabulary]
        targets = window[1:].to(logits.device)
        for row in range(0, len(targets), _ROWS):
            part = logits[row : row + _ROWS].float()
            loss = torch.nn.functional.cross_entropy(part, targets[row : row + _ROWS], reduction="none")
            total += loss.double().sum().item()
        count += len(targets)
        if progress is not None:
            progress(start + len(window), len(ids))
    nll = total / count
    # exp overflows past 709 nats, which only a broken model reaches
    return PerplexityResult(math.exp(nll) if nll < 700 else math.inf, nll, count, context)


def _device_of(model: Any) -> torch.device:
    if isinstance(model, torch.nn.Module):
        for parameter in model.parameters():
            return parameter.device
    return torch.device("cpu")
