"""A kernel that is compiled anew for every length of the context stops a request for seconds."""

from __future__ import annotations

from test_compiled import output


def test_a_request_of_16384_positions_compiles_each_kernel_twice_at_most() -> None:
    lines = output("count_compiles.py")
    counts = {name: int(number) for name, number in map(str.split, lines)}
    assert {"_attend_kernel", "_merge_kernel", "_gate_up_kernel", "_tile_kernel"} <= counts.keys()
    # One block in the forward, and two where the one before it goes into the cache.
    assert {name: number for name, number in counts.items() if number > 2} == {}
