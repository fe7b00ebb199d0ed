"""`dmax serve --engine`: the command that it becomes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_boundary import ENVIRONMENT, command
from test_cli import Dmax, assert_refused, dmax_fixture  # noqa: F401  (a fixture)

from dmax.errors import InputError
from dmax.serve.engines import Command, command_for
from dmax.tiny import bundled

TELLS = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"
PLAIN: dict[str, Any] = dict(
    host="127.0.0.1",
    port=8000,
    dtype="auto",
    max_batch_size=None,
    max_length=None,
    keys=(),
    others=(),
)


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with programs that stand for vLLM's and SGLang's, and say how they were called."""
    vllm = tmp_path / "vllm"
    vllm.write_text(f"#!{sys.executable}\n{TELLS}\n")
    vllm.chmod(0o755)
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").write_text("")
    (tmp_path / "sglang" / "launch_server.py").write_text(TELLS)
    info = tmp_path / "sglang-0.5.23.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.23\n")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def serve(engines: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """What `dmax serve WORDS` comes to."""
    path = os.pathsep.join([str(engines), ENVIRONMENT["PYTHONPATH"]])
    environment = ENVIRONMENT | {"PYTHONPATH": path, "PATH": os.environ["PATH"]} | variables
    environment = {name: value for name, value in environment.items() if value}
    return subprocess.run(
        command("serve", *words), env=environment, capture_output=True, text=True, check=False
    )


def test_vllm_is_started_with_the_model_and_what_stands_after_the_dashes(engines: Path) -> None:
    words = "--engine vllm --model some/model --port 8123 --max-length 512 -- -tp 2 --x y"
    done = serve(engines, *words.split(), DMAX_API_KEY="my-key")
    assert done.returncode == 0, done.stderr
    called, environment = json.loads(done.stdout)
    assert called == (
        "serve some/model --host 127.0.0.1 --port 8123 --dtype auto --max-model-len 512 -tp 2 --x y"
    ).split(" ")
    assert environment["VLLM_API_KEY"] == "my-key"


def test_sglang_decodes_as_many_at_once_as_dmax_does(engines: Path) -> None:
    done = serve(engines, "--engine", "sglang", "--", "--tp", "2")
    assert done.returncode == 0, done.stderr
    called, _ = json.loads(done.stdout)
    path = str(bundled("tiny-dmax"))
    assert called == (
        f"--model-path {path} --host 127.0.0.1 --port 8000 --dtype auto "
        "--served-model-name tiny-dmax --max-running-requests 16 --tp 2"
    ).split(" ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--engine vllm --log-json", "vLLM has no `--log-json`"),
        ("--engine vllm --max-queue 3", "vLLM has no `--max-queue`"),
        ("--engine sglang --cors-origin *", "SGLang has no `--cors-origin`"),
        ("--engine vllm --model a --model b", "vLLM serves one model, and there are 2"),
        ("--engine vlm", "there is no engine 'vlm'"),
        ("-- --tensor-parallel-size 2", "`dmax serve` takes options only"),
        ("tiny-dmax", "`dmax serve` takes options only, got 'tiny-dmax'"),
    ],
)
def test_what_does_not_go_together_is_named(dmax: Dmax, words: str, said: str) -> None:
    assert_refused(dmax("serve", *words.split()), said)


def test_keys_never_stand_on_a_command_line(engines: Path) -> None:
    started = command_for("vllm", "a", **PLAIN | {"keys": ("my-key",)})
    assert "my-key" not in f"{started.words} {started!r}"
    with pytest.raises(InputError, match="one key") as several:
        command_for("vllm", "a", **PLAIN | {"keys": ("my-key", "my-other")})
    with pytest.raises(InputError, match="on the command line only") as sglang:
        command_for("sglang", "a", **PLAIN | {"keys": ("my-key",)})
    assert "my-" not in f"{several.value} {sglang.value}"


@pytest.mark.parametrize(("engine", "shown"), [("vllm", "vLLM"), ("sglang", "SGLang")])
def test_where_an_engine_is_missing_it_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: str, shown: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=f"{shown} is not installed here") as info:
        command_for(engine, "a", **PLAIN)
    assert f"[{engine}]" in str(info.value) or "pip install" in str(info.value)


def test_a_release_that_the_plugin_does_not_know_is_not_started(engines: Path) -> None:
    metadata = engines / "sglang-0.5.23.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("0.5.23", "9.9"))
    with pytest.raises(InputError, match="dmax was run with sglang 0.5.23, and this is 9.9"):
        command_for("sglang", "a", **PLAIN)


def test_a_program_that_is_gone_is_no_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError):
        Command(("/no/such/program",)).start()


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_model_whose_predictions_stand_one_earlier_is_refused(
    engine: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "shift": true}')
    with pytest.raises(InputError, match="a token is predicted by the position before it"):
        command_for(engine, str(tmp_path), **PLAIN)
