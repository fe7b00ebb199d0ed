"""From the name of a model to the folder of its files: bundled, local, or on the hub."""

from __future__ import annotations

import os
from pathlib import Path

import huggingface_hub

from dmax.errors import InputError
from dmax.tiny import BUNDLED, bundled

# Published by the authors of DMax as `Zigeng/…`. They are decoded with SPD, which no file says.
PUBLISHED_DMAX = ("DMax-16B", "DMax-Math-16B", "DMax-Coder-16B")
PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


def find_folder(name_or_path: str | os.PathLike[str]) -> Path:
    """The local folder of a bundled name, a path or a hub id, downloaded if need be.

    Raises:
        InputError: the name leads nowhere, or to a folder that holds no checkpoint.
    """
    name = os.fspath(name_or_path)
    if not name:
        raise InputError(
            "the name of the model is empty",
            hint=f"choose {' or '.join(BUNDLED)}, a folder or a hub id",
        )
    folder = bundled(name) or Path(os.path.expanduser(name))
    if bundled(name) and not folder.is_dir():
        raise InputError(
            f"the bundled checkpoint `{name}` is missing from this installation",
            hint="reinstall dmax",
        )
    if os.path.isdir(folder):  # unlike Path.is_dir, no name is too long for it
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder} holds no config.json, so it is not a checkpoint")
        return folder
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=PATTERNS))
    except (OSError, ValueError) as error:
        reason, *_ = [*str(error).strip().splitlines(), type(error).__name__]
        raise InputError(
            f"`{name}` is neither bundled ({', '.join(BUNDLED)}), nor a folder, "
            "nor reachable on the hub",
            hint=reason,
        ) from error


def is_published_dmax(name_or_path: str | os.PathLike[str], folder: Path) -> bool:
    """Whether this is the hub id of a published DMax model, or its folder has the name of one."""
    names = (os.fspath(name_or_path).removeprefix("Zigeng/"), folder.absolute().name)
    return any(name in PUBLISHED_DMAX for name in names)
