"""Small real kernels built from the wrappers: emulator under every schedule, race checker, GPU."""

import pytest
import torch
from libraries import SCHEDULES, Device, emulator, require_sm90
from torch import Tensor


def ring_sums(x: Tensor, phases: int) -> Tensor:
    for _ in range(phases):
        x = x.roll(1) + x.roll(-1)
    return x


def check_row_sum(device: Device) -> None:
    for rows, columns in ((5, 1000), (1, 1), (3, 256)):
        x = torch.randn(rows, columns)
        torch.testing.assert_close(device.row_sum(x), x.double().sum(1).float(), rtol=1e-4, atol=1e-4)


def check_cluster_exchange(device: Device) -> None:
    for cluster in (1, 2, 8):
        x = torch.randn(8, 64)
        got = device.cluster_exchange(x, cluster)
        for block in range(8):
            first, rank = block // cluster * cluster, block % cluster
            assert torch.equal(got[block, :64], x[first + (rank + 1) % cluster].flip(0))
            assert got[block, 64:].tolist() == [rank, cluster]


def check_cluster_argmax(device: Device) -> None:
    for n, cluster in ((3000, 4), (257, 8), (100, 2)):
        x = torch.randint(0, 40, (3, n)).float()  # many ties
        expected = [row.index(max(row)) for row in x.tolist()]
        assert device.cluster_argmax(x, cluster).tolist() == expected


def check_pipeline(device: Device) -> None:
    for blocks, tiles in ((3, 9), (1, 1), (2, 2)):
        x = torch.randn(blocks, tiles * 256)
        torch.testing.assert_close(device.pipeline(x), x.double().sum(1).float(), rtol=1e-4, atol=1e-3)


def check_gemm(device: Device) -> None:
    for (m, n, k), dtype in (
        ((64, 64, 64), torch.bfloat16),
        ((70, 33, 104), torch.float16),
        ((1, 1, 8), torch.bfloat16),
    ):
        a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        expected = (a.double() @ b.double().T).float()
        torch.testing.assert_close(device.gemm(a, b), expected, rtol=1e-4, atol=1e-4)


def check_grid_phases(device: Device) -> None:
    for n, blocks, phases in ((300, 4, 5), (64, 1, 2), (1000, 8, 4)):
        x = torch.randint(0, 9, (n,)).float()
        assert torch.equal(device.grid_phases(x, blocks, phases)[phases % 2], ring_sums(x, phases))


def check_last_block(device: Device) -> None:
    x = torch.randint(-9, 9, (3000,)).float()
    assert float(device.last_block_sum(x)) == float(x.sum())


CHECKS = [
    check_row_sum, check_cluster_exchange, check_cluster_argmax, check_pipeline, check_gemm,
    check_grid_phases, check_last_block,
]  # fmt: skip
SM90 = {check_cluster_exchange, check_cluster_argmax, check_pipeline}
names = {"ids": lambda check: check.__name__.removeprefix("check_")}


@pytest.mark.parametrize("check", CHECKS, **names)
def test_kernel(device: Device, check) -> None:
    if check in SM90:
        require_sm90(device)
    check(device)


@pytest.mark.parametrize("settings", SCHEDULES[1:], ids=lambda s: "-".join(s.values()))
@pytest.mark.parametrize("check", CHECKS, **names)
def test_kernel_under_schedule(check, settings: dict[str, str]) -> None:
    with emulator(**settings):
        check(Device("emu"))


@pytest.mark.parametrize("check", CHECKS, **names)
def test_kernel_checked_under_random_schedule(check) -> None:
    with emulator(SCHED="random", SEED="5", STRICT="1"):
        check(Device("race"))
