"""The paper's experiments in miniature, on the bundled models: all that `docs/results/` shows.

    python bench/ablation_training.py   # the retrained models, about an hour on two cores
    python bench/paper.py               # decode, measure, draw, write the page

Both go on where they were interrupted. Which claims hold is computed from the figures: a difference
of two shares counts when its 95 % interval (Newcombe's, from two Wilson intervals) leaves out zero.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ablation_training import SEEDS, VARIANTS, folder
from command_line import check_plots, count

from dmax.benchmark.run import machines
from dmax.environment import environment
from dmax.evaluation.plots import draw
from dmax.evaluation.run import evaluate
from dmax.evaluation.statistics import wilson_interval
from dmax.evaluation.sweep import Curve, run_sweep
from dmax.files import write_atomically
from dmax.llm import LLM
from dmax.params import DecodingParams
from dmax.records.encoding import encode_dataset
from dmax.tasks import get_task
from dmax.tasks.word_problems import problems
from dmax.training import noise
from dmax.training.clean_stream import CleanStream
from dmax.training.data import Collator
from dmax.training.rollout import roll_out
from dmax.training.vocabulary import IGNORE

Record = dict[str, Any]
HARD = ("soft_inputs", False)
ANYWHERE = ("prefix_only", False)
TAUS = (0.0, 0.5, 0.95)  # of the paper's Table 3
DECODING = (
    Curve("base, threshold", "tiny-base", "threshold", (0.0, 0.3, 0.5, 0.7, 0.95)),
    Curve("base, SPD", "tiny-base", "spd", TAUS),
    Curve("DMax, threshold", "tiny-dmax", "threshold", (0.5, 0.95)),
    Curve("DMax, SPD", "tiny-dmax", "spd", (0.0, 0.3, 0.5, 0.7, 0.9, 0.95)),
    Curve("DMax, hard tokens", "tiny-dmax", "spd", TAUS, (HARD,)),
    Curve("DMax, no prefix rule", "tiny-dmax", "spd", TAUS, (ANYWHERE,)),
    Curve("DMax, hard tokens, no prefix rule", "tiny-dmax", "spd", TAUS, (HARD, ANYWHERE)),
    Curve("DMax, no renormalisation", "tiny-dmax", "spd", TAUS, (("renormalize", False),)),
    Curve(
        "DMax, consistency stop alone", "tiny-dmax", "spd", TAUS, (("stop_on_confidence", False),)
    ),
    Curve(
        "DMax, confidence stop alone", "tiny-dmax", "spd", TAUS, (("stop_on_consistency", False),)
    ),
    Curve("DMax, top-k 2", "tiny-dmax", "spd", TAUS, (("top_k", 2),)),
    Curve("DMax, top-k 4", "tiny-dmax", "spd", TAUS, (("top_k", 4),)),
    *(
        Curve(f"{name}, block {length}", model, strategy, values, (("block_length", length),))
        for length in (8, 16)
        for name, model, strategy, values in (
            ("base, threshold", "tiny-base", "threshold", (0.5, 0.95)),
            ("DMax, SPD", "tiny-dmax", "spd", TAUS),
        )
    ),
)
TRAINING = tuple(
    Curve(f"{variant}, {how}, seed {seed}", str(folder(variant, seed)), strategy, values, settings)
    for seed in SEEDS
    for variant in VARIANTS
    for how, strategy, values, settings in (
        ("SPD", "spd", TAUS, ()),
        ("hard tokens", "spd", (0.5,), (HARD,)),
        ("threshold", "threshold", (0.5, 0.95), ()),
    )
)
MEASURED = {
    "base": "tiny-base",
    "DMax": "tiny-dmax",
    "masks only": str(folder("masks only", 1)),
    "random tokens": str(folder("random tokens", 1)),
    "sampled rollouts": str(folder("sampled rollouts", 1)),
}


# --- what the sweeps do not measure ---------------------------------------------------------------


def revisions(llm: LLM, questions: Sequence[str], params: DecodingParams) -> Record:
    """How often a decoded token changes.

    Returns:
        `changes`, and the `chances` of one: decoded positions, counted at every forward.
    """
    changes = 0
    chances = 0
    for question in questions:
        previous = None
        for event in llm.stream(question, params):
            if event.kind == "finished":
                break
            if previous is not None and previous.position == event.position:
                decoded = [i for i, masked in enumerate(previous.masked) if not masked]
                chances += len(decoded)
                changes += sum(previous.token_ids[i] != event.token_ids[i] for i in decoded)
            previous = event
    return {"changes": changes, "chances": chances}


@torch.no_grad()
def corrections(llm: LLM, ratio: float = 0.75, num: int = 256) -> Record:
    """One pass over the model's own predictions: wrong tokens mended, right ones broken.

    Reference answers are masked at `ratio`, predicted in one pass by argmax, and the predictions
    are predicted anew. A valid paraphrase counts as wrong, for every model alike.
    """
    data = [
        {"prompt": problem.question, "response": problem.response}
        for problem in problems(num, seed=7, split="test")
    ]
    checkpoint = llm.checkpoint
    eos = llm.checkpoint.special_ids.eos_token_ids[0]
    length = checkpoint.special_ids.block_length
    mask = checkpoint.special_ids.mask_token_id
    dataset = encode_dataset(
        data, checkpoint.tokenizer, checkpoint.special_ids, max_length=1024, end_turn=False
    )
    collate = Collator(length, eos, 0, None)
    generator = torch.Generator().manual_seed(0)
    counts = dict.fromkeys(("wrong", "mended", "right", "broken"), 0)
    for start in range(0, num, 32):
        inputs = collate([dataset[i] for i in range(start, min(start + 32, num))])
        clean = inputs["clean_ids"]
        labels = inputs["labels"]
        noisy = noise.mask_tokens(
            clean, inputs["corruptible"], torch.full((len(clean),), ratio), mask, generator
        )
        stream = CleanStream(llm.model, clean, length)
        embed = llm.model.get_input_embeddings()
        predicted = roll_out(stream.denoise(embed(noisy)).logits(), mask)
        was_masked = (noisy == mask) & (labels != IGNORE)
        fed = torch.where(noisy == mask, predicted, noisy)
        again = roll_out(stream.denoise(embed(fed)).logits(), mask)
        before = predicted == labels
        after = again == labels
        counts["wrong"] += int((was_masked & ~before).sum())
        counts["mended"] += int((was_masked & ~before & after).sum())
        counts["right"] += int((was_masked & before).sum())
        counts["broken"] += int((was_masked & before & ~after).sum())
    return counts


def forward_times(llm: LLM, num: int = 24, repeats: int = 5) -> Record:
    """Milliseconds a forward at batch 1, threshold decoding and SPD in turn, A B A B …"""
    task = get_task("word_problems")
    ways = {
        "threshold": DecodingParams(strategy="threshold"),
        "spd": DecodingParams(strategy="spd"),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, params in ways.items():
            run, _ = evaluate(llm, task, params, limit=num, seed=7)
            times[name].append(1000 * run.seconds / (run.num_forwards + run.num_prefill_forwards))
    pairs = zip(times["spd"], times["threshold"], strict=True)
    ratios = [spd / threshold for spd, threshold in pairs]
    return {"milliseconds": times, "ratios": ratios, "ratio": statistics.median(ratios)}


def measure(output: Path) -> Record:
    """All of the above, each written as soon as it is known and not repeated."""
    record: Record = {"environment": environment()}
    if output.exists():
        record = json.loads(output.read_text())
    questions = [p.question for p in problems(64, seed=7, split="test")]
    hard = DecodingParams("spd", 0.5, options={"soft_inputs": False})
    soft = DecodingParams("spd", 0.5)
    jobs: dict[str, Callable[[], Record]] = {}
    for name, path in MEASURED.items():
        jobs[f"revisions, hard tokens, {name}"] = with_model(path, revisions, questions, hard)
        jobs[f"revisions, SPD, {name}"] = with_model(path, revisions, questions, soft)
        jobs[f"corrections, {name}"] = with_model(path, corrections)
    jobs["forward times"] = lambda: forward_times(LLM("tiny-dmax", max_batch_size=1))
    for name, job in jobs.items():
        if name not in record:
            record[name] = job()
            print(name, json.dumps(record[name]), flush=True)
            write_atomically(output, json.dumps(record, indent=1) + "\n")
    return record


def with_model(
    path: str, function: Callable[..., Record], *arguments: object
) -> Callable[[], Record]:
    """A job that opens a model when it is called, and applies the function to it."""
    return lambda: function(LLM(path), *arguments)


# --- what the paper says, and whether it holds here -----------------------------------------------


@dataclass(frozen=True)
class Share:
    """Correct answers of so many, at a mean TPF; several seeds are pooled."""

    correct: int
    total: int
    tpf: float

    @property
    def rate(self) -> float:
        """Accuracy."""
        return self.correct / self.total

    def __str__(self) -> str:
        return f"{self.correct}/{self.total} ({100 * self.rate:.1f} %) at TPF {self.tpf:.2f}"


def difference(a: Share, b: Share) -> tuple[float, float, float]:
    """a - b in points with its 95 % interval (Newcombe's hybrid score interval)."""
    low_a, high_a = wilson_interval(a.correct, a.total)
    low_b, high_b = wilson_interval(b.correct, b.total)
    delta = a.rate - b.rate
    low = delta - math.hypot(a.rate - low_a, high_b - b.rate)
    high = delta + math.hypot(high_a - a.rate, b.rate - low_b)
    return 100 * delta, 100 * low, 100 * high


def better(a: Share, b: Share) -> str:
    """Whether a is more accurate than b."""
    _, low, high = difference(a, b)
    if low > 0:
        return "holds"
    return "fails" if high < 0 else "within noise"


def gap(a: Share, b: Share) -> str:
    """The difference as text."""
    delta, low, high = difference(a, b)
    return f"{delta:+.1f} points ({low:+.1f} to {high:+.1f})"


class Results:
    """The three records, by label and value."""

    def __init__(self, decoding: Record, training: Record, measures: Record) -> None:
        self.decoding = decoding
        self.training = training
        self.measures = measures

    def at(self, label: str, value: float) -> Share:
        """A point of the decoding sweep."""
        (point,) = (
            p for p in self.decoding["points"] if (p["label"], p["value"]) == (label, value)
        )
        return Share(point["correct"], point["total"], point["tpf"])

    def pooled(self, variant: str, how: str, value: float) -> Share:
        """A retrained variant over all seeds."""
        labels = {f"{variant}, {how}, seed {seed}" for seed in SEEDS}
        points = [
            p for p in self.training["points"] if p["label"] in labels and p["value"] == value
        ]
        correct, total, tokens, forwards = (
            sum(p[name] for p in points)
            for name in ("correct", "total", "generated_tokens", "num_forwards")
        )
        return Share(correct, total, tokens / forwards)


Finding = tuple[str, str]  # verdict, figures
Judge = Callable[[Results], Finding]


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, or of ours, and how it is judged.

    Attributes:
        number: as this project counts them, or "ours".
        text: the claim.
        paper: the paper's figures.
        brief: the claim in a few words, for the first lines of the page.
        judge: the verdict and our figures, from the records.
    """

    number: str
    text: str
    paper: str
    brief: str
    judge: Judge


CLAIMS: list[Claim] = []


def claim(number: str, text: str, paper: str, brief: str) -> Callable[[Judge], Judge]:
    """Register a claim."""

    def register(judge: Judge) -> Judge:
        CLAIMS.append(Claim(number, text, paper, brief, judge))
        return judge

    return register


def worst(*verdicts: str) -> str:
    """The weakest of several verdicts: a claim holds if all its parts do."""
    return max(verdicts, key=("holds", "within noise", "fails").index)


@claim(
    "17",
    "The base model collapses as its threshold falls",
    "92.6, 78.0, 0.9 % at 0.95, 0.5, 0",
    brief="the base model collapses when pushed",
)
def _(r: Results) -> Finding:
    careful, middle, bold = (r.at("base, threshold", value) for value in (0.95, 0.5, 0.0))
    return worst(better(careful, middle), better(middle, bold)), f"{careful}; {middle}; {bold}"


@claim(
    "18",
    "SPD on the base model, without OPUT, collapses at every threshold",
    "0.0 % at TPF 1.04, 1.73, 5.39",
    brief="so does SPD without OPUT",
)
def _(r: Results) -> Finding:
    pairs = [(r.at("DMax, SPD", value), r.at("base, SPD", value)) for value in TAUS]
    return worst(*(better(*pair) for pair in pairs)), "; ".join(str(base) for _, base in pairs)


@claim(
    "19",
    "OPUT alone, hard tokens: no loss at 0.95, a gain at 0.5",
    "92.6 at 0.95, 90.1 against 78.0 at 0.5",
    brief="OPUT gains with hard tokens too",
)
def _(r: Results) -> Finding:
    name = "DMax, hard tokens, no prefix rule"
    careful = r.at(name, 0.95)
    bold = r.at(name, 0.5)
    loss = better(r.at("base, threshold", 0.95), careful)
    kept = "fails" if loss == "holds" else "holds"
    return worst(kept, better(bold, r.at("base, threshold", 0.5))), f"{careful}; {bold}"


@claim(
    "20",
    "At threshold 0, soft inputs keep what hard tokens lose",
    "90.4 against 68 to 70 %",
    brief="soft inputs help at threshold 0",
)
def _(r: Results) -> Finding:
    soft = r.at("DMax, SPD", 0.0)
    hard = r.at("DMax, hard tokens", 0.0)
    return better(soft, hard), f"soft {soft}; hard {hard}: {gap(soft, hard)}"


@claim(
    "21",
    "At mild thresholds soft and hard differ little",
    "93.3 against 93.0, 92.1 against 91.3",
    brief="soft and hard inputs are alike at mild thresholds",
)
def _(r: Results) -> Finding:
    pairs = [(r.at("DMax, SPD", value), r.at("DMax, hard tokens", value)) for value in (0.95, 0.5)]
    little = all(abs(difference(*pair)[0]) <= 2 for pair in pairs)
    return "holds" if little else "fails", "; ".join(
        f"soft {a}, hard {b}: {gap(a, b)}" for a, b in pairs
    )


@claim(
    "22",
    "The prefix rule trades TPF for accuracy at 0.5",
    "5.64 / 91.4 without, 5.48 / 92.1 with it",
    brief="the prefix rule trades TPF for accuracy",
)
def _(r: Results) -> Finding:
    with_rule = r.at("DMax, SPD", 0.5)
    without = r.at("DMax, no prefix rule", 0.5)
    verdict = better(with_rule, without) if with_rule.tpf < without.tpf else "fails"
    return verdict, f"with {with_rule}; without {without}: {gap(with_rule, without)}"


@claim(
    "23",
    "Random-token training is worse than OPUT, and oscillates",
    "68.7 % at TPF 2.26",
    brief="random tokens are worse than OPUT",
)
def _(r: Results) -> Finding:
    oput = r.pooled("sampled rollouts", "hard tokens", 0.5)
    random = r.pooled("random tokens", "hard tokens", 0.5)
    rates = {
        n: r.measures[f"revisions, hard tokens, {n}"] for n in ("sampled rollouts", "random tokens")
    }
    flips = {n: 100 * m["changes"] / m["chances"] for n, m in rates.items()}
    verdict = (
        better(oput, random) if flips["random tokens"] > flips["sampled rollouts"] else "fails"
    )
    shown = ", ".join(f"{n} {value:.1f} %" for n, value in flips.items())
    return (
        verdict,
        f"OPUT {oput}; random tokens {random}. Decoded tokens that change at a forward: {shown}",
    )


@claim(
    "24",
    "Stopping on confidence alone costs TPF, on consistency alone a little",
    "5.48; 2.28 and 5.13",
    brief="each stop rule by itself costs TPF",
)
def _(r: Results) -> Finding:
    both, consistent, confident = (
        r.at(name, 0.5)
        for name in ("DMax, SPD", "DMax, consistency stop alone", "DMax, confidence stop alone")
    )
    verdict = "holds" if confident.tpf < consistent.tpf < both.tpf else "fails"
    return verdict, f"both {both}; consistency alone {consistent}; confidence alone {confident}"


@claim(
    "25",
    "OPUT raises TPF at the same threshold of 0.95",
    "2.04 to 2.95, with no control",
    brief="OPUT raises TPF at the same threshold",
)
def _(r: Results) -> Finding:
    base = r.at("base, threshold", 0.95)
    oput, masks = (r.pooled(name, "threshold", 0.95) for name in ("sampled rollouts", "masks only"))
    verdict = "holds" if oput.tpf > base.tpf else "fails"
    return (
        verdict,
        f"base {base}; OPUT {oput}; the control on the same data with masks only {masks}",
    )


@claim(
    "26",
    "At equal TPF DMax dominates, and when careful it is no worse than the base",
    "+0.8 to +3.0 points",
    brief="DMax beats the base at equal TPF",
)
def _(r: Results) -> Finding:
    base = r.at("base, threshold", 0.95)
    careful = r.at("DMax, SPD", 0.7)
    bold = r.at("DMax, SPD", 0.5)
    pushed = r.at("base, threshold", 0.3)
    kept = "fails" if better(base, careful) == "holds" else "holds"
    verdict = worst(kept, better(bold, pushed))
    return verdict, f"base {base}, pushed {pushed}; DMax {careful}, pushed {bold}"


@claim(
    "27",
    "Blends need their length restored",
    "asserted, not measured",
    brief="blends need their length restored",
)
def _(r: Results) -> Finding:
    pairs = [(r.at("DMax, SPD", value), r.at("DMax, no renormalisation", value)) for value in TAUS]
    return worst(*(better(*pair) for pair in pairs)), "; ".join(
        f"with {a}, without {b}" for a, b in pairs
    )


@claim(
    "27",
    "More candidates in a blend (top-k 2, 4) help",
    "an option of the code, not measured",
    brief="more candidates in a blend help",
)
def _(r: Results) -> Finding:
    one, two, four = (r.at(name, 0.5) for name in ("DMax, SPD", "DMax, top-k 2", "DMax, top-k 4"))
    return worst(better(two, one), better(four, one)), f"k = 1 {one}; 2 {two}; 4 {four}"


@claim(
    "28",
    "A forward of SPD takes 10 to 20 % longer",
    "4.4 ms in place of 4.0",
    brief="a forward of SPD takes 10 to 20 % longer",
)
def _(r: Results) -> Finding:
    measured = r.measures["forward times"]
    low = min(measured["ratios"])
    high = max(measured["ratios"])
    verdict = "holds" if 1.1 <= measured["ratio"] <= 1.2 else "fails"
    return (
        verdict,
        f"{measured['ratio']:.2f} times as long on a CPU at batch 1 ({low:.2f} to {high:.2f})",
    )


@claim(
    "29",
    "OPUT mends more wrong tokens than the base, and breaks fewer right ones than random tokens",
    "figure",
    brief="OPUT mends more and breaks less",
)
def _(r: Results) -> Finding:
    counts = {
        n: r.measures[f"corrections, {n}"] for n in ("base", "random tokens", "sampled rollouts")
    }
    mended = {n: c["mended"] / c["wrong"] for n, c in counts.items()}
    broken = {n: c["broken"] / c["right"] for n, c in counts.items()}
    oput = "sampled rollouts"
    good = (
        mended[oput] > max(mended["base"], mended["random tokens"])
        and broken[oput] < broken["random tokens"]
    )
    shown = "; ".join(
        f"{n}: mended {c['mended']}/{c['wrong']} ({100 * mended[n]:.1f} %), "
        f"broken {c['broken']}/{c['right']} ({100 * broken[n]:.1f} %)"
        for n, c in counts.items()
    )
    return "holds" if good else "fails", shown


@claim(
    "ours",
    "Sampled rollouts are as good as the published argmax ones",
    "not measured",
    brief="sampled rollouts are as good as argmax",
)
def _(r: Results) -> Finding:
    pairs = [
        (r.pooled("sampled rollouts", "SPD", t), r.pooled("argmax rollouts", "SPD", t))
        for t in (0.5, 0.0)
    ]
    verdict = worst(*("fails" if better(b, a) == "holds" else "holds" for a, b in pairs))
    return verdict, "; ".join(f"sampled {a}, argmax {b}: {gap(a, b)}" for a, b in pairs)


@claim(
    "ours",
    "A mask ratio of 0.75 is better than 0.5 and than 1",
    "0.75, not varied",
    brief="a mask ratio of 0.75 is best",
)
def _(r: Results) -> Finding:
    names = ("sampled rollouts", "mask ratio 0.5", "mask ratio 1")
    middle, low, high = (r.pooled(name, "SPD", 0.5) for name in names)
    return worst(better(middle, low), better(middle, high)), f"0.75 {middle}; 0.5 {low}; 1 {high}"


@claim(
    "ours",
    "OPUT is better than the same data with masks only, decoded as is best for each",
    "the missing control",
    brief="OPUT beats masks only on the same data",
)
def _(r: Results) -> Finding:
    oput = r.pooled("sampled rollouts", "SPD", 0.5)
    masks = r.pooled("masks only", "threshold", 0.5)
    revised = r.pooled("masks only", "hard tokens", 0.5)
    verdict = worst(better(oput, masks), better(oput, revised))
    return (
        verdict,
        f"OPUT, SPD {oput}; masks only, threshold {masks}; masks only, revised {revised}",
    )


# --- the page -------------------------------------------------------------------------------------


def page(results: Results) -> str:
    """The Markdown page: verdicts with counts, then every point."""
    rows = ["| # | the paper says | there | here | |", "|---|---|---|---|---|"]
    briefs: dict[str, list[str]] = {"holds": [], "fails": [], "within noise": []}
    for entry in CLAIMS:
        verdict, figures = entry.judge(results)
        cells = (entry.number, entry.text, entry.paper, figures, f"**{verdict}**")
        rows.append(f"| {' | '.join(cells)} |")
        briefs[verdict].append(f"{entry.brief} ({entry.number})")
    record = results.decoding
    return TEMPLATE.format(
        summary="\n\n".join(_line(verdict, briefs[verdict]) for verdict in briefs),
        claims="\n".join(rows),
        decoding=_points(record["points"]),
        training=_pooled(results),
        problems=record["limit"],
        retrained=results.training["limit"],
        seeds=len(SEEDS),
        machine=machines(record),
    )


def _line(verdict: str, briefs: Sequence[str]) -> str:
    return textwrap.fill(f"**{verdict.capitalize()}:** {'; '.join(briefs) or 'none'}.", width=120)


def _points(points: Sequence[Record]) -> str:
    rows = [
        "| model, decoding | threshold | correct | 95 % interval | TPF |",
        "|---|---|---|---|---|",
    ]
    for p in points:
        low, high = (100 * bound for bound in p["interval"])
        share = f"{p['correct']}/{p['total']}"
        interval = f"{low:.1f} to {high:.1f}"
        rows.append(f"| {p['label']} | {p['value']:g} | {share} | {interval} | {p['tpf']:.2f} |")
    return "\n".join(rows)


def _pooled(results: Results) -> str:
    rows = [
        "| trained with | decoded by | threshold | each seed | pooled |",
        "|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        for how, values in (("SPD", TAUS), ("hard tokens", (0.5,)), ("threshold", (0.5, 0.95))):
            for value in values:
                labels = [f"{variant}, {how}, seed {seed}" for seed in SEEDS]
                found = {
                    p["label"]: p["correct"]
                    for p in results.training["points"]
                    if p["value"] == value
                }
                each = ", ".join(str(found[label]) for label in labels)
                pooled = results.pooled(variant, how, value)
                rows.append(f"| {variant} | {how} | {value:g} | {each} | {pooled} |")
    return "\n".join(rows)


TEMPLATE = """# The paper's experiments in miniature

{summary}

Numbers in brackets are rows of the table below. A verdict is computed. *Holds* and *fails* mean
that the 95 % interval of the difference leaves out zero, or that a ratio lies on that side. *Within
noise* means that it does not.

Single settings were decoded on {problems} unseen word problems, retrained models on {retrained} for
each of {seeds} seeds. Machine: {machine}. The retrained models come from
`python bench/ablation_training.py`
([recipes/tiny_ablation.yaml](../../recipes/tiny_ablation.yaml)), and `python bench/paper.py` wrote
this page from the records in this folder. `make results` runs both, and
[every decoding method](methods.md). Pages of their own have [a real pretrained
model](pretrained.md), [what came after DMax](beyond.md), and
[when on-policy noise matters](noise.md), which looks into claim 23.

![Accuracy against TPF of the decoding variants](decoding.svg)

## Claims

{claims}

## Decoding, every point

{decoding}

## Training, every point

A quarter of the bundled model's OPUT training each.

{training}
"""


def main() -> None:
    """Measure what is missing, write the page, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=count, default=500, help="problems for a decoding setting")
    parser.add_argument(
        "--retrained-limit", type=count, default=200, help="problems for a retrained model"
    )
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    check_plots(parser)
    task = get_task("word_problems")
    output = options.output

    def sweep(curves: Sequence[Curve], name: str, limit: int) -> Record:
        return run_sweep(
            curves,
            task,
            output / name,
            limit=limit,
            seed=7,
            open_model=lambda path: LLM(path, max_batch_size=64),
            report=lambda line: print(line, flush=True),
        )

    decoding = sweep(DECODING, "decoding.json", options.limit)
    training = sweep(TRAINING, "training.json", options.retrained_limit)
    results = Results(decoding, training, measure(output / "measures.json"))
    shown = [
        p for p in decoding["points"] if "block" not in p["label"] and "top-k" not in p["label"]
    ]
    picture = output / "decoding.svg"
    draw({**decoding, "points": shown}, picture, ours="DMax, SPD", against="base, threshold")
    write_atomically(output / "README.md", page(results))


if __name__ == "__main__":
    main()
