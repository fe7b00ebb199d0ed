"""Decoding strategies by name. A strategy sees logits, tokens and an `embed` callable, never a model or an engine."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from dmax.errors import InputError, did_you_mean
from dmax.params import DecodingParams

if TYPE_CHECKING:
    from dmax.decoding.block import DecodingStrategy

_GROUP = "dmax.strategies"
_STRATEGIES = {
    "autoregressive": "dmax.decoding.autoregressive:Autoregressive",
    "credit": "dmax.decoding.credit:CreditDecoding",
    "d2f": "dmax.decoding.d2f:D2F",
    "demask": "dmax.decoding.demask:Demask",
    "dparallel": "dmax.decoding.dparallel:DParallel",
    "entropy_bound": "dmax.decoding.entropy_bound:EntropyBound",
    "fast_dllm": "dmax.decoding.fast_dllm:FastDLLM",
    "fast_dllm_factor": "dmax.decoding.fast_dllm:FastDLLMFactor",
    "hierarchy": "dmax.decoding.hierarchy:HierarchyDecoding",
    "iter_smooth": "dmax.decoding.iter_smooth:IterSmooth",
    "joint_threshold": "dmax.decoding.joint_threshold:JointThreshold",
    "learn2pd": "dmax.decoding.learn2pd:Learn2PD",
    "llada": "dmax.decoding.llada:FixedSchedule",
    "lopa": "dmax.decoding.lopa:Lookahead",
    "mbd": "dmax.decoding.mbd:MultiBlockSPD",
    "sched": "dmax.decoding.sched:ScheduledExit",
    "spd": "dmax.decoding.spd:SoftParallelDecoding",
    "threshold": "dmax.decoding.threshold:ThresholdDecoding",
}


def _table() -> dict[str, str]:
    # Ours win: no plugin changes what a published name means.
    return {entry.name: entry.value for entry in entry_points(group=_GROUP)} | _STRATEGIES


def strategies() -> tuple[str, ...]:
    """Names of all strategies, those of plugins (entry-point group `dmax.strategies`) included."""
    return tuple(sorted(_table()))


def get_strategy(params: DecodingParams) -> DecodingStrategy:
    """The strategy that `params` names, with its settings; raises `InputError` with the valid names otherwise."""
    # Asking for ours alone spares a search through all installed packages, which takes
    # milliseconds.
    table = _STRATEGIES if params.strategy in _STRATEGIES else _table()
    if params.strategy not in table:
        raise InputError(
            f"unknown strategy {params.strategy!r}; choose from {', '.join(strategies())}",
            hint=did_you_mean(params.strategy, strategies()),
        )
    entry = EntryPoint(params.strategy, table[params.strategy], _GROUP)
    strategy: DecodingStrategy = entry.load().from_params(params)
    return strategy
