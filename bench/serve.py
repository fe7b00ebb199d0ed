"""`dmax serve` under load and under attack, and what HTTP costs; loopback only.

    python bench/serve.py --output bench/results/serve_cpu.json    # everything; half an hour
    python bench/serve.py --only speed --output bench/results/serve_cpu.json
    python bench/serve.py --quick --check                          # each row in short, for CI

`--output` keeps the rows that are not measured. `--check` ends with 1 if a row does not hold.
`--markdown` prints the table of a record, for docs/serving.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import prose
import torch
from serving import faults, harness, hostile, load, speed
from serving.endings import endings
from serving.row import FULL, QUICK, Result, Sizes

from dmax.benchmark.report import Table, console, figure, show
from dmax.benchmark.run import command
from dmax.environment import environment
from dmax.files import write_atomically

PACKAGES = ("fastapi", "starlette", "uvicorn", "pydantic", "schemathesis", "hypothesis", "lm-eval")
Figures = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table.

    Attributes:
        what: is done.
        must: what must hold.
        run: does it.
        say: what came of it, in a few words.
    """

    what: str
    must: str
    run: Callable[[Sizes], Coroutine[Any, Any, Result]]
    say: Callable[[Figures], str]


def _mixed(found: Figures) -> str:
    return (
        f"{found['equal_to_alone']:,}/{found['requests']:,} equal, {found['tokens']:,} tokens, "
        f"{found['distinct_answers']:,} distinct answers, {len(found['strategies'])} strategies"
    )


def _disconnects(found: Figures) -> str:
    return (
        f"{found['resident_mib_before']:.1f} MiB before, {found['resident_mib_after']:.1f} after; "
        f"open files {found['open_files_before']} and {found['open_files_after']}; "
        f"running {found['running_after']}, waiting {found['waiting_after']}"
    )


def _others(found: Figures) -> str:
    return (
        f"others got {found['answers_to_others_meanwhile']:,} answers meanwhile, "
        f"at most {found['longest_wait_of_others']:.1f} s each"
    )


def _api(found: Figures) -> str:
    return f"{found['cases']:,} cases, {found['failures']} failures; {_others(found)}"


def _bodies(found: Figures) -> str:
    statuses = ", ".join(f"{num:,} × {status}" for status, num in found["statuses"].items())
    return f"{found['bodies']:,} bodies: {statuses}; {_others(found)}"


def _bytes(found: Figures) -> str:
    outcomes = ", ".join(f"{num} × {status}" for status, num in found["outcomes"].items())
    return f"{found['tries']} tries: {outcomes}; {_others(found)}"


def _keys(found: Figures) -> str:
    return (
        f"{found['refused']:,}/{found['wrong']:,} wrong ones got 401, all {found['right']} right "
        f"ones passed, {found['keys_in_the_log']} stand in the log"
    )


def _broken(found: Figures) -> str:
    return f"{found['errors']} error bodies; {found['equal_to_alone']}/{found['good']} others equal"


def _disk(found: Figures) -> str:
    return f"{found['equal_to_alone']}/{found['requests']} equal, exit code {found['exit_code']}"


def _endings(found: Figures) -> str:
    outcomes = ", ".join(f"{num} {name}" for name, num in found["outcomes"].items())
    return (
        f"{found['in_flight_at_sigterm']} in flight: {outcomes}; exit code {found['exit_code']} "
        f"after {found['seconds_until_exit']:.1f} of {found['deadline_seconds']:.0f} s; "
        f"{found['files_left']} files left"
    )


def _soak(found: Figures) -> str:
    slope = figure(found["mib_per_minute"], ".3f")
    return (
        f"{found['requests']:,} requests in {found['seconds'] / 60:.1f} minutes, "
        f"{found['resident_mib_median']:.0f} MiB, slope {slope} MiB a minute"
    )


def _harness(found: Figures) -> str:
    counts = found["lm_eval"]
    return (
        f"{counts['correct']}/{counts['total']} right, {counts['generated_tokens']:,} tokens, "
        f"{counts['num_forwards']:,} forwards in both"
    )


def _speed(found: Figures) -> str:
    costs = [
        f"{100 * row['cost']['median']:.1f} % ({100 * row['cost']['low']:.1f} to "
        f"{100 * row['cost']['high']:.1f}) at {row['clients']}"
        for row in found["rows"]
    ]
    return "; ".join(costs) + " clients"


ROWS = {
    "mixed": Row(
        "1,000 streams, 64 at a time: mixed lengths, thresholds, strategies, seeds",
        "0 lost, 0 duplicated or interleaved tokens, every answer that of the request alone",
        load.mixed,
        _mixed,
    ),
    "disconnects": Row(
        "200 clients that disconnect mid-stream at random",
        "slots and memory return to the level before",
        load.disconnects,
        _disconnects,
    ),
    "api": Row(
        "schemathesis on the server's own OpenAPI page",
        "at least 5,000 cases, no failed check, others served meanwhile",
        hostile.api,
        _api,
    ),
    "bodies": Row(
        "bodies that hypothesis makes",
        "answered, or refused in the standard form; no 5xx",
        hostile.odd_bodies,
        _bodies,
    ),
    "bytes": Row(
        "invalid UTF-8, 100 MB, 1e6 digits, 100,000 brackets, broken heads, 200 slow headers",
        "no 5xx, no hang, others served meanwhile",
        hostile.bad_bytes,
        _bytes,
    ),
    "keys": Row("wrong, missing and many keys", "401 every time", faults.keys, _keys),
    "broken": Row(
        "NaN logits of some requests, a strategy that raises",
        "those get an error body, the others their answers",
        faults.broken_requests,
        _broken,
    ),
    "disk": Row("a log on a full disk", "all get their answers", faults.full_disk, _disk),
    "endings": Row(
        "SIGTERM under load; kill -9 and restart",
        "answers or clean errors, exit 0 within the deadline, no port or file left",
        endings,
        _endings,
    ),
    "soak": Row(
        "15 minutes of steady load, the second half watched",
        "flat memory",
        load.soak,
        _soak,
    ),
    "lm_eval": Row(
        "lm_eval, `local-chat-completions`",
        "the counts of `dmax eval`",
        harness.harness,
        _harness,
    ),
    "speed": Row(
        "the server against the engine itself, in turns",
        "HTTP costs at most 10 % of the tokens per second at 8 clients",
        speed.speed,
        _speed,
    ),
}


def run(name: str, sizes: Sizes) -> dict[str, Any]:
    """Do a row; its record."""
    began = time.perf_counter()
    try:
        result = asyncio.run(ROWS[name].run(sizes))
    except Exception as error:  # whatever it is: this row does not hold, and others follow
        result = Result(faults=[f"the row ended with {error!r}"])
    return {
        "holds": not result.faults,
        "faults": result.faults,
        "figures": result.figures,
        "sizes": asdict(sizes),
        "row_seconds": round(time.perf_counter() - began, 1),
        "command": command(sys.argv),
        "environment": environment(),
        "packages": {package: version(package) for package in PACKAGES},
    }


def table(rows: Mapping[str, Any]) -> Table:
    """What came of the rows."""
    cells = [
        {
            "row": name,
            "must hold": ROWS[name].must,
            "holds": "yes" if found["holds"] else "no",
            "measured": ROWS[name].say(found["figures"]) if found["figures"] else "nothing",
        }
        for name, found in rows.items()
    ]
    return Table("serve", "dmax serve under load and faults", list(rows.values()), cells)


def speed_table(found: Figures) -> Table:
    """Speed over HTTP beside that of the engine."""
    cells = [
        {
            "clients": str(row["clients"]),
            "by": name,
            "tokens/s": figure(row[name]["tokens_per_second"], ".0f"),
            "first block p50, ms": figure(row[name]["first_block_ms"]["p50"], ".0f"),
            "p99": figure(row[name]["first_block_ms"]["p99"], ".0f"),
            "per token p50, ms": figure(row[name]["token_ms"]["p50"], ".2f"),
            "p99, ms": figure(row[name]["token_ms"]["p99"], ".2f"),
        }
        for row in found["rows"]
        for name in ("engine", "http")
    ]
    note = f"{found['dtype']}, {found['rounds']} rounds in turns; median, lowest and highest."
    return Table("speed", "tokens per second and waiting", found["rows"], cells, note)


def markdown(record: Mapping[str, Any]) -> str:
    """The table of a record as a page has it."""
    found = {name: record["rows"][name]["figures"] for name in ROWS if name in record["rows"]}
    rows = [
        (ROWS[name].what, ROWS[name].must, ROWS[name].say(figures) if figures else "nothing")
        for name, figures in found.items()
    ]
    tables = [prose.table(("test", "must hold", "measured"), rows)]
    if "speed" in found:
        cells = speed_table(found["speed"]).cells
        tables.append(prose.table(list(cells[0]), [list(each.values()) for each in cells]))
    return "\n\n".join(tables)


def main() -> None:
    """Run the rows, show, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--quick", action="store_true", help="each row in short")
    parser.add_argument("--check", action="store_true", help="end with 1 if a row does not hold")
    parser.add_argument("--seed", type=int, default=FULL.seed, help="of all draws")
    parser.add_argument("--soak-seconds", type=float, help="how long the soak takes")
    parser.add_argument("--soak-dtype", help="of the weights meanwhile")
    parser.add_argument("--output", type=Path, help="JSON file; rows not measured stay in it")
    parser.add_argument("--markdown", type=Path, help="print the table of this record, and end")
    given = parser.parse_args()
    if given.markdown:
        print(markdown(json.loads(given.markdown.read_text("utf-8"))))
        return

    sizes = replace(QUICK if given.quick else FULL, seed=given.seed)
    if given.soak_seconds is not None:
        sizes = replace(sizes, soak_seconds=given.soak_seconds)
    if given.soak_dtype is not None:
        sizes = replace(sizes, soak_dtype=given.soak_dtype)
    record: dict[str, Any] = {"benchmark": "serve", "rows": {}}
    if given.output and given.output.is_file():
        record = json.loads(given.output.read_text("utf-8"))
    target = console(stderr=True)
    torch.set_num_threads(1)  # of this process, which only compares; the server has its own
    measured = {}
    for name in given.only:
        target.print(f"{name}: {ROWS[name].what} ...", highlight=False)
        found = run(name, sizes)
        record["rows"] |= {name: found}
        measured[name] = found
        for fault in found["faults"]:
            target.print(f"  {fault}", style="red", highlight=False, markup=False)
        if given.output:
            text = json.dumps(record, indent=2, ensure_ascii=False)
            write_atomically(given.output, text + "\n")
    show(table(measured), target)
    if "speed" in measured and measured["speed"]["figures"]:
        show(speed_table(measured["speed"]["figures"]), target)
    sys.exit(1 if given.check and not all(row["holds"] for row in measured.values()) else 0)


if __name__ == "__main__":
    main()
