# SPDX-License-Identifier: Apache-2.0
"""Versions outside of the supported range, and the files that pin the ends of it."""

from __future__ import annotations

import configparser
import importlib.metadata
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from scap_nncf import versions
from scap_nncf.extras import require

ROOT = Path(__file__).parents[1]


def ranges() -> dict[str, Requirement]:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    texts = [parser["options"]["install_requires"]]
    texts += [text for extra, text in parser["options.extras_require"].items() if extra != "test"]
    lines = [line.split(";")[0].strip() for text in texts for line in text.splitlines()]
    found = [Requirement(line) for line in lines if line and not line.startswith("scap-nncf")]
    return {requirement.name.lower().replace("_", "-"): requirement for requirement in found if requirement.specifier}


def constraints(name: str) -> dict[str, Version]:
    lines = (ROOT / "constraints" / name).read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {package.lower().replace("_", "-"): Version(version) for package, version in pairs}


@pytest.mark.parametrize(
    ("module", "version", "words"),
    [
        ("nncf", "2.19.0", r"nncf 2\.19\.0 is installed, but scap-nncf needs nncf.*>=3\.4.*pip install"),
        ("torch", "2.1.0", r"torch 2\.1\.0 is installed, but scap-nncf needs torch>="),
        ("transformers", "4.40.0", "transformers 4.40.0 is installed"),
        ("optimum", "1.20.0", "optimum-intel 1.20.0 is installed"),
    ],
)
def test_a_version_that_is_too_old_is_named(
    module: str, version: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "version", lambda _: version)
    versions.check.cache_clear()
    with pytest.raises(versions.UnsupportedInstallationError, match=words) as caught:
        require(module, "transformers")
    assert "\n" not in str(caught.value)
    versions.check.cache_clear()


def test_a_version_that_is_too_new_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda _: "99.0")
    versions.check.cache_clear()
    with pytest.warns(UserWarning, match=r"transformers 99\.0 is newer"):
        require("transformers", "transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        require("transformers", "transformers")
    versions.check.cache_clear()


def test_what_is_installed_here_passes() -> None:
    versions.check.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for module in ("nncf", "torch", "numpy", "transformers", "openvino", "a_module_that_nobody_has"):
            versions.check(module)


def test_constraint_files_are_the_ends_of_the_ranges() -> None:
    oldest, newest, wanted = constraints("oldest.txt"), constraints("newest.txt"), ranges()
    assert {"nncf", "torch", "numpy", "transformers", "accelerate", "safetensors", "openvino"} <= set(oldest)
    for name, requirement in wanted.items():
        if name not in oldest:  # an extra that nothing else depends on
            continue
        assert requirement.specifier.contains(oldest[name], prereleases=True), name
        floors = [Version(one.version) for one in requirement.specifier if one.operator == ">="]
        assert all(oldest[name].release[: len(floor.release)] == floor.release for floor in floors), name
        if name in newest:
            assert requirement.specifier.contains(newest[name], prereleases=True), name
    for name in ("nncf", "torch", "transformers", "openvino", "optimum-intel"):
        assert newest[name] >= oldest[name]
        assert importlib.metadata.version(name)
