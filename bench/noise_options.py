"""The command line of `bench/noise.py`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any

import side_by_side
from command_line import amount, check_plots, count, seed
from noise_kinds import NOISES
from noise_plan import BUNDLED, DESIGNS, LIMIT, Design


def parse(description: str) -> argparse.Namespace:
    """The options as given; what they do not say is the design's."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--study", choices=DESIGNS, default=BUNDLED, help="a page and its records")
    parser.add_argument("--recipe", type=Path, help="OPUT on the base, in place of the design's")
    parser.add_argument("--only", nargs="+", choices=NOISES, dest="noises", metavar="NOISE")
    parser.add_argument("--rates", nargs="+", type=amount)
    parser.add_argument("--seeds", nargs="+", type=seed)
    parser.add_argument("--steps", nargs="+", type=count)
    parser.add_argument("--limit", type=count, default=LIMIT, help="problems of a point")
    parser.add_argument("--held-out", type=count, help="examples to look at")
    parser.add_argument("--minutes", type=amount, default=inf, help="begin no stage later")
    parser.add_argument("--runs", type=Path, help="folder of the training runs")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--page", action="store_true", help="measure nothing, write the whole page")
    parser.add_argument("--toy", action="store_true", help="one step, one problem")
    side_by_side.add_options(parser)
    options = parser.parse_args()
    side_by_side.check_options(parser, options)
    check_plots(parser)
    options.design = DESIGNS[options.study]
    if options.toy:
        options.design, options.limit = options.design.at_toy_length(), 1
    for name in ("noises", "rates", "steps"):
        check_planned(parser, options.design, name, getattr(options, name) or ())
    given = vars(options)
    for name in ("recipe", "noises", "rates", "seeds", "steps", "held_out"):
        if given[name] is None:
            given[name] = getattr(options.design, name)
        elif isinstance(given[name], list):
            given[name] = list(dict.fromkeys(given[name]))  # each once
    options.runs = options.runs or Path("runs", options.study)
    return options


def check_planned(
    parser: argparse.ArgumentParser, design: Design, name: str, chosen: Sequence[Any]
) -> None:
    """End the script if the design does not have all that was chosen of its noises or numbers."""
    planned = getattr(design, name)
    unplanned = [value for value in chosen if value not in planned]
    if unplanned:
        others = ", ".join(map(str, unplanned))
        parser.error(f"the study has the {name} {', '.join(map(str, planned))}, got {others}")
