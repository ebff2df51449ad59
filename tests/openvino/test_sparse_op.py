# SPDX-License-Identifier: Apache-2.0
"""The OpenVINO operation that skips weights: the same numbers as the simulated graph, saved, loaded and taken back."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov
import pytest
import torch

import scap_nncf
from scap_nncf import bench_openvino, deploy_openvino
from scap_nncf.deployment import deploy, is_deployed, undeploy
from scap_nncf.kernels.cpu import build as builder
from scap_nncf.kernels.cpu.build import BuildError
from scap_nncf.kernels.openvino import operation

Models = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def extension() -> Path:
    try:
        return scap_nncf.openvino_extension()
    except BuildError as error:
        pytest.skip(f"the extension cannot be built here: {error}")


def operations(model: ov.Model) -> list[Any]:
    return [node for node in model.get_ops() if operation.is_sparse_fc(node)]


def kinds(model: ov.Model) -> dict[str, int]:
    names = [node.get_type_name() for node in model.get_ops() if node.get_type_name() != "Constant"]
    return {name: names.count(name) for name in set(names)}


def fresh(batches: Models, length: int = 19) -> list[dict[str, torch.Tensor]]:
    batch = batches(1, 2, length, seed=random.randrange(1 << 30))[0]
    return [batch, {"input_ids": batch["input_ids"][:1, :1]}, {"input_ids": batch["input_ids"][:1, :3]}]


@pytest.mark.parametrize("mode", ["zero", "mean"])
@pytest.mark.parametrize("weights", ["f32", "f16", "int8_asym", "int8_sym", "int4_sym", "int4_asym"])
def test_same_numbers_in_every_format(
    weights: str, mode: str, read_ir: Models, run_ir: Models, batches: Models, tmp_path: Path
) -> None:
    model = read_ir()
    if weights == "f16":
        ov.save_model(model, tmp_path / "half.xml", compress_to_fp16=True)
        model = ov.Core().read_model(tmp_path / "half.xml")
    elif weights != "f32":
        options = {"group_size": 8} if weights.startswith("int4") else {}
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode(weights), **options)
    sparse = nncf.compress(model, algorithm="scap", dataset=nncf.Dataset(batches(2)), sparsity=0.5, mode=mode)
    samples = fresh(batches)
    expected = [run_ir(sparse, sample) for sample in samples]
    before = kinds(sparse)
    assert deploy(sparse, backend="cpu") is sparse
    assert is_deployed(sparse)
    # q, k and v in one, o, gate and up with their activation, down; two blocks
    assert len(operations(sparse)) == 8
    assert not any(name == "Swish" for name in kinds(sparse))
    for sample, logits in zip(samples, expected, strict=True):
        np.testing.assert_allclose(run_ir(sparse, sample), logits, rtol=1e-4, atol=2e-5)
    undeploy(sparse)
    assert not is_deployed(sparse)
    assert kinds(sparse) == before
    for sample, logits in zip(samples, expected, strict=True):
        assert np.array_equal(run_ir(sparse, sample), logits)


@pytest.mark.parametrize("prune", ["all", "decode"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_families(family: str, prune: str, read_ir: Models, run_ir: Models, batches: Models) -> None:
    # biases, transposed weights; where only lone tokens are pruned, a flag tells the operation
    sparse = nncf.compress(
        read_ir(family), algorithm="scap", dataset=nncf.Dataset(batches(2)), sparsity=0.4, mode="mean", prune=prune
    )
    samples = fresh(batches)
    expected = [run_ir(sparse, sample) for sample in samples]
    deploy(sparse, backend="cpu")
    assert operations(sparse)
    for sample, logits in zip(samples, expected, strict=True):
        np.testing.assert_allclose(run_ir(sparse, sample), logits, rtol=1e-4, atol=5e-5)
    undeploy(sparse)
    for sample, logits in zip(samples, expected, strict=True):
        np.testing.assert_allclose(run_ir(sparse, sample), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "swapped"])
def test_gated_by_other_activations(activation: str, core: Any, exact: dict[str, Any]) -> None:
    from openvino import opset13 as opset

    x = opset.parameter([-1, -1, 64], np.float32, name="x")
    gate, up = (
        opset.matmul(x, bench_openvino.random_weight(64, 200, "i8", seed=seed), False, True,
                     name=f"__module.layers.0.mlp.{name}/aten::linear/MatMul")
        for seed, name in enumerate(("gate_proj", "up_proj"))
    )  # fmt: skip
    makers = {
        "gelu": lambda: opset.multiply(opset.gelu(gate, "erf"), up),
        "gelu_tanh": lambda: opset.multiply(opset.gelu(gate, "tanh"), up),
        "relu": lambda: opset.multiply(opset.relu(gate), up),
        "swapped": lambda: opset.multiply(up, opset.swish(gate)),
    }
    model = ov.Model([opset.result(makers[activation]())], [x], "gated")
    data = np.random.default_rng().standard_normal((1, 5, 64), dtype=np.float32)
    sparse = nncf.compress(model, algorithm="scap", dataset=nncf.Dataset([data]), sparsity=0.5, mode="mean")
    run = lambda: np.array(core.compile_model(sparse, "CPU", exact)(data)[0])  # noqa: E731
    expected, before = run(), kinds(sparse)
    deploy(sparse, backend="cpu")
    (node,) = operations(sparse)
    assert operation.attributes_of(node).activation == {"swapped": "silu"}.get(activation, activation)
    np.testing.assert_allclose(run(), expected, rtol=1e-4, atol=1e-5)
    undeploy(sparse)
    assert kinds(sparse) == before
    np.testing.assert_allclose(run(), expected, rtol=1e-6, atol=1e-7)


def test_other_precision_hints_and_counters(core: Any, read_ir: Models, run_ir: Models, batches: Models) -> None:
    sparse = nncf.compress(read_ir(), algorithm="scap", dataset=nncf.Dataset(batches(2)), sparsity=0.5)
    sample = fresh(batches)[0]
    plan = scap_nncf.get_controller(sparse).plan
    scap_nncf.measure_sparsity(sparse, [sample])
    wanted = {row.name: row.realised_sparsity for row in scap_nncf.get_controller(sparse).statistics().layers}
    exact = run_ir(sparse, sample)
    deploy(sparse, backend="cpu")
    bench_openvino.reset_counts()
    run_ir(sparse, sample)
    counted = bench_openvino.counts()
    for layer in plan.layers:
        dropped, seen = counted[layer.name]
        assert abs(dropped / seen - wanted[layer.name]) < 1e-3
    from scap_nncf.algorithms.backends.openvino.feed import feed

    for hint in ("bf16", "f16"):
        compiled = core.compile_model(sparse, "CPU", {"INFERENCE_PRECISION_HINT": hint})
        result = np.array(compiled.create_infer_request().infer(feed(sparse, sample, "sample"))[0])
        assert np.isfinite(result).all()
        assert np.abs(result - exact).mean() < 0.6 * np.abs(exact).mean()  # masks flip where values are rounded


def test_saved_and_loaded(
    exported: Models, read_ir: Models, run_ir: Models, batches: Models, exact: dict[str, Any], tmp_path: Path
) -> None:
    from optimum.intel import OVModelForCausalLM

    from scap_nncf import optimum

    sparse = nncf.compress(read_ir(), algorithm="scap", dataset=nncf.Dataset(batches(2)), sparsity=0.5)
    samples = fresh(batches)
    expected = [run_ir(sparse, sample) for sample in samples]
    plain = OVModelForCausalLM.from_pretrained(exported("llama"), ov_config=exact)
    plain.replace_ov_model(plain.model, sparse.clone())
    ids = samples[0]["input_ids"][:1]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    text = plain.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()

    folder = scap_nncf.save_openvino(deploy(sparse, backend="cpu"), tmp_path / "ir")
    for file in exported("llama").iterdir():
        if not (folder / file.name).exists():
            shutil.copy(file, folder)
    again = scap_nncf.load_openvino(folder)
    assert is_deployed(again)
    for sample, logits in zip(samples, expected, strict=True):
        np.testing.assert_allclose(run_ir(again, sample), logits, rtol=1e-4, atol=2e-5)
    controller = scap_nncf.get_controller(again)
    assert controller.plan.sites == scap_nncf.get_controller(sparse).plan.sites
    for change in (controller.strip, controller.disabled().__enter__):
        with pytest.raises(nncf.ValidationError, match="undeploy"):
            change()
    with pytest.raises(nncf.ValidationError, match="deployed"):
        deploy(again, backend="cpu")
    own = ov.Core()
    own.add_extension(str(scap_nncf.openvino_extension()))
    assert operations(own.read_model(folder / "openvino_model.xml"))
    undeploy(again)
    assert np.array_equal(run_ir(again, samples[0]), expected[0])

    task = "text-generation-with-past"
    model = optimum.from_pretrained(folder, task=task, ov_config=exact)
    assert is_deployed(model)
    assert model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist() == text
    model.save_pretrained(tmp_path / "third")
    third = optimum.from_pretrained(tmp_path / "third", task=task, ov_config=exact)
    assert third.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist() == text
    undeploy(third)
    assert third.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist() == text

    # where nothing can be compiled the stock graph runs, and one line says so
    code = f"""
import scap_nncf, torch
from scap_nncf import optimum
from scap_nncf.deployment import is_deployed
assert not is_deployed(scap_nncf.load_openvino({str(folder)!r}))
model = optimum.from_pretrained({str(folder)!r}, task={task!r}, ov_config={exact!r})
ids = torch.tensor({ids.tolist()!r})
print(model.generate(ids, attention_mask=torch.ones_like(ids), **{options!r})[0].tolist())
"""
    bare = {**os.environ, "PATH": "/nowhere", "CXX": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], env=bare, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == str(text)
    assert (done.stdout + done.stderr).count("the stock graph runs") == 1


def test_genai(exported: Models, read_ir: Models, batches: Models, tmp_path: Path) -> None:
    genai = pytest.importorskip("openvino_genai", reason="needs openvino-genai")
    sparse = nncf.compress(read_ir(), algorithm="scap", dataset=nncf.Dataset(batches(1)), sparsity=0.5, prune="all")
    plain, deployed = tmp_path / "plain", tmp_path / "deployed"
    for folder in (plain, deployed):
        shutil.copytree(exported("llama"), folder)
        model = sparse if folder is plain else deploy(sparse, backend="cpu")
        for name in ("openvino_model.xml", "openvino_model.bin"):
            (folder / name).unlink()
        ov.save_model(model, folder / "openvino_model.xml", compress_to_fp16=False)
    texts = []
    for backend in ("SDPA", "PA"):
        for folder, extensions in ((plain, []), (deployed, [str(scap_nncf.openvino_extension())])):
            options = {"INFERENCE_PRECISION_HINT": "f32", "ATTENTION_BACKEND": backend, "KV_CACHE_PRECISION": "f32"}
            pipe = genai.LLMPipeline(str(folder), "CPU", extensions=extensions, **options)
            texts.append(str(pipe.generate("abc def", max_new_tokens=8, ignore_eos=True, do_sample=False)))
    assert texts[0] == texts[1]
    assert texts[2] == texts[3]


def test_only_where_it_pays(read_ir: Models, run_ir: Models, batches: Models, caplog: pytest.LogCaptureFixture) -> None:
    sparsity = {"up": 0.5, "gate": 0.05, "down": 0.5, "o": 0.1}
    sparse = nncf.compress(read_ir(), algorithm="scap", dataset=nncf.Dataset(batches(1)), sparsity=sparsity)
    sample = fresh(batches)[1]
    expected = run_ir(sparse, sample)
    deploy(sparse, backend="cpu")
    names = [name for node in operations(sparse) for name in operation.attributes_of(node).names]
    assert sorted(name.rpartition(".")[2] for name in names) == ["down_proj"] * 2 + ["up_proj"] * 2
    np.testing.assert_allclose(run_ir(sparse, sample), expected, rtol=1e-4, atol=2e-5)
    undeploy(sparse)
    assert np.array_equal(run_ir(sparse, sample), expected)
    deploy(sparse, backend="cpu", min_sparsity=0.0)
    assert sum(len(operation.attributes_of(node).names) for node in operations(sparse)) == 8
    np.testing.assert_allclose(run_ir(sparse, sample), expected, rtol=1e-4, atol=2e-5)


def test_wrong_uses(read_ir: Models, batches: Models) -> None:
    with pytest.raises(nncf.ValidationError, match="no activation sparsity"):
        deploy(read_ir(), backend="cpu")
    with pytest.raises(nncf.ParameterNotSupportedError, match="backend='cpu'"):
        deploy(read_ir(), backend="triton")
    with pytest.raises(nncf.ValidationError, match="not deployed"):
        undeploy(read_ir())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('version="1" in_features="48"', 'version="7" in_features="48"'),
        ('in_features="48"', 'in_features="49"'),
        ('thresholds="', 'thresholds="x'),
        ('activation="silu"', 'activation="selu"'),
        ('formats="f32', 'formats="q3'),
    ],
)
def test_damaged_ir_is_refused(old: str, new: str, read_ir: Models, batches: Models, tmp_path: Path) -> None:
    sparse = nncf.compress(read_ir(), algorithm="scap", dataset=nncf.Dataset(batches(1)), sparsity=0.5)
    folder = scap_nncf.save_openvino(deploy(sparse, backend="cpu"), tmp_path / "ir")
    text = (folder / "openvino_model.xml").read_text()
    assert old in text
    (folder / "openvino_model.xml").write_text(text.replace(old, new))
    with pytest.raises(RuntimeError, match=r"ScapSparseFC|layer|attribute"):
        scap_nncf.load_openvino(folder)


def test_without_a_compiler_deploy_leaves_the_model(
    read_ir: Models, batches: Models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sparse = nncf.compress(read_ir(), algorithm="scap", dataset=nncf.Dataset(batches(1)), sparsity=0.5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(builder.shutil, "which", lambda *_args, **_kwargs: None)
    deploy_openvino._warn_stock.cache_clear()
    deploy(sparse, backend="cpu")
    assert not is_deployed(sparse)


def test_benchmark(tmp_path: Path) -> None:
    # wide enough that the few values which bfloat16 rounds onto the threshold do not decide
    result = bench_openvino.layers([(512, 200)], ["i4", "bf16"], (0.0, 0.5), (1, 9), group=32, rounds=1)
    assert {row.weights for row in result.rows} == {"i4", "bf16"}
    half = [row for row in result.rows if row.way == "sparse" and row.sparsity == 0.5 and row.tokens == 1]
    assert all(abs(row.realised - 0.5) < 0.02 for row in half)
    assert all(result.speedup(row) > 0 for row in result.rows)
    assert all(file.is_file() for file in result.save(tmp_path, "layers"))
    chain = bench_openvino.chain(64, 96, 2, ["u8"], (0.5,), (1,), rounds=1)
    assert any(row.way == "sparse" and 0.3 < row.realised < 0.7 for row in chain.rows)


def test_sanitizers(tmp_path: Path) -> None:
    """Address and undefined-behaviour sanitizers over random shapes, formats and masks, and over wrong attributes."""
    wanted = builder.target("openvino")
    compiler = builder._compiler()
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    common = ["-O1", "-g1", "-std=c++17", "-w", f"-I{builder._SOURCES}", f"-I{builder._EXTENSION.parent}"]
    common += [*(f"-I{path}" for path in wanted.includes), *(f"-D{item}" for item in wanted.definitions)]
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }")
    if subprocess.run([compiler, *flags, str(probe), "-o", str(tmp_path / "probe")], capture_output=True).returncode:
        pytest.skip("this compiler has no sanitizers")
    sources = [path for path in wanted.sources if path != builder._EXTENSION]
    sources.append(Path(__file__).with_name("sanitize.cpp"))
    running, objects = [], []
    for source in sources:
        objects.append(str(tmp_path / f"{source.stem}.o"))
        isa = builder._X86_FLAGS.get(source.name, []) if builder.platform.machine() == "x86_64" else []
        command = [compiler, *flags, *common, *isa, "-c", str(source), "-o", objects[-1]]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-2000:]
    program, folder = tmp_path / "sanitize", wanted.libraries[0].parent
    link = [compiler, *flags, *objects, *map(str, wanted.libraries), f"-Wl,-rpath,{folder}", "-o", str(program)]
    subprocess.run(link, check=True, capture_output=True)
    ran = []
    for isa in ("avx512_bf16", "avx512", "avx2", "portable"):
        done = subprocess.run([program, str(random.randrange(1 << 30)), "120", isa], capture_output=True, text=True)
        if done.returncode != 2:  # 2: this machine has no such instruction set
            assert done.returncode == 0, f"{isa}: {done.stdout[-1500:]}{done.stderr[-1500:]}"
            ran.append(isa)
    assert "portable" in ran
