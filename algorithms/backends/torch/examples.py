# SPDX-License-Identifier: Apache-2.0
"""What a PyTorch model can be called with, where the user gave nothing: to find its sites, never to calibrate."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from scap_nncf.algorithms.backends.torch.run import forward_sample

#: Tokens that an encoder-decoder model writes for a sample without decoder inputs.
DECODER_TOKENS = 64
_DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds", "labels")


def example_inputs(model: nn.Module) -> Any:
    """
    A sample to watch: token ids, an image, or sound, by what the model says of its inputs. transformers' models say it
    in ``main_input_name`` and their configuration, those of timm in ``pretrained_cfg``. Otherwise a few token ids.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "main_input_name"):
        size = _timm_input_size(model)
        if size is not None:
            return {"x": _noise(model, 1, *size)}
        dummy = getattr(model, "dummy_inputs", None)
        return dummy if isinstance(dummy, dict) and dummy else {"input_ids": _token_ids()}
    main = str(model.main_input_name)
    inputs: dict[str, Any] = {}
    if main == "pixel_values":
        inputs = {main: _image(model, config)}
    elif main == "input_features":
        bins = getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", 80)
        frames = 2 * getattr(config, "max_source_positions", 1500)
        inputs = {main: _noise(model, 1, int(bins), int(frames))}
    elif main == "input_values":  # a second of sound at 16 kHz
        inputs = {main: _noise(model, 1, 16_000)}
    else:
        dummy = getattr(model, "dummy_inputs", None)
        inputs = dict(dummy) if isinstance(dummy, dict) and dummy else {"input_ids": _token_ids()}
    if hasattr(model, "get_image_features") and hasattr(model, "get_text_features"):  # two towers: CLIP, SigLIP
        inputs = {"input_ids": _token_ids(), "pixel_values": _image(model, config)}
    if getattr(config, "is_encoder_decoder", False) and not any(name in inputs for name in _DECODER_INPUTS):
        start = getattr(config, "decoder_start_token_id", None) or 0
        if "decoder_input_ids" in _parameters(model):
            inputs["decoder_input_ids"] = torch.tensor([[start, 1, 2, 3]]).expand(_batch(inputs), -1)
    return inputs


def with_decoder_inputs(model: nn.Module, sample: Any, what: str) -> Any:
    """
    A sample that an encoder-decoder model can be called with: where it has inputs for the encoder alone (a recording, a
    text to translate), the model writes the decoder's itself, greedily, up to ``DECODER_TOKENS`` tokens.

    :param what: how to name the sample in an error message.
    :raises nncf.ValidationError: the model cannot generate from the sample.
    """
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False) or not isinstance(sample, Mapping):
        return sample
    if any(name in sample for name in _DECODER_INPUTS) or not hasattr(model, "generate"):
        return sample
    if "decoder_input_ids" not in _parameters(model) or not model.can_generate():  # type: ignore[operator]
        return sample

    class Generate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, **inputs: Any) -> Any:
            most = getattr(config, "max_target_positions", None) or 2 * DECODER_TOKENS
            options = {"max_new_tokens": min(DECODER_TOKENS, most // 2), "do_sample": False, "num_beams": 1}
            return model.generate(**inputs, **options)  # type: ignore[operator]

    Generate.__name__ = type(model).__name__  # for messages
    with torch.no_grad():
        ids = forward_sample(Generate(), sample, what)
    start = getattr(model.generation_config, "decoder_start_token_id", None)  # type: ignore[union-attr]
    if start is not None and (ids.shape[1] == 0 or not bool((ids[:, 0] == start).all())):
        ids = torch.cat([ids.new_full((ids.shape[0], 1), start), ids], 1)
    return {**sample, "decoder_input_ids": ids}


def _token_ids() -> torch.Tensor:
    return torch.arange(1, 9).unsqueeze(0)


def _batch(inputs: Mapping[str, torch.Tensor]) -> int:
    return next(iter(inputs.values())).shape[0]


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters


def _image(model: nn.Module, config: Any) -> torch.Tensor:
    vision = getattr(config, "vision_config", None) or config
    size = getattr(vision, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return _noise(model, 1, int(getattr(vision, "num_channels", 3)), int(height), int(width))


def _timm_input_size(model: nn.Module) -> tuple[int, ...] | None:
    """Channels, height, width; models of timm remember what they were made for."""
    embed = getattr(model, "patch_embed", None)
    size, projection = getattr(embed, "img_size", None), getattr(embed, "proj", None)
    if size is not None and isinstance(projection, nn.Conv2d):
        return projection.in_channels, *size
    settings = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    found = settings.get("input_size") if isinstance(settings, Mapping) else None
    return tuple(found) if found else None


def _noise(model: nn.Module, *shape: int) -> torch.Tensor:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
