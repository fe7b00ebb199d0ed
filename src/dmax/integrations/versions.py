"""Which releases of another engine a plugin was run with."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version


def complaint(package: str, supported: Sequence[str]) -> str | None:
    """What is wrong with the release that is installed, as a sentence; None: it was tried.

    Args:
        package: that is installed.
        supported: its releases that the plugin was run with.
    """
    found = version(package)
    if found in supported:
        return None
    return f"dmax was run with {package} {' and '.join(supported)}, and this is {found}"
