"""The detectors detect: every mistake of ``bugs.cu`` and ``bugs_async.cu`` is found by the one named here.

- ``plain``: the emulator, in every schedule: a message that matches, or WRONG for a result that is not the
  right one (LAZY_WRONG: in the orderly schedules with lazy copies). The checker gives the same message.
- ``race``: the race, bounds and initialisation checker, in every schedule: a message that matches. It starts
  with the line of the kernel.
- ``ubsan``: the compiler's undefined-behaviour checks, in a process of their own because they end it.

With the mistake switched off the same kernel gives the right result everywhere: no detector cries wolf.
"""

import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from libraries import ROOT, SCHEDULES, Device, emulator, path
from torch import Tensor

WRONG, LAZY_WRONG = "wrong result", "wrong result in orderly schedules"
LINE = r"^(\S*/)?tests/emu/bugs(_async)?\.cu:\d+: block \(\d,0,0\) thread \(\d+,0,0\): "
RACE = LINE + "race: .* conflicts with an earlier .* at .*bugs"
UNORDERED_BLOCKS = RACE + r".*\(nothing orders these blocks\)"
UNINITIALISED = LINE + r"uninitialised: (atomic )?(read|write) of \d+ bytes at "
UNORDERED = f"{RACE}|{UNINITIALISED}"  # a reader that comes too early may find that nothing was written
OUTSIDE = LINE + "out of bounds: "
SHARED = r"shared memory of block \(0,0,0\)"


@dataclass(frozen=True)
class Bug:
    """A kernel of bugs*.cu: its right result, and who must find its mistake."""

    name: str
    right: Callable[[Tensor], Tensor]
    plain: str = ""
    race: str = ""
    ubsan: str = ""
    op: str = "bug"

    @property
    def checked(self) -> str:
        """What the checker says: its own finding, or what the emulator says in any build."""
        return self.race or ("" if self.plain in (WRONG, LAZY_WRONG) else self.plain)

    def run(self, device: Device, inject: bool) -> tuple[Tensor, Tensor]:
        x = torch.randint(-8, 9, (128 if self.op == "bug" else 1024,)).float()
        return getattr(device, self.op)(self.name, x, inject), self.right(x)


def same(x: Tensor) -> Tensor:
    return x


def mirrored(x: Tensor) -> Tensor:
    return x.flip(0)


def swapped(x: Tensor) -> Tensor:
    return x.reshape(-1, 2).flip(1).flatten()


def in_lower_half_warps(x: Tensor) -> Tensor:
    return torch.where(torch.arange(128) % 32 < 16, swapped(x), x)


def even_mirrored(x: Tensor) -> Tensor:
    y = x.clone()
    y[::2] = x[::2].flip(0)
    return y


def upper_half_one(x: Tensor) -> Tensor:
    return torch.cat([x[:64], torch.ones(64)])


def counted(x: Tensor) -> Tensor:
    return torch.cat([torch.tensor([128.0]), x[1:]])


def tile(i: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.reshape(4, 256)[i]


def sum_of_tiles(x: Tensor) -> Tensor:
    return x.reshape(4, 256).sum(0)


def two_tiles(x: Tensor) -> Tensor:
    return x[:256] + x[256:512]


def squared(x: Tensor) -> Tensor:
    a = x.repeat(4).reshape(64, 64)
    return (a @ a.T)[:4].flatten()


BUGS = [
    Bug("missing_barrier", mirrored, race=UNORDERED),
    Bug("missing_second_barrier", lambda x: 2 * x, race=RACE),
    Bug("missing_syncwarp", swapped, race=UNORDERED),
    Bug("shuffle_is_no_barrier", swapped, race=UNORDERED),
    Bug(
        "divergent_barrier", mirrored, plain="divergent barrier: this thread is in __syncthreads, others wait"
    ),
    Bug("missing_lane", in_lower_half_warps, plain="exits while its warp waits for it|already exited"),
    Bug("different_collectives", swapped, plain="warp divergence: __(shfl_xor|ballot)_sync mask f{8} meets"),
    Bug("lane_not_in_mask", swapped, plain="the calling lane is not in its own mask"),
    Bug(
        "deadlock",
        same,
        plain=r"deadlock: no thread can run\n  block .* waits in named_barrier_sync at .*bugs",
    ),
    Bug("half_warp_barrier", same, plain="named barrier 1: only some lanes of warp"),
    Bug(
        "named_barrier_left_open",
        same,
        plain="ends with 32 of 128 arrivals at named barrier 3|only some lanes",
    ),
    Bug("collective_after_return", even_mirrored, plain="a lane that has already exited"),
    Bug("two_threads_one_element", upper_half_one, race=RACE),
    Bug("two_blocks_one_element", same, race=UNORDERED_BLOCKS),
    Bug("missing_atomic", counted, race=RACE),
    Bug("shared_read_past", lambda x: x.roll(-1), race=OUTSIDE + rf"read of 4 bytes at {SHARED}\+512"),
    Bug(
        "shared_write_past", same, plain="wrote 4 bytes past the end of its 512 bytes", race=OUTSIDE + "write"
    ),
    Bug("tensor_read_past", same, race=OUTSIDE + r"read of 4 bytes at x\+512, which has 512 bytes"),
    Bug("tensor_write_past", same, race=OUTSIDE + "write of 4 bytes at out-4, which has 512 bytes"),
    Bug("uninitialised_shared", mirrored, race=UNINITIALISED + rf"{SHARED}\+20"),
    Bug("uninitialised_tensor", same, race=UNINITIALISED + "out"),
    Bug("smem_too_small", same, plain="the type takes 1024 bytes, the launch gave 512"),
    Bug("misaligned_load", same, ubsan="misaligned address"),
    Bug("integer_overflow", same, ubsan="signed integer overflow"),
    Bug("array_overrun", same, ubsan="index 4 out of bounds"),
]
ASYNC_BUGS = [
    Bug("missing_tail_barrier", sum_of_tiles, race=RACE),
    Bug("wait_too_weak", sum_of_tiles, plain=LAZY_WRONG, race=RACE + ".*has not been waited for"),
    Bug("missing_barrier_after_wait", tile(0), race=UNORDERED),
    Bug("copy_never_waited_for", tile(0), plain="thread exits with cp.async copies it never waited for"),
    Bug("misaligned_copy", tile(0), plain="cp_async16: misaligned"),
    Bug("copy_past_tensor", tile(3), race=OUTSIDE + r"read of 16 bytes at x\+4096"),
    Bug("missing_mbar_wait", sum_of_tiles, plain=LAZY_WRONG, race=RACE),
    Bug("mbarrier_not_initialised", sum_of_tiles, plain="mbarrier was never initialised", race=UNINITIALISED),
    Bug("mbarrier_not_published", sum_of_tiles, race=UNORDERED),
    Bug("too_many_arrivals", tile(0), plain="more arrivals than the mbarrier expects"),
    Bug("missing_final_cluster_barrier", two_tiles, race="race: "),
    Bug("missing_first_cluster_barrier", two_tiles, race=UNORDERED),
    Bug("cluster_wait_without_arrive", tile(0), plain="cluster_wait: without cluster_arrive"),
    Bug("missing_wgmma_wait", squared, plain=WRONG),
    Bug("missing_wgmma_fence", squared, plain="wgmma: without wgmma_fence"),
    Bug(
        "missing_proxy_fence",
        squared,
        race=LINE + "missing fence_proxy_async: read of 16 bytes .* written by",
    ),
    Bug("operand_overwritten", squared, plain=WRONG, race=RACE),
    Bug("fragment_changed", tile(0), plain="a register of the operand a changed before wgmma_wait"),
    Bug("missing_threadfence", sum_of_tiles, race=UNORDERED_BLOCKS),
    Bug("missing_grid_barrier", sum_of_tiles, race=UNORDERED),
    Bug("grid_not_cooperative", sum_of_tiles, plain="the launch is not cooperative"),
    Bug("grid_counter_not_zero", sum_of_tiles, plain="the counter was not zero at the launch"),
]
BUGS += [replace(bug, op="async_bug") for bug in ASYNC_BUGS]

RACE_SCHEDULES = [s for s in SCHEDULES if "ASYNC" not in s][:4]


def having(detector: str) -> dict:
    bugs = [bug for bug in BUGS if getattr(bug, detector)]
    return {"argvalues": bugs, "ids": [bug.name for bug in bugs]}


every_bug = {"argvalues": BUGS, "ids": [bug.name for bug in BUGS]}


def test_every_bug_has_a_detector() -> None:
    assert all(bug.plain or bug.checked or bug.ubsan for bug in BUGS)
    assert len({bug.name for bug in BUGS}) == len(BUGS)


@pytest.mark.parametrize("bug", **every_bug)
def test_right_kernel_passes(bug: Bug) -> None:
    for settings in SCHEDULES:
        with emulator(**settings):
            result, right = bug.run(Device("emu"), False)
        assert torch.equal(result, right), settings


@pytest.mark.parametrize("bug", **every_bug)
def test_right_kernel_passes_the_checker(bug: Bug) -> None:
    for settings in RACE_SCHEDULES:
        with emulator(STRICT="1", **settings):
            result, right = bug.run(Device("race"), False)
        assert torch.equal(result, right), settings


@pytest.mark.parametrize("bug", **having("plain"))
def test_plain_emulator_finds(bug: Bug) -> None:
    emu = Device("emu")
    schedules = [s for s in SCHEDULES if "ASYNC" not in s]
    if bug.plain == LAZY_WRONG:
        schedules = [s for s in schedules if s["SCHED"] != "random"]
    for settings in schedules:
        with emulator(**settings):
            if bug.plain in (WRONG, LAZY_WRONG):
                result, right = bug.run(emu, True)
                assert not torch.equal(result, right), settings
            else:
                with pytest.raises(RuntimeError, match=bug.plain):
                    bug.run(emu, True)
            result, right = bug.run(emu, False)  # an error leaves nothing behind
        assert torch.equal(result, right)


@pytest.mark.parametrize("bug", **having("checked"))
def test_checker_finds(bug: Bug) -> None:
    race = Device("race")
    for settings in RACE_SCHEDULES:
        with emulator(**settings):
            with pytest.raises(RuntimeError, match=bug.checked):
                bug.run(race, True)
            result, right = bug.run(race, False)
        assert torch.equal(result, right)


@pytest.mark.parametrize("name", ["missing_barrier", "missing_tail_barrier", "missing_final_cluster_barrier"])
def test_random_schedules_find_missing_barriers(name: str) -> None:
    """Without the checker: some order of execution gives a wrong result."""
    bug = next(b for b in BUGS if b.name == name)
    wrong = 0
    for seed in range(40):
        with emulator(SCHED="random", SEED=str(seed)):
            result, right = bug.run(Device("emu"), True)
        wrong += not torch.equal(result, right)
    assert wrong > 0


def run_ubsan(name: str, inject: bool) -> subprocess.CompletedProcess[str]:
    library = path("ubsan")
    if not library.is_file():
        pytest.fail(f"{library.relative_to(ROOT)} is missing: build the target test_libraries")
    program = f"""
        import torch
        torch.ops.load_library({str(library)!r})
        x = torch.randint(-8, 9, (128,)).float()
        for name in {name!r}.split(","):
            assert torch.equal(torch.ops.tokencomp_test_ubsan.bug(name, x, {inject}), x)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("bug", **having("ubsan"))
def test_ubsan_finds(bug: Bug) -> None:
    process = run_ubsan(bug.name, True)
    assert process.returncode != 0
    assert re.search(rf"bugs\.cu:\d+:\d+: runtime error: .*{bug.ubsan}", process.stderr), process.stderr


def test_ubsan_passes_right_kernels() -> None:
    process = run_ubsan(",".join(bug.name for bug in BUGS if bug.ubsan), False)
    assert process.returncode == 0, process.stderr


def test_watchdog_names_a_spinning_thread(capfd: pytest.CaptureFixture[str]) -> None:
    x = torch.ones(128)
    with emulator(WATCHDOG="0.05"):
        assert torch.equal(Device("emu").bug("spins", x, True), x)
    assert re.search(r"block \(0,0,0\) thread 5 has not given way for 0\.05 s", capfd.readouterr().err)


def test_launches_are_checked() -> None:
    emu = Device("emu")
    with emulator(DEVICE="sm_80"), pytest.raises(RuntimeError, match="this device has no clusters"):
        emu.cluster_exchange(torch.zeros(2, 64), 2)
    for call in (
        lambda: emu.pipeline(torch.zeros(1, 256)),
        lambda: emu.stmatrix(torch.zeros(32, 4, dtype=torch.int32), False),
        lambda: emu.wgmma(torch.zeros(64, 64).bfloat16(), torch.zeros(64, 64).bfloat16(), None),
    ):
        with emulator(DEVICE="sm_80"), pytest.raises(RuntimeError, match="needs sm_90"):
            call()
    with pytest.raises(RuntimeError, match="not a multiple of the cluster size"):
        emu.cluster_exchange(torch.zeros(3, 64), 2)
    with pytest.raises(RuntimeError, match="cooperative grid of 4160 threads"):
        emu.grid_phases(torch.zeros(64), 65, 1)
    for setting in ({"SCHED": "sideways"}, {"ASYNC": "later"}, {"DEVICE": "sm_1"}):
        with emulator(**setting), pytest.raises(RuntimeError, match="TOKENCOMP_EMU_"):
            emu.row_sum(torch.zeros(1, 1))
