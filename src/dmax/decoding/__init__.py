"""Decoding strategies by name: DMax's own, the baselines, and those of other packages."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from dmax.errors import InputError, did_you_mean, load_plugin, show
from dmax.params import AUTO, DecodingParams

if TYPE_CHECKING:
    from dmax.decoding.strategy import Strategy

FALLBACK = "threshold"
"""What "auto" means for a model that does not say how it was trained."""

_STRATEGIES = {
    "spd": "dmax.decoding.spd:SoftParallelDecoding",
    "threshold": "dmax.decoding.threshold:ThresholdDecoding",
    "autoregressive": "dmax.baselines.autoregressive:Autoregressive",
    "credit": "dmax.baselines.credit:CreditDecoding",
    "d2f": "dmax.baselines.d2f:D2F",
    "demask": "dmax.baselines.demask:Demask",
    "dparallel": "dmax.baselines.dparallel:DParallel",
    "entropy_bound": "dmax.baselines.entropy_bound:EntropyBound",
    "fast_dllm": "dmax.baselines.fast_dllm:FastDLLM",
    "fast_dllm_factor": "dmax.baselines.fast_dllm:FastDLLMFactor",
    "hierarchy": "dmax.baselines.hierarchy:HierarchyDecoding",
    "iter_smooth": "dmax.baselines.iter_smooth:IterSmooth",
    "joint_threshold": "dmax.baselines.joint_threshold:JointThreshold",
    "learn2pd": "dmax.baselines.learn2pd:Learn2PD",
    "llada": "dmax.baselines.llada:FixedSchedule",
    "lopa": "dmax.baselines.lopa:Lookahead",
    "mbd": "dmax.baselines.mbd:MultiBlockSPD",
    "sched": "dmax.baselines.sched:ScheduledExit",
}


def _table() -> dict[str, str]:
    # Ours win: no plugin changes what a published name means.
    return {each.name: each.value for each in entry_points(group="dmax.strategies")} | _STRATEGIES


def strategies() -> tuple[str, ...]:
    """Names of all strategies, with those of plugins (entry-point group `dmax.strategies`)."""
    return tuple(sorted(_table()))


def get_strategy(params: DecodingParams) -> Strategy:
    """The strategy that `params` names, with its settings.

    Raises:
        InputError: there is no strategy of this name, or it does not take these settings.
    """
    return strategy_class(params.strategy).from_params(params)


def strategy_class(name: str) -> type[Strategy]:
    """The strategy of this name, without settings.

    `LLM` replaces "auto" by what the checkpoint names before it comes here; without a checkpoint it
    means threshold decoding.

    Raises:
        InputError: there is none, or a plugin's cannot be loaded.
    """
    if name == AUTO:
        name = FALLBACK
    # Our own table spares a search through all installed packages, which takes milliseconds.
    table = _STRATEGIES if name in _STRATEGIES else _table()
    if name not in table:
        raise InputError(
            f"unknown strategy {show(name)}; choose from {', '.join((AUTO, *strategies()))}",
            hint=did_you_mean(name, table),
        )
    return load_plugin(name, table[name])


def check_strategy(params: DecodingParams) -> None:
    """For what computes long before it decodes: raise `InputError` now if decoding would.

    What "auto" stands for is known when the checkpoint is loaded.
    """
    if params.strategy != AUTO:
        get_strategy(params)
