"""What the program runs on: device and dtype with the reason for the choice, and versions.

The record of hardware and versions stands beside every number that was measured.
"""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dmax.errors import InputError, did_you_mean

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def select_device(device: str | torch.device = "auto") -> tuple[torch.device, str]:
    """The device to use and why.

    "auto" is the first CUDA GPU, else the CPU. Others, such as "mps", are used only if asked for.

    Raises:
        InputError: an unknown device, or one that this machine or this build of torch does not
            have.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda"), f"{torch.cuda.get_device_name()} is present"
        return torch.device("cpu"), "no CUDA GPU is present"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        choices = f"choose from {', '.join(DEVICES)} or, with an index, cuda:1"
        raise InputError(
            f"unknown device {device!r}; {choices}", did_you_mean(str(device), DEVICES)
        ) from None
    try:
        torch.zeros(1, device=chosen).item()  # the meta device has tensors, but no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0].rstrip(".")
        message = f"device {str(device)!r} is not available on this machine: {reason}"
        raise InputError(message, "auto takes the best device there is") from None
    return chosen, "asked for"


def select_dtype(dtype: str | torch.dtype, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of the weights and why.

    "auto" is bfloat16 where the hardware computes in it, else float32.

    Raises:
        InputError: a name or dtype that weights cannot have.
    """
    if dtype == "auto":
        if device.type == "cpu" and _cpu_has_bfloat16():
            return torch.bfloat16, "the processor computes in it; float32 on request, exact"
        if device.type != "cuda":
            return torch.float32, f"{device.type} does not compute in bfloat16 by itself"
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return torch.bfloat16, f"the GPU computes in it (sm{major}{minor})"
        return torch.float32, f"the GPU (sm{major}{minor}) does not compute in bfloat16"
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise InputError(
            f"unknown dtype {str(dtype)!r}; choose from auto, {', '.join(DTYPES)}",
            did_you_mean(str(dtype), ("auto", *DTYPES)),
        )
    return chosen, "asked for"


def lacks_compiler(device: torch.device) -> str | None:
    """The C++ compiler that `torch.compile` wants for a CPU, if it is missing; else None."""
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    return name if device.type == "cpu" and shutil.which(name) is None else None


def environment(device: torch.device | str | None = None) -> dict[str, Any]:
    """A JSON-ready record of hardware and versions; fields that cannot be found out are None.

    Args:
        device: what the numbers were computed on; the GPU's name and power limit are recorded for a
            CUDA device only.
    """
    chosen = torch.device("cpu" if device is None else device)
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "dmax": _version("dmax"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "device": str(chosen),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if chosen.type == "cuda":
        properties = torch.cuda.get_device_properties(chosen)
        record["gpu"] = properties.name
        record["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        record["gpu_power_limit_w"] = _power_limit(str(properties.uuid))
        record["cuda"] = torch.version.cuda
    return record


def _cpu_has_bfloat16() -> bool:
    """Whether the processor has instructions for products in bfloat16 (AVX-512 BF16 or AMX)."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def _output(command: Sequence[str]) -> str | None:
    """What a program prints, or None if it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout that the package runs from; None for an installed wheel.

    A `+` after it says that the checkout has changes.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    describe = ["describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
    return _output(["git", "-C", str(root), *describe])


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _power_limit(uuid: str) -> float | None:
    """Watts that the GPU may draw.

    It is named by its UUID: with CUDA_VISIBLE_DEVICES, torch and nvidia-smi count differently.
    """
    query = ["--query-gpu=power.limit", "--format=csv,noheader,nounits"]
    watts = _output(["nvidia-smi", f"--id=GPU-{uuid}", *query])
    try:
        return float(watts or "")
    except ValueError:
        return None
