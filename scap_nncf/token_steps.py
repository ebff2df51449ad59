# SPDX-License-Identifier: Apache-2.0
"""
A text in the way it is generated: a prompt in one pass, then token after token with the key-value cache.

The same text can be run *at once*: prompt in one pass, the rest in another. What each token is computed from is the
same, and so is the pruning, where the plan's token policy is held to (`prune="decode"` keeps the prompt dense and
prunes what follows). Both ways give equal logits up to rounding.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import nncf
import torch

import scap_nncf
from scap_nncf.algorithms.backends import is_optimum_model

# Tokens a pass of the rest of a text: bounds the logits, which are [B, tokens, vocabulary].
_CHUNK = 512


def policy_of(model: Any) -> str | None:
    """The token policy of a sparse model's plan, ``all`` or ``decode``; None for a dense one."""
    controller = scap_nncf.get_controller(model)
    return None if controller is None else controller.plan.prune


def must_decode(model: Any) -> bool:
    """
    Whether a model can show its token policy only token by token: an OpenVINO graph, or deployed kernels, that prune
    while decoding.
    """
    if policy_of(model) != "decode":
        return False
    from scap_nncf.algorithms.backends.torch.prune import DEPLOYMENT, expert_pruners, named_pruners

    if is_optimum_model(model) or DEPLOYMENT in model.__dict__:
        return True
    controller: Any = scap_nncf.get_controller(model)
    simulated = {p.layer.name for _, p in named_pruners(model)}
    simulated.update(name for pruner in expert_pruners(model) for name in pruner.counts())
    return simulated != {layer.name for layer in controller.plan.layers}


def run_prompt(model: Any, prompt: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """
    The prompt in one pass, as a generation begins.

    :param prompt: int64 [B, P], no padding.
    :return: logits after the last token, [B, vocabulary]; and the cache.
    :raises nncf.UnsupportedModelError: the model keeps no key-value cache.
    """
    options: dict[str, Any] = {"use_cache": True}
    if not is_optimum_model(model):
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            options["logits_to_keep"] = 1
    else:
        options = {}  # the cache is inside of the graph, and each prompt resets it
    output = model(input_ids=prompt, **options)
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        msg = f"{type(model).__name__} returns no key-value cache, which evaluation token by token needs"
        raise nncf.UnsupportedModelError(msg)
    return output.logits[:, -1], cache


def can_share_prompts(model: Any) -> bool:
    """Whether a prompt's cache can be used for several continuations: a transformers model with a `DynamicCache`."""
    if is_optimum_model(model):
        return False
    try:
        _, cache = run_prompt(model, torch.zeros(1, 1, dtype=torch.int64, device=model.device))
    except (nncf.UnsupportedModelError, TypeError):
        return False
    return hasattr(cache, "batch_select_indices")


def select(cache: Any, rows: list[int], device: Any) -> Any:
    """A cache with the given rows of one [B, ...], each as often as it is named; it is used up."""
    cache.batch_select_indices(torch.tensor(rows, device=device))
    return cache


def run_rest(
    model: Any, cache: Any, tokens: torch.Tensor, decode: bool, lengths: torch.Tensor | None = None
) -> Iterator[torch.Tensor]:
    """
    What follows the prompt.

    :param cache: of `run_prompt`; it is used up.
    :param tokens: int64 [B, T], padded on the right with any token.
    :param decode: token by token as a generation runs; else in passes of up to 512 tokens, with the pruning that the
        token policy gives tokens that come alone.
    :param lengths: int64 [B], tokens of each text without padding; None for T.
    :return: logits [B, t, vocabulary] after each of the tokens, in pieces of t = 1 or up to 512.
    """
    # transformers models take their length from the cache; a graph has the mask as its only measure
    past = ((),) if is_optimum_model(model) else cache
    step = 1 if decode else _CHUNK
    at_once = not decode and policy_of(model) == "decode"
    valid = None
    if lengths is not None and int(lengths.min()) < tokens.shape[1]:
        valid = torch.arange(tokens.shape[1], device=tokens.device) < lengths.to(tokens.device).unsqueeze(1)  # [B, T]
    for start in range(0, tokens.shape[1], step):
        part = tokens[:, start : start + step]
        with _policy(model, at_once, None if valid is None else valid[:, start : start + step]):
            output = model(input_ids=part, past_key_values=past)
        yield output.logits


def _policy(model: Any, at_once: bool, counted: torch.Tensor | None) -> AbstractContextManager[None]:
    if is_optimum_model(model) or (not at_once and counted is None):
        return nullcontext()
    from scap_nncf.algorithms.backends.torch.prune import token_policy

    return token_policy(model, True if at_once else None, counted)
