# SPDX-License-Identifier: Apache-2.0
"""Settings of error mitigation, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import nncf

SHIFTS = ("none", "static", "token", "learned")
STATISTICS = ("median", "mean")
#: Rank of the residual where it is asked for by name alone.
DEFAULT_RANK = 16

_NAMES: dict[str, dict[str, Any]] = {
    "none": {},
    "s-pts": {"shift": "static"},
    "d-pts": {"shift": "token"},
    "l-pts": {"shift": "learned"},
    "var": {"variance": True},
    "ls": {"scaling": True},
    "r-sparse": {"low_rank": DEFAULT_RANK},
}


@dataclass(frozen=True)
class Mitigation:
    """
    Error mitigation of pruned activations (arXiv 2509.22166, section 3; R-Sparse, arXiv 2504.19449). Parts combine;
    :func:`scap_nncf.kernels.reference.mitigated_fc` is the definition.

    .. code-block:: python

        nncf.compress(model, algorithm=Nm("8:16", mitigation=Mitigation(shift="learned", variance=True)), dataset=data)
        nncf.compress(model, algorithm="nm", pattern="8:16", mitigation="var+l-pts", dataset=data)  # the same

    :param shift: what is subtracted before values are dropped, and given back behind the layer: ``none``; ``static``
        (S-PTS), one number for the site, which is SCAP's mode centring; ``token`` (D-PTS), the token's own median or
        mean; ``learned`` (L-PTS), a number for each channel of the site.
    :param statistic: ``median`` or ``mean``, for the shifts ``static`` and ``token``.
    :param variance: scale the kept values so that their variance over the token's channels is what it was (VAR).
    :param scaling: learn a factor 1 + γ for each output channel (LS).
    :param low_rank: rank of the residual ``(dropped part)·A·B`` with A·B the best approximation of the weights of that
        rank (R-Sparse); 0 for none. It costs rank·(IC + OC) weights a layer.
    :param learning_rate: of AdamW, with shifts in units of the channel's root mean square.
    :param epochs: at most this many passes over the data.
    :param patience: a site stops learning after this many epochs without a better loss on held-out samples.
    """

    shift: str = "none"
    statistic: str = "median"
    variance: bool = False
    scaling: bool = False
    low_rank: int = 0
    learning_rate: float = 1e-2
    epochs: int = 4
    patience: int = 1

    def __post_init__(self) -> None:
        for name, value, known in (("shift", self.shift, SHIFTS), ("statistic", self.statistic, STATISTICS)):
            if value not in known:
                msg = f"{name} must be one of {', '.join(known)}, got {value!r}."
                raise nncf.ValidationError(msg)
        for name, least in (("low_rank", 0), ("epochs", 1), ("patience", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                msg = f"{name} must be a whole number from {least}, got {value!r}."
                raise nncf.ValidationError(msg)
        rate = self.learning_rate
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not math.isfinite(rate) or rate <= 0:
            msg = f"learning_rate must be a positive number, got {rate!r}."
            raise nncf.ValidationError(msg)
        for name in ("variance", "scaling"):
            if not isinstance(getattr(self, name), bool):
                msg = f"{name} must be True or False, got {getattr(self, name)!r}."
                raise nncf.ValidationError(msg)

    @property
    def learns(self) -> bool:
        """Whether anything is trained, which takes data and gradients."""
        return self.shift == "learned" or self.scaling


def as_mitigation(value: Mitigation | str | None) -> Mitigation | None:
    """
    :param value: a configuration; the paper's names joined by ``+``, such as ``var+l-pts``; or None.
    :return: None where nothing is to be done.
    :raises nncf.ValidationError: an unknown name, or two kinds of shift.
    """
    if isinstance(value, str):
        names = [name.strip().lower() for name in value.split("+")]
        unknown = [name for name in names if name not in _NAMES]
        if unknown:
            msg = f"Unknown error mitigation {', '.join(map(repr, unknown))}; there are {', '.join(_NAMES)}."
            raise nncf.ValidationError(msg)
        if len([name for name in names if "shift" in _NAMES[name]]) > 1:
            msg = f"{value!r} names several shifts, of which one can be used."
            raise nncf.ValidationError(msg)
        value = Mitigation(**{key: setting for name in names for key, setting in _NAMES[name].items()})
    if value is not None and not isinstance(value, Mitigation):
        msg = f"mitigation must be a Mitigation, its names such as 'var+l-pts', or None; got {type(value).__name__}."
        raise nncf.ValidationError(msg)
    return None if value == Mitigation() else value
