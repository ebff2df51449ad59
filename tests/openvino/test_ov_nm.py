# SPDX-License-Identifier: Apache-2.0
"""N:M patterns and error mitigation in OpenVINO graphs, against the float64 definition and the PyTorch model."""

from __future__ import annotations

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
from scap_nncf import Mitigation, Nm
from scap_nncf.algorithms.backends import backend_of
from scap_nncf.algorithms.plan import LayerPlan, Plan, SitePlan
from scap_nncf.kernels.reference import mitigated_fc, prune_nm

IC, OC = 24, 10
NAME = "layers.0.fc1"
VECTORS = ("shift", "score", "scale", "bias", "low_rank_in", "low_rank_out")
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "pattern": ({"pattern": (2, 4)}, ()),
    "pattern and mode": ({"pattern": (5, 8)}, ("bias",)),
    "top-k": ({"pattern": (7, IC)}, ("score",)),
    "shift and scale": ({"pattern": (3, 8)}, ("shift", "scale")),
    "mean": ({"pattern": (3, 8), "token_shift": "mean"}, ()),
    "median": ({"pattern": (3, 8), "token_shift": "median"}, ("scale",)),
    "variance": ({"pattern": (3, 8), "variance": True}, ()),
    "low rank": ({"pattern": (3, 8)}, ("low_rank_in", "low_rank_out")),
    "all": ({"pattern": (3, 8), "token_shift": "median", "variance": True}, VECTORS),
    "threshold, all": ({"threshold": 0.6, "token_shift": "mean", "variance": True}, VECTORS[2:]),
    "nothing but bias": ({}, ("bias",)),
}


def handmade(weight: np.ndarray, bias: np.ndarray | None = None, first: bool = False) -> ov.Model:
    """One layer [IC, OC] on x [B, T, IC], or with the weights first on x [B, IC, T]."""
    x = opset.parameter([-1, IC, -1] if first else [-1, -1, IC], np.float32, name="x")
    name = f"__module.{NAME}/aten::linear/MatMul"
    if first:
        y = opset.matmul(opset.constant(np.ascontiguousarray(weight.T)), x, False, False, name=name)
    else:
        y = opset.matmul(x, opset.constant(weight), False, False, name=name)
    if bias is not None:
        y = opset.add(y, opset.constant(bias.reshape((-1, 1) if first else (1, 1, -1))))
    return ov.Model([opset.result(y)], [x], "handmade")


def make_plan(case: str, mode: float, prune: str = "all") -> Plan:
    options, kinds = CASES[case]
    rng = np.random.default_rng()
    shapes = {"low_rank_in": (IC, 3), "low_rank_out": (3, OC), "scale": (OC,), "bias": (OC,)}
    vectors = {(NAME, kind): rng.standard_normal(shapes.get(kind, (IC,))) / 3 for kind in kinds}
    if (NAME, "score") in vectors:
        vectors[NAME, "score"] = np.abs(vectors[NAME, "score"]) + 0.1
    layer = replace(LayerPlan(NAME, "fc1", IC, OC, -1.0, 0.5), **options)
    return Plan((SitePlan(NAME, 0, mode, "mean", (layer,)),), "nm", prune).with_vectors(vectors)


def expected(plan: Plan, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    (layer,), (site,) = plan.layers, plan.sites
    held = {kind: torch.from_numpy(v).double() for kind, v in plan.vectors_of(layer).items()}
    added = torch.zeros(OC).double() + (0 if bias is None else torch.from_numpy(bias).double()) + held.get("bias", 0)
    y = mitigated_fc(
        torch.from_numpy(x).double(),
        torch.from_numpy(weight).double(),
        threshold=layer.threshold,
        pattern=layer.pattern,
        score=held.get("score"),
        shift=held.get("shift", site.mode) if layer.prunes else 0.0,
        token=layer.token_shift,
        variance=layer.variance,
        scale=held.get("scale"),
        low_rank=(held["low_rank_in"], held["low_rank_out"]) if "low_rank_in" in held else None,
        bias=added,
    )
    return y.numpy()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("first", "with_bias"), [(False, True), (True, False)])
def test_graph_is_the_definition(
    case: str, first: bool, with_bias: bool, core: Any, exact: Any, tmp_path: Path
) -> None:
    rng = np.random.default_rng()
    weight = rng.standard_normal((IC, OC)).astype(np.float32)
    bias = rng.standard_normal(OC).astype(np.float32) if with_bias else None
    x = rng.standard_normal((2, 5, IC)).astype(np.float32)
    plan = make_plan(case, float(np.float32(rng.normal() / 2)))

    def run(model: Any) -> np.ndarray:
        fed = np.ascontiguousarray(x.transpose(0, 2, 1)) if first else x
        y = core.compile_model(model, "CPU", exact)(fed)[0]
        return y.transpose(0, 2, 1) if first else y

    dense = handmade(weight, bias, first)
    before = run(dense)
    sparse = nncf.compress(dense, plan=plan)
    truth = expected(plan, x, weight, bias)
    assert np.abs(run(sparse) - truth).max() < 2e-4 * max(1.0, np.abs(truth).max())
    # to a file and back: vectors are found in the graph, and the graph becomes dense again
    ov.save_model(sparse, tmp_path / "m.xml", compress_to_fp16=False)
    read = core.read_model(tmp_path / "m.xml")
    controller = scap_nncf.get_controller(read)
    assert controller.plan == scap_nncf.get_controller(sparse).plan
    assert controller.plan.vectors.keys() == plan.vectors.keys()
    assert all(np.array_equal(controller.plan.vectors[key], plan.vectors[key]) for key in plan.vectors)
    controller.disable()
    assert np.array_equal(run(read), before)
    controller.enable()
    assert np.allclose(run(read), run(sparse), atol=1e-5)
    assert np.array_equal(run(controller.strip()), before)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (5, 8), (9, IC)])
def test_ties_keep_the_lower_channel(n: int, m: int, core: Any, exact: Any) -> None:
    x = (np.random.default_rng().integers(-2, 3, (3, 40, IC)) / 2).astype(np.float32)  # many equal magnitudes
    layer = LayerPlan(NAME, "fc1", IC, IC, -1.0, 1 - n / m, (n, m))
    model = nncf.compress(
        handmade(np.eye(IC, dtype=np.float32)), plan=Plan((SitePlan(NAME, 0, 0.0, "zero", (layer,)),), "nm")
    )
    y = core.compile_model(model, "CPU", exact)(x)[0]
    assert np.array_equal(y, prune_nm(torch.from_numpy(x), n, m).numpy())


@pytest.mark.parametrize("case", ["all", "threshold, all", "pattern and mode"])
def test_decode_policy_leaves_prompts_dense(case: str, core: Any, exact: Any) -> None:
    rng = np.random.default_rng()
    weight = rng.standard_normal((IC, OC)).astype(np.float32)
    x = rng.standard_normal((2, 5, IC)).astype(np.float32)
    plan = make_plan(case, 0.25, "decode")
    compiled = core.compile_model(nncf.compress(handmade(weight), plan=plan), "CPU", exact)
    assert np.abs(compiled(x)[0] - x @ weight).max() < 1e-4
    assert np.abs(compiled(x[:, :1])[0] - expected(plan, x[:, :1], weight, None)).max() < 2e-4


def test_learned_scaling_costs_nothing_at_run_time(core: Any, exact: Any) -> None:
    weight = np.random.default_rng().standard_normal((IC, OC)).astype(np.float32)
    counts = []
    for case in ("pattern", "shift and scale"):
        plan = make_plan(case, 0.0)
        layer = replace(plan.layers[0], vectors=tuple(kind for kind in plan.layers[0].vectors if kind == "scale"))
        plan = replace(plan, sites=(replace(plan.sites[0], layers=(layer,)),))
        plan = replace(plan, vectors={key: value for key, value in plan.vectors.items() if key[1] == "scale"})
        model = nncf.compress(handmade(weight, np.ones(OC, dtype=np.float32)), plan=plan)
        operations = core.compile_model(model, "CPU", exact).get_runtime_model().get_ordered_ops()
        counts.append(sum(node.get_type_name() != "Constant" for node in operations))
    assert counts[0] == counts[1]


def test_vectors_of_a_model_saved_dense_come_from_its_folder(core: Any, tmp_path: Path) -> None:
    weight = np.random.default_rng().standard_normal((IC, OC)).astype(np.float32)
    sparse = nncf.compress(handmade(weight), plan=make_plan("all", 0.0))
    plan = scap_nncf.get_controller(sparse).plan
    scap_nncf.get_controller(sparse).disable()
    scap_nncf.save_openvino(sparse, tmp_path / "folder")
    bare = core.read_model(tmp_path / "folder" / "openvino_model.xml")
    with pytest.raises(nncf.ValidationError, match="came without"):
        scap_nncf.get_controller(bare).enable()
    loaded = scap_nncf.load_openvino(tmp_path / "folder")
    scap_nncf.get_controller(loaded).enable()
    assert scap_nncf.get_controller(loaded).plan.vectors.keys() == plan.vectors.keys()


def test_exported_model_computes_the_same(
    tiny_model: Callable[..., Any], batches: Callable[..., Any], tmp_path: Path, exact: Any, core: Any
) -> None:
    settings = Mitigation(shift="learned", variance=True, scaling=True, low_rank=3, epochs=1)
    model = nncf.compress(tiny_model("llama"), algorithm=Nm("2:4", "clact", settings), dataset=batches(3))
    folder = scap_nncf.export_openvino(model, tmp_path / "ir")
    ir = core.read_model(folder / "openvino_model.xml")
    assert type(scap_nncf.get_controller(ir)).__name__ == "NmController"
    (sample,) = batches(1, batch=1, seed=4)
    with torch.no_grad():
        truth = model(**sample).logits[0].numpy()
    from scap_nncf.algorithms.backends.openvino.feed import feed

    y = core.compile_model(ir, "CPU", exact)(feed(ir, sample, "sample"))[0][0]
    # a value that moves across the N-th changes a token; most stay
    assert np.median(np.abs(y - truth).max(-1)) < 2e-3
    assert scap_nncf.measure_sparsity(ir, [sample]).realised_sparsity == pytest.approx(0.5, abs=0.01)
    assert Plan.load(folder).vectors.keys() == scap_nncf.get_controller(model).plan.vectors.keys()


def test_compressed_on_openvino_itself(read_ir: Callable[..., Any], batches: Callable[..., Any]) -> None:
    settings = Nm("2:4", "amber", "var+r-sparse+s-pts")
    ir = nncf.compress(read_ir(), algorithm=settings, dataset=batches(2, batch=1))
    plan = scap_nncf.get_controller(ir).plan
    assert all(layer.vectors == ("low_rank_in", "low_rank_out", "score") for layer in plan.layers)
    assert all(layer.variance for layer in plan.layers)
    with pytest.raises(nncf.ParameterNotSupportedError, match="PyTorch"):
        nncf.compress(read_ir(), algorithm="nm", pattern="2:4", mitigation="l-pts", dataset=batches(2, batch=1))


@pytest.mark.parametrize("criterion", ["clact", "wina", "amber"])
def test_scores_are_those_of_torch(
    criterion: str, tiny_model: Callable[..., Any], read_ir: Callable[..., Any], batches: Callable[..., Any]
) -> None:
    data = batches(2, batch=1)
    plans = []
    for model in (tiny_model("llama"), read_ir("llama")):
        compressed = nncf.compress(model, algorithm="nm", pattern="2:4", criterion=criterion, dataset=data)
        plans.append(scap_nncf.get_controller(compressed).plan)
    assert plans[0].vectors.keys() == plans[1].vectors.keys()
    assert all(np.allclose(plans[0].vectors[key], plans[1].vectors[key], rtol=1e-3) for key in plans[0].vectors)
    name = plans[0].layers[0].name
    ir = read_ir("llama")
    assert np.allclose(
        backend_of(ir).dense_weight(ir, name), tiny_model("llama").get_submodule(name).weight.t().numpy(), atol=1e-5
    )
