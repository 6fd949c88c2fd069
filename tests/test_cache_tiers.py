"""Quantized pages of a cache against lists of tokens and the specification of their bytes."""

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from tiers_model import NEVER, Model, Row, Token, books_are_exact, fresh, random_keep
from tokencomp.cache import LayerStore, Pool
from tokencomp.methods.kv import ChannelMaps, PageSpec, Side
from torch import Tensor

D, P = 8, 16
SIDES = {"score": Side(torch.float32, NEVER)}
CPU = torch.device("cpu")
FORMATS = (PageSpec("int4", "int4"), PageSpec("int2", "int8", k_axis="token", k_group=4, v_group=32))


def pool(dtype: torch.dtype = torch.float32, **options: Any) -> Pool:
    return Pool(P, D, D, dtype, CPU, formats=FORMATS, **options)


def write(store: LayerStore, model: Model, k: Tensor, v: Tensor, counts: list[int]) -> None:
    """Append ``[B, Hkv, T, D]``, of which each row has ``counts[b]`` from the left."""
    given = np.array(counts, np.int32)
    full = bool((given == k.shape[2]).all())
    starts = None if full else torch.zeros(len(counts), dtype=torch.int32)
    store.append(k, v, starts, None if full else torch.from_numpy(given), None if full else given)
    position, lengths = store.position(), store.host_lengths
    for b, rows in enumerate(model.rows):
        for h, row in enumerate(rows):
            for t in range(counts[b]):
                token = Token(model.seen[b] + t, k[b, h, t].clone(), v[b, h, t].clone(), random.random())
                token.score = float(torch.tensor(token.score))
                at = int((position[b, h, : lengths[b, h]] == token.position).nonzero())
                assert store.state["score"][b, h, at] == NEVER
                store.state["score"][b, h, at] = token.score
                row.working.append(token)
        model.seen[b] += counts[b]


def maps_of(rng: random.Random, batch: int, heads: int) -> ChannelMaps | None:
    if rng.random() < 0.5:
        return None
    scale, bias = (fresh(rng, batch, heads, 1, D, torch.float32)[:, :, 0] for _ in range(2))
    return ChannelMaps(
        scale.abs() + 0.5,
        bias if rng.random() < 0.5 else None,
        scale.abs() + 1 if rng.random() < 0.5 else None,
    )


@pytest.mark.parametrize("seed", range(24))
def test_any_sequence_of_operations(seed: int) -> None:
    rng = random.Random(seed)
    random.seed(seed)
    batch, heads = rng.randint(1, 3), rng.randint(1, 2)
    dtype = rng.choice([torch.float32, torch.float16, torch.bfloat16])
    store = LayerStore(pool(dtype), batch, heads, SIDES)
    formats = [own.format for own in store.pool.quantized]
    model = Model([[Row() for _ in range(heads)] for _ in range(batch)], [0] * batch, formats)
    demoted, choices = 0, ["append", "append", "retier", "retier", "select", "crop", "copy", "few"]
    for step, what in enumerate(["append", "append", "append", "retier", *rng.choices(choices, k=16)]):
        batch = len(model.rows)
        if what in ("append", "few"):
            t = rng.randint(1, 50 if what == "append" else 6)
            counts = [rng.choice([t, t, rng.randint(0, t)]) for _ in model.rows]
            k, v = (fresh(rng, batch, heads, t, D, dtype) for _ in "kv")
            if rng.random() < 0.2:
                k[0, 0, 0, 0], v[-1, -1, -1, 3] = rng.choice([float("nan"), float("-inf")]), float("inf")
            write(store, model, k, v, counts)
        elif what == "retier":
            maps = maps_of(rng, batch, heads)
            keep = random_keep(rng, model, len(formats), maps, all_stay=step == 3)
            before = store.host_lengths.copy()
            gone = store.compact(keep, np.array(model.seen, np.int32))
            assert gone == int((before - store.host_lengths).sum())
        elif what == "select":
            order = [rng.randrange(batch) for _ in range(rng.randint(1, 4))]
            store.select(torch.tensor(order))
            model.select(order)
        elif what == "crop":
            model.seen = [max(0, seen - rng.choice([3, 3, 3, 40])) for seen in model.seen]
            store.crop(np.array(model.seen, np.int32))
            for seen, rows in zip(model.seen, model.rows, strict=True):
                for row in rows:
                    row.crop(seen)
        else:
            before_copy, store = store, copy.deepcopy(store)
            before_copy.release()
            assert all(own.book.in_use == 0 for own in (before_copy.pool, *before_copy.pool.quantized))
        model.check(store)
        books_are_exact([store])
        demoted += sum(len(row.pages) for rows in model.rows for row in rows)
    assert demoted > 0, "the walk must demote something"
    store.release()
    assert all(own.book.in_use == 0 for own in (store.pool, *store.pool.quantized))
