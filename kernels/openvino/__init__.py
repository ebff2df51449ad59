# SPDX-License-Identifier: Apache-2.0
"""
The operation ``ScapSparseFC`` of the OpenVINO CPU plugin: ``extension.cpp``, and making and reading it from Python.
"""
