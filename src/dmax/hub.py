"""From the name of a model to the folder of its files: bundled, local, or on the hub."""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import huggingface_hub
from huggingface_hub import constants

from dmax.errors import InputError, did_you_mean, first_line, shorten, show
from dmax.tiny import BUNDLED, bundled

# Published by the authors of DMax as `Zigeng/…`. They are decoded with SPD, which no file says.
PUBLISHED_DMAX = ("DMax-16B", "DMax-Math-16B", "DMax-Coder-16B")
# An SDAR whose blocks are longer than 4 is published as `JetLM/SDAR-…-b32`; no file says so.
SDAR_BLOCKS = re.compile(r"SDAR-.+-b(\d{1,4})")
SETTINGS = ["*.json", "*.jinja", "*.txt", "*.model"]
PATTERNS = [*SETTINGS, "*.safetensors"]
REACH_SECONDS = 1.5  # to open a connection, which takes a slow network a few tenths
MAX_NEIGHBOURS = 1000


def find_folder(name_or_path: str | os.PathLike[str], *, with_weights: bool = True) -> Path:
    """The local folder of a bundled name, a path or a hub id, downloaded if need be.

    Without a network, a hub id that was downloaded before leads to what is there.

    Args:
        name_or_path: a bundled name, a folder or a hub id.
        with_weights: whether weights are downloaded too.

    Raises:
        InputError: the name leads nowhere, or to a folder that holds no checkpoint.
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise InputError(f"a model must be a name or a folder, got {show(name_or_path)}")
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
        if not (folder / "config.json").exists() and not is_adapter(folder):
            raise InputError(
                f"{shorten(str(folder))} holds no config.json, so it is not a checkpoint"
            )
        return folder
    if _exists(folder):
        raise InputError(
            f"{shorten(name)} is not a folder", hint="name the folder that holds config.json"
        )
    return _download(name, PATTERNS if with_weights else SETTINGS)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds adapters of peft, which are no model without their base."""
    return (folder / "adapter_config.json").exists()


def _download(name: str, patterns: list[str]) -> Path:
    try:
        huggingface_hub.utils.validate_repo_id(name)  # type: ignore[attr-defined]
        is_offline = constants.HF_HUB_OFFLINE or not is_reachable(constants.ENDPOINT)
        return Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=patterns, local_files_only=is_offline
            )
        )
    except Exception as error:  # of the hub's client, of its HTTP library, of the system
        raise InputError(
            f"`{shorten(name)}` is neither bundled ({', '.join(BUNDLED)}), nor a folder, "
            "nor reachable on the hub",
            hint=did_you_mean(name, (*BUNDLED, *_neighbours(name))) or shorten(first_line(error)),
        ) from error


def is_reachable(address: str, seconds: float = REACH_SECONDS) -> bool:
    """Whether a connection to a web address, or to the proxy for it, can be opened in this time.

    Names are resolved and connections tried side by side: without a network, each of them alone may
    take minutes to fail.
    """
    target = urlsplit(address)
    proxies = getproxies()
    proxy = proxies.get(target.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(target.hostname or ""):
        target = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    port = target.port or (80 if target.scheme == "http" else 443)
    is_found = threading.Event()
    is_done = threading.Event()

    def connect(family: int, place: Any) -> None:
        with suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.settimeout(seconds)
            probe.connect(place)
            is_found.set()
            is_done.set()

    def resolve() -> None:
        with suppress(OSError, UnicodeError):
            places = socket.getaddrinfo(target.hostname, port, type=socket.SOCK_STREAM)
            probes = [_start(connect, family, place) for family, _, _, _, place in places]
            for probe in probes:
                probe.join()
        is_done.set()

    _start(resolve)
    is_done.wait(seconds)
    return is_found.is_set()


def is_published_dmax(name_or_path: str | os.PathLike[str], folder: Path) -> bool:
    """Whether this is the hub id of a published DMax model, or its folder has the name of one."""
    names = (os.fspath(name_or_path).removeprefix("Zigeng/"), folder.absolute().name)
    return any(name in PUBLISHED_DMAX for name in names)


def named_block_length(name_or_path: str | os.PathLike[str], folder: Path) -> int | None:
    """The block length in the name of a published SDAR or of its folder, if there is one."""
    for name in (os.path.basename(os.fspath(name_or_path)), folder.absolute().name):
        if found := SDAR_BLOCKS.fullmatch(name):
            return int(found[1])
    return None


def _exists(path: Path) -> bool:
    with suppress(ValueError):  # a name with a NUL character
        return os.path.lexists(path)
    return False


def _start(task: Callable[..., None], *args: Any) -> threading.Thread:
    """A thread that does not keep the program from ending."""
    thread = threading.Thread(target=task, args=args, daemon=True)
    thread.start()
    return thread


def _neighbours(name: str) -> Iterator[str]:
    """The folders beside a path that does not exist, written as the path is."""
    parent, _ = os.path.split(name)
    with suppress(OSError, ValueError), os.scandir(os.path.expanduser(parent) or ".") as entries:
        for entry in islice(entries, MAX_NEIGHBOURS):
            if entry.is_dir():
                yield os.path.join(parent, entry.name)
