# SPDX-License-Identifier: Apache-2.0
"""A progress bar on the terminal's error stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr that goes when it is done; yields a function of (done, total)."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"  {description}", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
