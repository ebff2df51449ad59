# SPDX-License-Identifier: Apache-2.0
"""The compiled CPU kernels from PyTorch: against float64, in every instruction set, and in deployed models."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from typing import Any

import nncf
import pytest
import torch
from tiny_models import build_tiny_model, make_batches

import scap_nncf
from scap_nncf.deployment import deploy, undeploy
from scap_nncf.kernels import ops, quant_ops, reference
from scap_nncf.kernels.cpu import library
from scap_nncf.kernels.cpu.build import BuildError
from scap_nncf.kernels.packing import dequantize, from_integers

INSTRUCTION_SETS = ("avx512_bf16", "avx512", "avx2", "portable")


@pytest.fixture(scope="module", autouse=True)
def compiled() -> Iterator[None]:
    """The kernels, for the tests of this module alone: the others run the plain torch definitions."""
    try:
        library.load()
    except BuildError as error:
        pytest.skip(f"the CPU kernels cannot be built here: {error}")
    yield
    library._library = None


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    best = library.isa()
    try:
        library.force_isa(request.param)
    except ValueError:
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    library.force_isa(best)


def definition(
    x: torch.Tensor, weight: torch.Tensor, thresholds: list[float], widths: list[int], mode: float,
    bias: torch.Tensor | None, activation: str | None,
) -> tuple[torch.Tensor, float]:  # fmt: skip
    """The result in float64 with the masks of float32, and the size of what is added up."""
    parts, size, start = [], 1.0, 0
    for threshold, width in zip(thresholds, widths, strict=True):
        z = x.float() - mode
        kept = torch.where(z.abs() <= threshold, torch.zeros(()), z).double()
        columns = weight[:, start : start + width].double()
        part = kept @ columns
        size = max(size, float((kept.abs() @ columns.abs()).max()))
        if bias is not None:
            part = part + bias[start : start + width].double()
        parts.append(part)
        start += width
    if activation is not None:
        return reference.activate(parts[0], activation) * parts[1], size * size * (size if activation == "relu2" else 1)
    return torch.cat(parts, dim=-1), size


def check(result: torch.Tensor, expected: tuple[torch.Tensor, float], dtype: torch.dtype) -> None:
    exact, size = expected
    step = {torch.float32: 0.0, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
    limit = 65000.0 if dtype == torch.float16 else float("inf")
    difference = (result.double() - exact).abs()
    assert result.dtype == dtype
    assert bool(((difference <= 1e-6 * size + step * exact.abs()) | (exact.abs() > limit)).all()), difference.max()


def test_random_calls(isa: str) -> None:
    for _ in range(60):
        k = random.choice([1, 2, 7, 16, 33, 64, 100, 257])
        rows = random.choice([1, 1, 2, 3, 8, 9, 70])
        activation = random.choice([None, None, "silu", "gelu", "gelu_tanh", "relu", "relu2"])
        widths = [random.choice([1, 5, 16, 31, 64, 65, 128, 200, 2100]) for _ in range(random.choice([1, 2, 3]))]
        if activation is not None:
            widths = [widths[0]] * 2
        dtype = random.choice([torch.float32, torch.bfloat16, torch.float16])
        thresholds = [random.choice([-1.0, 0.0, 0.5, 1.2, 50.0]) for _ in widths]
        mode, n = random.choice([0.0, 0.25]), sum(widths)
        x, bias = torch.randn(rows, k).to(dtype), random.choice([None, torch.randn(n)])
        weight = torch.randn(k, n).to(dtype)
        given = (thresholds, widths, mode)
        result = library.sparse_fc(x, weight, *given, bias, activation)
        check(result, definition(x, weight, *given, bias, activation), dtype)

        bits = random.choice([4, 8])
        if activation is not None or len(widths) > 1:
            block = 512 // bits
            widths = [-(-width // block) * block for width in widths]
            n, bias = sum(widths), None
        group = random.choice([g for g in range(1, k + 1) if k % g == 0 and (g > 8 or g == k)])
        signed, half = random.random() < 0.5, 1 << (bits - 1)
        low, high = (-half, half) if signed else (0, 2 * half)
        kinds = {
            "none": None,
            "integer": torch.randint(low, high, (n, k // group), dtype=torch.int32),
            "float": torch.randn(n, k // group),
        }
        zero = kinds[random.choice(list(kinds))]
        scale = (torch.rand(n, k // group) + 0.5).to(random.choice([torch.float32, torch.float16, torch.bfloat16]))
        packed = from_integers(torch.randint(low, high, (n, k)), scale, zero, bits=bits, signed=signed)
        given = (thresholds, widths, mode)
        fields = (packed.packed, packed.scale, packed.zero, bits)
        result = library.sparse_fc_quant(x, *fields, *given, bias, activation)
        assert result is not None
        wide = dequantize(*fields, rounded=False, dtype=torch.float64)
        check(result, definition(x, wide, *given, bias, activation), dtype)


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_thread_count_changes_no_bit(isa: str, rows: int) -> None:
    x, weight = torch.randn(rows, 300), torch.randn(300, 2500)
    scale = torch.rand(2500, 3) + 0.5
    packed = from_integers(torch.randint(-8, 8, (2500, 300)), scale, bits=4, signed=True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            dense = library.sparse_fc(x, weight, [0.7], [2500], 0.1, None)
            words = library.sparse_fc_quant(x, packed.packed, packed.scale, None, 4, [0.7], [2500], 0.1, None)
            results.append((dense, words))
    finally:
        torch.set_num_threads(before)
    for dense, words in results[1:]:
        assert torch.equal(dense, results[0][0])
        assert torch.equal(words, results[0][1])


def test_nan_and_infinity_stay_visible(isa: str) -> None:
    x = torch.randn(1, 40)
    x[0, 3], x[0, 20] = float("nan"), float("inf")
    y = library.sparse_fc(x, torch.rand(40, 70) + 0.1, [0.5], [70], 0.0, None)
    assert bool(y.isnan().all())


def test_ops_use_the_kernels_for_strided_and_shaped_inputs() -> None:
    weight = torch.randn(48, 200)[:, 30:130]  # adjacent columns of a wider one
    x = torch.randn(2, 2, 96)[..., ::2]
    y = ops.sparse_fc(x, weight, [0.4, 0.8], [60, 40], 0.1, torch.randn(100))
    assert y.shape == (2, 2, 100)
    twin = ops.sparse_fc(x, weight, [0.4, 0.8], [60, 40], 0.1, None, torch.randn(2, 2, 100))
    assert twin.shape == (2, 2, 100)
    exact, size = definition(x, weight, [0.4, 0.8], [60, 40], 0.1, None, None)
    plain = ops.sparse_fc(x, weight, [0.4, 0.8], [60, 40], 0.1)
    assert (plain.double() - exact).abs().max() <= 1e-6 * size
    many = torch.randn(50, 48)
    exact, size = definition(many, weight, [0.4, 0.8], [60, 40], 0.1, None, None)
    assert (ops.sparse_fc(many, weight, [0.4, 0.8], [60, 40], 0.1).double() - exact).abs().max() <= 1e-6 * size
    wide = x.double()  # float64 has no kernel: the definition runs
    assert ops.sparse_fc(wide, weight.double(), [0.4], [100]).dtype == torch.float64
    # a segment that begins inside of a block of words
    packed = from_integers(torch.randint(-8, 8, (200, 48)), torch.rand(200, 1), bits=4, signed=True)
    args = (packed.packed, packed.scale, None, 4, [0.4, 0.8], [70, 130])
    wanted = reference.quantized.sparse_fc_quant(x, *args)
    torch.testing.assert_close(quant_ops.sparse_fc_quant(x, *args), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "phi3"])
@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_deployed_model_is_the_simulated_one(family: str, mode: str) -> None:
    model = build_tiny_model(family)
    model = scap_nncf.compress(model, dataset=nncf.Dataset(make_batches(2)), sparsity=0.5, mode=mode)
    batches = [make_batches(1, 2, length, seed=random.randrange(1 << 30))[0] for length in (1, 3, 19)]
    with torch.no_grad():
        expected = [model(**batch).logits for batch in batches]
        deploy(model, backend="cpu")
        for batch, logits in zip(batches, expected, strict=True):
            torch.testing.assert_close(model(**batch).logits, logits, atol=1e-5, rtol=1e-5)
        undeploy(model)
        assert torch.equal(model(**batches[1]).logits, expected[1])


@pytest.mark.parametrize("mode", ["int8_asym", "int4_sym"])
def test_compressed_model(mode: str) -> None:
    data = nncf.Dataset(make_batches(2))
    options: dict[str, Any] = {} if mode == "int8_asym" else {"group_size": 8, "ratio": 1.0}
    model = nncf.compress_weights(
        build_tiny_model("llama"), mode=nncf.CompressWeightsMode(mode), dataset=data, **options
    )
    model = scap_nncf.compress(model, dataset=data, sparsity=0.5)
    batch = make_batches(1, 1, 4, seed=random.randrange(1 << 30))[0]
    with torch.no_grad():
        # the definition on packed weights: the simulation decompresses in float16, which moves values over thresholds
        expected = deploy(model, backend="reference")(**batch).logits
        logits = deploy(undeploy(model), backend="cpu")(**batch).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_without_a_compiler_the_definition_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(library, "_library", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda *_args, **_kwargs: None)
    model = build_tiny_model("llama")
    model = scap_nncf.compress(model, dataset=nncf.Dataset(make_batches(1)), sparsity=0.5)
    batch = make_batches(1, seed=4)[0]
    with torch.no_grad():
        expected = model(**batch).logits
        torch.testing.assert_close(deploy(model, backend="cpu")(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    assert not library.loaded()
