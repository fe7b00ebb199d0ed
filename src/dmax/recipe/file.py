"""A YAML file that knows the line of each of its keys, so that every error says where to look."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from huggingface_hub.errors import StrictDataclassError

from dmax.errors import InputError, did_you_mean, shorten, show
from dmax.files import TO_UTF8

MAX_BYTES = 30_000
MAX_ENTRIES = 2_000
MAX_DEPTH = 20
# All that transformers and accelerate raise for values that do not fit, or need another package.
UNUSABLE = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError),
    *(RuntimeError, TypeError, ValueError),
)
_TAG = "tag:yaml.org,2002:"
KEYS = {f"{_TAG}{kind}" for kind in ("str", "merge")}
PLAIN = {int, float, str, bool, dict, list, type(None)}
VALUES = {f"{_TAG}{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map")}


@dataclass(frozen=True, slots=True)
class RecipeFile:
    """A mapping read from YAML.

    Attributes:
        path: of the file.
        content: the mapping.
        lines: 1-based line of every key, by dotted path.
    """

    path: Path
    content: dict[str, Any] = field(repr=False)
    lines: dict[str, int] = field(repr=False)

    def wrong(self, key: str, message: str, hint: str | None = None) -> InputError:
        """The error to raise for what stands at a dotted key, or at the nearest key above it."""
        while key and key not in self.lines:
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        return InputError(f"{self.path}:{self.lines.get(key, 1)}: {message}", hint)

    @contextmanager
    def at(self, key: str) -> Iterator[None]:
        """Errors from within are of the value at a dotted key."""
        try:
            yield
        except InputError as error:
            raise self.wrong(key, f"in `{key}`, {error.message}", error.hint) from error

    @contextmanager
    def trying(self, section: str, keys: Iterable[str]) -> Iterator[None]:
        """Errors from within are of the first key of a section that their sentence speaks of.

        Those of libraries are caught too: they raise all kinds of errors for values that do not
        fit.
        """
        try:
            yield
        except InputError as error:
            message = f"in `{section}`, {error.message}"
            raise self.wrong(_spoken_of(message, section, keys), message, error.hint) from error
        except (*UNUSABLE, StrictDataclassError) as error:
            key = _spoken_of(str(error), section, keys)
            raise self.wrong(key, f"`{section}` is not usable: {_reason(error)}") from error

    def check_keys(self, prefix: str, section: Any, known: set[str]) -> None:
        """Raise `InputError` unless the value at `prefix` is a mapping of known keys.

        An empty prefix is the whole file.
        """
        if not isinstance(section, dict):
            raise self.wrong(prefix, f"`{prefix}` must be a mapping")
        for key in section:
            if key not in known:
                name = f"{prefix}.{key}" if prefix else key
                raise self.wrong(
                    name, f"unknown key `{shorten(name)}`", did_you_mean(key, sorted(known))
                )

    def check_types(self, prefix: str, section: dict[str, Any], kind: type) -> None:
        """Raise `InputError` for a value whose type is not that of its field in a dataclass.

        Only fields of plain types are checked: transformers converts others by itself. YAML reads
        5e-4 as a text.
        """
        hints = get_type_hints(kind)
        for key, value in section.items():
            types = _plain_types(hints[key])
            accepted = types | {int} if float in types else types
            if types and type(value) not in accepted:
                names = " or ".join(sorted(member.__name__ for member in types - {type(None)}))
                name = f"{prefix}.{key}"
                raise self.wrong(name, f"`{name}` must be {names}, got {show(value)}")


def _reason(error: Exception) -> str:
    """What a library says of a value; Python's own words say nothing of a recipe."""
    spoken = " ".join(str(error).split())
    if unknown := re.search(r"unexpected keyword argument '(\w+)'", spoken):
        return f"nothing takes `{shorten(unknown[1])}`"
    if isinstance(error, (TypeError, AttributeError)) or not spoken:
        return "a value of a kind that cannot stand there"
    return shorten(spoken)


def _spoken_of(message: str, section: str, keys: Iterable[str]) -> str:
    """The dotted name of the first key that a message names, or of the whole section."""
    named = (key for key in keys if re.search(rf"\b{re.escape(key)}\b", message))
    return f"{section}.{next(named, '')}"


def _plain_types(hint: Any) -> set[type]:
    """The types that a field may have; empty if one of them is more than a plain type."""
    is_union = get_origin(hint) in (Union, UnionType)
    members = get_args(hint) if is_union else (hint,)
    types = {get_origin(member) or member for member in members}
    return types if types <= PLAIN else set()


def read_recipe_file(path: Path) -> RecipeFile:
    """Read a YAML file.

    Raises:
        InputError: naming file and line: no such file, not UTF-8, not YAML, not a mapping, a key
            that stands twice or is no word, a value of a kind that JSON lacks, a number that is not
            finite or has more than 64 bits, or more of anything than a recipe can need.
    """
    text = _text(path)
    lines = dict[str, int]()
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        for number, (name, line) in enumerate(_entries(node, "", 1, path)):
            if number == MAX_ENTRIES:
                raise InputError(
                    f"{path}:{line}: more than {MAX_ENTRIES:,} values",
                    hint="aliases count as often as they are used",
                )
            if name in lines:
                raise InputError(
                    f"{path}:{line}: the key `{shorten(name)}` stands in line {lines[name]} "
                    "already",
                    hint="keep only one",
                )
            lines[name] = line
        content = loader.construct_document(node) if node is not None else None
    except InputError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # such as a date that is none
        raise InputError(
            f"{path}:{_line_of(error, text)}: not valid YAML ({type(error).__name__})"
        ) from None
    if not isinstance(content, dict):
        raise InputError(
            f"{path}:1: a recipe is a mapping with output_dir, model, data and training"
        )
    file = RecipeFile(path, content, lines)
    _check_numbers(file, content, "")
    return file


def _text(path: Path) -> str:
    """What a recipe holds; a device or a pipe, which may never end, is not read."""
    if not os.path.isfile(path):
        raise InputError(
            f"recipe `{shorten(str(path))}` is not a file",
            hint=_nearest(path) or "see recipes/ for the ones that come with dmax",
        )
    with path.open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise InputError(f"{path}: a recipe has at most {MAX_BYTES:,} bytes")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 text", hint=TO_UTF8) from None


def _nearest(path: Path) -> str:
    """A hint that names the recipe that is called most like a missing one; empty without one."""
    beside = path.parent.glob("*.y*ml") if os.path.isdir(path.parent) else ()
    names = {file.stem: file for file in beside}  # an ending would make all names alike
    near = difflib.get_close_matches(path.stem, names, n=1)
    return f"did you mean `{names[near[0]]}`?" if near else ""


def _line_of(error: Exception, text: str) -> int:
    """Where YAML stopped reading: most of its errors have a mark, one has a position."""
    if mark := getattr(error, "problem_mark", None):
        return int(mark.line) + 1
    return text.count("\n", 0, getattr(error, "position", 0)) + 1


def _entries(
    node: yaml.Node | None, name: str, line: int, path: Path, depth: int = 0
) -> Iterator[tuple[str, int]]:
    """Dotted name and line of every value below a node, those of an alias wherever it is used.

    Raises:
        InputError: a key or a value is of a wrong kind, or nested too deep.
    """
    where = f"{path}:{line}"
    if depth > MAX_DEPTH:
        raise InputError(f"{where}: nested more than {MAX_DEPTH} deep")
    match node:
        case yaml.MappingNode(value=pairs):
            for key, value in pairs:
                below = key.start_mark.line + 1
                if key.tag not in KEYS:
                    kind = shorten(key.tag.rpartition(":")[2])
                    shown = f"{show(key.value)}, YAML's" if isinstance(key.value, str) else "YAML's"
                    raise InputError(f"{path}:{below}: a key must be a word, got {shown} {kind}")
                _check_scalar(key, f"{path}:{below}")
                dotted = f"{name}.{key.value}" if name else key.value
                yield dotted, below
                yield from _entries(value, dotted, below, path, depth + 1)
        case yaml.SequenceNode(value=items):
            for index, item in enumerate(items):
                below = item.start_mark.line + 1
                yield f"{name}[{index}]", below
                yield from _entries(item, f"{name}[{index}]", below, path, depth + 1)
        case yaml.ScalarNode():
            _check_scalar(node, where)
    if node is not None and node.tag not in VALUES:
        kind = node.tag.rpartition(":")[2]
        raise InputError(
            f"{where}: a value is of YAML's kind {shorten(kind)}, which no recipe has",
            hint="put it in quotes to make it a text",
        )


def _check_scalar(node: yaml.ScalarNode, where: str) -> None:
    """An escape in YAML can write what no text and no name of a file holds."""
    if "\0" in node.value or any("\ud800" <= mark <= "\udfff" for mark in node.value):
        raise InputError(f"{where}: a text holds a NUL or half of a surrogate pair")


def _check_numbers(file: RecipeFile, value: Any, name: str) -> None:
    """Raise `InputError` for a number that no setting can have."""
    match value:
        case dict():
            for key, below in value.items():
                _check_numbers(file, below, f"{name}.{key}" if name else key)
        case list():
            for index, below in enumerate(value):
                _check_numbers(file, below, f"{name}[{index}]")
        case float() if not math.isfinite(value):
            raise file.wrong(name, f"`{name}` must be a finite number, got {value}")
        case int() if value.bit_length() > 63:
            raise file.wrong(name, f"`{name}` must be a number of up to 64 bits, got {show(value)}")
