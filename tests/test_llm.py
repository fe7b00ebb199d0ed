"""`LLM`: every form of prompt, one or many, alone or together; streams; limits; no tokenizer.

The fixtures `folder` and `bare_folder` are here for all tests of the edges: a random model that
takes milliseconds.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import torch

from dmax import LLM, DecodingParams, GenerationOutput, InputError, StreamEvent
from dmax.checkpoint import load_checkpoint, save_checkpoint
from dmax.engine.engine import Engine
from dmax.engine.warm_up import warm_up
from dmax.models import LLaDA2MoeConfig, LLaDA2MoeModelLM
from dmax.outputs import Load
from dmax.special_ids import SpecialIds
from dmax.tiny.tokenizer import build_tokenizer

CONFIG = {
    "block_length": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 16,
    "moe_intermediate_size": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 512,
    # Spread logits: different tokens at different positions, and some confidence.
    "initializer_range": 0.5,
}


def build(factory: pytest.TempPathFactory, with_tokenizer: bool) -> Path:
    """A random checkpoint, the same weights with and without its tokenizer."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    mask = tokenizer.mask_token_id
    eos = tokenizer.eos_token_id
    ids = {"mask_token_id": mask, "eos_token_id": eos, "pad_token_id": eos}
    model = LLaDA2MoeModelLM(LLaDA2MoeConfig(vocab_size=len(tokenizer), **ids, **CONFIG))
    folder = factory.mktemp("checkpoints") / ("tiny" if with_tokenizer else "bare")
    save_checkpoint(
        model,
        tokenizer if with_tokenizer else None,
        folder,
        SpecialIds(mask, (eos,), eos, CONFIG["block_length"]),
    )
    return folder


@pytest.fixture(scope="session", name="folder")
def folder_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory, True)


@pytest.fixture(scope="session", name="bare_folder")
def bare_folder_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory, False)


@pytest.fixture(scope="session", name="llm")
def llm_fixture(folder: Path) -> LLM:
    return LLM(str(folder), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def bare(bare_folder: Path) -> LLM:
    return LLM(str(bare_folder), dtype="float32", device="cpu")


PARAMS = DecodingParams(strategy="spd", max_new_tokens=16)
LONGER = replace(PARAMS, max_new_tokens=32)
TEXTS = [
    "Tom has 3 apples.",
    "Tom buys 5 apples at the market. How many apples does Tom have now?",
    "Hi",
]


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# --- prompts --------------------------------------------------------------------------------------


def test_a_text_its_messages_and_its_ids_are_one_prompt(llm: LLM) -> None:
    ids = llm.encode(TEXTS[0])
    assert (
        llm.tokenizer.decode(ids)
        == f"<role>HUMAN</role>{TEXTS[0]}<|role_end|><role>ASSISTANT</role>"
    )
    assert llm.encode(messages(TEXTS[0])) == llm.encode(list(ids)) == llm.encode(ids) == ids
    forms: list[Any] = [TEXTS[0], messages(TEXTS[0]), list(ids), ids]
    singles = [llm.generate(form, PARAMS) for form in forms]
    assert all(isinstance(outputs, list) and len(outputs) == 1 for outputs in singles)
    assert singles[0] == singles[1] == singles[2] == singles[3]
    assert singles[0][0].prompt_token_ids == ids
    assert llm.generate(forms, PARAMS) == singles[0] * 4
    assert llm.generate(tuple(forms), PARAMS) == singles[0] * 4


def test_a_list_keeps_its_order_and_every_prompt_its_result(llm: LLM) -> None:
    prompts: list[Any] = [*TEXTS, messages(TEXTS[1][:20]), list(range(5)), [7], messages("a")]
    alone = [llm.generate(prompt, PARAMS)[0] for prompt in prompts]
    # Else the order would not show.
    assert len({output.token_ids for output in alone}) == len(prompts)
    assert llm.generate(prompts, PARAMS) == alone
    assert llm.generate(prompts[::-1], PARAMS) == alone[::-1]
    few = LLM.from_checkpoint(llm.checkpoint, max_batch_size=2)
    assert few.generate(prompts, PARAMS) == alone


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert llm.generate([]) == []
    assert llm.generate([], []) == []


def test_a_text_goes_through_the_chat_template_only_if_there_is_one(llm: LLM) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    plain = LLM.from_checkpoint(replace(llm.checkpoint, tokenizer=tokenizer))
    assert plain.encode(TEXTS[0]) == tuple(tokenizer.encode(TEXTS[0]))
    assert plain.encode(messages(TEXTS[0])) == plain.encode(TEXTS[0])
    several = [{"role": "system", "content": "Be brief."}, *messages(TEXTS[0])]
    with pytest.raises(InputError, match="no chat template, so it takes one user message") as error:
        plain.generate(several)
    assert "chat_template.jinja into the folder" in str(error.value.hint)


@pytest.mark.parametrize(
    "prompts",
    [
        [None],
        [3.5],
        [["a", "b"]],
        [[1, "a"]],
        [[True]],
        [[messages("a")]],
    ],
)
def test_a_prompt_of_no_known_form_is_refused(llm: LLM, prompts: Any) -> None:
    with pytest.raises(
        InputError, match="prompt 0 must be a text, a list of token ids or a list of chat messages"
    ):
        llm.generate(prompts)


@pytest.mark.parametrize(
    "prompts", [None, 3, {"role": "user", "content": "a"}, b"a", {1, 2}, iter("a")]
)
def test_what_is_no_list_of_prompts_is_refused(llm: LLM, prompts: Any) -> None:
    with pytest.raises(InputError, match="prompts must be a text or a list"):
        llm.generate(prompts)


@pytest.mark.parametrize(
    "prompts",
    [
        torch.tensor([1, 2]).to_sparse(),
        torch.tensor([1, 2], device="meta"),
        torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        torch.nested.nested_tensor([torch.ones(2).long()] * 2, layout=torch.jagged),
        [torch.tensor([1, 2]).to_sparse()],
        [torch.tensor(1, device="meta")],
        np.array(["a", "b"]),
        np.ma.masked_array([1, 2], mask=[False, True]),  # type: ignore[no-untyped-call]
    ],
    ids=str,
)
def test_an_array_without_token_ids_is_refused(llm: LLM, prompts: Any) -> None:
    with pytest.raises(InputError, match="prompt"):
        llm.generate(prompts)


@pytest.mark.parametrize("prompt", [[], [-1], [10_000]])
def test_ids_that_are_none_are_refused(llm: LLM, prompt: list[int]) -> None:
    with pytest.raises(
        InputError, match="prompt 1 (is empty|holds a token id outside the vocabulary)"
    ):
        llm.generate([[1], prompt])


# --- parameters -----------------------------------------------------------------------------------


def test_params_are_for_all_or_one_for_each(llm: LLM) -> None:
    each = [
        PARAMS,
        DecodingParams(strategy="threshold", threshold=0.3, max_new_tokens=9),
        replace(PARAMS, max_new_tokens=24, block_length=4),
    ]
    alone = [llm.generate(text, params)[0] for text, params in zip(TEXTS, each, strict=True)]
    assert [len(output.token_ids) for output in alone] == [16, 9, 24]
    assert llm.generate(TEXTS, each) == alone
    assert llm.generate(TEXTS, tuple(each)) == alone
    assert llm.generate(TEXTS, PARAMS) == llm.generate(TEXTS, [PARAMS] * 3)
    assert llm.generate(TEXTS[0], [PARAMS]) == llm.generate(TEXTS[0], PARAMS)


@pytest.mark.parametrize("count", [0, 2, 4])
def test_a_wrong_number_of_params_is_refused(llm: LLM, count: int) -> None:
    with pytest.raises(InputError, match=f"got a list of {count}; the number of prompts is 3"):
        llm.generate(TEXTS, [PARAMS] * count)


@pytest.mark.parametrize("params", ["spd", {"threshold": 0.5}, [None, None, None], DecodingParams])
def test_params_of_another_type_are_refused(llm: LLM, params: Any) -> None:
    with pytest.raises(InputError, match="`params` must be a `DecodingParams` or a list of them"):
        llm.generate(TEXTS, params)


def test_an_unknown_option_is_named_with_the_nearest_one(llm: LLM, folder: Path) -> None:
    with pytest.raises(InputError, match="(?s)no option `max_batchsize`.*mean `max_batch_size`"):
        LLM(str(folder), max_batchsize=3)
    with pytest.raises(InputError, match="(?s)no option `quantisation`.*mean `quantization`"):
        LLM(str(folder), quantisation="int8")
    with pytest.raises(InputError, match="(?s)no option `bogus`.*there are max_batch_size, "):
        LLM.from_checkpoint(llm.checkpoint, bogus=1)
    with pytest.raises(InputError, match="(?s)no option `max_len`.*mean `max_length`"):
        llm.engine(max_len=8)


def test_a_block_length_belongs_to_its_request(llm: LLM, folder: Path) -> None:
    each = [replace(PARAMS, block_length=length) for length in (None, 4, 16, 8)]
    outputs = llm.generate([TEXTS[1]] * 4, each)
    assert outputs[0] == outputs[3]  # 8 is the checkpoint's own
    for output, params in zip(outputs, each, strict=True):
        length = params.block_length
        other = LLM(str(folder), dtype="float32", device="cpu", block_length=length)
        assert other.generate(TEXTS[1], PARAMS) == [output]
        assert output.num_prefill_forwards == 1


def test_an_unknown_strategy_is_an_error_before_any_compute(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr(Engine, "run", fails)
    monkeypatch.setattr(type(llm.model), "forward", fails)
    with pytest.raises(InputError, match="unknown strategy 'spdd'; choose from auto, "):
        llm.generate(TEXTS[:2], [PARAMS, DecodingParams(strategy="spdd")])
    with pytest.raises(InputError, match="did you mean `spd`"):
        list(llm.stream(TEXTS[0], DecodingParams(strategy="spdd")))


@pytest.mark.parametrize("prompt", [5, {"role": "user", "content": "Hi"}, torch.tensor(5)])
def test_a_stream_takes_one_whole_prompt(llm: LLM, prompt: Any) -> None:
    with pytest.raises(InputError, match="prompt 0 must be a text, a list of token ids"):
        next(llm.stream(prompt))


def test_what_does_not_fit_the_context_is_refused(llm: LLM) -> None:
    with pytest.raises(
        InputError, match="prompt 1 has 1 tokens; with `max_new_tokens` 512 it needs 520 positions"
    ):
        llm.generate([[1], [1]], [PARAMS, replace(PARAMS, max_new_tokens=512)])
    assert len(llm.generate([1] * 504, replace(PARAMS, max_new_tokens=8))[0].token_ids) <= 8


def test_a_request_that_does_not_fit_is_refused_before_others_are_decoded(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr(type(llm.model), "forward", fails)
    with pytest.raises(InputError, match="the model has 512"):
        llm.generate([[1], [1]], [PARAMS, replace(PARAMS, max_new_tokens=512, block_length=4)])


# --- outputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 5, 8, 13])
def test_max_new_tokens_cuts_the_completion(llm: LLM, limit: int) -> None:
    whole = llm.generate(TEXTS, LONGER)
    cut = llm.generate(TEXTS, replace(PARAMS, max_new_tokens=limit))
    for short, long in zip(cut, whole, strict=True):
        assert short.token_ids == long.token_ids[:limit]
        assert short.text == llm.tokenizer.decode(short.token_ids, skip_special_tokens=True)
        assert short.finish_reason == long.finish_reason == "length"
        assert short.num_forwards <= long.num_forwards


def with_eos(llm: LLM, prompt: Any) -> tuple[LLM, tuple[int, ...]]:
    """The same model with an EOS that its completion holds, and the completion before it."""
    tokens = llm.generate(prompt, LONGER)[0].token_ids
    eos = next(
        token for index, token in enumerate(tokens) if index >= 10 and token not in tokens[:index]
    )
    ids = replace(llm.checkpoint.special_ids, eos_token_ids=(eos,))
    other = LLM.from_checkpoint(replace(llm.checkpoint, special_ids=ids))
    return other, tokens[: tokens.index(eos)]


def test_eos_ends_the_completion_and_is_no_part_of_it(llm: LLM) -> None:
    ending, expected = with_eos(llm, TEXTS[2])
    (output,) = ending.generate(TEXTS[2], LONGER)
    assert output.token_ids == expected
    assert output.finish_reason == "stop"
    assert output.text == llm.tokenizer.decode(expected, skip_special_tokens=True)
    (whole,) = llm.generate(TEXTS[2], LONGER)
    assert output.num_forwards < whole.num_forwards  # blocks after the EOS are not decoded


def test_forwards_are_counted(llm: LLM) -> None:
    (output,) = llm.generate(TEXTS[1], PARAMS)
    num_blocks = -(-(len(output.prompt_token_ids) % 8 + 16) // 8)
    assert (output.num_prefill_forwards, output.num_commit_forwards) == (1, 0)
    assert num_blocks <= output.num_forwards <= 8 * num_blocks
    # Each open block, and all but the last once more on their way into the cache.
    assert output.num_positions == 8 * (output.num_forwards + num_blocks - 1)


# --- streams --------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["spd", "threshold"])
@pytest.mark.parametrize("ends", [False, True])
def test_a_stream_tells_the_story_of_its_output(llm: LLM, strategy: str, ends: bool) -> None:
    prompt = TEXTS[2]
    params = DecodingParams(strategy, max_new_tokens=20)
    streaming = with_eos(llm, prompt)[0] if ends else llm
    events = list(streaming.stream(prompt, params))
    (output,) = streaming.generate(prompt, params)

    *steps, last = events
    assert all(isinstance(event, StreamEvent) for event in events)
    assert (last.kind, last.output) == ("finished", output)
    assert (last.text, last.token_ids) == (output.text, output.token_ids)
    assert {event.kind for event in steps} == {"provisional", "committed"}
    assert len(steps) == output.num_forwards  # one event a forward

    tokens: list[int] = []
    step = 0
    for event in steps:
        step += 1
        assert (event.position, event.step, event.output) == (len(tokens), step, None)
        assert event.num_forwards == steps.index(event) + 1
        assert len(event.written) == len(event.masked)
        assert not any(w and m for w, m in zip(event.written, event.masked, strict=True))
        assert len(event.token_ids) == len(event.masked) == len(event.confidence)
        mask = streaming.checkpoint.special_ids.mask_token_id
        assert [token == mask for token in event.token_ids] == list(event.masked)
        if event.kind == "committed":
            assert not any(event.masked)
            tokens += event.token_ids
            step = 0
    eos = streaming.checkpoint.special_ids.eos_token_ids[0]
    cut = tokens[: tokens.index(eos)] if eos in tokens else tokens
    assert tuple(cut[:20]) == output.token_ids
    assert steps[-1].kind == "committed"


def test_an_event_tells_what_its_step_did(llm: LLM) -> None:
    first, *_ = llm.stream(TEXTS[0], replace(PARAMS, top_k=3))
    decoded = [not masked for masked in first.masked]
    assert list(first.written) == decoded
    for token, confidence, blended in zip(
        first.token_ids, first.confidence, first.candidates, strict=True
    ):
        ids, probs = zip(*blended, strict=True)
        assert len(set(ids)) == 3
        assert list(probs) == sorted(probs, reverse=True)
        assert probs[0] == pytest.approx(confidence)
        assert token in (ids[0], llm.checkpoint.special_ids.mask_token_id)
    *_, capped, _ = llm.stream(TEXTS[0], replace(PARAMS, threshold=1.0, max_steps_per_block=2))
    assert capped.capped
    slow, *_ = llm.stream(TEXTS[0], DecodingParams("threshold", 1.0, max_new_tokens=8))
    assert (sum(slow.written), slow.candidates) == (1, ())


def test_who_waits_for_nothing_gets_events_where_they_want_them(llm: LLM) -> None:
    requests = [llm.request(index, TEXTS[0], PARAMS) for index in (3, 5)]
    events = SimpleQueue[StreamEvent | BaseException]()
    call = llm.submit(requests, events)
    ended = dict[int, StreamEvent]()
    while len(ended) < 2:
        event = events.get()
        assert isinstance(event, StreamEvent)
        if event.kind == "finished":
            ended[event.index] = event
    call.cancel()  # of what has finished, which is nothing to do
    [answer] = llm.generate(TEXTS[0], PARAMS)
    assert [llm.output(each, ended[each.index]) for each in requests] == [answer, answer]
    assert llm.load() == Load(0, 0)


def test_raw_text_goes_without_the_chat_template() -> None:
    llm = LLM("tiny-dmax")
    assert llm.tokenizer.decode(llm.encode("Jack has", raw=True)) == "Jack has"
    assert len(llm.encode("Jack has")) > len(llm.encode("Jack has", raw=True))


def test_the_text_of_an_event_is_what_is_decided_before_eos(llm: LLM) -> None:
    streaming, _ = with_eos(llm, TEXTS[2])
    eos = streaming.checkpoint.special_ids.eos_token_ids[0]
    for event in streaming.stream(TEXTS[2], LONGER):
        end = event.token_ids.index(eos) if eos in event.token_ids else len(event.token_ids)
        shown = [
            t for t in event.token_ids[:end] if t != streaming.checkpoint.special_ids.mask_token_id
        ]
        assert event.text == llm.tokenizer.decode(shown, skip_special_tokens=True)


def test_a_stream_takes_one_prompt(llm: LLM) -> None:
    ids = list(llm.encode(TEXTS[0]))
    assert list(llm.stream(ids, PARAMS)) == list(llm.stream(TEXTS[0], PARAMS))
    with pytest.raises(InputError, match="prompt 0 must be"):
        list(llm.stream(TEXTS, PARAMS))  # type: ignore[arg-type]


# --- without a tokenizer --------------------------------------------------------------------------


def test_a_checkpoint_without_tokenizer_takes_and_gives_ids(bare: LLM, llm: LLM) -> None:
    prompts = [list(llm.encode(text)) for text in TEXTS]
    outputs = bare.generate(prompts, PARAMS)
    assert bare.tokenizer is None
    assert outputs == [replace(output, text="") for output in llm.generate(prompts, PARAMS)]
    (*_, last) = bare.stream(prompts[0], PARAMS)
    assert (last.output, last.text) == (outputs[0], "")


def test_a_checkpoint_without_tokenizer_says_so(bare: LLM) -> None:
    with pytest.raises(InputError, match="no tokenizer") as error:
        bare.generate("Hi")
    assert error.value.hint == "pass prompts as lists of token ids"
    with pytest.raises(InputError, match="no tokenizer"):
        bare.generate(messages("Hi"))


# --- early ends and shared work -------------------------------------------------------------------


def test_a_stop_text_ends_the_completion_before_it(llm: LLM) -> None:
    whole = llm.generate(TEXTS[1], PARAMS)[0]
    words = whole.text.split()
    stop = words[len(words) // 2]
    output = llm.generate(TEXTS[1], replace(PARAMS, stop=("never said", stop)))[0]
    assert output.finish_reason == "stop"
    assert output.text == whole.text[: whole.text.index(stop)]
    assert output.token_ids == whole.token_ids[: len(output.token_ids)]
    kept = llm.tokenizer.decode(output.token_ids)
    assert stop in kept and stop not in llm.tokenizer.decode(output.token_ids[:-1])
    assert output.num_forwards <= whole.num_forwards
    assert llm.generate(TEXTS[1], replace(PARAMS, stop="never said"))[0] == whole


def test_stop_texts_need_a_tokenizer(bare: LLM) -> None:
    with pytest.raises(InputError, match="no tokenizer to find stop texts with"):
        bare.generate([1, 2], DecodingParams(stop="a"))


def test_known_prefixes_are_not_encoded_again(folder: Path, llm: LLM) -> None:
    sharing = LLM.from_checkpoint(
        load_checkpoint(folder, dtype=torch.float32, device="cpu"), prefix_cache_mib=1
    )
    first, again = (sharing.generate(TEXTS[1], PARAMS)[0] for _ in range(2))
    assert first == llm.generate(TEXTS[1], PARAMS)[0]
    assert (first.num_prefill_forwards, again.num_prefill_forwards) == (1, 0)
    assert again.token_ids == first.token_ids


def test_streams_of_one_model_may_run_at_once(llm: LLM) -> None:
    expected = [llm.generate(text, PARAMS)[0] for text in TEXTS[:2]]
    streams = [llm.stream(text, PARAMS) for text in TEXTS[:2]]
    ends: list[GenerationOutput | None] = [None, None]
    while None in ends:
        for index, stream in enumerate(streams):
            event = next(stream, None)
            if event is not None and event.output is not None:
                ends[index] = event.output
    assert ends == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_batch_size": 0},
            "`max_batch_size` must be a whole number between 1 and 65536",
        ),
        ({"prefix_cache_mib": -1}, "`prefix_cache_mib` must be"),
    ],
)
def test_settings_of_the_engine_are_checked(
    llm: LLM, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        LLM.from_checkpoint(llm.checkpoint, **options)


def test_params_of_another_kind_are_refused(llm: LLM) -> None:
    with pytest.raises(
        InputError, match="`params` must be a `DecodingParams` or a list of them, got 3"
    ):
        llm.generate("Hi", 3)  # type: ignore[arg-type]


# --- loading --------------------------------------------------------------------------------------


def test_ids_given_to_the_constructor_win(folder: Path) -> None:
    llm = LLM(
        str(folder),
        dtype=torch.float32,
        device="cpu",
        mask_token_id=3,
        eos_token_id=5,
        block_length=16,
    )
    ids = llm.checkpoint.special_ids
    assert (ids.mask_token_id, ids.eos_token_ids, ids.block_length) == (3, (5,), 16)
    assert not llm.model.training


def test_a_model_in_memory_is_taken_as_it_is(folder: Path, llm: LLM) -> None:
    checkpoint = load_checkpoint(folder, dtype=torch.float32, device="cpu")
    checkpoint.model.train()
    other = LLM.from_checkpoint(checkpoint)
    assert other.model is checkpoint.model and not other.model.training
    assert other.generate(TEXTS, PARAMS) == llm.generate(TEXTS, PARAMS)


# --- what a checkpoint was trained for ------------------------------------------------------------


def trained_for(llm: LLM, decoding: str | None) -> LLM:
    """The same model, of a checkpoint that names this strategy."""
    return LLM.from_checkpoint(replace(llm.checkpoint, decoding=decoding))


@pytest.mark.parametrize("named", ["spd", "threshold", "credit"])
def test_a_model_is_decoded_as_its_checkpoint_says(
    llm: LLM, named: str, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = DecodingParams(strategy=named, max_new_tokens=16)
    auto = DecodingParams(max_new_tokens=16)
    trained = trained_for(llm, named)
    assert trained.resolve(auto) == chosen
    assert trained.generate(TEXTS, auto) == llm.generate(TEXTS, chosen)
    *_, streamed = trained.stream(TEXTS[0], auto)
    assert streamed.output == llm.generate(TEXTS[0], chosen)[0]
    assert caplog.records == []  # nothing had to be chosen


def test_a_model_that_names_no_strategy_is_decoded_by_threshold_and_says_so_once(
    llm: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    untold = trained_for(llm, None)
    auto = DecodingParams(max_new_tokens=16)
    chosen = DecodingParams(strategy="threshold", max_new_tokens=16)
    assert untold.generate(TEXTS, [auto] * 3) == llm.generate(TEXTS, chosen)
    assert untold.generate(TEXTS) != []
    assert list(untold.stream(TEXTS[0], auto))[-1].kind == "finished"
    assert untold.resolve(auto) == chosen
    (record,) = caplog.records
    said = record.getMessage()
    assert "does not say which decoding it was trained for" in said
    assert "`threshold`" in said and "`strategy`" in said and "\n" not in said
    assert llm.checkpoint.path in said
    caplog.clear()
    trained_for(llm, None).generate(TEXTS[0])  # another model says it for itself
    assert len(caplog.records) == 1


def test_a_strategy_that_is_asked_for_is_used_and_nothing_is_said(
    llm: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    for decoding in (None, "threshold"):
        assert trained_for(llm, decoding).resolve(PARAMS) is PARAMS
        assert trained_for(llm, decoding).generate(TEXTS, PARAMS) == llm.generate(TEXTS, PARAMS)
    assert caplog.records == []


def test_options_that_the_chosen_strategy_does_not_have_are_refused(llm: LLM) -> None:
    auto = DecodingParams(options={"soft_inputs": False})
    assert trained_for(llm, "spd").generate(TEXTS[0], auto)
    with pytest.raises(InputError, match="strategy `threshold` has no option `soft_inputs`"):
        trained_for(llm, None).generate(TEXTS[0], auto)


# --- requests that fail ---------------------------------------------------------------------------


def test_nan_logits_are_the_error_of_the_call_and_the_model_stays_usable(folder: Path) -> None:
    broken = LLM(str(folder), dtype="float32", device="cpu")
    weight = broken.model.get_input_embeddings().weight
    whole = broken.generate(TEXTS[0], PARAMS)
    token = broken.encode(TEXTS[1])[8]
    assert token not in broken.encode(TEXTS[0])
    kept = weight.data[token].clone()
    weight.data[token] = torch.nan
    with pytest.raises(InputError, match="the model gave NaN logits for prompt 1"):
        broken.generate(TEXTS[:2], PARAMS)
    with pytest.raises(InputError, match="the model gave NaN logits for prompt 0"):
        list(broken.stream(TEXTS[1], PARAMS))
    weight.data[token] = kept
    assert broken.generate(TEXTS[0], PARAMS) == whole


def test_a_model_on_a_gpu_sums_its_products_in_float32(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = list[torch.device]()
    monkeypatch.setattr("dmax.llm.sum_in_float32", devices.append)
    LLM.from_checkpoint(llm.checkpoint)
    assert devices == [llm.model.device]


def test_a_model_gets_ready_when_it_is_loaded(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[tuple[Engine, DecodingParams]]()

    def watched(engine: Engine, params: DecodingParams) -> None:
        asked.append((engine, params))
        warm_up(engine, params)

    monkeypatch.setattr("dmax.llm.warm_up", watched)
    warm = LLM.from_checkpoint(llm.checkpoint, warm_up=True)
    ((engine, params),) = asked
    assert params.strategy == llm.resolve(DecodingParams()).strategy
    planned = engine.runner
    assert warm.generate(TEXTS, PARAMS) == llm.generate(TEXTS, PARAMS)
    assert engine.runner is planned  # the same engine, in the memory that it had
    warm.close()


def test_what_a_model_cannot_get_ready_for_is_an_error_when_it_is_loaded(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dmax.cache.total_memory", lambda device: 2**10)
    with pytest.raises(InputError, match="keys and values of 16 sequences of .* positions take"):
        LLM.from_checkpoint(llm.checkpoint, warm_up=True)


def test_graphs_are_refused_where_nothing_captures_them(llm: LLM) -> None:
    with pytest.raises(InputError, match="`cuda_graphs` takes a CUDA device, .* on cpu"):
        LLM.from_checkpoint(llm.checkpoint, cuda_graphs=True)
