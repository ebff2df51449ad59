# SPDX-License-Identifier: Apache-2.0
"""
Loading models whose weights stay on disk: transformers' ``device_map`` with everything in blocks on ``disk``.

What is outside of the blocks (embeddings, norms) is in memory; each block's weights are read from the checkpoint's own
safetensors when they are needed. Calibration then goes block by block by itself
(:mod:`scap_nncf.algorithms.backends.torch.blockwise`).
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import nncf
import torch
from torch import nn

from scap_nncf.extras import require


def disk_places(model: nn.Module, device: torch.device | str) -> dict[str, str]:
    """
    A device map: blocks, and an output embedding of its own, on disk; everything else on the device.

    :param model: of the architecture; it may be on the meta device.
    :raises nncf.UnsupportedModelError: the model has no list of blocks.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # type: ignore[operator]
    tied = head is not None and getattr(model.config, "tie_word_embeddings", False) and embedding is not None
    places: dict[str, str] = {}

    def visit(prefix: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if isinstance(child, nn.ModuleList) and len(child) > 0:
                places.update({f"{path}.{index}": "disk" for index, _ in child.named_children()})
            elif child is head and not tied:
                places[path] = "disk"
            elif any(isinstance(part, nn.ModuleList) for part in child.modules()):
                visit(f"{path}.", child)
            else:
                places[path] = str(device)

    visit("", model)
    if not any(part.isdigit() for path in places for part in path.split(".")):
        msg = f"{type(model).__name__} has no list of blocks that could stay on disk; load it as a whole."
        raise nncf.UnsupportedModelError(msg)
    return places


@contextmanager
def disk_options(config: Any, device: torch.device | str) -> Iterator[dict[str, Any]]:
    """
    Options for ``from_pretrained`` that leave the weights on disk. The folder for weights that transformers has to
    rewrite (another dtype, experts that it fuses) is in ``options["offload_folder"]``; pass it to :func:`remove_with`.
    """
    require("accelerate", "transformers", "leaving weights on disk")
    transformers = require("transformers", "transformers", "leaving weights on disk")
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config)
    folder = tempfile.mkdtemp(prefix="scap-offload-")
    try:
        yield {"device_map": disk_places(empty, device), "offload_folder": folder}
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def remove_with(model: nn.Module, folder: str) -> None:
    """Remove the folder when the model goes, or the process ends."""
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
