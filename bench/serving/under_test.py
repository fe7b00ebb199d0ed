"""`dmax serve` with `--dtype float64`, which the command itself does not offer.

A forward over more rows rounds differently, and in 16 or 32 bits that alone may turn an answer. To
see whether a server mixes up anything else, its answers are compared in 64.
"""

from __future__ import annotations

import sys

import dmax_command


def main() -> None:
    """Run the command."""
    dmax_command.spin_briefly(dmax_command.SPINS_BESIDE_OTHERS)  # before torch is loaded

    import torch

    from dmax import environment

    environment.DTYPES["float64"] = torch.float64
    sys.argv[1:1] = ["serve"]
    dmax_command.main()


if __name__ == "__main__":
    main()
