# SPDX-License-Identifier: Apache-2.0
"""The commands `scap-nncf bench kernel` and `scap-nncf bench decode`."""

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
