# SPDX-License-Identifier: Apache-2.0
"""Plans and statistics on disk: round trips, damage, other models, the reference's format."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import nncf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scap_nncf.algorithms.plan import SCHEMA_VERSION, LayerPlan, Plan, SitePlan, write_atomically
from scap_nncf.algorithms.scap.calibration import STATISTICS_FILE, CalibrationStatistics, statistics_of_plan
from scap_nncf.algorithms.scap.histogram import ActivationHistogram
from scap_nncf.algorithms.scap.statistics import bucket_counts
from scap_nncf.algorithms.sites import Layer, Site


def make_plan() -> Plan:
    gate = LayerPlan("model.layers.0.mlp.gate_proj", "gate", 8, 32, 0.1234567, 0.4)
    up = LayerPlan("model.layers.0.mlp.up_proj", "up", 8, 32, -1.0, 0.0)
    down = LayerPlan("model.layers.0.mlp.down_proj", "down", 32, 8, 3e-5, 0.6)
    return Plan(
        (SitePlan(gate.name, 0, 0.0, "zero", (gate, up)), SitePlan(down.name, 0, -0.17, "kde", (down,))),
        prune="decode",
        made_by={"samples": 4},
    )


def make_statistics() -> CalibrationStatistics:
    sites = tuple(Site(name, 0, (Layer(name, "up", 8, 32),)) for name in ("model.layers.0.up", "model.layers.1.up"))
    histograms = {
        site.name: ActivationHistogram(bucket_counts(torch.randn(800)).numpy(), exact=index == 1)
        for index, site in enumerate(sites)
    }
    return CalibrationStatistics(sites, histograms, 3)


STATISTICS = make_statistics().to_bytes()


def test_round_trip(tmp_path: Path) -> None:
    plan = make_plan()
    plan.save(tmp_path)
    assert Plan.load(tmp_path) == plan
    assert Plan.load(tmp_path / "plan.json") == plan
    assert Plan.load(tmp_path).to_json() == plan.to_json()


def test_truncated_plans_never_load(tmp_path: Path) -> None:
    text = make_plan().to_json()
    for cut in range(0, len(text) - 2, 37):
        with pytest.raises(nncf.ValidationError):
            Plan.from_json(text[:cut])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_plans_load_or_say_why(data: st.DataObject) -> None:
    text = bytearray(make_plan().to_json().encode())
    for _ in range(data.draw(st.integers(1, 4))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    try:
        plan = Plan.from_json(text.decode("utf-8", errors="replace"))
    except (nncf.ValidationError, nncf.UnsupportedVersionError):
        return
    assert all(np.isfinite(layer.threshold) and 0 <= layer.sparsity < 1 for layer in plan.layers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": SCHEMA_VERSION + 1}, "newer"),
        ({"schema_version": "1"}, "schema_version"),
        ({"schema": "other"}, "not a plan"),
        ({"sites": {}}, "expected a list"),
        ({"prune": "never"}, "prune"),
        ({"sites": [{"name": "a", "block": 0, "mode": 0, "mode_method": "zero", "layers": []}]}, "no layers"),
    ],
)
def test_plans_that_do_not_follow_the_schema(change: dict[str, object], message: str) -> None:
    data = {**json.loads(make_plan().to_json()), **change}
    with pytest.raises((nncf.ValidationError, nncf.UnsupportedVersionError), match=message):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize("value", ["NaN", "Infinity", '"0.1"', "true", "null", "1e999"])
def test_thresholds_must_be_finite_numbers(value: str) -> None:
    text = make_plan().to_json().replace("0.1234567", value)
    with pytest.raises(nncf.ValidationError):
        Plan.from_json(text)


def test_a_layer_named_twice_is_refused() -> None:
    plan = make_plan()
    with pytest.raises(nncf.ValidationError, match="twice"):
        Plan.from_json(replace(plan, sites=plan.sites + plan.sites[:1]).to_json())


def test_missing_plan(tmp_path: Path) -> None:
    with pytest.raises(nncf.InvalidPathError, match="No plan"):
        Plan.load(tmp_path)


def test_bind_names_everything_that_does_not_fit() -> None:
    shapes = {"model.layers.0.mlp.gate_proj": (8, 32), "model.layers.0.mlp.up_proj": (8, 16)}
    with pytest.raises(nncf.ValidationError, match="2 of 3") as error:
        make_plan().bind(shapes)
    assert "up_proj is 8x32 in the plan, 8x16 in the model" in str(error.value)
    assert "down_proj is not in the model" in str(error.value)


def test_write_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*_args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(nncf.ValidationError, match="Cannot write"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_save_where_a_file_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(nncf.ValidationError, match="Cannot write"):
        make_plan().save(tmp_path / "taken")


def test_reference_format_round_trip(tmp_path: Path) -> None:
    # what the reference implementation writes; its kde and median files say "zero" beside a mode that is not
    entries = {}
    for block in range(2):
        for name, mode, threshold in (("up_proj", 0.0, 0.01), ("gate_proj", 0.0, 0.02), ("down_proj", -0.16, 0.03)):
            key = f"model.layers.{block}.mlp.{name}"
            entries[key] = {
                "module_name": key,
                "demode_method": "zero",
                "mode": mode,
                "threshold": threshold,
                "target_sparsity": 0.5,
                "hook_type": "pre_hook",
            }
    path = tmp_path / "calibrated_thresholds.json"
    path.write_text(json.dumps(entries))
    plan = Plan.load(tmp_path)
    assert [len(site.layers) for site in plan.sites] == [2, 1, 2, 1]
    assert [layer.role for layer in plan.sites[0].layers] == ["up", "gate"]
    assert plan.sites[1].mode == -0.16
    assert plan.sites[1].mode_method == "imported"
    written = json.loads(plan.to_reference(tmp_path / "out.json").read_text())
    assert {k: (v["mode"], v["threshold"]) for k, v in written.items()} == {
        k: (v["mode"], v["threshold"]) for k, v in entries.items()
    }
    assert Plan.from_reference(tmp_path / "out.json").sites == plan.sites


@pytest.mark.parametrize("text", ["[]", "{", '{"a": 1}', '{"a": {"hook_type": "pre_hook"}}', '"hook_type"'])
def test_damaged_reference_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "calibrated_thresholds.json"
    path.write_text(text)
    with pytest.raises(nncf.ValidationError):
        Plan.from_reference(path)
    with pytest.raises(nncf.ValidationError):
        Plan.load(path)


# -- statistics -----------------------------------------------------------------------------------------------------


def test_statistics_round_trip(tmp_path: Path) -> None:
    statistics = make_statistics()
    statistics.save(tmp_path)
    loaded = CalibrationStatistics.load(tmp_path)
    assert loaded.sites == statistics.sites
    assert loaded.samples == 3
    for name, histogram in statistics.histograms.items():
        assert np.array_equal(loaded.histograms[name].counts, histogram.counts)
        assert loaded.histograms[name].exact == histogram.exact
    assert loaded.to_bytes() == statistics.to_bytes()


def test_statistics_of_other_sites_do_not_merge() -> None:
    statistics = make_statistics()
    other = CalibrationStatistics(statistics.sites[:1], statistics.histograms, 1)
    with pytest.raises(nncf.ValidationError, match="cannot be merged"):
        statistics.merge(other)
    assert statistics.merge(statistics).samples == 6


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_statistics_load_or_say_why(data: st.DataObject) -> None:
    content = bytearray(STATISTICS)
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    for _ in range(data.draw(st.integers(1, 4)) if content else 0):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(nncf.ValidationError):
        CalibrationStatistics.from_bytes(bytes(content), "test")


def test_statistics_belong_to_their_plan(tmp_path: Path) -> None:
    plan = replace(make_plan(), statistics={"file": STATISTICS_FILE, "sha256": "0" * 64})
    with pytest.raises(nncf.ValidationError, match="missing"):
        statistics_of_plan(tmp_path, plan)
    make_statistics().save(tmp_path)
    with pytest.raises(nncf.ValidationError, match="checksum"):
        statistics_of_plan(tmp_path, plan)
    assert statistics_of_plan(tmp_path, make_plan()) is None


# -- schema 2: patterns and vectors ----------------------------------------------------------------------------------


def with_vectors() -> Plan:
    layers = (
        LayerPlan("a.0.up", "up", 32, 7, -1.0, 0.5, pattern=(8, 16), token_shift="median", variance=True),
        LayerPlan("a.0.gate", "gate", 32, 7, 0.25, 0.5),
    )
    plan = Plan((SitePlan("a.0.up", 0, 0.0, "zero", layers),), "nm")
    random = np.random.default_rng()
    shapes = {"shift": (32,), "low_rank_in": (32, 3), "low_rank_out": (3, 7)}
    return plan.with_vectors({("a.0.up", kind): random.random(shape) for kind, shape in shapes.items()})


def test_vectors_are_saved_beside_the_plan(tmp_path: Path) -> None:
    plan = with_vectors()
    plan.save(tmp_path)
    again = Plan.load(tmp_path)
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert again.vectors.keys() == plan.vectors.keys()
    assert all(np.array_equal(again.vectors[key], plan.vectors[key]) for key in plan.vectors)
    (tmp_path / "vectors.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(nncf.ValidationError, match="SHA-256"):
        Plan.load(tmp_path)
    (tmp_path / "vectors.safetensors").unlink()
    with pytest.raises(nncf.ValidationError, match="beside"):
        Plan.load(tmp_path)
    bare = Plan.from_json(plan.to_json())
    with pytest.raises(nncf.ValidationError, match="came without"):
        bare.vectors_of(bare.layers[0])


def test_a_plan_of_thresholds_alone_stays_schema_1() -> None:
    plan = Plan((SitePlan("a", 0, 0.0, "zero", (LayerPlan("a", "up", 4, 4, 0.1, 0.5),)),))
    assert json.loads(plan.to_json())["schema_version"] == 1
    assert "pattern" not in plan.to_json()
    assert json.loads(with_vectors().to_json())["schema_version"] == 2


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ({("b", "shift"): np.zeros(32)}, "has not"),
        ({("a.0.up", "shift"): np.zeros(31)}, "expected finite numbers of shape"),
        ({("a.0.up", "score"): np.full(32, np.nan)}, "NaN"),
        ({("a.0.up", "low_rank_out"): np.zeros((4, 7))}, "low_rank"),
        ({("a.0.up", "curve"): np.zeros(32)}, "unknown kind"),
    ],
)
def test_vectors_that_do_not_fit(vectors: dict[tuple[str, str], np.ndarray], message: str) -> None:
    with pytest.raises(nncf.ValidationError, match=message):
        with_vectors().with_vectors(vectors)


@pytest.mark.parametrize("pattern", [[16, 16], [0, 4], [2], "2:4", [2, 4.5], [-1, 4]])
def test_bad_patterns_in_a_file(pattern: object) -> None:
    data = json.loads(with_vectors().to_json())
    data["sites"][0]["layers"][0]["pattern"] = pattern
    with pytest.raises(nncf.ValidationError, match="schema"):
        Plan.from_json(json.dumps(data))


def test_a_pattern_must_divide_the_width_of_the_model() -> None:
    plan = with_vectors()
    other = Plan((replace(plan.sites[0], layers=(replace(plan.layers[0], in_features=0, vectors=()),)),), "nm")
    with pytest.raises(nncf.ValidationError, match="do not divide"):
        other.bind({"a.0.up": (40, 7)})
