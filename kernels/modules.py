# SPDX-License-Identifier: Apache-2.0
"""
Modules that run FC layers with the kernels that skip weights.

A :class:`Projection` holds the only copy of the weights of the layers that read one tensor, input channel by input
channel, and runs them as one launch. :class:`DeployedLinear` stands where such a layer stood, :class:`DeployedGlu`
where a gated feed-forward stood. The layers they replace live on outside of the module tree: their parameters are views
into the projection, so nothing is stored twice, ``state_dict`` keeps its names, and they can be put back.

All of this is for inference: weights are frozen and no gradient flows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import ops, quant_ops, reference
from .cpu.library import advise_huge_pages
from .packing import Int4Weight, Int8Weight, QuantWeight
from .reference import quantized


@dataclass(frozen=True)
class Part:
    """
    One FC layer of a projection.

    :param name: name of the layer in the model.
    :param module: the layer itself, kept out of the module tree.
    :param out_features: its outputs.
    :param threshold: τ; negative keeps every input.
    :param sparsity: expected share of dropped inputs, a hint for the choice of tiles.
    :param output_bias: added to the outputs of pruned tokens [out_features], or None.
    """

    name: str
    module: nn.Module
    out_features: int
    threshold: float
    sparsity: float
    output_bias: torch.Tensor | None = None


class Projection(nn.Module):
    """
    FC layers that read the same tensor, run as one.

    ``y = kept(x − η) @ W + (b + η·colsum(W) + r)``, each layer with its own threshold and vector r (SCAP paper,
    sections 2 and 3.3); tokens that the policy does not prune get ``x @ W + b``. With an `activation` the outputs are
    the halves gate | up of a gated feed-forward and the result is ``activation(gate) * up``.

    :param parts: the layers in the order of their outputs.
    :param mode: η, one for all.
    :param bias: plain biases of all parts together [N], zero where a layer has none; None where none has.
    :param decode_only: prune only tokens that come alone (sequence length 1).
    :param activation: a name that the kernels know, or None.
    :param use_reference: run the plain torch definition instead of a kernel.
    """

    bias: torch.Tensor | None
    fused_bias: torch.Tensor | None
    output_bias: torch.Tensor | None
    zeros: torch.Tensor | None
    total: torch.Tensor | None

    def __init__(
        self,
        parts: Sequence[Part],
        mode: float,
        bias: torch.Tensor | None,
        decode_only: bool = False,
        activation: str | None = None,
        use_reference: bool = False,
    ) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.mode = mode
        self.decode_only = decode_only
        self.activation = activation
        self.use_reference = use_reference
        self.enabled = True
        self.segments = [part.out_features for part in self.parts]
        self.thresholds = [part.threshold for part in self.parts]
        self.out_features = sum(self.segments)
        self.sparsity = sum(part.sparsity * part.out_features for part in self.parts) / self.out_features
        self.register_buffer("bias", bias, persistent=False)
        self.register_buffer("fused_bias", None, persistent=False)
        self.register_buffer("output_bias", _joined_output_bias(self.parts), persistent=False)
        self.register_buffer("zeros", None, persistent=False)
        self.register_buffer("total", None, persistent=False)

    # -- forward -------------------------------------------------------------------------------------------------

    def active(self, x: torch.Tensor) -> bool:
        """Whether these tokens are pruned, from the policy and the shape [..., T, K]."""
        if not self.enabled:
            return False
        return not self.decode_only or x.dim() < 2 or x.shape[-2] == 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """:param x: [..., K]; returns [..., N], or [..., N / 2] with an activation, in the dtype of x."""
        if not self.active(x):
            return self._gate(self._dense(x))
        self._count(x)
        return self._sparse(x)

    def _sparse(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _dense(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _gate(self, y: torch.Tensor) -> torch.Tensor:
        if self.activation is None:
            return y
        gate, up = y.chunk(2, dim=-1)
        return reference.activate(gate, self.activation) * up

    def refresh_bias(self) -> None:
        """Compute the fused bias ``b + η·colsum(W) + r`` [N] anew."""
        raise NotImplementedError

    def _with_output_bias(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        if self.output_bias is None:
            return bias
        own = self.output_bias = self.output_bias.to(self._weights_device())
        return own if bias is None else (bias.double() + own.double()).to(bias.dtype)

    def _weights_device(self) -> torch.device:
        raise NotImplementedError

    def prepare_for_cpu(self) -> None:
        """Ask for huge pages below the weights."""
        for tensor in (*self.parameters(recurse=False), *self.buffers(recurse=False)):
            advise_huge_pages(tensor.detach())

    def reload(self) -> None:
        """Follow the layers after new values were written into their parameters."""
        self.bias = joined_bias([part.module for part in self.parts], self.segments, self._dtype())
        self.refresh_bias()

    def check_loadable(self) -> None:
        """
        :raises ValueError: new values in the layers' parameters would not reach the kernels.
        """

    def _dtype(self) -> torch.dtype:
        raise NotImplementedError

    # -- counters ------------------------------------------------------------------------------------------------

    def set_counting(self, on: bool) -> None:
        """
        Count dropped inputs of each layer from now on, or stop.

        Counts are added up on the device, inside CUDA graphs too, and read only by :meth:`counts`.
        """
        if on == (self.zeros is not None):
            return
        device = self._device()
        self.zeros = torch.zeros(len(self.parts), dtype=torch.int64, device=device) if on else None
        self.total = torch.zeros((), dtype=torch.int64, device=device) if on else None

    def reset_counts(self) -> None:
        """Start counting anew."""
        if self.zeros is not None and self.total is not None:
            self.zeros.zero_()
            self.total.zero_()

    def counts(self) -> dict[str, tuple[int, int]]:
        """Dropped and seen inputs by layer name; empty where nothing is counted. Waits for the device."""
        if self.zeros is None or self.total is None:
            return {}
        zeros, total = self.zeros.tolist(), int(self.total)
        return {part.name: (zeros[i], total) for i, part in enumerate(self.parts)}

    def _count(self, x: torch.Tensor) -> None:
        if self.zeros is None or self.total is None:
            return
        size = ((x if x.dtype == torch.float64 else x.float()) - self.mode).abs()
        dropped = {threshold: (size <= threshold).sum() for threshold in dict.fromkeys(self.thresholds)}
        self.zeros.add_(torch.stack([dropped[threshold] for threshold in self.thresholds]))
        self.total.add_(x.numel())

    def _device(self) -> torch.device:
        return next(self.parameters(recurse=False), next(self.buffers(recurse=False), torch.empty(0))).device

    # -- the layers behind it ------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Nothing: the stand-ins save what the layers would have saved, under their names."""

    def _load_from_state_dict(self, *_args: Any) -> None:
        """Nothing, likewise."""

    def release(self) -> None:
        """Give the layers back parameters of their own."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        thresholds = ", ".join(f"{value:.4g}" for value in self.thresholds)
        text = f"out_features={self.out_features}, thresholds=[{thresholds}], mode={self.mode:.4g}"
        return text + (f", activation={self.activation}" if self.activation else "")


def _is_transposed(module: nn.Module) -> bool:
    """Whether the layer stores its weight [K, N] (transformers' Conv1D) and not [N, K]."""
    return type(module).__name__ == "Conv1D"


def joined_bias(modules: Sequence[nn.Module], widths: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
    """The biases of layers side by side [N], zeros for a layer without; None where none has a bias."""
    biases = [getattr(module, "bias", None) for module in modules]
    if all(bias is None for bias in biases):
        return None
    device = next(bias.device for bias in biases if bias is not None)
    parts = [
        torch.zeros(width, dtype=dtype, device=device) if bias is None else bias.detach().to(dtype)
        for bias, width in zip(biases, widths, strict=True)
    ]
    return torch.cat(parts)


def _joined_output_bias(parts: Sequence[Part]) -> torch.Tensor | None:
    """The vectors of parts side by side, float32 [N], zeros for a part without; None where none has one."""
    if all(part.output_bias is None for part in parts):
        return None
    return torch.cat(
        [
            torch.zeros(part.out_features) if part.output_bias is None else part.output_bias.float().cpu()
            for part in parts
        ]
    )


class FloatProjection(Projection):
    """
    A projection over floating-point weights, one contiguous copy ``weight`` [K, N].

    Building it moves the weights: the layers' parameters become views, and their own memory is free afterwards. Until
    then there is a second copy of these layers alone.
    """

    weight: nn.Parameter

    def __init__(self, parts: Sequence[Part], mode: float, **options: Any) -> None:
        modules, widths = [part.module for part in parts], [part.out_features for part in parts]
        dtype = modules[0].weight.dtype
        super().__init__(parts, mode, joined_bias(modules, widths, dtype), **options)
        with torch.no_grad():
            matrices = [m.weight.detach() if _is_transposed(m) else m.weight.detach().t() for m in modules]
            if len(matrices) == 1:
                weight = matrices[0].contiguous()
            else:
                weight = torch.empty((matrices[0].shape[0], self.out_features), dtype=dtype, device=matrices[0].device)
                torch.cat(matrices, dim=1, out=weight)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._tie()
        self.refresh_bias()

    @property
    def in_features(self) -> int:
        """K, the number of input channels."""
        return self.weight.shape[0]

    def _tie(self) -> None:
        start = 0
        for part in self.parts:
            view = self.weight.data[:, start : start + part.out_features]
            part.module.weight.data = view if _is_transposed(part.module) else view.t()
            start += part.out_features

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FloatProjection:
        # Moves and casts go through here; the layers kept outside follow their projection.
        before = (self.weight.data_ptr(), self.weight.dtype, self.weight.device)
        super()._apply(fn, recurse)
        if (self.weight.data_ptr(), self.weight.dtype, self.weight.device) != before:
            self._tie()
            for part in self.parts:
                if part.module.bias is not None:
                    part.module.bias.data = fn(part.module.bias.data)
                for key, buffer in part.module._buffers.items():
                    part.module._buffers[key] = None if buffer is None else fn(buffer)
            self.refresh_bias()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FloatProjection:
        # parameters copy themselves as tensors of their own, also where they are views
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        twin._tie()
        return twin

    def release(self) -> None:
        with torch.no_grad():
            for part in self.parts:
                part.module.weight.data = part.module.weight.data.contiguous()

    def refresh_bias(self) -> None:
        self.fused_bias = self._with_output_bias(reference.fuse_bias(self.weight.detach(), self.bias, self.mode))

    def _dtype(self) -> torch.dtype:
        return self.weight.dtype

    def _weights_device(self) -> torch.device:
        return self.weight.device

    def _dense(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.t(), self.bias)

    def _sparse(self, x: torch.Tensor) -> torch.Tensor:
        run = reference if self.use_reference else ops
        options = {} if self.use_reference else {"sparsity": self.sparsity}
        if self.activation is None:
            return run.sparse_fc(x, self.weight, self.thresholds, self.segments, self.mode, self.fused_bias, **options)
        gate, up = self.thresholds[0], self.thresholds[-1]
        return run.sparse_glu(x, self.weight, gate, up, self.mode, self.activation, self.fused_bias, **options)


class PackedProjection(Projection):
    """
    A projection over 8- or 4-bit weights, packed input channel by input channel (see :mod:`.packing`).

    The layers' own packed parameters are not views of this; whoever builds it puts them away.

    :param weight: the weights of all parts side by side.
    :param input_scale: factor of the input [K] that belongs to the weights (AWQ); applied after pruning, as NNCF does.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    input_scale: torch.Tensor | None

    def __init__(
        self,
        parts: Sequence[Part],
        mode: float,
        weight: QuantWeight,
        input_scale: torch.Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__(parts, mode, None, **options)
        self.bits, self.weight_dtype, self.in_features = weight.bits, weight.dtype, weight.in_features
        for name, tensor in (("packed", weight.packed), ("scale", weight.scale), ("zero", weight.zero)):
            self.register_buffer(name, tensor, persistent=False)
        self.register_buffer("input_scale", input_scale, persistent=False)
        self.reload()

    def _dtype(self) -> torch.dtype:
        return torch.float32

    def _weights_device(self) -> torch.device:
        return self.packed.device

    def _weight(self) -> QuantWeight:
        kind = {8: Int8Weight, 4: Int4Weight}[self.bits]
        return kind(self.packed, self.scale, self.zero, self.weight_dtype)

    def refresh_bias(self) -> None:
        self.fused_bias = self.bias
        if self.mode != 0.0:
            weight = self._weight()
            if self.input_scale is None:
                sums = weight.colsum()
            else:
                sums = self.input_scale.double() @ weight.dequantize(torch.float64)
            bias = 0.0 if self.bias is None else self.bias.double()
            self.fused_bias = (self.mode * sums + bias).float()
        self.fused_bias = self._with_output_bias(self.fused_bias)

    def check_loadable(self) -> None:
        msg = "The packed weights of a deployed model cannot be replaced; undeploy it, load them, and deploy again."
        raise ValueError(msg)

    def release(self) -> None:
        """Nothing: the layers kept their packed weights."""

    def _dense(self, x: torch.Tensor) -> torch.Tensor:
        if self.input_scale is not None:
            x = x * self.input_scale.to(x.dtype)
        keep = [-1.0] * len(self.segments)
        return self._fc(x, keep, 0.0, self.bias)

    def _fc(self, x: torch.Tensor, thresholds: list[float], mode: float, bias: torch.Tensor | None) -> torch.Tensor:
        run = quantized if self.use_reference else quant_ops
        args = (x, self.packed, self.scale, self.zero, self.bits, thresholds, self.segments, mode, bias)
        return run.sparse_fc_quant(*args) if self.use_reference else run.sparse_fc_quant(*args, sparsity=self.sparsity)

    def _sparse(self, x: torch.Tensor) -> torch.Tensor:
        thresholds, mode = self.thresholds, self.mode
        if self.input_scale is not None:  # parts with a factor come alone
            z = reference.prune(x, mode, thresholds[0]) if self.use_reference else ops.prune(x, mode, thresholds[0])
            x, mode = z * self.input_scale.to(x.dtype), 0.0
            thresholds = [0.0 if thresholds[0] >= 0 else -1.0]
        if self.activation is None:
            return self._fc(x, thresholds, mode, self.fused_bias)
        run = quantized if self.use_reference else quant_ops
        options = {} if self.use_reference else {"sparsity": self.sparsity}
        gate, up = thresholds[0], thresholds[-1]
        packed = (self.packed, self.scale, self.zero, self.bits)
        return run.sparse_glu_quant(x, *packed, gate, up, mode, self.activation, self.fused_bias, **options)


class _Handover:
    """
    What layers of one projection pass on within one step: the first that sees a tensor computes for all.

    The pair is replaced as a whole, and used only for the very same tensor object, so that a caller who runs layers in
    another order or from another thread gets a second computation and never a wrong result.
    """

    __slots__ = ("pending",)

    def __init__(self) -> None:
        self.pending: tuple[torch.Tensor, torch.Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Handover:
        memo[id(self)] = twin = _Handover()
        return twin


class DeployedLinear(nn.Module):
    """
    Stands where one FC layer stood; computes with the projection that it shares with its neighbours.

    :param projection: owned by the first layer of the projection, so that it is registered once.
    :param index: which part of the projection this is.
    """

    def __init__(self, projection: Projection, index: int, handover: _Handover) -> None:
        super().__init__()
        part = projection.parts[index]
        if index == 0:
            self.projection = projection
        self._shared = (projection,)  # a tuple hides it from the module tree
        self._handover = handover
        self._original = (part.module,)
        self.out_features = part.out_features
        self.start = sum(projection.segments[:index])
        self.is_first = index == 0
        self.is_last = index == len(projection.parts) - 1
        self.alone = self.is_first and self.is_last

    @property
    def in_features(self) -> int:
        """Input channels."""
        return self._shared[0].in_features  # type: ignore[return-value]

    @property
    def weight(self) -> torch.Tensor:
        """The weight as the replaced layer stores it: a view into the projection."""
        return self._original[0].weight  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor | None:
        """The plain bias of the replaced layer."""
        return self._original[0].bias  # type: ignore[return-value]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """:param input: [..., K]; returns [..., out_features]."""
        projection = self._shared[0]
        if self.alone:
            return projection(input)
        pending = self._handover.pending
        # the first always computes: a caller may have written new values into the same tensor
        if self.is_first or pending is None or pending[0] is not input:
            pending = (input, projection(input))
        self._handover.pending = None if self.is_last else pending
        return pending[1][..., self.start : self.start + self.out_features]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> DeployedLinear:
        self._shared[0]._apply(fn)  # a second time does nothing
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._original[0]._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self._shared[0].check_loadable()
        self._original[0]._load_from_state_dict(state_dict, prefix, *args)  # in place: the projection sees it
        self._shared[0].reload()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class DeployedGated(nn.Module):
    """
    Stands where a gated feed-forward stood whose channels are dropped behind the gate (CATS): the gate's layer runs
    dense, up's rows and down's columns of closed gates are skipped.

    Gate and up stay as they were, weights [N, K] row by row, which is what the kernel reads; down's projection holds
    its weights the other way round and drops the zeros that closed gates leave.

    :param gate, up: plain linear layers.
    :param down: a deployed layer, alone in its projection, with threshold 0.
    :param names: child names of gate, up and down in the feed-forward.
    :param threshold: τ on the size of the activated gate.
    """

    def __init__(
        self,
        gate: nn.Module,
        up: nn.Module,
        down: DeployedLinear,
        names: tuple[str, str, str],
        threshold: float,
        activation: str,
    ) -> None:
        super().__init__()
        for name, module in zip(names, (gate, up, down), strict=True):
            self.add_module(name, module)
        self.names = names
        self.threshold = threshold
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """:param x: [..., K]; returns [..., outputs of down]."""
        gate, up, down = (self._modules[name] for name in self.names)
        projection = down._shared[0]  # type: ignore[union-attr]
        # not by calling the layers: the hooks of the simulation wait on them
        opened = F.linear(x, gate.weight, gate.bias)  # type: ignore[union-attr]
        if not projection.active(x):
            y = F.linear(x, up.weight, up.bias)  # type: ignore[union-attr]
            return projection(reference.activate(opened, self.activation) * y)
        run = reference.gated_up if projection.use_reference else ops.gated_up
        return projection(run(opened, x, up.weight, self.threshold, self.activation, up.bias))  # type: ignore[union-attr]

    def extra_repr(self) -> str:
        return f"threshold={self.threshold:.4g}, activation={self.activation}"


class DeployedGlu(nn.Module):
    """
    Stands where a gated feed-forward stood: ``down(activation(gate(x)) * up(x))`` in two launches.

    :param gate_up: projection with an activation.
    :param names: child names of its layers in the feed-forward.
    :param down: the last layer, deployed or as it was, under its old name.
    """

    def __init__(self, gate_up: Projection, names: Sequence[str], down: nn.Module, down_name: str) -> None:
        super().__init__()
        self.gate_up = gate_up
        self._names = tuple(names)
        self._down_name = down_name
        self.add_module(down_name, down)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """:param x: [..., K]; returns [..., outputs of down]."""
        return getattr(self, self._down_name)(self.gate_up(x))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, part in zip(self._names, self.gate_up.parts):
            part.module._save_to_state_dict(destination, f"{prefix}{name}.", keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.gate_up.check_loadable()
        for name, part in zip(self._names, self.gate_up.parts):
            part.module._load_from_state_dict(state_dict, f"{prefix}{name}.", *args)
        self.gate_up.reload()


def deployed_layers(projection: Projection) -> list[DeployedLinear]:
    """Stand-ins for all layers of a projection, in the order of its parts."""
    handover = _Handover()
    return [DeployedLinear(projection, index, handover) for index in range(len(projection.parts))]
