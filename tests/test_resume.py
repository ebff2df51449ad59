# SPDX-License-Identifier: Apache-2.0
"""Calibration that is killed and taken up again, and folders that are full, read-only or wanted twice."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nncf
import pytest
from test_processes import FILES, compress, in_processes
from tiny_models import build_tiny_model, make_batches

import scap_nncf
from scap_nncf.algorithms.scap import journal
from scap_nncf.storage import new_folder


@pytest.fixture
def nncf_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("nncf"), "propagate", True)
    caplog.set_level(logging.INFO, logger="nncf")
    return caplog


def dies_at(samples: list[Any], index: int) -> Iterator[Any]:
    for number, sample in enumerate(samples):
        if number == index:
            os.kill(os.getpid(), signal.SIGKILL)
        yield sample


def calibrate(
    folder: Path, data: Any, seed: int = 0, every: float = 0.0, family: str = "llama"
) -> tuple[bytes, list[int]]:
    """Statistics of a resumable calibration, and how often the model ran."""
    model = build_tiny_model(family, seed=seed)
    runs: list[int] = []
    handle = model.get_submodule("model.layers.1.mlp").register_forward_hook(lambda *_: runs.append(1))
    with scap_nncf.resumable(folder, every=every):
        statistics = scap_nncf.calibrate(model, dataset=data, allocation="uniform")
    handle.remove()
    return statistics.to_bytes(), runs


def killed(folder: Path, index: int, samples: int = 6, **options: Any) -> None:
    """Leave the state of a process that was killed when it asked for sample `index`."""
    import multiprocessing

    import torch

    def child() -> None:
        torch.set_num_threads(1)
        calibrate(folder, dies_at(make_batches(samples), index), **options)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def whole(samples: int = 6, seed: int = 0) -> bytes:
    model = build_tiny_model(seed=seed)
    return scap_nncf.calibrate(model, dataset=make_batches(samples), allocation="uniform").to_bytes()


@pytest.mark.parametrize("index", [1, 4])
def test_goes_on_after_kill(index: int, tmp_path: Path) -> None:
    folder = tmp_path / "unfinished"
    killed(folder, index)
    assert list(folder.iterdir()), "nothing was kept"
    result, runs = calibrate(folder, make_batches(6))
    assert result == whole()
    assert len(runs) == 1 + 6 - index, "samples were run again"  # one run finds the sites
    assert not folder.exists()


def test_killed_twice_and_all_done_before(tmp_path: Path) -> None:
    folder = tmp_path / "unfinished"
    killed(folder, 2)
    killed(folder, 4)
    killed(folder, 5, samples=6)
    result, runs = calibrate(folder, make_batches(6))
    assert result == whole()
    assert len(runs) == 2

    killed(folder, 5)
    model = build_tiny_model()
    with scap_nncf.resumable(folder):
        five = scap_nncf.calibrate(model, dataset=make_batches(6), allocation="uniform", subset_size=5)
    assert five.samples == 5
    assert five.to_bytes() == scap_nncf.calibrate(model, dataset=make_batches(6)[:5], allocation="uniform").to_bytes()


@pytest.mark.parametrize("change", ["data", "model", "fewer", "damage"])
def test_what_does_not_belong_is_not_taken_up(change: str, tmp_path: Path, nncf_log: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "unfinished"
    killed(folder, 4)
    data, seed = make_batches(6), 0
    if change == "data":
        data[1]["attention_mask"][0, -1] = 0
    elif change == "model":
        seed = 1
    elif change == "fewer":
        data = data[:3]
    else:
        file = next(folder.iterdir())
        file.write_bytes(file.read_bytes()[:-3])
    expected = scap_nncf.calibrate(build_tiny_model(seed=seed), dataset=data, allocation="uniform").to_bytes()
    result, runs = calibrate(folder, data, seed)
    assert result == expected
    assert len(runs) == 1 + len(data)
    if change != "model":  # another model has a file of its own
        assert "calibrating from the start" in nncf_log.text


def test_processes_go_on_after_kill(tmp_path: Path) -> None:
    folder = tmp_path / "unfinished"

    def dying(_rank: int) -> None:
        model = build_tiny_model()
        with scap_nncf.resumable(folder, every=0.0):
            scap_nncf.calibrate(model, dataset=_failing(make_batches(7, batch=1), 4), allocation="uniform")

    def again(rank: int) -> None:
        with scap_nncf.resumable(folder, every=0.0):
            compress(tmp_path / str(rank))

    assert all(in_processes(2, tmp_path / "a", dying))
    assert len(list(folder.iterdir())) == 2
    assert in_processes(2, tmp_path / "b", again) == ["", ""]
    compress(tmp_path / "alone")
    for name in FILES:
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def _failing(samples: list[Any], index: int) -> Iterator[Any]:
    yield from samples[:index]
    raise RuntimeError("the data ended")


def test_a_full_disk_does_not_end_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nncf_log: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise nncf.ValidationError("Cannot write x: No space left on device.")

    monkeypatch.setattr(journal, "write_atomically", full)
    result, _ = calibrate(tmp_path / "unfinished", make_batches(6))
    assert result == whole()
    assert nncf_log.text.count("No space left") == 1


def test_folders_that_are_not_ours(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(nncf.ValidationError, match="holds other things"), scap_nncf.resumable(tmp_path):
        pass
    with pytest.raises(nncf.ValidationError, match="seconds"), scap_nncf.resumable(tmp_path / "x", every=-1):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "precious"


# -- folders -----------------------------------------------------------------------------------------------------------


def test_a_folder_is_written_by_one_process_at_a_time(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as folder:
        (folder / "plan.json").write_text("{}")
        with pytest.raises(nncf.ValidationError, match="another process is writing"), new_folder(tmp_path / "out"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_process_left_goes_with_the_next_run(tmp_path: Path) -> None:
    import multiprocessing

    def dying() -> None:
        with new_folder(tmp_path / "out", overwrite=True) as folder:
            (folder / "plan.json").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=dying)
    process.start()
    process.join()
    assert not (tmp_path / "out").exists()
    assert any(tmp_path.iterdir())
    with new_folder(tmp_path / "out") as folder:
        (folder / "plan.json").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("basic_ios::clear: iostream error")]
)
def test_a_full_disk_leaves_the_old_folder(error: Exception, tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as folder:
        (folder / "plan.json").write_text("old")
    again = new_folder(tmp_path / "out", overwrite=True)
    with pytest.raises(nncf.ValidationError, match="cannot be written"), again as folder:  # noqa: PT012
        (folder / "plan.json").write_text("ne")
        raise error
    assert (tmp_path / "out" / "plan.json").read_text() == "old"


@pytest.mark.parametrize("stage", range(4))
def test_a_saved_plan_is_whole_at_every_point(stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies before the n-th file of a second save is written."""
    from scap_nncf.algorithms import plan as plan_module
    from scap_nncf.algorithms.scap.calibration import statistics_of_plan

    first = scap_nncf.compress(build_tiny_model(), dataset=make_batches(2), sparsity=0.3, allocation="uniform")
    second = scap_nncf.compress(build_tiny_model(seed=1), dataset=make_batches(3), sparsity=0.6, allocation="uniform")
    old, new = (scap_nncf.get_controller(model) for model in (first, second))
    old.save(tmp_path)
    write, calls = plan_module.write_atomically, []

    def dying(path: Path, content: bytes) -> Path:
        calls.append(path)
        if len(calls) > stage:
            raise KeyboardInterrupt
        return write(path, content)

    monkeypatch.setattr(plan_module, "write_atomically", dying)
    expected = new
    if stage < 3:  # the file that is kept, the statistics, the plan
        expected = old
        with pytest.raises(KeyboardInterrupt):
            new.save(tmp_path)
    else:
        new.save(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    plan = scap_nncf.Plan.load(tmp_path)
    assert plan.sites == expected.plan.sites
    assert statistics_of_plan(tmp_path, plan).to_bytes() == expected.calibration.to_bytes()
    monkeypatch.undo()
    new.save(tmp_path)
    assert statistics_of_plan(tmp_path, scap_nncf.Plan.load(tmp_path)).to_bytes() == new.calibration.to_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
