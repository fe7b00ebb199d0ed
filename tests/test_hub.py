"""From names to folders: typos, no network, a network that answers nothing, and what was kept."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from dmax.errors import InputError
from dmax.hub import REACH_SECONDS, find_folder, is_reachable


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the hub's client knows."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the hub's client is asked for; it has nothing."""
    calls: list[dict[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        calls.append({"name": name, **options})
        raise OSError("nothing here\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def refusal(name: Any) -> InputError:
    with pytest.raises(InputError) as error:
        find_folder(name)
    assert "\n" not in error.value.message
    assert len(error.value.message) < 350
    return error.value


@pytest.mark.parametrize(
    ("name", "meant"),
    [("tiny-dmx", "tiny-dmax"), ("tinybase", "tiny-base"), ("runs/tiny-opt", "runs/tiny-oput")],
)
def test_a_typo_is_told_what_was_meant(
    name: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "tiny-oput").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert refusal(name).hint == f"did you mean `{meant}`?"
    assert refusal(tmp_path / "rums").hint == f"did you mean `{tmp_path / 'runs'}`?"


@pytest.mark.parametrize(
    "name",
    ["x" * 10_000, "a\x00b", "\ud800", "a\nb", "no//such", "~no-such-user/a", "a b"],
)
def test_odd_names_get_one_short_line(name: str, asked: list[dict[str, Any]]) -> None:
    assert "is neither bundled" in refusal(name).message
    assert asked == []  # no hub id looks like that


@pytest.mark.parametrize("name", [None, 3, b"a", ["a"]])
def test_what_is_no_name_is_refused(name: Any) -> None:
    refusal(name)


@pytest.mark.parametrize("make", [Path.touch, os.mkfifo, lambda path: path.symlink_to(path)])
def test_what_is_no_folder_is_never_opened(
    make: Callable[[Path], None], tmp_path: Path, asked: list[dict[str, Any]]
) -> None:
    make(tmp_path / "model")
    assert "is not a folder" in refusal(tmp_path / "model").message
    assert "is not a folder" in refusal("/dev/zero").message
    assert asked == []


# ---- the network ---------------------------------------------------------------------------------


@pytest.fixture
def listening() -> Any:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_an_open_port_is_reachable_and_a_closed_one_is_not(listening: int) -> None:
    assert is_reachable(f"https://127.0.0.1:{listening}")
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    assert not is_reachable(f"https://127.0.0.1:{closed}", seconds=60)  # refused at once


def test_a_proxy_is_what_has_to_be_reached(listening: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmax.hub.proxy_bypass", lambda host: False)
    monkeypatch.setattr("dmax.hub.getproxies", lambda: {"https": f"http://127.0.0.1:{listening}"})
    assert is_reachable("https://no.such.host.invalid")
    monkeypatch.setattr("dmax.hub.getproxies", lambda: {"https": f"127.0.0.1:{listening}"})
    assert is_reachable("https://no.such.host.invalid")


def test_a_network_that_answers_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, release = threading.Event(), threading.Event()

    def silent(*_: Any, **__: Any) -> list[Any]:
        asked.set()
        release.wait()
        return []

    monkeypatch.setattr("socket.getaddrinfo", silent)
    assert not is_reachable("https://no.such.host.invalid", seconds=0.1)  # while nobody answers
    assert asked.wait(60)
    release.set()
    assert REACH_SECONDS <= 2


@pytest.mark.parametrize("reached", [True, False])
def test_the_client_is_asked_for_what_it_kept_if_there_is_no_network(
    reached: bool, online: None, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dmax.hub.is_reachable", lambda address: reached)
    assert refusal("someone/model").hint == "nothing here"
    assert [call["local_files_only"] for call in asked] == [not reached]


def test_offline_the_network_is_not_tried(
    asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("tried the network"))
    refusal("someone/model")
    assert [call["local_files_only"] for call in asked] == [True]


def test_a_revision_that_was_kept_works_without_a_network(
    online: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0" * 40
    repository = tmp_path / "models--someone--model"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("dmax.hub.is_reachable", lambda address: False)
    assert find_folder("someone/model") == snapshot
