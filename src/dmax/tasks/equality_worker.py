"""The process behind `dmax.tasks.equality`: reads `[gold, answer]` lines, writes `true` or `false`.

A script, run by its path: it imports nothing of this package, which would take longer than
math-verify itself.
"""

from __future__ import annotations

import json
import logging
import sys


def serve() -> None:
    """Say that math-verify is there, or why not; then answer one line with one line until the input ends."""
    # whatever the parsers print is no reply
    replies = sys.stdout
    sys.stdout = sys.stderr
    try:
        from math_verify import parse, verify
    except ImportError as error:
        print(json.dumps(str(error)), file=replies, flush=True)
        return
    logging.disable()
    print(json.dumps(None), file=replies, flush=True)
    for line in sys.stdin:
        gold, answer = (parse(f"\\boxed{{{text}}}") for text in json.loads(line))
        print(json.dumps(bool(verify(gold, answer))), file=replies, flush=True)


if __name__ == "__main__":
    serve()
