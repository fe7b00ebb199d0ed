"""A story played again at a speed that can be read, or as a few stills where nothing can move."""

from __future__ import annotations

import time

from rich.console import Console
from rich.control import Control
from rich.live import Live
from rich.text import Text

from dmax.cli.marks import signs
from dmax.demo.screen import answers, legend, picture, problem
from dmax.demo.story import Story

PICTURES_PER_SECOND = 20
TITLE = "One unseen problem, written three ways"


def show(console: Console, story: Story, seconds: float) -> None:
    """Play a story in that many seconds, and leave its last picture standing.

    A pipe, or a terminal that cannot move its cursor, gets stills.
    """
    if console.is_interactive and console.file.isatty():  # colours may be forced on a pipe
        _play(console, story, seconds)
        moments = [story.seconds]
    else:
        *fast_ends, end = sorted(recording.seconds for recording in story.recordings)
        moments = [fast_ends[-1] / 2, fast_ends[-1], end]
    console.print(Text(TITLE, style="bold"))
    console.print(problem(story.example))
    for moment in moments:
        if len(moments) > 1:
            console.print(Text(f"\nafter {moment:.3f} s"))
        console.print(answers(console, story, moment))
    console.print(legend(signs(console)))


def _play(console: Console, story: Story, seconds: float) -> None:
    """All answers by one clock, on a screen of their own that is gone afterwards."""
    slower = seconds / story.seconds
    title = f"{TITLE}: a replay, {slower:.0f} times slower than it was"
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            began = time.perf_counter()
            while (passed := time.perf_counter() - began) < seconds:
                moment = passed / slower
                height = console.height  # at every picture: the terminal may be resized
                live.update(picture(console, story, moment, title, height), refresh=True)
                time.sleep(1 / PICTURES_PER_SECOND)
    finally:  # an interruption may come before `Live` knows that it has begun
        console.control(Control.alt_screen(False))
        console.show_cursor(True)
