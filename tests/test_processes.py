# SPDX-License-Identifier: Apache-2.0
"""Several processes calibrate to the plan of one, bit for bit, and fail together."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_models import build_tiny_model, make_batches

import scap_nncf
from scap_nncf.algorithms import processes

FILES = ("plan.json", "statistics.safetensors")


def in_processes(count: int, folder: Path, work: Callable[[int], None]) -> list[str]:
    """Run `work(rank)` in forked processes of one gloo group; returns what each raised, or an empty text."""
    context = multiprocessing.get_context("fork")
    reports = context.SimpleQueue()
    folder.mkdir(exist_ok=True)

    def child(rank: int) -> None:
        torch.set_num_threads(1)  # the thread pools of the parent are not here
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        report = ""
        try:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
            work(rank)
        except BaseException:
            report = traceback.format_exc()
        reports.put((rank, report))

    children = [context.Process(target=child, args=(rank,), daemon=True) for rank in range(count)]
    for process in children:
        process.start()
    found = dict(reports.get() for _ in children)
    for process in children:
        process.join(30)
    return [found[rank] for rank in range(count)]


def compress(folder: Path, family: str = "llama", samples: int = 7, stream: bool = False, **settings: Any) -> None:
    data: Any = make_batches(samples, batch=1)
    settings = {"sparsity": 0.5, "allocation": "uniform", **settings}
    model = scap_nncf.compress(build_tiny_model(family), dataset=iter(data) if stream else data, **settings)
    scap_nncf.get_controller(model).save(folder)


@pytest.mark.parametrize(
    ("count", "settings"),
    [
        (3, {"stream": True, "sparsity": {"ffn": 0.6}, "mode": "median"}),
        (3, {"samples": 2}),  # the third has none
        (2, {"allocation": "fisher", "allocation_samples": 3}),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "-".join(value) or "dense",
)
def test_plan_and_statistics_are_those_of_one_process(count: int, settings: dict[str, Any], tmp_path: Path) -> None:
    compress(tmp_path / "alone", **settings)
    reports = in_processes(count, tmp_path / "group", lambda rank: compress(tmp_path / str(rank), **settings))
    assert reports == [""] * count
    for rank in range(count):
        for name in FILES:
            assert (tmp_path / str(rank) / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), (rank, name)


def test_processes_fail_together(tmp_path: Path) -> None:
    def broken(rank: int) -> None:
        data = make_batches(6, batch=1)
        if rank == 1:
            data[3]["input_ids"] += 10_000  # the second of process 1
        scap_nncf.compress(build_tiny_model(), dataset=data, sparsity=0.5, allocation="uniform")

    first, second = in_processes(2, tmp_path / "a", broken)
    assert "OtherProcessError" in first
    assert "process 1: ValidationError" in first
    assert "cannot take sample" in second

    def other_data(rank: int) -> None:
        data = make_batches(6, batch=1, seed=rank)
        scap_nncf.compress(build_tiny_model(), dataset=data, sparsity=0.5, allocation="uniform")

    assert all("different models or data" in report for report in in_processes(2, tmp_path / "b", other_data))


def test_single_process_calibrates_on_all_it_is_given(tmp_path: Path) -> None:
    def own_data(rank: int) -> None:
        assert processes.current().count == 2
        with scap_nncf.single_process():
            data = make_batches(4, batch=1)[2 * rank : 2 * rank + 2]
            scap_nncf.calibrate(build_tiny_model(), dataset=data, allocation="uniform").save(tmp_path / str(rank))

    assert in_processes(2, tmp_path / "group", own_data) == ["", ""]
    parts = [scap_nncf.CalibrationStatistics.load(tmp_path / str(rank)) for rank in (1, 0)]
    whole = scap_nncf.calibrate(build_tiny_model(), dataset=make_batches(4, batch=1), allocation="uniform")
    assert parts[0].merge(parts[1]).to_bytes() == whole.to_bytes()


def test_command_line_under_a_launcher(tiny_model_dir: str, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("accelerate")
    from scap_nncf.cli import main

    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day and the clocks were striking. " * 40)
    arguments = ["compress", tiny_model_dir, "--calibration", str(text), "--length", "32"]
    arguments += ["--samples", "7", "--device", "cpu", "--json", "--output"]
    assert main([*arguments, str(tmp_path / "1")]) == 0
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "scap_nncf"]
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    environment = {**kept, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [*launch, *arguments, str(tmp_path / "2")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().count("\n") == 0, "more than one process printed"
    for file in FILES:
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes()
