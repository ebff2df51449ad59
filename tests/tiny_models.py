# SPDX-License-Identifier: Apache-2.0
"""
Tiny random models of several families, and batches for them.

A module of its own: `from conftest import ...` would take whichever of the conftest.py files pytest read last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Sizes are no powers of two on purpose: kernels and reshapes that only work on round shapes show here.
VOCAB, HIDDEN, HEADS, FFN, BLOCKS = 131, 48, 4, 88, 2


def _config(family: str) -> Any:
    import transformers as tf

    common = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    decoder = {
        **common,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_hidden_layers": BLOCKS,
        "intermediate_size": FFN,
        "max_position_embeddings": 256,
    }
    grouped = {**decoder, "num_key_value_heads": 2}
    builders: dict[str, Callable[[], Any]] = {
        # separate gate/up/down and q/k/v, grouped queries, no bias
        "llama": lambda: tf.LlamaConfig(**grouped),
        "mistral": lambda: tf.MistralConfig(**grouped, sliding_window=None),
        "qwen2": lambda: tf.Qwen2Config(**grouped),  # bias on q, k, v
        "gemma3": lambda: tf.Gemma3TextConfig(**grouped, head_dim=12, layer_types=["full_attention"] * BLOCKS),
        # Conv1D projections with transposed weights, biases everywhere, fused qkv
        "gpt2": lambda: tf.GPT2Config(
            **common, n_embd=HIDDEN, n_head=HEADS, n_layer=BLOCKS, n_inner=FFN, n_positions=256
        ),
        # fc1/fc2, separate q/k/v, ReLU
        "opt": lambda: tf.OPTConfig(
            **common,
            hidden_size=HIDDEN,
            num_attention_heads=HEADS,
            num_hidden_layers=BLOCKS,
            ffn_dim=FFN,
            max_position_embeddings=256,
            word_embed_proj_dim=HIDDEN,
        ),
        # fused query_key_value, GELU, parallel residual: attention and feed-forward read one tensor
        "falcon": lambda: tf.FalconConfig(
            **common,
            hidden_size=HIDDEN,
            num_attention_heads=HEADS,
            num_hidden_layers=BLOCKS,
            ffn_hidden_size=FFN,
            parallel_attn=True,
            new_decoder_architecture=False,
            multi_query=True,
        ),
        "gpt_neox": lambda: tf.GPTNeoXConfig(**decoder),
        "phi": lambda: tf.PhiConfig(**decoder),  # parallel attention and feed-forward, biases
        "phi3": lambda: tf.Phi3Config(**grouped),  # fused qkv and gate_up
        "mpt": lambda: tf.MptConfig(
            vocab_size=VOCAB, d_model=HIDDEN, n_heads=HEADS, n_layers=BLOCKS, expansion_ratio=2, max_seq_len=256
        ),
        "qwen3": lambda: tf.Qwen3Config(**grouped, head_dim=12),
        "gemma2": lambda: tf.Gemma2Config(**grouped, head_dim=12, layer_types=["full_attention"] * BLOCKS),
        "olmo": lambda: tf.OlmoConfig(**grouped),
        "starcoder2": lambda: tf.Starcoder2Config(**grouped),  # biases, GELU without a gate
        "bloom": lambda: tf.BloomConfig(
            vocab_size=VOCAB, hidden_size=HIDDEN, n_head=HEADS, n_layer=BLOCKS, bos_token_id=1, eos_token_id=2
        ),
        # state space: in_proj and out_proj
        "mamba2": lambda: tf.Mamba2Config(
            **common, hidden_size=HIDDEN, num_hidden_layers=BLOCKS, num_heads=8, head_dim=12, state_size=8, n_groups=2
        ),
        # state space and attention side by side
        "falcon_h1": lambda: tf.FalconH1Config(
            **grouped, head_dim=12, mamba_d_ssm=48, mamba_n_heads=4, mamba_d_head=12, mamba_d_state=8, mamba_n_groups=1
        ),
        # fused 3-D expert parameters
        "mixtral": lambda: tf.MixtralConfig(**grouped, num_local_experts=4, num_experts_per_tok=2),
        "qwen2_moe": lambda: tf.Qwen2MoeConfig(
            **grouped,
            num_experts=4,
            num_experts_per_tok=3,
            moe_intermediate_size=40,
            shared_expert_intermediate_size=56,
        ),
        "qwen3_moe": lambda: tf.Qwen3MoeConfig(
            **grouped, head_dim=12, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40
        ),
        "olmoe": lambda: tf.OlmoeConfig(**grouped, num_experts=4, num_experts_per_tok=2),
        # latent attention, a dense first block, a shared expert
        "deepseek_v3": lambda: tf.DeepseekV3Config(
            **{**grouped, "num_key_value_heads": HEADS},
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=40,
            first_k_dense_replace=1,
            q_lora_rank=24,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=12,
            n_group=2,
            topk_group=2,
            n_shared_experts=1,
        ),
        # transposed expert weights with biases, gate and up interleaved
        "gpt_oss": lambda: tf.GptOssConfig(
            **grouped, head_dim=12, num_local_experts=4, num_experts_per_tok=2, sliding_window=16
        ),
    }
    if family not in builders:
        raise KeyError(f"no tiny model of family {family!r}; there are {sorted(builders)}")
    return builders[family]()


def build_tiny_model(family: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
    """A random causal LM in eval mode: 2 blocks, hidden 48, feed-forward 88, vocabulary 131."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(_config(family)).eval()
        # the default initialisation (std 0.02, zero biases) gives activations so small that nothing is at stake
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
                elif name.endswith("bias"):
                    parameter.normal_(0.0, 0.1)
    model.requires_grad_(False)
    return model.to(dtype)


def make_batches(count: int = 4, batch: int = 2, length: int = 19, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """`count` dicts of `input_ids` and `attention_mask`, each int64 [batch, length]; ids avoid the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "input_ids": torch.randint(3, VOCAB, (batch, length), generator=generator),
            "attention_mask": torch.ones(batch, length, dtype=torch.int64),
        }
        for _ in range(count)
    ]
