"""Speed on a CPU: SPD, threshold and one token a forward; engine and hub loop; batch sizes; a dense backbone's floor.

    python bench/cpu.py
    python bench/cpu.py --quick --dtypes float32

The last line on stdout is the JSON record, which also goes to bench/results/.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from transformers.utils import logging

from dmax.benchmark import cpu
from dmax.benchmark.report import console
from dmax.benchmark.run import result_path, run_cpu
from dmax.errors import InputError


def main() -> None:
    """Measure, show, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="under a minute, for a first impression"
    )
    parser.add_argument("--limit", type=int, help="problems at batch 1")
    parser.add_argument("--batch-limit", type=int, help="problems at every batch size")
    parser.add_argument("--repeats", type=int, help="rounds behind the one that warms up")
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="1 among them")
    parser.add_argument(
        "--dtypes", nargs="+", help="float32, bfloat16; methods are compared in the first"
    )
    parser.add_argument(
        "--base-threshold", type=float, help="of tiny-base: the lowest that keeps its accuracy"
    )
    parser.add_argument("--best-threshold", type=float, help="of tiny-dmax, besides 0.5")
    parser.add_argument("--seed", type=int, help="of the problems")
    parser.add_argument(
        "--output", type=Path, default=result_path(Path("bench/results"), "cpu", cpu.CPU)
    )
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    quick = given.pop("quick")
    output = given.pop("output")
    lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    try:
        options = replace(cpu.QUICK if quick else cpu.CpuOptions(), **given | lists)
    except InputError as error:
        parser.error(str(error))
    logging.disable_progress_bar()
    record = run_cpu(options, console=console(), output=output)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
