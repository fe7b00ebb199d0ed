"""Optional packages: what needs them, and how to install them.

They come from the checkout, or by their own names. The name of this package is never given to pip:
an index may know another project by it.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path

from dmax.errors import InputError

DISTRIBUTION = "dmax-lm"
CHECKOUT = Path(__file__).resolve().parents[2]


def require(module: str, extra: str, what: str, otherwise: str = "") -> None:
    """Make sure that an optional package is there; asked before hours of computing, not after.

    Args:
        module: what is imported, such as `matplotlib`.
        extra: the extra of pyproject.toml that installs it.
        what: what needs it, as the beginning of a sentence.
        otherwise: how to do without it, if there is a way.

    Raises:
        InputError: it is missing; the hint says how to install it.
    """
    if not has(module):
        package = module.replace("_", "-")
        hint = f"{install_hint(extra)}, or {otherwise}" if otherwise else install_hint(extra)
        raise InputError(f"{what} needs the package `{package}`", hint)


def has(module: str) -> bool:
    """Whether an optional package is there."""
    return sys.modules.get(module) is not None or find_spec(module) is not None


def install_hint(extra: str) -> str:
    """The command that installs an extra into this environment."""
    if (CHECKOUT / "pyproject.toml").is_file():
        where = "." if Path.cwd() == CHECKOUT else str(CHECKOUT)
        # Editable, as `make` installs it: a copy would hide later changes to the sources.
        return f"{_pip()} install -e '{where}[{extra}]'"
    try:
        lines = requires(DISTRIBUTION) or []
    except PackageNotFoundError:  # the sources lie on the path, without being installed
        return f"its packages are those of the extra `{extra}` in pyproject.toml"
    condition = f'extra == "{extra}"'
    parts = [line.partition(";") for line in lines]
    packages = [shlex.quote(name.strip()) for name, _, marker in parts if condition in marker]
    return f"{_pip()} install {' '.join(packages)}"


def _pip() -> str:
    """The `pip` of this interpreter, as briefly as the shell finds it."""
    found = shutil.which("pip")
    is_ours = found is not None and Path(found).parent == Path(sys.executable).parent
    return "pip" if is_ours else f"{shlex.quote(sys.executable)} -m pip"
