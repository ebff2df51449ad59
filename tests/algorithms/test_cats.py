# SPDX-License-Identifier: Apache-2.0
"""CATS through nncf.compress: thresholds behind the gate, masks, saving, deployment, bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import pytest
import torch
from torch import nn

import scap_nncf
from scap_nncf import Cats
from scap_nncf.deployment import deploy, deployment_of, undeploy

Factory = Callable[..., Any]
ACTIVATIONS = {"llama": nn.functional.silu, "gemma3": lambda x: nn.functional.gelu(x, approximate="tanh")}


def feed_forwards(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if name.endswith(".mlp")}


def watch(module: nn.Module, seen: list[torch.Tensor], output: bool = False) -> Any:
    if output:
        return module.register_forward_hook(lambda _m, _a, y: seen.append(y))
    return module.register_forward_pre_hook(lambda _m, a: seen.append(a[0]))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_threshold_is_a_quantile_of_the_activated_gate(tiny_model: Factory, batches: Factory, family: str) -> None:
    model, data = tiny_model(family), batches(5)
    gates: dict[str, list[torch.Tensor]] = {}
    handles = [
        watch(m.gate_proj, gates.setdefault(f"{n}.gate_proj", []), True) for n, m in feed_forwards(model).items()
    ]
    with torch.no_grad():
        for sample in data:
            model(**sample)
    for handle in handles:
        handle.remove()
    nncf.compress(model, algorithm="cats", sparsity=0.4, dataset=data)
    plan = scap_nncf.get_controller(model).plan
    assert [site.name for site in plan.sites] == list(gates)
    for site in plan.sites:
        a = ACTIVATIONS[family](torch.cat([g.flatten() for g in gates[site.name]]))
        truth = np.quantile(a.double().abs().numpy(), 0.4)
        by_role = {layer.role: layer for layer in site.layers}
        assert by_role["up"].threshold == by_role["down"].threshold == pytest.approx(truth, rel=2**-7)
        assert by_role["gate"].threshold < 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_closed_gates_close_both_layers(tiny_model: Factory, batches: Factory, dtype: torch.dtype) -> None:
    model = nncf.compress(tiny_model("llama", dtype=dtype), algorithm="cats", sparsity=0.5, dataset=batches(3))
    controller = scap_nncf.get_controller(model)
    x = torch.randn(2, 7, 48).to(dtype)
    for site in controller.plan.sites:
        ffn = feed_forwards(model)[site.name.rpartition(".")[0]]
        threshold = site.layers[0].threshold
        with torch.no_grad():
            a = nn.functional.silu(nn.functional.linear(x, ffn.gate_proj.weight))
            opened = torch.where(a.float().abs() <= threshold, torch.zeros((), dtype=dtype), a)
            truth = nn.functional.linear(opened * nn.functional.linear(x, ffn.up_proj.weight), ffn.down_proj.weight)
            assert torch.equal(ffn(x), truth)


def test_statistics_and_switches(tiny_llama: nn.Module, batches: Factory, tmp_path: Path) -> None:
    data = batches(4)
    with torch.no_grad():
        dense = tiny_llama(**data[0]).logits
        model = nncf.compress(tiny_llama, algorithm="cats", sparsity=0.5, dataset=data)
        controller = scap_nncf.get_controller(model)
        for sample in data:
            model(**sample)
        statistics = controller.statistics()
        # two of three layers of each feed-forward
        assert statistics.sparsity == pytest.approx(1 / 3)
        assert statistics.realised_sparsity == pytest.approx(1 / 3, abs=0.02)
        sparse = model(**data[0]).logits
        assert not torch.equal(sparse, dense)
        with controller.disabled():
            assert torch.equal(model(**data[0]).logits, dense)
        controller.save(tmp_path / "plan")
        scap_nncf.save_pretrained(model, tmp_path / "model")
        again = scap_nncf.load_pretrained(tmp_path / "model")
        assert torch.equal(again(**data[0]).logits, sparse)
        assert "CatsController(2 feed-forwards" in repr(scap_nncf.get_controller(again))
        before = {layer.name: layer.threshold for layer in controller.plan.layers}
        controller.set_sparsity(0.8)
        assert all(layer.threshold > before[layer.name] for layer in controller.plan.layers if layer.role != "gate")
        scap_nncf.get_controller(again).set_sparsity(0.8)
        assert torch.equal(again(**data[0]).logits, model(**data[0]).logits)
        controller.strip()
        assert torch.equal(model(**data[0]).logits, dense)


def test_decode_policy(tiny_llama: nn.Module, batches: Factory) -> None:
    sample = batches(1)[0]
    one = {key: value[:, :1] for key, value in sample.items()}
    with torch.no_grad():
        dense, dense_one = tiny_llama(**sample).logits, tiny_llama(**one).logits
        nncf.compress(tiny_llama, algorithm=Cats(0.6, prune="decode"), dataset=batches(2))
        assert torch.equal(tiny_llama(**sample).logits, dense)
        assert not torch.equal(tiny_llama(**one).logits, dense_one)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2"])
@pytest.mark.parametrize("prune", ["all", "decode"])
def test_deployed_model_computes_the_same(tiny_model: Factory, batches: Factory, family: str, prune: str) -> None:
    model = nncf.compress(tiny_model(family), algorithm=Cats(0.6, prune), dataset=batches(2))
    samples = [batches(1)[0], {key: value[:, :1] for key, value in batches(1)[0].items()}]
    names = set(model.state_dict())
    with torch.no_grad():
        before = [model(**sample).logits for sample in samples]
        deploy(model, backend="reference", counters=True)
        assert not deployment_of(model).left
        for sample, truth in zip(samples, before):
            assert torch.allclose(model(**sample).logits, truth, atol=1e-4)
        assert set(model.state_dict()) == names
        dropped, seen = deployment_of(model).counts()["model.layers.0.mlp.down_proj"]
        assert 0.3 < dropped / seen < 0.8
        undeploy(model)
        assert all(torch.equal(model(**sample).logits, truth) for sample, truth in zip(samples, before))


def test_compressed_weights(tiny_llama: nn.Module, batches: Factory) -> None:
    recipe = [scap_nncf.WeightCompression("int8_asym"), Cats(0.5)]
    model = nncf.compress(tiny_llama, algorithm=recipe, dataset=batches(2))
    with torch.no_grad():
        model(**batches(1)[0])
    assert scap_nncf.get_controller(model).statistics().realised_sparsity == pytest.approx(1 / 3, abs=0.05)


def test_bad_input(tiny_model: Factory, batches: Factory, tmp_path: Path) -> None:
    for family in ("opt", "gpt2", "phi3"):  # no gate, or one fused with up
        with pytest.raises(nncf.UnsupportedModelError, match="gate"):
            nncf.compress(tiny_model(family), algorithm="cats", dataset=batches(1))
    with pytest.raises(nncf.ValidationError, match="dataset"):
        nncf.compress(tiny_model("llama"), algorithm="cats")
    with pytest.raises(nncf.ValidationError):
        Cats(sparsity=1.0)
    scope = nncf.IgnoredScope(patterns=[".*gate_proj"])
    with pytest.raises(nncf.ValidationError, match="leaves no"):
        nncf.compress(tiny_model("llama"), algorithm=Cats(ignored_scope=scope), dataset=batches(1))
    model = nncf.compress(tiny_model("llama"), algorithm="cats", dataset=batches(1))
    scap_nncf.get_controller(model).save(tmp_path / "plan")
    with pytest.raises(nncf.ValidationError, match="does not fit"):
        nncf.compress(tiny_model("opt"), plan=tmp_path / "plan")
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.get_submodule("model.layers.0.mlp.gate_proj").weight[0, 0] = torch.nan
    with pytest.raises(nncf.ValidationError, match="NaN"):
        nncf.compress(broken, algorithm="cats", dataset=batches(1))
    assert scap_nncf.get_controller(broken) is None
