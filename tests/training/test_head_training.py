"""Heads are trained on the right labels, fit what can be fitted, and `dmax train` writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from dmax.baselines.head_states import Blocks, dependency_examples, filter_examples
from dmax.baselines.head_training import HeadConfig, fit, record
from dmax.baselines.heads import KINDS, Head, dependency_logits, filter_logits, load_head, save_head
from dmax.errors import InputError
from dmax.llm import LLM
from dmax.models import LLaDA2MoeConfig, LLaDA2MoeModelLM
from dmax.params import DecodingParams
from dmax.recipe.run import run_recipe
from dmax.recipe.sections import load_recipe
from dmax.records.encoding import Encoded
from dmax.special_ids import SpecialIds

BLOCK = 4
MASK = 47
EOS = 46
SPECIAL = SpecialIds(MASK, (EOS,), EOS, BLOCK)
SHORT = Encoded(prompt_ids=[1, 2, 3, 4, 5], response_ids=[6, 7])
LONG = Encoded(prompt_ids=[8, 9, 10, 11, 12, 13], response_ids=[14, 15, 16, 17, 18, 19])


@pytest.fixture
def model() -> LLaDA2MoeModelLM:
    torch.manual_seed(0)
    config = LLaDA2MoeConfig(
        vocab_size=MASK + 1,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        n_group=2,
        topk_group=1,
        initializer_range=0.15,
        pad_token_id=EOS,
        eos_token_id=EOS,
    )
    config._experts_implementation = "eager"
    return LLaDA2MoeModelLM(config).eval()


# --- states ---------------------------------------------------------------------------------------


def test_blocks_are_those_that_a_response_fills(model: Any) -> None:
    blocks = Blocks(model, [SHORT, LONG], SPECIAL)
    # Both start at position 4. The short one ends with EOS at 7, the long one at 12, and its last
    # block is filled up.
    final = [[5, 6, 7, EOS], [EOS] * 4, [EOS] * 4, [12, 13, 14, 15], [16, 17, 18, 19], [EOS] * 4]
    masked = [".xxx", "....", "....", "..xx", "xxxx", "xxxx"]
    assert blocks.final.tolist() == final
    assert blocks.masked.tolist() == [[letter == "x" for letter in row] for row in masked]


@torch.no_grad()
def test_blocks_are_denoised_behind_clean_ones(model: Any) -> None:
    blocks = Blocks(model, [LONG], SPECIAL)
    masked = blocks.masked & torch.tensor([[True, False, True, False]])
    logits = blocks.denoise(masked)
    # The second block by itself: what precedes is clean and each block sees itself and what is
    # before it.
    ids = torch.tensor([[*LONG["prompt_ids"], *LONG["response_ids"][:2], MASK, 17, MASK, 19]])
    block = torch.arange(12) // BLOCK
    mask = (block[:, None] >= block[None])[None, None]
    alone = model(input_ids=ids, attention_mask=mask, position_ids=torch.arange(12)[None]).logits[
        0, 8:
    ]
    torch.testing.assert_close(logits[1], alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_hidden_states_are_what_logits_are_made_of(model: Any) -> None:
    blocks = Blocks(model, [SHORT, LONG], SPECIAL)
    logits, hidden = blocks.hidden_states(blocks.masked)
    torch.testing.assert_close(model.lm_head(hidden), logits)
    assert not model.lm_head._forward_pre_hooks


class Scripted:
    """`Blocks` whose model is a function of what is masked and of the tokens that are not."""

    def __init__(self, final: list[list[int]], denoise: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.final = torch.tensor(final)
        self.special_ids = SPECIAL
        self._denoise = denoise
        self.masked = torch.ones_like(self.final, dtype=torch.bool)

    def denoise(self, masked: Tensor, tokens: Tensor | None = None) -> Tensor:
        return self._denoise(masked, self.final if tokens is None else tokens)

    def hidden_states(self, masked: Tensor) -> tuple[Tensor, Tensor]:
        return self.denoise(masked), masked[..., None].float()


def says(tokens: list[int], confidence: list[float]) -> Tensor:
    """[L, V] logits of these probabilities; the rest is MASK's."""
    probs = torch.full((len(tokens), MASK + 1), 1e-9)
    probs[torch.arange(len(tokens)), torch.tensor(tokens)] = torch.tensor(confidence)
    probs[:, MASK] = 1 - torch.tensor(confidence)
    return probs.log()


def test_the_greedy_oracle_decodes_what_is_right_or_else_the_surest() -> None:
    answers = {
        (True, True, True): says([1, 5, 5], [0.6, 0.9, 0.8]),  # 0 is right
        (False, True, True): says([1, 5, 5], [0.7, 0.9, 0.8]),  # none of the masks is: the surest
        (False, False, True): says([1, 2, 3], [0.7, 0.2, 0.4]),
        (False, False, False): says(
            [4, 4, 4], [0.7, 0.2, 0.4]
        ),  # the first block, while the second goes on
    }
    right = says([1, 2, 3], [0.5, 0.5, 0.5])
    script = lambda masked, _: torch.stack([right, answers[tuple(masked[1].tolist())]])  # noqa: E731
    examples = list(filter_examples(Scripted([[1, 2, 3], [1, 2, 3]], script)))  # type: ignore[arg-type]
    masked = [example["masked"].tolist() for example in examples]
    assert masked == [[[True] * 3] * 2, [[False, True, True]], [[False, False, True]]]
    assert examples[0]["right"].tolist() == [[True] * 3, [True, False, False]]
    assert examples[1]["right"].tolist() == [[True, False, False]]
    assert examples[2]["right"].tolist() == [[True, True, True]]
    torch.testing.assert_close(
        examples[1]["confidence"], torch.tensor([[0.7, 0.9, 0.8]])
    )  # decoded ones included


def test_the_dependency_is_how_far_a_token_moves_the_others() -> None:
    undecided = torch.full((2, MASK + 1), 1e-9)
    undecided[0, 3] = 1.0
    undecided[1, [4, 5]] = torch.tensor([0.75, 0.25])

    def script(masked: Tensor, tokens: Tensor) -> Tensor:
        probs = undecided.repeat(len(masked), 1, 1)
        # Once position 0 is told its likeliest token, 3, position 1 is sure of 5; the final token 9
        # changes nothing.
        told = ~masked[:, 0] & (tokens[:, 0] == 3)
        probs[told, 1] = 1e-9
        probs[told, 1, 5] = 1.0
        return probs.log()

    blocks = Scripted([[9, 9]] * 40, script)
    (example,) = dependency_examples(blocks, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    assert 0 < len(example["masked"]) < 40  # blocks with fewer than two masks have nothing to tell
    assert example["masked"].all()
    expected = torch.tensor([[0.0, 0.75], [0.0, 0.0]])  # ½ (|0.75 - 0| + |0.25 - 1|)
    torch.testing.assert_close(example["dependency"], expected.expand(len(example["masked"]), 2, 2))
    assert example["hidden"].shape == (len(example["masked"]), 2, 1)


# --- fitting --------------------------------------------------------------------------------------


def fitted(states: dict[str, Tensor], **config: Any) -> Head:
    return fit(states, HeadConfig(**config), model_digest="m", hidden_size=4)


def test_a_filter_learns_which_neighbour_tells_it() -> None:
    confidence = torch.rand(400, 4)
    right = confidence.roll(1, dims=1) >= 0.5  # a position is final if the one before it is sure
    states = {
        "confidence": confidence,
        "right": right,
        "masked": torch.ones(400, 4, dtype=torch.bool),
    }
    head = fitted(states, kind="learn2pd", max_steps=400, learning_rate=0.03)
    found = filter_logits(head.tensors, confidence) >= 0
    assert (
        found == right
    ).float().mean() > 0.8  # by its own confidence alone it would be right half of the time
    assert (head.kind, head.model, head.block_length, head.hidden_size, head.steps) == (
        "learn2pd",
        "m",
        4,
        4,
        400,
    )
    again = fitted(states, kind="learn2pd", max_steps=400, learning_rate=0.03)
    assert again.digest == head.digest
    assert (
        fitted(states, kind="learn2pd", max_steps=400, learning_rate=0.03, seed=1).digest
        != head.digest
    )


def test_what_is_decoded_is_no_example() -> None:
    states = {
        "confidence": torch.rand(50, 2),
        "right": torch.tensor([[True, False]] * 50),
        "masked": torch.tensor([[True, False]] * 50),
    }
    head = fitted(states, kind="learn2pd", max_steps=200, learning_rate=0.05)
    assert (filter_logits(head.tensors, states["confidence"])[:, 0] >= 2).all()


def test_a_dependency_head_learns_from_hidden_states_and_distance() -> None:
    hidden = torch.randn(300, 3, 4).sign()
    near = torch.tensor([[0, 0.6, 0], [0, 0, 0.6], [0, 0, 0]])  # on the right neighbour
    alike = (hidden[:, :, None, 0] == 1) & (hidden[:, None, :, 1] == 1)
    target = 0.1 + near + 0.2 * alike
    masked = torch.ones(300, 3, dtype=torch.bool)
    states = {"hidden": hidden, "dependency": target, "masked": masked}
    head = fitted(states, kind="demask", max_steps=500, learning_rate=0.03, inner_size=4)
    error = (dependency_logits(head.tensors, hidden).sigmoid() - target).abs()[
        :, ~torch.eye(3, dtype=torch.bool)
    ]
    assert error.mean() < 0.1  # from a constant it would be 0.27


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "learn2dp"}, "`kind` must be one of learn2pd, demask, got 'learn2dp'"),
        ({"kind": "demask", "learning_rate": 0}, "`learning_rate` must be a number above 0"),
        (
            {"kind": "demask", "inner_size": 0},
            "`inner_size` must be a whole number between 1 and 4096, got 0",
        ),
    ],
)
def test_a_wrong_setting_is_one_clear_error(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        HeadConfig(**config)
    assert message in error.value.message


@pytest.mark.parametrize("kind", KINDS)
def test_recording_is_the_same_each_time_and_of_every_response(model: Any, kind: str) -> None:
    config = HeadConfig(kind=kind, record_batch_size=1)
    first, again = (record(model, [SHORT, LONG], SPECIAL, config) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert first["masked"].shape[1] == BLOCK
    if (
        kind == "learn2pd"
    ):  # a block of m masks is over after m steps at the latest, and takes one at least
        assert 4 <= len(first["masked"]) <= 3 + 2 + 4 + 4


# --- dmax train -----------------------------------------------------------------------------------


def write(folder: Path, model: Path | str, /, **changes: Any) -> Path:
    recipe = {
        "output_dir": str(folder / "out"),
        "model": {"path": str(model)},
        "data": {"problems": 3, "seed": 1},
        "head": {"kind": "learn2pd", "max_steps": 3},
    }
    path = folder / "head.yaml"
    path.write_text(yaml.safe_dump(recipe | changes, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from test_trainer import write_recipe

    pytest.importorskip("accelerate")
    return run_recipe(load_recipe(write_recipe(tmp_path_factory.mktemp("model")), {"max_steps": 1}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_trains_a_head_that_decodes(trained: Path, tmp_path: Path, kind: Any) -> None:
    path = write(tmp_path, trained, head={"kind": kind, "max_steps": 3})
    lines: list[str] = []
    file = run_recipe(load_recipe(path), report=lines.append)
    assert file == tmp_path / "out" / f"{kind}.safetensors"
    head = load_head(str(file), kind)
    assert (head.block_length, head.hidden_size, head.steps) == (8, 16, 3)
    assert any("states of 3 responses" in line for line in lines)
    llm = LLM(str(trained), dtype="float32")
    (output,) = llm.generate(
        "Tom has 3 apples.", DecodingParams(kind, max_new_tokens=16, options={"head": str(file)})
    )
    assert 1 <= output.num_forwards <= 24


def test_a_longer_run_is_not_replaced_unless_asked(trained: Path, tmp_path: Path) -> None:
    path = write(tmp_path, trained)
    file = run_recipe(load_recipe(path))
    with pytest.raises(InputError, match="was trained for 3 steps, this run has only 2"):
        run_recipe(load_recipe(path, {"max_steps": 2}))
    assert load_head(str(file), "learn2pd").steps == 3
    run_recipe(load_recipe(path, {"max_steps": 2}), resume=False)
    assert load_head(str(file), "learn2pd").steps == 2
    run_recipe(load_recipe(path))
    assert load_head(str(file), "learn2pd").steps == 3


def test_what_is_not_a_head_is_not_replaced(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    file = tmp_path / "out" / "learn2pd.safetensors"
    save_head(Head("demask", "m", 4, 2, 1, {"query": torch.zeros(2, 1)}), file)
    with pytest.raises(
        InputError,
        match="is not a sound head of strategy `learn2pd`: it belongs to strategy `demask`",
    ):
        run_recipe(load_recipe(write(tmp_path, trained)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"head": {"kind": "learn2pd", "max_step": 1}},
            r"head.yaml:\d+: unknown key `head.max_step`",
        ),
        (
            {"head": {"kind": "filter"}},
            r"head.yaml:\d+: in `head`, `kind` must be one of learn2pd, demask",
        ),
        (
            {"head": {"max_steps": 5}},
            r"head.yaml:\d+: in `head`, `kind` must be one of learn2pd, demask, got ''",
        ),
        (
            {"head": {"kind": "demask", "max_steps": "many"}},
            r"head.yaml:\d+: `head.max_steps` must be int, got 'many'",
        ),
        ({"head": None}, r"head.yaml:\d+: `head` must be a mapping"),
        ({"training": {}}, r"head.yaml:\d+: a recipe with `head` has no `training`"),
        ({"eval": {}}, r"head.yaml:\d+: a recipe with `head` has no `eval`"),
        (
            {"model": {"config": {}}},
            r"head.yaml:\d+: a head belongs to a trained model, so `model` needs a `path`",
        ),
        ({"model": {"path": "m", "keep_start": 0.5}}, r"head.yaml:\d+: `model.keep_start`"),
    ],
)
def test_a_bad_recipe_is_one_clear_error(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_recipe(write(tmp_path, "tiny-base", **change))
