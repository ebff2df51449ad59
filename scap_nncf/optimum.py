# SPDX-License-Identifier: Apache-2.0
"""
Optimum-Intel pipelines with activation sparsity.

.. code-block:: python

    from optimum.intel import OVWeightQuantizationConfig
    import scap_nncf
    from scap_nncf.optimum import from_pretrained, save_pretrained

    model = from_pretrained(
        "org/name",
        quantization_config=OVWeightQuantizationConfig(bits=4, group_size=64),
        algorithm=scap_nncf.Scap(sparsity=0.4),
        dataset=texts,
    )
    model.generate(...)
    save_pretrained(model, "folder")
    model = from_pretrained("folder")  # sparse and quantised as it was; OVModelForCausalLM loads it too

Optimum's configuration classes are a closed set, so the settings of the sparsity are not in ``openvino_config.json``:
they are in the IR itself (``rt_info``) and in ``plan.json``. This module leans on parts of optimum-intel that are not
documented (how a configuration is applied, how a graph is replaced), hence the narrow range of versions in setup.cfg.
"""

from __future__ import annotations

import os
import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nncf

from scap_nncf import deploy_openvino
from scap_nncf.algorithms.backends import is_optimum_model
from scap_nncf.algorithms.plan import Plan
from scap_nncf.algorithms.scap.config import Scap
from scap_nncf.algorithms.scap.controller import get_controller
from scap_nncf.compress import compress
from scap_nncf.extras import require
from scap_nncf.openvino_io import MODEL_FILE, attach_statistics, load_openvino
from scap_nncf.storage import check_target, new_folder

_PURPOSE = "Optimum-Intel pipelines"

#: How the name of a transformers class ends → Optimum's task. Optimum asks the hub, and has no answer for folders.
_TASKS = (
    ("ForCausalLM", "text-generation-with-past"),
    ("LMHeadModel", "text-generation-with-past"),
    ("ForImageClassification", "image-classification"),
    ("ForSequenceClassification", "text-classification"),
    ("ForTokenClassification", "token-classification"),
    ("ForQuestionAnswering", "question-answering"),
    ("ForMaskedLM", "fill-mask"),
    ("ForAudioClassification", "audio-classification"),
    ("ForConditionalGeneration", "text2text-generation-with-past"),
    ("Model", "feature-extraction"),
)
_IMAGE_TASKS = ("image-classification",)
#: One of these makes a tokenizer.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "vocab.json",
)


def from_pretrained(
    ref: str | os.PathLike[str],
    *,
    algorithm: Any = None,
    dataset: Any = None,
    plan: Plan | str | os.PathLike[str] | None = None,
    task: str | None = None,
    quantization_config: Any = None,
    tokenizer: Any = None,
    **options: Any,
) -> Any:
    """
    A model object of Optimum-Intel, quantised and sparse, from a hub id or a folder.

    :param ref: a hub id, a folder with a PyTorch model or with OpenVINO IR (exported by Optimum or by this package,
        quantised or not), or ``demo``.
    :param algorithm: what ``nncf.compress`` takes: :class:`scap_nncf.Scap`, a list of steps, a recipe file. None adds
        no sparsity; a model that is sparse already stays so.
    :param dataset: calibration data: texts (the model's tokenizer is used), or what :func:`scap_nncf.compress` takes.
    :param plan: a plan to apply instead of calibrating.
    :param task: Optimum's name of the task, such as ``text-generation``, ``feature-extraction`` or
        ``image-classification``; None finds it from the model's configuration.
    :param quantization_config: a configuration of Optimum-Intel, such as ``OVWeightQuantizationConfig``, or a dict. It
        is applied before the sparsity.
    :param tokenizer: the tokenizer of `dataset` and `quantization_config`; None takes that of the model.
    :param options: passed to ``from_pretrained`` of the Optimum class (``ov_config``, ``device``, ``compile`` ...).
    :return: an instance of ``OVModelForCausalLM`` or the class of the task, not compiled yet.
    :raises nncf.ValidationError: there is no model or tokenizer, the data does not fit, or the model is sparse already.
    :raises MissingExtraError: optimum-intel is not installed.
    """
    intel = require("optimum.intel", "optimum", _PURPOSE)
    require("openvino", "optimum", _PURPOSE)
    ref = _resolve(ref)
    kind = getattr(intel, class_name(task or task_of(ref, options)))
    compile_at_once = options.pop("compile", False)
    if Path(ref).is_dir() and "file_name" not in options:
        # Optimum cannot tell by itself when it is offline
        options.setdefault("export", not any(Path(ref).rglob("openvino*model.xml")))
    runs = True
    if deploy_openvino.holds_operation(Path(ref) / MODEL_FILE):
        runs = deploy_openvino.teach(require("optimum.intel.openvino.modeling_base", "optimum", _PURPOSE).core)
    try:
        model = kind.from_pretrained(ref, quantization_config=quantization_config, compile=False, **options)
    except (OSError, ValueError, KeyError) as error:
        msg = f"Optimum-Intel cannot load {ref} as {kind.__name__}: {error}"
        raise nncf.ValidationError(msg) from error
    deploy_openvino.stock_if_untaught(model, runs)
    if Path(ref).is_dir():
        attach_statistics(model, ref)
    if algorithm is not None or plan is not None:
        if plan is None and tokenizer is None and _holds_texts(dataset):
            tokenizer = tokenizer_of(ref)
        model = compress(
            model, algorithm if algorithm is not None else "scap", dataset=dataset, plan=plan, tokenizer=tokenizer
        )
    if compile_at_once:
        model.compile()
    return model


def save_pretrained(
    model: Any, folder: str | os.PathLike[str], tokenizer: Any = None, *, overwrite: bool = False
) -> Path:
    """
    Save a model object of Optimum-Intel with its plan and calibration statistics.

    ``model.save_pretrained`` of Optimum saves a model that prunes the same; the statistics, with which the sparsity can
    be changed later, would be lost.

    :param tokenizer: a tokenizer or image processor to save with it, and for a tokenizer its OpenVINO models.
    :param overwrite: replace a folder that this package wrote.
    :return: the folder; it is complete or not there.
    :raises nncf.ValidationError: no model object of Optimum-Intel, or the folder is not empty or cannot be written.
    """
    if not is_optimum_model(model):
        msg = f"expected a model object of Optimum-Intel, got {type(model).__name__}."
        raise nncf.ValidationError(msg)
    controller = get_controller(model)
    with new_folder(folder, overwrite) as temporary:
        model.save_pretrained(temporary)
        if controller is not None:
            controller.save(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
            from transformers import PreTrainedTokenizerBase

            if isinstance(tokenizer, PreTrainedTokenizerBase):
                convert = require("optimum.exporters.openvino.convert", "optimum", _PURPOSE)
                convert.export_tokenizer(tokenizer, temporary, task=getattr(model, "export_feature", None))
    return Path(folder)


class OVSparsifier:
    """
    Activation sparsity in the manner of ``optimum.intel.OVQuantizer``.

    .. code-block:: python

        model = OVModelForCausalLM.from_pretrained("org/name", export=True, load_in_8bit=True)
        OVSparsifier.from_pretrained(model, tokenizer).sparsify(Scap(sparsity=0.4), texts, save_directory="folder")

    :param model: a model object of Optimum-Intel; it is changed in place.
    :param tokenizer: for calibration on texts, and saved with the model.
    """

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        if not is_optimum_model(model):
            msg = f"OVSparsifier takes a model object of Optimum-Intel, got {type(model).__name__}."
            raise nncf.ValidationError(msg)
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, model: Any, tokenizer: Any = None) -> OVSparsifier:
        """The sparsifier of a model object."""
        return cls(model, tokenizer)

    def sparsify(
        self,
        algorithm: Any = None,
        calibration_dataset: Any = None,
        *,
        plan: Plan | str | os.PathLike[str] | None = None,
        save_directory: str | os.PathLike[str] | None = None,
    ) -> Any:
        """
        Calibrate and prune, or apply a plan.

        :param algorithm: default: ``Scap()``, 50 % of every layer.
        :param save_directory: save the result there, see :func:`save_pretrained`.
        :return: the model.
        """
        if save_directory is not None:
            check_target(save_directory)  # not after minutes of calibration
        steps = "scap" if algorithm is None else algorithm
        compress(self.model, steps, dataset=calibration_dataset, plan=plan, tokenizer=self.tokenizer)
        if save_directory is not None:
            save_pretrained(self.model, save_directory, self.tokenizer)
        return self.model


def export(
    ref: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    algorithm: Any = None,
    dataset: Any = None,
    plan: Plan | str | os.PathLike[str] | None = None,
    task: str | None = None,
    arguments: Sequence[str] = (),
    overwrite: bool = False,
    runtime: str = "any",
) -> Path:
    """
    What ``optimum-cli export openvino`` does, then calibration of the resulting IR and pruning.

    :param ref: hub id, folder of a PyTorch model or of OpenVINO IR (which is taken as it is, quantised or not), or
        ``demo``.
    :param folder: where to write; it is complete or not there.
    :param algorithm: default: ``Scap()``, 50 % of every layer.
    :param dataset: calibration data; texts need the tokenizer that comes with the model.
    :param plan: a plan to apply instead of calibrating.
    :param task: Optimum's name of the task; None finds it.
    :param arguments: flags of ``optimum-cli export openvino``, such as ``["--weight-format", "int4"]``.
    :param runtime: ``any`` writes plain operations; ``cpu`` the operation that skips weights, see
        :func:`scap_nncf.deploy`.
    :return: the folder.
    """
    parser = ArgumentParser()
    require("optimum.commands.export.openvino", "optimum", _PURPOSE).parse_args_openvino(parser)
    given = parser.parse_args(["--model", str(ref), *arguments, str(folder)])
    if task is not None:
        given.task = task

    def data(_folder: Path, _task: str) -> tuple[Any, Any]:
        return dataset, tokenizer_of(_folder) if _holds_texts(dataset) else None

    return export_arguments(given, Scap() if algorithm is None else algorithm, data, plan, overwrite, runtime)


def export_arguments(
    given: Namespace, algorithm: Any, data: Any, plan: Any, overwrite: bool, runtime: str = "any"
) -> Path:
    """
    The export behind :func:`export` and the commands.

    :param given: parsed flags of ``optimum-cli export openvino``.
    :param data: called with the folder of the exported model and the task; returns the calibration data, and a
        tokenizer where it holds texts.
    """
    command = require("optimum.commands.export.openvino", "optimum", _PURPOSE).OVExportCommand
    target = Path(given.output)
    check_target(target, overwrite)
    if plan is not None:  # not after minutes of export
        from scap_nncf.algorithms.backends.openvino.prune import check_plan

        check_plan(plan if isinstance(plan, Plan) else Plan.load(plan))
    given = Namespace(**vars(given))
    given.model = _resolve(given.model)
    source = Path(given.model)
    without_tokenizer = source.is_dir() and not _has_tokenizer(source)
    if given.task == "auto":
        given.task = task_of(given.model, {"trust_remote_code": given.trust_remote_code, "cache_dir": given.cache_dir})
    if (source / MODEL_FILE).is_file():
        _refuse_quantisation(given)
        with new_folder(target, overwrite) as partial:
            shutil.copytree(source, partial, dirs_exist_ok=True)
            _sparsify_folder(partial, algorithm, data, plan, given.task, runtime)
        return target
    with new_folder(target, overwrite) as partial:
        given.output = partial
        parser = ArgumentParser()
        try:
            command(None, given, from_defaults_factory=True, parser=parser).run()
        except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
            if isinstance(error, (nncf.ValidationError, nncf.InvalidGroupSizeError)):
                raise
            msg = f"Optimum-Intel cannot export {given.model}: {type(error).__name__}: {error}"
            raise nncf.UnsupportedModelError(msg) from error
        if without_tokenizer:
            _remove_tokenizer(partial)
        _sparsify_folder(partial, algorithm, data, plan, given.task, runtime)
    return target


def _refuse_quantisation(given: Namespace) -> None:
    """
    :raises nncf.ParameterNotSupportedError: flags that say how to export or quantise, for a model that is IR already.
    """
    openvino_command = require("optimum.commands.export.openvino", "optimum", _PURPOSE)
    flags = {"--weight-format": given.weight_format, "--quant-mode": given.quant_mode}
    named = [name for name, value in flags.items() if value is not None]
    if named or not openvino_command.no_compression_parameter_provided(given):
        msg = (
            f"{given.model} holds an OpenVINO model, whose weights are taken as they are; leave out "
            f"{', '.join(named) or 'the settings of a quantisation'}. To quantise it first, use a recipe in Python: "
            "nncf.compress(ir, algorithm=[WeightCompression(...), Scap(...)], dataset=dataset)."
        )
        raise nncf.ParameterNotSupportedError(msg)


def _sparsify_folder(folder: Path, algorithm: Any, data: Any, plan: Any, task: str, runtime: str) -> None:
    """Make the dense IR in a folder that is ours alone a sparse one."""
    import openvino

    if not (folder / MODEL_FILE).is_file():
        parts = ", ".join(sorted(path.name for path in folder.glob("openvino_*.xml")))
        msg = f"Optimum exports this model in parts ({parts}); pruning is put into models of one part only."
        raise nncf.ParameterNotSupportedError(msg)
    ir = load_openvino(folder)
    if plan is not None:
        sparse = compress(ir, plan=plan)
    else:
        dataset, tokenizer = data(folder, task)
        sparse = compress(ir, algorithm, dataset=dataset, tokenizer=tokenizer)
    controller = get_controller(sparse)
    if runtime == "cpu":
        deploy_openvino.deploy_ir(sparse)
    openvino.save_model(sparse, folder / "sparse.xml", compress_to_fp16=False)
    if controller is not None:
        controller.save(folder)
    del ir, sparse, controller  # the weights are mapped from the file that goes
    for suffix in (".xml", ".bin"):
        (folder / f"sparse{suffix}").replace((folder / MODEL_FILE).with_suffix(suffix))


# -- what a reference is -----------------------------------------------------------------------------------------------


def task_of(ref: str | os.PathLike[str], options: Any = None) -> str:
    """
    Optimum's task of a model, from the class in its configuration.

    :raises nncf.ValidationError: there is no configuration, or its class tells nothing.
    """
    transformers = require("transformers", "optimum", _PURPOSE)
    known = {k: v for k, v in (options or {}).items() if k in ("trust_remote_code", "cache_dir", "revision", "token")}
    try:
        config = transformers.AutoConfig.from_pretrained(str(ref), **known)
    except (OSError, ValueError, KeyError) as error:
        msg = f"{ref} is no model: {error}"
        raise nncf.ValidationError(msg) from error
    names = list(getattr(config, "architectures", None) or [])
    for name in names:
        for suffix, task in _TASKS:
            if name.endswith(suffix):
                return task
    msg = (
        f"The task of {ref} cannot be told from its configuration (architectures: {names or 'none'}); give it as task."
    )
    raise nncf.ValidationError(msg)


def class_name(task: str) -> str:
    """
    The Optimum class of a task.

    :raises nncf.ParameterNotSupportedError: unknown task.
    """
    classes = require("optimum.intel.openvino.utils", "optimum", _PURPOSE)._HEAD_TO_AUTOMODELS
    plain = task.removesuffix("-with-past")
    if plain not in classes:
        msg = f"Unknown task {task!r}; there are {', '.join(sorted(classes))}."
        raise nncf.ParameterNotSupportedError(msg)
    return str(classes[plain])


def _resolve(ref: str | os.PathLike[str]) -> str:
    if str(ref) == "demo":
        from scap_nncf.models import demo_model_folder

        return str(demo_model_folder())
    return str(Path(ref).expanduser()) if Path(ref).expanduser().exists() else str(ref)


def _holds_texts(dataset: Any) -> bool:
    if isinstance(dataset, nncf.Dataset) or not isinstance(dataset, Sequence) or not dataset:
        return False
    first = dataset[0]
    return isinstance(first, str) or (isinstance(first, dict) and isinstance(first.get("text"), str))


def tokenizer_of(ref: str | os.PathLike[str]) -> Any:
    """
    The tokenizer of a model.

    :raises nncf.ValidationError: there is none.
    """
    transformers = require("transformers", "optimum", _PURPOSE)
    folder = Path(ref)
    try:
        if folder.is_dir() and not _has_tokenizer(folder):  # transformers would make up an empty one
            raise OSError("the folder has no tokenizer.json or other file of a tokenizer")
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(ref))
        if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):  # made up earlier, and saved
            raise OSError("it has no words beyond special tokens; the model came without a tokenizer")
        return tokenizer
    except (OSError, ValueError, KeyError) as error:
        msg = f"Calibration on text needs the tokenizer of {ref}, which cannot be loaded: {error}"
        raise nncf.ValidationError(msg) from error


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_FILES) or any(folder.glob("*.tiktoken"))


def _remove_tokenizer(folder: Path) -> None:
    """Of a model without one, Optimum saves the empty tokenizer that transformers makes up from the configuration."""
    for pattern in (*_TOKENIZER_FILES, "special_tokens_map.json", "openvino_tokenizer.*", "openvino_detokenizer.*"):
        for file in folder.glob(pattern):
            file.unlink()


def text_samples(folder: Path, texts: Sequence[str], length: int, samples: int, seed: int) -> list[Any]:
    """Token batches for an exported model; no longer than its tokenizer allows."""
    from scap_nncf.text import token_batches

    tokenizer = tokenizer_of(folder)
    limit = getattr(tokenizer, "model_max_length", None) or length
    return token_batches(tokenizer, texts, min(length, limit), None, seed)[:samples]


def image_samples(folder: Path, images: Path, samples: int) -> list[Any]:
    """
    Pixel values of the images in a folder, prepared as the model wants them.

    :raises nncf.ValidationError: no images, or the model has no image processor.
    """
    transformers = require("transformers", "optimum", _PURPOSE)
    image = require("PIL.Image", "optimum", "calibration on images")
    if not images.is_dir():
        msg = f"An image model is calibrated on images: --calibration is {images}, expected a folder of images."
        raise nncf.ValidationError(msg)
    files = sorted(p for p in images.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".bmp", ".webp"))
    if not files:
        msg = f"{images} holds no image (.jpg, .png, .bmp, .webp)."
        raise nncf.ValidationError(msg)
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        msg = f"The model came without an image processor (preprocessor_config.json): {error}"
        raise nncf.ValidationError(msg) from error
    batch = []
    for file in files[:samples]:
        with image.open(file) as picture:
            batch.append(dict(processor(picture.convert("RGB"), return_tensors="pt")))
    return batch


def default_data(
    folder: Path, task: str, calibration: str, field: str, length: int, samples: int, seed: int
) -> list[Any]:
    """Calibration samples of the commands: images for image models, otherwise text."""
    from scap_nncf.text import builtin_text, read_texts

    if task in _IMAGE_TASKS:
        return image_samples(folder, Path(calibration), samples)
    texts = builtin_text("calibration") if calibration == "builtin" else read_texts(calibration, field)
    return text_samples(folder, texts, length, samples, seed)
