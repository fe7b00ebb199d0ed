"""Distillation with a model: what is kept, what is dropped, what a stopped run goes on from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from responder import PARAMS, PROMPTS, Responder, by_index, counts, lines, run
from test_llm import folder_fixture, llm_fixture  # noqa: F401  (fixtures)

from dmax import LLM, GenerationOutput, InputError, StreamEvent
from dmax import files as files_module
from dmax.distill import files as distill_files
from dmax.distill import model
from dmax.distill.files import ResponseFiles
from dmax.distill.filters import Filters
from dmax.distill.model import ModelAnswerer
from dmax.distill.responses import Prompt
from dmax.distill.run import MOST_REFUSED, Report, distill
from dmax.engine.request import Request
from dmax.outputs import Cost
from dmax.records.encoding import encode_dataset
from dmax.records.sources import read_conversations

ALL = (7, 5, {"unfinished": 1, "empty": 1})


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "new" / "responses.jsonl"


def apart(output: Path) -> Path:
    return output.with_suffix(".dropped.jsonl")


def test_a22_finished_responses_are_kept_unfiltered_and_the_others_set_apart(output: Path) -> None:
    told: list[tuple[int, int]] = []
    report = run(output, Responder(), progress=lambda done, total, _: told.append((done, total)))
    assert counts(report) == ALL
    assert told == [(done, 7) for done in (0, 2, 3, 4, 5, 6, 7)]  # two end together
    assert [record["index"] for record in by_index(output)] == [0, 1, 3, 5, 6]
    assert by_index(output)[3] == {
        "index": 5,
        "prompt": "six für ☃",
        "response": "answer to six für ☃",
        "tokens": 5,
        "forwards": 1,
    }
    dropped = by_index(apart(output))
    assert [record["prompt"] for record in dropped] == ["endless three", "silent five"]
    assert [record["reason"] for record in dropped] == ["unfinished", "empty"]
    assert report.tokens == sum(record["tokens"] for record in [*by_index(output), *dropped]) == 21
    assert report.tpf == report.tokens / 7


def test_responses_that_are_finished_together_are_appended_at_once(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    appended: list[tuple[str, int]] = []

    def append(path: Path, text: str) -> None:
        appended.append((path.name, text.count("\n")))
        files_module.append(path, text)

    monkeypatch.setattr(distill_files, "append", append)
    together = ["even1", "even2", "endless one", "endless two", "even3"]  # by their length
    run(output, Responder(), together)
    written = [each for each in appended if each[1]]
    assert written == [(output.name, 3), (apart(output).name, 2)]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_batch_stays_full_until_no_prompt_is_left(output: Path, batch_size: int) -> None:
    prompts = [f"{'a' * (1 + index % 7)} {index}" for index in range(150)]
    responder = Responder(max_batch_size=batch_size)
    assert run(output, responder, prompts).kept == 150
    num_last = responder.batches.count(batch_size)
    assert responder.batches[:num_last] == [batch_size] * num_last
    longest = max(len(prompt) for prompt in prompts)
    assert len(responder.batches) - num_last <= longest


def test_a_response_is_written_when_it_is_finished(output: Path) -> None:
    seen: list[int] = []
    run(
        output,
        Responder(),
        ["long prompt", "p"],
        progress=lambda done, *_: seen.append(len(lines(output)) if done else 0),
    )
    assert seen == [0, 1, 2]
    assert [record["index"] for record in lines(output)] == [1, 0]


def test_training_reads_what_distillation_writes(output: Path) -> None:
    run(output, Responder())
    kept = [prompt for prompt in PROMPTS if "endless" not in prompt and "silent" not in prompt]
    expected = [([{"role": "user", "content": prompt}], f"answer to {prompt}") for prompt in kept]
    learnt = sorted([record[:2] for record in read_conversations(output)], key=expected.index)
    assert learnt == expected


@pytest.mark.parametrize("dies_at", [0, 4, 10, 14])
def test_an_interrupted_run_goes_on_where_it_stopped(
    output: Path, tmp_path: Path, dies_at: int
) -> None:
    whole = tmp_path / "whole.jsonl"
    run(whole, Responder(max_batch_size=2))
    with pytest.raises(KeyboardInterrupt):
        run(output, Responder(dies_at, max_batch_size=2))
    files = [file for file in (output, apart(output)) if file.exists()]
    done = {record["prompt"] for file in files for record in lines(file)}
    second = Responder(max_batch_size=2)
    assert counts(run(output, second)) == ALL
    assert sorted(second.asked) == sorted(set(PROMPTS) - done)
    for suffix in (".jsonl", ".dropped.jsonl"):
        assert by_index(output.with_suffix(suffix)) == by_index(whole.with_suffix(suffix))


@pytest.mark.parametrize("suffix", [".jsonl", ".dropped.jsonl"])
def test_a_run_goes_on_from_any_prefix(output: Path, suffix: str) -> None:
    run(output, Responder())
    file = output.with_suffix(suffix)
    whole = by_index(file)
    data = file.read_bytes()
    # Less than the beginning that all lines share does not say whose the file is.
    for end in range(len(b'{"index": '), len(data)):
        file.write_bytes(data[:end])
        assert counts(run(output, Responder())) == ALL
        assert by_index(file) == whole


def test_a_line_cut_off_is_answered_again(output: Path) -> None:
    run(output, Responder())
    text = output.read_text(encoding="utf-8")
    output.write_text(text[:-9], encoding="utf-8")
    again = Responder()
    assert counts(run(output, again)) == ALL
    assert again.asked == [lines(output)[-1]["prompt"]]
    assert output.read_text(encoding="utf-8") == text


def test_a_line_cut_off_inside_a_letter_is_answered_again(output: Path) -> None:
    run(output, Responder(), PROMPTS[:6])
    whole = output.read_bytes()
    output.write_bytes(whole[: whole.rindex("☃".encode()) + 1])
    again = Responder()
    run(output, again, PROMPTS[:6])
    assert again.asked == ["six für ☃"]
    assert output.read_bytes() == whole


def test_separators_of_lines_inside_a_response_are_no_ends_of_records(output: Path) -> None:
    prompts = ["first\u2028second", "next\x85line"]
    run(output, Responder(), prompts)
    again = Responder()
    assert run(output, again, prompts).kept == 2
    assert again.asked == []
    read = [record.messages[0]["content"] for record in read_conversations(output)]
    assert sorted(read) == sorted(prompts)


def test_a_finished_run_asks_nothing(output: Path) -> None:
    run(output, Responder())
    before = output.read_bytes()
    again = Responder()
    assert counts(run(output, again)) == ALL
    assert again.asked == []
    assert output.read_bytes() == before


def test_more_prompts_continue_a_file_and_other_prompts_do_not(output: Path) -> None:
    run(output, Responder(), PROMPTS[:4])
    more = Responder()
    assert counts(run(output, more)) == ALL
    assert sorted(more.asked) == sorted(PROMPTS[4:])
    before = output.read_bytes()
    for others in (PROMPTS[:3], ["one", "other", *PROMPTS[2:]]):
        with pytest.raises(InputError, match=r"responses.*:\d answers another prompt"):
            run(output, Responder(), others)
    assert output.read_bytes() == before


FOREIGN = (
    "nonsense",
    "[1]",
    "{}",
    "{",
    '{"index": -1, "prompt": "seven"}',
    '{"index": 1, "prompt": "one"}',
    '{"index": 1, "prompt": "tw0',
)


@pytest.mark.parametrize("suffix", [".jsonl", ".dropped.jsonl"])
@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize("line", FOREIGN)
def test_a_file_of_something_else_is_left_alone(
    output: Path, line: str, end: str, suffix: str
) -> None:
    file = output.with_suffix(suffix)
    file.parent.mkdir()
    file.write_text(line + end)
    manifest(output).write_text('{"dmax": "0.1.0"}')
    with pytest.raises(InputError, match=f"responses{suffix}:1 "):
        run(output, Responder())
    assert file.read_text() == line + end


def test_words_after_our_lines_are_left_alone(output: Path) -> None:
    run(output, Responder(), PROMPTS[:2])
    text = output.read_text() + "to do: read these"
    output.write_text(text)
    with pytest.raises(InputError, match=r"responses.jsonl:3 is no response"):
        run(output, Responder())
    assert output.read_text() == text


@pytest.mark.parametrize("suffix", [".jsonl", ".dropped.jsonl"])
def test_a_damaged_line_is_no_response_even_if_it_ends(output: Path, suffix: str) -> None:
    run(output, Responder(), PROMPTS[:4])
    file = output.with_suffix(suffix)
    *whole, last = file.read_text().splitlines()
    damaged = "".join(line + "\n" for line in (*whole, last[:-9]))
    file.write_text(damaged)
    where = f"responses{suffix}:{len(whole) + 1}"
    with pytest.raises(InputError, match=f"{where} is no response to a prompt"):
        run(output, Responder())
    assert file.read_text() == damaged


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        run(tmp_path / "file" / "responses.jsonl", Responder())


def test_a_folder_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for folder in (tmp_path / "folder", Path(), Path("/")):
        with pytest.raises(InputError, match="cannot write .*: it is a folder"):
            run(folder, Responder())


def distilled(llm: LLM, prompts: list[Prompt], output: Path) -> Report:
    return distill(ModelAnswerer(llm, PARAMS), prompts, ResponseFiles(output))


def test_a_model_answers_as_it_generates(llm: LLM, output: Path) -> None:
    prompts: list[Any] = ["Tom has 3 apples.", "Hi"]
    report = distilled(llm, prompts, output)
    outputs = llm.generate(prompts, PARAMS)
    # A random model does not find an end.
    assert (report.kept, report.dropped) == (0, {"unfinished": 2})
    assert report.tokens == sum(len(result.token_ids) for result in outputs)
    assert report.tpf == report.tokens / sum(result.num_forwards for result in outputs)
    dropped = by_index(apart(output))
    assert [record["response"] for record in dropped] == [result.text for result in outputs]


# ---- prompts that are refused --------------------------------------------------------------------


def test_a_prompt_that_the_model_refuses_is_dropped_with_the_reason(output: Path) -> None:
    prompts = ["a very long one to be refused", *PROMPTS, "refused too"]
    report = run(output, Responder(max_batch_size=1), prompts)
    assert counts(report) == (9, 5, {"unfinished": 1, "empty": 1, "refused": 2})
    refused = [each for each in lines(apart(output)) if each["reason"] == "refused"]
    assert [record["error"] for record in refused] == [
        "prompt 0 does not fit",
        "prompt 8 does not fit",
    ]
    again = Responder()
    assert counts(run(output, again, prompts)) == counts(report)
    assert again.asked == []


@pytest.mark.parametrize("num_prompts", [1, 5, MOST_REFUSED, 100])
def test_a_model_that_refuses_everything_ends_the_run_and_uses_no_prompt_up(
    output: Path, num_prompts: int
) -> None:
    with pytest.raises(InputError, match="prompt 0 does not fit"):
        run(output, Responder(), ["refused"] * num_prompts)
    assert not output.exists() and not apart(output).exists()


def test_a_run_goes_on_past_any_number_of_refusals_once_something_was_answered(
    output: Path,
) -> None:
    run(output, Responder(), ["one"])
    report = run(output, Responder(), ["one", *["refused"] * (2 * MOST_REFUSED)])
    assert counts(report) == (1 + 2 * MOST_REFUSED, 1, {"refused": 2 * MOST_REFUSED})


# ---- chats ---------------------------------------------------------------------------------------


def test_a_chat_is_answered_and_training_reads_it(output: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}]
    endless = [{"role": "user", "content": "endless"}]
    assert run(output, Responder(), [chat, endless, "two"]).kept == 2
    [record, _] = by_index(output)
    assert record["messages"][:-1] == chat
    assert "prompt" not in record
    learnt = [record for record in read_conversations(output) if record.messages == chat]
    assert [record.response for record in learnt] == ["answer to Be brief. one"]
    again = Responder()
    assert run(output, again, [chat, endless, "two"]).kept == 2
    assert again.asked == []
    with pytest.raises(InputError, match="answers another prompt"):
        run(output, Responder(), [chat[1:], endless, "two"])


def test_a_line_of_a_chat_that_was_cut_off_is_answered_again(output: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}]
    run(output, Responder(), [chat])
    whole = output.read_bytes()
    for end in range(len(b'{"index": '), len(whole)):
        output.write_bytes(whole[:end])
        assert run(output, Responder(), [chat]).kept == 1
        assert output.read_bytes() == whole


# ---- what an earlier run depends on --------------------------------------------------------------


def manifest(output: Path) -> Path:
    return output.with_suffix(".manifest.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"responder": Responder(weight=2.0)}, r"`weights` was '\w{16}' and is '\w{16}'"),
        ({"filters": Filters(max_repetition=0.5)}, "`filters.max_repetition` was None and is 0.5"),
        (
            {"params": replace(PARAMS, threshold=0.4)},
            r"`params.threshold` was 0.3 and is 0.4, `decoding` was .* and is .*",
        ),
        ({"params": replace(PARAMS, strategy="llada", threshold=None)}, "`params.strategy` was"),
        ({"params": replace(PARAMS, max_new_tokens=17)}, "`params.max_new_tokens` was 16 and is"),
    ],
)
@pytest.mark.parametrize("has_unfinished_only", [False, True])
def test_a_run_goes_on_with_the_same_model_and_settings_only(
    output: Path, change: dict[str, Any], message: str, has_unfinished_only: bool
) -> None:
    first = ["silent one"] if has_unfinished_only else PROMPTS[:2]
    prompts = first + PROMPTS[2:]
    run(output, Responder(), first)
    before = {file: file.read_bytes() for file in output.parent.iterdir()}
    changed = {"responder": Responder()} | change
    with pytest.raises(InputError, match=f"are of another run: {message}") as caught:
        run(output, prompts=prompts, **changed)
    assert "\n" not in caught.value.message
    assert changed["responder"].asked == []
    assert {file: file.read_bytes() for file in output.parent.iterdir()} == before
    assert run(output, Responder(max_batch_size=2), prompts).prompts == len(prompts)


def test_a_run_goes_on_with_the_same_version_only(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(output, Responder(), PROMPTS[:2])
    monkeypatch.setattr(model, "__version__", "9.9")
    with pytest.raises(InputError, match=r"another run: `dmax` was '.*' and is '9\.9'"):
        run(output, Responder())


def test_responses_that_nothing_speaks_of_are_left_alone(output: Path) -> None:
    run(output, Responder(), PROMPTS[:2])
    manifest(output).unlink()
    with pytest.raises(InputError, match=r"responses\.manifest\.json is missing"):
        ResponseFiles(output).read(PROMPTS)  # before a model is loaded
    with pytest.raises(InputError, match="or move the earlier one away"):
        run(output, Responder())
    assert len(lines(output)) == 2


@pytest.mark.parametrize("content", ["", "{", "[1]", "[" * 100_000, "\udcff"])
def test_a_manifest_that_is_none(output: Path, content: str) -> None:
    run(output, Responder(), PROMPTS[:2])
    manifest(output).write_text(content, errors="surrogateescape")
    with pytest.raises(InputError, match="is not the manifest of a distillation"):
        run(output, Responder())


def test_a_run_killed_before_its_first_response_may_begin_otherwise(output: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(output, Responder(dies_at=0))
    assert not output.parent.exists() or not list(output.parent.iterdir())
    output.parent.mkdir(exist_ok=True)
    manifest(output).write_text('{"dmax": "0.1.0", "weights": "others"}')
    assert counts(run(output, Responder())) == ALL
    assert json.loads(manifest(output).read_text())["params"]["threshold"] == 0.3


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/full"])
def test_a_device_is_no_output(path: str) -> None:
    with pytest.raises(InputError, match=f"cannot write {path}"):
        run(Path(path), Responder())


def test_files_are_looked_at_before_there_are_prompts(output: Path) -> None:
    ResponseFiles(output).check()
    assert not output.parent.exists()
    run(output, Responder(), PROMPTS[:2])
    ResponseFiles(output).check()
    manifest(output).unlink()
    with pytest.raises(InputError, match="manifest.json is missing"):
        ResponseFiles(output).check()
    output.write_text("a diary")
    with pytest.raises(InputError, match="responses.jsonl:1 is no response to a prompt"):
        ResponseFiles(output).check()


def test_training_learns_the_very_tokens_that_the_model_wrote(llm: LLM, output: Path) -> None:
    text = "Tom has 3 apples."
    written = llm.tokenizer.encode(f"{text}<|role_end|>", add_special_tokens=False)  # type: ignore[union-attr]

    class Writer(Responder):
        """Ends its turn as the chat template does, then reaches EOS."""

        def output(self, request: Request, event: Any) -> GenerationOutput:
            result = GenerationOutput("", tuple(written), request.prompt_ids, "stop", Cost())
            return llm.output(request, StreamEvent("finished", "", result.token_ids, output=result))

    assert counts(run(output, Writer(), ["Hi"])) == (1, 1, {})
    assert [record["response"] for record in lines(output)] == [text]
    conversations = list(read_conversations(output))
    ids = llm.checkpoint.special_ids
    [example] = encode_dataset(conversations, llm.tokenizer, ids, max_length=512)
    assert example["prompt_ids"] == list(llm.encode("Hi"))
    assert example["response_ids"] == written


def test_a_model_knows_its_own_responses(llm: LLM, output: Path) -> None:
    distilled(llm, [*PROMPTS[:1]], output)
    told = json.loads(manifest(output).read_text())
    llm.generate("Tom", PARAMS)
    assert distilled(llm, [*PROMPTS[:2]], output).prompts == 2
    assert json.loads(manifest(output).read_text()) == told
    template, llm.tokenizer.chat_template = llm.tokenizer.chat_template, "{{ messages }}"  # type: ignore[union-attr]
    with pytest.raises(InputError, match="of another run: `tokenizer` was"):
        distilled(llm, [*PROMPTS], output)
    llm.tokenizer.chat_template = template  # type: ignore[union-attr]
