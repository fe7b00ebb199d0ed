"""Checkpoints: a valid folder with one file changed loads and decodes, or is refused."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from mutations import (
    STAND_INS,
    Mutation,
    byte_mutations,
    in_place_of,
    json_mutations,
    put,
    tree_mutations,
    write_json,
)
from oracle import attempt, draw, fuzz, refused
from test_fuzz_settings import check_output

from dmax import LLM, DecodingParams
from dmax.baselines.heads import load_head
from dmax.checkpoint import load_checkpoint
from dmax.errors import InputError

PARAMS = DecodingParams(strategy="threshold", max_new_tokens=8, max_steps_per_block=4)
JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
FILES = (*JSON_FILES, "model.safetensors", "chat_template.jinja")
WEIGHTS = "model.safetensors"


@contextmanager
def copy_of(checkpoint: Path) -> Iterator[Path]:
    """A copy of a checkpoint to spoil; its files are linked until they are replaced."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        shutil.copytree(checkpoint, folder, copy_function=os.link)
        yield folder


def write(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)  # the file is linked to the valid one
    path.write_bytes(content)


def check(folder: Path) -> object:
    """Load and decode; what is accepted gives sound completions."""

    def run() -> tuple[LLM, Any]:
        llm = LLM(str(folder), dtype="float32", device="cpu")
        return llm, llm.generate("Tom has 3 apples.", PARAMS)

    outcome = attempt(run, folder.parent)
    if not isinstance(outcome, InputError):
        llm, [output] = outcome
        check_output(llm, output, PARAMS)
        assert all(weight.isfinite().all() for weight in llm.model.state_dict().values())
    return outcome


@fuzz(60, name=st.sampled_from(JSON_FILES), data=st.data())
def test_a_changed_json_file(checkpoint: Path, name: str, data: st.DataObject) -> None:
    content = (checkpoint / name).read_bytes()
    mutation = draw(data, json_mutations(json.loads(content)))
    with copy_of(checkpoint) as folder:
        write(folder / name, mutation.apply(content))
        check(folder)


@fuzz(40, data=st.data())
def test_a_changed_value_of_the_config(checkpoint: Path, data: st.DataObject) -> None:
    tree = json.loads((checkpoint / "config.json").read_bytes())
    mutations = draw(data, st.lists(tree_mutations(tree), min_size=1, max_size=2))
    for mutation in mutations:
        tree = mutation.apply(tree)
    with copy_of(checkpoint) as folder:
        write(folder / "config.json", write_json(tree))
        check(folder)


def split(content: bytes) -> tuple[Any, bytes]:
    """Header and tensors of a safetensors file."""
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def joined(header: bytes, body: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + body


def header_mutations(content: bytes) -> st.SearchStrategy[Mutation]:
    """One change of a safetensors file: of its header, of its size, or of any byte."""
    tree, body = split(content)
    sizes = st.sampled_from((0, 1, 2**31, 2**40, 2**63, 2**64 - 1))
    deep = b'{"__metadata__":' + b'{"a":' * 200_000
    return st.one_of(
        tree_mutations(tree).map(
            lambda each: Mutation(each.name, lambda _: joined(write_json(each.apply(tree)), body))
        ),
        json_mutations(tree).map(
            lambda each: Mutation(each.name, lambda _: joined(each.apply(write_json(tree)), body))
        ),
        sizes.map(
            lambda size: Mutation(
                f"header of {size} bytes", lambda data: struct.pack("<Q", size) + data[8:]
            )
        ),
        st.just(Mutation("a deep header", lambda _: joined(deep, body))),
        byte_mutations(),
    )


@fuzz(40, data=st.data())
def test_changed_weights(checkpoint: Path, data: st.DataObject) -> None:
    content = (checkpoint / WEIGHTS).read_bytes()
    mutation = draw(data, header_mutations(content))
    with copy_of(checkpoint) as folder:
        write(folder / WEIGHTS, mutation.apply(content))
        check(folder)


@fuzz(25, data=st.data(), content=st.text(max_size=20))
def test_a_changed_chat_template(checkpoint: Path, data: st.DataObject, content: str) -> None:
    valid = (checkpoint / "chat_template.jinja").read_bytes()
    mutation = draw(data, byte_mutations())
    templates = (
        mutation.apply(valid),
        mutation.apply(valid),
        b"{{ " + content.encode("utf-8", "replace") + b" }}",
        b"{% for i in range(10 ** 10) %}x{% endfor %}",
        b"{{ 'x' * 10 ** 10 }}",
        b"{{ messages.__class__.__mro__ }}",
        b"{{ 1 // 0 }}",
        b"{{ raise_exception('no') }}",
        b"{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        b"{% include '/etc/passwd' %}",
    )
    with copy_of(checkpoint) as folder:
        write(folder / "chat_template.jinja", draw(data, st.sampled_from(templates)))
        check(folder)


INDEX = "model.safetensors.index.json"


@fuzz(25, data=st.data())
def test_a_changed_index_of_weights(checkpoint: Path, data: st.DataObject) -> None:
    header, _ = split((checkpoint / WEIGHTS).read_bytes())
    names = [name for name in header if name != "__metadata__"]
    shard = "model-00001-of-00001.safetensors"
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, shard)}
    mutation = draw(data, json_mutations(index))
    with copy_of(checkpoint) as folder:
        (folder / WEIGHTS).rename(folder / shard)
        write(folder / INDEX, mutation.apply(write_json(index)))
        check(folder)


@fuzz(
    30,
    name=st.sampled_from(FILES),
    what=st.sampled_from(sorted(STAND_INS)),
)
def test_something_else_in_the_place_of_a_file(checkpoint: Path, name: str, what: str) -> None:
    with copy_of(checkpoint) as folder:
        in_place_of(folder / name, what)
        outcome = check(folder)
        if name in ("config.json", WEIGHTS):
            refused(outcome, f"{name} is {what}")


WRONG: dict[tuple[str, ...], tuple[Any, ...]] = {
    ("mask_token_id",): (-1, 10**6, 10**400, 0.5, "1", True, [1], {}, float("nan")),
    ("eos_token_id",): (-1, 10**6, 10**400, 0.5, "1", True, [True], [-1], {}, float("nan")),
    ("block_length",): (0, -1, 0.5, "8", True, [8], {}, 10**400, float("nan")),
    ("num_hidden_layers",): (0, -1, 0.5, "2", [2], {}, 10**6, 10**400, float("nan")),
    ("hidden_size",): (0, -1, 0.5, "16", [16], {}, 10**9, 10**400, float("nan")),
    ("num_experts",): (-1, 0.5, "4", [4], {}, 10**9, 10**400, float("nan")),
    ("vocab_size",): (0, -1, 0.5, "9", [9], {}, 10**12, 10**400, float("nan")),
    ("model_type",): ("", "lama", 1, None, [], {}),
    ("decoding_strategy",): ("sdp", 1, [], {}, True, "", "os:system"),
}
wrong = st.sampled_from([(place, value) for place, values in WRONG.items() for value in values])


@fuzz(45, wrong=wrong, steps=st.integers(1, 9))
def test_a_wrong_value_of_a_config_is_refused(
    checkpoint: Path, wrong: tuple[tuple[str, ...], Any], steps: int
) -> None:
    place, value = wrong
    tree = json.loads((checkpoint / "config.json").read_bytes()) | {
        "decoding_strategy": "threshold"
    }
    with copy_of(checkpoint) as folder:
        (folder / "generation_config.json").unlink()  # its EOS would decide
        changed = put(place, value).apply(tree)
        write(folder / "config.json", write_json(changed | {"steps": steps}))
        refused(check(folder), f"`{place[0]}` is {value!r:.40}")


@fuzz(10, name=st.sampled_from(("eos_token_id", "mask_token_id")), place=st.integers(0, 9))
def test_a_mask_that_ends_a_text_is_refused(checkpoint: Path, name: str, place: int) -> None:
    tree = json.loads((checkpoint / "config.json").read_bytes())
    other = "mask_token_id" if name == "eos_token_id" else "eos_token_id"
    tree |= {name: tree[other], "note": place}
    with copy_of(checkpoint) as folder:
        (folder / "generation_config.json").unlink()
        write(folder / "config.json", write_json(tree))
        refused(
            attempt(lambda: load_checkpoint(folder, dtype="float32", device="cpu"), folder),
            "MASK is EOS",
        )


@fuzz(30, kind=st.sampled_from(("demask", "learn2pd")), data=st.data())
def test_a_changed_head(llm: LLM, own_heads: Path, kind: Any, data: st.DataObject) -> None:
    content = (own_heads / f"{kind}.safetensors").read_bytes()
    mutation = draw(data, header_mutations(content))
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / f"{kind}.safetensors"
        file.write_bytes(mutation.apply(content))
        outcome = attempt(lambda: load_head(str(file), kind), file.parent)
        if not isinstance(outcome, InputError):
            settings = DecodingParams(
                strategy=kind, max_new_tokens=8, max_steps_per_block=4, options={"head": str(file)}
            )
            decoded = attempt(lambda: llm.generate("Tom has 3 apples.", settings), file.parent)
            if not isinstance(decoded, InputError):
                check_output(llm, decoded[0], settings)
