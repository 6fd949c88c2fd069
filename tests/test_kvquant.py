"""The kvquant operators on every back end: the bytes of the specification, round trips, pages, transforms."""

import math
from typing import Any

import pytest
import tokencomp
import torch
from backends import Backend
from cases_kvquant import (
    BITS,
    MMA_LAYOUTS,
    PAGE_CASES,
    QUANT_CASES,
    DequantCase,
    PageCase,
    QuantCase,
    strided,
)
from hypothesis import given
from hypothesis import strategies as st
from tokencomp import reference
from tokencomp.ops.kvquant_pages import TIER_BITS, PageFormat, page_entry, page_number, page_type
from torch import Tensor
from yardstick import assert_scores

by_name = {"ids": lambda case: case.name}


def same(got: Tensor, want: Tensor, what: str) -> None:
    assert got.dtype == want.dtype, what
    assert got.shape == want.shape, what
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}")


def two_byte_rows(kind: str) -> Tensor:
    """``[1, 2, 128, 256]`` float32, to be rounded to two bytes: what is awkward to take the range of."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(1, 2, 128, 256, generator=g)
    if kind == "spread":
        return x * torch.randn(1, 2, 128, 1, generator=g).exp() * 10
    if kind == "far from zero":
        return x * 0.01 + 60000
    if kind == "tiny":
        return x * 1e-7
    if kind == "both zeros":
        return torch.where(x < 0, -0.0, 0.0)
    x[0, 0, 5, 7], x[0, 1, 9, 100], x[0, 1, 70, 10] = math.nan, math.inf, -math.inf
    return x


@pytest.mark.parametrize("kind", ["spread", "far from zero", "tiny", "both zeros", "not finite"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_elements_of_two_bytes_are_coded_as_their_floats(kind: str, dtype: torch.dtype) -> None:
    """The CPU takes ranges of two-byte elements as integers; of the same numbers in float32 it does not."""
    x = two_byte_rows(kind).to(dtype)
    for bits in (8, 4, 2):
        for axis, group in (("token", 32), ("token", 128), ("channel", 32), ("channel", 64)):
            got, want = (tokencomp.ops.kv_quantize(t, bits, axis=axis, group=group) for t in (x, x.float()))
            same(got[0], want[0], f"codes of {bits} bits by {axis}")
            same(got[1].view(torch.int16), want[1].view(torch.int16), f"params of {bits} bits by {axis}")


@pytest.mark.parametrize("case", QUANT_CASES, **by_name)
def test_quantize_makes_the_bytes_of_the_specification(backend: Backend, case: QuantCase) -> None:
    arguments, options = case.arguments()
    codes, params = backend.run("kv_quantize", *arguments, **options)
    want = reference.kv_quantize(*arguments, **options, dtype=torch.float32)
    same(params, want[1], "params")
    same(codes, want[0], "codes")


@pytest.mark.parametrize("case", QUANT_CASES, **by_name)
def test_dequantize(backend: Backend, case: QuantCase) -> None:
    arguments, options = DequantCase(case).arguments()
    got = backend.run("kv_dequantize", *arguments, **options)
    dtype = options.pop("dtype")
    want = reference.kv_dequantize(*arguments, **options, dtype=torch.float32)
    same(got, want.to(dtype), "x")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("axis", ["token", "channel"])
def test_error_is_what_float64_has(backend: Backend, axis: str, bits: int) -> None:
    """Signal to noise within 0.1 dB of the quantizer in float64."""
    x, options = torch.randn(1, 2, 128, 128), {"axis": axis, "group": 64}
    codes, params = backend.run("kv_quantize", x, bits, **options)
    got = backend.run("kv_dequantize", codes, params, bits, **options)
    exact = reference.kv_quantize(x, bits, **options)
    want = reference.kv_dequantize(*exact, bits, **options)
    noise = [float((y.double() - x.double()).square().sum()) for y in (got, want)]
    assert abs(10 * math.log10(noise[0] / noise[1])) < 0.1


def test_bad_groups_are_seen_in_the_parameters(backend: Backend) -> None:
    x = torch.randn(1, 1, 6, 64)
    x[0, 0, 1, 5], x[0, 0, 4, 60] = math.nan, 1e9
    codes, params = backend.run("kv_quantize", x, 4, group=32)
    lost = params.isnan().any(-1)[0, 0]
    assert lost.nonzero().tolist() == [[1, 0], [4, 1]]
    back = backend.run("kv_dequantize", codes, params, 4, group=32)[0, 0].view(6, 2, 32)
    assert back[lost].isnan().all()
    assert back[~lost].isfinite().all()


# --- layouts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_repack(backend: Backend, bits: int, size: int) -> None:
    codes = torch.randint(0, 256, (1, 2, 32, size * bits // 8)).to(torch.uint8)
    for layout in MMA_LAYOUTS:
        packed = backend.run("kv_repack", codes, bits, "linear", layout)
        same(packed, reference.kv_repack(codes, bits, "linear", layout), layout)
        assert bits * size < 256 or not torch.equal(packed, codes)
        same(backend.run("kv_repack", packed, bits, layout, "linear"), codes, "linear")
        same(backend.run("kv_repack", packed, bits, layout, layout), packed, "copy")
    both = backend.run("kv_repack", codes, bits, "mma16_k", "mma16_v")
    same(both, reference.kv_repack(codes, bits, "mma16_k", "mma16_v"), "keys to values")


def test_repack_of_rows_takes_any_number_of_tokens(backend: Backend) -> None:
    codes = torch.randint(0, 256, (1, 1, 5, 15)).to(torch.uint8)
    same(backend.run("kv_repack", codes, 3, "linear", "linear"), codes, "copy")
    same(backend.run("kv_repack", codes[:, :, :0], 3, "linear", "linear"), codes[:, :, :0], "nothing")


def test_golden_words_through_the_operators(backend: Backend) -> None:
    x = (torch.arange(128) % 16).float().expand(1, 1, 16, 128)
    codes, params = backend.run("kv_quantize", x, 4, group=128, layout="mma16_k")
    words = [f"{w & 0xFFFFFFFF:08x}" for w in codes[0, 0, 0].view(torch.int32).tolist()]
    assert words == ["91918080"] * 4 + ["b3b3a2a2"] * 4 + ["d5d5c4c4"] * 4 + ["f7f7e6e6"] * 4
    assert params[0, 0, 0].tolist() == [[1, 0]]
    codes, _ = backend.run("kv_quantize", torch.tensor([[[[-1, 0.2, 0.5, 2]]]]), 2, group=4)
    assert codes.flatten().tolist() == [0xE4]


@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    """Small odd shapes against the specification, on the CPU."""
    from backends import make_backend

    bits = data.draw(st.sampled_from(BITS))
    size = data.draw(st.integers(1, 12)) * (8 if bits == 3 else max(1, 8 // bits))
    tokens, axis = data.draw(st.integers(0, 20)), data.draw(st.sampled_from(["token", "channel"]))
    extent = size if axis == "token" else tokens
    group = data.draw(st.sampled_from([g for g in range(1, extent + 1) if extent % g == 0] or [-1]))
    x = torch.randn(1, 2, tokens, size)
    options = {"axis": axis, "group": group, "rounding": data.draw(st.sampled_from(["even", "away"]))}
    got = make_backend("cpu").run("kv_quantize", x, bits, **options)
    want = reference.kv_quantize(x, bits, **options, dtype=torch.float32)
    same(got[0], want[0], "codes")
    same(got[1], want[1], "params")


# --- pages --------------------------------------------------------------------------------------------------


def expected_page(
    case: PageCase, tensors: tuple[Tensor, ...], maps: dict[str, Tensor], i: int
) -> list[Tensor]:
    """K codes, K params, V codes and V params of page i, from the specification; no slot is empty."""
    _, k, v, sequence, index, _ = tensors
    out = []
    for which, x in (("k", k), ("v", v)):
        f, batch, head = case.format, *divmod(int(sequence[i]), k.shape[1])
        tier, axis, group = (getattr(f, f"{name}_{which}") for name in ("tier", "axis", "group"))
        rows = x[batch, head][index[i].clamp(min=0)][None, None]
        options: dict[str, Any] = {"axis": axis, "group": group}
        options["layout"] = "linear" if f.layout == "linear" else f"mma16_{which}"
        options["kind"] = "fp8" if tier == "fp8" else "int"
        for name in ("scale", "bias"):
            if f"{which}_{name}" in maps:
                options[f"pre_{name}"] = maps[f"{which}_{name}"][batch, head][None, None]
        out += [t[0, 0] for t in reference.kv_quantize(rows, TIER_BITS[tier], **options, dtype=torch.float32)]
    return out


def sections(page: Tensor, case: PageCase) -> list[Tensor]:
    f = case.format
    starts = [*f.sections, f.page_bytes]
    sizes = [f._code_bytes(f.tier_k), f._param_bytes(f.axis_k, f.group_k)]
    sizes += [f._code_bytes(f.tier_v), f._param_bytes(f.axis_v, f.group_v)]
    return [page[at : at + size] for at, size in zip(starts, sizes, strict=False)]


@pytest.mark.parametrize("case", [c for c in PAGE_CASES if not c.holes], **by_name)
def test_pages_hold_what_quantize_makes(backend: Backend, case: PageCase) -> None:
    tensors, maps = case.inputs()
    pool = tensors[0].clone()
    with backend.active():
        here = [t.to(backend.device) for t in (pool, *tensors[1:])]
        on_device = {name: m.to(backend.device) for name, m in maps.items()}
        from tokencomp import ops

        ops.kv_page_write_(*here, case.format, **on_device)
    pool = here[0].cpu()
    written = tensors[5].tolist()
    untouched = [p for p in range(pool.shape[0]) if p not in written]
    assert torch.equal(pool[untouched], tensors[0][untouched])
    for i, page in enumerate(written):
        for got, want in zip(sections(pool[page], case), expected_page(case, tensors, maps, i), strict=True):
            assert torch.equal(got, want.contiguous().view(torch.uint8).flatten())


@pytest.mark.parametrize("case", PAGE_CASES, **by_name)
def test_pages_read_back(backend: Backend, case: PageCase) -> None:
    tensors, maps = case.inputs()
    with backend.active():
        from tokencomp import ops

        here = [t.to(backend.device) for t in tensors]
        on_device = {name: m.to(backend.device) for name, m in maps.items()}
        ops.kv_page_write_(*here, case.format, **on_device)
        got = ops.kv_page_read(
            here[0], here[5], case.format, dtype=tensors[1].dtype, sequence=here[3], **on_device
        )
    for x, back, tier, wide in zip(tensors[1:3], got, (case.tier_k, case.tier_v), "kv", strict=True):
        assert back.dtype == x.dtype
        rows = x.flatten(0, 1)[tensors[3].long()[:, None], tensors[4].long().clamp(min=0)]
        there = (tensors[4] >= 0)[..., None].expand_as(rows)
        bits = TIER_BITS[tier]
        size = 12.0 if wide else 1.0  # of a group: all lie within +-6 even after the maps
        bound = 0.07 * 6 if tier == "fp8" else size / (2**bits - 1) / 2 + 0.01 * 12
        error = (back.cpu().float() - rows.float()).abs()[there]
        assert error.numel() == 0 or float(error.max()) <= 2 * bound  # maps divide by at least a half


def test_pages_of_empty_slots_read_as_zeros(cpu_backend: Backend) -> None:
    """Also where the sequences have no tokens at all."""
    page = PageFormat("int4", "fp8", 16, 64)
    pool = torch.full((1, page.page_bytes), 255, dtype=torch.uint8)
    index, one = torch.full((1, 16), -1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    for tokens in (0, 5):
        x = torch.full((1, 1, tokens, 64), math.nan)
        cpu_backend.run_kernel("kv_page_write_", pool, x, x, one, index, one, **page.options())
        assert (pool == 0).all()
        assert cpu_backend.run("kv_page_read", pool, one, page)[0].abs().max() == 0


def test_page_bytes() -> None:
    table = {
        (16, "token", 128, 128): {"int8": 4224, "int4": 2176, "int3": 1664, "int2": 1152},
        (32, "token", 128, 128): {"int8": 8448, "int4": 4352, "int3": 3328, "int2": 2304},
        (64, "token", 128, 128): {"int8": 16896, "int4": 8704, "int3": 6656, "int2": 4608},
        (64, "token", 64, 64): {"int2": 5120},
        (64, "channel", -1, 128): {"int4": 8960, "int2": 4864},
        (16, "channel", 16, 128): {"int4": 2624, "int2": 1600},
    }
    for (tokens, axis, k, v), row in table.items():
        for tier, size in row.items():
            assert PageFormat(tier, tier, tokens, 128, axis, "token", k, v).page_bytes == size
    assert (
        PageFormat("int4", "int2", 64, 128, "token", "token", 32, 32).page_bytes == 64 * 128 * 6 // 8 + 2048
    )
    kivi = PageFormat("int2", "int2", 64, 128, "channel", "token", 32, 32)
    assert (kivi.page_bytes, kivi.bits) == (6144, 3.0)


def test_table_entries() -> None:
    for kind in range(8):
        entry = torch.tensor([page_entry(kind, n) for n in (0, 1, 2**28 - 1)], dtype=torch.int32)
        assert page_type(entry).tolist() == [kind] * 3
        assert page_number(entry).tolist() == [0, 1, 2**28 - 1]
    with pytest.raises(ValueError, match=r"number must be in \[0, 2\^28\), got 268435456"):
        page_entry(1, 2**28)
    with pytest.raises(ValueError, match=r"kind must be in \[0, 7\], got 8"):
        page_entry(8, 0)


# --- transforms and statistics ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32, 64, 128, 256])
def test_hadamard(backend: Backend, size: int, dtype: torch.dtype) -> None:
    x, signs = strided(torch.randn(2, 3, 11, size).to(dtype), "hf"), torch.randn(size).sign()
    for options in ({}, {"signs": signs}, {"signs": signs, "inverse": True}):
        got = backend.run("hadamard", x, **options)
        exact, torch32 = (reference.hadamard(x, **options, dtype=d) for d in (torch.float64, torch.float32))
        if dtype == torch.float32:
            assert_scores(got, exact, torch32)
        else:
            error, rounding = (got.double() - exact).abs(), (torch32.to(dtype).double() - exact).abs().max()
            assert got.dtype == dtype
            assert float(error.max()) <= 2 * float(rounding) + 1e-6
    back = backend.run("hadamard", backend.run("hadamard", x.float(), signs), signs, inverse=True)
    torch.testing.assert_close(back, x.float(), rtol=1e-5, atol=1e-5)


def test_hadamard_of_other_ranks(backend: Backend) -> None:
    assert backend.run("hadamard", torch.tensor([4.0, 0, 0, 1])).tolist() == [2.5, 1.5, 1.5, 2.5]
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(backend.run("hadamard", x), reference.hadamard(x).float())
    assert backend.run("hadamard", x[:0]).shape == (0, 5, 8)


def test_rotated_dot_products_are_unchanged(backend: Backend) -> None:
    q, k, signs = torch.randn(1, 2, 7, 64), torch.randn(1, 2, 9, 64), torch.randn(64).sign()
    rotated = backend.run("hadamard", q, signs) @ backend.run("hadamard", k, signs).mT
    torch.testing.assert_close(rotated, q @ k.mT, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [(2, 3, 37, 64), (1, 1, 1300, 128), (2, 1, 512, 256), (3, 2, 5, 1), (1, 1, 600, 96), (2, 2, 0, 8)],
)
def test_channel_stats(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = strided((torch.randn(shape) + 2).to(dtype), "sliced")
    if shape[2] > 3:
        x[0, 0, 3, 0] = math.nan
    ragged = {
        "lengths": torch.arange(shape[0]).clamp(max=1) * shape[2] * 2 // 3,
        "starts": torch.full((shape[0],), shape[2] // 5),
    }
    for options in ({}, ragged):
        got = backend.run("channel_stats", x, **options)
        exact, torch32 = (
            reference.channel_stats(x, **options, dtype=d) for d in (torch.float64, torch.float32)
        )
        for name, *values in zip(("absmax", "min", "max", "mean"), got, exact, torch32, strict=True):
            nan = values[1].isnan()
            assert torch.equal(values[0].isnan(), nan), name
            values = [v[~nan] for v in values]
            if name == "mean":
                assert_scores(*values, what=name)
            else:
                assert torch.equal(values[0].double(), values[1]), name


def test_statistics_do_not_depend_on_threads() -> None:
    from tokencomp import ops

    x, before = torch.randn(3, 2, 1500, 64), torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append((*ops.channel_stats(x), *ops.kv_quantize(x, 3, group=64), ops.hadamard(x)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
