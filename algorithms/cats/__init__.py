# SPDX-License-Identifier: Apache-2.0
"""CATS: contextually aware thresholding behind the gates of feed-forwards."""

from scap_nncf.algorithms.cats.builder import CatsBuilder
from scap_nncf.algorithms.cats.config import Cats
from scap_nncf.algorithms.cats.controller import CatsController

__all__ = ["Cats", "CatsBuilder", "CatsController"]
