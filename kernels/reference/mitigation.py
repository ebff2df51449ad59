# SPDX-License-Identifier: Apache-2.0
"""
A pruned fully connected layer with error mitigation: the definition (arXiv 2509.22166, section 3; R-Sparse).

::

    u = x − η − μ                    η static shift, μ the token's own mean or median
    z = u where it is kept, else 0   by a threshold on |u|, or N:M
    y = (1 + γ) ∘ ( ν·z·W + (u − z)·A·B + (η + μ)·W ) + b

ν = √(Var u / Var z) over the token's channels. Without any of these it is ``z·W + b``.
"""

from __future__ import annotations

import torch

from .fc import accumulation_dtype
from .prune import prune
from .topk_nm import prune_nm


def token_shift(u: torch.Tensor, kind: str) -> torch.Tensor:
    """
    The shift μ of each token.

    :param u: [..., K].
    :param kind: ``mean``, or ``median`` (of an even number the lower one).
    :return: [..., 1].
    """
    if kind == "mean":
        return u.mean(-1, keepdim=True)
    if kind == "median":
        return u.median(-1, keepdim=True).values
    raise ValueError(f"unknown token shift {kind!r}")


def variance_factor(u: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """
    ν = √(Var u / Var z) over the channels of each token; 1 where z does not vary.

    :param u: [..., K] before, `z` after pruning.
    :return: [..., 1].
    """
    before = u.var(-1, correction=0, keepdim=True)
    after = z.var(-1, correction=0, keepdim=True)
    usable = after > 0
    return torch.where(usable, before / torch.where(usable, after, torch.ones_like(after)), 1.0).sqrt()


def mitigated_fc(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    threshold: float = -1.0,
    pattern: tuple[int, int] | None = None,
    score: torch.Tensor | None = None,
    shift: torch.Tensor | float = 0.0,
    token: str | None = None,
    variance: bool = False,
    scale: torch.Tensor | None = None,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    :param x: [..., K].
    :param weight: [K, N], input-channel-major.
    :param threshold: τ; used where there is no pattern.
    :param pattern: (N, M), see :func:`scap_nncf.kernels.reference.topk_nm.keep_nm`.
    :param score: [K], what magnitudes are multiplied with before they are ranked or compared with the threshold.
    :param shift: η, a number or [K].
    :param token: kind of μ, see :func:`token_shift`.
    :param variance: whether ν is applied.
    :param scale: γ [N].
    :param low_rank: A [K, r] and B [r, N].
    :param bias: b [N], never scaled.
    :return: [..., N] in the dtype of `x`; computed in float32 (float64 for float64).
    """
    wide = accumulation_dtype(x.dtype)
    w = weight.to(wide)
    u = x.to(wide) - shift
    mu = token_shift(u, token) if token is not None else None
    if mu is not None:
        u = u - mu
    if pattern is not None:
        z = prune_nm(u, *pattern, score)
    elif score is not None:
        z = torch.where((u * score.to(wide)).abs() <= threshold, torch.zeros_like(u), u)
    else:
        z = prune(u, 0.0, threshold)
    factor = variance_factor(u, z) if variance else 1.0
    y = (z * factor) @ w
    if low_rank is not None:
        a, b = low_rank
        y = y + ((u - z) @ a.to(wide)) @ b.to(wide)
    y = y + torch.as_tensor(shift, dtype=wide).expand(w.shape[0]) @ w
    if mu is not None:
        y = y + mu * w.sum(0)
    if scale is not None:
        y = y * (1 + scale.to(wide))
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(x.dtype)
