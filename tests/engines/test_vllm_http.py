"""vLLM's server, asked with the `openai` client: what works, what is refused, what is counted."""

from __future__ import annotations

import json
import shutil
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from reference import BLOCK, Wanted, load, model_path, texts
from vllm_server import NAME, Server

GREEDY = load("spd")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(model_path()) as started:
        yield started


def chat(server: Server, text: str, **options: Any) -> Any:
    options = {"max_tokens": 96} | options
    messages = [{"role": "user", "content": text}]
    return server.client.chat.completions.create(model=NAME, messages=messages, **options)


def complete(server: Server, wanted: Wanted, **options: Any) -> Any:
    """The completion of a prompt of token ids, decoded as the reference was."""
    params = wanted.params
    names = ("strategy", "threshold", "stop_confidence", "top_k")
    asked = {name: getattr(params, name) for name in names} | dict(params.options)
    xargs = {f"dmax_{name}": value for name, value in asked.items() if value is not None}
    given = {
        "max_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "seed": params.seed,
        "extra_body": {"vllm_xargs": xargs, "ignore_eos": params.ignore_eos},
    }
    prompt = list(wanted.prompt)
    return server.client.completions.create(model=NAME, prompt=prompt, **(given | options))


def forwards(response: Any) -> dict[str, Any]:
    """What a response says of its forwards."""
    return response.model_extra["metrics"]["speculative_decoding"]


# --- what clients send works ---


@pytest.mark.parametrize("index", range(8))
def test_a_chat_is_answered_as_by_dmax(server: Server, index: int) -> None:
    wanted = GREEDY[index]
    response = chat(server, texts()[index])
    (choice,) = response.choices
    assert choice.message.content.strip() == wanted.text.strip()
    assert choice.finish_reason == wanted.finish_reason
    assert response.usage.prompt_tokens == len(wanted.prompt)
    has_eos = wanted.finish_reason == "stop"
    assert response.usage.completion_tokens == len(wanted.token_ids) + has_eos
    assert forwards(response)["num_forwards"] == wanted.num_forwards
    assert forwards(response)["tokens_per_forward"] == pytest.approx(
        len(wanted.token_ids) / wanted.num_forwards
    )


@pytest.mark.parametrize("group", ["spd_top_3", "threshold", "joint_threshold", "eos_ignored"])
def test_a_request_chooses_its_strategy(server: Server, group: str) -> None:
    for wanted in load(group)[:4]:
        response = complete(server, wanted)
        assert response.choices[0].text == wanted.text
        assert forwards(response)["num_forwards"] == wanted.num_forwards


def test_options_may_be_texts_as_in_forms(server: Server) -> None:
    wanted = load("spd_careful")[0]
    xargs = {"dmax_threshold": "0.9", "dmax_stop_confidence": "0.99", "dmax_soft_inputs": "true"}
    response = complete(server, wanted, extra_body={"vllm_xargs": xargs})
    assert response.choices[0].text == wanted.text


def test_a_stream_comes_by_block_and_ends_with_usage(server: Server) -> None:
    finished = [each for each in GREEDY if each.finish_reason == "stop"]
    wanted = max(finished, key=lambda each: len(each.token_ids))
    text = texts()[GREEDY.index(wanted)]
    chunks = list(chat(server, text, stream=True, stream_options={"include_usage": True}))
    parts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    parts = [part for part in parts if part]
    end = len(wanted.prompt) + len(wanted.token_ids) + 1  # the EOS may begin a block
    num_blocks = -(-end // BLOCK) - len(wanted.prompt) // BLOCK
    assert "".join(parts).strip() == wanted.text.strip()
    assert 1 < len(parts) <= num_blocks
    assert chunks[-1].usage.completion_tokens == len(wanted.token_ids) + 1
    assert forwards(chunks[-1])["num_forwards"] == wanted.num_forwards


def test_temperature_0_is_greedy_and_the_default(server: Server) -> None:
    wanted = GREEDY[0].text.strip()
    for options in ({"temperature": 0}, {"temperature": 0.0, "top_p": 1, "seed": 5}, {}):
        assert chat(server, texts()[0], **options).choices[0].message.content.strip() == wanted


def test_samples_are_those_of_dmax_and_belong_to_their_seed(server: Server) -> None:
    for wanted in load("sampled")[:4]:
        assert complete(server, wanted).choices[0].text == wanted.text
    first, again, other = (
        chat(server, texts()[0], temperature=2, seed=seed).choices[0].message.content
        for seed in (7, 7, 8)
    )
    assert first == again != other


def test_temperature_1_without_a_seed_samples(server: Server) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda text: chat(server, text, temperature=1), texts()[:16]))
    said = [answer.choices[0].message.content.strip() for answer in answers]
    wanted = [each.text.strip() for each in load("64_spd")[:16]]
    assert said != wanted


def test_several_choices_are_several_samples(server: Server) -> None:
    response = chat(server, texts()[0], n=2, temperature=2, seed=3)
    first, second = (choice.message.content for choice in response.choices)
    assert first and second and first != second


def test_log_probabilities_stand_beside_their_tokens(server: Server) -> None:
    response = chat(server, texts()[0], logprobs=True, top_logprobs=3)
    (choice,) = response.choices
    tokens = choice.logprobs.content
    assert len(tokens) == response.usage.completion_tokens
    assert all(-100 < token.logprob <= 0 for token in tokens)
    # A sure token is the first of the best; the chosen one is always among them or added to them.
    assert all(3 <= len(token.top_logprobs) <= 4 for token in tokens)
    best = [max(token.top_logprobs, key=lambda each: each.logprob) for token in tokens]
    agree = [token.token == top.token for token, top in zip(tokens, best, strict=True)]
    assert sum(agree) >= 0.9 * len(tokens)
    num_read = len(tokens) - (choice.finish_reason == "stop")  # without the EOS
    text = "".join(token.token for token in tokens[:num_read])
    assert text.strip() == choice.message.content.strip()


def test_no_log_probabilities_but_the_chosen_ones(server: Server) -> None:
    response = complete(server, GREEDY[0], logprobs=0)
    probabilities = response.choices[0].logprobs.token_logprobs
    assert len(probabilities) == response.usage.completion_tokens


@pytest.mark.parametrize("index", range(4))
def test_a_stop_text_ends_the_completion_before_it(server: Server, index: int) -> None:
    wanted = GREEDY[index]
    text = wanted.text
    stop = text[len(text) // 2 :][:6]
    (choice,) = complete(server, wanted, stop=[stop]).choices
    assert choice.text == text[: text.find(stop)]
    assert choice.finish_reason == "stop"


def test_a_request_with_a_stop_text_is_counted_too(server: Server) -> None:
    wanted = GREEDY[0]
    response = complete(server, wanted, stop=[wanted.text[:4]])
    assert 1 <= forwards(response)["num_forwards"] <= wanted.num_forwards


def test_a_stop_token_ends_the_completion(server: Server) -> None:
    wanted = GREEDY[0]
    token = wanted.token_ids[20]
    at = wanted.token_ids.index(token)
    body = {"stop_token_ids": [token], "vllm_xargs": {"dmax_strategy": "spd"}}
    response = complete(server, wanted, extra_body=body)
    assert response.usage.completion_tokens == at + 1


@pytest.mark.parametrize("count", [1, 5, 32, 33])
def test_max_tokens_ends_the_completion(server: Server, count: int) -> None:
    response = complete(server, load("eos_ignored")[0], max_tokens=count)
    assert response.usage.completion_tokens == count
    assert response.choices[0].finish_reason == "length"


def test_16_clients_with_strategies_and_thresholds_of_their_own(server: Server) -> None:
    wanted = load("mixed")[:16]
    with ThreadPoolExecutor(16) as pool:
        responses = list(pool.map(lambda each: complete(server, each), wanted))
    assert [each.choices[0].text for each in responses] == [each.text for each in wanted]
    counted = [forwards(each)["num_forwards"] for each in responses]
    assert counted == [each.num_forwards for each in wanted]


# --- what does not is refused with status 400 ---

CHAT_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"top_p": 0.9, "temperature": 1}, "`top_p` does not go with decoding by blocks, got 0.9"),
    ({"frequency_penalty": 0.5}, "`frequency_penalty` does not go"),
    ({"presence_penalty": 0.5}, "`presence_penalty` does not go"),
    ({"logit_bias": {"5": 1}}, "`logit_bias` does not go"),
    ({"response_format": {"type": "json_object"}}, "`response_format` does not go"),
    ({"extra_body": {"top_k": 5, "temperature": 1}}, "`dmax_top_k` in `vllm_xargs`"),
    ({"extra_body": {"min_p": 0.1, "temperature": 1}}, "`min_p` does not go"),
    ({"extra_body": {"min_tokens": 5}}, "`min_tokens` does not go"),
    ({"extra_body": {"repetition_penalty": 1.1}}, "`repetition_penalty` does not go"),
    ({"extra_body": {"bad_words": ["apple"]}}, "`bad_words` does not go"),
    ({"extra_body": {"allowed_token_ids": [5, 6]}}, "`allowed_token_ids` does not go"),
    ({"extra_body": {"prompt_logprobs": 1}}, "`prompt_logprobs` "),
    ({"extra_body": {"use_beam_search": True, "n": 2}}, "beam search does not go"),
]
XARGS_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"dmax_treshold": 0.5}, "did you mean `dmax_threshold`?"),
    ({"dmax_threshold": 1.5}, "`threshold` must be a number between 0 and 1, got 1.5"),
    ({"dmax_threshold": "high"}, "`threshold` must be a number between 0 and 1, got 'high'"),
    ({"dmax_threshold": [0.5, 0.6]}, "`threshold` must be a number between 0 and 1"),
    ({"dmax_strategy": "sdp"}, "did you mean `spd`?"),
    ({"dmax_strategy": 3}, "`strategy` must be a name, got 3"),
    ({"dmax_strategy": "mbd"}, "needs 2 open blocks, and vLLM has one"),
    ({"dmax_strategy": "lopa"}, "needs 2 branches of a block"),
    ({"dmax_strategy": "demask", "dmax_head": "tiny-base"}, "needs hidden states"),
    ({"dmax_strategy": "learn2pd", "dmax_head": "/etc/hostname"}, "`dmax_head` must be"),
    ({"dmax_strategy": "learn2pd"}, "needs the option `head`"),
    ({"dmax_top_k": 1000}, "`dmax_top_k` must be at most 32"),
    ({"dmax_top_k": "many"}, "`top_k` must be a whole number"),
    ({"dmax_soft_inputs": "maybe"}, "`soft_inputs` must be true or false"),
    ({"dmax_temperature": 1}, "ask for `temperature`"),
    ({"dmax_block_length": 8}, "the block length is the checkpoint's"),
    ({"diffusion_canvas_length": 8}, "for other diffusion models"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("options", "sentence"), CHAT_REFUSALS)
def test_what_block_diffusion_cannot_do_is_refused(
    server: Server, options: dict[str, Any], sentence: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError, match="400") as caught:
        chat(server, texts()[0], stream=stream, **options)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("xargs", "sentence"), XARGS_REFUSALS)
def test_options_that_cannot_be_are_refused(
    server: Server, xargs: dict[str, Any], sentence: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError, match="400") as caught:
        chat(server, texts()[0], stream=stream, extra_body={"vllm_xargs": xargs})
    assert sentence in str(caught.value)


def test_prompts_that_cannot_be_are_refused(server: Server) -> None:
    mask = json.loads(Path(model_path(), "config.json").read_text("utf-8"))["mask_token_id"]
    for prompt, sentence in (([5, mask, 6], "holds the mask token"), ([5] * 600, "maximum")):
        with pytest.raises(openai.BadRequestError, match="400") as caught:
            server.client.completions.create(model=NAME, prompt=prompt, max_tokens=8)
        assert sentence in str(caught.value)


def test_neutral_values_are_no_wishes(server: Server) -> None:
    body = {"top_k": -1, "min_p": 0, "repetition_penalty": 1, "min_tokens": 0, "bad_words": []}
    response = chat(
        server,
        texts()[0],
        top_p=1,
        frequency_penalty=0,
        presence_penalty=0,
        logit_bias={},
        response_format={"type": "text"},
        extra_body=body,
    )
    assert response.choices[0].message.content.strip() == GREEDY[0].text.strip()


# --- the server goes on ---


def test_no_option_ends_the_server(server: Server) -> None:
    values: list[Any] = ["", "nan", "inf", -1, 1e308, 10**30, [], ["a", 1], "9" * 5000, "\x00", 0.5]
    names = (
        "strategy threshold stop_confidence top_k max_steps_per_block soft_inputs head x".split()
    )
    for name in names:
        for value in values:
            body = {"vllm_xargs": {f"dmax_{name}": value}}
            with suppress(openai.BadRequestError):  # status 400
                chat(server, texts()[0], max_tokens=1, extra_body=body)
    assert chat(server, texts()[0]).choices[0].message.content.strip() == GREEDY[0].text.strip()


def test_closing_the_connection_frees_the_slot(server: Server) -> None:
    long = replace(GREEDY[0], params=replace(GREEDY[0].params, ignore_eos=True))
    before = server.metric("vllm:generation_tokens_total")
    streams = [complete(server, long, max_tokens=400, stream=True) for _ in range(4)]
    for stream in streams:
        next(iter(stream))
        stream.close()
    deadline = time.monotonic() + 20
    while server.metric("vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert server.metric("vllm:num_requests_running") == 0
    assert server.metric("vllm:generation_tokens_total") - before < 4 * 200
    assert complete(server, GREEDY[1]).choices[0].text == GREEDY[1].text


COUNTED = {
    "dmax:denoising_forwards_total": "num_forwards",
    "dmax:prefill_forwards_total": "num_prefill_forwards",
    "dmax:commit_forwards_total": "num_commit_forwards",
}


def test_the_metrics_are_the_sums_over_the_requests(server: Server) -> None:
    names = {
        "dmax:generated_tokens_total": lambda each: len(each.token_ids),
        "dmax:denoising_forwards_total": lambda each: each.num_forwards,
    }
    before = {name: server.metric(name) for name in (*names, *COUNTED)}
    wanted = [*GREEDY, *load("threshold")]
    with ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(lambda each: complete(server, each), wanted))
    time.sleep(0.5)  # the last step is counted after its responses have left
    grown = {name: server.metric(name) - before[name] for name in before}
    for name, of in names.items():
        assert grown[name] == sum(map(of, wanted)), name
    for name, key in COUNTED.items():
        assert grown[name] == sum(forwards(each)[key] for each in responses), name


def test_health_and_models(server: Server) -> None:
    assert [model.id for model in server.client.models.list()] == [NAME]
    with urllib.request.urlopen(f"{server.address}/health") as response:
        assert response.status == 200


# --- a published checkpoint, as it is ---


NAMED_BY_DMAX = ("decoding_strategy", "block_length", "mask_token_id")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as the authors publish theirs, with defaults for ordinary sampling."""
    folder = tmp_path_factory.mktemp("hub") / "DMax-Math-16B"
    shutil.copytree(model_path(), folder)
    file = folder / "config.json"
    config = json.loads(file.read_text("utf-8"))
    for name in (*NAMED_BY_DMAX, "use_qk_norm", "use_rmsnorm"):
        config.pop(name, None)
    file.write_text(json.dumps(config), "utf-8")
    defaults = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    ends = {"eos_token_id": config["eos_token_id"]}
    (folder / "generation_config.json").write_text(json.dumps(defaults | ends), "utf-8")
    return folder


def test_a_published_checkpoint_is_served_without_flags(published: Path) -> None:
    with Server(str(published)) as started:
        for wanted, text in list(zip(GREEDY, texts(), strict=False))[:4]:
            response = chat(started, text)
            assert response.choices[0].message.content.strip() == wanted.text.strip()
            assert forwards(response)["num_forwards"] == wanted.num_forwards
