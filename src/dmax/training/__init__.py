"""Training objectives by name. An objective sees a model and a batch, never a trainer or a file."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from dmax.errors import InputError, did_you_mean, load_plugin

if TYPE_CHECKING:
    from dmax.training.objectives import Objective

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
    # Ours win: no plugin changes what a published name means.
    return {each.name: each.value for each in entry_points(group="dmax.objectives")} | _OBJECTIVES


def get_objective(name: str, rollout: str = "argmax") -> type[Objective]:
    """The objective of a name; `oput` has one for each kind of `rollout`.

    Raises:
        InputError: there is no such objective or rollout; names those that exist. Or a plugin's
            objective cannot be loaded.
    """
    table = objective_table() | {"oput": _find("rollout", rollout, _ROLLOUTS)}
    return load_plugin(name, _find("objective", name, table))


def _find(setting: str, name: str, table: dict[str, str]) -> str:
    if not isinstance(name, str) or name not in table:
        raise InputError(
            f"`{setting}` must be one of {', '.join(table)}, got {name!r}",
            did_you_mean(name, table),
        )
    return table[name]
