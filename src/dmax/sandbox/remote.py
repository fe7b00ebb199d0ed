"""What runs inside a sandboxed process: a program, a server of a candidate's functions, or tests that call them.

Standard library alone, sent as source. Tests and candidate live in two processes, and all that
passes between them is plain data in JSON: None, bool, int, float, complex, str, bytes, bytearray,
range, list, tuple, set, frozenset, dict. Instances of subclasses travel as the plain type. Any
other object stays where it is and is known to the tests by a
number: they can call it, go through it, and ask for items and attributes, but it equals nothing but
    itself, and none
of its code runs among the tests.
"""

from __future__ import annotations

import builtins
import json
import linecache
import operator
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, BinaryIO, NoReturn

CONTAINERS = (list, tuple, set, frozenset)
MUTABLE = (list, dict, set, bytearray)
MAX_MESSAGE = 1 << 23  # bytes
OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, *args, **kwargs: function(*args, **kwargs),
    **{
        "iter": iter,
        "next": next,
        "len": len,
        "bool": bool,
        "getattr": getattr,
        "setattr": setattr,
    },
    "getitem": operator.getitem,
}
ERRORS = (  # what a test can expect; not StopIteration, which would end an `all(map(...))` among the tests early
    "ArithmeticError AssertionError AttributeError EOFError Exception FloatingPointError ImportError IndexError "
    "KeyError LookupError MemoryError ModuleNotFoundError NameError NotImplementedError OSError OverflowError "
    "PermissionError RecursionError RuntimeError TypeError ValueError ZeroDivisionError"
).split()


def main(config: dict[str, Any]) -> None:
    """Do the part that `config["role"]` names."""
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]  # `site` is not loaded
    if config["role"] == "run":
        run(config["program"])
    elif config["role"] == "serve":
        serve(config["program"], os.fdopen(config["read"], "rb"), os.fdopen(config["write"], "wb"))
    else:
        connection = Connection(os.fdopen(config["read"], "rb"), os.fdopen(config["write"], "wb"))
        verify(config, connection)
        os._exit(config["passed"])


def run(program: str) -> None:
    """Run a program as `python file` does."""
    try:
        execute(program, ModuleType("__main__"))
    except SystemExit:
        raise
    except BaseException as error:
        place = (
            error.__traceback__
            and error.__traceback__.tb_next
            and error.__traceback__.tb_next.tb_next
        )
        traceback.print_exception(type(error), error, place)
        sys.exit(1)


def execute(source: str, module: ModuleType) -> None:
    """Run source as the body of a module that tracebacks, pickle and dataclasses can find."""
    file = f"<{module.__name__.strip('_')}>"
    linecache.cache[file] = len(source), None, source.splitlines(True), file
    sys.modules[module.__name__] = module
    exec(compile(source, file, "exec", dont_inherit=True), module.__dict__)


def encode(value: Any, refer: Callable[[Any], int]) -> Any:
    """A value as JSON has it; `refer` gives the number of an object that stays, or raises `TypeError`."""
    if value is None or isinstance(value, bool | float | str):
        return value
    if isinstance(value, int):
        return (
            value if value.bit_length() < 64 else ["int", hex(value)]
        )  # long decimals are slow, and refused
    if isinstance(value, dict):
        return ["dict", [[encode(key, refer), encode(item, refer)] for key, item in value.items()]]
    if isinstance(value, bytes | bytearray):
        return ["bytes" if isinstance(value, bytes) else "bytearray", value.hex()]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, range):
        return ["range", [encode(bound, refer) for bound in (value.start, value.stop, value.step)]]
    for kind in CONTAINERS:
        if isinstance(value, kind):
            return [kind.__name__, [encode(item, refer) for item in value]]
    return ["object", refer(value)]


def decode(data: Any, resolve: Callable[[int], Any]) -> Any:
    """The value behind `encode`'s JSON, made of built-in types and what `resolve` gives for a number."""
    if not isinstance(data, list):
        return data
    kind, content = data
    match kind:
        case "int":
            return int(content, 16)
        case "dict":
            return {decode(key, resolve): decode(item, resolve) for key, item in content}
        case "bytes" | "bytearray":
            return getattr(builtins, kind).fromhex(content)
        case "complex" | "range":
            return getattr(builtins, kind)(*(decode(part, resolve) for part in content))
        case "list" | "tuple" | "set" | "frozenset":
            return getattr(builtins, kind)(decode(item, resolve) for item in content)
        case "object":
            return resolve(content)
    raise ValueError(f"unknown kind of value {kind!r}")


def serve(program: str, requests: BinaryIO, replies: BinaryIO) -> None:
    """Load the candidate, then answer requests until the tests are done; its failure to load is every answer."""
    module = ModuleType("candidate")
    failure: BaseException | None = None
    try:
        execute(program, module)
    except BaseException as error:
        failure = error
    objects: list[Any] = [module]
    numbers = {id(module): 0}

    def refer(value: Any) -> int:
        if id(value) not in numbers:
            numbers[id(value)] = len(objects)
            objects.append(value)  # kept alive, so the id stays its own
        return numbers[id(value)]

    for line in requests:
        try:
            if failure:
                raise failure
            reply = answer(json.loads(line), refer, objects.__getitem__)
        except BaseException as error:
            reply = ["error", [kind.__name__ for kind in type(error).__mro__], str(error)]
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


def answer(request: Any, refer: Callable[[Any], int], resolve: Callable[[int], Any]) -> list[Any]:
    """Do one operation; the reply also has the arguments that it changed in place."""
    name, *encoded = request
    args = decode(encoded[0], resolve)
    kwargs = decode(encoded[1], resolve)
    mutable = [
        (place, value)
        for place, value in enumerate([*args, *kwargs.values()])
        if isinstance(value, MUTABLE)
    ]
    before = [encode(value, refer) for _, value in mutable]
    result = encode(OPERATIONS[name](*args, **kwargs), refer)
    after = [[place, encode(value, refer)] for place, value in mutable]
    return ["value", result, [new for new, old in zip(after, before, strict=True) if new[1] != old]]


class Connection:
    """The tests' end of the two pipes to the candidate."""

    def __init__(self, replies: BinaryIO, requests: BinaryIO) -> None:
        self.replies = replies
        self.requests = requests

    def ask(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        """Have the candidate do an operation; its exceptions are raised here by name, as built-in ones."""
        message = json.dumps([operation, encode(args, number_of), encode(kwargs, number_of)])
        try:
            self.requests.write(message.encode() + b"\n")
            self.requests.flush()
            line = self.replies.readline(MAX_MESSAGE)
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            fail(
                "the candidate's answer is too long"
                if line
                else "the candidate ended before it answered"
            )
        kind, content, extra = json.loads(line)
        if kind == "error":
            raise_named(content, str(extra), operation)
        changeable = [*args, *kwargs.values()]
        for place, new in extra:
            replace(changeable[place], decode(new, self.resolve))
        return decode(content, self.resolve)

    def resolve(self, number: int) -> Remote:
        """The candidate's object of that number; 0 is its module."""
        return Remote(self, int(number))


def number_of(value: Any) -> int:
    """The number of one of the candidate's objects, to hand it back."""
    if isinstance(value, Remote):
        return value._number
    raise TypeError(f"a {type(value).__name__} cannot be handed to the candidate")


def fail(reason: str) -> NoReturn:
    """End the tests; not an exception, since a test that expects one must not take it for the candidate's."""
    sys.stderr.write(reason + "\n")
    sys.stderr.flush()
    os._exit(1)


def raise_named(names: Sequence[str], text: str, operation: str) -> NoReturn:
    """Raise the nearest of `ERRORS` among the class names of the candidate's exception."""
    if operation == "next" and names[0] == "StopIteration":
        raise StopIteration
    known = next((name for name in names if name in ERRORS), None)
    if known in (None, "Exception"):
        raise Exception(f"{names[0]}: {text}")
    raise getattr(builtins, known)(text)


def replace(old: Any, new: Any) -> None:
    """Give a mutable argument its new content."""
    if not isinstance(old, type(new)):
        raise TypeError("an argument cannot change its type")
    old.clear()
    old.extend(new) if isinstance(old, list | bytearray) else old.update(new)


class Remote:
    """An object of the candidate's, as the tests see it: without equality, membership and arithmetic of its own."""

    _connection: Connection
    _number: int

    def __init__(self, connection: Connection, number: int) -> None:
        object.__setattr__(self, "_connection", connection)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        return self._connection.ask("call", self, *args, **kwargs)

    def __iter__(self) -> Iterator[Any]:
        return self._connection.ask("iter", self)

    def __next__(self) -> Any:
        return self._connection.ask("next", self)

    def __len__(self) -> int:
        return self._connection.ask("len", self)

    def __bool__(self) -> bool:
        return self._connection.ask("bool", self)

    def __getitem__(self, key: Any) -> Any:
        return self._connection.ask("getitem", self, key)

    def __getattr__(self, name: str) -> Any:
        return self._connection.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._connection.ask("setattr", self, name, value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and self._number == other._number

    def __hash__(self) -> int:
        return hash(self._number)


def verify(config: dict[str, Any], connection: Connection) -> None:
    """Run the tests with the candidate's functions under their names; comes back only if they ran to their end."""
    tests = ModuleType("tests")
    try:
        bound = {
            name: connection.ask("getattr", connection.resolve(0), name) for name in config["names"]
        }
        execute(config["setup"], tests)
        tests.__dict__.update(bound)
        execute(config["tests"], tests)
    except BaseException as error:
        place = [
            frame.line
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == "<tests>"
        ]
        told = "".join(traceback.format_exception_only(error)).strip()
        fail(f"{told} in: {place[-1]}" if place else told)
