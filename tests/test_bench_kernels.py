"""The tools behind bench/KERNELS.md: reading machine code, residency, what the emulator records."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from backends import ROOT, make_backend
from emulator import settings

sys.path.insert(0, str(ROOT / "bench"))

from gpu import model, sass

KERNELS = ROOT / "bench" / "KERNELS.md"

# A loop of a masked and a plain way round, both with one product; an inner loop that copies; a tail.
CODE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDGSTS.E.BYPASS.128 [R2], [R4.64] ;
        /*0020*/               @P1 BRA 0x10 ;
        /*0030*/                   ISETP.NE.AND P0, PT, R0, RZ, PT ;
        /*0040*/               @P0 BRA 0x90 ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0060*/                   FSEL R4, R4, -INF , P2 ;
        /*0070*/                   FSEL R5, R5, -INF , P2 ;
        /*0080*/                   BRA 0xa0 ;
        /*0090*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*00a0*/                   MUFU.EX2 R4, R4 ;
        /*00b0*/              @!P3 BRA 0x30 ;
        /*00c0*/                   STG.E.128 [R2.64], R4 ;
        /*00d0*/                   EXIT ;
        /*00e0*/                   BRA 0xe0 ;
"""


def test_main_loop_takes_the_short_way() -> None:
    code = sass.parse(CODE)
    assert [i.opcode for i in sass.main_loop(code, "tensor")] == [
        "ISETP.NE.AND", "BRA", "HMMA.16816.F32.BF16", "MUFU.EX2", "BRA",
    ]  # fmt: skip
    assert [i.opcode for i in sass.main_loop(code, "loads")] == ["LDGSTS.E.BYPASS.128", "BRA"]
    assert sass.main_loop(code, "fp32") == []
    assert sass.hot_path(code, "fp32", leaving=True)[-1].opcode == "EXIT"
    assert sass.mix(code)["tensor"] == 2


@pytest.mark.parametrize(
    ("opcode", "bytes_", "flops"),
    [
        ("LDG.E.128.CONSTANT", 512, 0), ("LDG.E.U16", 64, 0), ("LDSM.16.M88.4", 512, 0), ("LDS.64", 256, 0),
        ("FFMA.FTZ", 0, 0), ("HMMA.16816.F32", 0, 4096), ("HGMMA.64x128x16.F32.BF16", 0, 65536),
    ],
)  # fmt: skip
def test_instructions(opcode: str, bytes_: float, flops: float) -> None:
    i = sass.Instruction(0, opcode)
    assert (i.bytes, i.flops) == (bytes_, flops)


def test_resources() -> None:
    text = (
        "Fatbin elf code:\n====\narch = sm_90a\n\n Function k1:\n  REG:168 STACK:0 SHARED:1024 LOCAL:0 X\n\n"
        "Fatbin elf code:\n====\narch = sm_80\n\n Function k1:\n  REG:40 STACK:8 SHARED:0 LOCAL:4 X\n"
    )
    found = sass.parse_resources(text)
    assert found == {"sm_90a": {"k1": sass.Usage(168, 0, 1024, 0)}, "sm_80": {"k1": sass.Usage(40, 8, 0, 4)}}


@pytest.mark.parametrize(
    ("threads", "registers", "smem", "blocks"),
    [
        (128, 168, 70800, 3),  # 71 of 228 KiB
        (256, 255, 0, 1),
        (256, 32, 0, 8),
        (32, 16, 0, 32),  # no more blocks than that
        (1024, 64, 0, 1),
        (384, 168, 168960, 1),
        (1024, 65, 0, 0),  # does not run
    ],
)
def test_blocks_per_sm(threads: int, registers: int, smem: int, blocks: int) -> None:
    assert model.blocks_per_sm(threads, registers, smem) == blocks


def test_estimate() -> None:
    """A launch that only copies is bound by memory, one that only multiplies by the tensor cores."""
    usage = sass.Usage(32, 0, 0, 0)
    launch = model.Launch("k", (132 * 8, 1, 1), 256, 0)
    copy = [sass.Instruction(0, "LDG.E.128"), sass.Instruction(16, "BRA", 0)]
    found = model.estimate(launch, usage, copy, True, model.Work(4.8e9))
    assert found.bound == "memory"
    assert found.resident == 8
    assert found.filled == 1.0
    assert found.share == pytest.approx(4.3 / 4.8, rel=0.01)
    product = [sass.Instruction(0, "HGMMA.64x128x16.F32"), sass.Instruction(16, "BRA", 0)]
    found = model.estimate(launch, usage, product, True, model.Work(1e6, 989e9, "tensor"))
    assert found.bound == "tensor"
    assert found.seconds["tensor"] == pytest.approx(1e-3)
    half = model.Launch("k", (66, 1, 1), 256, 0)
    assert model.estimate(half, usage, copy, True, model.Work(1e9)).filled == 0.5


def test_every_kernel_is_in_the_tables() -> None:
    """A kernel that was added since has no row: generate KERNELS.md again."""
    text = KERNELS.read_text()
    kernels = {
        match
        for file in (ROOT / "csrc" / "cuda").glob("*")
        if file.is_file()
        for match in re.findall(r"registers: (\w+) <= \d+", file.read_text())
    }
    assert len(kernels) > 40
    assert not [name for name in sorted(kernels) if f"\n| {name} | " not in text]


def test_emulator_records_launches(tmp_path: Path) -> None:
    backend = make_backend("emu")
    x = torch.randn(1, 40, 64).bfloat16()
    file = tmp_path / "launches"
    with settings(TOKENCOMP_EMU_RECORD=str(file)):
        backend.run("kcenter_greedy", x, 3)
        ran = [json.loads(line) for line in file.read_text().splitlines()]
        with settings(TOKENCOMP_EMU_DRY="1", TOKENCOMP_EMU_DEVICE="h200"):
            backend.run("kcenter_greedy", x, 3)
    dry = [json.loads(line) for line in file.read_text().splitlines()][len(ran) :]
    assert ran
    assert dry
    assert all("kcenter" in r["kernel"] and r["threads"] > 0 for r in ran + dry)
    assert ran[0]["matrix_accesses"] == ran[0]["wavefronts"] > 0  # no conflicts
    assert dry[0]["matrix_accesses"] == 0


@pytest.mark.parametrize("inject", [False, True])
def test_emulator_counts_bank_conflicts(tmp_path: Path, inject: bool) -> None:
    library = ROOT / "build" / "lib" / "libtokencomp_test_emu.so"
    assert library.is_file(), "build the target test_libraries"
    torch.ops.load_library(str(library))
    file = tmp_path / "launches"
    with settings(TOKENCOMP_EMU_RECORD=str(file)):
        torch.ops.tokencomp_test_emu.bug("rows_in_one_bank", torch.randn(128), inject)
    found = json.loads(file.read_text())
    assert found["matrix_accesses"] == 16  # four warps, four matrices
    assert found["wavefronts"] == 16 * (8 if inject else 1)


def test_emulator_tells_of_a_file_it_cannot_write(tmp_path: Path) -> None:
    backend = make_backend("emu")
    with (
        settings(TOKENCOMP_EMU_RECORD=str(tmp_path / "no" / "file")),
        pytest.raises(RuntimeError, match="TOKENCOMP_EMU_RECORD: cannot write"),
    ):
        backend.run("kcenter_greedy", torch.randn(1, 8, 16), 2)
