"""Demotion: slots of working pages become whole quantized pages, byte for byte those of the dense values."""

import re
from typing import Any

import pytest
import torch
from backends import Backend
from cases_kvquant import RETIER_CASES, PageCase, RetierCase
from tiers_model import read, same_page
from tokencomp import ops, reference
from tokencomp.ops.kvquant_pages import page_entry
from torch import Tensor

by_name = {"ids": lambda case: case.name}


def retiered(backend: Backend, case: RetierCase) -> Tensor:
    tensors, maps = case.inputs()
    with backend.active():
        here = [t.to(backend.device) for t in tensors]
        ops.kv_retier_(*here, case.case.format, **{name: m.to(backend.device) for name, m in maps.items()})
    for got, was in zip(here[1:], tensors[1:], strict=True):
        assert torch.equal(got.cpu(), was)
    return here[0].cpu()


@pytest.mark.parametrize("case", RETIER_CASES, **by_name)
def test_pages_are_those_of_the_dense_rows(backend: Backend, case: RetierCase) -> None:
    pool = retiered(backend, case)
    (want, *tensors), maps = case.case.inputs()
    torch.ops.tokencomp.kv_page_write_(want, *tensors, **case.case.format.options(), **maps)
    assert torch.equal(pool, want)


@pytest.mark.parametrize("case", [c for c in RETIER_CASES if not c.case.holes][::4], **by_name)
def test_pages_are_those_of_the_specification(backend: Backend, case: RetierCase) -> None:
    pool = retiered(backend, case)
    (before, k, v, sequence, index, pages), maps = case.case.inputs()
    page = case.case.format
    for row, slots, number in zip(sequence.tolist(), index.long(), pages.tolist(), strict=True):
        own = {name: m.flatten(0, 1)[row] for name, m in maps.items()}
        rows = (x.flatten(0, 1)[row][slots] for x in (k, v))
        written = reference.kv_page(*rows, page, **own)
        same_page(pool[number], written, page)
        back = ops.kv_page_read(
            pool, torch.tensor([number]), page, sequence=torch.tensor([row]), **maps
        )  # on the CPU, both layouts
        for got, half in zip(back, "kv", strict=True):
            assert torch.equal(got[0], read(written, page, half, own))
    others = [i for i in range(len(pool)) if i not in pages.tolist()]
    assert torch.equal(pool[others], before[others])


def test_slots_without_a_working_page_are_empty(backend: Backend) -> None:
    """Unchecked: places without a page or with a quantized one, rows and pages that are not there."""
    case = RetierCase(PageCase("int4", "int4", n=2))
    tensors, _ = case.inputs()
    pool, k, v, table, sequence, slots, pages = tensors
    sequence[:] = torch.tensor([0, 4])
    table[0, 0, :], table[1, 1, 1:] = -1, page_entry(3, 1)
    options = case.case.format.options()
    want, before = pool.clone(), pool.clone()
    holes = slots.clone()
    holes[0], holes[1][slots[1] >= case.case.P] = -1, -1
    torch.ops.tokencomp.kv_retier_(want, k, v, table.clamp(min=0) % 8, sequence, holes, pages, **options)
    with backend.active():
        here = [t.to(backend.device) for t in tensors]
        kernel = getattr(torch.ops, backend.namespace).kv_retier_
        kernel(*here, **options)
        assert torch.equal(here[0].cpu()[pages[0]], want[pages[0]])
        fresh = before.to(backend.device)
        kernel(fresh, *here[1:4], here[4] + 50, here[5], here[6], **options)
        kernel(fresh, *here[1:6], here[6] + 50, **options)
    assert torch.equal(fresh.cpu(), before)


CASE = RetierCase(PageCase("int4", "int4", P=16, n=2))
TENSORS = CASE.inputs()[0]
NAMES = ("pool", "k_pages", "v_pages", "block_table", "sequence", "slots", "pages")
POOL, K, V, TABLE, SEQUENCE, SLOTS, PAGES = TENSORS
SHAPE = list(K.shape)
ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"pool": POOL[:, :-16].contiguous()}, "pool must have pages of 1344 bytes for this page type, got 1328"),
    ({"k_pages": K[0]}, "k_pages must have shape [N, Hx, P, D], got [1, 16, 64]"),
    ({"k_pages": torch.cat([K] * 3, 2)}, "k_pages must have pages of 16, 32 or 64 slots, got 48"),
    (
        {"k_pages": K.double(), "v_pages": V.double()},
        "k_pages must be float32, float16 or bfloat16, got Double",
    ),
    (
        {"v_pages": V[:-1]},
        f"v_pages must have the shape of k_pages, {SHAPE}, got {[SHAPE[0] - 1, *SHAPE[1:]]}",
    ),
    ({"v_pages": V.half()}, "v_pages must have the dtype and device of k_pages, got another"),
    ({"block_table": TABLE[0]}, "block_table must have shape [B, Hkv, places], got [3, 4]"),
    ({"block_table": TABLE.float()}, "block_table must be Int, got Float"),
    ({"sequence": SEQUENCE[:1]}, "sequence must have shape [2], got [1]"),
    ({"pages": PAGES[:, None]}, "pages must have shape [n], got [2, 1]"),
    ({"k_scale": torch.ones(2, 3, 5)}, "k_scale must have shape [2, 3, 64], got [2, 3, 5]"),
]


def call(**changed: Any) -> None:
    given = dict(zip(NAMES, TENSORS, strict=True)) | {"pool": POOL.clone()} | changed
    ops.kv_retier_(**{"page": CASE.case.format, **given})


@pytest.mark.parametrize(("changed", "message"), ERRORS)
def test_message(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(f"kv_retier_: {message}")):
        call(**changed)


def test_values() -> None:
    wide = RetierCase(PageCase("int4", "int4", P=32, n=2)).case.format
    far = TABLE.clone()
    far[0, 0], far[1, 2] = -1, page_entry(2, 5)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"sequence": SEQUENCE + 6}, "sequence must be in [0, B * Hkv=6), got"),
        ({"slots": SLOTS + 64}, "slots must be in [-1, places * P=64), got"),
        ({"pages": PAGES - 9}, "pages must be in [0, number of pages=6), got"),
        ({"pages": PAGES * 0}, "pages must be distinct, got 0 twice"),
        ({"page": wide}, "slots must have shape [n, P=32], got [2, 16]"),
        (
            {"block_table": far, "sequence": torch.tensor([0, 1])},
            f"slots must be in working pages, [0, N={SHAPE[0]}) of type 0, got -1",
        ),
        (
            {"block_table": far, "sequence": torch.tensor([1, 5])},
            f"slots must be in working pages, [0, N={SHAPE[0]}) of type 0, got page 5 of type 2",
        ),
    ]
    for changed, message in refused:
        with pytest.raises(ValueError, match=re.escape(f"kv_retier_: {message}")):
            call(**changed)
