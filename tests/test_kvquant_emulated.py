"""The CUDA kernels of the kvquant family on the emulator beyond one run per case: every kernel and branch
under the checker for races, accesses out of bounds and reads of memory nobody wrote, and other schedules.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases_kvquant import DequantCase, PageCase, QuantCase, RetierCase, strided
from emulator import SCHEDULES, settings
from test_kvquant import same
from tokencomp import reference

ROOT = Path(__file__).resolve().parent.parent

QUANTS = [
    QuantCase(1, 2, 19, 64, 4, dtype="bfloat16", group=32, maps="both"),
    QuantCase(1, 2, 21, 40, 3, dtype="float16", group=8, view="sliced", rounding="away"),
    QuantCase(2, 1, 36, 96, 2, axis="channel", group=18, data="bad"),
    QuantCase(1, 1, 32, 64, 8, kind="fp8", layout="mma16_k", group=64),
    QuantCase(1, 1, 32, 128, 3, layout="mma16_k", group=64, dtype="bfloat16"),
    QuantCase(1, 1, 48, 64, 2, layout="mma16_v", axis="channel", group=16),
    QuantCase(1, 1, 16, 256, 4, layout="mma16_v", group=128),
    QuantCase(1, 2, 5, 4, 2),
]
PAGES = [
    PageCase("int4", "int2", P=16, layout="mma16", maps=True, holes=True, n=3),
    PageCase("int3", "fp8", P=32, axis_v="channel", holes=True, n=2, dtype="bfloat16"),
]


@pytest.fixture(params=["emu", "emu_race"])
def kernels(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The operators in the plain build, and under the checker."""
    path = ROOT / "build" / "lib" / f"libtokencomp_{request.param}.so"
    if not path.is_file():
        pytest.fail(f"{path.relative_to(ROOT)} is missing: build it with `make test-libraries`")
    torch.ops.load_library(str(path))
    return getattr(torch.ops, f"tokencomp_{request.param}")


by_name = {"ids": lambda case: case.name}


@pytest.mark.parametrize("case", QUANTS, **by_name)
def test_quantize_and_back(kernels: Any, case: QuantCase) -> None:
    arguments, options = case.arguments()
    got = kernels.kv_quantize(*arguments, **options)
    want = reference.kv_quantize(*arguments, **options, dtype=torch.float32)
    same(got[0], want[0], "codes")
    same(got[1], want[1], "params")
    arguments, options = DequantCase(case).arguments()
    back = kernels.kv_dequantize(*arguments, **options)
    dtype = options.pop("dtype")
    same(back, reference.kv_dequantize(*arguments, **options, dtype=torch.float32).to(dtype), "x")


@pytest.mark.parametrize("case", PAGES, **by_name)
def test_pages(kernels: Any, case: PageCase) -> None:
    tensors, maps = case.inputs()
    pool, options = tensors[0].clone(), {**case.format.options(), **maps}
    kernels.kv_page_write_(pool, *tensors[1:], **options)
    torch.ops.tokencomp.kv_page_write_(tensors[0], *tensors[1:], **options)
    assert torch.equal(pool, tensors[0])
    read = {**options, "sequence": tensors[3], "dtype": torch.float32}
    got = kernels.kv_page_read(pool, tensors[5], case.P, case.D, **read)
    want = torch.ops.tokencomp.kv_page_read(pool, tensors[5], case.P, case.D, **read)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    "case", [RetierCase(case, engine) for case in PAGES for engine in (False, True)], **by_name
)
def test_retier(kernels: Any, case: RetierCase) -> None:
    (pool, *tensors), options = case.arguments()
    want = pool.clone()
    kernels.kv_retier_(pool, *tensors, **options)
    torch.ops.tokencomp.kv_retier_(want, *tensors, **options)
    assert torch.equal(pool, want)


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_repack(kernels: Any, bits: int) -> None:
    codes = torch.randint(0, 256, (1, 1, 32, 64 * bits // 8)).to(torch.uint8)
    for source, target in (
        ("linear", "mma16_k"),
        ("mma16_v", "linear"),
        ("mma16_k", "mma16_v"),
        ("linear", "linear"),
    ):
        same(
            kernels.kv_repack(codes, bits, source, target),
            reference.kv_repack(codes, bits, source, target),
            target,
        )


@pytest.mark.parametrize("size", [2, 32, 64, 128, 256])
def test_hadamard(kernels: Any, size: int) -> None:
    x, signs = strided(torch.randn(1, 2, 5, size), "sliced"), torch.randn(size).sign()
    for inverse in (False, True):
        assert torch.equal(
            kernels.hadamard(x, signs, inverse=inverse),
            torch.ops.tokencomp.hadamard(x, signs, inverse=inverse),
        )


def test_statistics(kernels: Any) -> None:
    x, lengths = torch.randn(2, 2, 700, 24), torch.tensor([700, 513], dtype=torch.int32)
    got = kernels.channel_stats(x, lengths=lengths)
    want = torch.stack(reference.channel_stats(x, lengths=lengths))
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: "-".join(schedule.values()))
def test_every_schedule_gives_the_same_bits(kernels: Any, schedule: dict[str, str]) -> None:
    x = torch.randn(1, 2, 600, 24)
    for case in (QUANTS[0], QUANTS[2], QUANTS[5]):
        arguments, options = case.arguments()
        want = kernels.kv_quantize(*arguments, **options)
        with settings(**schedule):
            got = kernels.kv_quantize(*arguments, **options)
        same(got[0], want[0], case.name)
        same(got[1], want[1], case.name)
    stats = kernels.channel_stats(x)
    with settings(**schedule):
        assert torch.equal(kernels.channel_stats(x), stats)
