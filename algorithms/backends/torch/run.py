# SPDX-License-Identifier: Apache-2.0
"""Calling a PyTorch model with whatever a calibration sample is."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import nncf
import numpy as np
import torch
from torch import nn

from scap_nncf.algorithms.backends.torch.residency import execution_device


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's training flag is restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def model_device(model: nn.Module) -> torch.device:
    """Device of the first parameter or buffer that is in memory; CPU where there is none."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.device.type != "meta":  # where accelerate keeps weights that it fetches for each call
            return tensor.device
    return execution_device(model) or torch.device("cpu")


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors and arrays inside mappings, tuples and lists, moved to a device."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, torch.Tensor):
        return value if value.is_meta else value.to(device)  # a sample of a model that has no values either
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(item, device) for item in value) if type(value) in (tuple, list) else value
    return value


def attention_mask(sample: Any) -> torch.Tensor | None:
    """The sample's attention mask [B, T], if it has one and masks something out."""
    if not isinstance(sample, Mapping):
        return None
    mask = sample.get("attention_mask")
    if isinstance(mask, np.ndarray):
        mask = torch.from_numpy(mask)
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or bool((mask != 0).all()):
        return None
    return mask


def forward_sample(model: nn.Module, sample: Any, what: str) -> Any:
    """
    Call the model with a sample: a mapping is passed as keyword arguments, a tuple or list as positional arguments,
    anything else as the only argument.

    :param what: how to name the sample in an error message.
    :raises nncf.ValidationError: the model cannot take the sample; the cause is chained.
    """
    sample = to_device(sample, model_device(model))
    try:
        if isinstance(sample, Mapping):
            return model(**sample)
        if isinstance(sample, (tuple, list)):
            return model(*sample)
        return model(sample)
    except (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        msg = (
            f"{type(model).__name__} cannot take {what} ({describe(sample)}): {type(error).__name__}: {error}. "
            "A sample must be a dict of keyword arguments, a tuple of positional arguments, or one tensor; use the "
            "transform_func of nncf.Dataset to make it so."
        )
        raise nncf.ValidationError(msg) from error


def without_cache(model: nn.Module, sample: Any) -> Any:
    """A mapping with ``use_cache=False`` where the model knows that: for passes in which nothing is generated."""
    if not isinstance(sample, Mapping) or "use_cache" in sample:
        return sample
    known = "use_cache" in inspect.signature(type(model).forward).parameters
    return {**sample, "use_cache": False} if known else sample


def describe(sample: Any) -> str:
    """Short description of a sample for messages."""
    if isinstance(sample, Mapping):
        return "{" + ", ".join(f"{key}: {describe(value)}" for key, value in sample.items()) + "}"
    if isinstance(sample, (torch.Tensor, np.ndarray)):
        return f"{sample.dtype} {tuple(sample.shape)}"
    return type(sample).__name__
