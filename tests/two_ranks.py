"""Two processes that torchrun starts on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

TORCHRUN = 'Traceback (most recent call last):\n  File "<frozen runpy>"'  # its report of a failure


def launch(
    *command: object, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a module or a script in two processes; what both write is put together as `stdout`.

    Args:
        command: what stands after `torchrun`.
        environment: variables of theirs beside ours.
    """
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        + [str(part) for part in command],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",  # torchrun tells the signal that ended a rank, not the place
        }
        | dict(environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    ended.stdout = ended.stdout.partition(TORCHRUN)[0]
    return ended
