# SPDX-License-Identifier: Apache-2.0
"""
Text for calibration and evaluation, and its way into token batches.

The built-in text needs no network: it is the English prose of Python's own language reference, which ships with every
Python as `pydoc_data.topics` (0.4 MB). Its wording follows the Python version, so figures measured on it compare within
one Python version only. The two parts share no paragraph: what is measured on the held-out part was not calibrated on.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import nncf

if TYPE_CHECKING:
    import torch

Part = Literal["calibration", "held_out"]


@cache
def builtin_text(part: Part) -> tuple[str, ...]:
    """
    Documents of English prose that ship with Python.

    :param part: `"calibration"` or `"held_out"`; no paragraph is in both.
    :return: the documents of that part, the longest first.
    :raises nncf.ValidationError: if `part` is neither.
    """
    if part not in ("calibration", "held_out"):
        msg = f"part is {part!r}; expected 'calibration' or 'held_out'"
        raise nncf.ValidationError(msg)
    from pydoc_data.topics import topics

    # Topics repeat each other's chapters, in other indentation: a paragraph belongs to the first topic that holds it.
    # Underlines of headings, interpreter sessions and grammar productions are no prose.
    seen: set[str] = set()
    documents = []
    for text in sorted(topics.values(), key=lambda text: (-len(text), text)):
        paragraphs = []
        for paragraph in text.split("\n\n"):
            lines = (line for line in paragraph.splitlines() if not set(line.strip()) <= set("*=-~^+ "))
            words = " ".join(" ".join(lines).split())
            if words and words not in seen and not any(mark in words for mark in (">>>", "::=")):
                seen.add(words)
                paragraphs.append(words)
        if paragraphs:
            documents.append("\n\n".join(paragraphs))
    documents.sort(key=lambda text: (-len(text), text))
    # Two of three for calibration; by size in turn, so that both parts mix long and short subjects.
    return tuple(text for i, text in enumerate(documents) if (i % 3 == 1) == (part == "held_out"))


def read_texts(path: str | Path, field: str = "text") -> list[str]:
    """
    Reads texts from a file, gzip-compressed or not.

    :param path: `.txt` (the whole file is one text) or `.jsonl` (one JSON object or string a line); `.gz` may follow.
    :param field: the key that holds the text in a JSON object.
    :return: the texts that are not empty.
    :raises nncf.ValidationError: if the file does not exist, has another ending, a line is no JSON or lacks the field,
        or there is no text in it.
    """
    path = Path(path)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    kind = (suffixes[:-1] if packed else suffixes)[-1:]
    if kind not in ([".txt"], [".jsonl"]):
        msg = f"{path}: expected a .txt or .jsonl file (or one of these with .gz)"
        raise nncf.ValidationError(msg)
    try:
        with gzip.open(path, "rt", encoding="utf-8") if packed else path.open(encoding="utf-8") as file:
            content = file.read()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        msg = f"{path}: cannot be read as UTF-8 text: {error}"
        raise nncf.ValidationError(msg) from error
    texts = [content] if kind == [".txt"] else [_text_of(line, field, path, n) for n, line in _lines(content)]
    texts = [text for text in texts if text.strip()]
    if not texts:
        msg = f"{path}: there is no text in it"
        raise nncf.ValidationError(msg)
    return texts


def _lines(content: str) -> Iterable[tuple[int, str]]:
    return ((n, line) for n, line in enumerate(content.split("\n"), start=1) if line.strip())


def _text_of(line: str, field: str, path: Path, number: int) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        msg = f"{path}, line {number}: not JSON ({error.msg}); expected one JSON object a line"
        raise nncf.ValidationError(msg) from error
    if isinstance(record, str):
        return record
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        has = sorted(record) if isinstance(record, dict) else type(record).__name__
        msg = f"{path}, line {number}: expected an object with a text in {field!r}, found {has}"
        raise nncf.ValidationError(msg)
    return record[field]


def token_ids(tokenizer: Any, texts: Iterable[str]) -> torch.Tensor:
    """
    The tokens of all texts, joined by an empty line, without special tokens, as int64 [tokens].

    :raises nncf.ValidationError: if there is not a single token.
    """
    import torch

    # verbose=False: a text longer than the model's context is cut into windows later, no need for a warning
    ids = tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        msg = "the texts hold no token; expected at least one text that is not empty"
        raise nncf.ValidationError(msg)
    return torch.tensor(ids, dtype=torch.int64)


def token_batches(
    tokenizer: Any,
    texts: Sequence[str],
    length: int = 512,
    count: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[dict[str, torch.Tensor]]:
    """
    Cuts texts into windows of tokens, in random order, ready as a calibration dataset.

    :param tokenizer: a transformers tokenizer.
    :param texts: documents; they are joined before the cut (see `token_ids`).
    :param length: tokens a window. Texts with fewer tokens in all make one shorter window.
    :param count: how many windows to return; None for all.
    :param seed: of the order; equal arguments give equal batches.
    :return: dicts of `input_ids` and `attention_mask` (all ones), each int64 [1, length].
    :raises nncf.ValidationError: if `length` or `count` is not positive, or the texts give fewer windows than `count`.
    """
    import torch

    if length < 1 or (count is not None and count < 1):
        msg = f"length is {length} and count is {count}; expected at least 1 of each"
        raise nncf.ValidationError(msg)
    ids = token_ids(tokenizer, texts)
    starts = list(range(0, max(len(ids) - length, 0) + 1, length))
    if count is not None and count > len(starts):
        msg = (
            f"{count} samples of {length} tokens were asked for, but the text gives {len(starts)} "
            f"({len(ids)} tokens): give more text, or ask for fewer or shorter samples"
        )
        raise nncf.ValidationError(msg)
    random.Random(seed).shuffle(starts)
    windows = [ids[start : start + length].unsqueeze(0).to(device) for start in starts[:count]]
    return [{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in windows]
