# SPDX-License-Identifier: Apache-2.0
"""
The builders of the quantisation steps: NNCF's entry points with checks, roll-back and clear errors around them.

Quantisation belongs before activation sparsity: the fused bias b + η·W must come from the weights that will run, and
NNCF's AWQ finds no pattern (and says nothing) once pruners stand before the layers. Where a model is sparse already,
its pruning is taken out, the weights are quantised, and the same plan is put back, with a warning.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import nncf
from nncf.common.graph.graph import NNCFGraph
from nncf.common.logging import nncf_logger
from nncf.common.tensor_statistics.statistic_point import StatisticPointsContainer
from nncf.common.utils.backend import BackendType, get_backend

from scap_nncf.algorithms.backends import backend_of, is_optimum_model
from scap_nncf.algorithms.base import COMPRESSION_ALGORITHMS, CompressionBuilder, builder_for
from scap_nncf.algorithms.data import Samples
from scap_nncf.algorithms.plan import Plan
from scap_nncf.algorithms.quantization.config import Quantization, WeightCompression
from scap_nncf.algorithms.quantization.snapshot import Snapshot, graph_of, replace_graph
from scap_nncf.algorithms.scap.controller import get_controller

_MODES = nncf.CompressWeightsMode
TORCH_MODES = (_MODES.INT8_SYM, _MODES.INT8_ASYM, _MODES.INT4_SYM, _MODES.INT4_ASYM)
_INT8_MODES = (_MODES.INT8_SYM, _MODES.INT8_ASYM)
_TORCH_FLAGS = ("awq", "scale_estimation", "all_layers")

WRONG_ORDER = (
    "The model is sparse already and is quantised now. AWQ finds no pattern behind pruners, and mode*W must come from "
    "the quantised weights; so the pruning is taken out, the weights are quantised, and the same plan is put back. Its "
    "thresholds are still those of the unquantised model: to calibrate on the model that will run, quantise first and "
    "sparsify then."
)


class _QuantisationBuilder(CompressionBuilder):
    """What both steps share: the place before sparsity, and no plan or statistic of their own."""

    stage: ClassVar[str] = "quantisation"

    @property
    def available_backends(self) -> list[BackendType]:
        return [BackendType.TORCH, BackendType.OPENVINO]

    def build(self, model: Any, dataset: Any, tokenizer: Any = None) -> Any:
        """
        Quantise. A PyTorch model is changed in place, as far as NNCF does so; an ``openvino.Model`` is cloned, and a
        model object of Optimum-Intel gets the new graph.

        :param dataset: see :class:`scap_nncf.algorithms.data.Samples`; may be None where nothing has to be calibrated.
        :raises nncf.ParameterNotSupportedError: NNCF has no such setting for this kind of model.
        :raises nncf.ValidationError: bad settings or data.
        :raises nncf.InvalidGroupSizeError: the group size does not divide the width of a layer.
        """
        if is_optimum_model(model):
            replace_graph(model, self.build(graph_of(model), dataset, tokenizer))
            return model
        kind = get_backend(model)
        if kind not in self.available_backends:
            msg = f"Quantisation steps support PyTorch modules and OpenVINO models, got {type(model).__name__}."
            raise nncf.UnsupportedBackendError(msg)
        self.check(kind)
        controller = get_controller(model)
        if controller is None:
            return self._quantise_or_restore(model, kind, dataset, tokenizer)
        nncf_logger.warning(WRONG_ORDER)
        return self._around_pruning(model, controller, kind, dataset, tokenizer)

    def _around_pruning(self, model: Any, controller: Any, kind: BackendType, dataset: Any, tokenizer: Any) -> Any:
        plan, calibration = controller.plan, controller.calibration
        if kind == BackendType.OPENVINO:
            model = model.clone()
            controller = get_controller(model)
        dense = controller.strip()
        try:
            quantised = self._quantise_or_restore(dense, kind, dataset, tokenizer)
        except BaseException:
            _prune_again(dense, plan, calibration)
            raise
        result = _prune_again(quantised, plan, calibration)
        if quantised is not dense and kind == BackendType.TORCH:  # NNCF made a copy; the given model stays as it was
            _prune_again(dense, plan, calibration)
        return result

    def _quantise_or_restore(self, model: Any, kind: BackendType, dataset: Any, tokenizer: Any) -> Any:
        if kind == BackendType.OPENVINO:
            model = model.clone()  # NNCF changes the graph in place
        snapshot = Snapshot(model)
        try:
            return self.quantise(model, kind, dataset, tokenizer)
        except BaseException:
            snapshot.restore()
            raise

    @abstractmethod
    def check(self, kind: BackendType) -> None:
        """
        :raises nncf.ParameterNotSupportedError: NNCF has no such setting for this backend.
        """

    @abstractmethod
    def quantise(self, model: Any, kind: BackendType, dataset: Any, tokenizer: Any) -> Any:
        """Call NNCF; the caller takes care of roll-back."""

    def build_from_plan(self, model: Any, plan: Plan, calibration: Any = None) -> Any:
        """
        :raises nncf.ParameterNotSupportedError: always; a plan holds activation sparsity only.
        """
        msg = "A plan holds activation sparsity only; quantised models are saved with scap_nncf.save_pretrained."
        raise nncf.ParameterNotSupportedError(msg)

    def get_statistic_points(self, model: Any, graph: NNCFGraph | None = None) -> StatisticPointsContainer:
        """Empty: NNCF collects what its algorithms need."""
        return StatisticPointsContainer()

    def apply(
        self,
        model: Any,
        graph: NNCFGraph | None = None,
        statistic_points: StatisticPointsContainer | None = None,
        dataset: nncf.Dataset | None = None,
    ) -> Any:
        """As :meth:`build`."""
        return self.build(model, dataset)


@COMPRESSION_ALGORITHMS.register("weight_compression")
class WeightCompressionBuilder(_QuantisationBuilder):
    """``nncf.compress_weights``. A PyTorch model is changed in place, or left as it was if anything fails."""

    config_type: ClassVar[type] = WeightCompression
    config: WeightCompression

    def check(self, kind: BackendType) -> None:
        config = self.config
        formats = nncf.CompressionFormat
        if kind == BackendType.OPENVINO:
            if config.compression_format != formats.DQ:
                msg = (
                    f"compression_format={config.compression_format.value!r} exists for PyTorch models only; "  # type: ignore[union-attr]
                    f"an OpenVINO model takes {formats.DQ.value!r}."
                )
                raise nncf.ParameterNotSupportedError(msg)
            return
        if config.mode not in TORCH_MODES:
            msg = (
                f"NNCF has no weight mode {config.mode.value!r} for PyTorch models; it has "  # type: ignore[union-attr]
                f"{', '.join(mode.value for mode in TORCH_MODES)}. {_EXPORT_FIRST}"
            )
            raise nncf.ParameterNotSupportedError(msg)
        for name in ("gptq", "lora_correction"):
            if getattr(config, name):
                msg = f"NNCF has no {name} for PyTorch models; there it has {', '.join(_TORCH_FLAGS)}. {_EXPORT_FIRST}"
                raise nncf.ParameterNotSupportedError(msg)

    def quantise(self, model: Any, kind: BackendType, dataset: Any, tokenizer: Any) -> Any:
        config = self.config
        samples = _samples(model, kind, dataset, tokenizer, config.subset_size)
        target = _traced(model, samples) if kind == BackendType.TORCH else model
        if config.mode in _INT8_MODES:
            samples = None  # NNCF refuses data where it has no use for them
        try:
            return nncf.compress_weights(
                target,
                mode=config.mode,
                ratio=config.ratio,
                group_size=config.group_size,
                ignored_scope=config.ignored_scope,
                dataset=None if samples is None else nncf.Dataset(samples),
                sensitivity_metric=config.sensitivity_metric,
                subset_size=config.subset_size if samples is None else min(config.subset_size, len(samples)),
                backup_mode=config.backup_mode,
                compression_format=config.compression_format,
                advanced_parameters=config.advanced_parameters,
                # NNCF refuses even False where it has no such option
                **{name: getattr(config, name) or None for name in (*_TORCH_FLAGS, "gptq", "lora_correction")},
            )
        except nncf.InvalidGroupSizeError as error:
            raise nncf.InvalidGroupSizeError(f"{error}\n{_undivided(model, _group_size(config))}") from error


@COMPRESSION_ALGORITHMS.register("quantization")
class QuantizationBuilder(_QuantisationBuilder):
    """``nncf.quantize``: 8-bit weights and activations, in a copy of the model."""

    config_type: ClassVar[type] = Quantization
    config: Quantization

    def check(self, kind: BackendType) -> None:
        config = self.config
        if kind == BackendType.OPENVINO:
            return
        unsupported = {
            "mode": config.mode is not None,
            "fast_bias_correction=False": not config.fast_bias_correction,
            "target_device='CPU_SPR'": config.target_device == nncf.TargetDevice.CPU_SPR,
        }
        given = [name for name, is_given in unsupported.items() if is_given]
        if given:
            msg = f"NNCF's quantize has no {', '.join(given)} for PyTorch models. {_EXPORT_FIRST}"
            raise nncf.ParameterNotSupportedError(msg)

    def quantise(self, model: Any, kind: BackendType, dataset: Any, tokenizer: Any) -> Any:
        config = self.config
        samples = _samples(model, kind, dataset, tokenizer, config.subset_size)
        if samples is None:
            msg = "Quantisation of activations needs a dataset: pass dataset=nncf.Dataset(...)."
            raise nncf.ValidationError(msg)
        return nncf.quantize(
            model,
            nncf.Dataset(samples),
            mode=config.mode,
            preset=config.preset,
            target_device=config.target_device,
            subset_size=min(config.subset_size, len(samples)),
            fast_bias_correction=config.fast_bias_correction,
            model_type=config.model_type,
            ignored_scope=config.ignored_scope,
            advanced_parameters=config.advanced_parameters,
        )


_EXPORT_FIRST = "For the others export the model to OpenVINO IR (scap_nncf.export_openvino) and quantise that."


def _prune_again(model: Any, plan: Plan, calibration: Any) -> Any:
    return builder_for(plan.algorithm, {}).build_from_plan(model, plan, calibration)


def _samples(model: Any, kind: BackendType, dataset: Any, tokenizer: Any, subset_size: int) -> list[Any] | None:
    """The first samples, as what the model is called with; NNCF goes through them several times."""
    if dataset is None:
        return None
    samples = Samples(dataset, tokenizer, subset_size)
    samples.first()  # an empty dataset is refused here, with a clear message
    if kind == BackendType.OPENVINO:
        from scap_nncf.algorithms.backends.openvino.feed import feed

        return [feed(model, sample, "a sample of the dataset") for sample in samples]
    return list(samples)


def _traced(model: Any, samples: list[Any] | None) -> Any:
    """The model in NNCF's wrapper, traced with the first sample or with the model's own dummy inputs."""
    from nncf.torch.function_hook.wrapper import get_hook_storage, is_wrapped
    from nncf.torch.quantization.layers import BaseWeightsDecompressor

    from scap_nncf.algorithms.backends.torch.examples import example_inputs
    from scap_nncf.algorithms.backends.torch.run import evaluation, forward_sample

    if is_wrapped(model) and any(isinstance(m, BaseWeightsDecompressor) for m in get_hook_storage(model).modules()):
        msg = "The weights of the model are compressed already; load the original model to compress it another way."
        raise nncf.ValidationError(msg)
    sample = example_inputs(model) if samples is None else samples[0]
    with evaluation(model):  # NNCF's own message for inputs that do not fit is a long trace
        forward_sample(model, sample, "the model's dummy inputs" if samples is None else "the first sample")
    return nncf.torch.wrap_model(model, example_input=sample, trace_parameters=True)


def _group_size(config: WeightCompression) -> int:
    """What NNCF takes where the user says nothing."""
    fixed = {_MODES.MXFP4: 32, _MODES.MXFP8_E4M3: 32, _MODES.NVFP4: 16}
    return config.group_size or fixed.get(config.mode, 128)  # type: ignore[call-overload]


def _undivided(model: Any, group_size: int) -> str:
    """NNCF's message names operations without their block; this names the layers."""
    shapes = backend_of(model).shapes_of(model)
    failed = [(name, width) for name, (width, _) in shapes.items() if width % group_size]
    shown = ", ".join(f"{name} ({width} inputs)" for name, width in failed[:8]) + (", ..." if len(failed) > 8 else "")
    fitting = [size for size in (128, 64, 32, 16, 8, 4, 2) if not any(width % size for width, _ in shapes.values())]
    advice = f"; group sizes that divide every layer: {', '.join(map(str, fitting))}" if fitting else ""
    return f"Layers whose inputs {group_size} does not divide: {shown}{advice}."
