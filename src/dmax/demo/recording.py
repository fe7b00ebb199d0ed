"""Decodes answers and writes down every forward: the stories that the demo plays."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile

from dmax.cli.marks import visible
from dmax.demo.settings import SETTINGS, Setting
from dmax.demo.story import Frame, Piece, Recording, Story
from dmax.llm import LLM
from dmax.outputs import StreamEvent
from dmax.params import DecodingParams
from dmax.tasks import Example, Task

TimedEvent = tuple[float, StreamEvent]
REPEATS = 3  # decodes of an answer, of which the fastest is shown


def find_story(models: Mapping[str, LLM], task: Task, examples: Sequence[Example]) -> Story:
    """The first problem that shows the difference, each answer the fastest of a few decodes.

    The careful base solves it, the pushed base does not, and DMax revises a word of its answer;
    whether DMax solves it has no say. If there is no such problem, it is the first of all.
    """
    chosen = examples[0]
    choice = f"the first of {len(examples)}"
    for example in examples:
        answers = _answers(models, task, example, repeats=1)
        careful, pushed, dmax = answers
        if careful.is_correct and not pushed.is_correct and dmax.revisions:
            chosen = example
            choice = (
                f"the first of {len(examples)} in which the careful base is right, the pushed base "
                "is wrong, and DMax revises a word"
            )
            break
    return Story(chosen, _answers(models, task, chosen, repeats=REPEATS), choice)


def _answers(
    models: Mapping[str, LLM], task: Task, example: Example, repeats: int
) -> tuple[Recording, ...]:
    return tuple(
        record(models[setting.model], task, setting, example, repeats) for setting in SETTINGS
    )


def record(llm: LLM, task: Task, setting: Setting, example: Example, repeats: int) -> Recording:
    """Decode an answer several times, alone in its batch, and keep the fastest."""
    params = replace(setting.params, max_new_tokens=task.max_new_tokens)
    runs = [list(_timed_events(llm, example.prompt, params)) for _ in range(repeats)]
    *events, (_, last) = min(runs, key=lambda run: run[-1][0])
    output = last.output
    assert output is not None, "the last event of a stream carries it"
    texts = [_text(llm, token) for token in output.token_ids]
    frames, revisions = _frames(llm, events, mistakes(texts, example.reference or ""))
    return Recording(
        setting,
        frames,
        output,
        extracted=task.extract(output.text),
        is_correct=task.score(output.text, example),
        revisions=revisions,
    )


def mistakes(texts: Sequence[str], solution: str) -> frozenset[int]:
    """Where an answer is certainly wrong, as indices of its tokens.

    A word that is said twice in a row is a mistake, and so is a number that the solution does not
    hold. There are other mistakes, which only a reader sees.

    Args:
        texts: the tokens of the answer.
        solution: a right one.
    """
    numbers = set(re.findall(r"\d+", solution))
    words = [text.strip() for text in texts]
    said_twice = {
        index for index in range(1, len(words)) if words[index] and words[index] == words[index - 1]
    }
    foreign = {
        index for index, word in enumerate(words) if word.isdecimal() and word not in numbers
    }
    return frozenset(said_twice | foreign)


def _timed_events(llm: LLM, prompt: str, params: DecodingParams) -> Iterator[TimedEvent]:
    """What happened, each with the seconds since the question."""
    began = time.perf_counter()
    for event in llm.stream(prompt, params):
        yield time.perf_counter() - began, event


def _frames(
    llm: LLM, events: Sequence[TimedEvent], wrong: frozenset[int]
) -> tuple[tuple[Frame, ...], tuple[tuple[str, str], ...]]:
    """The answer after every forward, and the tokens that were revised on the way."""
    frames = []
    revisions = []
    revised: set[int] = set()
    decoded: dict[int, str] = {}  # by position
    settled: tuple[Piece, ...] = ()
    for seconds, event in events:
        block = []
        is_final = event.kind == "committed"
        for index, text in enumerate(_texts(llm, event), start=event.position):
            if not text:
                block.append(Piece())
                continue
            before = decoded.get(index, text)
            is_new = before != text
            if is_new:
                revised.add(index)
                revisions.append((before.strip(), text.strip()))
            decoded[index] = text
            is_wrong = is_final and index in wrong
            block.append(Piece(text, is_final, index in revised, is_new, is_wrong))
        frames.append(Frame(seconds, (*settled, *block)))
        if is_final:
            settled = frames[-1].pieces
    return tuple(frames), tuple(revisions)


def _texts(llm: LLM, event: StreamEvent) -> Iterator[str]:
    """The tokens of a block up to the end of the text, empty where it is masked."""
    eos = llm.checkpoint.special_ids.eos_token_ids
    positions = zip(event.token_ids, event.masked, strict=True)
    for token, is_masked in takewhile(lambda position: position[0] not in eos, positions):
        yield "" if is_masked else _text(llm, token)


def _text(llm: LLM, token: int) -> str:
    """A token as a terminal may show it."""
    assert llm.tokenizer is not None, "the bundled models have one"
    return visible(str(llm.tokenizer.decode([token])))
