# SPDX-License-Identifier: Apache-2.0
"""
Damaged and hostile input for everything that is read from disk.

Each loader gets random bytes, truncated and bit-flipped files, and well-formed documents with wrong values in random
places. It must either load (and then write and read again the same), or refuse with one of NNCF's errors: anything else
that is raised, a write outside of the folder, a network connection, a process or an unpickling is a failure.

    python benchmarks/faults/fuzz_loaders.py --examples 1000 --output results/fuzz_loaders.json

The tests run a few dozen examples of the same (tests/test_trust.py).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import nncf
import numpy as np
import typer
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from safetensors.numpy import save as save_tensors

import scap_nncf
from scap_nncf.algorithms import sparsity
from scap_nncf.algorithms.plan import PLAN_FILE, STATISTICS_FILE, VECTORS_FILE, Plan, sha256
from scap_nncf.algorithms.scap.calibration import CalibrationStatistics, statistics_of_plan

REFUSALS = (
    nncf.ValidationError,
    nncf.InvalidPathError,
    nncf.UnsupportedVersionError,
    nncf.ParameterNotSupportedError,
    nncf.UnsupportedModelError,
    typer.BadParameter,
)
_MEMORY = 24 << 30  # address space; what asks for more than the loader may allocate fails here instead of swapping

# -- what goes in ------------------------------------------------------------------------------------------------------

NASTY = [
    None, True, False, 0, -1, 1, 2,
    1 << 31, 1 << 63, 10**400, -(10**400), 1e308, -1e-308, 0.5, 0.999, 1.0, float("nan"),
    float("inf"), "", "0", "../../outside", "/etc/passwd", "..\\..\\outside", "\u0000", "\ud800", "a" * 5000, [], [[]],
    {}, {"": None}, [[1, 2]], [0, 0], [4, 2], ["__import__('os').system('true')"], {"__class__": "os.system"},
    "all", "decode", "zero", "scap", "sha256", 1e39,
]  # fmt: skip
json_values = st.sampled_from(NASTY) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a document."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


@st.composite
def mutated(draw: Any, document: Any) -> Any:
    """The document with one to three values replaced, removed, doubled or renamed."""
    data = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(data))
        if not found:
            break
        *path, key = draw(st.sampled_from(found))
        owner = data
        for step in path:
            owner = owner[step]
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "double", "rename"]))
        if action == "replace":
            owner[key] = copy.deepcopy(draw(json_values))  # the next mutation may change it
        elif action == "remove":
            del owner[key]
        elif action == "double" and isinstance(owner, list):
            owner.insert(key, copy.deepcopy(owner[key]))
        elif action == "rename" and isinstance(owner, dict):
            owner[draw(st.text(max_size=6))] = owner.pop(key)
    return data


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """Truncated, with flipped bits, with bytes put in, or nothing of it at all."""

    def flip(places_: list[int]) -> bytes:
        data = bytearray(content)
        for place in places_:
            data[(place >> 3) % len(data)] ^= 1 << (place & 7)
        return bytes(data)

    head = st.integers(0, min(8 * len(content), 4096) - 1)  # headers say what the rest means
    anywhere = st.integers(0, 8 * len(content) - 1)
    return st.one_of(
        st.integers(0, len(content)).map(lambda end: content[:end]),
        st.lists(head | anywhere, min_size=1, max_size=4).map(flip),
        st.tuples(st.integers(0, len(content)), st.binary(max_size=8)).map(
            lambda pair: content[: pair[0]] + pair[1] + content[pair[0] :]
        ),
        st.binary(max_size=200),
    )


def documents(document: Any) -> st.SearchStrategy[bytes]:
    """A JSON document as bytes: with wrong values, or damaged as a file."""
    text = json.dumps(document).encode()
    return mutated(document).map(lambda data: json.dumps(data).encode()) | damaged(text)


# -- what it goes into -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A loader: the inputs that it gets and the call, which gets one and an empty folder."""

    name: str
    inputs: Callable[[], st.SearchStrategy[Any]]
    load: Callable[[Any, Path], None]


@cache
def example() -> tuple[Plan, CalibrationStatistics]:
    """A plan of a small model made of numbers, with its statistics."""
    from scap_nncf.algorithms.scap.histogram import NUM_BUCKETS, ActivationHistogram
    from scap_nncf.algorithms.sites import Layer, Site

    sites = (
        Site("model.layers.0.q", 0, (Layer("model.layers.0.q", "q", 8, 8), Layer("model.layers.0.k", "k", 8, 4))),
        Site("model.layers.0.down", 0, (Layer("model.layers.0.down", "down", 16, 8),)),
    )
    counts = np.zeros(NUM_BUCKETS, dtype=np.int64)
    counts[[0x3F80, 0xBF80, 0x3E00]] = [500, 300, 200]
    statistics = CalibrationStatistics(sites, {site.name: ActivationHistogram(counts.copy()) for site in sites}, 3)
    return scap_nncf.make_plan(statistics, scap_nncf.Scap(sparsity=0.5, allocation="uniform")), statistics


@cache
def plan_document() -> Any:
    document = json.loads(example()[0].to_json())
    document["statistics"] = {"file": STATISTICS_FILE, "sha256": sha256(example()[1].to_bytes())}
    document["sites"][1]["layers"][0] |= {"pattern": [2, 4], "token_shift": "mean", "variance": True}
    document["schema_version"] = 2
    return document


def load_plan(content: bytes, folder: Path) -> None:
    (folder / PLAN_FILE).write_bytes(content)
    (folder / STATISTICS_FILE).write_bytes(example()[1].to_bytes())
    plan = Plan.load(folder)
    assert Plan.from_json(plan.to_json()).sites == plan.sites
    statistics_of_plan(folder, plan)


def load_statistics(content: bytes, folder: Path) -> None:
    (folder / STATISTICS_FILE).write_bytes(content)
    statistics = CalibrationStatistics.load(folder)
    again = CalibrationStatistics.from_bytes(statistics.to_bytes(), "again")
    assert again.sites == statistics.sites
    assert again.tokens == statistics.tokens


def statistics_inputs() -> st.SearchStrategy[bytes]:
    content = example()[1].to_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    inner = json.loads(header["__metadata__"]["scap_nncf"])

    def assemble(new: Any) -> bytes:
        text = json.dumps(new).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + size :]

    def with_inner(new: Any) -> bytes:
        return assemble({**header, "__metadata__": {"scap_nncf": json.dumps(new)}})

    return damaged(content) | mutated(header).map(assemble) | mutated(inner).map(with_inner)


def load_vectors(content: bytes, folder: Path) -> None:
    plan = example()[0]
    vectors = {(plan.layers[0].name, "bias"): np.zeros(8, np.float32)}
    described = json.loads(plan.with_vectors(vectors).to_json())
    described["vectors"]["sha256"] = sha256(content)  # so that the content is read
    (folder / PLAN_FILE).write_text(json.dumps(described))
    (folder / VECTORS_FILE).write_bytes(content)
    loaded = Plan.load(folder)
    loaded.to_json()
    loaded.vector_bytes()


def vector_inputs() -> st.SearchStrategy[bytes]:
    layer = example()[0].layers[0]
    shapes = st.sampled_from([(8,), (), (0,), (4,), (8, 1), (1, 8)])
    kinds = st.sampled_from([f"{layer.name}/bias", f"{layer.name}/shift", "x", "../x/bias", f"{layer.name}/"])
    dtypes = st.sampled_from([np.float32, np.float64, np.int8, np.float16])
    arrays = st.builds(lambda shape, dtype: np.ones(shape, dtype), shapes, dtypes)
    tensors = st.dictionaries(kinds, arrays | st.just(np.full(8, np.nan, np.float32)), max_size=3)
    return tensors.map(save_tensors) | damaged(save_tensors({f"{layer.name}/bias": np.zeros(8, np.float32)}))


RECIPE = [
    {"weight_compression": {"mode": "int4_sym", "group_size": 64, "awq": True, "ratio": 0.8}},
    {
        "scap": {
            "sparsity": {"up": 0.4, "re:down": 0.6},
            "mode": "auto",
            "prune": "all",
            "ignored_scope": {"patterns": ["head"]},
        }
    },
]
YAML_PIECES = [
    "&a [*a]", "- &a [x, x, x, x, x, x, x, x, x]\n", "- &b [*a, *a, *a, *a, *a, *a, *a, *a]\n", "- [*b, *b, *b, *b]\n",
    "!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!!bool x", "!!int ''", "!!float x",
    "!!timestamp x", "2001-99-99", "!!binary '*'", "<<: *x", "<<: [1]", "? [a]\n: b\n", "0x", "0x" + "f" * 3000,
    "1:60:60", "scap", ": ", "- ", "\n", "  ", "{", "}", "[", "]", "sparsity", ".nan", ".inf", "1e999", "*a", "---\n",
    "%YAML 9.9\n", "steps", "|", ">", "'", '"', "\t", "\x00", "#",
]  # fmt: skip


def recipe_inputs() -> st.SearchStrategy[tuple[str, bytes]]:
    as_yaml = mutated(RECIPE).map(lambda data: yaml.safe_dump(data).encode("utf-8", "surrogatepass"))
    pieces = st.lists(st.sampled_from(YAML_PIECES) | st.text(max_size=4), max_size=30).map(
        lambda parts: "".join(parts).encode("utf-8", "surrogatepass")
    )
    bombs = st.tuples(st.integers(2, 9), st.integers(3, 12)).map(lambda size: _bomb(*size))
    as_yaml = as_yaml | pieces | bombs | damaged(yaml.safe_dump(RECIPE).encode())
    return st.one_of(
        documents(RECIPE).map(lambda content: ("recipe.json", content)),
        as_yaml.map(lambda content: ("recipe.yaml", content)),
    )


def _bomb(width: int, depth: int) -> bytes:
    """Aliases to aliases: width^depth values in a few lines."""
    lines = ["- &x0 [1]"] + [f"- &x{i} [{', '.join([f'*x{i - 1}'] * width)}]" for i in range(1, depth)]
    return "\n".join(lines).encode()


def load_recipe(content: tuple[str, bytes], folder: Path) -> None:
    file = folder / content[0]
    file.write_bytes(content[1])
    scap_nncf.load_recipe(file)


REFERENCE = {
    f"model.layers.{block}.mlp.{role}_proj": {
        "module_name": f"model.layers.{block}.mlp.{role}_proj",
        "demode_method": "zero",
        "mode": 0.0,
        "threshold": 0.25,
        "target_sparsity": 0.4,
        "hook_type": "pre_hook",
    }
    for block in range(2)
    for role in ("gate", "up", "down")
}


def load_reference(content: bytes, folder: Path) -> None:
    (folder / "calibrated_thresholds.json").write_bytes(content)
    for load in (Plan.load, lambda path: Plan.from_reference(path / "calibrated_thresholds.json")):
        plan = load(folder)
        assert Plan.from_json(plan.to_json()).sites == plan.sites


def sparsity_inputs() -> st.SearchStrategy[Any]:
    words = ["up", "gate", "down", "all", "attn", "zero", "kde", "auto", "0.35", "1", "-0", "1e999", "nan", "re:(", "=",
             ",", " ", "", "{", "}", '"', ":", "0x1", "١", "0_1", "@"]  # fmt: skip
    grammar = st.lists(st.sampled_from(words) | st.text(max_size=3), max_size=9).map(",".join)
    pairs = st.lists(st.sampled_from(words), max_size=9).map("".join)
    return grammar | pairs | json_values | mutated({"up": 0.4, "re:down": 0.5}).map(json.dumps)


def load_sparsity(content: Any, folder: Path) -> None:
    sites = example()[1].sites
    loads: list[Callable[[], Any]] = [lambda: sparsity.resolve(content, sites)]
    if isinstance(content, str) and not content.startswith("@"):
        from scap_nncf.cli_options import parse_sparsity

        loads += [lambda: sparsity.resolve(parse_sparsity(content), sites), lambda: _sparsity_file(content, folder)]
    refusals = []
    for load in loads:
        try:
            load()
        except REFUSALS as error:
            refusals.append(error)
    if len(refusals) == len(loads):
        raise refusals[0]


def _sparsity_file(content: str, folder: Path) -> None:
    from scap_nncf.cli_options import parse_sparsity

    for name in ("s.json", "s.yaml"):
        (folder / name).write_bytes(content.encode("utf-8", "surrogatepass"))
        parse_sparsity(f"@{folder / name}")


def load_rt_info(content: bytes, folder: Path) -> None:
    import openvino as ov
    from openvino import opset13 as opset

    x = opset.parameter([1, 8], np.float32, name="x")
    model = ov.Model([opset.matmul(x, opset.constant(np.ones((8, 8), np.float32)), False, False)], [x], "tiny")
    text = content.decode("utf-8", "replace").replace("\x00", "")
    place = ["nncf", "scap", "plan"]
    model.set_rt_info(text, place if not text.startswith("[") else [*place, "below"])
    controller = scap_nncf.get_controller(model)
    assert controller is not None
    controller.plan.to_json()


@cache
def _checkpoint() -> dict[str, bytes]:
    """Files of a saved model that is quantised and sparse."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    data = [{"input_ids": torch.randint(0, 32, (1, 9))} for _ in range(2)]
    steps = [scap_nncf.WeightCompression("int4_asym", group_size=8), scap_nncf.Scap(sparsity=0.5)]
    model = scap_nncf.compress(model, algorithm=steps, dataset=data)
    with tempfile.TemporaryDirectory() as folder:
        scap_nncf.save_pretrained(model, Path(folder) / "saved")
        return {path.name: path.read_bytes() for path in (Path(folder) / "saved").iterdir()}


def load_checkpoint(content: tuple[str, bytes], folder: Path) -> None:
    for name, original in _checkpoint().items():
        (folder / name).write_bytes(content[1] if name == content[0] else original)
    scap_nncf.load_pretrained(folder)


def checkpoint_inputs() -> st.SearchStrategy[tuple[str, bytes]]:
    files = _checkpoint()
    description = documents(json.loads(files["checkpoint.json"])).map(lambda content: ("checkpoint.json", content))
    tensors = [name for name in files if name.endswith(".safetensors")]
    tensor_files = st.sampled_from(tensors).flatmap(
        lambda name: damaged(files[name]).map(lambda content: (name, content))
    )
    return description | tensor_files


TARGETS = [
    Target("plan.json", lambda: documents(plan_document()), load_plan),
    Target("statistics.safetensors", statistics_inputs, load_statistics),
    Target("vectors.safetensors", vector_inputs, load_vectors),
    Target("recipe YAML and JSON", recipe_inputs, load_recipe),
    Target("calibrated_thresholds.json", lambda: documents(REFERENCE), load_reference),
    Target("sparsity grammar and files", sparsity_inputs, load_sparsity),
    Target("rt_info of an IR", lambda: documents(plan_document()), load_rt_info),
    Target("checkpoint.json and its tensors", checkpoint_inputs, load_checkpoint),
]

# -- running -----------------------------------------------------------------------------------------------------------

_watch: dict[str, Any] = {"folder": None, "seen": []}
_FORBIDDEN = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watch["folder"] is None:
        return
    if event in _FORBIDDEN:
        _watch["seen"].append(f"{event} {arguments!r:.100}")
    elif event == "open" and isinstance(arguments[0], str) and not arguments[0].endswith((".pyc", ".py")):
        path = os.path.abspath(arguments[0])
        writes = isinstance(arguments[1], str) and any(letter in arguments[1] for letter in "wax+")
        if "outside" in path or (writes and not path.startswith((str(_watch["folder"]), "/dev/"))):
            _watch["seen"].append(f"open {path}")


@cache
def _watching() -> None:
    sys.addaudithook(_audit)


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """What happens inside may not run anything, connect, unpickle or write outside of the folder."""
    _watching()
    _watch.update(folder=folder, seen=[])
    try:
        yield
    finally:
        _watch["folder"] = None
    assert not _watch["seen"], _watch["seen"]


def run(target: Target, examples: int, number: int = 0, derandomize: bool = False) -> Counter[str]:
    """
    Feed a loader; raises what it should not have raised.

    :return: how many inputs were accepted, and refused by which error.
    """
    outcomes: Counter[str] = Counter()

    def one(content: Any) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "folder"
            folder.mkdir()
            (Path(name) / "outside").write_text("nobody may read this")
            try:
                with watched(folder):
                    target.load(content, folder)
                outcomes["accepted"] += 1
            except REFUSALS as error:
                outcomes[type(error).__name__] += 1

    options = settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        derandomize=derandomize,
    )
    test = options(given(target.inputs())(one))
    (test if derandomize else seed(number)(test))()
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1000, help="inputs a loader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="name of one loader")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    rows = []
    for target in TARGETS:
        if options.only not in (None, target.name):
            continue
        start = time.perf_counter()
        outcomes = run(target, options.examples, options.seed)
        row = {
            "loader": target.name,
            "inputs": sum(outcomes.values()),
            "accepted": outcomes.pop("accepted", 0),
            "refused": dict(sorted(outcomes.items())),
            "failures": 0,  # a failure ends the run with its smallest input
            "seconds": round(time.perf_counter() - start, 1),
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
        if options.output is not None:
            command = f"python benchmarks/faults/fuzz_loaders.py --examples {options.examples} --seed {options.seed}"
            data = {"command": command, "scap_nncf": scap_nncf.__version__, "nncf": nncf.__version__, "loaders": rows}
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
