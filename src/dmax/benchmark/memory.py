"""Memory of one decoding run, in a process of its own: what was allocated before would blur the peak.

    python -m dmax.benchmark.memory tiny-dmax bfloat16 16 64 7

Arguments: model, dtype, batch size, problems, their seed. Prints one JSON object; MiB resident, by
    Linux's own count
(`VmRSS` and `VmHWM` of /proc/self/status), null where there is none.
"""

from __future__ import annotations

import json
import subprocess
import sys

from transformers.utils import logging

from dmax.benchmark.measure import resident_mib
from dmax.llm import LLM
from dmax.params import DecodingParams
from dmax.tasks import get_task

Memory = dict[str, float | None]


def measure(model: str, dtype: str, batch_size: int, limit: int, seed: int) -> Memory:
    """MiB resident once the model is loaded, and at the peak; interpreter and torch included."""
    task = get_task("word_problems")
    prompts = [example.prompt for example in task.examples(limit, seed)]
    llm = LLM(model, dtype=dtype, device="cpu", max_batch_size=batch_size)
    loaded = resident_mib("VmRSS")
    llm.generate(prompts, DecodingParams(max_new_tokens=task.max_new_tokens))
    return {"loaded_mib": loaded, "peak_mib": resident_mib("VmHWM")}


def measure_apart(model: str, dtype: str, batch_size: int, limit: int, seed: int) -> Memory:
    """`measure` in a new process."""
    words = [
        sys.executable,
        "-m",
        "dmax.benchmark.memory",
        model,
        dtype,
        str(batch_size),
        str(limit),
        str(seed),
    ]
    output = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout
    memory: Memory = json.loads(output.splitlines()[-1])
    return memory


if __name__ == "__main__":
    logging.disable_progress_bar()
    name, kind, *numbers = sys.argv[1:]
    sys.stdout.write(json.dumps(measure(name, kind, *map(int, numbers))) + "\n")
