"""Decode attention on every back end against the float64 reference, and what must hold between calls."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from backends import Backend
from cases import DTYPES
from cases_decode import DECODE_CASES, STATES_CASES, DecodeCase, StatesCase
from decode_yardstick import assert_attention, assert_close
from emulator import settings
from tokencomp import native, ops, reference
from torch import Tensor

INF = float("inf")


def decode(backend: Backend, case: DecodeCase, **changes: Any) -> tuple[Tensor, Tensor, Tensor]:
    arguments, options = case.call()
    out: tuple[Tensor, Tensor, Tensor] = backend.run("paged_decode", *arguments, **(options | changes))
    return out


@pytest.mark.parametrize("case", DECODE_CASES, ids=lambda case: case.name)
def test_against_the_reference(backend: Backend, case: DecodeCase) -> None:
    assert_attention(case, *decode(backend, case))


@pytest.mark.parametrize("case", STATES_CASES, ids=lambda case: case.name)
def test_merge_states(backend: Backend, case: StatesCase) -> None:
    (out, lse), _ = case.call()
    got, total = backend.run("merge_states", out, lse)
    exact, torch32 = (reference.merge_states(out, lse, dtype=d) for d in (torch.float64, torch.float32))
    assert got.dtype == out.dtype
    assert_close(got, exact[0], torch32[0].to(out.dtype).float(), what="out")
    torch.testing.assert_close(total.double(), exact[1], rtol=1e-6, atol=1e-6)


def test_worked_example_of_merged_states(backend: Backend) -> None:
    out, lse = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), torch.tensor([[1.693147], [2.0]])
    got, total = backend.run("merge_states", out, lse)
    torch.testing.assert_close(got, torch.tensor([[0.4239, 0.5761]]), rtol=0, atol=5e-5)
    torch.testing.assert_close(total, torch.tensor([2.551445]), rtol=0, atol=1e-6)


BOTH = [DecodeCase(2, 8, 2, t, (1100, 77, 530, 16), 64, d, 32) for t, d in ((1, "bfloat16"), (3, "float32"))]


def small(case: DecodeCase, backend: Backend) -> DecodeCase:
    """The emulator takes its time."""
    return case if backend.name != "emu" else replace(case, lengths=(130, 77, 100, 16))


@pytest.mark.parametrize("case", BOTH, ids=lambda case: case.name)
@pytest.mark.parametrize("lists", ["", "counted"])
def test_order_of_pages_does_not_matter(backend: Backend, case: DecodeCase, lists: str) -> None:
    (q, k, v, table, lengths), options = replace(small(case, backend), lists=lists).call()
    want = backend.run("paged_decode", q, k, v, table, lengths, **options)
    order = torch.randperm(len(k))
    places = order.argsort()[table.long()].int()
    got = backend.run("paged_decode", q, k[order], v[order], places, lengths, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("case", BOTH, ids=lambda case: case.name)
def test_pages_of_engines_give_the_same_bits(backend: Backend, case: DecodeCase) -> None:
    case = small(case, backend)
    (q, k, v, table, lengths), options = replace(case, layout="engine").call()
    want = backend.run("paged_decode", q, k, v, table, lengths, **options)
    own_k, own_v = (x.reshape(-1, 1, *x.shape[2:]) for x in (k, v))
    own = table * case.Hkv + torch.arange(case.Hkv, dtype=torch.int32)[:, None]
    got = backend.run("paged_decode", q, own_k, own_v, own, lengths, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("case", BOTH, ids=lambda case: case.name)
def test_spare_room_does_not_matter(cpu_backend: Backend, case: DecodeCase) -> None:
    """On the CPU the parts of a row are those of its own length; elsewhere the plan may change."""
    (q, k, v, table, lengths), options = small(case, cpu_backend).call()
    want = cpu_backend.run("paged_decode", q, k, v, table, lengths, **options)
    wide = torch.cat([table, torch.full((2, 2, 60), -1, dtype=torch.int32)], 2)
    got = cpu_backend.run("paged_decode", q, k, v, wide, lengths, **options)
    if cpu_backend.name == "cpu":
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert_attention(small(case, cpu_backend), got[0], got[1], got[2])


@pytest.mark.parametrize("case", BOTH, ids=lambda case: case.name)
def test_rows_alone_give_the_bits_of_the_batch(case: DecodeCase) -> None:
    backend = Backend("cpu", "tokencomp", "cpu")
    (q, k, v, table, lengths), options = case.call()
    out, lse, _ = backend.run("paged_decode", q, k, v, table, lengths, **options)
    alone = backend.run("paged_decode", q[1:], k, v, table[1:], lengths[1:], **options)
    assert torch.equal(alone[0], out[1:])
    assert torch.equal(alone[1], lse[1:])


@pytest.mark.parametrize("case", BOTH, ids=lambda case: case.name)
def test_threads_do_not_matter(case: DecodeCase) -> None:
    backend, before = Backend("cpu", "tokencomp", "cpu"), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(decode(backend, case))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_list_is_a_mask(backend: Backend, dtype: str, rows: int) -> None:
    case = DecodeCase(1, 4, 2, rows, (120, 77), 64, dtype, 16, lists="counted", logits=True)
    (q, k, v, table, lengths), options = case.call()
    listed = backend.run("paged_decode", q, k, v, table, lengths, **options)
    index, count = options.pop("index"), options.pop("index_count")
    bias = torch.full((1, 2, case.capacity), -INF)
    for h in range(2):
        kept = index[0, h, : int(count[0, h])]
        bias[0, h, kept[kept >= 0].long()] = 0.0
    masked = backend.run("paged_decode", q, k, v, table, lengths, key_bias=bias, **options)
    assert torch.equal(listed[2], masked[2])
    tolerance = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 1.6e-2}[dtype]
    torch.testing.assert_close(listed[0], masked[0], rtol=0, atol=tolerance)
    torch.testing.assert_close(listed[1], masked[1], rtol=1e-6, atol=1e-6)


def test_rows_see_what_they_would_alone(backend: Backend) -> None:
    case = DecodeCase(1, 4, 2, 5, (120, 77), 64, "float32", 16)
    (q, k, v, table, lengths), options = case.call()
    together = backend.run("paged_decode", q, k, v, table, lengths, **options)
    for t in range(5):
        alone = backend.run("paged_decode", q[:, :, t : t + 1], k, v, table, lengths - (4 - t), **options)
        torch.testing.assert_close(together[0][:, :, t : t + 1], alone[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(together[1][:, :, t : t + 1], alone[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("page", [32, 64])
def test_pages_beyond_the_caches_give_the_bits_of_a_few(page: int) -> None:
    """More than 48 MB of pages are fetched another way than those of one head alone."""
    heads, places, g = 4, 24576 // page + 1, torch.Generator().manual_seed(0)
    pool = torch.randn(heads * places, 2, page, 128, generator=g).bfloat16()
    table = torch.randperm(heads * places, generator=g).view(1, heads, places).int()
    table[0, 1, 3] = -1
    lengths = torch.tensor([[0, 7, page + 1, 0]]).int().neg() + places * page
    q = torch.randn(1, 2 * heads, 3, 128, generator=g).bfloat16()
    keys, values = pool[:, 0:1], pool[:, 1:2]
    assert pool.numel() * 2 > 48 << 20
    together = ops.paged_decode(q, keys, values, table, lengths)
    for h in range(heads):
        rows = slice(2 * h, 2 * h + 2)
        alone = ops.paged_decode(q[:, rows], keys, values, table[:, h : h + 1], lengths[:, h : h + 1])
        assert all(torch.equal(x[:, rows], y) for x, y in zip(together[:2], alone[:2], strict=True))


def test_one_slot(backend: Backend) -> None:
    (q, k, v, table, lengths), options = DecodeCase(1, 2, 1, 1, (1,), 64).call()
    out, lse, _ = backend.run("paged_decode", q, k, v, table, lengths, **options)
    first = v[int(table[0, 0, 0]), 0, 0]
    torch.testing.assert_close(out[0, :, 0], first.expand(2, 64), rtol=1e-6, atol=0)
    z = (q[0, :, 0].double() @ k[int(table[0, 0, 0]), 0, 0].double()) / 8
    torch.testing.assert_close(lse[0, :, 0].double(), z, rtol=1e-5, atol=1e-6)


def test_rows_that_see_nothing(backend: Backend) -> None:
    case = DecodeCase(1, 4, 2, 2, (0, 9), 64, "bfloat16")
    out, lse, _ = decode(backend, case)
    assert (out[0, :2] == 0).all()
    assert (lse[0, :2] == -INF).all()
    assert lse[0, 2:].isfinite().all()
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    out, lse, _ = decode(backend, case, sinks=sinks)
    assert (out[0, :2] == 0).all()
    assert torch.equal(lse[0, :2], sinks[:2, None].expand(2, 2))


def test_parts_merge_to_the_whole(backend: Backend) -> None:
    case = DecodeCase(1, 4, 2, 1, (120, 77), 64, "float32", 16)
    (q, k, v, table, lengths), options = case.call()
    whole = backend.run("paged_decode", q, k, v, table, lengths, **options)
    slots = torch.arange(128, dtype=torch.int32).expand(1, 2, 128)
    parts = [
        backend.run("paged_decode", q, k, v, table, lengths, index=s, **options)
        for s in (slots[..., :50].contiguous(), slots[..., 50:].contiguous())
    ]
    out, lse = backend.run(
        "merge_states", torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts])
    )
    torch.testing.assert_close(out, whole[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, whole[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("units", "keys", "parts"),
    [(8, 0, 1), (8, 64, 1), (8, 2048, 11), (64, 32768, 6), (512, 32768, 3), (40000, 32768, 1)],
)
def test_plan_of_a_launch(units: int, keys: int, parts: int) -> None:
    """Few rows are cut into many parts; enough rows fill the device by themselves."""
    assert native.decode_cuda_parts(units=units, keys=keys) == parts


@pytest.mark.parametrize("splits", [1, 2, 3, 7, 32])
def test_number_of_parts_does_not_matter(splits: int) -> None:
    """Of a CUDA launch; the emulator takes the plan that the environment asks for."""
    from backends import make_backend

    backend = make_backend("emu")
    case = DecodeCase(1, 4, 2, 2, (200, 77), 64, "float32", 16, sinks=True)
    want = decode(backend, case)
    with settings(TOKENCOMP_DECODE_PARTS=str(splits)):
        got = decode(backend, case)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
