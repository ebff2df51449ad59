# SPDX-License-Identifier: Apache-2.0
"""The ways to say how sparse: one number, a mapping of selectors, or the reference implementation's grammar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real

import nncf

from scap_nncf.algorithms import roles
from scap_nncf.algorithms.sites import Site

MODE_METHODS = ("auto", "zero", "mean", "median", "kde")


@dataclass(frozen=True)
class Target:
    """
    What is asked of a layer.

    :param mode_method: how its mode is found; None means the algorithm's setting.
    :param selector: which part of the specification asked; an allocation keeps the total of each part.
    """

    sparsity: float
    mode_method: str | None = None
    selector: str = "all"


SparsitySpec = float | str | Mapping[str, float]


def parse(spec: SparsitySpec) -> dict[str, Target]:
    """
    A sparsity specification as selector → target.

    :param spec: a number in [0, 1) for every layer; a mapping of selectors (roles, groups or ``re:`` patterns) to
        numbers; or ``layer_type,mode_method,sparsity`` triplets joined by commas, such as
        ``up,zero,0.35,gate,zero,0.35,down,zero,0.55`` (the grammar of the SCAP reference implementation).
    :raises nncf.ValidationError: the specification cannot be read or a number is outside [0, 1).
    """
    if isinstance(spec, str):
        try:
            return {"all": Target(check_sparsity(float(spec)))}
        except ValueError:
            return _parse_grammar(spec)
    if isinstance(spec, Mapping):
        if not spec:
            msg = "The sparsity mapping is empty; expected for example {'up': 0.4, 'gate': 0.4, 'down': 0.6}."
            raise nncf.ValidationError(msg)
        return {str(selector): Target(check_sparsity(value, str(selector))) for selector, value in spec.items()}
    return {"all": Target(check_sparsity(spec))}


def is_one_number(spec: SparsitySpec) -> bool:
    """Whether the specification is one number for all layers, which leaves open how it is spread over them."""
    if isinstance(spec, str):
        try:
            float(spec)
        except ValueError:
            return False
        return True
    return not isinstance(spec, Mapping)


def check_sparsity(value: object, where: str = "sparsity") -> float:
    """
    :raises nncf.ValidationError: `value` is not a number in [0, 1).
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < 1:
        msg = f"Expected a number in [0, 1) for {where}, got {value!r}."
        raise nncf.ValidationError(msg)
    return float(value)


def _parse_grammar(spec: str) -> dict[str, Target]:
    fields = [part.strip() for part in spec.split(",")]
    form = "expected layer_type,mode_method,sparsity triplets such as 'up,zero,0.35,gate,zero,0.35,down,zero,0.55'"
    if len(fields) % 3 or not all(fields):
        msg = f"Cannot read the sparsity {spec!r}: {form}."
        raise nncf.ValidationError(msg)
    targets: dict[str, Target] = {}
    for selector, method, value in zip(fields[::3], fields[1::3], fields[2::3]):
        if method not in MODE_METHODS:
            msg = f"Unknown mode method {method!r} in {spec!r}; expected one of {', '.join(MODE_METHODS)}."
            raise nncf.ValidationError(msg)
        if selector in targets:
            msg = f"{selector!r} is given twice in {spec!r}."
            raise nncf.ValidationError(msg)
        try:
            number = float(value)
        except ValueError:
            msg = f"{value!r} in {spec!r} is not a number: {form}."
            raise nncf.ValidationError(msg) from None
        targets[selector] = Target(check_sparsity(number, selector), method)
    return targets


def resolve(spec: SparsitySpec, sites: Sequence[Site]) -> dict[str, Target]:
    """
    Layer name → target for every layer that the specification names. Where several selectors name a layer, the more
    specific one counts: pattern, role, group, ``all``.

    :raises nncf.ValidationError: a selector names nothing, two equally specific selectors disagree, or two layers of
        one site ask for different mode methods (η belongs to the shared tensor; thresholds may differ).
    """
    targets = parse(spec)
    layers = [layer for site in sites for layer in site.layers]
    roles.check_selectors(targets, layers)
    resolved: dict[str, Target] = {}
    for layer in layers:
        found = [(roles.rank(selector), selector) for selector in targets if roles.matches(selector, layer)]
        if not found:
            continue
        best = max(rank for rank, _ in found)
        names = [selector for rank, selector in found if rank == best]
        # 'fc1' is more exact than its alias 'up'
        names = [name for name in names if name == layer.role] or names
        if len({targets[name] for name in names}) > 1:
            msg = f"Layer {layer.name} is named by {' and '.join(map(repr, names))} with different targets."
            raise nncf.ValidationError(msg)
        resolved[layer.name] = replace(targets[names[0]], selector=names[0])
    for site in sites:
        methods = {resolved[layer.name].mode_method for layer in site.layers if layer.name in resolved}
        if len(methods) > 1:
            msg = (
                f"The layers {', '.join(layer.name for layer in site.layers)} read the same tensor and share its mode, "
                f"but different mode methods were asked for: {', '.join(sorted(map(str, methods)))}."
            )
            raise nncf.ValidationError(msg)
    return resolved
