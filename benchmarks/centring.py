# SPDX-License-Identifier: Apache-2.0
"""
How much mode centring raises the sparsity of the second feed-forward layer on real GELU models, at equal error.

    python benchmarks/centring.py speech MODEL --data clips/ --output centring-whisper.json
    python benchmarks/centring.py vision MODEL --data pictures.zip --output centring-dinov2.json
    python benchmarks/centring.py text MODEL --data text.txt --output centring-minilm.json

MODEL is a folder of transformers. Half of the data calibrates, the other half measures. Only `fc2` (`down`) is pruned,
every layer at the same target. The error is that of the output against the dense model: for speech the Kullback-Leibler
divergence of the next token (nats a token, teacher forcing on the dense model's own transcript), otherwise the squared
error of the last hidden state relative to its energy. For each way to find the mode: the sparsity at which the error is
that of no centring at 30 % and at 50 %.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import wave
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

import scap_nncf
from scap_nncf import Scap

MODES = ("zero", "mean", "median", "kde")
LEVELS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
Error = Callable[[], float]


def speech(folder: str, data: Path) -> tuple[Any, list[Any], dict[str, str]]:
    import transformers as tf

    model = tf.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    extractor = tf.WhisperFeatureExtractor.from_pretrained(folder)
    samples = []
    for path in sorted(data.glob("*.wav")):
        with wave.open(str(path)) as clip:
            sound = np.frombuffer(clip.readframes(clip.getnframes()), dtype=np.int16).astype(np.float32) / 32768
        features = extractor(sound, sampling_rate=16_000, return_tensors="pt").input_features
        prompt = torch.tensor([[model.config.decoder_start_token_id, 50259, 50359, 50363]])  # English, transcribe
        with torch.no_grad():
            ids = model.generate(
                input_features=features, decoder_input_ids=prompt, max_new_tokens=60, do_sample=False, num_beams=1
            )
        if not bool((ids[:, :4] == prompt).all()):
            ids = torch.cat([prompt, ids], 1)
        samples.append({"input_features": features, "decoder_input_ids": ids})
    return model, samples, {"encoder": r"re:encoder\..*fc2", "decoder": r"re:decoder\..*fc2"}


def vision(folder: str, data: Path) -> tuple[Any, list[Any], dict[str, str]]:
    import transformers as tf
    from PIL import Image

    model = tf.AutoModel.from_pretrained(folder).eval()
    with zipfile.ZipFile(data) as archive:
        names = sorted(name for name in archive.namelist() if name.lower().endswith((".jpg", ".jpeg", ".png")))
        chosen = random.Random(0).sample(names, 16)
        pictures = [Image.open(BytesIO(archive.read(name))).convert("RGB").resize((224, 224)) for name in chosen]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    arrays = [((np.asarray(picture) / 255 - mean) / std).transpose(2, 0, 1) for picture in pictures]
    return model, [{"pixel_values": torch.tensor(array).float()[None]} for array in arrays], {"all blocks": "down"}


def text(folder: str, data: Path) -> tuple[Any, list[Any], dict[str, str]]:
    import transformers as tf

    model = tf.AutoModel.from_pretrained(folder).eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    lines = [line.strip() for line in data.read_text(encoding="utf-8").splitlines() if len(line) > 200]
    chosen = random.Random(0).sample(lines, 32)
    encoded = [tokenizer(line, return_tensors="pt", truncation=True, max_length=128) for line in chosen]
    return model, [dict(item) for item in encoded], {"all blocks": "down"}


def error_of(model: Any, samples: list[Any]) -> Error:
    """A function that measures the model as it is against what it gives now."""

    def outputs() -> list[torch.Tensor]:
        with torch.no_grad():
            found = [model(**sample) for sample in samples]
        return [item.logits.log_softmax(-1) if "logits" in item else item.last_hidden_state for item in found]

    dense = outputs()

    def measure() -> float:
        total, weight = 0.0, 0.0
        for before, now in zip(dense, outputs()):
            if "WhisperFor" in type(model).__name__:
                total += float((before.exp() * (before - now)).sum())
                weight += before.shape[0] * before.shape[1]
            else:
                total += float((now - before).square().sum())
                weight += float(before.square().sum())
        return total / weight

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("speech", "vision", "text"))
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    model, samples, parts = {"speech": speech, "vision": vision, "text": text}[options.kind](
        options.model, options.data
    )
    calibration, held_out = samples[::2], samples[1::2]
    measure = error_of(model, held_out)
    result: dict[str, Any] = {"kind": options.kind, "calibration": len(calibration), "held_out": len(held_out)}
    for part, selector in parts.items():
        statistics = scap_nncf.calibrate(model, dataset=calibration, sparsity={selector: 0.5})
        curves: dict[str, list[tuple[float, float]]] = {}
        for mode in MODES:
            curves[mode] = [(0.0, 0.0)]
            for level in LEVELS:
                plan = scap_nncf.make_plan(
                    statistics, Scap(sparsity={selector: level}, mode=mode, allocation="uniform")
                )
                scap_nncf.compress(model, plan=plan)
                controller = scap_nncf.get_controller(model)
                error = measure()
                realised = controller.statistics().realised_sparsity
                controller.strip()
                curves[mode].append((realised, error))
                print(f"{part:12} {mode:7} target {level:.1f} realised {realised:.3f} error {error:.3e}", flush=True)
        modes = [site.mode for site in plan.sites]
        reached = {
            f"at the error of {level:.0%} uncentred": {
                mode: float(np.interp(_error_at(curves["zero"], level), *_increasing(curve)))
                for mode, curve in curves.items()
            }
            for level in (0.3, 0.5)
        }
        result[part] = {"curves": curves, "kde_modes": modes, "sparsity": reached}
        print(json.dumps(reached, indent=1))
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    result["command"] = f"python benchmarks/centring.py {options.kind} MODEL --data DATA"
    result["torch"] = torch.__version__
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _error_at(curve: list[tuple[float, float]], sparsity: float) -> float:
    return float(np.interp(sparsity, [point[0] for point in curve], [point[1] for point in curve]))


def _increasing(curve: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Errors and sparsities, the errors made monotone for interpolation."""
    return list(np.maximum.accumulate([point[1] for point in curve])), [point[0] for point in curve]


if __name__ == "__main__":
    sys.exit(main())
