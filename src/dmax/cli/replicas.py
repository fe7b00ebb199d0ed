"""`--ray` and its companions: what is made of them, for the commands that have them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from dmax.errors import InputError, did_you_mean, show

if TYPE_CHECKING:
    from dmax.distill.responses import Answerer
    from dmax.integrations.ray.cluster import RayOptions
    from dmax.integrations.ray.replicas import RayCompleter
    from dmax.integrations.ray.workers import Model
    from dmax.params import DecodingParams

ENGINES = ("dmax", "vllm")
COMPANIONS = {
    "replicas": "--replicas",
    "gpus_per_replica": "--gpus-per-replica",
    "engine": "--engine",
}


@dataclass(frozen=True, slots=True)
class Replicas:
    """Replicas that a command asks for; they start when a context is entered.

    Attributes:
        options: which cluster, and how many.
        model: what each of them loads.
    """

    options: RayOptions
    model: Model

    def completing(self, params: DecodingParams) -> AbstractContextManager[RayCompleter]:
        """For an evaluation."""
        from dmax.integrations.ray.replicas import completing

        return completing(self.options, self.model, params)

    def answering(self, params: DecodingParams) -> AbstractContextManager[Answerer]:
        """For a distillation."""
        from dmax.integrations.ray.replicas import answering

        return answering(self.options, self.model, params)


def is_asked(given: Mapping[str, Any]) -> bool:
    """Whether the options of a command ask for replicas.

    Raises:
        InputError: they do not, and one of them is about replicas.
    """
    if given["ray"] or given["ray_address"] is not None:
        return True
    for name, shown in COMPANIONS.items():
        if given[name] is not None:
            raise InputError(f"`{shown}` goes with --ray or --ray-address only")
    return False


def read(given: Mapping[str, Any]) -> Replicas | None:
    """The replicas that the options of a command ask for; None: this process decodes.

    Raises:
        InputError: a wrong option, Ray or the engine is missing, or there is no such model.
    """
    if not is_asked(given):
        return None
    from dmax.hub import find_folder
    from dmax.integrations.ray.cluster import RayOptions, check_installed
    from dmax.integrations.ray.workers import Model

    engine = given["engine"] or "dmax"
    if engine not in ENGINES:
        hint = did_you_mean(engine, ENGINES) or f"choose from {' and '.join(ENGINES)}"
        raise InputError(f"there is no engine {show(engine)}", hint)
    options = RayOptions(given["ray_address"], given["replicas"], given["gpus_per_replica"])
    names = "batch_size dtype device quantization compile_model".split()
    model = Model(
        _wherever(given["model"]),
        engine=cast(Any, engine),
        gpus=options.gpus_per_replica or 0,
        **{name: given[name] for name in names},
    )
    check_installed()
    if engine == "vllm" and options.address is None:
        from dmax.integrations.vllm.completer import check_engine

        check_engine()
    find_folder(given["model"], with_weights=False)
    return Replicas(options, model)


def _wherever(name: str) -> str:
    """The name of a model that leads to it from every folder."""
    return os.path.abspath(name) if os.path.isdir(name) else name
