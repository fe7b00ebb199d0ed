"""Compares values with a JSON Schema, as far as schema.json needs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dmax.errors import show

TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list, tuple),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}


def complaint(value: Any, schema: Mapping[str, Any]) -> str | None:
    """The first thing that is wrong with a value; None if the schema allows it.

    Understood are type, const, enum, minimum, maximum, minItems, items, prefixItems, required,
    properties and $ref to #/$defs.
    """
    return next(_complaints(value, schema, schema, ""), None)


def _complaints(
    value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], where: str
) -> Iterator[str]:
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    name = f"`{where}`" if where else "it"
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    if types and not any(_is(value, each) for each in types):
        yield f"{name} must be of type {' or '.join(types)}, got {show(value)}"
        return
    if "const" in schema and value != schema["const"]:
        yield f"{name} must be {show(schema['const'])}, got {show(value)}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{name} must be {' or '.join(map(show, schema['enum']))}, got {show(value)}"
    if _is(value, "number"):
        low, high = schema.get("minimum", value), schema.get("maximum", value)
        if value < low:
            yield f"{name} must be at least {low}, got {show(value)}"
        if value > high:
            yield f"{name} must be at most {high}, got {show(value)}"
    yield from _inner(value, schema, root, where)


def _inner(
    value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], where: str
) -> Iterator[str]:
    """What is wrong inside an object or an array."""
    name = f"`{where}`" if where else "it"
    if isinstance(value, dict):
        for key in schema.get("required", ()):
            if key not in value:
                yield f"{name} has no `{key}`"
        for key, inner in schema.get("properties", {}).items():
            if key in value:
                yield from _complaints(value[key], inner, root, f"{where}.{key}".lstrip("."))
    if isinstance(value, (list, tuple)):
        if len(value) < schema.get("minItems", 0):
            yield f"{name} has {len(value)} entries, and {schema['minItems']} are the least"
        first = schema.get("prefixItems", ())
        for at, each in enumerate(value):
            inner = first[at] if at < len(first) else schema.get("items", {})
            if inner is False:
                yield f"{name} has more than {len(first)} entries"
                return
            yield from _complaints(each, inner, root, f"{where}[{at}]")


def _is(value: Any, kind: str) -> bool:
    is_truth = isinstance(value, bool)
    return isinstance(value, TYPES[kind]) and (kind == "boolean" or not is_truth)
