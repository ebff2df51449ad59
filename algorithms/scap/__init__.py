# SPDX-License-Identifier: Apache-2.0
"""Statistical Calibrated Activation Pruning."""

from scap_nncf.algorithms.scap.builder import ScapBuilder
from scap_nncf.algorithms.scap.config import Scap
from scap_nncf.algorithms.scap.controller import ScapController, get_controller

__all__ = ["Scap", "ScapBuilder", "ScapController", "get_controller"]
