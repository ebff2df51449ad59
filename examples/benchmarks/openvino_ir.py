# SPDX-License-Identifier: Apache-2.0
"""
PyTorch against its OpenVINO IR on real weights, what survives saving, and what the export costs beside Optimum's own.

    python examples/benchmarks/openvino_ir.py PART --output results.json

`parity`: logits and loss of the dense model (that of any τ < 0) and of the sparse one, greedy text, share of flipped
next tokens and of flipped pruning decisions, at the precision of PyTorch and at OpenVINO's default. A hard threshold
turns a rounding into a flip, and a flip disturbs all later blocks; `control` shows how far that goes in PyTorch alone,
when its embeddings are changed by one part in a million.

`reload`: largest difference of the logits between a 4-bit sparse model and what is read back from disk, for every form
that it is saved in; the types of the stored weights, and what the CPU plugin runs with them.

`routes`: a plan calibrated on the IR that `optimum-cli export openvino --weight-format int4` wrote, beside that of the
route through Python, by layer.

`export`: wall clock, processor time and peak memory, each way in a process of its own.

Results are added to the JSON file under the name of the part.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import torch

import scap_nncf
from scap_nncf.algorithms.plan import block_index
from scap_nncf.models import load_model
from scap_nncf.text import builtin_text, token_batches

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "KV_CACHE_PRECISION": "f32"}
PROMPT = "The history of the city begins with"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["parity", "reload", "routes", "export"])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--sparsity", type=float, default=0.4)
    parser.add_argument("--samples", type=int, default=4, help="samples of 256 tokens, to calibrate and to compare")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", choices=["plain", "dense", "sparse"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(export_once(args)))
        return
    parts = {"parity": parity, "reload": reload, "routes": routes, "export": export_cost}
    result = parts[args.part](args)
    words = [Path(word).name for word in sys.argv[1:]]  # without the folders of this machine
    result["command"] = " ".join(["python", "examples/benchmarks/openvino_ir.py", *words])
    print(json.dumps(result, indent=1))
    if args.output:
        known = json.loads(args.output.read_text()) if args.output.is_file() else {}
        known[args.part] = result
        args.output.write_text(json.dumps(known, indent=1) + "\n")


def parity(args: argparse.Namespace) -> dict[str, Any]:
    from optimum.intel import OVModelForCausalLM

    model, tokenizer = load_model(args.model)
    held_out = token_batches(tokenizer, builtin_text("held_out"), length=256, count=args.samples)
    batches = token_batches(tokenizer, builtin_text("calibration"), length=256, count=args.samples)
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    dense = [logits(model, batch) for batch in held_out]
    dense_text = greedy(model, prompt)
    nncf.compress(model, algorithm="scap", dataset=batches, sparsity=args.sparsity)
    sparse = [logits(model, batch) for batch in held_out]
    sparse_text = greedy(model, prompt)
    masks = torch_masks(model, held_out[0])
    result: dict[str, Any] = {"model": args.model, "sparsity": args.sparsity, "tokens": 256 * args.samples}
    result["torch"] = {"dense_loss": loss(dense, held_out), "sparse_loss": loss(sparse, held_out)}
    with noisy_embeddings(model):
        noisy = torch_masks(model, held_out[0])
        result["control"] = {
            "sparse": compare(model, held_out, sparse),
            "flipped_pruning_decisions": shares({name: noisy[name] != masks[name] for name in masks}),
        }
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(scap_nncf.export_openvino(model, Path(scratch) / "ir"))
        for name, config in (("f32", EXACT), ("default", {})):
            ir = OVModelForCausalLM.from_pretrained(folder, ov_config=config)
            found: dict[str, Any] = {"sparse": compare(ir, held_out, sparse)}
            found["sparse_text_equal"] = greedy(ir, prompt) == sparse_text
            if name == "f32":
                found["flipped_pruning_decisions"] = flipped(ir.model, held_out[0], masks)
                found["realised_sparsity"] = scap_nncf.measure_sparsity(ir, held_out).realised_sparsity
            scap_nncf.get_controller(ir).disable()
            found["dense"] = compare(ir, held_out, dense)
            found["dense_text_equal"] = greedy(ir, prompt) == dense_text
            result[name] = found
    result["effect_of_pruning"] = float(np.mean([(a - b).abs().mean() for a, b in zip(sparse, dense)]))
    result["realised_sparsity_torch"] = scap_nncf.measure_sparsity(model, held_out).realised_sparsity
    return result


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits.float()


def greedy(model: Any, ids: torch.Tensor) -> list[int]:
    options = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()


def loss(found: list[torch.Tensor], batches: list[Any]) -> float:
    """Mean cross-entropy of the next token."""
    pairs = [(logit[0, :-1], batch["input_ids"][0, 1:]) for logit, batch in zip(found, batches)]
    return float(np.mean([float(torch.nn.functional.cross_entropy(logit, target)) for logit, target in pairs]))


@contextmanager
def noisy_embeddings(model: Any) -> Iterator[None]:
    generator = torch.Generator().manual_seed(0)

    def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * (1 + 1e-6 * torch.randn(output.shape, generator=generator))

    handle = model.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def compare(model: Any, batches: list[Any], expected: list[torch.Tensor]) -> dict[str, float]:
    differences, flips, count, everything = [], 0, 0, []
    for batch, reference in zip(batches, expected):
        found = logits(model, batch)
        everything.append(found)
        differences.append((found - reference).abs())
        flips += int((found.argmax(-1) != reference.argmax(-1)).sum())
        count += reference.shape[1]
    return {
        "max_difference": max(float(d.max()) for d in differences),
        "mean_difference": float(np.mean([float(d.mean()) for d in differences])),
        "flipped_next_tokens": flips / count,
        "loss": loss(everything, batches),
    }


def torch_masks(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    """Which values were dropped at the input of the first layer of each site."""
    masks: dict[str, np.ndarray[Any, Any]] = {}
    handles = []
    for site in scap_nncf.get_controller(model).plan.sites:

        def hook(_module: Any, inputs: tuple[torch.Tensor, ...], name: str = site.name) -> None:
            masks[name] = (inputs[0] == 0).numpy()

        # registered after the pruner's hook, so it sees what the layer sees
        handles.append(model.get_submodule(site.name).register_forward_pre_hook(hook))
    logits(model, batch)
    for handle in handles:
        handle.remove()
    return masks


def flipped(graph: Any, batch: dict[str, torch.Tensor], masks: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
    """Share of pruning decisions that differ between PyTorch and the IR."""
    import openvino

    from scap_nncf.algorithms.backends.openvino.feed import compile_exact, feed

    clone = graph.clone()
    pruners = {op.get_friendly_name(): op for op in clone.get_ordered_ops()}
    names = list(masks)
    results = [openvino.opset13.result(pruners[f"{name}/scap/pruned"].output(0)) for name in names]
    counted = openvino.Model(results, clone.get_sinks(), clone.get_parameters(), "masks")
    outputs = compile_exact(counted)(feed(graph, batch, "the batch"))
    return shares({name: (outputs[i] == 0).reshape(masks[name].shape) != masks[name] for i, name in enumerate(names)})


def shares(differ: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
    """Share of decisions that differ, in all sites and by block."""
    by_block: dict[int, list[float]] = {}
    for name, values in differ.items():
        by_block.setdefault(block_index(name) or 0, []).append(float(values.mean()))
    blocks = [float(np.mean(by_block[block])) for block in sorted(by_block)]
    return {"mean": float(np.mean(blocks)), "by_block": blocks}


def reload(args: argparse.Namespace) -> dict[str, Any]:
    from optimum.intel import OVModelForCausalLM

    from scap_nncf.optimum import save_pretrained

    model, tokenizer = load_model(args.model)
    batches = token_batches(tokenizer, builtin_text("calibration"), length=256, count=args.samples)
    steps = [scap_nncf.WeightCompression("int4_sym", group_size=64), scap_nncf.Scap(sparsity=args.sparsity)]
    model = nncf.compress(model, algorithm=steps, dataset=batches)
    sample = batches[0]
    found: dict[str, Any] = {"model": args.model, "sparsity": args.sparsity, "weights": "int4_sym, group size 64"}

    def difference(first: Any, second: Any) -> float:
        return float((logits(first, sample) - logits(second, sample)).abs().max())

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        scap_nncf.save_pretrained(model, folder / "torch", tokenizer)
        found["torch: save_pretrained, load_pretrained"] = difference(
            scap_nncf.load_pretrained(folder / "torch"), model
        )
        scap_nncf.export_openvino(model, folder / "ir")
        del model
        config = {name: str(value) for name, value in EXACT.items()}
        ir = OVModelForCausalLM.from_pretrained(str(folder / "ir"), ov_config=config)
        ways: dict[str, Any] = {
            "IR: scap_nncf.save_openvino": partial(scap_nncf.save_openvino, ir.model),
            "IR: scap_nncf.optimum.save_pretrained": partial(save_pretrained, ir),
            "IR: OVModelForCausalLM.save_pretrained": ir.save_pretrained,
        }
        for number, (name, save) in enumerate(ways.items()):
            target = folder / str(number)
            save(target)
            if not (target / "config.json").is_file():  # an IR alone
                (target / "config.json").write_bytes((folder / "ir" / "config.json").read_bytes())
            again = OVModelForCausalLM.from_pretrained(str(target), ov_config=config)
            found[name] = difference(again, ir)
            del again
        found["stored constants"] = dict(
            Counter(
                node.get_element_type().get_type_name()
                for node in ir.model.get_ordered_ops()
                if node.get_type_name() == "Constant" and node.get_element_type().get_type_name() in LOW_BITS
            )
        )
        for name, given in (("f32 hint", config), ("default", {})):
            found[f"products at run time, {name}"] = executed(ir.model, given)
    return found


LOW_BITS = ("i8", "u8", "i4", "u4", "nf4")


def executed(graph: Any, config: dict[str, str]) -> dict[str, int]:
    """Kind and weight type of the matrix products in the plugin's runtime graph → count."""
    import openvino

    counts: Counter[str] = Counter()
    for node in openvino.Core().compile_model(graph, "CPU", config).get_runtime_model().get_ordered_ops():
        kind = node.get_rt_info()["layerType"]
        kind = kind if isinstance(kind, str) else kind.astype(str)
        if kind in ("FullyConnected", "MatMul"):
            counts[f"{kind} {node.input_value(1).get_element_type().get_type_name()}"] += 1
    return dict(counts)


def routes(args: argparse.Namespace) -> dict[str, Any]:
    from optimum.intel import OVWeightQuantizationConfig

    from scap_nncf.models import demo_model_folder
    from scap_nncf.optimum import from_pretrained

    source = str(demo_model_folder()) if args.model == "demo" else args.model
    flags = ["--weight-format", "int4", "--group-size", "64", "--sym"]
    tokenizer = load_tokenizer(source)
    batches = token_batches(tokenizer, builtin_text("calibration"), length=256, count=args.samples)
    with tempfile.TemporaryDirectory() as scratch:
        target = str(Path(scratch) / "ir")
        command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", source]
        command += ["--task", "text-generation-with-past", *flags, target]
        subprocess.run(command, check=True, capture_output=True)
        step = scap_nncf.Scap(sparsity=args.sparsity)
        as_it_stands = thresholds(from_pretrained(target, algorithm=step, dataset=batches))
        config = OVWeightQuantizationConfig(bits=4, group_size=64, sym=True)
        in_python = thresholds(from_pretrained(source, quantization_config=config, algorithm=step, dataset=batches))
    relative = [abs(as_it_stands[name] - value) / value for name, value in in_python.items()]
    return {
        "model": args.model,
        "sparsity": args.sparsity,
        "tokens": 256 * args.samples,
        "optimum-cli": "export openvino " + " ".join(flags),
        "same_layers": as_it_stands.keys() == in_python.keys(),
        "layers": len(in_python),
        "largest_relative_difference_of_thresholds": max(relative),
        "bucket_width": 1 / 128,
    }


def load_tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source)


def thresholds(model: Any) -> dict[str, float]:
    return {layer.name: layer.threshold for layer in scap_nncf.get_controller(model).plan.layers}


def export_cost(args: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"model": args.model}
    for way in ("plain", "dense", "sparse"):
        command = [sys.executable, __file__, "export", "--model", args.model, "--child", way]
        done = subprocess.run([*command, "--sparsity", str(args.sparsity)], check=True, capture_output=True, text=True)
        result[way] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def export_once(args: argparse.Namespace) -> dict[str, float]:
    """One export; memory is the growth of the resident set over the loaded model, at its peak."""
    import psutil
    from optimum.exporters.openvino.convert import export_from_model, export_tokenizer

    model, tokenizer = load_model(args.model)
    process = psutil.Process()
    calibration = 0.0
    if args.child == "sparse":
        batches = token_batches(tokenizer, builtin_text("calibration"), length=256, count=args.samples)
        start = time.process_time()
        nncf.compress(model, algorithm="scap", dataset=batches, sparsity=args.sparsity)
        calibration = time.process_time() - start
    base, peak, done = process.memory_info().rss, 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, process.memory_info().rss)

    threading.Thread(target=watch, daemon=True).start()
    wall, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "ir"
        if args.child == "plain":
            export_from_model(model, output=folder, task="text-generation-with-past", preprocessors=[tokenizer])
            export_tokenizer(tokenizer, folder, task="text-generation-with-past")
        else:
            scap_nncf.export_openvino(model, folder, tokenizer=tokenizer)
        done.set()
        return {
            "wall_seconds": time.perf_counter() - wall,
            "processor_seconds": time.process_time() - cpu,
            "peak_growth_mib": (peak - base) / 2**20,
            "calibration_processor_seconds": calibration,
            "folder_mib": sum(path.stat().st_size for path in folder.iterdir()) / 2**20,
        }


if __name__ == "__main__":
    main()
