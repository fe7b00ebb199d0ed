"""How a strategy gets its settings: shared ones from `DecodingParams`, its own from `DecodingParams.options`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar, Self

from dmax.errors import InputError, did_you_mean
from dmax.params import DecodingParams


class Configured:
    """Base of a strategy that is a dataclass of its settings; each field is set by the field or option of its name.

    Fields that are not arguments (`init=False`) are the strategy's own to fill.
    """

    __slots__ = ()
    name: ClassVar[str]
    default_threshold: ClassVar[float]

    @classmethod
    def from_params(cls, params: DecodingParams) -> Self:
        """The settings of `params`; raises `InputError` for an option the strategy does not have."""
        options = dict(params.options)
        names = [field.name for field in fields(cls) if field.init]  # type: ignore[arg-type]  # subclasses are dataclasses
        own = [name for name in names if not hasattr(params, name)]
        if unknown := [name for name in options if name not in own]:
            has = f"has only {', '.join(own)}" if own else "has none"
            hint = did_you_mean(unknown[0], own)
            raise InputError(
                f"strategy `{cls.name}` has no option `{unknown[0]}`; it {has}", hint=hint
            )
        chosen: dict[str, Any] = {
            name: getattr(params, name) for name in names if hasattr(params, name)
        } | options
        if chosen.get("threshold", 0.0) is None:
            chosen["threshold"] = cls.default_threshold
        return cls(**chosen)
