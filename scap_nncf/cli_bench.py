# SPDX-License-Identifier: Apache-2.0
"""The commands `scap-nncf bench kernel`, `bench decode` and `bench openvino`."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import nncf
import typer

from scap_nncf.cli_options import parse_sparsity
from scap_nncf.cli_output import work

bench = typer.Typer(
    name="bench",
    help="Speed of the kernels and of whole models: dense beside sparse, JSON, CSV and a picture.",
    no_args_is_help=True,
)


class Dtype(str, Enum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


Out = Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the JSON, CSV and PNG files.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


@bench.command()
def decode(
    shape: Annotated[
        str, typer.Argument(help="Named shape with random weights, or MODEL as elsewhere.")
    ] = "mistral-7b",
    output: Out = None,
    sparsity: Annotated[
        list[str] | None,
        typer.Option(
            "--sparsity", "-s", help="As in compress; may be repeated. Default: the paper's FFN 48.5 % and 0.5."
        ),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Type of weights and activations.")] = Dtype.float16,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default: the GPU where there is one.")] = None,
    prompts: Annotated[str, typer.Option(help="Prompt lengths.")] = "256,1024,2048",
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = "1,4",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens a round.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the median counts.")] = 5,
    dense_modes: Annotated[str, typer.Option(help="eager, graph, compiled.")] = "eager,graph,compiled",
    sparse_modes: Annotated[str, typer.Option(help="eager, graph, compiled.")] = "compiled",
    bits: Annotated[
        int, typer.Option(help="4 or 8: weights of the blocks compressed by NNCF, against PyTorch's own dense kernels.")
    ] = 0,
    prefill: Annotated[int, typer.Option(min=0, help="Prompt length for the time to first token; 0: none.")] = 2048,
    as_json: AsJson = False,
) -> None:
    """Milliseconds a token of a whole model, dense and deployed."""
    import torch

    from scap_nncf import bench_decode

    sparsities = {text: parse_sparsity(text) for text in sparsity} if sparsity else None
    model: Any = shape
    if shape not in bench_decode.SHAPES:
        if not Path(shape).exists() and "/" not in shape and shape != "demo":
            known = ", ".join(bench_decode.SHAPES)
            msg = f"Unknown shape {shape!r}; there are {known}. Or give a folder, a hub id, or demo."
            raise nncf.ValidationError(msg)
        from scap_nncf.models import load_model

        model, _ = load_model(shape, dtype.value, device or "auto")
    with work(as_json) as out:
        result = bench_decode.run(
            model,
            sparsities=sparsities,
            dtype=getattr(torch, dtype.value),
            device=device,
            prompts=_numbers(prompts, "--prompts"),
            batches=_numbers(batches, "--batches"),
            tokens=tokens,
            rounds=rounds,
            dense_modes=_words(dense_modes),
            sparse_modes=_words(sparse_modes),
            prefill=prefill or None,
            bits=bits or None,
        )
        files = result.save(output) if output is not None else []
        out.result(
            {
                "about": result.about,
                "decode": [{**asdict(row), "speedup": result.speedup(row)} for row in result.decode],
                "prefill": [asdict(row) for row in result.prefill],
                "memory": [asdict(row) for row in result.memory],
                "files": [str(file) for file in files],
            },
            str(result),
        )


def _numbers(text: str, option: str) -> list[int]:
    try:
        numbers = [int(part) for part in _words(text)]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        msg = f"{option} {text!r}: expected whole numbers from 1, separated by commas"
        raise typer.BadParameter(msg)
    return numbers


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


@bench.command()
def kernel(
    shapes: Annotated[
        str, typer.Argument(help="Named shapes, separated by commas; NAME:ROLE picks one operation.")
    ] = "llama-3-8b",
    output: Out = None,
    dtypes: Annotated[str, typer.Option(help="fp16, bf16, fp32.")] = "fp16",
    sparsity: Annotated[str, typer.Option("--sparsity", "-s", help="Shares of dropped inputs.")] = "0,0.4,0.5,0.7,0.9",
    rows: Annotated[str, typer.Option(help="Rows of the activation, 1 to 16.")] = "1",
    peers: Annotated[
        Path | None, typer.Option(help="Folder with peers' kernels: teal.py, cats.py; measured beside ours.")
    ] = None,
    tune: Annotated[bool, typer.Option("--tune", help="Search tiles for these shapes first.")] = False,
    as_json: AsJson = False,
) -> None:
    """Microseconds of the GPU kernels beside the dense library and the time to read the weights that are kept."""
    from scap_nncf import bench_kernels

    try:
        shares = [float(item) for item in _words(sparsity)]
    except ValueError as error:
        msg = f"--sparsity {sparsity!r}: expected numbers such as 0.5, separated by commas ({error})"
        raise typer.BadParameter(msg) from error
    folder = output if output is not None else Path("bench_kernel")
    try:
        with work(as_json) as out:
            results = bench_kernels.run(
                _words(shapes),
                _words(dtypes),
                shares,
                folder,
                rows=_numbers(rows, "--rows"),
                peers_dir=peers,
                tune=tune,
                command=f"scap-nncf bench kernel {shapes} --dtypes {dtypes} --sparsity {sparsity} --rows {rows}",
            )
            out.result({"results": results, "folder": str(folder)}, f"{len(results)} measurements, saved to {folder}")
    except (ValueError, RuntimeError) as error:  # an unknown shape or dtype, or no GPU
        raise nncf.ValidationError(str(error)) from error


class What(str, Enum):
    layers = "layers"
    chain = "chain"


@bench.command()
def openvino(
    what: Annotated[What, typer.Argument(help="layers: single FC layers; chain: gated feed-forwards in a row.")] = (
        What.layers
    ),
    output: Out = None,
    shapes: Annotated[str, typer.Option(help="Layers: input channels x outputs.")] = "2048x8192,4096x14336",
    formats: Annotated[str, typer.Option(help="Weights: f32, bf16, f16, i8, u8, i4, u4.")] = "bf16,i8,i4",
    sparsity: Annotated[str, typer.Option("--sparsity", "-s", help="Shares of dropped inputs.")] = "0,0.4,0.5,0.7",
    tokens: Annotated[str, typer.Option(help="Rows of a call; 1 is decoding.")] = "1,128,512",
    group: Annotated[int, typer.Option(min=2, help="Input channels a scale, 4-bit weights.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the median counts.")] = 15,
    as_json: AsJson = False,
) -> None:
    """The OpenVINO operation that skips weights beside the stock CPU plugin in its best setting."""
    from scap_nncf import bench_openvino

    try:
        sizes = [(int(k), int(n)) for k, n in (item.split("x") for item in _words(shapes))]
        shares = [float(item) for item in _words(sparsity)]
    except ValueError as error:
        msg = f"--shapes {shapes!r} and --sparsity {sparsity!r}: expected such as 2048x8192 and 0.5 ({error})"
        raise typer.BadParameter(msg) from error
    common: dict[str, Any] = {"formats": _words(formats), "tokens": _numbers(tokens, "--tokens"), "group": group}
    command = (
        f"scap-nncf bench openvino {what.value} --shapes {shapes} --formats {formats} --sparsity {sparsity} "
        f"--tokens {tokens} --group {group} --rounds {rounds}"
    )
    with work(as_json) as out:
        if what is What.layers:
            result = bench_openvino.layers(sizes, sparsities=shares, rounds=rounds, command=command, **common)
        else:
            kept = [share for share in shares if share > 0]
            result = bench_openvino.chain(sparsities=kept, rounds=rounds, command=command, **common)
        files = result.save(output, f"openvino-{what.value}") if output is not None else []
        rows = [{**asdict(row), "speedup": result.speedup(row)} for row in result.rows]
        out.result({"about": result.about, "rows": rows, "files": [str(file) for file in files]}, str(result))
