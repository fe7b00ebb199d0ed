"""bench/pretrained.py: a cut vocabulary, numbers as tokens, a judge, and the stages in small."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pretrained
import pytest
import torch
from smollm import measure
from smollm.likelihood import cross_entropy
from smollm.size import CPU, GPU, Size
from smollm.vocabulary import Cut, cut_model, cut_vocabulary
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dmax.distill.model import ModelAnswerer
from dmax.distill.responses import Answers, Prompts, Response
from dmax.errors import InputError
from dmax.tasks.word_problems import ShortWordProblems

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [pretrained.chat(problem) for problem in ShortWordProblems.problems(40, 0, "train")]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE as SmolLM2's is, learnt from other words too; digits are single tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    others = ["words that no problem has: quantum chromodynamics, zebras and xylophones"] * 9
    backend.train_from_iterator([*TEXTS, *others], trainer)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
    )


def tiny_llama(vocab_size: int, *, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def cut(tokenizer: PreTrainedTokenizerFast) -> Cut:
    return cut_vocabulary(tokenizer, TEXTS[:10], range(21), pretrained.CHAT_TEMPLATE)


def test_a_cut_vocabulary_is_smaller_and_reads_texts_as_before(
    tokenizer: PreTrainedTokenizerFast, cut: Cut
) -> None:
    assert 256 < len(cut.tokenizer) < len(tokenizer)
    for text in TEXTS[:10]:
        assert cut.tokenizer.decode(cut.tokenizer(text).input_ids) == text
        words = re.sub(r" [0-9]+", "", text)
        assert cut.tokenizer.tokenize(words) == tokenizer.tokenize(words)
    unseen = "Zürich 日本 quantum"
    assert cut.tokenizer.decode(cut.tokenizer(unseen).input_ids) == unseen


def test_numbers_are_whole_tokens_and_other_digits_stay(cut: Cut) -> None:
    assert cut.tokenizer.tokenize(" 7 + 12 is 19.") == ["Ġ7", "Ġ+", "Ġ12", "Ġis", "Ġ19", "."]
    assert cut.tokenizer.decode(cut.tokenizer(" 7 + 12").input_ids) == " 7 + 12"
    assert cut.tokenizer.tokenize(" 345") == ["Ġ", "3", "4", "5"]


def test_the_mask_is_the_last_token_and_eos_pads(cut: Cut) -> None:
    assert cut.tokenizer.mask_token_id == len(cut.tokenizer) - 1
    assert cut.tokenizer.pad_token_id == cut.tokenizer.eos_token_id
    assert cut.tokenizer.convert_ids_to_tokens(cut.tokenizer.eos_token_id) == "<|im_end|>"


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_logits_of_kept_tokens_equal_the_originals(
    tokenizer: PreTrainedTokenizerFast, cut: Cut, tied: bool
) -> None:
    model = tiny_llama(len(tokenizer), tied=tied)
    text = re.sub(r" [0-9]+", "", TEXTS[0])
    before = model(torch.tensor([tokenizer(text).input_ids])).logits
    cut_model(model, cut)
    after = model(torch.tensor([cut.tokenizer(text).input_ids])).logits
    torch.testing.assert_close(after[..., : len(cut.kept)], before[..., cut.kept])
    assert after.shape[-1] == model.config.vocab_size == len(cut.tokenizer)


def test_a_number_starts_from_its_digits_and_the_mask_from_all(
    tokenizer: PreTrainedTokenizerFast, cut: Cut
) -> None:
    model = tiny_llama(len(tokenizer))
    old = model.get_input_embeddings().weight.detach().clone()
    cut_model(model, cut)
    new = model.get_input_embeddings().weight.detach()

    def row(text: str) -> torch.Tensor:
        return new[cut.tokenizer.convert_tokens_to_ids(f"Ġ{text}")]

    def digit(text: str) -> torch.Tensor:
        return old[tokenizer.convert_tokens_to_ids(text)]

    torch.testing.assert_close(row("7"), digit("7"))
    torch.testing.assert_close(row("12"), 0.6 * digit("1") + 0.4 * digit("2"))
    torch.testing.assert_close(new[-1], new[:-1].mean(dim=0))


@torch.no_grad()
def test_cross_entropy_is_that_of_each_text_by_itself() -> None:
    model = tiny_llama(50)
    texts = [([1, 5, 9], [7, 8, 2]), ([1], [3]), ([1, 4], [6, 2, 2, 2])]
    nats = 0.0
    for prompt, written in texts:
        logits = model(torch.tensor([prompt + written])).logits[0].log_softmax(dim=-1)
        for offset, token in enumerate(written):
            nats -= logits[len(prompt) + offset - 1, token].item()
    said = cross_entropy(model, texts, batch_size=2)
    assert said.tokens == 8
    assert said.nats == pytest.approx(nats, rel=1e-5)
    assert said.per_token == pytest.approx(nats / 8, rel=1e-5)


def test_nothing_written_has_no_cross_entropy() -> None:
    said = cross_entropy(tiny_llama(50), [([1, 2], [])])
    assert (said.nats, said.tokens, said.per_token) == (0.0, 0, 0.0)


def test_a_model_that_knows_nothing_gives_the_logarithm_of_its_vocabulary() -> None:
    model = tiny_llama(50)
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    said = cross_entropy(model, [([1, 2], [3, 4]), ([1], [2])])
    assert said.per_token == pytest.approx(math.log(50), rel=1e-6)


def test_an_answer_that_ends_by_itself_ends_with_eos(cut: Cut) -> None:
    sample = {"prompt": "How many?", "output": "#### 7", "finish_reason": "stop"}
    prompt, answer = measure.written(cut.tokenizer, sample)
    assert cut.tokenizer.decode(prompt).endswith("How many?<|im_end|>\n<|im_start|>assistant\n")
    assert cut.tokenizer.decode(answer) == "#### 7<|im_end|>"
    _, unfinished = measure.written(cut.tokenizer, sample | {"finish_reason": "length"})
    assert unfinished == answer[:-1]


@pytest.mark.parametrize(
    ("solved", "losses", "builds"),
    [
        (0.5, [2.0, 1.0], True),
        (0.49, [2.0, 1.0], False),
        (0.9, [1.0, 1.1], False),
        (0.9, [1.0, 1.0], False),
        (0.9, [1.0, math.nan], False),
        (0.9, [math.nan, math.nan], False),
        (0.9, [5.0], False),
        (0.9, [], False),
    ],
)
def test_a_base_that_solves_too_little_is_not_built_on(
    solved: float,
    losses: list[float],
    builds: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    there = [
        Path("runs/pretrained-ar"),
        Path("runs/pretrained-ar-run"),
        Path("runs/pretrained-base"),
    ]
    for folder in there:
        folder.mkdir(parents=True)
    point = {"correct": int(100 * solved), "total": 100, "accuracy": solved}
    if builds:
        pretrained.check_learnt(CPU, point, losses)
    else:
        with pytest.raises(InputError, match="nothing to build on") as error:
            pretrained.check_learnt(CPU, point, losses)
        assert f"remove {' '.join(map(str, there))}" in str(error.value.hint)


class Ending(ModelAnswerer):
    """A model whose answers all end, with a number."""

    def answers(self, prompts: Prompts, indices: Sequence[int]) -> Answers:
        for group in super().answers(prompts, indices):
            yield [(index, Response("#### 7", 2, is_finished=True)) for index, _ in group]


SHORT = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "eval_steps": 1,
    "save_steps": 2,
    "logging_steps": 1,
    "warmup_steps": 0,
}


def toy(size: Size) -> Size:
    """A size that trains for two steps, whatever machine it is for."""
    return replace(
        size,
        num_problems=40,
        num_held_out=4,
        num_responses=6,
        enough=0.0,
        limit=2,
        causal=SHORT,
        training=dict.fromkeys(("base", "oput", "masks", "random"), SHORT),
        use_cpu=True,
    )


@pytest.mark.parametrize("size", [CPU, GPU], ids=lambda size: size.name)
def test_the_whole_pipeline_runs_at_toy_length_and_goes_on_where_it_stopped(
    size: Size,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        pretrained.original,
        "load_original",
        lambda: (tiny_llama(len(tokenizer)), copy.deepcopy(tokenizer)),
    )
    monkeypatch.setattr(pretrained, "RESULTS", tmp_path)
    # A model that knows nothing never ends an answer, and then there is nothing to learn from.
    monkeypatch.setattr(pretrained, "ModelAnswerer", Ending)
    small = toy(size)
    every = [*pretrained.STAGES, "measure"]

    pretrained.run(small, every)

    record = json.loads((tmp_path / f"{size.name}.json").read_text())
    assert all(stage["is_done"] for stage in record["stages"].values())
    assert all(stage["steps"] == 2 for stage in record["stages"].values())
    assert (record["vocabulary"] < len(tokenizer)) == size.cuts_vocabulary
    for curve in pretrained.curves(small):
        for value in curve.values:
            point = record["points"][measure.slug(curve, value)]
            assert point["total"] == 2
            assert 0 < point["cross_entropy"] < 20
    page = (tmp_path / f"{size.name}.md").read_text()
    assert "not measured yet" not in page
    assert page.count("/2 |") == len(record["points"])
    settings = json.loads(Path(f"runs/{size.name}-oput/config.json").read_text())
    assert settings["block_length"] == size.block_length
    assert settings["shift"] is True

    weights = Path(f"runs/{size.name}-oput/model.safetensors")
    before = weights.stat().st_mtime_ns
    capsys.readouterr()
    pretrained.run(small, every)
    assert weights.stat().st_mtime_ns == before
    assert ":" not in capsys.readouterr().out  # no stage and no point was made again

    folder = f"runs/{size.name}-ar"
    learnt = Path(folder, "model.safetensors").read_bytes()
    shutil.rmtree(folder)  # as if it had stopped behind its last checkpoint
    pretrained.run(small, ["ar"])
    assert Path(folder, "model.safetensors").read_bytes() == learnt


def test_the_command_line_names_a_size_and_its_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(pretrained, "run", lambda size, stages: asked.append((size, stages)))
    monkeypatch.setattr(pretrained.side_by_side, "check_options", lambda *_: None)
    for arguments in (["base", "measure"], ["--gpu"]):
        monkeypatch.setattr(sys, "argv", ["bench/pretrained.py", *arguments])
        pretrained.main()
    assert asked == [(CPU, ["base", "measure"]), (GPU, [*pretrained.STAGES, "measure"])]


@pytest.mark.parametrize("size", [CPU, GPU], ids=lambda size: size.name)
@pytest.mark.parametrize(
    ("stage", "needed"),
    [
        ("ar", "convert"),
        ("base", "ar"),
        ("responses", "base"),
        ("oput", "base"),
        ("ar-longer", "ar"),
        ("measure", "convert"),
    ],
)
def test_a_stage_names_the_one_before_it_that_has_not_been_run(
    size: Size, stage: str, needed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    missing = pretrained.output(size, needed)
    with pytest.raises(InputError, match=f"`{stage}` needs {missing}, which is not there") as error:
        pretrained.run(size, [stage])
    assert f"run `{size.command} {needed}` first" in error.value.hint
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [CPU, GPU], ids=lambda size: size.name)
def test_recipes_read_and_write_what_belongs_to_their_size(size: Size) -> None:
    base = size.recipe("base")
    assert base.output_dir == Path(f"runs/{size.name}-base")
    assert base.model.path == f"runs/{size.name}-ar"
    assert base.model.block_length == size.block_length
    assert base.data.file == f"runs/{size.name}_problems.jsonl"
    assert base.data.eval_file == f"runs/{size.name}_held_out.jsonl"
    assert base.training["use_cpu"] is size.use_cpu
    oput = size.recipe("oput")
    assert oput.model.path == f"runs/{size.name}-base"
    assert oput.model.block_length is None
    assert oput.data.file == f"runs/{size.name}_responses.jsonl"
    assert oput.data.eval_file == str(size.held_out_responses)
    assert oput.model.attn_implementation == ("eager" if size is CPU else "sdpa")
