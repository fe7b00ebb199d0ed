"""Objectives by name, ours and a plugin's: what they draw, and what they are decoded with."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from torch import Tensor

import dmax
import dmax.training
from dmax.baselines.objectives import D2FObjective
from dmax.baselines.rollouts import SoftOPUT
from dmax.errors import InputError
from dmax.training import get_objective, objective_table
from dmax.training.clean_stream import CleanBatch, noisy_positions, take
from dmax.training.objectives import MDLM, OPUT, Objective
from dmax.training.vocabulary import IGNORE

BLOCK = 4
VOCAB = 48
MASK = 47
SETTINGS: dict[str, Any] = {
    "block_length": BLOCK,
    "mask_token_id": MASK,
    "mask_ratio_low": 0.3,
    "mask_ratio_high": 0.8,
    "loss_average": "sequences",
    "rollout": "argmax",
    "rollout_temperature": 1.0,
    "certainty_weight": 2.0,
    "certainty_temperature": 0.5,
    "cad_weight": "confidence",
    "cad_temperature": 1.0,
    "cad_floor": 1e-6,
    "reveal_weight": 1.0,
    "edited_loss": "cad",
    "stage_width_first": None,
    "stage_width_last": None,
    "stage_draw": "states",
    "learning_rate": 1.0,  # a training argument that is none of theirs
}


def test_objectives_of_ours_and_their_rollouts() -> None:
    ours = ("mdlm", "uniform", "oput", "dparallel", "d2f", "mbd_oput", "mmd", "cforce")
    assert tuple(objective_table()) == ours
    assert get_objective("mdlm") is MDLM
    assert get_objective("oput") is get_objective("oput", "sample") is OPUT
    assert get_objective("oput", "soft") is get_objective("oput", "spd") is SoftOPUT
    assert get_objective("mdlm", "soft") is MDLM  # which has no rollout


def test_each_objectives_a_decoding_that_exists() -> None:
    decodings = {name: get_objective(name).decoding for name in objective_table()}
    assert decodings.pop("cforce") is None  # that of the model it begins with
    assert decodings == {
        "mdlm": "threshold",
        "uniform": "spd",
        "oput": "spd",
        "dparallel": "dparallel",
        "d2f": "d2f",
        "mbd_oput": "mbd",
        "mmd": "spd",
    }
    assert set(decodings.values()) <= set(dmax.strategies())


@pytest.mark.parametrize(
    ("name", "rollout", "message", "hint"),
    [
        (
            "opud",
            "argmax",
            "`objective` must be one of mdlm, uniform, oput, dparallel, d2f, mbd_oput, mmd, "
            "cforce, got 'opud'",
            "did you mean `oput`?",
        ),
        (
            "oput",
            "sampled",
            "`rollout` must be one of argmax, sample, soft, spd, got 'sampled'",
            "did you mean `sample`?",
        ),
    ],
)
def test_an_unknown_name_is_answered_with_the_choices(
    name: str, rollout: str, message: str, hint: str
) -> None:
    with pytest.raises(InputError) as error:
        get_objective(name, rollout)
    assert error.value.message == message
    assert error.value.hint == hint


def test_a_plugin_is_found_and_cannot_take_a_name_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    target = "dmax.training.objectives:MDLM"
    found = [EntryPoint(name, target, "dmax.objectives") for name in ("mine", "oput")]
    monkeypatch.setattr(
        dmax.training, "entry_points", lambda group: found if group == "dmax.objectives" else []
    )
    assert "mine" in objective_table()
    assert list(objective_table()).count("oput") == 1
    assert get_objective("mine") is MDLM
    assert get_objective("oput") is OPUT


def test_a_plugin_that_cannot_be_loaded_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [EntryPoint("mine", "torch:Gone", "dmax.objectives")]
    monkeypatch.setattr(dmax.training, "entry_points", lambda group: found)
    with pytest.raises(InputError, match=r"the plugin `mine` \(torch:Gone\) cannot be loaded: "):
        get_objective("mine")


def test_the_annex_is_imported_for_its_own_objectives_only() -> None:
    program = (
        "import sys\n"
        "from dmax.training import get_objective\n"
        "import dmax.training.trainer\n"
        "get_objective('oput')\n"
        "print([name for name in sys.modules if name.startswith('dmax.baselines')])\n"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


class Recorder(torch.nn.Module):
    """A model without weights to train that keeps the ids of every noisy stream it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"vocab_size": VOCAB, "_attn_implementation": "eager"})
        self.embedding = torch.nn.Embedding(VOCAB, VOCAB)
        self.embedding.weight.data = torch.eye(VOCAB)
        self.seen: list[Tensor] = []

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embedding

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: slice = slice(None),
        past_key_values: Any = None,
        **_: Any,
    ) -> Any:
        ids = input_ids if inputs_embeds is None else inputs_embeds.argmax(dim=-1)
        assert ids is not None
        ids = ids[:, logits_to_keep]
        if past_key_values is not None:
            past_key_values.layers[0] = ()  # as a layer would record its keys and values
        self.seen.append(ids)
        logits = torch.nn.functional.one_hot(ids, VOCAB).float()
        return type("Outputs", (), {"logits": logits})


@pytest.fixture
def clean() -> CleanBatch:
    """Prompts of 9 and 13 tokens in blocks of 4: two whole blocks are prompt in both."""
    ids = torch.randint(MASK, (2, 6 * BLOCK), generator=torch.Generator().manual_seed(1))
    is_response = torch.arange(6 * BLOCK) >= torch.tensor([[9], [13]])
    return CleanBatch(ids, ids.masked_fill(~is_response, IGNORE), is_response)


def streams(objective: Objective, clean: CleanBatch, seed: int = 0) -> list[Tensor]:
    model = Recorder()
    objective.loss(model, clean, torch.Generator().manual_seed(seed))
    return model.seen


def copied(clean: CleanBatch, values: Tensor, name: str) -> Tensor:
    """What of [B, L] an objective's noisy copies hold: the blocks of responses, or all (D2F)."""
    return values if name == "d2f" else take(values, noisy_positions(clean, BLOCK))


# The others need layers or trajectories.
@pytest.mark.parametrize("name", sorted(objective_table().keys() - {"mmd", "cforce"}))
def test_noise_falls_on_responses_only_and_repeats_with_the_seed(
    name: str, clean: CleanBatch
) -> None:
    objective = get_objective(name).from_settings(SETTINGS)
    found = streams(objective, clean)
    assert len(found) == (2 if name in ("uniform", "oput", "mbd_oput") else 1)
    for ids, again in zip(found, streams(objective, clean), strict=True):
        assert torch.equal(ids, again)
    for ids in found:
        changed = ids != copied(clean, clean.clean_ids, name)
        assert changed.any()
        assert not (changed & ~copied(clean, clean.corruptible, name)).any()
    assert not torch.equal(found[0], streams(objective, clean, seed=1)[0])
    if name == "uniform":
        assert (found[1] != MASK).all()


def test_the_noisy_copies_are_the_blocks_of_each_response(clean: CleanBatch) -> None:
    """Prompts of 9 and 13 tokens end in the blocks at 8 and 12; both responses end at 23."""
    assert noisy_positions(clean, BLOCK).tolist() == [[*range(8, 24)], [*range(12, 28)]]
    short = clean.labels.clone()
    short[0, 13:] = IGNORE  # this response has labels in two blocks, the other one in three
    spans = noisy_positions(replace(clean, labels=short), BLOCK)
    assert spans.tolist() == [[*range(8, 20)], [*range(12, 24)]]
    beyond = take(clean.labels, noisy_positions(clean, BLOCK), beyond=IGNORE)
    assert (beyond[1, -BLOCK:] == IGNORE).all() and (beyond[0, -BLOCK:] != IGNORE).all()
    # D2F has no clean half, so it needs the prompt in its one stream.
    (ids,) = streams(D2FObjective.from_settings(SETTINGS), clean)
    assert torch.equal(ids[:, :8], clean.clean_ids[:, :8])


def test_nothing_to_learn_leaves_one_block(clean: CleanBatch) -> None:
    empty = replace(clean, labels=torch.full_like(clean.labels, IGNORE))
    assert noisy_positions(empty, BLOCK).shape == (2, BLOCK)
