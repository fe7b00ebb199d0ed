"""A checkpoint without a chat template, as base models are: it is asked with one text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_cli import Dmax, dmax_fixture  # noqa: F401  (fixture)
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

from dmax import LLM, DecodingParams
from dmax.chat_template import render_chat, turn_ending
from dmax.checkpoint import load_checkpoint
from dmax.distill.model import ModelAnswerer
from dmax.distill.responses import Response
from dmax.errors import InputError
from dmax.records.encoding import encode_dataset

pytest.importorskip("accelerate")

SPECIAL = ["<unk>", "<eos>", "<bos>"]
WORDS = [first + second for first in "bdfgklm" for second in "aeiou"]
PROMPTS = [f" ba de {word}" for word in WORDS[:6]]
SHORT = {"max_steps": 2, "logging_steps": 1, "gradient_accumulation_steps": 1, "use_cpu": True}


def byte_level() -> Tokenizer:
    """As GPT-2's: a word brings its space along, and nothing stands before the first."""
    words = [*SPECIAL, *(f"Ġ{word}" for word in WORDS)]
    made = Tokenizer(WordLevel({word: id for id, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def with_bos() -> Tokenizer:
    """As Llama's: the first space is added and taken away again, and every text begins with BOS."""
    words = [*SPECIAL, *(f"▁{word}" for word in WORDS)]
    made = Tokenizer(WordLevel({word: id for id, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    return made


def base_model(folder: Path, backend: Tokenizer) -> Path:
    """An autoregressive model with random weights."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(SPECIAL) + len(WORDS),
        n_positions=256,
        n_embd=16,
        n_layer=2,
        n_head=4,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # it writes words, and EOS within some of them
        model.lm_head.weight[[SPECIAL.index("<unk>"), SPECIAL.index("<bos>")]] = 0
        model.lm_head.weight[SPECIAL.index("<eos>")] *= 2
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(name="converted")
def converted_fixture(tmp_path: Path, dmax: Dmax) -> Path:
    source = base_model(tmp_path / "source", byte_level())
    made = dmax("convert", source, "-o", tmp_path / "made", "--block-length", 8, "--shift")
    assert made.code == 0, made.err
    assert "no chat template" in made.err
    return tmp_path / "made"


def lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def recipe(folder: Path, model: Path, data: Path) -> Path:
    path = folder / "recipe.yaml"
    sections = {
        "output_dir": str(folder / "trained"),
        "model": {"path": str(model)},
        "data": {"file": str(data), "num_proc": 1},
        "training": SHORT,
    }
    path.write_text(yaml.safe_dump(sections))
    return path


@pytest.mark.parametrize("backend", [byte_level(), with_bos()], ids=["byte level", "BOS"])
def test_what_is_distilled_is_learnt_at_the_ids_that_were_generated(
    backend: Tokenizer, tmp_path: Path
) -> None:
    source = base_model(tmp_path, backend)
    checkpoint = load_checkpoint(
        source, dtype=torch.float32, device="cpu", block_length=8, add_mask_token=True
    )
    llm = LLM.from_checkpoint(checkpoint)
    params = DecodingParams(strategy="threshold", max_new_tokens=16)
    generated = llm.generate(PROMPTS, params)
    answers = {
        index: answer
        for group in ModelAnswerer(llm, params).answers(PROMPTS, range(len(PROMPTS)))
        for index, answer in group
    }
    records = []
    for index, prompt in enumerate(PROMPTS):
        answer = answers[index]
        assert isinstance(answer, Response)
        records.append({"prompt": prompt, "response": answer.text})
    learnt = encode_dataset(records, llm.tokenizer, checkpoint.special_ids, max_length=64)
    for prompt, output, example in zip(PROMPTS, generated, learnt, strict=True):
        assert tuple(example["prompt_ids"]) == llm.encode(prompt) == llm.encode(prompt, raw=True)
        assert tuple(example["response_ids"]) == output.token_ids
    assert any(output.token_ids for output in generated)


def test_the_pipeline_takes_it_from_convert_to_eval(
    converted: Path, tmp_path: Path, dmax: Dmax
) -> None:
    prompts = lines(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    answers = tmp_path / "answers.jsonl"
    distilled = dmax(
        *("distill", "--model", converted, "--prompts", prompts, "--output", answers),
        *("--max-new-tokens", 128),
    )
    assert distilled.code == 0, distilled.err
    assert answers.read_text()
    trained = dmax("train", recipe(tmp_path, converted, answers))
    assert trained.code == 0, trained.err
    measured = dmax("eval", "--model", tmp_path / "trained", "--limit", 2, "--max-new-tokens", 8)
    assert measured.code == 0, measured.err


def test_a_chat_needs_a_template_and_the_error_says_where_to_put_one(
    converted: Path, tmp_path: Path, dmax: Dmax
) -> None:
    system = {"role": "system", "content": " ba"}
    question = {"role": "user", "content": " de"}
    answer = {"role": "assistant", "content": " fi go"}
    refused = []
    chats = [[system, question, answer], [question, answer, question, answer]]
    for number, chat in enumerate(chats):
        data = lines(tmp_path / f"{number}.jsonl", [{"messages": chat}])
        refused.append(dmax("train", recipe(tmp_path, converted, data)))
    output = tmp_path / "answers.jsonl"
    refused.append(
        dmax(
            *("distill", "--model", converted, "--prompts", tmp_path / "0.jsonl"),
            *("--output", output, "--max-new-tokens", 8),
        )
    )
    for result in refused:
        assert result.code == 2
        assert "no chat template, so it takes one user message" in result.err
        assert "put a chat_template.jinja into the folder of the checkpoint" in result.err
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (converted / "chat_template.jinja").write_text(template)
    trained = dmax("train", recipe(tmp_path, converted, tmp_path / "0.jsonl"))
    assert trained.code == 0, trained.err


def test_nothing_is_written_around_the_only_message() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level())
    question = {"role": "user", "content": " ba "}
    assert render_chat(tokenizer, [question], limit=100) == " ba "
    assert turn_ending(tokenizer) == ""
    with pytest.raises(InputError, match="one user message and nothing else"):
        render_chat(tokenizer, [{"role": "assistant", "content": " ba"}], limit=100)
