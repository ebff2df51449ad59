# SPDX-License-Identifier: Apache-2.0
"""Where results of a command go: stdout holds the result alone, everything else goes to stderr, files are whole."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scap_nncf.algorithms import processes
from scap_nncf.algorithms.scap.journal import resumable

if TYPE_CHECKING:
    from rich.console import Console


class Output:
    """Where a command's result goes: text on the console, or one JSON object on stdout."""

    def __init__(self, stream: Any, as_json: bool) -> None:
        from rich.console import Console

        self._stream = stream
        self._as_json = as_json
        # tables are wider than the 80 columns that rich takes for a pipe
        width = None if stream.isatty() or "COLUMNS" in os.environ else 120
        self.console: Console = Console(file=sys.stderr if as_json else stream, width=width)

    def result(self, data: Any, text: str | None) -> None:
        """Print what a command found: `data` for machines, or `text` (None prints nothing)."""
        if not processes.current().writes:
            return
        if self._as_json:
            # NaN and Infinity are no JSON; a reader would choke on them
            self._stream.write(json.dumps(_finite(data), allow_nan=False) + "\n")
        elif text is not None:
            self._stream.write(text + "\n")
        self._stream.flush()


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    if isinstance(data, float) and data - data != 0:
        return None
    return data


@contextlib.contextmanager
def work(as_json: bool) -> Iterator[Output]:
    """Runs the work with everything that prints (progress bars of NNCF, libraries) sent to stderr."""
    out = Output(sys.stdout, as_json)
    handlers = [h for h in logging.getLogger("nncf").handlers if isinstance(h, logging.StreamHandler)]
    before = [handler.setStream(sys.stderr) for handler in handlers]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield out
    finally:
        for handler, stream in zip(handlers, before):
            if stream is not None:
                handler.setStream(stream)


@contextlib.contextmanager
def launched(output: Path | None, overwrite: bool) -> Iterator[None]:
    """
    The processes of `torchrun` or `accelerate launch` work together; the first one writes and prints. What they
    calibrated when they are killed lies beside the output, and the same command goes on from there.
    """
    from scap_nncf.storage import check_target

    started = processes.start_from_launcher()
    try:
        with processes.current().together():
            if output is not None and processes.current().writes:
                check_target(output, overwrite)
        if output is None:
            yield
        else:
            target = output.expanduser()
            with resumable(target.parent / f".{target.name}.unfinished"):
                yield
    finally:
        if started:
            import torch.distributed

            torch.distributed.destroy_process_group()


@contextlib.contextmanager
def output_folder(folder: Path | None, overwrite: bool) -> Iterator[Path | None]:
    """A folder to write into, which appears complete or not at all; None where nothing is to be written."""
    from scap_nncf.storage import new_folder

    if folder is None or not processes.current().writes:
        yield None
    else:
        with new_folder(folder, overwrite) as temporary:
            yield temporary
