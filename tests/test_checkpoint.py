# SPDX-License-Identifier: Apache-2.0
"""One folder that holds a quantised and sparse PyTorch model and gives the same outputs again, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nncf
import pytest
import torch
from safetensors.torch import load_file, save_file

import scap_nncf
from scap_nncf import Quantization, Scap, WeightCompression

Factory = Callable[..., torch.nn.Module]
Batches = Callable[..., list[dict[str, torch.Tensor]]]

STEPS: dict[str, WeightCompression | None] = {
    "dense": None,
    "int8_sym": WeightCompression("int8_sym"),
    "int8_asym": WeightCompression("int8_asym"),
    "int4_sym": WeightCompression("int4_sym", group_size=8),
    "int4_asym": WeightCompression("int4_asym", group_size=8),
    "int4_sym_channel": WeightCompression("int4_sym", group_size=-1),
    "int4_asym_channel": WeightCompression("int4_asym", group_size=-1),
    "mixed": WeightCompression("int4_asym", group_size=8, ratio=0.5, backup_mode="int8_sym"),
    "mixed_float": WeightCompression("int4_sym", group_size=8, ratio=0.5, backup_mode="none"),
    "all_layers_awq": WeightCompression("int4_sym", group_size=8, all_layers=True, awq=True, scale_estimation=True),
}


def logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor], torch.Tensor]:
    """A saved 4-bit sparse OPT with AWQ, the input and its logits."""
    from tiny_models import build_tiny_model, make_batches

    data = make_batches()
    steps = [WeightCompression("int4_asym", group_size=8, awq=True), Scap(sparsity=0.4, mode="median")]
    model = nncf.compress(build_tiny_model("opt"), algorithm=steps, dataset=data)
    folder = scap_nncf.save_pretrained(model, tmp_path_factory.mktemp("saved") / "model")
    return folder, data[0], logits(model, data[0])


@pytest.mark.parametrize("name", list(STEPS))
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_reload_is_bit_exact(name: str, family: str, tiny_model: Factory, batches: Batches, tmp_path: Path) -> None:
    data = batches()
    model = tiny_model(family)
    if (step := STEPS[name]) is not None:
        model = nncf.compress(model, algorithm=step, dataset=data)
        quantised = scap_nncf.save_pretrained(model, tmp_path / "quantised")
        assert torch.equal(logits(scap_nncf.load_pretrained(quantised), data[1]), logits(model, data[1]))
    model = nncf.compress(model, dataset=data, sparsity=0.5, mode="median")
    folder = scap_nncf.save_pretrained(model, tmp_path / "both")
    loaded = scap_nncf.load_pretrained(str(folder))

    assert torch.equal(logits(loaded, data[1]), logits(model, data[1]))
    assert not loaded.training
    ours, theirs = scap_nncf.get_controller(loaded), scap_nncf.get_controller(model)
    assert ours.plan.sites == theirs.plan.sites
    ours.set_sparsity(0.3)  # the statistics came along
    theirs.set_sparsity(0.3)
    assert torch.equal(logits(loaded, data[1]), logits(model, data[1]))
    ours.strip(), theirs.strip()
    assert torch.equal(logits(loaded, data[1]), logits(model, data[1]))


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "gpt_neox", "mpt", "qwen2"])
def test_families(family: str, tiny_model: Factory, batches: Batches, tmp_path: Path) -> None:
    data = batches()
    steps = [WeightCompression("int4_sym", group_size=8), Scap(sparsity=0.5, mode="mean")]
    model = nncf.compress(tiny_model(family), algorithm=steps, dataset=data)
    loaded = scap_nncf.load_pretrained(scap_nncf.save_pretrained(model, tmp_path / "m"))
    assert torch.equal(logits(loaded, data[1]), logits(model, data[1]))
    ids = data[0]["input_ids"][:1, :5]
    kwargs = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(ids, **kwargs), model.generate(ids, **kwargs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, tiny_model: Factory, batches: Batches, tmp_path: Path) -> None:
    """`model.to(bfloat16)` also rounds the rotary frequencies, which no state dict holds."""
    data = batches()
    model = tiny_model("llama", dtype=dtype)
    model = nncf.compress(model, [WeightCompression("int8_asym"), Scap(sparsity=0.5, mode="median")], dataset=data)
    loaded = scap_nncf.load_pretrained(scap_nncf.save_pretrained(model, tmp_path / "m"))
    assert loaded.dtype == model.dtype
    assert torch.equal(logits(loaded, data[0]), logits(model, data[0]))


def test_attention_implementation_is_kept(tiny_model: Factory, batches: Batches, tmp_path: Path) -> None:
    model, data = tiny_model(), batches()
    model.set_attn_implementation("eager")
    model = nncf.compress(model, dataset=data, sparsity=0.5)
    loaded = scap_nncf.load_pretrained(scap_nncf.save_pretrained(model, tmp_path / "m"))
    assert loaded.config._attn_implementation == "eager"
    assert torch.equal(logits(loaded, data[0]), logits(model, data[0]))


def test_tied_weights_are_stored_once_and_stay_tied(batches: Batches, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=131, hidden_size=48, num_attention_heads=4, num_hidden_layers=1, intermediate_size=88,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model = nncf.compress(model, [WeightCompression("int8_sym"), Scap(sparsity=0.5)], dataset=batches())
    folder = scap_nncf.save_pretrained(model, tmp_path / "m")
    stored = load_file(folder / "compressed_model.safetensors")
    assert ("lm_head.weight" in stored) != ("model.embed_tokens.weight" in stored)
    loaded = scap_nncf.load_pretrained(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded, batches()[0]), logits(model, batches()[0]))


def test_packed_weights_are_small_and_plain_transformers_refuses_them(
    tiny_model: Factory, batches: Batches, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = nncf.compress(tiny_model(), algorithm=WeightCompression("int4_sym", group_size=8), dataset=batches())
    folder = scap_nncf.save_pretrained(model, tmp_path / "m")
    weight = load_file(folder / "compressed_model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert weight.dtype == torch.uint8
    assert weight.numel() == 48 * 88 // 2
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_sparse_only_folder_is_a_dense_model_to_transformers(
    tiny_model: Factory, batches: Batches, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    data = batches()
    model = nncf.compress(tiny_model(), dataset=data, sparsity=0.5)
    folder = scap_nncf.save_pretrained(model, tmp_path / "m")
    with scap_nncf.get_controller(model).disabled():
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder), data[0]), logits(model, data[0]))


def test_tokenizer_comes_along(tiny_llama: torch.nn.Module, tiny_tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = nncf.compress(tiny_llama, dataset=["abc", "some text"], tokenizer=tiny_tokenizer, sparsity=0.5)
    folder = scap_nncf.save_pretrained(model, tmp_path / "m", tokenizer=tiny_tokenizer)
    assert AutoTokenizer.from_pretrained(folder)("hello")["input_ids"] == tiny_tokenizer("hello")["input_ids"]


def test_load_model_takes_such_a_folder(tiny_llama: torch.nn.Module, tiny_tokenizer: Any, tmp_path: Path) -> None:
    from scap_nncf.models import load_model

    steps = [WeightCompression("int8_sym"), Scap(sparsity=0.5)]
    model = nncf.compress(tiny_llama, steps, dataset=["abc", "some text"], tokenizer=tiny_tokenizer)
    bare = scap_nncf.save_pretrained(model, tmp_path / "bare")
    with pytest.raises(nncf.ValidationError, match="no tokenizer"):
        load_model(bare)
    folder = scap_nncf.save_pretrained(model, tmp_path / "m", tokenizer=tiny_tokenizer)
    with pytest.raises(nncf.ValidationError, match="types are fixed"):
        load_model(folder, dtype="bfloat16")
    loaded, tokenizer = load_model(folder, device="cpu")
    batch = dict(tokenizer("hello", return_tensors="pt"))
    assert torch.equal(logits(loaded, batch), logits(model, batch))


def test_reload_in_another_process(saved: Any, tmp_path: Path) -> None:
    folder, batch, expected = saved
    save_file({**batch, "expected": expected}, tmp_path / "io.safetensors")
    code = (
        "import sys, torch, scap_nncf; from safetensors.torch import load_file\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "io = load_file(sys.argv[2]); expected = io.pop('expected')\n"
        "with torch.no_grad(): got = scap_nncf.load_pretrained(sys.argv[1])(**io).logits\n"
        "sys.exit(0 if torch.equal(got, expected) else 7)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path / "io.safetensors")], check=False)
    assert done.returncode == 0


class Small(torch.nn.Module):
    """Not a transformers model, with a buffer outside of the state dict and a weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(24, 24) for _ in range(3)])
        self.layers[2].weight = self.layers[0].weight
        self.register_buffer("offset", torch.rand(24), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x + self.offset))
        return x


def test_any_module_with_a_given_skeleton(tmp_path: Path) -> None:
    data = [torch.randn(5, 24) for _ in range(4)]
    steps = [WeightCompression("int4_sym", group_size=8), Scap(sparsity={"all": 0.5})]
    model = nncf.compress(Small().eval(), algorithm=steps, dataset=data)
    folder = scap_nncf.save_pretrained(model, tmp_path / "m")
    with pytest.raises(nncf.ValidationError, match="pass it: load_pretrained"):
        scap_nncf.load_pretrained(folder)
    skeleton = Small()
    loaded = scap_nncf.load_pretrained(folder, model=skeleton)
    assert loaded is skeleton
    with torch.no_grad():
        assert torch.equal(loaded(data[0]), model(data[0]))
    assert loaded.layers[2].weight is loaded.layers[0].weight


@pytest.mark.parametrize(
    "quantise", [Quantization(), WeightCompression("int4_sym", group_size=-1, compression_format="fake_quantize")]
)
@pytest.mark.usefixtures("reference_quantisers")
def test_fake_quantised_models(quantise: Any, tiny_model: Factory, batches: Batches, tmp_path: Path) -> None:
    data = batches()
    model = nncf.compress(tiny_model(), [quantise, Scap(sparsity=0.4, mode="median")], dataset=data)
    loaded = scap_nncf.load_pretrained(scap_nncf.save_pretrained(model, tmp_path / "m"))
    assert torch.equal(logits(loaded, data[1]), logits(model, data[1]))


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_folder_that_is_not_empty(tiny_llama: torch.nn.Module, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(nncf.ValidationError, match="not empty"):
        scap_nncf.save_pretrained(tiny_llama, tmp_path)
    with pytest.raises(nncf.ValidationError, match="did not write it"):
        scap_nncf.save_pretrained(tiny_llama, tmp_path, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_overwrite_our_own(tiny_llama: torch.nn.Module, tmp_path: Path) -> None:
    folder = scap_nncf.save_pretrained(tiny_llama, tmp_path / "m")
    scap_nncf.save_pretrained(tiny_llama, folder, overwrite=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m"]


def test_a_failing_save_leaves_nothing(tiny_llama: torch.nn.Module, tmp_path: Path) -> None:
    class Broken:
        def save_pretrained(self, folder: Any) -> None:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        scap_nncf.save_pretrained(tiny_llama, tmp_path / "m", tokenizer=Broken())
    assert list(tmp_path.iterdir()) == []


def test_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(nncf.InvalidPathError, match=r"checkpoint\.json"):
        scap_nncf.load_pretrained(tmp_path / "nothing")


def test_not_a_torch_module(tmp_path: Path) -> None:
    with pytest.raises(nncf.ValidationError, match="PyTorch module, got str"):
        scap_nncf.save_pretrained("model", tmp_path / "m")  # type: ignore[arg-type]


def test_weights_of_another_toolkit(tiny_llama: torch.nn.Module, tmp_path: Path) -> None:
    class Packed(torch.nn.Parameter):
        pass

    tiny_llama.lm_head.weight = Packed(tiny_llama.lm_head.weight.data, requires_grad=False)
    with pytest.raises(nncf.ValidationError, match=r"lm_head is of another toolkit \(Packed\)"):
        scap_nncf.save_pretrained(tiny_llama, tmp_path / "m")


def _copy(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def _edit(folder: Path, **changes: Any) -> None:
    file = folder / "checkpoint.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"schema": "other"}, nncf.ValidationError, "no checkpoint of scap-nncf"),
        ({"schema_version": 99}, nncf.UnsupportedVersionError, "Upgrade"),
        ({"class": "os"}, nncf.ValidationError, "no model class"),
        ({"class": "AutoConfig"}, nncf.ValidationError, "no model class"),
        ({"class": "LlamaForCausalLM"}, nncf.ValidationError, "does not fit|cannot be made"),
        ({"hooks": [{"class": "Popen", "names": ["a"], "config": {}}]}, nncf.ValidationError, "unknown hook 'Popen'"),
        ({"hooks": 3}, nncf.ValidationError, "hooks is int"),
        ({"hooks": []}, nncf.ValidationError, r"model\.safetensors is missing"),
    ],
)
def test_changed_description(
    changes: dict[str, Any], error: type[Exception], text: str, saved: Any, tmp_path: Path
) -> None:
    folder = _copy(saved[0], tmp_path / "copy")
    _edit(folder, **changes)
    with pytest.raises(error, match=text):
        scap_nncf.load_pretrained(folder)


@pytest.mark.parametrize(
    "name",
    ["compressed_model.safetensors", "buffers.safetensors", "statistics.safetensors", "checkpoint.json", "plan.json"],
)
@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_damaged_files(name: str, damage: str, saved: Any, tmp_path: Path) -> None:
    folder = _copy(saved[0], tmp_path / "copy")
    file = folder / name
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        file.unlink()
    if (name, damage) == ("plan.json", "remove"):
        with pytest.raises(nncf.ValidationError, match="does not fit"):
            scap_nncf.load_pretrained(folder)  # mode*W of a plan that is not there
        return
    with pytest.raises((nncf.ValidationError, nncf.InvalidPathError), match=name.replace(".", r"\.")):
        scap_nncf.load_pretrained(folder)


def test_missing_and_foreign_tensors_are_named(saved: Any, tmp_path: Path) -> None:
    folder = _copy(saved[0], tmp_path / "copy")
    file = folder / "compressed_model.safetensors"
    tensors = load_file(file)
    tensors["model.decoder.layers.9.fc1.weight"] = tensors.pop("model.decoder.layers.0.fc1.weight")
    save_file(tensors, file)
    with pytest.raises(nncf.ValidationError, match=r"layers\.0\.fc1\.weight.*layers\.9\.fc1\.weight"):
        scap_nncf.load_pretrained(folder)
