"""Replicas under Ray on this machine: the same results as one process, and how runs end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle
from reference import load

from dmax import LLM, DecodingParams, InputError
from dmax.completers import LocalCompleter
from dmax.distill.files import ResponseFiles
from dmax.distill.model import ModelAnswerer
from dmax.distill.run import distill
from dmax.evaluation.results import ResultFiles
from dmax.evaluation.run import evaluate
from dmax.integrations.ray.cluster import Node, Placement, RayOptions, connected
from dmax.integrations.ray.pool import MOST_STARTS, Chunk, Pool
from dmax.integrations.ray.replicas import RayAnswerer, RayCompleter
from dmax.integrations.ray.workers import Description, Model, Numbered
from dmax.tasks.word_problems import WordProblems

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # replicas cannot import tests

MODEL = Model("tiny-dmax", batch_size=2, dtype="float32")
TWO = Placement(replicas=2, cpus=1, gpus=0)
PARAMS = DecodingParams("spd", max_new_tokens=40)
PROMPTS = [f"Jack has {index} mugs and buys 2 more. How many has he?" for index in range(12)]
TOO_LONG = "long " * 3000


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    with connected(RayOptions()) as found:
        yield found


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("tiny-dmax", dtype="float32", device="cpu", max_batch_size=2)


class Trying:
    """A worker that does what its prompts say."""

    def __init__(self, name: str = "model", fails: str | None = None) -> None:
        if fails == "input":
            raise InputError("the checkpoint is damaged", hint="copy it again")
        if fails == "bug":
            raise ZeroDivisionError("a bug")
        if fails == "death":
            os.kill(os.getpid(), signal.SIGKILL)
        self.name = name

    def describe(self, params: DecodingParams) -> Description:
        name = f"{self.name} {os.getpid()}" if self.name == "another each time" else self.name
        return Description(params, {"weights": name})

    def work(self, prompts: Numbered, params: DecodingParams) -> Numbered:
        if any(prompt == "die" for _, prompt in prompts):
            os.kill(os.getpid(), signal.SIGKILL)
        if any(prompt == "fail" for _, prompt in prompts):
            raise InputError("there is no answer")
        return prompts


def pool(**options: Any) -> Pool:
    return Pool(partial(Trying, **options), TWO)


def ask(pool: Pool, *prompts: str) -> list[Numbered]:
    waiting = [Chunk([(number, prompt)], PARAMS) for number, prompt in enumerate(prompts)]
    return sorted(pool.results(waiting))


# ---- a cluster of its own ------------------------------------------------------------------------


def test_the_cluster_is_this_machine(nodes: list[Node]) -> None:
    assert [node.cpus for node in nodes] == [os.cpu_count()]


@pytest.mark.first
@pytest.mark.parametrize("name", ["64_spd", "64_threshold"])
def test_64_prompts_have_the_tokens_and_forwards_of_one_process(
    nodes: list[Node], name: str
) -> None:
    wanted = load(name)
    (params,) = {each.params for each in wanted}
    completer = RayCompleter(replace(MODEL, batch_size=8), TWO)
    prompts = [list(each.prompt) for each in wanted]
    found: dict[int, Any] = {}
    for group in completer.completions(prompts, params, lambda done, total: None):
        assert not found.keys() & dict(group).keys()
        found |= dict(group)
    assert sorted(found) == list(range(64))
    for number, each in enumerate(wanted):
        output = found[number]
        assert output.token_ids == each.token_ids and output.text == each.text
        assert output.num_forwards == each.num_forwards


def test_an_evaluation_has_the_results_of_one_process(nodes: list[Node], llm: LLM) -> None:
    task = WordProblems()
    options: dict[str, Any] = dict(limit=14, seed=3, model_name="tiny-dmax")
    one, samples = evaluate(llm, task, PARAMS, **options)
    told: list[tuple[int, int]] = []
    two, others = evaluate(
        RayCompleter(MODEL, TWO),
        task,
        DecodingParams("auto", max_new_tokens=40),
        progress=lambda done, total: told.append((done, total)),
        **options,
    )
    assert others == samples
    assert (two.accuracy, two.tpf, two.tpf_paper, two.cost) == (
        one.accuracy,
        one.tpf,
        one.tpf_paper,
        one.cost,
    )
    assert (two.weights, two.decoding, two.params) == (one.weights, one.decoding, one.params)
    assert two.environment["replicas"] == 2
    assert told[0] == (0, 14) and told[-1] == (14, 14)


def test_an_evaluation_goes_on_under_ray_and_back(
    nodes: list[Node], llm: LLM, tmp_path: Path
) -> None:
    task = WordProblems()

    class Interrupted(Exception):
        pass

    def stop(done: int, total: int, after: int) -> None:
        if done >= after:
            raise Interrupted

    def run(model: Any, after: int | None = None) -> Any:
        files = ResultFiles(tmp_path / "a.json")
        progress = partial(stop, after=after) if after else lambda done, total: None
        return evaluate(model, task, PARAMS, limit=40, seed=3, journal=files, progress=progress)

    with pytest.raises(Interrupted):
        run(llm, after=9)
    assert len((tmp_path / "a.partial.jsonl").read_text().splitlines()) == 1 + 8
    with pytest.raises(Interrupted):
        run(RayCompleter(MODEL, TWO), after=17)
    assert len((tmp_path / "a.partial.jsonl").read_text().splitlines()) >= 1 + 16
    _, samples = run(LocalCompleter(llm))
    assert samples == evaluate(llm, task, PARAMS, limit=40, seed=3)[1]


def test_a_distillation_has_the_results_of_one_process_and_goes_on(
    nodes: list[Node], llm: LLM, tmp_path: Path
) -> None:
    prompts = [*PROMPTS[:5], TOO_LONG, *PROMPTS[5:]]
    ours, theirs = ModelAnswerer(llm, PARAMS), RayAnswerer(MODEL, TWO, PARAMS)
    assert theirs.settings() == ours.settings()
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    expected = distill(ours, prompts, ResponseFiles(one))
    distill(theirs, prompts[:4], ResponseFiles(two))
    distill(ours, prompts[:7], ResponseFiles(two))
    report = distill(theirs, prompts, ResponseFiles(two))
    assert (report.kept, report.dropped, report.tpf) == (
        expected.kept,
        expected.dropped,
        expected.tpf,
    )
    assert report.dropped["refused"] == 1
    for suffix in (".jsonl", ".dropped.jsonl"):
        lines = (path.with_suffix(suffix).read_text().splitlines() for path in (one, two))
        assert len(set(map(tuple, map(sorted, lines)))) == 1


# ---- how runs end --------------------------------------------------------------------------------


def test_results_come_as_they_are_finished(nodes: list[Node]) -> None:
    assert ask(pool(), "a", "b", "c") == [[(0, "a")], [(1, "b")], [(2, "c")]]


def test_no_prompts_need_no_replica(nodes: list[Node]) -> None:
    assert ask(pool(fails="input")) == []


def test_what_cannot_be_loaded_is_told_in_its_sentence(nodes: list[Node]) -> None:
    with pytest.raises(InputError, match="the checkpoint is damaged") as told:
        pool(fails="input").describe(PARAMS)
    assert told.value.hint == "copy it again"


def test_what_fails_in_a_replica_is_told_in_its_sentence(nodes: list[Node]) -> None:
    with pytest.raises(InputError, match="there is no answer"):
        ask(pool(), "a", "fail")


def test_a_bug_keeps_its_type_and_its_place(nodes: list[Node]) -> None:
    with pytest.raises(ZeroDivisionError) as told:
        pool(fails="bug").describe(PARAMS)
    assert "in __init__" in told.value.__notes__[0]


@pytest.mark.parametrize("fails", ["death", None], ids=["in loading", "in a chunk"])
def test_a_replica_that_always_dies_ends_the_run(nodes: list[Node], fails: str | None) -> None:
    with pytest.raises(InputError, match=f"a replica died {MOST_STARTS} times in a row"):
        ask(pool(fails=fails), "a", "die", "b")


def test_replicas_of_different_models_are_refused(nodes: list[Node]) -> None:
    with pytest.raises(InputError, match="the replicas do not hold the same model"):
        ask(pool(name="another each time"), "a", "b")


# ---- the command ---------------------------------------------------------------------------------


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "dmax", *words]


def test_a_command_says_nothing_of_ray(tmp_path: Path) -> None:
    words = "eval --ray --limit 3 --max-new-tokens 16 --dtype float32 --json".split()
    environment = os.environ | {"HOME": str(tmp_path)}
    done = subprocess.run(command(*words), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["total"] == 3
    assert done.stderr.strip() == "loading tiny-dmax …"
    assert not list(tmp_path.iterdir()), "Ray writes into the home directory"


def begun(output: Path) -> subprocess.Popen[str]:
    """A distillation that has written something."""
    words = "distill --ray --model tiny-dmax --num 400 --batch-size 1 --dtype float32 --output"
    process = subprocess.Popen(
        command(*words.split(), str(output)), stderr=subprocess.PIPE, text=True
    )
    while not output.exists():
        assert process.poll() is None
        time.sleep(0.05)
    return process


def test_a_command_whose_server_dies_says_so(tmp_path: Path) -> None:
    process = begun(tmp_path / "a.jsonl")
    found = subprocess.run(["pgrep", "-P", str(process.pid), "raylet"], capture_output=True)
    os.kill(int(found.stdout), signal.SIGKILL)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 2
    assert "error: Ray's server on this machine has died" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_command_says_what_is_kept(number: signal.Signals, tmp_path: Path) -> None:
    process = begun(tmp_path / "a.jsonl")
    process.send_signal(number)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 128 + number
    assert errors.splitlines()[-1].startswith("interrupted; finished responses are kept in ")
    assert "Traceback" not in errors
