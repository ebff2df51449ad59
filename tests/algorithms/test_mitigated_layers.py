# SPDX-License-Identifier: Apache-2.0
"""Layers with N:M patterns and error mitigation in a model, against the float64 definition."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nncf
import pytest
import torch
from torch import nn

import scap_nncf
from scap_nncf.algorithms.backends import backend_of
from scap_nncf.algorithms.backends.torch.weights import dense_weight, project
from scap_nncf.algorithms.plan import LayerPlan, Plan, SitePlan
from scap_nncf.deployment import deploy, deployment_of
from scap_nncf.kernels.reference import mitigated_fc

IC, OC = 32, 9
NONE: dict[str, Any] = {}
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "pattern": ({"pattern": (2, 4)}, ()),
    "top-k": ({"pattern": (11, IC)}, ()),
    "score": ({"pattern": (3, 8)}, ("score",)),
    "shift": ({"pattern": (4, 8)}, ("shift",)),
    "token mean": ({"pattern": (4, 8), "token_shift": "mean"}, ()),
    "token median": ({"pattern": (4, 8), "token_shift": "median"}, ("shift",)),
    "variance": ({"pattern": (4, 8), "variance": True}, ()),
    "scale": ({"pattern": (4, 8)}, ("scale", "bias")),
    "low rank": ({"pattern": (4, 8)}, ("low_rank_in", "low_rank_out")),
    "all": (
        {"pattern": (4, 8), "token_shift": "median", "variance": True},
        ("shift", "score", "scale", "bias", "low_rank_in", "low_rank_out"),
    ),
    "threshold, all": (
        {"threshold": 0.5, "token_shift": "mean", "variance": True},
        ("shift", "scale", "bias", "low_rank_in", "low_rank_out"),
    ),
    "threshold and bias": ({"threshold": 0.5}, ("bias",)),
}


class Conv1D(nn.Module):
    """The transposed layer of GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.nf = OC
        self.weight = nn.Parameter(torch.randn(IC, OC))
        self.bias = nn.Parameter(torch.randn(OC))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


class Strange(nn.Module):
    """A format of weights that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = IC, OC
        self.register_buffer("packed", torch.randint(-8, 8, (OC, IC), dtype=torch.int8))
        self.bias = nn.Parameter(torch.randn(OC))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.packed.to(x.dtype) / 7).t() + self.bias


def make_plan(options: dict[str, Any], kinds: tuple[str, ...], mode: float = 0.0, prune: str = "all") -> Plan:
    layer = replace(LayerPlan("0", "up", IC, OC, -1.0, 0.5), **options)
    shapes = {"low_rank_in": (IC, 3), "low_rank_out": (3, OC), "scale": (OC,), "bias": (OC,)}
    vectors = {("0", kind): torch.randn(shapes.get(kind, (IC,))).numpy() / 4 for kind in kinds}
    if ("0", "score") in vectors:
        vectors["0", "score"] = abs(vectors["0", "score"]) + 0.1
    return Plan((SitePlan("0", None, mode, "zero", (layer,)),), "scap", prune).with_vectors(vectors)


def expected(plan: Plan, x: torch.Tensor, weight: torch.Tensor, own_bias: torch.Tensor | None) -> torch.Tensor:
    (layer,), held = plan.layers, {k: torch.from_numpy(v).double() for k, v in plan.vectors_of(plan.layers[0]).items()}
    bias = 0 if own_bias is None else own_bias.double()
    low_rank = (held["low_rank_in"], held["low_rank_out"]) if "low_rank_in" in held else None
    return mitigated_fc(
        x.double(),
        weight.double(),
        threshold=layer.threshold,
        pattern=layer.pattern,
        score=held.get("score"),
        shift=held.get("shift", plan.sites[0].mode),
        token=layer.token_shift,
        variance=layer.variance,
        scale=held.get("scale"),
        low_rank=low_rank,
        bias=bias + held.get("bias", 0) + torch.zeros(OC).double(),
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", [0.0, 0.3])
def test_against_the_definition(case: str, mode: float) -> None:
    plan = make_plan(*CASES[case], mode)
    x = torch.randn(3, 5, IC)
    for module in (nn.Linear(IC, OC), nn.Linear(IC, OC, bias=False), Conv1D(), Strange()):
        model = nn.Sequential(module)
        dense = model(x)
        weight = dense_weight(model, "0")
        assert torch.allclose(x @ weight + (module.bias if module.bias is not None else 0), dense, atol=1e-5)
        backend_of(model).insert(model, plan)
        truth = expected(plan, x, weight, module.bias)
        assert torch.allclose(model(x).double(), truth, rtol=1e-4, atol=1e-4)
        assert torch.allclose(model(x)[1:2], model(x[1:2]), atol=1e-5)
        backend_of(model).remove(model)
        assert torch.equal(model(x), dense)
        assert not [name for name, _ in model.named_buffers() if "scap" in name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    plan = make_plan(*CASES["all"])
    model = nn.Sequential(nn.Linear(IC, OC)).to(dtype)
    x = torch.randn(2, 7, IC).to(dtype)
    backend_of(model).insert(model, plan)
    truth = expected(plan, x, model[0].weight.t(), model[0].bias)
    y = model(x)
    assert y.dtype == dtype
    assert (y.double() - truth).norm() / truth.norm() < {torch.bfloat16: 2e-2, torch.float16: 3e-3}.get(dtype, 1e-6)


def test_prompts_stay_dense_where_only_decoding_is_pruned() -> None:
    model, x = nn.Sequential(nn.Linear(IC, OC)), torch.randn(2, 7, IC)
    dense = model(x)
    plan = make_plan(*CASES["all"], prune="decode")
    backend_of(model).insert(model, plan)
    assert torch.equal(model(x), dense)
    truth = expected(plan, x[:, :1], model[0].weight.t(), model[0].bias)
    assert torch.allclose(model(x[:, :1]).double(), truth, rtol=1e-4, atol=1e-4)


def test_project_is_the_product_with_the_weights() -> None:
    vector = torch.randn(IC) * 1e-4
    for module in (nn.Linear(IC, OC), Conv1D(), Strange()):
        model = nn.Sequential(module)
        truth = vector.double() @ dense_weight(model, "0").double()
        assert torch.allclose(project(model, "0", vector).double(), truth, rtol=1e-3)
    assert torch.equal(project(nn.Sequential(Strange()), "0", torch.zeros(IC)), torch.zeros(OC))


def test_weights_compressed_by_nncf() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("0", nn.Linear(64, OC))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.get_submodule("0")(x)

    x = torch.randn(2, 7, 64)
    model = nncf.compress_weights(Model().eval(), dataset=nncf.Dataset([x]))
    weight, own_bias = dense_weight(model, "0"), model.get_submodule("0").bias
    assert torch.allclose(x @ weight + own_bias, model(x), atol=1e-5)
    assert not torch.is_floating_point(model.get_submodule("0").weight)
    layer = LayerPlan("0", "up", 64, OC, -1.0, 0.5, (2, 4), variance=True)
    plan = Plan((SitePlan("0", None, 0.0, "zero", (layer,)),)).with_vectors({("0", "shift"): torch.rand(64).numpy()})
    backend_of(model).insert(model, plan)
    assert torch.allclose(model(x).double(), expected(plan, x, weight, own_bias), rtol=1e-3, atol=1e-3)


def test_deploy_leaves_such_layers_simulated(tiny_llama: nn.Module, batches: Any) -> None:
    sample = batches(1)[0]
    statistics = scap_nncf.calibrate(tiny_llama, dataset=[sample], sparsity={"up": 0.5})
    plan = scap_nncf.make_plan(statistics, scap_nncf.Scap(sparsity={"up": 0.5}))
    vectors = {(layer.name, "scale"): torch.randn(layer.out_features).numpy() / 10 for layer in plan.layers}
    model = nncf.compress(tiny_llama, plan=plan.with_vectors(vectors))
    with torch.no_grad():
        before = model(**sample).logits
        deploy(model, backend="reference")
        after = model(**sample).logits
    assert torch.allclose(before, after, atol=1e-4)
    assert {item.reason for item in deployment_of(model).left} == {"no kernel computes its error mitigation"}


def test_saved_model_is_the_same(tiny_llama: nn.Module, batches: Any, tmp_path: Path) -> None:
    sample = batches(1)[0]
    statistics = scap_nncf.calibrate(tiny_llama, dataset=[sample])
    plan = scap_nncf.make_plan(statistics, scap_nncf.Scap(sparsity=0.4))
    vectors: dict[tuple[str, str], Any] = {}
    for layer in plan.layers:
        vectors[layer.name, "shift"] = torch.randn(layer.in_features).numpy() / 10
        vectors[layer.name, "scale"] = torch.randn(layer.out_features).numpy() / 10
    model = nncf.compress(tiny_llama, plan=plan.with_vectors(vectors))
    scap_nncf.save_pretrained(model, tmp_path / "saved")
    again = scap_nncf.load_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(**sample).logits, model(**sample).logits)
