# SPDX-License-Identifier: Apache-2.0
"""
``scap-nncf bench decode`` with every model in a process of its own: compiling goes on side by side, timing in turns.

    python benchmarks/decode_processes.py --shape mistral-7b --output results

Dense and sparse models, full precision and 4-bit, are built and compiled at the same time on one GPU. Only then they
are timed, one process after the other, round by round, so that a drift of the clock hits all of them; a process that
waits for its turn launches nothing. The memory figures are those of the process. What is timed, and how, is
:mod:`scap_nncf.bench_decode`'s.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

#: name → (bits of the weights, sparsity or None for dense)
VARIANTS: dict[str, tuple[int | None, Any]] = {
    "dense": (None, None),
    "all-50": (None, 0.5),
    "ffn-48.5": (None, {"up": 0.40, "gate": 0.40, "down": 0.60}),
    "cats-33.3": (None, "cats"),  # half of the channels behind the gate: a third of the feed-forward
    "int4 dense": (4, None),
    "int4 all-50": (4, 0.5),
}


# -- a worker: one model ----------------------------------------------------------------------------------------------


def serve(shape: str, variant: str) -> None:
    """Answer requests of the driver, a JSON object a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints, prints to stderr
    import torch

    from scap_nncf import bench_decode

    bits, sparsity = VARIANTS[variant]
    dtype = torch.float16 if bits is None else torch.bfloat16  # tinygemm takes bfloat16 alone
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ready: dict[str, bench_decode.Decoder] = {}
    model: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        kind, start = request["do"], time.perf_counter()
        answer: dict[str, Any] = {}
        try:
            if kind == "build":
                model, answer = build(shape, bits, sparsity, dtype, where)
            elif kind == "prepare":
                batch, prompt, mode, tokens = (request[key] for key in ("batch", "prompt", "mode", "tokens"))
                torch._dynamo.reset()
                if sparsity is not None:
                    answer["realised"] = bench_decode._count_realised(model, batch, prompt)
                decoder = bench_decode.Decoder(model, batch, prompt, tokens)
                bench_decode._prepare(decoder, mode)
                ready[request["name"]] = decoder
                bench_decode._synchronise(where)
            elif kind == "time":
                answer["ms"] = ready[request["name"]].time(request["tokens"])
            elif kind == "drop":
                ready.pop(request["name"], None)
                bench_decode._free(where)
            elif kind == "prefill":
                answer["rows"] = [
                    (row.prune, row.ms, row.spread)
                    for row in bench_decode._time_prefill({variant: model}, request["length"], request["rounds"], where)
                ]
            elif kind == "about":
                answer["about"] = bench_decode._about(shape, dtype, where, {}, 0, 0, bits)
        except Exception as error:  # the driver notes it and goes on with the others
            answer["error"] = f"{type(error).__name__}: {error}"[:500]
        answer["seconds"] = round(time.perf_counter() - start, 1)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def build(shape: str, bits: int | None, sparsity: Any, dtype: Any, where: Any) -> tuple[Any, dict[str, Any]]:
    """The model of one variant, and its memory in bytes."""
    import nncf

    from scap_nncf import bench_decode, bench_lowbit, get_controller
    from scap_nncf.compress import compress
    from scap_nncf.deployment import deploy

    model = bench_decode.random_model(shape, dtype, where)
    deploying, share = 0, 0.0
    if sparsity is None:
        if bits is not None:
            model = bench_lowbit.make_dense(model, bits)
    else:
        if sparsity == "cats":
            batches = bench_decode.random_batches(model, 8, 256)
            model = compress(model, algorithm="cats", sparsity=0.5, dataset=nncf.Dataset(batches))
            plan = get_controller(model).plan
            plan = replace(plan, sites=tuple(replace(site, layers=site.layers[:2]) for site in plan.sites))  # not gate
        else:
            plan = bench_decode.sparse_plans(model, {"it": sparsity})["it"]
            if bits is not None:
                model = bench_lowbit.compress(model, bits)
            model = compress(model, plan=plan)
        share = bench_decode._pruned_share(model, plan)
        bench_decode._free(where)
        bench_decode._reset_peak(where)
        deploy(model)
        deploying = bench_decode._peak(where)
    bench_decode._free(where)
    weights = bench_decode._allocated(where)
    running = bench_decode._running_peak(model, where)
    return model, {"weights": weights, "deploying": deploying, "running": running, "share": share}


# -- the driver -------------------------------------------------------------------------------------------------------


@dataclass
class Worker:
    """One variant's process."""

    shape: str
    variant: str
    process: subprocess.Popen[str] = field(init=False)
    realised: dict[str, float] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.bits, self.sparsity = VARIANTS[self.variant]
        self.label = self.variant.removeprefix(f"int{self.bits} ")
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--shape", self.shape, "--serve", self.variant],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request: Any) -> None:
        """Send a request and do not wait."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Wait for the answer to the oldest request."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": f"the process ended with {self.process.poll()}"}

    def prepared(self, name: str, note: dict[str, Any]) -> None:
        """Keep the sparsity that was counted while a way to decode was made ready."""
        if "realised" in note:
            self.realised[name] = note["realised"]

    def do(self, **request: Any) -> dict[str, Any]:
        """Send and wait."""
        self.ask(**request)
        return self.answer()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--shape", default="mistral-7b")
    parser.add_argument("--output", type=Path, default=Path("."))
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefill", type=int, default=2048)
    parser.add_argument("--deadline", type=float, default=1e9, help="seconds after which no new part is begun")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.shape, given.serve)
        return
    began = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - began:5.1f} s] {text}", file=sys.stderr, flush=True)

    workers = {name: Worker(given.shape, name) for name in given.variants.split(",")}
    results = Results(given, workers)
    full = [worker for worker in workers.values() if worker.bits is None]
    packed = [worker for worker in workers.values() if worker.bits is not None]
    request = {"do": "prepare", "batch": 1, "prompt": given.prompt, "tokens": given.tokens, "mode": "compiled"}
    # a packed model is made from a half-precision one: packed ones first, while there is memory for that
    for group in ([*packed, *full[:1]], full[1:]):
        for worker in group:
            worker.ask(do="build")
        for worker in group:
            worker.memory = worker.answer()
            say(f"{worker.variant}: built {worker.memory}")
            worker.ask(name="compiled 1", **request)
    cases: list[tuple[Worker, str, int, str]] = []
    for worker in [*full, *packed]:
        note = worker.answer()
        say(f"{worker.variant}: compiled {note}")
        worker.prepared("compiled 1", note)
        if "error" not in note:
            cases.append((worker, "compiled", 1, "compiled 1"))
    for mode in ("eager", "graph"):
        note = workers["dense"].do(name=f"{mode} 1", **{**request, "mode": mode})
        say(f"dense {mode} {note}")
        if "error" not in note:
            cases.append((workers["dense"], mode, 1, f"{mode} 1"))
    results.time(cases, say)
    if time.perf_counter() - began < given.deadline:
        for worker in [*full, *packed]:
            answer = worker.do(do="prefill", length=given.prefill, rounds=3)
            say(f"{worker.variant}: prefill {answer}")
            results.prefill(worker, answer)
    # batch 4: eager in a graph, which needs no compiling, for all alike
    cases = []
    for worker in full if time.perf_counter() - began < given.deadline else []:
        note = worker.do(name="graph 4", **{**request, "mode": "graph", "batch": 4})
        say(f"{worker.variant} batch 4: {note}")
        worker.prepared("graph 4", note)
        if "error" not in note:
            cases.append((worker, "graph", 4, "graph 4"))
    results.time(cases, say)
    for worker in workers.values():
        worker.process.stdin.close()  # type: ignore[union-attr]
        worker.process.wait()


class Results:
    """Collects rows and writes them after every part: a run that is cut short keeps what it had."""

    def __init__(self, given: argparse.Namespace, workers: dict[str, Worker]) -> None:
        from scap_nncf.bench_report import DecodeResult

        self.given, self.workers = given, workers
        self.by_bits = {bits: DecodeResult({}) for bits in dict.fromkeys(w.bits for w in workers.values())}

    def time(self, cases: list[tuple[Worker, str, int, str]], say: Any) -> None:
        """Rounds in turns, then one row a case."""
        from scap_nncf.bench_report import DecodeRow

        times: list[list[float]] = [[] for _ in cases]
        for _ in range(self.given.rounds):
            for (worker, mode, _, name), values in zip(cases, times):
                tokens = min(self.given.tokens, 24) if mode == "eager" else self.given.tokens
                answer = worker.do(do="time", name=name, tokens=tokens)
                if "ms" in answer:
                    values.append(answer["ms"])
        for (worker, mode, batch, name), values in zip(cases, times):
            worker.do(do="drop", name=name)
            if not values:
                continue
            ms, realised = statistics.median(values), worker.realised.get(name)
            spread = max(values) - min(values)
            saved = None if realised is None else realised * worker.memory["share"]
            per_second = batch * 1e3 / ms
            row = DecodeRow(worker.label, mode, batch, self.given.prompt, ms, spread, per_second, realised, saved)
            self.by_bits[worker.bits].decode.append(row)
            say(f"{worker.variant} {mode} batch {batch}: {ms:.3f} ms a step, realised {realised}")
        self.write()

    def prefill(self, worker: Worker, answer: dict[str, Any]) -> None:
        """Times to the first token of one worker."""
        from scap_nncf.bench_report import PrefillRow

        for prune, ms, spread in answer.get("rows", []):
            self.by_bits[worker.bits].prefill.append(PrefillRow(worker.label, prune, self.given.prefill, ms, spread))
        self.write()

    def write(self) -> None:
        """One pair of files for each number of bits."""
        from scap_nncf.bench_report import MemoryRow

        for bits, result in self.by_bits.items():
            workers = [worker for worker in self.workers.values() if worker.bits == bits]
            if not result.about:
                result.about = workers[0].do(do="about").get("about", {}) | {
                    "sparsities": {w.label: w.sparsity for w in workers if w.sparsity is not None},
                    "tokens": self.given.tokens,
                    "rounds": self.given.rounds,
                    "command": f"python benchmarks/decode_processes.py --shape {self.given.shape}",
                }
            result.memory = [
                MemoryRow(worker.label, worker.memory["weights"], worker.memory["deploying"], worker.memory["running"])
                for worker in workers
                if "weights" in worker.memory
            ]
            result.save(self.given.output, "decode" if bits is None else f"decode-int{bits}")


if __name__ == "__main__":
    main()
