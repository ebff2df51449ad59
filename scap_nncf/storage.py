# SPDX-License-Identifier: Apache-2.0
"""Folders on disk: the user's cache, and output folders that are either complete or not there."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import filelock
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

    Nobody ever sees `target` half written, and a process that is killed at any point leaves the old folder or the new
    one. That it can be written, and that no other process is at it, is found out before the block runs, not after.

    :param target: the folder to make; its parents are made too.
    :param overwrite: replace a `target` that this package wrote; it stays as it is until the block has ended well.
    :raises nncf.ValidationError: if `target` is a file, is not empty (without `overwrite`, or with it if it holds
        nothing that this package writes), cannot be written, the disk is full, or another process writes it.
    """
    target = Path(target).expanduser()
    check_target(target, overwrite)
    with _claimed(target):
        try:
            _remove_stale(target)
            # beside the target: a rename works within one file system only
            temporary = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{target.name}-", dir=target.parent))
        except OSError as error:
            raise _cannot_write(target, error) from error
        try:
            try:
                yield temporary
            except Exception as error:
                if _is_full(error):
                    raise _cannot_write(target, error) from error
                raise
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


@contextlib.contextmanager
def _claimed(target: Path) -> Iterator[None]:
    """One process at a time writes `target`; the claim ends with the process, however it ends."""
    lock = filelock.FileLock(str(target.parent / f".{target.name}.scap-lock"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        msg = f"another process is writing {target} now; wait for it, or give another folder"
        raise nncf.ValidationError(msg) from error
    except OSError as error:
        raise _cannot_write(target, error) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            Path(lock.lock_file).unlink()
        lock.release()


def _publish(temporary: Path, target: Path, overwrite: bool) -> None:
    aside = None
    try:
        _flush(temporary)
        if target.is_dir():
            if overwrite and any(target.iterdir()):
                if _exchange(temporary, target):
                    return  # the old folder goes with the temporary one
                aside = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{target.name}-", dir=target.parent)) / "old"
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


def _flush(folder: Path) -> None:
    """Have the files on the disk before the folder gets its name: else a power cut could leave it with empty ones."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows
        return
    for path in [*(path for path in folder.rglob("*") if path.is_file()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """
    Swap two folders in one step, where the system can. In two steps, a process that is killed between them would leave
    neither under its name.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # an old C library
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _remove_stale(target: Path) -> None:
    """What killed processes left: of this target at once, for only one process writes it; of others after a day."""
    for folder in target.parent.glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError):
            of_target = folder.name.startswith(f"{_TEMPORARY}{target.name}-")
            if of_target or time.time() - folder.stat().st_mtime > _STALE_AFTER:
                shutil.rmtree(folder, ignore_errors=True)


def _is_full(error: Exception) -> bool:
    """Whether a write failed for want of room. Libraries in C++ and Rust say so only in their message, if at all."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
    words = ("No space left", "File too large", "Disk quota", "iostream error")
    return not isinstance(error, nncf.ValidationError) and any(word in str(error) for word in words)


def _cannot_write(target: Path, error: Exception) -> nncf.ValidationError:
    return nncf.ValidationError(f"{target} cannot be written: {getattr(error, 'strerror', None) or error}")
