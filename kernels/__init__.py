# SPDX-License-Identifier: Apache-2.0
"""
Sparse operations and the modules that use them; knows nothing of NNCF.

``reference`` is the definition in plain torch, ``triton`` the GPU kernels, ``ops`` the torch ops that choose between
them. Importing this package imports none of them, and never Triton.
"""
