"""The README and docs/ are true: Python runs, commands, links and named tests exist."""

from __future__ import annotations

import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer
from typer.main import get_command

from dmax.cli import app
from dmax.tiny import BUNDLED, bundled

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
USAGE_ERROR: Any = typer.BadParameter.__base__
NOT_RUN = (
    "<!-- not run"  # in the line above a block that needs the network or a GPU, with the reason
)
HAS_MODELS = all(
    (folder := bundled(name)) and (folder / "config.json").is_file() for name in BUNDLED
)

needs_readme = pytest.mark.skipif(not README.is_file(), reason="there is no README.md yet")
needs_models = pytest.mark.skipif(not HAS_MODELS, reason="the bundled models are not built yet")


def blocks(text: str) -> Iterator[tuple[int, str, str, bool]]:
    """First line, language and content of every fenced block, and whether it is to be run."""
    for found in re.finditer(
        r"^```(\w*)[^\n]*\n(.*?)^```\s*$", text, flags=re.MULTILINE | re.DOTALL
    ):
        above = text[: found.start()].rstrip().rpartition("\n")[2]
        yield (
            text[: found.start(2)].count("\n") + 1,
            found[1],
            found[2],
            not above.startswith(NOT_RUN),
        )


def commands(text: str) -> Iterator[tuple[int, list[str]]]:
    """Line and words of every `dmax …` in a block, pipes and what follows them left out."""
    for first, language, content, _ in blocks(text):
        if language == "python":
            continue
        joined = re.sub(
            r"\\\n", lambda _: "\0", content
        )  # a command over several lines keeps its number
        number = first
        for line in joined.split("\n"):
            bare = line.replace("\0", " ").strip().removeprefix("$ ")
            if bare.startswith("dmax "):
                words = shlex.split(bare, comments=True)
                end = next(
                    (
                        index
                        for index, word in enumerate(words)
                        if word in {"|", ">", "&&", ";", "<"}
                    ),
                    None,
                )
                yield number, words[1:end]
            number += 1 + line.count("\0")


def complaint(words: list[str]) -> str | None:
    """Why a command line cannot be right, or None."""
    known = get_command(app).commands  # type: ignore[attr-defined]
    if words[0].startswith("--"):
        return None if words[0] == "--help" else f"no flag {words[0]}"
    if words[0] not in known:
        return f"no command {words[0]}"
    if words[0] == "lm_eval":
        return None  # its flags are those of another program
    try:
        known[words[0]].make_context(words[0], words[1:])
    except typer.Exit:
        return None  # it is asked for its help
    except USAGE_ERROR as error:
        return f"{words[0]}: {error.format_message()}"
    return None


def test_blocks_and_commands_are_found() -> None:
    text = (
        "a\n```python\nx = 1\n```\n\n<!-- not run: a GPU -->\n```python\ny\n```\n"
        "```bash\n$ dmax eval \\\n  --bad 3 | tee x --no\ndmax chat  # --comment\n"
        "pip install dmax\n```\n"
    )
    assert [(line, language, run) for line, language, _, run in blocks(text)] == [
        (3, "python", True),
        (8, "python", False),
        (11, "bash", True),
    ]
    assert list(commands(text)) == [(11, ["eval", "--bad", "3"]), (13, ["chat"])]
    assert "--bad" in str(complaint(["eval", "--bad", "3"]))
    assert "--output" in str(complaint(["sweep", "--model", "tiny-dmax"]))
    assert "--limit" in str(complaint(["eval", "--limit", "many"]))
    assert complaint(["eval", "--help"]) is None
    assert complaint(["chatt"]) == "no command chatt"
    assert complaint(["generate", "-m", "tiny-dmax", "--threshold=0.5", "a question"]) is None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shown_commands_can_be_read(page: Path) -> None:
    found = list(commands(page.read_text(encoding="utf-8")))
    wrong = [
        f"{page.name}:{line}: {reason}" for line, words in found if (reason := complaint(words))
    ]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shown_targets_and_scripts_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"(?:^|`)make ([a-z]+)", text, flags=re.MULTILINE)
    assert set(targets) <= set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    scripts = re.findall(r"(?:^|`)(?:\S*/)?python ([\w/]+\.py)", text, flags=re.MULTILINE)
    assert [script for script in scripts if not (ROOT / script).is_file()] == []


@needs_readme
@needs_models
def test_python_blocks_run_and_print_what_is_written_below(
    capsys: pytest.CaptureFixture[str],
) -> None:
    namespace: dict[str, object] = {}  # one for all: later blocks go on from earlier ones
    for line, language, content, is_run in blocks(README.read_text(encoding="utf-8")):
        if language == "python" and is_run:
            code = compile("\n" * (line - 1) + content, str(README), "exec")
            exec(code, namespace)
            printed = capsys.readouterr().out
            assert [
                said for said in re.findall(r"^# (.*)", content, re.M) if said not in printed
            ] == []


@needs_models
def test_the_picture_of_a_block_shows_what_the_model_does() -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "draw_block.py"))
    drawn = tool["draw"](tool["trajectory"](tool["QUESTION"], tool["PARAMS"]))
    kept = (ROOT / "docs" / "images" / "block.svg").read_text(encoding="utf-8")

    def words(picture: str) -> list[str]:
        return list(ElementTree.fromstring(picture).itertext())

    assert words(drawn) == words(kept)
    assert sum("revised" in word for word in words(drawn)) >= 2, "the picture shows no revision"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_map_of_the_paper_names_tests_that_exist_and_leaves_no_choice_out() -> None:
    text = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    sources = "\n".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")
    )
    existing = set(re.findall(r"^def (test_\w+)", sources, flags=re.MULTILINE))
    index = (ROOT / "docs" / "paper_index.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(test_\w+)`", text + index)) <= existing
    tested = {
        int(number)
        for name in existing
        for number in re.findall(r"_a(\d+)(?=_)", f"_{name.removeprefix('test_')}")
    }
    assert tested >= set(range(1, 23))
    assert [int(row) for row in re.findall(r"^\| A(\d+) \|", text, flags=re.MULTILINE)] == list(
        range(1, 23)
    )
