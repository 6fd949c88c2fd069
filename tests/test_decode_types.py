"""Decode attention over pages of several types in one table, and over dense keys, against the float64
reference.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from backends import Backend, make_backend
from cases import DTYPES
from cases_decode import DecodeCase
from cases_decode_types import LINEAR_CASES, TYPES_CASES, TypesCase
from decode_yardstick import assert_attention
from tokencomp import reference
from tokencomp.ops.kvquant_pages import page_number, page_type
from tokencomp.ops.page_pools import PagePools
from torch import Tensor

INF = float("inf")
Result = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def cpu() -> Backend:
    return make_backend("cpu")


def decode(backend: Backend, case: TypesCase | DecodeCase, **changes: Any) -> Result:
    arguments, options = case.call()
    out: Result = backend.run("paged_decode", *arguments, **(options | changes))
    return out


def same(got: Result, want: Result) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("case", TYPES_CASES, ids=lambda case: case.name)
def test_against_the_reference(backend: Backend, case: TypesCase) -> None:
    case = case.on(backend.name)
    assert_attention(case, *decode(backend, case))


@pytest.mark.parametrize("case", LINEAR_CASES, ids=lambda case: case.name)
def test_shapes_of_the_linear_layout(cpu: Backend, case: TypesCase) -> None:
    assert_attention(case, *decode(cpu, case))


FOLDED = TypesCase(("int4c+int4t", "int2c+int2t", "int8t64+int8t32"), 2, 8, 2, 1, (640, 192), 128, P=64)


@pytest.mark.parametrize("offset", [0.0, 8.0])
@pytest.mark.parametrize("maps", ["", "k_scale k_bias v_scale v_bias"])
@pytest.mark.parametrize(
    "text", ["int4c+int4t", "int2c+int2c32", "int3t+int3t32", "int8t64+int8t64", "int8c16+int2t", "fp8t+fp8c"]
)
def test_grids_fold_exactly(backend: Backend, text: str, maps: str, offset: float) -> None:
    """In float32 logits and outputs are those of the dequantized values to 1e-5 of their size."""
    case = replace(FOLDED, formats=(text,), working=False, maps=maps, logits=True, offset=offset)
    case = case.on(backend.name)
    arguments, options = case.call()
    for got, want in zip(decode(backend, case), reference.paged_decode(*arguments, **options), strict=True):
        seen = want.isfinite()
        assert torch.equal(got.isfinite(), seen)
        assert (got.double() - want)[seen].abs().max() <= 1e-5 * want[seen].abs().max().clamp(min=1)


MIXED = [
    replace(FOLDED, dtype=dtype, T=rows, logits=True, lengths=(640, 197, 0, 1))
    for dtype, rows in (("bfloat16", 1), ("float16", 3), ("float32", 1))
]


@pytest.mark.parametrize("case", MIXED, ids=lambda case: case.name)
def test_order_of_pages_does_not_matter(backend: Backend, case: TypesCase) -> None:
    """Full pages change places; what each row holds stays."""
    case = replace(case, lengths=(640, 640), working=True, tail="any", logits=False, causal=False)
    case = case.on(backend.name)
    (q, k, v, table, lengths), options = case.call()
    full = int(lengths.min()) // case.P
    order = torch.cat([torch.randperm(full), torch.arange(full, table.shape[2])])
    want = backend.run("paged_decode", q, k, v, table, lengths, **options)
    got = backend.run("paged_decode", q, k, v, table[..., order].contiguous(), lengths, **options)
    tolerance = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}[case.dtype]
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=tolerance)
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("case", MIXED, ids=lambda case: case.name)
def test_places_in_the_pools_do_not_matter(backend: Backend, case: TypesCase) -> None:
    case = case.on(backend.name)
    (q, k, v, table, lengths), options = case.call()
    want = backend.run("paged_decode", q, k, v, table, lengths, **options)
    quantized: PagePools = options["quantized"]
    orders = [torch.randperm(len(pool)) for pool in (k, *quantized.pools)]
    moved = table.clone()
    for kind, order in enumerate(orders):
        own = page_type(table) == kind
        moved[own] = kind << 28 | order.argsort()[page_number(table[own]).long()].int()
    pools = tuple(pool[order] for pool, order in zip(quantized.pools, orders[1:], strict=True))
    options["quantized"] = replace(quantized, pools=pools)
    got = backend.run("paged_decode", q, k[orders[0]], v[orders[0]], moved, lengths, **options)
    assert same(got, want)


@pytest.mark.parametrize("case", MIXED, ids=lambda case: case.name)
def test_pools_that_no_row_names_change_nothing(backend: Backend, case: TypesCase) -> None:
    case = case.on(backend.name)
    quantized = case.call()[1]["quantized"]
    plain = DecodeCase(2, 8, 2, case.T, (640, 197, 0, 1), 128, case.dtype, 64, logits=True)
    got, want = decode(backend, plain, quantized=quantized), decode(backend, plain)
    if backend.name == "cpu" or case.dtype == "float32":
        assert same(got, want)
    assert_attention(plain, *got)  # on CUDA another kernel, with its own order of sums


@pytest.mark.parametrize("case", MIXED, ids=lambda case: case.name)
def test_threads_and_company_do_not_matter(cpu: Backend, case: TypesCase) -> None:
    (q, k, v, table, lengths), options = case.call()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(cpu.run("paged_decode", q, k, v, table, lengths, **options))
    finally:
        torch.set_num_threads(before)
    assert all(same(result, results[0]) for result in results[1:])
    alone = cpu.run("paged_decode", q[:1], k, v, table[:1], lengths[:1], **options)
    assert same(alone, tuple(t[:1] for t in results[0]))


@pytest.mark.parametrize("case", MIXED, ids=lambda case: case.name)
@pytest.mark.parametrize("maps", ["", "k_scale k_bias v_scale v_bias"])
def test_a_list_of_all_slots_is_no_list(backend: Backend, case: TypesCase, maps: str) -> None:
    case = replace(case, maps=maps).on(backend.name)
    slots = torch.arange(case.places * case.P).int().expand(2, 2, -1).contiguous()
    want, got = decode(backend, case), decode(backend, case, index=slots)
    tolerance = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 3e-2}[case.dtype]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def as_view(x: Tensor) -> Tensor:
    """The same values behind strides of its own, NaN between."""
    wide = x.new_full((*x.shape[:2], 2 * x.shape[2], x.shape[3] + 5), float("nan")).transpose(1, 2)
    view = wide.transpose(1, 2)[:, :, ::2, 2:-3]
    return view.copy_(x)


def test_a_partly_filled_quantized_page(backend: Backend) -> None:
    """Slots that were never written may hold any parameters."""
    case = replace(FOLDED, lengths=(70, 33, 1, 129), working=False, tail="any", logits=True).on(backend.name)
    (q, k, v, table, lengths), options = case.call()
    want = backend.run("paged_decode", q, k, v, table, lengths, **options)
    quantized: PagePools = options["quantized"]
    poisoned = []
    for pool, page in zip(quantized.pools, quantized.formats, strict=True):
        other = pool.clone()
        poison_unused(other, page, table, lengths, 1 + len(poisoned))
        poisoned.append(other)
    options["quantized"] = replace(quantized, pools=tuple(poisoned))
    assert same(backend.run("paged_decode", q, k, v, table, lengths, **options), want)


def poison_unused(pool: Tensor, page: Any, table: Tensor, lengths: Tensor, kind: int) -> None:
    """NaN as parameters of tokens beyond the lengths, where parameters belong to tokens."""
    for begin, axis, group in (
        (page.sections[1], page.axis_k, page.group_k),
        (page.sections[3], page.axis_v, page.group_v),
    ):
        if axis == "channel":
            continue
        size = 4 * page.head_dim // (page.head_dim if group == -1 else group)
        for b, h, place in (page_type(table) == kind).nonzero().tolist():
            first = min(max(int(lengths[b, h]) - place * page.tokens, 0), page.tokens)
            number = int(page_number(table[b, h, place]))
            pool[number, begin + first * size : begin + page.tokens * size] = 255


DENSE = [
    DecodeCase(2, 8, 2, rows, (1100, 77, 530, 16), 64, dtype, 32, logits=logits, lists=lists, bias=bias)
    for dtype, rows, logits, lists, bias in (
        ("bfloat16", 1, True, "", ""), ("float16", 3, False, "counted", ""), ("float32", 2, True, "", "head"),
    )
]  # fmt: skip


@pytest.mark.parametrize("view", [lambda x: x, as_view], ids=["contiguous", "strided"])
@pytest.mark.parametrize("case", DENSE, ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["cpu", "emu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_dense_keys_are_one_page_a_row(name: str, case: DecodeCase, view: Callable[[Tensor], Tensor]) -> None:
    backend = make_backend(name)
    case = case if name == "cpu" else replace(case, lengths=(130, 77, 100, 16))
    (q, k_pages, v_pages, table, lengths), options = case.call()
    k, v = (reference.paged_rows(pages, table)[0] for pages in (k_pages, v_pages))
    want = backend.run("paged_decode", q, k_pages, v_pages, table, lengths, **options)
    got = backend.run("paged_decode", q, view(k), view(v), None, lengths, **options)
    if view is not as_view or name == "cpu" or case.dtype == "float32":
        assert same(got, want)  # rows that are not aligned are multiplied in other tiles on CUDA
    assert_attention(case, *got)
    exact = reference.paged_decode(q, k, v, None, lengths, **options)
    torch.testing.assert_close(got[1].double(), exact[1], rtol=1e-5, atol=1e-5)


def test_dense_keys_of_any_number(cpu_backend: Backend) -> None:
    for slots in (0, 1, 5, 513):
        q, k, v = (torch.randn(1, h, n, 32) for h, n in ((4, 2), (2, slots), (2, slots)))
        lengths = torch.tensor([[slots, slots // 2]], dtype=torch.int32)
        got = cpu_backend.run("paged_decode", q, k, v, None, lengths, logits_out=True)
        want = reference.paged_decode(q, k, v, None, lengths, logits_out=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wild_entries_are_no_pages(backend: Backend, dtype: str) -> None:
    """Of a type beyond the pools, or of a number beyond its pool: such slots are not seen."""
    case = replace(FOLDED, dtype=dtype, logits=True).on(backend.name)
    (q, k, v, table, lengths), options = case.call()
    wild = table.clone()
    wild[0, :, ::2] = 4 << 28
    wild[1, :, ::2] = 2 << 28 | len(options["quantized"].pools[1])
    got = backend.run("paged_decode", q, k, v, wild, lengths, **options)
    hidden = torch.where(torch.isin(wild, table), table, -1)
    assert same(got, backend.run("paged_decode", q, k, v, hidden, lengths, **options))
    assert (got[2].view(2, 8, 1, -1, 64)[:, :, :, ::2] == -INF).all()
