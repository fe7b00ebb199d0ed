"""`dmax train --dry-run`: its figures as a person reads them."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from dmax.recipe.estimate.cluster import LINK_SHARE, RESERVE, UTILISATION
from dmax.recipe.estimate.result import Estimate

CARDS = {"80 GB": 80e9, "141 GB": 141e9}
UNKNOWN = "unknown"


def show_estimate(found: Estimate, console: Console) -> None:
    """Print memory, the verdict, and time and cost with what they rest on."""
    gpus = found.cluster.num_gpus
    batch = found.batch
    console.print(
        f"{gpus} × {found.cluster.gpu.name}: {found.settings}\n"
        f"{found.parameters:,} parameters, of which {found.learning:,} learn; "
        f"{batch['sequences']} × {batch['positions']:,} tokens on each GPU at a time, "
        f"{found.batch_is_from}"
    )
    console.print(_memory(found))
    console.print(_verdict(found) + "\n")
    console.print(_time(found))
    console.print(
        f"Time and cost rest on {UTILISATION:.0%} of {found.cluster.gpu.bfloat16 / 1e12:,.0f} "
        f"TFLOP/s (bfloat16, dense), {LINK_SHARE:.0%} of {found.cluster.gpu.link / 1e9:,.0f} GB/s "
        f"to other GPUs, and {found.cluster.gpu.price:.2f} $ an hour. From: products and traffic "
        "overlap wholly; to: not at all. Nothing of this has been measured.",
        style="dim",
    )


def _memory(found: Estimate) -> Table:
    table = Table(title="memory of each GPU", title_justify="left")
    table.add_column("")
    table.add_column("GB", justify="right")
    table.add_column("how sure")
    table.add_column("what it is")
    for part in found.memory:
        note = part.note + (", in the CPU's memory" if part.on_host else "")
        size = UNKNOWN if part.bytes is None else _gigabytes(part.bytes)
        table.add_row(part.name, size, part.basis, note)
    table.add_section()
    table.add_row("together", _gigabytes(found.peak), "", "at the peak of a step")
    return table


def _verdict(found: Estimate) -> str:
    gpu = found.cluster.gpu
    others = ", ".join(
        f"{name} {'are enough' if found.fits_into(memory) else 'are not enough'}"
        for name, memory in CARDS.items()
    )
    room = f"{gpu.memory / 1e9:.3g} GB, of which {RESERVE:.0%} is left to CUDA, NCCL and gaps"
    is_known = all(part.bytes is not None for part in found.memory)
    verdict = "fits" if found.fits else "does not fit"
    limits = "" if is_known else ", as far as is known"
    advice = f"\nTo make it fit, {found.advice}." if found.advice else ""
    return f"It {verdict} one {gpu.name} ({room}){limits}. Of cards in general, {others}.{advice}"


def _time(found: Estimate) -> Table:
    run = found.run
    table = Table(title="time and cost, estimated", title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("products of a step, a GPU", f"{run.flops / 1e12:,.1f} TFLOP")
    table.add_row("weights gathered", f"{_gigabytes(run.traffic.gathered)} GB")
    table.add_row("gradients exchanged", f"{_gigabytes(run.traffic.reduced)} GB")
    table.add_row("products alone", f"{run.step.compute:.3g} s")
    table.add_row("traffic alone", f"{run.step.communication:.3g} s")
    table.add_row("a step", _span(run.step.least, run.step.most, "s"))
    table.add_row("clean tokens of a step", f"{run.tokens:,}")
    steps = UNKNOWN + ", give --examples" if run.steps is None else f"{run.steps:,}"
    table.add_row("steps", steps)
    if run.hours is not None and found.dollars is not None:
        table.add_row("the run", duration(*run.hours))
        table.add_row("its cost", _span(*found.dollars, "$"))
    return table


def duration(least: float, most: float) -> str:
    """A span of hours in words, in minutes where all of it is less than one."""
    if most < 1:
        return _span(60 * least, 60 * most, "minutes")
    return _span(least, most, "hours")


def _span(least: float, most: float, unit: str) -> str:
    ends = [f"{each:.3g}" if each < 1000 else f"{each:,.0f}" for each in (least, most)]
    return f"{' to '.join(dict.fromkeys(ends))} {unit}"


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.2f}"
