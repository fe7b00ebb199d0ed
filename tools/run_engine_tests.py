"""Run the cases of vLLM, SGLang and Ray, each in its environment; `make test-engines` calls this.

    python tools/run_engine_tests.py                # all engines
    python tools/run_engine_tests.py vllm           # one engine
    python tools/run_engine_tests.py vllm --first   # its first SPD case, as in CI
    python tools/run_engine_tests.py vllm --only http  # files with this in their name

`dmax.LLM` decodes the reference first, in the environment that runs this script. Then every file
`test_<engine>_*.py` runs in a process of its own, since an engine takes half a minute to start. The
last line counts the cases that ran and that were skipped. Only cases that ran and passed are a
success: the exit code is 1 if one failed or was skipped, or if a process ended before its time.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from engine_environments import FOLDER, RECIPES, ROOT, is_complete, python_of

CASES = ROOT / "tests" / "engines"
STUBS = {"vllm": ("triton",), "sglang": ("sglang",), "ray": ()}
"""Folders under `stubs` that an engine needs on a CPU."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
SETTINGS: dict[str, dict[str, str]] = {
    "vllm": {
        "DO_NOT_TRACK": "1",
        "TRITON_INTERPRET": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine stands in the process of the cases
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",  # on a GPU it is the default
    },
    "sglang": {"SGLANG_USE_CPU_ENGINE": "1"},
    "ray": {"RAY_USAGE_STATS_ENABLED": "0"},
}
LIMIT = 3600
"""Seconds that a file of cases may take."""


@dataclass(frozen=True, slots=True)
class Count:
    """Cases of a file or of an engine."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(
            self.passed + other.passed, self.failed + other.failed, self.skipped + other.skipped
        )

    @property
    def is_success(self) -> bool:
        """Whether something ran, and all of it passed."""
        return self.passed > 0 and not self.failed and not self.skipped

    def __str__(self) -> str:
        failed = f", {self.failed} FAILED" if self.failed else ""
        return f"{self.passed + self.failed} run, {self.skipped} skipped{failed}"


def environment(engine: str, reference: Path, inherited: Mapping[str, str]) -> dict[str, str]:
    """The variables that an engine's processes see."""
    stubs = [str(CASES / "stubs" / name) for name in STUBS[engine]]
    dropped = ("PYTHONPATH", "VIRTUAL_ENV")  # of the environment that runs this script
    kept = {name: value for name, value in inherited.items() if name not in dropped}
    given = {"PYTHONPATH": os.pathsep.join(stubs), "DMAX_REFERENCE": str(reference)}
    threads = {"OMP_NUM_THREADS": inherited.get("OMP_NUM_THREADS", "1")}
    return kept | OFFLINE | threads | SETTINGS[engine] | given


def count(report: Path) -> Count:
    """What a JUnit report says; a process that left none has failed."""
    if not report.is_file():
        return Count(failed=1)
    (suite,) = ElementTree.parse(report).getroot()
    total, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    return Count(max(total - failed - skipped, 0), failed, skipped)


def run_files(
    files: Sequence[Path], python: Path, variables: Mapping[str, str], more: Sequence[str]
) -> Count:
    """Run the cases of some files in one process, which is ended with its workers at `LIMIT`."""
    report = Path(variables["DMAX_REFERENCE"]).with_name(f"{files[0].stem}.xml")
    report.unlink(missing_ok=True)
    options = ["-v", "--no-header", "-c", str(CASES / "pytest.ini"), f"--junitxml={report}", *more]
    command = [str(python), "-m", "pytest", *options, *map(str, files)]
    process = subprocess.Popen(command, env=dict(variables), cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        print(f"error: {files[0].name} took more than {LIMIT} s", file=sys.stderr)
        code = -signal.SIGKILL
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    found = count(report)
    has_died = code not in (0, 1)
    return found + Count(failed=1) if has_died and not found.failed else found


def run_engine(
    engine: str,
    groups: Sequence[Sequence[Path]],
    folder: Path,
    reference: Path,
    more: Sequence[str],
) -> Count:
    """Run groups of files of one engine, each in a process."""
    if not is_complete(engine, folder):
        print(f"error: make {engine}'s environment first: make test-engines", file=sys.stderr)
        return Count(skipped=sum(map(len, groups)))
    variables = environment(engine, reference, os.environ)
    total = Count()
    for group in groups:
        print(f"== {', '.join(file.name for file in group)}", flush=True)
        total += run_files(group, python_of(engine, folder), variables, more)
    return total


def main() -> int:
    """Run the cases and count them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engines", nargs="*", choices=[*RECIPES, []], help="all by default")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the environments")
    parser.add_argument("--first", action="store_true", help="one SPD case of each engine")
    parser.add_argument("--only", default="", help="a part of a file's name")
    arguments = parser.parse_args()

    arguments.folder.mkdir(parents=True, exist_ok=True)
    reference = (arguments.folder / "reference.json").resolve()
    subprocess.run([sys.executable, str(CASES / "reference.py"), str(reference)], check=True)
    chosen = arguments.engines or list(RECIPES)
    counts: dict[str, Count] = {}
    for engine in chosen:
        files = sorted(CASES.glob(f"test_{engine}_*.py"))
        groups = [[file] for file in files if arguments.only in file.name]
        groups = [sum(groups, [])] if arguments.first else groups
        more = ["-m", "first"] if arguments.first else []
        counts[engine] = run_engine(engine, groups, arguments.folder, reference, more)
    said = [f"{engine}: {counts.get(engine, 'left out')}" for engine in RECIPES]
    print("; ".join(said))
    return 0 if all(found.is_success for found in counts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
