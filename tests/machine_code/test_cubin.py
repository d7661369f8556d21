"""What cuobjdump prints, as numbers; and the occupancy that follows, against numbers by hand."""

import pytest

from bench.cubin import CHIPS, Code, Usage, blocks_an_sm, figures, read_sass, read_usage

USAGE = """
Fatbin elf code:
================
arch = sm_80

Resource usage:
 Common:
  GLOBAL:0
 Function attention:
  REG:168 STACK:8 SHARED:512 LOCAL:4 CONSTANT[0]:424 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN9fasttrace4stepILi8EEEv:
  REG:32 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

SASS = """
	code for sm_80
		Function : attention
	.headerflags	@"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS EF_CUDA_SM80"
        /*0000*/                   MOV R1, c[0x0][0x28] ;              /* 0x00000a0000017a02 */
                                                                       /* 0x000fe40000000f00 */
        /*0010*/              @!P0 LDG.E.128 R4, [R2.64] ;             /* 0x0000000402047981 */
        /*0020*/               @P1 LDGSTS.E.BYPASS.LTC128B.128 [R9], [R2.64] ;  /* 0x0 */
        /*0030*/                   LDGSTS.E.LTC128B.64 [R9], [R2.64] ; /* 0x0 */
        /*0040*/             @!UP0 LDG.E.U16 R4, [R2.64] ;             /* 0x0 */
        /*0050*/              @!PT HMMA.16816.F32 R4, R8, R20, R4 ;    /* 0x0 */
        /*0060*/                   HMMA.1688.F32.TF32 R4, R8, R20, R4 ; /* 0x0 */
        /*0070*/                   STL [R1+0x4], R9 ;                  /* 0x0 */
        /*0080*/                   LDL.64 R8, [R1] ;                   /* 0x0 */
        /*0090*/                   LDGDEPBAR ;                         /* 0x0 */
		..........


		Function : step
        /*0000*/                   HGMMA.64x32x16.F32 R24, gdesc[UR4], R24, gsb0 ; /* 0x0 */
        /*10a0*/                   EXIT ;                              /* 0x0 */
"""


def test_resources_of_each_function():
    used = read_usage(USAGE)
    assert used["attention"] == Usage(registers=168, local=12, shared=512)
    assert used["_ZN9fasttrace4stepILi8EEEv"] == Usage(registers=32, local=0, shared=0)


def test_instructions_of_each_function():
    code = read_sass(SASS)
    assert len(code["attention"].opcodes) == 10
    assert code["attention"].opcodes[0] == "MOV"
    assert code["step"].opcodes == ("HGMMA.64x32x16.F32", "EXIT")


def test_figures_count_what_matters():
    found = figures(
        CHIPS[80],
        read_usage(USAGE)["attention"],
        read_sass(SASS)["attention"],
        shared=1024,
        warps=4,
    )
    assert (found.registers, found.spilled, found.shared, found.warps) == (168, 12, 1536, 4)
    assert (found.tensor_unit, found.tensor_instructions) == ("HMMA", 2)
    assert found.tensor_macs == 16 * 8 * 16 + 16 * 8 * 8
    assert (found.loads, found.wide_loads, found.local_accesses) == (4, 2, 2)


def test_a_group_of_four_warps_counts_as_one_warp_of_it():
    code = read_sass(SASS)["step"]
    assert (code.tensor_unit, code.tensor_macs) == ("HGMMA", 64 * 32 * 16 // 4)


def test_uniform_registers_that_nothing_writes():
    """As ptxas 12.8 writes it: a descriptor made of UR16, which holds whatever was there."""
    code = """
		Function : attention
        /*0000*/                   ULDC.64 UR4, c[0x0][0x238] ;        /* 0x0 */
        /*0010*/                   UIMAD.WIDE.U32 UR6, UR5, UR4, URZ ; /* 0x0 */
        /*0020*/                   LDG.E.128 R4, desc[UR20][R2.64+0x40] ; /* 0x0 */
        /*0030*/                   UIADD3 UR8, UP0, {low}, 0x20, URZ ; /* 0x0 */
        /*0040*/                   UIADD3.X UR9, UR7, -0x3ffffff0, URZ, UP0, !UPT ; /* 0x0 */
        /*0050*/                   UIADD3.64 UR10, UR8, 0x40, URZ ;    /* 0x0 */
        /*0060*/                   HGMMA.64x16x16.F32 R24, R44, gdesc[UR8].tnspB, R24 ; /* 0x0 */
    """
    assert read_sass(code.format(low="UR16"))["attention"].unwritten == (16,)
    assert read_sass(code.format(low="UR6"))["attention"].unwritten == ()
    assert read_sass(SASS)["step"].unwritten == (4, 5, 6, 7)


@pytest.mark.parametrize("read", [read_usage, read_sass])
def test_text_that_says_nothing_is_an_error(read):
    with pytest.raises(ValueError, match="cuobjdump info"):
        read("cuobjdump info    : File 'kernel.cubin' does not contain device code")


@pytest.mark.parametrize(
    ("capability", "registers", "shared", "warps", "blocks"),
    [
        (80, 32, 0, 4, 16),  # 16 blocks of 4 warps fill 64 warps
        (80, 16, 0, 1, 32),  # no more blocks than that
        (80, 128, 0, 4, 4),  # 4096 registers a warp: 4 warps in each quarter
        (80, 129, 0, 4, 3),  # handed out in portions of 256 a warp: 136 x 32 = 4352
        (80, 255, 0, 8, 1),  # 2 warps a quarter
        (80, 168, 0, 8, 1),  # 3 warps a quarter, 12 in all
        (80, 128, 81 * 1024, 4, 2),  # with the one reserved, 82 of 164
        (80, 128, 81 * 1024 + 1, 4, 1),
        (80, 64, 163 * 1024, 4, 1),
        (80, 64, 163 * 1024 + 1, 4, 0),
        (90, 64, 227 * 1024, 4, 1),
        (86, 64, 99 * 1024, 4, 1),
        (86, 32, 0, 4, 12),  # 48 warps
        (89, 16, 0, 1, 24),
    ],
)
def test_occupancy_by_hand(capability, registers, shared, warps, blocks):
    chip = CHIPS[capability]
    assert blocks_an_sm(chip, registers=registers, shared=shared, warps=warps) == blocks


def test_an_unknown_tensor_instruction_is_an_error():
    with pytest.raises(KeyError, match="99999"):
        _ = Code(("HMMA.99999.F32",)).tensor_macs
