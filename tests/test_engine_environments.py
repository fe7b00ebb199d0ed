"""The tools behind `make test-engines`, without any engine."""

from __future__ import annotations

import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import engine_environments  # noqa: E402
import run_engine_tests  # noqa: E402
from engine_environments import RECIPES, Failed, is_complete, make, steps  # noqa: E402
from run_engine_tests import Count, count, environment  # noqa: E402

REPORT = """<testsuites><testsuite tests="{tests}" failures="{failures}" errors="0"
skipped="{skipped}"/></testsuites>"""


@pytest.mark.parametrize("engine", RECIPES)
def test_an_environment_gets_pytorch_for_cpus_before_and_dmax_after_all_else(
    engine: str, tmp_path: Path
) -> None:
    commands = [" ".join(command) for _, several in steps(engine, tmp_path) for command in several]
    assert "-m venv" in commands[0] and commands[0].endswith(str(tmp_path / engine))
    brings_torch = RECIPES[engine].over is None
    assert ("torch==" in commands[1] and "+cpu" in commands[1]) == brings_torch
    assert f"-e {ROOT}" in commands[-1]
    pip = [command for command in commands if " -m pip " in command]
    assert pip
    assert all(command.startswith(str(tmp_path / engine / "bin" / "python")) for command in pip)


def test_the_versions_of_engines_are_those_of_the_extras() -> None:
    import tomllib

    from packaging.requirements import Requirement

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"][
        "optional-dependencies"
    ]
    for engine, installed in {"vllm": "requirements", "sglang": "alone"}.items():
        pinned = Requirement(getattr(RECIPES[engine], installed)[0])
        (pin,) = pinned.specifier
        assert Requirement(extras[engine][0]).specifier.contains(pin.version)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Environments that take no time; the list holds what they are asked for."""
    asked: list[str] = []

    def steps_of(engine: str, folder: Path) -> list[tuple[str, list[list[str]]]]:
        asked.append(engine)
        create = f"import pathlib; pathlib.Path({str(folder / engine)!r}).mkdir(parents=True)"
        fails = [sys.executable, "-c", "raise SystemExit('no wheel')"]
        return [("create it", [fails, [sys.executable, "-c", create]])]

    monkeypatch.setattr(engine_environments, "steps", steps_of)
    enough = SimpleNamespace(free=10**12)
    monkeypatch.setattr(engine_environments.shutil, "disk_usage", lambda _: enough)
    return asked


def test_an_environment_is_made_once_and_after_the_one_it_stands_on(
    quick: list[str], tmp_path: Path
) -> None:
    deadline = time.monotonic() + 60
    assert not is_complete("sglang", tmp_path)
    make("sglang", tmp_path, deadline)
    assert quick == ["vllm", "sglang"]
    assert is_complete("vllm", tmp_path) and is_complete("sglang", tmp_path)
    (tmp_path / "vllm" / ".made").write_text("another recipe", "utf-8")
    assert not is_complete("vllm", tmp_path)


def test_what_cannot_be_made_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fails = [sys.executable, "-c", "print('first'); raise SystemExit('no wheel')"]
    monkeypatch.setattr(engine_environments, "steps", lambda *_: [("install it", [fails, fails])])
    with pytest.raises(Failed, match=r"^ray: cannot install it: no wheel$"):
        make("ray", tmp_path, time.monotonic() + 60)
    with pytest.raises(Failed, match=r"^ray: cannot install it: no time is left$"):
        make("ray", tmp_path, time.monotonic())
    assert not is_complete("ray", tmp_path)


def test_only_cases_that_ran_and_passed_are_a_success(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    assert count(report) == Count(failed=1), "a process that leaves no report has died"
    report.write_text(REPORT.format(tests=5, failures=1, skipped=2), "utf-8")
    assert count(report) == Count(passed=2, failed=1, skipped=2)
    assert str(count(report)) == "3 run, 2 skipped, 1 FAILED"
    assert Count(passed=3).is_success
    assert not Count().is_success, "nothing ran"
    assert not Count(passed=3, skipped=1).is_success
    assert not Count(passed=3, failed=1).is_success


def test_an_engine_sees_its_stubs_and_nothing_of_the_calling_environment() -> None:
    inherited = {"PYTHONPATH": "elsewhere", "HOME": "here", "OMP_NUM_THREADS": "2"}
    variables = environment("vllm", Path("reference.json"), inherited)
    assert [Path(part).name for part in variables["PYTHONPATH"].split(":")] == ["triton"]
    assert Path(variables["PYTHONPATH"], "triton_cpu_stub").is_dir()
    assert variables["HOME"] == "here" and variables["OMP_NUM_THREADS"] == "2"
    assert variables["HF_HUB_OFFLINE"] == "1"


def test_an_environment_that_is_missing_is_not_a_success(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = SimpleNamespace(returncode=0)  # of the reference, which takes half a minute
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    monkeypatch.setattr(sys, "argv", ["run", "ray", "--folder", str(tmp_path)])
    assert run_engine_tests.main() == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("vllm: left out; sglang: left out; ray: 0 run, ")


def test_the_cases_are_left_out_of_the_ordinary_tests() -> None:
    ignore = runpy.run_path(str(ROOT / "tests" / "engines" / "conftest.py"))
    is_ignored = ignore["pytest_ignore_collect"]
    assert is_ignored(ROOT, SimpleNamespace(rootpath=ROOT))
    assert is_ignored(ROOT, SimpleNamespace(rootpath=ROOT / "tests" / "engines")) is None


def test_a_full_disk_is_said_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = SimpleNamespace(free=10**9)
    monkeypatch.setattr(engine_environments.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(Failed, match=r"^vllm: takes 3\.5 GB of disk, and 1\.0 GB are free$"):
        make("vllm", tmp_path, time.monotonic() + 60)
    assert list(tmp_path.iterdir()) == []
