# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts: fused 3-D parameters, experts that few or no tokens reach, routers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import pytest
import torch
from torch import nn

import scap_nncf
from scap_nncf import Scap
from scap_nncf.algorithms.backends.torch import experts
from scap_nncf.algorithms.plan import Plan
from scap_nncf.algorithms.scap.histogram import ActivationHistogram
from scap_nncf.algorithms.scap.pooling import OWN_TOKENS, shrink
from scap_nncf.algorithms.scap.statistics import bucket_counts
from scap_nncf.algorithms.sites import Layer, Site

Factory = Callable[..., Any]
FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_site_for_every_expert_and_no_router(tiny_model: Factory, family: str) -> None:
    report = scap_nncf.inspect_model(tiny_model(family))
    roles = [tuple(layer.role for layer in site.layers) for site in report.sites]
    blocks = 1 if family == "deepseek_v3" else 2  # the first block is dense there
    assert roles.count(("experts.gate_up",)) == roles.count(("experts.down",)) == 4 * blocks
    assert not any("router" in layer.name or layer.name.endswith(".gate") for s in report.sites for layer in s.layers)
    routers = [item for item in report.left_out if "router" in item.reason]
    assert len(routers) == (2 if family == "qwen2_moe" else 1) * blocks  # and the gate of the shared expert
    # execution order: the experts' inputs before the experts' inner tensors, block after block
    assert [site.block for site in report.sites] == sorted(site.block for site in report.sites)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_forward_that_is_watched_changes_no_bit(
    tiny_model: Factory, batches: Factory, family: str, implementation: str
) -> None:
    model, sample = tiny_model(family, seed=3), batches(1, 3, 11, seed=5)[0]
    model.set_experts_implementation(implementation)
    dense = model(**sample).logits
    stage = experts.Stage()
    for _, module in experts.named_experts(model):
        experts.attach(module, stage)
    assert torch.equal(model(**sample).logits, dense)
    for _, module in experts.named_experts(model):
        experts.detach(module, stage)
        assert "forward" not in module.__dict__


def random_plan(model: nn.Module, sample: Any, seed: int, mode: bool = True) -> Plan:
    """Every layer its own threshold, every site its own mode."""
    generator = np.random.default_rng(seed)
    plan = scap_nncf.make_plan(scap_nncf.calibrate(model, dataset=[sample]), Scap(sparsity=0.5))
    sites = []
    for site in plan.sites:
        layers = tuple(replace(layer, threshold=float(np.float32(generator.uniform(0, 0.5)))) for layer in site.layers)
        sites.append(replace(site, mode=float(np.float32(generator.normal(0, 0.2))) if mode else 0.0, layers=layers))
    return replace(plan, sites=tuple(sites))


def reference(model: nn.Module, plan: Plan, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """One experts module, one expert after the other, in float64: equations 1 to 6 of the paper written out."""
    name, module = next(iter(experts.named_experts(model)))
    values = {layer.name: (site.mode, layer.threshold) for site in plan.sites for layer in site.layers}

    def linear(rows: torch.Tensor, expert: int, projection: str) -> torch.Tensor:
        mode, threshold = values[f"{name}.{expert}.{projection}"]
        weight = getattr(module, projection)[expert].double()
        weight = weight if module.is_transposed else weight.t()
        z = rows - mode
        z = torch.where(z.abs() <= threshold, 0.0, z)
        bias = getattr(module, f"{projection}_bias")[expert].double() if module.has_bias else 0.0
        return z @ weight + bias + mode * weight.sum(0)

    result = torch.zeros_like(x, dtype=torch.float64)
    for token in range(x.shape[0]):
        for rank in range(ids.shape[1]):
            expert = int(ids[token, rank])
            inner = module._apply_gate(linear(x[token : token + 1].double(), expert, "gate_up_proj"))
            result[token] += float(weights[token, rank]) * linear(inner, expert, "down_proj")[0]
    return result


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "traced"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_each_expert_has_its_own_threshold_and_mode(
    tiny_model: Factory, batches: Factory, family: str, implementation: str
) -> None:
    model = tiny_model(family, seed=1)
    plan = random_plan(model, batches(1)[0], seed=2)
    nncf.compress(model, plan=plan)
    _, module = next(iter(experts.named_experts(model)))
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(13, 48, generator=generator)
    ids = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(13)])
    weights = torch.rand(13, 2, generator=generator)
    expected = reference(model, plan, x, ids, weights)
    if implementation == "traced":
        got = torch.jit.trace(module, (x, ids, weights), check_trace=False)(x, ids, weights)
    else:
        model.set_experts_implementation(implementation)
        got = module(x, ids, weights)
    assert ((got.double() - expected).norm() / expected.norm()) < 1e-5
    assert module(x[:0], ids[:0], weights[:0]).shape == (0, 48)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_calibrate_prune_save_reload_strip(tiny_model: Factory, batches: Factory, tmp_path: Path, family: str) -> None:
    data = batches(6, 4, 32)
    model = tiny_model(family)
    dense = model(**data[0]).logits
    nncf.compress(model, dataset=data, sparsity=0.4, mode="mean", sequential=True, allocation="uniform")
    controller = scap_nncf.get_controller(model)
    sparse = model(**data[0]).logits
    controller.reset_counters()
    for sample in data:
        model(**sample)
    statistics = controller.statistics()
    for layer in statistics.layers:
        assert layer.realised_sparsity == pytest.approx(0.4, abs=0.01 if layer.tokens >= OWN_TOKENS else 0.05)
    rows = statistics.experts()
    assert all(row.experts == 4 and sum(row.tokens) == 2 * 6 * 4 * 32 for row in rows)
    assert rows[0].layer in str(statistics)

    scap_nncf.save_pretrained(model, tmp_path / "model")
    again = scap_nncf.load_pretrained(tmp_path / "model")
    assert torch.equal(again(**data[0]).logits, sparse)
    twin = copy.deepcopy(model)
    scap_nncf.get_controller(twin).strip()
    assert torch.equal(model(**data[0]).logits, sparse)
    assert torch.equal(twin(**data[0]).logits, dense)

    with controller.disabled():
        assert torch.equal(model(**data[0]).logits, dense)
    controller.set_sparsity({"experts": 0.6, "attn": 0.0})
    assert {layer.sparsity for layer in controller.plan.layers if layer.role == "experts.down"} == {0.6}
    controller.set_sparsity(0.0)
    assert torch.equal(model(**data[0]).logits, dense)
    controller.strip()
    assert torch.equal(model(**data[0]).logits, dense)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("settings", [{}, {"sequential": True}, {"allocation": "fisher"}])
def test_any_order_gives_the_same_plan(tiny_model: Factory, batches: Factory, settings: dict[str, Any]) -> None:
    data = batches(4)
    plans = []
    for order in (data, data[::-1]):
        model = nncf.compress(tiny_model("mixtral"), dataset=order, sparsity=0.5, mode="mean", **settings)
        plans.append(scap_nncf.get_controller(model).plan)
    if settings.get("allocation") == "fisher":  # labels are drawn by the number of the sample
        layers = [layer for layer in plans[0].layers if layer.role.startswith("experts.")]
        assert len({layer.sparsity for layer in layers}) > 2
        total = sum(layer.in_features * layer.out_features for layer in plans[0].layers)
        mean = sum(layer.in_features * layer.out_features * layer.sparsity for layer in plans[0].layers) / total
        assert mean == pytest.approx(0.5, abs=1e-6)
    else:
        assert plans[0].to_json() == plans[1].to_json()


def test_padding_does_not_count(tiny_model: Factory, batches: Factory) -> None:
    model, short = tiny_model("mixtral"), batches(1, 2, 11)[0]
    padded = {
        "input_ids": nn.functional.pad(short["input_ids"], (0, 6), value=5),
        "attention_mask": nn.functional.pad(short["attention_mask"], (0, 6)),
    }
    plain, masked = (scap_nncf.calibrate(model, dataset=[sample]) for sample in (short, padded))
    names = [site.name for site in plain.sites if "experts" in site.name]
    assert sum(plain.tokens_at(site) for site in plain.sites if site.name in names) == 2 * 2 * 2 * 22
    for site in plain.sites:
        assert plain.tokens_at(site) == masked.tokens_at(site)


def test_experts_that_no_token_reached_are_planned_on_their_siblings(tiny_model: Factory, batches: Factory) -> None:
    """And a plan with them applies, saves its counts, and is as good as any where they do run."""
    model, data = tiny_model("mixtral"), batches(3)
    for layer in model.model.layers:  # the last two experts get nothing
        layer.mlp.gate.register_forward_hook(lambda _m, _a, out: (out[0], out[1], out[2] % 2))
    statistics = scap_nncf.calibrate(model, dataset=data)
    silent = {site.name for site in statistics.sites if statistics.tokens_at(site) == 0}
    names = [
        f"model.layers.{b}.mlp.experts.{e}.{p}_proj" for b in range(2) for e in (2, 3) for p in ("gate_up", "down")
    ]
    assert silent == set(names)
    for sequential in (False, True):
        nncf.compress(model, dataset=data, sparsity=0.5, sequential=sequential)
        controller = scap_nncf.get_controller(model)
        thresholds = {layer.name: layer.threshold for layer in controller.plan.layers}
        assert len(thresholds) == 24
        assert all(thresholds[name] > 0 for name in silent)
        assert any(row.silent for row in controller.statistics().experts())
        controller.strip()


def test_shrinkage() -> None:
    """From nothing of its own at 0 tokens to nothing of the pool at OWN_TOKENS."""
    width = 16
    sites = [
        Site(f"b.0.experts.{e}.down", 0, (Layer(f"b.0.experts.{e}.down", "experts.down", width, 8),)) for e in "012"
    ]

    def histogram(tokens: int, scale: float) -> ActivationHistogram:
        values = torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens)) * scale
        return ActivationHistogram(bucket_counts(values).numpy())

    found = {site.name: histogram(n, s) for site, n, s in zip(sites, (4 * OWN_TOKENS, OWN_TOKENS // 2, 0), (1, 9, 1))}
    planned = shrink(sites, found)
    big, half, none = (planned[site.name].quantile(0.5) for site in sites)
    own = [found[site.name].quantile(0.5) for site in sites[:2]]
    assert big == own[0]
    assert none == pytest.approx(found[sites[0].name].merge(found[sites[1].name]).quantile(0.5), rel=1e-3)
    assert none < half < own[1]
    lonely = shrink(sites[1:2], found)
    assert lonely[sites[1].name].quantile(0.5) == own[1]  # no siblings: nothing to draw on


class Separate(nn.Module):
    """Experts that are modules of their own, as older modelling code has them; the last one never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"gate": nn.Linear(12, 3)})])
        self.layers[0]["experts"] = nn.ModuleList(
            nn.ModuleDict({"w1": nn.Linear(12, 20), "w3": nn.Linear(12, 20), "w2": nn.Linear(20, 12)}) for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.reshape(-1, 12)
        chosen = self.layers[0]["gate"](x)[:, :2].argmax(-1)
        result = torch.zeros_like(x)
        for number, expert in enumerate(self.layers[0]["experts"]):
            rows = x[chosen == number]
            if rows.numel():
                result[chosen == number] = expert["w2"](expert["w1"](rows).relu() * expert["w3"](rows))
        return result


def test_experts_as_modules_of_their_own() -> None:
    torch.manual_seed(0)
    model, x = Separate(), torch.randn(64, 12)
    report = scap_nncf.inspect_model(model, sample=x)
    roles = [tuple(layer.role for layer in site.layers) for site in report.sites]
    assert roles.count(("experts.gate", "experts.up")) == roles.count(("experts.down",)) == 3
    assert [item.reason[:6] for item in report.left_out] == ["router"]
    nncf.compress(model, dataset=[x], sparsity=0.5)
    layers = {layer.name: layer for layer in scap_nncf.get_controller(model).statistics().layers}
    assert layers["layers.0.experts.2.w2"].tokens == 0
    assert layers["layers.0.experts.2.w2"].threshold > 0


def test_experts_that_another_tool_has_taken_over_are_left_out(tiny_model: Factory, batches: Factory) -> None:
    model = tiny_model("mixtral")
    module = model.model.layers[0].mlp.experts
    module.forward = lambda *args: type(module).forward(module, *args)
    report = scap_nncf.inspect_model(model)
    assert any("patched" in item.reason for item in report.left_out)
    assert sum("experts" in site.name for site in report.sites) == 8
    nncf.compress(model, dataset=batches(1), sparsity=0.5)


def test_experts_in_an_unknown_layout_are_named() -> None:
    import transformers as tf

    config = tf.GraniteMoeConfig(
        vocab_size=131,
        hidden_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        intermediate_size=40,
        num_local_experts=4,
    )
    report = scap_nncf.inspect_model(tf.AutoModelForCausalLM.from_config(config).eval())
    assert any("unknown layout" in item.reason for item in report.left_out)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_compiles_without_graph_break(tiny_model: Factory, batches: Factory, implementation: str) -> None:
    model, sample = tiny_model("mixtral"), batches(1)[0]
    model.set_experts_implementation(implementation)
    nncf.compress(model, dataset=[sample], sparsity=0.4, mode="mean")
    expected = model(**sample, use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(**sample, use_cache=False).logits, expected, atol=1e-5)


def test_decode_policy(tiny_model: Factory, batches: Factory) -> None:
    model, sample = tiny_model("mixtral"), batches(1, 1)[0]
    dense = model(**sample).logits
    nncf.compress(model, dataset=[sample], sparsity=0.5, prune="decode", mode="mean")
    assert torch.equal(model(**sample).logits, dense)
    token = {"input_ids": sample["input_ids"][:, :1]}
    sparse = model(**token).logits
    with scap_nncf.get_controller(model).disabled():
        assert not torch.equal(model(**token).logits, sparse)


def test_patterns(tiny_model: Factory, batches: Factory) -> None:
    model, data = tiny_model("mixtral"), batches(1)
    dense = model(**data[0]).logits
    nncf.compress(model, algorithm="nm", dataset=data, pattern="2:4")
    assert not torch.equal(model(**data[0]).logits, dense)
    realised = {layer.role: layer.realised_sparsity for layer in scap_nncf.get_controller(model).statistics().layers}
    assert realised["experts.down"] == realised["experts.gate_up"] == 0.5
    scap_nncf.get_controller(model).strip()
    before = [sorted(module.__dict__) for module in model.modules()]
    with pytest.raises(nncf.ParameterNotSupportedError, match="ignored_scope"):
        nncf.compress(model, algorithm="nm", dataset=data, pattern="2:4", mitigation="var")
    assert [sorted(module.__dict__) for module in model.modules()] == before
    assert torch.equal(model(**data[0]).logits, dense)


def test_deployed_experts_stay_simulated(tiny_model: Factory, batches: Factory) -> None:
    from scap_nncf.deployment import deploy, undeploy

    model, sample = tiny_model("mixtral"), batches(1)[0]
    nncf.compress(model, dataset=[sample], sparsity=0.5, mode="mean")
    sparse = model(**sample).logits
    assert torch.allclose(deploy(model, backend="reference")(**sample).logits, sparse, atol=1e-4)
    assert torch.equal(undeploy(model)(**sample).logits, sparse)
