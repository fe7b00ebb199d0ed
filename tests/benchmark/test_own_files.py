"""Scripts of bench/ that write pages leave alone what stands in their place and is not theirs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import check_page

from dmax.errors import InputError

pytest.importorskip("matplotlib")
RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("beyond", "beyond.md"),
        ("beyond", "beyond.json"),
        ("methods", "methods.md"),
        ("methods", "methods.json"),
        ("noise", "noise.md"),
        ("noise", "noise.json"),
        ("noise", "noise_tokens.json"),
        ("paper", "README.md"),
        ("paper", "measures.json"),
    ],
)
def test_what_is_not_ours_stays(
    script: str,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refusal: Callable[..., str],
) -> None:
    monkeypatch.setattr("paper.check_retrained", lambda: None)
    mine = '{"mine": "keep me"}' if name.endswith(".json") else "# My own notes\n"
    (tmp_path / name).write_text(mine)
    said = refusal(script, "--output", str(tmp_path))
    assert f"{tmp_path / name} exists and was not written by this command" in said
    assert "choose another output" in said
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == mine


def test_our_pages_are_known_by_their_titles(tmp_path: Path) -> None:
    text = (RESULTS / "methods.md").read_text()
    check_page(tmp_path / "new.md", text)
    (tmp_path / "old.md").write_text(text.partition("\n")[0] + "\n\nOf another day.\n")
    check_page(tmp_path / "old.md", text)
    with pytest.raises(InputError, match="was not written by this command"):
        check_page(tmp_path, text)
