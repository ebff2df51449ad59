# SPDX-License-Identifier: Apache-2.0
"""
Device code shared by the sparse kernels: which weight rows to read, and how partial sums meet.

Rows. A program first writes a list of the channels it keeps, then walks the list. So a dropped input costs neither a
load nor a register, every load in flight is one that counts, and the groups of warps of a program have equally much to
do whatever the mask. (A masked tile wins nothing from 50 % sparsity on: its slots are mostly empty.)

Sums. Each program writes a partial sum to a workspace; the one that arrives last at a strip of columns adds the
partials up in a fixed order, which makes the result the same in every run, and applies bias, residual, activation and
the cast. One launch does it all, and the ticket counter is zero again when it ends.
"""

from __future__ import annotations

import triton
import triton.language as tl

try:  # programmatic dependent launch, from Triton 3.4 on
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # an older Triton; the launch option is then never set
    gdc_launch_dependents = gdc_wait = None


@triton.jit
def follow_producer(PDL: tl.constexpr):
    """
    Before the first read: with a programmatic launch the kernel before this one may still be running. From then on the
    next kernel may be placed on the chip, to wait there in its turn. (Never before the wait: a queue of waiting kernels
    would take the place of the one that works.)
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def kept(z, threshold, inside):
    """Whether an input is read: NaN is kept, a channel outside of the tensor is not."""
    return (~(tl.abs(z) <= threshold)) & inside


@triton.jit
def write_list(list_ptr, keep, entries):
    """Append the kept entries [ROWS] in order; the number of them. Every thread may read the list afterwards."""
    position = tl.cumsum(keep.to(tl.int32), 0)
    tl.store(list_ptr + position - 1, entries, mask=keep)
    count = tl.sum(keep.to(tl.int32), 0)
    tl.debug_barrier()
    return count


@triton.jit
def pack(k, z):
    """Channel and value in one int64, so that one load brings both."""
    return (k.to(tl.int64) << 32) | z.to(tl.int32, bitcast=True).to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def unpack_value(entry):
    """The float32 half of a packed entry; the channel is ``entry >> 32``."""
    return entry.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def segment_of(
    strip, n0, n1, n2, n3, t0, t1, t2, t3, SEGMENTS: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """First column, end column and threshold of a strip of BLOCK_N columns; strips never cross a segment."""
    first = strip * BLOCK_N
    end = n0
    threshold = t0
    if SEGMENTS > 1:
        s1 = tl.cdiv(n0, BLOCK_N)
        later = strip >= s1
        first = tl.where(later, n0 + (strip - s1) * BLOCK_N, first)
        end = tl.where(later, n0 + n1, end)
        threshold = tl.where(later, t1, threshold)
        if SEGMENTS > 2:
            s2 = s1 + tl.cdiv(n1, BLOCK_N)
            later = strip >= s2
            first = tl.where(later, n0 + n1 + (strip - s2) * BLOCK_N, first)
            end = tl.where(later, n0 + n1 + n2, end)
            threshold = tl.where(later, t2, threshold)
            if SEGMENTS > 3:
                s3 = s2 + tl.cdiv(n2, BLOCK_N)
                later = strip >= s3
                first = tl.where(later, n0 + n1 + n2 + (strip - s3) * BLOCK_N, first)
                end = tl.where(later, n0 + n1 + n2 + n3, end)
                threshold = tl.where(later, t3, threshold)
    return first, end, threshold


@triton.jit
def arrive(ticket_ptr):
    """Publish this program's partial sums and take a ticket; the holder of the last ticket sees all partials."""
    tl.debug_barrier()  # every thread's stores happen before the one atomic that releases them
    return tl.atomic_add(ticket_ptr, 1, sem="acq_rel")


@triton.jit
def add_partials(part_ptr, stride, splits, offsets, mask, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr):
    """Sum over splits of partial[split, offsets], in order; L1 is bypassed because other SMs wrote them."""
    total = tl.zeros([BLOCK_N], tl.float32)
    for j in range(0, splits, UNROLL):
        for r in tl.static_range(UNROLL):
            total += tl.load(
                part_ptr + (j + r) * stride + offsets,
                mask=mask & (j + r < splits),
                other=0.0,
                cache_modifier=".cg",
            )
    return total


@triton.jit
def add_vector(y, ptr, offsets, mask, HAS: tl.constexpr):
    """y + ptr[offsets] where there is such a vector."""
    if HAS:
        y += tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return y
