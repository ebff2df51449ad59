# SPDX-License-Identifier: Apache-2.0
"""
From fully connected layers to sites: grouping, roles, and what is left dense.

Backends find the layers and say which tensor each one reads; what follows is the same for all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import nncf

from scap_nncf.algorithms import roles
from scap_nncf.algorithms.plan import block_index
from scap_nncf.algorithms.scope import ignored_reason
from scap_nncf.algorithms.sites import Layer, LeftOut, ModelReport, Site, expert_pool


@dataclass(frozen=True)
class FoundLayer:
    """
    A fully connected (FC) layer as a backend found it.

    :param kind: what an ``IgnoredScope`` calls its type: class name (torch) or operation type (OpenVINO).
    :param tensor: identifies the activation that the layer reads; equal for layers that read the same one.
    :param is_head: True for the output embedding.
    """

    name: str
    kind: str
    in_features: int
    out_features: int
    tensor: Hashable
    is_head: bool = False


def make_report(
    model_name: str,
    found: Sequence[FoundLayer],
    selected_roles: Sequence[str] | None = None,
    ignored_scope: nncf.IgnoredScope | None = None,
    wanted: Sequence[str] = (),
    left_out: Sequence[LeftOut] = (),
) -> ModelReport:
    """
    Sites of a model and what stays dense. Layers of one block that read the same tensor form one site.

    :param model_name: how to name the model in messages.
    :param found: all FC layers that run, in the order of execution.
    :param selected_roles: only layers named by one of these selectors count.
    :param ignored_scope: layers to leave dense.
    :param wanted: selectors that the user wrote; layers outside of blocks, such as ``lm_head``, count only if
        named here or in `selected_roles` by their role or a ``re:`` pattern.
    :param left_out: what the backend has left out already.
    :raises nncf.ValidationError: a selector or scope names nothing, or nothing is left to prune.
    """
    out = list(left_out)
    kinds = {layer.name: layer.kind for layer in found}
    sites = _group(found, out)
    in_blocks = any(block_index(name) is not None for name in [*kinds, *(item.name for item in left_out)])

    explicit = [*wanted, *(selected_roles or ())]
    layers = [layer for site in sites for layer in site.layers]
    roles.check_selectors(selected_roles or (), layers)
    ignored = ignored_reason(ignored_scope, [(layer.name, kinds[layer.name]) for layer in layers])
    result = []
    for site in sites:
        chosen = []
        for layer in site.layers:
            reason = ignored(layer.name)
            if reason is None and (layer.role == "lm_head" or (in_blocks and site.block is None)):
                named = any(s == layer.role or (s.startswith("re:") and roles.matches(s, layer)) for s in explicit)
                reason = None if named else "outside of the blocks; name it to include it"
            if reason is None and selected_roles is not None:
                selected = any(roles.matches(selector, layer) for selector in selected_roles)
                reason = None if selected else f"role {layer.role} not selected"
            if reason is None:
                chosen.append(layer)
            else:
                out.append(LeftOut(layer.name, kinds[layer.name], reason))
        if chosen:
            result.append(Site(chosen[0].name, site.block, tuple(chosen)))
    if not result:
        reasons = Counter(item.reason for item in out)
        why = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        msg = f"No fully connected layer of {model_name} is left to prune: {why}."
        raise nncf.ValidationError(msg)
    return ModelReport(tuple(result), tuple(out))


def _group(found: Sequence[FoundLayer], left_out: list[LeftOut]) -> list[Site]:
    """All sites, with their roles; routers are added to `left_out`."""
    grouped: dict[tuple[Hashable, ...], list[FoundLayer]] = {}
    for layer in found:
        grouped.setdefault((block_index(layer.name), layer.tensor), []).append(layer)
    sites = []
    for members in grouped.values():
        kept = []
        for layer in members:
            if roles.is_router(layer.name, layer.in_features, layer.out_features):
                left_out.append(LeftOut(layer.name, layer.kind, "router: decides which expert runs"))
            else:
                kept.append(layer)
        layers = tuple(
            Layer(layer.name, _role(layer, index, len(kept)), layer.in_features, layer.out_features)
            for index, layer in enumerate(kept)
        )
        if layers:
            sites.append(Site(layers[0].name, block_index(layers[0].name), layers))
    return sites


def _role(layer: FoundLayer, index: int, readers: int) -> str:
    if layer.is_head:
        return "lm_head"
    shape = (layer.in_features, layer.out_features)
    role = roles.table_role(layer.name)
    if role is None:
        role = roles.structural_role(index, readers, *shape)
        role = role if expert_pool(layer.name) is None else roles.expert_role(role)
    return role
