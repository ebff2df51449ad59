# SPDX-License-Identifier: Apache-2.0
"""A kernel that only reads: the bandwidth that no other kernel can beat, measured beside them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def read_kernel(ptr, out_ptr, total, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Add up int32 words; the sum is stored only in a case that does not happen, so nothing is written."""
    at = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS) + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.int32)
    for i in tl.static_range(STEPS):
        acc += tl.load(ptr + at + i * BLOCK, mask=at + i * BLOCK < total, other=0, eviction_policy="evict_first")
    value = tl.sum(acc, 0)
    if value == 123456789:
        tl.store(out_ptr, value)


def launch_read(words: torch.Tensor, out: torch.Tensor) -> None:
    """
    :param words: int32, contiguous; read once.
    :param out: one int32.
    """
    read_kernel[(triton.cdiv(words.numel(), 4096),)](words, out, words.numel(), BLOCK=1024, STEPS=4, num_warps=8)
