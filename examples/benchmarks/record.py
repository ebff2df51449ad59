# SPDX-License-Identifier: Apache-2.0
"""Measured results in a JSON file, written after each measurement, so that a long script can be taken up again."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


class OutOfTime(Exception):
    """The budget is spent; what was measured so far is in the file."""


class Record:
    """
    The results of one part of a script: a JSON object under the part's name.

    :param output: the file; None keeps results in memory only.
    :param part: name in the file.
    :param seconds: no measurement begins later than this after the start; None for no limit.
    """

    def __init__(self, output: Path | None, part: str, seconds: float | None = None) -> None:
        self._output = output
        self._part = part
        self._deadline = None if seconds is None else time.monotonic() + seconds
        shown = [Path(argument).name if "/" in argument else argument for argument in sys.argv[1:]]
        self.data: dict[str, Any] = {
            "command": f"python examples/benchmarks/{Path(sys.argv[0]).name} {' '.join(shown)}",
            "machine": {
                "processor": _processor(),
                "threads": torch.get_num_threads(),
                "python": platform.python_version(),
                **{package: version(package) for package in ("torch", "nncf", "transformers")},
            },
            **self._stored().get(part, {}),
        }

    def once(self, key: str, measure: Callable[[], Any]) -> Any:
        """
        What is stored under the key, else what `measure` returns, stored at once.

        :raises OutOfTime: it would have to be measured, and the budget is spent.
        """
        if key not in self.data:
            if self._deadline is not None and time.monotonic() > self._deadline:
                raise OutOfTime
            self.set(key, measure())
            print(key, json.dumps(self.data[key]), file=sys.stderr, flush=True)
        return self.data[key]

    def set(self, key: str, value: Any) -> None:
        """Store a value, in place of one from before."""
        self.data[key] = value
        if self._output is None:
            return
        data = {**self._stored(), self._part: self.data}
        self._output.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._output.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(to_text(data) + "\n", encoding="utf-8")
        temporary.replace(self._output)

    def _stored(self) -> dict[str, Any]:
        if self._output is None or not self._output.is_file():
            return {}
        data: dict[str, Any] = json.loads(self._output.read_text(encoding="utf-8"))
        return data


def to_text(data: Any) -> str:
    """JSON with indents, and lists of numbers and names on one line."""
    text = json.dumps(data, indent=1, ensure_ascii=False)
    return re.sub(r"\[[^][{}]*\]", lambda match: " ".join(match[0].split()), text)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
