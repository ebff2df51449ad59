# SPDX-License-Identifier: Apache-2.0
"""The OpenVINO backend: same sites, plans and numbers as on PyTorch; compressed weights stay compressed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov
import pytest
import torch
from openvino import opset13 as opset

import scap_nncf
from scap_nncf import Quantization
from scap_nncf.algorithms.backends.openvino.layers import find_layers, module_name
from scap_nncf.kernels.reference import prune

BUCKET = 1 / 128  # relative width of a histogram bucket
LOW_BITS = {"i8", "u8", "i4", "u4", "nf4"}

Models = Callable[..., Any]


def thresholds(model_or_plan: Any) -> dict[str, float]:
    plan = model_or_plan if isinstance(model_or_plan, scap_nncf.Plan) else scap_nncf.get_controller(model_or_plan).plan
    return {layer.name: layer.threshold for layer in plan.layers}


def kinds(model: Any, kind: str) -> list[Any]:
    return [op for op in model.get_ordered_ops() if op.get_friendly_name().endswith(f"/scap/{kind}")]


def constants(model: Any) -> Counter[str]:
    stored = [op for op in model.get_ordered_ops() if op.get_type_name() == "Constant"]
    names = Counter(op.get_element_type().get_type_name() for op in stored)
    return Counter({name: count for name, count in names.items() if name in LOW_BITS})


def layer_type(op: Any) -> str:
    """What the CPU plugin runs for a node of its runtime model."""
    kind = op.get_rt_info()["layerType"]
    return kind if isinstance(kind, str) else str(kind.astype(str))


def executed(compiled: Any) -> Counter[tuple[str, str]]:
    """(layer type, weight type) of the matrix products that the CPU plugin runs."""
    result: Counter[tuple[str, str]] = Counter()
    for op in compiled.get_runtime_model().get_ordered_ops():
        kind = layer_type(op)
        if kind in ("FullyConnected", "MatMul"):
            result[kind, op.input_value(1).get_element_type().get_type_name()] += 1
    return result


def activations_of(model: Any, core: ov.Core) -> Counter[str]:
    """Types in which the activations of fully connected layers arrive at run time, by the plugin's defaults."""
    operations = core.compile_model(model, "CPU").get_runtime_model().get_ordered_ops()
    layers = [op for op in operations if layer_type(op) == "FullyConnected"]
    return Counter(op.input_value(0).get_element_type().get_type_name() for op in layers)


def assert_close_plans(first: dict[str, float], second: dict[str, float]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert second[name] == pytest.approx(value, rel=BUCKET), name


# -- the same as on PyTorch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_sites_and_plans_are_those_of_torch(
    family: str, tiny_model: Models, batches: Models, read_ir: Models, run_ir: Models
) -> None:
    model, ir, data = tiny_model(family), read_ir(family), batches()
    ours, theirs = scap_nncf.inspect_model(ir), scap_nncf.inspect_model(model)
    assert ours.sites == theirs.sites
    assert {item.name for item in ours.left_out} == {item.name for item in theirs.left_out}
    assert np.abs(run_ir(ir, data[0]) - model(**data[0]).logits.numpy()).max() < 1e-3

    settings = {"sparsity": 0.4, "mode": "mean", "allocation": "uniform"}
    sparse_ir = nncf.compress(ir, algorithm="scap", dataset=data, **settings)
    nncf.compress(model, algorithm="scap", dataset=data, **settings)
    plan = scap_nncf.get_controller(model).plan
    assert_close_plans(thresholds(plan), thresholds(sparse_ir))
    expected = model(**data[0]).logits.numpy()
    # torch → IR: hard thresholds may flip on a rounding, hence the mean
    assert np.abs(run_ir(nncf.compress(ir, plan=plan), data[0]) - expected).mean() < 1e-3
    # IR → torch
    scap_nncf.get_controller(model).strip()
    nncf.compress(model, plan=scap_nncf.get_controller(sparse_ir).plan)
    assert np.abs(run_ir(sparse_ir, data[0]) - model(**data[0]).logits.numpy()).mean() < 1e-3


def test_original_is_untouched(read_ir: Models, run_ir: Models, batches: Models) -> None:
    ir, data = read_ir(), batches(2)
    before, size = run_ir(ir, data[0]), len(ir.get_ordered_ops())
    sparse = nncf.compress(ir, algorithm="scap", dataset=data, sparsity=0.5)
    assert len(ir.get_ordered_ops()) == size
    assert np.array_equal(run_ir(ir, data[0]), before)
    assert scap_nncf.get_controller(ir) is None
    assert not np.array_equal(run_ir(sparse, data[0]), before)


def test_zero_sparsity_is_bit_identical(read_ir: Models, run_ir: Models, batches: Models) -> None:
    ir, data = read_ir(), batches(2)
    sparse = nncf.compress(ir, algorithm="scap", dataset=data, sparsity={"all": 0.0, "down": 0.5}, mode="mean")
    assert {plan.get_friendly_name().split("/scap/")[0] for plan in kinds(sparse, "pruned")} == {
        f"model.layers.{block}.mlp.down_proj" for block in (0, 1)
    }
    dense = nncf.compress(ir, algorithm="scap", dataset=data, sparsity=0.0, mode="mean")
    assert np.array_equal(run_ir(dense, data[0]), run_ir(ir, data[0]))


def test_sequential_matches_torch(tiny_model: Models, read_ir: Models, batches: Models) -> None:
    model, data = tiny_model("llama"), batches(2)
    sparse = nncf.compress(
        read_ir(), algorithm="scap", dataset=data, sparsity=0.5, sequential=True, allocation="uniform"
    )
    nncf.compress(model, algorithm="scap", dataset=data, sparsity=0.5, sequential=True, allocation="uniform")
    # a flipped value upstream moves what comes after, so a few buckets are allowed
    expected = thresholds(model)
    for name, value in thresholds(sparse).items():
        assert value == pytest.approx(expected[name], rel=4 * BUCKET), name


def test_padding_does_not_count(read_ir: Models, batches: Models) -> None:
    (sample,) = batches(1, batch=2, length=11)
    alone = {key: value[:1] for key, value in sample.items()}
    padded = {"input_ids": sample["input_ids"].clone(), "attention_mask": sample["attention_mask"].clone()}
    padded["attention_mask"][1] = 0
    ir = read_ir()
    one = scap_nncf.calibrate(ir, dataset=[alone]).histograms
    two = scap_nncf.calibrate(ir, dataset=[padded]).histograms
    for name, histogram in one.items():
        assert histogram.total == two[name].total
        assert two[name].quantile(0.5) == pytest.approx(histogram.quantile(0.5), rel=BUCKET)


# -- compressed weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "group", "stored"),
    [("int8_asym", -1, "u8"), ("int8_sym", -1, "i8"), ("int4_asym", 8, "u4"), ("int4_sym", 8, "i4"), ("nf4", 8, "nf4")],
)
def test_weights_stay_compressed(
    mode: str,
    group: int,
    stored: str,
    read_ir: Models,
    run_ir: Models,
    batches: Models,
    core: ov.Core,
    exact: dict[str, Any],
) -> None:
    data = batches(2)
    dense = nncf.compress_weights(read_ir(), mode=nncf.CompressWeightsMode(mode), group_size=group)
    sparse = nncf.compress(dense, algorithm="scap", dataset=data, sparsity=0.4, mode="mean")
    assert constants(sparse) == constants(dense)
    assert constants(sparse)[stored] >= 14
    before, after = (executed(core.compile_model(model, "CPU", exact)) for model in (dense, sparse))
    assert after == before
    assert after["FullyConnected", stored] >= 14

    # with nothing dropped, centring must cancel: η·W comes from the weights that run
    controller = scap_nncf.get_controller(sparse)
    assert all(site.mode != 0 for site in controller.plan.sites)
    sites = tuple(
        replace(site, layers=tuple(replace(layer, threshold=0.0) for layer in site.layers))
        for site in controller.plan.sites
    )
    centred = nncf.compress(dense, plan=replace(controller.plan, sites=sites))
    reference = run_ir(dense, data[0])
    assert np.abs(run_ir(centred, data[0]) - reference).max() < 1e-4
    assert not np.array_equal(run_ir(sparse, data[0]), reference)
    assert np.array_equal(run_ir(controller.strip(), data[0]), reference)


@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_pruning_stands_before_quantisers_of_activations(
    mode: str, read_ir: Models, run_ir: Models, batches: Models, core: ov.Core, tmp_path: Path
) -> None:
    data = batches(2)
    dense = nncf.compress(read_ir(), algorithm=Quantization(), dataset=data)
    integers = activations_of(dense, core)
    assert integers["u8"] + integers["i8"] >= 14
    reference, nodes = run_ir(dense, data[0]), len(dense.get_ordered_ops())
    # q, k and v read one scale and one quantiser, and are pruned alike, each otherwise, or only one of them
    for sparsity in (0.5, {"gate": 0.3, "up": 0.6, "down": 0.5}, {"k": 0.4}):
        sparse = nncf.compress(dense, dataset=data, sparsity=sparsity, mode=mode)
        assert activations_of(sparse, core) == integers, "the products must still run on integers"
        for layer in scap_nncf.measure_sparsity(sparse, data).layers:
            assert layer.realised_sparsity == pytest.approx(layer.sparsity, abs=0.06)
        folder = scap_nncf.save_openvino(sparse, tmp_path / f"{len(list(tmp_path.iterdir()))}")
        again = scap_nncf.load_openvino(folder)
        result = run_ir(again, data[0])
        assert np.array_equal(result, run_ir(sparse, data[0]))
        assert not np.array_equal(result, reference)
        stripped = scap_nncf.get_controller(again).strip()
        assert len(stripped.get_ordered_ops()) == nodes
        assert np.array_equal(run_ir(stripped, data[0]), reference)


# -- the inserted nodes ----------------------------------------------------------------------------------------------


def test_shared_input_is_pruned_once(read_ir: Models, batches: Models) -> None:
    ir, data = read_ir(), batches(2)
    sparse = nncf.compress(ir, algorithm="scap", dataset=data, sparsity=0.5, mode="mean", allocation="uniform")
    assert len(kinds(sparse, "pruned")) == len(scap_nncf.get_controller(sparse).plan.sites) == 8
    apart = nncf.compress(ir, algorithm="scap", dataset=data, sparsity={"gate": 0.3, "up": 0.6}, mode="mean")
    assert len(kinds(apart, "pruned")) == 4
    assert len(kinds(apart, "centred")) == len(kinds(apart, "magnitude")) == 2


def test_strip_after_reload_is_exact(
    read_ir: Models, run_ir: Models, batches: Models, core: ov.Core, tmp_path: Path
) -> None:
    data = batches(2)
    dense = nncf.compress_weights(read_ir("gpt2"), mode=nncf.CompressWeightsMode.INT8_ASYM)
    kept_info = dense.get_rt_info(["nncf", "weight_compression", "mode"]).astype(str)
    # the head has no bias and feeds the result: its correction is behind the product
    sparse = nncf.compress(dense, algorithm="scap", dataset=data, sparsity={"all": 0.5, "lm_head": 0.5}, mode="mean")
    assert kinds(sparse, "bias")
    assert kinds(sparse, "corrected")
    scap_nncf.save_openvino(sparse, tmp_path / "ir")
    again = core.read_model(tmp_path / "ir" / "openvino_model.xml")
    assert np.array_equal(run_ir(again, data[0]), run_ir(sparse, data[0]))
    assert [item.get_names() for item in again.outputs] == [item.get_names() for item in dense.outputs]
    controller = scap_nncf.get_controller(again)
    assert controller.plan.sites == scap_nncf.get_controller(sparse).plan.sites
    stripped = controller.strip()
    assert np.array_equal(run_ir(stripped, data[0]), run_ir(dense, data[0]))
    assert not [op for op in stripped.get_ordered_ops() if "/scap/" in op.get_friendly_name()]
    assert [item.get_names() for item in stripped.outputs] == [item.get_names() for item in dense.outputs]
    assert scap_nncf.get_controller(stripped) is None
    assert stripped.get_rt_info(["nncf", "weight_compression", "mode"]).astype(str) == kept_info


def test_switching_and_new_targets(read_ir: Models, run_ir: Models, batches: Models, tmp_path: Path) -> None:
    ir, data = read_ir(), batches(2)
    sparse = nncf.compress(ir, algorithm="scap", dataset=data, sparsity=0.5, mode="mean")
    controller = scap_nncf.get_controller(sparse)
    dense, pruned = run_ir(ir, data[0]), run_ir(sparse, data[0])
    with controller.disabled():
        assert np.array_equal(run_ir(sparse, data[0]), dense)
        with pytest.raises(nncf.ValidationError, match="switched off"):
            scap_nncf.measure_sparsity(sparse, data)
    assert np.array_equal(run_ir(sparse, data[0]), pruned)
    folder = scap_nncf.save_openvino(sparse, tmp_path / "ir")
    loaded = scap_nncf.load_openvino(folder)
    scap_nncf.get_controller(loaded).set_sparsity({"ffn": 0.3}, mode="zero")
    expected = nncf.compress(ir, algorithm="scap", dataset=data, sparsity={"ffn": 0.3}, mode="zero")
    assert np.array_equal(run_ir(loaded, data[0]), run_ir(expected, data[0]))
    # read by OpenVINO alone, the plan is there and the statistics are not
    plain = scap_nncf.get_controller(ov.Core().read_model(folder / "openvino_model.xml"))
    with pytest.raises(nncf.ValidationError, match="without calibration statistics"):
        plain.set_sparsity(0.2)


def test_measured_sparsity_is_that_of_torch(tiny_model: Models, read_ir: Models, batches: Models) -> None:
    model, data = tiny_model("llama"), batches(3)
    sparse = nncf.compress(read_ir(), algorithm="scap", dataset=data, sparsity={"ffn": 0.4, "attn": 0.2})
    assert scap_nncf.get_controller(sparse).statistics().realised_sparsity is None
    measured = scap_nncf.measure_sparsity(sparse, data)
    nncf.compress(model, plan=scap_nncf.get_controller(sparse).plan)
    counted = scap_nncf.measure_sparsity(model, data)
    assert len(measured.layers) == len(counted.layers) == 14
    for ours, theirs in zip(measured.layers, counted.layers):
        assert ours.name == theirs.name
        assert ours.realised_sparsity == pytest.approx(theirs.realised_sparsity, abs=2e-3)
    assert scap_nncf.get_controller(sparse).statistics().realised_sparsity == measured.realised_sparsity
    scap_nncf.get_controller(sparse).reset_counters()
    assert scap_nncf.get_controller(sparse).statistics().realised_sparsity is None


def test_decode_policy(read_ir: Models, run_ir: Models, batches: Models) -> None:
    ir, data = read_ir(), batches(2, batch=2, length=7)
    settings = {"algorithm": "scap", "dataset": data, "sparsity": 0.5, "mode": "mean"}
    decode, always = (nncf.compress(ir, **settings, prune=policy) for policy in ("decode", "all"))
    one = {key: value[:, :1] for key, value in data[0].items()}
    assert np.array_equal(run_ir(decode, data[0]), run_ir(ir, data[0]))  # a prompt is dense, bit for bit
    assert not np.array_equal(run_ir(decode, one), run_ir(ir, one))
    assert np.abs(run_ir(decode, one) - run_ir(always, one)).max() < 1e-5
    # measured token by token
    assert scap_nncf.measure_sparsity(decode, data).realised_sparsity == pytest.approx(0.5, abs=0.06)
    assert np.array_equal(run_ir(scap_nncf.get_controller(decode).strip(), one), run_ir(ir, one))


# -- graphs of other kinds -------------------------------------------------------------------------------------------


def handmade(weight: np.ndarray[Any, Any], dtype: Any = np.float32, first: bool = False, calls: int = 1) -> ov.Model:
    """`calls` products of one module with the weights [IC, OC], the weights as left operand if `first`."""
    in_features, out_features = weight.shape
    x = opset.parameter([-1, -1, in_features] if not first else [in_features, -1], dtype, name="x")
    x.output(0).set_names({"x"})
    constant = opset.constant(weight.T.astype(dtype).copy(), name="w")
    results = []
    for call in range(calls):
        scaled = opset.multiply(x, opset.constant(np.array(1.0 + call, dtype=dtype)), name=f"scaled{call}")
        name = "__module.layers.0.fc1/aten::linear/MatMul" + (f"_{call}" if call else "")
        if first:
            results.append(opset.result(opset.matmul(constant, scaled, False, False, name=name)))
        else:
            results.append(opset.result(opset.matmul(scaled, constant, False, True, name=name)))
    assert out_features == weight.shape[1]
    return ov.Model(results, [x], "handmade")


def plan_of(mode: float, threshold: float, shape: tuple[int, int], name: str = "layers.0.fc1") -> scap_nncf.Plan:
    from scap_nncf.algorithms.plan import LayerPlan, SitePlan

    layer = LayerPlan(name, "fc1", *shape, threshold, 0.5)
    return scap_nncf.Plan((SitePlan(name, 0, mode, "mean", (layer,)),))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("first", [False, True])
def test_pruner_is_the_definition(seed: int, first: bool, core: ov.Core, exact: dict[str, Any]) -> None:
    rng = np.random.default_rng(seed)
    in_features, out_features, tokens = (int(n) for n in rng.integers(3, 41, size=3))
    weight = rng.standard_normal((in_features, out_features)).astype(np.float32)
    mode, threshold = float(np.float32(rng.normal())), float(np.float32(rng.uniform(0, 1.5)))
    x = rng.standard_normal((tokens, in_features)).astype(np.float32)
    x[0, 0] = np.float32(mode)  # exactly at the mode: dropped
    model = nncf.compress(handmade(weight, first=first), plan=plan_of(mode, threshold, weight.shape))
    fed = np.ascontiguousarray(x.T) if first else x[None]
    y = core.compile_model(model, "CPU", exact)(fed)[0]
    y = y.T if first else y[0]
    kept = prune(torch.from_numpy(x), mode, threshold).double().numpy()
    expected = kept @ weight.astype(np.float64) + mode * weight.astype(np.float64).sum(axis=0)
    assert np.abs(y - expected).max() < 1e-4
    x[-1, -1] = np.nan  # stays visible
    y = core.compile_model(model, "CPU", exact)(np.ascontiguousarray(x.T) if first else x[None])[0]
    assert np.isnan(y).any()


def test_half_precision_graph_compares_in_float32(core: ov.Core, exact: dict[str, Any]) -> None:
    rng = np.random.default_rng(7)
    weight = np.eye(31, dtype=np.float32)
    x = rng.standard_normal((1, 57, 31)).astype(np.float16)
    threshold = float(np.float32(np.abs(x[0, 3, 5])))  # a tie: dropped
    sparse = nncf.compress(handmade(weight, np.float16), plan=plan_of(0.0, threshold, weight.shape))
    y = core.compile_model(sparse, "CPU", exact)(x)[0]
    expected = np.where(np.abs(x.astype(np.float32)) <= np.float32(threshold), 0, x)
    assert np.array_equal(y == 0, expected == 0)
    assert y.dtype == np.float16
    assert len(find_layers(scap_nncf.get_controller(sparse).strip())[0]) == 1
    assert np.array_equal(core.compile_model(sparse, "CPU", exact)(x)[0], x)


def test_module_that_is_called_twice() -> None:
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((12, 9)).astype(np.float32)
    model = handmade(weight, calls=2)
    (site,) = scap_nncf.inspect_model(model).sites
    assert [layer.name for layer in site.layers] == ["layers.0.fc1"]
    x = rng.standard_normal((1, 40, 12)).astype(np.float32)
    sparse = nncf.compress(model, algorithm="scap", dataset=[{"x": x}], sparsity=0.5, mode="zero")
    both = np.abs(np.concatenate([x, 2 * x]))
    plan = scap_nncf.get_controller(sparse).plan
    assert plan.layers[0].threshold == pytest.approx(np.quantile(both, 0.5), rel=2 * BUCKET)
    assert len(kinds(sparse, "pruned")) == 2
    shared = scap_nncf.measure_sparsity(sparse, [{"x": x}]).layers[0].realised_sparsity
    assert shared == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("friendly", "expected"),
    [
        ("__module.model.layers.0.mlp.up_proj/aten::linear/MatMul", "model.layers.0.mlp.up_proj"),
        ("__module.transformer.h.3.attn.c_attn/aten::addmm/MatMul", "transformer.h.3.attn.c_attn"),
        ("/model/layers.1/mlp/down_proj/MatMul", "model.layers.1.mlp.down_proj"),
        ("/encoder/layer.4/output/dense/MatMul_1", "encoder.layer.4.output.dense"),
        ("MatMul_817", "MatMul_817"),
    ],
)
def test_names(friendly: str, expected: str) -> None:
    assert module_name(friendly) == expected


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"tokens": np.ones((1, 3), np.int64)}, "'tokens', which is no input .* input_ids i64"),
        ({"attention_mask": np.ones((1, 3), np.int64)}, "does not feed input_ids"),
        ({"input_ids": np.ones((1, 3, 2), np.int64)}, r"shape \[1, 3, 2\], the model expects"),
        ({"input_ids": np.ones((1, 3), np.float32)}, "is float32, the model expects i64"),
        ({"input_ids": np.ones((1, 3), np.int64), "attention_mask": "all"}, "attention_mask .* is str, expected"),
        ([np.ones((1, 3), np.int64)] * 5, "5 tensors, but the model has 4 inputs"),
    ],
)
def test_samples_that_do_not_fit(sample: Any, message: str, read_ir: Models) -> None:
    ir = read_ir()
    size = len(ir.get_ordered_ops())
    with pytest.raises(nncf.ValidationError, match=message):
        nncf.compress(ir, algorithm="scap", dataset=[sample], sparsity=0.5)
    assert len(ir.get_ordered_ops()) == size


def test_unknown_input_is_named() -> None:
    x, scale = opset.parameter([-1, 5], np.float32, name="x"), opset.parameter([1], np.float32, name="scale")
    weight = opset.constant(np.ones((5, 4), np.float32))
    product = opset.matmul(opset.multiply(x, scale), weight, False, False, name="/layers/0/fc1/MatMul")
    model = ov.Model([opset.result(product)], [x, scale], "m")
    with pytest.raises(nncf.ValidationError, match=r"does not feed scale.*inputs are: x f32 .*scale f32"):
        nncf.compress(model, algorithm="scap", dataset=[{"x": np.ones((2, 5), np.float32)}], sparsity=0.5)


def test_not_finite_is_named() -> None:
    model = handmade(np.ones((6, 4), np.float32))
    good, bad = np.ones((1, 2, 6), np.float32), np.full((1, 2, 6), np.inf, np.float32)
    with pytest.raises(nncf.ValidationError, match=r"layers\.0\.fc1 has NaN or Inf values in sample 1"):
        nncf.compress(model, algorithm="scap", dataset=[good, bad], sparsity=0.5)


def test_refused_models(read_ir: Models, batches: Models) -> None:
    data = batches(1)
    sparse = nncf.compress(read_ir(), algorithm="scap", dataset=data, sparsity=0.5)
    with pytest.raises(nncf.ValidationError, match="already"):
        nncf.compress(sparse, algorithm="scap", dataset=data, sparsity=0.5)
    with pytest.raises(nncf.ValidationError, match="already"):  # a clone, as a file would, knows by its rt_info
        nncf.compress(sparse.clone(), algorithm="scap", dataset=data, sparsity=0.5)
    x = opset.parameter([2, 3], np.float32, name="x")
    with pytest.raises(nncf.UnsupportedModelError, match="no fully connected layer"):
        nncf.compress(ov.Model([opset.result(opset.relu(x))], [x], "m"), algorithm="scap", dataset=data, sparsity=0.5)
    with pytest.raises(nncf.ParameterNotSupportedError, match="gradients"):
        nncf.compress(read_ir(), algorithm="scap", dataset=data, sparsity=0.5, allocation="fisher")
    with pytest.raises(nncf.ParameterNotSupportedError, match="Refining needs gradients"):
        nncf.compress(read_ir(), algorithm="scap", dataset=data, sparsity=0.5, refine=scap_nncf.Refine())
    scope = nncf.IgnoredScope(types=["MatMul"])
    with pytest.raises(nncf.ValidationError, match="is left to prune"):
        nncf.compress(read_ir(), algorithm="scap", dataset=data, sparsity=0.5, ignored_scope=scope)


@pytest.mark.parametrize("greater", [False, True])
def test_pruning_by_others_is_recognised(greater: bool) -> None:
    x = opset.parameter([-1, 5], np.float32, name="x")
    limit, zero = opset.constant(np.float32(0.3)), opset.constant(np.float32(0))
    if greater:
        kept = opset.multiply(x, opset.convert(opset.greater(opset.abs(x), limit), "f32"))
    else:
        kept = opset.select(opset.less_equal(opset.abs(x), limit), zero, x)
    weight = opset.constant(np.ones((5, 4), np.float32))
    product = opset.matmul(kept, weight, False, False, name="__module.layers.0.fc1/aten::linear/MatMul")
    with pytest.raises(nncf.ValidationError, match="pruned in the graph already"):
        scap_nncf.inspect_model(ov.Model([opset.result(product)], [x], "m"))
