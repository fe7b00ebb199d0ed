"""`dmax serve --engine vllm|sglang`: the command that starts another engine's server.

Many GPUs are their business. dmax is a plugin there (docs/scale.md), and their servers have options
and limits of their own.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dmax import extras
from dmax.errors import InputError
from dmax.files import MAX_SETTINGS, read_object
from dmax.integrations.sglang import SUPPORTED
from dmax.integrations.versions import complaint as other_release
from dmax.integrations.vllm import versions as vllm_versions
from dmax.tiny import bundled

NAMES = {"vllm": "vLLM", "sglang": "SGLang"}
"""The engines, and how they write their names."""


@dataclass(frozen=True, slots=True)
class Command:
    """A program that takes the place of this one.

    Attributes:
        words: the program and its arguments, which every user of the machine can read.
        environment: added to this process's, which nobody else can read.
    """

    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    def start(self) -> None:
        """Become that program; does not return."""
        sys.stdout.flush()
        sys.stderr.flush()
        os.execvpe(self.words[0], self.words, os.environ | self.environment)


def command_for(
    engine: str,
    model: str,
    *,
    host: str,
    port: int,
    dtype: str,
    max_batch_size: int | None,
    max_length: int | None,
    keys: Sequence[str],
    others: Sequence[str],
) -> Command:
    """The command that serves a model with another engine.

    Args:
        engine: a key of `NAMES`.
        model: as for `dmax.LLM`; a bundled one is served under its name.
        host: that it listens on.
        port: that it listens on.
        dtype: of the weights, "auto" or a name.
        max_batch_size: sequences decoded together; None: the engine's own default.
        max_length: positions that a sequence may take; None: the checkpoint's.
        keys: that open the server.
        others: options of the engine, as its own command takes them.

    Raises:
        InputError: the engine is not installed, or of a release that the plugin does not go with,
            it cannot have the keys, or the model's predictions stand where it does not read them.
    """
    folder = bundled(model)
    path = str(folder or model)
    _check_reading(path, engine)
    renamed = ("--served-model-name", model) if folder else ()
    shared = ("--host", host, "--port", str(port), "--dtype", dtype, *renamed)
    if engine == "vllm":
        limits = _given("--max-num-seqs", max_batch_size) + _given("--max-model-len", max_length)
        words = (*_vllm(), "serve", path, *shared, *limits, *others)
        return Command(words, _vllm_key(keys))
    limits = _given("--max-running-requests", max_batch_size)
    limits += _given("--context-length", max_length)
    _check_no_keys(keys)
    return Command((*_sglang(), "--model-path", path, *shared, *limits, *others))


def _check_reading(path: str, engine: str) -> None:
    """Of a folder only: an engine downloads by itself, and the plugin looks again."""
    file = Path(path) / "config.json"
    if file.is_file() and read_object(file, MAX_SETTINGS).get("shift") is True:
        raise InputError(
            f"`shift` in {file} is true: a token is predicted by the position before it, and "
            f"{NAMES[engine]} reads predictions at their own positions",
            hint="leave out `--engine`",
        )


def _given(option: str, value: int | None) -> tuple[str, ...]:
    return () if value is None else (option, str(value))


def _vllm() -> tuple[str, ...]:
    """The program of vLLM: that of this environment, else the one that the shell finds."""
    if extras.has("vllm"):
        if said := vllm_versions.complaint():
            raise InputError(said)
        beside = Path(sys.executable).with_name("vllm")
        if beside.is_file():
            return (str(beside),)
    found = shutil.which("vllm")
    if found is None:
        raise _missing("vllm")
    return (found,)


def _sglang() -> tuple[str, ...]:
    """The program of SGLang, which is a module of this environment."""
    if not extras.has("sglang"):
        raise _missing("sglang")
    if said := other_release("sglang", SUPPORTED):
        raise InputError(said)
    return (sys.executable, "-m", "sglang.launch_server")


def _missing(engine: str) -> InputError:
    return InputError(
        f"{NAMES[engine]} is not installed here",
        hint=f"{extras.install_hint(engine)}, best in an environment of its own (docs/scale.md)",
    )


def _vllm_key(keys: Sequence[str]) -> dict[str, str]:
    """What vLLM reads its key from; on its command line, everybody could."""
    if len(keys) > 1:
        raise InputError(
            f"vLLM reads one key from its environment, and there are {len(keys)}",
            hint="give it one of them",
        )
    return {"VLLM_API_KEY": keys[0]} if keys else {}


def _check_no_keys(keys: Sequence[str]) -> None:
    if keys:
        raise InputError(
            "SGLang takes its key on the command line only, where every user of this machine "
            "can read it",
            hint="leave the keys out, and put a proxy that asks for them before SGLang",
        )
