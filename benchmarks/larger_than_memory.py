# SPDX-License-Identifier: Apache-2.0
"""
Calibration of a model whose weights exceed the memory that the process may use.

Writes a Llama-shaped model with random bfloat16 weights to disk, shard by shard, then calibrates it in a process of its
own whose private memory is limited (RLIMIT_DATA: the heap and private mappings; on top of what the libraries take),
once with the weights on disk and once, without a limit, in memory. The limit holds from the end of `from_pretrained`
on, which maps all shards for a moment without reading them. Records peak resident memory of the whole run, time and
whether the plans are the same.

    python benchmarks/larger_than_memory.py --limit-mib 700 --output benchmarks/results/larger-than-memory.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def write_model(folder: Path, blocks: int, hidden: int, ffn: int, vocabulary: int) -> int:
    """One shard a block; returns the bytes of all weights."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=blocks,
        num_attention_heads=hidden // 64, num_key_value_heads=max(hidden // 512, 1), max_position_embeddings=2048,
        dtype="bfloat16", tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def weight(rows: int, columns: int) -> Any:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).bfloat16()

    narrow = config.num_key_value_heads * 64
    index, total = {}, 0

    def shard(name: str, tensors: dict[str, Any]) -> None:
        nonlocal total
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    shard("model-embed.safetensors", {"model.embed_tokens.weight": weight(vocabulary, hidden)})
    for block in range(blocks):
        at = f"model.layers.{block}"
        tensors = {f"{at}.{name}.weight": torch.ones(hidden).bfloat16() for name in
                   ("input_layernorm", "post_attention_layernorm")}  # fmt: skip
        for name, rows, columns in (
            ("self_attn.q_proj", hidden, hidden), ("self_attn.k_proj", narrow, hidden),
            ("self_attn.v_proj", narrow, hidden), ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", ffn, hidden), ("mlp.up_proj", ffn, hidden), ("mlp.down_proj", hidden, ffn),
        ):  # fmt: skip
            tensors[f"{at}.{name}.weight"] = weight(rows, columns)
        shard(f"model-{block:03}.safetensors", tensors)
    head = {"lm_head.weight": weight(vocabulary, hidden), "model.norm.weight": torch.ones(hidden).bfloat16()}
    shard("model-head.safetensors", head)
    described = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(described))
    return total


def _status(key: str) -> int:
    """A figure of /proc/self/status, MiB."""
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith(key)).split()[1]) >> 10


def calibrate(folder: Path, options: Any) -> None:
    """In a process of its own: prints what it measured as JSON."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import scap_nncf
    from scap_nncf.offload import disk_places

    torch.set_num_threads(1)
    # what the first pass of any model takes for good: kernels, thread pools, lazily imported modules
    _warm_up()
    libraries, before = _status("VmRSS"), _status("VmData")
    start = time.perf_counter()
    places: dict[str, Any] = {}
    if options.child == "disk":
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            places = {"device_map": disk_places(AutoModelForCausalLM.from_config(config), "cpu")}
        places["offload_folder"] = str(folder / "offload")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **places).eval()
    loaded = time.perf_counter() - start
    if options.limit_mib:
        limit = (before + options.limit_mib) << 20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    generator = torch.Generator().manual_seed(1)
    data = [
        {"input_ids": torch.randint(3, model.config.vocab_size, (1, options.tokens), generator=generator)}
        for _ in range(options.samples)
    ]
    settings = {"sparsity": 0.5, "allocation": "uniform", "sequential": options.sequential, "mode": "zero"}
    statistics = scap_nncf.calibrate(model, dataset=data, **settings)
    plan = scap_nncf.make_plan(statistics, scap_nncf.Scap(**settings))
    print(
        json.dumps(
            {
                "weights": options.child,
                "limit_beside_libraries_mib": options.limit_mib or None,
                "libraries_rss_mib": libraries,
                "peak_rss_mib": _status("VmHWM"),
                "peak_above_libraries_mib": _status("VmHWM") - libraries,
                "load_seconds": round(loaded, 1),
                "seconds": round(time.perf_counter() - start, 1),
                "plan_sha256": hashlib.sha256(plan.to_json().encode()).hexdigest(),
                "statistics_sha256": hashlib.sha256(statistics.to_bytes()).hexdigest(),
            }
        )
    )


def _warm_up() -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    import scap_nncf

    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).bfloat16().eval()
    scap_nncf.calibrate(model, dataset=[{"input_ids": torch.ones(1, 8, dtype=torch.int64)}], allocation="uniform")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=5632)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--sequential", action="store_true")
    parser.add_argument("--limit-mib", type=int, default=700, help="private memory beside that of the libraries")
    parser.add_argument("--without-memory-run", action="store_true", help="only with the weights on disk")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=["disk", "memory"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        calibrate(options.folder, options)
        return
    with tempfile.TemporaryDirectory() as name:
        size = write_model(Path(name), options.blocks, options.hidden, options.ffn, options.vocabulary)
        runs = []
        for weights in ["disk"] if options.without_memory_run else ["disk", "memory"]:
            command = [sys.executable, __file__, "--folder", name, "--child", weights]
            command += ["--samples", str(options.samples), "--tokens", str(options.tokens)]
            command += ["--limit-mib", str(options.limit_mib if weights == "disk" else 0)]
            command += ["--sequential"] if options.sequential else []
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise SystemExit(done.stderr[-3000:])
            runs.append(json.loads(done.stdout.strip().splitlines()[-1]))
            forecast = next((line for line in done.stdout.splitlines() if "block by block:" in line), None)
            if forecast is not None:
                runs[-1]["said_before"] = forecast.partition("nncf:")[2]
            print(json.dumps(runs[-1]), flush=True)
    result = {
        "command": "python " + " ".join(["benchmarks/larger_than_memory.py", *sys.argv[1:]]),
        "shape": f"Llama, {options.blocks} blocks, hidden {options.hidden}, ffn {options.ffn}",
        "weights_mib": size >> 20,
        "samples": options.samples,
        "tokens_a_sample": options.tokens,
        "sequential": options.sequential,
        "runs": runs,
        "same_plan": len({run["plan_sha256"] for run in runs}) == 1 if len(runs) > 1 else None,
    }
    print("weights", result["weights_mib"], "MiB, same plan:", result["same_plan"])
    if options.output is not None:
        known = json.loads(options.output.read_text()) if options.output.is_file() else []
        known = [entry for entry in known if entry["command"] != result["command"]]
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps([*known, result], indent=1) + "\n")


if __name__ == "__main__":
    main()
