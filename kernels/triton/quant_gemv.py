# SPDX-License-Identifier: Apache-2.0
"""Sparse GEMV on 8-bit and 4-bit weights: rows of the packed weight whose input is dropped are never loaded.

One launch does everything: threshold, centring, skipping, scales and zero points, bias, residual, and for GLU
layers the gated activation. The shape of the work:

* A program owns a tile of output columns and ``WARPS * RUN`` input channels; each warp owns ``RUN`` of them.
* A warp turns 32 inputs into a 32-bit mask of the kept ones and walks its set bits, so arithmetic (not only memory
  traffic) shrinks with sparsity. That matters here: unpacking 4-bit weights costs more issue slots than bytes.
* Integers become floats by bit tricks: a nibble or a byte is placed in the mantissa of a float whose exponent gives
  the field's lowest bit the weight one, then the magic number is subtracted. One LOP3 (or PRMT) and one FADD a
  weight, exact. Two immediates do not fit one LOP3 unless it is written as inline PTX (ptxas otherwise emits two), so
  there is a PTX form for NVIDIA GPUs and a plain one for the interpreter and every other target.
* Scales leave the inner loop: ``sum z*(q - zero)*scale = scale * (sum z*q - zero * sum z)`` once per run.
* Programs that share columns leave partial sums in a workspace; the last one to arrive adds them in a fixed order.
  The result is the same in every run, and no second launch is needed.
"""

# ruff: noqa: RUF005  (tuple unpacking is not part of Triton's language)
from __future__ import annotations

import triton
import triton.language as tl

try:  # programmatic dependent launch: Triton 3.4 and later
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    HAS_PDL = True
except ImportError:  # pragma: no cover - depends on the Triton release
    HAS_PDL = False

    @triton.jit
    def gdc_wait():
        pass

    @triton.jit
    def gdc_launch_dependents():
        pass


@triton.jit
def _unpack_int4_ptx(w):
    # 0xEA is (a & b) | c. Fields at bits 0, 4, 8, 12, 16 need no shift: the exponent moves instead.
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 h;
        shr.u32 h, $8, 12;
        lop3.b32 $0, $8, 0x0000000F, 0x4B000000, 0xEA;
        lop3.b32 $1, $8, 0x000000F0, 0x49000000, 0xEA;
        lop3.b32 $2, $8, 0x00000F00, 0x47000000, 0xEA;
        lop3.b32 $3, $8, 0x0000F000, 0x45000000, 0xEA;
        lop3.b32 $4, $8, 0x000F0000, 0x43000000, 0xEA;
        lop3.b32 $5, h, 0x00000F00, 0x47000000, 0xEA;
        lop3.b32 $6, h, 0x0000F000, 0x45000000, 0xEA;
        lop3.b32 $7, h, 0x000F0000, 0x43000000, 0xEA;
        }
        """,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
        [w],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _unpack_int8_ptx(w):
    return tl.inline_asm_elementwise(
        """
        prmt.b32 $0, $4, 0x4B000000, 0x7550;
        prmt.b32 $1, $4, 0x4B000000, 0x7551;
        prmt.b32 $2, $4, 0x4B000000, 0x7552;
        prmt.b32 $3, $4, 0x4B000000, 0x7553;
        """,
        "=&r,=&r,=&r,=&r,r",
        [w],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _demagic(a, magic: tl.constexpr):
    return a.to(tl.float32, bitcast=True) - magic


@triton.jit
def _unpack_int4(w, PTX: tl.constexpr):
    """Eight float32 planes of an int32 word: plane j is nibble j minus 8, exact."""
    if PTX:
        a0, a1, a2, a3, a4, a5, a6, a7 = _unpack_int4_ptx(w)
    else:
        h = w >> 12
        a0 = (w & 0x0000000F) | 0x4B000000
        a1 = (w & 0x000000F0) | 0x49000000
        a2 = (w & 0x00000F00) | 0x47000000
        a3 = (w & 0x0000F000) | 0x45000000
        a4 = (w & 0x000F0000) | 0x43000000
        a5 = (h & 0x00000F00) | 0x47000000
        a6 = (h & 0x0000F000) | 0x45000000
        a7 = (h & 0x000F0000) | 0x43000000
    return (
        _demagic(a0, 8388616.0),
        _demagic(a1, 524296.0),
        _demagic(a2, 32776.0),
        _demagic(a3, 2056.0),
        _demagic(a4, 136.0),
        _demagic(a5, 32776.0),
        _demagic(a6, 2056.0),
        _demagic(a7, 136.0),
    )


@triton.jit
def _unpack_int8(w, PTX: tl.constexpr):
    """Four float32 planes of an int32 word: plane j is byte j minus 128, exact."""
    if PTX:
        a0, a1, a2, a3 = _unpack_int8_ptx(w)
    else:
        a0 = (w & 0xFF) | 0x4B000000
        a1 = ((w >> 8) & 0xFF) | 0x4B000000
        a2 = ((w >> 16) & 0xFF) | 0x4B000000
        a3 = ((w >> 24) & 0xFF) | 0x4B000000
    return _demagic(a0, 8388736.0), _demagic(a1, 8388736.0), _demagic(a2, 8388736.0), _demagic(a3, 8388736.0)


@triton.jit
def _to_half2_ptx(z):
    """The same float16 in both halves of an int32."""
    return tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $1, $1;", "=r,r", [z], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _from_half2_ptx(h):
    """float32 of the low and of the high float16 of an int32."""
    return tl.inline_asm_elementwise(
        "{ .reg .b16 l, u; mov.b32 {l, u}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, u; }",
        "=&f,=&f,r",
        [h],
        dtype=(tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _step_int4_ptx(w, z, h0, h1, h2, h3):
    """h += z * (nibbles - 8) in float16 pairs: planes (0, 4), (1, 5), (2, 6), (3, 7)."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 s, a, b, c, d, m, n;
        mov.b32 m, 0x64086408;
        mov.b32 n, 0x54805480;
        shr.u32 s, $4, 8;
        lop3.b32 a, $4, 0x000F000F, 0x64006400, 0xEA;
        lop3.b32 b, $4, 0x00F000F0, 0x54005400, 0xEA;
        lop3.b32 c, s, 0x000F000F, 0x64006400, 0xEA;
        lop3.b32 d, s, 0x00F000F0, 0x54005400, 0xEA;
        sub.rn.f16x2 a, a, m;
        sub.rn.f16x2 b, b, n;
        sub.rn.f16x2 c, c, m;
        sub.rn.f16x2 d, d, n;
        fma.rn.f16x2 $0, a, $5, $6;
        fma.rn.f16x2 $1, b, $5, $7;
        fma.rn.f16x2 $2, c, $5, $8;
        fma.rn.f16x2 $3, d, $5, $9;
        }
        """,
        "=&r,=&r,=&r,=&r,r,r,r,r,r,r",
        [w, z, h0, h1, h2, h3],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _step_int8_ptx(w, z, h0, h1):
    """h += z * (bytes - 128) in float16 pairs: planes (0, 2), (1, 3)."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 a, b, m;
        mov.b32 m, 0x64806480;
        prmt.b32 a, $2, 0x64646464, 0x4240;
        prmt.b32 b, $2, 0x64646464, 0x4341;
        sub.rn.f16x2 a, a, m;
        sub.rn.f16x2 b, b, m;
        fma.rn.f16x2 $0, a, $3, $4;
        fma.rn.f16x2 $1, b, $3, $5;
        }
        """,
        "=&r,=&r,r,r,r,r",
        [w, z, h0, h1],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _top_bit_ptx(b):
    """Index of the highest set bit (-1 when there is none), and the mask without it."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 t; bfind.u32 $0, $2; shl.b32 t, 1, $0; xor.b32 $1, $2, t; }",
        "=&r,=&r,r",
        [b],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _pop_row(b, PTX: tl.constexpr):
    """Index of a set bit of each mask, and the masks without it. Meaningless index where no bit is set."""
    if PTX:
        i, rest = _top_bit_ptx(b)  # bfind answers -1 for 0, and a shift by that much gives 0: rest stays 0
    else:
        low = b & (-b)
        # the exponent of a power of two is its index
        i = (low.to(tl.uint32, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
        rest = b ^ low
    return i, rest


@triton.jit
def _popcount(v, PTX: tl.constexpr):
    if PTX:
        n = tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [v], dtype=tl.int32, is_pure=True, pack=1)
    else:
        v = v - ((v >> 1) & 0x55555555)
        v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
        v = (v + (v >> 4)) & 0x0F0F0F0F
        v = v + (v >> 8)
        n = (v + (v >> 16)) & 0x3F
    return n


@triton.jit
def _erf(x):
    # Abramowitz and Stegun 7.1.26, |error| < 1.5e-7: the interpreter and every target agree on it.
    a = tl.abs(x)
    t = 1.0 / (1.0 + 0.3275911 * a)
    p = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    e = 1.0 - p * tl.exp(-a * a)
    return tl.where(x < 0.0, -e, e)


@triton.jit
def _activate(g, ACT: tl.constexpr):
    if ACT == "silu":
        r = g / (1.0 + tl.exp(-g))
    elif ACT == "gelu":
        r = 0.5 * g * (1.0 + _erf(g * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        u = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        r = g / (1.0 + tl.exp(-2.0 * u))
    elif ACT == "relu":
        r = tl.where(g < 0.0, 0.0, g)
    else:
        tl.static_assert(ACT == "relu2", "unknown activation")
        r = tl.where(g < 0.0, 0.0, g) * g
    return r


@triton.jit
def _reduce_partials(part_ptr, base, N, cols, mask, splits, BN: tl.constexpr, UNROLL: tl.constexpr):
    acc = tl.zeros([BN], tl.float32)
    for j in range(0, splits, UNROLL):
        for r in tl.static_range(UNROLL):
            acc += tl.load(
                part_ptr + base + (j + r) * N + cols,
                mask=mask & (j + r < splits),
                other=0.0,
                cache_modifier=".cg",
            )
    return acc


@triton.jit
def _fetch(
    w_base, x_ptr, at, b, word_mask, ROW_BLOCKS, mode, down,
    ROWS: tl.constexpr, CENTRED: tl.constexpr, HALF: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Ask for the next ROWS kept rows of each warp: words, inputs, and the masks that are left, as one flat tuple."""
    ws = ()
    zs = ()
    for _ in tl.static_range(ROWS):
        live = b != 0
        i, b = _pop_row(b, PTX)
        k = (at + i).to(tl.uint32)
        # no `other`: whatever a dead slot holds unpacks to a finite number, and is multiplied by zero
        w = tl.load(w_base + k * (ROW_BLOCKS * 16), mask=live & word_mask, eviction_policy="evict_first")
        # from L1: cheaper than a shuffle, which Triton would route through shared memory and barriers
        z = tl.load(x_ptr + k, mask=live, other=0.0).to(tl.float32)
        if CENTRED:
            z = tl.where(live, z - mode, 0.0)
        if HALF:
            z = _to_half2_ptx(z * down)
        ws = ws + (w,)
        zs = zs + (z,)
    return ws + zs + (b,)


@triton.jit
def _consume(
    rows, acc, WARPS: tl.constexpr, BLOCK_WORDS: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr,
    HALF: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Multiply what :func:`_fetch` got and add it to the float32 planes."""
    if HALF:
        h0 = tl.zeros([WARPS, BLOCK_WORDS], tl.int32)
        h1 = h0
        if BITS == 4:
            h2 = h0
            h3 = h0
            for r in tl.static_range(ROWS):
                h0, h1, h2, h3 = _step_int4_ptx(rows[r], rows[ROWS + r], h0, h1, h2, h3)
            a0, a4 = _from_half2_ptx(h0)
            a1, a5 = _from_half2_ptx(h1)
            a2, a6 = _from_half2_ptx(h2)
            a3, a7 = _from_half2_ptx(h3)
            out = (
                acc[0] + a0, acc[1] + a1, acc[2] + a2, acc[3] + a3,
                acc[4] + a4, acc[5] + a5, acc[6] + a6, acc[7] + a7,
            )  # fmt: skip
        else:
            for r in tl.static_range(ROWS):
                h0, h1 = _step_int8_ptx(rows[r], rows[ROWS + r], h0, h1)
            a0, a2 = _from_half2_ptx(h0)
            a1, a3 = _from_half2_ptx(h1)
            out = (acc[0] + a0, acc[1] + a1, acc[2] + a2, acc[3] + a3)
    else:
        out = acc
        for r in tl.static_range(ROWS):
            z = rows[ROWS + r]
            if BITS == 4:
                a0, a1, a2, a3, a4, a5, a6, a7 = _unpack_int4(rows[r], PTX)
                out = (
                    out[0] + z * a0, out[1] + z * a1, out[2] + z * a2, out[3] + z * a3,
                    out[4] + z * a4, out[5] + z * a5, out[6] + z * a6, out[7] + z * a7,
                )  # fmt: skip
            else:
                a0, a1, a2, a3 = _unpack_int8(rows[r], PTX)
                out = (out[0] + z * a0, out[1] + z * a1, out[2] + z * a2, out[3] + z * a3)
    return out


@triton.jit
def _add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _add8(a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7


# Values that differ between layers of one model and would only multiply the compiled variants.
UNSPECIALIZED = [
    "splits",
    *[f"block{i}" for i in range(4)],
    *[f"tile{i}" for i in range(1, 4)],
]


@triton.jit
def _plane_table(ptr, row, cols, rows_ok, N):
    """[WARPS, BLOCK_WORDS] of a scale or zero table for the columns of one plane."""
    mask = rows_ok[:, None] & (cols < N)[None, :]
    return tl.load(ptr + row[:, None] * N + cols[None, :], mask=mask, other=0)


@triton.jit
def _apply(c, scale, zero, zsum, HALF_RANGE: tl.constexpr, ZERO: tl.constexpr):
    s = scale.to(tl.float32)
    if ZERO == 1:
        r = (c - (zero.to(tl.float32) - HALF_RANGE) * zsum[:, None]) * s
    elif ZERO == 2:
        r = c * s + zero.to(tl.float32) * zsum[:, None]
    else:
        r = c * s
    return r


@triton.jit(do_not_specialize=UNSPECIALIZED)
def sparse_quant_gemv_kernel(
    x_ptr,  # [M, K] fp16, bf16 or fp32
    w_ptr,  # [K, 16 * ROW_BLOCKS] int32 words of 32 // BITS columns
    scale_ptr,  # [K // group, N]
    zero_ptr,  # [K // group, N], unused when ZERO == 0
    bias_ptr,  # [N], unused when not HAS_BIAS
    res_ptr,  # [M, N] like y, unused when not HAS_RES
    y_ptr,  # [M, N], or [M, N // 2] for GLU
    part_ptr,  # [M, splits, N] float32, unused when not SPLIT
    ticket_ptr,  # [M * tiles] int32 zeros, zero again at the end
    M,
    K,
    N,
    ROW_BLOCKS,  # row length of w in blocks of 16 words, so that 16-byte alignment is visible to the compiler
    GROUP,
    splits,
    mode,
    thr0,
    thr1,
    thr2,
    thr3,
    col0,
    col1,
    col2,
    col3,  # first column of segments 0..3
    col_end,  # one past the last column of the last segment
    block0,
    block1,
    block2,
    block3,  # 16-word block that holds col0..3: tiles start there, columns before the segment are masked
    tile1,
    tile2,
    tile3,  # first tile of segments 1..3; for GLU tile1 is the number of tiles of the gate
    BITS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    WARPS: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RES: tl.constexpr,
    ACT: tl.constexpr,
    SPLIT: tl.constexpr,
    UNROLL: tl.constexpr,
    CENTRED: tl.constexpr,
    HALF: tl.constexpr,
    PTX: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: ``BLOCK_WORDS * 32 // BITS`` columns times ``WARPS * RUN`` input channels of one row of x."""
    PER: tl.constexpr = 32 // BITS
    BN: tl.constexpr = BLOCK_WORDS * PER
    MID: tl.constexpr = 1 << (BITS - 1)
    m = tl.program_id(0) % M
    tile = tl.program_id(0) // M
    split = tl.program_id(1)

    thr = thr0
    first = col0
    last = col_end
    block = block0
    t = tile
    if SEGMENTS > 1:
        last = col1
        if tile >= tile1:
            thr = thr1
            first = col1
            block = block1
            last = col_end
            t = tile - tile1
        if SEGMENTS > 2:
            if tile >= tile1 and tile < tile2:
                last = col2
            if tile >= tile2:
                thr = thr2
                first = col2
                block = block2
                last = col_end
                t = tile - tile2
        if SEGMENTS > 3:
            if tile >= tile2 and tile < tile3:
                last = col3
            if tile >= tile3:
                thr = thr3
                first = col3
                block = block3
                last = col_end
                t = tile - tile3
    word0 = block * 16 + t * BLOCK_WORDS
    words = word0 + tl.arange(0, BLOCK_WORDS)
    word_mask = (words < ROW_BLOCKS * 16)[None, :]
    base = (words // 16) * (16 * PER) + words % 16  # column of plane 0 of each word; plane j is 16 * j further
    lane = tl.arange(0, 32)
    run0 = (split * WARPS + tl.arange(0, WARPS)) * RUN  # [WARPS] first input channel of each warp
    w_base = w_ptr + words[None, :]

    # Scales do not depend on x: asked for first, used last.
    g = run0 // GROUP
    ok = run0 < K
    s0 = _plane_table(scale_ptr, g, base, ok, N)
    s1 = _plane_table(scale_ptr, g, base + 16, ok, N)
    s2 = _plane_table(scale_ptr, g, base + 32, ok, N)
    s3 = _plane_table(scale_ptr, g, base + 48, ok, N)
    if BITS == 4:
        s4 = _plane_table(scale_ptr, g, base + 64, ok, N)
        s5 = _plane_table(scale_ptr, g, base + 80, ok, N)
        s6 = _plane_table(scale_ptr, g, base + 96, ok, N)
        s7 = _plane_table(scale_ptr, g, base + 112, ok, N)

    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x_ptr += m * K

    # Masks of the kept inputs, 32 at a time; all inputs are asked for before the first is looked at.
    xs = ()
    for j in tl.static_range(RUN // 32):
        k = (run0 + 32 * j)[:, None] + lane[None, :]
        xs = xs + (tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32),)
    masks = ()
    size = tl.zeros([WARPS, 32], tl.int32)
    iters = tl.zeros([WARPS], tl.int32)
    zsum = tl.zeros([WARPS], tl.float32)
    for j in tl.static_range(RUN // 32):
        k = (run0 + 32 * j)[:, None] + lane[None, :]
        z = xs[j]
        if CENTRED:
            z -= mode
        keep = (k < K) & ~(tl.abs(z) <= thr)  # NaN is kept and stays visible
        z = tl.where(keep, z, 0.0)
        bits = tl.sum(tl.where(keep, 1 << lane[None, :], 0), 1)
        masks = masks + (bits[:, None],)
        iters += tl.maximum((_popcount(bits, PTX) + (ROWS - 1)) // ROWS, 1)
        size = tl.maximum(size, z.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        if ZERO != 0:
            zsum += tl.sum(z, 1)
    count = tl.max(iters, 0)
    # A power of two brings the largest |z| of the run into [1, 2), so float16 sums of a few products cannot overflow;
    # it is undone, exactly, at the end.
    exponent = tl.minimum(tl.maximum(254 - (tl.max(size, 1) >> 23), 1), 253)[:, None]
    down = (exponent << 23).to(tl.float32, bitcast=True)

    c = tl.zeros([WARPS, BLOCK_WORDS], tl.float32)
    if BITS == 4:
        acc = (c, c, c, c, c, c, c, c)
    else:
        acc = (c, c, c, c)
    at = run0[:, None]
    rest = masks[1:]
    cur = _fetch(w_base, x_ptr, at, masks[0], word_mask, ROW_BLOCKS, mode, down, ROWS, CENTRED, HALF, PTX)
    for _ in range(1, count):
        b = cur[2 * ROWS]
        done = b == 0  # a warp whose mask is used up goes on to its next 32 inputs
        at = tl.where(done, at + 32, at)
        if RUN >= 64:
            b = tl.where(done, rest[0], b)
            new = ()
            for j in tl.static_range(1, RUN // 32 - 1):
                new = new + (tl.where(done, rest[j], rest[j - 1]),)
            rest = new + (tl.where(done, 0, rest[RUN // 32 - 2]),)
        nxt = _fetch(w_base, x_ptr, at, b, word_mask, ROW_BLOCKS, mode, down, ROWS, CENTRED, HALF, PTX)
        acc = _consume(cur, acc, WARPS, BLOCK_WORDS, BITS, ROWS, HALF, PTX)
        cur = nxt
    acc = _consume(cur, acc, WARPS, BLOCK_WORDS, BITS, ROWS, HALF, PTX)
    c0, c1, c2, c3 = acc[0], acc[1], acc[2], acc[3]
    if BITS == 4:
        c4, c5, c6, c7 = acc[4], acc[5], acc[6], acc[7]
    if HALF:
        up = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        c0, c1, c2, c3 = c0 * up, c1 * up, c2 * up, c3 * up
        if BITS == 4:
            c4, c5, c6, c7 = c4 * up, c5 * up, c6 * up, c7 * up

    if ZERO != 0:
        z0 = _plane_table(zero_ptr, g, base, ok, N)
        z1 = _plane_table(zero_ptr, g, base + 16, ok, N)
        z2 = _plane_table(zero_ptr, g, base + 32, ok, N)
        z3 = _plane_table(zero_ptr, g, base + 48, ok, N)
        if BITS == 4:
            z4 = _plane_table(zero_ptr, g, base + 64, ok, N)
            z5 = _plane_table(zero_ptr, g, base + 80, ok, N)
            z6 = _plane_table(zero_ptr, g, base + 96, ok, N)
            z7 = _plane_table(zero_ptr, g, base + 112, ok, N)
    else:
        z0, z1, z2, z3 = s0, s1, s2, s3
        if BITS == 4:
            z4, z5, z6, z7 = s4, s5, s6, s7
    c0 = _apply(c0, s0, z0, zsum, MID, ZERO)
    c1 = _apply(c1, s1, z1, zsum, MID, ZERO)
    c2 = _apply(c2, s2, z2, zsum, MID, ZERO)
    c3 = _apply(c3, s3, z3, zsum, MID, ZERO)
    if BITS == 4:
        c4 = _apply(c4, s4, z4, zsum, MID, ZERO)
        c5 = _apply(c5, s5, z5, zsum, MID, ZERO)
        c6 = _apply(c6, s6, z6, zsum, MID, ZERO)
        c7 = _apply(c7, s7, z7, zsum, MID, ZERO)
        c0, c1, c2, c3, c4, c5, c6, c7 = tl.reduce((c0, c1, c2, c3, c4, c5, c6, c7), 0, _add8)
        even = tl.join(tl.join(c0, c4), tl.join(c2, c6))
        odd = tl.join(tl.join(c1, c5), tl.join(c3, c7))
        part = tl.join(even, odd)
    else:
        c0, c1, c2, c3 = tl.reduce((c0, c1, c2, c3), 0, _add4)
        part = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    part = tl.reshape(part, [BLOCK_WORDS, PER])
    pcols = base[:, None] + 16 * tl.arange(0, PER)[None, :]
    pmask = (pcols >= first) & (pcols < last)

    finish = True
    if SPLIT:
        row = m * splits * N
        tl.store(part_ptr + row + split * N + pcols, part, mask=pmask, cache_modifier=".cg")
        # Every thread's store must be visible before the one thread that takes the ticket releases it.
        tl.debug_barrier()
        slot = tile
        expected = splits
        if ACT != "none":
            slot = t
            expected = 2 * splits
        slot = slot * M + m
        finish = tl.atomic_add(ticket_ptr + slot, 1, sem="acq_rel") == expected - 1
    if finish:
        if SPLIT:
            tl.store(ticket_ptr + slot, 0)
        if ACT == "none":
            if SPLIT:
                cols = word0 * PER + tl.arange(0, BN)
                mask = (cols >= first) & (cols < last)
                y = _reduce_partials(part_ptr, row, N, cols, mask, splits, BN, UNROLL)
            else:
                cols = pcols
                mask = pmask
                y = part
            if HAS_BIAS:
                y += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
            if HAS_RES:
                y += tl.load(res_ptr + m * N + cols, mask=mask, other=0.0).to(tl.float32)
            tl.store(y_ptr + m * N + cols, y.to(y_ptr.dtype.element_ty), mask=mask)
        else:
            half = N // 2
            gcols = t * BN + tl.arange(0, BN)
            gmask = gcols < half
            gate = _reduce_partials(part_ptr, row, N, gcols, gmask, splits, BN, UNROLL)
            up_ = _reduce_partials(part_ptr, row, N, gcols + half, gmask, splits, BN, UNROLL)
            if HAS_BIAS:
                gate += tl.load(bias_ptr + gcols, mask=gmask, other=0.0).to(tl.float32)
                up_ += tl.load(bias_ptr + half + gcols, mask=gmask, other=0.0).to(tl.float32)
            y = _activate(gate, ACT) * up_
            tl.store(y_ptr + m * half + gcols, y.to(y_ptr.dtype.element_ty), mask=gmask)
