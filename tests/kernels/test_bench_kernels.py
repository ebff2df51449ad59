# SPDX-License-Identifier: Apache-2.0
"""The kernel benchmark without a GPU: names, messages, files."""

from __future__ import annotations

import json

import pytest
import torch

from scap_nncf import bench_kernels


def test_shapes_by_name_and_role():
    found = list(bench_kernels.select(["llama-3-8b:down", "phi-2"], ("fc",)))
    assert [(model, shape.name) for model, shape in found][:2] == [("llama-3-8b", "down"), ("phi-2", "qkv")]
    assert found[0][1] == bench_kernels.Shape("down", "fc", 14336, 4096)
    for shapes in bench_kernels.SHAPES.values():
        assert all(shape.n % 2 == 0 and shape.op in ("fc", "glu", "ffn") for shape in shapes)


@pytest.mark.parametrize(("name", "match"), [("llama-9", "one of llama-2-7b"), ("phi-2:gate_up", "no 'gate_up'")])
def test_unknown_names_say_what_there_is(name, match):
    with pytest.raises(ValueError, match=match):
        list(bench_kernels.select([name], ("fc", "glu")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a CUDA device")
def test_no_gpu_is_one_clear_line():
    with pytest.raises(RuntimeError, match="CUDA device"):
        bench_kernels.run(["phi-2"])


def test_threshold_drops_the_asked_share():
    x = torch.randn(1, 1000)
    for sparsity in (0.1, 0.5, 0.9):
        assert (x.abs() <= bench_kernels.quantile(x, sparsity)).sum() == 1000 * sparsity
    assert bench_kernels.quantile(x, 0.0) < 0


def test_results_become_json_csv_and_a_plot(tmp_path, monkeypatch):
    pytest.importorskip("triton", reason="needs Triton")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    rows = [
        {"label": label, "sparsity": s, "floor_us": 9.0 * (1 - s), "dense_us": 10.0, "sparse_us": 10.0 * (1.1 - s)}
        for label in ("one", "two")
        for s in (0.0, 0.5)
    ]
    rows[0]["teal_us"] = 11.0  # a contender that was not measured everywhere
    bench_kernels.write(rows, 3.1e12, tmp_path, "the command")
    loaded = json.loads((tmp_path / "kernels.json").read_text())
    assert loaded["about"]["command"] == "the command"
    assert loaded["results"] == rows
    lines = (tmp_path / "kernels.csv").read_text().splitlines()
    assert len(lines) == 5
    assert lines[0].endswith("teal_us")
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    assert (tmp_path / "kernels.png").stat().st_size > 1000
