"""Chunks of prompts through replicas of a model, by Ray Data.

Ray Data keeps the replicas as a pool of actors, sends a chunk to each that is free, and gives what
comes back in the order in which it is finished. When the process or the machine of a replica dies,
Ray starts another one and sends it the same chunk. A chunk is in the results whole or not at all.
"""

from __future__ import annotations

import logging
import pickle
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dmax.errors import InputError, first_line, shorten
from dmax.params import DecodingParams

if TYPE_CHECKING:
    from dmax.integrations.ray.cluster import Placement
    from dmax.integrations.ray.workers import Description, Numbered, Worker

MOST_STARTS = 5
"""Starts of a replica without a finished chunk in between; then it is not chance that it dies."""
KEPT = "what is finished is kept with --output, and the same command goes on"


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prompts that a replica answers together."""

    prompts: Numbered
    params: DecodingParams


@dataclass(frozen=True, slots=True)
class Outcome:
    """What comes back: results with the description of the replica, or an error."""

    results: Numbered = ()
    description: Description | None = None
    error: Exception | None = None


def chunks(prompts: Numbered, params: DecodingParams, *, size: int, replicas: int) -> list[Chunk]:
    """Prompts in chunks of at most `size`, and smaller ones if replicas would stand idle."""
    size = max(1, min(size, -(-len(prompts) // replicas)))
    return [Chunk(prompts[at : at + size], params) for at in range(0, len(prompts), size)]


class Starts:
    """An actor that counts how often each replica started since it last finished a chunk."""

    def __init__(self) -> None:
        self._counts = Counter[str]()

    def begin(self, replica: str) -> int:
        """Count a start; how many there are."""
        self._counts[replica] += 1
        return self._counts[replica]

    def finish(self, replica: str) -> None:
        """Forget the starts of a replica that has finished a chunk."""
        del self._counts[replica]


class Replica:
    """An actor with a model: what Ray Data's pool consists of.

    Errors come back as values. Of what an actor raises, Ray passes on the text, tries what cannot
    succeed again, and prints both.

    Args:
        open_worker: loads the model.
        starts: the actor `Starts`.
    """

    def __init__(self, open_worker: Callable[[], Worker], starts: Any) -> None:
        import ray

        self._starts = starts
        self._name = ray.get_runtime_context().get_actor_id()
        self._worker: Worker | Exception
        num_starts = ray.get(starts.begin.remote(self._name))
        try:
            if num_starts > MOST_STARTS:
                raise InputError(
                    f"a replica died {MOST_STARTS} times in a row without finishing a batch",
                    hint=f"is there memory for the model and --batch-size? {KEPT}",
                )
            self._worker = open_worker()
        except Exception as error:  # whatever it is, it is told by the chunks
            self._worker = portable(error)

    def __call__(self, batch: Mapping[str, Sequence[bytes]]) -> dict[str, list[bytes]]:
        """Work on the chunks in column `chunk`; the outcomes stand in column `outcome`."""
        outcomes = [self._work(pickle.loads(chunk)) for chunk in batch["chunk"]]
        return {"outcome": [pickle.dumps(outcome) for outcome in outcomes]}

    def _work(self, chunk: Chunk) -> Outcome:
        if isinstance(self._worker, Exception):
            return Outcome(error=self._worker)
        try:
            results = self._worker.work(chunk.prompts, chunk.params)
            outcome = Outcome(results, self._worker.describe(chunk.params))
        except Exception as error:  # it is raised again where the command runs
            outcome = Outcome(error=portable(error))
        self._starts.finish.remote(self._name)
        return outcome


class Pool:
    """Replicas that all load the same model.

    Args:
        open_worker: loads it, in the process of a replica.
        placement: how many replicas there are, and what each takes.
    """

    def __init__(self, open_worker: Callable[[], Worker], placement: Placement) -> None:
        self.placement = placement
        self._open_worker = open_worker
        self._descriptions: dict[DecodingParams, Description] = {}

    def describe(self, params: DecodingParams) -> Description:
        """What results depend on. One replica is started for the answer, the first time.

        Raises:
            InputError: the model cannot be loaded.
        """
        if params not in self._descriptions:
            for outcome in self._outcomes([Chunk((), params)]):
                assert outcome.description is not None, "there is no error"
                found = outcome.description
                self._descriptions |= {params: found, found.params: found}
        return self._descriptions[params]

    def results(self, waiting: Sequence[Chunk]) -> Iterator[Numbered]:
        """The results of chunks, each as soon as it is finished.

        Raises:
            InputError: nothing can be answered any more, or replicas have different models.
        """
        for params in {chunk.params for chunk in waiting}:
            self.describe(params)  # before replicas take all there is
        for outcome in self._outcomes(waiting):
            found = outcome.description
            assert found is not None, "there is no error"
            expected = self._descriptions[found.params]
            if found.compared() != expected.compared():
                raise InputError(
                    "the replicas do not hold the same model: one has "
                    f"{shorten(str(found.compared()))}, another "
                    f"{shorten(str(expected.compared()))}",
                    hint="are the files and the version of dmax the same on every machine?",
                )
            yield outcome.results

    def _outcomes(self, waiting: Sequence[Chunk]) -> Iterator[Outcome]:
        """What comes back, without the errors, which are raised."""
        import ray
        from ray.exceptions import RayError

        if not waiting:
            return
        starts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Starts).remote()
        try:
            dataset = self._dataset(waiting, starts)
            for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
                for data in batch["outcome"]:
                    outcome: Outcome = pickle.loads(data)
                    if outcome.error is not None:
                        raise outcome.error
                    yield outcome
        except RayError as error:
            raise _translated(error) from error
        finally:
            if ray.is_initialized():
                ray.kill(starts)

    def _dataset(self, waiting: Sequence[Chunk], starts: Any) -> Any:
        """A row for each chunk, in a block of its own, and what replicas make of it."""
        from ray.data import ActorPoolStrategy, DataContext, from_items

        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.execution_no_progress_timeout_s = -1  # a chunk takes as long as it takes
        if not logging.getLogger("dmax").isEnabledFor(logging.DEBUG):
            logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        rows = [{"chunk": pickle.dumps(chunk)} for chunk in waiting]
        return from_items(rows, override_num_blocks=len(rows)).map_batches(
            Replica,
            fn_constructor_args=(self._open_worker, starts),
            batch_size=1,
            num_cpus=self.placement.cpus,
            num_gpus=self.placement.gpus,
            compute=ActorPoolStrategy(
                size=min(self.placement.replicas, len(rows)), max_tasks_in_flight_per_actor=1
            ),
        )


def _translated(error: Exception) -> InputError:
    """What Ray says in many lines; of an actor that could not be made, the last one says why."""
    last = str(error).strip().rpartition("\n")[2]
    if "creation task" in first_line(error):
        return InputError(
            f"a replica cannot start: {shorten(last)}",
            hint="is dmax installed on every machine of the cluster?",
        )
    return InputError(f"Ray ended the run: {shorten(first_line(error))}", hint=KEPT)


def portable(error: Exception) -> Exception:
    """An error that can travel to another process, with a note of where it was raised."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # foreign classes fail in any way
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
