"""Small changes to valid input: of bytes, of what JSON and YAML hold, and of files in a folder."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hostile
from hypothesis import strategies as st

Place = tuple[Any, ...]
"""Keys and indices that lead from the top of a tree to a value in it."""


@dataclass(frozen=True)
class Mutation:
    """A change with a name; it makes new input of valid input and leaves the latter as it is."""

    name: str
    apply: Callable[[Any], Any] = field(repr=False)


# --- trees ----------------------------------------------------------------------------------------


def places(tree: Any, above: Place = ()) -> Iterator[Place]:
    """The place of every value in a tree, the top left out."""
    keys: Any = (
        tree if isinstance(tree, dict) else range(len(tree) if isinstance(tree, list) else 0)
    )
    for key in keys:
        yield (*above, key)
        yield from places(tree[key], (*above, key))


def drop(place: Place) -> Mutation:
    """Leave a value out."""
    return Mutation(
        f"drop {_shown(place)}", lambda tree: _edited(tree, place, lambda at, key: at.pop(key))
    )


def put(place: Place, value: Any) -> Mutation:
    """Put a value in the place of another one."""

    def change(at: Any, key: Any) -> None:
        if not isinstance(at, str):  # an earlier change may have put a text there
            at[key] = value

    return Mutation(f"{_shown(place)} = {value!r:.60}", lambda tree: _edited(tree, place, change))


def rename(place: Place, name: str) -> Mutation:
    """Give a value of a mapping another key."""

    def change(at: Any, key: Any) -> None:
        if isinstance(at, dict):
            at[name] = at.pop(key)

    return Mutation(
        f"rename {_shown(place)} to {name!r:.40}", lambda tree: _edited(tree, place, change)
    )


def wrap(place: Place, times: int) -> Mutation:
    """Put a value into so many lists."""

    def change(at: Any, key: Any) -> None:
        if not isinstance(at, str):
            at[key] = hostile.nested(times, at[key])

    return Mutation(
        f"wrap {_shown(place)} {times} times", lambda tree: _edited(tree, place, change)
    )


def tree_mutations(tree: Any) -> st.SearchStrategy[Mutation]:
    """One change of a tree."""
    place = st.sampled_from(list(places(tree)))
    names = st.sampled_from(hostile.TEXTS) | st.sampled_from(
        [str(each[-1]) for each in places(tree)]
    )
    return st.one_of(
        st.builds(put, place, hostile.json_values()),
        st.builds(put, place, hostile.plain()),
        st.builds(drop, place),
        st.builds(rename, place, names),
        st.builds(wrap, place, st.sampled_from((1, 2, 30))),
    )


def _edited(tree: Any, place: Place, change: Callable[[Any, Any], Any]) -> Any:
    """A copy of a tree, changed in one place; as it was if earlier changes took the place away."""
    result = copy.deepcopy(tree)
    at = result
    try:
        for key in place[:-1]:
            at = at[key]
        at[place[-1]]
    except (LookupError, TypeError):
        return result
    change(at, place[-1])
    return result


def _shown(place: Place) -> str:
    return ".".join(map(str, place))


# --- bytes ----------------------------------------------------------------------------------------


def flip(share: float, bit: int) -> Mutation:
    """Change one bit, that far into the file."""

    def change(data: bytes) -> bytes:
        at = int(share * (len(data) - 1))
        return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :] if data else data

    return Mutation(f"flip bit {bit} at {share:.3f}", change)


def cut(share: float) -> Mutation:
    """Keep only the beginning."""
    return Mutation(f"cut at {share:.3f}", lambda data: data[: int(share * len(data))])


def insert(share: float, added: bytes) -> Mutation:
    """Put bytes in between."""

    def change(data: bytes) -> bytes:
        at = int(share * len(data))
        return data[:at] + added + data[at:]

    return Mutation(f"insert {added[:20]!r} at {share:.3f}", change)


def replace(content: bytes) -> Mutation:
    """Something else altogether."""
    return Mutation(f"replace by {content[:40]!r} ({len(content)} bytes)", lambda _: content)


WHOLES = (
    b"",
    b"\n",
    b"\x00" * 64,
    b"null",
    b"[]",
    b"{}",
    b"0",
    b'"text"',
    b"NaN",
    b"\xff\xfe{\x00}\x00",
    b"\xef\xbb\xbf{}",
    b"[" * 200_000,
    b'{"a":' * 200_000,
    b"9" * 10_000,
    b"PK\x03\x04",
    b"<!DOCTYPE html>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    b"x" * 2**20,
)
PIECES = (
    b"\x00",
    b"\xff",
    b"\r",
    b"\n\n",
    b'"',
    b"}",
    b"{",
    b"[",
    b",",
    b"\\ud800",
    b"\xed\xa0\x80",
    b"1e999",
)


def byte_mutations() -> st.SearchStrategy[Mutation]:
    """One change of a file's bytes."""
    share = st.floats(0, 1)
    return st.one_of(
        st.builds(flip, share, st.integers(0, 7)),
        st.builds(cut, share),
        st.builds(insert, share, st.sampled_from(PIECES) | st.binary(max_size=8)),
        st.sampled_from(WHOLES).map(replace),
    )


def json_mutations(tree: Any) -> st.SearchStrategy[Mutation]:
    """One change of a JSON file's bytes, by what it holds or by how it is written."""
    return st.one_of(
        tree_mutations(tree).map(_of_json), tree_mutations(tree).map(_of_json), byte_mutations()
    )


def _of_json(mutation: Mutation) -> Mutation:
    def change(data: bytes) -> bytes:
        return write_json(mutation.apply(json.loads(data)))

    return Mutation(mutation.name, change)


def write_json(tree: Any) -> bytes:
    """JSON with Python's NaN and infinities, as careless programs write it."""
    return json.dumps(tree).encode()


# --- files ----------------------------------------------------------------------------------------


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "file").write_text("text")


def _link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


STAND_INS: dict[str, Callable[[Path], None]] = {
    "nothing": lambda path: None,
    "a folder": _folder,
    "a pipe": lambda path: os.mkfifo(path),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": _link("missing"),
    "a link to zeros": _link("/dev/zero"),
    "a link to null": _link("/dev/null"),
    "a link to its folder": _link("."),
}


def in_place_of(path: Path, what: str) -> None:
    """Put something that is no plain file in the place of one."""
    _remove(path)
    STAND_INS[what](path)
