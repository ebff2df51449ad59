# SPDX-License-Identifier: Apache-2.0
"""NNCF's ``IgnoredScope`` applied to layer names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import nncf


def ignored_reason(scope: nncf.IgnoredScope | None, layers: Sequence[tuple[str, str]]) -> Callable[[str], str | None]:
    """
    A function that says why a layer is ignored, or None.

    :param scope: names, regular expressions (``re.match``, as in NNCF) and types to ignore.
    :param layers: (name, type) of all layers that could be pruned.
    :raises nncf.ValidationError: a rule matches no layer and ``scope.validate`` is set.
    :raises nncf.ParameterNotSupportedError: the scope has subgraphs.
    """
    if scope is None:
        return lambda _name: None
    if scope.subgraphs:
        msg = "IgnoredScope.subgraphs are not supported by activation sparsity; use names, patterns or types."
        raise nncf.ParameterNotSupportedError(msg)
    reasons: dict[str, str] = {}
    unmatched: list[str] = []
    patterns = [(text, _compile(text)) for text in scope.patterns]
    rules = [
        *((f"name {given!r}", [name for name, _ in layers if name == given]) for given in scope.names),
        *((f"pattern {text!r}", [name for name, _ in layers if rule.match(name)]) for text, rule in patterns),
        *((f"type {given!r}", [name for name, kind in layers if kind == given]) for given in scope.types),
    ]
    for rule, hits in rules:
        reasons.update(dict.fromkeys(hits, f"ignored by {rule}"))
        if not hits:
            unmatched.append(rule)
    if unmatched and scope.validate:
        msg = (
            f"IgnoredScope matches no fully connected layer: {', '.join(unmatched)}. "
            "List the layers with scap_nncf.inspect_model(model), or pass validate=False."
        )
        raise nncf.ValidationError(msg)
    return reasons.get


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        msg = f"IgnoredScope pattern {pattern!r} is not a valid regular expression: {error}."
        raise nncf.ValidationError(msg) from error
