"""Traces: any strategy, no token changed, files that are read back, and bad ones in a sentence."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from damaged_traces import DAMAGES
from test_llm import bare_folder_fixture, folder_fixture  # noqa: F401  (fixtures)

from dmax import LLM, DecodingParams, InputError
from dmax.decoding import strategies
from dmax.trace import Trace, record
from dmax.trace.file import json_schema, load_traces, to_json

QUESTION = "Tom has 3 mugs. He buys 4 more mugs. How many mugs does Tom have?"
HEADS = ("demask", "learn2pd")  # of the bundled model


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("tiny-base", dtype="float32")


@pytest.fixture(scope="module")
def made(llm: LLM) -> Trace:
    params = DecodingParams(strategy="spd", top_k=2, max_new_tokens=32)
    return record(llm, QUESTION, params, name="tiny-base")


def costs(output: Any) -> list[int]:
    names = "num_forwards num_prefill_forwards num_positions num_forced num_capped".split()
    return [output[name] for name in names]


@pytest.mark.parametrize("name", strategies())
def test_tracing_changes_no_token_of(llm: LLM, name: str) -> None:
    options = {"head": "tiny-base"} if name in HEADS else {}
    params = DecodingParams(strategy=name, max_new_tokens=64, options=options)
    [plain] = llm.generate(QUESTION, params)
    trace = record(llm, QUESTION, params)
    assert trace.output["token_ids"] == list(plain.token_ids)
    assert trace.output["text"] == plain.text
    assert costs(trace.output) == [
        plain.num_forwards,
        plain.num_prefill_forwards,
        plain.num_positions,
        plain.cost.num_forced,
        plain.cost.num_capped,
    ]
    assert trace.record["params"]["strategy"] == name
    forwards = [frame["num_forwards"] for frame in trace.frames]
    assert sorted(set(forwards)) == list(range(1, plain.num_forwards + 1))


def test_tracing_changes_no_sample(llm: LLM) -> None:
    params = DecodingParams(temperature=0.8, seed=5, max_new_tokens=64)
    [plain] = llm.generate(QUESTION, params)
    assert record(llm, QUESTION, params).output["token_ids"] == list(plain.token_ids)


def test_the_last_frames_hold_the_answer(llm: LLM) -> None:
    trace = record(llm, QUESTION, DecodingParams(max_new_tokens=64))
    settled = [frame for frame in trace.frames if frame["kind"] == "committed"]
    tokens = [token for frame in settled for token in frame["token_ids"]]
    assert tokens[: len(trace.output["token_ids"])] == trace.output["token_ids"]
    assert not any(any(frame["masked"]) for frame in settled)


def test_a_prompt_is_kept_as_it_was_given(llm: LLM) -> None:
    params = DecodingParams(max_new_tokens=8)
    messages = [{"role": "user", "content": QUESTION}]
    ids = list(llm.encode(QUESTION))
    assert record(llm, QUESTION, params).record["prompt"] == QUESTION
    assert record(llm, messages, params).record["prompt"] == messages
    assert record(llm, ids, params).record["prompt"] is None
    assert record(llm, ids, params).record["prompt_token_ids"] == ids


def test_a_checkpoint_without_tokenizer_shows_ids(bare_folder: Path) -> None:
    llm = LLM(str(bare_folder), dtype="float32")
    trace = record(llm, [1, 2, 3], DecodingParams(max_new_tokens=8))
    last = trace.frames[-1]
    assert [text.strip() for text in last["texts"]] == [str(token) for token in last["token_ids"]]
    assert trace.record["model"] == bare_folder.name
    assert "dmax-traces" in trace.html()


def test_a_deadline_of_nothing_is_a_trace_without_frames(llm: LLM) -> None:
    trace = record(llm, QUESTION, DecodingParams(deadline=0))
    assert (list(trace.frames), trace.output["finish_reason"]) == ([], "deadline")


def test_what_generate_refuses_is_refused(llm: LLM) -> None:
    with pytest.raises(InputError, match="there is room for"):
        record(llm, QUESTION * 1000)


def test_a_file_gives_the_trace_back(made: Trace, tmp_path: Path) -> None:
    made.save(tmp_path / "new" / "run.json")
    assert Trace.load(tmp_path / "new" / "run.json") == made
    assert json.loads(made.to_json()) == made.record
    assert made.header | {"frames": made.frames, "output": made.output} == made.record
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["run.json"]


def test_a_list_of_traces_is_read_too(made: Trace, tmp_path: Path) -> None:
    path = tmp_path / "two.json"
    path.write_text(to_json([made.record, made.record]))
    assert load_traces(path) == [made, made]
    with pytest.raises(InputError, match="two.json holds 2 traces"):
        Trace.load(path)


def test_a_trace_is_named_in_a_line(made: Trace) -> None:
    output = made.output
    cost = f"{len(output['token_ids'])} tokens in {output['num_forwards']} forwards"
    assert repr(made) == f"<Trace of tiny-base, spd: {cost}>"


def test_a_notebook_shows_the_page_in_a_frame(made: Trace) -> None:
    shown = made._repr_html_()
    assert shown.startswith("<iframe srcdoc=") and shown.endswith("</iframe>")
    assert "<script" not in shown and 'sandbox="allow-scripts' in shown


# --- bad files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_trace_is_one_sentence(made: Trace, tmp_path: Path, damage: str) -> None:
    change, expected = DAMAGES[damage]
    broken = copy.deepcopy(dict(made.record))
    change(broken)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(broken))
    with pytest.raises(InputError, match=expected) as raised:
        Trace.load(path)
    assert str(path) in raised.value.message
    assert "\n" not in raised.value.message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a": NaN}', "is not JSON"),
        (b"1" * 10_000, "is not JSON"),
        (b"[]", "the list in it is empty"),
        (b"[[]]", "is no trace"),
        (b'"text"', "is no trace"),
    ],
    ids=["empty", "utf-16", "deep", "nan", "digits", "no traces", "lists", "text"],
)
def test_a_file_of_something_else_is_one_sentence(
    tmp_path: Path, content: bytes, expected: str
) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=expected):
        Trace.load(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        Trace.load(tmp_path / "none.json")
    with pytest.raises(InputError, match="Is a directory"):
        Trace.load(tmp_path)


# --- the schema -----------------------------------------------------------------------------------


def test_the_schema_is_one_that_others_can_use(made: Trace) -> None:
    """Our own reader and a full implementation of JSON Schema agree on every example."""
    validators = pytest.importorskip("jsonschema_rs", reason="schemathesis brings it")
    validator = validators.validator_for(json_schema())
    assert validator.is_valid(made.record)
    beyond = {"lists of different lengths", "forwards that go back", "a hole in the text"}
    for name, (change, _) in DAMAGES.items():
        broken = copy.deepcopy(dict(made.record))
        change(broken)
        assert validator.is_valid(broken) == (name in beyond), name


def test_the_page_of_the_schema_names_every_field() -> None:
    text = (Path(__file__).parents[2] / "docs" / "trace.md").read_text(encoding="utf-8")
    schema = json_schema()
    names = [*schema["properties"], *schema["$defs"]["frame"]["properties"]]
    names += schema["$defs"]["output"]["properties"]
    assert [name for name in names if f"`{name}`" not in text] == []


def test_the_page_of_traces_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "trace.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert Trace.load("run.json") == names["trace"]
    assert names["page"].startswith("<!doctype html>")
