"""What replicas take of a cluster, and what is refused before Ray is asked; without Ray."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from typing import Any

import pytest

from dmax import DecodingParams, InputError
from dmax.cli import replicas
from dmax.integrations.ray.cluster import Node, Placement, RayOptions, place
from dmax.integrations.ray.pool import Chunk, Starts, chunks, portable
from dmax.integrations.ray.workers import Answering, Completing, Description, Model

LAPTOP = [Node(8)]
EIGHT = [Node(64, 8)]
CLUSTER = [Node(4), Node(16, 2), Node(32, 4)]
PARAMS = DecodingParams()


@pytest.mark.parametrize(
    ("options", "nodes", "expected"),
    [
        (RayOptions(), LAPTOP, Placement(1, 8, 0)),
        (RayOptions(replicas=3), LAPTOP, Placement(3, 2, 0)),
        (RayOptions(replicas=8), LAPTOP, Placement(8, 1, 0)),
        (RayOptions(), EIGHT, Placement(8, 8, 1)),
        (RayOptions(replicas=2), EIGHT, Placement(2, 32, 1)),
        (RayOptions(gpus_per_replica=4), EIGHT, Placement(2, 32, 4)),
        (RayOptions(gpus_per_replica=0), EIGHT, Placement(1, 64, 0)),
        (RayOptions(), CLUSTER, Placement(6, 8, 1)),
        (RayOptions(gpus_per_replica=2), CLUSTER, Placement(3, 16, 2)),
        (RayOptions(replicas=3, gpus_per_replica=0), CLUSTER, Placement(3, 16, 0)),
    ],
)
def test_replicas_share_gpus_and_cores(
    options: RayOptions, nodes: list[Node], expected: Placement
) -> None:
    assert place(options, nodes) == expected


def test_a_model_for_the_cpu_takes_no_gpus() -> None:
    assert place(RayOptions(), EIGHT, with_gpus=False) == Placement(1, 64, 0)


@pytest.mark.parametrize(
    ("options", "nodes", "message"),
    [
        (RayOptions(replicas=9), LAPTOP, "--replicas 9 need a core each, and .* have 8$"),
        (RayOptions(gpus_per_replica=1), LAPTOP, "need 1 GPUs, and the machines .* have 0$"),
        (RayOptions(replicas=9), EIGHT, "--replicas 9 with --gpus-per-replica 1 need 9 GPUs"),
        (RayOptions(replicas=2, gpus_per_replica=3), CLUSTER, "need 6 GPUs, and .* 0, 2, 4$"),
        (RayOptions(), [Node(2, 4)], "--replicas 4 need a core each"),
    ],
)
def test_more_than_there_is_is_refused(
    options: RayOptions, nodes: list[Node], message: str
) -> None:
    with pytest.raises(InputError) as refused:
        place(options, nodes)
    assert re.search(message, refused.value.message)


@pytest.mark.parametrize(
    "fields",
    [
        {"replicas": 0},
        {"replicas": True},
        {"gpus_per_replica": -1},
        {"gpus_per_replica": 65},
        {"address": ""},
        {"address": "ray://head:10001"},
    ],
)
def test_options_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        RayOptions(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"gpus": 2},
        {"device": "cuda:1"},
        {"device": "cpu", "gpus": 1},
        {"engine": "vllm", "quantization": "int8"},
        {"engine": "vllm", "compile_model": True},
    ],
)
def test_models_that_no_replica_can_load_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Model("tiny-dmax", **fields)


@pytest.mark.parametrize(
    ("num", "size", "count", "sizes"),
    [(10, 4, 1, [4, 4, 2]), (10, 64, 2, [5, 5]), (3, 64, 8, [1, 1, 1]), (0, 4, 2, [])],
)
def test_chunks_hold_every_prompt_once(num: int, size: int, count: int, sizes: list[int]) -> None:
    prompts = [(7 * index, f"prompt {index}") for index in range(num)]
    found = chunks(prompts, PARAMS, size=size, replicas=count)
    assert [len(chunk.prompts) for chunk in found] == sizes
    assert [each for chunk in found for each in chunk.prompts] == prompts
    assert all(chunk.params == PARAMS for chunk in found)


def test_a_chunk_and_an_error_travel() -> None:
    chunk = Chunk([(3, [{"role": "user", "content": "six für ☃"}])], PARAMS)
    assert pickle.loads(pickle.dumps(chunk)) == chunk
    sent = pickle.loads(pickle.dumps(portable(InputError("what is wrong", hint="mend it"))))
    assert (sent.message, sent.hint) == ("what is wrong", "mend it")


def test_an_error_that_cannot_travel_is_told_in_words() -> None:
    class Local(Exception):
        pass

    sent = portable(Local("why"))
    assert type(sent) is RuntimeError and str(sent) == "Local: why"


def test_starts_are_counted_until_a_chunk_is_finished() -> None:
    starts = Starts()
    assert [starts.begin("a"), starts.begin("b"), starts.begin("a")] == [1, 1, 2]
    starts.finish("a")
    assert [starts.begin("a"), starts.begin("b")] == [1, 2]


def test_machines_may_differ_and_models_may_not() -> None:
    one = Description(PARAMS, {"weights": "a", "environment": {"threads": 1}})
    assert one.compared() == {"weights": "a"}


# ---- what a replica does, in this process --------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Model:
    return Model("tiny-dmax", batch_size=2, dtype="float32")


def test_a_worker_completes_prompts_as_a_model_here(model: Model) -> None:
    from dmax import LLM

    params = DecodingParams(max_new_tokens=24)
    prompts = [(5, "What is 2 + 2?"), (3, "What is 3 + 4?"), (8, "How many mugs are left?")]
    worker = Completing(model)
    described = worker.describe(params)
    assert described.params.strategy == "spd"
    assert described.settings["batch_size"] == 2
    found = worker.work(prompts, params)
    expected = LLM("tiny-dmax", dtype="float32", device="cpu").generate(
        [prompt for _, prompt in prompts], params
    )
    assert found == list(zip([5, 3, 8], expected, strict=True))


def test_a_worker_refuses_a_prompt_and_answers_the_others(model: Model) -> None:
    params = DecodingParams(max_new_tokens=24)
    worker = Answering(model)
    prompts = [(5, "What is 2 + 2?"), (9, "long " * 3000), (7, "What is 3 + 4?")]
    answers: dict[int, Any] = dict(worker.work(prompts, params))
    assert answers.keys() == {5, 9, 7}
    assert "prompt 9" in answers[9].error.message
    assert answers[5].tokens > 0 and answers[7].forwards > 0
    assert worker.describe(params).settings["decoding"].startswith("SoftParallelDecoding(")


# ---- the command line ----------------------------------------------------------------------------

NOTHING = {
    "ray": False,
    "ray_address": None,
    "replicas": None,
    "gpus_per_replica": None,
    "engine": None,
    "model": "tiny-dmax",
    "batch_size": 8,
    "dtype": "auto",
    "device": "auto",
    "quantization": None,
    "compile_model": False,
}


def test_nothing_is_read_without_ray() -> None:
    assert replicas.read(NOTHING) is None


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"replicas": 2}, "--replicas"),
        ({"gpus_per_replica": 0}, "--gpus-per-replica"),
        ({"engine": "dmax"}, "--engine"),
    ],
)
def test_companions_go_with_ray(given: Mapping[str, Any], shown: str) -> None:
    with pytest.raises(InputError, match=f"`{shown}` goes with --ray"):
        replicas.read(NOTHING | given)


def test_an_engine_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="there is no engine 'vlm'") as refused:
        replicas.read(NOTHING | {"ray": True, "engine": "vlm"})
    assert refused.value.hint == "did you mean `vllm`?"


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from dmax import extras

    monkeypatch.setattr(extras, "has", lambda module: False)
    with pytest.raises(InputError, match="`--ray` needs the package `ray`"):
        replicas.read(NOTHING | {"ray": True})
