# SPDX-License-Identifier: Apache-2.0
"""nncf.compress on PyTorch models: sites, calibration, pruning, the controller, bad input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import pytest
import torch
from torch import nn

import scap_nncf
from scap_nncf import Scap
from scap_nncf.algorithms.backends.torch.prune import CORRECTION
from scap_nncf.algorithms.plan import Plan

Factory = Callable[..., Any]

ROLE_SETS = {
    "llama": [("q", "k", "v"), ("o",), ("gate", "up"), ("down",)],
    "qwen2": [("q", "k", "v"), ("o",), ("gate", "up"), ("down",)],
    "phi3": [("qkv",), ("o",), ("gate_up",), ("down",)],
    "gpt2": [("qkv",), ("o",), ("up",), ("down",)],
    "opt": [("q", "k", "v"), ("o",), ("fc1",), ("fc2",)],
    "gpt_neox": [("qkv",), ("o",), ("up",), ("down",)],
    "mpt": [("qkv",), ("o",), ("up",), ("down",)],
    # parallel attention and feed-forward read one tensor
    "falcon": [("qkv", "up"), ("o",), ("down",)],
    "phi": [("q", "k", "v", "fc1"), ("o",), ("fc2",)],
}


class Strange(nn.Module):
    """A family no table knows: names say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.ModuleList(
            nn.ModuleList([nn.Linear(12, n) for n in (12, 12, 12, 12, 40, 40)]) for _ in range(2)
        )
        self.back = nn.ModuleList(nn.ModuleDict({"0": nn.Linear(40, 12)}) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part, back in zip(self.stack, self.back):
            h = torch.tanh(x)
            a, b, c = (part[i](h) for i in range(3))
            x = x + part[3](a * b + c)
            h = torch.tanh(x)
            x = x + back["0"](part[4](h) * part[5](h))
        return x


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything a failed run must leave as it was."""
    hooks = [
        (len(m._forward_pre_hooks), len(m._forward_hooks), sorted(m._buffers), m.training) for m in model.modules()
    ]
    return {"hooks": hooks, "state": {k: v.clone() for k, v in model.state_dict().items()}}


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert after["hooks"] == before["hooks"]
    assert after["state"].keys() == before["state"].keys()
    assert all(torch.equal(after["state"][key], value) for key, value in before["state"].items())
    assert scap_nncf.get_controller(model) is None


# -- sites -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(ROLE_SETS))
def test_sites_and_roles(tiny_model: Factory, family: str) -> None:
    report = scap_nncf.inspect_model(tiny_model(family))
    roles = [tuple(layer.role for layer in site.layers) for site in report.sites]
    assert roles == ROLE_SETS[family] * 2
    assert [site.block for site in report.sites] == sorted(site.block for site in report.sites)
    assert any("outside of the blocks" in item.reason for item in report.left_out)
    assert report.sites[0].name in str(report)


def test_unknown_family_by_structure() -> None:
    report = scap_nncf.inspect_model(Strange(), sample=torch.randn(2, 5, 12))
    roles = [tuple(layer.role for layer in site.layers) for site in report.sites]
    assert roles == [("q", "k", "v"), ("o",), ("gate", "up"), ("down",)] * 2


def test_model_without_blocks_is_one_block() -> None:
    model = nn.Module()
    model.first, model.second = nn.Linear(8, 32), nn.Linear(32, 8)
    model.forward = lambda x: model.second(model.first(x).relu())  # type: ignore[method-assign]
    roles = [site.layers[0].role for site in scap_nncf.inspect_model(model, sample=torch.randn(3, 8)).sites]
    assert roles == ["up", "down"]


def test_selection(tiny_llama: nn.Module) -> None:
    assert scap_nncf.inspect_model(tiny_llama, roles="ffn") == scap_nncf.inspect_model(tiny_llama, roles=["ffn"])
    assert Scap(roles="ffn", sparsity=np.float32(0.5)) == Scap(roles=("ffn",))
    report = scap_nncf.inspect_model(
        tiny_llama, roles=["ffn", "lm_head"], ignored_scope=nncf.IgnoredScope(patterns=[".*layers\\.0\\.mlp\\.up.*"])
    )
    names = [layer.name for site in report.sites for layer in site.layers]
    assert "lm_head" in names
    assert "model.layers.0.mlp.up_proj" not in names
    assert "model.layers.1.mlp.up_proj" in names
    assert not any("self_attn" in name for name in names)


def test_lm_head_only_when_asked_for(tiny_llama: nn.Module, batches: Factory) -> None:
    nncf.compress(tiny_llama, dataset=batches(1), sparsity={"all": 0.3, "lm_head": 0.2})
    layers = {layer.name: layer.sparsity for layer in scap_nncf.get_controller(tiny_llama).plan.layers}
    assert layers["lm_head"] == 0.2
    assert len(layers) == 15


# -- registration ----------------------------------------------------------------------------------------------------


def test_registered_in_nncf() -> None:
    assert nncf.compress is scap_nncf.compress


def test_algorithm_by_name_object_and_list(tiny_model: Factory, batches: Factory) -> None:
    plans = []
    for algorithm, settings in (("scap", {"sparsity": 0.3}), (Scap(sparsity=0.3), {}), ([Scap(sparsity=0.3)], {})):
        model = nncf.compress(tiny_model(), algorithm=algorithm, dataset=nncf.Dataset(batches()), **settings)
        plans.append(scap_nncf.get_controller(model).plan)
    assert plans[0] == plans[1] == plans[2]


# -- calibration -----------------------------------------------------------------------------------------------------


def collected(model: nn.Module, name: str, data: list[dict[str, torch.Tensor]]) -> np.ndarray:
    values: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _m, a: values.append(a[0].detach()))
    with torch.no_grad():
        for sample in data:
            model(**sample)
    handle.remove()
    return torch.cat([value.reshape(-1, value.shape[-1]) for value in values]).double().numpy()


def test_thresholds_are_quantiles_of_all_values(tiny_llama: nn.Module, batches: Factory) -> None:
    data = batches()
    truth = {}
    for site in scap_nncf.inspect_model(tiny_llama).sites:
        truth[site.name] = np.quantile(np.abs(collected(tiny_llama, site.name, data)), 0.45)
    nncf.compress(tiny_llama, dataset=data, sparsity=0.45, mode="zero", allocation="uniform")
    for site in scap_nncf.get_controller(tiny_llama).plan.sites:
        for layer in site.layers:
            assert layer.threshold == pytest.approx(truth[site.name], rel=2**-7)


@pytest.mark.parametrize("sequential", [False, True])
def test_any_order_gives_the_same_plan(tiny_model: Factory, batches: Factory, sequential: bool) -> None:
    data = batches(6)
    texts = set()
    for order in (data, data[::-1], data[3:] + data[:3]):
        model = nncf.compress(tiny_model(), dataset=order, sparsity=0.5, sequential=sequential)
        texts.add(scap_nncf.get_controller(model).plan.to_json())
    assert len(texts) == 1


def test_merged_statistics_give_the_same_plan(tiny_llama: nn.Module, batches: Factory, tmp_path: Path) -> None:
    data = batches(8)
    config = Scap(sparsity=0.5, allocation="uniform")
    whole = scap_nncf.make_plan(scap_nncf.calibrate(tiny_llama, dataset=data), config)
    for share in range(4):
        scap_nncf.calibrate(tiny_llama, dataset=data[share::4]).save(tmp_path / str(share))
    parts = [scap_nncf.CalibrationStatistics.load(tmp_path / str(share)) for share in (2, 0, 3, 1)]
    merged = parts[0].merge(parts[1]).merge(parts[2].merge(parts[3]))
    assert scap_nncf.make_plan(merged, config).to_json() == whole.to_json()
    assert nncf.compress(tiny_llama, plan=whole) is tiny_llama


def test_padding_does_not_count(tiny_llama: nn.Module, batches: Factory) -> None:
    short = batches(1, 2, 11)[0]
    padded = {
        "input_ids": torch.nn.functional.pad(short["input_ids"], (0, 6), value=5),
        "attention_mask": torch.nn.functional.pad(short["attention_mask"], (0, 6)),
    }
    plain = scap_nncf.calibrate(tiny_llama, dataset=[short])
    masked = scap_nncf.calibrate(tiny_llama, dataset=[padded])
    unmasked = scap_nncf.calibrate(tiny_llama, dataset=[{"input_ids": padded["input_ids"]}])
    assert plain.tokens == masked.tokens == 22
    assert unmasked.tokens == 34
    name = "model.layers.0.self_attn.q_proj"
    assert np.array_equal(plain.histograms[name].counts, masked.histograms[name].counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_realised_sparsity_on_calibration_data(tiny_model: Factory, batches: Factory, dtype: torch.dtype) -> None:
    data = batches(4, 4, 32)
    model = nncf.compress(
        tiny_model("llama", dtype=dtype), dataset=data, sparsity=0.4, sequential=True, allocation="uniform"
    )
    for sample in data:
        model(**sample)
    for layer in scap_nncf.get_controller(model).statistics().layers:
        assert layer.realised_sparsity == pytest.approx(0.4, abs=0.01)


def test_sequential_sees_pruned_inputs(tiny_model: Factory, batches: Factory) -> None:
    """The first site is calibrated on the same values either way, the last one is not."""
    data = batches(3)
    plans = []
    for sequential in (False, True):
        settings = {"sparsity": 0.6, "sequential": sequential, "mode": "median", "allocation": "uniform"}
        model = nncf.compress(tiny_model(), dataset=data, **settings)
        plans.append(scap_nncf.get_controller(model).plan)
    dense, sequential_plan = plans
    assert dense.sites[0] == sequential_plan.sites[0]
    assert dense.sites[-1].layers[0].threshold != sequential_plan.sites[-1].layers[0].threshold
    # the reference: prune the sites before, then take the quantile
    model = tiny_model()
    nncf.compress(model, plan=Plan(sequential_plan.sites[:-1]))
    last = sequential_plan.sites[-1]
    values = collected(model, last.name, data)
    expected = np.quantile(np.abs(values - last.mode), 0.6)
    assert last.layers[0].threshold == pytest.approx(expected, rel=2**-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda data, _tok: nncf.Dataset(data),
        lambda data, _tok: nncf.Dataset(list(enumerate(data)), lambda item: item[1]),
        lambda data, _tok: [sample["input_ids"] for sample in data],
        lambda data, _tok: [(sample["input_ids"],) for sample in data],
        lambda data, _tok: (sample for sample in data),
        lambda data, _tok: [{key: value.numpy() for key, value in sample.items()} for sample in data],
    ],
    ids=["nncf.Dataset", "transform_func", "tensors", "tuples", "generator", "numpy"],
)
def test_kinds_of_datasets(tiny_llama: nn.Module, batches: Factory, make: Any) -> None:
    data = batches(3)
    expected = scap_nncf.calibrate(tiny_llama, dataset=data).to_bytes()
    assert scap_nncf.calibrate(tiny_llama, dataset=make(data, None)).to_bytes() == expected


def test_texts_with_a_tokenizer(tiny_llama: nn.Module, tiny_tokenizer: Any) -> None:
    texts = ["some text", "and a longer piece of text to follow it"]
    statistics = scap_nncf.calibrate(tiny_llama, dataset=texts, tokenizer=tiny_tokenizer)
    assert statistics.tokens == sum(len(tiny_tokenizer(text)["input_ids"]) for text in texts)
    datasets = pytest.importorskip("datasets", reason="needs the datasets extra")
    rows = datasets.Dataset.from_dict({"text": texts})
    again = scap_nncf.calibrate(tiny_llama, dataset=rows, tokenizer=tiny_tokenizer)
    assert again.to_bytes() == statistics.to_bytes()
    tokenised = rows.map(lambda row: dict(tiny_tokenizer(row["text"])), remove_columns=["text"])
    assert scap_nncf.calibrate(tiny_llama, dataset=tokenised).to_bytes() == statistics.to_bytes()
    for kind in ("torch", "numpy"):
        columns = tokenised.with_format(kind, columns=["input_ids", "attention_mask"])
        assert scap_nncf.calibrate(tiny_llama, dataset=columns).to_bytes() == statistics.to_bytes()
    with pytest.raises(nncf.ValidationError, match="tokenizer="):
        scap_nncf.calibrate(tiny_llama, dataset=texts)


def test_subset_size(tiny_llama: nn.Module, batches: Factory) -> None:
    assert scap_nncf.calibrate(tiny_llama, dataset=batches(5), subset_size=2).samples == 2
    assert scap_nncf.calibrate(tiny_llama, dataset=batches(5), subset_size=None).samples == 5


# -- pruning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "qwen2"])
def test_thresholds_that_drop_nothing(tiny_model: Factory, batches: Factory, family: str) -> None:
    model, sample = tiny_model(family), batches(1)[0]
    dense = model(**sample).logits
    nncf.compress(model, dataset=[sample], sparsity=0.5, mode="mean")
    controller = scap_nncf.get_controller(model)
    assert any(site.mode for site in controller.plan.sites)
    assert not torch.equal(model(**sample).logits, dense)
    controller.set_sparsity(0.0)
    assert torch.equal(model(**sample).logits, dense)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_mode_centring_alone_changes_nothing(tiny_model: Factory, batches: Factory, family: str) -> None:
    """x = (x − η) + η: with τ = 0 only values equal to η are dropped (equation 4 of the paper)."""
    model, sample = tiny_model(family), batches(1)[0]
    dense = model(**sample).logits
    nncf.compress(model, plan=_with(scap_nncf.calibrate(model, dataset=[sample]), mode=0.21, threshold=0.0))
    sparse = model(**sample).logits
    assert (sparse - dense).norm() / dense.norm() < 1e-5
    assert not torch.equal(sparse, dense)


def _with(statistics: Any, mode: float, threshold: float) -> Plan:
    from dataclasses import replace

    plan = scap_nncf.make_plan(statistics, Scap(sparsity=0.5))
    return replace(
        plan,
        sites=tuple(
            replace(site, mode=mode, layers=tuple(replace(layer, threshold=threshold) for layer in site.layers))
            for site in plan.sites
        ),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", [0.0, 0.3])
def test_one_layer_against_float64(dtype: torch.dtype, mode: float) -> None:
    model = nn.Sequential(nn.Linear(33, 17)).to(dtype)
    x = torch.randn(3, 5, 33).to(dtype)
    statistics = scap_nncf.calibrate(model, dataset=[x])
    nncf.compress(model, plan=_with(statistics, mode=mode, threshold=0.5))
    weight, bias = model[0].weight.double(), model[0].bias.double()
    z = x.double() - np.float32(mode)
    expected = torch.where(z.abs() <= 0.5, torch.zeros_like(z), z) @ weight.t() + bias + mode * weight.sum(1)
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    error = (model(x).double() - expected).norm() / expected.norm()
    assert error < tolerance


def test_nan_stays_visible() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    nncf.compress(model, dataset=[torch.randn(4, 8)], sparsity=0.5)
    x = torch.randn(1, 8)
    x[0, 3] = float("nan")
    assert model(x).isnan().all()


def test_decode_policy_leaves_prompts_dense(tiny_llama: nn.Module, batches: Factory) -> None:
    sample = batches(1)[0]
    dense = tiny_llama(**sample).logits
    nncf.compress(tiny_llama, dataset=[sample], sparsity=0.5, prune="decode", mode="mean")
    controller = scap_nncf.get_controller(tiny_llama)
    assert torch.equal(tiny_llama(**sample).logits, dense)
    assert controller.statistics().realised_sparsity is None
    token = {"input_ids": sample["input_ids"][:, :1]}
    with controller.disabled():
        dense_token = tiny_llama(**token).logits
    assert not torch.equal(tiny_llama(**token).logits, dense_token)
    assert controller.statistics().realised_sparsity > 0


def test_generate(tiny_llama: nn.Module, batches: Factory) -> None:
    nncf.compress(tiny_llama, dataset=batches(), sparsity=0.3)
    ids = batches(1)[0]["input_ids"][:1]
    text = tiny_llama.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    again = tiny_llama.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, cache_implementation="static")
    assert torch.equal(text, again)
    assert text.shape[1] > ids.shape[1]


@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_compiles_without_graph_break(tiny_llama: nn.Module, batches: Factory, mode: str) -> None:
    sample = batches(1)[0]
    nncf.compress(tiny_llama, dataset=[sample], sparsity=0.4, mode=mode)
    expected = tiny_llama(**sample, use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(tiny_llama, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(**sample, use_cache=False).logits, expected, atol=1e-5)
    assert scap_nncf.get_controller(compiled) is scap_nncf.get_controller(tiny_llama)


def test_compressing_a_compiled_model_that_has_run(tiny_llama: nn.Module, batches: Factory) -> None:
    """torch.compile does not notice hooks that come later: the model would silently stay dense."""
    sample = batches(1)[0]
    torch._dynamo.reset()
    compiled = torch.compile(tiny_llama, backend="eager")
    dense = compiled(**sample).logits
    assert nncf.compress(compiled, dataset=[sample], sparsity=0.5) is compiled
    sparse = compiled(**sample).logits
    assert torch.equal(sparse, tiny_llama(**sample).logits)
    assert not torch.equal(sparse, dense)
    controller = scap_nncf.get_controller(compiled)
    assert controller.plan.sites[0].name == "model.layers.0.self_attn.q_proj"
    controller.set_prune("decode")
    assert torch.equal(compiled(**sample).logits, dense)
    controller.strip()
    assert torch.equal(compiled(**sample).logits, dense)


def test_checkpoint_is_that_of_the_dense_model(tiny_llama: nn.Module, batches: Factory, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    sample = batches(1)[0]
    dense = tiny_llama(**sample).logits
    keys = set(tiny_llama.state_dict())
    nncf.compress(tiny_llama, dataset=[sample], sparsity=0.5, mode="mean")
    assert set(tiny_llama.state_dict()) == keys
    tiny_llama.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(**sample).logits, dense)


@pytest.mark.parametrize("mode", ["int8_asym", "int8_sym", "int4_sym", "int4_asym"])
def test_on_weights_compressed_by_nncf(tiny_model: Factory, batches: Factory, mode: str) -> None:
    """η·W must come from the weights that run; nothing dropped means the quantised model's output."""
    sample = batches(1)[0]
    settings = {} if mode.startswith("int8") else {"group_size": 8, "all_layers": True}
    model = nncf.compress_weights(
        tiny_model(), mode=nncf.CompressWeightsMode(mode), dataset=nncf.Dataset([sample]), **settings
    )
    quantised = model(**sample).logits
    nncf.compress(model, plan=_with(scap_nncf.calibrate(model, dataset=[sample]), mode=0.2, threshold=0.0))
    assert (model(**sample).logits - quantised).norm() / quantised.norm() < 1e-5
    controller = scap_nncf.get_controller(model)
    assert len(controller.plan.layers) == 14
    controller.strip()
    assert torch.equal(model(**sample).logits, quantised)


# -- controller ------------------------------------------------------------------------------------------------------


def test_controller(tiny_llama: nn.Module, batches: Factory, tmp_path: Path) -> None:
    data = batches()
    dense = tiny_llama(**data[0]).logits
    before = snapshot(tiny_llama)
    nncf.compress(tiny_llama, dataset=data, sparsity={"ffn": 0.5}, mode="mean")
    controller = scap_nncf.get_controller(tiny_llama)
    sparse = tiny_llama(**data[0]).logits
    statistics = controller.statistics()
    assert [row.role for row in statistics.roles()] == ["gate", "up", "down"]
    assert statistics.realised_sparsity == pytest.approx(0.5, abs=0.1)
    assert "down" in str(statistics)
    controller.reset_counters()
    assert controller.statistics().realised_sparsity is None
    with controller.disabled():
        assert torch.equal(tiny_llama(**data[0]).logits, dense)
    assert torch.equal(tiny_llama(**data[0]).logits, sparse)

    controller.save(tmp_path)
    assert controller.strip() is tiny_llama
    assert torch.equal(tiny_llama(**data[0]).logits, dense)
    assert_untouched(tiny_llama, before)

    nncf.compress(tiny_llama, plan=tmp_path)
    assert torch.equal(tiny_llama(**data[0]).logits, sparse)
    again = scap_nncf.get_controller(tiny_llama)
    assert again.set_sparsity({"ffn": 0.2}, mode="zero", prune="all").layers
    fresh = nncf.compress(copy.deepcopy(again.strip()), dataset=data, sparsity={"ffn": 0.2}, mode="zero")
    assert again.plan.sites == scap_nncf.get_controller(fresh).plan.sites


def test_a_stripped_controller_cannot_prune_behind_the_models_back(tiny_llama: nn.Module, batches: Factory) -> None:
    nncf.compress(tiny_llama, dataset=batches(1), sparsity=0.5)
    controller = scap_nncf.get_controller(tiny_llama)
    before = snapshot(controller.strip())
    assert controller.strip() is tiny_llama
    for change in (
        lambda: controller.set_sparsity(0.3),
        lambda: controller.set_prune("decode"),
        controller.enable,
        controller.disable,
        controller.reset_counters,
    ):
        with pytest.raises(nncf.ValidationError, match="stripped"):
            change()
    assert_untouched(tiny_llama, before)
    assert nncf.compress(tiny_llama, plan=controller.plan) is tiny_llama
    # a second controller is there now; the first one must not touch its pruning
    controller.strip()
    assert scap_nncf.get_controller(tiny_llama).statistics().layers


def test_a_sparse_model_has_the_sites_of_the_dense_one(tiny_llama: nn.Module, batches: Factory) -> None:
    dense = scap_nncf.inspect_model(tiny_llama)
    nncf.compress(tiny_llama, dataset=batches(1), sparsity=0.5, mode="mean")
    assert scap_nncf.inspect_model(tiny_llama) == dense
    with pytest.raises(nncf.ValidationError, match="already"):
        scap_nncf.calibrate(tiny_llama, dataset=batches(1))


def test_copy_of_a_sparse_model_has_its_own_controller(tiny_llama: nn.Module, batches: Factory) -> None:
    sample = batches(1)[0]
    nncf.compress(tiny_llama, dataset=[sample], sparsity=0.5, mode="mean")
    twin = copy.deepcopy(tiny_llama)
    sparse = tiny_llama(**sample).logits
    scap_nncf.get_controller(twin).strip()
    assert torch.equal(tiny_llama(**sample).logits, sparse)
    assert not torch.equal(twin(**sample).logits, sparse)
    assert not any(CORRECTION in name for name, _ in twin.named_buffers())


def test_failed_set_sparsity_keeps_the_plan(tiny_llama: nn.Module, batches: Factory) -> None:
    sample = batches(1)[0]
    nncf.compress(tiny_llama, dataset=[sample], sparsity=0.5)
    controller = scap_nncf.get_controller(tiny_llama)
    sparse, plan = tiny_llama(**sample).logits, controller.plan
    for bad in (
        {"sparsity": {"upp": 0.3}},
        {"sparsity": 1.2},
        {"sparsity": 0.3, "mode": "nil"},
        {"sparsity": 0.3, "prune": "x"},
    ):
        with pytest.raises(nncf.ValidationError):
            controller.set_sparsity(**bad)
    assert controller.plan == plan
    assert torch.equal(tiny_llama(**sample).logits, sparse)


def test_plan_without_statistics_cannot_be_recomputed(tiny_llama: nn.Module, batches: Factory) -> None:
    plan = scap_nncf.make_plan(scap_nncf.calibrate(tiny_llama, dataset=batches(1)), Scap(sparsity=0.4))
    nncf.compress(tiny_llama, plan=plan)
    with pytest.raises(nncf.ValidationError, match="without calibration statistics"):
        scap_nncf.get_controller(tiny_llama).set_sparsity(0.3)


# -- bad input -------------------------------------------------------------------------------------------------------


BAD_SETTINGS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"sparsity": {"uup": 0.5}}, nncf.ValidationError, "is not a role"),
    ({"sparsity": {"re:nothing_like_this": 0.5}}, nncf.ValidationError, "names no layer"),
    ({"sparsity": 1.0}, nncf.ValidationError, r"\[0, 1\)"),
    ({"sparsity": 0.5, "mode": "modal"}, nncf.ValidationError, "mode must be"),
    ({"sparsity": 0.5, "prune": "prefill"}, nncf.ValidationError, "prune must be"),
    ({"sparsity": 0.5, "roles": ["qkv"]}, nncf.ValidationError, "names no layer"),
    ({"sparsity": 0.5, "ignored_scope": nncf.IgnoredScope(names=["x"])}, nncf.ValidationError, "matches no"),
    ({"sparsity": 0.5, "subset_size": 0}, nncf.ValidationError, "subset_size"),
    ({"sparsety": 0.5}, nncf.ParameterNotSupportedError, "sparsety"),
    ({"algorithm": "scab"}, nncf.ParameterNotSupportedError, "scap"),
    ({"algorithm": []}, nncf.ValidationError, "empty"),
    ({"algorithm": 3}, nncf.ParameterNotSupportedError, "configuration object"),
    ({"algorithm": Scap(), "sparsity": 0.5}, nncf.ParameterNotSupportedError, "beside"),
    ({"dataset": []}, nncf.ValidationError, "empty"),
    ({"dataset": None}, nncf.ValidationError, "needs a dataset"),
    ({"dataset": "text"}, nncf.ValidationError, "Wrap"),
    ({"dataset": torch.ones(2, 5, dtype=torch.int64)}, nncf.ValidationError, "got Tensor. Wrap"),
    ({"dataset": [{"pixel_values": torch.zeros(1)}]}, nncf.ValidationError, "cannot take the first sample"),
    ({"dataset": [torch.tensor([[900]])]}, nncf.ValidationError, "cannot take"),
    ({"plan": "/nowhere/at/all"}, nncf.InvalidPathError, "No plan"),
    ({"plan": Plan(()), "dataset": None, "sparsity": 0.4}, nncf.ValidationError, "leave out"),
]


@pytest.mark.parametrize(("settings", "error", "message"), BAD_SETTINGS, ids=[m for _, _, m in BAD_SETTINGS])
@pytest.mark.parametrize("sequential", [False, True])
def test_bad_settings_leave_the_model_alone(
    tiny_llama: nn.Module,
    batches: Factory,
    settings: dict[str, Any],
    error: type[Exception],
    message: str,
    sequential: bool,
) -> None:
    settings = {"dataset": None if "plan" in settings else batches(2), **settings}
    if sequential and "plan" not in settings and "algorithm" not in settings:
        settings["sequential"] = True
    before = snapshot(tiny_llama)
    with pytest.raises(error, match=message):
        nncf.compress(tiny_llama, **settings)
    assert_untouched(tiny_llama, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("sequential", [False, True])
def test_non_finite_activation_names_site_and_sample(value: float, sequential: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    bad = torch.randn(2, 8)
    bad[1, 2] = value
    before = snapshot(model)
    with pytest.raises(nncf.ValidationError, match="input of 0 has NaN or Inf values in sample 1"):
        nncf.compress(model, dataset=[torch.randn(2, 8), bad], sparsity=0.5, sequential=sequential)
    assert_untouched(model, before)


@pytest.mark.parametrize("sequential", [False, True])
def test_sample_in_the_middle_fails(tiny_llama: nn.Module, batches: Factory, sequential: bool) -> None:
    data = [*batches(2), {"input_ids": torch.tensor([[9999]])}, *batches(1)]
    before = snapshot(tiny_llama)
    with pytest.raises(nncf.ValidationError, match="cannot take sample 2"):
        nncf.compress(tiny_llama, dataset=data, sparsity=0.5, sequential=sequential)
    assert_untouched(tiny_llama, before)


def test_compressing_twice_is_refused(tiny_llama: nn.Module, batches: Factory) -> None:
    data = batches(1)
    nncf.compress(tiny_llama, dataset=data, sparsity=0.5)
    sparse = tiny_llama(**data[0]).logits
    for settings in ({"dataset": data, "sparsity": 0.3}, {"plan": scap_nncf.get_controller(tiny_llama).plan}):
        with pytest.raises(nncf.ValidationError, match="already"):
            nncf.compress(tiny_llama, **settings)
    assert torch.equal(tiny_llama(**data[0]).logits, sparse)


def test_plan_of_another_model(tiny_model: Factory, batches: Factory) -> None:
    plan = scap_nncf.make_plan(scap_nncf.calibrate(tiny_model("gpt2"), dataset=batches(1)), Scap())
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(nncf.ValidationError, match="does not fit"):
        nncf.compress(model, plan=plan)
    assert_untouched(model, before)


def test_site_that_runs_in_the_first_sample_only_is_calibrated_on_it() -> None:
    """An expert that later samples do not reach gets empty inputs or no call at all; neither is an error."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    nncf.compress(model, dataset=[torch.randn(4, 8), torch.empty(0, 8)], sparsity=0.5)
    assert model(torch.empty(0, 8)).shape == (0, 8)


def test_training_mode_and_gradients_are_restored(tiny_llama: nn.Module, batches: Factory) -> None:
    tiny_llama.train()
    tiny_llama.model.norm.eval()
    nncf.compress(tiny_llama, dataset=batches(1), sparsity=0.5)
    assert tiny_llama.training
    assert not tiny_llama.model.norm.training
    assert torch.is_grad_enabled()


def test_models_that_cannot_be_pruned() -> None:
    with pytest.raises(nncf.UnsupportedModelError, match="no fully connected layer"):
        scap_nncf.inspect_model(nn.Sequential(nn.ReLU()), sample=torch.randn(2, 2))
    with pytest.raises(nncf.UnsupportedBackendError, match="got str"):
        nncf.compress("model", dataset=[1])
