# SPDX-License-Identifier: Apache-2.0
"""
The sparse operations as torch ops: one call for every device, shape and row count.

========================== =============================================================================================
``scap_nncf::sparse_fc``    ``prune(x - mode) @ W + bias + residual``, one threshold an output segment
``scap_nncf::sparse_glu``   ``act(gate) * up`` of two FC layers over one tensor
``scap_nncf::gated_up``     ``act(gate) * (x @ W^T + bias)`` where the gate is open (CATS), zero elsewhere
``scap_nncf::prune``        ``x - mode`` where ``|x - mode| > threshold``, zero elsewhere
========================== =============================================================================================

They work in eager mode, under ``torch.compile(fullgraph=True)`` (fake kernels) and in CUDA graphs (no host
synchronisation, no launch that depends on data). On a CPU they run ``kernels.reference``, or the compiled kernels once
``kernels.cpu.library.load`` was called; on a CUDA device one Triton
launch for 1 to 16 rows, or prune + the dense library matmul on the same weight where that is faster. What is dropped is
the same everywhere. Inference only: there is no autograd formula.

Triton is imported at the first CUDA call, never at import.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache

import torch

from . import reference
from .cpu import library as cpu
from .reference import ACTIVATIONS, fuse_bias
from .triton.dispatch import MAX_GATED_ROWS, MAX_ROWS, prefer_dense

__all__ = ["fuse_bias", "gated_up", "input_major", "prune", "sparse_fc", "sparse_glu"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

torch.library.define(
    "scap_nncf::sparse_fc",
    "(Tensor x, Tensor weight, float[] thresholds, int[] segments, float mode=0.0, Tensor? bias=None, "
    "Tensor? residual=None, bool deterministic=True, float sparsity=0.5) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "scap_nncf::sparse_glu",
    "(Tensor x, Tensor weight, float gate_threshold, float up_threshold, float mode=0.0, str activation='silu', "
    "Tensor? bias=None, bool deterministic=True, float sparsity=0.5) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "scap_nncf::gated_up",
    "(Tensor gate, Tensor x, Tensor weight, float threshold, str activation='silu', Tensor? bias=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "scap_nncf::prune",
    "(Tensor x, float mode, float threshold) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


# -- public functions ------------------------------------------------------------------------------


def sparse_fc(
    x: torch.Tensor,
    weight: torch.Tensor,
    thresholds: Sequence[float],
    segments: Sequence[int],
    mode: float = 0.0,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    deterministic: bool = True,
    sparsity: float = 0.5,
) -> torch.Tensor:
    """
    A fully connected layer, or several that read one tensor, skipping the weights of dropped inputs.

    :param x: [..., K], float32, float16 or bfloat16 (float64 too on a CPU).
    :param weight: [K, N] in the dtype of `x`, input-channel-major; see :func:`input_major`.
    :param thresholds: τ of each output segment; negative keeps everything.
    :param segments: output columns of each segment; they sum to N. One FC: ``[tau], [N]``.
    :param mode: η of the tensor.
    :param bias: [N], already fused (:func:`fuse_bias`), in the dtype of `x` or float32.
    :param residual: [..., N] in the dtype of `x`, added to the result.
    :param deterministic: sum partial results in a fixed order. False sums with atomics.
    :param sparsity: expected share of dropped inputs. A hint for the choice of tiles and of the dense path; it never
        changes which inputs are dropped.
    :return: [..., N] in the dtype of `x`.
    :raises TypeError: for dtypes that are not floating or do not match.
    :raises ValueError: for shapes, devices or segments that do not fit.
    """
    return torch.ops.scap_nncf.sparse_fc(
        x, weight, list(thresholds), list(segments), mode, bias, residual, deterministic, sparsity
    )


def sparse_glu(
    x: torch.Tensor,
    weight: torch.Tensor,
    gate_threshold: float,
    up_threshold: float,
    mode: float = 0.0,
    activation: str = "silu",
    bias: torch.Tensor | None = None,
    deterministic: bool = True,
    sparsity: float = 0.5,
) -> torch.Tensor:
    """
    ``activation(gate) * up`` of two FC layers that read one tensor.

    :param x: [..., K].
    :param weight: [K, 2N] in the dtype of `x`: gate's columns, then up's.
    :param gate_threshold: τ of gate.
    :param up_threshold: τ of up.
    :param mode: η of the tensor.
    :param activation: silu, gelu (erf), gelu_tanh, relu or relu2.
    :param bias: [2N], already fused.
    :param deterministic: see :func:`sparse_fc`.
    :param sparsity: see :func:`sparse_fc`.
    :return: [..., N] in the dtype of `x`.
    :raises TypeError: for dtypes that are not floating or do not match.
    :raises ValueError: for shapes or devices that do not fit, or an unknown activation.
    """
    return torch.ops.scap_nncf.sparse_glu(
        x, weight, gate_threshold, up_threshold, mode, activation, bias, deterministic, sparsity
    )


def gated_up(
    gate: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    threshold: float,
    activation: str = "silu",
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The second layer of a gated feed-forward, skipping the weights of closed gates; :func:`.reference.gated_up`.

    :param gate: [..., N] in the dtype of `x`, before the activation.
    :param x: [..., K], float32, float16 or bfloat16 (float64 too on a CPU).
    :param weight: [N, K] in the dtype of `x`, as ``torch.nn.Linear`` stores it.
    :param threshold: τ on the size of the activated gate; negative keeps everything.
    :param bias: [N] or None.
    :return: [..., N] in the dtype of `x`.
    :raises TypeError: for dtypes that are not floating or do not match.
    :raises ValueError: for shapes or devices that do not fit, or an unknown activation.
    """
    return torch.ops.scap_nncf.gated_up(gate, x, weight, threshold, activation, bias)


def prune(x: torch.Tensor, mode: float, threshold: float) -> torch.Tensor:
    """
    ``x - mode`` where ``|x - mode| > threshold``, zero elsewhere; one pass on a GPU.

    :param x: any shape, floating.
    :param mode: η.
    :param threshold: τ; negative keeps everything.
    :return: a new tensor, same shape and dtype.
    """
    return torch.ops.scap_nncf.prune(x, mode, threshold)


def input_major(linear_weight: torch.Tensor) -> torch.Tensor:
    """
    The one copy of the weights that every operation here reads.

    :param linear_weight: [N, K], as ``torch.nn.Linear`` stores it.
    :return: [K, N] contiguous.
    """
    return linear_weight.t().contiguous()


# -- checks ----------------------------------------------------------------------------------------


def _check_pair(x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.dtype not in _FLOATS:
        raise TypeError(f"x is {x.dtype}; expected float16, bfloat16, float32 or float64.")
    if weight.dtype != x.dtype:
        raise TypeError(f"weight is {weight.dtype} and x is {x.dtype}; cast one of them so that they are equal.")
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit; expected x [..., K] and weight [K, N] "
            "(input channels first: the transpose of torch.nn.Linear's weight)."
        )
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device} and weight on {weight.device}; move them to one device.")


def _check_extra(name: str, extra: torch.Tensor | None, shape: tuple[int, ...], x: torch.Tensor) -> None:
    if extra is None:
        return
    if tuple(extra.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(extra.shape)}; expected {tuple(shape)}.")
    if extra.device != x.device:
        raise ValueError(f"{name} is on {extra.device} and x on {x.device}; move them to one device.")
    if not extra.is_floating_point():
        raise TypeError(f"{name} is {extra.dtype}; expected a floating dtype.")


def _check_fc(
    x: torch.Tensor,
    weight: torch.Tensor,
    thresholds: Sequence[float],
    segments: Sequence[int],
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> None:
    _check_pair(x, weight)
    n = weight.shape[1]
    if len(thresholds) != len(segments) or sum(segments) != n or any(s < 0 for s in segments):
        raise ValueError(
            f"thresholds {list(thresholds)} and segments {list(segments)} do not fit a weight with {n} output columns; "
            "expected one threshold a segment and segments that sum to that number."
        )
    _check_extra("bias", bias, (n,), x)
    _check_extra("residual", residual, (*x.shape[:-1], n), x)


def _check_glu(x: torch.Tensor, weight: torch.Tensor, activation: str, bias: torch.Tensor | None) -> None:
    _check_pair(x, weight)
    if weight.shape[1] % 2:
        raise ValueError(f"weight has {weight.shape[1]} columns; expected an even number, gate's and then up's.")
    if activation not in ACTIVATIONS:
        raise ValueError(f"Unknown activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}.")
    _check_extra("bias", bias, (weight.shape[1],), x)


def _check_gated_up(
    gate: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, activation: str, bias: torch.Tensor | None
) -> None:
    _check_pair(x, weight.t() if weight.dim() == 2 else weight)
    if gate.dtype != x.dtype:
        raise TypeError(f"gate is {gate.dtype} and x is {x.dtype}; cast one of them so that they are equal.")
    _check_extra("gate", gate, (*x.shape[:-1], weight.shape[0]), x)
    if activation not in ACTIVATIONS:
        raise ValueError(f"Unknown activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}.")
    _check_extra("bias", bias, (weight.shape[0],), x)


# -- which path ------------------------------------------------------------------------------------


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


@cache
def _kernels_unavailable(device: torch.device) -> str | None:
    """Why this device cannot run the kernels, or None."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return 'Triton is not installed (pip install "scap-nncf[triton]")'
    capability = torch.cuda.get_device_capability(device)
    if capability < (7, 5):
        return f"the GPU has compute capability {capability[0]}.{capability[1]} and the kernels need 7.5"
    return None


def _use_kernel(x: torch.Tensor, weight: torch.Tensor, rows: int, sparsity: float) -> bool:
    """Whether the sparse kernel runs; the reasons that a user should know of are told once."""
    if rows > MAX_ROWS or x.numel() == 0 or weight.numel() == 0:
        return False
    if x.dtype == torch.float64:
        _warn_once("float64 activations on a GPU run the dense path: the sparse kernels sum in float32.")
        return False
    if weight.stride(1) != 1 and weight.shape[1] != 1:
        _warn_once(
            f"A weight of shape {tuple(weight.shape)} has strides {tuple(weight.stride())}: the sparse kernels need "
            "adjacent output channels, so this layer runs dense. Store it as weight.contiguous()."
        )
        return False
    reason = _kernels_unavailable(x.device)
    if reason is not None:
        _warn_once(f"Sparse kernels are off, layers run dense: {reason}.")
        return False
    return not prefer_dense(x.device, weight.shape[0], weight.shape[1], x.dtype, rows, sparsity)


def _dense_fc(
    x: torch.Tensor,  # [M, K]
    weight: torch.Tensor,  # [K, N]
    segments: Sequence[tuple[float, int]],
    mode: float,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,  # [M, N]
) -> torch.Tensor:
    """Prune, then the library's matmul over the same weight."""
    bias = None if bias is None else bias.to(x.dtype)
    columns = weight.split([size for _, size in segments], dim=1)
    parts = [_dense_prune(x, mode, threshold) @ w for (threshold, _), w in zip(segments, columns, strict=True)]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    if bias is not None:
        y = y + bias
    return y if residual is None else y + residual


def _dense_prune(x: torch.Tensor, mode: float, threshold: float) -> torch.Tensor:
    if threshold < 0 and mode == 0.0:
        return x
    if not x.is_cuda or x.dtype == torch.float64 or _kernels_unavailable(x.device) is not None or x.numel() == 0:
        return reference.prune(x, mode, threshold)
    from .triton.prune import launch_prune

    x = x.contiguous()
    out = torch.empty_like(x)
    launch_prune(x, mode, threshold, out)
    return out


# -- implementations -------------------------------------------------------------------------------


@torch.library.impl("scap_nncf::sparse_fc", "CPU")
def _sparse_fc_cpu(
    x, weight, thresholds, segments, mode=0.0, bias=None, residual=None, deterministic=True, sparsity=0.5
):  # type: ignore[no-untyped-def]
    _check_fc(x, weight, thresholds, segments, bias, residual)
    if not cpu.serves(x) or x.numel() == 0 or weight.numel() == 0:
        return reference.sparse_fc(x, weight, thresholds, segments, mode, bias, residual)
    k, n = weight.shape
    if x.numel() // k > cpu.FEW_ROWS:  # all inputs are in use by some row: the library's matmul is best
        flat, shape = x.reshape(-1, k), (*x.shape[:-1], n)
        residual = None if residual is None else residual.reshape(-1, n)
        return _dense_fc(flat, weight, _merge(thresholds, segments), mode, bias, residual).reshape(shape)
    y = cpu.sparse_fc(x, weight, thresholds, segments, mode, bias)
    return y if residual is None else y + residual


@torch.library.impl("scap_nncf::sparse_fc", "CUDA")
def _sparse_fc_cuda(
    x, weight, thresholds, segments, mode=0.0, bias=None, residual=None, deterministic=True, sparsity=0.5
):  # type: ignore[no-untyped-def]
    _check_fc(x, weight, thresholds, segments, bias, residual)
    k, n = weight.shape
    shape = (*x.shape[:-1], n)
    flat = x.reshape(-1, k)
    rows = flat.shape[0]
    residual = None if residual is None else residual.reshape(-1, n)
    if rows == 0 or k == 0 or n == 0:
        return reference.sparse_fc(x, weight, thresholds, segments, mode, bias, residual)
    merged = _merge(thresholds, segments)
    nothing_dropped = mode == 0.0 and all(threshold < 0 for threshold, _ in merged)
    if nothing_dropped or not _use_kernel(flat, weight, rows, sparsity):
        return _dense_fc(flat, weight, merged, mode, bias, residual).reshape(shape)
    from .triton.fc import MAX_SEGMENTS, launch_fc
    from .triton.tiles import choose

    flat = flat.contiguous()
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    out = torch.empty((rows, n), dtype=x.dtype, device=x.device)
    tile = choose("fc", x.device, k, n, x.dtype, rows, sparsity)
    if len(merged) <= MAX_SEGMENTS:
        launch_fc(flat, weight, merged, mode, bias, residual, out, tile, deterministic)
        return out.view(shape)
    start = 0
    for threshold, size in merged:  # more segments than one launch takes: one launch each
        piece = slice(start, start + size)
        part = torch.empty((rows, size), dtype=x.dtype, device=x.device)
        launch_fc(
            flat, weight[:, piece], [(threshold, size)], mode, None if bias is None else bias[piece],
            None if residual is None else residual[:, piece].contiguous(), part, tile, deterministic,
        )  # fmt: skip
        out[:, piece] = part
        start += size
    return out.view(shape)


@torch.library.register_fake("scap_nncf::sparse_fc")
def _sparse_fc_fake(
    x, weight, thresholds, segments, mode=0.0, bias=None, residual=None, deterministic=True, sparsity=0.5
):  # type: ignore[no-untyped-def]
    _check_fc(x, weight, thresholds, segments, bias, residual)
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


@torch.library.impl("scap_nncf::sparse_glu", "CPU")
def _sparse_glu_cpu(
    x, weight, gate_threshold, up_threshold, mode=0.0, activation="silu", bias=None, deterministic=True, sparsity=0.5
):  # type: ignore[no-untyped-def]
    _check_glu(x, weight, activation, bias)
    if not cpu.serves(x) or x.numel() == 0 or weight.numel() == 0:
        return reference.sparse_glu(x, weight, gate_threshold, up_threshold, mode, activation, bias)
    k, n = weight.shape[0], weight.shape[1] // 2
    thresholds, segments = [gate_threshold, up_threshold], [n, n]
    if x.numel() // k > cpu.FEW_ROWS:
        h = _dense_fc(x.reshape(-1, k), weight, _merge(thresholds, segments), mode, bias, None)
        return (reference.activate(h[:, :n], activation) * h[:, n:]).reshape(*x.shape[:-1], n)
    return cpu.sparse_fc(x, weight, thresholds, segments, mode, bias, activation)


@torch.library.impl("scap_nncf::sparse_glu", "CUDA")
def _sparse_glu_cuda(
    x, weight, gate_threshold, up_threshold, mode=0.0, activation="silu", bias=None, deterministic=True, sparsity=0.5
):  # type: ignore[no-untyped-def]
    _check_glu(x, weight, activation, bias)
    k, n = weight.shape[0], weight.shape[1] // 2
    flat = x.reshape(-1, k)
    rows = flat.shape[0]
    if rows == 0 or k == 0 or n == 0:
        return reference.sparse_glu(x, weight, gate_threshold, up_threshold, mode, activation, bias)
    out = torch.empty((rows, n), dtype=x.dtype, device=x.device)
    if rows == 1 and _use_kernel(flat, weight, rows, sparsity):
        from .triton.glu import launch_glu
        from .triton.tiles import choose

        bias = None if bias is None else bias.contiguous()
        tile = choose("glu", x.device, k, 2 * n, x.dtype, rows, sparsity)
        launch_glu(
            flat.contiguous(), weight, gate_threshold, up_threshold, mode, activation, bias, out, tile, deterministic
        )
        return out.view(*x.shape[:-1], n)
    h = torch.ops.scap_nncf.sparse_fc(
        flat, weight, [gate_threshold, up_threshold], [n, n], mode, bias, None, deterministic, sparsity
    )  # [M, 2N]
    if x.dtype == torch.float64 or _kernels_unavailable(x.device) is not None:
        gate, up = h.chunk(2, dim=1)
        return (reference.activate(gate, activation) * up).reshape(*x.shape[:-1], n)
    from .triton.glu import launch_gate

    launch_gate(h, activation, out)
    return out.view(*x.shape[:-1], n)


@torch.library.register_fake("scap_nncf::sparse_glu")
def _sparse_glu_fake(
    x, weight, gate_threshold, up_threshold, mode=0.0, activation="silu", bias=None, deterministic=True, sparsity=0.5
):  # type: ignore[no-untyped-def]
    _check_glu(x, weight, activation, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[1] // 2))


@torch.library.impl("scap_nncf::gated_up", "CPU")
def _gated_up_cpu(gate, x, weight, threshold, activation="silu", bias=None):  # type: ignore[no-untyped-def]
    _check_gated_up(gate, x, weight, activation, bias)
    return reference.gated_up(gate, x, weight, threshold, activation, bias)


@torch.library.impl("scap_nncf::gated_up", "CUDA")
def _gated_up_cuda(gate, x, weight, threshold, activation="silu", bias=None):  # type: ignore[no-untyped-def]
    _check_gated_up(gate, x, weight, activation, bias)
    n, k = weight.shape
    flat = x.reshape(-1, k)
    rows = flat.shape[0]
    plain = x.dtype != torch.float64 and weight.stride(1) == 1 and _kernels_unavailable(x.device) is None
    if plain and 0 < rows <= MAX_GATED_ROWS and k and n:
        from .triton.gated_up import launch_gated_up

        out = torch.empty((rows, n), dtype=x.dtype, device=x.device)
        bias = None if bias is None else bias.contiguous()
        gate = gate.reshape(-1, n).contiguous()
        launch_gated_up(gate, flat.contiguous(), weight, threshold, activation, bias, out)
        return out.view(*x.shape[:-1], n)
    opened = reference.open_gate(gate, threshold, activation).to(x.dtype)
    return opened * torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


@torch.library.register_fake("scap_nncf::gated_up")
def _gated_up_fake(gate, x, weight, threshold, activation="silu", bias=None):  # type: ignore[no-untyped-def]
    _check_gated_up(gate, x, weight, activation, bias)
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@torch.library.impl("scap_nncf::prune", "CPU")
def _prune_cpu(x, mode, threshold):  # type: ignore[no-untyped-def]
    y = reference.prune(x, mode, threshold)
    return y.clone() if y is x else y


@torch.library.impl("scap_nncf::prune", "CUDA")
def _prune_cuda(x, mode, threshold):  # type: ignore[no-untyped-def]
    y = _dense_prune(x, mode, threshold)
    return y.clone() if y is x else y


@torch.library.register_fake("scap_nncf::prune")
def _prune_fake(x, mode, threshold):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


def _merge(thresholds: Sequence[float], segments: Sequence[int]) -> list[tuple[float, int]]:
    """(threshold, columns) of each segment; empty ones go, neighbours with one threshold become one."""
    merged: list[tuple[float, int]] = []
    for threshold, columns in zip(thresholds, segments, strict=True):
        if columns == 0:
            continue
        if merged and merged[-1][0] == threshold:
            merged[-1] = (threshold, merged[-1][1] + columns)
        else:
            merged.append((float(threshold), int(columns)))
    return merged
