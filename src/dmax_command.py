"""The `dmax` command's first lines: settings that have to be made before libraries are loaded.

They belong to the command's own process, so they stand outside the package: `import dmax` leaves
the environment of its process alone.
"""

from __future__ import annotations

import os
import sys

SPINS = 2000
SPINS_BESIDE_OTHERS = 100
"""In a server the event loop and clients want the cores, too. 128 requests of 8 callers took 5.8 s
of computing time with so few, and 11 with the number above."""


def spin_briefly(spins: int) -> None:
    """Have idle OpenMP threads of torch sleep soon, unless the user has said what they should do.

    They spin for milliseconds before they sleep. That is worth a tenth when the cores are ours
    alone, and makes everything ten times slower or worse when they are shared. OpenMP reads the
    variable once, when torch is loaded.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(spins))


def main() -> None:
    """Entry point of the `dmax` command."""
    spin_briefly(SPINS_BESIDE_OTHERS if "serve" in sys.argv[1:] else SPINS)
    os.environ["MPLBACKEND"] = "agg"  # plots are files; one that is not here stops matplotlib
    try:
        from dmax.cli import main as run

        run()
    except KeyboardInterrupt:  # before or after a command, which has an end of its own
        sys.exit(130)
