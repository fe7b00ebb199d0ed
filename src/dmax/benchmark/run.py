"""From a device to its benchmark: tables as they are measured, and one JSON record of all."""

from __future__ import annotations

import json
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dmax.benchmark import cpu, gpu
from dmax.benchmark.report import Row, Table, show
from dmax.environment import environment, on_device, select_device
from dmax.errors import InputError
from dmax.files import check_ours, check_writable, write_atomically


def run_benchmark(
    device: str = "auto", *, quick: bool = False, console: Console, output: Path | None = None
) -> dict[str, Any]:
    """The bundled models on a CPU; LLaDA-2.0-mini's shape with random weights on a CUDA GPU.

    Args:
        device: as in `select_device`.
        quick: fewer problems, sizes and repeats.
        console: where the tables go.
        output: JSON file for the record.

    Raises:
        InputError: a device that there is no benchmark for, a GPU without room, or an output that
            cannot be written.
    """
    chosen = select_device(device)
    options: cpu.CpuOptions | gpu.GpuOptions
    if chosen.type == "cpu":
        options = cpu.QUICK if quick else cpu.FULL
        tables = cpu.tables(options)
    elif chosen.type == "cuda":
        options = gpu.QUICK if quick else gpu.FULL
        tables = gpu.tables(options, chosen)
    else:
        raise InputError(
            f"there is no benchmark for {chosen.type}", hint="use --device cpu or --device cuda"
        )
    theme = "cpu" if chosen.type == "cpu" else "gpu"
    return record_tables(theme, chosen, asdict(options), tables, console=console, output=output)


def record_tables(
    theme: str,
    device: torch.device,
    settings: Row,
    tables: Iterable[Table],
    *,
    console: Console,
    output: Path | None = None,
) -> dict[str, Any]:
    """Print the tables as they come and gather them in one record, which is written after each."""
    if output is not None:
        check_writable(output)
        check_ours(output, "benchmark", "settings", "environment")
    record: dict[str, Any] = {
        "benchmark": theme,
        "command": command(sys.argv),
        "environment": environment(device),
        "settings": settings,
        "notes": {},
    }
    console.print(headline(record["environment"]), highlight=False)
    console.print("measuring ...", highlight=False)
    with on_device(device):
        for table in tables:
            show(table, console, hardware(record["environment"]))
            record[table.name] = list(table.rows)
            record["notes"][table.name] = table.note
            if output is not None:
                write_atomically(output, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return record


def command(arguments: Sequence[str]) -> str:
    """The command line, without the folders of this machine."""
    program = Path(arguments[0]).name
    name = f"python bench/{program}" if program.endswith(".py") else program
    here = f"{Path.cwd()}/"
    rest = [shlex.quote(argument.replace(here, "")) for argument in arguments[1:]]
    return " ".join([name, *rest])


def hardware(record: Row) -> str:
    """What computed."""
    return str(record.get("gpu") or f"{record['cpu']}, threads: {record['threads']}")


def machines(record: Row) -> str:
    """What computed the points of a sweep, in which precision: where most were measured first."""
    points = record["points"]
    own = (_machine(point.get("environment", record["environment"]), point) for point in points)
    (first, _), *others = Counter(own).most_common()
    counted = (f"{num} of {len(points)} points: {machine}" for machine, num in others)
    return "; ".join((first, *counted))


def _machine(environment: Row, point: Row) -> str:
    return f"{hardware(environment)}, torch {environment['torch']}, {point['dtype']}"


def headline(record: Row) -> str:
    """Hardware and versions in one line."""
    versions = ", ".join(f"{name} {record[name]}" for name in ("dmax", "torch", "transformers"))
    return f"{hardware(record)}; {versions}; commit {record['commit'] or 'unknown'}"
