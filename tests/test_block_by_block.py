# SPDX-License-Identifier: Apache-2.0
"""Calibration with the weights of one block in memory: the statistics of the in-memory run, bit for bit."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import nncf
import pytest
import torch
from test_processes import FILES, in_processes
from tiny_models import build_tiny_model, make_batches

import scap_nncf
from scap_nncf.algorithms.backends.torch import blockwise
from scap_nncf.algorithms.backends.torch.residency import is_offloaded

FAMILIES = ["gpt2", "gemma3", "mixtral"]  # Llama is in every other test


def statistics(model: torch.nn.Module, data: Any = None, **settings: Any) -> bytes:
    settings = {"sparsity": 0.5, "allocation": "uniform", **settings}
    return scap_nncf.calibrate(model, dataset=data or make_batches(3), **settings).to_bytes()


@pytest.fixture(scope="module")
def folder_of_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    build_tiny_model("llama").save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def offloaded(folder: Path, scratch: Path) -> torch.nn.Module:
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    places |= {f"model.layers.{index}": "disk" for index in range(2)}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=scratch).eval()
    assert is_offloaded(model.model.layers[0])
    return model


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, sequential: bool) -> None:
    data = make_batches(3)
    data[1]["attention_mask"][0, :7] = 0
    usual = statistics(build_tiny_model(family), data, sequential=sequential)
    model = build_tiny_model(family)
    assert statistics(model, data, sequential=sequential, block_by_block=True) == usual
    assert model.config.use_cache == build_tiny_model(family).config.use_cache
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.modules())


@pytest.mark.parametrize(
    "settings", [{}, {"sequential": True, "mode": "median"}, {"sparsity": {"lm_head": 0.3, "up": 0.5}}]
)
def test_weights_on_disk(
    settings: dict[str, Any], folder_of_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 0
    model = offloaded(folder_of_shards, tmp_path / "scratch")
    load = blockwise.BlockWalk.enter

    def watch(self: Any, name: str) -> None:
        nonlocal most
        load(self, name)
        here = [block for block in model.model.layers if next(block.parameters()).device.type != "meta"]
        most = max(most, len(here))

    monkeypatch.setattr(blockwise.BlockWalk, "enter", watch)
    assert statistics(model, **settings) == statistics(build_tiny_model("llama"), **settings)
    assert most == 1
    assert all(is_offloaded(block) for block in model.model.layers)
    assert next(model.model.layers[0].parameters()).device.type == "meta"


def test_an_offloaded_model_is_pruned_as_one_in_memory(folder_of_shards: Path, tmp_path: Path) -> None:
    data = make_batches(2)
    model = offloaded(folder_of_shards, tmp_path / "scratch")
    usual = build_tiny_model("llama")
    for sparse in (model, usual):
        scap_nncf.compress(sparse, dataset=data, sparsity=0.5, mode="mean", allocation="uniform")
    assert scap_nncf.get_controller(model).plan.to_json() == scap_nncf.get_controller(usual).plan.to_json()
    with torch.no_grad():
        assert torch.equal(model(**data[0]).logits, usual(**data[0]).logits)


def test_hidden_states_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "MAX_HIDDEN_BYTES", 0)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    written = []
    to_file = blockwise._Hidden.to_file
    monkeypatch.setattr(blockwise._Hidden, "to_file", lambda self, file: written.append(file) or to_file(self, file))
    for sequential in (False, True):
        usual = statistics(build_tiny_model("llama"), sequential=sequential)
        assert statistics(build_tiny_model("llama"), sequential=sequential, block_by_block=True) == usual
    assert len(written) == 2 * 2 * 3  # calibrations, blocks, samples
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("family", "sequential"), [("llama", True), ("gpt2", False), ("gemma3", True)])
def test_goes_on_at_a_block_after_kill(family: str, sequential: bool, tmp_path: Path) -> None:
    folder = tmp_path / "unfinished"
    blocks = {"llama": "model.layers", "gpt2": "transformer.h", "gemma3": "model.layers"}[family]
    settings = {"sequential": sequential, "block_by_block": True}

    def killed() -> None:
        torch.set_num_threads(1)
        model = build_tiny_model(family)
        calls = []

        def hook(*_: Any) -> None:
            calls.append(1)
            if len(calls) == 3:  # one call found the sites; the second sample is in the last block
                os.kill(os.getpid(), signal.SIGKILL)

        model.get_submodule(f"{blocks}.1").register_forward_hook(hook)
        with scap_nncf.resumable(folder, every=0.0):
            statistics(model, **settings)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert any(path.is_dir() for path in folder.iterdir())

    model, runs = build_tiny_model(family), []
    model.get_submodule(f"{blocks}.0").mlp.register_forward_hook(lambda *_: runs.append(1))
    with scap_nncf.resumable(folder, every=0.0):
        result = statistics(model, **settings)
    assert result == statistics(build_tiny_model(family), sequential=sequential)
    assert len(runs) == 1, "the first block was run again"  # once to find the sites
    assert not folder.exists()


@pytest.mark.parametrize(("family", "by_block"), [("llama", True), ("mixtral", False)])
def test_processes_in_sequence(family: str, by_block: bool, tmp_path: Path) -> None:
    def compress(folder: Path, **settings: Any) -> None:
        settings = {"sparsity": 0.5, "allocation": "uniform", "sequential": True, **settings}
        model = scap_nncf.compress(build_tiny_model(family), dataset=make_batches(5, batch=1), **settings)
        scap_nncf.get_controller(model).save(folder)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the others: torch's products round differently with another number of threads
    compress(tmp_path / "alone")
    torch.set_num_threads(threads)
    work = lambda rank: compress(tmp_path / str(rank), block_by_block=by_block)  # noqa: E731
    assert in_processes(2, tmp_path / "group", work) == ["", ""]
    for name in FILES:
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_what_cannot_be_walked() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises((nncf.UnsupportedModelError, nncf.ValidationError)):
        scap_nncf.calibrate(torch.nn.ModuleDict({"a": model}), dataset=[torch.ones(1, 4)], block_by_block=True)
    with pytest.raises(nncf.ValidationError, match="block_by_block"):
        scap_nncf.Scap(block_by_block="yes")


def test_load_model_leaves_weights_on_disk(tiny_model_dir: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from scap_nncf.cli import main
    from scap_nncf.models import load_model

    model, _ = load_model(tiny_model_dir, device="cpu", offload=True)
    assert all(is_offloaded(block) for block in model.model.layers)
    assert next(model.model.embed_tokens.parameters()).device.type == "cpu"
    with pytest.raises(nncf.UnsupportedModelError, match="gradients"):
        scap_nncf.calibrate(model, dataset=make_batches(2), allocation="fisher")
    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day and the clocks were striking. " * 40)
    arguments = ["compress", tiny_model_dir, "--calibration", str(text), "--length", "32", "--samples", "3"]
    arguments += ["--device", "cpu", "--allocation", "uniform", "--json", "--output"]
    assert main([*arguments, str(tmp_path / "memory")]) == 0
    assert main([*arguments, str(tmp_path / "disk"), "--offload"]) == 0
    assert (tmp_path / "memory" / "plan.json").read_bytes() == (tmp_path / "disk" / "plan.json").read_bytes()


@pytest.mark.parametrize("family", ["gpt2", "opt", "mpt", "gemma3"])
def test_places_of_families(family: str) -> None:
    from scap_nncf.offload import disk_places

    model = build_tiny_model(family)
    places = disk_places(model, "cpu")
    for name, _ in model.named_parameters():
        assert any(name.startswith(f"{place}.") for place in places), f"{name} has no place"
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    heads = [place for place in places if "head" in place and not any(part.isdigit() for part in place.split("."))]
    assert all(places[head] == ("cpu" if tied else "disk") for head in heads)
    assert sum(where == "disk" for where in places.values()) >= 2
