"""Files of rows, and files that a command goes on from: changed, cut off, or something else."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from mutations import (
    STAND_INS,
    byte_mutations,
    in_place_of,
    json_mutations,
    tree_mutations,
    write_json,
)
from oracle import attempt, contents, draw, fuzz, refused

from dmax import LLM, DecodingParams
from dmax.distill.files import ResponseFiles
from dmax.distill.model import ModelAnswerer
from dmax.distill.prompts import read_questions
from dmax.distill.responses import Prompt, as_chat
from dmax.distill.run import Report, distill
from dmax.errors import InputError
from dmax.evaluation.results import ResultFiles
from dmax.evaluation.run import evaluate
from dmax.evaluation.sweep import curves_of, run_sweep
from dmax.records.encoding import encode_dataset
from dmax.records.sources import find_source, read_conversations
from dmax.tasks import get_task

PARAMS = DecodingParams(strategy="threshold", max_new_tokens=8, max_steps_per_block=4)
LIMIT = 3

RECORDS: dict[str, Any] = {
    "pairs": {"prompt": "Tom has 3 apples.", "response": "He has 3."},
    "questions": {"question": "Tom has 3 apples.", "answer": "He has 3."},
    "messages": {
        "messages": [
            {"role": "system", "content": "Count."},
            {"role": "user", "content": "Tom has 3 apples."},
            {"role": "assistant", "content": "He has 3."},
        ]
    },
}
ROWS: dict[str, Any] = {
    "gsm8k": {"question": "Tom has 3 apples. How many?", "answer": "He has 3.\n#### 3"},
    "math500": {"problem": "What is 1 + 2?", "answer": "3", "solution": "1 + 2 = 3", "level": 1},
    "asdiv": {"body": "Tom has 3 apples.", "question": "How many?", "answer": "3 (apples)"},
    "humaneval": {
        "prompt": "def f():\n",
        "test": "def check(f):\n    assert f() is None\n",
        "entry_point": "f",
        "canonical_solution": "    return None\n",
    },
    "mbpp": {"text": "Return None.", "test_list": ["assert f() is None"], "code": "def f(): pass"},
}


def reads(read: Callable[[Path], Any], content: bytes) -> Any:
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "rows.jsonl"
        file.write_bytes(content)
        return attempt(lambda: read(file), Path(name))


def lines(*records: bytes) -> bytes:
    return b"".join(record + b"\n" for record in records)


@fuzz(70, form=st.sampled_from(sorted(RECORDS)), data=st.data())
def test_training_data(llm: LLM, form: str, data: st.DataObject) -> None:
    valid = write_json(RECORDS[form])
    mutation = draw(data, json_mutations(RECORDS[form]))

    def read(file: Path) -> Any:
        read = list(read_conversations(file))
        return encode_dataset(read, llm.tokenizer, llm.checkpoint.special_ids, max_length=512)

    outcome = reads(read, lines(valid, mutation.apply(valid)))
    if not isinstance(outcome, InputError):
        assert all(example["response_ids"] for example in outcome)
        vocabulary = llm.model.config.vocab_size
        tokens = [
            token
            for example in outcome
            for token in (*example["prompt_ids"], *example["response_ids"])
        ]
        assert all(0 <= token < vocabulary for token in tokens)


def prompts_of(file: Path) -> Sequence[Prompt]:
    return read_questions(find_source(file), None, None, None, num=None, seed=0).prompts


@fuzz(35, data=st.data())
def test_prompts_of_a_file(data: st.DataObject) -> None:
    record = {"prompt": "Tom has 3 apples."}
    mutation = draw(data, json_mutations(record))
    outcome = reads(prompts_of, lines(mutation.apply(write_json(record))))
    if not isinstance(outcome, InputError):
        contents = [message["content"] for prompt in outcome for message in as_chat(prompt)]
        assert all(content.encode() for content in contents)
        assert all(as_chat(prompt)[-1]["content"].strip() for prompt in outcome)


@fuzz(70, task=st.sampled_from(sorted(ROWS)), data=st.data())
def test_rows_of_a_task(task: str, data: st.DataObject) -> None:
    valid = write_json(ROWS[task])
    mutation = draw(data, json_mutations(ROWS[task]))
    outcome = reads(lambda file: get_task(task, file).examples(9, 0), lines(mutation.apply(valid)))
    if not isinstance(outcome, InputError):
        assert all(example.prompt.encode().strip() for example in outcome)


READERS: dict[str, Callable[[Path], Any]] = {
    "training data": lambda file: list(read_conversations(file)),
    "prompts": prompts_of,
    "a task": lambda file: get_task("gsm8k", file),
}


@fuzz(16, reader=st.sampled_from(sorted(READERS)), what=st.sampled_from(sorted(STAND_INS)))
def test_something_else_in_the_place_of_rows(reader: str, what: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "rows.jsonl"
        in_place_of(file, what)
        refused(attempt(lambda: READERS[reader](file), Path(name)), f"it is {what}")


# --- files that a command goes on from ------------------------------------------------------------


@pytest.fixture(scope="module")
def responses(llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a distillation wrote."""
    output = tmp_path_factory.mktemp("responses") / "responses.jsonl"
    distilled(llm, output)
    return output


def distilled(llm: LLM, output: Path) -> Report:
    prompts = ["Tom has 3 apples.", "Hi"]
    return distill(ModelAnswerer(llm, PARAMS), prompts, ResponseFiles(output))


@fuzz(25, data=st.data())
def test_responses_that_are_continued(llm: LLM, responses: Path, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        for file in responses.parent.iterdir():
            (Path(name) / file.name).write_bytes(file.read_bytes())
        chosen = draw(data, st.sampled_from(sorted(Path(name).iterdir())))
        content = chosen.read_bytes()
        chosen.write_bytes(draw(data, byte_mutations()).apply(content))

        def go_on() -> Any:
            return distilled(llm, Path(name) / responses.name)

        before = contents(Path(name))
        outcome = attempt(go_on)
        if isinstance(outcome, InputError):
            assert contents(Path(name)) == before, "refused, and changed a file"
        else:
            assert outcome.kept + sum(outcome.dropped.values()) == outcome.prompts == 2


@pytest.fixture(scope="module")
def journal(llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of an interrupted evaluation."""
    folder = tmp_path_factory.mktemp("journal")
    files = ResultFiles(folder / "result.json")
    evaluate(llm, get_task("word_problems"), PARAMS, limit=LIMIT, seed=7, journal=files)
    return folder


@fuzz(40, data=st.data())
def test_an_evaluation_that_is_continued(llm: LLM, journal: Path, data: st.DataObject) -> None:
    valid = (journal / "result.partial.jsonl").read_bytes()
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "result.partial.jsonl"
        file.write_bytes(changed_line(valid, data))

        def go_on() -> Any:
            task = get_task("word_problems")
            files = ResultFiles(Path(name) / "result.json")
            return evaluate(llm, task, PARAMS, limit=LIMIT, seed=7, journal=files)

        before = file.read_bytes()
        outcome = attempt(go_on)
        if isinstance(outcome, InputError):
            assert file.read_bytes() == before
        else:
            summary, samples = outcome
            assert summary.total == len(samples) == LIMIT
            assert 0 <= summary.accuracy <= 1
            assert summary.correct == sum(sample.is_correct for sample in samples)
            assert all(type(sample.output) is str for sample in samples)
            assert summary.seconds >= 0
            assert summary.cost.num_forwards > 0


def changed_line(content: bytes, data: st.DataObject) -> bytes:
    """A JSONL file with one of its lines changed, or with a change of its bytes."""
    rows = content.splitlines(keepends=True)
    index = draw(data, st.integers(0, len(rows)))
    if index == len(rows):
        return draw(data, byte_mutations()).apply(content)
    rows[index] = (
        write_json(
            draw(data, tree_mutations(json.loads(rows[index]))).apply(json.loads(rows[index]))
        )
        + b"\n"
    )
    return b"".join(rows)


@pytest.fixture(scope="module")
def sweep(llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The record of a finished sweep of two points."""
    return sweep_in(llm, tmp_path_factory.mktemp("sweep") / "sweep.json")


def sweep_in(llm: LLM, output: Path) -> bytes:
    curves = curves_of(["tiny"], ["threshold"], [0.5, 0.9])
    run_sweep(
        curves,
        get_task("word_problems"),
        output,
        limit=LIMIT,
        seed=7,
        max_new_tokens=8,
        open_model=lambda name: llm,
    )
    return output.read_bytes()


@fuzz(35, data=st.data())
def test_a_sweep_that_is_continued(llm: LLM, sweep: bytes, data: st.DataObject) -> None:
    content = draw(data, json_mutations(json.loads(sweep))).apply(sweep)
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "sweep.json"
        file.write_bytes(content)
        outcome = attempt(lambda: sweep_in(llm, file))
        if isinstance(outcome, InputError):
            assert file.read_bytes() == content, "refused, and changed the record"
            return
        points = json.loads(outcome)["points"]
        ours = [point["value"] for point in points if point["label"] == "tiny, threshold"]
        assert {0.5, 0.9} <= set(ours)  # a record may hold more from an earlier sweep
        assert all(0 <= point["accuracy"] <= 1 for point in points)


@fuzz(
    19,
    what=st.sampled_from(sorted(STAND_INS)),
    name=st.sampled_from(("result.json", "result.partial.jsonl", "result.samples.jsonl")),
)
def test_something_else_in_the_place_of_a_result(llm: LLM, what: str, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        in_place_of(Path(folder) / name, what)

        def start() -> Any:
            files = ResultFiles(Path(folder) / "result.json")
            return evaluate(llm, get_task("word_problems"), PARAMS, limit=1, seed=7, journal=files)

        outcome = attempt(start)
        if what in ("a folder", "a link to its folder", "a link to zeros", "a pipe"):
            refused(outcome, f"{name} is {what}")
