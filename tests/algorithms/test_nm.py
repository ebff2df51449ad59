# SPDX-License-Identifier: Apache-2.0
"""N:M activation sparsity through nncf.compress: patterns, criteria, error mitigation, saving, recipes, bad input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import build_tiny_model, make_batches
from torch import nn

import scap_nncf
from scap_nncf import Mitigation, Nm, Scap
from scap_nncf.algorithms.backends import backend_of
from scap_nncf.algorithms.mitigation import as_mitigation
from scap_nncf.algorithms.mitigation.apply import low_rank
from scap_nncf.algorithms.nm import NmBuilder, criteria
from scap_nncf.algorithms.nm.config import parse_patterns

Factory = Callable[..., Any]


def inputs_of(model: nn.Module, sample: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What each planned layer is given after all hooks, [B, T, IC]."""
    seen: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(layer.name).register_forward_pre_hook(
            lambda _m, a, name=layer.name: seen.__setitem__(name, a[0].detach().clone())
        )
        for layer in scap_nncf.get_controller(model).plan.layers
    ]
    with torch.no_grad():
        model(**sample)
    for handle in handles:
        handle.remove()
    return seen


class Pair(nn.Module):
    """Two layers on one tensor and one behind them; the tensor has a mean in each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(32, 24), nn.Linear(32, 16), nn.Linear(24, 8)
        self.offset = torch.randn(32) + 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x + self.offset
        return self.last(self.first(h).relu()) + self.second(h).sum()


def pair_data(count: int) -> list[torch.Tensor]:
    return [torch.randn(2, 64, 32) for _ in range(count)]


def error(dense: Pair, sparse: Pair, data: list[torch.Tensor]) -> float:
    """Squared error of the layers on one tensor, relative to their results."""
    with torch.no_grad():
        x = torch.cat(data) + dense.offset
        pairs = [(dense.first(x), sparse.first(x)), (dense.second(x), sparse.second(x))]
    return sum(float((a - b).square().sum() / a.square().sum()) for a, b in pairs)


# -- selection -------------------------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from([(1, 2), (2, 4), (3, 4), (4, 8), (1, 8)]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(["llama", "qwen2", "gpt2", "opt", "falcon"]),
    st.integers(1, 3),
    st.integers(0, 2**31),
)
def test_exactly_n_of_m_in_every_token_of_any_batch(
    pattern: tuple[int, int], dtype: torch.dtype, family: str, batch: int, seed: int
) -> None:
    n, m = pattern
    model = build_tiny_model(family, dtype=dtype, seed=seed % 1000)
    (sample,) = make_batches(1, batch=batch, length=11, seed=seed)
    nncf.compress(model, algorithm="nm", pattern=pattern)
    for name, x in inputs_of(model, sample).items():
        nonzero = (x.reshape(*x.shape[:-1], -1, m) != 0).sum(-1)
        assert (nonzero <= n).all()
        if not (family == "opt" and name.endswith("fc2")):  # a ReLU leaves as many as it likes
            assert (nonzero == n).float().mean() > 0.99


def test_a_token_does_not_depend_on_its_batch(tiny_llama: nn.Module, batches: Factory) -> None:
    (sample,) = batches(1, batch=4)
    nncf.compress(tiny_llama, algorithm="nm", pattern="2:4", criterion="clact", dataset=batches(2), mitigation="d-pts")
    together = inputs_of(tiny_llama, sample)
    first = scap_nncf.get_controller(tiny_llama).plan.layers[0].name  # its input is not yet that of other layers' sums
    for row in range(4):
        alone = inputs_of(tiny_llama, {key: value[row : row + 1] for key, value in sample.items()})
        assert torch.equal(alone[first][0], together[first][row])
        assert all(torch.allclose(alone[k][0], together[k][row], atol=1e-4) for k in list(alone)[:3])


def test_top_k_of_the_token(tiny_llama: nn.Module, batches: Factory) -> None:
    nncf.compress(tiny_llama, algorithm="nm", pattern=0.7)
    for x in inputs_of(tiny_llama, batches(1)[0]).values():
        assert ((x != 0).sum(-1) == x.shape[-1] - round(0.7 * x.shape[-1])).all()
    assert scap_nncf.get_controller(tiny_llama).statistics().realised_sparsity == pytest.approx(0.7, abs=0.01)


def test_patterns_by_role(tiny_llama: nn.Module, batches: Factory) -> None:
    model = nncf.compress(tiny_llama, algorithm="nm", pattern={"ffn": "2:4", "down": 0.25, "q": "1:8"})
    patterns = {layer.role: layer.pattern for layer in scap_nncf.get_controller(model).plan.layers}
    assert patterns == {"q": (1, 8), "gate": (2, 4), "up": (2, 4), "down": (66, 88)}
    with torch.no_grad():
        model(**batches(1)[0])
    table = str(scap_nncf.get_controller(model).statistics())
    assert all(text in table for text in ("Pattern", "2:4", "66:88", "1:8"))
    assert "NmController" in repr(scap_nncf.get_controller(model))


def test_strip_and_switch(tiny_llama: nn.Module, batches: Factory) -> None:
    sample = batches(1)[0]
    with torch.no_grad():
        dense = tiny_llama(**sample).logits
        model = nncf.compress(tiny_llama, algorithm="nm", pattern="2:4", mitigation="var+r-sparse")
        controller = scap_nncf.get_controller(model)
        assert not torch.equal(model(**sample).logits, dense)
        with controller.disabled():
            assert torch.equal(model(**sample).logits, dense)
        with pytest.raises(nncf.ParameterNotSupportedError, match="pattern"):
            controller.set_sparsity(0.3)
        with pytest.raises(nncf.ValidationError, match="already"):
            nncf.compress(model, algorithm="nm")
        controller.strip()
        assert torch.equal(model(**sample).logits, dense)


# -- criteria --------------------------------------------------------------------------------------------------------


def test_criteria_are_what_the_papers_say() -> None:
    w = torch.randn(30, 20).double()
    w[3, 4] = 50.0
    assert torch.allclose(criteria.wina(w) * w.norm(dim=1).mean(), w.norm(dim=1).float())
    low, high = np.quantile(w.numpy(), [0.005, 0.995], method="nearest")
    clipped = w.clamp(low, high)
    norms = ((clipped - clipped.mean()) / clipped.std(correction=0)).norm(dim=1)
    assert torch.allclose(criteria.amber(w), (norms / norms.mean()).float(), rtol=1e-2)
    x = torch.randn(9, 30).double()
    assert torch.allclose(
        criteria.clact(x.square().mean(0)) / criteria.clact(x.square().mean(0))[0],
        (x.norm(dim=0) / x.norm(dim=0)[0]).float(),
    )
    assert torch.equal(criteria.wina(torch.zeros(4, 2)), torch.ones(4))


@pytest.mark.parametrize("criterion", ["clact", "amber", "wina"])
def test_a_channel_that_weighs_much_is_kept(tiny_model: Factory, batches: Factory, criterion: str) -> None:
    model = tiny_model("llama")
    down = model.get_submodule("model.layers.0.mlp.down_proj")
    up = model.get_submodule("model.layers.0.mlp.up_proj")
    with torch.no_grad():
        if criterion == "clact":
            up.weight[5] *= 30  # the channel is large on the calibration data
        else:
            down.weight[:, 5] *= 30
    nncf.compress(model, algorithm="nm", pattern={"down": "1:8"}, criterion=criterion, dataset=batches(2))
    plan = scap_nncf.get_controller(model).plan
    scores = plan.vectors_of(plan.layers[0])["score"]
    assert scores[5] == scores.max()
    x = inputs_of(model, batches(1, seed=5)[0])["model.layers.0.mlp.down_proj"]
    assert (x[..., 5] != 0).float().mean() > (0.3 if criterion == "amber" else 0.8)  # Amber-Pruner clips outliers


def test_statistics_collected_by_others(tiny_model: Factory, batches: Factory) -> None:
    data, config = batches(3), Nm({"ffn": "2:4", "k": "2:4"}, "clact")
    whole = nncf.compress(tiny_model(), algorithm=config, dataset=data)
    model = tiny_model()
    builder = NmBuilder(config)
    points = builder.get_statistic_points(model)
    assert backend_of(model).collect(model, points, data) == 3
    builder.apply(model, statistic_points=points)
    plans = [scap_nncf.get_controller(m).plan for m in (whole, model)]
    assert plans[0].sites == plans[1].sites
    assert all(np.array_equal(plans[0].vectors[key], plans[1].vectors[key]) for key in plans[0].vectors)


# -- error mitigation ------------------------------------------------------------------------------------------------


def test_names_of_mitigations() -> None:
    assert as_mitigation("VAR + L-PTS") == Mitigation(shift="learned", variance=True)
    assert as_mitigation("d-pts+ls+r-sparse") == Mitigation(shift="token", scaling=True, low_rank=16)
    assert as_mitigation("none") is None
    assert as_mitigation(Mitigation()) is None


@pytest.mark.parametrize("what", ["l-pts", "ls", "var+l-pts", "l-pts+ls+r-sparse"])
def test_learning_lowers_the_error_on_other_data(what: str) -> None:
    torch.manual_seed(0)  # how much there is to gain depends on the weights
    dense, data, other = Pair(), pair_data(24), pair_data(3)
    fixed = "+".join(part for part in what.split("+") if part in ("var", "r-sparse")) or None
    results = []
    for mitigation in (fixed, what):
        model = nncf.compress(
            copy.deepcopy(dense),
            algorithm="nm",
            pattern="2:4",
            mitigation=mitigation,
            dataset=data,
            roles="re:first|second",
        )
        results.append(error(dense, model, other))
    assert results[1] < 0.97 * results[0]


def test_learning_makes_no_site_worse_where_it_cannot_help(tiny_llama: nn.Module, batches: Factory) -> None:
    """A step too long for anything to be learned: what was there before is kept."""
    what = Mitigation(shift="learned", learning_rate=1e6, epochs=1)
    model = nncf.compress(tiny_llama, algorithm="nm", pattern="2:4", mitigation=what, dataset=batches(4))
    plan = scap_nncf.get_controller(model).plan
    assert all(not plan.vectors_of(layer)["shift"].any() for layer in plan.layers)


def test_layers_of_a_site_share_the_learned_shift() -> None:
    model = nncf.compress(Pair(), algorithm="nm", pattern="2:4", mitigation="l-pts", dataset=pair_data(8))
    plan = scap_nncf.get_controller(model).plan
    assert [len(site.layers) for site in plan.sites] == [2, 1]
    shifts = [plan.vectors_of(layer)["shift"] for layer in plan.sites[0].layers]
    assert np.array_equal(*shifts)
    assert np.isfinite(shifts[0]).all()
    # towards the channels' means
    assert np.corrcoef(shifts[0], model.offset.numpy())[0, 1] > 0.5


def test_static_shift_is_the_median_of_the_site(tiny_model: Factory, batches: Factory) -> None:
    data, model = batches(3), tiny_model("opt")
    values: list[torch.Tensor] = []
    handle = model.get_submodule("model.decoder.layers.0.fc2").register_forward_pre_hook(
        lambda _m, a: values.append(a[0].flatten())
    )
    with torch.no_grad():
        for sample in data:
            model(**sample)
    handle.remove()
    nncf.compress(model, algorithm="nm", pattern="2:4", criterion="clact", mitigation="s-pts", dataset=data)
    sites = {site.name: site for site in scap_nncf.get_controller(model).plan.sites}
    site = sites["model.decoder.layers.0.fc2"]
    assert site.mode == pytest.approx(float(torch.cat(values).median()), abs=1e-3)
    assert site.mode_method == "median"


def test_low_rank_is_near_the_best_approximation() -> None:
    w = torch.randn(50, 4) @ torch.randn(4, 30) + 0.1 * torch.randn(50, 30)
    a, b = low_rank(w, 6)
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    best = (w - (u[:, :6] * s[:6]) @ v[:6]).norm()
    assert (w - a @ b).norm() < 1.02 * best
    assert torch.equal(low_rank(w, 6)[0], a)
    assert low_rank(w, 99)[0].shape == (50, 30)


@pytest.mark.parametrize("what", ["d-pts", "l-pts", "ls", "r-sparse"])
def test_scap_takes_the_same_mitigations(what: str) -> None:
    dense, data = Pair(), pair_data(16)
    results = []
    for mitigation in (None, what):
        settings_ = {"sparsity": 0.5, "mode": "zero", "mitigation": mitigation, "roles": ["re:first|second"]}
        model = nncf.compress(copy.deepcopy(dense), dataset=data, **settings_)
        results.append(error(dense, model, data))
        # thresholds follow the shift: what is dropped is what was asked for
        assert scap_nncf.get_controller(model).statistics().realised_sparsity == pytest.approx(0.5, abs=0.02)
    assert results[1] < results[0]
    with pytest.raises(nncf.ValidationError, match="mitigation"):
        scap_nncf.get_controller(model).set_sparsity(0.3)


# -- plans, checkpoints, recipes, weights ----------------------------------------------------------------------------

EVERYTHING = Mitigation(shift="learned", variance=True, scaling=True, low_rank=2, epochs=1)


def test_saved_and_loaded(tiny_model: Factory, batches: Factory, tmp_path: Path) -> None:
    sample = batches(1)[0]
    model = nncf.compress(tiny_model("qwen2"), algorithm=Nm("2:4", "amber", EVERYTHING), dataset=batches(3))
    controller = scap_nncf.get_controller(model)
    controller.save(tmp_path / "plan")
    again = nncf.compress(tiny_model("qwen2"), plan=tmp_path / "plan")
    scap_nncf.save_pretrained(model, tmp_path / "model")
    loaded = scap_nncf.load_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(again(**sample).logits, model(**sample).logits)
        assert torch.equal(loaded(**sample).logits, model(**sample).logits)
    assert type(scap_nncf.get_controller(loaded)).__name__ == "NmController"
    assert scap_nncf.get_controller(loaded).plan.to_json() == controller.plan.to_json()
    with pytest.raises(nncf.ValidationError, match="does not fit"):
        nncf.compress(tiny_model("opt"), plan=tmp_path / "plan")


def test_compressed_weights(tiny_model: Factory, batches: Factory, tmp_path: Path) -> None:
    recipe = [Nm("2:4", "wina", EVERYTHING), scap_nncf.WeightCompression("int8_asym")]
    model = nncf.compress(tiny_model("llama"), algorithm=recipe, dataset=batches(3))
    plan = scap_nncf.get_controller(model).plan
    assert [next(iter(step)) for step in plan.made_by["recipe"]] == ["weight_compression", "nm"]
    scap_nncf.save_pretrained(model, tmp_path / "model")
    loaded = scap_nncf.load_pretrained(tmp_path / "model")
    with torch.no_grad():
        sample = batches(1)[0]
        assert torch.equal(loaded(**sample).logits, model(**sample).logits)
        scap_nncf.get_controller(model).strip()
        assert not torch.equal(loaded(**sample).logits, model(**sample).logits)


def test_recipe_file(tiny_llama: nn.Module, batches: Factory, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text('- nm: {pattern: {ffn: "2:4"}, criterion: wina, mitigation: {shift: token, variance: true}}\n')
    nncf.compress(tiny_llama, algorithm=file, dataset=batches(1))
    layers = scap_nncf.get_controller(tiny_llama).plan.layers
    assert {layer.role for layer in layers} == {"gate", "up", "down"}
    assert all(layer.pattern == (2, 4) and layer.token_shift == "median" and layer.variance for layer in layers)
    file.write_text("- nm: {pattern: 2:4}\n")  # YAML 1.1 reads 124 minutes
    with pytest.raises(nncf.ValidationError, match="quotes"):
        scap_nncf.load_recipe(file)


def test_decode_policy(tiny_llama: nn.Module, batches: Factory) -> None:
    sample = batches(1)[0]
    with torch.no_grad():
        dense = tiny_llama(**sample).logits
        nncf.compress(tiny_llama, algorithm="nm", pattern="2:4", prune="decode", mitigation="var+d-pts")
        assert torch.equal(tiny_llama(**sample).logits, dense)
        assert scap_nncf.get_controller(tiny_llama).statistics().realised_sparsity is None


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["4:4", "8:4", "0:4", "2-4", "", 1.0, 0.0, -0.5, float("nan"), 124, True, {}, (2,)])
def test_bad_patterns(pattern: Any) -> None:
    with pytest.raises(nncf.ValidationError, match=r"pattern|0 < N < M"):
        Nm(pattern)


@pytest.mark.parametrize(
    "settings_", [{"criterion": "l2"}, {"mitigation": "magic"}, {"mitigation": "s-pts+d-pts"}, {"mitigation": 3}]
)
def test_bad_settings(settings_: dict[str, Any]) -> None:
    with pytest.raises(nncf.ValidationError):
        Nm("2:4", **settings_)


@pytest.mark.parametrize(
    "settings_",
    [{"shift": "x"}, {"low_rank": -1}, {"learning_rate": 0}, {"epochs": 0}, {"variance": 1}, {"statistic": "mode"}],
)
def test_bad_mitigation(settings_: dict[str, Any]) -> None:
    with pytest.raises(nncf.ValidationError):
        Mitigation(**settings_)


def test_m_must_divide_the_width(tiny_llama: nn.Module) -> None:
    with pytest.raises(nncf.ValidationError, match=r"down_proj \(88 inputs, 8:16\)"):
        nncf.compress(tiny_llama, algorithm="nm", pattern="8:16")
    assert scap_nncf.get_controller(tiny_llama) is None
    scope = nncf.IgnoredScope(patterns=[".*down_proj"])
    nncf.compress(tiny_llama, algorithm="nm", pattern="8:16", ignored_scope=scope)


@pytest.mark.parametrize("settings_", [{"mitigation": "l-pts"}, {"mitigation": "s-pts"}, {"criterion": "clact"}])
def test_learning_needs_data(tiny_llama: nn.Module, settings_: dict[str, Any]) -> None:
    with pytest.raises(nncf.ValidationError, match="dataset"):
        nncf.compress(tiny_llama, algorithm="nm", pattern="2:4", **settings_)
    with pytest.raises(nncf.ValidationError, match="empty"):
        nncf.compress(tiny_llama, algorithm="nm", pattern="2:4", dataset=[], **settings_)
    assert scap_nncf.get_controller(tiny_llama) is None


@pytest.mark.parametrize("settings_", [{"criterion": "wina"}, {"mitigation": "var"}, {"mitigation": "l-pts"}])
def test_fused_experts_take_patterns_alone(tiny_model: Factory, batches: Factory, settings_: dict[str, Any]) -> None:
    model = tiny_model("mixtral")
    with pytest.raises(nncf.ParameterNotSupportedError, match="expert"):
        nncf.compress(model, algorithm="nm", pattern="2:4", dataset=batches(2), **settings_)
    assert scap_nncf.get_controller(model) is None
    nncf.compress(model, algorithm="nm", pattern={"attn": "2:4"}, dataset=batches(2), **settings_)


def test_nan_in_the_calibration_data() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(nncf.ValidationError, match=r"NaN|not finite"):
        nncf.compress(
            model, algorithm="nm", pattern="2:4", mitigation="l-pts", dataset=[torch.full((3, 16), torch.nan)]
        )
    assert not model[0]._forward_pre_hooks


def test_parsed_patterns() -> None:
    assert parse_patterns(" 2 : 4 ")["all"].groups == (2, 4)
    assert parse_patterns(0.5)["all"].of_width(7) == (3, 7)  # round(3.5) = 4 dropped
    assert parse_patterns(0.01)["all"].of_width(10) is None


def test_scap_refuses_a_static_shift() -> None:
    with pytest.raises(nncf.ValidationError, match="mode"):
        Scap(mitigation="s-pts")
