# SPDX-License-Identifier: Apache-2.0
"""Optional dependencies: import one, or say in one line what to install."""

from __future__ import annotations

import importlib
from types import ModuleType

from scap_nncf.versions import check


class MissingExtraError(ImportError):
    """An optional dependency is not installed; the message is one line that names the command to run."""


def require(module: str, extra: str, purpose: str | None = None) -> ModuleType:
    """
    Imports `module`, which comes with the extra `extra` of this package.

    :param module: dotted name, e.g. `"matplotlib.figure"`.
    :param extra: name of the extra in setup.cfg, e.g. `"report"`.
    :param purpose: what needs it, for the message, e.g. `"plotting activations"`.
    :return: the imported module.
    :raises MissingExtraError: if the module's top-level package is not installed.
    :raises UnsupportedInstallationError: if it is older than this package needs.
    """
    check(module.partition(".")[0])
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise  # installed, but something inside it is broken: hiding that would mislead
        subject = purpose or "this"
        msg = f'{subject} needs the package {package!r}, which is not installed: pip install "scap-nncf[{extra}]"'
        raise MissingExtraError(msg, name=package) from None
