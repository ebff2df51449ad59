# SPDX-License-Identifier: Apache-2.0
"""
Plain torch definitions of every sparse operation: what the kernels are tested against and what runs on a CPU.

They work in any floating dtype, float64 included, and say nothing about speed.
"""

from .activation import ACTIVATIONS, activate
from .fc import fuse_bias, sparse_fc
from .gated_up import gated_up, open_gate
from .glu import sparse_glu
from .prune import prune

__all__ = ["ACTIVATIONS", "activate", "fuse_bias", "gated_up", "open_gate", "prune", "sparse_fc", "sparse_glu"]
