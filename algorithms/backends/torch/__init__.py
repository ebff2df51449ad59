# SPDX-License-Identifier: Apache-2.0
"""PyTorch backend: sites from a watched forward pass, statistics and pruning through module hooks."""

from scap_nncf.algorithms.backends.torch.collect import (
    collect,
    collect_by_block,
    collect_sequential,
    histograms_of,
    statistic_points,
)
from scap_nncf.algorithms.backends.torch.discover import inspect_model
from scap_nncf.algorithms.backends.torch.fisher import collect_costs
from scap_nncf.algorithms.backends.torch.greedy import greedy_paths
from scap_nncf.algorithms.backends.torch.layers import shapes_of
from scap_nncf.algorithms.backends.torch.prune import (
    counts,
    insert,
    remove,
    reset_counts,
    set_enabled,
    store_controller,
    stored_controller,
    working_copy,
)
from scap_nncf.algorithms.backends.torch.refine import train_biases
from scap_nncf.algorithms.backends.torch.residency import is_offloaded
from scap_nncf.algorithms.backends.torch.train import shifted_histograms, train_mitigation
from scap_nncf.algorithms.backends.torch.weights import dense_matrix as dense_weight

#: Prices of sparsity and trained vectors can be had.
GRADIENTS = True

__all__ = [
    "GRADIENTS",
    "collect",
    "collect_by_block",
    "collect_costs",
    "collect_sequential",
    "counts",
    "dense_weight",
    "greedy_paths",
    "histograms_of",
    "insert",
    "inspect_model",
    "is_offloaded",
    "remove",
    "reset_counts",
    "set_enabled",
    "shapes_of",
    "shifted_histograms",
    "statistic_points",
    "store_controller",
    "stored_controller",
    "train_biases",
    "train_mitigation",
    "working_copy",
]
