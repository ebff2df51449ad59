# SPDX-License-Identifier: Apache-2.0
"""
The plan: the portable result of a calibration.

A plan says for every site which layers read it, the mode η, and for each layer the threshold τ and the target sparsity.
It is JSON with a schema version; vectors and statistics go into safetensors beside it. A plan made on a PyTorch model
applies to its OpenVINO IR and the other way round. Loading parses data only; nothing in a plan is executed.

Schema 1 is thresholds and modes alone. Schema 2 adds N:M patterns and error mitigation; a plan that has none of these
is still written as schema 1. Vectors are float32 tensors named ``layer name + "/" + kind`` in ``vectors.safetensors``.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import nncf
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from scap_nncf.algorithms import roles
from scap_nncf.algorithms.documents import check_file_entry, parse_json, read_text
from scap_nncf.algorithms.sites import Layer, Site

SCHEMA = "scap-nncf.plan"
SCHEMA_VERSION = 2
PLAN_FILE = "plan.json"
VECTORS_FILE = "vectors.safetensors"
STATISTICS_FILE = "statistics.safetensors"
REFERENCE_FILE = "calibrated_thresholds.json"
MAX_PLAN_BYTES = 64 << 20  # of text; as Python objects it is some 20 times that at worst
_MAX_VECTOR_BYTES = 64 << 30
_MAX_WHOLE = 1 << 31
_PREVIOUS = ".previous"  # a file of the plan that is being replaced
_MAX_FLOAT32 = float(np.finfo(np.float32).max)

PRUNE_POLICIES = ("all", "decode")

#: What a layer may have vectors for, and their shapes; IC and OC are the layer's widths, r is the rank.
#: ``shift``: η of each channel, in place of the site's mode. ``score``: factor of each channel's magnitude where values
#: are ranked. ``scale``: γ, the product is multiplied by 1 + γ. ``bias``: added to the result. ``low_rank_in`` and
#: ``low_rank_out``: A and B, the dropped part of the input times A·B is added to the product.
VECTOR_SHAPES: dict[str, tuple[str, ...]] = {
    "shift": ("IC",),
    "score": ("IC",),
    "scale": ("OC",),
    "bias": ("OC",),
    "low_rank_in": ("IC", "r"),
    "low_rank_out": ("r", "OC"),
}
TOKEN_SHIFTS = ("mean", "median")

Vector = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class LayerPlan:
    """
    What happens at the input of one FC layer.

    :param threshold: τ; values with ``|x − η| <= τ`` are dropped, and a negative τ drops nothing.
    :param sparsity: target sparsity s in [0, 1).
    :param in_features: input channels, or 0 where unknown (plans imported from the reference).
    :param out_features: output channels, or 0 where unknown.
    :param pattern: (N, M): of each M neighbouring input channels the N largest are kept. M = in_features is a top-k of
        the token. The threshold is negative then.
    :param token_shift: ``mean`` or ``median`` of the token's channels, subtracted before values are dropped.
    :param variance: scale what is kept so that its variance over the token's channels is that before dropping.
    :param vectors: kinds of vectors that the plan holds of this layer, see ``VECTOR_SHAPES``.
    """

    name: str
    role: str
    in_features: int
    out_features: int
    threshold: float
    sparsity: float
    pattern: tuple[int, int] | None = None
    token_shift: str | None = None
    variance: bool = False
    vectors: tuple[str, ...] = ()

    @property
    def prunes(self) -> bool:
        """Whether anything can be dropped."""
        return self.pattern is not None or self.threshold >= 0

    @property
    def is_folded(self) -> bool:
        """What there is besides threshold and mode can be folded into a bias: nothing, or a vector that is added."""
        return replace(self, vectors=tuple(kind for kind in self.vectors if kind != "bias")).is_plain

    @property
    def is_plain(self) -> bool:
        """A threshold and the site's mode are all there is."""
        return self.pattern is None and self.token_shift is None and not self.variance and not self.vectors


@dataclass(frozen=True)
class SitePlan:
    """One pruned tensor: its mode η (a scalar), how it was found, and the layers that read it."""

    name: str
    block: int | None
    mode: float
    mode_method: str
    layers: tuple[LayerPlan, ...]


@dataclass(frozen=True)
class Plan:
    """
    :param algorithm: name in the registry of algorithms.
    :param prune: ``all`` prunes every token, ``decode`` only tokens that come alone (the paper's runtime).
    :param made_by: versions, settings and sample counts, for the reader.
    :param statistics: name and SHA-256 of the statistics file beside the plan, if there is one.
    :param vectors: (layer name, kind) → float32 array, for all kinds that the layers name.
    """

    sites: tuple[SitePlan, ...]
    algorithm: str = "scap"
    prune: str = "all"
    made_by: Mapping[str, Any] = field(default_factory=dict)
    statistics: Mapping[str, str] | None = None
    vectors: Mapping[tuple[str, str], Vector] = field(default_factory=dict, repr=False, compare=False)

    @property
    def layers(self) -> tuple[LayerPlan, ...]:
        """All layers, in the order of execution."""
        return tuple(layer for site in self.sites for layer in site.layers)

    def with_prune(self, prune: str) -> Plan:
        """The same plan with another token policy."""
        return replace(self, prune=check_prune(prune))

    def with_vectors(self, vectors: Mapping[tuple[str, str], Vector]) -> Plan:
        """
        The same plan with these vectors beside those that it has; an equal (layer, kind) is replaced.

        :raises nncf.ValidationError: a layer or kind is unknown, or a vector does not fit its layer.
        """
        held = {**self.vectors, **{key: np.ascontiguousarray(v, dtype=np.float32) for key, v in vectors.items()}}
        kinds: dict[str, list[str]] = {}
        for name, kind in held:
            kinds.setdefault(name, []).append(kind)
        unknown = sorted(set(kinds) - {layer.name for layer in self.layers})
        if unknown:
            msg = f"Vectors are given for layers that the plan has not: {', '.join(unknown[:5])}."
            raise nncf.ValidationError(msg)
        sites = tuple(
            replace(site, layers=tuple(replace(x, vectors=tuple(sorted(kinds.get(x.name, ())))) for x in site.layers))
            for site in self.sites
        )
        return replace(self, sites=sites, vectors=held)._checked("the vectors")

    def vectors_of(self, layer: LayerPlan) -> dict[str, Vector]:
        """
        Kind → vector of one layer.

        :raises nncf.ValidationError: the plan came without its vectors.
        """
        missing = [kind for kind in layer.vectors if (layer.name, kind) not in self.vectors]
        if missing:
            msg = (
                f"The plan came without the vectors of {layer.name} ({', '.join(missing)}), which are in "
                f"{VECTORS_FILE} beside {PLAN_FILE}; load the plan from the folder that holds both."
            )
            raise nncf.ValidationError(msg)
        return {kind: self.vectors[layer.name, kind] for kind in layer.vectors}

    def vector_bytes(self) -> bytes:
        """The vectors as safetensors; equal vectors give equal bytes."""
        return save_tensors({f"{name}/{kind}": value for (name, kind), value in sorted(self.vectors.items())})

    def with_vector_bytes(self, content: bytes, source: str) -> Plan:
        """
        The same plan with the vectors that its layers name, from :meth:`vector_bytes`.

        :param source: how to name the content in an error.
        :raises nncf.ValidationError: the content is damaged, or does not fit.
        """
        plan = replace(self, vectors=_parse_vectors(content, source))._checked(source)
        for layer in plan.layers:
            plan.vectors_of(layer)
        return plan

    def _checked(self, source: str) -> Plan:
        """
        :raises nncf.ValidationError: a vector does not fit its layer or is not finite.
        """
        for layer in self.layers:
            sizes = {"IC": layer.in_features, "OC": layer.out_features}
            for kind in layer.vectors:
                if (layer.name, kind) not in self.vectors:
                    continue
                if kind not in VECTOR_SHAPES:
                    msg = f"{source}: unknown kind of vector {kind!r} of {layer.name}."
                    raise nncf.ValidationError(msg)
                vector, names = self.vectors[layer.name, kind], VECTOR_SHAPES[kind]
                wrong = vector.ndim != len(names) or any(
                    sizes.setdefault(name, size) not in (0, size) for name, size in zip(names, vector.shape)
                )
                if wrong or not np.isfinite(vector).all():
                    what = f"has shape {list(vector.shape)}" if wrong else "has NaN or Inf values"
                    shape = ", ".join(str(sizes.get(name, name)) for name in names)
                    msg = f"{source}: {kind} of {layer.name} {what}; expected finite numbers of shape [{shape}]."
                    raise nncf.ValidationError(msg)
        return self

    # -- JSON ----------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The plan as JSON text; equal plans give equal text."""
        data = {"schema": SCHEMA, "schema_version": self._schema(), **asdict(replace(self, vectors={}))}
        if self.statistics is None:
            del data["statistics"]
        del data["vectors"]
        if self.vectors:
            data["vectors"] = {"file": VECTORS_FILE, "sha256": sha256(self.vector_bytes())}
        for layer in (layer for site in data["sites"] for layer in site["layers"]):
            for key in ("pattern", "token_shift", "variance", "vectors"):
                if not layer[key]:
                    del layer[key]
        return json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n"

    def _schema(self) -> int:
        """The oldest schema that says all of this plan."""
        return 1 if self.algorithm == "scap" and all(layer.is_plain for layer in self.layers) else 2

    @classmethod
    def from_json(cls, text: str, source: str = "plan") -> Plan:
        """
        A plan without its vectors; :meth:`load` reads these as well.

        :raises nncf.ValidationError: the text is damaged, of a newer schema, or no plan.
        """
        if len(text) > MAX_PLAN_BYTES:
            msg = f"{source} has {len(text)} characters, more than a plan may have ({MAX_PLAN_BYTES})."
            raise nncf.ValidationError(msg)
        data = parse_json(text, source)
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            msg = f"{source} is not a plan: expected an object with 'schema': '{SCHEMA}'."
            raise nncf.ValidationError(msg)
        version = data.get("schema_version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            msg = f"{source} has schema_version {version!r}, expected a whole number from 1."
            raise nncf.ValidationError(msg)
        if version > SCHEMA_VERSION:
            msg = (
                f"{source} has plan schema {version}, newer than the {SCHEMA_VERSION} this version of scap-nncf reads. "
                "Upgrade scap-nncf."
            )
            raise nncf.UnsupportedVersionError(msg)
        try:
            sites = tuple(_read_site(item) for item in _list(data["sites"]))
            statistics = data.get("statistics")
            if data.get("vectors") is not None:
                check_file_entry(data["vectors"], VECTORS_FILE)
            plan = cls(
                sites=sites,
                algorithm=_text(data["algorithm"]),
                prune=check_prune(_text(data["prune"])),
                made_by=_made_by(data.get("made_by")),
                statistics=None if statistics is None else check_file_entry(statistics, STATISTICS_FILE),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            msg = f"{source} does not follow plan schema {SCHEMA_VERSION}: {error!r}."
            raise nncf.ValidationError(msg) from error
        repeated = sorted(name for name, count in Counter(layer.name for layer in plan.layers).items() if count > 1)
        if repeated:
            msg = f"{source} names layers twice: {', '.join(repeated[:5])}."
            raise nncf.ValidationError(msg)
        return plan

    # -- files ---------------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str], beside: Mapping[str, bytes] | None = None) -> Path:
        """
        Write ``plan.json`` into a folder, and ``vectors.safetensors`` before it where there are vectors. A process that
        is killed in the middle leaves the old plan with its old files, or the new plan with its new ones.

        :param beside: name → content of further files that the plan names with their checksums.
        :return: the path of the file.
        :raises nncf.ValidationError: the folder cannot be written.
        """
        target = Path(folder)
        named = _named_checksums(target / PLAN_FILE)
        kept = []
        written = dict(beside or {})
        if self.vectors:
            written[VECTORS_FILE] = self.vector_bytes()
        for name, content in written.items():
            file, previous = target / name, target / f"{name}{_PREVIOUS}"
            if name in named and file.is_file() and sha256(content) != named[name] == sha256(file.read_bytes()):
                write_atomically(previous, file.read_bytes())  # the present plan needs it until it is replaced
            kept.append(previous)
            write_atomically(file, content)
        file = write_atomically(target / PLAN_FILE, self.to_json().encode())
        for previous in kept:
            previous.unlink(missing_ok=True)
        return file

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """
        Read a plan.

        :param path: a folder with ``plan.json``, such a file, or a ``calibrated_thresholds.json`` of the reference
            implementation.
        :raises nncf.InvalidPathError: there is no such file.
        :raises nncf.ValidationError: the file is no plan, or damaged.
        """
        file = Path(path)
        if file.is_dir():
            candidates = [file / PLAN_FILE, file / REFERENCE_FILE]
            file = next((candidate for candidate in candidates if candidate.is_file()), candidates[0])
        if not file.is_file():
            msg = f"No plan at {file}: expected a folder with {PLAN_FILE}, or the file itself."
            raise nncf.InvalidPathError(msg)
        text = read_text(file, MAX_PLAN_BYTES, "a plan")
        if '"hook_type"' in text and f'"{SCHEMA}"' not in text:
            return cls._from_reference_text(text, str(file))
        plan = cls.from_json(text, str(file))
        if any(layer.vectors for layer in plan.layers):
            plan = replace(plan, vectors=_read_vectors(file, json.loads(text)))._checked(str(file))
            for layer in plan.layers:
                plan.vectors_of(layer)
        return plan

    # -- the reference implementation's format ----------------------------------------------------------------------

    @classmethod
    def from_reference(cls, path: str | os.PathLike[str]) -> Plan:
        """
        Import a ``calibrated_thresholds.json`` of the SCAP reference implementation.

        Layers of one block with the same mode and role up / gate, or q / k / v, become one site. The reference does not
        record shapes, so `in_features` and `out_features` are 0 until the plan is applied to a model. Its files say
        ``demode_method: zero`` beside a non-zero mode; such a site is marked ``imported``.
        """
        return cls._from_reference_text(read_text(path, MAX_PLAN_BYTES, "a plan"), str(path))

    @classmethod
    def _from_reference_text(cls, text: str, source: str) -> Plan:
        try:
            data = parse_json(text, source)
            sites: dict[tuple[Any, ...], SitePlan] = {}
            for name, entry in data.items():
                role = roles.table_role(name) or "fc1"
                mode, threshold = _number(entry["mode"]), _number(entry["threshold"])
                method = _text(entry["demode_method"])
                if mode != 0.0 and method == "zero":
                    method = "imported"
                block = block_index(name)
                stem = "ffn" if role in ("up", "gate") else "attn" if role in ("q", "k", "v") else role
                layer = LayerPlan(name, role, 0, 0, threshold, _sparsity(entry["target_sparsity"]))
                key = (block, stem, mode)
                if key in sites:
                    sites[key] = replace(sites[key], layers=(*sites[key].layers, layer))
                else:
                    sites[key] = SitePlan(name, block, mode, method, (layer,))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            msg = f"{source} is not a calibrated_thresholds.json of the SCAP reference: {error!r}."
            raise nncf.ValidationError(msg) from error
        return cls(tuple(sites.values()), made_by={"imported_from": "SCAP reference implementation"})

    def to_reference(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan in the format of the SCAP reference implementation (``calibrated_thresholds.json``)."""
        data = {
            layer.name: {
                "module_name": layer.name,
                "demode_method": site.mode_method,
                "mode": site.mode,
                "threshold": layer.threshold,
                "target_sparsity": layer.sparsity,
                "hook_type": "pre_hook",
            }
            for site in self.sites
            for layer in site.layers
        }
        return write_atomically(Path(path), (json.dumps(data, indent=2) + "\n").encode())

    # -- fit to a model --------------------------------------------------------------------------------------------

    def bind(self, shapes: Mapping[str, tuple[int, int]]) -> Plan:
        """
        The plan with the model's shapes filled in.

        :param shapes: (in_features, out_features) of every FC layer of the model, by name.
        :raises nncf.ValidationError: a layer of the plan is missing in the model or has another shape; all are named.
        """
        problems: list[str] = []
        sites = []
        for site in self.sites:
            layers = []
            for layer in site.layers:
                if layer.name not in shapes:
                    problems.append(f"{layer.name} is not in the model")
                    continue
                shape = shapes[layer.name]
                if layer.in_features and (layer.in_features, layer.out_features) != shape:
                    problems.append(
                        f"{layer.name} is {layer.in_features}x{layer.out_features} in the plan, "
                        f"{shape[0]}x{shape[1]} in the model"
                    )
                if layer.pattern is not None and shape[0] % layer.pattern[1]:
                    n, m = layer.pattern
                    problems.append(f"{layer.name} has {shape[0]} inputs, which groups of {m} ({n}:{m}) do not divide")
                layers.append(replace(layer, in_features=shape[0], out_features=shape[1]))
            sites.append(replace(site, layers=tuple(layers)))
        if problems:
            shown = "; ".join(problems[:8]) + ("; ..." if len(problems) > 8 else "")
            msg = (
                f"The plan does not fit the model: {len(problems)} of {len(self.layers)} layers differ: {shown}. "
                "Was it made for another model?"
            )
            raise nncf.ValidationError(msg)
        return replace(self, sites=tuple(sites))


def block_index(name: str) -> int | None:
    """Index of the transformer block in a dotted layer name: the first whole number."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def check_prune(value: str) -> str:
    """
    :raises nncf.ValidationError: not a known token policy.
    """
    if value not in PRUNE_POLICIES:
        msg = f"prune must be one of {', '.join(PRUNE_POLICIES)}, got {value!r}."
        raise nncf.ValidationError(msg)
    return value


def to_float32(value: float) -> float:
    """The value as a float32 holds it: kernels and graphs keep thresholds and modes in float32."""
    return float(np.float32(value))


def sites_of(plan: Plan) -> tuple[Site, ...]:
    """The sites of a plan without their numbers."""
    return tuple(
        Site(
            site.name,
            site.block,
            tuple(Layer(layer.name, layer.role, layer.in_features, layer.out_features) for layer in site.layers),
        )
        for site in plan.sites
    )


def write_atomically(path: Path, content: bytes) -> Path:
    """
    Write a file so that it is either the old or the new one, never half of it.

    :raises nncf.ValidationError: the folder cannot be made or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        msg = f"Cannot write {path}: {error.strerror or error}. Choose a folder that can be written."
        raise nncf.ValidationError(msg) from error
    return path


def _named_checksums(file: Path) -> dict[str, str]:
    """Name → SHA-256 of the files that a plan names; empty where there is no plan, or no whole one."""
    try:
        data = parse_json(read_text(file, MAX_PLAN_BYTES, "a plan"), str(file))
        entries = [data[key] for key in ("statistics", "vectors") if isinstance(data.get(key), dict)]
        return {str(entry["file"]): str(entry["sha256"]) for entry in entries}
    except (nncf.ValidationError, KeyError, AttributeError):
        return {}


def read_companion(file: Path, checksum: object, limit: int) -> bytes | None:
    """
    The content of a file that a plan names, where it has the checksum; None where it is damaged or of another plan.

    :raises nncf.ValidationError: it is missing, or has more than `limit` bytes.
    """
    if not file.is_file():
        msg = f"{file}, which the plan needs, is missing; copy the whole folder, or calibrate again."
        raise nncf.ValidationError(msg)
    for candidate in (file, file.with_name(f"{file.name}{_PREVIOUS}")):  # see Plan.save_with
        if not candidate.is_file():
            continue
        if candidate.stat().st_size > limit:
            msg = f"{candidate} has {candidate.stat().st_size} bytes, more than it may have ({limit})."
            raise nncf.ValidationError(msg)
        content = candidate.read_bytes()
        if sha256(content) == checksum:
            return content
    return None


def sha256(content: bytes) -> str:
    """Hexadecimal SHA-256 of the content."""
    return hashlib.sha256(content).hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _read_site(item: Mapping[str, Any]) -> SitePlan:
    block = item["block"]
    layers = tuple(_read_layer(layer) for layer in _list(item["layers"]))
    if not layers:
        msg = f"site {item['name']!r} has no layers"
        raise ValueError(msg)
    return SitePlan(
        _text(item["name"]),
        None if block is None else _whole(block),
        _number(item["mode"]),
        _text(item["mode_method"]),
        layers,
    )


def _read_layer(item: Mapping[str, Any]) -> LayerPlan:
    return LayerPlan(
        _text(item["name"]),
        _text(item["role"]),
        _whole(item["in_features"]),
        _whole(item["out_features"]),
        _number(item["threshold"]),
        _sparsity(item["sparsity"]),
        _pattern(item.get("pattern")),
        _choice(item.get("token_shift"), (None, *TOKEN_SHIFTS)),
        _choice(item.get("variance", False), (False, True)),
        tuple(_choice(kind, tuple(VECTOR_SHAPES)) for kind in _list(item.get("vectors", ()))),
    )


def _read_vectors(file: Path, data: Mapping[str, Any]) -> dict[tuple[str, str], Vector]:
    """
    The vectors beside a plan file.

    :raises nncf.ValidationError: they are missing, damaged or those of another plan.
    """
    described = data.get("vectors") or {}
    path = file.parent / VECTORS_FILE
    content = read_companion(path, described.get("sha256"), _MAX_VECTOR_BYTES)
    if content is None:
        msg = f"{path} is damaged or belongs to another plan than {file}: its SHA-256 differs from the one noted there."
        raise nncf.ValidationError(msg)
    return _parse_vectors(content, str(path))


def _parse_vectors(content: bytes, source: str) -> dict[tuple[str, str], Vector]:
    try:
        tensors = load_tensors(content)
    except (SafetensorError, ValueError, KeyError) as error:
        msg = f"{source} is damaged: {error!r}."
        raise nncf.ValidationError(msg) from error
    found = {}
    for key, value in tensors.items():
        name, _, kind = key.rpartition("/")
        found[name, kind] = value.astype(np.float32)
    return found


def check_pattern(n: int, m: int) -> tuple[int, int]:
    """
    :raises nncf.ValidationError: N:M is no pattern that keeps something and drops something.
    """
    if not 0 < n < m:
        msg = f"A pattern N:M keeps N of each M channels, with 0 < N < M; got {n}:{m}."
        raise nncf.ValidationError(msg)
    return n, m


def _pattern(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    n, m = (_whole(number) for number in _list(value))
    if not 0 < n < m:
        raise ValueError(f"expected a pattern [N, M] with 0 < N < M, got {value!r}")
    return n, m


def _choice(value: Any, choices: tuple[Any, ...]) -> Any:
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        msg = f"expected one of {', '.join(map(repr, choices))}, got {value!r}"
        raise ValueError(msg)
    return value


def _made_by(value: Any) -> dict[str, Any]:
    made_by = {} if value is None else value
    if not isinstance(made_by, Mapping) or not isinstance(made_by.get("settings", {}), Mapping):
        msg = f"expected made_by, and its settings, as objects, got {str(value)[:80]}"
        raise TypeError(msg)
    return dict(made_by)


def _list(value: Any) -> Iterable[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        msg = f"expected a list, got {type(value).__name__}"
        raise TypeError(msg)
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        msg = f"expected text, got {value!r}"
        raise TypeError(msg)
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_WHOLE:
        msg = f"expected a whole number from 0 to {_MAX_WHOLE}, got {str(value)[:80]}"
        raise ValueError(msg)
    return value


def _number(value: Any) -> float:
    # compared, not converted: a JSON number may have any number of digits; NaN compares false
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -_MAX_FLOAT32 <= value <= _MAX_FLOAT32:
        msg = f"expected a finite float32 number, got {str(value)[:80]}"
        raise ValueError(msg)
    return float(value)


def _sparsity(value: Any) -> float:
    number = _number(value)
    if not 0 <= number < 1:
        msg = f"expected a sparsity in [0, 1), got {value!r}"
        raise ValueError(msg)
    return number
