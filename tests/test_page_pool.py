"""PagePool against a plain model: nothing leaks, nothing is used twice, and an error changes nothing.

``TOKENCOMP_POOL_STEPS`` shortens the random walk of a million steps.
"""

import os
import random

import numpy as np
import pytest
import torch
from tokencomp import native

STEPS = int(os.environ.get("TOKENCOMP_POOL_STEPS", "1000000"))
P = 16


class Model:
    """Rows of pages as an engine keeps them, with the uses of every page counted apart from the pool."""

    def __init__(self, capacity: int, seed: int) -> None:
        self.pool = native.PagePool(capacity)
        self.uses = np.zeros(capacity, dtype=np.int64)
        self.rows: list[tuple[list[int], int]] = []  # pages, tokens
        self.random = random.Random(seed)
        self.refused = 0

    def take(self, count: int) -> list[int] | None:
        """New pages: the lowest free ones; none where the model has too few."""
        free = np.flatnonzero(self.uses == 0)[:count] if count > 1 else self.lowest(count)
        if len(free) < count:
            self.refused += 1
            with pytest.raises(native.OutOfPages):
                self.pool.allocate(count)
            return None
        pages = self.pool.allocate(count).tolist()
        assert pages == list(free), "not the lowest free pages: a page is used twice, or one has leaked"
        self.uses[pages] += 1
        return pages

    def lowest(self, count: int) -> list[int]:
        page = int(np.argmin(self.uses))
        return [page][:count] if self.uses[page] == 0 else []

    def drop(self, pages: list[int]) -> None:
        self.pool.free(pages)
        self.uses[pages] -= 1

    def begin(self) -> None:
        tokens = self.random.randrange(12 * P)
        if (pages := self.take(-(-tokens // P))) is not None:
            self.rows.append((pages, tokens))

    def append(self) -> None:
        """One token; a page that is shared is copied before it is written to."""
        i = self.random.randrange(len(self.rows))
        pages, tokens = self.rows[i]
        if tokens % P == 0:
            if (new := self.take(1)) is None:
                return
            pages = [*pages, *new]
        elif self.pool.refcount(pages[-1:])[0] > 1:
            if (new := self.take(1)) is None:
                return
            self.drop(pages[-1:])
            pages = [*pages[:-1], *new]
        self.rows[i] = pages, tokens + 1

    def compact(self) -> None:
        """Fewer tokens: in place, or into new pages where one is shared."""
        i = self.random.randrange(len(self.rows))
        pages, tokens = self.rows[i]
        tokens = self.random.randint(0, tokens)
        kept = -(-tokens // P)
        if bool((self.pool.refcount(pages) > 1).any()):
            if (new := self.take(kept)) is None:
                return
            self.drop(pages)
            pages = new
        else:
            self.drop(pages[kept:])
            pages = pages[:kept]
        self.rows[i] = pages, tokens

    def end(self) -> None:
        i = self.random.randrange(len(self.rows))
        self.rows[i], self.rows[-1] = self.rows[-1], self.rows[i]
        self.drop(self.rows.pop()[0])

    def fork(self) -> None:
        pages, tokens = self.random.choice(self.rows)
        self.pool.retain(pages)
        self.uses[pages] += 1
        self.rows.append((list(pages), tokens))

    def check(self) -> None:
        """The pool agrees with the model, and the model with the rows there are."""
        listed = np.bincount([page for pages, _ in self.rows for page in pages], minlength=len(self.uses))
        assert (listed == self.uses).all()
        assert (self.pool.refcount(np.arange(len(self.uses))) == self.uses).all()
        used = int((self.uses > 0).sum())
        facts = self.pool.statistics()
        assert (facts["in_use"], facts["free"]) == (used, len(self.uses) - used)


def test_random_walk() -> None:
    model, steps = Model(200, seed=1), (Model.append,) * 12 + (Model.compact,) * 3 + (Model.fork,)
    for step in range(STEPS):
        if not model.rows or model.random.random() < 0.04:
            model.begin()
        elif len(model.rows) > 80 or model.random.random() < 0.03:
            model.end()
        else:
            model.random.choice(steps)(model)
        if step % 500 == 0:
            model.check()
        if step == STEPS // 2:
            model.pool.grow(300)
            model.uses = np.concatenate([model.uses, np.zeros(100, dtype=np.int64)])
    model.check()
    assert model.refused > 20, "the pool was never full: the walk tests too little"
    while model.rows:
        model.end()
    model.check()
    assert model.pool.in_use == 0
    assert (model.pool.allocate(300) == np.arange(300)).all()


def test_the_walk_sees_a_leak() -> None:
    model = Model(40, seed=2)
    model.begin()
    model.pool.allocate(1)  # behind the model's back
    with pytest.raises(AssertionError):
        model.check()


def test_pages_are_shared_until_the_last_use_ends() -> None:
    pool = native.PagePool(100)
    pages = pool.allocate(5)
    assert pages.dtype == np.int32
    pool.retain(pages[1:3])
    assert pool.refcount(pages).tolist() == [1, 2, 2, 1, 1]
    pool.free(pages)
    assert pool.statistics() == {"capacity": 100, "in_use": 2, "free": 98, "peak": 5, "allocations": 5}
    assert pool.allocate(3).tolist() == [0, 3, 4]
    pool.free(torch.tensor([[1, -1], [2, -1]], dtype=torch.int32))
    assert pool.in_use == 3


def test_errors_say_what_is_wrong_and_change_nothing() -> None:
    pool = native.PagePool(8)
    pool.allocate(6)
    pool.retain([2])
    before = pool.refcount(range(8)).tolist(), pool.statistics()
    message = r"PagePool.allocate: 3 pages wanted, 2 of 8 free \(6 in use, peak 6\)"
    with pytest.raises(MemoryError, match=message):
        pool.allocate(3)
    for call, error, message in (
        (lambda: pool.allocate(-1), ValueError, "count must be >= 0, got -1"),
        (lambda: pool.allocate(1 << 40), MemoryError, "1099511627776 pages wanted"),
        (lambda: pool.free([0, 1, 7]), ValueError, r"PagePool.free: page 7 is not in use \(freed twice"),
        (lambda: pool.free([3, 3]), ValueError, "page 3 is not in use"),
        (lambda: pool.free([2, 2, 2]), ValueError, "page 2 is not in use"),
        (lambda: pool.free([0, 8]), IndexError, r"pages must be in \[0, capacity=8\), got 8"),
        (lambda: pool.free([-2]), IndexError, "got -2"),
        (lambda: pool.free([1 << 32]), IndexError, "got 4294967296"),
        (lambda: pool.retain([0, 7]), ValueError, "PagePool.retain: page 7 is free"),
        (lambda: pool.retain([9]), IndexError, "PagePool.retain: pages must be in"),
        (lambda: pool.refcount([8]), IndexError, "PagePool.refcount"),
        (lambda: pool.free([0.0]), TypeError, "pages must be integers, got float64"),
        (lambda: pool.free("pages"), TypeError, "pages must be integers"),
        (lambda: pool.grow(7), ValueError, r"capacity must be in \[8, 268435456\], got 7"),
        (lambda: native.PagePool(-1), ValueError, "capacity must be in"),
    ):
        with pytest.raises(error, match=message):
            call()
        assert before == (pool.refcount(range(8)).tolist(), pool.statistics())
    pool.free([])
    assert len(pool.allocate(0)) == 0
    assert before[0] == pool.refcount(range(8)).tolist()


def test_grown_pages_come_last() -> None:
    pool = native.PagePool(63)
    pool.allocate(63)
    pool.grow(130)
    pool.free([5])
    assert pool.allocate(3).tolist() == [5, 63, 64]
    assert pool.allocate(65).tolist() == list(range(65, 130))
