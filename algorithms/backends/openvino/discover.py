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
    left_out = [LeftOut(item.name, KIND, item.reason) for item in unfit]
    return make_report("The OpenVINO model", found, selected_roles, ignored_scope, wanted, left_out)


def _execution_order(layers: Sequence[FcLayer], tensors: dict[str, Any]) -> Any:
    """
    Sort key: sites as they come in the graph; inside a site q before k before v, and gate before up. A graph has no
    order among readers of one tensor, while a PyTorch module has: this makes both name their sites alike.
    """
    first: dict[Any, int] = {}
    for index, layer in enumerate(layers):
        first.setdefault((block_index(layer.name), tensors[layer.name]), index)

    def key(layer: FcLayer) -> tuple[int, int]:
        role = roles.table_role(layer.name)
        rank = roles.ROLES.index(role) if role in roles.ROLES else len(roles.ROLES)
        return first[(block_index(layer.name), tensors[layer.name])], rank

    return key
