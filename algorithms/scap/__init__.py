# SPDX-License-Identifier: Apache-2.0
"""Statistical Calibrated Activation Pruning."""

from scap_nncf.algorithms.scap.builder import ScapBuilder, make_plan
from scap_nncf.algorithms.scap.calibration import CalibrationStatistics
from scap_nncf.algorithms.scap.config import Scap
from scap_nncf.algorithms.scap.controller import ScapController, get_controller

__all__ = ["CalibrationStatistics", "Scap", "ScapBuilder", "ScapController", "get_controller", "make_plan"]
