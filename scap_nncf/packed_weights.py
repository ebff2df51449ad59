# SPDX-License-Identifier: Apache-2.0
"""
Weights of 8 or 4 bits, taken over from the toolkit that quantised the model.

torchao's weight-only tensors are read where they are. ``nncf.compress_weights`` leaves packed parameters in the modules
and decompresses them in hooks on every function call; the whole forward runs under a function mode for that. Kernels
read packed weights themselves, so the mode is taken off as a whole: every hook must be one that is understood, or the
model stays as it is. (Hooks are found by the running number of a call, so taking over some and leaving others would
shift the numbers.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from scap_nncf.algorithms.backends.torch.layers import fc_shape
from scap_nncf.kernels.packing import QuantWeight, from_nncf, from_torchao


class CannotTakeOver(Exception):
    """Something in a quantised model has no counterpart in the kernels; the message says what."""


@dataclass
class TakenOver:
    """
    What was found in a quantised model.

    :param layers: FC layer name → NNCF's decompressor, or None where the weight is a tensor of torchao.
    :param embeddings: embedding name → its decompressor.
    :param scales: FC layer name → factor of its input [K] (AWQ, SmoothQuant).
    :param weights: FC layer name → packed weight, after :meth:`pack`.
    """

    model: nn.Module
    layers: dict[str, nn.Module | None] = field(default_factory=dict)
    embeddings: dict[str, nn.Module] = field(default_factory=dict)
    scales: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, QuantWeight] = field(default_factory=dict)
    _parked: list[tuple[nn.Parameter, torch.device]] = field(default_factory=list)
    _replaced: list[tuple[nn.Module, torch.device]] = field(default_factory=list)
    _forward: Callable[..., Any] | None = None

    def pack(self) -> None:
        """
        Fill `weights`, the layers' weights as the kernels read them. The layers' own wait on the CPU until
        :meth:`restore`, so that no more than one layer has two copies on a GPU.

        :raises CannotTakeOver: a format that the kernels cannot read.
        """
        for name, decompressor in self.layers.items():
            module = self.model.get_submodule(name)
            try:
                packed = _from_tensor(module.weight) if decompressor is None else from_nncf(module.weight, decompressor)
                self.weights[name] = packed
            except (TypeError, ValueError) as error:
                msg = f"{name}: {error}"
                raise CannotTakeOver(msg) from error
            if decompressor is None:
                self._park_tensor(module)
            elif module.weight.is_cuda and not any(module.weight is weight for weight, _ in self._parked):
                tied = any(self.layers[other] is decompressor for other in self.layers if other not in self.weights)
                if not tied:
                    self._parked.append((module.weight, module.weight.device))
                    module.weight.data = module.weight.data.cpu()

    def _park_tensor(self, module: nn.Module) -> None:
        """A tensor subclass has no storage that could be moved away under it: its parameter is replaced."""
        device = module.weight.device  # type: ignore[union-attr]
        if device.type == "cuda":
            self._replaced.append((module, device))  # type: ignore[arg-type]
            _move_weight(module, torch.device("cpu"))

    def bypass(self) -> None:
        """Run the model's own forward, without NNCF's function mode, where NNCF has wrapped it."""
        if all(decompressor is None for decompressor in self.layers.values()) and not self.embeddings:
            return
        self._forward = self.model.__dict__["forward"]
        self.model.__dict__["forward"] = self._forward.orig_forward  # type: ignore[union-attr]

    def restore(self) -> None:
        """Put NNCF's forward and the layers' own weights back."""
        if self._forward is not None:
            self.model.__dict__["forward"] = self._forward
            self._forward = None
        while self._parked:
            parameter, device = self._parked.pop()
            parameter.data = parameter.data.to(device)
        while self._replaced:
            _move_weight(*self._replaced.pop())


def take_over(model: nn.Module) -> TakenOver | None:
    """
    Find the quantised weights of a model; nothing is changed.

    :return: None where there are none: NNCF has not wrapped the model, and no layer has a weight of torchao.
    :raises CannotTakeOver: NNCF has wrapped the model, and there is something that the kernels have no counterpart for.
    """
    from nncf.torch.function_hook.wrapper import get_hook_storage, is_wrapped

    if not is_wrapped(model):
        return _torchao_layers(model)
    from scap_nncf.algorithms.backends.torch.function_hooks import input_scale, resolve

    storage = get_hook_storage(model)
    found = TakenOver(model)
    readers: dict[int, list[str]] = {}  # a tied weight has one hook and several modules
    for name, module in model.named_modules():
        if module._parameters.get("weight") is not None:
            readers.setdefault(id(module._parameters["weight"]), []).append(name)
    for key, hooks in storage.post_hooks.items():
        owner, decompressor = _decompressed(key, list(hooks.values()))
        for name in readers[id(model.get_submodule(owner).weight)]:
            module = model.get_submodule(name)
            if isinstance(module, nn.Embedding):
                found.embeddings[name] = decompressor
            elif fc_shape(module) is not None:
                found.layers[name] = decompressor
            else:
                msg = f"the compressed weight of {name} ({type(module).__name__})"
                raise CannotTakeOver(msg)
    keys = resolve(model)
    unknown = set(storage.pre_hooks) - set(keys.values())
    if unknown:
        msg = f"NNCF's hook on {sorted(unknown)[0]}"
        raise CannotTakeOver(msg)
    for name in keys:
        scale = input_scale(model, name)
        if scale is not None:
            found.scales[name] = scale
    return found


#: classes of torchao's weight-only tensors
_TORCHAO_TENSORS = ("Int8Tensor", "IntxUnpackedToInt8Tensor")


def _torchao_layers(model: nn.Module) -> TakenOver | None:
    found = TakenOver(model)
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Linear) and weight is not None and _is_weight_only(weight):
            found.layers[name] = None
    return found if found.layers else None


def _is_weight_only(weight: torch.Tensor) -> bool:
    """Whether a weight is a tensor of torchao that the kernels can read: activations are not quantised with it."""
    if type(weight).__name__ not in _TORCHAO_TENSORS or not type(weight).__module__.startswith("torchao."):
        return False
    activations = (getattr(weight, key, None) for key in ("act_quant_kwargs", "activation_quantization"))
    bits = _bits(weight)
    return bits is not None and all(value is None for value in activations) and weight.block_size[0] == 1  # type: ignore[attr-defined]


def _bits(weight: torch.Tensor) -> int | None:
    names = {"torch.int4": 4, "torch.int8": 8}
    return names.get(str(getattr(weight, "target_dtype", torch.int8)))


def _from_tensor(weight: torch.Tensor) -> QuantWeight:
    """
    :param weight: a tensor of torchao [N, K].
    :raises ValueError: its parts do not fit together.
    """
    bits = _bits(weight)
    assert bits is not None
    zero = getattr(weight, "zero_point", None)
    values, scale = weight.qdata, weight.scale  # type: ignore[attr-defined]
    return from_torchao(values, scale, zero, bits=bits, dtype=weight.dtype)


def _move_weight(module: nn.Module, device: torch.device) -> None:
    weight = module._parameters["weight"]
    assert weight is not None
    module._parameters["weight"] = nn.Parameter(weight.detach().to(device), requires_grad=weight.requires_grad)


def _decompressed(key: str, hooks: list[nn.Module]) -> tuple[str, nn.Module]:
    """Module name and decompressor behind a hook on ``<module>:weight__0``."""
    parameter, _, port = key.rpartition("__")
    name, _, attribute = parameter.replace(":", ".").rpartition(".")
    known = len(hooks) == 1 and type(hooks[0]).__name__.endswith("WeightsDecompressor")
    if not known or attribute != "weight" or port != "0":
        msg = f"NNCF's hooks on {key.replace(':', '.')} ({', '.join(type(hook).__name__ for hook in hooks)})"
        raise CannotTakeOver(msg)
    return name, hooks[0]


class PackedEmbedding(nn.Module):
    """
    Stands for an embedding that NNCF compressed to 8 bits with a scale a row: only the rows asked for are decompressed.

    :raises CannotTakeOver: for another format.
    """

    def __init__(self, embedding: nn.Module, decompressor: Any) -> None:
        super().__init__()
        by_row = decompressor._scale.dim() == 2 and decompressor._scale.shape[1] == 1
        int8 = type(decompressor).__name__.startswith("INT8")
        if type(embedding) is not nn.Embedding or embedding.max_norm is not None or not (by_row and int8):
            msg = f"a {type(embedding).__name__} compressed by {type(decompressor).__name__}"
            raise CannotTakeOver(msg)
        self._original = (embedding,)
        self.register_buffer("values", embedding.weight.data, persistent=False)
        self.register_buffer("scale", decompressor._scale, persistent=False)
        self.register_buffer("zero", getattr(decompressor, "_zero_point", None), persistent=False)
        self.dtype = decompressor.result_dtype or decompressor._scale.dtype
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim

    @property
    def weight(self) -> torch.Tensor:
        """The packed values [V, H]."""
        return self.values

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """:param input: ids of any shape; returns [..., H]."""
        # the arithmetic of NNCF's decompressor, on these rows: scale's dtype first, then the result's
        rows, scale = self.values[input].to(self.scale.dtype), self.scale[input]
        if self.zero is not None:
            rows = rows - self.zero[input].to(self.scale.dtype)
        return (rows * scale).to(self.dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._original[0]._save_to_state_dict(destination, prefix, keep_vars)
