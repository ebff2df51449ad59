# SPDX-License-Identifier: Apache-2.0
"""
Roles of fully connected layers, and the selectors users write to name them.

A role is found from the module name by a table; where the name says nothing, from the layer's position and shape in
its block (``structural_role``), so that an unknown family still works.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import nncf

from scap_nncf.algorithms.sites import Layer, expert_pool

#: Layers of a mixture-of-experts block's experts.
EXPERT_ROLES = ("experts.gate", "experts.up", "experts.gate_up", "experts.down")
_FFN_ROLES = ("gate", "up", "gate_up", "down", "fc1", "fc2", *EXPERT_ROLES)
ROLES = ("q", "k", "v", "qkv", "o", "in", "out", *_FFN_ROLES, "lm_head")

GROUPS: dict[str, tuple[str, ...]] = {
    "attn": ("q", "k", "v", "qkv", "o"),
    "ffn": _FFN_ROLES,
    "experts": EXPERT_ROLES,
    "all": tuple(role for role in ROLES if role != "lm_head"),
    # the paper speaks of up and down also where a family calls them fc1 and fc2
    "up": ("up", "fc1", "experts.up"),
    "down": ("down", "fc2", "experts.down"),
    "gate": ("gate", "experts.gate"),
    "gate_up": ("gate_up", "experts.gate_up"),
}

# (pattern on the dotted module name, role). The first match wins.
_ROLE_TABLE: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(rf"(?:^|\.){pattern}$"), role)
    for pattern, role in (
        (r"lm_head|embed_out|output_projection", "lm_head"),
        (r"(?:q_proj|query|q_lin|wq)", "q"),
        (r"(?:k_proj|key|k_lin|wk)", "k"),
        (r"(?:v_proj|value|v_lin|wv)", "v"),
        (r"(?:qkv_proj|query_key_value|c_attn|Wqkv|qkv)", "qkv"),
        (r"(?:SelfAttention|EncDecAttention)\.(?:q)", "q"),
        (r"(?:SelfAttention|EncDecAttention)\.(?:k)", "k"),
        (r"(?:SelfAttention|EncDecAttention)\.(?:v)", "v"),
        (r"(?:SelfAttention|EncDecAttention)\.(?:o)", "o"),
        (r"(?:mixer|mamba|ssm)\.in_proj", "in"),
        (r"(?:mixer|mamba|ssm)\.out_proj", "out"),
        # latent attention (DeepSeek): down to the latent and up from it
        (r"(?:q_a_proj|q_b_proj)", "q"),
        (r"kv_a_proj_with_mqa", "k"),
        (r"kv_b_proj", "v"),
        (r"(?:o_proj|out_proj|out_lin)", "o"),
        (r"(?:attn|attention|self_attention)\.(?:c_proj|proj|dense|wo)", "o"),
        (r"(?:attention|attn|crossattention)\.output\.dense", "o"),
        (r"(?:gate_up_proj|gate_and_up_proj)", "gate_up"),
        (r"(?:gate_proj|w1|wi_0)", "gate"),
        (r"(?:up_proj|w3|wi_1|c_fc|dense_h_to_4h|fc_in|wi|lin1|intermediate\.dense)", "up"),
        (r"(?:down_proj|w2|dense_4h_to_h|fc_out|wo|lin2)", "down"),
        (r"(?:mlp|ffn|feed_forward)\.c_proj", "down"),
        (r"output\.dense", "down"),
        (r"fc1", "fc1"),
        (r"fc2", "fc2"),
    )
)

# A router decides which expert runs; pruning its input changes the path, not only the value.
_ROUTER = re.compile(r"(?:^|\.)(?:router(?:\.\w+)*|gate|shared_expert_gate)$")


def is_router(name: str, in_features: int, out_features: int) -> bool:
    """
    Whether a layer is a mixture-of-experts router, which is never pruned: by its name, and because it has fewer
    outputs (experts) than inputs, unlike the gate of a gated FFN.
    """
    return out_features < in_features and _ROUTER.search(name) is not None


def table_role(name: str) -> str | None:
    """The role that the module name says, or None."""
    role = next((role for pattern, role in _ROLE_TABLE if pattern.search(name)), None)
    return role if role is None or expert_pool(name) is None else expert_role(role)


def expert_role(role: str) -> str:
    """The role of an expert's layer, from what it would be in a plain feed-forward."""
    role = {"fc1": "up", "fc2": "down"}.get(role, role)
    return f"experts.{role}" if f"experts.{role}" in EXPERT_ROLES else role


def structural_role(index: int, readers: int, in_features: int, out_features: int) -> str:
    """
    The role of a layer whose name is not in the table, from its place and shape.

    Three layers on one tensor are q, k, v and two are gate and up, in their order. A layer alone on its tensor is
    ``qkv`` where it is three times as wide as its input, ``up`` where it widens, ``down`` where it narrows and ``o``
    where it is square.

    :param index: position among the layers that read the same tensor.
    :param readers: how many layers read it.
    """
    if readers == 3:
        return ("q", "k", "v")[index]
    if readers == 2:
        return ("gate", "up")[index]
    if out_features == 3 * in_features:
        return "qkv"
    if out_features == in_features:
        return "o"
    return "up" if out_features > in_features else "down"


def matches(selector: str, layer: Layer) -> bool:
    """
    Whether a selector names a layer.

    :param selector: a role, a group (``attn``, ``ffn``, ``experts``, ``all``), or ``re:`` and a regular expression
        that is searched in the layer's name.
    """
    if selector.startswith("re:"):
        return _pattern(selector).search(layer.name) is not None
    return layer.role in GROUPS.get(selector, (selector,))


def rank(selector: str) -> int:
    """How specific a selector is: a pattern beats a role, a role beats a group, a group beats ``all``."""
    if selector.startswith("re:"):
        return 4
    return {"all": 0, "attn": 1, "ffn": 1, "experts": 2}.get(selector, 3)


def check_selectors(selectors: Iterable[str], layers: Sequence[Layer]) -> None:
    """
    :raises nncf.ValidationError: a selector is unknown or names no layer of the model.
    """
    present = sorted({layer.role for layer in layers})
    for selector in selectors:
        if selector.startswith("re:"):
            known = True
            _pattern(selector)
        else:
            known = selector in ROLES or selector in GROUPS
        if any(matches(selector, layer) for layer in layers):
            continue
        why = "names no layer of this model" if known else "is not a role"
        msg = (
            f"{selector!r} {why}. Roles in this model: {', '.join(present) or 'none'}; groups: attn, ffn, "
            "experts, all; or write 're:' and a regular expression on the layer name."
        )
        raise nncf.ValidationError(msg)


def _pattern(selector: str) -> re.Pattern[str]:
    try:
        return re.compile(selector[3:])
    except re.error as error:
        msg = f"{selector!r} is not a valid regular expression: {error}."
        raise nncf.ValidationError(msg) from error
