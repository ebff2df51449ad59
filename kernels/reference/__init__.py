# SPDX-License-Identifier: Apache-2.0
"""
Plain torch definitions of every sparse operation: what the kernels are tested against and what runs on a CPU.

They work in any floating dtype, float64 included, and say nothing about speed.
"""

from .activation import ACTIVATIONS, activate
from .fc import fuse_bias, sparse_fc
from .gated_up import gated_up, open_gate
from .glu import sparse_glu
from .mitigation import mitigated_fc, token_shift, variance_factor
from .prune import prune
from .topk_nm import keep_nm, prune_nm

__all__ = [
    "ACTIVATIONS",
    "activate",
    "fuse_bias",
    "gated_up",
    "keep_nm",
    "mitigated_fc",
    "open_gate",
    "prune",
    "prune_nm",
    "sparse_fc",
    "sparse_glu",
    "token_shift",
    "variance_factor",
]
