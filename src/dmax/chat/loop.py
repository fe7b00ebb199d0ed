"""The chat itself: a question or a command, what comes of it, and again, whatever goes wrong."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import closing
from os.path import expanduser
from pathlib import Path

from rich.console import Console
from rich.text import Text

from dmax.chat.commands import (
    OFF,
    SLASH,
    is_command,
    parse,
    usages,
    with_strategy,
    with_threshold,
)
from dmax.chat.drafts import Drafts
from dmax.chat.lines import Lines
from dmax.chat.responder import Answer, Outcome, Responder
from dmax.chat.screen import is_live, open_screen
from dmax.chat.session import DoesNotFit, Session
from dmax.cli.marks import visible
from dmax.cli.terminal import console as notes
from dmax.cli.terminal import doing, print_error
from dmax.cli.trace import USUAL_OUTPUT, check_place, write
from dmax.errors import InputError, one_line
from dmax.params import DecodingParams
from dmax.tiny import BUNDLED
from dmax.trace import Trace

EXAMPLE = (
    "Tom has 4 mugs. Later Tom hands 3 mugs to a teacher. Tom buys 3 mugs at the market. "
    "A magician makes it 3 times as many mugs. An aunt sends Tom 3 mugs by mail. "
    "Tom leaves 5 mugs at school. Find how many mugs Tom has at the end."
)
WIDE = 100  # columns in which every command has a line
KEPT = "what had settled is kept, and /retry asks again"


class Quit(Exception):
    """The chat is to end."""


class Chat:
    """A conversation between whoever types and whoever answers.

    Answers go to stdout, everything else to stderr.

    Args:
        responder: answers.
        params: how it decodes.
        system: what the model is told before the conversation; None: nothing.
        pace: seconds that each draft stays at least, for those who want to watch.
    """

    def __init__(
        self,
        responder: Responder,
        params: DecodingParams,
        system: str | None = None,
        pace: float = 0.0,
    ) -> None:
        responder.check(params)
        self._responder = responder
        self._params = params
        self._pace = pace
        self._session = Session(system)
        self._console = Console(file=sys.stdout, markup=False, emoji=False, highlight=False)
        self._lines = Lines(is_live=is_live(self._console))
        self._last: Answer | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "model": self._use_model,
            "strategy": self._use_strategy,
            "threshold": self._use_threshold,
            "system": self._use_system,
            "trace": self._write_trace,
            "retry": self._retry,
            "clear": self._clear,
            "help": self._help,
            "quit": self._quit,
        }

    def run(self) -> None:
        """Answer until the input ends."""
        if self._lines.is_terminal:
            self._welcome()
        was_interrupted = False
        while True:
            try:
                text = self._lines.read()
                was_interrupted = False
                self._heed(text)
            except (EOFError, Quit) as end:
                if isinstance(end, EOFError) and self._lines.is_terminal:
                    notes.print()  # the shell goes on in a line of its own
                return
            except InputError as error:
                print_error(one_line(error))
            except KeyboardInterrupt:
                if not self._lines.is_terminal:
                    raise
                notes.print()
                is_empty = not self._lines.has_typed()
                if is_empty and was_interrupted:
                    return
                was_interrupted = is_empty
                if is_empty:
                    _note("Ctrl-C once more or Ctrl-D ends the chat")

    def _heed(self, text: str) -> None:
        """Answer a question, or do what a command asks for."""
        if is_command(text):
            command = parse(text)
            self._commands[command.name](command.argument)
        elif text.strip():
            self._session.asked = text.strip()
            self._answer()

    # --- answers ---

    def _answer(self) -> None:
        """Answer the last question, as far as nobody ends it.

        Raises:
            InputError: there is no answer, or only a part of it, which is kept.
        """
        settled: list[str] = []
        try:
            with self._lines.unseen(), closing(self._begun()) as answer:
                self._show(answer, settled)
        except KeyboardInterrupt:
            if not self._lines.is_terminal:
                raise
            is_kept = self._keep(settled)
            _note(f"ended; {KEPT if is_kept else 'nothing had settled, so nothing is kept'}")
        except InputError as error:
            if not self._keep(settled):
                raise
            raise InputError(error.message, KEPT) from error
        else:
            self._session.answer("".join(settled))
            self._last = answer
            assert answer.outcome is not None, "an answer that was read to its end has one"
            _note(in_words(answer.outcome, self._params.max_new_tokens))

    def _begun(self) -> Answer:
        """The answer to the last question and to as many turns before it as fit the context."""
        session = self._session
        before = session.num_left_out
        while True:
            try:
                answer = self._responder.answer(session.messages(), self._params)
            except DoesNotFit:
                if session.leave_out():
                    continue
                session.num_left_out = before
                raise
            if session.num_left_out > before:
                _note(left_out(session.num_left_out))
            return answer

    def _show(self, answer: Answer, settled: list[str]) -> None:
        """Show an answer while it is written; `settled` takes its text."""
        drafts = Drafts(self._params.max_new_tokens)
        with open_screen(self._console) as screen:
            for part in answer:
                settled.append(part.settled)
                if part.frame is not None:
                    drafts.take(part.frame, answer.eos_token_ids)
                if part.frame is None or part.frame.kind == "provisional" or part.settled:
                    screen.show(part.settled, drafts.pieces())
                if part.frame is not None and self._pace:
                    time.sleep(self._pace)

    def _keep(self, settled: list[str]) -> bool:
        """Keep what has settled of an answer that was ended, if there is anything."""
        text = "".join(settled)
        if not text.strip():
            return False
        self._session.answer(text)
        return True

    # --- commands ---

    def _use_model(self, name: str) -> None:
        if name:
            with doing(f"loading {name}"):
                self._responder.use(name)
            self._session.include_all()
            self._last = None  # the model before would be kept for it
        self._tell_settings()

    def _use_strategy(self, text: str) -> None:
        if text:
            self._use(with_strategy(self._params, text))
        self._tell_settings()

    def _use_threshold(self, text: str) -> None:
        if text:
            self._use(with_threshold(self._params, text))
        self._tell_settings()

    def _use(self, params: DecodingParams) -> None:
        self._responder.check(params)
        self._params = params

    def _tell_settings(self) -> None:
        _note(self._responder.describe(self._params))

    def _use_system(self, text: str) -> None:
        if text:
            self._session.system = None if text == OFF else text
            self._session.include_all()
        said = self._session.system
        _note("no system message" if said is None else f"system message: {said}")

    def _write_trace(self, name: str) -> None:
        if self._last is None:
            raise InputError("there is no finished answer to trace", hint="ask a question first")
        path = Path(expanduser(name)) if name else USUAL_OUTPUT
        check_place(path)
        write(path, [Trace.from_record(self._last.trace())])
        _note(f"the last answer, step by step: {path}")

    def _retry(self, _: str) -> None:
        self._session.take_back()
        self._answer()

    def _clear(self, _: str) -> None:
        self._session.clear()
        _note("the conversation is forgotten")

    def _help(self, _: str) -> None:
        rows = usages()
        column = max(len(usage) for usage, _ in rows)
        is_wide = notes.width >= WIDE
        for usage, what in rows:
            line = f"{usage:{column}}  {what}" if is_wide else f"{usage}\n  {what}"
            notes.print(Text(line))
        _note(
            'A line that ends with \\ goes on in the next one; """ begins and ends a text of '
            "several lines. Ctrl-C ends an answer, Ctrl-D the chat."
        )

    def _quit(self, _: str) -> None:
        raise Quit

    def _welcome(self) -> None:
        _note(f"{self._responder.describe(self._params)}; {SLASH}help lists commands, Ctrl-D ends")
        if self._responder.name in BUNDLED:
            _note(
                f"It solves word problems, one at a time ({SLASH}clear before the next), such as: "
                f"{EXAMPLE}"
            )
            if not self._pace:
                _note("Its answers take no time; begin with --pace 0.2 to watch them sharpen")


def in_words(outcome: Outcome, limit: int) -> str:
    """What an answer cost, on one line; what a server does not tell is left out."""
    parts = []
    if outcome.num_tokens is not None:
        parts.append(f"{outcome.num_tokens} tokens")
    if outcome.num_forwards is not None:
        parts.append(f"{outcome.num_forwards} forwards")
    if outcome.tokens_per_forward is not None:
        parts.append(f"TPF {outcome.tokens_per_forward:.2f}")
    parts.append(f"{outcome.seconds:.2f} s")
    if outcome.finish_reason == "length":
        is_full = outcome.num_tokens is not None and outcome.num_tokens < limit
        parts.append("cut where the context ends" if is_full else "cut by --max-new-tokens")
    return ", ".join(parts)


def left_out(num_turns: int) -> str:
    """What is said when the oldest turns do not fit the context any more."""
    if num_turns == 1:
        return "the oldest turn no longer fits the context and is left out"
    return f"the {num_turns} oldest turns no longer fit the context and are left out"


def _note(text: str) -> None:
    """A dim line beside the answers."""
    style = "" if notes.no_color else "dim"
    notes.print(Text(visible(text)), style=style, soft_wrap=not notes.is_terminal)
