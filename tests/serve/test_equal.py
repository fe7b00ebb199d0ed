"""Streams, whole answers and `dmax generate` say the same, whatever is asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from openai import OpenAI
from running import QUESTION, TINY, Running

from dmax import DecodingParams, strategies
from dmax.errors import InputError
from dmax.llm import LLM
from dmax.serve.params import derived_seed
from dmax.serve.served import ServedModel
from dmax.serve.settings import ServerOptions

WITHOUT_HEAD = sorted(set(strategies()) - {"learn2pd", "demask"})


def both(
    client: OpenAI, *, dmax: dict[str, Any] | None = None, **settings: Any
) -> tuple[Any, list[Any]]:
    """The answer to a chat at once, and as a stream."""
    messages: Any = [{"role": "user", "content": QUESTION}]
    asked = {"model": TINY, "messages": messages} | settings
    whole = client.chat.completions.create(**asked, extra_body={"dmax": dmax})
    stream = client.chat.completions.create(**asked, stream=True, extra_body={"dmax": dmax})
    return whole, list(stream)


def text_of(chunks: Sequence[Any], index: int = 0) -> str:
    parts = [part for each in chunks for part in each.choices if part.index == index]
    return "".join(part.delta.content or "" for part in parts)


def generated(server: Running, **settings: Any) -> Any:
    [output] = server.models[0].llm.generate([QUESTION], DecodingParams(**settings))
    return output


@pytest.mark.parametrize("strategy", ["auto", *WITHOUT_HEAD])
def test_every_strategy(server: Running, client: OpenAI, strategy: str) -> None:
    whole, chunks = both(client, dmax={"strategy": strategy}, max_tokens=45)
    output = generated(server, strategy=strategy, max_new_tokens=45)
    assert whole.choices[0].message.content == text_of(chunks) == output.text
    assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == len(output.token_ids) == 45
    assert whole.dmax["num_forwards"] == chunks[-1].dmax["num_forwards"] == output.num_forwards


def test_a_strategy_with_a_bundled_head(server: Running, client: OpenAI) -> None:
    strategy: Any = {"strategy": "learn2pd", "options": {"head": "tiny-base"}}
    whole, chunks = both(client, model="tiny-base", dmax=strategy, max_tokens=40)
    llm: LLM = server.models[1].llm
    [output] = llm.generate([QUESTION], DecodingParams(**strategy, max_new_tokens=40))
    assert whole.choices[0].message.content == text_of(chunks) == output.text


@pytest.mark.parametrize("max_tokens", [1, 2, 31, 32, 33, 61, 62, 63, 64, 200])
def test_every_limit(server: Running, client: OpenAI, max_tokens: int) -> None:
    whole, chunks = both(client, max_tokens=max_tokens)
    output = generated(server, max_new_tokens=max_tokens)
    assert whole.choices[0].message.content == text_of(chunks) == output.text
    assert whole.choices[0].finish_reason == output.finish_reason


# Within a block, at its border, over borders, of several tokens, and one that never comes.
STOPS = [".", " mugs", "her ", "In this step", " s", "\n####", " 1", "never said", ["is 1", "mugs"]]


@pytest.mark.parametrize("stop", STOPS, ids=str)
def test_every_stop_text(server: Running, client: OpenAI, stop: Any) -> None:
    whole, chunks = both(client, stop=stop)
    output = generated(server, stop=stop)
    assert whole.choices[0].message.content == text_of(chunks) == output.text
    assert whole.usage.completion_tokens == len(output.token_ids)
    assert whole.choices[0].finish_reason == "stop"


def test_every_piece_of_the_answer_as_a_stop_text(server: Running, client: OpenAI) -> None:
    """So that some of them lie over the border of two blocks."""
    text = generated(server).text
    borders = range(0, len(text) - 6, 15)
    for start in borders:
        stop = text[start : start + 6]
        whole, chunks = both(client, stop=stop)
        assert whole.choices[0].message.content == text_of(chunks) == text[: text.index(stop)]


def test_ignoring_the_end(server: Running, client: OpenAI) -> None:
    whole, chunks = both(client, dmax={"ignore_eos": True}, max_tokens=100)
    output = generated(server, ignore_eos=True, max_new_tokens=100)
    assert whole.choices[0].message.content == text_of(chunks) == output.text
    assert whole.usage.completion_tokens == 100


def test_choices_have_seeds_of_their_own_and_the_first_has_the_one_asked_for(
    server: Running, client: OpenAI
) -> None:
    sampled = {"temperature": 3, "max_tokens": 32}
    whole, chunks = both(client, **sampled, seed=3, n=3)
    texts = [choice.message.content for choice in whole.choices]
    assert texts == [text_of(chunks, index) for index in range(3)]
    assert len(set(texts)) == 3
    for index, text in enumerate(texts):
        seed = derived_seed(3, index)
        output = generated(server, temperature=3, max_new_tokens=32, seed=seed)
        assert output.text == text
    assert both(client, **sampled, seed=3)[0].choices[0].message.content == texts[0]
    assert whole.usage.prompt_tokens == len(output.prompt_token_ids)
    assert whole.usage.completion_tokens == sum(
        len(each.dmax["token_ids"]) for each in whole.choices
    )


def test_seeds_that_the_sampler_has_not_are_taken_too(client: OpenAI) -> None:
    answers = [
        both(client, temperature=3, max_tokens=16, seed=seed)[0].choices[0].message.content
        for seed in (-1, -1, -2, 2**63)
    ]
    assert answers[0] == answers[1] and len(set(answers)) == 3


def test_derived_seeds_are_the_same_forever_and_differ() -> None:
    assert derived_seed(None, 4) is None
    assert [derived_seed(7, index) for index in range(3)] == [
        7,
        4228751037375301439,
        7488442340688320512,
    ]
    seeds = {derived_seed(seed, choice) for seed in range(40) for choice in range(40)}
    assert len(seeds) == 1600


PROMPTS = ["Two", "Jack starts the week with 8 mugs. ", "Three times"]


@pytest.mark.parametrize("kind", ["texts", "ids"])
def test_completions_continue_texts_and_ids_without_a_template(
    server: Running, client: OpenAI, kind: str
) -> None:
    llm: LLM = server.models[0].llm
    ids = [list(llm.encode(prompt, raw=True)) for prompt in PROMPTS]
    prompts: Any = PROMPTS if kind == "texts" else ids
    outputs = llm.generate(ids, DecodingParams(max_new_tokens=20))
    asked: Any = {"model": TINY, "max_tokens": 20}
    answer = client.completions.create(**asked, prompt=prompts)
    assert [each.text for each in answer.choices] == [each.text for each in outputs]
    assert [each.index for each in answer.choices] == [0, 1, 2]
    assert answer.usage is not None and answer.usage.prompt_tokens == sum(map(len, ids))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert client.completions.create(**asked, prompt=prompt).choices[0].text == output.text
    chunks = list(client.completions.create(**asked, prompt=prompts, stream=True))
    for index, output in enumerate(outputs):
        parts = [part for each in chunks for part in each.choices if part.index == index]
        assert "".join(part.text for part in parts) == output.text
        assert [part.finish_reason for part in parts][-1] == output.finish_reason


def test_choices_of_several_prompts_are_grouped_by_prompt(client: OpenAI) -> None:
    asked: Any = {"model": TINY, "max_tokens": 8, "temperature": 3, "seed": 1}
    several = client.completions.create(**asked, prompt=PROMPTS[:2], n=2)
    alone = [client.completions.create(**asked, prompt=each, n=2) for each in PROMPTS[:2]]
    expected = [choice.text for answer in alone for choice in answer.choices]
    assert [choice.text for choice in several.choices] == expected


# --- probabilities --------------------------------------------------------------------------------


def followed(llm: LLM, params: DecodingParams) -> dict[int, tuple[int, float]]:
    """By position, the token and its probability at the last forward that wrote it."""
    found: dict[int, tuple[int, float]] = {}
    for event in llm.stream(QUESTION, params):
        for offset, is_written in enumerate(event.written):
            if is_written:
                written = event.token_ids[offset], event.confidence[offset]
                found[event.position + offset] = written
    return found


@pytest.mark.parametrize("strategy", ["spd", "threshold", "mbd"])
def test_logprobs_are_those_of_the_forward_that_settled_the_token(
    server: Running, client: OpenAI, strategy: str
) -> None:
    llm = server.models[0].llm
    settled = followed(llm, DecodingParams(strategy))
    whole, chunks = both(client, dmax={"strategy": strategy}, logprobs=True)
    choice = whole.choices[0]
    entries = choice.logprobs.content
    assert len(entries) == whole.usage.completion_tokens
    assert "".join(entry.token for entry in entries) == choice.message.content
    for position, entry in enumerate(entries):
        token, probability = settled[position]
        assert token == choice.dmax["token_ids"][position]
        assert entry.logprob == pytest.approx(math.log(probability), abs=1e-6)
        assert bytes(entry.bytes).decode() == entry.token and entry.top_logprobs == []
    parts = [part.logprobs.content for each in chunks for part in each.choices if part.logprobs]
    assert [entry for part in parts for entry in part] == entries


@pytest.mark.parametrize("stop", [" mugs", "In this step", ["\n####"]], ids=str)
def test_logprobs_end_where_the_tokens_end(client: OpenAI, stop: Any) -> None:
    whole, chunks = both(client, stop=stop, logprobs=True, max_tokens=50)
    entries = whole.choices[0].logprobs.content
    assert len(entries) == whole.usage.completion_tokens
    parts = [part.logprobs.content for each in chunks for part in each.choices if part.logprobs]
    assert [entry for part in parts for entry in part] == entries


def test_top_logprobs_hold_the_candidates_that_there_are(client: OpenAI) -> None:
    for top_k, num_top, expected in ((1, 5, 1), (4, 20, 4), (4, 2, 2), (4, 0, 0)):
        whole, _ = both(client, dmax={"top_k": top_k}, logprobs=True, top_logprobs=num_top)
        for entry in whole.choices[0].logprobs.content:
            assert len(entry.top_logprobs) == expected
            if expected:
                assert entry.top_logprobs[0].token == entry.token
                assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob, abs=1e-5)
                falling = [each.logprob for each in entry.top_logprobs]
                assert falling == sorted(falling, reverse=True)


def test_logprobs_of_completions_have_their_own_form(client: OpenAI) -> None:
    asked: Any = {"model": TINY, "prompt": QUESTION, "max_tokens": 40}
    choice = client.completions.create(**asked, logprobs=1).choices[0]
    found = choice.logprobs
    assert found is not None and found.tokens and found.text_offset and found.top_logprobs
    assert "".join(found.tokens) == choice.text
    for offset, token in zip(found.text_offset, found.tokens, strict=True):
        assert choice.text[offset:].startswith(token)
    best = [max(each, key=lambda token: each[token]) for each in found.top_logprobs]
    assert best == found.tokens
    parts = [
        part.logprobs
        for each in client.completions.create(**asked, logprobs=1, stream=True)
        for part in each.choices
        if part.logprobs
    ]
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [x for part in parts for x in getattr(part, name)] == getattr(found, name)
    plain = client.completions.create(**asked, logprobs=0).choices[0].logprobs
    assert plain is not None and plain.top_logprobs is None and plain.tokens == found.tokens


def test_a_head_of_another_model_is_refused(server: Running) -> None:
    with pytest.raises(InputError):
        generated(server, strategy="learn2pd", options={"head": "tiny-base"})
    options = {"strategy": "learn2pd", "options": {"head": "tiny-base"}}
    body = {"model": TINY, "messages": [{"role": "user", "content": "Hi"}], "dmax": options}
    answer = server.post("/v1/chat/completions", body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "dmax.options")


def test_a_model_without_a_tokenizer_takes_and_gives_token_ids(server: Running) -> None:
    llm: LLM = server.models[0].llm
    options = ServerOptions()
    bare = LLM.from_checkpoint(replace(llm.checkpoint, tokenizer=None))
    model = ServedModel(TINY, lambda: bare, options)
    model.load()
    ids = list(llm.encode(QUESTION))
    [expected] = llm.generate([ids], DecodingParams())
    with Running(model, options=options) as other:
        asked = {"model": TINY, "prompt": ids, "logprobs": 1}
        [choice] = other.post("/v1/completions", asked).json()["choices"]
        assert choice["text"] == "" and choice["dmax"]["token_ids"] == list(expected.token_ids)
        assert choice["logprobs"]["tokens"] == [str(token) for token in expected.token_ids]
        streamed = other.post("/v1/completions", asked | {"stream": True}).text
        assert streamed.rstrip().endswith("[DONE]") and '"error"' not in streamed
        for more in ({"prompt": "Hi"}, {"stop": "a"}):
            refused = other.post("/v1/completions", asked | more)
            assert refused.status_code == 400
            assert "no tokenizer" in refused.json()["error"]["message"]
