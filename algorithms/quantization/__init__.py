# SPDX-License-Identifier: Apache-2.0
"""NNCF's quantisation as steps of a recipe: weights only (4 and 8 bit), or weights and activations (8 bit)."""

from scap_nncf.algorithms.quantization.builder import QuantizationBuilder, WeightCompressionBuilder
from scap_nncf.algorithms.quantization.config import Quantization, WeightCompression

__all__ = ["Quantization", "QuantizationBuilder", "WeightCompression", "WeightCompressionBuilder"]
