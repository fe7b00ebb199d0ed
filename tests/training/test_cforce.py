"""CForce: its divergence, who learns by what, and training on recorded trajectories."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import small_network
from test_trainer import losses, write_recipe
from torch import Tensor

from dmax import LLM, DecodingParams
from dmax.attention import dense_mask, noisy_clean
from dmax.baselines import cforce
from dmax.baselines.cforce import (
    EDITED,
    WEIGHTS,
    CForce,
    Divergence,
    cforce_loss,
    learners,
    log_probs,
)
from dmax.baselines.stages import FollowedBatch, Stages, TrajectoryCollator, adjacent_stages
from dmax.distill.files import ResponseFiles
from dmax.distill.model import ModelAnswerer
from dmax.distill.run import distill
from dmax.errors import InputError
from dmax.recipe.run import run_recipe
from dmax.recipe.sections import load_recipe
from dmax.records.encoding import Encoded
from dmax.special_ids import reads_shifted
from dmax.tasks.word_problems import problems
from dmax.tiny import bundled
from dmax.training.config import DMaxConfig
from dmax.training.objectives import Loss, ObjectiveModule
from dmax.training.vocabulary import IGNORE, in_chunks

ROOT = Path(__file__).parents[2]
BLOCK = 4
VOCAB = 48
MASK = 30
EOS = 46
SETTINGS: dict[str, Any] = {
    "block_length": BLOCK,
    "mask_token_id": MASK,
    "mask_ratio_low": 0.5,
    "mask_ratio_high": 0.5,
    "loss_average": "sequences",
    "cad_weight": "confidence",
    "cad_temperature": 1.0,
    "cad_floor": 1e-6,
    "reveal_weight": 1.0,
    "edited_loss": "cad",
    "stage_width_first": 1,
    "stage_width_last": 3,
    "stage_draw": "states",
}


@pytest.fixture
def model() -> Any:
    network = small_network("llada2_moe", "eager", vocab_size=VOCAB, eos=EOS, head_dim=8)
    return network.double()


def example(seed: int, length: int, prompt: int = 5) -> Encoded:
    """Tokens that are shown at random steps, some of them edited later."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, low: int = 0) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    writes = []
    for _ in range(length):
        step, token = draw(6, 1), draw(MASK)
        writes.append([step, token])
        if draw(3) == 0:
            writes[-1] += [step + draw(4, 1), (token + 1) % MASK]
    trajectory = {"prompt_tokens": prompt, "block_length": BLOCK, "writes": writes}
    return Encoded(
        prompt_ids=[draw(MASK) for _ in range(prompt)],
        response_ids=[each[-1] for each in writes],
        trajectory=json.dumps(trajectory),
    )


def followed(*examples: Encoded) -> FollowedBatch:
    fields: Any = TrajectoryCollator(BLOCK, EOS, BLOCK)(examples)
    return FollowedBatch(**fields)


@pytest.fixture
def batch() -> FollowedBatch:
    return followed(example(1, 11), example(2, 15))


def stages_of(batch: FollowedBatch, width: int = 2, seed: int = 0) -> Stages:
    generator = torch.Generator().manual_seed(seed)
    return adjacent_stages(
        batch, width, block_length=BLOCK, mask_token_id=MASK, generator=generator
    )


def loss_of(
    model: Any, batch: FollowedBatch, stages: Stages, edited_loss: str = "cad", **options: Any
) -> Loss:
    who = learners(stages, batch.labels, MASK, edited_loss)
    return cforce_loss(
        model,
        batch.clean_ids,
        stages,
        None,
        who,
        **{"block_length": BLOCK, "mask_token_id": MASK} | options,
    )


def gradient(model: Any, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    return torch.cat([each.flatten() for each in gradients])


def random_log_probs(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return logits.log_softmax(dim=-1)


# --- the divergence -------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", WEIGHTS)
def test_equal_predictions_do_not_differ_and_pull_nowhere(weight: str) -> None:
    logits = random_log_probs(5, 20).requires_grad_()
    log_p = logits.log_softmax(dim=-1)
    found = Divergence(weight, floor=0).of(log_p, log_p.detach())
    assert found.abs().max() < 1e-15
    found.sum().backward()
    assert logits.grad is not None and logits.grad.abs().max() < 1e-15


@pytest.mark.parametrize("weight", WEIGHTS)
def test_different_predictions_differ(weight: str) -> None:
    log_p, log_t = random_log_probs(5, 20), random_log_probs(5, 20, seed=1)
    assert (Divergence(weight).of(log_p, log_t) > 0.01).all()


def test_the_share_of_the_reverse_direction_is_as_named() -> None:
    log_p, log_t = random_log_probs(5, 20), random_log_probs(5, 20, seed=1)
    p, t = log_p.exp(), log_t.exp()
    forward = (t * (t / p).log()).sum(-1)
    reverse = (p * (p / t).log()).sum(-1)
    c = t.amax(-1)
    expected = {
        "confidence": (1 - c) * forward + c * reverse,
        "doubt": c * forward + (1 - c) * reverse,
        "forward": forward,
        "half": (forward + reverse) / 2,
    }
    for weight, value in expected.items():
        torch.testing.assert_close(Divergence(weight, floor=0).of(log_p, log_t), value)


def test_the_forward_direction_is_soft_cross_entropy_without_the_targets_entropy() -> None:
    logits = random_log_probs(5, 20).requires_grad_()
    log_t = random_log_probs(5, 20, seed=1)
    cross_entropy = F.cross_entropy(logits, log_t.exp(), reduction="none")
    entropy = torch.special.entr(log_t.exp()).sum(-1)
    found = Divergence("forward").of(logits.log_softmax(-1), log_t)
    torch.testing.assert_close(found, cross_entropy - entropy)
    [one] = torch.autograd.grad(found.sum(), logits, retain_graph=True)
    [other] = torch.autograd.grad(cross_entropy.sum(), logits)
    torch.testing.assert_close(one, other)


def test_jensen_shannon_is_symmetric_and_bounded() -> None:
    log_p, log_t = random_log_probs(9, 20, scale=30), random_log_probs(9, 20, seed=1, scale=30)
    found = Divergence("jsd").of(log_p, log_t)
    torch.testing.assert_close(found, Divergence("jsd").of(log_t, log_p))
    assert (found <= math.log(2) + 1e-12).all()


def test_the_floor_bounds_the_reverse_direction() -> None:
    log_t = torch.tensor([[0.0, -500.0]], dtype=torch.float64)
    log_p = torch.full((1, 2), 0.5, dtype=torch.float64).log()
    assert Divergence("confidence", floor=0).of(log_p, log_t).item() > 200
    floored = Divergence("confidence", floor=1e-6).of(log_p, log_t).item()
    assert floored == pytest.approx(math.log(0.5) - math.log(1e-6) / 2)


def test_a_temperature_changes_the_confidence_only() -> None:
    log_t = random_log_probs(5, 20, seed=1)
    sharper = Divergence(temperature=0.5).confidence(log_t)
    torch.testing.assert_close(sharper, (2 * log_t).softmax(-1).amax(-1))
    assert (sharper > Divergence().confidence(log_t)).all()
    same = [Divergence("forward", temperature).of(log_t, log_t / 2) for temperature in (0.5, 1)]
    assert torch.equal(*same)


def test_mask_is_no_token() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    found = log_probs(logits, MASK)
    assert found.shape == (3, VOCAB - 1)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(3))
    raised = logits.clone()
    raised[:, MASK] = 1e4
    assert torch.equal(log_probs(raised, MASK), found)
    assert log_probs(logits.bfloat16(), MASK).dtype == torch.float32
    assert log_probs(logits.double(), MASK).dtype == torch.float64


def test_chunks_are_put_together_and_their_gradients_too() -> None:
    rows = torch.arange(7.0).requires_grad_()
    [whole] = in_chunks(lambda part: (rows[part] ** 2,), 7, vocab_size=10)
    [pieces] = in_chunks(lambda part: (rows[part] ** 2,), 7, vocab_size=10, chunk=20)
    assert torch.equal(whole, pieces)
    [one], [other] = (torch.autograd.grad(each.sum(), rows) for each in (whole, pieces))
    assert torch.equal(one, other)
    assert in_chunks(lambda part: (rows[:0][part],), 0, vocab_size=10)[0].shape == (0,)


# --- who learns -----------------------------------------------------------------------------------


def test_who_learns_by_what() -> None:
    m = MASK
    stages = Stages(
        early=torch.tensor([[m, m, m, 7, m]]),
        late=torch.tensor([[m, 5, 6, 8, m]]),
        edited=torch.tensor([[False, False, True, True, False]]),
    )
    labels = torch.tensor([[1, 1, 1, 1, IGNORE]])
    yes_no = {
        "cad": ([1, 0, 1, 0, 0], [0, 1, 0, 0, 0]),
        "ce": ([1, 0, 0, 0, 0], [0, 1, 1, 0, 0]),
        "both": ([1, 0, 1, 0, 0], [0, 1, 1, 0, 0]),
    }
    assert set(yes_no) == set(EDITED)
    for edited_loss, (agreeing, told) in yes_no.items():
        who = learners(stages, labels, MASK, edited_loss)
        assert who.all.int().tolist() == [[1, 1, 1, 0, 0]]
        assert who.agreeing.int().tolist() == [agreeing]
        assert who.told.int().tolist() == [told]


# --- the loss -------------------------------------------------------------------------------------


@torch.no_grad()
def plain_loss(model: Any, batch: FollowedBatch, stages: Stages) -> float:
    """Equations 9 to 13 as they are written, over [noisy | clean] and one position at a time."""
    length = batch.clean_ids.shape[1]
    position = torch.arange(2 * length)
    mask = dense_mask(noisy_clean(BLOCK, length), position, position)[None, None]
    embed = model.get_input_embeddings()

    def log_probs_of(ids: Tensor) -> Tensor:
        embeds = embed(torch.cat((ids, batch.clean_ids), dim=1))
        places = (position % length)[None]
        logits = model(inputs_embeds=embeds, attention_mask=mask, position_ids=places).logits
        at = torch.arange(length)
        if reads_shifted(model.config):  # the state before: clean where another block ends
            at = torch.where(at % BLOCK > 0, at - 1, (length + at - 1) * (at > 0))
        logits = logits[:, at].clone()
        logits[..., MASK] = -torch.inf
        return logits.log_softmax(-1)

    log_p, log_t = log_probs_of(stages.early), log_probs_of(stages.late)
    total = 0.0
    for row in range(len(batch.clean_ids)):
        agreeing, told = [], []
        for at in range(length):
            early, late = int(stages.early[row, at]), int(stages.late[row, at])
            if early != MASK or batch.labels[row, at] == IGNORE:
                continue
            if late != MASK and not stages.edited[row, at]:
                told.append(-log_p[row, at, late].item())
                continue
            tokens = [token for token in range(VOCAB) if token != MASK]
            p, t = log_p[row, at, tokens], log_t[row, at, tokens]
            c = t.exp().max()
            forward = (t.exp() * (t - p)).sum()
            reverse = (p.exp() * (p - t.clamp(min=math.log(1e-6)))).sum()
            agreeing.append(float((1 - c) * forward + c * reverse))
        for values in (agreeing, told):
            total += sum(values) / max(1, len(values)) / len(batch.clean_ids)
    return total


@pytest.mark.parametrize("shift", [False, True], ids=["own", "shifted"])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_paper_s_equations(
    model: Any, batch: FollowedBatch, seed: int, shift: bool
) -> None:
    model.config.shift = shift
    stages = stages_of(batch, seed=seed)
    who = learners(stages, batch.labels, MASK)
    assert who.agreeing.any() and who.told.any() and (stages.edited & who.all).any()
    found = loss_of(model, batch, stages)
    assert found.total.item() == pytest.approx(plain_loss(model, batch, stages), rel=1e-7)
    assert found.total == found.parts["loss_cad"] + found.parts["loss_reveal"]
    weighed = loss_of(model, batch, stages, reveal_weight=3.0).total
    torch.testing.assert_close(weighed, found.parts["loss_cad"] + 3 * found.parts["loss_reveal"])


def test_equal_stages_give_no_loss_and_no_gradient(model: Any, batch: FollowedBatch) -> None:
    stages = stages_of(batch)
    equal = stages._replace(late=stages.early)
    for weight in WEIGHTS:
        found = loss_of(model, batch, equal, cad=Divergence(weight, floor=0))
        assert abs(found.total.item()) < 1e-13
        # Parts of the model compute in float32, whose last bits differ between the two forwards.
        assert gradient(model, found.total).abs().max() < 1e-6
    assert gradient(model, loss_of(model, batch, stages).total).abs().max() > 0.01


def test_no_gradient_reaches_the_later_prediction(
    model: Any, batch: FollowedBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient is that towards targets which are numbers, computed beforehand."""
    stages = stages_of(batch)
    seen: list[Tensor] = []
    make = cforce.log_probs

    def noted(logits: Tensor, mask_token_id: int) -> Tensor:
        seen.append(make(logits, mask_token_id))
        return seen[-1]

    monkeypatch.setattr(cforce, "log_probs", noted)
    found = gradient(model, loss_of(model, batch, stages).total)
    early, late = seen
    assert early.requires_grad and not late.requires_grad
    fixed = late.clone()
    calls = iter((make, lambda logits, mask_token_id: fixed))
    monkeypatch.setattr(cforce, "log_probs", lambda *given: next(calls)(*given))
    torch.testing.assert_close(gradient(model, loss_of(model, batch, stages).total), found)


def test_no_mask_left_means_cross_entropy_alone(model: Any, batch: FollowedBatch) -> None:
    stages = stages_of(batch, width=99)
    assert not learners(stages, batch.labels, MASK, "ce").agreeing.any()
    found = loss_of(model, batch, stages, "ce")
    assert found.parts["loss_cad"] == 0
    labels = stages.late.masked_fill(stages.early != MASK, IGNORE)
    assert found.total > 0 and found.total == found.parts["loss_reveal"]
    assert (labels != IGNORE).any()


def test_chunks_of_logits_change_nothing(model: Any, batch: FollowedBatch) -> None:
    stages = stages_of(batch)
    one = loss_of(model, batch, stages).total
    other = loss_of(model, batch, stages, chunk=3 * VOCAB).total
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(gradient(model, one), gradient(model, other))


def test_a_batch_is_the_mean_of_its_sequences(model: Any) -> None:
    examples = [example(1, 11), example(2, 15)]
    both = followed(*examples)
    stages = stages_of(both)
    alone = []
    for row, each in enumerate(examples):
        single = followed(each)
        length = single.clean_ids.shape[1]
        part = Stages(*(states[row : row + 1, :length] for states in stages))
        alone.append(loss_of(model, single, part).total)
    torch.testing.assert_close(loss_of(model, both, stages).total, sum(alone) / 2)


@pytest.mark.parametrize("average", ["sequences", "labels"])
def test_the_mean_is_over_sequences_or_over_positions(
    model: Any, batch: FollowedBatch, average: str
) -> None:
    stages = stages_of(batch)
    found = loss_of(model, batch, stages, average=average)
    who = learners(stages, batch.labels, MASK)
    counts = who.told.sum(dim=1)
    rows = found.per_sequence["reveal"]
    expected = rows.mean() if average == "sequences" else (rows * counts).sum() / counts.sum()
    torch.testing.assert_close(found.parts["loss_reveal"], expected)


# --- the objective --------------------------------------------------------------------------------


def module(model: Any, **changes: Any) -> ObjectiveModule:
    return ObjectiveModule(model, CForce.from_settings(SETTINGS | changes))


def run(model: Any, batch: dict[str, Any], seed: int = 0, **changes: Any) -> dict[str, Tensor]:
    return module(model, **changes)(torch.Generator().manual_seed(seed), **batch)


def fields() -> dict[str, Any]:
    return TrajectoryCollator(BLOCK, EOS, BLOCK)([example(1, 11), example(2, 15)])


def test_the_same_generator_gives_the_same_loss(model: Any) -> None:
    found = [run(model, fields(), seed)["loss"].item() for seed in (0, 0, 1, 2)]
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_the_noisy_copies_are_the_blocks_of_responses(model: Any) -> None:
    """The objective leaves out the blocks that are all prompt; its loss is that of whole copies."""
    batch = FollowedBatch(**fields())
    found = run(model, fields(), stage_width_first=2)["loss"]
    torch.testing.assert_close(found, loss_of(model, batch, stages_of(batch)).total)


def test_a_warm_up_of_blocks_cuts_the_same_trajectories(model: Any) -> None:
    whole = module(model)
    short = module(model, block_length=2)
    losses = [
        whole(torch.Generator().manual_seed(0), 2, **fields())["loss"],
        short(torch.Generator().manual_seed(0), **fields())["loss"],
    ]
    assert losses[0] == losses[1] > 0


def test_everything_is_made_on_the_device_of_the_data(model: Any) -> None:
    batch = fields()
    with torch.device("meta"):  # where a tensor would land that names no device
        parts = run(model, batch)
    assert {name: part.device.type for name, part in parts.items()} == dict.fromkeys(parts, "cpu")


@pytest.mark.parametrize(("progress", "width"), [(0.0, 1), (0.5, 2), (1.0, 3)])
def test_stages_grow_with_training(model: Any, progress: float, width: int) -> None:
    parts = run(model, fields() | {"progress": progress})
    assert parts["stage_width"] == width
    default = run(
        model, fields() | {"progress": progress}, stage_width_first=None, stage_width_last=None
    )
    assert default["stage_width"] == 1 + (progress == 1)  # from an eighth to half of 4 positions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cad_weight": "forwards"}, "`cad_weight` must be one of confidence, doubt, forward"),
        ({"edited_loss": "mse"}, "`edited_loss` must be one of cad, ce, both, got 'mse'"),
        ({"stage_draw": "all"}, "`stage_draw` must be one of states, cuts"),
        ({"stage_width_first": 0}, "`stage_width_first` must be"),
        ({"stage_width_last": 1.5}, "`stage_width_last` must be"),
        ({"cad_floor": 2}, "`cad_floor` must be"),
        ({"cad_temperature": 0}, "`cad_temperature` must be"),
        ({"reveal_weight": -1}, "`reveal_weight` must be"),
    ],
)
def test_a_wrong_setting_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CForce.from_settings(SETTINGS | changes)


def test_no_confidence_is_told_where_nothing_agrees(model: Any, batch: FollowedBatch) -> None:
    found = loss_of(model, batch, stages_of(batch, width=99), "ce")
    assert found.parts["confidence"].isnan()
    assert 0 < loss_of(model, batch, stages_of(batch)).parts["confidence"] <= 1


def test_a_mask_token_in_a_stream_is_named(model: Any) -> None:
    batch = fields()
    batch["write_tokens"][0, 7, 0] = MASK
    with pytest.raises(InputError, match="a trajectory holds the mask token"):
        run(model, batch)


def test_a_token_that_is_not_of_the_model_is_named(model: Any) -> None:
    batch = fields()
    batch["write_tokens"][0, 7, 0] = VOCAB
    with pytest.raises(InputError, match=f"holds the token {VOCAB}, and the model has tokens"):
        run(model, batch)


def test_the_defaults_are_the_proposed_ones(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    args = DMaxConfig(output_dir=str(tmp_path), objective="cforce", use_cpu=True)
    objective = CForce.from_settings(vars(args) | {"block_length": 32, "mask_token_id": MASK})
    expected = replace(
        CForce.from_settings(SETTINGS | {"block_length": 32}),
        mask_ratio_low=0.75,
        mask_ratio_high=0.75,
        stage_width_first=None,
        stage_width_last=None,
    )
    assert objective == expected
    assert args.learning_rate == 2e-6


# --- training -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("recorded") / "trajectories.jsonl"
    llm = LLM("tiny-base", dtype="float32", max_batch_size=8)
    params = DecodingParams(strategy="threshold", max_new_tokens=256)
    prompts = [problem.question for problem in problems(8, seed=3)]
    distill(ModelAnswerer(llm, params, records=True), prompts, ResponseFiles(output))
    return output


def recipe(folder: Path, data: Path, **training: Any) -> Path:
    model = {"path": "tiny-base", "attn_implementation": "eager"}
    training = {"objective": "cforce", "learning_rate": 1e-4, "max_steps": 4, "save_steps": 2} | (
        training
    )
    section = {"file": str(data), "end_turn": False}
    return write_recipe(folder, model=model, data=section, training=training)


def test_it_trains_and_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dmax.training.trainer import DMaxTrainer

    compute_loss = DMaxTrainer.compute_loss

    def dies_in_step_four(self: DMaxTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return compute_loss(self, *args, **kwargs)

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
        recipe(folder, recorded)
    result = run_recipe(load_recipe(whole / "recipe.yaml"))
    with monkeypatch.context() as patch:
        patch.setattr(DMaxTrainer, "compute_loss", dies_in_step_four)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(load_recipe(broken / "recipe.yaml"))
    run_recipe(load_recipe(broken / "recipe.yaml"))
    assert losses(broken) == losses(whole)
    weights = [(folder / "out" / "model.safetensors").read_bytes() for folder in (whole, broken)]
    assert weights[0] == weights[1]
    lines = json.loads((whole / "out-run" / "checkpoint-4" / "trainer_state.json").read_text())
    widths = [line["stage_width"] for line in lines["log_history"] if "stage_width" in line]
    assert widths == [4, 7, 10, 13]
    # The model is decoded as the one that it came from.
    config = json.loads((result / "config.json").read_text())
    folder = bundled("tiny-base")
    assert folder is not None
    before = json.loads((folder / "config.json").read_text())
    assert config["decoding_strategy"] == before["decoding_strategy"] == "threshold"


@pytest.mark.parametrize("way", ["name", "recipe"])
def test_the_decoding_that_only_a_name_tells_is_written(
    tmp_path: Path, recorded: Path, way: str
) -> None:
    from dmax.training.trainer import DMaxTrainer

    folder = bundled("tiny-base")
    assert folder is not None
    start = tmp_path / "DMax-Math-16B"
    shutil.copytree(folder, start)
    config = json.loads((start / "config.json").read_text())
    del config["decoding_strategy"]
    (start / "config.json").write_text(json.dumps(config))
    if way == "recipe":
        path = recipe(tmp_path, recorded, max_steps=1, save_steps=1)
        path.write_text(path.read_text().replace("tiny-base", str(start)))
        run_recipe(load_recipe(path))
    else:
        args = DMaxConfig(
            output_dir=str(tmp_path / "run"), objective="cforce", use_cpu=True, report_to="none"
        )
        DMaxTrainer(str(start), args).save_model(str(tmp_path / "out"))
    for written in (tmp_path / "out", *tmp_path.glob("out-run/checkpoint-1")):
        found = json.loads((written / "config.json").read_text())
        assert found["decoding_strategy"] == "spd"


def test_a_file_without_trajectories_is_refused_in_a_sentence(
    tmp_path: Path, recorded: Path
) -> None:
    plain = tmp_path / "plain.jsonl"
    records = [json.loads(line) for line in recorded.read_text().splitlines()]
    texts = [{name: each[name] for name in ("prompt", "response")} for each in records]
    plain.write_text("".join(json.dumps(each) + "\n" for each in texts))
    with pytest.raises(InputError) as raised:
        run_recipe(load_recipe(recipe(tmp_path, plain)))
    assert raised.value.message == f"{plain}:1: there is no trajectory to learn from"
    assert raised.value.hint == "write the responses with `dmax distill --trajectories`"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("token", "message"),
    [(977, "the text holds the mask token"), (981, "981 is not a token id below 981")],
)
def test_a_token_that_cannot_be_learnt_is_refused_before_training(
    tmp_path: Path, recorded: Path, token: int, message: str
) -> None:
    records = [json.loads(line) for line in recorded.read_text().splitlines()]
    records[4]["trajectory"]["writes"][3][-1] = token
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text("".join(json.dumps(each) + "\n" for each in records))
    with pytest.raises(InputError) as raised:
        run_recipe(load_recipe(recipe(tmp_path, wrong)))
    assert raised.value.message == f"{wrong}:5: {message}"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["recipe.yaml", "wrong.jsonl"]
    run_recipe(load_recipe(recipe(tmp_path, wrong, objective="oput", max_steps=1)))  # has no use


def test_micro_batches_in_which_nothing_agrees_do_not_count_in_the_confidence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here two on this rank and two on another one, which has seen a confidence of 0.5 once."""
    from dmax.training import trainer as module
    from dmax.training.trainer import DMaxTrainer

    args = DMaxConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = DMaxTrainer("tiny-base", args)

    def logged(*confidences: float) -> dict[str, float]:
        trainer._parts = [
            {"loss_cad": torch.tensor(3.0), "confidence": torch.tensor(each)}
            for each in confidences
        ]
        trainer.log(logs := {"loss": 3.0})
        return logs

    nan = math.nan
    assert logged(nan, 0.9, nan, 0.8)["confidence"] == pytest.approx(0.85)
    assert logged(nan, 0.9)["loss_cad"] == 3
    assert math.isnan(logged(nan, nan)["confidence"])
    other = torch.tensor([[6.0, 0.5], [2, 1]])
    monkeypatch.setattr(module, "sum_over_ranks", lambda value: value + other)
    found = logged(nan, 0.9)
    assert (found["loss_cad"], found["confidence"]) == (3, pytest.approx(0.7))


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*cforce*.yaml")), ids=lambda p: p.stem)
def test_recipes_name_the_place_where_the_guesses_stand(path: Path) -> None:
    [(page, heading)] = re.findall(r"(docs/[\w/]+\.md)(?:#(\w+))?", path.read_text())
    _, _, rest = (ROOT / page).read_text().lower().partition(f"### {heading}\n")
    section = rest.partition("\n## ")[0]
    assert heading and "guess" in section and "`cad_weight`" in section


def test_other_objectives_learn_from_the_same_file(tmp_path: Path, recorded: Path) -> None:
    run_recipe(load_recipe(recipe(tmp_path, recorded, objective="oput", max_steps=1)))
    assert losses(tmp_path)[0]["loss_masked"] > 0
