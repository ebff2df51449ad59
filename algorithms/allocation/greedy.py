# SPDX-License-Identifier: Apache-2.0
"""
Allocation by greedy search within each block (TEAL, arXiv 2408.14690, algorithm 1): the same sparsity for every block,
spread over its layers so that its output moves least. For comparison; it looks at local error, not at the loss.
"""

from __future__ import annotations

from collections.abc import Mapping

import nncf
import numpy as np
from numpy.typing import NDArray

#: A step adds this to the sparsity of the largest layer of a block, and as many bytes to that of a smaller one.
STEP = 0.05
MAX_SPARSITY = 0.95
#: Sparsities of a block at which the search's path is kept.
LEVELS: tuple[float, ...] = tuple(round(0.05 * step, 2) for step in range(15))


def allocate(paths: Mapping[str, NDArray[np.float64]], sparsity: float) -> dict[str, float]:
    """
    Sparsity of each layer where every block has this one.

    :param paths: layer name → sparsity at LEVELS.
    :raises nncf.ValidationError: more than the search went up to.
    """
    if sparsity > LEVELS[-1]:
        msg = f"The greedy search goes up to a sparsity of {LEVELS[-1]}, got {sparsity}."
        raise nncf.ValidationError(msg)
    return {name: float(np.interp(sparsity, LEVELS, path)) for name, path in paths.items()}
