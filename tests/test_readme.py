# SPDX-License-Identifier: Apache-2.0
"""The README's Python blocks that are marked as tested run in their order, on a tiny model in place of the demo's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCK = re.compile(r"<!-- tested -->\n```python\n(.*?)```", re.DOTALL)


def test_set_up_commands():
    text = README.read_text(encoding="utf-8")
    assert '\npip install ".[demo]" && scap-nncf demo\n' in text
    assert '\npip install -e ".[test]" && pytest\n' in text


def test_python_blocks(tmp_path, monkeypatch, tiny_model, tiny_tokenizer):
    from scap_nncf import models

    blocks = BLOCK.findall(README.read_text(encoding="utf-8"))
    if not blocks:
        pytest.fail("README.md has no block marked as tested")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load_model", lambda ref: (tiny_model("llama"), tiny_tokenizer))
    # one namespace: a block may go on where the one before it ended
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README.md, tested block {number + 1}", "exec"), names)
    assert (tmp_path / "plan" / "plan.json").is_file()
    assert (tmp_path / "activations.png").is_file()
