"""Each wrapper of ``csrc/cuda/arch`` against a plain statement of what the PTX and CUDA documentation says.

The statements below are index formulas and NumPy integer arithmetic; they share nothing with the emulator. On
a machine with a GPU the same tests run on the real instructions, which is what entitles the emulator to be
believed elsewhere.
"""

import numpy as np
import pytest
import torch
from libraries import SCHEDULES, Device, emulator, require_sm90
from torch import Tensor

LANES = range(32)


def integers(*shape: int, low: int = -(2**31), high: int = 2**31, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.randint(low, high, shape, dtype=torch.int64).to(dtype)


def pairs(x: Tensor) -> Tensor:
    """16-bit elements [..., 2] as the 32-bit words that hold them, low half first."""
    return x.contiguous().view(torch.int32).squeeze(-1)


# ---- matrix fragments


def matrix_fragment(x: np.ndarray, transpose: bool) -> np.ndarray:
    """ldmatrix .x4: lane l receives of 8x8 matrix m the elements (l / 4, 2 (l % 4)) and its neighbour."""
    out = np.zeros((32, 4, 2), dtype=x.dtype)
    for m in range(4):
        matrix = x[8 * m : 8 * m + 8].T if transpose else x[8 * m : 8 * m + 8]
        for lane in LANES:
            out[lane, m] = matrix[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2]
    return out


@pytest.mark.parametrize("transpose", [False, True])
def test_ldmatrix(device: Device, transpose: bool) -> None:
    x = integers(32, 8, low=-(2**15), high=2**15, dtype=torch.int16)
    expected = pairs(torch.from_numpy(matrix_fragment(x.numpy(), transpose)))
    assert torch.equal(device.ldmatrix(x, transpose), expected)


@pytest.mark.parametrize("transpose", [False, True])
def test_stmatrix(device: Device, transpose: bool) -> None:
    require_sm90(device)
    x = integers(32, 8, low=-(2**15), high=2**15, dtype=torch.int16)
    fragment = pairs(torch.from_numpy(matrix_fragment(x.numpy(), transpose)))
    assert torch.equal(device.stmatrix(fragment, transpose), x)


def mma_fragments(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Registers of mma.m16n8k(16 or 32) for A [16, K], B [K, 8], C [16, 8]; a register holds `step` of K."""
    step = a.shape[1] // 8  # two 16-bit or four 8-bit values
    half = a.shape[1] // 2
    fa = torch.empty(32, 4, step, dtype=a.dtype)
    fb = torch.empty(32, 2, step, dtype=b.dtype)
    fc = torch.empty(32, 4, dtype=c.dtype)
    for lane in LANES:
        g, t = lane // 4, lane % 4
        for i in range(4):
            row, k = g + 8 * (i % 2), step * t + half * (i // 2)
            fa[lane, i] = a[row, k : k + step]
            fc[lane, i] = c[g + 8 * (i // 2), 2 * t + i % 2]
        for i in range(2):
            k = step * t + half * i
            fb[lane, i] = b[k : k + step, g]
    return pairs(fa), pairs(fb), fc


def test_movmatrix(device: Device) -> None:
    x = integers(8, 8, low=-(2**15), high=2**15, dtype=torch.int16)
    fragment = pairs(x.view(32, 2))  # lane l holds (l / 4, 2 (l % 4)) and its neighbour
    assert torch.equal(device.movmatrix(fragment), pairs(x.T.contiguous().view(32, 2)))


def test_pairs_of_halves(device: Device) -> None:
    """Subnormal factors and products count: codes are such numbers. Products that round are drawn too."""
    a, b = torch.randn(999, 2).half(), torch.randn(999, 2).half()
    a[::3] *= 2.0**-14
    b[::5] *= 2.0**-12
    word_a, word_b = pairs(a), pairs(b)
    got = device.f16x2(word_a, word_b)
    assert torch.equal(got[:, 0], pairs((a.double() * b.double()).half()))
    lost = a.double() * b.double() - (a.double() * b.double()).half().double()
    assert torch.equal(got[:, 2].contiguous().view(torch.float16).view(-1, 2), lost.half())
    floats = torch.stack([word_a.view(torch.float32), word_b.view(torch.float32)], 1)
    finite = floats.isfinite().all(1)
    assert torch.equal(got[finite, 1], pairs(floats.half())[finite])


def test_mma_of_subnormal_halves(device: Device) -> None:
    """Integers below 1024 as fp16 bits are subnormal and exact: q 2^-24."""
    codes = integers(16, 16, low=0, high=256, dtype=torch.int16)
    b, c = torch.randn(16, 8).half(), torch.zeros(16, 8)
    fa, fb, fc = mma_fragments(codes.view(torch.float16), b, c)
    _, _, expected = mma_fragments(codes.view(torch.float16), b, (codes.double() @ b.double()).float())
    torch.testing.assert_close(device.mma(fa, fb, fc, False) * 2.0**24, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma(device: Device, dtype: torch.dtype) -> None:
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    fa, fb, fc = mma_fragments(a, b, c)
    _, _, expected = mma_fragments(a, b, (a.double() @ b.double() + c.double()).float())
    got = device.mma(fa, fb, fc, dtype == torch.bfloat16)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_special_values(device: Device, dtype: torch.dtype) -> None:
    """Infinities, NaN, subnormals and signed zeros of the 16-bit types arrive as what they are."""
    tiny = torch.finfo(dtype).smallest_normal / 4
    for value in (float("inf"), float("-inf"), float("nan"), tiny, -tiny, torch.finfo(dtype).max, -0.0):
        a, b, c = torch.zeros(16, 16, dtype=dtype), torch.zeros(16, 8, dtype=dtype), torch.zeros(16, 8)
        a[5, 3], b[3, 2] = value, 1
        expected = torch.zeros(16, 8)
        expected[5, 2] = torch.tensor(value).to(dtype).float()
        if not np.isfinite(value):
            expected[5] = float("nan")  # infinity times the other zeros
            expected[5, 2] = value
        fa, fb, fc = mma_fragments(a, b, c)
        _, _, fragment = mma_fragments(a, b, expected)
        got = device.mma(fa, fb, fc, dtype == torch.bfloat16)
        torch.testing.assert_close(got, fragment, rtol=0, atol=0, equal_nan=True)


def test_mma_s8(device: Device) -> None:
    a = integers(16, 32, low=-128, high=128, dtype=torch.int8)
    b = integers(32, 8, low=-128, high=128, dtype=torch.int8)
    c = integers(16, 8, low=-(10**6), high=10**6)
    fa, fb, fc = mma_fragments(a, b, c)
    _, _, expected = mma_fragments(a, b, (a.long() @ b.long() + c.long()).int())
    assert torch.equal(device.mma_s8(fa, fb, fc), expected)


@pytest.mark.parametrize("columns", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("accumulate", [False, True])
def test_wgmma(device: Device, columns: int, dtype: torch.dtype, accumulate: bool) -> None:
    require_sm90(device)
    a, b = torch.randn(64, 64).to(dtype), torch.randn(columns, 64).to(dtype)
    c = torch.randn(64, columns) if accumulate else None
    expected = a.double() @ b.double().T + (0 if c is None else c.double())
    torch.testing.assert_close(device.wgmma(a, b, c), expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("columns", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("accumulate", [False, True])
def test_wgmma_fragment(device: Device, columns: int, dtype: torch.dtype, accumulate: bool) -> None:
    """The operand in registers is rounded there; the other one has its columns side by side."""
    require_sm90(device)
    a, b = torch.randn(64, 64), torch.randn(64, columns).to(dtype)
    c = torch.randn(64, columns) if accumulate else None
    expected = a.to(dtype).double() @ b.double() + (0 if c is None else c.double())
    torch.testing.assert_close(device.wgmma_fragment(a, b, c), expected.float(), rtol=1e-4, atol=1e-4)


# ---- shuffles, votes, reductions


def shuffled(x: Tensor, argument: Tensor, kind: int, width: int) -> Tensor:
    out = x.clone()
    for lane in LANES:
        a, first, inside = int(argument[lane]), lane // width * width, lane % width
        if kind == 0:
            source = first + a % width
        elif kind == 1:
            source = lane ^ a if (lane ^ a) < first + width else lane
        elif kind == 2:
            source = lane - a if inside >= a else lane
        else:
            source = lane + a if inside + a < width else lane
        out[lane] = x[source]
    return out


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("width", [32, 16, 8, 2])
@pytest.mark.parametrize("kind", range(4), ids=["idx", "xor", "up", "down"])
def test_shuffle(device: Device, kind: int, width: int, dtype: torch.dtype) -> None:
    x = integers(32, low=-(2**31), high=2**31, dtype=dtype) * (1 if dtype == torch.int32 else 2**31 + 5)
    for a in range(32) if kind == 1 else (0, 1, 3, 7, 31):
        argument = torch.full((32,), a, dtype=torch.int32)
        assert torch.equal(device.shuffle(x, argument, kind, width), shuffled(x, argument, kind, width)), a
    if kind == 0:  # each lane its own source
        argument = integers(32, low=0, high=64)
        assert torch.equal(device.shuffle(x, argument, kind, width), shuffled(x, argument, kind, width))


@pytest.mark.parametrize("lanes", [32, 17, 1])
@pytest.mark.parametrize("values", [(-3, 5), (0, 2), (1, 2), (-(2**31), 2**31)])
def test_votes(device: Device, lanes: int, values: tuple[int, int]) -> None:
    x = integers(64, low=values[0], high=values[1])
    expected = torch.zeros(64, 17, dtype=torch.int64)
    for warp in range(2):
        v = x[32 * warp : 32 * warp + lanes].long()
        u = v % 2**32
        odd = v % 2 == 1
        bits = torch.arange(lanes)
        together = [
            int((odd.long() << bits).sum()), int(odd.any()), int(odd.all()), None,
            int(v.sum()), int(v.min()), int(v.max()), int(u.sum()), int(u.min()), int(u.max()),
            int(np.bitwise_and.reduce(u.numpy())), int(np.bitwise_or.reduce(u.numpy())),
            int(np.bitwise_xor.reduce(u.numpy())), None,
        ]  # fmt: skip
        for lane in range(lanes):
            row = expected[32 * warp + lane]
            for i, value in enumerate(together):
                if value is not None:
                    row[i] = value
            row[3] = int(((v == v[lane]).long() << bits).sum())
    expected[:, 14] = int((x == 3).any())
    expected[:, 15] = int((x != 3).all())
    expected[:, 16] = int((x.long() % 2 == 1).sum())
    got = device.votes(x, lanes).long()
    elected = got[:, 13].reshape(2, 32)
    assert elected.sum(dim=1).tolist() == [1, 1]
    assert elected[:, lanes:].sum() == 0
    got[:, 13] = 0
    assert torch.equal(got % 2**32, expected % 2**32)


@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_reductions(device: Device, threads: int) -> None:
    x = torch.randn(threads)
    got = device.reduce(x)
    warps = x.reshape(-1, 32)
    per_warp = warps.double().sum(1) + 2 * warps.max(1).values.double() + 4 * warps.min(1).values.double()
    key = (x * 1024 + 8192).long() * 2**32 + torch.arange(threads)
    torch.testing.assert_close(got[:, 0], x.double().sum().float().expand(threads), rtol=1e-4, atol=1e-4)
    assert bool((got[:, 0] == got[0, 0]).all())
    assert bool((got[:, 1] == x.max()).all())
    assert bool((got[:, 2] == x.min()).all())
    assert bool((got[:, 3] == float(key.argmax())).all())
    torch.testing.assert_close(got[:, 4], per_warp.float().repeat_interleave(32), rtol=1e-4, atol=1e-4)
    winners = key.reshape(-1, 32).argmax(1) + 32 * torch.arange(threads // 32)
    assert torch.equal(got[:, 5], winners.float().repeat_interleave(32))


# ---- copies and memory


def test_cp_async(device: Device) -> None:
    x, valid = integers(256, 4), integers(256, low=0, high=2)
    assert torch.equal(device.cp_async(x, valid), x * valid[:, None])


def test_loads(device: Device) -> None:
    x = integers(64, 4, low=0, high=2**30)
    expected = x.clone()
    expected[:, 0] += 7
    assert torch.equal(device.loads(x), expected)


def test_atomics(device: Device) -> None:
    x = integers(512)
    v = x.long()
    u = v % 2**32
    words, wide = device.atomics(x)
    increments = 0
    for _ in range(512):
        increments = 0 if increments >= 50 else increments + 1
    expected = torch.tensor(
        [
            v.sum(), max(0, v.max()), min(0, v.min()), u.max(),
            np.bitwise_or.reduce(u.numpy()), np.bitwise_xor.reduce(u.numpy()), 0,
            -v.sum(), increments, (u | 1).sum(),
        ]
    )  # fmt: skip
    remainder = torch.from_numpy(np.fmod(v.numpy(), 64)).sum()  # C++'s %: the sign of the dividend
    assert float(words[6:7].view(torch.float32)) == float(remainder)
    words[6] = 0
    assert torch.equal(words.long() % 2**32, expected.long() % 2**32)
    assert int(wide) == int((u * 2**20 + torch.arange(512) % 64).max())


# ---- functions of integers and floats


def test_bits(device: Device) -> None:
    edges = [0, 1, -1, 2**31 - 1, -(2**31), 0x12345678, 31, 32]
    a = torch.cat([integers(200), torch.tensor(edges * len(edges), dtype=torch.int32)])
    b = torch.cat([integers(200), torch.tensor(edges, dtype=torch.int32).repeat_interleave(len(edges))])
    rows = []
    for x, y in zip(a.tolist(), b.tolist(), strict=True):
        u, v = x % 2**32, y % 2**32
        wide = u << 32 | v
        both = (v << 32 | u).to_bytes(8, "little")
        signed = [np.frombuffer(w.to_bytes(4, "little"), dtype=np.int8).astype(int) for w in (u, v)]
        rows.append(
            [
                bin(u).count("1"), 32 - u.bit_length(), (u & -u).bit_length(), int(f"{u:032b}"[::-1], 2),
                int.from_bytes([both[v >> 4 * i & 7] for i in range(4)], "little"),
                (v << 32 | u) << (v & 31) >> 32, (v << 32 | u) >> (u & 31), u * v >> 32,
                int((signed[0] * signed[1]).sum()) + 5,
                bin(wide).count("1"), 64 - wide.bit_length(), (wide & -wide).bit_length(),
            ]
        )  # fmt: skip
    expected = torch.tensor([[value % 2**32 for value in row] for row in rows])
    assert torch.equal(device.bits(a, b).long() % 2**32, expected)


def test_maths(device: Device) -> None:
    nan = float("nan")
    a = torch.cat([torch.randn(300) * 3, torch.tensor([nan, 1.0, nan, 0.5, 2.5, -0.5, 0.0, 300.0])])
    b = torch.cat([torch.randn(300), torch.tensor([1.0, nan, nan, 1.0, 2.0, 3.0, 4.0, 5.0])])
    x, y = a.double(), b.double()
    expected = torch.stack(
        [
            torch.fmin(x, y), torch.fmax(x, y), x.nan_to_num(0).clamp(0, 1), (x.abs() + 1).rsqrt(),
            (x / 8).exp(), (x.abs() + 1).log(), x / (y.abs() + 1), x * y + 1, x.nan_to_num(0).round(), -x,
            x.exp2().masked_fill(x > 128, float("inf")),
        ],
        dim=1,
    )  # fmt: skip
    got = device.maths(a, b)
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5, equal_nan=True)
    for exact in (0, 1, 2, 8, 9):
        torch.testing.assert_close(got[:, exact], expected[:, exact].float(), rtol=0, atol=0, equal_nan=True)


# ---- the device


def test_device_info(device: Device) -> None:
    sms, major, cluster, smem = device.device_info(torch.zeros(1))
    if device.name == "cuda":
        properties = torch.cuda.get_device_properties(0)
        assert (sms, major) == (properties.multi_processor_count, properties.major)
        assert cluster == (8 if major >= 9 else 1)
        assert smem == properties.shared_memory_per_block_optin
    else:
        assert (sms, major, cluster, smem) == (4, 9, 8, 232448)


def test_device_info_of_sm_80() -> None:
    with emulator(DEVICE="sm_80"):
        assert Device("emu").device_info(torch.zeros(1)) == (4, 8, 1, 166912)


@pytest.mark.parametrize("settings", SCHEDULES, ids=lambda s: "-".join(s.values()))
def test_schedules_do_not_matter(settings: dict[str, str]) -> None:
    emu = Device("emu")
    x, valid = integers(256, 4), integers(256, low=0, high=2)
    with emulator(**settings):
        assert torch.equal(emu.cp_async(x, valid), x * valid[:, None])
        test_votes(emu, 17, (-3, 5))
        test_reductions(emu, 96)
        test_wgmma(emu, 64, torch.bfloat16, True)
        test_wgmma_fragment(emu, 128, torch.float16, True)
