# SPDX-License-Identifier: Apache-2.0
"""Text token by token with the cache, against the same text at once, under both token policies."""

from __future__ import annotations

import math

import nncf
import pytest
import torch

import scap_nncf
from scap_nncf.algorithms.backends.torch.prune import named_pruners, token_policy
from scap_nncf.perplexity import perplexity, windows_of

VOCABULARY = 131


def _ids(count: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (count,))


def _sparse(model: torch.nn.Module, batches, prune: str, sparsity: float = 0.4) -> torch.nn.Module:
    return scap_nncf.compress(model, dataset=batches(), sparsity=sparsity, prune=prune)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt", "falcon"])
def test_dense_model_decodes_to_the_same_loss(tiny_model, family):
    model, ids = tiny_model(family), _ids(75)
    at_once = perplexity(model, ids, 20)
    decoded = perplexity(model, ids, 20, decode=True, batch_size=3)
    assert decoded.tokens == at_once.tokens
    assert [n for _, n in decoded.windows] == [n for _, n in at_once.windows]
    assert [loss for loss, _ in decoded.windows] == pytest.approx([loss for loss, _ in at_once.windows], rel=1e-4)


@pytest.mark.parametrize("prune", ["all", "decode"])
@pytest.mark.parametrize("stride", [None, 9])
def test_sparse_model_decodes_to_the_same_loss(tiny_llama, batches, prune, stride):
    ids = _ids(70)
    dense = perplexity(tiny_llama, ids, 24, stride=stride).nll
    model = _sparse(tiny_llama, batches, prune)
    at_once = perplexity(model, ids, 24, stride=stride)
    counted = scap_nncf.get_controller(model).statistics().realised_sparsity
    decoded = perplexity(model, ids, 24, stride=stride, decode=True)
    assert abs(at_once.nll - dense) > 1e-3  # else the test shows nothing
    # a value at a threshold may fall on the other side by rounding: rarely, and with little effect
    assert decoded.nll == pytest.approx(at_once.nll, abs=2e-3)
    assert counted == pytest.approx(0.4, abs=0.1)


def test_policies_differ_where_there_is_a_prompt(tiny_llama, batches):
    ids = _ids(60)
    model = _sparse(tiny_llama, batches, "all", 0.5)
    every = perplexity(model, ids, 30, stride=10).nll
    controller = scap_nncf.get_controller(model)
    controller.set_sparsity(0.5, prune="decode")
    assert abs(perplexity(model, ids, 30, stride=10).nll - every) > 1e-4


def test_decode_policy_at_once_equals_one_token_at_a_time_by_hand(tiny_llama, batches):
    """The reference: generate's own way, written out: prompt, then single tokens."""
    ids = _ids(18)
    model = _sparse(tiny_llama, batches, "decode")
    losses, cache = [], None
    prompt = 8
    with torch.no_grad():
        output = model(input_ids=ids[None, :prompt], use_cache=True)
        for position in range(prompt, len(ids)):
            row = output.logits[0, -1].double()
            losses.append((torch.logsumexp(row, 0) - row[ids[position]]).item())
            cache = output.past_key_values
            output = model(input_ids=ids[None, position : position + 1], past_key_values=cache, use_cache=True)
    from scap_nncf.perplexity import Window, window_losses

    ((loss, count),) = window_losses(model, ids, [Window(0, prompt, len(ids))])
    assert count == len(losses)
    assert loss == pytest.approx(sum(losses), rel=2e-3)


@pytest.mark.parametrize(
    ("tokens", "context", "stride"), [(50, 20, 7), (41, 20, 20), (5, 20, 4), (60, 20, 1), (21, 20, 19)]
)
def test_windows_predict_each_token_once(tokens, context, stride):
    windows = windows_of(tokens, context, stride)
    predicted = [t for w in windows for t in range(w.scored, w.end)]
    assert len(predicted) == len(set(predicted))
    assert all(w.start < w.scored < w.end <= w.start + context for w in windows)
    skipped = set(range(tokens)) - set(predicted)
    assert skipped == ({0} if stride < context else set(range(0, tokens, context)))


def test_stride_gives_more_context_as_computed_by_hand(tiny_llama):
    ids = _ids(40)
    result = perplexity(tiny_llama, ids, 16, stride=4)
    total = 0.0
    for position in range(1, 40):
        # a window ends at 16, 20, 24, ...: the first that reaches past the token predicts it
        end = 16 if position < 16 else min(16 + 4 * math.ceil((position - 15) / 4), 40)
        start = 0 if position < 16 else 4 * math.ceil((position - 15) / 4)
        row = tiny_llama(input_ids=ids[None, start:end]).logits[0, position - start - 1].double()
        total += (torch.logsumexp(row, 0) - row[ids[position]]).item()
    assert result.tokens == 39
    assert result.nll == pytest.approx(total / 39, rel=1e-5)


@pytest.mark.parametrize("stride", [0, 17, -1])
def test_bad_stride(tiny_llama, stride):
    with pytest.raises(nncf.ValidationError, match="stride"):
        perplexity(tiny_llama, _ids(40), 16, stride=stride)


def test_token_policy_counts_only_what_counts_and_goes_back(tiny_llama, batches):
    model = _sparse(tiny_llama, batches, "decode")
    controller = scap_nncf.get_controller(model)
    controller.reset_counters()
    tokens = _ids(14).reshape(2, 7)
    counted = torch.tensor([[True] * 7, [True] * 3 + [False] * 4])
    with token_policy(model, True, counted):
        model(input_ids=tokens)
    for module, pruner in named_pruners(model):
        assert pruner.total == 10 * module.in_features
        assert (pruner.forced, pruner.counted) == (None, None)
    before = {p.layer.name: p.total for _, p in named_pruners(model)}
    model(input_ids=tokens)  # a prompt under prune="decode": dense again
    assert before == {p.layer.name: p.total for _, p in named_pruners(model)}
