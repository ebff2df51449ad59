# SPDX-License-Identifier: Apache-2.0
"""The wheel holds everything, installs nothing at the top level but scap_nncf, and imports nothing heavy."""

from __future__ import annotations

import configparser
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# folder in the repository -> package it is installed as
FOLDERS = {"scap_nncf": "scap_nncf", "algorithms": "scap_nncf/algorithms", "kernels": "scap_nncf/kernels"}
# what is read at run time: modules, kernel sources, tables
SHIPPED = {".py", ".typed", ".json", ".yaml", ".cpp", ".hpp", ".h", ".cu", ".cmake"}

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.cfg").is_file(), reason="needs the source tree beside the tests (setup.cfg)"
)


def _sources() -> list[tuple[Path, str]]:
    """Every file that should be in the wheel: (its path here, its path there)."""
    files = []
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*")):
            relative = path.relative_to(ROOT / folder)
            hidden = any(part.startswith((".", "__pycache__")) for part in relative.parts)
            if path.is_file() and not hidden and (path.suffix in SHIPPED or path.name == "CMakeLists.txt"):
                files.append((path, f"{package}/{relative.as_posix()}"))
    return files


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that the repository stays clean."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    # an optional namespace package for other tools' plug-ins (optimum-cli), where there is one
    if (ROOT / "optimum").is_dir():
        shutil.copytree(ROOT / "optimum", source / "optimum", ignore=shutil.ignore_patterns("__pycache__"))
    # the backend itself: no isolated environment, so nothing is downloaded
    code = f"import setuptools.build_meta as backend; backend.build_wheel({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel installed into an empty folder, without its dependencies."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", str(target)]
    done = subprocess.run([*command, str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return target


def _python(code: str, folder: Path, site: Path) -> str:
    """Runs code in another process that finds `site` first and sees neither the tests nor the repository's root."""
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_setup_cfg_lists_every_package():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    listed = config["options"]["packages"].split()
    there = {
        Path(target).parent.as_posix().replace("/", ".") for path, target in _sources() if path.name == "__init__.py"
    }
    assert sorted(there - set(listed)) == [], "folders with __init__.py that setup.cfg does not list"
    assert sorted(name for name in set(listed) - there if name.startswith("scap_nncf")) == [], "listed, but not there"
    assert len(listed) == len(set(listed))


def test_every_module_is_in_a_package():
    """A folder of modules without __init__.py would work from the source tree and be lost in the wheel."""
    lost = [str(path) for path, _ in _sources() if path.suffix == ".py" and not (path.parent / "__init__.py").is_file()]
    assert lost == []


def test_wheel_holds_every_file(wheel):
    sources = _sources()
    assert len(sources) > 30
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        missing = [target for _, target in sources if target not in names]
        assert missing == [], "not in the wheel; see packages and package_data in setup.cfg"
        for path, target in sources:
            assert archive.read(target) == path.read_bytes(), target
        (entry_points,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
        assert "scap-nncf = scap_nncf.cli:main" in archive.read(entry_points).decode()
        assert any(name.endswith("LICENSE") for name in names)


def test_nothing_else_reaches_site_packages(installed):
    top = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    # optimum is a namespace that optimum-cli looks into for third-party commands
    assert top - {"bin", "optimum", "__pycache__"} == {"scap_nncf"}
    assert not (installed / "optimum" / "__init__.py").exists()


def test_installed_package_imports_from_where_it_is(installed, tmp_path):
    code = (
        "import importlib.util as u, scap_nncf, scap_nncf.algorithms as a, scap_nncf.kernels as k\n"
        "print(scap_nncf.__file__, a.__file__, k.__file__, sep='\\n')\n"
        "print([name for name in ('algorithms', 'kernels') if u.find_spec(name)])"
    )
    *files, leaked = _python(code, tmp_path, installed).strip().splitlines()[-4:]
    assert [Path(file).parent for file in files] == [
        installed / "scap_nncf",
        installed / "scap_nncf" / "algorithms",
        installed / "scap_nncf" / "kernels",
    ]
    assert leaked == "[]"


def test_import_is_light(installed, tmp_path, record_property):
    code = (
        "import json, sys, time\n"
        "start = time.perf_counter(); import nncf; middle = time.perf_counter()\n"
        "before = {name.partition('.')[0] for name in sys.modules}\n"
        "import scap_nncf; end = time.perf_counter()\n"
        "after = {name.partition('.')[0] for name in sys.modules}\n"
        "print(json.dumps([sorted(after - before), middle - start, end - middle]))"
    )
    new, nncf_seconds, own_seconds = json.loads(_python(code, tmp_path, installed).strip().splitlines()[-1])
    heavy = {
        "accelerate",
        "datasets",
        "gguf",
        "huggingface_hub",
        "lm_eval",
        "matplotlib",
        "openvino",
        "openvino_tokenizers",
        "optimum",
        "optuna",
        "pandas",
        "tokenizers",
        "transformers",
        "triton",
        "typer",
    }
    assert sorted(heavy & set(new)) == []
    # for information: a busy machine says little about the code
    record_property("seconds_import_nncf", nncf_seconds)
    record_property("seconds_import_scap_nncf", own_seconds)
    print(f"import nncf {nncf_seconds:.2f} s, import scap_nncf beyond it {own_seconds:.2f} s")


def test_command_line_of_the_wheel(installed, tmp_path):
    code = "import sys; from scap_nncf.cli import main; sys.exit(main(['--version']))"
    assert _python(code, tmp_path, installed).startswith("scap-nncf ")
