# SPDX-License-Identifier: Apache-2.0
"""
FC layers that skip weights on a CPU: C++ sources (``src``), compiled at first use with the compiler at hand.

``build`` compiles and caches, ``library`` calls the result; the OpenVINO extension in ``kernels/openvino`` is built
from the same sources. Importing this package compiles nothing.
"""
