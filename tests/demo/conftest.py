"""One story for all tests of the demo: real answers of the bundled models, decoded once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dmax.demo.recording import find_story
from dmax.demo.settings import SETTINGS
from dmax.demo.story import Story
from dmax.llm import LLM
from dmax.tasks import get_task

SEED = 2026


@pytest.fixture(scope="session")
def models() -> dict[str, LLM]:
    names = {setting.model for setting in SETTINGS}
    return {name: LLM(name, device="cpu", dtype="float32", max_batch_size=1) for name in names}


@pytest.fixture(scope="session")
def story(models: dict[str, LLM]) -> Story:
    """Its forwards take 10 ms each, whatever the machine is doing."""
    task = get_task("word_problems")
    found = find_story(models, task, task.examples(4, SEED))
    recordings = tuple(
        replace(
            recording,
            frames=tuple(
                replace(frame, seconds=0.01 * number)
                for number, frame in enumerate(recording.frames, start=1)
            ),
        )
        for recording in found.recordings
    )
    return replace(found, recordings=recordings)
