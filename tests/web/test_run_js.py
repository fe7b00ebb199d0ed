"""What follows from frames: the module run.js, on frames that are worked out by hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from browser import chromium, needs_chromium, opened
from damaged_traces import DAMAGES

from dmax import InputError
from dmax.trace import Trace
from dmax.web.page import self_contained

pytestmark = needs_chromium

MASK, EOS = 99, 98
WORDS = {1: " one", 2: " two", 3: " three", 4: " four", EOS: ""}

REFUSED = """(() => {
  try {
    Run.fromTrace(BROKEN);
  } catch (error) {
    return error.message;
  }
  return "nothing is wrong";
})()"""

Evaluate = Callable[..., Any]


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Evaluate]:
    """Runs an expression of JavaScript about `run`, the run that a trace holds."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(self_contained("test", "", "run.js", (), {}).html, encoding="utf-8")
    with chromium() as browser, opened(browser, path.as_uri()) as page:

        def evaluate(record: Any, expression: str) -> Any:
            body = f"""async (trace) => {{
              const {{ Run }} = await import("dmax/run.js");
              const run = Run.fromTrace(trace);
              return {expression};
            }}"""
            return page.evaluate(body, record)

        yield evaluate


def frame(forward: int, tokens: str, *, position: int = 0, step: int = 0, **more: Any) -> Any:
    """A frame of tokens such as "1 2 . E": `.` is masked, `E` the EOS."""
    ids = [{".": MASK, "E": EOS}.get(word) or int(word) for word in tokens.split()]
    masked = [token == MASK for token in ids]
    return {
        "kind": "provisional",
        "position": position,
        "step": step or forward,
        "num_forwards": forward,
        "seconds": forward / 2,
        "token_ids": ids,
        "texts": ["" if token == MASK else WORDS[token] for token in ids],
        "masked": masked,
        "confidence": [0.5] * len(ids),
        "written": [not each for each in masked],
        "forced": False,
        "capped": False,
    } | more


def last(forward: int, tokens: str, **more: Any) -> Any:
    return frame(forward, tokens, **{"kind": "committed", **more})


def trace(frames: Sequence[Any], num_tokens: int = 4, **changes: Any) -> dict[str, Any]:
    params = {"strategy": "spd", "max_new_tokens": 100, "ignore_eos": False, "options": {}}
    num_forwards = max((each["num_forwards"] for each in frames), default=0)
    record = {
        "format": "dmax-trace",
        "version": 1,
        "model": "m",
        "prompt": "p",
        "prompt_token_ids": [1],
        "params": params | changes.pop("params", {}),
        "threshold": 0.5,
        "stop_confidence": 0.9,
        "block_length": 4,
        "mask_token_id": MASK,
        "eos_token_ids": [EOS],
        "environment": {},
        "frames": list(frames),
        "output": {
            "text": "",
            "token_ids": [1] * num_tokens,
            "finish_reason": "length",
            "num_forwards": num_forwards,
            "num_prefill_forwards": 1,
            "num_positions": 8,
            "num_forced": 0,
            "num_capped": 0,
            "tokens_per_forward": 1.0,
            "seconds": 4.0,
        },
    } | changes
    Trace.from_record(record)
    return record


FOUR = (
    frame(1, "1 . . ."),
    frame(2, "1 2 3 ."),
    frame(3, "4 2 . 3"),
    last(4, "4 2 3 3"),
)


def test_every_position_has_its_status_and_event(evaluate: Evaluate) -> None:
    seen = "[0, 1, 2, 3, 4].map((m) => run.at(m).tokens.map((t) => [t.status, t.event, t.changes]))"
    before, first, second, third, fourth = evaluate(trace(FOUR), seen)
    assert before == [["mask", None, 0]] * 4
    assert first == [["provisional", "promoted", 0], *[["mask", "waiting", 0]] * 3]
    assert second == [
        ["provisional", "kept", 0],
        ["provisional", "promoted", 0],
        ["provisional", "promoted", 0],
        ["mask", "waiting", 0],
    ]
    assert third == [
        ["revised", "revised", 1],
        ["provisional", "kept", 0],
        ["mask", "remasked", 0],
        ["provisional", "promoted", 0],
    ]
    assert fourth == [
        ["settled", "kept", 1],
        ["settled", "kept", 0],
        ["settled", "promoted", 0],  # the token that it had before it was masked again
        ["settled", "kept", 0],
    ]


def test_a_position_tells_its_history(evaluate: Evaluate) -> None:
    history = evaluate(trace(FOUR), "run.history(0)")
    assert [(each["forward"], each["text"], each["event"]) for each in history] == [
        (1, " one", "promoted"),
        (2, " one", "kept"),
        (3, " four", "revised"),
        (4, " four", "kept"),
    ]
    assert [each["id"] for each in evaluate(trace(FOUR), "run.history(3)")] == [None, None, 3, 3]
    assert len(evaluate(trace(FOUR), "run.history(0, 2)")) == 2
    assert evaluate(trace(FOUR), "run.history(4)") == []


def test_candidates_are_part_of_it(evaluate: Evaluate) -> None:
    two = [[[1, 0.75, " one"], [2, 0.25, " two"]]] * 4
    [entry] = evaluate(trace([last(1, "1 1 1 1", candidates=two)]), "run.history(2)")
    assert entry["candidates"] == [
        {"id": 1, "probability": 0.75, "text": " one"},
        {"id": 2, "probability": 0.25, "text": " two"},
    ]


def test_counters_follow_the_moment(evaluate: Evaluate) -> None:
    record = trace([*FOUR, last(5, "1 1 1 1", position=4)], num_tokens=8)
    counters = evaluate(record, "[1, 4, 5].map((moment) => run.at(moment).counters)")
    assert [each["forwards"] for each in counters] == [1, 4, 5]
    assert [each["settled"] for each in counters] == [0, 4, 8]
    assert [each["tpf"] for each in counters] == [0, 1.0, 8 / 5]
    assert [each["tokensPerSecond"] for each in counters] == [0, 4 / 2, 8 / 4]
    assert [each["revisions"] for each in counters] == [0, 1, 1]


def test_the_text_ends_at_the_first_eos(evaluate: Evaluate) -> None:
    roles = "run.at().tokens.map((token) => token.role)"
    record = trace([last(1, "1 E 2 E")], num_tokens=1)
    assert evaluate(record, roles) == ["text", "end", "after", "after"]
    assert evaluate(record, "run.at().text") == " one"
    assert evaluate(record, "run.at().counters.settled") == 1
    ignoring = trace([last(1, "1 E 2 E")], params={"ignore_eos": True})
    assert evaluate(ignoring, roles) == ["text"] * 4
    assert evaluate(ignoring, "run.at().tokens[1].isEos")


def test_the_text_ends_at_the_limit_and_after_a_stop_text(evaluate: Evaluate) -> None:
    roles = "run.at().tokens.map((token) => token.role)"
    limited = trace([last(1, "1 2 3 4")], params={"max_new_tokens": 3})
    assert evaluate(limited, roles) == ["text", "text", "text", "after"]
    assert evaluate(trace([last(1, "1 2 3 4")], num_tokens=2), roles)[1:3] == ["text", "after"]


def test_masks_have_a_sign_in_the_text(evaluate: Evaluate) -> None:
    assert evaluate(trace(FOUR), "run.at(2).text") == " one two three░"


def end_of(evaluate: Evaluate, frames: Sequence[Any], block: int = 0, **changes: Any) -> Any:
    return evaluate(trace(frames, **changes), f"run.blocks[{block}].end?.kinds ?? null")


def test_why_a_block_ended(evaluate: Evaluate) -> None:
    sure = {"confidence": [0.9] * 4}
    whole = frame(1, "1 2 3 4")
    assert end_of(evaluate, [whole, last(2, "1 2 3 4")]) == ["agree"]
    assert end_of(evaluate, [whole, last(2, "1 2 3 4", **sure)]) == ["agree", "sure"]
    assert end_of(evaluate, [whole, last(2, "1 2 3 3", **sure)]) == ["sure"]
    assert end_of(evaluate, [frame(1, "1 . . 4"), last(2, "1 2 3 4", **sure)]) == ["sure"]
    assert end_of(evaluate, [whole, last(2, "1 2 3 4", capped=True)]) == ["capped"]
    assert end_of(evaluate, [whole]) is None
    off = {"options": {"stop_on_confidence": False}}
    assert end_of(evaluate, [whole, last(2, "1 2 3 4", **sure)], params=off) == ["agree"]


def test_why_a_block_of_a_strategy_without_stop_confidence_ended(evaluate: Evaluate) -> None:
    none = {"stop_confidence": None}
    sure = {"confidence": [1.0] * 4}
    assert end_of(evaluate, [frame(1, "1 . . 4"), last(2, "1 2 3 4", **sure)], **none) == [
        "unmasked"
    ]
    assert end_of(evaluate, [frame(1, "1 2 3 4"), last(2, "1 2 3 4")], **none) == ["agree"]
    waiting = [
        frame(1, "1 . . ."),
        frame(1, "1 2 3 4", position=4),
        last(2, "1 2 3 4"),
        last(2, "1 2 3 4", position=4),
    ]
    assert end_of(evaluate, waiting, block=0, num_tokens=8, **none) == ["unmasked"]
    assert end_of(evaluate, waiting, block=1, num_tokens=8, **none) == ["waited"]


def test_reasons_are_said_in_words(evaluate: Evaluate) -> None:
    text = "run.blocks[0].end.text"
    sure = {"confidence": [0.95] * 4}
    ends = [frame(1, "1 2 3 4"), last(2, "1 2 3 4", **sure)]
    expected = "two forwards agree, and every position is at least 0.9 sure"
    assert evaluate(trace(ends), text) == expected
    capped = trace([frame(1, "1 . . ."), last(2, "1 2 3 4", capped=True)])
    assert evaluate(capped, text) == "the cap on steps was reached (2)"


def test_several_open_blocks_share_a_moment(evaluate: Evaluate) -> None:
    frames = [
        frame(1, "1 2 . ."),
        frame(2, "1 2 3 ."),
        frame(2, "4 . . .", position=4, step=1),
        last(3, "1 2 3 4"),
        frame(3, "4 3 . .", position=4, step=2),
        last(4, "4 3 2 1", position=4, step=3),
    ]
    record = trace(frames, num_tokens=8)
    assert evaluate(record, "run.numMoments") == 5
    counts = evaluate(record, "[0, 1, 2, 3, 4].map((m) => run.at(m).tokens.length)")
    assert counts == [4, 4, 8, 8, 8]
    statuses = evaluate(record, "run.at(3).tokens.map((token) => token.status)")
    assert statuses == ["settled"] * 4 + ["provisional"] * 2 + ["mask"] * 2
    blocks = evaluate(record, "run.blocks")
    assert [(each["firstForward"], each["lastForward"]) for each in blocks] == [(1, 3), (2, 4)]
    assert [each["steps"] for each in blocks] == [3, 3]


def test_forced_steps_and_revisions_are_counted(evaluate: Evaluate) -> None:
    frames = [
        frame(1, "1 . . .", forced=True),
        frame(2, "2 1 . .", forced=True),
        last(3, "2 1 1 1"),
    ]
    [block] = evaluate(trace(frames), "run.blocks")
    assert (block["forced"], block["revisions"]) == (2, 1)


def test_the_curve_has_a_point_for_each_step(evaluate: Evaluate) -> None:
    frames = [frame(1, "1 . . .", confidence=[0.8, 0.2, 0.4, 0.6]), last(2, "1 2 3 4")]
    [curve] = evaluate(trace(frames), "run.curve()")
    first, second = curve["points"]
    assert first == {"moment": 1, "mean": 0.5, "lowest": 0.2, "decoded": 0.25, "changed": 1}
    assert (second["decoded"], second["changed"]) == (1, 3)


def test_a_run_grows_and_is_written_as_it_was_read(evaluate: Evaluate) -> None:
    record = trace(FOUR)
    assert evaluate(record, "run.toTrace()") == record
    grown = """(() => {
      const { frames, output, ...header } = trace;
      const growing = new Run(header);
      const seen = frames.map((frame) => {
        growing.push(frame);
        return [growing.numMoments, growing.at().tokens.length, growing.isFinished];
      });
      growing.finish(output);
      return [seen, growing.isFinished, JSON.stringify(growing.at()) === JSON.stringify(run.at())];
    })()"""
    seen, is_finished, is_same = evaluate(record, grown)
    assert seen == [[moment, 4, False] for moment in (2, 3, 4, 5)]
    assert is_finished and is_same


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_page_refuses_what_python_refuses(evaluate: Evaluate, damage: str) -> None:
    """Both read strangers' files, and each says in one sentence what is wrong."""
    change, _ = DAMAGES[damage]
    candidates = [[[1, 0.5, " one"]]] * 4
    record = trace([frame(1, "1 2 3 .", candidates=candidates), last(2, "1 2 3 4")])
    broken = copy.deepcopy(record)
    change(broken)
    with pytest.raises(InputError):
        Trace.from_record(broken)
    said = evaluate(record, REFUSED.replace("BROKEN", json.dumps(broken)))
    assert said.startswith("It is ") and said.endswith(".")
    assert evaluate(record, "Run.fromTrace(trace).numMoments") == 3
