# SPDX-License-Identifier: Apache-2.0
"""Roles, selectors, the sparsity grammar and ignored scopes."""

from __future__ import annotations

import nncf
import pytest

from scap_nncf.algorithms import roles
from scap_nncf.algorithms.scope import ignored_reason
from scap_nncf.algorithms.sites import Layer, Site
from scap_nncf.algorithms.sparsity import Target, parse, resolve


def llama_block(index: int = 0) -> list[Site]:
    prefix = f"model.layers.{index}"

    def layer(name: str, role: str) -> Layer:
        return Layer(f"{prefix}.{name}", role, 8, 8)

    groups = [
        [layer("self_attn.q_proj", "q"), layer("self_attn.k_proj", "k"), layer("self_attn.v_proj", "v")],
        [layer("self_attn.o_proj", "o")],
        [layer("mlp.gate_proj", "gate"), layer("mlp.up_proj", "up")],
        [layer("mlp.down_proj", "down")],
    ]
    return [Site(layers[0].name, index, tuple(layers)) for layers in groups]


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.layers.3.self_attn.q_proj", "q"),
        ("model.layers.3.self_attn.o_proj", "o"),
        ("model.layers.0.mlp.gate_up_proj", "gate_up"),
        ("transformer.h.0.attn.c_attn", "qkv"),
        ("transformer.h.0.attn.c_proj", "o"),
        ("transformer.h.0.mlp.c_proj", "down"),
        ("transformer.h.31.mlp.dense_4h_to_h", "down"),
        ("transformer.blocks.31.ffn.down_proj", "down"),
        ("encoder.layer.0.attention.self.query", "q"),
        ("encoder.layer.0.attention.output.dense", "o"),
        ("encoder.layer.0.intermediate.dense", "up"),
        ("encoder.layer.0.output.dense", "down"),
        ("encoder.block.0.layer.0.SelfAttention.q", "q"),
        ("encoder.block.0.layer.1.DenseReluDense.wi_0", "gate"),
        ("backbone.layers.0.mixer.in_proj", "in"),
        ("backbone.layers.0.mixer.out_proj", "out"),
        ("blocks.0.attn.proj", "o"),
        ("model.decoder.layers.0.fc1", "fc1"),
        ("lm_head", "lm_head"),
        ("model.layers.0.block.strange", None),
    ],
)
def test_role_from_name(name: str, role: str | None) -> None:
    assert roles.table_role(name) == role


def test_router_is_told_from_a_gate_projection() -> None:
    assert roles.is_router("model.layers.0.mlp.gate", 64, 8)
    assert not roles.is_router("model.layers.0.mlp.gate", 64, 256)
    assert not roles.is_router("model.layers.0.mlp.gate_proj", 64, 8)


@pytest.mark.parametrize(
    ("index", "readers", "shape", "role"),
    [(0, 3, (8, 8), "q"), (2, 3, (8, 4), "v"), (1, 2, (8, 32), "up"), (0, 1, (8, 24), "qkv"), (0, 1, (32, 8), "down")],
)
def test_role_from_structure(index: int, readers: int, shape: tuple[int, int], role: str) -> None:
    assert roles.structural_role(index, readers, *shape) == role


def test_reference_grammar() -> None:
    targets = parse(" up,zero,0.35, gate,zero,0.35 ,down,kde,0.55 ")
    assert targets == {"up": Target(0.35, "zero"), "gate": Target(0.35, "zero"), "down": Target(0.55, "kde")}
    assert parse("0.5") == parse(0.5) == {"all": Target(0.5)}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("up,zero", "triplets"),
        ("up,zero,0.3,up,zero,0.4", "twice"),
        ("up,nil,0.3", "mode method"),
        ("up,zero,half", "not a number"),
        ("up,zero,1.0", r"\[0, 1\)"),
        ("", "triplets"),
        (1.0, r"\[0, 1\)"),
        (-0.1, r"\[0, 1\)"),
        (float("nan"), r"\[0, 1\)"),
        (True, r"\[0, 1\)"),
        ({}, "empty"),
        ({"up": "much"}, r"\[0, 1\)"),
        (None, r"\[0, 1\)"),
    ],
)
def test_bad_sparsity(spec: object, message: str) -> None:
    with pytest.raises(nncf.ValidationError, match=message):
        parse(spec)  # type: ignore[arg-type]


def test_the_more_specific_selector_wins() -> None:
    sites = llama_block(0) + llama_block(1)
    targets = resolve({"all": 0.3, "ffn": 0.4, "down": 0.5, r"re:layers\.1\.mlp\.down": 0.6}, sites)
    assert targets["model.layers.0.self_attn.q_proj"].sparsity == 0.3
    assert targets["model.layers.0.mlp.up_proj"].sparsity == 0.4
    assert targets["model.layers.0.mlp.down_proj"].sparsity == 0.5
    assert targets["model.layers.1.mlp.down_proj"].sparsity == 0.6


def test_layers_without_a_target_stay_out() -> None:
    assert set(resolve({"up": 0.4}, llama_block())) == {"model.layers.0.mlp.up_proj"}


def test_different_thresholds_on_a_shared_tensor_are_honoured() -> None:
    targets = resolve("up,zero,0.2,gate,zero,0.6", llama_block())
    assert {target.sparsity for target in targets.values()} == {0.2, 0.6}


def test_different_modes_on_a_shared_tensor_are_refused() -> None:
    with pytest.raises(nncf.ValidationError, match="share its mode"):
        resolve("up,zero,0.2,gate,kde,0.2", llama_block())


def test_contradicting_patterns_are_refused() -> None:
    with pytest.raises(nncf.ValidationError, match="different targets"):
        resolve({"re:mlp": 0.2, "re:up_proj": 0.3}, llama_block())


@pytest.mark.parametrize(
    ("selector", "message"),
    [("upp", "is not a role"), ("qkv", "names no layer"), ("re:nothing", "names no layer"), ("re:(", "regular exp")],
)
def test_selector_that_names_nothing(selector: str, message: str) -> None:
    with pytest.raises(nncf.ValidationError, match=message):
        resolve({selector: 0.5}, llama_block())


def test_up_and_down_name_fc1_and_fc2_as_well() -> None:
    layers = [Layer("model.layers.0.fc1", "fc1", 8, 32), Layer("model.layers.0.fc2", "fc2", 32, 8)]
    sites = [Site(layer.name, 0, (layer,)) for layer in layers]
    assert {name: t.sparsity for name, t in resolve({"up": 0.3, "down": 0.5}, sites).items()} == {
        "model.layers.0.fc1": 0.3,
        "model.layers.0.fc2": 0.5,
    }


def test_ignored_scope() -> None:
    layers = [("model.layers.0.mlp.up_proj", "Linear"), ("model.layers.0.mlp.down_proj", "Conv1D")]
    reason = ignored_reason(nncf.IgnoredScope(patterns=[".*up.*"], types=["Conv1D"]), layers)
    assert "pattern" in (reason(layers[0][0]) or "")
    assert "type" in (reason(layers[1][0]) or "")
    assert ignored_reason(None, layers)(layers[0][0]) is None
    with pytest.raises(nncf.ValidationError, match="matches no"):
        ignored_reason(nncf.IgnoredScope(names=["model.layers.9"]), layers)
    ignored_reason(nncf.IgnoredScope(names=["model.layers.9"], validate=False), layers)
    with pytest.raises(nncf.ValidationError, match="regular expression"):
        ignored_reason(nncf.IgnoredScope(patterns=["("]), layers)
    with pytest.raises(nncf.ParameterNotSupportedError, match="subgraphs"):
        ignored_reason(nncf.IgnoredScope(subgraphs=[nncf.Subgraph(inputs=["a"], outputs=["b"])]), layers)
