"""Reads the machine code of a compiled kernel: what its innermost loops do, pipe by pipe.

A loop that reads weights is as fast as its busiest pipe allows. Dividing the bytes it reads by the
cycles of that pipe gives a ceiling, which must lie well above the bandwidth of the memory: else
the loop is bound by its arithmetic, however few bytes it reads.

`nvdisasm` and `cuobjdump` come with Triton. Rates of the pipes are those of compute capability 9.0
in the table of arithmetic throughput in NVIDIA's CUDA programming guide.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton

MULTIPROCESSORS = 132  # of an H100 or H200 (SXM)
HERTZ = 1.755e9  # that they hold under load
WARP = 32
QUARTERS = 4  # of a multiprocessor; each issues one instruction of one warp a cycle
REGISTERS = 65_536  # of a multiprocessor; a warp takes eight for each thread at a time
SHARED = 228 * 1024  # bytes of its shared memory, of which each program takes one KiB more
PROGRAMS = 32  # that it runs at the same time at most
WARPS = 64  # of these together
TENSOR_RATE = 2048  # products of bfloat16 that a multiprocessor adds up in a cycle, by wgmma
MMA_SHARE = 0.5  # of that rate, which `mma.sync` reaches
SHARED_RATE = 128  # bytes that shared memory moves in a cycle

ALU = set(
    "BMSK F2FP FMNMX FSEL FSETP HMNMX2 I2FP IABS IADD3 IMNMX ISETP LEA LOP3 MOV P2R PLOP3 PRMT "
    "R2P SEL SGXT SHF VABSDIFF VIADD VIADDMNMX VIMNMX".split()
)
FMA = set("FADD FFMA FMUL HADD2 HFMA2 HMUL2 HSET2 HSETP2".split())
WIDE_FMA = {"IMAD"}  # on half of the FMA lanes
CONVERSIONS = {"F2F", "F2I", "I2F"}  # one number at a time
XU = {"BREV", "FLO", "FRND", "MUFU", "POPC"} | CONVERSIONS
MEMORY = set("ATOM ATOMG ATOMS LD LDG LDGSTS LDL LDS LDSM RED SHFL ST STG STL STS STSM".split())
LOCAL = {"LDL", "STL"}
GLOBAL = set("ATOM ATOMG LD LDG LDGSTS RED ST STG".split())
WAIT = "ACQBULK"  # until earlier kernels have written everything (`griddepcontrol.wait`)
TENSOR = {"HGMMA", "HMMA", "IGMMA", "IMMA", "QGMMA"}
# Names of the pointers to what a kernel streams; all else it loads is small or is read again.
STREAMED = re.compile(r"tl\.load\(\s*(weight|k_at|v_at)")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of machine code.

    Attributes:
        name: `LDGSTS`.
        suffixes: `("E", "BYPASS", "128")`.
        target: label that a branch jumps to.
        file: of the source it was compiled from, with its line.
        line: see `file`.
    """

    name: str
    suffixes: tuple[str, ...]
    target: str | None
    file: str
    line: int

    @property
    def bytes_of_warp(self) -> int:
        """Bytes that a warp moves, if this moves any."""
        if self.name in ("LDSM", "STSM"):  # matrices of 8 rows of 16 bytes
            return 128 * next((int(each) for each in self.suffixes if each in ("2", "4")), 1)
        sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        return WARP * next((sizes[each] for each in self.suffixes if each in sizes), 4)


Code = list[tuple[str | None, Instruction]]
"""Instructions, each with the label before it, if there is one."""


def disassemble(cubin: bytes) -> str:
    """What `nvdisasm` prints of a kernel, with the lines of its source."""
    return _run("nvdisasm", cubin, "--print-code", "--print-line-info-inline")


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes it keeps outside of them."""
    told = _run("cuobjdump", cubin, "--dump-resource-usage")
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", told)}
    return {"registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"]}


def programs_at_once(registers: int, warps: int, shared: int) -> int:
    """Programs that a multiprocessor runs at the same time.

    Args:
        registers: of a thread.
        warps: of a program.
        shared: bytes of a program.
    """
    by_registers = REGISTERS // (-(-registers // 8) * 8 * WARP * warps)
    by_memory = SHARED // (shared + 1024)
    return min(by_registers, by_memory, WARPS // warps, PROGRAMS)


def _run(tool: str, cubin: bytes, *options: str) -> str:
    """What one of the programs in Triton's wheel prints of a kernel."""
    path = next(Path(triton.__file__).parent.glob(f"backends/nvidia/bin/{tool}"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(path), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read_code(text: str) -> Code:
    """The instructions in what `nvdisasm` prints; those that never run are left out."""
    place = re.compile(r'//## File "([^"]+)", line (\d+)')
    label = re.compile(r"^(\.\w+):")
    instruction = re.compile(r"/\*[0-9a-f]+\*/\s+(@\S+ )?\s*([A-Z]\w*)(\S*)\s*([^;]*);")
    code: Code = []
    file, line, before, is_new = "", 0, None, True
    for each in text.splitlines():
        if found := place.search(each):
            if is_new:  # the innermost place comes first, then those it is inlined at
                file, line = found[1], int(found[2])
            is_new = False
        elif found := label.match(each):
            before = found[1]
        elif found := instruction.search(each):
            is_new = True
            if found[1] == "@!PT ":
                continue
            jump = re.search(r"\((\.L\w+)\)", found[4]) if found[2] == "BRA" else None
            suffixes = tuple(found[3].strip(".").split("."))
            target = jump[1] if jump else None
            code.append((before, Instruction(found[2], suffixes, target, file, line)))
            before = None
    return code


def accesses_before_wait(code: Code) -> list[str] | None:
    """Instructions that touch global memory before earlier kernels are waited for.

    None for a kernel that does not wait: it is not started before they have ended.
    """
    names = [each.name for _, each in code]
    if WAIT not in names:
        return None
    return [name for name in names[: names.index(WAIT)] if name in GLOBAL]


def innermost_loops(code: Code) -> list[list[Instruction]]:
    """What lies between a label and a branch back to it, with no such pair inside."""
    begins = {label: place for place, (label, _) in enumerate(code) if label}
    ranges = [
        (begins[each.target], place)
        for place, (_, each) in enumerate(code)
        if each.target in begins and begins[each.target] < place
    ]
    innermost = [
        (begin, end)
        for begin, end in ranges
        if not any(
            begin <= other and last <= end and (other, last) != (begin, end)
            for other, last in ranges
        )
    ]
    return [[each for _, each in code[begin : end + 1]] for begin, end in innermost]


def cycles(loop: Sequence[Instruction]) -> dict[str, float]:
    """Cycles for which one warp's turn of the loop keeps each pipe of a multiprocessor busy."""
    busy: defaultdict[str, float] = defaultdict(float)
    for each in loop:
        busy["issue"] += 1 / QUARTERS
        if each.name in ALU:
            busy["alu"] += 2 / QUARTERS
        elif each.name in FMA:
            busy["fma"] += 1 / QUARTERS
        elif each.name in WIDE_FMA:
            busy["fma"] += 2 / QUARTERS
        elif each.name in XU:
            busy["xu"] += 8 / QUARTERS
        elif each.name in MEMORY:
            busy["shared"] += max(1, each.bytes_of_warp / SHARED_RATE)
        elif each.name in TENSOR:
            busy["tensor"] += _tensor_cycles(each)
    return dict(busy)


def _tensor_cycles(each: Instruction) -> float:
    """Of a product of one warp, or of a warp's share in one of four warps."""
    sizes = next(suffix for suffix in each.suffixes if re.fullmatch(r"[\dx]+", suffix))
    if "x" in sizes:  # 64x32x16, by four warps
        rows, columns, depth = map(int, sizes.split("x"))
        return rows * columns * depth / TENSOR_RATE / QUARTERS
    products = {"1688": 16 * 8 * 8, "16816": 16 * 8 * 16, "16832": 16 * 8 * 32}[sizes]
    return products / TENSOR_RATE / MMA_SHARE


def streamed_bytes(loop: Sequence[Instruction]) -> int:
    """Bytes of weights, or of keys and values, that a warp asks for in one turn of the loop."""
    return sum(each.bytes_of_warp for each in loop if each.name == "LDGSTS" and is_streamed(each))


def is_streamed(each: Instruction) -> bool:
    """Whether the line of source loads from a pointer to what is streamed."""
    return bool(STREAMED.search(source_line(each.file, each.line)))


@cache
def _source(file: str) -> list[str]:
    return Path(file).read_text(encoding="utf-8").splitlines()


def source_line(file: str, line: int) -> str:
    """A line of source; nothing of files that are not there."""
    return _source(file)[line - 1] if Path(file).is_file() else ""


def of_loop(loop: Sequence[Instruction]) -> dict[str, Any]:
    """What a loop does, for the report: counts for a warp's turn, and the ceiling in TB/s."""
    names = Counter(each.name for each in loop)
    busy = cycles(loop)
    streamed = streamed_bytes(loop)
    per_cycle = {pipe: streamed / time for pipe, time in busy.items()}
    return {
        "instructions": len(loop),
        "streamed_bytes": streamed,
        "conversions": sum(names[name] for name in CONVERSIONS),
        "local": sum(names[name] for name in LOCAL),
        "tensor": sum(names[name] for name in TENSOR),
        "copies": sorted({each.bytes_of_warp // WARP for each in loop if each.name == "LDGSTS"}),
        "cycles": {pipe: round(time, 2) for pipe, time in busy.items()},
        "ceilings": {
            pipe: round(rate * MULTIPROCESSORS * HERTZ / 1e12, 2)
            for pipe, rate in per_cycle.items()
        },
    }


def streaming_loops(code: Code) -> Iterator[dict[str, Any]]:
    """The innermost loops that copy weights, or keys and values, to shared memory."""
    for loop in innermost_loops(code):
        if streamed_bytes(loop):
            yield of_loop(loop)
