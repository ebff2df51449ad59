# SPDX-License-Identifier: Apache-2.0
"""Settings of the quantisation steps, as data. Names and meanings are NNCF's."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar

import nncf
from nncf.common.quantization.structs import QuantizationPreset

TEnum = TypeVar("TEnum", bound=Enum)

#: Names of earlier NNCF releases for the same format.
_OLD_MODE_NAMES = {"e2m1": "mxfp4"}


@dataclass(frozen=True)
class WeightCompression:
    """
    Weight-only quantisation, ``nncf.compress_weights`` as a step of a recipe.

    .. code-block:: python

        steps = [WeightCompression("int4_sym", group_size=64, awq=True, scale_estimation=True), Scap(sparsity=0.4)]
        model = nncf.compress(model, algorithm=steps, dataset=dataset)

    Where a setting is None, NNCF's default holds.

    :param mode: ``int8_sym``, ``int8_asym``, ``int4_sym``, ``int4_asym`` (PyTorch and OpenVINO); ``nf4``, ``fp4``,
        ``mxfp4`` (also called ``e2m1``), ``nvfp4``, ``fp8_e4m3``, ``mxfp8_e4m3``, ``cb4``, ``codebook``,
        ``adaptive_codebook``, ``int2_sym``, ``int3_sym`` (OpenVINO); or the member of ``nncf.CompressWeightsMode``.
    :param group_size: weights along the input channels that share a scale; −1 for one scale an output channel.
    :param ratio: share of the weights that get the 4-bit format; the others get `backup_mode`.
    :param all_layers: 4-bit for embeddings and the last layer too.
    :param awq: activation-aware scaling of salient channels; data-free where there is no dataset.
    :param scale_estimation: scales that minimise the error of the layer's output.
    :param gptq: error feedback from weight to weight (OpenVINO only).
    :param lora_correction: low-rank correction of the error (OpenVINO only).
    :param sensitivity_metric: what decides which layers get `backup_mode`, a ``nncf.SensitivityMetric``.
    :param backup_mode: ``none``, ``int8_sym``, ``int8_asym`` ..., a ``nncf.BackupMode``.
    :param compression_format: ``dequantize`` (packed weights), ``fake_quantize``, ``fake_quantize_with_lora`` or
        ``fake_quantize_with_lora_nls`` (PyTorch only), a ``nncf.CompressionFormat``.
    :param ignored_scope: operations to leave as they are, by NNCF's node names.
    :param subset_size: at most this many samples of the dataset are used.
    :param advanced_parameters: a ``nncf.AdvancedCompressionParameters``.
    """

    mode: str | nncf.CompressWeightsMode = "int8_asym"
    group_size: int | None = None
    ratio: float | None = None
    all_layers: bool | None = None
    awq: bool | None = None
    scale_estimation: bool | None = None
    gptq: bool | None = None
    lora_correction: bool | None = None
    sensitivity_metric: str | nncf.SensitivityMetric | None = None
    backup_mode: str | nncf.BackupMode | None = None
    compression_format: str | nncf.CompressionFormat = "dequantize"
    ignored_scope: nncf.IgnoredScope | None = None
    subset_size: int = 128
    advanced_parameters: nncf.AdvancedCompressionParameters | None = None

    def __post_init__(self) -> None:
        mode = _OLD_MODE_NAMES.get(self.mode, self.mode) if isinstance(self.mode, str) else self.mode
        _set(self, "mode", _member("mode", mode, nncf.CompressWeightsMode))
        _set(self, "compression_format", _member("compression_format", self.compression_format, nncf.CompressionFormat))
        if self.sensitivity_metric is not None:
            metric = _member("sensitivity_metric", self.sensitivity_metric, nncf.SensitivityMetric)
            _set(self, "sensitivity_metric", metric)
        if self.backup_mode is not None:
            _set(self, "backup_mode", _member("backup_mode", self.backup_mode, nncf.BackupMode))
        for name in ("all_layers", "awq", "scale_estimation", "gptq", "lora_correction"):
            _check_flag(name, getattr(self, name))
        _check_whole("group_size", self.group_size, "a whole number from 1, or -1 for one scale an output channel")
        if self.group_size is not None and (self.group_size < -1 or self.group_size == 0):
            msg = f"group_size must be a whole number from 1, or -1, got {self.group_size!r}."
            raise nncf.ValidationError(msg)
        if self.ratio is not None and (isinstance(self.ratio, (bool, str)) or not 0 <= self.ratio <= 1):
            msg = f"ratio must be a number in [0, 1], got {self.ratio!r}."
            raise nncf.ValidationError(msg)
        _check_subset(self.subset_size)


@dataclass(frozen=True)
class Quantization:
    """
    Quantisation of weights and activations to 8 bit, ``nncf.quantize`` as a step of a recipe.

    NNCF quantises a copy of a PyTorch model: the result is a new model, and the given one stays as it is.

    :param mode: None for 8-bit integers; ``fp8_e4m3`` or ``fp8_e5m2`` (OpenVINO only).
    :param preset: ``performance`` (symmetric activations) or ``mixed`` (asymmetric).
    :param target_device: ``ANY``, ``CPU``, ``GPU``, ``NPU``, ``CPU_SPR``.
    :param subset_size: at most this many samples of the dataset are used.
    :param fast_bias_correction: False for the slower and more accurate method (OpenVINO only).
    :param model_type: ``transformer`` adds the patterns and SmoothQuant of transformers; None for other models.
    :param ignored_scope: operations to leave as they are, by NNCF's node names.
    :param advanced_parameters: a ``nncf.AdvancedQuantizationParameters``.
    """

    mode: str | nncf.QuantizationMode | None = None
    preset: str | QuantizationPreset | None = None
    target_device: str | nncf.TargetDevice = "ANY"
    subset_size: int = 300
    fast_bias_correction: bool = True
    model_type: str | nncf.ModelType | None = "transformer"
    ignored_scope: nncf.IgnoredScope | None = None
    advanced_parameters: nncf.AdvancedQuantizationParameters | None = None

    def __post_init__(self) -> None:
        _set(self, "target_device", _member("target_device", self.target_device, nncf.TargetDevice))
        for name, kind in (
            ("preset", QuantizationPreset),
            ("mode", nncf.QuantizationMode),
            ("model_type", nncf.ModelType),
        ):
            if getattr(self, name) is not None:
                _set(self, name, _member(name, getattr(self, name), kind))
        _check_flag("fast_bias_correction", self.fast_bias_correction)
        _check_subset(self.subset_size)


def describe(config: Any) -> dict[str, Any]:
    """The settings that differ from the defaults, as plain JSON data, for the record in a plan or checkpoint."""
    result: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if item.name in ("mode", "sparsity") or value != item.default:
            result[item.name] = _plain(value)
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, (type, nncf.IgnoredScope)):
        return describe(value)
    if isinstance(value, nncf.IgnoredScope):
        return {key: getattr(value, key) for key in ("names", "patterns", "types") if getattr(value, key)}
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value)


def _member(name: str, value: Any, kind: type[TEnum]) -> TEnum:
    if isinstance(value, kind):
        return value
    for member in kind:
        if isinstance(value, str) and value.lower() in (str(member.value).lower(), member.name.lower()):
            return member
    known = ", ".join(str(member.value) for member in kind)
    msg = f"{name} must be one of {known}, got {value!r}."
    raise nncf.ValidationError(msg)


def _set(config: Any, name: str, value: Any) -> None:
    object.__setattr__(config, name, value)  # frozen dataclass


def _check_flag(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, bool):
        msg = f"{name} must be True, False or None, got {value!r}."
        raise nncf.ValidationError(msg)


def _check_whole(name: str, value: Any, expected: str) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        msg = f"{name} must be {expected}, got {value!r}."
        raise nncf.ValidationError(msg)


def _check_subset(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        msg = f"subset_size must be a whole number from 1, got {value!r}."
        raise nncf.ValidationError(msg)
