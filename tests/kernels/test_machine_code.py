"""Reading machine code: a listing whose loops and cycles are worked out by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import machine_code  # noqa: E402

SOURCE = """\
a = tl.load(left_at)
b = tl.load(weight_at)
"""
# An outer loop around an inner one, and the jump to itself that stands at the end of every kernel.
LISTING = """
.L_x_0:
        /*0000*/                   IMAD R1, R2, R3, RZ ;
.L_x_1:
        //## File "{file}", line 1 inlined at "{file}", line 9
        //## File "{file}", line 9
        /*0010*/              @!PT LDS RZ, [RZ] ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R42], desc[UR8][R64.64], P2 ;
        //## File "{file}", line 2 inlined at "{file}", line 9
        //## File "{file}", line 9
        /*0030*/                   LDGSTS.E.BYPASS.128 [R42+0x800], desc[UR8][R62.64], P2 ;
        /*0040*/                   LDGSTS.E.64 [R42+0x900], desc[UR8][R60.64], P2 ;
        /*0050*/                   LDSM.16.M88.4 R4, [R5] ;
        /*0060*/                   F2F.BF16.F32 R6, R7 ;
        /*0070*/                   LOP3.LUT R4, R0.reuse, 0x7, RZ, 0xc0, !PT ;
        /*0080*/                   HMMA.16816.F32.BF16 R8, R12, R16, R8 ;
        /*0090*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*00a0*/              @!P1 BRA `(.L_x_1) ;
        /*00b0*/               @P0 BRA `(.L_x_0) ;
        /*00c0*/                   EXIT ;
.L_x_2:
        /*00d0*/                   BRA `(.L_x_2);
"""


@pytest.fixture
def loop(tmp_path: Path) -> list[machine_code.Instruction]:
    file = tmp_path / "kernel.py"
    file.write_text(SOURCE, encoding="utf-8")
    (found,) = machine_code.innermost_loops(
        machine_code.read_code(LISTING.replace("{file}", str(file)))
    )
    return found


def test_the_innermost_loop(loop: list[machine_code.Instruction]) -> None:
    names = "LDGSTS LDGSTS LDGSTS LDSM F2F LOP3 HMMA HGMMA BRA".split()
    assert [each.name for each in loop] == names  # without what never runs
    assert [each.line for each in loop[:3]] == [1, 2, 2]


def test_bytes_are_those_of_the_line_that_loads_weights(
    loop: list[machine_code.Instruction],
) -> None:
    assert machine_code.streamed_bytes(loop) == 32 * 16 + 32 * 8


def test_cycles_of_each_pipe(loop: list[machine_code.Instruction]) -> None:
    assert machine_code.cycles(loop) == {
        "issue": 9 / 4,
        "alu": 1 / 2,
        "xu": 2,
        "shared": 4 + 4 + 2 + 4,  # 512, 512, 256 and 512 bytes
        "tensor": 2048 / 1024 + 64 * 32 * 16 / 2048 / 4,
    }


def test_what_a_loop_does(loop: list[machine_code.Instruction]) -> None:
    told = machine_code.of_loop(loop)
    assert (told["conversions"], told["local"], told["tensor"]) == (1, 0, 2)
    assert told["copies"] == [8, 16]
    assert told["ceilings"]["shared"] == round(768 / 14 * 132 * 1.755e9 / 1e12, 2)


def test_how_many_programs_a_multiprocessor_runs() -> None:
    assert machine_code.programs_at_once(registers=249, warps=2, shared=49_664) == 4  # shared
    assert machine_code.programs_at_once(registers=249, warps=2, shared=25_088) == 4  # registers
    assert machine_code.programs_at_once(registers=225, warps=8, shared=0) == 1  # as if 232
    assert machine_code.programs_at_once(registers=32, warps=16, shared=0) == 4
    assert machine_code.programs_at_once(registers=16, warps=1, shared=0) == 32


def test_what_is_touched_before_the_wait() -> None:
    listing = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E R2, desc[UR4][R2.64] ;
        /*0020*/                   LDS R3, [R4] ;
        /*0030*/                   ACQBULK ;
        /*0040*/                   STG.E desc[UR4][R2.64], R5 ;
        /*0050*/                   EXIT ;
    """
    assert machine_code.accesses_before_wait(machine_code.read_code(listing)) == ["LDG"]
    without = machine_code.read_code(listing.replace("ACQBULK", "NOP"))
    assert machine_code.accesses_before_wait(without) is None
