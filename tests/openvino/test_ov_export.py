# SPDX-License-Identifier: Apache-2.0
"""Export of sparse PyTorch models to OpenVINO, and what Optimum-Intel and OpenVINO make of the result."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov
import pytest
import torch

import scap_nncf
from scap_nncf import Quantization, Scap, WeightCompression
from scap_nncf.algorithms.backends.openvino.feed import feed

Models = Callable[..., Any]


def greedy(model: Any, ids: torch.Tensor) -> list[int]:
    options = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()


def test_language_model(
    tiny_llama: Any, batches: Models, tiny_tokenizer: Any, exact: dict[str, Any], core: ov.Core, tmp_path: Path
) -> None:
    from optimum.intel import OVModelForCausalLM

    data = batches()
    ids = data[0]["input_ids"][:1]
    nncf.compress(tiny_llama, algorithm="scap", dataset=data, sparsity=0.4, mode="mean", allocation="uniform")
    expected, text = tiny_llama(**data[0]).logits, greedy(tiny_llama, ids)
    settings, padding_side = tiny_llama.config.to_dict(), tiny_tokenizer.padding_side
    folder = scap_nncf.export_openvino(tiny_llama, tmp_path / "ir", tokenizer=tiny_tokenizer)

    # the model and the tokenizer are as they were
    assert tiny_llama.config.to_dict() == settings
    assert tiny_tokenizer.padding_side == padding_side
    assert torch.equal(tiny_llama(**data[0]).logits, expected)
    plan = scap_nncf.get_controller(tiny_llama).plan

    written = {path.name for path in folder.iterdir()}
    assert {"openvino_model.xml", "openvino_model.bin", "config.json", "generation_config.json"} <= written
    assert {"tokenizer.json", "openvino_tokenizer.xml", "openvino_detokenizer.xml"} <= written
    assert {"plan.json", "statistics.safetensors"} <= written
    assert not any(name.startswith("sparse") for name in written)

    exported = OVModelForCausalLM.from_pretrained(folder, ov_config=exact)
    assert (exported(**data[0]).logits - expected).abs().mean() < 1e-3
    assert greedy(exported, ids) == text
    assert scap_nncf.get_controller(exported).plan.sites == plan.sites

    # plain OpenVINO reads it too, and a copy saved by Optimum differs by nothing
    assert scap_nncf.get_controller(core.read_model(folder / "openvino_model.xml")).plan.sites == plan.sites
    exported.save_pretrained(tmp_path / "again")
    again = OVModelForCausalLM.from_pretrained(tmp_path / "again", ov_config=exact)
    assert torch.equal(again(**data[0]).logits, exported(**data[0]).logits)

    # an Optimum model is changed in place: dense again, then sparse from its own calibration
    controller = scap_nncf.get_controller(exported)
    pruned = exported(**data[0]).logits
    with controller.disabled():
        dense = exported(**data[0]).logits
    scap_nncf.get_controller(tiny_llama).strip()
    assert (dense - tiny_llama(**data[0]).logits).abs().max() < 1e-3
    assert greedy(exported, ids) == text
    assert controller.strip() is exported
    uniform = {"sparsity": 0.4, "mode": "mean", "allocation": "uniform"}
    assert nncf.compress(exported, algorithm="scap", dataset=data, **uniform) is exported
    assert (exported(**data[0]).logits - pruned).abs().mean() < 1e-3


def test_dense_parity_and_same_text(
    tiny_model: Models, exported: Callable[[str], Path], batches: Models, exact: dict[str, Any]
) -> None:
    from optimum.intel import OVModelForCausalLM

    model, data = tiny_model("llama"), batches(1)
    ours = OVModelForCausalLM.from_pretrained(exported("llama"), ov_config=exact)
    assert (ours(**data[0]).logits - model(**data[0]).logits).abs().max() < 1e-3
    assert greedy(ours, data[0]["input_ids"][:1]) == greedy(model, data[0]["input_ids"][:1])
    assert scap_nncf.get_controller(ours) is None


@pytest.mark.parametrize(("mode", "stored"), [("int8_asym", "u8"), ("int4_sym", "i4")])
def test_quantised_then_sparse(
    mode: str, stored: str, tiny_llama: Any, batches: Models, exact: dict[str, Any], core: ov.Core, tmp_path: Path
) -> None:
    from optimum.intel import OVModelForCausalLM

    data = batches(2)
    options = {} if mode.startswith("int8") else {"group_size": 8, "dataset": nncf.Dataset(data)}
    step = nncf.CompressWeightsMode(mode)
    options.setdefault("dataset", nncf.Dataset(data[:1]))
    model = nncf.compress_weights(tiny_llama, mode=step, **options)
    dense = model(**data[0]).logits
    nncf.compress(model, algorithm="scap", dataset=data, sparsity=0.4, mode="mean", allocation="uniform")
    expected = model(**data[0]).logits
    folder = scap_nncf.export_openvino(model, tmp_path / "ir")
    exported = OVModelForCausalLM.from_pretrained(folder, ov_config=exact)
    # NNCF decompresses to float16 in torch, the CPU plugin in float32: 3e-4, which flips some values at a threshold
    assert (exported(**data[0]).logits - expected).abs().mean() < 0.25 * (expected - dense).abs().mean()
    with scap_nncf.get_controller(exported).disabled():
        assert (exported(**data[0]).logits - dense).abs().max() < 1e-2
    ir = core.read_model(folder / "openvino_model.xml")
    types = [op.get_element_type().get_type_name() for op in ir.get_ordered_ops() if op.get_type_name() == "Constant"]
    assert types.count(stored) >= 14

    # calibrating the IR as it stands gives the same plan
    stripped = scap_nncf.get_controller(ir).strip()
    from_ir = nncf.compress(stripped, algorithm="scap", dataset=data, sparsity=0.4, mode="mean", allocation="uniform")
    ours = {layer.name: layer.threshold for layer in scap_nncf.get_controller(from_ir).plan.layers}
    for layer in scap_nncf.get_controller(model).plan.layers:
        assert ours[layer.name] == pytest.approx(layer.threshold, rel=1 / 128)


@pytest.mark.parametrize(
    "step", [Quantization(), WeightCompression("int4_sym", group_size=8, awq=True)], ids=["w8a8", "awq"]
)
@pytest.mark.usefixtures("reference_quantisers")
def test_scales_and_quantisers_are_behind_the_pruner(
    step: Any, tiny_model: Models, batches: Models, core: ov.Core, tmp_path: Path
) -> None:
    """SmoothQuant, AWQ and quantisers of activations change what a product reads, not what is compared with τ."""
    data = batches(4)
    family = "llama" if isinstance(step, Quantization) else "opt"  # AWQ folds its factor into llama's weights
    model = nncf.compress(tiny_model(family), algorithm=[step, Scap(sparsity=0.5, mode="mean")], dataset=data)
    with scap_nncf.get_controller(model).disabled():
        dense = model(**data[0]).logits
    expected = model(**data[0]).logits
    ir = scap_nncf.load_openvino(scap_nncf.export_openvino(model, tmp_path / "ir"))
    theirs = {layer.name: layer.realised_sparsity for layer in scap_nncf.measure_sparsity(model, data).layers}
    for layer in scap_nncf.measure_sparsity(ir, data).layers:
        assert layer.realised_sparsity == pytest.approx(theirs[layer.name], abs=0.01)
    compiled = core.compile_model(ir, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    result = torch.from_numpy(compiled(feed(ir, data[0], "the sample"))[0])
    # roundings flip what lies on a threshold or between two integers, and later layers follow
    assert (result - expected).abs().mean() < 0.3 * (expected - dense).abs().mean()


@pytest.mark.usefixtures("reference_quantisers")
def test_scale_that_is_fused_into_a_norm_is_refused(tiny_model: Models, batches: Models, tmp_path: Path) -> None:
    data = batches(2)
    model = nncf.compress(tiny_model("opt"), algorithm=[Quantization(), Scap(sparsity=0.5)], dataset=data)
    with pytest.raises(nncf.UnsupportedModelError, match=r"such as model\.decoder\.layers\.0\.fc1.*quantise"):
        scap_nncf.export_openvino(model, tmp_path / "ir")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_model(
    dtype: torch.dtype, tiny_model: Models, batches: Models, core: ov.Core, tmp_path: Path
) -> None:
    model, data = tiny_model("llama", dtype=dtype), batches(1)
    nncf.compress(model, algorithm="scap", dataset=data, sparsity=0.3)
    expected = model(**data[0]).logits
    folder = scap_nncf.export_openvino(model, tmp_path / "ir")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.equal(model(**data[0]).logits, expected)
    ir = core.read_model(folder / "openvino_model.xml")
    name = "bf16" if dtype == torch.bfloat16 else "f16"
    types = [op.get_element_type().get_type_name() for op in ir.get_ordered_ops() if op.get_type_name() == "Constant"]
    assert types.count(name) >= 15
    assert len(scap_nncf.get_controller(ir).plan.layers) == 14


def test_stored_as_float16(tiny_llama: Any, batches: Models, core: ov.Core, tmp_path: Path) -> None:
    data = batches(1)
    nncf.compress(tiny_llama, algorithm="scap", dataset=data, sparsity=0.4, mode="mean")
    folder = scap_nncf.export_openvino(tiny_llama, tmp_path / "ir", compress_to_fp16=True)
    ir = core.read_model(folder / "openvino_model.xml")
    constants = {op.get_friendly_name(): op for op in ir.get_ordered_ops() if op.get_type_name() == "Constant"}
    assert sum(op.get_element_type() == ov.Type.f16 for op in constants.values()) >= 15
    # thresholds and modes stay float32, and are those of the plan to the last bit
    plan = scap_nncf.get_controller(tiny_llama).plan
    for site in plan.sites:
        stored = constants[f"{site.name}/scap/threshold"]
        assert stored.get_element_type() == ov.Type.f32
        assert float(stored.data) == np.float32(site.layers[0].threshold)
        assert float(constants[f"{site.name}/scap/mode"].data) == np.float32(site.mode)


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_encoders(kind: str, exact: dict[str, Any], tmp_path: Path) -> None:
    import transformers as tf
    from optimum.intel import OVModelForFeatureExtraction, OVModelForImageClassification

    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 88}
    generator = torch.Generator().manual_seed(5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        if kind == "bert":
            model: Any = tf.BertModel(tf.BertConfig(vocab_size=131, max_position_embeddings=64, **sizes))
        else:
            model = tf.ViTForImageClassification(tf.ViTConfig(image_size=32, patch_size=8, num_labels=7, **sizes))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    model.eval()
    if kind == "bert":
        ids = torch.randint(3, 131, (2, 13), generator=generator)
        data, loader = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], OVModelForFeatureExtraction
    else:
        data = [{"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}]
        loader = OVModelForImageClassification
    dense = model(**data[0])[0].detach()
    nncf.compress(model, algorithm="scap", dataset=data, sparsity=0.4, mode="mean", allocation="uniform")
    expected = model(**data[0])[0].detach()
    folder = scap_nncf.export_openvino(model, tmp_path / "ir")
    exported = loader.from_pretrained(folder, ov_config=exact)
    result = torch.as_tensor(exported(**data[0])[0])
    assert (result - expected).abs().mean() < 1e-3
    assert (result - dense).abs().mean() > 1e-3
    # its IR calibrates as it stands, to the same thresholds
    ir = scap_nncf.load_openvino(folder)
    plan = scap_nncf.get_controller(ir).plan
    stripped = scap_nncf.get_controller(ir).strip()
    again = nncf.compress(stripped, dataset=data, sparsity=0.4, mode="mean", allocation="uniform")
    again = scap_nncf.get_controller(again).plan
    thresholds = {layer.name: layer.threshold for layer in again.layers}
    assert len(thresholds) == 12
    for layer in plan.layers:
        assert thresholds[layer.name] == pytest.approx(layer.threshold, rel=1 / 128)


# -- bad input -------------------------------------------------------------------------------------------------------


def test_folder_in_use(tiny_llama: Any, batches: Models, tmp_path: Path) -> None:
    nncf.compress(tiny_llama, algorithm="scap", dataset=batches(1), sparsity=0.4)
    target = tmp_path / "full"
    target.mkdir()
    (target / "mine.txt").write_text("keep")
    for overwrite in (False, True):  # a folder that is not ours is never replaced
        with pytest.raises(nncf.ValidationError):
            scap_nncf.export_openvino(tiny_llama, target, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert (target / "mine.txt").read_text() == "keep"


def test_failure_leaves_nothing(tiny_llama: Any, batches: Models, tmp_path: Path) -> None:
    data = batches(1)
    nncf.compress(tiny_llama, algorithm="scap", dataset=data, sparsity=0.4)
    expected = tiny_llama(**data[0]).logits
    with pytest.raises(nncf.UnsupportedModelError, match="Optimum-Intel cannot export LlamaForCausalLM"):
        scap_nncf.export_openvino(tiny_llama, tmp_path / "ir", task="no-such-task")
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(tiny_llama(**data[0]).logits, expected)  # sparse as before
    with pytest.raises(nncf.ValidationError, match="takes a PyTorch model, got str"):
        scap_nncf.export_openvino("model", tmp_path / "ir")


def test_missing_ir_and_foreign_plan(read_ir: Models, batches: Models, tmp_path: Path) -> None:
    with pytest.raises(nncf.InvalidPathError, match="No OpenVINO model at"):
        scap_nncf.load_openvino(tmp_path)
    folders = []
    for sparsity in (0.3, 0.5):
        sparse = nncf.compress(read_ir(), algorithm="scap", dataset=batches(1), sparsity=sparsity)
        folders.append(scap_nncf.save_openvino(sparse, tmp_path / str(sparsity)))
    (folders[0] / "plan.json").write_bytes((folders[1] / "plan.json").read_bytes())
    with pytest.raises(nncf.ValidationError, match="is not the plan of the model in this folder"):
        scap_nncf.load_openvino(folders[0])


def test_import_needs_neither_openvino_nor_optimum() -> None:
    code = """
import sys
sys.modules.update(openvino=None, optimum=None)  # what import finds is: not installed
import scap_nncf, torch
from scap_nncf.extras import MissingExtraError

try:
    scap_nncf.export_openvino(torch.nn.Linear(2, 2), "nowhere")
except MissingExtraError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True)
    assert 'pip install "scap-nncf[optimum]"' in done.stdout


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_fused_experts_are_pruned_in_the_graph(
    tiny_model: Models, batches: Models, exact: dict[str, Any], tmp_path: Path, family: str
) -> None:
    from optimum.intel import OVModelForCausalLM

    model, data = tiny_model(family), batches(2)
    nncf.compress(model, algorithm="scap", dataset=data, sparsity={"experts": 0.5, "attn": 0.3}, mode="mean")
    expected = model(**data[0]).logits
    folder = scap_nncf.export_openvino(model, tmp_path / "ir")
    assert torch.equal(model(**data[0]).logits, expected)
    exported = OVModelForCausalLM.from_pretrained(folder, ov_config=exact)
    assert (exported(**data[0]).logits - expected).abs().mean() < 1e-3
    plan = scap_nncf.get_controller(exported).plan
    assert {layer.role for layer in plan.layers} == {"q", "k", "v", "o"}
    assert plan.made_by["expert_layers_in_graph"] == 16
