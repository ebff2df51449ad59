# SPDX-License-Identifier: Apache-2.0
"""
Reading JSON and YAML that may come from anybody: a plan, a recipe, a description of a checkpoint.

Nothing is executed, sizes are checked before anything is read, and whatever is wrong with a document is a
``nncf.ValidationError`` that names it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nncf

#: Values in a YAML document once its aliases are written out: a few lines of aliases to aliases make billions.
MAX_YAML_VALUES = 100_000


def read_text(file: str | os.PathLike[str], limit: int, what: str) -> str:
    """
    The UTF-8 text of a file of bounded size.

    :param limit: most bytes that such a file may have.
    :param what: for messages, such as ``a plan``.
    :raises nncf.ValidationError: too large, unreadable, or not UTF-8.
    """
    path = Path(file)
    try:
        with path.open("rb") as stream:  # not stat(): a file may grow, or be no regular one
            content = stream.read(limit + 1)
        if len(content) > limit:
            msg = f"{path} has more than {limit} bytes, which {what} never has."
            raise nncf.ValidationError(msg)
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        msg = f"{path} is not UTF-8 text: {error}."
        raise nncf.ValidationError(msg) from error
    except OSError as error:
        msg = f"{path} cannot be read: {error.strerror or error}."
        raise nncf.ValidationError(msg) from error


def parse_json(text: str, source: str) -> Any:
    """
    JSON as it is specified: no NaN or Infinity, and no key twice in an object.

    :param source: how to name the document in messages.
    :raises nncf.ValidationError: the text is no such JSON.
    """
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # ValueError: also numbers of thousands of digits
        msg = f"{source} is not valid JSON ({error}); the file may be truncated or damaged."
        raise nncf.ValidationError(msg) from error


def _no_constant(name: str) -> Any:
    msg = f"{name} is no JSON number"
    raise ValueError(msg)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        msg = f"the key {next(key for key in keys if keys.count(key) > 1)!r} is repeated"
        raise ValueError(msg)
    return made


def parse_yaml(text: str, source: str) -> Any:
    """
    YAML of plain values (PyYAML's safe loader), without repeated keys and without aliases that unfold beyond measure.

    :param source: how to name the document in messages.
    :raises nncf.ValidationError: the text is no such YAML.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """PyYAML would silently take the last of repeated keys."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                name = self.construct_object(key, deep=True)
                if isinstance(name, (str, int, float, bool)):
                    if name in seen:
                        raise yaml.constructor.ConstructorError(
                            None, None, f"the key {name!r} is repeated", key.start_mark
                        )
                    seen.add(name)
            return super().construct_mapping(node, deep)

    try:
        data = yaml.load(text, Loader)
        _check_size(data)
        return data
    # PyYAML lets the errors of its constructors through: int("0x"), a date without a month, !!bool x
    except (
        yaml.YAMLError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        OverflowError,
        RecursionError,
    ) as error:
        msg = f"{source} is not valid YAML: {error}"
        raise nncf.ValidationError(msg) from error


def _check_size(data: Any) -> None:
    left = MAX_YAML_VALUES
    waiting = [data]
    while waiting:
        value = waiting.pop()
        left -= 1
        if left < 0:
            msg = f"it unfolds to more than {MAX_YAML_VALUES} values"
            raise ValueError(msg)
        if isinstance(value, int) and value.bit_length() > 1024:  # written in hexadecimal it may be of any length
            msg = "a number has more than 1024 bits"
            raise ValueError(msg)
        if isinstance(value, Mapping):
            waiting.extend(value.keys())
            waiting.extend(value.values())
        elif isinstance(value, (list, tuple, set)):
            waiting.extend(value)


def check_file_entry(value: Any, expected: str) -> dict[str, str]:
    """
    An entry ``{"file": ..., "sha256": ...}`` about the file `expected` in the same folder. The name is compared, never
    followed: no document can point outside of its folder.

    :raises ValueError: another file, or no checksum.
    """
    if not isinstance(value, Mapping) or set(value) != {"file", "sha256"}:
        msg = f"expected an object with 'file' and 'sha256', got {str(value)[:80]}"
        raise ValueError(msg)
    if value["file"] != expected:
        msg = f"the file must be {expected!r} in the same folder, got {str(value['file'])[:80]!r}"
        raise ValueError(msg)
    digest = value["sha256"]
    if not isinstance(digest, str) or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        msg = f"sha256 must be 64 hexadecimal digits, got {str(digest)[:80]!r}"
        raise ValueError(msg)
    return {"file": expected, "sha256": digest}
