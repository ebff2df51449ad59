# SPDX-License-Identifier: Apache-2.0
"""
Kills, full disks and folders that cannot be written: nothing may be lost or half-written.

Each operation replaces a good result by another good one. A process does it and is killed (``kill -9``) after a random
time; then the folder must hold the old result or the new one, whole, and the operation must succeed when it is run
again. A calibration must also give the plan that an uninterrupted one gives. With a full disk (a limit on the size of
files, at a random place) the operation must say that it could not write and leave the old result.

    python benchmarks/faults/faults.py --kills 40 --output benchmarks/faults/results/faults.json
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nncf
import openvino as ov
import torch
from openvino import opset13 as opset
from transformers import AutoModelForCausalLM, LlamaConfig

import scap_nncf
from scap_nncf import cli

TEXT = "It was a bright cold day and the clocks were striking thirteen. " * 60
_context = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Operation:
    """
    :param make: (folder, which of two results) → writes it there.
    :param read: loads what is in the folder; raises where it is damaged.
    :param resumes: the operation keeps unfinished work beside the folder.
    """

    name: str
    make: Callable[[Path, int], None]
    read: Callable[[Path], Any]
    resumes: bool = False


def tiny_model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=131, hidden_size=48, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted({c for i in range(128) for c in byte_level.pre_tokenize_str(chr(i))[0][0]})[:128]
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer, backend.decoder = byte_level, decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def batches(count: int = 6) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 131, (1, 19), generator=generator)} for _ in range(count)]


def operations(work: Path) -> list[Operation]:
    """The operations, with models and data made once."""
    model_folder = work / "model"
    tiny_model().save_pretrained(model_folder)
    tiny_tokenizer().save_pretrained(model_folder)
    (work / "text.txt").write_text(TEXT)
    sparse = [scap_nncf.compress(tiny_model(i), dataset=batches(), sparsity=0.3 + 0.3 * i) for i in range(2)]
    steps = [scap_nncf.WeightCompression("int4_sym", group_size=8), scap_nncf.Scap(sparsity=0.5)]
    quantised = [scap_nncf.compress(tiny_model(i), algorithm=steps, dataset=batches()) for i in range(2)]

    def plan_graphs() -> None:  # in a child: a process with OpenVINO's threads cannot be forked
        import numpy as np

        data = [np.random.default_rng(0).normal(size=(1, 64)).astype(np.float32)]
        for i in range(2):
            graph = scap_nncf.compress(_graph(i), dataset=data, sparsity=0.5, mode="zero", allocation="uniform")
            scap_nncf.get_controller(graph).save(work / f"graph{i}")

    child(plan_graphs).join()

    def save_openvino(folder: Path, which: int) -> None:
        graph = scap_nncf.compress(_graph(which), plan=work / f"graph{which}")
        scap_nncf.save_openvino(graph, folder, overwrite=True)

    def compress(folder: Path, which: int) -> None:
        arguments = ["compress", str(model_folder), "--calibration", str(work / "text.txt"), "--length", "64"]
        arguments += ["--samples", "24", "--device", "cpu", "--sparsity", str(0.3 + 0.3 * which)]
        if cli.main([*arguments, "--output", str(folder), "--overwrite"]) != 0:
            raise SystemExit("compress failed")

    def export(folder: Path, which: int) -> None:
        scap_nncf.export_openvino(sparse[which], folder, overwrite=True)

    return [
        Operation("scap-nncf compress --output", compress, _plan_and_statistics, resumes=True),
        Operation(
            "controller.save", lambda f, i: scap_nncf.get_controller(sparse[i]).save(f) and None, _plan_and_statistics
        ),
        Operation(
            "save_pretrained",
            lambda f, i: scap_nncf.save_pretrained(quantised[i], f, overwrite=True) and None,
            scap_nncf.load_pretrained,
        ),
        Operation(
            "save_openvino",
            save_openvino,
            _read_graph,
        ),
        Operation("export_openvino", export, _read_graph),
    ]


def _read_graph(folder: Path) -> None:
    """Both in a child, because OpenVINO starts threads."""
    process = child(lambda: scap_nncf.load_openvino(folder) and None)
    process.join()
    if process.exitcode != 0:
        raise AssertionError(f"the model in {folder} cannot be read")


def _graph(seed: int) -> Any:
    import numpy as np

    generator = np.random.default_rng(seed)
    x = opset.parameter([1, 64], np.float32, name="x")
    y: Any = x
    for index in range(8):
        y = opset.matmul(y, opset.constant(generator.normal(size=(64, 64)).astype(np.float32)), False, False)
        y.set_friendly_name(f"layers.{index}.up_proj/MatMul")
    return ov.Model([y], [x], "chain")


def _plan_and_statistics(folder: Path) -> None:
    from scap_nncf.algorithms.scap.calibration import statistics_of_plan

    plan = scap_nncf.Plan.load(folder)
    if statistics_of_plan(folder, plan) is None:
        raise AssertionError("the statistics are gone")


def state_of(folder: Path) -> str:
    """A digest of what counts in a folder: every file but the times in result.json."""
    if not folder.exists():
        return "absent"
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in ("result.json", "README.md") and not path.name.startswith("."):
            # the plan holds their checksums, and reading it checks them; of a plan that was being replaced, the former
            # ones lie beside the new ones until the plan is there
            if path.name.startswith(("statistics.safetensors", "vectors.safetensors")):
                continue
            content = path.read_bytes()
            if path.suffix == ".xml":  # OpenVINO numbers the layers of an export anew
                content = b""
            digest.update(path.name.encode() + hashlib.sha256(content).digest())
    return digest.hexdigest()


def child(work: Callable[[], None], limit: int | None = None) -> Any:
    """A forked process that does the work in silence; its exit code is 3 if it raised what NNCF's errors are."""

    def run() -> None:
        torch.set_num_threads(1)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        os.dup2(null, 2)
        try:
            _logged(work)
        except nncf.ValidationError as error:
            os._exit(3 if "writ" in str(error) else 4)  # cannot write, cannot be written, is writing
        except SystemExit:
            os._exit(3)
        except BaseException:
            os._exit(5)
        os._exit(0)

    process = _context.Process(target=run)
    process.start()
    return process


def _logged(work: Callable[[], None]) -> None:
    try:
        work()
    except Exception as error:
        if not isinstance(error, nncf.ValidationError) or "writ" not in str(error):
            with contextlib.suppress(OSError), open(Path(tempfile.gettempdir()) / "scap-faults.log", "a") as log:
                traceback.print_exc(file=log)
        raise


def leftovers(parent: Path) -> list[str]:
    """Names beside the results that should not be there."""
    return sorted(item.name for item in parent.iterdir() if item.name != "result")


def kill_at_random(operation: Operation, kills: int, generator: random.Random) -> dict[str, Any]:
    """Kill the operation `kills` times; raises where something is lost or damaged."""
    with tempfile.TemporaryDirectory() as name:
        parent = Path(name)
        folder = parent / "result"
        results = []
        for which in (0, 1):
            start = time.perf_counter()
            process = child(lambda which=which: operation.make(folder, which))
            process.join()
            seconds = time.perf_counter() - start  # the second time nothing is imported any more
            assert process.exitcode == 0, f"{operation.name} fails by itself: {process.exitcode}"
            operation.read(folder)
            results.append(state_of(folder))
        assert results[0] != results[1]
        found: Counter[str] = Counter()
        points = []
        present = 1
        for _ in range(kills):
            which = 1 - present  # where it is killed early, the other one stays
            delay = generator.uniform(0.0, seconds if operation.resumes else 0.1 + 3 * seconds)
            process = child(lambda which=which: again_and_again(operation, folder, which))
            time.sleep(delay)
            process.kill()
            process.join()
            killed = process.exitcode == -signal.SIGKILL
            points.append(round(delay, 3))
            state = state_of(folder)
            assert state in results, f"{operation.name}: after {delay:.3f} s the folder is {state}"
            operation.read(folder)
            present = results.index(state)
            found["finished before the kill" if not killed else "one of the two, whole"] += 1
            if operation.resumes and any("unfinished" in item for item in leftovers(parent)):
                found["left unfinished work"] += 1
            # the same again must succeed, take up what is left, and leave nothing behind
            process = child(lambda which=which: operation.make(folder, which))
            process.join()
            assert process.exitcode == 0, f"{operation.name} cannot be run again: {process.exitcode}"
            assert state_of(folder) == results[which], f"{operation.name}: another result after a kill"
            operation.read(folder)
            present = which
            assert not leftovers(parent), leftovers(parent)
    return {
        "operation": operation.name,
        "fault": "kill -9 at a random time",
        "tries": kills,
        "found": dict(sorted(found.items())),
        "seconds_undisturbed": round(seconds, 2),
        "killed_after_s": points,
        "lost_or_damaged": 0,
    }


def again_and_again(operation: Operation, folder: Path, which: int) -> None:
    """Until it is killed, unless it can be resumed: most kills shall hit the middle of something."""
    operation.make(folder, which)
    while not operation.resumes:
        which = 1 - which
        operation.make(folder, which)


def full_disk(operation: Operation, tries: int, generator: random.Random) -> dict[str, Any]:
    """Limit the size of files at random places."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "result"
        child(lambda: operation.make(folder, 0)).join()
        before = state_of(folder)
        largest = max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        codes: Counter[str] = Counter()
        for _ in range(tries):
            limit = generator.randrange(0, largest)
            process = child(lambda: operation.make(folder, 1), limit)
            process.join()
            assert process.exitcode == 3, f"{operation.name}, {limit} bytes: exit code {process.exitcode}"
            codes["refused with a clear error"] += 1
            assert state_of(folder) == before, f"{operation.name}, {limit} bytes: the old result is gone"
            operation.read(folder)
            for item in leftovers(folder.parent):
                assert "unfinished" in item, item
    return {
        "operation": operation.name,
        "fault": "no file may grow beyond a random size",
        "tries": tries,
        "found": dict(codes),
        "lost_or_damaged": 0,
    }


def two_at_once(operation: Operation) -> dict[str, Any]:
    """Two processes write into one folder at the same time."""
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "result"
        wanted = []
        for which in (0, 1):
            child(lambda which=which: operation.make(folder, which)).join()
            wanted.append(state_of(folder))
        for _ in range(6):
            pair = [child(lambda which=which: operation.make(folder, which)) for which in (0, 1)]
            for process in pair:
                process.join()
            codes = sorted(process.exitcode for process in pair)
            assert codes in ([0, 0], [0, 3], [0, 4]), codes
            outcomes["one refused" if codes[1] else "one after the other"] += 1
            assert state_of(folder) in wanted
            operation.read(folder)
    return {
        "operation": operation.name,
        "fault": "two processes, one folder",
        "tries": 6,
        "found": dict(outcomes),
        "lost_or_damaged": 0,
    }


def cannot_write(operation: Operation) -> dict[str, Any]:
    """A place where nobody may write: not even root can make folders in /proc."""
    process = child(lambda: operation.make(Path("/proc/scap/result"), 0))
    process.join()
    assert process.exitcode == 3, process.exitcode
    return {
        "operation": operation.name,
        "fault": "a folder that cannot be written",
        "tries": 1,
        "found": {"refused with a clear error": 1},
        "lost_or_damaged": 0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="for each operation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="operations with this in their name")
    parser.add_argument("--output", type=Path, help="JSON file for the result; rows of other operations in it stay")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # a tiny model is calibrated in less than the interval of a minute
    scap_nncf.resumable = functools.partial(scap_nncf.resumable, every=0.0)
    generator = random.Random(options.seed)
    work = Path(tempfile.mkdtemp())
    try:
        for operation in operations(work):
            if options.only is not None and options.only not in operation.name:
                continue
            rows = [kill_at_random(operation, options.kills, generator)]
            rows += [full_disk(operation, max(options.kills // 4, 1), generator), cannot_write(operation)]
            if operation.name != "controller.save":  # it writes single files, the last one wins
                rows.append(two_at_once(operation))
            for row in rows:
                print(json.dumps({key: value for key, value in row.items() if key != "killed_after_s"}), flush=True)
            if options.output is not None:
                _record(options.output, rows, options)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _record(file: Path, rows: list[dict[str, Any]], options: Any) -> None:
    known = json.loads(file.read_text())["rows"] if file.is_file() else []
    new = {(row["operation"], row["fault"]) for row in rows}
    kept = [row for row in known if (row["operation"], row["fault"]) not in new]
    command = f"python benchmarks/faults/faults.py --kills {options.kills} --seed {options.seed}"
    data = {"command": command, "scap_nncf": scap_nncf.__version__, "python": sys.version.split()[0]}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**data, "rows": kept + rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
