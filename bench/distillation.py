"""How fast responses are written: from a server at several numbers of requests, and from a model.

    python bench/distillation.py

The server is on this machine and takes 0.2 seconds for any answer, so that what is measured is the
client and the files; `client_milliseconds` are of the processor, for each response. The model is
compared with `LLM.generate` on the same prompts, in seconds of the processor too, which other work
on the machine changes little.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from command_line import telling  # noqa: E402
from fake_server import Server  # noqa: E402

from dmax import LLM, DecodingParams  # noqa: E402
from dmax.distill.files import ResponseFiles  # noqa: E402
from dmax.distill.model import ModelAnswerer  # noqa: E402
from dmax.distill.run import Report, distill  # noqa: E402
from dmax.distill.server import ServerAnswerer, ServerOptions  # noqa: E402
from dmax.environment import environment  # noqa: E402
from dmax.files import write_atomically  # noqa: E402
from dmax.tasks.word_problems import problems  # noqa: E402

SECONDS = 0.2  # that the server takes
CONCURRENCIES = (1, 8, 64, 256)
NUM_PROMPTS = 100
REPEATS = 2
PARAMS = DecodingParams(strategy="threshold", threshold=0.95)


def serve(address: Any) -> None:
    """A server in a process of its own, until it is killed."""
    with Server(delay=SECONDS) as server:
        address.send(server.url)
        server.ended.wait()


def from_server(url: str, concurrency: int) -> dict[str, float]:
    """Responses per second with so many requests in flight."""
    num_prompts = min(int(5 * concurrency / SECONDS), 1_500)
    prompts = [f"question {number}" for number in range(num_prompts)]
    with TemporaryDirectory() as name:
        answerer = ServerAnswerer(ServerOptions(url, concurrency=concurrency))
        began = time.process_time()
        report = distill(answerer, prompts, ResponseFiles(Path(name) / "a.jsonl"))
        client_seconds = time.process_time() - began
    assert report.kept == num_prompts
    return {
        "concurrency": concurrency,
        "responses_per_second": report.kept / report.seconds,
        "at_most": concurrency / SECONDS,
        "client_milliseconds": 1000 * client_seconds / num_prompts,
    }


def from_model(llm: LLM, questions: list[Any]) -> dict[str, float]:
    """Seconds of the processor for the same prompts, distilled and merely generated."""
    began = time.process_time()
    outputs = llm.generate(questions, PARAMS)
    generated = time.process_time()
    with TemporaryDirectory() as name:
        report: Report = distill(
            ModelAnswerer(llm, PARAMS), questions, ResponseFiles(Path(name) / "a.jsonl")
        )
    distilled = time.process_time()
    assert report.tokens == sum(len(output.token_ids) for output in outputs)
    return {
        "tokens": report.tokens,
        "generate_seconds": generated - began,
        "distill_seconds": distilled - generated,
    }


@telling()
def main() -> None:
    """Measure both, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("bench/results/distillation.json"))
    options = parser.parse_args()

    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(sender,))
    process.start()
    url = receiver.recv()
    servers = [from_server(url, concurrency) for concurrency in CONCURRENCIES]
    process.kill()
    for each in servers:
        print(json.dumps(each))
    llm = LLM("tiny-base", dtype="bfloat16", max_batch_size=64)
    questions = [problem.question for problem in problems(NUM_PROMPTS, seed=1)]
    llm.generate(questions[:64], PARAMS)
    models = [from_model(llm, questions) for _ in range(REPEATS)]
    best = {name: min(each[name] for each in models) for name in models[0]}
    ratio = best["distill_seconds"] / best["generate_seconds"]
    print(json.dumps(best))
    print(f"distilled / generated, in seconds of the processor: {ratio:.3f}")
    record = {
        "server": servers,
        "model": models,
        "ratio": ratio,
        "environment": environment(llm.model.device),
    }
    write_atomically(options.output, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
