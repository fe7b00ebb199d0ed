"""What may be wrong with a trace, and what its reader says of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Damage = Callable[[dict[str, Any]], Any]


def without(*path: str) -> Damage:
    def damage(trace: dict[str, Any]) -> None:
        *parents, name = path
        for parent in parents:
            trace = trace[parent]
        del trace[name]

    return damage


def with_frame(**changes: Any) -> Damage:
    return lambda trace: trace["frames"][0].update(changes)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "a newer version": (
        lambda trace: trace.update(version=2),
        "is a trace of version 2, and this dmax reads up to 1",
    ),
    "no version": (without("version"), "has no `version`"),
    "another format": (lambda trace: trace.update(format="mp3"), "no `format` 'dmax-trace'"),
    "no frames": (without("frames"), "has no `frames`"),
    "no output": (without("output"), "has no `output`"),
    "no strategy": (without("params", "strategy"), "`params` has no `strategy`"),
    "a text for a number": (with_frame(step="2"), r"`frames\[0\].step` must be of type integer"),
    "true for a number": (with_frame(position=True), r"`frames\[0\].position` must be of type"),
    "a probability of 2": (
        lambda trace: trace["frames"][0]["confidence"].__setitem__(0, 2),
        r"`frames\[0\].confidence\[0\]` must be at most 1",
    ),
    "an unknown kind": (with_frame(kind="maybe"), "must be 'provisional' or 'committed'"),
    "lists of different lengths": (with_frame(texts=["a"]), "`token_ids` and 1 `texts`"),
    "a candidate of two": (
        lambda trace: trace["frames"][0]["candidates"][0].__setitem__(0, [1, 0.5]),
        "has 2 entries, and 3 are the least",
    ),
    "forwards that go back": (with_frame(num_forwards=9999), "goes back from forward 9999 to"),
    "a hole in the text": (
        lambda trace: [frame.update(position=frame["position"] + 7) for frame in trace["frames"]],
        "the block before position 7 ends at 0",
    ),
}
