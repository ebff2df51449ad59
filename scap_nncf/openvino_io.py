# SPDX-License-Identifier: Apache-2.0
"""OpenVINO models in folders, with their plan and statistics beside them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import nncf

from scap_nncf.algorithms.data import Samples
from scap_nncf.algorithms.plan import PLAN_FILE, Plan
from scap_nncf.algorithms.scap.calibration import statistics_of_plan
from scap_nncf.algorithms.scap.controller import ScapController, get_controller
from scap_nncf.algorithms.scap.report import ScapStatistics
from scap_nncf.extras import require
from scap_nncf.storage import new_folder

MODEL_FILE = "openvino_model.xml"  # the name that Optimum-Intel and OpenVINO GenAI look for


def save_openvino(model: Any, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """
    Write an OpenVINO model as ``openvino_model.xml`` and ``.bin``, and where it is sparse ``plan.json`` and statistics.

    :param model: an ``openvino.Model``.
    :param folder: where to write; it must not exist or be empty. It appears only when it is complete.
    :param overwrite: replace a folder that this package wrote.
    :return: the folder.
    :raises nncf.ValidationError: the folder is not empty or cannot be written.
    """
    openvino = require("openvino", "openvino", "saving OpenVINO models")
    if not isinstance(model, openvino.Model):
        msg = (
            f"save_openvino takes an openvino.Model, got {type(model).__name__}; for PyTorch models there is "
            "export_openvino, for model objects of Optimum-Intel scap_nncf.optimum.save_pretrained."
        )
        raise nncf.ValidationError(msg)
    controller = get_controller(model)
    with new_folder(folder, overwrite) as partial:
        # thresholds are float32: halved, other values would be dropped than those that were calibrated
        openvino.save_model(model, partial / MODEL_FILE, compress_to_fp16=False)
        if controller is not None:
            controller.save(partial)
    return Path(folder)


def load_openvino(folder: str | os.PathLike[str]) -> Any:
    """
    Read an OpenVINO model from a folder, with the calibration statistics beside it: its sparsity can be changed.

    ``openvino.Core().read_model`` reads the same model; its controller then knows the plan but no statistics. A model
    that was deployed with ``scap_nncf.deploy(model, backend="cpu")`` runs in any core that has the extension
    (:func:`scap_nncf.openvino_extension`); where that cannot be built, its stock graph is returned, with a warning.

    :param folder: has ``openvino_model.xml``.
    :return: an ``openvino.Model``.
    :raises nncf.InvalidPathError: there is no such file.
    :raises nncf.ValidationError: plan or statistics are damaged or belong to another model.
    """
    require("openvino", "openvino", "reading OpenVINO models")
    from scap_nncf.algorithms.backends.openvino.feed import core

    path = Path(folder) / MODEL_FILE
    if not path.is_file():
        msg = f"No OpenVINO model at {path}; expected a folder that export_openvino, save_openvino or Optimum wrote."
        raise nncf.InvalidPathError(msg)
    from scap_nncf import deploy_openvino

    deployed = deploy_openvino.holds_operation(path)
    runs = deploy_openvino.teach(core()) if deployed else True
    model = core().read_model(path)
    deploy_openvino.stock_if_untaught(model, runs)
    attach_statistics(model, folder)
    return model


def attach_statistics(model: Any, folder: str | os.PathLike[str]) -> ScapController | None:
    """
    Give a sparse model's controller the calibration statistics of a folder.

    :param model: an ``openvino.Model``, or an Optimum-Intel model object.
    :return: the controller; None where the model is dense.
    :raises nncf.ValidationError: the folder's plan is another one than the model's, or a file is damaged.
    """
    controller = get_controller(model)
    if controller is None or not (Path(folder) / PLAN_FILE).is_file():
        return controller
    from scap_nncf.algorithms.backends.openvino import note_vectors

    plan = Plan.load(folder)
    if plan.sites != controller.plan.sites or plan.prune != controller.plan.prune:
        msg = f"{Path(folder) / PLAN_FILE} is not the plan of the model in this folder; save both together."
        raise nncf.ValidationError(msg)
    controller.calibration = statistics_of_plan(Path(folder), plan)
    if plan.vectors:
        controller.plan = replace(controller.plan, vectors=plan.vectors)
        note_vectors(model, plan)
    return controller


def measure_sparsity(
    model: Any, dataset: Any, *, tokenizer: Any = None, subset_size: int | None = None
) -> ScapStatistics:
    """
    Realised sparsity on data. Sparse PyTorch models count whenever they run; OpenVINO models only here.

    Padding is left out for OpenVINO models. One that prunes while decoding only is run token by token.

    :param model: a sparse OpenVINO model, an Optimum-Intel model object that holds one, or a sparse PyTorch model.
    :param dataset: as for ``nncf.compress``.
    :return: statistics with `realised_sparsity`; ``get_controller(model).statistics()`` shows them as well.
    :raises nncf.ValidationError: the model is dense, or a sample does not fit.
    """
    controller = get_controller(model)
    if controller is None:
        msg = "The model has no activation sparsity to measure; compress it first."
        raise nncf.ValidationError(msg)
    samples = Samples(dataset, tokenizer, subset_size)
    samples.first()  # an empty dataset is refused
    from scap_nncf.algorithms.backends import backend_of

    measure = getattr(backend_of(model), "measure", None)
    if measure is not None:
        measure(model, samples)
        return controller.statistics()
    from scap_nncf.algorithms.backends.torch.run import evaluation, forward_sample

    controller.reset_counters()
    with evaluation(model):
        for index, sample in enumerate(samples):
            forward_sample(model, sample, f"sample {index}")
    return controller.statistics()
