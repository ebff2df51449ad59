# SPDX-License-Identifier: Apache-2.0
"""
Saving and loading PyTorch models that are sparse, quantised by NNCF, or both.

NNCF cannot save a model whose weights it compressed (``nncf.torch.get_config`` refuses the decompressors), so this
module writes the packed weights and the description of each hook. One folder holds everything; the loaded model gives
the same outputs bit for bit. Tensors are safetensors, the rest is JSON: loading executes nothing from the folder.

.. code-block:: python

    scap_nncf.save_pretrained(model, "folder", tokenizer=tokenizer)
    model = scap_nncf.load_pretrained("folder")

====================================  ==================================================================================
``checkpoint.json``                   model class, hooks of NNCF, names that share one tensor
``model.safetensors``                 weights of a model that is not quantised; plain transformers loads it (dense) too
``compressed_model.safetensors``      packed weights and scales of a quantised model; named so that plain transformers,
                                      which would misread it, refuses the folder
``buffers.safetensors``               what is not in a state dict: rotary frequencies, mode*W
``plan.json``, statistics             of a sparse model
``config.json``, tokenizer files      as transformers writes them
====================================  ==================================================================================
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nncf
import torch
from nncf.common.utils.backend import BackendType, get_backend
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from scap_nncf._version import __version__
from scap_nncf.algorithms.backends.torch import function_hooks
from scap_nncf.algorithms.backends.torch.layers import named_fc_layers
from scap_nncf.algorithms.backends.torch.prune import DEPLOYMENT, IN_PLAN
from scap_nncf.algorithms.backends.torch.quantised import foreign_layer
from scap_nncf.algorithms.base import builder_for
from scap_nncf.algorithms.documents import parse_json, read_text
from scap_nncf.algorithms.plan import PLAN_FILE, Plan
from scap_nncf.algorithms.scap.calibration import statistics_of_plan
from scap_nncf.algorithms.scap.controller import get_controller
from scap_nncf.extras import require
from scap_nncf.storage import new_folder

CHECKPOINT_FILE = "checkpoint.json"
SCHEMA = "scap-nncf.checkpoint"
SCHEMA_VERSION = 1

_MAX_DESCRIPTION_BYTES = 64 << 20
# What transformers has itself. It takes the name of a hub repository as well, whose kernels it would fetch and run.
_ATTENTION = (
    None,
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex_attention",
)
_EXPERTS = (None, "eager", "grouped_mm", "batched_mm")
_DENSE_WEIGHTS = "model.safetensors"
_PACKED_WEIGHTS = "compressed_model.safetensors"
_BUFFERS = "buffers.safetensors"
_HOOKS = "__nncf_hooks."  # prefix of NNCF's modules in a state dict
_HOOK_TENSORS = "__hook__."  # prefix of their tensors in our file
_DECOMPRESSORS = (
    "INT8AsymmetricWeightsDecompressor",
    "INT8SymmetricWeightsDecompressor",
    "INT4AsymmetricWeightsDecompressor",
    "INT4SymmetricWeightsDecompressor",
)
_QUANTISERS = (
    "SQMultiply",
    "SymmetricQuantizer",
    "AsymmetricQuantizer",
    "SymmetricLoraQuantizer",
    "AsymmetricLoraQuantizer",
    "SymmetricLoraNLSQuantizer",
    "AsymmetricLoraNLSQuantizer",
)


def save_pretrained(
    model: nn.Module, folder: str | os.PathLike[str], tokenizer: Any = None, *, overwrite: bool = False
) -> Path:
    """
    Save a PyTorch model with what scap-nncf and NNCF did to it.

    :param model: a model after ``nncf.compress``, ``nncf.compress_weights`` or ``nncf.quantize``.
    :param folder: the folder to make; it is complete or not there.
    :param tokenizer: saved into the same folder, where given.
    :param overwrite: replace a folder that this package wrote.
    :return: the folder.
    :raises nncf.ValidationError: the folder is not empty or cannot be written, or the model holds what cannot be saved.
    """
    model = getattr(model, "_orig_mod", model)  # behind torch.compile
    if not isinstance(model, nn.Module) or get_backend(model) != BackendType.TORCH:
        msg = (
            f"save_pretrained takes a PyTorch module, got {type(model).__name__}. An OpenVINO model is saved by "
            "scap_nncf.save_openvino, or by save_pretrained of its optimum class."
        )
        raise nncf.ValidationError(msg)
    if DEPLOYMENT in model.__dict__:
        msg = (
            "The model is deployed: its weights are laid out for kernels. Call scap_nncf.undeploy(model) before saving."
        )
        raise nncf.ValidationError(msg)
    hooks, hook_tensors = _describe_hooks(model)
    weights, aliases = _weights(model)
    buffers = _extra_buffers(model)
    controller = get_controller(model)
    description = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "class": type(model).__name__,
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
        "trainable": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "aliases": aliases,
        "hooks": hooks,
        "input_scales": function_hooks.resolve(model) if controller is not None else {},
        "made_by": {"scap_nncf": __version__, "nncf": nncf.__version__, "torch": torch.__version__},
    }
    with new_folder(folder, overwrite) as temporary:
        _save_config(model, temporary)
        weights_file = _PACKED_WEIGHTS if hooks else _DENSE_WEIGHTS
        save_file({**weights, **hook_tensors}, temporary / weights_file, metadata={"format": "pt"})
        save_file(buffers, temporary / _BUFFERS, metadata={"format": "pt"})
        if controller is not None:
            controller.save(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        text = json.dumps(description, indent=1, sort_keys=True) + "\n"
        (temporary / CHECKPOINT_FILE).write_text(text, encoding="utf-8")
    return Path(folder).expanduser()


def load_pretrained(
    folder: str | os.PathLike[str], model: nn.Module | None = None, device: torch.device | str = "cpu"
) -> Any:
    """
    Load what :func:`save_pretrained` saved: the same outputs bit for bit on the same device.

    :param folder: the folder; a tokenizer in it is loaded by ``transformers.AutoTokenizer.from_pretrained(folder)``.
    :param model: a model of the same architecture to load into, in place; default: made from ``config.json`` by the
        transformers class that was saved.
    :param device: where to put the model.
    :return: the model in evaluation mode, sparse and quantised as it was.
    :raises nncf.InvalidPathError: there is no checkpoint.
    :raises nncf.ValidationError: the checkpoint is damaged or belongs to another architecture.
    :raises nncf.UnsupportedVersionError: it was made by a newer version.
    """
    path = Path(folder).expanduser()
    description = _read_description(path)
    weights_file = path / (_PACKED_WEIGHTS if description["hooks"] else _DENSE_WEIGHTS)
    tensors = _read_tensors(weights_file)
    buffers = _read_tensors(path / _BUFFERS)
    hook_tensors = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_HOOK_TENSORS)}
    tensors.update({alias: tensors[name] for alias, name in description["aliases"].items() if name in tensors})
    if model is None:
        model = _from_config(path, description)
    packed = _packed_parameters(description)
    _assign(model, tensors, packed, set(description["trainable"]), weights_file)
    _insert_hooks(model, description["hooks"], hook_tensors, weights_file)
    if description["input_scales"]:
        function_hooks.keep(model, description["input_scales"])
    if (path / PLAN_FILE).is_file():
        plan = Plan.load(path)
        model = builder_for(plan.algorithm, {}).build_from_plan(model, plan, statistics_of_plan(path, plan))
    _assign_buffers(model, buffers, path / _BUFFERS)
    assert model is not None
    return model.to(device).eval()


# -- what is in a model ------------------------------------------------------------------------------------------------


def _weights(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors of the state dict without NNCF's, each once, and the other names of those that are shared."""
    _refuse_foreign(model)
    first: dict[Any, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    for name, value in model.state_dict().items():
        if name.startswith(_HOOKS):
            continue
        if not isinstance(value, torch.Tensor):
            msg = f"{name} is {type(value).__name__} in the model's state dict; only tensors can be saved."
            raise nncf.ValidationError(msg)
        if name in aliases:
            continue
        identity = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
        if value.numel() and identity in first:
            aliases[name] = first[identity]
            continue
        first[identity] = name
        tensors[name] = _plain(name, value)
    return tensors, aliases


def _refuse_foreign(model: nn.Module) -> None:
    for name, module, _ in named_fc_layers(model):
        kind = foreign_layer(module)
        if kind is not None:
            msg = (
                f"{name} is of another toolkit ({kind}), whose format cannot be saved here. Save the dense-quantised "
                "model by that toolkit's own means and the plan by scap_nncf.get_controller(model).save(folder); then "
                "load the model with the toolkit and call nncf.compress(model, plan=folder)."
            )
            raise nncf.ValidationError(msg)
    for name, parameter in model.named_parameters():
        if not name.startswith(_HOOKS) and type(parameter) is not nn.Parameter:
            msg = (
                f"{name} is a {type(parameter).__name__}: another toolkit quantised the weights. Save the model by "
                "that toolkit's own means, and the plan by scap_nncf.get_controller(model).save(folder)."
            )
            raise nncf.ValidationError(msg)


def _extra_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that a state dict leaves out; rotary frequencies in another dtype would change the outputs."""
    saved = set(model.state_dict())
    return {
        name: _plain(name, buffer)
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if name not in saved and not name.startswith(_HOOKS) and name.rpartition(".")[2] not in IN_PLAN
    }


def _plain(name: str, value: torch.Tensor) -> torch.Tensor:
    if value.device.type == "meta":
        msg = f"{name} is on the meta device: it has no values to save. Load the weights first."
        raise nncf.ValidationError(msg)
    # a copy: tensors that overlap in memory cannot be written
    return value.detach().to("cpu", copy=value.untyped_storage().nbytes() != value.nbytes).contiguous()


def _describe_hooks(model: nn.Module) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """NNCF's hooks as JSON and tensors; one entry a module, which may hang in several places."""
    from nncf.torch.function_hook.wrapper import get_hook_storage, is_wrapped

    if not is_wrapped(model):
        return [], {}
    places: dict[nn.Module, list[str]] = {}
    for name, hook in get_hook_storage(model).named_hooks(remove_duplicate=False):
        places.setdefault(hook, []).append(name)
    entries: list[dict[str, Any]] = []
    tensors: dict[str, torch.Tensor] = {}
    for index, (hook, names) in enumerate(places.items()):
        kind = type(hook).__name__
        config: dict[str, Any]
        if kind in _DECOMPRESSORS:
            config = {
                "result_dtype": _dtype_name(getattr(hook, "result_dtype", None)),
                **{
                    key: None if getattr(hook, key) is None else list(getattr(hook, key))
                    for key in ("zero_point_shape", "compressed_weight_shape", "result_shape")
                    if hasattr(hook, key)
                },
            }
        elif kind in _QUANTISERS:
            config = hook.get_config()  # type: ignore[operator]
        else:
            known = ", ".join(_DECOMPRESSORS + _QUANTISERS)
            msg = f"NNCF's hook {kind} at {names[0]} cannot be saved; these can: {known}."
            raise nncf.ValidationError(msg)
        entries.append({"class": kind, "names": names, "config": config})
        for key, value in hook.state_dict().items():
            tensors[f"{_HOOK_TENSORS}{index}.{key}"] = _plain(key, value).clone()
    return entries, tensors


def _save_config(model: nn.Module, folder: Path) -> None:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "save_pretrained"):
        return  # no transformers model: load_pretrained(folder, model=...) takes one that the user made
    config = copy.deepcopy(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)


# -- making it again ---------------------------------------------------------------------------------------------------


def _read_description(folder: Path) -> dict[str, Any]:
    file = folder / CHECKPOINT_FILE
    if not file.is_file():
        msg = f"No checkpoint at {folder}: expected a folder made by scap_nncf.save_pretrained, with {CHECKPOINT_FILE}."
        raise nncf.InvalidPathError(msg)
    data = parse_json(read_text(file, _MAX_DESCRIPTION_BYTES, "a checkpoint's description"), str(file))
    try:
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema is {str(data['schema'])[:80]!r}, expected {SCHEMA!r}")
        version = int(data["schema_version"])
        if version > SCHEMA_VERSION:
            msg = f"{file} has schema {version}, newer than the {SCHEMA_VERSION} read here. Upgrade scap-nncf."
            raise nncf.UnsupportedVersionError(msg)
        for key, kind in (
            ("class", str),
            ("trainable", list),
            ("aliases", dict),
            ("hooks", list),
            ("input_scales", dict),
        ):
            if not isinstance(data[key], kind):
                raise TypeError(f"{key} is {type(data[key]).__name__}, expected {kind.__name__}")
        for hook in data["hooks"]:
            if hook["class"] not in _DECOMPRESSORS + _QUANTISERS or not isinstance(hook["config"], dict):
                raise ValueError(f"unknown hook {hook['class']!r}")
            if not hook["names"] or not all(isinstance(name, str) for name in hook["names"]):
                raise ValueError(f"hook {hook['class']} has no place")
        texts = [data["class"], *data["trainable"], *data["aliases"], *data["aliases"].values()]
        texts += data["input_scales"].values()
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("names of tensors and classes must be texts")
        if data.get("attention") not in _ATTENTION:
            raise ValueError(f"attention is {str(data['attention'])[:80]!r}, expected one of {_ATTENTION}")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        msg = f"{file} is damaged or no checkpoint of scap-nncf: {error!r}."
        raise nncf.ValidationError(msg) from error
    return data


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    if not file.is_file():
        msg = f"{file} is missing; copy the whole folder."
        raise nncf.ValidationError(msg)
    try:
        return load_file(file)
    except (SafetensorError, ValueError, OSError) as error:
        msg = f"{file} is damaged: {error}."
        raise nncf.ValidationError(msg) from error


def _from_config(folder: Path, description: Mapping[str, Any]) -> nn.Module:
    transformers = require("transformers", "transformers", "loading a saved model")
    kind = getattr(transformers, description["class"], None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        msg = (
            f"{description['class']} is no model class of transformers {transformers.__version__}; make the model "
            "yourself and pass it: load_pretrained(folder, model=...)."
        )
        raise nncf.ValidationError(msg)
    try:
        made_by: Callable[..., Any] = kind._from_config  # type: ignore[attr-defined]
        # without a word on trust transformers would ask on the terminal whether to run code of the folder
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        _refuse_kernels(config)
        options = {"attn_implementation": description["attention"]} if description.get("attention") else {}
        try:
            with _parameters_on_meta():
                model = made_by(config, **options)
        except (RuntimeError, NotImplementedError):  # a model that computes with its weights while it is made
            model = made_by(config, **options)
        if (folder / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # what a model class does with a config that is not its own, it does in any way
        msg = f"{folder}: {description['class']} cannot be made from its config.json: {error}"
        raise nncf.ValidationError(msg) from error
    model.config._name_or_path = str(folder)
    return model


def _refuse_kernels(config: Any) -> None:
    """A config.json may name an implementation, too; only those of transformers itself are taken."""
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ())]
    for part in parts:
        attention = getattr(part, "_attn_implementation", None)
        experts = getattr(part, "_experts_implementation", None)
        if attention not in _ATTENTION or experts not in _EXPERTS:
            msg = f"the implementation {attention or experts!r} is not one of transformers itself"
            raise ValueError(msg)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters without memory or initialisation; buffers, which are computed when a model is made, are real."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.data.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _packed_parameters(description: Mapping[str, Any]) -> set[str]:
    """Names of the parameters that a decompressor unpacks: their shape and dtype are not the model's."""
    from nncf.torch.function_hook.hook_storage import decode_hook_name

    try:
        packed = {
            decode_hook_name(name)[1]
            for hook in description["hooks"]
            if hook["class"] in _DECOMPRESSORS
            for name in hook["names"]
        }
    except ValueError as error:
        raise _damaged(CHECKPOINT_FILE, error) from error
    groups: dict[str, set[str]] = {}
    for alias, name in description["aliases"].items():
        groups.setdefault(name, {name}).add(alias)
    return packed.union(*(group for group in groups.values() if group & packed))


def _assign(
    model: nn.Module, tensors: dict[str, torch.Tensor], packed: set[str], trainable: set[str], source: Path
) -> None:
    expected = {name: value for name, value in model.state_dict().items() if not name.startswith(_HOOKS)}
    missing, unknown = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    other = [
        f"{name} is {list(tensors[name].shape)}, the model has {list(value.shape)}"
        for name, value in expected.items()
        if name in tensors and name not in packed and value.shape != tensors[name].shape
    ]
    if missing or unknown or other:
        parts = [
            f"{len(missing)} tensors of the model are missing ({', '.join(missing[:3])})" if missing else "",
            f"{len(unknown)} are not in the model ({', '.join(unknown[:3])})" if unknown else "",
            f"{len(other)} have another shape ({'; '.join(other[:3])})" if other else "",
        ]
        msg = f"{source} does not fit {type(model).__name__}: {', '.join(part for part in parts if part)}."
        raise nncf.ValidationError(msg)
    made: dict[int, nn.Parameter] = {}  # tied names get one parameter
    for name in expected:
        value = tensors[name]
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        if attribute in module._parameters:
            if id(value) not in made:
                made[id(value)] = nn.Parameter(value, requires_grad=name in trainable and value.is_floating_point())
            module._parameters[attribute] = made[id(value)]
        else:
            module._buffers[attribute] = value


def _insert_hooks(model: nn.Module, entries: list[Any], tensors: dict[str, torch.Tensor], source: Path) -> None:
    if not entries:
        return
    from nncf.torch.function_hook.wrapper import get_hook_storage, wrap_model

    wrap_model(model)
    storage = get_hook_storage(model)
    for index, entry in enumerate(entries):
        prefix = f"{_HOOK_TENSORS}{index}."
        state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        try:
            hook = _make_hook(entry["class"], entry["config"], state)
            for name in entry["names"]:
                storage.insert_hook_by_name(name, hook)
        except (KeyError, TypeError, ValueError, RuntimeError, nncf.InternalError) as error:
            raise _damaged(source, error) from error


def _make_hook(kind: str, config: Mapping[str, Any], state: dict[str, torch.Tensor]) -> nn.Module:
    from nncf.torch.quantization import layers
    from nncf.torch.quantization.quantize_functions import unpack_uint4

    make = getattr(layers, kind)
    _check_sizes(config, state)
    if kind in _QUANTISERS:
        hook = make.from_config(config)
        hook.load_state_dict(state)
        return hook
    arguments: dict[str, Any] = {"scale": state["_scale"], "result_dtype": _dtype(config["result_dtype"])}
    if "INT4" in kind:
        arguments["compressed_weight_shape"] = torch.Size(config["compressed_weight_shape"])
        shape = config["result_shape"]
        arguments["result_shape"] = None if shape is None else torch.Size(shape)
    if "Asymmetric" in kind:
        zero_point = state["_zero_point"]
        if "INT4" in kind:  # the decompressor packs what it is given
            zero_point = unpack_uint4(zero_point).reshape(config["zero_point_shape"])
        arguments["zero_point"] = zero_point
    return make(**arguments)


def _check_sizes(config: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> None:
    """A quantiser allocates by its description, before its tensors come: the two must agree in size."""
    held = sum(tensor.numel() for tensor in state.values())
    described = {**config, **config.get("qspec", {}), **config.get("lspec", {})}
    for key in ("scale_shape", "zero_point_shape", "orig_weight_shape"):
        sizes = described.get(key)
        if sizes is None:
            continue
        rank = described.get("lora_rank", 1)
        numbers = [*sizes, rank] if isinstance(sizes, list) else [None]
        if not all(type(number) is int and 0 <= number <= 1 << 31 for number in numbers):
            raise ValueError(f"{key} is no shape: {str(sizes)[:80]}")
        # adapters are [rank, in] and [out, rank]; packed zero points hold two values in a byte
        needs = rank * sum(sizes) if key == "orig_weight_shape" else math.prod(sizes)
        if needs > 2 * held:
            raise ValueError(f"{key} {sizes} asks for {needs} values, the file has {held}")


def _assign_buffers(model: nn.Module, buffers: dict[str, torch.Tensor], source: Path) -> None:
    for name, value in buffers.items():
        owner, _, attribute = name.rpartition(".")
        try:
            existing = model.get_submodule(owner)._buffers[attribute]
            if existing is not None and existing.shape != value.shape:
                raise ValueError(f"{name} is {list(value.shape)}, the model has {list(existing.shape)}")
        except (AttributeError, KeyError, ValueError) as error:
            msg = f"{source} does not fit {type(model).__name__}: {error}."
            raise nncf.ValidationError(msg) from error
        model.get_submodule(owner)._buffers[attribute] = value


def _dtype_name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"unknown dtype {name!r}")
    return dtype


def _damaged(source: Path | str, error: Exception) -> nncf.ValidationError:
    return nncf.ValidationError(f"{source} is damaged: {error!r}.")
