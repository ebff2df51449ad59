# SPDX-License-Identifier: Apache-2.0
"""
N:M activation sparsity on real weights: patterns, criteria and error mitigation, beside pruned weights and CATS.

    python examples/benchmarks/nm_patterns.py patterns --text wikitext2_test.txt --calibration c4.jsonl --output nm.json
    python examples/benchmarks/nm_patterns.py criteria mitigation weights training cats ...

Perplexity over windows of 512 tokens, the loss of each kept; every FC layer of every block is pruned, every token.
Results are added to the JSON file measurement by measurement; with --seconds the script stops early (exit code 3) and
goes on where it was when it is called again.
"""

from __future__ import annotations

import argparse
import copy
import resource
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from record import OutOfTime, Record
from torch import nn

import scap_nncf
from scap_nncf import Cats, Nm, Scap
from scap_nncf.algorithms.backends.torch.layers import named_fc_layers
from scap_nncf.kernels.reference import keep_nm
from scap_nncf.models import load_model
from scap_nncf.perplexity import perplexity
from scap_nncf.text import builtin_text, read_texts, token_batches, token_ids

PATTERNS: dict[str, Any] = {"8:16": "8:16", "2:4": "2:4", "top-k 50 %": 0.5, "16:32": "16:32"}
PATTERNS |= {"top-k 70 %": 0.7, "4:8": "4:8"}
MITIGATIONS = ("none", "var", "d-pts", "r-sparse", "l-pts", "var+l-pts", "ls", "s-pts")
CRITERIA = ("act", "clact", "amber", "wina")


class Bench:
    """A model with its data."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model, self.tokenizer = load_model(args.model, dtype=torch.float32)
        texts = read_texts(args.text) if args.text else list(builtin_text("held_out"))
        self.ids = token_ids(self.tokenizer, texts)[: args.tokens]
        texts = read_texts(args.calibration) if args.calibration else list(builtin_text("calibration"))
        self.samples = token_batches(self.tokenizer, texts, length=args.length, count=args.samples, seed=0)
        self.deadline = None if args.seconds is None else time.monotonic() + args.seconds
        self.record = Record(None, "")

    def begin(self, part: str) -> None:
        """Record what follows under a part's name."""
        args = self.args
        left = None if self.deadline is None else self.deadline - time.monotonic()
        self.record = Record(args.output, part, left)
        self.record.set(
            "settings",
            {
                "model": Path(args.model).name,
                "text": Path(args.text).name if args.text else "builtin",
                "calibration": Path(args.calibration).name if args.calibration else "builtin",
                "tokens": len(self.ids),
                "context": args.context,
            },
        )

    def dense(self) -> None:
        self.record.once("dense", lambda: self.measure(self.model))

    def measure(self, model: nn.Module) -> dict[str, Any]:
        result = perplexity(model, self.ids, self.args.context)
        row: dict[str, Any] = {"perplexity": round(result.perplexity, 4)}
        row["window_nll"] = [round(loss / count, 5) for loss, count in result.windows]
        return row

    def compressed(self, algorithm: Any) -> dict[str, Any]:
        """Perplexity of the model under an algorithm, and what the compression took."""
        began = time.perf_counter()
        scap_nncf.compress(self.model, algorithm=algorithm, dataset=self.samples)
        seconds = time.perf_counter() - began
        controller = scap_nncf.get_controller(self.model)
        assert controller is not None
        try:
            row = self.measure(self.model)
            statistics = controller.statistics()
            row |= {"realised_sparsity": round(statistics.realised_sparsity or 0.0, 4), "seconds": round(seconds, 1)}
            row["calibration_tokens"] = self.args.samples * self.args.length
            extra = sum(v.size for v in controller.plan.vectors.values())
            weights = sum(layer.in_features * layer.out_features for layer in controller.plan.layers)
            row["added_numbers_share"] = round(extra / weights, 5)
        finally:
            controller.strip()
        return row

    @cache  # noqa: B019 - one bench a process
    def input_norms(self) -> dict[str, torch.Tensor]:
        """Root mean square of each input channel of each layer over the calibration data, up to a common factor."""
        found: dict[str, torch.Tensor] = {}
        handles = []
        for name, module, (width, _) in named_fc_layers(self.model):
            found[name] = torch.zeros(width)

            def hook(_module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                found[name] += args[0].flatten(0, -2).square().sum(0)

            handles.append(module.register_forward_pre_hook(hook))
        with torch.no_grad():
            for sample in self.samples:
                self.model(**sample)
        for handle in handles:
            handle.remove()
        return {name: value.sqrt() for name, value in found.items()}

    def nm(self, key: str, name: str, criterion: str = "act", mitigation: Any = None) -> None:
        config = Nm(PATTERNS[name], criterion, mitigation)
        self.record.once(key, lambda: self.compressed(config))


def patterns(bench: Bench, name: str) -> None:
    """By magnitude, without mitigation."""
    bench.dense()
    bench.nm(name, name)


def criteria(bench: Bench, name: str) -> None:
    """Each criterion, without mitigation."""
    for criterion in CRITERIA[1:]:
        bench.nm(f"{name}, {criterion}", name, criterion)


def mitigation(bench: Bench, name: str) -> None:
    """Each mitigation, by magnitude."""
    for what in MITIGATIONS[1:]:
        bench.nm(f"{name}, {what}", name, mitigation=what)


def weights(bench: Bench, name: str) -> None:
    """Pruned weights in place of pruned activations: by magnitude, and by magnitude times the input's norm (Wanda)."""
    for score in ("magnitude", "wanda"):
        bench.record.once(f"{name}, {score}", lambda score=score: _pruned(bench, name, score, bench.input_norms))


def _pruned(bench: Bench, name: str, score: str, norms: Callable[[], dict[str, torch.Tensor]]) -> dict[str, Any]:
    model = copy.deepcopy(bench.model)
    pattern = PATTERNS[name]
    dropped = total = 0
    with torch.no_grad():
        for layer, module, (width, _) in named_fc_layers(model):
            if layer == "lm_head":
                continue
            n, m = map(int, pattern.split(":")) if isinstance(pattern, str) else (width - round(pattern * width), width)
            size = module.weight.abs()  # [OC, IC]; a group is of neighbouring inputs of one output, as Wanda's
            if score == "wanda":
                size = size * norms()[layer]
            kept = keep_nm(size, n, m)
            module.weight.mul_(kept)
            dropped, total = dropped + int((~kept).sum()), total + kept.numel()
    return bench.measure(model) | {"weight_sparsity": round(dropped / total, 4)}


def training(bench: Bench, _name: str) -> None:
    """Time and memory of what is learned at once."""

    def measure() -> dict[str, Any]:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        row = bench.compressed(Nm("8:16", mitigation="l-pts+var+ls"))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return row | {"peak_memory_MiB": peak // 1024, "peak_memory_before_MiB": before // 1024}

    bench.record.once("8:16, l-pts+var+ls", measure)


def cats(bench: Bench, _name: str) -> None:
    """CATS and SCAP at equal sparsity of the feed-forward; attention stays dense."""
    for share in (1 / 3, 0.485):
        bench.record.once(f"cats, {share:.1%} of the FFN", lambda share=share: bench.compressed(Cats(1.5 * share)))
        for name, spec in (
            ("uniform", {"ffn": share}),
            ("down first", {"up": 0.75 * share, "gate": 0.75 * share, "down": 1.5 * share}),
        ):
            key = f"scap, {name}, {share:.1%} of the FFN"
            bench.record.once(key, lambda spec=spec: bench.compressed(Scap(spec)))


PARTS = {
    "cats": cats,
    "patterns": patterns,
    "criteria": criteria,
    "mitigation": mitigation,
    "weights": weights,
    "training": training,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=sorted(PARTS))
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS), choices=list(PATTERNS), metavar="NAME")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", help="calibration texts, .txt or .jsonl (.gz)")
    parser.add_argument("--text", help="evaluation text")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--seconds", type=float, help="begin no measurement after this many seconds")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    try:
        bench = Bench(args)
        for name in args.patterns:
            for part in args.parts:
                bench.begin(part)
                PARTS[part](bench, name)
    except OutOfTime:
        print("out of time: call again to go on", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
