"""The process of `dmax.chat_template`: reads lines of requests, writes lines of results.

It is a script that is run by its path and imports nothing of this package, since that would take
longer than what it does. A request is `[template, messages, variables, limit]`, a result
`[text, reason]`, one of which is empty. A template that computes for too long ends the process.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from pathlib import Path
from typing import Any

CPU_SECONDS = 0.3  # published templates take less than a hundredth of it
MEMORY = 256 * 2**20  # bytes beyond those of the process itself


def serve() -> None:
    """Say that transformers is there, or why not; then render line by line until the input ends."""
    # Whatever libraries print is no result, so it goes to stderr.
    results = sys.stdout
    sys.stdout = sys.stderr
    try:
        from transformers.utils.chat_template_utils import render_jinja_template
    except ImportError as error:
        print(json.dumps(str(error)), file=results, flush=True)
        return
    limit_memory()
    print(json.dumps(None), file=results, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        # The default action ends the process, also within one long operation of the interpreter.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        result = render(render_jinja_template, *request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(result), file=results, flush=True)


def render(
    render_template: Any,
    template: str,
    messages: list[dict[str, str]],
    variables: dict[str, Any],
    limit: int,
) -> tuple[str, str]:
    """What a template makes of a chat, or why it makes nothing."""
    try:
        [text], _ = render_template(conversations=[messages], chat_template=template, **variables)
    except MemoryError:
        return "", "it takes too much memory"
    except Exception as error:  # a template is a program: it may raise anything
        return "", f"{type(error).__name__}: {str(error)[:1000]}"
    if len(text) > limit:
        return "", f"it writes {len(text)} characters, there is room for {limit}"
    return text, ""


def limit_memory() -> None:
    """Refuse this process more memory than it has and `MEMORY`; Linux alone knows what it has."""
    pages = Path("/proc/self/statm")
    if pages.exists():
        now = int(pages.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))


if __name__ == "__main__":
    serve()
