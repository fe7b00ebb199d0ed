"""SGLang's server, asked by OpenAI's client."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from reference import load, model_path, texts
from sglang_engine import OPTIONS

START = 240  # seconds


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--model-path", model_path(), "--port", str(port), "--host", "127.0.0.1"]
    for name, value in OPTIONS.items():
        flag = "--" + name.replace("_", "-")
        flags += [flag] if value is True else [flag, str(value)]
    command = [sys.executable, "-m", "sglang.launch_server", *flags]
    process = subprocess.Popen(command, env=dict(os.environ), start_new_session=True)
    base = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{base}/health", process)
        yield base
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its workers would outlive it
        process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"no server answers; it ended with {process.poll()}")


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, question: str, **given: Any) -> Any:
    messages: Any = [{"role": "user", "content": question}]
    return client.chat.completions.create(model="any", messages=messages, max_tokens=96, **given)


def test_a_chat_is_answered_as_by_our_own_engine(client: openai.OpenAI) -> None:
    for question, right in zip(texts()[:4], load("64_spd"), strict=False):
        for given in ({}, {"temperature": 0}):
            [choice] = ask(client, question, **given).choices
            assert choice.message.content == right.text
            assert choice.finish_reason == right.finish_reason


def test_a_chat_is_streamed(client: openai.OpenAI) -> None:
    right = load("64_spd")[0]
    chunks = list(ask(client, texts()[0], stream=True))
    parts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(parts) == right.text
    assert len([part for part in parts if part]) >= 2  # one for each block


def test_a_request_names_its_own_strategy(client: openai.OpenAI) -> None:
    options = {"custom_params": {"dmax_strategy": "threshold"}}
    [choice] = ask(client, texts()[0], extra_body=options).choices
    assert choice.message.content == load("64_threshold")[0].text


def test_samples_are_those_of_our_own_engine_with_the_same_seed(client: openai.OpenAI) -> None:
    greedy = load("64_spd")
    differ = 0
    for question, right, other in zip(texts(), load("sampled"), greedy, strict=False):
        given = {"temperature": right.params.temperature, "seed": right.params.seed}
        [choice] = ask(client, question, **given).choices
        assert choice.message.content == right.text
        differ += right.text != other.text
    assert differ > 0


def test_a_stop_text_ends_a_chat(client: openai.OpenAI) -> None:
    [choice] = ask(client, texts()[0], stop="Then").choices
    assert choice.message.content == load("64_spd")[0].text.partition("Then")[0]
    assert choice.finish_reason == "stop"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": 0.5, "top_p": 0.9}, "no place for `top_p`"),
        ({"logprobs": True}, "no place for `return_logprob`"),
        ({"frequency_penalty": 0.4}, "no place for `frequency_penalty`"),
        ({"extra_body": {"custom_params": {"dmax_strategy": "mbd"}}}, "needs 2 open blocks"),
        ({"extra_body": {"custom_params": {"dmax_threshold": "high"}}}, "`threshold` must be"),
        ({"response_format": {"type": "json_object"}}, "no place for `json_schema`"),
    ],
)
def test_what_cannot_be_is_answered_with_a_sentence(
    client: openai.OpenAI, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, texts()[0], **given)
    assert ask(client, texts()[0]).choices[0].message.content == load("64_spd")[0].text


def test_forwards_stand_in_the_native_response(address: str) -> None:
    right = load("64_spd")[0]
    body = {"input_ids": list(right.prompt), "sampling_params": {"max_new_tokens": 96}}
    told = httpx.post(f"{address}/generate", json=body, timeout=60).json()["meta_info"]
    assert told["dmax_num_forwards"][-1] == right.num_forwards
    assert told["dmax_num_commit_forwards"][-1] > 0
