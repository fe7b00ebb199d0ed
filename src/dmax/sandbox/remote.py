"""What runs in a sandboxed process: a program, a candidate's functions, or tests of them.

A process gets this file as source, so it imports nothing besides the standard library. Tests and
candidate live in two processes that exchange lines of JSON. Values of the built-in types in `PLAIN`
travel, and so do None, booleans, numbers and strings; an instance of a subclass arrives as the
built-in type. Any other object stays with the candidate, and the tests know it by a number. They
can call it, go through it, and ask for its items and attributes, but it equals nothing but itself,
and none of its code runs among the tests.
"""

from __future__ import annotations

import builtins
import json
import linecache
import operator
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, BinaryIO, NoReturn

PLAIN: dict[type, Callable[[Any], Iterable[Any]]] = {  # built-in type -> the parts of its values
    dict: dict.items,
    list: iter,
    tuple: iter,
    set: iter,
    frozenset: iter,
    bytes: iter,
    bytearray: iter,
    complex: lambda value: (value.real, value.imag),
    range: lambda value: (value.start, value.stop, value.step),
}
TYPES = {kind.__name__: kind for kind in PLAIN}
MUTABLE = (list, dict, set, bytearray)
OPERATIONS: dict[str, Callable[..., Any]] = {
    operation.__name__: operation
    for operation in (operator.call, iter, next, len, bool, getattr, setattr, operator.getitem)
}
# What a test can expect. StopIteration is not among them, since it would end an `all(map(...))` of
# the tests early.
ERRORS = """
    ArithmeticError AssertionError AttributeError EOFError Exception FloatingPointError ImportError
    IndexError KeyError LookupError MemoryError ModuleNotFoundError NameError NotImplementedError
    OSError OverflowError PermissionError RecursionError RuntimeError TypeError ValueError
    ZeroDivisionError
""".split()
MAX_REPLY = 1 << 23  # bytes


def main(config: dict[str, Any]) -> None:
    """Do the part that `config["role"]` names: "run", "serve" or "check"."""
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]  # `site` is not loaded
    if config["role"] == "run":
        run(config["program"])
        return
    received = os.fdopen(config["channel"], "rb")
    sent = os.fdopen(config["channel"], "wb", closefd=False)
    if config["role"] == "serve":
        serve(config["program"], received, sent)
    else:
        verify(config, Connection(received, sent))
        os._exit(config["passed"])


def run(program: str) -> None:
    """Run a program as `python file` does."""
    try:
        execute(program, ModuleType("__main__"))
    except SystemExit:
        raise
    except BaseException as error:
        frames = error.__traceback__
        assert frames and frames.tb_next, "`run` and `execute`, which are left out"
        traceback.print_exception(type(error), error, frames.tb_next.tb_next)
        sys.exit(1)


def execute(source: str, module: ModuleType) -> None:
    """Run source as the body of a module that tracebacks, pickle and dataclasses can find."""
    file = f"<{module.__name__.strip('_')}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    sys.modules[module.__name__] = module
    exec(compile(source, file, "exec", dont_inherit=True), module.__dict__)


def encode(value: Any, refer: Callable[[Any], int]) -> Any:
    """A value as JSON; `refer` gives the number of an object that stays where it is."""
    if value is None or isinstance(value, bool | float | str):
        return value
    if isinstance(value, int):
        # Python is slow to read long decimals, and refuses very long ones.
        return value if value.bit_length() < 64 else ["int", hex(value)]
    for kind, parts_of in PLAIN.items():
        if isinstance(value, kind):
            return [kind.__name__, [encode(part, refer) for part in parts_of(value)]]
    return ["object", refer(value)]


def decode(data: Any, resolve: Callable[[int], Any]) -> Any:
    """The value that `encode` was given; `resolve` gives the object that a number stands for."""
    if not isinstance(data, list):
        return data
    kind, content = data
    if kind == "object":
        return resolve(content)
    if kind == "int":
        return int(content, 16)
    parts = [decode(part, resolve) for part in content]
    if kind in ("complex", "range"):
        return TYPES[kind](*parts)
    return TYPES[kind](parts)


def serve(program: str, requests: BinaryIO, replies: BinaryIO) -> None:
    """Load a candidate, then answer requests until the tests are done.

    If the candidate cannot be loaded, that error is the answer to every request.
    """
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
            objects.append(value)  # an object that is kept alive keeps its id
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
    """Do one operation, and give its result and the arguments that it changed in place."""
    name, *encoded = request
    args = decode(encoded[0], resolve)
    kwargs = decode(encoded[1], resolve)
    arguments = [*args, *kwargs.values()]
    mutable = {i: each for i, each in enumerate(arguments) if isinstance(each, MUTABLE)}
    before = {i: encode(each, refer) for i, each in mutable.items()}
    result = encode(OPERATIONS[name](*args, **kwargs), refer)
    after = {i: encode(each, refer) for i, each in mutable.items()}
    return ["value", result, [[i, new] for i, new in after.items() if new != before[i]]]


class Connection:
    """The tests' end of the channel to the candidate."""

    def __init__(self, replies: BinaryIO, requests: BinaryIO) -> None:
        self.replies = replies
        self.requests = requests
        self.objects: dict[int, Remote] = {}

    def ask(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        """Have the candidate do an operation.

        Its exceptions are raised here by name, as built-in ones.
        """
        message = json.dumps([operation, encode(args, number_of), encode(kwargs, number_of)])
        try:
            self.requests.write(message.encode() + b"\n")
            self.requests.flush()
            line = self.replies.readline(MAX_REPLY)
        except ConnectionError:
            line = b""
        if not line:
            fail("the candidate ended before it answered")
        if not line.endswith(b"\n"):
            fail("the candidate's answer is too long")
        kind, content, extra = json.loads(line)
        if kind == "error":
            raise_named(content, str(extra), operation)
        arguments = [*args, *kwargs.values()]
        for place, new in extra:
            replace(arguments[place], decode(new, self.resolve))
        return decode(content, self.resolve)

    def resolve(self, number: int) -> Remote:
        """The candidate's object of that number; 0 is its module."""
        return self.objects.setdefault(number, Remote(self, number))


def number_of(value: Any) -> int:
    """The number of one of the candidate's objects, to hand it back."""
    if isinstance(value, Remote):
        return value._number
    raise TypeError(f"a {type(value).__name__} cannot be handed to the candidate")


def fail(reason: str) -> NoReturn:
    """End the tests with a reason on stderr.

    It is no exception, since a test that expects one would take it for the candidate's.
    """
    sys.stderr.write(reason + "\n")
    sys.stderr.flush()
    os._exit(1)


def raise_named(names: Sequence[str], text: str, operation: str) -> NoReturn:
    """Raise the nearest of `ERRORS` among the class names of the candidate's exception."""
    if operation == "next" and names[0] == "StopIteration":
        raise StopIteration
    known = next((name for name in names if name in ERRORS), "Exception")
    if known == "Exception":
        raise Exception(f"{names[0]}: {text}")
    raise getattr(builtins, known)(text)


def replace(old: Any, new: Any) -> None:
    """Give a mutable argument its new content."""
    if not isinstance(old, type(new)):
        raise TypeError("an argument cannot change its type")
    old.clear()
    if isinstance(old, list | bytearray):
        old.extend(new)
    else:
        old.update(new)


def forward(operation: str) -> Callable[..., Any]:
    """A method that has the candidate do an operation on its object."""

    def method(self: Remote, *args: Any, **kwargs: Any) -> Any:
        return self._connection.ask(operation, self, *args, **kwargs)

    return method


class Remote:
    """An object of the candidate's, as the tests see it.

    It has no equality, membership and arithmetic of its own.
    """

    _connection: Connection
    _number: int

    def __init__(self, connection: Connection, number: int) -> None:
        object.__setattr__(self, "_connection", connection)
        object.__setattr__(self, "_number", number)

    __call__ = forward("call")
    __iter__ = forward("iter")
    __next__ = forward("next")
    __len__ = forward("len")
    __bool__ = forward("bool")
    __getitem__ = forward("getitem")
    __getattr__ = forward("getattr")
    __setattr__ = forward("setattr")


def verify(config: dict[str, Any], connection: Connection) -> None:
    """Run the tests with the candidate's functions; it returns only if they ran to their end."""
    tests = ModuleType("tests")
    candidate = connection.resolve(0)
    try:
        taken = {name: getattr(candidate, name) for name in config["names"]}
        execute(config["setup"], tests)
        tests.__dict__.update(taken)
        execute(config["tests"], tests)
    except BaseException as error:
        reason = "".join(traceback.format_exception_only(error)).strip()
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.line for frame in frames if frame.filename == "<tests>"]
        fail(f"{reason} in: {lines[-1]}" if lines else reason)
