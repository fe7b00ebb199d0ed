"""One model, many threads: every answer is that of the request alone, and nobody waits for ever.

Answers are compared in float64, where the last bits decide nothing: a forward over more rows rounds
differently.
"""

from __future__ import annotations

import copy
import gc
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_llm import PARAMS, TEXTS, folder_fixture  # noqa: F401  (fixture)

from dmax import LLM, DecodingParams, GenerationOutput, InputError, StreamEvent
from dmax.checkpoint import load_checkpoint
from dmax.engine.engine import Engine
from dmax.engine.runner import ModelRunner
from dmax.tiny.tokenizer import build_tokenizer

NUM_THREADS = 8
LONG = replace(PARAMS, max_new_tokens=400)

SETTINGS = [
    PARAMS,
    replace(PARAMS, threshold=0.2, block_length=4),
    replace(PARAMS, temperature=0.8, seed=5),
    replace(PARAMS, stop=("e", "never said")),
    replace(PARAMS, deadline=0.0),
    replace(PARAMS, deadline=3600.0, block_length=16),
    DecodingParams("threshold", 0.3, max_new_tokens=9),
    DecodingParams("threshold", temperature=1.0, seed=7, max_new_tokens=8, block_length=4),
    DecodingParams("mbd", max_new_tokens=12),
    DecodingParams("lopa", max_new_tokens=8),
    DecodingParams("autoregressive", max_new_tokens=5, ignore_eos=True),
]
CASES = [(text, params) for text in (*TEXTS, TEXTS[1] * 3) for params in SETTINGS]
REFUSED: list[tuple[Any, DecodingParams, str]] = [
    ("Hi", replace(PARAMS, max_new_tokens=512), "it needs"),
    ([10_000], PARAMS, "outside the vocabulary"),
    ([], PARAMS, "is empty"),
]


def load(folder: Path) -> LLM:
    return LLM.from_checkpoint(load_checkpoint(folder, dtype=torch.float64, device="cpu"))


@pytest.fixture(scope="module", name="llm")
def llm_fixture(folder: Path) -> LLM:
    return load(folder)


@pytest.fixture(scope="module")
def answers(llm: LLM) -> list[GenerationOutput]:
    """Every case by itself, with an engine of its own in this thread."""
    found = []
    for prompt, params in CASES:
        request = llm.request(0, prompt, params)
        *_, last = llm.engine(params.block_length).run([request])
        found.append(llm.output(request, last))
    return found


def in_threads(work: Callable[[int], Any], num: int = NUM_THREADS) -> list[Any]:
    """What `work` returns for every number, each in a thread of its own that starts at once."""
    start = threading.Barrier(num)

    def run(index: int) -> Any:
        start.wait()
        return work(index)

    with ThreadPoolExecutor(num) as pool:
        return list(pool.map(run, range(num)))


def is_idle(llm: LLM) -> bool:
    """Whether nothing is decoded any more; asks after what was left before."""
    llm.generate([1], replace(PARAMS, max_new_tokens=1))
    thread = llm._thread
    return not thread._places and not any(each.is_busy() for each in thread._engines.values())


class Raised(Exception):
    """Of a consumer."""


def consume(stream: Iterator[StreamEvent]) -> None:
    for _ in stream:
        raise Raised


# --- equal to the same request alone --------------------------------------------------------------


def take(llm: LLM, answers: list[GenerationOutput], draw: random.Random) -> Counter[str]:
    """Submit something at random and check what comes of it; counts requests by what that was."""
    index = draw.randrange(len(CASES))
    prompt, params = CASES[index]
    action = draw.choice(["one", "several", "stream", "closed", "dropped", "raising", "refused"])
    if action == "one":
        assert llm.generate(prompt, params) == [answers[index]]
    elif action == "several":
        chosen = [draw.randrange(len(CASES)) for _ in range(draw.randint(2, 4))]
        prompts, each = zip(*(CASES[at] for at in chosen), strict=True)
        assert llm.generate(prompts, each) == [answers[at] for at in chosen]
        return Counter({action: len(chosen)})
    elif action == "stream":
        check_stream(list(llm.stream(prompt, params)), answers[index])
    elif action == "closed":
        stream = llm.stream(prompt, params)
        for _ in zip(range(draw.randrange(4)), stream, strict=False):
            pass
        stream.close()  # type: ignore[attr-defined]
    elif action == "dropped":
        for _ in llm.stream(prompt, params):
            break
    elif action == "raising":
        with pytest.raises(Raised):
            consume(llm.stream(prompt, params))
    else:
        wrong, settings, message = draw.choice(REFUSED)
        with pytest.raises(InputError, match=message):
            llm.generate([prompt, wrong], [params, settings])
    return Counter({action: 1})


def check_stream(events: list[StreamEvent], answer: GenerationOutput) -> None:
    *blocks, last = events
    assert last.output == answer
    assert {event.index for event in events} == {0}
    written = [token for each in blocks if each.kind == "committed" for token in each.token_ids]
    assert tuple(written[: len(answer.token_ids)]) == answer.token_ids
    assert len(blocks) >= answer.num_forwards > 0 or answer.finish_reason == "deadline"


def test_500_requests_from_many_threads_are_answered_as_alone(
    llm: LLM, answers: list[GenerationOutput]
) -> None:
    # Else one could be taken for another.
    assert len({answer.token_ids for answer in answers}) > len(CASES) / 2

    def work(index: int) -> Counter[str]:
        draw = random.Random(index)
        counts = Counter[str]()
        while counts.total() < 500 / NUM_THREADS:
            counts += take(llm, answers, draw)
        return counts

    counts = sum(in_threads(work), Counter())
    assert counts.total() >= 500 and min(counts.values()) >= 20 and len(counts) == 7
    assert is_idle(llm)


def test_requests_of_different_callers_share_a_forward(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = list[int]()
    batches = Engine.batches

    def counted(self: Engine) -> Iterator[Any]:
        for batch in batches(self):
            sizes.append(len(batch[2]))
            yield batch

    monkeypatch.setattr(Engine, "batches", counted)
    streams = [llm.stream(text, LONG) for text in TEXTS]
    for stream in streams:
        next(stream)
    assert max(sizes) == 1 or max(sizes) <= len(TEXTS)
    for stream in streams:
        next(stream)
        stream.close()  # type: ignore[attr-defined]
    assert max(sizes) == len(TEXTS)
    assert is_idle(llm)


def test_one_call_is_scheduled_as_a_run(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its requests start together, and its memory is planned for them."""
    planned = list[tuple[int, int]]()
    forwards = list[int]()
    init, forward = ModelRunner.__init__, ModelRunner.forward

    def plan(self: ModelRunner, model: Any, ids: Any, slots: int, *rest: Any, **more: Any) -> None:
        planned.append((slots, rest[0]))
        init(self, model, ids, slots, *rest, **more)

    def counted(self: ModelRunner, batch: Any, *rest: Any, **more: Any) -> Any:
        forwards.append(batch.num_rows)
        return forward(self, batch, *rest, **more)

    monkeypatch.setattr(ModelRunner, "__init__", plan)
    monkeypatch.setattr(ModelRunner, "forward", counted)
    requests = [llm.request(index, text, PARAMS) for index, text in enumerate(TEXTS)]
    list(llm.engine().run(requests))
    as_run = planned.copy(), forwards.copy()
    planned.clear()
    forwards.clear()
    LLM.from_checkpoint(llm.checkpoint).generate(TEXTS, PARAMS)
    assert (planned, forwards) == as_run


def test_engines_of_one_model_take_turns(
    llm: LLM, answers: list[GenerationOutput], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of several `LLM`s, and one that is stepped by hand."""
    inside = list[int]()
    forward = ModelRunner.forward

    def alone(self: ModelRunner, *given: Any, **more: Any) -> Any:
        inside.append(1)
        assert len(inside) == 1
        output = forward(self, *given, **more)
        inside.clear()
        return output

    monkeypatch.setattr(ModelRunner, "forward", alone)
    request = llm.request(0, *CASES[0])

    def work(index: int) -> list[GenerationOutput]:
        if index % 2:
            return LLM.from_checkpoint(llm.checkpoint).generate(*CASES[0])
        *_, last = llm.engine().run([request])
        return [llm.output(request, last)]

    assert in_threads(work) == [[answers[0]]] * NUM_THREADS


def test_a_tokenizer_serves_many_threads(llm: LLM) -> None:
    """Also one whose file truncates, which transformers undoes at the first call."""

    def encoded() -> LLM:
        tokenizer = build_tokenizer()
        tokenizer._tokenizer.enable_truncation(5)
        tokenizer._tokenizer.enable_padding(length=50)
        return LLM.from_checkpoint(replace(llm.checkpoint, tokenizer=tokenizer))

    texts = [f"{text} {number}" for number in range(40) for text in TEXTS]
    expected = [llm.encode(text) for text in texts]
    for _ in range(5):
        other = encoded()
        for ids in in_threads(lambda _: [other.encode(text) for text in texts]):  # noqa: B023
            assert ids == expected
        for read in in_threads(lambda _: [other.decode(ids) for ids in expected]):  # noqa: B023
            assert read == [llm.decode(ids) for ids in expected]


# --- ends and errors ------------------------------------------------------------------------------


def test_a_request_that_breaks_is_the_error_of_its_own_caller(folder: Path) -> None:
    llm = load(folder)
    token = llm.encode(TEXTS[1])[8]
    assert token not in llm.encode(TEXTS[0])
    whole = llm.generate(TEXTS[0], PARAMS)
    llm.model.get_input_embeddings().weight.data[token] = torch.nan

    def work(index: int) -> list[GenerationOutput] | None:
        if index % 2:
            return llm.generate(TEXTS[0], PARAMS)
        with pytest.raises(InputError, match="the model gave NaN logits for prompt 1"):
            llm.generate([TEXTS[0], TEXTS[1]], PARAMS)
        return None

    for _ in range(5):  # slots that held NaN are taken again
        assert in_threads(work) == [None, whole] * (NUM_THREADS // 2)


def test_memory_that_is_not_there_is_the_error_of_its_own_caller(
    llm: LLM, answers: list[GenerationOutput], monkeypatch: pytest.MonkeyPatch
) -> None:
    init = ModelRunner.__init__

    def limited(self: Any, model: Any, ids: Any, slots: int, capacity: int, **more: Any) -> None:
        if capacity > 300:
            raise MemoryError("300 positions")
        init(self, model, ids, slots, capacity, **more)

    monkeypatch.setattr(ModelRunner, "__init__", limited)
    other = LLM.from_checkpoint(llm.checkpoint)
    stream = other.stream(*CASES[0])
    events = [next(stream)]
    with pytest.raises(MemoryError, match="300 positions"):
        other.generate([TEXTS[0], TEXTS[1]], [PARAMS, LONG])
    check_stream([*events, *stream], answers[0])
    assert is_idle(other)


def test_an_error_of_the_engine_reaches_everyone_who_waits_and_no_one_after(
    llm: LLM, answers: list[GenerationOutput], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Engine.step
    all_wait = threading.Event()

    def fails(self: Engine) -> list[StreamEvent]:
        all_wait.wait()
        if len(llm._thread._places) < NUM_THREADS:
            return step(self)
        raise torch.OutOfMemoryError("no memory")

    def wait(index: int) -> None:
        if index == 0:
            list(llm.stream(TEXTS[0], LONG))
        else:
            llm.generate(TEXTS[0], replace(LONG, block_length=(4, 8)[index % 2]))

    def work(index: int) -> BaseException:
        with pytest.raises(torch.OutOfMemoryError, match="no memory") as raised:
            wait(index)
        return raised.value

    monkeypatch.setattr(Engine, "step", fails)
    all_wait.set()
    errors = in_threads(work)
    assert len(set(errors)) == NUM_THREADS  # of each caller its own
    for error in errors:  # says where the engine failed, and who of all callers waited
        functions = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        assert functions.count("work") == functions.count("fails") == 1
    monkeypatch.undo()
    assert llm.generate(*CASES[0]) == [answers[0]]
    assert is_idle(llm)


def test_a_missing_output_is_an_error(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Engine.step

    def forgets(self: Engine) -> list[StreamEvent]:
        return [event for event in step(self) if event.kind != "finished" or event.index % 2]

    monkeypatch.setattr(Engine, "step", forgets)
    with pytest.raises(RuntimeError, match="ended without a result for every request"):
        llm.generate(TEXTS[:2], PARAMS)
    monkeypatch.setattr(Engine, "step", lambda self: step(self)[:0])
    with pytest.raises(RuntimeError, match="ended without a result for every request"):
        list(llm.stream(TEXTS[0], PARAMS))


def test_ctrl_c_ends_a_wait_at_once_and_cancels_the_request(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Engine.step
    is_back = threading.Event()
    main_thread = threading.main_thread().ident
    assert main_thread is not None

    def interrupted(self: Engine) -> list[StreamEvent]:
        # A signal that comes just before the wait is heeded with the next one.
        while not is_back.wait(0.01):
            signal.pthread_kill(main_thread, signal.SIGINT)
        return step(self)

    def only_once(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "step", interrupted)
    before = signal.signal(signal.SIGINT, only_once)
    try:
        with pytest.raises(KeyboardInterrupt):
            llm.generate(TEXTS, LONG)
        is_back.set()  # the caller was back before the step was over
        assert is_idle(llm)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_cancelled_call_gives_what_is_finished(llm: LLM) -> None:
    request = llm.request(7, TEXTS[0], replace(LONG, ignore_eos=True))
    call = llm._thread.submit([replace(request, provisional=True)])
    next(call)
    call.cancel()
    *_, last = call
    assert last.output is not None and last.index == 7
    assert last.output.finish_reason == "cancelled"
    assert len(last.output.token_ids) < 400
    assert list(call) == []


def test_a_call_that_nobody_keeps_is_cancelled(llm: LLM) -> None:
    llm._thread.submit([llm.request(0, TEXTS[0], replace(LONG, ignore_eos=True))])
    assert is_idle(llm)


def test_closing_is_an_error_for_those_who_wait_and_come_later(folder: Path) -> None:
    llm = load(folder)
    stream = llm.stream(TEXTS[0], replace(LONG, ignore_eos=True))
    next(stream)
    llm._thread.close()
    with pytest.raises(RuntimeError, match="was closed"):
        list(stream)
    with pytest.raises(RuntimeError, match="takes no more requests"):
        llm.generate(TEXTS[0])
    llm._thread.close()  # again


# --- the thread's life ----------------------------------------------------------------------------


def parts_of(llm: LLM) -> tuple[threading.Thread, list[weakref.ref[Any]]]:
    """Its thread, and references that keep nothing alive."""
    thread = llm._thread._thread
    assert thread is not None and thread.is_alive()
    engine = next(iter(llm._thread._engines.values()))
    return thread, [weakref.ref(each) for each in (llm, llm.model, engine, engine.runner.cache)]


@pytest.mark.parametrize("is_streaming", [False, True])
def test_a_model_that_is_dropped_goes_with_its_thread_and_memory(
    folder: Path, is_streaming: bool
) -> None:
    gc.collect()
    gc.disable()  # no circle keeps it alive
    try:
        llm = load(folder)
        stream = llm.stream(TEXTS[0], LONG)
        if is_streaming:
            next(stream)
        else:
            llm.generate(TEXTS[0], PARAMS)
        thread, references = parts_of(llm)
        del llm, stream
        thread.join()
        assert [reference() for reference in references] == [None] * 4
    finally:
        gc.enable()


def test_a_model_that_decodes_nothing_has_no_thread(folder: Path) -> None:
    llm = load(folder)
    with pytest.raises(InputError):
        llm.generate([None])  # type: ignore[list-item]
    assert llm._thread._thread is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda llm: pickle.loads(pickle.dumps(llm))])
def test_a_copy_has_a_thread_of_its_own(
    folder: Path, answers: list[GenerationOutput], copied: Callable[[LLM], LLM]
) -> None:
    llm = load(folder)
    prompt, params = CASES[0]
    stream = llm.stream(prompt, params)
    events = [next(stream)]
    other = copied(llm)
    assert other.model is not llm.model
    assert other.generate(prompt, params) == [answers[0]]
    check_stream([*events, *stream], answers[0])


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_child_decodes_with_a_thread_of_its_own(
    llm: LLM, answers: list[GenerationOutput]
) -> None:
    stream = llm.stream(TEXTS[0], LONG)
    next(stream)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(60)
            with pytest.raises(RuntimeError, match="cannot go on in its fork"):
                next(stream)
            code = 0 if llm.generate(*CASES[0]) == [answers[0]] else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert list(stream)[-1].kind == "finished"
    assert llm.generate(*CASES[0]) == [answers[0]]


def test_the_interpreter_ends_in_the_middle_of_a_stream(folder: Path) -> None:
    code = f"""
import threading
from dmax import LLM, DecodingParams
llm = LLM({str(folder)!r}, dtype="float32", device="cpu")
params = DecodingParams(max_new_tokens=400, ignore_eos=True)
for _ in llm.stream("Hi", params):
    break
kept = llm.stream("Hi", params)
next(kept)
waiting = threading.Thread(target=lambda: llm.generate(["Hi"] * 20, params), daemon=True)
waiting.start()
circle = [kept, LLM.from_checkpoint(llm.checkpoint)]
circle.append(circle)
circle[1].generate("Hi", DecodingParams(max_new_tokens=1))
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "done\n")
    for sign in ("Fatal", "terminate", "Exception ignored"):
        assert sign not in done.stderr


# --- what torch keeps for each thread -------------------------------------------------------------


def test_a_caller_keeps_its_autocast(llm: LLM) -> None:
    """Also beside another one, who has none."""
    single = LLM.from_checkpoint(replace(llm.checkpoint, model=copy.deepcopy(llm.model).float()))
    requests = [single.request(index, text, PARAMS) for index, text in enumerate(TEXTS)]

    def directly() -> list[tuple[int, ...]]:
        events = single.engine().run(requests)
        ended = {event.index: event.token_ids for event in events if event.kind == "finished"}
        return [ended[index] for index in range(len(TEXTS))]

    plain = directly()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = directly()
    assert cast != plain

    def work(index: int) -> list[tuple[int, ...]]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(index % 2)):
            return [output.token_ids for output in single.generate(TEXTS, PARAMS)]

    assert in_threads(work, 2) == [plain, cast]


def test_a_caller_keeps_its_number_of_threads(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    used = list[int]()
    step = Engine.step

    def counted(self: Engine) -> list[StreamEvent]:
        used.append(torch.get_num_threads())
        return step(self)

    monkeypatch.setattr(Engine, "step", counted)
    for num in (2, 1):
        torch.set_num_threads(num)
        used.clear()
        llm.generate(TEXTS[0], PARAMS)
        assert set(used) == {num}


@pytest.mark.parametrize(
    "setting", [torch.inference_mode, torch.enable_grad, lambda: torch.device("meta")]
)
def test_other_settings_of_a_caller_change_nothing(
    llm: LLM, answers: list[GenerationOutput], setting: Callable[[], Any]
) -> None:
    with setting():
        assert LLM.from_checkpoint(llm.checkpoint).generate(*CASES[0]) == [answers[0]]
