# SPDX-License-Identifier: Apache-2.0
"""Evaluation of OpenVINO models of Optimum-Intel, against the PyTorch model that they were exported from."""

from __future__ import annotations

import json
import random

import pytest
import torch

import scap_nncf
from scap_nncf.evaluation import evaluate
from scap_nncf.perplexity import perplexity

pytest.importorskip("lm_eval", reason="needs the extra 'eval'")


@pytest.fixture
def optimum_model(exported, exact):
    from scap_nncf.optimum import from_pretrained

    return from_pretrained(exported("llama"), task="text-generation-with-past", ov_config=exact, compile=True)


@pytest.fixture
def data(tmp_path):
    letters = "abcdefghij klm"
    text = ["".join(random.choices(letters, k=30)) for _ in range(6)]
    records = [
        {"context": line, "choices": [f" {c}{c}" for c in random.sample("opqrst", 3)], "gold": random.randrange(3)}
        for line in text
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "text.txt").write_text("".join(random.choices(letters, k=170)))
    return tmp_path


@pytest.mark.parametrize("prune", ["all", "decode"])
def test_equals_torch(optimum_model, tiny_llama, tiny_tokenizer, batches, data, prune):
    sparse = scap_nncf.compress(tiny_llama, dataset=batches(), sparsity={"all": 0.5}, prune=prune)
    plan = scap_nncf.get_controller(sparse).plan
    scap_nncf.get_controller(sparse).strip()
    arguments = {"plan": plan, "tasks": ["mine"], "data": data, "perplexity": [data / "text.txt"], "context": 48}
    torch_result = evaluate(tiny_llama, tiny_tokenizer, stride=24, **arguments)
    ov_result = evaluate(optimum_model, tiny_tokenizer, stride=24, **arguments)
    for run in ("dense", "sparse"):
        assert ov_result.texts[0].values[run].nll == pytest.approx(torch_result.texts[0].values[run].nll, abs=0.01)
        assert ov_result.tasks[0].items == torch_result.tasks[0].items == 6
    # scores near a tie may fall the other way; the likelihoods do not
    assert list(ov_result.tasks[0].outcomes["dense"]) == list(torch_result.tasks[0].outcomes["dense"])
    assert abs(ov_result.texts[0].changes["sparse"].difference) > 0.005
    assert ov_result.runs[1].realised == pytest.approx(0.5, abs=0.12)
    assert scap_nncf.get_controller(optimum_model) is None


def test_token_by_token(optimum_model, tiny_tokenizer):
    ids = torch.randint(3, 131, (70,))
    at_once = perplexity(optimum_model, ids, 24, stride=16)
    decoded = perplexity(optimum_model, ids, 24, stride=16, decode=True)
    assert decoded.tokens == at_once.tokens
    assert decoded.nll == pytest.approx(at_once.nll, rel=1e-4)
