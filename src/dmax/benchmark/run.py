"""From a device to the benchmark that suits it, its tables as they are measured, and one JSON record of all."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from dmax.benchmark import cpu, gpu, rig
from dmax.benchmark.report import Row, Section, show
from dmax.environment import environment, select_device
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
    chosen, _ = select_device(device)
    if chosen.type == "cpu":
        return run_cpu(cpu.QUICK if quick else cpu.CpuOptions(), console=console, output=output)
    if chosen.type == "cuda":
        return run_gpu(rig.QUICK if quick else rig.FULL, chosen, console=console, output=output)
    raise InputError(
        f"there is no benchmark for {chosen.type}", hint="use --device cpu or --device cuda"
    )


def run_cpu(
    options: cpu.CpuOptions, *, console: Console, output: Path | None = None
) -> dict[str, Any]:
    """`dmax.benchmark.cpu` with these options."""
    return _gather("cpu", cpu.CPU, asdict(options), cpu.sections(options), console, output)


def run_gpu(
    options: rig.GpuOptions, device: torch.device, *, console: Console, output: Path | None = None
) -> dict[str, Any]:
    """`dmax.benchmark.gpu` with these options, on any device."""
    return _gather("gpu", device, asdict(options), gpu.sections(options, device), console, output)


def _gather(
    theme: str,
    device: torch.device,
    settings: Row,
    sections: Iterable[Section],
    console: Console,
    output: Path | None,
) -> dict[str, Any]:
    """Show the sections as they come and gather them in one record, which is written after each."""
    if output is not None:
        check_writable(output)
        check_ours(output, "benchmark", "settings", "environment")
    record: dict[str, Any] = {
        "benchmark": theme,
        "command": command(sys.argv),
        "environment": environment(device),
    }
    record |= {"settings": settings, "notes": {}}
    console.print(headline(record["environment"]), highlight=False)
    for section in sections:
        show(section, console)
        record[section.name] = list(section.rows)
        record["notes"][section.name] = section.note
        if output is not None:
            write_atomically(output, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return record


def command(arguments: Sequence[str]) -> str:
    """The command line, without the folders of this machine."""
    program = Path(arguments[0]).name
    here = f"{Path.cwd()}/"
    name = f"python bench/{program}" if program.endswith(".py") else program
    return " ".join(
        [name, *(shlex.quote(argument.replace(here, "")) for argument in arguments[1:])]
    )


def headline(record: Row) -> str:
    """Hardware and versions in one line."""
    hardware = record.get("gpu") or f"{record['cpu']}, {record['threads']} threads"
    versions = ", ".join(f"{name} {record[name]}" for name in ("dmax", "torch", "transformers"))
    return f"{hardware}; {versions}; commit {record['commit'] or 'unknown'}"


def result_path(folder: Path, theme: Literal["cpu", "gpu"], device: torch.device) -> Path:
    """THEME_HARDWARE_DATE.json."""
    record = environment(device)
    hardware = record.get("gpu") or f"{record['cpu']} {record['cores']} cores"
    slug = re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")
    return folder / f"{theme}_{slug}_{record['date'][:10]}.json"
