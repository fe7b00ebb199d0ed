"""GPUs as their makers describe them, and what a step takes on several of them: estimates.

Nothing here is measured. A utilisation and a share of the links' speed stand for all that a step
loses, and the user sees every constant beside the result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dmax.errors import InputError, did_you_mean, show
from dmax.params import check_number

UTILISATION = 0.3
"""Share of a GPU's dense matrix products per second that training reaches."""
LINK_SHARE = 0.75
"""Share of the links' speed that collectives reach."""
RESERVE = 0.08
"""Share of a GPU's memory for CUDA, for NCCL and for gaps between allocations."""
MOST_GPUS = 4096


@dataclass(frozen=True, slots=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        name: what users call it.
        memory: bytes.
        bfloat16: dense products in bfloat16, operations per second.
        float32: products in float32, without TF32.
        link: bytes per second to the other GPUs of a machine, in one direction.
        price: of an hour, in dollars; what clouds ask, roughly.
    """

    name: str
    memory: float
    bfloat16: float
    float32: float
    link: float
    price: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", 80e9, 989e12, 67e12, 450e9, 3.0),
        Gpu("h200", 141e9, 989e12, 67e12, 450e9, 3.8),
        Gpu("b200", 180e9, 2250e12, 80e12, 900e9, 5.5),
        Gpu("a100", 80e9, 312e12, 19.5e12, 300e9, 1.8),
        Gpu("l40s", 48e9, 362e12, 91e12, 32e9, 1.0),
        Gpu("rtx4090", 24e9, 165e12, 82e12, 32e9, 0.5),
    )
}


@dataclass(frozen=True, slots=True)
class Cluster:
    """Several GPUs of one kind.

    Attributes:
        gpu: the kind.
        num_gpus: how many.
    """

    gpu: Gpu
    num_gpus: int

    @classmethod
    def of(
        cls,
        num_gpus: int,
        name: str = "h100",
        *,
        memory: float | None = None,
        price: float | None = None,
    ) -> Cluster:
        """So many GPUs of a kind, with another memory (GB) or price if they are given.

        Raises:
            InputError: no such kind, or a number that nobody can have.
        """
        check_number("gpus", num_gpus, low=1, high=MOST_GPUS, whole=True)
        check_number("memory", memory, low=0, high=1e6, above_low=True, optional=True)
        check_number("price", price, low=0, high=1e6, optional=True)
        gpu = GPUS.get(name.lower())
        if gpu is None:
            raise InputError(
                f"`gpu` must be one of {', '.join(GPUS)}, got {show(name)}",
                hint=did_you_mean(name, GPUS) or "name a similar one, and give `memory` in GB",
            )
        if memory is not None:
            gpu = replace(gpu, memory=memory * 1e9)
        if price is not None:
            gpu = replace(gpu, price=price)
        return cls(gpu, num_gpus)


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one GPU sends, and receives, in a step.

    Attributes:
        gathered: bytes of weights.
        reduced: bytes of gradients.
    """

    gathered: float
    reduced: float


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step.

    Attributes:
        compute: of the products alone.
        communication: of the traffic alone.
    """

    compute: float
    communication: float

    @property
    def least(self) -> float:
        """If one hides wholly behind the other."""
        return max(self.compute, self.communication)

    @property
    def most(self) -> float:
        """If nothing overlaps."""
        return self.compute + self.communication


def step_time(cluster: Cluster, flops: float, traffic: Traffic, *, in_bfloat16: bool) -> StepTime:
    """How long a step of `flops` operations and this traffic takes on each GPU."""
    gpu = cluster.gpu
    speed = gpu.bfloat16 if in_bfloat16 else gpu.float32
    return StepTime(
        compute=flops / (speed * UTILISATION),
        communication=(traffic.gathered + traffic.reduced) / (gpu.link * LINK_SHARE),
    )
