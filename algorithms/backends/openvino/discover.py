# SPDX-License-Identifier: Apache-2.0
"""Finding the sites of an OpenVINO model: from its graph alone, no sample is run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import nncf

from scap_nncf.algorithms import roles
from scap_nncf.algorithms.backends.openvino.layers import FcLayer, find_layers, ir_of, looks_pruned
from scap_nncf.algorithms.discovery import FoundLayer, make_report
from scap_nncf.algorithms.plan import block_index
from scap_nncf.algorithms.sites import LeftOut, ModelReport

KIND = "MatMul"


def inspect_model(
    model: Any,
    sample: Any = None,
    selected_roles: Sequence[str] | None = None,
    ignored_scope: nncf.IgnoredScope | None = None,
    wanted: Sequence[str] = (),
) -> ModelReport:
    """
    Sites of a model and what stays dense; nothing is changed.

    :param model: an OpenVINO model, or an Optimum-Intel model object that holds one.
    :param sample: not needed here.
    :param selected_roles: only layers named by one of these selectors count.
    :param ignored_scope: layers to leave dense; its types are operation types, here always ``MatMul``.
    :param wanted: selectors that the user wrote; layers outside of blocks, such as ``lm_head``, count only if named.
    :raises nncf.UnsupportedModelError: the model has no FC layer.
    :raises nncf.ValidationError: a selector or scope names nothing, or inputs are pruned already.
    """
    layers, unfit = find_layers(ir_of(model))
    if not layers:
        msg = (
            "The OpenVINO model has no fully connected layer: no MatMul of an activation with constant weights. "
            f"{len(unfit)} products with constants do not fit" + (f", such as {unfit[0]}." if unfit else ".")
        )
        raise nncf.UnsupportedModelError(msg)
    pruned = looks_pruned(layers)
    if pruned:
        msg = (
            f"The inputs of {len(pruned)} layers are pruned in the graph already, such as {pruned[0]}, but the model "
            "carries no plan of scap-nncf. Export the dense model, or use scap_nncf.export_openvino for a sparse one."
        )
        raise nncf.ValidationError(msg)
    tensors = {layer.name: tuple(call.tensor for call in layer.calls) for layer in layers}
    found = [
        FoundLayer(
            layer.name,
            KIND,
            layer.in_features,
            layer.out_features,
            tensor=tensors[layer.name],
            is_head=roles.table_role(layer.name) == "lm_head",
        )
        for layer in sorted(layers, key=_execution_order(layers, tensors))
    ]
    left_out = [LeftOut(item.name, KIND, item.reason) for item in dict.fromkeys(unfit)]
    return make_report("The OpenVINO model", found, selected_roles, ignored_scope, wanted, left_out)


def _execution_order(layers: Sequence[FcLayer], tensors: dict[str, Any]) -> Any:
    """
    Sort key that puts layers into the order in which a PyTorch module runs them, so that sites are named alike.

    A graph has no order among the readers of one tensor, nor among parallel branches: q comes before k and v, gate
    before up, and attention before the feed-forward part. Where a role occurs twice in a block (self and cross
    attention), the block's sites stay in the order of the graph.
    """
    ranks: dict[str, int] = {}
    sites: dict[Any, list[tuple[int, int]]] = {}  # (block, tensor) → position in the graph and rank of each layer
    for index, layer in enumerate(layers):
        role = roles.table_role(layer.name)
        ranks[layer.name] = roles.ROLES.index(role) if role in roles.ROLES else len(roles.ROLES)
        sites.setdefault((block_index(layer.name), tensors[layer.name]), []).append((index, ranks[layer.name]))
    first_of_block: dict[int | None, int] = {}
    ranks_of_block: dict[int | None, list[int]] = {}
    for (block, _), members in sites.items():
        first_of_block.setdefault(block, members[0][0])
        ranks_of_block.setdefault(block, []).extend(rank for _, rank in members)

    def key(layer: FcLayer) -> tuple[int, ...]:
        block = block_index(layer.name)
        members = sites[block, tensors[layer.name]]
        distinct = len(set(ranks_of_block[block])) == len(ranks_of_block[block])
        place = min(rank for _, rank in members) if distinct else 0
        return first_of_block[block], place, members[0][0], ranks[layer.name]

    return key
