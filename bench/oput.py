"""Cost of a training pair: OPUT as `dmax` computes it against the published recipe.

    python bench/oput.py
    python bench/oput.py --quick --output /tmp/oput.json

A pair is one sequence learnt from masks and from the model's own predictions. The published step is
`published_step.py`. Both run in one process on one thread, in turns, with the same noise; a figure
is the median of the rounds. The last line is the ratio of their CPU seconds. The script ends with 1
if the gradients differ.

Memory is measured in a process of its own for each: what Linux counts at the peak of one pair
(`VmHWM`) above what was resident before it (`VmRSS`). So are the bytes that the vocabulary loss of
a pair takes for each logit of a stream: with all logits at once, and in chunks.

L positions of a sequence, V vocabulary, D hidden size.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import published_step
import torch
import torch.nn.functional as F
from command_line import changed, given_options, result_path
from memory import resident_mib
from published_step import IGNORE, Sample
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from dmax.benchmark.measure import in_turns, spread
from dmax.benchmark.report import Row, Table, console, figure
from dmax.benchmark.run import record_tables
from dmax.checkpoint import load_checkpoint
from dmax.models import backbone
from dmax.tasks.word_problems import problems
from dmax.training.clean_stream import CleanBatch, NoisyBatch, noisy_positions, take
from dmax.training.embedding import without_gradient
from dmax.training.objectives import oput_loss
from dmax.training.rollout import pick
from dmax.training.vocabulary import CHUNK, States, score

CPU = torch.device("cpu")
TOLERANCE = 1e-5
"""Length of the difference of two gradients over that of one, in float32."""
MASK_RATIO = 0.75
BLOCK = 32
DMAX = "dmax"
PUBLISHED = "published"
SKIPPING = "published, without the rollout that it throws away"


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure.

    Attributes:
        repeats: rounds after the one that warms up.
        layers: of the Llama with random weights.
        hidden: D of it.
        vocabulary: V of it.
        length: L of its sequences.
        prompt: positions of a prompt, which has neither noise nor loss.
        logits_vocabulary: V of the vocabulary loss, that of LLaDA-2.0.
        logits_length: L of it, a quarter of the paper's: all logits of 2,048 would take 5 GiB.
        chunk: logits at once, a quarter of what training takes, so that there are as many chunks.
    """

    repeats: int = 5
    layers: int = 6
    hidden: int = 384
    vocabulary: int = 8192
    length: int = 512
    prompt: int = 96
    logits_vocabulary: int = 157_184
    logits_length: int = 512
    chunk: int = CHUNK // 4


FULL = Options()
QUICK = Options(
    repeats=1,
    layers=2,
    hidden=64,
    vocabulary=512,
    length=64,
    prompt=32,
    logits_vocabulary=4096,
    logits_length=256,
    chunk=2**17,
)


# --- one pair, both ways --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pair:
    """A model and a sequence that it learns from masks and from its own predictions.

    Attributes:
        model: in training mode.
        sample: the sequence with its noise.
        mask: id of MASK.
        eos: id of EOS, whose row of the input table gets no gradient.
    """

    model: Any
    sample: Sample
    mask: int
    eos: int

    def dmax(self) -> None:
        """Add the gradient as `dmax` computes it."""
        clean_ids = self.sample.clean_ids[None]
        labels = self.sample.labels[None]
        positions = noisy_positions(CleanBatch(clean_ids, labels, labels != IGNORE), BLOCK)
        batch = NoisyBatch(
            clean_ids,
            take(self.sample.noisy_ids[None], positions),
            take(labels, positions, beyond=IGNORE),
            positions,
        )
        with without_gradient(self.model.get_input_embeddings(), self.eos):
            loss = oput_loss(self.model, batch, block_length=BLOCK, mask_token_id=self.mask)
            loss.total.backward()

    def published(self, *, skips_unused_rollout: bool = False) -> None:
        """Add the gradient as the published code computes it."""
        published_step.step(
            self.model,
            [self.sample],
            block_length=BLOCK,
            mask_token_id=self.mask,
            eos_token_id=self.eos,
            skips_unused_rollout=skips_unused_rollout,
        )

    def gradient(self, run: Callable[[], None]) -> Tensor:
        """All that one way adds to the gradients, in one vector of float64."""
        self.model.zero_grad()
        run()
        weights = self.model.parameters()
        return torch.cat(
            [each.grad.flatten().double() for each in weights if each.grad is not None]
        )


def make_pair(name: str, options: Options) -> Pair:
    """A Llama with random weights that learns everything, or all but a prompt; or `tiny-base`."""
    if name == "tiny-base":
        return real_pair()
    torch.manual_seed(0)
    mask, eos = options.vocabulary - 1, options.vocabulary - 2
    heads = max(1, options.hidden // 64)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=options.length,
        pad_token_id=eos,
        attn_implementation="sdpa",
    )
    model = backbone.as_block_diffusion(LlamaForCausalLM(config)).train()
    clean_ids = torch.randint(eos, (options.length,))
    labels = clean_ids.clone()
    if name == "llama, prompt":
        labels[: options.prompt] = IGNORE
    return Pair(model, with_noise(clean_ids, labels, mask), mask, eos)


def real_pair() -> Pair:
    """A word problem for the bundled model."""
    checkpoint = load_checkpoint("tiny-base", dtype=torch.float32, device=CPU)
    mask, eos = checkpoint.special_ids.mask_token_id, checkpoint.special_ids.eos_token_ids[0]
    [problem] = problems(1, seed=1, split="train")
    clean_ids, labels = published_step.encode(
        checkpoint.tokenizer,
        problem.question,
        problem.response,
        length=8 * BLOCK,
        block_length=BLOCK,
        eos=eos,
    )
    return Pair(checkpoint.model.train(), with_noise(clean_ids, labels, mask), mask, eos)


def with_noise(clean_ids: Tensor, labels: Tensor, mask: int) -> Sample:
    """Masks at three quarters of the labelled positions."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.rand(clean_ids.shape, generator=generator) < MASK_RATIO
    return Sample(clean_ids, clean_ids.masked_fill(drawn & (labels != IGNORE), mask), labels)


# --- time -----------------------------------------------------------------------------------------


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def pair_row(name: str, options: Options) -> Row:
    """Seconds of a pair by contender, their ratios, and how far the gradients are apart."""
    pair = make_pair(name, options)
    ways: dict[str, Callable[[], None]] = {
        PUBLISHED: pair.published,
        SKIPPING: lambda: pair.published(skips_unused_rollout=True),
        DMAX: pair.dmax,
    }
    expected = pair.gradient(pair.published)
    difference = (pair.gradient(pair.dmax) - expected).norm() / expected.norm()
    turns = {way: (lambda run=run: seconds(run)) for way, run in ways.items()}
    times = in_turns(turns, options.repeats)
    wall = {way: spread([each for each, _ in times[way]]) for way in ways}
    cpu = {way: spread([each for _, each in times[way]]) for way in ways}
    return {
        "model": name,
        "positions": len(pair.sample.clean_ids),
        "labels": int((pair.sample.labels != IGNORE).sum()),
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "ratio": cpu[PUBLISHED]["median"] / cpu[DMAX]["median"],
        "ratio_wall": wall[PUBLISHED]["median"] / wall[DMAX]["median"],
        "ratio_skipping": cpu[SKIPPING]["median"] / cpu[DMAX]["median"],
        "gradient_difference": float(difference),
        "peak_mib": {way: apart(pair_peak, name, way, options) for way in (PUBLISHED, DMAX)},
    }


def pair_table(options: Options) -> Table:
    """What a pair costs."""
    names = ("llama", "llama, prompt", "tiny-base")
    rows = [pair_row(name, options) for name in names]
    cells = [
        {
            "model": row["model"],
            "positions": str(row["positions"]),
            "labels": str(row["labels"]),
            "published, CPU s": figure(row["cpu_seconds"][PUBLISHED], ".2f"),
            "dmax, CPU s": figure(row["cpu_seconds"][DMAX], ".2f"),
            "ratio": figure(row["ratio"], ".2f"),
            "wall": figure(row["ratio_wall"], ".2f"),
            "no unused rollout": figure(row["ratio_skipping"], ".2f"),
            "published, MiB": figure(row["peak_mib"][PUBLISHED], ".0f"),
            "dmax, MiB": figure(row["peak_mib"][DMAX], ".0f"),
            "gradients apart": figure(row["gradient_difference"], ".1e"),
        }
        for row in rows
    ]
    note = (
        "A pair: one sequence, forward and backward, from masks and from the model's own "
        "predictions. Ratio: CPU seconds of the published pair over ours; wall: the same of wall "
        "seconds; no unused rollout: against a published pair of 6 L positions in place of 8. MiB: "
        "peak above what was resident before."
    )
    return Table("pairs", "a training pair, published and here", rows, cells, note)


# --- memory ---------------------------------------------------------------------------------------


def apart(measure: Callable[..., float], *arguments: Any) -> float:
    """What a measurement gives in a new process: earlier allocations would blur the peak."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(measure, *arguments).result()


def peak_mib(run: Callable[[], object]) -> float:
    """MiB at the peak of a call above what was resident before; NaN where Linux does not count."""
    torch.set_num_threads(1)
    before = resident_mib("VmRSS")
    run()
    peak = resident_mib("VmHWM")
    return float("nan") if before is None or peak is None else peak - before


def pair_peak(name: str, way: str, options: Options) -> float:
    """Peak of one pair, gradients included."""
    logging.disable_progress_bar()
    pair = make_pair(name, options)
    return peak_mib(pair.dmax if way == DMAX else pair.published)


def logits_peak(way: str, options: Options) -> float:
    """Peak of the vocabulary loss of a pair, forward and backward; all positions are labelled."""
    torch.manual_seed(0)
    head = nn.Linear(64, options.logits_vocabulary, bias=False)
    mask = options.logits_vocabulary - 1
    streams = [torch.randn(1, options.logits_length, 64, requires_grad=True) for _ in range(2)]
    labels = torch.randint(mask, (1, options.logits_length))
    is_masked = torch.rand(labels.shape) < MASK_RATIO

    def plain() -> Tensor:
        masked = head(streams[0])
        pick(masked, mask)
        predicted = head(streams[1])
        losses = [F.cross_entropy(each.flatten(0, 1), labels[0]) for each in (masked, predicted)]
        return torch.stack(losses).mean()  # backward does not need the logits themselves

    def chunked() -> Tensor:
        masked, predicted = (States(each, head, options.logits_vocabulary) for each in streams)
        first = score(masked, labels, is_masked, mask_token_id=mask, chunk=options.chunk)
        second = score(predicted, labels, chunk=options.chunk)
        return torch.stack((first.losses.mean(), second.losses.mean())).mean()

    loss = plain if way == "plain" else chunked
    return peak_mib(lambda: loss().backward())


def logits_table(options: Options) -> Table:
    """What the vocabulary loss takes for each logit of a stream."""
    size = options.logits_length * options.logits_vocabulary
    rows: list[Row] = []
    for way in ("plain", "chunked"):
        peak = apart(logits_peak, way, options)
        rows.append(
            {
                "loss": way,
                "positions": options.logits_length,
                "vocabulary": options.logits_vocabulary,
                "peak_mib": peak,
                "bytes_per_logit": peak * 2**20 / size,
            }
        )
    cells = [
        {
            "vocabulary loss": row["loss"],
            "positions": str(row["positions"]),
            "vocabulary": f"{row['vocabulary']:,}",
            "peak MiB": figure(row["peak_mib"], ".0f"),
            "bytes a logit": figure(row["bytes_per_logit"], ".1f"),
        }
        for row in rows
    ]
    note = (
        "Bytes: the peak over the number of logits of one stream; a pair has two. Plain: all "
        "logits of both streams at once, as a model takes it whose head is not linear."
    )
    return Table("logits", "the vocabulary loss of a pair", rows, cells, note)


def tables(options: Options) -> Iterator[Table]:
    """The tables, each measured when it is asked for."""
    yield pair_table(options)
    yield logits_table(options)


def main() -> int:
    """Measure, show, write; 1 if a gradient is not the published one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, for a first impression")
    parser.add_argument("--repeats", type=int, help="rounds after the one that warms up")
    parser.add_argument("--output", type=Path, default=result_path("oput", CPU))
    given = given_options(parser)
    preset = QUICK if given.pop("quick") else FULL
    output = given.pop("output")
    options = changed(parser, preset, given)
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    record = record_tables(
        "oput", CPU, asdict(options), tables(options), console=console(), output=output
    )
    pairs = record["pairs"]
    wrong = [row["model"] for row in pairs if not row["gradient_difference"] <= TOLERANCE]
    for model in wrong:
        print(f"{model}: the gradients differ by more than {TOLERANCE}", file=sys.stderr)
    print(f"{pairs[0]['ratio']:.2f} times the CPU seconds of dmax for the published pair")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
