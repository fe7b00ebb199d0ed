"""What the program runs on, and records of hardware and weights to stand beside numbers."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dmax.errors import InputError, did_you_mean, shorten, show
from dmax.extras import DISTRIBUTION

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def select_device(device: str | torch.device = "auto") -> torch.device:
    """The device to use; "auto" is the first CUDA GPU, else the CPU, and "mps" only if asked for.

    Raises:
        InputError: an unknown device, or one that this machine or this build of torch does not
            have.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        if chosen.type == "cpu" and chosen.index:  # torch takes any, and there is one
            raise ValueError
    except (RuntimeError, TypeError, ValueError):
        choices = f"choose from {', '.join(DEVICES)} or, with an index, cuda:1"
        raise InputError(
            f"unknown device {show(device)}; {choices}", did_you_mean(device, DEVICES)
        ) from None
    try:
        torch.zeros(1, device=chosen).item()  # the meta device has tensors, but no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = shorten(str(error).partition("\n")[0].rstrip(".")) or "no reason given"
        message = f"device {str(device)!r} is not available on this machine: {reason}"
        raise InputError(message, "auto takes the best device there is") from None
    return chosen


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one for a while: Triton launches there, and graphs are captured there.

    Operations of PyTorch go where their tensors are, with this or without.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def sum_in_float32(device: torch.device) -> None:
    """Have a GPU sum products of 16 bits in float32, also where it splits the sum into parts.

    Where PyTorch lets it, cuBLAS adds the parts in bfloat16. It splits by the number of rows, so a
    result would depend on its neighbours in more than its last bits. This is for all of the
    process.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16; elsewhere it is emulated, many times slower."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and _cpu_has_bfloat16()


def select_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the weights; "auto" is bfloat16 where the hardware computes in it, else float32.

    Raises:
        InputError: a name or dtype that weights cannot have.
    """
    if dtype == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    for name, known in DTYPES.items():
        if dtype in (name, known):
            return known
    raise InputError(
        f"unknown dtype {show(str(dtype))}; choose from auto, {', '.join(DTYPES)}",
        did_you_mean(str(dtype), ("auto", *DTYPES)),
    )


def total_memory(device: torch.device | str) -> int | None:
    """Bytes of memory that a device has, whether they are free or not; None if nobody says."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "cpu" and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def lacks_compiler(device: torch.device) -> str | None:
    """The C++ compiler that `torch.compile` would call for a CPU, if it is not there; else None."""
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
        "dmax": _version(DISTRIBUTION),
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


def weights_digest(model: torch.nn.Module) -> str:
    """16 hexadecimal digits that tell weights apart.

    SHA-256 of every tensor's name, dtype, shape and bytes.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


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
    """Commit of the checkout that the package runs from, with a `+` if it has changes.

    None for an installed wheel.
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

    It is found by its UUID: under CUDA_VISIBLE_DEVICES the indices of nvidia-smi and of torch
    differ.
    """
    watts = _output(
        [
            "nvidia-smi",
            f"--id=GPU-{uuid}",
            "--query-gpu=power.limit",
            "--format=csv,noheader,nounits",
        ]
    )
    try:
        return float(watts or "")
    except ValueError:
        return None
