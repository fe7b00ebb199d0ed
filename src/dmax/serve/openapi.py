"""The OpenAPI document, with what only this server's models and limits can say.

FastAPI makes most of it from `bodies` and `replies`. Here the fields get the bounds that hold for
the models that are served, so that what the document allows is what the server does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import Field, fields
from typing import Any, get_args, get_type_hints

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from dmax.decoding import get_strategy, strategy_class
from dmax.errors import InputError
from dmax.params import DecodingParams
from dmax.serve.bodies import MAX_OPTION
from dmax.serve.replies import SCHEMAS, ChatChunk, CompletionChunk
from dmax.serve.served import ServedModel
from dmax.serve.settings import ServerOptions

Schema = dict[str, Any]

NULL: Schema = {"type": "null"}
OF_SOME_STRATEGIES = ("threshold", "stop_confidence", "top_k")


def narrow(document: Schema, models: Sequence[ServedModel], options: ServerOptions) -> None:
    """Put the bounds of this server into the document that FastAPI made.

    Args:
        document: which is changed.
        models: all of them loaded.
        options: limits.
    """
    schemas = document["components"]["schemas"]
    names = [model.name for model in models]
    document["paths"]["/v1/models/{name}"]["get"]["parameters"][0]["schema"]["enum"] = names
    for name in ("ChatRequest", "CompletionRequest"):
        properties = schemas[name]["properties"]
        properties["model"]["enum"] = names
        for tokens in ("max_tokens", "max_completion_tokens"):
            if tokens in properties:
                most = min(model.max_new_tokens for model in models)
                _number(properties[tokens])["maximum"] = most
        _number(properties["n"])["maximum"] = options.max_choices
    chat = schemas["ChatRequest"]
    chat["allOf"] = [
        _requires("top_logprobs", {"type": "integer", "minimum": 1}, "logprobs"),
        _streams_if_provisional(),
    ]
    completion = schemas["CompletionRequest"]
    completion["allOf"] = [_streams_if_provisional()]
    _narrow_prompt(completion["properties"]["prompt"], models, options)
    dmax = schemas["DmaxOptions"]
    lengths = {model.block_length for model in models}
    dmax["properties"]["block_length"] = {
        "enum": [None, *(lengths if len(lengths) == 1 else ())],
        "description": "The checkpoint's own.",
    }
    dmax["anyOf"] = _strategies(models)
    if options.api_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, methods in document["paths"].items():
            for method in methods.values() if path.startswith("/v1/") else ():
                method["security"] = [{"key": []}]


def _add_chunks(document: Schema) -> None:
    """Add the schemas of chunks, which FastAPI does not see."""
    _, found = models_json_schema(
        [(ChatChunk, "serialization"), (CompletionChunk, "serialization")],
        ref_template=f"{SCHEMAS}{{model}}",
    )
    document["components"]["schemas"].update(found["$defs"])


def _number(schema: Schema) -> Schema:
    """The part of a schema that is not null."""
    found: Schema = next(each for each in schema["anyOf"] if each != NULL)
    return found


def _requires(field: str, value: Schema, other: str) -> Schema:
    """Where a field has a value, another one must be true."""
    return {
        "if": {"properties": {field: value}, "required": [field]},
        "then": {"properties": {other: {"const": True}}, "required": [other]},
    }


def _streams_if_provisional() -> Schema:
    provisional = {
        "type": "object",
        "properties": {"stream": {"const": "provisional"}},
        "required": ["stream"],
    }
    return _requires("dmax", provisional, "stream")


def _narrow_prompt(prompt: Schema, models: Sequence[ServedModel], options: ServerOptions) -> None:
    """Bound the token ids of prompts, and how many prompts there may be."""
    most = min(model.llm.model.config.vocab_size for model in models) - 1
    masks = sorted({model.llm.checkpoint.special_ids.mask_token_id for model in models})
    token = {"type": "integer", "minimum": 0, "maximum": most, "not": {"enum": masks}}
    _, ids, texts, id_lists = prompt["anyOf"]
    longest = min(model.context - model.block_length for model in models)
    for each in (ids, id_lists["items"]):
        each["items"] = token
        each["maxItems"] = min(options.max_prompt_tokens or longest, longest)
    texts["maxItems"] = id_lists["maxItems"] = options.max_choices


# --- what each strategy takes ---------------------------------------------------------------------


def _strategies(models: Sequence[ServedModel]) -> list[Schema]:
    """For each strategy what may stand beside its name; first for requests that name none."""
    defaults = {model.strategy for model in models}
    names = sorted(set.intersection(*(set(model.strategies) for model in models)))
    known = [_own_fields(name) for name in sorted(defaults)]
    shared = {key: schema for key, schema in known[0].items() if all(key in own for own in known)}
    unnamed = _variant({"enum": [None, "auto"]}, shared)
    named = [
        _variant({"const": name}, own) | {"required": ["strategy"], "title": name}
        for name in names
        for own in _alternatives(name)
    ]
    return [unnamed, *named]


def _alternatives(strategy: str) -> list[dict[str, Schema]]:
    """The settings of a strategy, one of those that bound each other at a time."""
    own = _own_fields(strategy)
    defaults = get_strategy(DecodingParams(strategy)).numbers()
    bound: dict[str, Schema] = {}
    for name, schema in own.items():
        for limit, furthest in (("minimum", min), ("maximum", max)):
            if limit in schema and not _takes(strategy, name, schema[limit]):
                # The default of the other one is as far as this one goes.
                taken = [each for each in defaults.values() if _takes(strategy, name, each)]
                bound[name] = bound.get(name, schema) | {limit: furthest(taken)}
    free = {name: schema for name, schema in own.items() if name not in bound}
    return [free | {name: schema} for name, schema in bound.items()] or [free]


def _variant(strategy: Schema, own: dict[str, Schema]) -> Schema:
    """What may stand beside the name of a strategy with these fields."""
    options = {key: schema for key, schema in own.items() if key not in OF_SOME_STRATEGIES}
    taken = {"type": "object", "properties": options, "additionalProperties": False}
    properties: Schema = {"strategy": strategy, "options": {"anyOf": [taken, NULL]}}
    properties |= {name: NULL for name in OF_SOME_STRATEGIES if name not in own}
    return {"properties": properties}


def _own_fields(strategy: str) -> dict[str, Schema]:
    """The settings of a strategy, each as the document describes it."""
    found = strategy_class(strategy)
    types = get_type_hints(found)
    # Subclasses are dataclasses, which mypy cannot know.
    all_fields = fields(found)  # type: ignore[arg-type]
    return {each.name: _schema(each, types[each.name]) for each in all_fields if each.init}


def _takes(strategy: str, option: str, value: float) -> bool:
    """Whether a strategy takes a value beside the defaults of its other settings."""
    if option in OF_SOME_STRATEGIES:
        return True
    try:
        get_strategy(DecodingParams(strategy, options={option: value}))
    except InputError:
        return False
    return True


def _schema(field: Field[Any], type_: Any) -> Schema:
    if isinstance(field.default, bool):
        return {"type": "boolean"}
    bounds = field.metadata
    if not bounds:
        return {"enum": list(get_args(type_))}
    low = "exclusiveMinimum" if bounds.get("above_low") else "minimum"
    schema: Schema = {
        "type": "integer" if bounds.get("whole") else "number",
        low: bounds["low"],
        "maximum": min(bounds.get("high", MAX_OPTION), MAX_OPTION),
    }
    return {"anyOf": [schema, NULL]} if bounds.get("optional") else schema


def add_openapi(app: FastAPI, models: Sequence[ServedModel], options: ServerOptions) -> None:
    """Have an app describe itself with the bounds of its models, once they are loaded."""
    describe = app.openapi

    def openapi() -> Schema:
        is_made = app.openapi_schema is not None
        document = describe()
        if not is_made:
            _add_chunks(document)
            if all(model.is_ready for model in models):
                narrow(document, models, options)
            else:
                app.openapi_schema = None  # it is made again when they are
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's documentation has it
