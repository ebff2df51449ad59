# SPDX-License-Identifier: Apache-2.0
"""
Model families of every kind at toy size: how to build one, what to call it with, and which sites it has.

Causal language models are in ``tiny_models``; here are encoders, sequence-to-sequence, vision and audio models, and
what all have in common. ``benchmarks/families.py`` makes the table of docs/families.md from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tiny_models import BLOCKS, FFN, HEADS, HIDDEN, VOCAB, build_tiny_model, make_batches
from torch import nn

Samples = list[dict[str, torch.Tensor]]
# transformers' ViT runs k and v before q
KVQ = [("k", "v", "q"), ("o",)]
SEPARATE, FUSED = [("q", "k", "v"), ("o",)], [("qkv",), ("o",)]
GLU, MLP, FC = [("gate", "up"), ("down",)], [("up",), ("down",)], [("fc1",), ("fc2",)]


@dataclass(frozen=True)
class Family:
    """
    :param make: seed → model in eval mode, float32.
    :param samples: (count, batch, seed) → what the model is called with.
    :param roles: the sites' roles, all blocks in the order of execution.
    :param task: Optimum's name of the task where it exports the family to OpenVINO.
    """

    name: str
    kind: str
    make: Callable[[int], nn.Module]
    samples: Callable[[int, int, int], Samples]
    roles: list[tuple[str, ...]]
    task: str | None = None


def _randomised(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """The default initialisation (std 0.02, zero biases) gives activations so small that nothing is at stake."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() >= 2 and parameter.shape[-1] > 1:
                    parameter.normal_(0.0, parameter.shape[1:].numel() ** -0.5)
                elif name.endswith("gamma"):  # scale of a residual branch: starts next to nothing
                    parameter.fill_(0.5)
                elif name.endswith("bias") and "norm" not in name:
                    parameter.normal_(0.0, 0.1)
    return model.requires_grad_(False)


def _text(count: int, batch: int, seed: int) -> Samples:
    return make_batches(count, batch, 19, seed)


def _pixels(size: int = 32, name: str = "pixel_values") -> Callable[[int, int, int], Samples]:
    def samples(count: int, batch: int, seed: int) -> Samples:
        generator = torch.Generator().manual_seed(seed)
        return [{name: torch.randn(batch, 3, size, size, generator=generator)} for _ in range(count)]

    return samples


def _speech(count: int, batch: int, seed: int) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "input_features": torch.randn(batch, 8, 60, generator=generator),
            "decoder_input_ids": torch.randint(3, VOCAB, (batch, 11), generator=generator),
        }
        for _ in range(count)
    ]


def _pairs(count: int, batch: int, seed: int) -> Samples:
    generator = torch.Generator().manual_seed(seed + 1)
    return [
        {**sample, "decoder_input_ids": torch.randint(3, VOCAB, (batch, 9), generator=generator)}
        for sample in make_batches(count, batch, 19, seed)
    ]


def _image_and_text(count: int, batch: int, seed: int) -> Samples:
    """A picture's 4 patches stand for the first tokens of the text."""
    images = _pixels()(count, batch, seed)
    return [
        {
            "input_ids": torch.cat([torch.full((batch, 4), VOCAB - 1), text["input_ids"] % (VOCAB - 4) + 3], 1),
            **image,
        }
        for text, image in zip(make_batches(count, batch, 11, seed), images)
    ]


def _both_towers(count: int, batch: int, seed: int) -> Samples:
    images = _pixels()(count, batch, seed)
    return [
        {"input_ids": text["input_ids"], **image} for text, image in zip(make_batches(count, batch, 11, seed), images)
    ]


def _transformers(name: str, config: Callable[[Any], Any]) -> Callable[[int], nn.Module]:
    def make(seed: int) -> nn.Module:
        import transformers

        return _randomised(lambda: getattr(transformers, name)(config(transformers)), seed)

    return make


def _causal(name: str, kind: str, block: list[tuple[str, ...]], export: bool = True) -> Family:
    return Family(
        name,
        kind,
        lambda seed: build_tiny_model(name, seed=seed),
        _text,
        block * BLOCKS,
        "text-generation-with-past" if export else None,
    )


_encoder = {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_hidden_layers": BLOCKS,
    "intermediate_size": FFN,
}
_vision = {**_encoder, "image_size": 32, "patch_size": 16}
_text_encoder = {**_encoder, "vocab_size": VOCAB, "max_position_embeddings": 64}


def _experts(shared: bool = False) -> list[tuple[str, ...]]:
    experts = [("experts.gate_up",)] * 4 + [("experts.down",)] * 4
    return SEPARATE + (GLU if shared else []) + experts


def _timm(name: str, **options: Any) -> Callable[[int], nn.Module]:
    def make(seed: int) -> nn.Module:
        import timm

        small = {"embed_dim": HIDDEN, "depth": BLOCKS, "num_heads": HEADS, "img_size": 32, "num_classes": 10}
        return _randomised(lambda: timm.create_model(name, **small, **options), seed)

    return make


def _whisper(tf: Any) -> Any:
    return tf.WhisperConfig(
        vocab_size=VOCAB,
        num_mel_bins=8,
        d_model=HIDDEN,
        encoder_layers=BLOCKS,
        decoder_layers=BLOCKS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=FFN,
        decoder_ffn_dim=FFN,
        max_source_positions=30,
        max_target_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )


def _llava(tf: Any) -> Any:
    return tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**{**_vision, "num_hidden_layers": BLOCKS}),
        text_config=tf.LlamaConfig(**_text_encoder, num_key_value_heads=2, bos_token_id=1, eos_token_id=2),
        image_token_index=VOCAB - 1,
        image_token_id=VOCAB - 1,
    )


def _t5(tf: Any, **options: Any) -> Any:
    return tf.T5Config(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        d_kv=12,
        d_ff=FFN,
        num_layers=BLOCKS,
        num_heads=HEADS,
        decoder_start_token_id=0,
        **options,
    )


_LATENT = [("q", "k"), ("q",), ("v",), ("o",)]
# decoder blocks of encoder-decoder models: self attention, cross attention (k and v read the encoder), feed-forward
_CROSS = [("q",), ("k", "v"), ("o",)]

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _causal("llama", "GLU decoder", SEPARATE + GLU),
        _causal("mistral", "GLU decoder", SEPARATE + GLU),
        _causal("qwen2", "GLU decoder", SEPARATE + GLU),
        _causal("qwen3", "GLU decoder", SEPARATE + GLU),
        _causal("gemma2", "GLU decoder", SEPARATE + GLU),
        _causal("gemma3", "GLU decoder", SEPARATE + GLU),
        _causal("olmo", "GLU decoder", SEPARATE + GLU),
        _causal("phi3", "GLU decoder", [("qkv",), ("o",), ("gate_up",), ("down",)]),
        _causal("gpt2", "decoder", FUSED + MLP),
        _causal("opt", "decoder, ReLU", SEPARATE + FC),
        _causal("gpt_neox", "decoder", FUSED + MLP),
        _causal("falcon", "decoder", [("qkv", "up"), ("o",), ("down",)]),
        _causal("mpt", "decoder", FUSED + MLP),
        _causal("phi", "decoder", [("q", "k", "v", "fc1"), ("o",), ("fc2",)]),
        _causal("starcoder2", "decoder", SEPARATE + MLP),
        _causal("bloom", "decoder", FUSED + MLP),
        _causal("mixtral", "mixture of experts", _experts()),
        _causal("qwen2_moe", "mixture of experts", _experts(shared=True)),
        _causal("qwen3_moe", "mixture of experts", _experts()),
        _causal("olmoe", "mixture of experts", _experts()),
        _causal("gpt_oss", "mixture of experts", _experts()),
        Family(
            "deepseek_v3",
            "mixture of experts, latent attention",
            lambda seed: build_tiny_model("deepseek_v3", seed=seed),
            _text,
            # the first block is dense; the shared expert runs after the routed ones
            [*_LATENT, *GLU, *_LATENT, *_experts()[2:], *GLU],
        ),
        Family(
            "falcon_h1",
            "hybrid of state space and attention",
            lambda seed: build_tiny_model("falcon_h1", seed=seed),
            _text,
            [("in",), ("out",), *SEPARATE, ("up", "gate"), ("down",)] * BLOCKS,
        ),
        _causal("mamba2", "state space", [("in",), ("out",)]),
        Family(
            "bert",
            "encoder",
            _transformers("BertModel", lambda tf: tf.BertConfig(**_text_encoder)),
            _text,
            (SEPARATE + MLP) * BLOCKS,
            "feature-extraction",
        ),
        Family(
            "roberta",
            "encoder",
            _transformers("RobertaModel", lambda tf: tf.RobertaConfig(**_text_encoder)),
            _text,
            (SEPARATE + MLP) * BLOCKS,
            "feature-extraction",
        ),
        Family(
            "t5",
            "sequence to sequence, ReLU",
            _transformers("T5ForConditionalGeneration", _t5),
            _pairs,
            (SEPARATE + MLP) * BLOCKS + (SEPARATE + _CROSS + MLP) * BLOCKS,
        ),
        Family(
            "t5_v1_1",
            "sequence to sequence, GLU",
            _transformers("T5ForConditionalGeneration", lambda tf: _t5(tf, feed_forward_proj="gated-gelu")),
            _pairs,
            (SEPARATE + GLU) * BLOCKS + (SEPARATE + _CROSS + GLU) * BLOCKS,
        ),
        Family(
            "whisper",
            "speech, encoder and decoder",
            _transformers("WhisperForConditionalGeneration", _whisper),
            _speech,
            (SEPARATE + FC) * BLOCKS + (SEPARATE + _CROSS + FC) * BLOCKS,
        ),
        Family(
            "vit",
            "vision",
            _transformers("ViTForImageClassification", lambda tf: tf.ViTConfig(**_vision, num_labels=10)),
            _pixels(),
            (KVQ + MLP) * BLOCKS,
            "image-classification",
        ),
        Family(
            "deit",
            "vision",
            _transformers("DeiTForImageClassification", lambda tf: tf.DeiTConfig(**_vision, num_labels=10)),
            _pixels(),
            (KVQ + MLP) * BLOCKS,
            "image-classification",
        ),
        Family(
            "dinov2",
            "vision",
            _transformers("Dinov2Model", lambda tf: tf.Dinov2Config(**_vision, mlp_ratio=2)),
            _pixels(),
            (KVQ + FC) * BLOCKS,
        ),
        Family(
            "siglip_vision",
            "vision",
            _transformers("SiglipVisionModel", lambda tf: tf.SiglipVisionConfig(**_vision)),
            _pixels(),
            (SEPARATE + FC) * BLOCKS,
        ),
        Family(
            "siglip",
            "vision and text",
            _transformers(
                "SiglipModel",
                lambda tf: tf.SiglipConfig(text_config=dict(_text_encoder), vision_config=dict(_vision)),
            ),
            _both_towers,
            (SEPARATE + FC) * BLOCKS * 2,
        ),
        Family(
            "llava",
            "vision-language",
            _transformers("LlavaForConditionalGeneration", _llava),
            _image_and_text,
            (SEPARATE + FC) * BLOCKS + (SEPARATE + GLU) * BLOCKS,
        ),
        Family("timm_vit", "vision (timm)", _timm("vit_tiny_patch16_224"), _pixels(32, "x"), (FUSED + FC) * BLOCKS),
        Family("timm_deit", "vision (timm)", _timm("deit_tiny_patch16_224"), _pixels(32, "x"), (FUSED + FC) * BLOCKS),
        Family(
            "timm_deit3", "vision (timm)", _timm("deit3_small_patch16_224"), _pixels(32, "x"), (FUSED + FC) * BLOCKS
        ),
    )
}
