# SPDX-License-Identifier: Apache-2.0
"""Tiny models as OpenVINO IR, exported once a session, and an exact way to run them.

There is no `__init__.py` here on purpose: this folder must not hide the package `openvino`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ov = pytest.importorskip("openvino", reason="needs the extra 'openvino'")
pytest.importorskip("optimum.intel", reason="needs the extra 'optimum'")


@pytest.fixture(scope="session", autouse=True)
def _nothing_in_the_working_folder() -> Iterator[None]:
    """A model saved under a bare name lands wherever the tests are run."""
    before = set(Path.cwd().glob("*.xml")) | set(Path.cwd().glob("*.bin"))
    yield
    written = (set(Path.cwd().glob("*.xml")) | set(Path.cwd().glob("*.bin"))) - before
    assert not written, f"a test wrote {sorted(path.name for path in written)} into the current folder"


@pytest.fixture(scope="session")
def core() -> Any:
    return ov.Core()


@pytest.fixture(scope="session")
def exact() -> dict[str, Any]:
    """What torch computes: no half precision, no quantised activations, no quantised cache."""
    return {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "KV_CACHE_PRECISION": "f32"}


@pytest.fixture(scope="session")
def _ir_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    return tmp_path_factory.mktemp("ir"), {}


@pytest.fixture
def exported(
    _ir_folders: tuple[Path, dict[str, Path]], tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> Callable[[str], Path]:
    """`exported("llama")`: folder of the dense tiny model, with tokenizer; exported once a session."""
    root, done = _ir_folders

    def export(family: str) -> Path:
        import scap_nncf

        if family not in done:
            done[family] = scap_nncf.export_openvino(tiny_model(family), root / family, tokenizer=tiny_tokenizer)
        return done[family]

    return export


@pytest.fixture
def read_ir(core: Any, exported: Callable[[str], Path]) -> Callable[..., Any]:
    """`read_ir("llama")`: a fresh dense `openvino.Model`."""
    return lambda family="llama": core.read_model(exported(family) / "openvino_model.xml")


@pytest.fixture
def run_ir(core: Any, exact: dict[str, Any]) -> Callable[..., np.ndarray[Any, Any]]:
    """`run_ir(model, sample)`: first output, float32."""

    def run(model: Any, sample: Any) -> np.ndarray[Any, Any]:
        from scap_nncf.algorithms.backends.openvino.feed import feed

        request = core.compile_model(model, "CPU", exact).create_infer_request()
        return np.array(request.infer(feed(model, sample, "the sample"))[0])

    return run
