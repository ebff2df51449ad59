# SPDX-License-Identifier: Apache-2.0
"""Perplexity, and the texts and token windows that it and the calibration read."""

from __future__ import annotations

import gzip
import json
import math

import nncf
import pytest
import torch

from scap_nncf.perplexity import perplexity
from scap_nncf.text import builtin_text, read_texts, token_batches, token_ids

VOCABULARY = 131


def _expected(model: torch.nn.Module, ids: torch.Tensor, context: int) -> tuple[float, int]:
    """Mean NLL in float64, token by token."""
    losses = []
    for start in range(0, len(ids), context):
        window = ids[start : start + context]
        logits = model(input_ids=window[None]).logits[0].double()
        losses += [(torch.logsumexp(logits[i], 0) - logits[i, window[i + 1]]).item() for i in range(len(window) - 1)]
    return sum(losses) / len(losses), len(losses)


@pytest.mark.parametrize(("tokens", "context"), [(2, 2), (7, 512), (61, 20), (301, 150), (331, 331)])
def test_equals_token_by_token(tiny_llama, tokens, context):
    ids = torch.randint(0, VOCABULARY, (tokens,))
    result = perplexity(tiny_llama, ids, context)
    nll, count = _expected(tiny_llama, ids, context)
    assert result.tokens == count
    assert result.nll == pytest.approx(nll, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-4)


def test_a_single_token_at_the_end_is_not_predicted(tiny_llama):
    ids = torch.randint(0, VOCABULARY, (21,))
    assert perplexity(tiny_llama, ids, 20) == perplexity(tiny_llama, ids[:20], 20)


def test_batch_of_one_max_tokens_and_progress(tiny_llama):
    ids = torch.randint(0, VOCABULARY, (1, 100))
    seen: list[tuple[int, int]] = []
    result = perplexity(tiny_llama, ids, 16, max_tokens=40, progress=lambda done, total: seen.append((done, total)))
    assert result == perplexity(tiny_llama, ids[0, :40], 16)
    assert seen == [(16, 40), (32, 40), (40, 40)]


def test_bfloat16_is_evaluated_in_float32(tiny_model):
    model = tiny_model("llama", dtype=torch.bfloat16)
    ids = torch.randint(0, VOCABULARY, (50,))
    nll, _ = _expected(model, ids, 25)
    assert perplexity(model, ids, 25).nll == pytest.approx(nll, rel=1e-5)


@pytest.mark.parametrize(
    ("ids", "context", "message"),
    [
        (torch.zeros(0, dtype=torch.int64), 8, "too few"),
        (torch.zeros(1, dtype=torch.int64), 8, "too few"),
        (torch.zeros(9, dtype=torch.int64), 1, "context is 1"),
        (torch.zeros(2, 9, dtype=torch.int64), 8, "expected integers"),
        (torch.zeros(9), 8, "expected integers"),
    ],
)
def test_bad_input(tiny_llama, ids, context, message):
    with pytest.raises(nncf.ValidationError, match=message):
        perplexity(tiny_llama, ids, context)


def test_builtin_parts_share_no_paragraph():
    parts = {
        part: {paragraph for text in builtin_text(part) for paragraph in text.split("\n\n")}
        for part in ("calibration", "held_out")
    }
    assert not parts["calibration"] & parts["held_out"]
    assert sum(map(len, builtin_text("calibration"))) > 100_000
    assert sum(map(len, builtin_text("held_out"))) > 50_000
    with pytest.raises(nncf.ValidationError, match="held_out"):
        builtin_text("test")  # type: ignore[arg-type]


def test_read_texts(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo", encoding="utf-8")
    assert read_texts(tmp_path / "a.txt") == ["one\n\ntwo"]
    lines = [json.dumps({"text": "é"}), "", json.dumps("plain"), json.dumps({"text": "  "})]
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(lines))
    assert read_texts(tmp_path / "b.jsonl.gz") == ["é", "plain"]
    (tmp_path / "c.jsonl").write_text('{"body": "x"}\n', encoding="utf-8")
    assert read_texts(tmp_path / "c.jsonl", field="body") == ["x"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x", "expected a .txt or .jsonl"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y"', "line 2: not JSON"),
        ("a.jsonl", b'{"body": "x"}', "line 1.*'text'"),
        ("a.jsonl", b"[1]", "line 1"),
        ("a.txt", b" \n", "no text"),
        ("a.txt", b"\xff\xfe\xfa", "UTF-8"),
        ("a.txt.gz", b"not gzip", "cannot be read"),
        ("a.txt", None, "cannot be read"),
    ],
)
def test_read_texts_bad_file(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(nncf.ValidationError, match=message):
        read_texts(tmp_path / name)


def test_token_batches(tiny_tokenizer):
    texts = ["abcdefghij" * 5, "klmno" * 7]
    ids = token_ids(tiny_tokenizer, texts)
    batches = token_batches(tiny_tokenizer, texts, length=8, seed=3)
    assert len(batches) == len(ids) // 8
    assert {tuple(batch["input_ids"].shape) for batch in batches} == {(1, 8)}
    assert all(bool(batch["attention_mask"].all()) for batch in batches)
    # every token of the whole windows once, in another order
    rebuilt = sorted(tuple(batch["input_ids"][0].tolist()) for batch in batches)
    assert rebuilt == sorted(tuple(ids[i : i + 8].tolist()) for i in range(0, len(ids) - 7, 8))
    again = token_batches(tiny_tokenizer, texts, length=8, count=4, seed=3)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(again, batches))


def test_token_batches_short_text_and_too_many_samples(tiny_tokenizer):
    (only,) = token_batches(tiny_tokenizer, ["abc"], length=64)
    assert only["input_ids"].shape == (1, 3)
    with pytest.raises(nncf.ValidationError, match=r"2 samples of 64 tokens .* gives 1 \(3 tokens\)"):
        token_batches(tiny_tokenizer, ["abc"], length=64, count=2)
    with pytest.raises(nncf.ValidationError, match="no token"):
        token_batches(tiny_tokenizer, [""])
    with pytest.raises(nncf.ValidationError, match="at least 1"):
        token_batches(tiny_tokenizer, ["abc"], length=0)
