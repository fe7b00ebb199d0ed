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
from typing import Any

import pretrained
import pytest
import torch
from smollm import measure
from smollm.likelihood import cross_entropy
from smollm.page import headline, results, where_it_fell, write_page
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


Solved = dict[str, list[tuple[int, float]]]
SOLVED: Solved = {  # by label: right answers of 200 and TPF, at one threshold after the other
    "original, where the base starts": [(122, 0.97)],
    "original, as long as the base": [(191, 0.97)],
    "base, threshold": [(158, 1.3), (136, 2.4), (42, 4.59)],
    "DMax, SPD": [(178, 1.18), (164, 2.8), (181, 3.0)],
    "base, SPD": [(169, 1.85)],
    "masks only, threshold": [(175, 1.69), (91, 6.86)],
    "masks only, SPD": [(188, 1.62), (154, 3.19), (154, 3.69)],
    "random tokens, SPD": [(181, 1.63), (170, 3.16), (170, 3.43)],
}


def record_of(size: Size, solved: Solved) -> dict[str, Any]:
    """A record in which only these curves are measured."""
    points = {
        measure.slug(curve, value): dict(correct=correct, total=200, tpf=tpf, interval=(0, 1))
        for curve in pretrained.curves(size)
        for value, (correct, tpf) in zip(curve.values, solved.get(curve.label, []), strict=False)
    }
    return {
        "points": points,
        "stages": {name: {"is_done": False, "steps": 0, "log": []} for name in pretrained.TRAINED},
        "limit": 200,
        "seed": 7,
        "dtype": "float32",
        "vocabulary": 900,
        "references": 0.4,
        "environment": {"cpu": "a CPU", "threads": 1, "torch": "2"},
    }


@pytest.mark.parametrize("size", [CPU, GPU], ids=lambda size: size.name)
def test_a_page_names_what_is_missing_and_how_to_measure_it(size: Size) -> None:
    curves = pretrained.curves(size)
    table = "\n".join(results(size, record_of(size, {}), curves))
    assert table.count("not measured yet") == sum(len(curve.values) for curve in curves)
    assert f"`{size.command} ar ar-longer base oput masks random measure`" in table


def found(solved: Solved, size: Size = CPU) -> str:
    """The head of the page, in one line."""
    return " ".join(headline(record_of(size, solved), pretrained.curves(size)).split())


@pytest.mark.parametrize("size", [CPU, GPU], ids=lambda size: size.name)
def test_the_head_of_a_page_says_what_was_found(size: Size) -> None:
    assert found(SOLVED, size).startswith(
        "**In short:** The careful base, at threshold 0.95, solves 158/200 at TPF 1.30. DMax, at "
        "0.3, solves 181/200 at TPF 3.00, 11.5 points more than the base (+4.5 to +18.5). At 0.5 "
        "it dips to 164/200 at TPF 2.80. The autoregressive original, trained as long as the base, "
        "writes one token at a time and solves 191/200 at TPF 0.97, 5.0 points more than DMax "
        "(-0.1 to +10.3). Over masks only, on-policy noise bought accuracy beyond chance at 1 of 3 "
        "thresholds. It cost tokens a forward at 3 of 3. At 0.3 masks only solve 154/200 at TPF "
        "3.69, DMax 13.5 points more (+6.3 to +20.6). Over random tokens, on-policy noise bought "
        "no accuracy beyond chance. It cost tokens a forward at 3 of 3. At 0.3 random tokens solve "
        "170/200 at TPF 3.43, DMax 5.5 points more (-1.0 to +12.0). The most right answers by SPD "
        "are 188/200 at TPF 1.62, of masks only at 0.95. Each model was trained with one seed."
    )


def test_the_head_says_where_noise_cost_accuracy() -> None:
    said = found(SOLVED | {"DMax, SPD": [(178, 1.7), (130, 2.8), (100, 4.0)]})
    assert (
        "Over random tokens, on-policy noise bought no accuracy beyond chance. It cost accuracy "
        "beyond chance at 2 of 3 and tokens a forward at 1 of 3. At 0.3 random tokens solve "
        "170/200 at TPF 3.43, DMax 35.0 points fewer ("
    ) in said
    assert "dips" not in said


def test_of_models_that_solve_as_much_the_head_names_the_faster_one() -> None:
    controls = {
        "masks only, SPD": [(188, 1.62), (188, 3.19), (188, 10.69)],
        "random tokens, SPD": [(188, 1.63), (188, 3.16), (188, 9.43)],
    }
    said = "The most right answers by SPD are 188/200 at TPF 10.69, of masks only at 0.3."
    assert said in found(SOLVED | controls)


@pytest.mark.parametrize(
    ("solved", "said"),
    [
        ([(169, 1.85)], "does not collapse** on this base, unlike in the paper and on the bundled"),
        (
            [(3, 0.9)],
            "collapses** on this base, as in the paper and on the bundled model: 3/200 at TPF 0.90,"
            " against 158/200 at TPF 1.30 by threshold decoding at 0.95.",
        ),
        ([], None),
    ],
)
def test_the_page_says_whether_spd_collapses_without_oput(
    solved: list[tuple[int, float]], said: str | None, tmp_path: Path
) -> None:
    record = record_of(CPU, SOLVED | {"base, SPD": solved})
    write_page(CPU, record, pretrained.curves(CPU), tmp_path / "page.md")
    page = " ".join((tmp_path / "page.md").read_text().split())
    failed = page.partition("## What failed")[2]
    assert ("SPD without OPUT" in failed) == (said is not None)
    assert said is None or f"**SPD without OPUT {said}" in failed
    assert "the tables above" not in page


def test_the_head_compares_only_what_is_measured() -> None:
    measured = {"base, threshold": SOLVED["base, threshold"]}
    half = measured | {"DMax, SPD": [(178, 1.18)]}
    for solved in (measured, half):
        said = found(solved)
        assert said.startswith("**So far:** The careful base, at threshold 0.95, solves 158/200 at")
        assert " at TPF 1.30. Each model was trained with one seed." in said
        assert "**Still to come:** original, where the base starts; original, as long as" in said
    said = found(measured | {label: SOLVED[label] for label in ("DMax, SPD", "masks only, SPD")})
    assert "Over masks only" in said
    assert "Over random tokens" not in said
    assert "The autoregressive original" not in said
    assert found({}).startswith("**So far:** nothing can be compared. **Still to come:** original")


@pytest.mark.parametrize("size", [CPU, GPU], ids=lambda size: size.name)
@pytest.mark.parametrize(
    ("labels", "rows"), [((), 0), (("DMax, SPD", "base, SPD"), 1), (SOLVED, 7)]
)
def test_a_page_compares_dmax_at_the_same_thresholds(
    size: Size, labels: Sequence[str], rows: int, tmp_path: Path
) -> None:
    record = record_of(size, {label: SOLVED[label] for label in labels})
    write_page(size, record, pretrained.curves(size), tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    table, _, _ = page.partition("## DMax against")[2].partition("## Stages")
    assert table.count(" points (") == rows
    assert ("## What failed" in page) == (size is CPU)
    assert "worded at random, so 0.400 is no lower bound" in " ".join(page.split())


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ({"base": [], "oput": []}, "nowhere yet"),
        ({"base": [1.1]}, "nowhere yet"),
        ({"base": [1.1, 0.6], "oput": [2.4, 2.5, 0.7]}, "in every stage that has been run"),
        ({"base": [1.1, 0.6], "oput": [0.6, 0.6], "masks": []}, "in 1 of 2 stages, not in oput"),
    ],
)
def test_the_page_says_in_which_stages_held_out_loss_fell(
    ends: dict[str, list[float]], said: str
) -> None:
    stages = {
        name: {"log": [{"step": step, "eval_loss": loss} for step, loss in enumerate(losses)]}
        for name, losses in ends.items()
    }
    assert where_it_fell({"stages": stages}) == said
