"""The process of `dmax.tasks.equality`: reads lines `[gold, answer]`, writes `true` or `false`.

It is a script that is run by its path. It imports nothing of this package, since that would take
longer than importing math-verify.
"""

from __future__ import annotations

import json
import logging
import sys


def serve() -> None:
    """Say that math-verify is there, or why not; then answer line by line until the input ends."""
    # Whatever the parsers print is no reply, so it goes to stderr.
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
