# SPDX-License-Identifier: Apache-2.0
"""
Trains tiny models of kinds whose trained weights are hard to come by, on one CPU core in a minute or so.

    python examples/train_tiny.py moe --seconds 60 --output tiny-moe

`gelu` is an MPT (GELU without a gate), `moe` a Mixtral with 8 experts, `mamba2` a Mamba2: language models over bytes,
trained on the prose of Python's own language reference, which ships with Python (PSF licence) and is read at run time;
nothing of it is stored here but in the weights. `deit` is a DeiT that tells apart shapes which are drawn at run time.
The folder is what transformers' `from_pretrained` loads, in float16, with `training.json` beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from scap_nncf.text import builtin_text

LENGTH = 128  # bytes of a sample
SHAPES = ("circle", "square", "triangle", "cross", "ring", "stripes")


def untrained(kind: str) -> Any:
    """The model with random weights."""
    common = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if kind == "gelu":
        return tf.MptForCausalLM(
            tf.MptConfig(vocab_size=256, d_model=128, n_heads=4, n_layers=4, max_seq_len=LENGTH, expansion_ratio=4)
        )
    if kind == "moe":
        config = tf.MixtralConfig(
            **common,
            hidden_size=128,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=8,
            num_experts_per_tok=2,
            max_position_embeddings=1024,
            output_router_logits=True,
            router_aux_loss_coef=0.005,
        )
        model = tf.MixtralForCausalLM(config)
        model.set_experts_implementation("eager")  # the fastest of the three with gradients on a CPU
        return model
    if kind == "mamba2":
        config = tf.Mamba2Config(
            **common,
            hidden_size=128,
            num_hidden_layers=3,
            num_heads=8,
            head_dim=32,
            state_size=16,
            n_groups=1,
            chunk_size=32,
        )
        return tf.Mamba2ForCausalLM(config)
    config = tf.DeiTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=384,
        id2label=dict(enumerate(SHAPES)),
        label2id={name: number for number, name in enumerate(SHAPES)},
    )
    return tf.DeiTForImageClassification(config)


def text_bytes(part: str) -> torch.Tensor:
    """The built-in text as int64 bytes."""
    return torch.tensor(list("\n\n".join(builtin_text(part)).encode()))  # type: ignore[arg-type]


def text_batch(data: torch.Tensor, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """`count` random windows of LENGTH bytes."""
    starts = torch.randint(len(data) - LENGTH, (count,), generator=generator).tolist()
    return {"input_ids": torch.stack([data[start : start + LENGTH] for start in starts])}


def picture_batch(count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Bright shapes anywhere on a noisy ground: pixel_values [count, 3, 32, 32] and labels [count]."""
    labels = torch.randint(len(SHAPES), (count,), generator=generator)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    pictures = []
    for label in labels.tolist():
        cx, cy, r = torch.rand(3, generator=generator) * torch.tensor([12.0, 12.0, 5.0]) + torch.tensor([10, 10, 5.0])
        dx, dy = x - cx, y - cy
        inside = dx.abs().maximum(dy.abs()) < r
        mask = {
            "circle": dx.hypot(dy) < r,
            "square": inside,
            "triangle": inside & (dy > 2 * dx.abs() - r),
            "cross": inside & ((dx.abs() < r / 3) | (dy.abs() < r / 3)),
            "ring": (dx.hypot(dy) < r) & (dx.hypot(dy) > r / 2),
            "stripes": inside & ((dy + r).long() // 3 % 2 == 0),
        }[SHAPES[label]]
        ground, ink = 0.4 * torch.randn(2, 3, 1, 1, generator=generator)
        ink = ink + 2.0  # shapes are brighter than their ground
        picture = torch.where(mask, ink, ground) + 0.3 * torch.randn(3, 32, 32, generator=generator)
        pictures.append(picture)
    return {"pixel_values": torch.stack(pictures), "labels": labels}


def loss_of(model: Any, batches: list[dict[str, torch.Tensor]]) -> float:
    """Mean cross-entropy in nats, of the next byte or of the label."""
    total = 0.0
    with torch.no_grad():
        for batch in batches:
            if "labels" in batch:
                total += float(torch.nn.functional.cross_entropy(_logits(model, batch), batch["labels"]))
            else:
                logits = _logits(model, batch)[:, :-1].flatten(0, 1)
                total += float(torch.nn.functional.cross_entropy(logits, batch["input_ids"][:, 1:].flatten()))
    return total / len(batches)


def held_out(kind: str, count: int = 8) -> list[dict[str, torch.Tensor]]:
    """Batches of 16 that are not trained on."""
    generator = torch.Generator().manual_seed(12345)
    if kind == "deit":
        return [picture_batch(64, generator) for _ in range(count)]
    data = text_bytes("held_out")
    return [text_batch(data, 16, generator) for _ in range(count)]


def calibration(kind: str, count: int = 8) -> list[dict[str, torch.Tensor]]:
    """Inputs alone, of the training distribution."""
    generator = torch.Generator().manual_seed(1)
    if kind == "deit":
        return [{"pixel_values": picture_batch(16, generator)["pixel_values"]} for _ in range(count)]
    data = text_bytes("calibration")
    return [text_batch(data, 16, generator) for _ in range(count)]


def train(kind: str, seconds: float, seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """
    :return: the model in eval mode, and what is to be said of its training.
    """
    torch.manual_seed(seed)
    model = untrained(kind).train()
    generator = torch.Generator().manual_seed(seed)
    data = text_bytes("calibration") if kind != "deit" else None
    peak = 1e-3 if data is None else 3e-3
    optimiser = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.05)
    started, step, shown = time.perf_counter(), 0, 0.0
    while (elapsed := time.perf_counter() - started) < seconds:
        share = elapsed / seconds  # the rate follows the clock: warm-up, then a cosine to nothing
        rate = peak * min(1.0, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * share))
        for group in optimiser.param_groups:
            group["lr"] = rate
        batch = picture_batch(64, generator) if data is None else text_batch(data, 16, generator)
        labels = batch.get("labels", batch.get("input_ids"))
        loss = model(**{**batch, "labels": labels}).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        if elapsed - shown > 10:
            print(f"  {elapsed:3.0f} s, step {step}, loss {loss.item():.3f}", flush=True)
            shown = elapsed
    model.eval().requires_grad_(False)
    if kind == "moe":
        model.config.output_router_logits = False  # of the balancing loss, for training alone
    return model, {
        "kind": kind,
        "seconds": seconds,
        "steps": step,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "held_out_loss": round(loss_of(model, held_out(kind)), 4),
        "command": f"python examples/train_tiny.py {kind} --seconds {seconds:g}",
        "torch": torch.__version__,
    }


def load_or_train(kind: str, folder: str | None, seconds: float) -> Any:
    """A model that this script saved, or one trained now."""
    if folder is not None:
        auto = tf.AutoModelForImageClassification if kind == "deit" else tf.AutoModelForCausalLM
        return auto.from_pretrained(folder, dtype=torch.float32).eval()
    print(f"training a tiny {kind} model for {seconds:g} s (python examples/train_tiny.py keeps one)")
    return train(kind, seconds)[0]


def _logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**{key: value for key, value in batch.items() if key != "labels"}).logits.float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("gelu", "moe", "mamba2", "deit"))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    model, said = train(options.kind, options.seconds)
    model.half().save_pretrained(options.output)
    (options.output / "training.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(said, indent=1))


if __name__ == "__main__":
    main()
