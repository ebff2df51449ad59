# SPDX-License-Identifier: Apache-2.0
"""Refining: the vectors help, are part of the plan, and every way to run the model adds them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import pytest
import torch
from torch import nn

import scap_nncf
from scap_nncf.algorithms.plan import Plan
from scap_nncf.algorithms.refine import Refine
from scap_nncf.cli import main
from scap_nncf.deployment import deploy, undeploy

Factory = Callable[..., Any]
QUICK = Refine(steps=12, learning_rate=2e-2, tokens=60, check_every=4, mixed_precision=False)


def _refined(model: nn.Module, data: Any, **settings: Any) -> Any:
    nncf.compress(model, dataset=data, **{"sparsity": 0.6, "mode": "zero", "refine": QUICK, **settings})
    return scap_nncf.get_controller(model)


def _with_random_biases(plan: Plan, scale: float = 0.3) -> Plan:
    random = np.random.default_rng()
    return plan.with_vectors(
        {(layer.name, "bias"): scale * random.standard_normal(layer.out_features) for layer in plan.layers}
    )


@pytest.mark.parametrize("family", ["opt", "gpt2"])  # their hidden values are not centred: there is a mean to lose
def test_refining_comes_closer_to_the_dense_model(family: str, tiny_model: Factory, batches: Factory) -> None:
    model = tiny_model(family)
    model.requires_grad_(True)
    data, unseen = batches(24), batches(4, seed=7)
    with torch.no_grad():
        dense = [model(**sample).logits.log_softmax(-1) for sample in unseen]

    def divergence() -> float:
        with torch.no_grad():
            return sum(
                float((p.exp() * (p - model(**sample).logits.log_softmax(-1))).sum(-1).mean())
                for p, sample in zip(dense, unseen)
            )

    nncf.compress(model, dataset=data, sparsity=0.6)
    before = divergence()
    controller = scap_nncf.get_controller(model)
    report = controller.refine(data, settings=QUICK)
    assert report.best_step > 0
    assert report.losses[report.best_step] < report.losses[0]
    assert divergence() < before
    assert all(layer.vectors == ("bias",) for layer in controller.plan.layers if layer.threshold >= 0)
    # thresholds were matched: what is pruned now is what was asked
    controller.reset_counters()
    for sample in data:
        model(**sample)
    statistics = controller.statistics()
    assert statistics.realised_sparsity == pytest.approx(statistics.sparsity, abs=0.01)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    controller.strip()
    with torch.no_grad():
        assert all(torch.equal(p, model(**sample).logits.log_softmax(-1)) for p, sample in zip(dense, unseen))


def test_vectors_are_saved_with_the_plan(tiny_gpt2: nn.Module, batches: Factory, tmp_path: Path) -> None:
    controller = _refined(tiny_gpt2, batches(24))
    sample = batches(1, seed=3)[0]
    with torch.no_grad():
        expected = tiny_gpt2(**sample).logits
    plan = controller.plan
    assert plan.made_by["refined"]["best_step"] > 0
    assert plan.made_by["settings"]["refine"]["steps"] == 12
    controller.save(tmp_path)
    assert json.loads((tmp_path / "plan.json").read_text())["schema_version"] == 2
    controller.strip()
    nncf.compress(tiny_gpt2, plan=tmp_path)
    with torch.no_grad():
        assert torch.equal(tiny_gpt2(**sample).logits, expected)
    again = scap_nncf.get_controller(tiny_gpt2)
    assert again.plan.sites == plan.sites
    # vectors stay when the sparsity changes
    changed = again.set_sparsity(0.3)
    assert changed.vectors.keys() == plan.vectors.keys()
    assert all(np.array_equal(changed.vectors[key], plan.vectors[key]) for key in plan.vectors)


@pytest.mark.parametrize("policy", ["all", "decode"])
@pytest.mark.parametrize(("family", "mode"), [("llama", "zero"), ("gpt2", "median")])
def test_deployed_layers_add_the_vectors(
    family: str, mode: str, policy: str, tiny_model: Factory, batches: Factory
) -> None:
    model = tiny_model(family)
    nncf.compress(model, dataset=batches(2), sparsity=0.5, mode=mode, prune=policy)
    controller = scap_nncf.get_controller(model)
    plan = _with_random_biases(controller.plan)
    with torch.no_grad():
        unrefined = model(batches(1)[0]["input_ids"][:, :1]).logits
    controller.strip()
    nncf.compress(model, plan=plan)
    ids = batches(1)[0]["input_ids"]
    with torch.no_grad():
        expected = [model(ids).logits, model(ids[:, :1]).logits]
        deploy(model, backend="reference")
        for tokens, logits in zip((ids, ids[:, :1]), expected):
            assert torch.allclose(model(tokens).logits, logits, rtol=1e-3, atol=1e-4)
        undeploy(model)
        assert torch.equal(model(ids).logits, expected[0])
    assert not torch.allclose(expected[1], unrefined, atol=1e-2)


def test_quantised_weights_are_refined_and_deployed(tiny_model: Factory, batches: Factory) -> None:
    data = batches(24)
    mode = nncf.CompressWeightsMode.INT8_SYM
    model = nncf.compress_weights(tiny_model("gpt2"), mode=mode, dataset=nncf.Dataset(data))
    controller = _refined(model, data)
    assert controller.plan.vectors
    ids = batches(1, 48, 2, seed=5)[0]["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits
        deploy(model, backend="reference")
        close = (model(ids).logits - expected).abs() < 1e-2
    # a value at the threshold may fall on the other side of it; the other tokens agree
    assert close.all(-1).float().mean() > 0.6


def test_what_cannot_be_refined(tiny_llama: nn.Module, batches: Factory) -> None:
    with pytest.raises(nncf.ValidationError, match="two samples"):
        nncf.compress(tiny_llama, dataset=batches(1), sparsity=0.5, refine=QUICK)
    assert scap_nncf.get_controller(tiny_llama) is None
    encoder = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    with pytest.raises(nncf.UnsupportedModelError, match="language model"):
        nncf.compress(encoder, dataset=[torch.randn(2, 8)] * 4, sparsity=0.5, refine=QUICK)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in encoder.modules())
    for bad in ({"steps": 0}, {"learning_rate": 2}, {"held_out": 0.0}):
        with pytest.raises(nncf.ValidationError, match="Refine"):
            Refine(**bad)
    with pytest.raises(nncf.ValidationError, match="refine must be"):
        scap_nncf.Scap(refine=True)


def test_thresholds_can_be_matched_to_other_text(tiny_llama: nn.Module, batches: Factory) -> None:
    nncf.compress(tiny_llama, dataset=batches(4), sparsity=0.5, prune="decode")
    controller = scap_nncf.get_controller(tiny_llama)
    few = [{"input_ids": torch.full((2, 30), 7) + torch.arange(30) % 5} for _ in range(2)]  # of another kind
    plan = controller.match_realised(few)
    assert plan.prune == "decode"
    controller.set_sparsity(0.5)
    controller._change(dataclasses.replace(plan, prune="all"))
    for sample in few:
        tiny_llama(**sample)
    assert controller.statistics().realised_sparsity == pytest.approx(0.5, abs=0.03)


def test_refine_and_match_on_the_command_line(
    tiny_model_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "like.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    command = ["compress", tiny_model_dir, "--samples", "6", "--length", "48", "--json", "--sparsity", "0.5"]
    command += ["--refine", "--refine-steps", "2", "--match", str(text), "--output", str(tmp_path / "plan")]
    assert main(command) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["refine"]["steps"] == 2
    plan = Plan.load(tmp_path / "plan")
    assert plan.made_by["refined"]["settings"]["steps"] == 2
    assert "thresholds_matched" in plan.made_by
    uniform = [*command[:6], "--json", "--allocation", "uniform", "--output", str(tmp_path / "uniform")]
    assert main(uniform) == 0
    assert {layer.sparsity for layer in Plan.load(tmp_path / "uniform").layers} == {0.5}
