# SPDX-License-Identifier: Apache-2.0
"""Text from a model, with what it cost."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import nncf
import torch

import scap_nncf


@dataclass(frozen=True)
class Generation:
    """
    :param text: the new text, without the prompt and special tokens.
    :param prompt_tokens: tokens of the prompt, template included.
    :param tokens: new tokens.
    :param seconds: wall-clock time from the prompt to the last token.
    :param realised_sparsity: share of pruned inputs over prompt and new tokens, weighted by weights; None if the model
        is dense, or an OpenVINO model, which does not count while it runs.
    """

    text: str
    prompt_tokens: int
    tokens: int
    seconds: float
    realised_sparsity: float | None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@torch.no_grad()
def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 64,
    chat: bool | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> Generation:
    """
    Generates text for a prompt.

    :param chat: put the prompt into the tokenizer's chat template; None where there is a template.
    :param temperature: 0 takes the most likely token each time; above it samples, with `seed`.
    :raises nncf.ValidationError: if the prompt is empty, a number is out of range, or `chat` is asked of a tokenizer
        without a template.
    """
    if not prompt.strip():
        msg = "the prompt is empty; expected some text"
        raise nncf.ValidationError(msg)
    if max_new_tokens < 1 or temperature < 0:
        msg = f"max_new_tokens is {max_new_tokens} and temperature {temperature}; expected at least 1 and 0"
        raise nncf.ValidationError(msg)
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if chat and not has_template:
        msg = "the model's tokenizer has no chat template: leave chat out to continue the prompt as plain text"
        raise nncf.ValidationError(msg)
    if chat or (chat is None and has_template):
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = {key: inputs[key].to(model.device) for key in ("input_ids", "attention_mask")}
    length = inputs["input_ids"].shape[1]
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    # a checkpoint's own sampling settings would trigger warnings, or change what temperature 0 means
    options |= {"temperature": temperature, "top_k": 50, "top_p": 1.0} if temperature > 0 else dict(_GREEDY)
    if tokenizer.pad_token_id is None:
        options["pad_token_id"] = tokenizer.eos_token_id
    controller = scap_nncf.get_controller(model)
    if controller is not None:
        controller.reset_counters()
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        start = time.perf_counter()
        output = model.generate(**inputs, **options)[0, length:]  # [new tokens]
        count = output.numel()
        new_text = tokenizer.decode(output, skip_special_tokens=True).strip()  # reading it waits for the device
        seconds = time.perf_counter() - start
    realised = None if controller is None else controller.statistics().realised_sparsity
    return Generation(new_text, length, count, seconds, realised)


_GREEDY = {"temperature": None, "top_k": None, "top_p": None}
