"""Memory of one decoding run, in a process of its own: earlier allocations would blur the peak.

    python bench/memory.py tiny-dmax bfloat16 16 64 7

Arguments: model, dtype, batch size, problems, their seed. Prints one JSON object: MiB resident by
Linux's own count (`VmRSS` and `VmHWM` of /proc/self/status), null where there is none.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from transformers.utils import logging

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


def resident_mib(field: str) -> float | None:
    """`VmRSS` (now) or `VmHWM` (peak) of this process in MiB; None where Linux does not count."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    sizes = [int(line.split()[1]) for line in lines if line.startswith(f"{field}:")]
    return sizes[0] / 1024 if sizes else None


def measure_apart(model: str, dtype: str, batch_size: int, limit: int, seed: int) -> Memory:
    """`measure` in a new process."""
    arguments = [model, dtype, str(batch_size), str(limit), str(seed)]
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    memory: Memory = json.loads(done.stdout.splitlines()[-1])
    return memory


if __name__ == "__main__":
    logging.disable_progress_bar()
    name, kind, *numbers = sys.argv[1:]
    print(json.dumps(measure(name, kind, *map(int, numbers))))
