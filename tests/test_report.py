# SPDX-License-Identifier: Apache-2.0
"""The report page: what is on it, that it needs nothing from outside, and that its pictures are pictures."""

from __future__ import annotations

import base64
import json
import math
import random
import re
import shutil
import subprocess
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nncf
import pytest

import scap_nncf
from scap_nncf import plots
from scap_nncf.cli import main
from scap_nncf.evaluation import evaluate
from scap_nncf.report import read_run, save_plots, write_report

pytest.importorskip("matplotlib", reason="needs the extra 'report'")


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        for name, value in attrs:
            if tag == "img" and name == "src":
                self.images.append(value or "")
            elif name in ("src", "href", "srcset", "action", "data", "poster", "background"):
                self.references.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag  # every element is closed, in order

    def handle_data(self, data: str) -> None:
        self.text += data


def _checked(path: Path) -> _Page:
    content = path.read_text(encoding="utf-8")
    page = _Page(content)
    assert page.open == []
    assert not page.references
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base"}
    style = "".join(re.findall(r"<style>(.*?)</style>", content, re.S))
    assert "url(" not in style
    assert "@import" not in style
    for image in page.images:
        kind, _, data = image.partition(";base64,")
        raw = base64.b64decode(data, validate=True)
        if kind == "data:image/svg+xml":
            root = xml.etree.ElementTree.fromstring(raw)
            assert root.tag.endswith("svg")
            links = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")]
            assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
        else:
            assert kind == "data:image/png"
            import io

            from PIL import Image

            picture = Image.open(io.BytesIO(raw))
            picture.load()
            assert min(picture.size) > 50
    return page


def _search(count: int = 12) -> dict[str, Any]:
    rng = random.Random()
    methods = ["uniform", "fisher", "cats", "tpe"]
    return {
        "schema": "scap-nncf.search",
        "schema_version": 1,
        "about": {"budget": "max_loss 1 %", "seed": 3},
        "metric": "perplexity",
        "dense": 20.0,
        "trials": [
            {"number": i, "method": methods[i % 4], "label": f"<{i}>", "byte_sparsity": rng.random(), "plan": None,
             "loss": 20 + 30 * rng.random(), "seconds": 1.5}
            for i in range(count)
        ],
        "best": 5,
        "held_out": {"loss": 20.3, "predicted_speedup": 1.37, "kernels": "<H100>"},
    }  # fmt: skip


_DECODE = {"mode": "eager", "batch": 1, "prompt": 8, "spread": 0.1, "realised": None, "saved": None, "error": ""}
_BENCH = {
    "about": {"model": "tiny & small", "dtype": "float32", "device": "cpu"},
    "decode": [
        {**_DECODE, "variant": "dense", "ms": 2.0, "tokens_per_second": 500.0, "speedup": 1.0},
        {**_DECODE, "variant": "0.5", "ms": 1.25, "tokens_per_second": 800.0, "speedup": 1.6}
        | {"realised": 0.51, "saved": 0.48},
        {**_DECODE, "variant": "0.6", "ms": None, "tokens_per_second": None, "speedup": None, "error": "no GPU"},
    ],
}


@pytest.fixture
def run_folder(tmp_path, tiny_llama, tiny_tokenizer, batches) -> Path:
    """A plan with statistics, an evaluation that really ran, a search and a benchmark."""
    folder = tmp_path / "run"
    scap_nncf.compress(tiny_llama, dataset=batches(), sparsity={"attn": 0.3, "up": 0.5, "gate": 0.4, "down": 0.6})
    controller = scap_nncf.get_controller(tiny_llama)
    controller.save(folder / "plan")
    text = tmp_path / "text.txt"
    text.write_text("".join(random.choices("abcdefgh ", k=200)))
    evaluate(tiny_llama, tiny_tokenizer, perplexity=[text], context=32, args={"model": "<tiny>"}).save(folder)
    (folder / "search.json").write_text(json.dumps(_search()))
    (folder / "decode.json").write_text(json.dumps(_BENCH))
    (folder / "other.json").write_text("[1, 2]")
    return folder


def test_whole_page(run_folder, tmp_path):
    seen: list[tuple[int, int]] = []
    path = write_report(run_folder, tmp_path / "deep" / "report.html", progress=lambda *done: seen.append(done))
    page = _checked(path)
    assert seen[-1][0] == seen[-1][1] == len(page.images)
    for heading in ("Quality", "Trade-off", "Sparsity", "Activations", "Bytes and speed", "To do it again"):
        assert heading in page.text
    data = json.loads((run_folder / "evaluation_results.json").read_text())
    change = data["perplexity"][0]["changes"]["sparse"]
    assert f"{100 * math.expm1(change['difference']):+.1f} %" in page.text
    assert f"{data['runs'][1]['realised']:.1%}".replace("%", " %") in page.text
    plan = scap_nncf.Plan.load(run_folder / "plan")
    for layer in plan.layers:
        assert layer.name in page.text
        assert f"{layer.threshold:.4g}" in page.text
    assert all(f"<{i}>" in page.text for i in range(12))  # every trial, and its label escaped
    assert "tiny & small" in page.text
    assert "no GPU" in page.text
    assert "<tiny>" in page.text
    assert "1.60×" in page.text
    assert f"{1 / (1 - 0.48):.2f}×" in page.text  # predicted beside measured
    assert "1.37×, from measured kernel times (<H100>)" in page.text
    trial = json.loads((run_folder / "search.json").read_text())["trials"][3]
    assert f"{100 * (trial['loss'] / 20 - 1):+.2f} %" in page.text


@pytest.mark.parametrize("kept", ["plan", "evaluation_results.json", "search.json", "decode.json"])
def test_any_part_alone(run_folder, tmp_path, kept):
    alone = tmp_path / "alone"
    alone.mkdir()
    source = run_folder / kept
    if source.is_dir():
        for file in source.iterdir():
            shutil.copy(file, alone)
    else:
        shutil.copy(source, alone)
    page = _checked(write_report(alone, tmp_path / "report.html"))
    assert "Not there:" in page.text
    if kept == "plan":
        (alone / "statistics.safetensors").unlink()
        plan = scap_nncf.Plan.load(alone)
        from dataclasses import replace

        replace(plan, statistics=None).save(alone)
        page = _checked(write_report(alone, tmp_path / "report.html"))
        assert "without statistics" in page.text


def test_equal_runs_give_equal_pages(run_folder, tmp_path):
    shutil.rmtree(run_folder / "plan")
    first, second = (write_report(run_folder, tmp_path / f"{i}.html").read_bytes() for i in range(2))
    assert first == second


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_pictures_as_files(run_folder, tmp_path, kind):
    files = save_plots(run_folder, tmp_path / "plots", kind)
    assert {file.stem for file in files} == {
        "quality", "pareto", "map", "map_realised", "targets", "activations", "bytes",
    }  # fmt: skip
    for file in files:
        content = file.read_bytes()
        assert content.startswith(b"\x89PNG") if kind == "png" else b"<svg" in content[:600]
    with pytest.raises(nncf.ValidationError, match="svg or png"):
        save_plots(run_folder, tmp_path / "plots", "bmp")


def test_both_kinds_of_loss():
    search = _search(1)
    search["trials"][0]["loss"] = 25.0
    assert plots.rise(search, search["trials"][0]) == pytest.approx(0.25)
    search["trials"][0]["loss"], search["loss_is"] = 0.25, "rise"
    assert plots.rise(search, search["trials"][0]) == 0.25
    assert plots.rise({"dense": None}, {"loss": 3.0}) is None


def test_front_holds_what_nothing_beats():
    trials = _search(40)["trials"]
    front = plots.pareto_front(trials)
    for trial in trials:
        beaten = any(
            other["byte_sparsity"] >= trial["byte_sparsity"] and other["loss"] <= trial["loss"] and other is not trial
            for other in trials
        )
        assert (trial in front) == (not beaten)
    assert [t["byte_sparsity"] for t in front] == sorted(t["byte_sparsity"] for t in front)


def test_realised_of_the_run_that_fits_the_plan(run_folder):
    run = read_run(run_folder)
    assert run.realised == {layer["layer"]: layer["realised"] for layer in run.evaluation["runs"][1]["layers"]}
    run.evaluation["runs"][1]["layers"][0]["target"] = 0.99
    assert run.realised is None


def test_bad_runs(run_folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(nncf.ValidationError, match="holds nothing of a run"):
        write_report(empty, tmp_path / "report.html")
    with pytest.raises(nncf.InvalidPathError, match="is no folder"):
        write_report(tmp_path / "none", tmp_path / "report.html")
    for name, text, message in [
        ("search.json", "{", "cut off"),
        ("search.json", '{"schema": "other"}', "no result of a search"),
        ("evaluation_results.json", '{"evaluation": {}}', "no 'runs'"),
        ("evaluation_results.json", "[]", "expected a JSON object"),
    ]:
        before = (run_folder / name).read_text()
        (run_folder / name).write_text(text)
        with pytest.raises(nncf.ValidationError, match=message):
            write_report(run_folder, tmp_path / "report.html")
        (run_folder / name).write_text(before)
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(nncf.ValidationError, match="no finished trial"):
        plots.plot_pareto({"trials": []})
    with pytest.raises(nncf.ValidationError, match="compared nothing"):
        plots.plot_evaluation({"runs": [{"name": "dense"}]})


def test_command(run_folder, tmp_path, capsys):
    code = main(["report", str(run_folder), "-o", str(tmp_path / "r.html"), "--plots", str(tmp_path / "p"), "--json"])
    assert code == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["read"]) == {"plan/plan.json", "evaluation_results.json", "search.json", "decode.json"}
    assert len(result["plots"]) == 7
    _checked(tmp_path / "r.html")
    assert main(["report", str(tmp_path / "nowhere")]) == 1
    assert "is no folder" in capsys.readouterr().err


_BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.mark.skipif(_BROWSER is None, reason="needs Chromium or Chrome")
def test_in_a_browser(run_folder, tmp_path):
    """A real headless browser with its network cut off: every picture has its size, and nothing overflows."""
    path = write_report(run_folder, tmp_path / "report.html")
    probe = (
        "<script>window.addEventListener('load',()=>{const i=[...document.images];document.title=JSON.stringify({"
        "images:i.length,broken:i.filter(x=>!x.complete||!x.naturalWidth).length,"
        "wide:document.documentElement.scrollWidth-document.documentElement.clientWidth,"
        "requests:performance.getEntriesByType('resource').filter(e=>!e.name.startsWith('data:')).length})})</script>"
    )
    shown = tmp_path / "probe.html"
    shown.write_text(path.read_text().replace("</head>", probe + "</head>").replace("<details>", "<details open>"))
    command = [_BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND",
               f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--window-size=900,1200",
               "--dump-dom", shown.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    import html

    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None, done.stderr[-2000:]
    found = json.loads(html.unescape(title[1]))
    assert found == {"images": path.read_text().count("<img "), "broken": 0, "wide": 0, "requests": 0}
