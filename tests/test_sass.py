"""What is read from machine code."""

import pytest

from bitune_kernels.testing.sass import overwritten

# A loop of one product [64, 8] per turn, its left operand in R8 .. R11 and its sums in R24 .. R27.
LOOP = """
        /*0000*/                   MOV R8, R2 ;
.L_x_0:
        /*0010*/                   WARPGROUP.ARRIVE ;
        /*0020*/                   HGMMA.64x8x16.F32.BF16 R24, R8, gdesc[UR4], R24, gsb0 ;
        /*0030*/                   {beside} ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, {pending} ;
        /*0050*/             @!P1  {after} ;
        /*0060*/              @P0  BRA `(.L_x_0) ;
        /*0070*/                   EXIT ;
.L_x_1:
        /*0080*/                   BPT.TRAP 0x1 ;
        /*0090*/                   MOV R8, R2 ;
        /*00a0*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, []),
        ({"beside": "ISETP.GT.AND P0, PT, R8, R24, PT"}, []),  # reads
        ({"beside": "STS.128 [R8], R24"}, []),
        ({"beside": "F2FP.BF16.F32.PACK_AB R11, R3, R2"}, ["F2FP.BF16.F32.PACK_AB R11, R3, R2"]),
        ({"beside": "LDS.128 R4, [R2]"}, []),
        ({"beside": "LDS.128 R5, [R2]"}, ["LDS.128 R5, [R2]"]),
        ({"beside": "SHFL.BFLY PT, R27, R2, 0x1, 0x1f"}, ["SHFL.BFLY PT, R27, R2, 0x1, 0x1f"]),
        ({"pending": "0x1", "after": "FADD R24, R24, R2"}, ["FADD R24, R24, R2"]),
        ({"pending": "0x1", "after": "FADD R28, R24, R2"}, []),
        ({"beside": "@P2  BRA `(.L_x_1)"}, []),  # what stands behind a trap belongs to another path
    ],
    ids=str,
)
def test_registers_of_running_products(changes, found):
    whole = {"beside": "FADD R12, R2, R3", "pending": "0x0", "after": "FMUL R8, R24, R2"} | changes
    code = LOOP.format(**whole)
    assert overwritten(code) == found
    as_cuobjdump_prints_it = code.replace("`(.L_x_0)", "0x10").replace("`(.L_x_1)", "0x80")
    assert overwritten(as_cuobjdump_prints_it) == found
