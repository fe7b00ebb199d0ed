"""`dmax bench` on a GPU: LLaDA-2.0-mini at full size with random weights, against the time it takes to read them.

Experts are prescribed (`routing.py`), so that a forward reads as many as with a trained model.
Steps are those of the engine; tokens per second follow from the tokens a step decodes (TPF), which
random weights cannot tell. With the options `rig.SMALL` all of it runs on a small shape, on a CPU
too, to see that it works.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dmax.benchmark.forwards import forwards
from dmax.benchmark.measure import copy_bandwidth
from dmax.benchmark.report import RATIO_COLUMNS, Row, Section, ratio
from dmax.benchmark.rig import GpuOptions, Rig, build
from dmax.benchmark.steps import by_batch, by_context, by_format, engine_steps

PUBLISHED = 1338.0
"""Tokens per second at batch 1 that the paper reports, on two H200 (arXiv 2604.08302)."""
TPF = range(1, 9)
TARGETS = {"H100": (1395, 2200), "H200": (1800, 2900)}
"""Tokens per second at TPF 6 that were aimed at, in bfloat16 and with 8-bit experts."""


def sections(options: GpuOptions, device: torch.device) -> Iterator[Section]:
    """The tables, each measured when it is asked for.

    Raises:
        InputError: the GPU has no room for the model.
    """
    rig = Rig(build(options, device), options, device, copy_bandwidth(device, options.copy_bytes))
    rig.free()  # what was copied
    yield machine(rig)
    yield forwards(rig)
    steps = engine_steps(rig)
    yield steps
    yield by_batch(rig)
    yield by_context(rig)
    quantised = by_format(rig)
    yield quantised
    yield speeds([*steps.rows, *quantised.rows])
    yield ratios(rig, steps.rows, quantised.rows)


def machine(rig: Rig) -> Section:
    """What the device can do, and the size of the model."""
    parameters = list(rig.checkpoint.model.parameters())
    row = {
        "device": torch.cuda.get_device_name(rig.device) if rig.on_gpu else "CPU",
        "gb_per_second": {name: value / 1e9 for name, value in rig.bandwidth.items()},
        "parameters": sum(parameter.numel() for parameter in parameters),
        "model_gib": sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        / 2**30,
    }
    columns = {
        "device": "device",
        "copy, GB/s": "gb_per_second:.1f",
        "parameters": "parameters:,d",
        "model, GiB": "model_gib:.2f",
    }
    note = "Copy: bytes read and written by a device-to-device copy; the floor of a forward is its bytes over this."
    return Section("machine", "device and model", columns, [row], note)


def speeds(rows: Sequence[Row]) -> Section:
    """What the steps amount to in tokens per second, by the tokens that a step decodes."""
    shown: list[Row] = [
        {"case": row["case"], "step_ms": row["step_ms"], **{f"tpf_{n}": speed(row, n) for n in TPF}}
        for row in rows
        if "error" not in row
    ]
    shown.append({"case": "published: two H200, not measured here", "reported": PUBLISHED})
    columns = {
        "case": "case",
        "ms/step": "step_ms:.2f",
        **{f"TPF {n}": f"tpf_{n}:.0f" for n in TPF},
    }
    note = "TPF over the time of a step; a block's first step, which also commits the block before, takes longer."
    return Section(
        "speeds", "tokens/s at batch 1", columns | {"reported": "reported:.0f"}, shown, note
    )


def speed(row: Row, tpf: float) -> float:
    """Tokens per second of a row of steps."""
    return float(tpf * row["batch"] * 1e3 / row["step_ms"]["median"])


def ratios(rig: Rig, steps: Sequence[Row], quantised: Sequence[Row]) -> Section:
    """What the tables amount to; targets are those of the full size, on the GPU they were set for."""
    measured = {row["case"]: row for row in [*steps, *quantised] if "error" not in row}
    rows = []
    if engine := measured.get("engine"):
        plain, eight_bit = _targets(rig)
        rows.append(ratio("share of the floor", engine["of_floor"], ">= 0.75" if plain else ""))
        rows.append(ratio("tokens/s at TPF 6", speed(engine, 6), plain))
        for case, row in measured.items():
            if case != "engine":
                gain = row["step_ms"]["median"] / engine["step_ms"]["median"]
                rows.append(
                    ratio(
                        f"engine / {case}", gain, ">= 5" if case == "grouped_mm" and plain else ""
                    )
                )
        rows += [
            ratio(f"tokens/s at TPF 6, {case}", speed(measured[case], 6), eight_bit)
            for case in ("int8 experts", "fp8 experts")
            if case in measured
        ]
        if plain:
            rows.append(
                ratio("tokens/s at TPF 6 / published on two H200", speed(engine, 6) / PUBLISHED)
            )
    return Section(
        "ratios",
        "ratios",
        RATIO_COLUMNS,
        rows,
        "Engine / other: how many times faster its steps are.",
    )


def _targets(rig: Rig) -> tuple[str, str]:
    """Of tokens per second in bfloat16 and with 8-bit experts; empty where none was set."""
    name = torch.cuda.get_device_name(rig.device) if rig.on_gpu and not rig.options.changes else ""
    found = next((targets for card, targets in TARGETS.items() if card in name), None)
    return (f">= {found[0]}", f">= {found[1]}") if found else ("", "")
