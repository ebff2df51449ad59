# SPDX-License-Identifier: Apache-2.0
"""Tiny Llamas whose weights other toolkits quantised; each function skips the test where its toolkit is missing."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_doubles import AwqLinear, GptqLinear
from tiny_models import VOCAB
from torch import nn


def dense() -> Any:
    """Widths that every format takes: groups of 32 and 64, output channels in 32s."""
    import transformers as tf

    config = tf.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        intermediate_size=128,
        max_position_embeddings=256,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = tf.LlamaForCausalLM(config).eval()
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.data.normal_(0.0, parameter.shape[-1] ** -0.5)
    return model.requires_grad_(False)


def _replaced(make: Callable[[nn.Linear], nn.Module]) -> Any:
    model = dense()
    for name, module in list(model.model.layers.named_modules()):
        if type(module) is nn.Linear:
            parent, _, child = name.rpartition(".")
            setattr(model.model.layers.get_submodule(parent), child, make(module))
    return model.eval()


def _torchao(name: str, **options: Any) -> Any:
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    model = dense()
    quantization.quantize_(model, getattr(quantization, name)(**options))
    return model


def torchao_int8() -> Any:
    return _torchao("Int8WeightOnlyConfig")


def torchao_int4() -> Any:
    granularity = pytest.importorskip("torchao.quantization.granularity", reason="needs torchao")
    return _torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=granularity.PerGroup(32))


def torchao_int8_dynamic() -> Any:
    return _torchao("Int8DynamicActivationInt8WeightConfig")


def bitsandbytes_nf4() -> Any:
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")

    def make(linear: nn.Linear) -> nn.Module:
        layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        return layer.to("cpu")

    return _replaced(make)


def bitsandbytes_int8() -> Any:
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")

    def make(linear: nn.Linear) -> nn.Module:
        layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        return layer.to("cpu")

    return _replaced(make)


def compressed_tensors(run_compressed: bool = False) -> Any:
    """Through a checkpoint on disk, as its users have it."""
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    import transformers as tf
    from compressed_tensors import quantization as ct
    from compressed_tensors.compressors import ModelCompressor

    model = dense()
    weights = ct.QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=32)
    scheme = ct.QuantizationScheme(targets=["Linear"], weights=weights)
    config = ct.QuantizationConfig(
        config_groups={"all": scheme}, ignore=["lm_head"], format="pack-quantized", quantization_status="frozen"
    )
    ct.apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            groups = module.weight.data.unflatten(1, (-1, 32))
            module.weight_scale.data = (groups.abs().amax(-1) / 7.5).to(module.weight_scale.dtype)
            module.quantization_status = ct.QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format="pack-quantized")
    with tempfile.TemporaryDirectory() as folder:
        compressor.compress_model(model)
        model.save_pretrained(folder)
        compressor.update_config(folder)
        options = tf.CompressedTensorsConfig(run_compressed=run_compressed)
        return tf.AutoModelForCausalLM.from_pretrained(Path(folder), quantization_config=options).eval()


def hqq() -> Any:
    core = pytest.importorskip("hqq.core.quantize", reason="needs hqq")
    config = core.BaseQuantizeConfig(nbits=4, group_size=64)
    return _replaced(lambda linear: core.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu"))


def quanto() -> Any:
    optimum_quanto = pytest.importorskip("optimum.quanto", reason="needs optimum-quanto")
    model = dense()
    optimum_quanto.quantize(model, weights=optimum_quanto.qint8, exclude="lm_head")
    optimum_quanto.freeze(model)
    return model


def gptq() -> Any:
    return _replaced(GptqLinear)


def awq() -> Any:
    return _replaced(AwqLinear)


#: Toolkit → (model, how far the output may move when the mode is taken out and put back, relative). The last is not
#: rounding in float32 where a toolkit computes in bfloat16 or quantises the activation, whose values the mode shifts.
TOOLKITS: dict[str, tuple[Callable[[], Any], float]] = {
    "torchao_int8": (torchao_int8, 1e-5),
    "torchao_int4": (torchao_int4, 1e-5),
    "torchao_int8_dynamic": (torchao_int8_dynamic, 6e-2),
    "bitsandbytes_int8": (bitsandbytes_int8, 6e-2),
    "bitsandbytes_nf4": (bitsandbytes_nf4, 3e-2),
    "compressed_tensors": (compressed_tensors, 1e-5),
    "hqq": (hqq, 1e-5),
    "quanto": (quanto, 1e-5),
    "gptq": (gptq, 1e-5),
    "awq": (awq, 1e-5),
}
