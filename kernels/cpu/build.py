# SPDX-License-Identifier: Apache-2.0
"""
Compiling the C++ sources at first use, once for each version of what they are linked with.

The result lies in ``<cache>/scap_nncf/cpu/<key>/``; the key is a hash of the sources, the machine's architecture, the
compiler and, for the extension, the OpenVINO version. A lock lets one process compile while others wait; the folder
appears by a rename when it is complete, so that a killed build leaves nothing that anybody would load.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

__all__ = ["BuildError", "build", "cache_folder", "find", "target"]

logger = logging.getLogger("nncf")

_SOURCES = Path(__file__).parent / "src"
_EXTENSION = Path(__file__).parents[1] / "openvino" / "extension.cpp"
_MARK = b"scap-nncf build: "  # stands in every library before its description; readable without loading it
#: A folder with libraries built elsewhere, see ``scap-nncf build-openvino --output``.
PREBUILT_VARIABLE = "SCAP_NNCF_CPU_LIBRARIES"
_STALE_AFTER = 3600.0  # seconds; a build takes some ten

# Each file is compiled for its own instruction set and chosen at run time; elsewhere these files are empty.
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
_X86_FLAGS = {
    "isa_avx2.cpp": _AVX2,
    "isa_avx512.cpp": _AVX512,
    "isa_avx512_bf16.cpp": [*_AVX512, "-mavx512bf16"],
}
_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-w"]


class BuildError(RuntimeError):
    """A library is not there and cannot be built; the message is one line that says why and what helps."""


@dataclass(frozen=True)
class Target:
    """
    What is built.

    :param name: ``cpu`` (kernels alone, for PyTorch) or ``openvino`` (kernels and the operation).
    :param description: what has to be equal for a library to be usable: sources and OpenVINO version.
    :param includes: folders of headers.
    :param libraries: files to link with.
    :param definitions: macros.
    """

    name: str
    description: str
    includes: tuple[Path, ...] = ()
    libraries: tuple[Path, ...] = ()
    definitions: tuple[str, ...] = ()

    @property
    def file_name(self) -> str:
        """Name of the library file."""
        return f"libscap_{self.name}.so"

    @property
    def sources(self) -> list[Path]:
        """C++ files."""
        files = sorted(_SOURCES.glob("*.cpp"))
        return [*files, _EXTENSION] if self.name == "openvino" else files


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/scap_nncf/cpu``, or ``~/.cache/scap_nncf/cpu``. It may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "scap_nncf" / "cpu"


def target(name: str) -> Target:
    """
    What ``cpu`` or ``openvino`` has to be built of on this machine.

    :raises BuildError: OpenVINO is not installed, or has no headers.
    """
    files = sorted([*_SOURCES.iterdir(), _EXTENSION])
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    sources = digest.hexdigest()[:16]
    if name == "cpu":
        return Target(name, f"cpu, sources {sources}, {platform.machine()}")
    openvino = _openvino()
    root = Path(openvino.__file__ or "").parent
    include = root / "include"
    libraries = [*root.glob("libs/libopenvino.so*"), *root.glob("libs/libtbb.so*")]
    if not (include / "openvino" / "openvino.hpp").is_file() or not libraries:
        msg = f"this installation of OpenVINO {openvino.__version__} has no headers or libraries to build with ({root})"
        raise BuildError(msg)
    threads = _definitions(root / "cmake" / "OpenVINOTargets.cmake")
    return Target(
        name,
        f"openvino {openvino.__version__}, sources {sources}, {platform.machine()}",
        (include,),
        tuple(libraries),
        threads,
    )


def find(name: str) -> Path | None:
    """
    The library, where it is built already: in the folder ``$SCAP_NNCF_CPU_LIBRARIES``, in the package, or in the cache.

    :raises BuildError: a library in the folder of the environment variable is for other sources or another OpenVINO.
    """
    wanted = target(name)
    given = os.environ.get(PREBUILT_VARIABLE)
    if given:
        file = Path(given) / wanted.file_name
        if file.is_file():
            found = describe(file)
            if found != wanted.description:
                msg = (
                    f"{file} was built for '{found}', this is '{wanted.description}'; build it again with "
                    f"scap-nncf build-openvino --output {given}, or unset {PREBUILT_VARIABLE}"
                )
                raise BuildError(msg)
            return file
    for file in (Path(__file__).parent / "prebuilt" / wanted.file_name, _cached(wanted)):
        if file.is_file() and describe(file) == wanted.description:
            return file
    return None


def build(name: str, output: Path | None = None, flags: Sequence[str] = ()) -> Path:
    """
    The library, built if it is not there.

    :param output: a folder to build into instead of the cache.
    :param flags: more flags for the compiler, such as ``-fsanitize=address``; only with `output`.
    :raises BuildError: there is no compiler, or it fails.
    """
    if output is None:
        found = find(name)
        if found is not None:
            return found
    wanted = target(name)
    compiler = _compiler()
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        _compile(wanted, compiler, output / wanted.file_name, flags)
        return output / wanted.file_name
    final = _cached(wanted)
    try:
        final.parent.parent.mkdir(parents=True, exist_ok=True)
        with _lock(final.parent.with_suffix(".lock")):
            if not final.is_file() or describe(final) != wanted.description:
                logger.info(f"Compiling the CPU kernels for {wanted.description} (once, about 15 s) ...")
                _remove_stale(final.parent.parent)
                work = Path(tempfile.mkdtemp(prefix=".building-", dir=final.parent.parent))
                try:
                    _compile(wanted, compiler, work / wanted.file_name, ())
                    shutil.rmtree(final.parent, ignore_errors=True)  # damaged, or it would have been taken
                    work.rename(final.parent)
                finally:
                    shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        msg = f"the CPU kernels cannot be built in {final.parent.parent}: {error.strerror or error}"
        raise BuildError(msg) from error
    return final


def describe(file: Path) -> str:
    """What a library says it was built for, without loading it; empty where it says nothing."""
    try:
        data = file.read_bytes()
    except OSError:
        return ""
    start = data.find(_MARK)
    if start < 0:
        return ""
    end = data.find(b"\0", start)
    return data[start + len(_MARK) : end].decode("utf-8", "replace")


def _cached(wanted: Target) -> Path:
    key = hashlib.sha256(wanted.description.encode()).hexdigest()[:20]
    return cache_folder() / f"{wanted.name}-{key}" / wanted.file_name


def _openvino() -> ModuleType:
    try:
        import openvino
    except ImportError as error:
        msg = 'OpenVINO is not installed: pip install "scap-nncf[openvino]"'
        raise BuildError(msg) from error
    return openvino


def _definitions(cmake: Path) -> tuple[str, ...]:
    """How this OpenVINO was built: its threading library and the ABI of strings."""
    text = cmake.read_text(errors="replace") if cmake.is_file() else ""
    threads = re.search(r"OV_THREAD=(\w+)", text)
    abi = re.search(r"_GLIBCXX_USE_CXX11_ABI=(\d)", text)
    found = [f"OV_THREAD={threads.group(1) if threads else 'OV_THREAD_TBB'}"]
    if abi:
        found.append(f"_GLIBCXX_USE_CXX11_ABI={abi.group(1)}")
    return tuple(found)


def _compiler() -> str:
    if sys.platform != "linux":
        msg = f"the CPU kernels build on Linux only so far, this is {sys.platform}"
        raise BuildError(msg)
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        path = shutil.which(name) if name else None
        if path:
            return path
    msg = "there is no C++ compiler (c++, g++ or clang++, or the one in CXX); install one, e.g. apt install g++"
    raise BuildError(msg)


def _compile(wanted: Target, compiler: str, output: Path, flags: Sequence[str]) -> None:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    common = [*_FLAGS, *flags, f"-I{_SOURCES}", *(f"-I{path}" for path in wanted.includes)]
    common += [f"-D{item}" for item in wanted.definitions]
    common.append(f'-DSCAP_BUILD="{_MARK.decode()}{wanted.description}"')
    with tempfile.TemporaryDirectory(prefix="scap-build-") as work:
        objects, commands = [], []
        for source in wanted.sources:
            objects.append(f"{work}/{source.stem}.o")
            isa = _X86_FLAGS.get(source.name, []) if x86 else []
            commands.append([compiler, *common, *isa, "-c", str(source), "-o", objects[-1]])
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            list(pool.map(_run, commands))
        temporary = output.with_suffix(".tmp")
        _run([compiler, "-shared", *flags, *objects, *map(str, wanted.libraries), "-o", str(temporary)])
        temporary.replace(output)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
        reason = lines[0].strip() if lines else f"exit status {done.returncode}"
        source = next((Path(item).name for item in command if item.endswith(".cpp")), "the library")
        msg = f"{Path(command[0]).name} cannot compile {source}: {reason}"
        raise BuildError(msg)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time; the lock goes with its process, however that ends."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_stale(folder: Path) -> None:
    for path in folder.glob(".building-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_AFTER:
                shutil.rmtree(path, ignore_errors=True)
