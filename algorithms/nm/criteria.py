# SPDX-License-Identifier: Apache-2.0
"""
How channels are ranked: a factor of each input channel's magnitude, fixed before the model runs.

The published code takes CLACT's column norms from the batch at hand, so that a token's result depends on its neighbours
and on the batch; here they come from the calibration data.
"""

from __future__ import annotations

import torch

#: Shares of the weights below and above which Amber-Pruner clips.
_CLIP = (0.005, 0.995)


def clact(mean_square: torch.Tensor) -> torch.Tensor:
    """
    CLACT: ``|x_it| · ‖X_:t‖₂ / ‖x_i‖₂``; the token's own norm is the same for all its channels and ranks nothing.

    :param mean_square: of each channel over the calibration data, [IC].
    :return: [IC], mean 1.
    """
    return _normalised(mean_square.double().sqrt())


def wina(weight: torch.Tensor) -> torch.Tensor:
    """
    WINA (arXiv 2505.19427): the norm of the weights that a channel is multiplied with.

    :param weight: [IC, OC].
    :return: [IC], mean 1.
    """
    return _normalised(weight.double().norm(dim=1))


def amber(weight: torch.Tensor) -> torch.Tensor:
    """
    Amber-Pruner (arXiv 2508.02128): as :func:`wina`, of weights that are clipped at their 0.5 % and 99.5 % quantiles
    and standardised.

    :param weight: [IC, OC].
    :return: [IC], mean 1.
    """
    values = weight.double().flatten()
    low, high = (float(values.kthvalue(1 + round(share * (values.numel() - 1))).values) for share in _CLIP)
    clipped = weight.double().clamp(low, high)
    spread = float(clipped.std(correction=0))
    norms = ((clipped - clipped.mean()) / spread if spread > 0 else clipped).norm(dim=1)
    return _normalised(norms)


def _normalised(norms: torch.Tensor) -> torch.Tensor:
    """Only ratios rank; a channel without weights or activations ranks last."""
    mean = norms.mean()
    return (norms / mean if float(mean) > 0 else torch.ones_like(norms)).float()
