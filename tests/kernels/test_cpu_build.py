# SPDX-License-Identifier: Apache-2.0
"""Building the CPU kernels: once, by one process, or a message that says why not."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scap_nncf.kernels.cpu import build as builder
from scap_nncf.kernels.cpu.build import BuildError, build, describe, find, target

BUILD = "from scap_nncf.kernels.cpu.build import build; print(build('cpu'))"

# a compiler that notes each call, waits, and writes what it was told to be: fast, and it can be killed
FAKE = """#!/bin/sh
echo call >> {log}
sleep {wait}
while [ $# -gt 1 ]; do
  case "$1" in
    -DSCAP_BUILD=*) printf '%s\\0' "$1" | sed 's/-DSCAP_BUILD="//; s/"//' > {folder}/text ;;
    -o) out="$2" ;;
  esac
  shift
done
cat {folder}/text > "$out"
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(builder.PREBUILT_VARIABLE, raising=False)
    return tmp_path / "cache" / "scap_nncf" / "cpu"


def fake_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, wait: float) -> Path:
    log, file = folder / "calls", folder / "c++"
    file.write_text(FAKE.format(log=log, wait=wait, folder=folder))
    file.chmod(0o755)
    monkeypatch.setenv("CXX", str(file))
    return log


def test_two_processes_build_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = fake_compiler(tmp_path, monkeypatch, 0.3)
    running = [subprocess.Popen([sys.executable, "-c", BUILD], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = {process.communicate(timeout=60)[0].split()[-1] for process in running}
    assert len(printed) == 1
    assert Path(printed.pop()).is_file()
    assert len(log.read_text().split()) == len(target("cpu").sources) + 1
    build("cpu")
    assert len(log.read_text().split()) == len(target("cpu").sources) + 1  # from the cache
    assert not list(cache.glob(".building-*"))


def test_killed_build_leaves_nothing_to_load(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = fake_compiler(tmp_path, monkeypatch, 0.4)
    process = subprocess.Popen([sys.executable, "-c", BUILD], start_new_session=True)
    deadline = time.time() + 60
    while not log.exists() and time.time() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert find("cpu") is None
    file = build("cpu")
    assert describe(file) == target("cpu").description
    # a library that was cut short is not taken either
    file.write_bytes(file.read_bytes()[:20])
    assert find("cpu") is None
    assert describe(build("cpu")) == target("cpu").description


def test_new_sources_are_compiled_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_compiler(tmp_path, monkeypatch, 0)
    old = build("cpu")
    sources = tmp_path / "src"
    shutil.copytree(builder._SOURCES, sources)
    (sources / "sparse_fc.cpp").write_text("// another\n")
    monkeypatch.setattr(builder, "_SOURCES", sources)
    assert build("cpu") != old


def test_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_args, **_kwargs: None)
    with pytest.raises(BuildError, match=r"no C\+\+ compiler .* apt install g\+\+"):
        build("cpu")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such thing' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(BuildError, match=r"broken cannot compile .*no such thing"):
        build("cpu")
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    with pytest.raises(BuildError, match="cannot be built in"):
        build("cpu")


def test_prebuilt_library_for_another_openvino(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    wanted = target("openvino")
    monkeypatch.setenv(builder.PREBUILT_VARIABLE, str(tmp_path))
    library = tmp_path / wanted.file_name
    library.write_bytes(b"\x7fELF scap-nncf build: openvino 2024.0.0, sources 0, x86_64\0 more")
    with pytest.raises(BuildError, match=r"was built for 'openvino 2024.0.0.*build-openvino --output"):
        build("openvino")
    library.write_bytes(f"\x7fELF scap-nncf build: {wanted.description}\0".encode())
    assert build("openvino") == library
