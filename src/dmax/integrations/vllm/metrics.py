"""Forwards of requests: from the scheduler to responses and to `/metrics`.

vLLM has a record for each request of speculative decoding, on whose path diffusion models run. The
record goes from the scheduler to the process that answers, into `metrics.speculative_decoding` of
responses and the last chunk of a stream, and into `CompletionOutput.spec_decode_metrics`. Ours goes
the same way, with the forwards beside what vLLM counts itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dmax.integrations.vllm.wrapping import Method, is_served, wrap
from dmax.outputs import Cost, ratio

if TYPE_CHECKING:
    from vllm.v1.metrics.stats import RequestSpecDecodeMetrics

FINISHED = "finished_by_dmax"
"""The attribute of vLLM's `IterationStats` that `finished` reads."""


# --- the record of a request ---


def snapshot(request: Any, output: Any, cost: Cost) -> RequestSpecDecodeMetrics:
    """The record of a request as it is now, with its forwards.

    Of a record only the fields that vLLM declares reach another process. The forwards travel in the
    one list that is free: what a step drafted is kept for `detailed` metrics of draft models only.

    Args:
        request: of the scheduler; its `spec_decode_metrics` are what vLLM has counted.
        output: what the scheduler sends of it now; an `EngineCoreOutput`.
        cost: forwards of the request.
    """
    record = request.spec_decode_metrics
    is_ended_by_token = str(output.finish_reason) == "stop"  # stop texts are found elsewhere
    num_tokens = request.num_output_tokens - is_ended_by_token
    counts = (cost.num_forwards, cost.num_prefill_forwards, cost.num_commit_forwards)
    # vLLM takes a forward that only commits for a step in which nothing was accepted.
    not_steps = sum(record.histogram) - cost.num_forwards
    first, *others = record.histogram
    return replace(
        record,
        histogram=[first - not_steps, *others],
        per_step_accepted=[],
        per_step_drafted=[num_tokens, *counts],
    )


def tokens_and_cost(record: RequestSpecDecodeMetrics | None) -> tuple[int, Cost] | None:
    """Generated tokens and forwards in a record that `snapshot` made; None in any other."""
    if record is None or record.per_step_accepted or len(record.per_step_drafted) != 4:
        return None
    num_tokens, num_forwards, num_prefill_forwards, num_commit_forwards = record.per_step_drafted
    return num_tokens, Cost(num_forwards, num_prefill_forwards, num_commit_forwards)


def _with_forwards(original: Method) -> Method:
    """`RequestSpecDecodeMetrics.to_dict`, which fills `metrics.speculative_decoding`."""

    def to_dict(self: RequestSpecDecodeMetrics) -> dict[str, Any]:
        found = tokens_and_cost(self)
        if found is None:
            return dict(original(self))
        num_tokens, cost = found
        return original(self) | {
            "num_forwards": cost.num_forwards,
            "num_prefill_forwards": cost.num_prefill_forwards,
            "num_commit_forwards": cost.num_commit_forwards,
            "tokens_per_forward": ratio(num_tokens, cost.num_forwards),
        }

    return to_dict


# --- the server's metrics ---


def _keep_finished(original: Method) -> Method:
    """`OutputProcessor._update_stats_from_finished`: what a request cost, for the stat loggers."""

    def update(self: Any, req_state: Any, finish_reason: Any, iteration_stats: Any) -> None:
        original(self, req_state, finish_reason, iteration_stats)
        found = tokens_and_cost(req_state.spec_decode_metrics)
        if found is None or iteration_stats is None:
            return
        num_tokens, cost = found
        # The scheduler does not know what a stop text cuts off.
        num_kept = min(num_tokens, req_state.detokenizer.num_output_tokens())
        setattr(iteration_stats, FINISHED, [*finished(iteration_stats), (num_kept, cost)])

    return update


def finished(iteration_stats: Any) -> list[tuple[int, Cost]]:
    """Tokens and cost of the requests that finished in a step."""
    return getattr(iteration_stats, FINISHED, [])


def _with_counters(original: Method) -> Method:
    """`StatLoggerManager.__init__`: one logger more for our models.

    The entry points for stat loggers would do, but they switch statistics on for every model of an
    environment, also where `--disable-log-stats` asks for none.
    """

    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        if is_served(vllm_config.model_config):
            from dmax.integrations.vllm.counters import ForwardCounters

            self.stat_loggers.append(ForwardCounters(vllm_config, finished))

    return init


def install() -> None:
    """Have vLLM report forwards of our models."""
    wrap("vllm.v1.metrics.stats:RequestSpecDecodeMetrics", "to_dict", _with_forwards)
    output_processor = "vllm.v1.engine.output_processor:OutputProcessor"
    wrap(output_processor, "_update_stats_from_finished", _keep_finished)
    wrap("vllm.v1.metrics.loggers:StatLoggerManager", "__init__", _with_counters)
