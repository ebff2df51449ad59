# SPDX-License-Identifier: Apache-2.0
"""Tile choice, the dense switch, and the cache of tuned tiles."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from scap_nncf.kernels.triton import autotune, dispatch, tiles

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forget():
    tiles.forget_choices()
    autotune._read.cache_clear()
    yield
    tiles.forget_choices()
    autotune._read.cache_clear()


def test_a_measured_shape_gets_its_own_tile():
    for key, tile in tiles.table()["sm_90"]:
        assert tiles.nearest(key, tiles.table()["sm_90"]) == tile


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("shape", [(1, 1), (100, 7), (5000, 5000), (100_000, 300)])
@pytest.mark.parametrize("op", ["fc", "glu"])
def test_unknown_shapes_get_a_tile_that_fits(op, shape, rows):
    tile = tiles.choose(op, CPU, *shape, torch.float16, rows, 0.5)
    assert tile.rows >= 64
    assert tile.block_n >= 32
    columns = shape[1] // 2 if op == "glu" else shape[1]
    assert tile.block_n == 32 or tile.block_n // 2 < columns
    assert tile.span(shape[0]) * -(-shape[0] // tile.span(shape[0])) >= shape[0]


def test_splits_share_the_channels_out():
    tile = tiles.Tile(rows=256, splits=18)
    assert tile.span(4096) == 240  # a multiple of 16: loads stay aligned
    assert tiles.Tile(rows=256).span(4096) == 256
    assert tiles.Tile(rows=64, splits=3).span(4096) == 64  # never more than a program looks at


def test_tiles_are_powers_of_two():
    with pytest.raises(ValueError, match="power of two"):
        tiles.Tile(block_n=100)


def test_tuned_tiles_survive_on_disk_and_win():
    key = tiles.Key.of("fc", 4096, 14336, torch.float16, 1, 0.5)
    own = tiles.Tile(block_n=64, rows=64, groups=1, unroll=1, num_warps=1)
    assert tiles.choose("fc", CPU, 4096, 14336, torch.float16, 1, 0.5) != own
    autotune.remember(key, own, CPU)
    assert tiles.choose("fc", CPU, 4096, 14336, torch.float16, 1, 0.5) == own
    assert tiles.choose("fc", CPU, 4096, 14336, torch.float16, 1, 0.9) != own  # another level of sparsity
    path = autotune.cache_file(CPU)
    assert len(json.loads(path.read_text())) == 1
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file is left


def test_a_broken_cache_file_is_ignored_with_a_warning():
    path = autotune.cache_file(CPU)
    path.parent.mkdir(parents=True)
    path.write_text("[{")
    with pytest.warns(UserWarning, match="Delete the file"):
        tile = tiles.choose("fc", CPU, 4096, 4096, torch.float16, 1, 0.5)
    assert tile == tiles.nearest(tiles.Key.of("fc", 4096, 4096, torch.float16, 1, 0.5), tiles.table()["sm_90"])


@pytest.mark.parametrize("op", ["fc", "glu"])
@pytest.mark.parametrize("rows", [1, 4])
def test_the_search_is_bounded(op, rows):
    found = autotune.candidates(tiles.Key.of(op, 4096, 4096, torch.float32, rows, 0.5))
    assert 4 <= len(found) <= 16


def test_dense_switch():
    args = (CPU, 4096, 14336, torch.float16)
    assert not dispatch.prefer_dense(*args, 1, 0.0)  # one row never
    assert not dispatch.prefer_dense(*args, 2, 0.9)
    assert dispatch.prefer_dense(*args, 8, 0.1)  # hardly anything is skipped by all eight
    switched = [dispatch.prefer_dense(*args, 8, s / 20) for s in range(21)]
    assert switched == sorted(switched, reverse=True)  # once sparse, sparse from there on


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tuning_finds_and_remembers():
    tile = autotune.tune("fc", 512, 1024, torch.float16, budget_s=5.0)
    assert tiles.choose("fc", torch.device("cuda", 0), 512, 1024, torch.float16, 1, 0.5) == tile
