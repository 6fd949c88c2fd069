"""Running the operators of the paged cache on a case, and holding them to the specification.

What moves is the same bits; what is computed may miss float64 by twice what torch's fp32 misses it by.
"""

from collections.abc import Callable
from typing import Any

import torch
from backends import Backend
from cases_kvcache import Cache, KVCase
from merge_yardstick import tolerance
from tokencomp import reference
from tokencomp.reference.kvcache import rows_of as reference_rows
from tokencomp.reference.kvcache import slots
from torch import Tensor
from yardstick import NOISE


def bits(t: Tensor) -> Tensor:
    """The elements as integers, so that NaN equals NaN."""
    return t.contiguous().view(torch.int32 if t.dtype == torch.float32 else torch.int16)


def assert_same(got: Cache, want: Cache) -> None:
    for name in ("k_pages", "v_pages"):
        assert torch.equal(bits(getattr(got, name)), bits(getattr(want, name))), name


def run_in_place(backend: Backend, name: str, cache: Cache, *arguments: Any, **options: Any) -> Cache:
    """The pages after operator ``name`` ran on a copy of ``cache``; ``arguments`` follow ``lengths``."""
    moved = backend.here(tuple(cache.clone().parts))
    pages = moved[:1] if name == "rope_shift_" else moved[:2]
    new = arguments[:2] if name == "kv_append_" else ()
    with backend.active():
        backend.call(name, *pages, *new, *moved[2:], *arguments[len(new) :], **options)
    return Cache(*backend.home(moved))


def assert_pages_close(
    got: Cache,
    before: Cache,
    touched: Tensor,
    specification: Callable[[tuple[Tensor, ...], torch.dtype], None],
) -> None:
    """What changes may miss float64 by twice what torch's fp32, rounded to the pages' type, misses it by.

    ``specification(parts, dtype)`` changes the pages of ``parts``, computing in ``dtype``. ``touched`` ``[N,
    Hx, P]`` are the slots that may change; all others must be the same bits.
    """
    plain, exact = before.clone(), before.clone()
    exact.k_pages, exact.v_pages = exact.k_pages.double(), exact.v_pages.double()
    specification(plain.parts, torch.float32)
    specification(exact.parts, torch.float64)
    for name in ("k_pages", "v_pages"):
        ours, start, want, theirs = (getattr(c, name) for c in (got, before, exact, plain))
        assert torch.equal(bits(ours)[~touched], bits(start)[~touched]), f"{name}: a slot that had to stay"
        ours, want, theirs = ours[touched].double(), want[touched], theirs[touched].double()
        if ours.numel() == 0:
            continue
        assert bool(want.isfinite().all()), "the case has no number to compare with"
        allowed = 2 * (theirs - want).abs().max() + NOISE * want.abs().max()
        error = (ours - want).abs().max()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def slots_of(cache: Cache, used: Callable[[int, int], Tensor]) -> Tensor:
    """``[N, Hx, P]``: the slots that ``used(b, h)`` lists for every row."""
    mask = torch.zeros(cache.k_pages.shape[:3], dtype=torch.bool)
    for b, h in reference_rows(cache.lengths):
        listed = used(b, h).long()
        page, head, place = slots(cache.k_pages, cache.block_table, b, h, int(cache.lengths[b, h]))
        mask[page[listed], head[listed], place[listed]] = True
    return mask


def check_append(backend: Backend, case: KVCase) -> None:
    cache, want = case.cache(), case.cache()
    (k, v), ranges = case.tokens()
    reference.kv_append_(want.k_pages, want.v_pages, k, v, want.block_table, want.lengths, **ranges)
    assert_same(run_in_place(backend, "kv_append_", cache, k, v, **ranges), want)


def check_compact(backend: Backend, case: KVCase, order: str) -> None:
    cache, want, (index, count) = case.cache(), case.cache(), case.kept()
    reference.kv_compact_(*want.parts, index, count, order=order)
    assert_same(run_in_place(backend, "kv_compact_", cache, index, count, order=order), want)


def check_gather(backend: Backend, case: KVCase, **options: Any) -> None:
    cache = case.cache()
    got = backend.run("kv_gather", *cache.parts, **options)
    want = reference.kv_gather(*cache.parts, **options)
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape
        assert torch.equal(bits(x), bits(y)), options.keys()


def check_shift(backend: Backend, case: KVCase, layout: str) -> None:
    cache, (old, new), inv_freq = case.cache(), case.positions(), case.frequencies()
    got = run_in_place(backend, "rope_shift_", cache, old, new, inv_freq, layout=layout)

    def moved(b: int, h: int) -> Tensor:
        n = int(cache.lengths[b, h])
        return (old[b, h, :n] != new[b, h, :n]).nonzero()[:, 0]

    def specification(parts: tuple[Tensor, ...], _: torch.dtype) -> None:
        """In float64 even for the yardstick: torch's fp32 sines of large angles would allow anything."""
        reference.rope_shift_(parts[0], *parts[2:], old, new, inv_freq, layout=layout)

    assert_pages_close(got, cache, slots_of(cache, moved), specification)
    rest = slice(2 * len(inv_freq), None)  # channels that are not rotated
    assert torch.equal(bits(got.k_pages[..., rest]), bits(cache.k_pages[..., rest]))


def check_assign(backend: Backend, case: KVCase, **options: Any) -> None:
    """Each member goes to the best kept slot up to the tolerance, with its own similarity."""
    least, arguments = 0.1, (*case.cache().parts, *case.kept(), case.members())
    target, value = backend.run("evict_assign", *arguments, **options, min_similarity=least)
    exact = reference.evict_similarity(*arguments, **options)
    close = tolerance(reference.evict_similarity(*arguments, **options, dtype=torch.float32), exact)
    assert (target.dtype, value.dtype) == (torch.int32, torch.float32)
    best = exact.amax(-1) if exact.shape[-1] else torch.full(target.shape, -float("inf"))
    none = best == -float("inf")
    assert torch.equal(value == -float("inf"), none)
    assert torch.equal(target == -1, none | (value < least))
    assert bool(((value - best).abs()[~none] <= close).all())
    chosen = exact.gather(-1, target.clamp(min=0).long()[..., None])[..., 0] if exact.shape[-1] else best
    assert bool(((chosen - best).abs()[target >= 0] <= close).all())


def check_merge(backend: Backend, case: KVCase, **options: Any) -> None:
    cache = case.cache()
    (index, count), member, (target, weight, center) = case.kept(), case.members(), case.mixture()
    arguments = (index, count, member, target, weight, center)
    got = run_in_place(backend, "evict_merge_", cache, *arguments, **options)

    def met(b: int, h: int) -> Tensor:
        return index[b, h, target[b, h, (member[b, h] >= 0) & (target[b, h] >= 0)].long()]

    def specification(parts: tuple[Tensor, ...], dtype: torch.dtype) -> None:
        reference.evict_merge_(*parts, *arguments, **options, dtype=dtype)

    assert_pages_close(got, cache, slots_of(cache, met), specification)
    if options.get("keys", "keep") == "keep":
        assert torch.equal(bits(got.k_pages), bits(cache.k_pages))


def check_all(backend: Backend, case: KVCase) -> None:
    """Every operator once."""
    index, count = case.kept()
    check_append(backend, case)
    for order in ("stable", "holefill"):
        check_compact(backend, case, order)
    check_gather(backend, case, size=int(case.cache().lengths.max()) + 1)
    check_gather(backend, case, size=index.shape[2] + 1, index=index, count=count)
    if case.D > 1:
        for layout in ("half", "interleaved"):
            check_shift(backend, case, layout)
    check_assign(backend, case, similarity="kv")
    check_merge(backend, case, keys="direction", by_norm=True)
    check_merge(backend, case, values="sum", keys="mean")
