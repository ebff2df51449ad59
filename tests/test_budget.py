# SPDX-License-Identifier: Apache-2.0
"""Budgets and the search: limits are kept, trials are stored, resumed and shared."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
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
from scap_nncf import Budget, BudgetError
from scap_nncf.algorithms.budget import MOST, KernelTable, byte_sparsity, least_sparsity, most_sparsity
from scap_nncf.budget import mean_loss, split, traffic_of
from scap_nncf.cli import main

Factory = Callable[..., Any]


# -- arithmetic --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.floats(0.5, 8.0), st.floats(1.0, 5.0), st.floats(0.002, 0.5), st.floats(0.05, 0.9))
def test_the_most_sparsity_within_a_loss(slope: float, power: float, limit: float, start: float) -> None:
    calls: list[float] = []

    def loss(sparsity: float) -> float:
        calls.append(sparsity)
        return math.expm1(slope * sparsity**power)

    found, at = most_sparsity(loss, limit, 0.005, start)
    true = min((math.log1p(limit) / slope) ** (1 / power), MOST)
    assert true - 0.0051 <= found <= true + 1e-9
    assert at == pytest.approx(loss(found)) or found == 0.0
    assert len(calls) <= 14


def test_losses_that_leave_no_choice() -> None:
    assert most_sparsity(lambda s: 1.0 if s > 0 else 0.0, 0.0, 0.005) == (0.0, 0.0)
    assert most_sparsity(lambda s: 0.0, 0.01, 0.005)[0] > MOST - 0.006
    assert least_sparsity(lambda s: s >= 0.37) == pytest.approx(0.37, abs=2e-4)
    assert least_sparsity(lambda s: True) == 0.0
    assert least_sparsity(lambda s: False) is None


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {"max_loss": "1%", "bytes": 0.5},
        {"max_loss": "one"},
        {"max_loss": -0.1},
        {"bytes": 1.5},
        {"speedup": 0.5},
        {"speedup": True},
        {"max_loss": "1%", "metric": "bleu"},
    ],
)
def test_budgets_that_say_nothing(bad: dict[str, Any]) -> None:
    with pytest.raises(nncf.ValidationError):
        Budget(**bad)


def test_shares_are_read() -> None:
    assert Budget(max_loss="1%").max_loss == pytest.approx(0.01)
    assert Budget(max_loss=" 2.5 %").max_loss == pytest.approx(0.025)
    assert Budget(bytes="55%").bytes == pytest.approx(0.55)
    assert "1 %" in str(Budget(max_loss=0.01))


def test_predicted_times_are_the_measured_ones_where_there_are_any() -> None:
    table = KernelTable.load()
    rows = json.loads((Path(table.source)).read_text())["results"]
    checked = 0
    for row in rows:
        size = row["k"] * row["n"] * {"fp16": 2, "bf16": 2, "fp32": 4}[row["dtype"]]
        same = [r for r in rows if r["k"] * r["n"] * {"fp16": 2, "bf16": 2, "fp32": 4}[r["dtype"]] == size]
        same = [r for r in same if r["sparsity"] == row["sparsity"]]
        dense, sparse = table.predict(size, row["sparsity"])
        assert dense == pytest.approx(np.mean([r["dense_us"] for r in same]))
        assert sparse == pytest.approx(np.mean([r["sparse_us"] for r in same]))
        checked += 1
    assert checked > 20
    size = 2 * 4096 * 14336
    times = [table.predict(size, s)[1] for s in np.linspace(0, 0.9, 10)]
    assert all(a > b for a, b in pairwise(times))
    with pytest.raises(nncf.InvalidPathError):
        KernelTable.load("no-such-file.json")


# -- compress ----------------------------------------------------------------------------------------------------------


def test_a_budget_of_bytes(tiny_llama: nn.Module, batches: Factory) -> None:
    nncf.compress(tiny_llama, dataset=batches(), budget=Budget(bytes=0.6))
    controller = scap_nncf.get_controller(tiny_llama)
    layers = {name: m for name, m in tiny_llama.named_modules() if isinstance(m, nn.Linear)}
    total = sum(m.weight.numel() for m in layers.values())
    skipped = sum(x.sparsity * x.in_features * x.out_features for x in controller.plan.layers)
    assert 1 - skipped / total == pytest.approx(0.6, abs=1e-3)
    record = controller.plan.made_by["budget"]
    assert record["bytes_left"] <= 0.6
    assert record["sparsity"] == pytest.approx(controller.statistics().sparsity)
    controller.strip()
    with pytest.raises(BudgetError, match=r"cannot be met.*% of the bytes are left"):
        nncf.compress(tiny_llama, dataset=batches(), budget=Budget(bytes=0.05), roles=["attn"])
    assert scap_nncf.get_controller(tiny_llama) is None


def test_a_budget_of_time(tiny_llama: nn.Module, batches: Factory, tmp_path: Path) -> None:
    rows = [
        {"k": k, "n": 48, "dtype": "fp32", "rows": 1, "sparsity": s, "dense_us": 10.0, "sparse_us": 11 - 10 * s}
        for k in (48, 88)
        for s in (0.0, 0.5, 0.9)
    ]
    (tmp_path / "times.json").write_text(json.dumps({"results": rows}))
    wanted = Budget(speedup=1.3, kernels=str(tmp_path / "times.json"))
    nncf.compress(tiny_llama, dataset=batches(), budget=wanted)
    controller = scap_nncf.get_controller(tiny_llama)
    assert controller.plan.made_by["budget"]["speedup"] == pytest.approx(1.3, abs=0.005)
    controller.strip()
    with pytest.raises(BudgetError, match="predicted speed-up is"):
        nncf.compress(tiny_llama, dataset=batches(), budget=Budget(speedup=50, kernels=wanted.kernels))


def test_a_budget_of_loss(tiny_llama: nn.Module, batches: Factory) -> None:
    data = batches(12)
    nncf.compress(tiny_llama, dataset=data, budget=Budget(max_loss="4%", tolerance=0.02))
    controller = scap_nncf.get_controller(tiny_llama)
    record = controller.plan.made_by["budget"]
    calibration, judges = split(data)
    assert len(judges) == 3
    assert controller.calibration.samples == len(calibration) == 9
    sparse = mean_loss(tiny_llama, judges)
    with controller.disabled():
        dense = mean_loss(tiny_llama, judges)
    assert math.exp(sparse - dense) - 1 == pytest.approx(record["loss"], abs=1e-4)
    assert record["loss"] <= 0.04
    assert controller.statistics().sparsity == pytest.approx(record["sparsity"])
    assert any(loss > 0.04 for _, loss in record["trials"]) or record["sparsity"] > 0.9
    controller.strip()
    with pytest.raises(nncf.ValidationError, match="leave out one"):
        nncf.compress(tiny_llama, dataset=data, budget=Budget(bytes=0.6), sparsity=0.5)
    with pytest.raises(nncf.ValidationError, match="at least 4 samples"):
        nncf.compress(tiny_llama, dataset=data[:2], budget=Budget(max_loss="1%"))


def test_traffic_counts_what_is_stored(tiny_llama: nn.Module, batches: Factory) -> None:
    sites = scap_nncf.inspect_model(tiny_llama).sites
    traffic = traffic_of(tiny_llama.half(), sites)
    assert traffic.total == sum(2 * m.weight.numel() for m in tiny_llama.modules() if isinstance(m, nn.Linear))
    assert [layer.name for layer in traffic.others] == ["lm_head"]


# -- search ------------------------------------------------------------------------------------------------------------

optuna = pytest.importorskip("optuna", reason="needs the extra 'search'")

from scap_nncf.search import Search, search_plan  # noqa: E402


class Truth:
    """A loss that the prices get wrong: layers of the second block cost ten times what they say."""

    def __init__(self, model: nn.Module, data: Any) -> None:
        self.calibration = scap_nncf.calibrate(model, dataset=data, allocation="fisher")
        self.calls = 0

    def __call__(self, plan: Any) -> float:
        if plan is None:
            return 10.0
        self.calls += 1
        total = sum(
            (10.0 if ".1." in x.name else 1.0) * x.in_features * x.out_features * x.sparsity**2 for x in plan.layers
        )
        return 10.0 * (1 + total / 4e5)

    def search(self, budget: Budget, folder: Path | None = None, **options: Any) -> Any:
        return search_plan(
            self.calibration, scap_nncf.Scap(), budget, self, Search(**options), folder=folder, fingerprint="here"
        )


@pytest.fixture
def truth(tiny_llama: nn.Module, batches: Factory) -> Truth:
    return Truth(tiny_llama, batches())


def test_search_beats_the_prices_and_keeps_the_promise(truth: Truth, tmp_path: Path) -> None:
    budget = Budget(max_loss="10%")
    alone = truth.search(budget)
    result = truth.search(budget, tmp_path, trials=25)
    assert result.trials[result.best].loss <= 0.1
    sparsity = {r.number: r.byte_sparsity for r in result.trials}
    assert sparsity[result.best] > max(t.byte_sparsity for t in alone.trials if t.loss <= 0.1)
    assert byte_sparsity(result.plan, truth.calibration.sites) == pytest.approx(sparsity[result.best])
    data = json.loads((tmp_path / "search.json").read_text())
    assert (data["schema"], data["schema_version"], data["metric"]) == ("scap-nncf.search", 1, "perplexity")
    assert len(data["trials"]) == len(result.trials)
    assert data["best"] == result.best
    kept = scap_nncf.Plan.load(tmp_path / next(t["plan"] for t in data["trials"] if t["number"] == data["best"]))
    assert kept.sites == result.plan.sites


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_an_ended_search_goes_on(kind: str, truth: Truth, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db" if kind == "sqlite" else f"journal:{tmp_path}/s.log"
    budget = Budget(max_loss="10%")

    class Killed(Exception):
        pass

    plain = Truth.__call__
    limit = 9

    def dying(self: Truth, plan: Any) -> float:
        if self.calls >= limit and plan is not None:
            raise Killed
        return plain(self, plan)

    truth.__class__ = type("Dying", (Truth,), {"__call__": dying})
    with pytest.raises(Killed):
        truth.search(budget, trials=12, storage=url)
    truth.__class__ = Truth
    before = truth.calls
    result = truth.search(budget, trials=12, storage=url)
    assert truth.calls - before == len(result.trials) - limit  # nothing is measured twice
    assert sum(t.method == "tpe" for t in result.trials) == 12
    again = truth.calls
    assert truth.search(budget, trials=12, storage=url).best == result.best
    assert truth.calls == again
    with pytest.raises(nncf.ValidationError, match="another model"):
        truth.search(Budget(max_loss="20%"), trials=12, storage=url)
    # another process can take part
    follower = truth.search(budget, trials=15, storage=url, leader=False)
    assert len(follower.trials) == len(result.trials)  # the search was over


def test_samplers_and_limits(truth: Truth) -> None:
    front = truth.search(Budget(max_loss="10%"), sampler="nsga2", trials=12)
    assert len({t.byte_sparsity for t in front.trials if t.method == "nsga2"}) == 12
    grid = truth.search(Budget(max_loss="10%"), sampler="grid", trials=100)
    assert sum(t.method == "grid" for t in grid.trials) == 27
    assert len({t.label for t in grid.trials if t.method == "grid"}) >= 26
    short = truth.search(Budget(max_loss="10%"), trials=50, patience=3)
    assert sum(t.method == "tpe" for t in short.trials) < 50
    none = truth.search(Budget(max_loss="10%"), trials=50, seconds=0.0)
    assert not any(t.method == "tpe" for t in none.trials)
    with pytest.raises(nncf.ValidationError, match="sampler"):
        Search(sampler="cma")
    bare = scap_nncf.CalibrationStatistics(truth.calibration.sites, truth.calibration.histograms)
    truth.calibration = bare
    with pytest.raises(nncf.ValidationError, match="prices"):
        truth.search(Budget(max_loss="10%"))


def test_search_on_the_command_line(tiny_model_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    command = ["search", tiny_model_dir, "--max-loss", "5%", "-o", str(run), "--samples", "2", "--tokens", "512"]
    command += ["--held-out-tokens", "512", "--context", "128", "--trials", "2", "--json"]
    assert main(command) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["loss"] <= 0.05
    data = json.loads((run / "search.json").read_text())
    assert data["held_out"]["loss"] == pytest.approx(printed["held_out"]["loss"])
    assert data["about"]["budget"] == "at most 5 % higher perplexity"
    plan = scap_nncf.Plan.load(run)
    assert plan.made_by["budget"]["trials"] == printed["trials"]
    assert plan.statistics is not None
    assert main([*command[:2], "--bytes", "0.1", "-o", str(tmp_path / "no"), "--samples", "2"]) == 1
    assert "of the bytes are left" in capsys.readouterr().err
    assert main([*command[:2], "-o", str(run)]) == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("keep")
    assert main([*command[:3], "5%", "-o", str(tmp_path / "other")]) == 1
    assert torch.is_grad_enabled()
