"""Training objectives by name. An objective sees a model and a batch, never a trainer or a file."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from dmax.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from dmax.training.objectives import Objective

_GROUP = "dmax.objectives"
_OBJECTIVES = {
    "mdlm": "dmax.training.objectives:MDLM",
    "uniform": "dmax.training.objectives:Uniform",
    "oput": "dmax.training.objectives:OPUT",
    "dparallel": "dmax.baselines.objectives:DParallelObjective",
    "d2f": "dmax.baselines.objectives:D2FObjective",
    "mbd_oput": "dmax.baselines.multi_block:MultiBlockOPUT",
    "mmd": "dmax.baselines.mmd:MMD",
    "cforce": "dmax.baselines.cforce:CForce",
}
_ROLLOUTS = {  # of `oput`, and which objective rolls out so
    "argmax": "dmax.training.objectives:OPUT",
    "sample": "dmax.training.objectives:OPUT",
    "soft": "dmax.baselines.rollouts:SoftOPUT",
    "spd": "dmax.baselines.rollouts:SoftOPUT",
}


def objective_table() -> dict[str, str]:
    """Where each objective is, by name, with those of plugins (entry points `dmax.objectives`)."""
    plugins = {entry.name: entry.value for entry in entry_points(group=_GROUP)}
    return plugins | _OBJECTIVES  # no plugin changes what a published name means


def get_objective(name: str, rollout: str = "argmax") -> type[Objective]:
    """The objective of a name; `oput` has one for each kind of `rollout`.

    Raises:
        InputError: there is no such objective or rollout; names those that exist.
    """
    entry = _find("objective", name, objective_table())
    of_oput = _find("rollout", rollout, _ROLLOUTS)
    if name == "oput":
        entry = of_oput
    return EntryPoint(name, entry, _GROUP).load()


def _find(setting: str, name: str, table: Mapping[str, str]) -> str:
    if not isinstance(name, str) or name not in table:
        choices = ", ".join(table)
        raise InputError(
            f"`{setting}` must be one of {choices}, got {name!r}", hint=did_you_mean(name, table)
        )
    return table[name]
