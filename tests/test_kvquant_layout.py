"""Where codes lie: the formulas of the layouts for 128 channels written out, golden words, round trips, and
fragments of the matrix instruction made from packed words.
"""

from collections.abc import Callable

import pytest
import torch
from tokencomp.reference.kvquant_layout import Layout, pack, places, unpack
from torch import Tensor

Formula = Callable[[int, int], tuple[int, int]]


def key(d: int) -> tuple[int, int, int, int]:
    return d // 16, d % 16 // 8, d % 8 // 2, d % 2  # j, h, c, e


def k2(t: int, d: int) -> tuple[int, int]:
    j, h, c, e = key(d)
    n = 8 * e + 2 * (j % 4) + h
    return 64 * (t % 8) + 16 * c + 8 * (t // 8) + 4 * (j // 4) + n // 4, 2 * (n % 4)


def k1(t: int, d: int) -> tuple[int, int]:
    j, h, c, e = key(d)
    n = 16 * e + 2 * j + h
    return 32 * (t % 8) + 8 * c + 4 * (t // 8) + n // 8, n % 8


def k4(t: int, d: int) -> tuple[int, int]:
    j, h, c, e = key(d)
    n = 4 * e + 2 * (j % 2) + h
    return 64 * t + 16 * c + 4 * (j // 2) + n // 2, n % 2 * 4


def k8(t: int, d: int) -> tuple[int, int]:
    j, h, c, e = key(d)
    return 128 * t + 64 * (j // 4) + 16 * c + 4 * (j % 4) + 2 * h + e, 0


def k16(t: int, d: int) -> tuple[int, int]:
    j, h, c, e = key(d)
    return 256 * t + 64 * (j // 2) + 16 * c + 8 * (j % 2) + 4 * h + 2 * e, 0


def value(t: int, d: int) -> tuple[int, int, int, int]:
    return d // 8, t // 8, 4 * (d % 8) + t % 8 // 2, t % 2  # m, h, lane, e


def v2(t: int, d: int) -> tuple[int, int]:
    m, h, lane, e = value(t, d)
    n = 8 * e + 2 * (m % 4) + h
    return 16 * lane + 4 * (m // 4) + n // 4, 2 * (n % 4)


def v1(t: int, d: int) -> tuple[int, int]:
    m, h, lane, e = value(t, d)
    n = 16 * e + 2 * (m % 8) + h
    return 8 * lane + 4 * (m // 8) + n // 8, n % 8


def v4(t: int, d: int) -> tuple[int, int]:
    m, h, lane, e = value(t, d)
    i, n = m // 2, 4 * e + 2 * (m % 2) + h
    return 512 * (i // 4) + 16 * lane + 4 * (i % 4) + n // 2, n % 2 * 4


def v8(t: int, d: int) -> tuple[int, int]:
    m, h, lane, e = value(t, d)
    return 512 * (m // 4) + 16 * lane + 4 * (m % 4) + 2 * h + e, 0


def v16(t: int, d: int) -> tuple[int, int]:
    m, h, lane, e = value(t, d)
    return 512 * (m // 2) + 16 * lane + 8 * (m % 2) + 4 * h + 2 * e, 0


FORMULAS: dict[tuple[Layout, int], Formula] = {
    **{("mma16_k", width): f for width, f in ((1, k1), (2, k2), (4, k4), (8, k8), (16, k16))},
    **{("mma16_v", width): f for width, f in ((1, v1), (2, v2), (4, v4), (8, v8), (16, v16))},
}


@pytest.mark.parametrize(("layout", "width"), FORMULAS)
def test_formulas_of_128_channels(layout: Layout, width: int) -> None:
    byte, shift = places(layout, width, 128)
    for t in range(16):
        for d in range(128):
            assert (int(byte[t, d]), int(shift[t, d])) == FORMULAS[layout, width](t, d)


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("layout", ["linear", "mma16_k", "mma16_v"])
def test_every_code_has_its_own_place(layout: Layout, bits: int, size: int) -> None:
    codes = torch.randint(0, 2**bits, (2, 32, size))
    packed = pack(codes, bits, layout)
    assert packed.shape == (2, 32, size * bits // 8)
    assert torch.equal(unpack(packed, bits, layout), codes)
    assert (pack(torch.full_like(codes, 2**bits - 1), bits, layout) == 255).all()


def rows(code: Callable[[Tensor], Tensor]) -> Tensor:
    return code(torch.arange(128)).expand(16, 128)


def test_golden_bytes_of_linear() -> None:
    assert pack(rows(lambda d: d % 16), 4, "linear")[0, :4].tolist() == [0x00, 0x11, 0x22, 0x33]
    assert pack(rows(lambda d: d % 4), 2, "linear")[0, :4].tolist() == [0x00, 0x55, 0xAA, 0xFF]
    assert pack(torch.tensor([[0, 1, 2, 3]]), 2, "linear").tolist() == [[0xE4]]
    assert pack(torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]]), 3, "linear").tolist() == [[0x88, 0xDD, 0xF0]]


def words(packed: Tensor) -> list[str]:
    return [f"{w & 0xFFFFFFFF:08x}" for w in packed.contiguous().view(torch.int32).flatten().tolist()]


def test_golden_words_of_fragments() -> None:
    four = words(pack(rows(lambda d: d % 16), 4, "mma16_k")[0])
    assert four == ["91918080"] * 4 + ["b3b3a2a2"] * 4 + ["d5d5c4c4"] * 4 + ["f7f7e6e6"] * 4
    assert set(words(pack(rows(lambda d: d // 16 % 4), 2, "mma16_k"))) == {"fa50fa50"}


# --- fragments: registers of mma.m16n8k16 from packed words, by masks and shifts ----------------------------

Pair = tuple[int, int]


def chunks(packed: Tensor, lane_of_row: int, lanes: int, chunk: int, count: int) -> list[int]:
    """The words a lane reads of the words of one row: ``count`` of them, ``chunk`` at a time."""
    w = [int(x) & 0xFFFFFFFF for x in packed.contiguous().view(torch.int32).flatten()]
    return [w[i // chunk * lanes * chunk + lane_of_row * chunk + i % chunk] for i in range(count)]


def pairs_of(word: int, width: int) -> list[Pair]:
    """The elements of a word as pairs (e = 0, e = 1), in the order of their numbers."""
    if width == 8:
        return [(word >> 16 * i & 255, word >> (16 * i + 8) & 255) for i in range(2)]
    mask = (1 << width) - 1
    return [(word >> width * p & mask, word >> (16 + width * p) & mask) for p in range(16 // width)]


def key_fragments(packed: Tensor, bits: int, t0: int, step: int, size: int) -> list[list[Pair]]:
    """B operand of 8 keys, ``[lane][register]``: rows k = channels of a step of 16, columns n = tokens."""
    row_words = size * bits // 32
    out = []
    for lane in range(32):
        token, c = t0 + lane // 4, lane % 4
        if bits == 2:
            row = packed.flatten()[8 * row_words * (token % 8) :][: 8 * row_words]
            read = chunks(row, c, 4, min(4, row_words // 2), row_words // 2)
            elements = [p for w in read for p in pairs_of(w, 2)][token % 16 // 8 * (size // 8) :]
        else:
            row = packed[token]
            per_lane = row_words // 4
            elements = [p for w in chunks(row, c, 4, min(4, per_lane), per_lane) for p in pairs_of(w, bits)]
        out.append([elements[2 * step], elements[2 * step + 1]])
    return out


def value_fragments(packed: Tensor, bits: int, m: int, size: int) -> list[list[Pair]]:
    """B operand of one block of 16 values: rows k = tokens, columns n = the 8 channels of step ``m``."""
    per_lane = 16 * size * bits // 8 // 4 // 32
    out = []
    for lane in range(32):
        read = chunks(packed, lane, 32, min(4, per_lane), per_lane)
        elements = [p for w in read for p in pairs_of(w, bits)]
        out.append([elements[2 * m], elements[2 * m + 1]])
    return out


def multiply(a: Tensor, b: list[list[Pair]]) -> Tensor:
    """``a [16, 16] @ B [16, 8]``, B in fragments: register r of lane l holds k = 8 r + 2 (l % 4) + e."""
    dense = torch.zeros(16, 8)
    for lane in range(32):
        for register in range(2):
            for e in range(2):
                dense[8 * register + 2 * (lane % 4) + e, lane // 4] = b[lane][register][e]
    return a @ dense


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_words_are_fragments(bits: int, size: int) -> None:
    codes = torch.randint(0, 2**bits, (16, size))
    q, p = torch.randint(-3, 4, (16, size)).float(), torch.randint(-3, 4, (16, 16)).float()
    keys = pack(codes, bits, "mma16_k")
    logits = torch.zeros(16, 16)
    for t0 in (0, 8):
        for j in range(size // 16):
            fragment = key_fragments(keys, bits, t0, j, size)
            logits[:, t0 : t0 + 8] += multiply(q[:, 16 * j : 16 * j + 16], fragment)
    assert torch.equal(logits, q @ codes.float().T)
    values = pack(codes, bits, "mma16_v").flatten()
    steps = [multiply(p, value_fragments(values, bits, m, size)) for m in range(size // 8)]
    assert torch.equal(torch.cat(steps, 1), p @ codes.float())
