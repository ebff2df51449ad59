# SPDX-License-Identifier: Apache-2.0
"""What is read from disk: refused or loaded, never executed, and never larger in memory than it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import pytest
from safetensors.numpy import save as save_tensors

import scap_nncf
from scap_nncf.algorithms import documents
from scap_nncf.algorithms.plan import PLAN_FILE, STATISTICS_FILE, VECTORS_FILE, Plan, sha256
from scap_nncf.algorithms.scap.calibration import CalibrationStatistics, statistics_of_plan

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "faults"))
import fuzz_loaders

EXAMPLES = {"checkpoint.json and its tensors": 15}


@pytest.mark.parametrize("target", fuzz_loaders.TARGETS, ids=lambda target: target.name)
def test_damaged_and_hostile_files(target: fuzz_loaders.Target) -> None:
    examples = EXAMPLES.get(target.name, 40)
    if "IR" in target.name:
        pytest.importorskip("openvino")
    outcomes = fuzz_loaders.run(target, examples, number=int(np.random.default_rng().integers(1 << 31)))
    assert sum(outcomes.values()) >= examples // 2
    assert outcomes["accepted"] < sum(outcomes.values()), "nothing was refused"


@pytest.mark.parametrize("entry", ["statistics", "vectors"])
@pytest.mark.parametrize(
    "name", ["../../secret.safetensors", "/etc/passwd", "sub/x", "..\\x", "", "plan.json", "\x00", 7, None, ["x"]]
)
def test_names_of_other_files_are_refused(entry: str, name: Any, tmp_path: Path) -> None:
    plan, _ = fuzz_loaders.example()
    document = json.loads(plan.to_json())
    document[entry] = {"file": name, "sha256": "0" * 64}
    (tmp_path / PLAN_FILE).write_text(json.dumps(document))
    with pytest.raises(nncf.ValidationError, match="the file must be"):
        Plan.load(tmp_path)


def test_every_truncation_and_every_flipped_byte_of_statistics(tmp_path: Path) -> None:
    """The plan's checksum catches what the format itself may not: any single change."""
    plan, statistics = fuzz_loaders.example()
    content = statistics.to_bytes()
    document = json.loads(plan.to_json()) | {"statistics": {"file": STATISTICS_FILE, "sha256": sha256(content)}}
    (tmp_path / PLAN_FILE).write_text(json.dumps(document))
    loaded = Plan.load(tmp_path)
    file = tmp_path / STATISTICS_FILE
    file.write_bytes(content)
    assert statistics_of_plan(tmp_path, loaded).to_bytes() == content
    generator = np.random.default_rng()
    for place in generator.choice(len(content), 60, replace=False):
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(generator.integers(8))
        for damaged in (bytes(flipped), content[:place]):
            file.write_bytes(damaged)
            with pytest.raises(nncf.ValidationError):
                statistics_of_plan(tmp_path, loaded)


def test_statistics_ask_for_no_more_memory_than_they_may() -> None:
    site = {"name": "x", "block": 0, "layers": [["x", "q", 1, 1]], "exact": False}
    tensors = {"0.buckets": np.zeros(0, np.uint16), "0.counts": np.zeros(0, np.int64)}
    header = {"format": "scap-nncf.statistics.1", "samples": 1, "priced_tokens": None}
    many = save_tensors(tensors, {"scap_nncf": json.dumps({**header, "sites": [site] * 40_000})})
    with pytest.raises(nncf.ValidationError, match="40000 sites"):
        CalibrationStatistics.from_bytes(many, "a bomb")
    for buckets, counts in (
        (np.arange(3, dtype=np.uint16), np.ones(1, np.int64)),  # would be broadcast
        (np.array([1, 1], np.uint16), np.ones(2, np.int64)),
        (np.array([1], np.uint16), np.array([1 << 62])),
        (np.array([1], np.int64), np.array([1])),
    ):
        content = save_tensors(
            {"0.buckets": buckets, "0.counts": counts}, {"scap_nncf": json.dumps({**header, "sites": [site]})}
        )
        with pytest.raises(nncf.ValidationError, match="damaged"):
            CalibrationStatistics.from_bytes(content, "a file")


def test_yaml_bombs_and_objects(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(fuzz_loaders._bomb(9, 12))  # 9^12 values
    with pytest.raises(nncf.ValidationError, match="unfolds"):
        scap_nncf.load_recipe(file)
    file.write_text(f"!!python/object/apply:os.system ['touch {tmp_path}/ran']")
    with pytest.raises(nncf.ValidationError, match="YAML"):
        scap_nncf.load_recipe(file)
    assert not (tmp_path / "ran").exists()
    file.write_text("&a [*a]")
    with pytest.raises(nncf.ValidationError):
        scap_nncf.load_recipe(file)
    file.write_text("- &s scap: &v {sparsity: 0.3}\n")  # anchors in measure are fine
    assert scap_nncf.load_recipe(file)[0].sparsity == 0.3


def test_large_and_odd_files(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    with file.open("wb") as stream:
        stream.truncate(1 << 34)  # sparse: no disk, and it must not be read
    with pytest.raises(nncf.ValidationError, match="never has"):
        Plan.load(file)
    with pytest.raises(nncf.ValidationError, match="cannot be read"):
        documents.read_text(tmp_path, 100, "a plan")
    for text in ('{"a": 1, "a": 2}', '{"a": NaN}', "[" * 100_000, "9" * 5000, '{"a": -Infinity}'):
        with pytest.raises(nncf.ValidationError, match="JSON"):
            documents.parse_json(text, "it")


def test_vectors_that_do_not_fit(tmp_path: Path) -> None:
    plan, _ = fuzz_loaders.example()
    layer = plan.layers[0]
    plan.with_vectors({(layer.name, "bias"): np.zeros(layer.out_features, np.float32)}).save(tmp_path)
    for bad in (np.zeros((layer.out_features, 2), np.float32), np.full(layer.out_features, np.inf, np.float32)):
        content = save_tensors({f"{layer.name}/bias": bad})
        document = json.loads((tmp_path / PLAN_FILE).read_text())
        document["vectors"]["sha256"] = sha256(content)
        (tmp_path / PLAN_FILE).write_text(json.dumps(document))
        (tmp_path / VECTORS_FILE).write_bytes(content)
        with pytest.raises(nncf.ValidationError, match="bias"):
            Plan.load(tmp_path)


@pytest.mark.parametrize("place", ["checkpoint.json", "config.json"])
def test_a_checkpoint_names_no_kernels_of_a_repository(place: str, tmp_path: Path) -> None:
    """transformers takes 'org/name' as an attention implementation, fetches it from the hub and runs it."""
    for name, content in fuzz_loaders._checkpoint().items():
        (tmp_path / name).write_bytes(content)
    key = "attention" if place == "checkpoint.json" else "attn_implementation"
    document = json.loads((tmp_path / place).read_text()) | {key: "somebody/kernels"}
    if place == "config.json":
        description = json.loads((tmp_path / "checkpoint.json").read_text()) | {"attention": None}
        (tmp_path / "checkpoint.json").write_text(json.dumps(description))
    (tmp_path / place).write_text(json.dumps(document))
    with pytest.raises(nncf.ValidationError, match="somebody/kernels"):
        scap_nncf.load_pretrained(tmp_path)


def test_a_checkpoint_asks_for_no_more_memory_than_it_has(tmp_path: Path) -> None:
    for name, content in fuzz_loaders._checkpoint().items():
        (tmp_path / name).write_bytes(content)
    document = json.loads((tmp_path / "checkpoint.json").read_text())
    document["hooks"][0] = {
        "class": "SQMultiply",
        "names": document["hooks"][0]["names"],
        "config": {"scale_shape": [1 << 30, 1 << 10]},
    }
    (tmp_path / "checkpoint.json").write_text(json.dumps(document))
    with pytest.raises(nncf.ValidationError, match="asks for"):
        scap_nncf.load_pretrained(tmp_path)


def test_a_folder_with_code_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in fuzz_loaders._checkpoint().items():
        (folder / name).write_bytes(content)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "unheard-of", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(nncf.ValidationError):
        scap_nncf.load_pretrained(folder)
    assert not (tmp_path / "ran").exists()
