"""What a decoding strategy is: settings, and one method that turns a forward into a decision."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor

from dmax.errors import InputError, did_you_mean
from dmax.params import DecodingParams, check_fields
from dmax.params import number as number
from dmax.params import whole as whole

if TYPE_CHECKING:
    from dmax.decoding.block import Decision, Output, State, View

Number = float | Tensor
"""A setting that every sequence has for itself: one number, or in the engine [B, 1] float32."""


class Strategy(ABC):
    """A decoding method; derive from it a frozen dataclass of its settings, with a method `step`.

    A field is set by the field of `DecodingParams` that has its name, else by the option of that
    name. Fields made by `number` may differ between the sequences of one forward. All memory lives
    in the state, which the engine keeps for every block.

    Attributes:
        name: as in `DecodingParams.strategy`.
        default_threshold: used where `DecodingParams.threshold` is None.
        needs_hidden_states: whether `Output.hidden_states` must be there.
        extra_steps: forwards that a block may take beyond one for every position.
        blocks: blocks of a sequence that are open at once; each sees those before it as they are.
        opens_at: the next block opens once this share of the last open one is sure.
        forces_at: a block must progress once this share of the one before it is sure; until
            then it may wait.
        sure_from: confidence from which a decoded position counts as sure.
        num_branches: branches of a block that one forward evaluates (see `branches`).
        renormalize: blends that are fed back keep their length (equation 10).
    """

    name: ClassVar[str]
    default_threshold: ClassVar[float]
    needs_hidden_states: ClassVar[bool] = False
    extra_steps: int = 0
    blocks: int = 1
    opens_at: Number = 0.0
    forces_at: Number = 0.0
    sure_from: Number = 0.0
    num_branches: int = 1
    renormalize: bool = True

    def check_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Raise `InputError` if the method does not go with a model of these named weights."""
        return

    def open(self, view: View) -> State:
        """What the strategy remembers of blocks that have just been opened; nothing by default."""
        return {}

    def branches(self, view: View, state: State) -> Tensor:
        """Token ids [B, num_branches, L]: the branches of each block, which the forward reads."""
        return view.tokens[:, None]

    @abstractmethod
    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        """Decide after a forward: what becomes of B blocks, and what to remember of them.

        `output` has B * num_branches rows; B at the first step of the blocks, which have no
        branches yet.
        """

    def fused(self) -> tuple[int, dict[str, bool]] | None:
        """Candidates and switches of `dmax.kernels.decide`, if it does what `step` does.

        None, as here, for every other strategy.
        """
        return None

    def __post_init__(self) -> None:
        """Check the settings; raises `InputError` naming the one that is wrong."""
        check_fields(self)

    @classmethod
    def from_params(cls, params: DecodingParams) -> Self:
        """The strategy with the settings of `params`.

        Raises:
            InputError: an option that the strategy does not have, or a setting out of range.
        """
        # Subclasses are dataclasses, which mypy cannot know.
        names = [entry.name for entry in fields(cls) if entry.init]  # type: ignore[arg-type]
        shared = {name: getattr(params, name) for name in names if hasattr(params, name)}
        own = [name for name in names if name not in shared]
        options = dict(params.options)
        for name in options:
            if name not in own:
                has = f"has only {', '.join(own)}" if own else "has none"
                raise InputError(
                    f"strategy `{cls.name}` has no option `{name}`; it {has}",
                    hint=did_you_mean(name, own),
                )
        if "threshold" in shared and params.threshold is None:
            shared["threshold"] = cls.default_threshold
        return cls(**shared, **options)

    def numbers(self) -> dict[str, float]:
        """The settings that may differ between the sequences of one forward."""
        values: dict[str, float] = {}
        for entry in fields(self):  # type: ignore[arg-type]
            value = getattr(self, entry.name)
            if entry.metadata and not entry.metadata.get("whole") and value is not None:
                values[entry.name] = value
        return values

    def without_numbers(self) -> Self:
        """This strategy with all its numbers at 0; those that agree in it may share a forward."""
        return self.with_numbers(dict.fromkeys(self.numbers(), 0.0))

    def with_numbers(self, numbers: Mapping[str, Any]) -> Self:
        """The same strategy with other `numbers`; they are not checked again."""
        other = copy.copy(self)
        for name, value in numbers.items():
            object.__setattr__(other, name, value)
        return other
