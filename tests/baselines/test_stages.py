"""Stages of trajectories: where they are cut, which pairs are drawn, what stood there."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dmax.baselines.cforce import stage_width
from dmax.baselines.stages import (
    NEVER,
    FollowedBatch,
    TrajectoryCollator,
    adjacent_stages,
    draw_stages,
    stage_cuts,
)
from dmax.errors import InputError
from dmax.records.encoding import Encoded
from dmax.records.trajectories import REMASKED
from dmax.training.vocabulary import IGNORE

BLOCK = 4
EOS = 0
MASK = 99
COLLATE = TrajectoryCollator(block_length=BLOCK, eos_token_id=EOS, eos_labels=BLOCK)
WRITES = [  # after a prompt of 6: the rest of block 1, blocks 2 and 3
    *([1, 10], [2, 11]),
    *([1, 12, 3, 22], [1, 13], [1, 14], [4, 15]),
    *([2, 16], [1, 17, 2, REMASKED, 4, 17], [3, EOS], [1, EOS, 5, 18, 6, EOS]),
]


def example(writes: list[list[int]] = WRITES, prompt: int = 6, **changes: Any) -> Encoded:
    trajectory = {"prompt_tokens": prompt, "block_length": BLOCK, "writes": writes} | changes
    response = [each[-1] for each in writes if each[-1] != EOS]
    prompt_ids = [*range(50, 50 + prompt)]
    return Encoded(prompt_ids=prompt_ids, response_ids=response, trajectory=json.dumps(trajectory))


def batch_of(*examples: Encoded) -> FollowedBatch:
    fields: Any = COLLATE(examples)
    return FollowedBatch(**fields)


def steps(*first: int) -> Tensor:
    return torch.tensor([first])


@pytest.mark.parametrize(
    ("first", "last", "width", "expected"),
    [
        ([1, 2, 3, 4], 4, 1, [0, 1, 2, 3, 4, 4]),
        ([4, 2, 1, 3], 4, 1, [0, 1, 2, 3, 4, 4]),  # whatever their places
        ([1, 2, 3, 4], 4, 2, [0, 2, 4, 4]),
        ([1, 2, 3, 4], 4, 3, [0, 3, 4]),
        ([1, 2, 3, 4], 4, 9, [0, 4]),
        ([1, 1, 1, 3], 3, 1, [0, 1, 1, 1, 3, 3]),  # three cuts are crossed in one step
        ([1, 1, 1, 1], 1, 2, [0, 1, 1, 1]),
        ([1, 1, 2, 2], 7, 2, [0, 1, 2, 7]),  # edits after all is shown
        ([2, 5, NEVER, NEVER], 5, 1, [0, 2, 5, 5, 5, 5]),  # two positions are prompt
        ([NEVER] * 4, 0, 2, [0, 0, 0, 0]),  # a block without a trajectory
    ],
)
def test_stages_are_cut_by_the_tokens_shown(
    first: list[int], last: int, width: int, expected: list[int]
) -> None:
    assert stage_cuts(steps(*first), torch.tensor([last]), width).tolist() == [expected]


def test_a_cut_is_the_first_state_with_so_many_tokens() -> None:
    """By counting, for random trajectories of every shape."""
    generator = torch.Generator().manual_seed(0)
    for width in range(1, 10):
        first = torch.randint(1, 9, (50, 8), generator=generator)
        last = first.amax(dim=1) + torch.randint(3, (50,), generator=generator)
        for row, cuts in zip(range(50), stage_cuts(first, last, width).tolist(), strict=True):
            shown = [int((first[row] <= step).sum()) for step in range(int(last[row]) + 1)]
            for stage, cut in enumerate(cuts):
                reached = [at for at, count in enumerate(shown) if count >= stage * width]
                assert cut == (reached[0] if reached else int(last[row]))
            assert cuts[-1] == last[row]


def pairs(cuts: Tensor, full: int, draws: str, num: int = 3000) -> Counter[tuple[int, int]]:
    generator = torch.Generator().manual_seed(1)
    many = cuts.expand(num, -1)
    early, late = draw_stages(many, torch.full((num,), full), generator, draws)
    return Counter(zip(early.tolist(), late.tolist(), strict=True))


def test_distinct_states_are_drawn_evenly_and_the_next_one_differs() -> None:
    cuts = steps(0, 1, 1, 1, 3, 4, 4)
    found = pairs(cuts, full=4, draws="states")
    assert set(found) == {(0, 1), (1, 3), (3, 4)}
    assert all(900 < count < 1100 for count in found.values())


def test_cuts_are_drawn_evenly_where_that_is_asked_for() -> None:
    found = pairs(steps(0, 1, 1, 1, 3, 4, 4), full=4, draws="cuts")
    assert set(found) == {(0, 1), (1, 3), (3, 4)}
    assert 1650 < found[1, 3] < 1950  # three cuts of five
    assert 500 < found[0, 1] < 700


def test_a_state_without_masks_is_never_the_early_one() -> None:
    assert set(pairs(steps(0, 2, 7), full=2, draws="states")) == {(0, 2)}
    assert set(pairs(steps(0, 2, 7), full=2, draws="cuts")) == {(0, 2)}


def test_a_block_without_a_trajectory_stays_as_it_is() -> None:
    early, late = draw_stages(steps(0, 0, 0), torch.tensor([0]), torch.Generator())
    assert (early.tolist(), late.tolist()) == ([0], [0])


# --- batches --------------------------------------------------------------------------------------


def test_a_batch_holds_the_final_tokens_and_all_steps() -> None:
    batch = batch_of(example())
    final = [10, 11, 22, 13, 14, 15, 16, 17, EOS, EOS]
    assert batch.clean_ids[0, :16].tolist() == [*range(50, 56), *final]
    assert batch.labels[0, :16].tolist() == [IGNORE] * 6 + final
    assert (batch.labels[0, 16:] == IGNORE).all()  # EOS labels, but no trajectory
    assert batch.write_steps.shape == (1, batch.clean_ids.shape[1], 3)
    assert batch.write_steps[0, 8].tolist() == [1, 3, NEVER]
    assert batch.write_tokens[0, 8].tolist()[:2] == [12, 22]
    assert (batch.write_steps[0, :6] == NEVER).all()
    assert batch.progress == 0


def test_a_response_that_is_encoded_to_more_tokens_has_ended_with_its_trajectory() -> None:
    """A token that is half a character comes back from the text as several."""
    longer = Encoded(**{**example(), "response_ids": [*range(10, 21)]})
    COLLATE.check([longer])
    batch, expected = batch_of(longer), batch_of(example())
    length = expected.clean_ids.shape[1]
    for name in ("clean_ids", "labels", "write_steps"):
        assert torch.equal(getattr(batch, name)[:, :length], getattr(expected, name))
    assert (batch.clean_ids[:, 16:] == EOS).all()


def test_any_token_that_ends_a_response_ends_its_trajectory() -> None:
    other = 7
    writes = [[other if token == EOS else token for token in each] for each in WRITES]
    longer = Encoded(**{**example(writes), "response_ids": [*range(10, 23)]})
    with pytest.raises(InputError, match="its trajectory has 10 tokens, and the response has 13"):
        COLLATE.check([longer])
    replace(COLLATE, end_ids=(other,)).check([longer])


def test_padding_changes_nothing_of_an_example() -> None:
    longer = example(WRITES + [[1, 5]] * 8, prompt=6)
    alone, both = batch_of(example()), batch_of(example(), longer)
    length = alone.clean_ids.shape[1]
    for name in ("clean_ids", "labels", "corruptible", "write_steps", "write_tokens"):
        assert torch.equal(getattr(both, name)[:1, :length], getattr(alone, name))


def test_eos_labels_end_what_is_learnt() -> None:
    collate = TrajectoryCollator(block_length=BLOCK, eos_token_id=EOS, eos_labels=1)
    labels = collate([example()])["labels"][0]
    assert labels[14] == EOS  # behind 6 prompt and 8 response tokens
    assert (labels[15:] == IGNORE).all()


@pytest.mark.parametrize(
    ("wrong", "message", "hint"),
    [
        ({"trajectory": None}, "there is no trajectory to learn from", "distill --trajectories"),
        ({"trajectory": {"steps": 3}}, "there is no trajectory to learn from", "--trajectories"),
        ({"trajectory": '{"steps": 3}'}, "there is no trajectory to learn from", "--trajectories"),
        (
            {"trajectory": example(block_length=8)["trajectory"]},
            "its trajectory has blocks of 8 positions, and the model has blocks of 4",
            "block_length",
        ),
        (
            {"trajectory": example(prompt_tokens=5)["trajectory"]},
            "its trajectory follows 5 prompt tokens, and the prompt has 6",
            "chat template",
        ),
        (
            {"trajectory": example(WRITES[:-1])["trajectory"]},
            "its trajectory of 9 tokens ends inside a block",
            "record it anew",
        ),
        (
            {"trajectory": example(WRITES + [[1, 5]])["trajectory"]},
            "its trajectory of 11 tokens ends inside a block",
            "record it anew",
        ),
        (
            {"trajectory": example(WRITES[:6])["trajectory"]},
            "its trajectory has 6 tokens, and the response has 8",
            "record it anew",
        ),
    ],
)
def test_an_example_without_a_usable_trajectory_is_named(
    wrong: Any, message: str, hint: str
) -> None:
    examples: Any = [example(), {**example(), **wrong}]
    for refused in (lambda: COLLATE.check(examples), lambda: COLLATE(examples[1:])):
        with pytest.raises(InputError) as raised:
            refused()
        assert message in raised.value.message
        assert hint in (raised.value.hint or "")
    examples[1]["where"] = "here.jsonl:2"
    with pytest.raises(InputError, match=r"here\.jsonl:2: "):
        COLLATE.check(examples)


def test_a_response_that_was_cut_may_go_on_behind_its_trajectory() -> None:
    cut: Any = {**example(WRITES[:6]), "response_ids": [5] * 8, "is_cut": True}
    COLLATE.check([cut])
    batch = batch_of(cut)
    assert (batch.labels[0, 12:] == IGNORE).all() and (batch.labels[0, 6:12] != IGNORE).all()


@pytest.mark.parametrize(
    ("position", "place", "token", "message"),
    [
        (2, 1, MASK, "the text holds the mask token"),  # edited away later
        (9, -1, MASK, "the text holds the mask token"),
        (3, 1, 200, "200 is not a token id below 200"),
    ],
)
def test_a_token_that_the_model_cannot_learn_is_refused_with_its_example(
    position: int, place: int, token: int, message: str
) -> None:
    writes = [[*each] for each in WRITES]
    writes[position][place] = token
    wrong: Any = {**example(), "trajectory": example(writes)["trajectory"]}
    COLLATE.check([example()] * 2, (200, MASK))
    with pytest.raises(InputError, match=f"example 2: {message}"):
        COLLATE.check([example(), wrong], (200, MASK))
    with pytest.raises(InputError, match=rf"here\.jsonl:7: {message}"):
        COLLATE.check([example(), {**wrong, "where": "here.jsonl:7"}], (200, MASK))


# --- pairs of states ------------------------------------------------------------------------------


def drawn(batch: FollowedBatch, width: int, seed: int, **options: Any) -> list[list[int]]:
    stages = adjacent_stages(
        batch,
        width,
        block_length=BLOCK,
        mask_token_id=MASK,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )
    return [each[0, :16].tolist() for each in stages]


def block(states: list[list[int]], number: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(each[number * BLOCK : (number + 1) * BLOCK]) for each in states)


def test_blocks_show_two_adjacent_states_of_their_own() -> None:
    batch = batch_of(example())
    found = [drawn(batch, 2, seed) for seed in range(60)]
    no = (False,) * 4
    assert {block(states, 0) for states in found} == {((50, 51, 52, 53), (50, 51, 52, 53), no)}
    assert {block(states, 1) for states in found} == {
        # Two generated positions: one cut at 2 tokens, which is the final state.
        ((54, 55, MASK, MASK), (54, 55, 10, 11), no),
    }
    assert {block(states, 2) for states in found} == {
        # 3 tokens at step 1 cross the cut at 2; that at 4 is crossed at step 4, after an edit.
        ((MASK,) * 4, (12, 13, 14, MASK), no),
        ((12, 13, 14, MASK), (22, 13, 14, 15), (False,) * 4),
    }
    assert {block(states, 3) for states in found} == {
        # Shown at 1, 1, 2, 3: cuts at steps 1 and 3; the edits end at step 6.
        ((MASK,) * 4, (MASK, 17, MASK, EOS), no),
        ((MASK, 17, MASK, EOS), (16, MASK, EOS, EOS), no),
    }


def test_edits_between_two_stages_are_marked() -> None:
    batch = batch_of(example())
    found = [drawn(batch, 4, seed) for seed in range(20)]
    assert {block(states, 2) for states in found} == {
        ((MASK,) * 4, (22, 13, 14, 15), (True, False, False, False)),
    }
    # Taken back and shown again counts as changed; so does changed and changed back.
    whole = [drawn(batch, 9, seed) for seed in range(20)]
    assert {block(states, 3) for states in whole} == {
        ((MASK,) * 4, (16, 17, EOS, EOS), (False, True, False, True)),
    }


def test_the_last_state_is_the_response() -> None:
    batch = batch_of(example())
    late = drawn(batch, 99, seed=0)[1]
    assert late == batch.clean_ids[0, :16].tolist()


def test_the_generator_decides() -> None:
    batch = batch_of(example(), example([[each, each] for each in range(1, 11)]))
    for draws in ("states", "cuts"):
        assert drawn(batch, 1, 3, draws=draws) == drawn(batch, 1, 3, draws=draws)
    assert len({str(drawn(batch, 1, seed)) for seed in range(9)}) > 3
    assert drawn(replace(batch, progress=0.5), 1, 3) == drawn(batch, 1, 3)


# --- the width ------------------------------------------------------------------------------------


def test_stages_grow_from_an_eighth_to_half_a_block() -> None:
    assert [stage_width(progress / 4) for progress in range(5)] == [4, 7, 10, 13, 16]
    assert [stage_width(progress / 12) for progress in range(13)] == [*range(4, 17)]
    assert {stage_width(progress, 8, 8) for progress in (0.0, 0.3, 1.0)} == {8}
    assert [stage_width(progress, 16, 4) for progress in (0, 1)] == [16, 4]
    assert stage_width(0.0, 0.125, 4) == 1
