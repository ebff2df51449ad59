# SPDX-License-Identifier: Apache-2.0
"""
The OpenVINO operation that skips weights in whole models: decode, prefill, memory, loading and perplexity.

    python benchmarks/openvino_cpu.py make smollm2 WORK        # models, once; also: llama-1b bf16|int8|int4
    python benchmarks/openvino_cpu.py decode smollm2 WORK RESULTS
    python benchmarks/openvino_cpu.py load smollm2 WORK RESULTS
    python benchmarks/openvino_cpu.py perplexity smollm2 WORK RESULTS

``smollm2`` is SmolLM2-135M-Instruct with int8 weights and 40 % in every layer of the blocks, on real text; ``llama-1b``
has the shape of a 1B Llama and random weights, 50 % in every layer. WORK takes a few GB. Set NUMPY_MADVISE_HUGEPAGE=0.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

import scap_nncf
from scap_nncf import bench_openvino
from scap_nncf.deployment import deploy

WAYS = ("stock", "sparse")
SPARSITY = {"smollm2": 0.4, "llama-1b": 0.5}


def name_of(model: str, weights: str) -> str:
    return model if model == "smollm2" else f"{model}-{weights}"


def make(model: str, weights: str, work: Path) -> None:
    """``stock``, ``simulated`` and ``sparse`` folders below WORK/<name>."""
    import nncf

    base = work / name_of(model, weights)
    if (base / "sparse" / "openvino_model.xml").is_file():
        return
    base.mkdir(parents=True, exist_ok=True)
    dense = dense_smollm2(base) if model == "smollm2" else dense_llama(work)
    ir = scap_nncf.load_openvino(dense)
    if weights != "bf16":
        options: dict[str, Any] = {"int4": {"group_size": 128, "ratio": 1.0}}.get(weights, {})
        mode = nncf.CompressWeightsMode.INT8_ASYM if weights == "int8" else nncf.CompressWeightsMode.INT4_SYM
        ir = nncf.compress_weights(ir, mode=mode, **options)
    publish(ir, dense, base / "stock")
    sparsity = {"all": SPARSITY[model]}
    sparse = scap_nncf.compress(ir, dataset=calibration(model), sparsity=sparsity, mode="zero")
    if model == "smollm2":
        publish(sparse, dense, base / "simulated")
    publish(deploy(sparse, backend="cpu"), dense, base / "sparse")


def dense_smollm2(base: Path) -> Path:
    from scap_nncf.models import demo_model

    folder = base / "dense"
    if not (folder / "openvino_model.xml").is_file():
        model, tokenizer = demo_model()
        scap_nncf.export_openvino(model, folder, tokenizer=tokenizer)
    return folder


def dense_llama(work: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = work / "llama-1b-dense"
    if not (folder / "openvino_model.xml").is_file():
        config = LlamaConfig(
            hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
            num_key_value_heads=8, head_dim=64, vocab_size=32000, max_position_embeddings=2048,
        )  # fmt: skip
        torch.manual_seed(0)
        scap_nncf.export_openvino(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval(), folder)
        gc.collect()
    return folder


def publish(ir: Any, source: Path, folder: Path) -> None:
    if (folder / "openvino_model.xml").is_file():
        return
    scap_nncf.save_openvino(ir, folder)
    for file in source.iterdir():
        if file.is_file() and not (folder / file.name).exists() and not file.name.startswith("openvino_model"):
            shutil.copy(file, folder)


def calibration(model: str) -> Any:
    import torch

    if model == "llama-1b":
        generator = torch.Generator().manual_seed(0)
        return [{"input_ids": torch.randint(0, 32000, (1, 48), generator=generator)}]
    from scap_nncf.models import demo_model
    from scap_nncf.text import builtin_text, token_batches

    _, tokenizer = demo_model()
    return token_batches(tokenizer, builtin_text("calibration"), 256, None, 0)[:16]


def prompt_of(model: str, length: int) -> np.ndarray[Any, Any]:
    if model == "llama-1b":
        return np.random.default_rng(1).integers(0, 32000, length)
    from transformers import AutoTokenizer

    from scap_nncf.models import demo_model_folder
    from scap_nncf.text import builtin_text

    tokenizer = AutoTokenizer.from_pretrained(str(demo_model_folder()))
    return np.array(tokenizer("\n".join(builtin_text("held_out"))[:20000])["input_ids"][:length])


def run_decode(model: str, weights: str, work: Path, results: Path, rounds: int) -> None:
    base, name = work / name_of(model, weights), name_of(model, weights)
    result = bench_openvino.decode(
        {way: base / way for way in WAYS}, weights, name, prompt_of(model, 160), tokens=32, rounds=rounds,
        prefill=(128, 512), command=f"python benchmarks/openvino_cpu.py decode {model} --weights {weights}",
    )  # fmt: skip
    result.save(results, f"decode-{name}")
    print(result)


def run_load(model: str, weights: str, work: Path, results: Path) -> None:
    """Each in a process of its own, in turn, three times; the median of the loads and the memory of the last."""
    name, rows = name_of(model, weights), []
    for way in WAYS * 3:
        code = (
            "import json, sys; from dataclasses import asdict; from scap_nncf import bench_openvino as b; "
            f"print(json.dumps(asdict(b.loads({str(work / name / way)!r}, {weights!r}, {name!r}, {way!r}))))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    results.mkdir(parents=True, exist_ok=True)
    (results / f"load-{name}.json").write_text(json.dumps({"about": bench_openvino.about(), "loads": rows}, indent=1))


def run_perplexity(work: Path, results: Path, tokens: int) -> None:
    """Deployed beside simulated and stock, in float32 and in the plugin's default precision."""
    import openvino as ov

    from scap_nncf.deploy_openvino import teach

    core = ov.Core()
    teach(core)
    ids, length = prompt_of("smollm2", tokens), 128
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "KV_CACHE_PRECISION": "f32"}
    found = {}
    for setting, config in (("f32", exact), ("default", {})):
        for way in ("stock", "simulated", "sparse"):
            model = core.read_model(work / "smollm2" / way / "openvino_model.xml")
            request = core.compile_model(model, "CPU", config).create_infer_request()
            decoder = bench_openvino._Decoder(request, model)
            losses = []
            for start in range(0, len(ids) - length + 1, length):
                piece = ids[start : start + length][None]
                decoder.start(piece)
                logits = np.array(request.get_output_tensor(0).data, dtype=np.float64)[0, :-1]
                logits -= logits.max(-1, keepdims=True)
                chosen = logits[np.arange(length - 1), piece[0, 1:]]
                losses.append(np.log(np.exp(logits).sum(-1)) - chosen)
            found[f"{way} {setting}"] = float(np.exp(np.mean(np.concatenate(losses))))
            print(way, setting, found[f"{way} {setting}"], flush=True)
    results.mkdir(parents=True, exist_ok=True)
    about = {**bench_openvino.about(), "tokens": len(ids) // length * length, "context": length}
    (results / "perplexity-smollm2.json").write_text(json.dumps({"about": about, "perplexity": found}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["make", "decode", "load", "perplexity"])
    parser.add_argument("model", choices=list(SPARSITY))
    parser.add_argument("work", type=Path)
    parser.add_argument("results", type=Path, nargs="?", default=Path("benchmarks/results/openvino-cpu"))
    parser.add_argument("--weights", default="int8", choices=["bf16", "int8", "int4"])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    given = parser.parse_args()
    if given.step == "make":
        make(given.model, given.weights, given.work)
    elif given.step == "decode":
        run_decode(given.model, given.weights, given.work, given.results, given.rounds)
    elif given.step == "load":
        run_load(given.model, given.weights, given.work, given.results)
    else:
        run_perplexity(given.work, given.results, given.tokens)


if __name__ == "__main__":
    main()
