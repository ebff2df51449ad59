# SPDX-License-Identifier: Apache-2.0
"""Settings of N:M activation sparsity, as data."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nncf

from scap_nncf.algorithms.mitigation.config import Mitigation, as_mitigation
from scap_nncf.algorithms.plan import check_pattern, check_prune

CRITERIA = ("act", "clact", "amber", "wina")


@dataclass(frozen=True)
class Nm:
    """
    N:M activation sparsity (arXiv 2509.22166): of each M neighbouring input channels of a layer, the N that rank
    highest are kept, token by token. Of equals the lower channel is kept.

    .. code-block:: python

        nncf.compress(model, algorithm="nm", pattern="8:16")  # magnitudes alone need no data
        nncf.compress(model, algorithm=Nm({"ffn": "8:16", "attn": 0.5}, mitigation="var+l-pts"), dataset=dataset)

    :param pattern: ``"N:M"``; or a number in (0, 1), the share of the token's channels that is dropped wherever they
        are (top-k of the token); or a mapping of roles, groups (``attn``, ``ffn``, ``all``) or ``re:`` patterns to
        these, which leaves other layers dense. M must divide the width of every layer: others are to be left out with
        `ignored_scope` or by the mapping.
    :param criterion: how channels are ranked: ``act`` by magnitude; ``clact`` by magnitude times the channel's root
        mean square over the calibration data; ``amber`` (Amber-Pruner) and ``wina`` by magnitude times the norm of the
        channel's weights, with outliers of the weights clipped and the rest standardised, or as they are.
    :param mitigation: error mitigation: a :class:`Mitigation`, or the paper's names such as ``"var+l-pts"``.
    :param prune: ``all`` prunes every token; ``decode`` leaves prompts dense and prunes tokens that come alone.
    :param roles: only layers that this selector, or one of these, names may be pruned.
    :param ignored_scope: layers to leave dense, by module name, regular expression or class name.
    :param subset_size: at most this many samples of the dataset are used; None uses all.
    """

    pattern: Any = "8:16"
    criterion: str = "act"
    mitigation: Mitigation | str | None = None
    prune: str = "all"
    roles: str | Sequence[str] | None = None
    ignored_scope: nncf.IgnoredScope | None = None
    subset_size: int | None = 128

    def __post_init__(self) -> None:
        if isinstance(self.roles, str):
            object.__setattr__(self, "roles", (self.roles,))
        parse_patterns(self.pattern)
        if self.criterion not in CRITERIA:
            msg = f"criterion must be one of {', '.join(CRITERIA)}, got {self.criterion!r}."
            raise nncf.ValidationError(msg)
        as_mitigation(self.mitigation)
        check_prune(self.prune)
        size = self.subset_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            msg = f"subset_size must be a whole number from 1 or None, got {size!r}."
            raise nncf.ValidationError(msg)

    @property
    def needs_data(self) -> bool:
        """Whether anything is measured or learned."""
        mitigation = as_mitigation(self.mitigation)
        return self.criterion == "clact" or (
            mitigation is not None and (mitigation.learns or mitigation.shift == "static")
        )


@dataclass(frozen=True)
class Pattern:
    """(N, M), or the share that is dropped where `groups` is None."""

    groups: tuple[int, int] | None
    sparsity: float

    def of_width(self, width: int) -> tuple[int, int] | None:
        """
        (N, M) for a layer of this width; None where M does not divide it, or where no value or every value would be
        dropped.
        """
        if self.groups is not None:
            return self.groups if width % self.groups[1] == 0 else None
        kept = width - round(self.sparsity * width)
        return (kept, width) if 0 < kept < width else None


def parse_patterns(spec: Any) -> dict[str, Pattern]:
    """
    Selector → pattern.

    :raises nncf.ValidationError: the specification cannot be read.
    """
    if isinstance(spec, Mapping):
        if not spec:
            msg = "The mapping of patterns is empty; expected for example {'ffn': '8:16'}."
            raise nncf.ValidationError(msg)
        return {str(selector): _pattern(value) for selector, value in spec.items()}
    return {"all": _pattern(spec)}


def _pattern(value: Any) -> Pattern:
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", value)
        if match is not None:
            value = (int(match.group(1)), int(match.group(2)))
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(type(number) is int for number in value):
        n, m = check_pattern(*value)
        return Pattern((n, m), 1 - n / m)
    if isinstance(value, float) and math.isfinite(value) and 0 < value < 1:
        return Pattern(None, value)
    hint = " In YAML write it in quotes, or it is read as a number of minutes." if type(value) is int else ""
    msg = f"Expected a pattern such as '8:16', or a number in (0, 1) of channels to drop, got {value!r}.{hint}"
    raise nncf.ValidationError(msg)
