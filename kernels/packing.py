# SPDX-License-Identifier: Apache-2.0
"""Quantised weights in the one layout the sparse kernels read: input channel by input channel.

Weight-only formats store ``[N, K]`` (out, in) and pack neighbouring *input* channels into a byte, so skipping an input
would save nothing. Here row ``k`` holds input channel ``k`` of all outputs: dropping the input drops its bytes.

====== =========================================================================================================
field  meaning
====== =========================================================================================================
packed int32 ``[K, words]``. A word holds 32 // bits outputs, lowest bits first, 16 apart: field ``j`` of word
       ``16 * b + i`` is output ``b * 16 * (32 // bits) + 16 * j + i``. So field ``j`` of neighbouring words are
       neighbouring outputs, and scales, sums and results move in whole sectors without a shuffle. Values are unsigned;
       signed sources are stored plus 8 or 128. Rows are padded to whole blocks of 16 words.
scale  ``[K // group, N]``; one row when the scale is per output channel (group == K).
zero   None: ``w = (u - half) * scale`` with half = 8 or 128. Integer ``[K // group, N]``: ``w = (u - zero) * scale``.
       Floating ``[K // group, N]``: ``w = (u - half) * scale + zero`` (the tinygemm convention).
dtype  dtype of the dense weight that the source format stands for.
====== =========================================================================================================

Every function takes plain tensors: neither NNCF nor torchao nor a GPTQ package is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch

BLOCK_WORDS = 16  # words of a block; rows are whole blocks
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of an AWQ word is output 8c + _AWQ_ORDER[i]


@dataclass(frozen=True)
class QuantWeight:
    """Common part of :class:`Int8Weight` and :class:`Int4Weight`; see the module for the fields.

    :raises TypeError: for a wrong dtype. :raises ValueError: for shapes that do not fit together.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    dtype: torch.dtype = torch.float16

    bits: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_quant_tensors(self.packed, self.scale, self.zero, self.bits)

    @property
    def in_features(self) -> int:
        """K, the number of input channels."""
        return self.packed.shape[0]

    @property
    def out_features(self) -> int:
        """N, the number of outputs."""
        return self.scale.shape[1]

    @property
    def group(self) -> int:
        """Input channels that share a scale."""
        return self.packed.shape[0] // self.scale.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held: packed values, scales and zero points."""
        tensors = (self.packed, self.scale) if self.zero is None else (self.packed, self.scale, self.zero)
        return sum(t.numel() * t.element_size() for t in tensors)

    def to(self: _W, device: torch.device | str) -> _W:
        """The same weight on another device."""
        zero = None if self.zero is None else self.zero.to(device)
        return type(self)(self.packed.to(device), self.scale.to(device), zero, self.dtype)

    def integers(self) -> torch.Tensor:
        """Unsigned stored values, uint8 ``[K, N]``."""
        return unpack_words(self.packed, self.bits, self.out_features)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Dense ``[K, N]`` weight, bit for bit what the source format decompresses to (transposed).

        The arithmetic runs in the dtype of ``scale``, as NNCF, torchao, GPTQ and AWQ do it, and the result is cast to
        ``dtype`` (default: the dtype of the source's dense weight).
        """
        return dequantize(self.packed, self.scale, self.zero, self.bits, rounded=True).to(dtype or self.dtype)

    def colsum(self) -> torch.Tensor:
        """Column sums of the weight, float64 ``[N]``; the fused bias is ``b + mode * colsum``."""
        return dequantize(self.packed, self.scale, self.zero, self.bits, rounded=False, dtype=torch.float64).sum(0)


_W = TypeVar("_W", bound=QuantWeight)


@dataclass(frozen=True)
class Int8Weight(QuantWeight):
    """8-bit weight, four outputs a word; usually one scale per output channel."""

    bits: ClassVar[int] = 8


@dataclass(frozen=True)
class Int4Weight(QuantWeight):
    """4-bit weight, eight outputs a word, scales per group of input channels."""

    bits: ClassVar[int] = 4


def check_quant_tensors(packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int) -> None:
    """Raise TypeError or ValueError unless the tensors form a weight as the module describes it."""
    if bits not in (4, 8):
        raise ValueError(f"a quantised weight has 4 or 8 bits, not {bits}")
    if packed.dtype != torch.int32 or packed.dim() != 2:
        raise TypeError(f"packed must be int32 [K, words], got {packed.dtype} {tuple(packed.shape)}")
    if not scale.is_floating_point() or scale.dim() != 2:
        raise TypeError(f"scale must be floating [groups, N], got {scale.dtype} {tuple(scale.shape)}")
    k, words = packed.shape
    groups, n = scale.shape
    if n < 1 or k < 1:
        raise ValueError(f"a weight needs K >= 1 and N >= 1, got K={k}, N={n}")
    if words != row_words(n, bits):
        raise ValueError(f"N={n} outputs of {bits} bits take {row_words(n, bits)} words a row, packed has {words}")
    if groups < 1 or k % groups:
        raise ValueError(f"{groups} rows of scales do not divide K={k} input channels into equal groups")
    if zero is not None and zero.shape != scale.shape:
        raise ValueError(f"zero must have the shape of scale {tuple(scale.shape)}, got {tuple(zero.shape)}")
    if zero is not None and (zero.device != scale.device or packed.device != scale.device):
        raise ValueError("packed, scale and zero must be on one device")


def row_words(n: int, bits: int) -> int:
    """int32 words in a packed row of ``n`` outputs."""
    return -(-n // (BLOCK_WORDS * 32 // bits)) * BLOCK_WORDS


def pack_words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack unsigned integers ``[K, N]`` (below ``2**bits``) along N into int32 ``[K, words]``."""
    k, n = values.shape
    per = 32 // bits
    words = row_words(n, bits)
    padded = torch.zeros((k, words * per), dtype=torch.uint8, device=values.device)
    padded[:, :n] = values.to(torch.uint8)
    fields = padded.view(k, -1, per, BLOCK_WORDS).transpose(2, 3).reshape(k, -1)
    if bits == 4:
        fields = fields[:, 0::2] | (fields[:, 1::2] << 4)
    # a view of bytes as words: the first byte is the lowest (little-endian, as on every platform torch runs on)
    return fields.contiguous().view(torch.int32)


def unpack_words(packed: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """Inverse of :func:`pack_words`: uint8 ``[K, n]``."""
    k = packed.shape[0]
    data = packed.contiguous().view(torch.uint8)
    if bits == 4:
        data = torch.stack((data & 0xF, data >> 4), dim=-1).reshape(k, -1)
    return data.view(k, -1, BLOCK_WORDS, 32 // bits).transpose(2, 3).reshape(k, -1)[:, :n]


def dequantize(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bits: int,
    *,
    rounded: bool,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Dense ``[K, N]`` weight.

    ``rounded=True``: arithmetic in ``scale.dtype``, exactly as the source format does it, result in that dtype.
    ``rounded=False``: the number the integers and scales stand for, computed in ``dtype`` (float64: exact). The sparse
    kernels compute with these, multiplying the scale in float32 after the sum; a weight differs from the rounded one by
    at most half a unit in the last place of ``scale.dtype``.
    """
    k = packed.shape[0]
    groups, n = scale.shape
    work = scale.dtype if rounded else dtype
    half = 1 << (bits - 1)
    u = unpack_words(packed, bits, n).to(torch.int16).reshape(groups, k // groups, n)
    s = scale.to(work)[:, None, :]
    if zero is None:
        w = (u - half).to(work) * s
    elif zero.is_floating_point():
        w = (u - half).to(work) * s + zero.to(work)[:, None, :]
    else:
        w = (u - zero.to(torch.int16)[:, None, :]).to(work) * s
    return w.reshape(k, n)


def _weight_class(bits: int) -> type[QuantWeight]:
    if bits not in (4, 8):
        raise ValueError(f"only 4- and 8-bit weights have sparse kernels, got {bits} bits")
    return Int4Weight if bits == 4 else Int8Weight


def from_integers(
    values: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    *,
    bits: int,
    signed: bool,
    dtype: torch.dtype = torch.float16,
) -> QuantWeight:
    """Pack plain integers.

    :param values: integers ``[N, K]`` (out, in), as torch's Linear stores its weight.
    :param scale: ``[N]``, ``[N, 1]`` or ``[N, groups]``.
    :param zero: None, integer zero points or floating offsets, shaped like ``scale``. Integer zero points are in the
        units of ``values``.
    :param signed: whether ``values`` run over -half..half-1 (True) or 0..2*half-1 (False). Unsigned values without a
        zero point stand for ``(values - half) * scale``.
    :param dtype: dtype of the dense weight these stand for.
    :returns: an :class:`Int8Weight` or :class:`Int4Weight`.
    """
    cls = _weight_class(bits)
    if values.dim() != 2 or values.is_floating_point():
        raise TypeError(f"values must be integers [N, K], got {values.dtype} {tuple(values.shape)}")
    n, k = values.shape
    half = 1 << (bits - 1)
    low, high = (-half, half - 1) if signed else (0, 2 * half - 1)
    if values.numel() and (int(values.min()) < low or int(values.max()) > high):
        raise ValueError(f"{bits}-bit {'signed' if signed else 'unsigned'} values must lie in [{low}, {high}]")
    shift = half if signed else 0
    stored = (values.to(torch.int16) + shift).t()
    table = _table(scale, n, k, "scale")
    ztable = None
    if zero is not None:
        ztable = _table(zero, n, k, "zero")
        if not zero.is_floating_point():
            ztable = _small_integers(ztable.to(torch.int32) + shift)
    return cls(pack_words(stored, bits), table, ztable, dtype)


def _table(t: torch.Tensor, n: int, k: int, name: str) -> torch.Tensor:
    """``[N]``, ``[N, 1]`` or ``[N, groups]`` as contiguous ``[groups, N]``."""
    t2 = t.reshape(n, -1) if t.numel() and t.shape[0] == n else None
    if t2 is None or k % t2.shape[1]:
        raise ValueError(f"{name} must be [N={n}] or [N={n}, groups] with groups dividing K={k}, got {tuple(t.shape)}")
    return t2.t().contiguous()


def _small_integers(zero: torch.Tensor) -> torch.Tensor:
    """Zero points in the narrowest integer type that holds them (they are read for every group)."""
    low, high = int(zero.min()), int(zero.max())
    if low >= 0 and high <= 255:
        return zero.to(torch.uint8)
    if low >= -32768 and high <= 32767:
        return zero.to(torch.int16)
    raise ValueError(f"zero points must lie in the int16 range, got [{low}, {high}]")


def _unpack_pairs(packed: torch.Tensor) -> torch.Tensor:
    """NNCF's nibble order: the first value in the low half of the byte. uint8, flat."""
    data = packed.reshape(-1)
    return torch.stack((data & 0xF, data >> 4), dim=-1).reshape(-1)


def from_nncf(weight: torch.Tensor, decompressor: Any) -> QuantWeight:
    """Convert a parameter compressed by ``nncf.compress_weights`` (PyTorch backend, NNCF 3.x).

    Reads the decompressor's buffers and attributes by name (``_scale``, ``_zero_point``, ``compressed_weight_shape``,
    ``zero_point_shape``, ``result_dtype``), so NNCF is not imported here. INT8 and INT4, symmetric and asymmetric, for
    weights stored ``[N, K]`` (Linear); a weight stored ``[K, N]`` (transformers' Conv1D) is recognised by its scales.

    :param weight: the compressed parameter. int8/uint8 ``[N, K]``, or packed nibbles uint8 ``[N*K/2, 1]``.
    :param decompressor: the INT8/INT4 (a)symmetric weights decompressor that NNCF attached to it.
    :raises TypeError: if the object is none of the four decompressors.
    :raises ValueError: for weights that are not matrices (fused experts).
    """
    name = type(decompressor).__name__
    if name not in {f"INT{b}{kind}WeightsDecompressor" for b in (4, 8) for kind in ("Symmetric", "Asymmetric")}:
        raise TypeError(f"expected one of NNCF's INT8/INT4 weight decompressors, got {name}")
    bits = 4 if name.startswith("INT4") else 8
    scale = decompressor._scale
    zero = getattr(decompressor, "_zero_point", None)
    values = weight.detach()
    if bits == 4:
        values = _unpack_pairs(values).reshape(decompressor.compressed_weight_shape)
        if zero is not None:
            zero = _unpack_pairs(zero)[: scale.numel()].reshape(decompressor.zero_point_shape)
    signed = bits == 8 and zero is None
    values, scale, zero = _nncf_as_linear(values, scale, zero)
    dtype = decompressor.result_dtype or scale.dtype
    return from_integers(values, scale, zero, bits=bits, signed=signed, dtype=dtype)


def _nncf_as_linear(
    values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Bring NNCF's shapes to values ``[N, K]``, scale and zero ``[N, groups]``.

    Linear: values [N, K] with scale [N, 1], or [N, G, g] with [N, G, 1]. Conv1D: [K, N] with [1, N], or [G, g, N] with
    [G, 1, N].
    """
    shape, reduced = tuple(values.shape), tuple(scale.shape)
    if len(shape) == 2 and reduced == (shape[0], 1):
        return values, scale, zero
    if len(shape) == 2 and reduced == (1, shape[1]):
        return values.t(), scale.t(), None if zero is None else zero.t()
    if len(shape) == 3 and reduced == (shape[0], shape[1], 1):
        return values.reshape(shape[0], -1), scale[..., 0], None if zero is None else zero[..., 0]
    if len(shape) == 3 and reduced == (shape[0], 1, shape[2]):
        values = values.reshape(-1, shape[2]).t()
        return values, scale[:, 0].t(), None if zero is None else zero[:, 0].t()
    raise ValueError(
        f"cannot read a compressed weight of shape {shape} with scales {reduced}: expected a matrix quantised along "
        "its input channels"
    )


def from_torchao(
    int_data: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    *,
    bits: int,
    dtype: torch.dtype = torch.bfloat16,
) -> QuantWeight:
    """Convert torchao's plain weight-only tensors.

    int8 weight-only: ``int_data`` int8 ``[N, K]``, ``scale`` ``[N]`` or ``[N, 1]``, ``zero_point`` None or integer.
    int4 (``IntxWeightOnlyConfig``): signed ``int_data`` in -8..7. int4 tinygemm: unsigned ``int_data`` in 0..15 and a
    *floating* ``zero_point``, meaning ``(q - 8) * scale + zero_point``. Sign is taken from the dtype of ``int_data``.
    """
    signed = int_data.dtype != torch.uint8
    if signed and zero_point is not None and zero_point.is_floating_point():
        signed = bool(int_data.numel()) and int(int_data.min()) < 0
    if zero_point is not None and not zero_point.is_floating_point() and not bool(zero_point.any()):
        zero_point = None if signed else zero_point
    return from_integers(int_data, scale, zero_point, bits=bits, signed=signed, dtype=dtype)


def from_gptq(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None = None,
    *,
    bits: int = 4,
    checkpoint_format: str = "gptq",
    dtype: torch.dtype = torch.float16,
) -> QuantWeight:
    """Convert GPTQ tensors.

    :param qweight: int32 ``[K * bits / 32, N]``, packed along the input channels, lowest bits first.
    :param qzeros: int32 ``[groups, N * bits / 32]``, packed along the outputs.
    :param scales: ``[groups, N]``.
    :param g_idx: int ``[K]``, group of each input channel, or None for ``k // group``.
    :param checkpoint_format: "gptq" (zero points stored minus one) or "gptq_v2" (stored as they are).
    :raises ValueError: for activation-ordered groups (``g_idx`` not ``k // group``): the scale would change from one
        input channel to the next. Quantise with ``desc_act=False``.
    """
    cls = _weight_class(bits)
    if checkpoint_format not in ("gptq", "gptq_v2"):
        raise ValueError(f"checkpoint_format must be 'gptq' or 'gptq_v2', got {checkpoint_format!r}")
    per = 32 // bits
    k, n = qweight.shape[0] * per, qweight.shape[1]
    groups = scales.shape[0]
    if tuple(scales.shape) != (groups, n) or tuple(qzeros.shape) != (groups, -(-n // per)) or k % groups:
        raise ValueError(
            f"GPTQ tensors do not fit together: qweight {tuple(qweight.shape)}, qzeros {tuple(qzeros.shape)}, "
            f"scales {tuple(scales.shape)} at {bits} bits"
        )
    if g_idx is not None:
        expected = torch.arange(k, device=g_idx.device) // (k // groups)
        if tuple(g_idx.shape) != (k,) or not torch.equal(g_idx.to(torch.int64), expected):
            raise ValueError(
                "GPTQ weights with activation order (desc_act=True) have no fixed groups along the input channels; "
                "quantise with desc_act=False, or leave this layer dense"
            )
    shifts = torch.arange(0, 32, bits, device=qweight.device, dtype=torch.int32)
    mask = (1 << bits) - 1
    u = ((qweight[:, None, :] >> shifts[None, :, None]) & mask).reshape(k, n)
    zero = ((qzeros[:, :, None] >> shifts) & mask).reshape(groups, -1)[:, :n]
    if checkpoint_format == "gptq":
        zero = zero + 1
    return cls(pack_words(u, bits), scales.contiguous(), _small_integers(zero).contiguous(), dtype)


def from_awq(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, *, dtype: torch.dtype = torch.float16
) -> Int4Weight:
    """Convert AWQ's GEMM format: qweight int32 ``[K, N / 8]``, qzeros ``[groups, N / 8]``, scales ``[groups, N]``.

    AWQ packs along the outputs already, in the order 0 2 4 6 1 3 5 7.
    """
    k, words = qweight.shape
    groups, n = scales.shape
    if n != 8 * words or tuple(qzeros.shape) != (groups, words) or k % groups:
        raise ValueError(
            f"AWQ tensors do not fit together: qweight {tuple(qweight.shape)}, qzeros {tuple(qzeros.shape)}, "
            f"scales {tuple(scales.shape)}"
        )
    shifts = torch.tensor([4 * _AWQ_ORDER.index(i) for i in range(8)], device=qweight.device, dtype=torch.int32)
    u = ((qweight[:, :, None] >> shifts) & 0xF).reshape(k, n)
    zero = ((qzeros[:, :, None] >> shifts) & 0xF).reshape(groups, n)
    return Int4Weight(pack_words(u, 4), scales.contiguous(), zero.to(torch.uint8).contiguous(), dtype)


def concatenate_outputs(weights: Sequence[_W]) -> _W:
    """One weight ``[K, N1 + N2 + ...]`` from several that read the same input (gate and up; q, k and v).

    :raises ValueError: if bits, K, group size or the kind of zero point differ.
    """
    if not weights:
        raise ValueError("no weights to concatenate")
    first = weights[0]
    for w in weights[1:]:
        same_zero = (w.zero is None) == (first.zero is None) and (
            w.zero is None or first.zero is None or w.zero.is_floating_point() == first.zero.is_floating_point()
        )
        if w.bits != first.bits or w.in_features != first.in_features or w.group != first.group or not same_zero:
            raise ValueError(
                "weights can be joined only if bits, input channels, group size and kind of zero point agree; got "
                + ", ".join(f"int{v.bits} K={v.in_features} group={v.group}" for v in weights)
            )
    packed = pack_words(torch.cat([w.integers() for w in weights], 1), first.bits)
    zero = None
    if first.zero is not None:
        zeros = [w.zero for w in weights if w.zero is not None]
        common = zeros[0].dtype
        for z in zeros[1:]:
            common = torch.promote_types(common, z.dtype)
        zero = torch.cat([z.to(common) for z in zeros], 1)
    return type(first)(packed, torch.cat([w.scale for w in weights], 1), zero, first.dtype)


def fuse_bias(weight: QuantWeight, bias: torch.Tensor | None, mode: float) -> torch.Tensor | None:
    """``bias + mode * colsum(W)``, float32 ``[N]``; None when there is neither a bias nor a mode."""
    if mode == 0.0:
        return None if bias is None else bias.detach().to(torch.float32)
    fused = mode * weight.colsum()
    if bias is not None:
        fused = fused + bias.detach().to(torch.float64)
    return fused.to(torch.float32)
