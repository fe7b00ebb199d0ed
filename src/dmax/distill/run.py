"""The run: ask, filter, write down."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from dmax.distill.files import Entry, ResponseFiles, Tally
from dmax.distill.filters import Filters
from dmax.distill.responses import Answer, Answerer, Prompt, Refusal
from dmax.outputs import ratio

MOST_REFUSED = 32
"""Refusals in a row, before there is any response, that are not the fault of the prompts."""
UNFILTERED = Filters()


@dataclass(frozen=True, slots=True)
class Report:
    """What came of the prompts, also of those that an interrupted run had answered.

    Attributes:
        prompts: how many there are.
        kept: how many have a response worth learning from.
        dropped: how many have not, by the reason: a filter's, or "refused" where the prompt was not
            answered.
        tokens: generated in all responses; 0 if nobody counted them.
        tpf: tokens per denoising forward, a ratio of sums; None if nobody counted the forwards.
        seconds: since the run was started, or started again.
        tokens_per_second: since then.
    """

    prompts: int
    kept: int
    dropped: dict[str, int]
    tokens: int
    tpf: float | None
    seconds: float
    tokens_per_second: float


def distill(
    answerer: Answerer,
    prompts: Sequence[Prompt],
    files: ResponseFiles,
    filters: Filters = UNFILTERED,
    *,
    progress: Callable[[int, int, str], None] = lambda done, total, speed: None,
) -> Report:
    """Answer every prompt that the files do not answer yet, and write the responses down.

    A line is `{"index", "prompt", "response", "tokens", "forwards"}`, or has `messages` where the
    prompt is a chat: records that training reads. `index` is the number of the prompt. Where it was
    asked for, a `trajectory` follows. Lines come in the order in which responses are finished. What
    is dropped stands apart, so that a resumed run does not decode it again.

    Args:
        answerer: a model or a server.
        prompts: texts and chats.
        files: where the responses go; those that this function wrote for these prompts are
            continued.
        filters: which responses are kept.
        progress: told how many of how many prompts are done, and how fast.

    Raises:
        InputError: the files hold lines that are not responses to these prompts, or responses of
            another model, other settings or another version; they cannot be written, or another
            process writes them; or nothing can be answered any more.
    """
    with files.locked():
        tally = files.read(prompts)
        files.go_on({**answerer.settings(), "filters": filters.settings()})
        numbers = files.part.numbers(len(prompts))
        waiting = [index for index in numbers if index not in tally.done]
        began, tokens_before = time.perf_counter(), tally.tokens
        progress(len(tally.done), len(numbers), "")
        with closing(answerer.answers(prompts, waiting)) as answers:
            for group in _trusted(answers, is_proven=_is_proven(tally)):
                entries = [_judge(index, prompts[index], each, filters) for index, each in group]
                files.write(entries)
                for entry in entries:
                    tally.add(entry)
                tokens = tally.tokens - tokens_before
                speed = f"{ratio(tokens, time.perf_counter() - began):,.0f} tokens/s"
                progress(len(tally.done), len(numbers), speed if tokens else "")
        files.finish()
        seconds = time.perf_counter() - began
    return Report(
        prompts=len(numbers),
        kept=tally.kept,
        dropped=dict(tally.dropped),
        tokens=tally.tokens,
        tpf=ratio(tally.tokens, tally.forwards) if tally.forwards else None,
        seconds=seconds,
        tokens_per_second=ratio(tally.tokens - tokens_before, seconds),
    )


def _judge(index: int, prompt: Prompt, answer: Answer, filters: Filters) -> Entry:
    """Keep or drop an answer."""
    reason = "refused" if isinstance(answer, Refusal) else filters.reason(index, answer)
    return Entry(index, prompt, answer, reason)


def _is_proven(tally: Tally) -> bool:
    """Whether any prompt was answered, so that a refusal is the fault of its prompt."""
    return tally.kept + tally.dropped.total() > tally.dropped["refused"]


def _trusted(
    answers: Iterator[list[tuple[int, Answer]]], is_proven: bool
) -> Iterator[list[tuple[int, Answer]]]:
    """The same answers; refusals wait until something is answered.

    One prompt in a million may be too long, and is dropped. If everything is refused, the fault is
    elsewhere, and no prompt is used up over it.

    Raises:
        InputError: the first refusal, if nothing is answered.
    """
    held: list[tuple[int, Refusal]] = []
    for group in answers:
        refused = [(index, each) for index, each in group if isinstance(each, Refusal)]
        is_proven = is_proven or len(refused) < len(group)
        if is_proven:
            yield [*held, *group]
            held.clear()
            continue
        held += refused
        if len(held) >= MOST_REFUSED:
            break
    if held:
        raise held[0][1].error
