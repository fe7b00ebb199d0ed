"""What a dry run finds: figures, and how far each of them can be trusted."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from dmax.recipe.estimate.cluster import (
    LINK_SHARE,
    RESERVE,
    UTILISATION,
    Cluster,
    StepTime,
    Traffic,
)

Basis = Literal["exact", "counted", "estimate", "unknown"]
"""Exact follows from shapes; counted was counted on a step without numbers, as a CPU runs it."""


@dataclass(frozen=True, slots=True)
class Part:
    """Memory of one GPU that serves one purpose.

    Attributes:
        name: the purpose.
        bytes: how much; None if nobody knows.
        basis: how far that can be trusted.
        note: what it consists of.
        on_host: whether it lies in the memory of the CPU instead.
    """

    name: str
    bytes: int | None
    basis: Basis
    note: str = ""
    on_host: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """How long a run takes, all of it estimated.

    Attributes:
        flops: operations of a step on one GPU.
        traffic: of a step on one GPU.
        step: seconds of a step.
        steps: of the whole run; None if nobody knows.
        tokens: clean tokens of a step on all GPUs.
    """

    flops: int
    traffic: Traffic
    step: StepTime
    steps: int | None
    tokens: int

    @property
    def hours(self) -> tuple[float, float] | None:
        """If traffic hides behind products, and if nothing overlaps."""
        if self.steps is None:
            return None
        return self.steps * self.step.least / 3600, self.steps * self.step.most / 3600


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a recipe takes on a cluster.

    Attributes:
        cluster: the GPUs.
        parameters: of the model.
        learning: those of them that learn.
        batch: `sequences` of a micro-batch, their `positions`, and how many of all are `labelled`.
        batch_is_from: which sequences these are, in words.
        settings: what of the recipe decides about memory, in words.
        memory: of one GPU, by purpose.
        run: time.
        advice: what to change where it does not fit; empty if it does.
    """

    cluster: Cluster
    parameters: int
    learning: int
    batch: dict[str, int]
    batch_is_from: str
    settings: str
    memory: list[Part]
    run: Run
    advice: str = ""

    @property
    def peak(self) -> int:
        """Bytes of a GPU at the peak of a step; what nobody knows is left out."""
        return sum(part.bytes or 0 for part in self.memory if not part.on_host)

    @property
    def fits(self) -> bool:
        """Whether a GPU has that much beside its reserve."""
        return self.fits_into(self.cluster.gpu.memory)

    def fits_into(self, memory: float) -> bool:
        """Whether so many bytes are enough."""
        return self.peak <= memory * (1 - RESERVE)

    @property
    def dollars(self) -> tuple[float, float] | None:
        """Cost of the run, the least and the most."""
        if self.run.hours is None:
            return None
        rate = self.cluster.num_gpus * self.cluster.gpu.price
        return self.run.hours[0] * rate, self.run.hours[1] * rate

    def record(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        run = self.run
        return {
            "gpus": self.cluster.num_gpus,
            "gpu": asdict(self.cluster.gpu),
            "settings": self.settings,
            "parameters": self.parameters,
            "learning": self.learning,
            "batch_per_gpu": {**self.batch, "is_from": self.batch_is_from},
            "memory_per_gpu": {
                part.name: {
                    "bytes": part.bytes,
                    "basis": part.basis,
                    "note": part.note,
                    "on_host": part.on_host,
                }
                for part in self.memory
            },
            "peak_bytes_per_gpu": self.peak,
            "fits": self.fits,
            "advice": self.advice,
            "estimates": {
                "flops_per_step_and_gpu": run.flops,
                "gathered_bytes_per_step_and_gpu": run.traffic.gathered,
                "reduced_bytes_per_step_and_gpu": run.traffic.reduced,
                "compute_seconds_per_step": run.step.compute,
                "communication_seconds_per_step": run.step.communication,
                "seconds_per_step": [run.step.least, run.step.most],
                "tokens_per_step": run.tokens,
                "steps": run.steps,
                "hours": run.hours,
                "dollars": self.dollars,
            },
            "constants": {
                "utilisation": UTILISATION,
                "link_share": LINK_SHARE,
                "memory_reserve": RESERVE,
                "dollars_per_gpu_hour": self.cluster.gpu.price,
            },
        }
