"""`lora` of a recipe: the adapters that learn in place of the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dmax.adapters import ALL_LINEAR, EXPERTS, lora_config
from dmax.errors import InputError, show
from dmax.params import check_number

MOST = 2**16  # of ranks and scales


@dataclass(frozen=True, slots=True)
class LoraSection:
    """Low-rank adapters, as `peft.LoraConfig` has them.

    Attributes:
        r: rank of each adapter.
        alpha: its scale is `alpha / r`.
        dropout: before each adapter while it learns.
        targets: what is adapted: all-linear, attention, shared_experts, experts, or names of
            modules (`dmax.adapters.find_targets`).
        use_rslora: make the scale `alpha / sqrt(r)`.
        merge: write a whole checkpoint, the adapters merged into its weights.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: [ALL_LINEAR])
    use_rslora: bool = False
    merge: bool = False

    def __post_init__(self) -> None:
        """Raises `InputError` naming the field that is wrong."""
        check_number("r", self.r, low=1, high=MOST, whole=True)
        check_number("alpha", self.alpha, low=1, high=MOST, whole=True)
        check_number("dropout", self.dropout, low=0, high=1)
        if not self.targets or not all(isinstance(name, str) and name for name in self.targets):
            raise InputError(f"`targets` must be a list of names, got {show(self.targets)}")
        if EXPERTS in self.targets and self.dropout:
            raise InputError(f"adapters of stacked experts take no `dropout`, got {self.dropout}")

    def config(self, model: Any) -> Any:
        """The `peft.LoraConfig` of these adapters for a model.

        Raises:
            InputError: peft is missing, or the model has no such layers.
        """
        return lora_config(
            model,
            r=self.r,
            alpha=self.alpha,
            dropout=self.dropout,
            targets=self.targets,
            use_rslora=self.use_rslora,
        )
