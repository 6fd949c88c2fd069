"""How many kernels an operator starts on an H200: as many for 65536 tokens as for 512.

Launches are those of the emulator with the device's limits, where kernels are recorded but do not run.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import make_backend
from emulator import settings
from tokencomp.methods import DivPrune, ToDRE
from tokencomp.ops import _check
from torch.utils._python_dispatch import TorchDispatchMode

HALF = torch.bfloat16
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def kcenter(n: int, objective: str) -> Arguments:
    return (torch.zeros(1, n, 64, dtype=HALF), n // 8), {"objective": objective}


def decode(n: int) -> Arguments:
    pages, heads = n // 64, 8
    pool = torch.zeros(heads * pages, 1, 64, 128, dtype=HALF)
    table = torch.arange(heads * pages, dtype=torch.int32).view(1, heads, pages)
    q = torch.zeros(1, 32, 1, 128, dtype=HALF)
    return (q, pool, pool, table, torch.full((1, heads), n, dtype=torch.int32)), {}


def prompt(n: int, *, score: bool = False) -> Arguments:
    q, k = (torch.zeros(1, heads, n, 64, dtype=HALF) for heads in (4, 2))
    return (q, k, torch.zeros(1, 4, n) if score else k), {}


def halves(n: int) -> Arguments:
    x = torch.zeros(1, n, 64, dtype=HALF)
    return (x[:, 0::2], x[:, 1::2]), {}


# operator: launches, sizes, arguments. Eviction and selection of tokens wait for no result in between.
OPERATORS: dict[str, tuple[str, int, tuple[int, ...], Callable[[int], Arguments]]] = {
    "kcenter max_min": ("kcenter_greedy", 1, (512, 4096), lambda n: kcenter(n, "max_min")),
    "kcenter max_sum": ("kcenter_greedy", 1, (512, 4096), lambda n: kcenter(n, "max_sum")),
    "topk_select": ("topk_select", 1, (512, 65536), lambda n: ((torch.zeros(8, n), n // 16), {})),
    "topk_budget": ("topk_budget", 8, (512, 65536), lambda n: ((torch.zeros(1, 8, n), n // 2), {})),
    "cosine_match": ("cosine_match", 4, (512, 4096), halves),
    "energy_score": ("energy_score", 3, (512, 4096), lambda n: ((torch.zeros(1, n, 64), 0.5), {})),
    "attention_lse": ("attention_lse", 2, (512, 4096), lambda n: (prompt(n)[0][:2], {})),
    "column_score": ("column_score", 3, (512, 4096), lambda n: prompt(n, score=True)),
    "flash_prefill": ("flash_prefill", 1, (512, 4096), prompt),
    "paged_decode": ("paged_decode", 1, (512, 65536), decode),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_launches_do_not_grow(name: str, tmp_path: Path) -> None:
    operator, launches, sizes, arguments = OPERATORS[name]
    backend = make_backend("emu")
    found = []
    for size in sizes:
        positional, named = arguments(size)
        file = tmp_path / str(size)
        with settings(TOKENCOMP_EMU_RECORD=str(file), TOKENCOMP_EMU_DRY="1", TOKENCOMP_EMU_DEVICE="h200"):
            backend.run(operator, *positional, **named)
        found.append([json.loads(line)["kernel"] for line in file.read_text().splitlines()])
    assert [len(kernels) for kernels in found] == [launches] * len(sizes), found


class Started(TorchDispatchMode):
    """Names of what would start a kernel: operators whose results are no views and hold values."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and "empty" not in str(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("score", [True, False])
def test_selection_of_visual_tokens_starts_few_kernels(monkeypatch: pytest.MonkeyPatch, score: bool) -> None:
    """Of LLaVA-NeXT's 2880 tokens; values are not looked at, as on a GPU."""
    monkeypatch.setattr(_check, "checked", lambda *tensors: False)
    x = torch.randn(1, 2880, 64, generator=torch.Generator().manual_seed(0))
    cls_score = x[:, :, 0].contiguous()
    with Started() as started:
        kept = ToDRE(keep=0.1).select(x, cls_score=cls_score) if score else DivPrune(keep=0.1).select(x)
    assert kept.shape == (1, 288)
    kernels = ["topk_select"] * score + ["kcenter_greedy", "sort"]
    assert [name.split(".")[1] for name in started.names] == kernels
