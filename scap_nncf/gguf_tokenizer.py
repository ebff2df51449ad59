# SPDX-License-Identifier: Apache-2.0
"""
The tokenizer of a GGUF file, built from the file's own metadata.

transformers 5.5 builds one too, but a wrong one in three ways: for the Llama architecture it puts a begin-of-sequence
token before every text whatever the file says; saved and loaded again, that tokenizer becomes another one (it inserts
end-of-text between words, perplexity of SmolLM2: 58,000 instead of 28); and for Gemma it leaves the merges out, so
that text is split into characters. What is built here follows the metadata and survives saving.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nncf
from nncf.common.logging import nncf_logger

from scap_nncf.extras import require

# Token types of the format (gguf.TokenType).
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4

# How text is cut before byte-pair encoding, by `tokenizer.ggml.pre`; None is GPT-2's own pattern.
_DIGIT = "digits"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PRE_TOKENIZERS: dict[str, str | None] = {
    "default": None,
    "gpt-2": None,
    "smollm": _DIGIT,
    "llama-bpe": _CONTRACTIONS + r"\p{N}{1,3}" + _REST,
    "qwen2": _CONTRACTIONS + r"\p{N}" + _REST,
}
# Files of these kinds put the begin-of-sequence token first where `add_bos_token` is not given.
_BOS_BY_DEFAULT = ("llama-bpe",)


def tokenizer_from_gguf(path: str | Path) -> Any:
    """
    Builds the tokenizer that a GGUF file describes.

    :param path: the file; `tokenizer.ggml.model` must be `gpt2` (byte-level BPE) or `llama` (SentencePiece BPE).
    :return: a `transformers.PreTrainedTokenizerFast` with the file's special tokens and chat template. It adds a
        begin- or end-of-sequence token only where the file says so, and `save_pretrained` / `AutoTokenizer` keep it.
    :raises nncf.UnsupportedModelError: if the file holds no tokenizer, or one of another kind.
    """
    gguf = require("gguf", "transformers", "reading a GGUF file")
    transformers = require("transformers", "transformers", "building a tokenizer")
    fields = gguf.GGUFReader(str(path)).fields

    def field(key: str, default: Any = None) -> Any:
        return fields[key].contents() if key in fields else default

    def ggml(key: str, default: Any = None) -> Any:
        return field(f"tokenizer.ggml.{key}", default)

    kind, tokens = ggml("model"), ggml("tokens")
    if tokens is None or kind not in ("gpt2", "llama"):
        msg = f"{path}: the tokenizer is of kind {kind!r}; expected 'gpt2' or 'llama' with a list of tokens"
        raise nncf.UnsupportedModelError(msg)
    types = ggml("token_type", [_NORMAL] * len(tokens))
    vocab: dict[str, int] = {}
    for i, token in enumerate(tokens):
        vocab.setdefault(token, i)  # the first wins where a token is listed twice
    pre = ggml("pre", "default")
    if kind == "gpt2":
        backend = _byte_level(vocab, ggml("merges", []), pre)
        add_bos = ggml("add_bos_token", pre in _BOS_BY_DEFAULT)
    else:
        unknown = ggml("unknown_token_id")
        backend = _sentence_piece(
            vocab,
            _merges_by_score(tokens, types, ggml("scores"), vocab),
            unknown_token=None if unknown is None else tokens[unknown],
            add_space_prefix=ggml("add_space_prefix", True),
        )
        add_bos = ggml("add_bos_token", True)
    _add_tokens(backend, tokens, types)
    ids = {name: ggml(f"{key}_token_id") for name, key in _SPECIAL.items()}
    special = {name: tokens[i] for name, i in ids.items() if i is not None and i < len(tokens)}
    _add_bos_eos(
        backend,
        special.get("bos_token") if add_bos else None,
        special.get("eos_token") if ggml("add_eos_token", False) else None,
        byte_level=kind == "gpt2",
    )
    arguments: dict[str, Any] = dict(special)
    architecture = field("general.architecture", "")
    if (context := field(f"{architecture}.context_length")) is not None:
        arguments["model_max_length"] = int(context)
    if (template := field("tokenizer.chat_template")) is not None:
        arguments["chat_template"] = template
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **arguments)


_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def _byte_level(vocab: dict[str, int], merges: list[str], pre: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(merge.split(" ", 1)) for merge in merges]))
    if pre not in _PRE_TOKENIZERS:
        nncf_logger.warning(
            f"the GGUF file's pre-tokenizer {pre!r} is not known here; GPT-2's is used, some words may be split "
            f"in another way than the model was trained with (known: {sorted(_PRE_TOKENIZERS)})"
        )
    pattern = _PRE_TOKENIZERS.get(pre)
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif pattern == _DIGIT:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(
    vocab: dict[str, int], merges: list[tuple[str, str]], unknown_token: str | None, add_space_prefix: bool
) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    space = "\u2581"
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unknown_token, fuse_unk=True, byte_fallback=True)
    )
    replace = normalizers.Replace(" ", space)
    steps = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_space_prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(space), replace])
        steps.append(decoders.Strip(content=" ", left=1))
    else:
        tokenizer.normalizer = replace
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges_by_score(
    tokens: list[str], types: list[int], scores: list[float] | None, vocab: dict[str, int]
) -> list[tuple[str, str]]:
    """SentencePiece stores no merges: any two tokens that make a third may merge, the highest score first."""
    if scores is None:
        msg = "the GGUF file's SentencePiece tokenizer has no scores; the order of its merges cannot be known"
        raise nncf.UnsupportedModelError(msg)
    merges: list[tuple[float, int, int, tuple[str, str]]] = []
    for i, token in enumerate(tokens):
        if types[i] != _NORMAL:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                merges.append((-scores[i], vocab[left], vocab[right], (left, right)))
    merges.sort()
    return [pair for *_, pair in merges]


def _add_tokens(backend: Any, tokens: list[str], types: list[int]) -> None:
    from tokenizers import AddedToken

    def of(kind: int, special: bool) -> list[Any]:
        return [AddedToken(t, special=special, normalized=False) for t, k in zip(tokens, types) if k == kind]

    backend.add_special_tokens(of(_CONTROL, special=True))
    backend.add_tokens(of(_USER_DEFINED, special=False))


def _add_bos_eos(backend: Any, bos: str | None, eos: str | None, byte_level: bool) -> None:
    from tokenizers import processors

    if bos is None and eos is None:
        if byte_level:
            backend.post_processor = processors.ByteLevel(trim_offsets=False)
        return
    single = [token for token in (bos, "$A", eos) if token]
    pair = single + [token for token in (bos, "$B", eos) if token]
    named = [(token, backend.token_to_id(token)) for token in dict.fromkeys(t for t in (bos, eos) if t)]
    template = processors.TemplateProcessing(
        single=single, pair=[f"{t}:1" if i >= len(single) else t for i, t in enumerate(pair)], special_tokens=named
    )
    backend.post_processor = template
