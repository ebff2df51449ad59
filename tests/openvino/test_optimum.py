# SPDX-License-Identifier: Apache-2.0
"""Optimum-Intel pipelines: load, quantise, sparsify, save and reload, in Python and from the command line."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov
import pytest
import torch
from optimum.intel import (
    OVModelForCausalLM,
    OVModelForFeatureExtraction,
    OVModelForImageClassification,
    OVWeightQuantizationConfig,
)

import scap_nncf
from scap_nncf import Quantization, Scap, WeightCompression
from scap_nncf import optimum as pipelines
from scap_nncf.cli_export import main as export_main

TEXTS = [
    "some text to calibrate on, long enough to be worth it",
    "and another one, of other words, with numbers 1 2 3",
    "a third text so that there is a little more to see",
]
IDS = torch.tensor([[5, 9, 33, 70, 12, 88]])
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}


def generate(model: Any) -> list[int]:
    return model.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0)[0].tolist()


def constants(model: ov.Model) -> Counter[str]:
    names = [
        op.get_element_type().get_type_name() for op in model.get_ordered_ops() if op.get_type_name() == "Constant"
    ]
    return Counter(name for name in names if name in ("i8", "u8", "i4", "u4", "nf4"))


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> str:
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny-bert")
    config = BertConfig(
        vocab_size=131, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=88
    )
    BertModel(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    folder = tmp_path_factory.mktemp("tiny-vit")
    config = ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=88,
        image_size=32, patch_size=8, num_labels=5,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for index in range(3):
        Image.fromarray(generator.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


def test_text_generation_from_a_torch_folder(tiny_model_dir: str, tmp_path: Path) -> None:
    model = pipelines.from_pretrained(
        tiny_model_dir, algorithm=Scap(sparsity={"ffn": 0.5}), dataset=TEXTS, ov_config=EXACT
    )
    assert isinstance(model, OVModelForCausalLM)
    expected = generate(model)
    controller = scap_nncf.get_controller(model)
    assert {layer.role for layer in controller.plan.layers} == {"gate", "up", "down"}

    folder = pipelines.save_pretrained(model, tmp_path / "ours")
    again = pipelines.from_pretrained(folder, ov_config=EXACT)
    assert generate(again) == expected
    assert scap_nncf.get_controller(again).plan == controller.plan
    scap_nncf.get_controller(again).set_sparsity({"ffn": 0.2})  # the statistics came along

    model.save_pretrained(tmp_path / "theirs")  # Optimum's own
    plain = OVModelForCausalLM.from_pretrained(tmp_path / "theirs", ov_config=EXACT)
    assert generate(plain) == expected
    assert scap_nncf.get_controller(plain).plan.sites == controller.plan.sites


def test_offline(tiny_model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the hub Optimum takes every folder for IR (or, if told to export, for PyTorch weights)."""
    from optimum.intel.openvino import modeling_base

    monkeypatch.setattr(modeling_base, "is_offline_mode", lambda: True)
    model = pipelines.from_pretrained(tiny_model_dir, algorithm=Scap(sparsity=0.4), dataset=TEXTS, ov_config=EXACT)
    folder = pipelines.save_pretrained(model, tmp_path / "m")
    assert generate(pipelines.from_pretrained(folder, ov_config=EXACT)) == generate(model)


def test_it_prunes_as_torch_does(tiny_model_dir: str, tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    scap = Scap(sparsity=0.4, allocation="uniform")  # an IR has no gradients to allocate by
    torch_model = nncf.compress(tiny_model(), algorithm=scap, dataset=TEXTS, tokenizer=tiny_tokenizer)
    model = pipelines.from_pretrained(tiny_model_dir, algorithm=scap, dataset=TEXTS, ov_config=EXACT)
    ours = {layer.name: layer.threshold for layer in scap_nncf.get_controller(model).plan.layers}
    theirs = {layer.name: layer.threshold for layer in scap_nncf.get_controller(torch_model).plan.layers}
    assert ours.keys() == theirs.keys()
    assert all(ours[name] == pytest.approx(theirs[name], rel=1 / 64) for name in ours)
    plan = scap_nncf.get_controller(torch_model).plan
    same = pipelines.from_pretrained(tiny_model_dir, plan=plan, ov_config=EXACT)
    with torch.no_grad():
        expected = torch_model(IDS).logits
    error = (same(IDS).logits - expected).abs()
    assert error.mean() < 1e-4  # a value on the threshold may fall to the other side


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (OVWeightQuantizationConfig(bits=8, sym=False), "u8"),
        (OVWeightQuantizationConfig(bits=8, sym=True), "i8"),
        (OVWeightQuantizationConfig(bits=4, group_size=8, sym=True), "i4"),
        ({"bits": 4, "group_size": 8, "sym": False}, "u4"),
    ],
)
def test_optimum_quantises_first(config: Any, kind: str, exported: Callable[[str], Path], tmp_path: Path) -> None:
    source = exported("llama")
    quantised = pipelines.from_pretrained(source, quantization_config=config, ov_config=EXACT)
    model = pipelines.from_pretrained(
        source, quantization_config=config, algorithm=Scap(sparsity=0.5, mode="median"), dataset=TEXTS,
        ov_config=EXACT,
    )  # fmt: skip
    assert constants(model.model) == constants(quantised.model)
    assert constants(model.model)[kind] >= 14
    with scap_nncf.get_controller(model).disabled():
        assert torch.equal(model(IDS).logits, quantised(IDS).logits)
    folder = pipelines.save_pretrained(model, tmp_path / "m")
    reloaded = pipelines.from_pretrained(folder, ov_config=EXACT)
    assert torch.equal(reloaded(IDS).logits, model(IDS).logits)
    assert constants(reloaded.model) == constants(model.model)


def test_data_aware_quantisation_of_optimum(tiny_model_dir: str, exported: Callable[[str], Path]) -> None:
    config = OVWeightQuantizationConfig(
        bits=4, group_size=8, dataset=TEXTS, tokenizer=tiny_model_dir, quant_method="awq", scale_estimation=True
    )
    model = pipelines.from_pretrained(
        exported("llama"), quantization_config=config, algorithm=Scap(sparsity=0.4), dataset=TEXTS
    )
    assert constants(model.model)["u4"] >= 14
    assert scap_nncf.get_controller(model) is not None


@pytest.mark.parametrize(
    "step",
    [
        WeightCompression("nf4", group_size=8),
        WeightCompression("int4_asym", group_size=8, gptq=True),
        WeightCompression("int4_asym", group_size=8, lora_correction=True),
        Quantization(),
    ],
    ids=["nf4", "gptq", "lora", "w8a8"],
)
def test_recipe_on_a_model_object(step: Any, exported: Callable[[str], Path], tmp_path: Path) -> None:
    model = pipelines.from_pretrained(
        exported("llama"), algorithm=[Scap(sparsity=0.5), step], dataset=TEXTS, ov_config=EXACT
    )
    made_by = scap_nncf.get_controller(model).plan.made_by
    assert [next(iter(item)) for item in made_by["recipe"]][-1] == "scap"
    folder = pipelines.save_pretrained(model, tmp_path / "m")
    plain = ov.Core().read_model(folder / "openvino_model.xml")
    assert scap_nncf.get_controller(plain).plan.made_by == made_by  # the IR carries the recipe
    reloaded = pipelines.from_pretrained(folder, ov_config=EXACT)
    assert torch.equal(reloaded(IDS).logits, model(IDS).logits)


def test_a_failing_recipe_leaves_the_model_object(exported: Callable[[str], Path]) -> None:
    model = pipelines.from_pretrained(exported("llama"), ov_config=EXACT)
    graph, before = model.model, model(IDS).logits
    steps = [WeightCompression("int8_sym"), Scap(sparsity={"re:nothing": 0.5})]
    with pytest.raises(nncf.ValidationError, match="re:nothing"):
        nncf.compress(model, algorithm=steps, dataset=[{"input_ids": IDS}])
    assert model.model is graph
    assert torch.equal(model(IDS).logits, before)


def test_wrong_order_on_an_ir(read_ir: Callable[..., ov.Model], run_ir: Any, batches: Any) -> None:
    data = batches()
    step = WeightCompression("int4_sym", group_size=8)
    sparse = nncf.compress(read_ir(), dataset=data, sparsity=0.4)
    before = run_ir(sparse, data[0])
    plan = scap_nncf.get_controller(sparse).plan
    both = nncf.compress(sparse, algorithm=step, dataset=data)
    assert np.array_equal(run_ir(sparse, data[0]), before), "the given model must not change"
    expected = nncf.compress(nncf.compress(read_ir(), algorithm=step, dataset=data), plan=plan)
    assert np.array_equal(run_ir(both, data[0]), run_ir(expected, data[0]))


def test_ir_that_someone_else_quantised(tiny_model_dir: str, tmp_path: Path) -> None:
    """An IR of `optimum-cli export openvino --weight-format int4` is calibrated as it stands: the same plan."""
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", tiny_model_dir]
    flags = ["--task", "text-generation-with-past", "--weight-format", "int4", "--group-size", "8", "--sym"]
    done = subprocess.run([*command, *flags, str(tmp_path / "theirs")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calibrated = pipelines.from_pretrained(tmp_path / "theirs", algorithm=Scap(sparsity=0.4), dataset=TEXTS)
    config = OVWeightQuantizationConfig(bits=4, group_size=8, sym=True)
    through_python = pipelines.from_pretrained(
        tiny_model_dir, quantization_config=config, algorithm=Scap(sparsity=0.4), dataset=TEXTS
    )
    # the command takes it as well, and what it writes is that model
    assert export_main([str(tmp_path / "theirs"), str(tmp_path / "m"), "--plan", _plan_of(calibrated, tmp_path)]) == 0
    from_command = pipelines.from_pretrained(tmp_path / "m", ov_config=EXACT)
    assert constants(from_command.model) == constants(calibrated.model)
    assert scap_nncf.get_controller(from_command).plan.sites == scap_nncf.get_controller(calibrated).plan.sites
    assert export_main([str(tmp_path / "theirs"), str(tmp_path / "again"), "--weight-format", "int8"]) == 1
    assert export_main([str(tmp_path / "m"), str(tmp_path / "again"), *FAST]) == 1  # sparse already
    assert not (tmp_path / "again").exists()
    ours, theirs = (
        {layer.name: layer.threshold for layer in scap_nncf.get_controller(model).plan.layers}
        for model in (calibrated, through_python)
    )
    assert ours.keys() == theirs.keys()
    assert all(ours[name] == pytest.approx(theirs[name], rel=1 / 64) for name in ours)


def _plan_of(model: Any, folder: Path) -> str:
    return str(scap_nncf.get_controller(model).save(folder / "plan"))


def test_feature_extraction(bert_folder: str, tmp_path: Path) -> None:
    model = pipelines.from_pretrained(bert_folder, algorithm=Scap(sparsity=0.5), dataset=TEXTS, ov_config=EXACT)
    assert isinstance(model, OVModelForFeatureExtraction)
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "token_type_ids": torch.zeros_like(IDS)}
    expected = model(**inputs).last_hidden_state
    folder = pipelines.save_pretrained(model, tmp_path / "m")
    assert torch.equal(pipelines.from_pretrained(folder, ov_config=EXACT)(**inputs).last_hidden_state, expected)
    with scap_nncf.get_controller(model).disabled():
        assert not torch.equal(model(**inputs).last_hidden_state, expected)


def test_image_classification(vit_folder: str, tmp_path: Path) -> None:
    data = [{"pixel_values": torch.rand(2, 3, 32, 32)} for _ in range(3)]
    config = OVWeightQuantizationConfig(bits=8)
    model = pipelines.from_pretrained(
        vit_folder, quantization_config=config, algorithm=Scap(sparsity=0.5), dataset=data, ov_config=EXACT
    )
    assert isinstance(model, OVModelForImageClassification)
    expected = model(**data[0]).logits
    folder = pipelines.save_pretrained(model, tmp_path / "m")
    assert torch.equal(pipelines.from_pretrained(folder, ov_config=EXACT)(**data[0]).logits, expected)


def test_sparsifier(exported: Callable[[str], Path], tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = OVModelForCausalLM.from_pretrained(str(exported("llama")), compile=False, ov_config=EXACT)
    sparsifier = pipelines.OVSparsifier.from_pretrained(model, tiny_tokenizer)
    result = sparsifier.sparsify(Scap(sparsity=0.4), TEXTS, save_directory=tmp_path / "m")
    assert result is model
    expected = generate(model)
    assert generate(OVModelForCausalLM.from_pretrained(tmp_path / "m", ov_config=EXACT)) == expected
    assert (tmp_path / "m" / "openvino_tokenizer.xml").is_file()
    with pytest.raises(nncf.ValidationError, match="not empty"):
        sparsifier.sparsify(Scap(), TEXTS, save_directory=tmp_path / "m")
    assert generate(model) == expected


# -- the command line --------------------------------------------------------------------------------------------------

FAST = ["--samples", "3", "--length", "16"]


def test_export_command(tiny_model_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--weight-format", "int4", "--group-size", "8", "--sparsity", "up=0.4,down=0.6", "--mode", "median"]
    assert export_main([tiny_model_dir, str(tmp_path / "m"), *flags, *FAST]) == 0
    assert "Saved to" in capsys.readouterr().out
    model = pipelines.from_pretrained(tmp_path / "m", ov_config=EXACT)
    plan = scap_nncf.get_controller(model).plan
    assert {(layer.role, layer.sparsity) for layer in plan.layers} == {("up", 0.4), ("down", 0.6)}
    assert constants(model.model)["u4"] >= 14
    assert len(generate(model)) > IDS.shape[1]
    assert (tmp_path / "m" / "openvino_tokenizer.xml").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]

    assert export_main([tiny_model_dir, str(tmp_path / "again"), "--plan", str(tmp_path / "m")]) == 0
    again = pipelines.from_pretrained(tmp_path / "again")
    assert scap_nncf.get_controller(again).plan.sites == plan.sites


def test_export_command_for_images(vit_folder: str, images: Path, tmp_path: Path) -> None:
    assert export_main([vit_folder, str(tmp_path / "m"), "--calibration", str(images), "--samples", "3"]) == 0
    assert scap_nncf.get_controller(pipelines.from_pretrained(tmp_path / "m")).plan.made_by["samples"] == 3


def test_export_command_for_encoders(bert_folder: str, tmp_path: Path) -> None:
    assert export_main([bert_folder, str(tmp_path / "m"), "--prune", "all", *FAST]) == 0
    assert isinstance(pipelines.from_pretrained(tmp_path / "m"), OVModelForFeatureExtraction)


def test_optimum_cli_has_the_command(tiny_model_dir: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino-scap"]
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert helped.returncode == 0, helped.stderr
    plain = subprocess.run([*command[:-1], "openvino", "--help"], capture_output=True, text=True)
    flags = {word.strip("[],") for word in plain.stdout.split() if word.startswith(("--", "[--"))}
    assert len(flags) > 20
    assert all(flag in helped.stdout for flag in flags)
    done = subprocess.run(
        [*command, "--model", tiny_model_dir, str(tmp_path / "m"), "--sparsity", "all=0.3", *FAST],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert scap_nncf.get_controller(scap_nncf.load_openvino(tmp_path / "m")).plan.layers[0].sparsity == 0.3


def test_python_export_is_the_same_code(tiny_model_dir: str, tmp_path: Path) -> None:
    folder = pipelines.export(
        tiny_model_dir,
        tmp_path / "m",
        algorithm=Scap(sparsity={"all": 0.3}),
        dataset=TEXTS,
        arguments=["--weight-format", "int8"],
    )
    model = scap_nncf.load_openvino(folder)
    assert constants(model)["u8"] >= 14
    assert scap_nncf.get_controller(model).plan.layers[0].sparsity == 0.3


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["{model}", "{full}"], 1, "not empty"),
        (["{model}/nothing", "{new}"], 1, "nothing is no model"),
        (["{model}", "{new}", "--sparsity", "1.5"], None, "1.5"),
        (["{model}", "{new}", "--sparsity", "nope=0.5", *FAST], 1, "nope"),
        (["{model}", "{new}", "--weight-format", "int4", "--group-size", "32", *FAST], 1, "group size"),
        (["{model}", "{new}", "--calibration", "{model}/nothing.txt"], 1, "nothing.txt"),
        (["{model}", "{new}", "--plan", "{model}"], 1, "plan"),
        (["{model}", "{new}", "--plan", "x", "--sparsity", "0.4"], 2, "no effect"),
        (["{bare}", "{new}", *FAST], 1, "tokenizer"),
        (["{model}", "{new}", "--task", "swimming"], 1, "swimming"),
    ],
)
def test_bad_input_of_the_command(
    arguments: list[str],
    code: int | None,
    text: str,
    tiny_model_dir: str,
    tiny_model: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    bare = tmp_path / "bare"
    if "{bare}" in arguments:
        tiny_model().save_pretrained(bare)
    places = {"model": tiny_model_dir, "full": tmp_path / "full", "new": tmp_path / "new", "bare": bare}
    try:
        result = export_main([item.format(**places) for item in arguments])
    except SystemExit as leave:
        result = leave.code
    assert result == code if code is not None else result
    assert text in capsys.readouterr().err
    left = {path.name for path in tmp_path.iterdir()} - {"bare"}
    assert left == {"full"}
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_bad_input_in_python(tiny_model_dir: str, tiny_llama: Any, tmp_path: Path) -> None:
    with pytest.raises(nncf.ValidationError, match="no model"):
        pipelines.from_pretrained(tmp_path)
    with pytest.raises(nncf.ParameterNotSupportedError, match="Unknown task 'swimming'"):
        pipelines.from_pretrained(tiny_model_dir, task="swimming")
    with pytest.raises(nncf.ValidationError, match="model object of Optimum-Intel"):
        pipelines.OVSparsifier(tiny_llama)
    with pytest.raises(nncf.ValidationError, match="model object of Optimum-Intel"):
        pipelines.save_pretrained(tiny_llama, tmp_path / "m")
    tiny_llama.save_pretrained(tmp_path / "bare")
    with pytest.raises(nncf.ValidationError, match="tokenizer"):
        pipelines.from_pretrained(tmp_path / "bare", algorithm=Scap(), dataset=TEXTS)


def test_the_other_commands_take_an_ir(
    exported: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from scap_nncf.cli import main

    def run(*words: str) -> str:
        code = main(list(words))
        text = capsys.readouterr()
        assert code == 0, text.err
        return text.out

    ir, plan = str(exported("llama")), str(tmp_path / "plan")
    assert "14 layers at 8 sites" in run("inspect", ir)
    assert "40.0 %" in run("compress", ir, "--sparsity", "0.4", "--output", plan, *FAST)
    assert "pruned" in run("generate", ir, "--plan", plan, "--prompt", "one", "--max-new-tokens", "3")
    assert "dense" in run("generate", ir, "--prompt", "one", "--max-new-tokens", "3")
