"""Speed on a GPU: forwards and steps of LLaDA-2.0-mini at full size, against the time of reading its weights.

    python bench/gpu.py
    python bench/gpu.py --device cpu --scale tiny    # only shows that everything runs

Weights are random and drawn on the device. The last line on stdout is the JSON record, which also
goes to bench/results/ unless the scale is tiny.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from dmax.benchmark import rig
from dmax.benchmark.report import console
from dmax.benchmark.run import result_path, run_gpu
from dmax.environment import select_device
from dmax.errors import InputError

OPTIONS = {"full": rig.FULL, "quick": rig.QUICK, "tiny": rig.SMALL}


def main() -> None:
    """Measure, show, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--scale", choices=OPTIONS, default="full", help="quick: fewer rows; tiny: a small model"
    )
    parser.add_argument(
        "--distinct", type=float, help="experts that a block hits in a layer, on average"
    )
    parser.add_argument("--context", type=int, help="positions at the end of a completion")
    parser.add_argument("--contexts", type=int, nargs="+")
    parser.add_argument("--batch-sizes", type=int, nargs="+")
    parser.add_argument("--steps", type=int, help="denoising steps of a block")
    parser.add_argument("--repeats", type=int, help="completions timed")
    parser.add_argument("--output", type=Path)
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    scale = given.pop("scale")
    output = given.pop("output", None)
    lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    try:
        device = select_device(given.pop("device"))[0]
        options = replace(OPTIONS[scale], **given | lists)
    except InputError as error:
        parser.error(str(error))
    if output is None and scale != "tiny":
        output = result_path(Path("bench/results"), "gpu", device)
    record = run_gpu(options, device, console=console(), output=output)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
