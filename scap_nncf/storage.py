# SPDX-License-Identifier: Apache-2.0
"""Folders on disk: the user's cache, and output folders that are either complete or not there."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import nncf

_TEMPORARY = ".scap-tmp-"
# Each output folder holds one of these; no other folder is ever replaced, whatever the flags say.
_OURS = ("plan.json", "result.json", "checkpoint.json")
_STALE_AFTER = 24 * 3600  # seconds; an unfinished folder this old was left by a process that was killed


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/scap_nncf`, or `~/.cache/scap_nncf`. It may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "scap_nncf"


@contextlib.contextmanager
def new_folder(target: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """
    A folder to write into, which becomes `target` when the block ends well and vanishes when it raises.

    Nobody ever sees `target` half written. That it can be written is found out before the block runs, not after.

    :param target: the folder to make; its parents are made too.
    :param overwrite: replace a `target` that this package wrote; it stays as it is until the block has ended well.
    :raises nncf.ValidationError: if `target` is a file, is not empty (without `overwrite`, or with it if it holds
        nothing that this package writes), or cannot be written.
    """
    target = Path(target).expanduser()
    check_target(target, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target.parent)
        # beside the target: a rename works within one file system only
        temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=target.parent))
    except OSError as error:
        raise _cannot_write(target, error) from error
    try:
        yield temporary
        # mkdtemp makes it private; what we leave behind has the rights of any new folder
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        _publish(temporary, target, overwrite)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_target(target: str | os.PathLike[str], overwrite: bool = False) -> None:
    """
    :raises nncf.ValidationError: if `target` is a file, or a folder that is not empty and may not be replaced.
    """
    target = Path(target).expanduser()
    if target.exists() and not target.is_dir():
        msg = f"{target} is a file; expected a folder to write to, new or empty"
        raise nncf.ValidationError(msg)
    try:
        occupied = target.is_dir() and any(target.iterdir())
    except OSError as error:
        raise _cannot_write(target, error) from error
    if occupied and not overwrite:
        msg = f"{target} is not empty: give another folder, or --overwrite (overwrite=True) to replace it"
        raise nncf.ValidationError(msg)
    if occupied and not any((target / name).is_file() for name in _OURS):
        msg = f"{target} holds none of {list(_OURS)}, so scap-nncf did not write it and will not replace it"
        raise nncf.ValidationError(msg)


def _publish(temporary: Path, target: Path, overwrite: bool) -> None:
    aside = None
    try:
        if target.is_dir():
            if overwrite and any(target.iterdir()):
                aside = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=target.parent)) / "old"
                target.rename(aside)
            else:
                target.rmdir()  # empty, or another process has filled it meanwhile: then this fails
        temporary.rename(target)
    except OSError as error:
        if aside is not None and not target.exists():
            aside.rename(target)
        raise _cannot_write(target, error) from error
    finally:
        if aside is not None:
            shutil.rmtree(aside.parent, ignore_errors=True)


def _remove_stale(parent: Path) -> None:
    for folder in parent.glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _STALE_AFTER:
                shutil.rmtree(folder, ignore_errors=True)


def _cannot_write(target: Path, error: OSError) -> nncf.ValidationError:
    return nncf.ValidationError(f"{target} cannot be written: {error.strerror or error}")
