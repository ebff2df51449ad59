# SPDX-License-Identifier: Apache-2.0
"""Calibration data: whatever the user holds, as samples that the model can be called with."""

from __future__ import annotations

import hashlib
import heapq
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import nncf
import numpy as np

#: Tokens kept of each text, as in the paper's calibration (section 4 uses 256); longer texts are truncated.
DEFAULT_TEXT_LENGTH = 256


#: Columns of datasets that hold images or sound, and what a processor calls them.
_MEDIA = {"image": "images", "img": "images", "audio": "audio"}
#: Axes of one sample of a model input that is no text.
_DENSE_AXES = {"pixel_values": 3, "input_features": 2, "input_values": 1}


def _is_image(item: Any) -> bool:
    return any(f"{kind.__module__}.{kind.__name__}" == "PIL.Image.Image" for kind in type(item).__mro__)


def _with_batch_axis(value: Any, axes: int) -> Any:
    """Rows of datasets.Dataset are lists, and have no batch axis."""
    if isinstance(value, Sequence):
        import torch

        value = torch.as_tensor(value, dtype=torch.float32)
    return value[None] if getattr(value, "ndim", None) == axes else value


class Samples:
    """
    A calibration dataset as an iterable of samples that can be looked into without losing the first one.

    :param dataset: a ``nncf.Dataset``; an iterable of tensors, mappings or tuples; texts or PIL images with a
        `tokenizer`; or a ``datasets.Dataset`` with the column ``input_ids``, ``pixel_values``, ``input_features`` or
        ``input_values``, or ``text``, ``image`` or ``audio`` with a `tokenizer`.
    :param tokenizer: a transformers tokenizer for texts, an image processor or feature extractor for images or sound.
    :param subset_size: at most this many samples; None for all.
    :raises nncf.ValidationError: no dataset, or texts without a tokenizer.
    """

    def __init__(self, dataset: Any, tokenizer: Any = None, subset_size: int | None = None) -> None:
        if dataset is None:
            msg = "Calibration needs a dataset: pass dataset=nncf.Dataset(...), or plan= to reuse a calibration."
            raise nncf.ValidationError(msg)
        # a tensor is iterable as well, over its rows
        lone = isinstance(dataset, (str, bytes, Mapping)) or hasattr(dataset, "dtype")
        if lone or not (isinstance(dataset, nncf.Dataset) or hasattr(dataset, "__iter__")):
            msg = (
                f"dataset must be a nncf.Dataset or an iterable of samples, got {type(dataset).__name__}. "
                "Wrap a single sample or text into a list."
            )
            raise nncf.ValidationError(msg)
        self._tokenizer = tokenizer
        source = dataset.get_inference_data() if isinstance(dataset, nncf.Dataset) else dataset
        self._iterator = itertools.islice(iter(source), subset_size)
        if isinstance(dataset, nncf.Dataset):
            length = dataset.get_length()
        else:
            length = len(dataset) if hasattr(dataset, "__len__") else None
        self.total: int | None = length if subset_size is None or length is None else min(length, subset_size)

    def first(self) -> Any:
        """
        The first sample; it is still part of the iteration.

        :raises nncf.ValidationError: the dataset is empty.
        """
        try:
            item = next(self._iterator)
        except StopIteration:
            msg = "The calibration dataset is empty; give at least one sample."
            raise nncf.ValidationError(msg) from None
        self._iterator = itertools.chain([item], self._iterator)  # type: ignore[assignment]
        return self._prepare(item)

    def __iter__(self) -> Iterator[Any]:
        return map(self._prepare, self._iterator)

    def _prepare(self, item: Any) -> Any:
        if isinstance(item, str):
            return self._encode(item)
        if _is_image(item):
            return self._process("images", item)
        if isinstance(item, Mapping):
            kind = next((kind for kind in _MEDIA if kind in item), None)
            if kind is not None:  # a row of datasets.Dataset with images or sound
                return self._process(_MEDIA[kind], item[kind])
            dense = [key for key in _DENSE_AXES if key in item]
            if dense and "input_ids" not in item:
                return {**item, **{key: _with_batch_axis(item[key], _DENSE_AXES[key]) for key in dense}}
            ids = item.get("input_ids")
            if isinstance(ids, Sequence) or getattr(ids, "ndim", 2) == 1:  # a row of datasets.Dataset: no batch axis
                import torch

                keys = [key for key in ("input_ids", "attention_mask", "token_type_ids") if key in item]
                rows = {key: torch.as_tensor(item[key], dtype=torch.int64) for key in keys}
                return {key: row.unsqueeze(0) if row.dim() == 1 else row for key, row in rows.items()}
            if isinstance(item.get("text"), str):
                return self._encode(item["text"])
        return item

    def _process(self, argument: str, value: Any) -> dict[str, Any]:
        """What the image processor or feature extractor makes of an image or of sound."""
        if self._tokenizer is None:
            msg = f"The dataset holds {argument}; pass tokenizer= (an image processor or feature extractor) for them."
            raise nncf.ValidationError(msg)
        options = {}
        if argument == "audio" and isinstance(value, Mapping):  # datasets.Audio
            value, options = value["array"], {"sampling_rate": value["sampling_rate"]}
        call = inspect.signature(self._tokenizer.__call__).parameters
        name = argument if argument in call else next(iter(call))  # feature extractors say raw_speech
        return dict(self._tokenizer(**{name: value}, return_tensors="pt", **options))

    def _encode(self, text: str) -> dict[str, Any]:
        if self._tokenizer is None:
            msg = "The dataset holds texts; pass tokenizer= to turn them into model inputs."
            raise nncf.ValidationError(msg)
        encoded = self._tokenizer(text, return_tensors="pt", truncation=True, max_length=DEFAULT_TEXT_LENGTH)
        if encoded["input_ids"].shape[-1] == 0:
            msg = f"The tokenizer makes no tokens of the text {text[:40]!r}; leave empty texts out of the dataset."
            raise nncf.ValidationError(msg)
        return dict(encoded)


class Kept:
    """
    Passes samples on and keeps a few of them, chosen by their content: which ones does not depend on the order, and a
    stream of any length stays a stream.

    :param samples: an iterable of prepared samples.
    :param count: how many to keep; those with the smallest :func:`fingerprint`.
    """

    def __init__(self, samples: Any, count: int) -> None:
        self._samples = samples
        self._count = count
        self.total: int | None = getattr(samples, "total", None)
        self._heap: list[tuple[int, int, Any]] = []  # (−fingerprint, tie breaker, sample): the largest first

    def first(self) -> Any:
        """The first sample; it is still part of the iteration."""
        return self._samples.first()

    def __iter__(self) -> Iterator[Any]:
        for index, sample in enumerate(self._samples):
            entry = (-fingerprint(sample), index, sample)
            if len(self._heap) < self._count:
                heapq.heappush(self._heap, entry)
            elif entry[0] > self._heap[0][0]:
                heapq.heapreplace(self._heap, entry)
            yield sample

    def kept(self) -> list[Any]:
        """The kept samples, by fingerprint."""
        return [sample for _, _, sample in sorted(self._heap, key=lambda entry: -entry[0])]


def fingerprint(sample: Any) -> int:
    """
    A number in [0, 2^63) that depends on the content of a sample alone, not on how it is wrapped: its token ids where
    it is a mapping that has them, its first item where it is a tuple, else all of it.
    """
    digest = hashlib.blake2b(digest_size=8)
    if isinstance(sample, Mapping) and "input_ids" in sample:
        sample = sample["input_ids"]
    elif isinstance(sample, (tuple, list)) and sample:
        sample = sample[0]
    _feed(digest, sample)
    return int.from_bytes(digest.digest(), "little") >> 1


def _feed(digest: Any, value: Any) -> None:
    if hasattr(value, "detach"):  # a torch tensor; bfloat16 has no numpy type
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            _feed(digest, value[key])
    elif isinstance(value, (tuple, list)):
        for item in value:
            _feed(digest, item)
    elif isinstance(value, np.ndarray):
        if value.dtype.kind in "iu":
            value = value.astype(np.int64)
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    else:
        digest.update(repr(value).encode())
