"""The engines that a table can be measured with, opened by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from dmax import extras
from dmax.decoding import get_strategy
from dmax.errors import InputError, first_line, shorten
from dmax.params import DecodingParams
from dmax.reproduce.table import Table

if TYPE_CHECKING:
    from dmax.completers import Completer

RESERVED = {
    "dtype": "--dtype sets it",
    "max_batch_size": "--batch-size sets it",
    "max_num_seqs": "--batch-size sets it",
    "max_running_requests": "--batch-size sets it",
    "model": "--model NAME=FOLDER sets it",
    "tp_size": "tensor_parallel_size=N sets it",
}
"""Arguments of engines that have a place of their own."""
LABELS = {"dmax": "dmax", "vllm": "vLLM", "sglang": "SGLang"}
COMPLETERS = {
    "vllm": "dmax.integrations.vllm.completer:VllmCompleter",
    "sglang": "dmax.integrations.sglang.completer:SglangCompleter",
}


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """What decodes, and on what.

    Attributes:
        name: one of `table.ENGINES`.
        batch_size: sequences decoded together.
        dtype: of the weights.
        device: of dmax's own engine; the others choose theirs.
        tensor_parallel: over how many GPUs; dmax's own engine has one.
        options: further arguments of another engine, as pairs.
    """

    name: str = "dmax"
    batch_size: int = 1
    dtype: str = "auto"
    device: str = "auto"
    tensor_parallel: int = 1
    options: tuple[tuple[str, Any], ...] = ()

    def check(self) -> None:
        """Make sure that the engine is there; asked before a checkpoint is downloaded.

        Raises:
            InputError: its package is missing, or it cannot have these settings.
        """
        if self.name != "dmax":
            extras.require(
                self.name, self.name, f"measuring with {LABELS[self.name]}", "leave out --engine"
            )
            own = [name for name, _ in self.options if name in RESERVED]
            if own:
                raise InputError(
                    f"`{own[0]}` is no further option of an engine", hint=RESERVED[own[0]]
                )
        elif self.options:
            names = ", ".join(name for name, _ in self.options)
            raise InputError(
                f"dmax's own engine has no further options, got {shorten(names)}",
                hint="name another engine with --engine",
            )


def check_requirement(table: Table, engine: EngineChoice) -> None:
    """Make sure that what a table is about is there, so that nothing else is measured in its name.

    Raises:
        InputError: other settings of the engine were asked for, or there are too few GPUs.
    """
    requires = table.requires
    if requires is None:
        return
    wanted = LABELS[requires.engine]
    needs = (
        f"`{table.name}` is measured with {wanted} over {requires.tensor_parallel} GPUs "
        f"at batch size {table.batch_size}"
    )
    possible = "dmax reproduce table1 --only dmax-math --only dmax-coder measures tokens/s on what "
    possible += "there is, under its own name; --trial tries the wiring of this one"
    if engine.name != requires.engine:
        raise InputError(f"{needs}, not with {LABELS[engine.name]}", hint=possible)
    if engine.tensor_parallel != requires.tensor_parallel:
        raise InputError(f"{needs}, not over {engine.tensor_parallel}", hint=possible)
    if engine.batch_size != table.batch_size:
        raise InputError(f"{needs}, not {engine.batch_size}", hint=possible)
    num_gpus = torch.cuda.device_count()
    if num_gpus < requires.tensor_parallel:
        raise InputError(f"{needs}; this machine has {num_gpus}", hint=possible)


def check_strategy_runs(params: DecodingParams, engine: EngineChoice) -> None:
    """Raise `InputError` unless the engine runs the strategy of these settings."""
    if engine.name != "dmax":
        from dmax.integrations.options import check_runs_here

        check_runs_here(get_strategy(params), LABELS[engine.name])


@contextmanager
def opened(engine: EngineChoice, model: str) -> Iterator[Completer]:
    """A model in an engine, whose memory is free again afterwards.

    Raises:
        InputError: the model cannot be read, or the engine does not run it.
    """
    completer = _open(engine, model)
    try:
        yield completer
    finally:
        if engine.name != "dmax":  # whose memory is free once nothing holds the model
            completer.close()  # type: ignore[attr-defined]  # of the engines' completers only
        del completer
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _open(engine: EngineChoice, model: str) -> Completer:
    if engine.name == "dmax":
        from dmax.completers import LocalCompleter
        from dmax.llm import LLM

        size = engine.batch_size
        return LocalCompleter(
            LLM(model, dtype=engine.dtype, device=engine.device, max_batch_size=size)
        )
    module, _, name = COMPLETERS[engine.name].partition(":")
    completer: Callable[..., Completer] = getattr(import_module(module), name)
    try:
        return completer(
            model,
            dtype=engine.dtype,
            max_batch_size=engine.batch_size,
            tensor_parallel_size=engine.tensor_parallel,
            **dict(engine.options),
        )
    except TypeError as error:  # what engines raise for arguments that they do not have
        if not engine.options:
            raise
        raise InputError(
            f"{LABELS[engine.name]} does not take these options: {first_line(error)}",
            hint="--engine-option NAME=VALUE hands them on",
        ) from error
