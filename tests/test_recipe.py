# SPDX-License-Identifier: Apache-2.0
"""Recipes: quantisation and sparsity in one call, their order, their files, and what happens when a step fails."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nncf
import pytest
import torch
from nncf.torch.function_hook.wrapper import get_hook_storage, is_wrapped
from nncf.torch.quantization.layers import BaseWeightsDecompressor, SQMultiply

import scap_nncf
from scap_nncf import Quantization, Scap, WeightCompression
from scap_nncf.algorithms.backends.torch.weights import column_sums

Factory = Callable[..., torch.nn.Module]
Batches = Callable[..., list[dict[str, torch.Tensor]]]

TORCH_MODES = [
    WeightCompression("int8_sym"),
    WeightCompression("int8_asym"),
    WeightCompression("int4_sym", group_size=8),
    WeightCompression("int4_asym", group_size=8),
    WeightCompression("int4_sym", group_size=-1),
    WeightCompression("int4_asym", group_size=8, ratio=0.5),
    WeightCompression("int4_sym", group_size=8, awq=True, scale_estimation=True),
    WeightCompression("int4_asym", group_size=8, all_layers=True, backup_mode="int8_sym"),
]


def logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def hooks(model: torch.nn.Module, kind: type) -> list[str]:
    return [name for name, hook in get_hook_storage(model).named_hooks() if isinstance(hook, kind)]


@pytest.fixture
def nncf_warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("nncf"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="nncf")
    return caplog


@pytest.mark.parametrize("step", TORCH_MODES, ids=lambda s: f"{s.mode.value}-{s.group_size}-{s.ratio}-{s.awq}")
def test_quantise_then_sparsify(step: WeightCompression, tiny_model: Factory, batches: Batches) -> None:
    data = batches(6)
    alone = nncf.compress(tiny_model(), algorithm=step, dataset=data)
    assert hooks(alone, BaseWeightsDecompressor)

    model = tiny_model()
    result = nncf.compress(model, algorithm=[step, Scap(sparsity=0.5)], dataset=nncf.Dataset(data))
    assert result is model
    controller = scap_nncf.get_controller(model)
    with controller.disabled():
        assert torch.equal(logits(model, data[0]), logits(alone, data[0]))
    controller.reset_counters()
    assert not torch.equal(logits(model, data[0]), logits(alone, data[0]))
    assert controller.statistics().realised_sparsity == pytest.approx(0.5, abs=0.08)
    assert [next(iter(item)) for item in controller.plan.made_by["recipe"]] == ["weight_compression", "scap"]


def test_order_is_put_right(tiny_model: Factory, batches: Batches, nncf_warnings: pytest.LogCaptureFixture) -> None:
    data = batches()
    quantise, sparsify = WeightCompression("int4_sym", group_size=8, awq=True), Scap(sparsity=0.4, mode="median")
    right = nncf.compress(tiny_model("opt"), algorithm=[quantise, sparsify], dataset=data)
    assert "run in the order" not in nncf_warnings.text
    wrong = nncf.compress(tiny_model("opt"), algorithm=[sparsify, quantise], dataset=data)
    assert "The steps run in the order WeightCompression, Scap" in nncf_warnings.text
    assert torch.equal(logits(right, data[0]), logits(wrong, data[0]))
    assert hooks(wrong, SQMultiply), "AWQ was lost"


def test_quantising_a_sparse_model_warns_and_keeps_the_plan(
    tiny_model: Factory, batches: Batches, nncf_warnings: pytest.LogCaptureFixture
) -> None:
    data = batches()
    step = WeightCompression("int4_sym", group_size=8, awq=True)
    quantised = nncf.compress(tiny_model("opt"), algorithm=step, dataset=data)
    model = nncf.compress(tiny_model("opt"), dataset=data, sparsity=0.4, mode="median")
    plan = scap_nncf.get_controller(model).plan
    model = nncf.compress(model, algorithm=step, dataset=data)

    assert "sparse already and is quantised now" in nncf_warnings.text
    assert hooks(model, SQMultiply) == hooks(quantised, SQMultiply) != []
    controller = scap_nncf.get_controller(model)
    assert controller.plan.sites == plan.sites
    assert controller.histograms  # the sparsity can still be changed
    expected = nncf.compress(quantised, plan=plan)
    assert torch.equal(logits(model, data[0]), logits(expected, data[0]))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
@pytest.mark.parametrize("mode", ["int8_sym", "int4_asym"])
def test_correction_is_that_of_the_weights_that_run(
    family: str, mode: str, tiny_model: Factory, batches: Batches
) -> None:
    """With a threshold that drops nothing, x − η pruned and corrected is the dense layer, to rounding."""
    data = batches()
    awq = {"awq": True, "group_size": 8} if mode == "int4_asym" else {}
    model = nncf.compress(tiny_model(family), algorithm=WeightCompression(mode, **awq), dataset=data)
    dense = logits(model, data[0])
    nncf.compress(model, dataset=data, sparsity=0.5, mode="mean")
    controller = scap_nncf.get_controller(model)
    plan = controller.plan
    controller.strip()
    keep = [replace(s, mode=0.3, layers=tuple(replace(item, threshold=0.0) for item in s.layers)) for s in plan.sites]
    model = nncf.compress(model, plan=replace(plan, sites=tuple(keep)))
    error = (logits(model, data[0]) - dense).abs().max() / dense.abs().max()
    assert error < 1e-5
    if family in ("opt", "gpt_neox") and mode == "int4_asym":
        assert hooks(model, SQMultiply), "the test is meant to cover AWQ's multiplication"


def test_column_sums_count_the_scale_of_awq(tiny_model: Factory, batches: Batches) -> None:
    model = nncf.compress(
        tiny_model("opt"), algorithm=WeightCompression("int4_sym", group_size=8, awq=True), dataset=batches()
    )
    name = "model.decoder.layers.1.fc2"
    storage = get_hook_storage(model)
    weight = storage.execute_post_function_hooks(f"{name}.weight", 0, model.get_submodule(name).weight)
    key = next(k for k in storage.pre_hooks if k.endswith("fc2/linear/1__0"))
    (scale,) = [hook.scale for hook in storage.pre_hooks[key].values() if isinstance(hook, SQMultiply)]
    assert not torch.allclose(scale, torch.ones_like(scale))
    torch.testing.assert_close(column_sums(model, name), (weight @ scale.reshape(-1)).detach())


def test_a_failing_step_leaves_the_model_as_it_was(tiny_model: Factory, batches: Batches) -> None:
    model, data = tiny_model("opt"), batches()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = logits(model, data[0])
    step = WeightCompression("int4_sym", group_size=8, awq=True)
    bad = Scap(sparsity={"re:nothing_like_this": 0.5})
    with pytest.raises(nncf.ValidationError, match="nothing_like_this"):
        nncf.compress(model, algorithm=[step, bad], dataset=data)
    assert not is_wrapped(model)
    assert scap_nncf.get_controller(model) is None
    after = model.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    assert torch.equal(logits(model, data[0]), before)
    nncf.compress(model, algorithm=[step, Scap(sparsity=0.5)], dataset=data)  # and it can still be compressed


def test_a_failing_quantisation_of_a_sparse_model_keeps_the_pruning(tiny_model: Factory, batches: Batches) -> None:
    data = batches()
    model = nncf.compress(tiny_model(), dataset=data, sparsity=0.5)
    before = logits(model, data[0])
    with pytest.raises(nncf.InvalidGroupSizeError):
        nncf.compress(model, algorithm=WeightCompression("int4_sym", group_size=64), dataset=data)
    assert torch.equal(logits(model, data[0]), before)


def test_data_that_runs_out_serves_every_step(tiny_model: Factory, batches: Batches) -> None:
    data = batches(5)
    steps = [WeightCompression("int4_sym", group_size=8, awq=True), Scap(sparsity=0.5)]
    once = nncf.compress(tiny_model("opt"), algorithm=steps, dataset=iter(data))
    again = nncf.compress(tiny_model("opt"), algorithm=steps, dataset=data)
    assert scap_nncf.get_controller(once).plan == scap_nncf.get_controller(again).plan


def test_texts_serve_every_step(tiny_model: Factory, tiny_tokenizer: Any) -> None:
    steps = [WeightCompression("int4_sym", group_size=8, scale_estimation=True), Scap(sparsity=0.5)]
    model = nncf.compress(tiny_model(), algorithm=steps, dataset=["some text", "more of it"], tokenizer=tiny_tokenizer)
    assert scap_nncf.get_controller(model).plan.made_by["tokens"] > 0


def test_int8_needs_no_data(tiny_model: Factory, batches: Batches) -> None:
    data = batches(1)
    alone = nncf.compress(tiny_model(), algorithm="weight_compression", mode="int8_sym")
    assert hooks(alone, BaseWeightsDecompressor)
    with_data = nncf.compress(tiny_model(), algorithm="weight_compression", mode="int8_sym", dataset=data)
    assert torch.equal(logits(alone, data[0]), logits(with_data, data[0]))


@pytest.mark.parametrize(
    ("step", "text"),
    [
        ({"mode": "nf4"}, "int8_sym, int8_asym, int4_sym, int4_asym"),
        ({"mode": "e2m1"}, "no weight mode 'mxfp4' for PyTorch models"),
        ({"mode": "int3_sym"}, "no weight mode 'int3_sym'"),
        ({"mode": "int4_sym", "gptq": True}, "no gptq for PyTorch models; there it has awq, scale_estimation"),
        ({"mode": "int4_sym", "lora_correction": True}, "no lora_correction"),
        ({"mode": "int8_sym", "awq": True}, "INT8 modes do not support awq"),
        ({"mode": "int8_sym", "group_size": 8}, "INT8 modes require per-channel"),
    ],
)
def test_what_the_backend_lacks(step: dict[str, Any], text: str, tiny_model: Factory, batches: Batches) -> None:
    model = tiny_model()
    with pytest.raises(nncf.ParameterNotSupportedError, match=text):
        nncf.compress(model, algorithm=WeightCompression(**step), dataset=batches())
    assert not is_wrapped(model)


@pytest.mark.parametrize(
    "step",
    [
        {"mode": "int5"},
        {"mode": "int4_sym", "group_size": 0},
        {"mode": "int4_sym", "group_size": "64"},
        {"mode": "int4_sym", "ratio": 1.5},
        {"mode": "int4_sym", "awq": "yes"},
        {"subset_size": 0},
        {"backup_mode": "int1"},
        {"compression_format": "zip"},
    ],
)
def test_bad_settings(step: dict[str, Any]) -> None:
    with pytest.raises(nncf.ValidationError, match=next(iter(set(step) - {"mode"}), "mode")):
        WeightCompression(**step)


def test_group_size_that_does_not_divide_names_the_layers(tiny_model: Factory, batches: Batches) -> None:
    with pytest.raises(nncf.InvalidGroupSizeError) as caught:
        nncf.compress(tiny_model(), algorithm=WeightCompression("int4_sym", group_size=16), dataset=batches())
    message = str(caught.value)
    assert "Failed to apply group-wise quantization with group size value 16" in message  # NNCF's own words
    assert "model.layers.1.mlp.down_proj (88 inputs)" in message
    assert "model.layers.1.mlp.up_proj" not in message
    assert "divide every layer: 8, 4, 2" in message


def test_compressing_twice_is_refused(tiny_model: Factory, batches: Batches) -> None:
    data = batches()
    model = nncf.compress(tiny_model(), algorithm=WeightCompression("int8_sym"), dataset=data)
    before = logits(model, data[0])
    with pytest.raises(nncf.ValidationError, match="compressed already"):
        nncf.compress(model, algorithm=WeightCompression("int4_sym", group_size=8), dataset=data)
    assert torch.equal(logits(model, data[0]), before)


@pytest.mark.parametrize(
    ("steps", "error", "text"),
    [
        ([], nncf.ValidationError, "empty"),
        ([Scap(), Scap(sparsity=0.3)], nncf.ValidationError, "one sparsity step"),
        ([WeightCompression(), Quantization(), Scap()], nncf.ValidationError, "one quantisation step"),
        ([WeightCompression(), "scrap"], nncf.ParameterNotSupportedError, "scrap"),
        ([WeightCompression(), 0.5], nncf.ParameterNotSupportedError, "float"),
    ],
)
def test_lists_that_make_no_recipe(
    steps: list[Any], error: type[Exception], text: str, tiny_model: Factory, batches: Batches
) -> None:
    with pytest.raises(error, match=text):
        nncf.compress(tiny_model(), algorithm=steps, dataset=batches())


def test_settings_beside_a_list_are_refused(tiny_model: Factory, batches: Batches) -> None:
    with pytest.raises(nncf.ParameterNotSupportedError, match="which step"):
        nncf.compress(tiny_model(), algorithm=[WeightCompression(), Scap()], dataset=batches(), sparsity=0.3)


def test_recipe_on_a_sparse_model_is_refused(tiny_model: Factory, batches: Batches) -> None:
    model = nncf.compress(tiny_model(), dataset=batches(), sparsity=0.5)
    with pytest.raises(nncf.ValidationError, match="strip"):
        nncf.compress(model, algorithm=[WeightCompression(), Scap()], dataset=batches())


# -- W8A8 --------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("reference_quantisers")
def test_quantised_activations(tiny_model: Factory, batches: Batches) -> None:
    data, model = batches(6), tiny_model()
    before = logits(model, data[0])
    result = nncf.compress(model, algorithm=[Scap(sparsity=0.5, mode="median"), Quantization()], dataset=data)
    assert torch.equal(logits(model, data[0]), before), "NNCF quantises a copy"
    controller = scap_nncf.get_controller(result)
    with controller.disabled():
        quantised = logits(result, data[0])
    error = (quantised - before).pow(2).mean() / before.pow(2).mean()
    assert 0 < error < 0.02
    controller.reset_counters()
    assert torch.isfinite(logits(result, data[0])).all()
    assert controller.statistics().realised_sparsity == pytest.approx(0.5, abs=0.08)


@pytest.mark.usefixtures("reference_quantisers")
def test_correction_under_quantised_activations_uses_dequantised_weights(tiny_model: Factory, batches: Batches) -> None:
    """A quantiser of activations clips an input of ones; the column sums must not pass it."""
    model = nncf.compress(tiny_model(), algorithm=Quantization(), dataset=batches())
    original = tiny_model()
    for name in ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.o_proj"):
        expected = original.get_submodule(name).weight.sum(dim=1)
        difference = (column_sums(model, name) - expected).norm() / expected.norm()
        assert difference < 0.05


@pytest.mark.parametrize(
    "setting", [{"mode": "fp8_e4m3"}, {"fast_bias_correction": False}, {"target_device": "CPU_SPR"}]
)
def test_what_quantisation_lacks_on_torch(setting: dict[str, Any], tiny_model: Factory, batches: Batches) -> None:
    with pytest.raises(nncf.ParameterNotSupportedError, match="for PyTorch models"):
        nncf.compress(tiny_model(), algorithm=Quantization(**setting), dataset=batches())


def test_quantisation_needs_data(tiny_model: Factory) -> None:
    with pytest.raises(nncf.ValidationError, match="needs a dataset"):
        nncf.compress(tiny_model(), algorithm=Quantization())


# -- files -------------------------------------------------------------------------------------------------------------

RECIPE = """
# 4-bit weights, then pruning
- scap:
    sparsity: {ffn: 0.4}
    ignored_scope: {patterns: ['.*layers\\.0\\..*']}
- weight_compression:
    mode: int4_sym
    group_size: 8
    awq: true
    advanced_parameters:
      group_size_fallback_mode: adjust
      awq_params: {subset_size: 4}
"""


def test_recipe_file(tmp_path: Path, tiny_model: Factory, batches: Batches) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    sparsify, quantise = scap_nncf.load_recipe(file)
    assert sparsify == Scap(sparsity={"ffn": 0.4}, ignored_scope=nncf.IgnoredScope(patterns=[r".*layers\.0\..*"]))
    assert quantise.mode == nncf.CompressWeightsMode.INT4_SYM
    parameters = quantise.advanced_parameters
    assert parameters.group_size_fallback_mode == nncf.GroupSizeFallbackMode.ADJUST
    assert parameters.awq_params.subset_size == 4

    data = batches()
    model = nncf.compress(tiny_model(), algorithm=str(file), dataset=data)
    steps = [WeightCompression("int4_sym", group_size=8, awq=True, advanced_parameters=parameters), sparsify]
    assert torch.equal(logits(model, data[0]), logits(nncf.compress(tiny_model(), steps, dataset=data), data[0]))
    assert {layer.role for layer in scap_nncf.get_controller(model).plan.layers} == {"gate", "up", "down"}


def test_recipe_file_as_json_and_under_steps(tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({"steps": ["scap", {"quantization": {"preset": "mixed"}}]}))
    sparsify, quantise = scap_nncf.load_recipe(file)
    assert sparsify == Scap()
    assert quantise == Quantization(preset="mixed")


@pytest.mark.parametrize(
    ("text", "error", "expected"),
    [
        ("", nncf.ValidationError, "list of steps"),
        ("scap", nncf.ValidationError, "list of steps"),
        ("- scap: {sparsity: 0.5", nncf.ValidationError, "not valid YAML"),
        ("- scap: {sparsity: 0.5}\n  weight_compression: {}", nncf.ValidationError, "step 1: expected one algorithm"),
        ("- scap: {}\n- prune: {}", nncf.ParameterNotSupportedError, "step 2: unknown algorithm 'prune'"),
        ("- scap: {sparsty: 0.5}", nncf.ParameterNotSupportedError, "no setting 'sparsty'; there are .*sparsity"),
        ("- scap: {sparsity: 1.5}", nncf.ValidationError, r"step 1 \(scap\)"),
        ("- scap: 0.5", nncf.ValidationError, "settings as a mapping"),
        ("- scap: {sparsity: 0.5, sparsity: 0.6}", nncf.ValidationError, "'sparsity' is repeated"),
        ("- weight_compression: {mode: int7}", nncf.ValidationError, "int7"),
        ("- weight_compression: {advanced_parameters: {group_size_fallback_mode: x}}", nncf.ValidationError, "adjust"),
        ("- weight_compression: {advanced_parameters: {nope: 1}}", nncf.ParameterNotSupportedError, "'nope'"),
        ("- scap: !!python/object/apply:os.system ['true']", nncf.ValidationError, "not valid YAML"),
        ("steps: [scap]\nother: 1", nncf.ValidationError, "unknown key other"),
    ],
)
def test_bad_recipe_files(text: str, error: type[Exception], expected: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(error, match=expected) as caught:
        scap_nncf.load_recipe(file)
    assert str(file) in str(caught.value)


def test_missing_recipe_file(tmp_path: Path, tiny_model: Factory, batches: Batches) -> None:
    with pytest.raises(nncf.InvalidPathError, match=r"none\.yaml"):
        nncf.compress(tiny_model(), algorithm=str(tmp_path / "none.yaml"), dataset=batches())
