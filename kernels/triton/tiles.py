# SPDX-License-Identifier: Apache-2.0
"""
Which tile a launch uses: measured tables first, the nearest measured shape otherwise, never a search.

Order of choice: a tile that the user's own tuning found for this GPU and shape (:mod:`.autotune`, on request only),
then the table measured for the GPU's family (``tiles.json``: how it was measured stands there), then the entry whose K
and N are nearest. A tile changes speed and the order of summation, never what is dropped.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from typing import Any

import torch

TABLE = "tiles.json"


@dataclass(frozen=True)
class Tile:
    """
    :param block_n: columns a program computes (of each half for a GLU); a power of two.
    :param rows: input channels a program looks at; a power of two.
    :param groups: weight rows that a program reads side by side, one to each group of warps; a power of two.
    :param unroll: weight rows that each group has in flight.
    :param num_warps: warps a program.
    :param max_registers: registers a thread that the compiler may use. Without a limit it trades loads in flight for
        occupancy and waits for one row before it asks for the next.
    :param early_launch: let the kernel be placed on the chip while the one before it ends (programmatic dependent
        launch).
    :param splits: programs along the input channels, where a number that no power of two gives fills the chip better;
        0 leaves it to `rows`.

    With 2 to 16 rows tensor cores multiply: `unroll` is then the weight rows of one step, `groups` the pipeline stages.
    """

    block_n: int = 512
    rows: int = 256
    groups: int = 2
    unroll: int = 8
    num_warps: int = 4
    max_registers: int = 96
    early_launch: bool = False
    splits: int = 0

    def __post_init__(self) -> None:
        for name in ("block_n", "rows", "num_warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"Tile {name} is {value}; expected a power of two.")

    def span(self, k: int) -> int:
        """Input channels that a program really takes: `rows`, or fewer so that all of `splits` have equally much."""
        if self.splits == 0:
            return self.rows
        return min(self.rows, max(16, -(-k // self.splits) + 15 & ~15))

    def sum_unroll(self) -> int:
        """Partial sums that the last program has in flight, within its registers."""
        columns = max(1, self.block_n // (32 * self.num_warps))
        return max(8, min(32, 64 // columns))

    def launch_options(self, device: torch.device) -> dict[str, int | bool]:
        """Keyword arguments of a Triton launch."""
        options: dict[str, int | bool] = {"num_warps": self.num_warps, "num_stages": 1, "PDL": False}
        if device.type != "cuda" or torch.version.hip is not None:
            return options
        options["maxnreg"] = self.max_registers  # an option of the NVIDIA compiler alone
        if self.early_launch and has_programmatic_launch(device):
            options |= {"PDL": True, "launch_pdl": True}
        return options


@dataclass(frozen=True)
class Key:
    """
    What a tile is chosen for.

    :param op: fc or glu.
    :param k: input channels.
    :param n: output columns of the weight (2N for a GLU).
    :param itemsize: bytes of a weight.
    :param many_rows: whether the launch has 2 to 16 rows.
    :param level: 0 below 80 % sparsity, 1 from there on: few rows are left and shorter programs win.
    """

    op: str
    k: int
    n: int
    itemsize: int
    many_rows: bool
    level: int

    @classmethod
    def of(cls, op: str, k: int, n: int, dtype: torch.dtype, rows: int, sparsity: float) -> Key:
        """The key of a launch on `rows` rows at an expected `sparsity`."""
        return cls(op, k, n, dtype.itemsize, rows > 1, int(sparsity >= 0.8))


@cache
def has_programmatic_launch(device: torch.device) -> bool:
    """Whether a kernel may be launched while the one before it ends (compute capability 9.0, Triton 3.4)."""
    from .rows import gdc_wait

    return gdc_wait is not None and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def family(device: torch.device) -> str:
    """GPU family of a CUDA device, for example sm_90; cpu for the interpreter."""
    if device.type != "cuda":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def table() -> dict[str, list[tuple[Key, Tile]]]:
    """The shipped measurements by GPU family."""
    return {name: [parse_entry(entry) for entry in entries] for name, entries in measurements()["tiles"].items()}


@cache
def measurements() -> dict[str, Any]:
    """The shipped file as it is."""
    return json.loads(resources.files(__package__).joinpath(TABLE).read_text(encoding="utf-8"))


def parse_entry(entry: dict[str, Any]) -> tuple[Key, Tile]:
    """One JSON object ``{"key": {...}, "tile": {...}}``."""
    return Key(**entry["key"]), Tile(**entry["tile"])


def format_entry(key: Key, tile: Tile) -> dict[str, Any]:
    """The inverse of :func:`parse_entry`."""
    return {"key": asdict(key), "tile": asdict(tile)}


def choose(op: str, device: torch.device, k: int, n: int, dtype: torch.dtype, rows: int, sparsity: float) -> Tile:
    """
    The tile for a launch.

    :param op: fc or glu.
    :param k: input channels.
    :param n: columns of the weight.
    :param rows: rows of the activation, 1 to 16.
    :param sparsity: expected share of dropped inputs.
    """
    return _choose(Key.of(op, k, n, dtype, rows, sparsity), device)


@cache
def _choose(key: Key, device: torch.device) -> Tile:
    from .autotune import remembered

    own = remembered(key, device)
    if own is not None:
        return own
    entries = table().get(family(device)) or table()["sm_90"]
    return nearest(key, entries)


def forget_choices() -> None:
    """Choose anew at the next launch (after tuning)."""
    _choose.cache_clear()


def nearest(key: Key, entries: list[tuple[Key, Tile]]) -> Tile:
    """The tile of the entry nearest to `key`: same operation and row class first, then byte width, level and shape."""

    def distance(other: Key) -> tuple[float, ...]:
        shape = abs(math.log2(max(key.k, 1) / other.k)) + abs(math.log2(max(key.n, 1) / other.n))
        return (
            key.many_rows != other.many_rows,
            key.op != other.op,
            abs(key.itemsize - other.itemsize),
            key.level != other.level,
            shape,
        )

    found, tile = min(entries, key=lambda entry: distance(entry[0]))
    return tile if (key.k, key.n, key.op) == (found.k, found.n, found.op) else _fit(key, found, tile)


def _strips(key: Key, block_n: int) -> int:
    columns = max(1, key.n // 2 if key.op == "glu" else key.n)
    return -(-columns // block_n)


def _fit(key: Key, found: Key, tile: Tile) -> Tile:
    """A tile for another shape: no wider than the columns, and about as many programs as where it was measured."""
    block_n = tile.block_n
    while block_n > 32 and _strips(key, block_n // 2) == 1:
        block_n //= 2
    programs = _strips(found, tile.block_n) * -(-found.k // tile.span(found.k))
    share = key.k / max(1, round(programs / _strips(key, block_n)))  # input channels a program
    rows = 64
    while rows < min(share, 2048):
        rows *= 2
    return Tile(**{**asdict(tile), "block_n": block_n, "rows": rows, "splits": 0})
