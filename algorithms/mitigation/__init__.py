# SPDX-License-Identifier: Apache-2.0
"""Error mitigation: what makes up for dropped activations. Shared by all algorithms that prune the input of layers."""

from scap_nncf.algorithms.mitigation.apply import mitigate
from scap_nncf.algorithms.mitigation.config import Mitigation, as_mitigation

__all__ = ["Mitigation", "as_mitigation", "mitigate"]
