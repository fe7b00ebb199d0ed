"""What a line that begins with a slash asks for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dmax.cli.options import named_values
from dmax.errors import InputError, did_you_mean, shorten, show
from dmax.params import AUTO, DecodingParams

SLASH = "/"
OFF = "off"


@dataclass(frozen=True, slots=True)
class Usage:
    """How a command is used.

    Attributes:
        argument: what may stand behind it; empty: nothing.
        what: it does.
    """

    argument: str
    what: str


COMMANDS = {
    "model": Usage("[NAME]", "let another model answer; without a name, say which one does"),
    "strategy": Usage("[NAME [OPTION=VALUE …]]", f"decode by another strategy, or by {AUTO}"),
    "threshold": Usage("[NUMBER]", f"decode at this confidence, from 0 to 1, or at {AUTO}"),
    "system": Usage("[TEXT]", f"what the model is told before the conversation; {OFF}: nothing"),
    "trace": Usage("[FILE]", "write the last answer as a page that plays its steps, or as .json"),
    "retry": Usage("", "ask the last question again"),
    "clear": Usage("", "forget the conversation"),
    "help": Usage("", "list the commands"),
    "quit": Usage("", "end, as Ctrl-D does"),
}
SHORT = {"exit": "quit", "?": "help"}


@dataclass(frozen=True, slots=True)
class Command:
    """A command with what stands behind it; empty: nothing."""

    name: str
    argument: str


def is_command(line: str) -> bool:
    """Whether a line is a command; a space before the slash makes it a question."""
    return line.startswith(SLASH)


def parse(line: str) -> Command:
    """The command that a line names.

    Raises:
        InputError: there is none of that name, or it takes nothing and something stands behind it.
    """
    typed, _, argument = line.removeprefix(SLASH).partition(" ")
    name = typed.strip().lower()
    name = SHORT.get(name, name)
    argument = argument.strip()
    if name not in COMMANDS:
        raise InputError(
            f"there is no command `{SLASH}{shorten(typed)}`",
            did_you_mean(f"{SLASH}{name}", [f"{SLASH}{each}" for each in COMMANDS])
            or f"{SLASH}help lists them; a space before the slash makes it a question",
        )
    if argument and not COMMANDS[name].argument:
        raise InputError(f"`{SLASH}{name}` takes nothing behind it, got {show(argument)}")
    return Command(name, argument)


def usages() -> list[tuple[str, str]]:
    """How each command is written, and what it does."""
    return [(f"{SLASH}{name} {usage.argument}", usage.what) for name, usage in COMMANDS.items()]


def with_threshold(params: DecodingParams, text: str) -> DecodingParams:
    """Settings with the threshold that stands behind `/threshold`.

    Raises:
        InputError: it is no number between 0 and 1.
    """
    if text == AUTO:
        return replace(params, threshold=None)
    try:
        threshold = float(text)
    except ValueError:
        raise InputError(
            f"`{SLASH}threshold` takes a number between 0 and 1, or {AUTO}, got {show(text)}",
            hint=f"for example {SLASH}threshold 0.5",
        ) from None
    return replace(params, threshold=threshold)


def with_strategy(params: DecodingParams, text: str) -> DecodingParams:
    """Settings with the strategy and the options that stand behind `/strategy`.

    The threshold becomes the strategy's own, since the one before was chosen for another.

    Raises:
        InputError: an option of another form. Whether there is such a strategy is known when it is
            made.
    """
    name, *options = text.split()
    values = named_values(options, flag=f"{SLASH}strategy {name}")
    return replace(params, strategy=name, threshold=None, options=values)
