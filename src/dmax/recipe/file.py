"""A YAML file that knows the line of each of its keys, so that every error says where to look."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from dmax.errors import InputError, did_you_mean


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
            key = key.rpartition(".")[0]
        return InputError(f"{self.path}:{self.lines.get(key, 1)}: {message}", hint)

    @contextmanager
    def at(self, key: str) -> Iterator[None]:
        """Errors from within are of the value at a dotted key."""
        try:
            yield
        except InputError as error:
            raise self.wrong(key, f"in `{key}`, {error.message}", error.hint) from error

    def check_keys(self, prefix: str, section: Any, known: set[str]) -> None:
        """Raise `InputError` unless the value at `prefix` is a mapping of known keys.

        An empty prefix is the whole file.
        """
        if not isinstance(section, dict):
            raise self.wrong(prefix, f"`{prefix}` must be a mapping")
        for key in section:
            if key not in known:
                name = f"{prefix}.{key}" if prefix else str(key)
                raise self.wrong(
                    name, f"unknown key `{name}`", did_you_mean(str(key), sorted(known))
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
                raise self.wrong(name, f"`{name}` must be {names}, got {value!r}")


def _plain_types(hint: Any) -> set[type]:
    """The types that a field may have; empty if one of them is more than a plain type."""
    is_union = get_origin(hint) in (Union, UnionType)
    members = get_args(hint) if is_union else (hint,)
    types = {get_origin(member) or member for member in members}
    return types if types <= {int, float, str, bool, dict, type(None)} else set()


def read_recipe_file(path: Path) -> RecipeFile:
    """Read a YAML file.

    Raises:
        InputError: naming file and line: no such file, not UTF-8, not YAML, not a mapping, or a key
            stands twice.
    """
    if not path.is_file():
        raise InputError(
            f"recipe `{path}` is not a file", hint="see recipes/ for the ones that come with dmax"
        )
    raw = path.read_bytes()
    lines = dict[str, int]()
    try:
        text = raw.decode("utf-8")
        content = yaml.safe_load(text)
        _collect_lines(yaml.compose(text, Loader=yaml.SafeLoader), "", lines, path)
    except InputError:
        raise
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}:{line}: not UTF-8 text", hint="convert it, for example with iconv -t UTF-8"
        ) from None
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # a date or an anchor that is none
        raise InputError(
            f"{path}:{_line_of(error, text)}: not valid YAML ({type(error).__name__})"
        ) from None
    if not isinstance(content, dict):
        raise InputError(
            f"{path}:1: a recipe is a mapping with output_dir, model, data and training"
        )
    return RecipeFile(path, content, lines)


def _line_of(error: Exception, text: str) -> int:
    """Where YAML stopped reading: most of its errors have a mark, one has a position."""
    if mark := getattr(error, "problem_mark", None):
        return int(mark.line) + 1
    return text.count("\n", 0, getattr(error, "position", 0)) + 1


def _collect_lines(node: Any, prefix: str, lines: dict[str, int], path: Path) -> None:
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        name = f"{prefix}{key.value}"
        line = key.start_mark.line + 1
        if name in lines:
            raise InputError(
                f"{path}:{line}: the key `{name}` stands in line {lines[name]} already",
                "keep only one",
            )
        lines[name] = line
        _collect_lines(value, f"{name}.", lines, path)
