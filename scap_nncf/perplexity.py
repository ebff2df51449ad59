# SPDX-License-Identifier: Apache-2.0
"""Perplexity of a causal language model on a stream of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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
    :param tokens: tokens that were predicted.
    :param context: tokens a window.
    :param stride: tokens from one window to the next; equal to `context` where windows do not overlap.
    :param windows: of each window, the summed negative log-likelihood and the number of predicted tokens: what
        `scap_nncf.significance.paired_windows` compares.
    """

    perplexity: float
    nll: float
    tokens: int
    context: int
    stride: int = 0
    windows: tuple[tuple[float, int], ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        stride = f", stride {self.stride}" if self.stride not in (0, self.context) else ""
        return f"{self.perplexity:.2f} ({self.tokens} tokens, context {self.context}{stride})"


@dataclass(frozen=True)
class Window:
    """
    Tokens [start, end) of the stream; those from `scored` on are predicted, those before it are their context.

    A generation would get the context as its prompt.
    """

    start: int
    scored: int
    end: int


def windows_of(tokens: int, context: int, stride: int | None = None) -> list[Window]:
    """
    The windows of a stream.

    :param stride: None or `context`: windows do not overlap, and the first token of each is not predicted. Less: each
        window after the first predicts its last `stride` tokens, and every token but the very first is predicted once.
    :raises nncf.ValidationError: `context` is below 2, or `stride` is not in [1, context].
    """
    if context < 2:
        msg = f"context is {context}; expected at least 2: the first token of a window is not predicted"
        raise nncf.ValidationError(msg)
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        msg = f"stride is {stride}; expected 1 to {context}, the context"
        raise nncf.ValidationError(msg)
    if stride == context:
        starts = range(0, tokens, context)
        return [Window(s, s + 1, min(s + context, tokens)) for s in starts if tokens - s >= 2]
    windows, end = [], 0
    for start in range(0, tokens, stride):
        last = min(start + context, tokens)
        windows.append(Window(start, max(end, start + 1), last))
        end = last
        if end == tokens:
            break
    return [window for window in windows if window.end > window.scored]


@torch.no_grad()
def perplexity(
    model: Any,
    input_ids: torch.Tensor,
    context: int = 512,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    stride: int | None = None,
    decode: bool = False,
    batch_size: int = 1,
) -> PerplexityResult:
    """
    Perplexity over windows of `context` tokens, by default without overlap: each token but the first of its window is
    predicted from those before it in the window. A shorter window at the end counts too, if it has two tokens or more.

    A sparse model is run under the token policy of its plan. Under ``prune="decode"`` the context of a window (its
    first token, or with a `stride` its first `context` - `stride` tokens) is the prompt and stays dense; the predicted
    tokens are pruned.

    :param model: a transformers causal LM, or anything that maps `input_ids` to an output with `.logits`
        [1, context, vocabulary]; for `decode` it must take and return `past_key_values` as transformers models do. It
        is used as it is, on the device it is on.
    :param input_ids: int64 [tokens] or [1, tokens]. No special token is added.
    :param max_tokens: use only so many of the tokens.
    :param progress: called with (tokens done, tokens in all) after each window.
    :param stride: tokens from one window to the next, see `windows_of`; None for `context`.
    :param decode: run each window as a generation runs: the prompt in one pass, then token by token with the cache.
        Slow; the result is that of the whole window at once up to rounding.
    :param batch_size: windows that are decoded side by side; each is computed by itself.
    :raises nncf.ValidationError: if `context` is below 2, the input has another shape, or fewer than two tokens.
    """
    ids = input_ids.reshape(-1) if input_ids.dim() == 2 and input_ids.shape[0] == 1 else input_ids
    if ids.dim() != 1 or ids.is_floating_point():
        msg = f"input_ids is {input_ids.dtype} {list(input_ids.shape)}; expected integers [tokens] or [1, tokens]"
        raise nncf.ValidationError(msg)
    ids = ids[:max_tokens].to(_device_of(model))
    windows = windows_of(len(ids), context, stride)
    if len(ids) < 2:
        msg = f"{len(ids)} tokens are too few to predict any; expected at least 2"
        raise nncf.ValidationError(msg)
    losses = []
    for window, loss in zip(windows, window_losses(model, ids, windows, decode, batch_size)):
        losses.append(loss)
        if progress is not None:
            progress(window.end, len(ids))
    return summarise(losses, context, context if stride is None else stride)


def summarise(losses: Sequence[tuple[float, int]], context: int, stride: int) -> PerplexityResult:
    """The perplexity of windows whose losses are known."""
    count = sum(n for _, n in losses)
    nll = sum(loss for loss, _ in losses) / count
    # exp overflows past 709 nats, which only a broken model reaches
    return PerplexityResult(math.exp(nll) if nll < 700 else math.inf, nll, count, context, stride, tuple(losses))


@torch.no_grad()
def window_losses(
    model: Any, ids: torch.Tensor, windows: Sequence[Window], decode: bool = False, batch_size: int = 1
) -> Iterator[tuple[float, int]]:
    """
    For each window, the summed negative log-likelihood of its predicted tokens (nats) and how many they are.

    :param ids: int64 [tokens], on the model's device.
    """
    from scap_nncf.token_steps import must_decode, policy_of

    if isinstance(model, torch.nn.Module) or hasattr(model, "ov_models"):
        decode = decode or must_decode(model)
        in_parts = decode or policy_of(model) == "decode"
    else:
        in_parts = decode
    if not in_parts:
        for window in windows:
            logits = model(input_ids=ids[window.start : window.end].unsqueeze(0)).logits[0, :-1]  # [T - 1, vocabulary]
            skipped = window.scored - window.start - 1
            yield _loss(logits[skipped:], ids[window.scored : window.end]), window.end - window.scored
        return
    yield from _in_parts(model, ids, windows, decode, batch_size)


def _in_parts(
    model: Any, ids: torch.Tensor, windows: Sequence[Window], decode: bool, batch_size: int
) -> Iterator[tuple[float, int]]:
    """Prompt, then the rest; windows of equal lengths side by side."""
    from scap_nncf.token_steps import run_prompt, run_rest

    done = 0
    while done < len(windows):
        shapes = [(w.scored - w.start, w.end - w.scored) for w in windows[done : done + max(batch_size, 1)]]
        group = windows[done : done + next((i for i, s in enumerate(shapes) if s != shapes[0]), len(shapes))]
        tokens = torch.stack([ids[w.start : w.end] for w in group])  # [B, T]
        prompt, targets = tokens[:, : shapes[0][0]], tokens[:, shapes[0][0] :]
        first, cache = run_prompt(model, prompt)
        losses = [_loss(first[row : row + 1], targets[row, :1]) for row in range(len(group))]
        position = 1
        for logits in run_rest(model, cache, targets[:, :-1], decode) if targets.shape[1] > 1 else ():
            for row in range(len(group)):
                losses[row] += _loss(logits[row], targets[row, position : position + logits.shape[1]])
            position += logits.shape[1]
        yield from ((loss, targets.shape[1]) for loss in losses)
        done += len(group)


def _loss(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Summed negative log-likelihood of targets [T] under logits [T, vocabulary]."""
    total = 0.0
    targets = targets.to(logits.device)
    for row in range(0, len(targets), _ROWS):
        part = logits[row : row + _ROWS].float()
        loss = torch.nn.functional.cross_entropy(part, targets[row : row + _ROWS], reduction="none")
        total += loss.double().sum().item()
    return total


def _device_of(model: Any) -> torch.device:
    if isinstance(model, torch.nn.Module):
        for parameter in model.parameters():
            return parameter.device
    return torch.device("cpu")
