"""Replicas of a model behind the protocols of evaluation and of distillation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from dmax.completers import CHUNK_BATCHES, Completions, Progress
from dmax.distill.responses import Answers, Prompts
from dmax.errors import InputError
from dmax.integrations.ray.cluster import Placement, RayOptions, connected, place
from dmax.integrations.ray.pool import Pool, chunks
from dmax.integrations.ray.workers import Answering, Completing, Model
from dmax.params import DecodingParams
from dmax.prompts import Prompt


class RayCompleter:
    """Replicas that complete prompts, as `dmax.completers.Completer` says.

    Args:
        model: what each of them loads.
        placement: how many there are, and where.
    """

    def __init__(self, model: Model, placement: Placement) -> None:
        self.name = model.name
        self._pool = Pool(partial(Completing, model), placement)
        self._size = CHUNK_BATCHES * model.batch_size

    def resolve(self, params: DecodingParams) -> DecodingParams:
        """As `Completer.resolve`."""
        return self._pool.describe(params).params

    def settings(self, params: DecodingParams) -> dict[str, Any]:
        """As `Completer.settings`; the environment is that of a replica."""
        import ray

        settings = self._pool.describe(params).settings
        placement = self._pool.placement
        record = {
            "ray": ray.__version__,
            "replicas": placement.replicas,
            "gpus_per_replica": placement.gpus,
        }
        return settings | {"environment": settings["environment"] | record}

    def completions(
        self, prompts: Sequence[Prompt], params: DecodingParams, progress: Progress
    ) -> Completions:
        """As `Completer.completions`; a group is a chunk, a few batches of a replica."""
        waiting = chunks(
            list(enumerate(prompts)),
            params,
            size=self._size,
            replicas=self._pool.placement.replicas,
        )
        num_done = 0
        for group in self._pool.results(waiting):
            num_done += len(group)
            progress(num_done, len(prompts))
            yield list(group)


class RayAnswerer:
    """Replicas that answer prompts, as `dmax.distill.responses.Answerer` says.

    Args:
        model: what each of them loads.
        placement: how many there are, and where.
        params: how to decode.
    """

    def __init__(self, model: Model, placement: Placement, params: DecodingParams) -> None:
        self._pool = Pool(partial(Answering, model), placement)
        self._params = params
        self._size = CHUNK_BATCHES * model.batch_size

    def settings(self) -> dict[str, Any]:
        """As a replica gives them: the same as those of a model in this process."""
        return self._pool.describe(self._params).settings

    def answers(self, prompts: Prompts, indices: Sequence[int]) -> Answers:
        """Answer the prompts of these numbers; a group is a chunk, a few batches of a replica."""
        numbered = [(index, prompts[index]) for index in indices]
        replicas = self._pool.placement.replicas
        waiting = chunks(numbered, self._params, size=self._size, replicas=replicas)
        for group in self._pool.results(waiting):
            yield list(group)


@contextmanager
def completing(options: RayOptions, model: Model, params: DecodingParams) -> Iterator[RayCompleter]:
    """Replicas for an evaluation, one of which has been seen to load the model.

    Raises:
        InputError: more is asked for than the cluster has, or the model cannot be loaded.
    """
    with connected(options) as nodes:
        placement = place(options, nodes, with_gpus=model.device != "cpu")
        completer = RayCompleter(_placed(model, placement), placement)
        completer.resolve(params)
        yield completer


@contextmanager
def answering(options: RayOptions, model: Model, params: DecodingParams) -> Iterator[RayAnswerer]:
    """Replicas for a distillation, one of which has been seen to load the model.

    Raises:
        InputError: as `completing`.
    """
    with connected(options) as nodes:
        placement = place(options, nodes, with_gpus=model.device != "cpu")
        answerer = RayAnswerer(_placed(model, placement), placement, params)
        answerer.settings()
        yield answerer


def _placed(model: Model, placement: Placement) -> Model:
    if model.device == "cuda" and not placement.gpus:
        raise InputError(
            "`--device cuda` needs a GPU for each replica, and there are none for them",
            hint="leave out --device, or give --gpus-per-replica",
        )
    return replace(model, gpus=placement.gpus)
