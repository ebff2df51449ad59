# SPDX-License-Identifier: Apache-2.0
"""Allocations: the budget is kept, prices are what the definition says, the cheap layers pay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import scap_nncf
from scap_nncf.algorithms.allocation import fisher, profile
from scap_nncf.algorithms.allocation.fisher import LEVELS, MAX_SPARSITY, Costs
from scap_nncf.algorithms.backends.torch.fisher import _label_seed, _sampled_loss
from scap_nncf.algorithms.data import Kept, fingerprint

Factory = Callable[..., Any]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.floats(0.0, 0.96), st.integers(0, 2**31))
def test_the_budget_is_spent_exactly(count: int, share: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    weights = {f"l{i}": int(random.integers(1, 1000)) for i in range(count)}
    prices = {name: np.sort(random.exponential(size=len(LEVELS))) for name in weights}
    budget = share * sum(weights.values())
    values = fisher.allocate(Costs(prices, 1), weights, budget)
    assert sum(weights[name] * value for name, value in values.items()) == pytest.approx(budget)
    assert all(0 <= value <= MAX_SPARSITY + 1e-12 for value in values.values())
    values = profile.allocate(dict.fromkeys(weights, "up"), weights, budget)
    assert sum(weights[name] * value for name, value in values.items()) == pytest.approx(budget)


def test_fisher_is_the_cheapest_of_all_plans_on_its_levels() -> None:
    """For convex prices the greedy filling is optimal; checked against all combinations of three layers."""
    random = np.random.default_rng()
    weights = {"a": 100, "b": 200, "c": 100}
    curves = {name: random.uniform(0.1, 3) * np.array(LEVELS) ** random.uniform(1.5, 4) for name in weights}
    levels = [level for level in LEVELS if level < MAX_SPARSITY]
    values = fisher.allocate(Costs(curves, 1), weights, 200.0)

    def total(choice: dict[str, float]) -> float:
        return sum(float(np.interp(choice[name], LEVELS, curves[name])) for name in weights)

    best = min(
        total({"a": a, "b": b, "c": c})
        for a in levels
        for b in levels
        for c in levels
        if 100 * a + 200 * b + 100 * c >= 200
    )
    assert total(values) <= best * (1 + 1e-9)


def test_prices_follow_their_definition(tiny_llama: nn.Module, batches: Factory) -> None:
    """g = δ·W from the gradient at the layer's output, summed by level in float64."""
    data = batches(2)
    costs = scap_nncf.calibrate(tiny_llama, dataset=data, allocation="fisher", mode="zero").costs
    statistics = scap_nncf.calibrate(tiny_llama, dataset=data)
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        module = tiny_llama.get_submodule(name)
        site = next(s for s in statistics.sites if name in [layer.name for layer in s.layers])
        histogram = statistics.histograms[site.name]
        expected, tokens = np.zeros(len(LEVELS)), 0
        for sample in data:
            kept: dict[str, torch.Tensor] = {}

            def hook(_m: nn.Module, args: Any, output: torch.Tensor, kept: dict[str, torch.Tensor] = kept) -> Any:
                kept["x"] = args[0].detach()
                kept["y"] = output.detach().requires_grad_()
                return kept["y"]

            handle = module.register_forward_hook(hook)
            with torch.enable_grad():
                _sampled_loss(tiny_llama(**sample).logits, None, _label_seed(sample, None, 0))[0].backward()
            handle.remove()
            gradient = (kept["y"].grad @ module.weight).reshape(-1, module.in_features).double()
            x = kept["x"].reshape(-1, module.in_features).double()
            for position, level in enumerate(LEVELS[1:], start=1):
                dropped = (x.abs() <= histogram.quantile(level)) * gradient * x
                expected[position] += dropped.sum(1).square().sum().item()
            tokens += len(x)
        assert costs.prices[name] == pytest.approx(expected / tokens, rel=1e-3, abs=1e-9)
    assert costs.tokens == tokens


def test_fisher_lowers_the_predicted_price(tiny_llama: nn.Module, batches: Factory, tmp_path: Path) -> None:
    nncf.compress(tiny_llama, dataset=batches(), sparsity=0.5, allocation="fisher")
    controller = scap_nncf.get_controller(tiny_llama)
    assert controller.statistics().sparsity == pytest.approx(0.5)
    q, k, v = controller.plan.sites[0].layers
    assert len({q.threshold, k.threshold, v.threshold}) > 1

    def price(plan: Any) -> float:
        prices = controller.calibration.costs.prices
        return sum(float(np.interp(layer.sparsity, LEVELS, prices[layer.name])) for layer in plan.layers)

    by_fisher = controller.plan
    uniform = controller.set_sparsity(0.5, allocation="uniform")
    assert price(by_fisher) < price(uniform)
    # one table serves every budget, also after a reload
    controller.save(tmp_path)
    controller.strip()
    again = scap_nncf.get_controller(nncf.compress(tiny_llama, plan=tmp_path))
    assert again.set_sparsity(0.5, allocation="fisher").sites == by_fisher.sites
    assert again.set_sparsity(0.3).made_by["settings"]["allocation"] == "fisher"


def test_padding_has_no_price(tiny_llama: nn.Module, batches: Factory) -> None:
    short = batches(1, 2, 9)[0]
    padded = {key: torch.nn.functional.pad(value, (0, 4)) for key, value in short.items()}
    a = scap_nncf.calibrate(tiny_llama, dataset=[short], allocation="fisher").costs
    b = scap_nncf.calibrate(tiny_llama, dataset=[padded], allocation="fisher").costs
    assert a.tokens == b.tokens == 18
    name = "model.layers.0.mlp.up_proj"
    assert a.prices[name] == pytest.approx(b.prices[name], rel=1e-3)


def test_gradient_flags_and_hooks_are_restored(tiny_llama: nn.Module, batches: Factory) -> None:
    tiny_llama.requires_grad_(True)
    scap_nncf.calibrate(tiny_llama, dataset=batches(1), allocation="fisher")
    assert all(p.requires_grad and p.grad is None for p in tiny_llama.parameters())
    assert not any(m._forward_pre_hooks for m in tiny_llama.modules())


def test_what_fisher_cannot_do(tiny_llama: nn.Module, batches: Factory) -> None:
    with pytest.raises(nncf.UnsupportedModelError, match="logits"):
        nncf.compress(nn.Sequential(nn.Linear(8, 8)), dataset=[torch.randn(2, 8)], allocation="fisher")
    nncf.compress(tiny_llama, dataset=batches(1), sparsity=0.5, allocation="uniform")
    controller = scap_nncf.get_controller(tiny_llama)
    with pytest.raises(nncf.ValidationError, match="calibrate with allocation='fisher'"):
        controller.set_sparsity(0.5, allocation="fisher")
    with pytest.raises(nncf.ValidationError, match="allocation must be"):
        controller.set_sparsity(0.5, allocation="greediest")
    with pytest.raises(nncf.ValidationError, match="allocation must be"):
        scap_nncf.Scap(allocation="fischer")
    controller.strip()
    with pytest.raises(nncf.ValidationError, match="cannot be reached"):
        nncf.compress(tiny_llama, dataset=batches(1), sparsity=0.98, allocation="fisher")


# -- the default -------------------------------------------------------------------------------------------------------


def test_the_default_is_fisher_for_one_number_and_literal_otherwise(tiny_llama: nn.Module, batches: Factory) -> None:
    nncf.compress(tiny_llama, dataset=batches(), sparsity=0.5)
    controller = scap_nncf.get_controller(tiny_llama)
    assert controller.plan.made_by["allocation"] == "fisher"
    by_default = controller.plan
    assert controller.set_sparsity(0.5, allocation="fisher").sites == by_default.sites
    for literal in ({"up": 0.4, "gate": 0.4, "down": 0.6}, "up,zero,0.4,gate,zero,0.4,down,zero,0.6"):
        plan = controller.set_sparsity(literal, allocation="auto")
        assert plan.made_by["allocation"] == "uniform"
        assert {(layer.role, layer.sparsity) for layer in plan.layers} == {("up", 0.4), ("gate", 0.4), ("down", 0.6)}
    controller.strip()
    nncf.compress(tiny_llama, dataset=batches(), sparsity=0.5, allocation="fisher")
    assert scap_nncf.get_controller(tiny_llama).plan.sites == by_default.sites


def test_each_part_of_a_mapping_keeps_its_total(tiny_llama: nn.Module, batches: Factory) -> None:
    nncf.compress(tiny_llama, dataset=batches(), sparsity={"attn": 0.3, "down": 0.6, "up": 0.4}, allocation="fisher")
    controller = scap_nncf.get_controller(tiny_llama)

    def total(plan: Any, roles: set[str]) -> float:
        layers = [layer for layer in plan.layers if layer.role in roles]
        weights = [layer.in_features * layer.out_features for layer in layers]
        return sum(w * layer.sparsity for w, layer in zip(weights, layers)) / sum(weights)

    for method in ("fisher", "profile"):
        plan = controller.set_sparsity({"attn": 0.3, "down": 0.6, "up": 0.4}, allocation=method)
        assert total(plan, {"q", "k", "v", "o"}) == pytest.approx(0.3)
        assert total(plan, {"down"}) == pytest.approx(0.6)
        assert total(plan, {"up"}) == pytest.approx(0.4)
        assert not any(layer.role == "gate" for layer in plan.layers)
        assert len({layer.sparsity for layer in plan.layers}) > 3


def test_the_default_without_gradients_or_logits(tiny_model: Factory, batches: Factory) -> None:
    encoder = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    nncf.compress(encoder, dataset=[torch.randn(4, 8)], sparsity=0.5)
    assert scap_nncf.get_controller(encoder).plan.made_by["allocation"] == "uniform"
    backbone = tiny_model("llama").model  # gated, but its output has no logits
    nncf.compress(backbone, dataset=batches(1), sparsity=0.5)
    assert scap_nncf.get_controller(backbone).plan.made_by["allocation"] == "profile"


def test_prices_do_not_depend_on_the_order_of_samples(tiny_llama: nn.Module, batches: Factory) -> None:
    data = batches(7)
    settings: dict[str, Any] = {"allocation": "fisher", "allocation_samples": 3}
    forward = scap_nncf.calibrate(tiny_llama, dataset=data, **settings)
    backward = scap_nncf.calibrate(tiny_llama, dataset=iter(data[::-1]), **settings)
    assert forward.to_bytes() == backward.to_bytes()
    parts = [scap_nncf.calibrate(tiny_llama, dataset=[sample], **settings) for sample in data]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    other = parts[6]
    for part in (parts[3], parts[0], parts[5], parts[1], parts[4], parts[2]):
        other = part.merge(other)
    assert merged.to_bytes() == other.to_bytes()
    # of all data in one process the thresholds of the levels are a little different, so the prices are as well
    whole = scap_nncf.calibrate(tiny_llama, dataset=data, allocation="fisher", allocation_samples=7).costs
    assert whole.tokens == merged.costs.tokens
    for name, values in whole.sums.items():
        assert merged.costs.sums[name][10] == pytest.approx(values[10], rel=0.5)


def test_kept_samples_are_few_and_chosen_by_content(batches: Factory) -> None:
    data = batches(20)
    chosen = []
    for order in (data, data[::-1]):
        kept = Kept(order, 4)
        assert len(list(kept)) == 20
        chosen.append([fingerprint(sample) for sample in kept.kept()])
    assert chosen[0] == chosen[1] == sorted(fingerprint(sample) for sample in data)[:4]


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_checkpointing_gives_the_same_prices(family: str, tiny_model: Factory, batches: Factory) -> None:
    model = tiny_model(family)
    plain = scap_nncf.calibrate(model, dataset=batches(2), allocation="fisher").costs
    again = scap_nncf.calibrate(model, dataset=batches(2), allocation="fisher", allocation_checkpointing=True).costs
    for name, values in plain.sums.items():
        assert again.sums[name] == pytest.approx(values, rel=1e-4, abs=1e-6)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_layer_that_no_token_reached_is_not_the_cheapest(batches: Factory, tiny_llama: nn.Module) -> None:
    """Its price is that of its role, so it is not pruned first."""
    statistics = scap_nncf.calibrate(tiny_llama, dataset=batches(2))
    from scap_nncf.algorithms.backends.torch.fisher import _Prices

    prices = _Prices(statistics.sites, statistics.histograms, {site.name: 0.0 for site in statistics.sites})
    first, second = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"
    prices._seen = {layer.name for site in statistics.sites for layer in site.layers} - {second}
    prices._sums[first] = np.linspace(0, 2, len(LEVELS))
    assert prices.costs(tiny_llama).sums[second] == pytest.approx(np.linspace(0, 2, len(LEVELS)), abs=1e-6)
    prices._seen -= {first}
    with pytest.raises(nncf.UnsupportedModelError, match="no gradient reaches"):
        prices.costs(tiny_llama)


# -- for comparison ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_moves_each_block_least(family: str, tiny_model: Factory, batches: Factory, tmp_path: Path) -> None:
    model, data = tiny_model(family), batches(3)
    nncf.compress(model, dataset=data, sparsity=0.5, allocation="greedy", mode="zero")
    controller = scap_nncf.get_controller(model)
    layers = controller.plan.layers
    for block in (0, 1):
        inside = [x for x in layers if f".{block}." in x.name]
        weights = [x.in_features * x.out_features for x in inside]
        assert sum(w * x.sparsity for w, x in zip(weights, inside)) / sum(weights) == pytest.approx(0.5)
    assert len({layer.sparsity for layer in layers}) > 4
    before = controller.plan.sites
    controller.save(tmp_path)
    controller.strip()
    again = scap_nncf.get_controller(nncf.compress(model, plan=tmp_path))
    again.set_sparsity(0.3)
    assert again.set_sparsity(0.5).sites == before

    # of single steps from nothing, the first layer to give up inputs is the one that moves the output least
    block = model.get_submodule("model.layers.0" if family == "llama" else "transformer.h.0")
    kept: list[Any] = []
    again.strip()
    handle = block.register_forward_pre_hook(lambda _m, a, k: kept.append((a, k)), with_kwargs=True)
    model(**data[0])
    handle.remove()
    from scap_nncf.algorithms.backends.torch.greedy import _search

    statistics = scap_nncf.calibrate(model, dataset=data, allocation="uniform")
    chosen = [(s, layer) for s in statistics.sites if s.block == 0 for layer in s.layers]
    with torch.no_grad():
        paths = _search(block, model, chosen, statistics.histograms, kept)
    first = max(paths, key=lambda name: paths[name][1])

    def error(name: str) -> float:
        site = next(s for s, layer in chosen if layer.name == name)
        weights = {layer.name: layer.weights for _, layer in chosen}
        step = 0.05 * max(weights.values()) / weights[name]
        threshold = statistics.histograms[site.name].quantile(min(step, 0.95))

        def prune(_m: Any, args: Any) -> Any:
            return (torch.where(args[0].abs() <= threshold, 0.0, args[0]), *args[1:])

        def run() -> torch.Tensor:
            output = block(*kept[0][0], **kept[0][1])
            return (output[0] if isinstance(output, tuple) else output)[..., -4:, :]

        with torch.no_grad():
            dense = run()
            hook = model.get_submodule(name).register_forward_pre_hook(prune)
            moved = float((run() - dense).square().sum())
            hook.remove()
        return moved

    errors = {layer.name: error(layer.name) for _, layer in chosen}
    assert errors[first] <= sorted(errors.values())[2]


def test_greedy_takes_one_number(tiny_llama: nn.Module, batches: Factory) -> None:
    with pytest.raises(nncf.ValidationError, match="one number"):
        nncf.compress(tiny_llama, dataset=batches(1), sparsity={"up": 0.3, "down": 0.5}, allocation="greedy")
    nncf.compress(tiny_llama, dataset=batches(1), sparsity=0.3, allocation="uniform")
    with pytest.raises(nncf.ValidationError, match="search of its own"):
        scap_nncf.get_controller(tiny_llama).set_sparsity(0.4, allocation="greedy")


def test_weight_norms_as_scores(tiny_llama: nn.Module, batches: Factory) -> None:
    """As many values are dropped, but those that matter least to the output."""
    data = batches(4)
    nncf.compress(tiny_llama, dataset=data, sparsity=0.4, allocation="uniform", score="weight_norm", mode="zero")
    controller = scap_nncf.get_controller(tiny_llama)
    name = "model.layers.0.self_attn.k_proj"  # nothing before it is pruned
    module = tiny_llama.get_submodule(name)
    raw: list[torch.Tensor] = []
    first = module.register_forward_pre_hook(lambda _m, a: raw.append(a[0]), prepend=True)
    after: list[torch.Tensor] = []
    last = module.register_forward_pre_hook(lambda _m, a: after.append(a[0]))
    with torch.no_grad():
        tiny_llama(**data[0])
    first.remove()
    last.remove()
    dropped = after[0] == 0
    score = raw[0].abs() * module.weight.norm(dim=0)
    assert score[dropped].max() <= score[~dropped].min()
    assert raw[0].abs()[dropped].max() > raw[0].abs()[~dropped].min()  # not the order of magnitudes
    assert dropped.float().mean() == pytest.approx(0.4, abs=0.05)
    assert controller.plan.made_by["settings"]["score"] == "weight_norm"
    with pytest.raises(nncf.ValidationError, match="score must be"):
        scap_nncf.Scap(score="gradient")
