# SPDX-License-Identifier: Apache-2.0
"""Kernel tests run on the GPU where there is one, else in Triton's interpreter on CPU tensors."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Tuned tiles of the user must not decide a test, nor a test write there."""
    monkeypatch.setenv("SCAP_NNCF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_CACHE_DIR", os.environ.get("TRITON_CACHE_DIR", str(tmp_path / "triton")))
