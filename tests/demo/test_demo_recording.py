"""What the demo records: every forward of a real answer, what was revised, and what is wrong."""

from __future__ import annotations

import pytest

from dmax.demo.recording import _text, find_story, mistakes
from dmax.demo.settings import CAREFUL, DMAX, PUSHED, SETTINGS
from dmax.demo.story import Story
from dmax.llm import LLM
from dmax.tasks import get_task


def test_a_recording_has_every_forward_and_ends_with_the_answer(story: Story) -> None:
    assert [recording.setting for recording in story.recordings] == list(SETTINGS)
    for recording in story.recordings:
        assert len(recording.frames) == recording.output.num_forwards
        times = [frame.seconds for frame in recording.frames]
        assert times == sorted(times)
        assert recording.num_forwards(0) == 0
        assert recording.num_forwards(recording.seconds) == recording.output.num_forwards
        last = recording.frames[-1].pieces
        assert "".join(piece.text for piece in last) == recording.output.text
        assert all(piece.is_final for piece in last)


def test_the_story_is_the_first_that_its_rule_names(models: dict[str, LLM], story: Story) -> None:
    careful, pushed, dmax = story.recordings
    assert careful.is_correct and not pushed.is_correct and dmax.revisions
    assert story.choice.startswith("the first of 4 in which the careful base is right")
    task = get_task("word_problems")
    first = task.examples(1, 2026)
    other = find_story(models, task, first)  # that one does not show it
    assert (other.example, other.choice) == (first[0], "the first of 1")


def test_only_dmax_revises_and_every_revision_is_shown(story: Story) -> None:
    careful, pushed, dmax = story.recordings
    assert (careful.setting, pushed.setting, dmax.setting) == (CAREFUL, PUSHED, DMAX)
    assert careful.revisions == pushed.revisions == ()
    new = [piece for frame in dmax.frames for piece in frame.pieces if piece.is_new]
    assert [piece.text.strip() for piece in new] == [after for _, after in dmax.revisions]
    assert all(piece.is_revised for piece in new)


def test_mistakes_are_marked_only_where_a_block_is_final(story: Story) -> None:
    _, pushed, dmax = story.recordings
    assert sum(piece.is_wrong for piece in pushed.frames[-1].pieces) >= 3
    assert not any(piece.is_wrong for piece in dmax.frames[-1].pieces)
    for frame in pushed.frames:
        assert all(piece.is_final for piece in frame.pieces if piece.is_wrong)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("First 13 + 5 is 18", []),
        ("First 13 13 5 is 18", [2]),
        ("the buttons buttons buttons", [2, 3]),
        ("is 19 of 18", [1]),
        (". . \n \n", [1]),
        ("", []),
    ],
)
def test_a_repeat_and_a_foreign_number_are_mistakes(words: str, expected: list[int]) -> None:
    texts = [f" {word}" for word in words.split(" ")]
    assert sorted(mistakes(texts, "13 + 5 is 18\n#### 18")) == expected


def test_what_a_terminal_would_obey_is_not_shown(models: dict[str, LLM]) -> None:

    llm = models[DMAX.model]

    ids = llm.tokenizer.encode("\x1b", add_special_tokens=False)
    assert "\x1b" not in "".join(_text(llm, token) for token in ids)
