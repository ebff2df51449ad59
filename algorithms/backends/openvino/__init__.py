# SPDX-License-Identifier: Apache-2.0
"""OpenVINO backend: sites from the graph, statistics through NNCF's aggregator, pruning as plain operations."""

from scap_nncf.algorithms.backends.openvino.collect import (
    collect,
    collect_costs,
    collect_sequential,
    greedy_paths,
    histograms_of,
    shifted_histograms,
    statistic_points,
    train_biases,
    train_mitigation,
)
from scap_nncf.algorithms.backends.openvino.discover import inspect_model
from scap_nncf.algorithms.backends.openvino.layers import shapes_of
from scap_nncf.algorithms.backends.openvino.measure import measure
from scap_nncf.algorithms.backends.openvino.prune import (
    counts,
    insert,
    note_plan,
    note_vectors,
    remove,
    reset_counts,
    set_enabled,
    store_controller,
    stored_controller,
    working_copy,
)
from scap_nncf.algorithms.backends.openvino.weights import dense_weight

#: Prices of sparsity and trained vectors need the PyTorch model; its plan applies here.
GRADIENTS = False

__all__ = [
    "GRADIENTS",
    "collect",
    "collect_costs",
    "collect_sequential",
    "counts",
    "dense_weight",
    "greedy_paths",
    "histograms_of",
    "insert",
    "inspect_model",
    "measure",
    "note_plan",
    "note_vectors",
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
