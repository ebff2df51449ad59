# SPDX-License-Identifier: Apache-2.0
"""The example algorithm of docs/adding-an-algorithm.md runs as it is written there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nncf
import pytest
import torch
from torch import nn

import scap_nncf
from scap_nncf.algorithms.base import COMPRESSION_ALGORITHMS

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture
def peak() -> Iterator[dict[str, Any]]:
    text = (DOCS / "adding-an-algorithm.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"<!-- tested -->\n```python\n(.*?)```", text, re.DOTALL)
    assert len(block.splitlines()) <= 70
    # classes need a module: dataclasses look their module up
    names: dict[str, Any] = {"__name__": __name__}
    exec(compile(block, "adding-an-algorithm.md", "exec"), names)
    yield names
    COMPRESSION_ALGORITHMS._registry_dict.pop("peak")


def test_example_algorithm(
    peak: dict[str, Any], tiny_llama: nn.Module, batches: Callable[..., Any], tmp_path: Path
) -> None:
    data = batches(3)
    largest: dict[str, float] = {}
    for site in scap_nncf.inspect_model(tiny_llama).sites:
        tiny_llama.get_submodule(site.name).register_forward_pre_hook(
            lambda _m, a, name=site.name: largest.__setitem__(
                name, max(largest.get(name, 0.0), float(a[0].abs().max()))
            )
        )
    with torch.no_grad():
        for sample in data:
            tiny_llama(**sample)
    truth = dict(largest)
    model = nncf.compress(tiny_llama, algorithm="peak", share=0.1, dataset=data)
    controller = scap_nncf.get_controller(model)
    for site in controller.plan.sites:
        assert all(layer.threshold == pytest.approx(0.1 * truth[site.name], rel=1e-5) for layer in site.layers)
    with torch.no_grad():
        sparse = model(**data[0]).logits
        assert 0.02 < controller.statistics().realised_sparsity < 0.9
        controller.save(tmp_path / "plan")
        controller.strip()
        assert not torch.equal(model(**data[0]).logits, sparse)
        model = nncf.compress(model, plan=tmp_path / "plan")
        assert torch.equal(model(**data[0]).logits, sparse)
    assert scap_nncf.get_controller(model).plan.made_by["settings"] == {"share": 0.1}


def test_example_in_a_recipe_and_its_errors(peak: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("- peak: {share: 0.05}\n")
    assert scap_nncf.load_recipe(tmp_path / "recipe.yaml") == [peak["Peak"](0.05)]
    with pytest.raises(nncf.ValidationError, match="share must be"):
        peak["Peak"](1.5)
    with pytest.raises(nncf.ParameterNotSupportedError, match="no setting 'sparsity'"):
        nncf.compress(nn.Sequential(nn.Linear(4, 4)), algorithm="peak", sparsity=0.5, dataset=[torch.ones(1, 4)])


def test_documents_name_what_exists() -> None:
    root = DOCS.parent
    for document in ("adding-an-algorithm.md", "nm.md"):
        text = (DOCS / document).read_text(encoding="utf-8")
        for path in re.findall(r"`((?:algorithms|kernels|examples|benchmarks|docs)/[\w/.-]+)`", text):
            assert (root / path).exists(), f"{document}: {path}"
