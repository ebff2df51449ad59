# SPDX-License-Identifier: Apache-2.0
"""
Weights that are not in memory: models whose modules accelerate loads from disk or main memory when they are called.

``from_pretrained(device_map=...)`` and ``accelerate.cpu_offload`` leave a hook on each module that fetches its weights
before a call and drops them after it. Here a whole block's weights are fetched once and kept for as many calls as there
are samples.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def offload_hooks(module: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """(module, accelerate's hook) of the module and those in it whose weights are fetched for each call."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):  # a SequentialHook holds several
            if getattr(one, "offload", False) and getattr(one, "weights_map", None) is not None:
                yield part, one


def is_offloaded(module: nn.Module) -> bool:
    """Whether weights of the module are not in memory between calls."""
    return any(True for _ in offload_hooks(module))


def execution_device(module: nn.Module) -> torch.device | None:
    """Where an offloaded module computes; None where its weights say so."""
    return next((torch.device(hook.execution_device) for _, hook in offload_hooks(module)), None)


@contextmanager
def resident(*modules: nn.Module) -> Iterator[None]:
    """The weights of the modules are in memory inside; a module that is not offloaded stays as it is."""
    loaded = [pair for module in modules for pair in offload_hooks(module)]
    fetched: list[tuple[nn.Module, Any, list[str]]] = []
    try:
        for part, hook in loaded:
            names = _fetch(part, hook)
            fetched.append((part, hook, names))
        yield
    finally:
        for part, hook, names in fetched:
            _drop(part, hook, names)


def _fetch(part: nn.Module, hook: Any) -> list[str]:
    from accelerate.utils import set_module_tensor_to_device

    names = _tensor_names(part, hook)
    for name in names:
        value = hook.weights_map[name]
        if torch.device(hook.execution_device).type == "cpu":
            value = _copy(value)
        set_module_tensor_to_device(part, name, hook.execution_device, value=value)
    hook.offload = False  # so that calls leave the weights alone
    return names


def _copy(value: torch.Tensor) -> torch.Tensor:
    """
    A copy in memory of its own: not a window into the mapped file, which would stay open as a whole, nor from the heap,
    where the small things that are kept from block to block settle in the gaps and make it grow by a block each time.
    """
    if value.numel() == 0 or not value.is_contiguous():
        return value.clone()
    memory = mmap.mmap(-1, value.nbytes)  # goes with the last tensor on it
    copy = torch.frombuffer(memory, dtype=torch.uint8).view(value.dtype).view(value.shape)
    return copy.copy_(value)


def _drop(part: nn.Module, hook: Any, names: list[str]) -> None:
    from accelerate.utils import set_module_tensor_to_device

    for name in names:
        set_module_tensor_to_device(part, name, "meta")
    hook.offload = True


def _tensor_names(part: nn.Module, hook: Any) -> list[str]:
    from accelerate.utils import named_module_tensors

    found = named_module_tensors(
        part, include_buffers=hook.offload_buffers, recurse=hook.place_submodules, remove_non_persistent=True
    )
    return [name for name, _ in found]


def weight_bytes(module: nn.Module) -> int:
    """Bytes of the weights and buffers of a module, wherever they are; each once."""
    tensors = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
