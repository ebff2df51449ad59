# SPDX-License-Identifier: Apache-2.0
"""
Calling the compiled kernels on torch tensors.

Once :func:`load` has been called, the torch ops of :mod:`scap_nncf.kernels.ops` and ``quant_ops`` run them for CPU
tensors; before, and for what they do not serve (float64), the plain torch definitions run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from scap_nncf.kernels.cpu.build import build

__all__ = ["FEW_ROWS", "advise_huge_pages", "force_isa", "isa", "load", "loaded", "sparse_fc", "sparse_fc_quant"]

#: Rows that the kernels read kept weights for, one after the other; more are multiplied as a dense matrix.
FEW_ROWS = 8

_F32, _F16, _BF16, _U8, _U4, _I16 = range(6)
_TYPES = {torch.float32: _F32, torch.float16: _F16, torch.bfloat16: _BF16}
_ZERO_TYPES = {**_TYPES, torch.uint8: _U8, torch.int16: _I16}
_ACTIVATIONS = {None: 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4, "relu2": 5}
_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25


class _Weight(ctypes.Structure):  # scap_weight
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("tile_columns", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("tile_bytes", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("scale_columns", ctypes.c_int64),
        ("format", ctypes.c_int32),
        ("scale_type", ctypes.c_int32),
        ("zero_type", ctypes.c_int32),
        ("padded", ctypes.c_int32),
        ("threshold", ctypes.c_float),
        ("reserved", ctypes.c_int32),
    ]


class _Call(ctypes.Structure):  # scap_call
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("weights", ctypes.POINTER(_Weight)),
        ("outputs", ctypes.POINTER(ctypes.c_void_p)),
        ("dropped", ctypes.c_void_p),
        ("parallel", ctypes.c_void_p),
        ("pool", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("count", ctypes.c_int32),
        ("x_type", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("mode", ctypes.c_float),
    ]


class _OpenMP(ctypes.Structure):  # scap_openmp
    _fields_ = [("gomp_parallel", ctypes.c_void_p), ("threads", ctypes.c_int64)]


@dataclass
class _Library:
    handle: Any
    openmp: int | None  # address of GOMP_parallel in the process: the pool that torch itself uses


_library: _Library | None = None


def load() -> None:
    """
    Compile the kernels if need be, and use them from now on for CPU tensors.

    :raises BuildError: they cannot be compiled here.
    """
    global _library
    if _library is not None:
        return
    handle = ctypes.CDLL(str(build("cpu")))
    handle.scap_run.argtypes = [ctypes.POINTER(_Call)]
    handle.scap_isa.restype = ctypes.c_char_p
    handle.scap_force_isa.argtypes = [ctypes.c_char_p]
    _library = _Library(handle, _openmp())


def loaded() -> bool:
    """Whether :func:`load` has been called."""
    return _library is not None


def isa() -> str:
    """Instruction set in use: ``avx512_bf16``, ``avx512``, ``avx2`` or ``portable``."""
    return str(_require().handle.scap_isa().decode())


def force_isa(name: str) -> None:
    """
    Use another instruction set in this process, for tests and measurements.

    :raises ValueError: the machine does not have it.
    """
    if _require().handle.scap_force_isa(name.encode()) != 0:
        msg = f"instruction set {name!r} is not to be had here; there are avx512_bf16, avx512, avx2 and portable"
        raise ValueError(msg)


def serves(x: torch.Tensor) -> bool:
    """Whether the compiled kernels run for this activation."""
    return _library is not None and x.dtype in _TYPES


def sparse_fc(
    x: torch.Tensor,
    weight: torch.Tensor,
    thresholds: Sequence[float],
    segments: Sequence[int],
    mode: float,
    bias: torch.Tensor | None,
    activation: str | None = None,
) -> torch.Tensor:
    """
    :func:`scap_nncf.kernels.reference.sparse_fc` on the compiled kernels; with an activation ``sparse_glu``.

    :param x: [..., K], float32, float16 or bfloat16.
    :param weight: [K, N] in the dtype of `x`, adjacent output channels.
    :return: [..., N], or [..., N / 2] with an activation.
    """
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    size = weight.element_size()
    pieces, start = [], 0
    for threshold, width in zip(thresholds, segments, strict=True):
        if width:
            pieces.append(
                _Weight(
                    data=weight.data_ptr() + start * size,
                    n=width,
                    tile_columns=width,
                    row_bytes=weight.stride(0) * size,
                    group=weight.shape[0],
                    format=_TYPES[weight.dtype],
                    scale_type=-1,
                    zero_type=-1,
                    threshold=threshold,
                )
            )
        start += width
    return _run(x, pieces, [width for width in segments if width], mode, bias, activation)


def sparse_fc_quant(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bits: int,
    thresholds: Sequence[float],
    segments: Sequence[int],
    mode: float,
    bias: torch.Tensor | None,
    activation: str | None = None,
) -> torch.Tensor | None:
    """
    The same on packed weights (see :mod:`scap_nncf.kernels.packing`); None where their layout is not served.
    """
    if scale.dtype not in _TYPES or (zero is not None and zero.dtype not in _ZERO_TYPES):
        return None
    packed, scale = packed.contiguous(), scale.contiguous()
    zero = None if zero is None else zero.contiguous()
    block = 512 // bits  # columns of 16 words
    if any(start % block for start in _starts(segments)):
        return None  # a segment that begins inside of a block of words
    pieces = []
    for start, width, threshold in zip(_starts(segments), segments, thresholds, strict=True):
        if width:
            pieces.append(
                _Weight(
                    data=packed.data_ptr() + start * bits // 8,
                    scale=scale.data_ptr() + start * scale.element_size(),
                    zero=None if zero is None else zero.data_ptr() + start * zero.element_size(),
                    n=width,
                    tile_columns=width,
                    row_bytes=packed.shape[1] * 4,
                    group=packed.shape[0] // scale.shape[0],
                    scale_columns=scale.shape[1],
                    format=_U8 if bits == 8 else _U4,
                    scale_type=_TYPES[scale.dtype],
                    zero_type=-1 if zero is None else _ZERO_TYPES[zero.dtype],
                    threshold=threshold,
                )
            )
    return _run(x, pieces, [width for width in segments if width], mode, bias, activation)


def _starts(segments: Sequence[int]) -> list[int]:
    return [sum(segments[:index]) for index in range(len(segments))]


def _run(
    x: torch.Tensor,
    weights: list[_Weight],
    widths: Sequence[int],
    mode: float,
    bias: torch.Tensor | None,
    activation: str | None,
) -> torch.Tensor:
    library = _require()
    k = x.shape[-1]
    flat = x.reshape(-1, k).contiguous()
    rows = flat.shape[0]
    if bias is not None:
        bias = bias.float().contiguous()
        start = 0
        for weight, width in zip(weights, widths, strict=True):
            weight.bias = bias.data_ptr() + 4 * start
            start += width
    results = [flat.new_empty((rows, width)) for width in (widths[:1] if activation else widths)]
    if rows:
        pool = _OpenMP(library.openmp, torch.get_num_threads())
        parallel = ctypes.cast(library.handle.scap_parallel_openmp, ctypes.c_void_p) if library.openmp else None
        call = _Call(
            x=flat.data_ptr(),
            weights=(_Weight * len(weights))(*weights),
            outputs=(ctypes.c_void_p * len(results))(*(result.data_ptr() for result in results)),
            parallel=parallel,
            pool=ctypes.cast(ctypes.pointer(pool), ctypes.c_void_p),
            rows=rows,
            k=k,
            threads=torch.get_num_threads() if library.openmp else 1,
            count=len(weights),
            x_type=_TYPES[flat.dtype],
            activation=_ACTIVATIONS[activation],
            mode=mode,
        )
        status = library.handle.scap_run(ctypes.byref(call))
        if status != 0:
            msg = f"the CPU kernel refused a call (status {status}): x {tuple(x.shape)}, {len(weights)} weights"
            raise RuntimeError(msg)
    joined = results[0] if len(results) == 1 else torch.cat(results, dim=1)
    return joined.view(*x.shape[:-1], joined.shape[1])


def advise_huge_pages(tensor: torch.Tensor) -> None:
    """Ask for huge pages below a tensor: rows that are skipped cost address translations otherwise. Best effort."""
    memory = tensor.untyped_storage()
    start = -(-memory.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    end = (memory.data_ptr() + memory.nbytes()) // _HUGE_PAGE * _HUGE_PAGE
    libc = _libc()
    if tensor.device.type == "cpu" and end > start and libc is not None:
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_HUGEPAGE)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_COLLAPSE)


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "madvise") else None


def _openmp() -> int | None:
    process = ctypes.CDLL(None)
    function = getattr(process, "GOMP_parallel", None)
    return None if function is None else ctypes.cast(function, ctypes.c_void_p).value


def _require() -> _Library:
    if _library is None:
        msg = "the CPU kernels are not loaded; call scap_nncf.kernels.cpu.library.load() before"
        raise RuntimeError(msg)
    return _library
