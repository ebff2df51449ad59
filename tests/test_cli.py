# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints where, exit codes, output folders. Runs in this process on a tiny model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

import scap_nncf
from scap_nncf.cli import main
from scap_nncf.cli_options import parse_sparsity

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 40


@pytest.fixture
def run(capsys):
    """Runs a command; gives (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def text_file(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def plan_folder(run, tmp_path, tiny_model_dir, text_file) -> Path:
    folder = tmp_path / "plan"
    code, _, err = run("compress", tiny_model_dir, "--calibration", text_file, "--length", 32, "--output", folder)
    assert code == 0, err
    return folder


def _error(err: str) -> str:
    """The one line of the error; libraries may have logged before it."""
    lines = [line for line in err.splitlines() if line.startswith("scap-nncf: error: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


# -- results -----------------------------------------------------------------------------------------------------------


def test_inspect(run, tiny_model_dir):
    code, out, _ = run("inspect", tiny_model_dir)
    assert code == 0
    for word in ("q k v", "gate up", "down", "lm_head", "14 layers at 8 sites"):
        assert word in out


def test_inspect_json_and_selection(run, tiny_model_dir, tiny_llama):
    code, out, _ = run("inspect", tiny_model_dir, "--roles", "ffn", "--ignore", r".*layers\.1\..*", "--json")
    assert code == 0
    result = json.loads(out)
    layers = [layer for site in result["sites"] for layer in site["layers"]]
    assert [layer["role"] for layer in layers] == ["gate", "up", "down"]
    assert {site["block"] for site in result["sites"]} == {0}
    modules = dict(tiny_llama.named_modules())
    for layer in layers:
        assert (layer["in_features"], layer["out_features"]) == (
            modules[layer["name"]].in_features,
            modules[layer["name"]].out_features,
        )
    assert result["prunable_weights"] == sum(layer["in_features"] * layer["out_features"] for layer in layers)
    assert all(item["reason"] for item in result["left_out"])


def test_compress_saves_a_plan_that_loads(run, tmp_path, tiny_model_dir, text_file):
    folder = tmp_path / "deep" / "plan"
    code, out, err = run(
        "compress", tiny_model_dir, "--sparsity", "up=0.3,gate=0.3,down=0.6", "--mode", "median", "--prune", "decode",
        "--calibration", text_file, "--length", 32, "--samples", 5, "--output", folder, "--json",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out)
    assert result == json.loads((folder / "result.json").read_text())
    assert (result["samples"], result["prune"], result["output"]) == (5, "decode", str(folder))
    assert {row["role"]: row["sparsity"] for row in result["roles"]} == pytest.approx(
        {"gate": 0.3, "up": 0.3, "down": 0.6}
    )
    plan = scap_nncf.Plan.load(folder)
    assert plan.prune == "decode"
    assert {layer.name: layer.threshold for layer in plan.layers} == {
        layer["name"]: layer["threshold"] for layer in result["layers"]
    }
    assert {site.mode_method for site in plan.sites} == {"median"}
    assert sorted(path.name for path in folder.parent.iterdir()) == ["plan"]  # nothing temporary stays


def test_compress_equals_the_library(run, plan_folder, tiny_model_dir, text_file):
    from scap_nncf.models import load_model
    from scap_nncf.text import read_texts, token_batches

    model, tokenizer = load_model(tiny_model_dir, device="cpu")
    batches = token_batches(tokenizer, read_texts(text_file), 32)[:64]
    scap_nncf.compress(model, dataset=batches, sparsity=0.5, subset_size=None)
    assert scap_nncf.get_controller(model).plan.sites == scap_nncf.Plan.load(plan_folder).sites


def test_compress_prints_a_table(run, tiny_model_dir, text_file):
    code, out, _ = run("compress", tiny_model_dir, "--calibration", text_file, "--length", 32)
    assert code == 0
    assert "Nothing was saved: give --output DIR" in out
    for role in ("q", "o", "gate", "down", "all"):
        assert f"│ {role} " in out


def test_compress_from_a_plan(run, tmp_path, tiny_model_dir, plan_folder):
    again = tmp_path / "again"
    code, _, err = run(
        "compress", tiny_model_dir, "--plan", plan_folder, "--sparsity", "0.25", "--prune", "decode",
        "--output", again, "--json",
    )  # fmt: skip
    assert code == 0, err
    before, after = scap_nncf.Plan.load(plan_folder), scap_nncf.Plan.load(again)
    weights = [layer.in_features * layer.out_features for layer in after.layers]
    mean = sum(w * layer.sparsity for w, layer in zip(weights, after.layers)) / sum(weights)
    assert mean == pytest.approx(0.25)
    assert all(new.threshold <= old.threshold for new, old in zip(after.layers, before.layers))
    assert after.prune == "decode"
    # the statistics went along, so the way back is open
    code, _, err = run("compress", tiny_model_dir, "--plan", again, "--sparsity", "0.5", "--output", tmp_path / "back")
    assert code == 0, err
    assert scap_nncf.Plan.load(tmp_path / "back").sites == before.sites
    # another policy alone: thresholds and statistics stay
    code, _, err = run("compress", tiny_model_dir, "--plan", again, "--prune", "all", "--output", tmp_path / "policy")
    assert code == 0, err
    policy, decode = scap_nncf.Plan.load(tmp_path / "policy"), scap_nncf.Plan.load(again)
    assert (policy.prune, policy.sites) == ("all", decode.sites)
    assert (tmp_path / "policy" / "statistics.safetensors").is_file()
    code, _, err = run("compress", tiny_model_dir, "--plan", again, "--samples", 3)
    assert code == 2
    assert "--samples" in err


def test_generate(run, tiny_model_dir, plan_folder):
    arguments = ["generate", tiny_model_dir, "--prompt", "The dog", "--max-new-tokens", 9, "--json"]
    code, out, err = run(*arguments)
    assert code == 0, err
    dense = json.loads(out)
    assert dense["tokens"] <= 9
    assert dense["realised_sparsity"] is None
    assert dense["tokens_per_second"] == pytest.approx(dense["tokens"] / dense["seconds"])
    code, out, err = run(*arguments, "--plan", plan_folder)
    assert code == 0, err
    assert 0.2 < json.loads(out)["realised_sparsity"] < 0.8
    code, out, _ = run("generate", tiny_model_dir, "--prompt", "The dog", "--plan", plan_folder)
    assert "tokens/s, realised sparsity" in out


def test_generate_is_deterministic_and_seeded(run, tiny_model_dir):
    def text(*arguments: object) -> str:
        code, out, err = run("generate", tiny_model_dir, "--prompt", "a", "--max-new-tokens", 20, "--json", *arguments)
        assert code == 0, err
        return json.loads(out)["text"]

    assert text() == text("--seed", 1)
    assert text("--temperature", 2, "--seed", 1) == text("--temperature", 2, "--seed", 1)
    assert text("--temperature", 2, "--seed", 1) != text("--temperature", 2, "--seed", 2)


def test_demo_on_a_tiny_model(run, tmp_path, tiny_model_dir, monkeypatch):
    from dataclasses import replace

    from scap_nncf import demo

    monkeypatch.setattr(
        demo, "SHORT", replace(demo.SHORT, samples=4, length=32, evaluation_tokens=128, context=32, new_tokens=8)
    )
    target = tmp_path / "demo"
    arguments = ["demo", "--short", "--model", tiny_model_dir, "--output", target, "--sparsity", "ffn=0.5"]
    code, out, err = run(*arguments)
    assert code == 0, err
    for word in ("Perplexity on", "dense:", "sparse:", "gate", "down", "activations.png", str(target)):
        assert word in out.replace("\n", "") or word in out
    assert (target / "activations.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((target / "result.json").read_text())
    assert 0.3 < result["realised_sparsity"] < 0.7
    assert result["sparse"]["perplexity"] != result["dense"]["perplexity"]
    assert len(scap_nncf.Plan.load(target / "plan").layers) == 6
    code, out, err = run(*arguments, "--json")  # a second run replaces the first
    assert code == 0, err
    assert json.loads(out)["plan"] == str(target / "plan")
    code, _, err = run(*arguments, "--no-overwrite")
    assert code == 1
    assert "not empty" in _error(err)


GATED, PLAIN = {"gate", "up", "down", "o"}, {"fc1", "fc2", "o"}
FUSED = {"qkv", "up", "down", "o"}
FAMILIES = {
    "llama": GATED | {"q", "k", "v"},
    "mistral": GATED | {"q", "k", "v"},
    "qwen2": GATED | {"q", "k", "v"},
    "gemma3": GATED | {"q", "k", "v"},
    "phi3": {"gate_up", "down", "qkv", "o"},
    "opt": PLAIN | {"q", "k", "v"},
    "phi": PLAIN | {"q", "k", "v"},
    "gpt2": FUSED,
    "falcon": FUSED,
    "gpt_neox": FUSED,
    "mpt": FUSED,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_from_disk_to_text(run, tmp_path, family, tiny_model, tiny_tokenizer, text_file):
    model, plan = tmp_path / "model", tmp_path / "plan"
    tiny_model(family).save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    code, out, err = run(
        "compress", model, "--calibration", text_file, "--length", 24, "--samples", 6, "--output", plan, "--json"
    )
    assert code == 0, err
    assert {row["role"] for row in json.loads(out)["roles"]} == FAMILIES[family]
    code, out, err = run("generate", model, "--plan", plan, "--prompt", "The dog", "--max-new-tokens", 5, "--json")
    assert code == 0, err
    assert 0.2 < json.loads(out)["realised_sparsity"] < 0.8


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "./no-such-folder"], "does not exist"),
        (["inspect", "MODEL", "--roles", "ffnn"], "'ffnn' is not a role"),
        (["inspect", "MODEL", "--device", "abacus"], "abacus"),
        (["compress", "MODEL", "--sparsity", "upp=0.5"], "'upp' is not a role"),
        (["compress", "MODEL", "--sparsity", "1.5"], "1.5"),
        (["compress", "MODEL", "--sparsity", "up,zero"], "triplets"),
        (["compress", "MODEL", "--calibration", "no-such.txt"], "no-such.txt"),
        (["compress", "MODEL", "--samples", "100000"], "100000 samples"),
        (["compress", "MODEL", "--plan", "no-such-plan"], "no-such-plan"),
        (["generate", "MODEL", "--prompt", " "], "prompt is empty"),
        (["generate", "MODEL", "--prompt", "x", "--chat"], "no chat template"),
        (["generate", "MODEL", "--prompt", "x", "--plan", "no-such-plan"], "no-such-plan"),
    ],
)
def test_errors_in_the_work(run, tmp_path, monkeypatch, tiny_model_dir, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*(tiny_model_dir if argument == "MODEL" else argument for argument in arguments))
    assert code == 1
    assert message in _error(err)
    assert out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["compres", "x"],
        ["inspect"],
        ["inspect", "x", "--no-such-option"],
        ["compress", "x", "--mode", "mdian"],
        ["compress", "x", "--samples", "0"],
        ["compress", "x", "--sparsity", "half"],
        ["compress", "x", "--sparsity", '{"up": "much"}'],
        ["compress", "x", "--sparsity", "@no-such-file.yaml"],
        ["generate", "x"],
    ],
)
def test_wrong_usage(run, arguments):
    code, out, err = run(*arguments)
    assert code == 2
    assert "Usage:" in err
    assert out == ""


def test_output_folders(run, tmp_path, tiny_model_dir, text_file, plan_folder):
    arguments = ["compress", tiny_model_dir, "--calibration", text_file, "--length", 32, "--output"]
    before = (plan_folder / "plan.json").read_bytes()
    code, _, err = run(*arguments, plan_folder, "--sparsity", "0.2")
    assert code == 1
    assert "--overwrite" in _error(err)
    assert (plan_folder / "plan.json").read_bytes() == before
    # an error in the work leaves the old folder alone, too
    code, _, err = run(*arguments, plan_folder, "--sparsity", "upp=0.2", "--overwrite")
    assert code == 1
    assert (plan_folder / "plan.json").read_bytes() == before
    code, _, err = run(*arguments, plan_folder, "--sparsity", "0.2", "--overwrite")
    assert code == 0, err
    assert (plan_folder / "plan.json").read_bytes() != before
    code, _, err = run(*arguments, text_file / "below")
    assert code == 1
    assert "cannot be written" in _error(err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan", "text.txt"]


def test_read_only_output(run, monkeypatch, tmp_path, tiny_model_dir, text_file):
    """Found out before the model is loaded. Permissions do not bind root, so the refusal is acted."""
    from scap_nncf import models, storage

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(storage.tempfile, "mkdtemp", refuse)
    monkeypatch.setattr(models, "load_model", lambda *_: pytest.fail("the model was loaded"))
    code, _, err = run("compress", tiny_model_dir, "--calibration", text_file, "--output", tmp_path / "plan")
    assert code == 1
    assert "cannot be written: Permission denied" in _error(err)


@pytest.mark.parametrize(("stop", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_ended_from_outside(run, monkeypatch, tmp_path, tiny_model_dir, text_file, stop, expected):
    """Nothing half-written stays."""
    monkeypatch.setattr(scap_nncf, "compress", lambda *_, **__: signal.raise_signal(stop))
    # a process that was started in the background of a script ignores interrupts
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code, out, err = run("compress", tiny_model_dir, "--calibration", text_file, "--output", tmp_path / "plan")
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
    assert (code, out) == (expected, "")
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_debug_shows_the_traceback(tiny_model_dir):
    with pytest.raises(Exception, match="ffnn"):
        main(["inspect", tiny_model_dir, "--roles", "ffnn", "--debug"])


def test_an_unexpected_error_names_its_type(run, monkeypatch, tiny_model_dir):
    def broken(*_, **__):
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr(scap_nncf, "inspect_model", broken)
    code, _, err = run("inspect", tiny_model_dir)
    assert code == 1
    assert _error(err) == "scap-nncf: error: ZeroDivisionError: by zero (--debug shows where)"


def test_bench(run, tmp_path):
    code, out, err = run(
        "bench", "decode", "tiny", "--device", "cpu", "--dtype", "float32", "--prompts", "8", "--batches", "1",
        "--tokens", "2", "--rounds", "1", "--dense-modes", "eager", "--sparse-modes", "eager", "--prefill", "8",
        "--sparsity", "0.5", "--output", tmp_path / "bench", "--json",
    )  # fmt: skip
    assert code == 0, err
    rows = json.loads(out)["decode"]
    assert [row["variant"] for row in rows] == ["dense", "0.5"]
    assert all(row["ms"] > 0 for row in rows)
    assert 0.3 < rows[1]["realised"] < 0.7
    assert json.loads((tmp_path / "bench" / "decode.json").read_text())["decode"] == rows
    code, _, err = run("bench", "decode", "no-such-shape")
    assert code == 1
    assert "mistral-7b" in err
    if not torch.cuda.is_available():
        code, _, err = run("bench", "kernel", "--output", tmp_path / "kernels")
        assert code == 1
        assert "CUDA" in err
        assert not (tmp_path / "kernels").exists()


def test_help_and_version(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(command in out for command in ("inspect", "compress", "generate", "demo"))
    for command in ("inspect", "compress", "generate", "demo"):
        code, out, err = run(command, "--help")
        assert (code, err) == (0, "")
        assert "--json" in out
    code, out, _ = run("--version")
    assert (code, out.split()[:2]) == (0, ["scap-nncf", scap_nncf.__version__])


def test_json_alone_on_stdout_in_a_real_process(tiny_model_dir, text_file):
    """Nothing that a library prints, from Python or not, may get into the object's way."""
    command = [sys.executable, "-m", "scap_nncf", "compress", tiny_model_dir, "--calibration", str(text_file), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == tiny_model_dir


# -- sparsity ----------------------------------------------------------------------------------------------------------


def test_parse_sparsity(tmp_path):
    (tmp_path / "s.json").write_text('{"up": 0.4}')
    (tmp_path / "s.yaml").write_text("sparsity:\n  up: 0.4\n  're:down': 0.6\n")
    (tmp_path / "n.yaml").write_text("0.3\n")
    (tmp_path / "g.yaml").write_text("up,zero,0.3\n")
    assert parse_sparsity("0.5") == 0.5
    assert parse_sparsity("up=0.4, down=.6") == {"up": 0.4, "down": 0.6}
    assert parse_sparsity(r"re:layers\.[01]\.=0.4") == {r"re:layers\.[01]\.": 0.4}
    assert parse_sparsity('{"up": 0.4}') == {"up": 0.4}
    assert parse_sparsity("up,zero,0.35,down,zero,0.55") == "up,zero,0.35,down,zero,0.55"
    assert parse_sparsity(f"@{tmp_path}/s.json") == {"up": 0.4}
    assert parse_sparsity(f"@{tmp_path}/s.yaml") == {"up": 0.4, "re:down": 0.6}
    assert parse_sparsity(f"@{tmp_path}/n.yaml") == 0.3
    assert parse_sparsity(f"@{tmp_path}/g.yaml") == "up,zero,0.3"
    (tmp_path / "bad.yaml").write_text("a: [")
    for text in (f"@{tmp_path}/bad.yaml", "{", "{}", "[1]", "up", "=", "up=x"):
        with pytest.raises(typer.BadParameter):
            parse_sparsity(text)
