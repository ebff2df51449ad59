# SPDX-License-Identifier: Apache-2.0
"""Whether what is installed is what this package was made for; the ranges are those of setup.cfg."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version

#: Top-level module → distribution, where they are called differently.
_DISTRIBUTIONS = {"optimum": "optimum-intel", "yaml": "pyyaml"}


class UnsupportedInstallationError(ImportError):
    """A package is older than this one needs; the message is one line that says what to install."""


@cache
def check(module: str) -> None:
    """
    Compare an installed package with the range that setup.cfg gives for it. A package that is not installed, or has no
    range, passes.

    :param module: top-level module, such as ``transformers``.
    :raises UnsupportedInstallationError: it is too old. One that is newer than what was tested warns once.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    name = canonicalize_name(_DISTRIBUTIONS.get(module, module))
    try:
        found = [Requirement(text) for text in requires("scap-nncf") or ()]
        installed = version(name)
    except PackageNotFoundError:
        return
    for requirement in found:
        if canonicalize_name(requirement.name) != name or requirement.specifier.contains(installed, prereleases=True):
            continue
        wanted = f"{requirement.name}{requirement.specifier}"
        if not _is_too_new(requirement.specifier, installed):
            msg = f'{name} {installed} is installed, but scap-nncf needs {wanted}: pip install "{wanted}"'
            raise UnsupportedInstallationError(msg, name=module)
        warnings.warn(
            f"{name} {installed} is newer than what scap-nncf was tested with ({wanted}); if something fails: "
            f'pip install "{wanted}"',
            stacklevel=3,
        )
        return


def _is_too_new(specifier: object, installed: str) -> bool:
    from packaging.version import Version

    bounds = [Version(one.version) for one in specifier if one.operator in (">=", ">", "~=", "==")]  # type: ignore[attr-defined]
    return all(Version(installed) >= bound for bound in bounds)


for _module in ("nncf", "torch"):  # imported first by the package, before anything that would fail in a way of its own
    check(_module)
