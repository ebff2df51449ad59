# SPDX-License-Identifier: Apache-2.0
"""
The operation ``ScapSparseFC`` of the OpenVINO CPU plugin: ``extension.cpp`` and what Python needs to make and to read it.
"""
