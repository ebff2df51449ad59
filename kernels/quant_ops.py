# SPDX-License-Identifier: Apache-2.0
"""
The sparse operations on 8- and 4-bit weights as torch ops.

======================================== =====================================================
``scap_nncf::sparse_fc_int8``, ``_int4`` ``prune(x - mode) @ W + bias + residual``, one threshold
                                         an output segment
``scap_nncf::sparse_glu_int8``, ``_int4`` ``act(gate) * up`` of two FC layers over one tensor
======================================== =====================================================

W is packed as :mod:`scap_nncf.kernels.packing` says. Eager, ``torch.compile(fullgraph=True)`` and CUDA graphs. On a
CPU the reference runs. On a CUDA device: up to five rows, a Triton GEMV, each row with its own mask; up to 16 rows, a
Triton tensor-core kernel over the union of the masks; more rows (prefill), the weight is dequantised and multiplied by
the library in slices of at most ``DENSE_SLICE_BYTES`` of transient memory. Inference only.

Precision: sums are float32. For float16 and bfloat16 activations the one-row kernel adds the products of up to eight
neighbouring kept rows in float16 first (scaled so that they cannot overflow), a relative error near 5e-4 of the
output's norm; float32 activations are exact to float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import reference
from .cpu import library as cpu
from .ops import _dense_prune, _kernels_unavailable, _merge, _warn_once
from .packing import BLOCK_WORDS, check_quant_tensors, dequantize
from .reference.activation import ACTIVATIONS
from .reference.quantized import sparse_fc_quant as _reference_fc
from .reference.quantized import sparse_glu_quant as _reference_glu

__all__ = ["sparse_fc_quant", "sparse_glu_quant"]

MAX_ROWS = 16  # rows that the sparse kernels take
DENSE_SLICE_BYTES = 128 << 20  # largest dequantised slice of a weight held at a time by the dense path

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FC_SCHEMA = (
    "(Tensor x, Tensor packed, Tensor scale, Tensor? zero, float[] thresholds, int[] segments, float mode=0.0, "
    "Tensor? bias=None, Tensor? residual=None, bool deterministic=True, float sparsity=0.5) -> Tensor"
)
_GLU_SCHEMA = (
    "(Tensor x, Tensor packed, Tensor scale, Tensor? zero, float gate_threshold, float up_threshold, float mode=0.0, "
    "str activation='silu', Tensor? bias=None, bool deterministic=True, float sparsity=0.5) -> Tensor"
)


# -- public functions -------------------------------------------------------------------------------------------------


def sparse_fc_quant(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bits: int,
    thresholds: Sequence[float],
    segments: Sequence[int],
    mode: float = 0.0,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    deterministic: bool = True,
    sparsity: float = 0.5,
) -> torch.Tensor:
    """
    A fully connected layer on packed weights, or several that read one tensor, skipping the bytes of dropped inputs.

    :param x: [..., K], float32, float16 or bfloat16 (float64 too on a CPU).
    :param packed: [K, words] int32; `scale` [groups, N]; `zero` None, integer or floating [groups, N]: the fields of
        :class:`~scap_nncf.kernels.packing.Int8Weight` or :class:`~scap_nncf.kernels.packing.Int4Weight`.
    :param bits: 8 or 4.
    :param thresholds: τ of each output segment; negative keeps everything.
    :param segments: output columns of each segment; they sum to N.
    :param mode: η of the tensor.
    :param bias: [N], already fused with ``mode * colsum(W)``.
    :param residual: [..., N] in the dtype of `x`, added to the result.
    :param deterministic: accepted for symmetry with the dense-weight ops; sums are always in a fixed order.
    :param sparsity: expected share of dropped inputs, a hint that never changes which inputs are dropped.
    :return: [..., N] in the dtype of `x`.
    :raises TypeError: for dtypes that do not fit. :raises ValueError: for shapes, devices or segments that do not fit.
    """
    op = torch.ops.scap_nncf.sparse_fc_int4 if _bits(bits) == 4 else torch.ops.scap_nncf.sparse_fc_int8
    return op(x, packed, scale, zero, list(thresholds), list(segments), mode, bias, residual, deterministic, sparsity)


def sparse_glu_quant(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bits: int,
    gate_threshold: float,
    up_threshold: float,
    mode: float = 0.0,
    activation: str = "silu",
    bias: torch.Tensor | None = None,
    deterministic: bool = True,
    sparsity: float = 0.5,
) -> torch.Tensor:
    """
    ``activation(gate) * up`` on packed weights gate | up, [K, 2N] unpacked.

    :param x: [..., K].
    :param bias: [2N], already fused.
    :param activation: silu, gelu (erf), gelu_tanh, relu or relu2.
    :return: [..., N] in the dtype of `x`.
    :raises TypeError: for dtypes that do not fit. :raises ValueError: for shapes or an unknown activation.
    """
    op = torch.ops.scap_nncf.sparse_glu_int4 if _bits(bits) == 4 else torch.ops.scap_nncf.sparse_glu_int8
    return op(x, packed, scale, zero, gate_threshold, up_threshold, mode, activation, bias, deterministic, sparsity)


def _bits(bits: int) -> int:
    if bits not in (4, 8):
        raise ValueError(f"packed weights have 4 or 8 bits, not {bits}")
    return bits


# -- checks -----------------------------------------------------------------------------------------------------------


def _check(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bits: int,
    bias: torch.Tensor | None,
) -> None:
    if x.dtype not in _FLOATS:
        raise TypeError(f"x is {x.dtype}; expected float16, bfloat16, float32 or float64.")
    check_quant_tensors(packed, scale, zero, bits)
    if x.dim() < 1 or x.shape[-1] != packed.shape[0]:
        raise ValueError(f"x {tuple(x.shape)} and a packed weight of {packed.shape[0]} input channels do not fit.")
    if x.device != packed.device:
        raise ValueError(f"x is on {x.device} and the weight on {packed.device}; move them to one device.")
    _check_vector("bias", bias, (scale.shape[1],), x)


def _check_vector(name: str, extra: torch.Tensor | None, shape: tuple[int, ...], x: torch.Tensor) -> None:
    if extra is None:
        return
    if tuple(extra.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(extra.shape)}; expected {shape}.")
    if extra.device != x.device:
        raise ValueError(f"{name} is on {extra.device} and x on {x.device}; move them to one device.")
    if not extra.is_floating_point():
        raise TypeError(f"{name} is {extra.dtype}; expected a floating dtype.")


def _check_segments(thresholds: Sequence[float], segments: Sequence[int], n: int) -> None:
    if len(thresholds) != len(segments) or sum(segments) != n or any(s < 0 for s in segments):
        raise ValueError(
            f"thresholds {list(thresholds)} and segments {list(segments)} do not fit a weight with {n} outputs; "
            "expected one threshold a segment and segments that sum to that number."
        )


def _check_glu(scale: torch.Tensor, activation: str) -> None:
    if scale.shape[1] % 2:
        raise ValueError(f"the weight has {scale.shape[1]} outputs; expected an even number, gate's and then up's.")
    if activation not in ACTIVATIONS:
        raise ValueError(f"Unknown activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}.")


# -- CUDA -------------------------------------------------------------------------------------------------------------


def _use_kernel(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether a sparse kernel serves these rows [M, K]; the reasons a user should know of are told once."""
    if not 1 <= x.shape[0] <= MAX_ROWS:
        return False
    if x.dtype == torch.float64:
        _warn_once("float64 activations on a GPU run the dense path: the sparse kernels sum in float32.")
        return False
    group = packed.shape[0] // scale.shape[0]
    if scale.shape[0] > 1 and group % 32:
        _warn_once(
            f"Packed weights with groups of {group} input channels run dense: the sparse kernels need a multiple of 32."
        )
        return False
    if packed.numel() >= 1 << 31:
        _warn_once("A packed weight of 8 GiB or more runs dense: the sparse kernels index with 31 bits.")
        return False
    reason = _kernels_unavailable(x.device)
    if reason is not None:
        _warn_once(f"Sparse kernels are off, layers run dense: {reason}.")
        return False
    return True


def _dense_slice(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bits: int,
    first: int,
    end: int,
    x: torch.Tensor,
) -> torch.Tensor:
    """Dense [K, end - first] in the dtype of x; `first` starts a block of 16 words."""
    if x.dtype != torch.float64 and _kernels_unavailable(x.device) is None:
        from .triton.quant_launch import dequantize_columns

        return dequantize_columns(packed, scale, zero, bits, first, end - first, x.dtype)
    per = 32 // bits
    words = packed[:, first // per : -(-end // (per * BLOCK_WORDS)) * BLOCK_WORDS]
    zero = None if zero is None else zero[:, first:end]
    return dequantize(words, scale[:, first:end], zero, bits, rounded=True).to(x.dtype)


def _dense_fc(
    x: torch.Tensor,  # [M, K]
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bits: int,
    segments: Sequence[tuple[float, int]],
    mode: float,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,  # [M, N]
) -> torch.Tensor:
    """Prune, dequantise a slice of columns, multiply; slice by slice."""
    k, n = packed.shape[0], scale.shape[1]
    block = BLOCK_WORDS * 32 // bits  # columns of a block of words: slices start at its multiples
    width = max(block, DENSE_SLICE_BYTES // (k * x.element_size()) // block * block)
    y = torch.empty((x.shape[0], n), dtype=x.dtype, device=x.device)
    start = 0
    for threshold, size in segments:
        z = _dense_prune(x, mode, threshold)
        at, end = start, start + size
        while at < end:
            first = at // block * block
            stop = min(end, first + width)
            w = _dense_slice(packed, scale, zero, bits, first, stop, x)
            y[:, at:stop] = z @ w[:, at - first :]
            at = stop
        start = end
    if bias is not None:
        y += bias.to(x.dtype)
    return y if residual is None else y + residual


def _fc_cuda(x, packed, scale, zero, bits, thresholds, segments, mode, bias, residual):  # type: ignore[no-untyped-def]
    k, n = packed.shape[0], scale.shape[1]
    shape = (*x.shape[:-1], n)
    flat = x.reshape(-1, k).contiguous()
    residual = None if residual is None else residual.reshape(-1, n).contiguous()
    if flat.shape[0] == 0:
        return x.new_empty(shape)
    if not _use_kernel(flat, packed, scale):
        merged = _merge(thresholds, segments)
        return _dense_fc(flat, packed, scale, zero, bits, merged, mode, bias, residual).reshape(shape)
    from .triton.quant_launch import launch_sparse_quant

    y = launch_sparse_quant(
        flat, packed.contiguous(), scale.contiguous(), None if zero is None else zero.contiguous(), bits,
        thresholds, segments, mode, None if bias is None else bias.contiguous(), residual,
    )  # fmt: skip
    return y.view(shape)


def _glu_cuda(x, packed, scale, zero, bits, gate_threshold, up_threshold, mode, activation, bias):  # type: ignore[no-untyped-def]
    k, n = packed.shape[0], scale.shape[1] // 2
    shape = (*x.shape[:-1], n)
    flat = x.reshape(-1, k).contiguous()
    if flat.shape[0] == 0:
        return x.new_empty(shape)
    if n % (BLOCK_WORDS * 32 // bits) == 0 and _use_kernel(flat, packed, scale):
        from .triton.quant_launch import launch_sparse_quant

        y = launch_sparse_quant(
            flat, packed.contiguous(), scale.contiguous(), None if zero is None else zero.contiguous(), bits,
            [gate_threshold, up_threshold], [n, n], mode, None if bias is None else bias.contiguous(), None,
            activation,
        )  # fmt: skip
        return y.view(shape)
    h = _fc_cuda(flat, packed, scale, zero, bits, [gate_threshold, up_threshold], [n, n], mode, bias, None)
    return (reference.activate(h[:, :n], activation) * h[:, n:]).reshape(shape)


# -- CPU --------------------------------------------------------------------------------------------------------------


def _compiled(x, packed, scale, zero, bits, thresholds, segments, mode, bias, activation=None):  # type: ignore[no-untyped-def]
    """The compiled kernels' result, or None where they are not loaded or do not serve this."""
    if not cpu.serves(x) or x.numel() == 0:
        return None
    return cpu.sparse_fc_quant(x, packed, scale, zero, bits, thresholds, segments, mode, bias, activation)


# -- registration -----------------------------------------------------------------------------------------------------


def _register(bits: int) -> None:
    fc, glu = f"scap_nncf::sparse_fc_int{bits}", f"scap_nncf::sparse_glu_int{bits}"
    torch.library.define(fc, _FC_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.define(glu, _GLU_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))

    def check_fc(x, packed, scale, zero, thresholds, segments, bias, residual):  # type: ignore[no-untyped-def]
        _check(x, packed, scale, zero, bits, bias)
        _check_segments(thresholds, segments, scale.shape[1])
        _check_vector("residual", residual, (*x.shape[:-1], scale.shape[1]), x)

    @torch.library.impl(fc, "CPU")
    def fc_cpu(
        x, packed, scale, zero, thresholds, segments, mode=0.0, bias=None, residual=None,
        deterministic=True, sparsity=0.5,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        check_fc(x, packed, scale, zero, thresholds, segments, bias, residual)
        y = _compiled(x, packed, scale, zero, bits, thresholds, segments, mode, bias)
        if y is not None:
            return y if residual is None else y + residual
        return _reference_fc(x, packed, scale, zero, bits, thresholds, segments, mode, bias, residual)

    @torch.library.impl(fc, "CUDA")
    def fc_cuda(
        x, packed, scale, zero, thresholds, segments, mode=0.0, bias=None, residual=None,
        deterministic=True, sparsity=0.5,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        check_fc(x, packed, scale, zero, thresholds, segments, bias, residual)
        return _fc_cuda(x, packed, scale, zero, bits, thresholds, segments, mode, bias, residual)

    @torch.library.register_fake(fc)
    def fc_fake(
        x, packed, scale, zero, thresholds, segments, mode=0.0, bias=None, residual=None,
        deterministic=True, sparsity=0.5,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        check_fc(x, packed, scale, zero, thresholds, segments, bias, residual)
        return x.new_empty((*x.shape[:-1], scale.shape[1]))

    @torch.library.impl(glu, "CPU")
    def glu_cpu(
        x, packed, scale, zero, gate_threshold, up_threshold, mode=0.0, activation="silu", bias=None,
        deterministic=True, sparsity=0.5,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        _check(x, packed, scale, zero, bits, bias)
        _check_glu(scale, activation)
        n = scale.shape[1] // 2
        y = _compiled(x, packed, scale, zero, bits, [gate_threshold, up_threshold], [n, n], mode, bias, activation)
        if y is not None:
            return y
        return _reference_glu(x, packed, scale, zero, bits, gate_threshold, up_threshold, mode, activation, bias)

    @torch.library.impl(glu, "CUDA")
    def glu_cuda(
        x, packed, scale, zero, gate_threshold, up_threshold, mode=0.0, activation="silu", bias=None,
        deterministic=True, sparsity=0.5,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        _check(x, packed, scale, zero, bits, bias)
        _check_glu(scale, activation)
        return _glu_cuda(x, packed, scale, zero, bits, gate_threshold, up_threshold, mode, activation, bias)

    @torch.library.register_fake(glu)
    def glu_fake(
        x, packed, scale, zero, gate_threshold, up_threshold, mode=0.0, activation="silu", bias=None,
        deterministic=True, sparsity=0.5,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        _check(x, packed, scale, zero, bits, bias)
        _check_glu(scale, activation)
        return x.new_empty((*x.shape[:-1], scale.shape[1] // 2))


_register(8)
_register(4)
