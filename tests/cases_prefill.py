"""Test data of the prefill family: a case of attention scores, with values, lists and sinks. The same cases
feed the tests, opcheck, the per-ISA checks and the emulator.
"""

import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from cases import DTYPES
from cases_score import ScoreCase, laid_out
from torch import Tensor

LISTS = ("", "all", "random", "diagonal", "empty")


@dataclass(frozen=True)
class PrefillCase:
    """One problem of prefill attention; ``base`` says who sees whom."""

    base: ScoreCase
    dv: int | None = None  # default: D
    lists: str = ""  # see LISTS; random lists have rows with nothing
    heads: str = "q"  # of the lists: q | kv | one
    columns: str = ""  # q | kv | one: single columns too, for that many heads
    block_q: int = 64
    block_k: int = 64
    sinks: bool = False

    @property
    def work(self) -> int:
        """Multiply-adds, for limits on slow back ends."""
        return 2 * self.base.work

    @property
    def slow(self) -> bool:
        return self.base.slow

    @property
    def name(self) -> str:
        parts = [self.base.name] + [f"v{self.dv}"] * (self.dv is not None)
        if self.lists:
            parts += [f"{self.lists}_{self.heads}_{self.block_q}x{self.block_k}"]
            parts += [f"columns_{self.columns}"] * bool(self.columns)
        return "-".join(parts + ["sinks"] * self.sinks)

    def call(self) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Positional and keyword arguments of the wrapper: the same every time (seeded by the name)."""
        base = self.base
        g = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        c = base.call()
        v = torch.randn(base.B, base.Hkv, base.S, self.dv or base.D, generator=g).to(c.q.dtype)
        options = dict(c.sight)
        if self.sinks:
            options["sinks"] = torch.randn(base.Hq, generator=g)
        if self.lists:
            options |= self._lists(g)
        return (c.q, c.k, laid_out(v, base.layout)), options

    def _lists(self, g: torch.Generator) -> dict[str, Any]:
        base = self.base
        rows, blocks = -(-base.T // self.block_q), -(-base.S // self.block_k)
        count = {"q": base.Hq, "kv": base.Hkv, "one": 1}
        chosen = torch.rand(base.B, count[self.heads], rows, blocks, generator=g) < 0.4
        if self.lists in ("all", "empty"):
            chosen = torch.full_like(chosen, self.lists == "all")
        if self.lists == "diagonal":
            last = ((torch.arange(rows) + 1) * self.block_q - 1 + base.S - base.T).clamp(0, base.S - 1)
            chosen = (torch.arange(blocks) == last[:, None] // self.block_k).expand_as(chosen)
        options = {"block_q": self.block_q, "block_k": self.block_k}
        options["indptr"], options["indices"] = lists_of(chosen)
        options["indices"][::3] |= -(1 << 31)  # the mark of other kernels
        if self.columns:
            wanted = torch.rand(base.B, count[self.columns], rows, base.S, generator=g) < 0.2
            taken = chosen.repeat_interleave(self.block_k, -1)[..., : base.S]
            taken = taken.repeat_interleave(base.Hq // taken.shape[1], 1)
            taken = taken.view(base.B, wanted.shape[1], -1, rows, base.S).any(2)
            options["column_ptr"], options["columns"] = lists_of(wanted & ~taken)
        return options


def lists_of(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Pointers and members of ``[B, H, rows, n]`` bool, with entries behind the last that nobody may use."""
    pointers = torch.zeros(chosen.shape[:3].numel() + 1, dtype=torch.int32)
    pointers[1:] = chosen.sum(-1).flatten().cumsum(0)
    members = torch.cat([chosen.nonzero()[:, 3], torch.full((3,), 1 << 20)])
    return pointers, members.int()


def operator_arguments(case: PrefillCase) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Arguments of the operator below its wrapper."""
    arguments, options = case.call()
    if "key_bias" in options and options["key_bias"].dim() == 2:
        options["key_bias"] = options["key_bias"][:, None].contiguous()
    if options.get("q_position") is not None:
        options["q_position"] = options["q_position"].reshape(-1, case.base.T)
    return arguments, options


def _dense() -> list[PrefillCase]:
    cases = []
    for i, dim in enumerate((64, 96, 128, 192, 256)):
        for j, (hq, hkv) in enumerate(((2, 2), (4, 1), (7, 1), (8, 1))):
            shape = ScoreCase(1 + (i + j) % 2, hq, hkv, 19 + 8 * j, 67 + i, dim, DTYPES[(i + j) % 3])
            cases.append(PrefillCase(shape))
    sizes = [(1, 1), (1, 5), (5, 1), (7, 3), (33, 33), (64, 64), (65, 257), (100, 96), (1, 300), (3, 513)]
    sizes += [(96, 96), (97, 97), (129, 130)]
    cases += [
        PrefillCase(ScoreCase(2, 4, 2, t, s, 32, DTYPES[i % 3]), dv=24 + i if i % 2 else None)
        for i, (t, s) in enumerate(sizes)
    ]
    cases += [PrefillCase(ScoreCase(1, 2, 1, 11, 40, d, t)) for d in (1, 3, 17, 80, 250) for t in DTYPES]
    cases += [
        PrefillCase(ScoreCase(1, 2, 1, 20, 70, 40, t), dv=dv) for dv in (1, 33, 130, 256) for t in DTYPES
    ]
    cases += [PrefillCase(ScoreCase(1, 2, 1, 200, 700, 64, d)) for d in DTYPES]
    cases += [replace(c, base=replace(c.base, causal=False)) for c in cases[::5]]
    cases += [PrefillCase(ScoreCase(1, 8, 2, 256, 1024, 128, d, slow=True)) for d in DTYPES]
    return cases


def _options() -> list[PrefillCase]:
    base = ScoreCase(B=2, Hq=6, Hkv=2, T=41, S=83, D=24)
    cases = []
    for dtype in DTYPES:
        one = replace(base, dtype=dtype)
        changed = [replace(one, bias=b) for b in ("batch", "head", "masked")]
        changed += [replace(one, position=p) for p in ("shared", "batch")]
        changed += [replace(one, lengths=(83, 30)), replace(one, starts=(0, 52)), replace(one, layout="hf")]
        changed += [replace(one, layout="sliced"), replace(one, window=9), replace(one, softcap=2.0)]
        changed += [replace(one, sharp=8.0), replace(one, bad=True), replace(one, bad=True, softcap=3.0)]
        cases += [PrefillCase(c) for c in changed] + [PrefillCase(one, sinks=True)]
    more = [replace(base, causal=False, lengths=(83, 7), starts=(80, 3), position="batch")]
    more += [replace(base, causal=False, lengths=(0, 83)), replace(base, lengths=(60, 20), starts=(60, 10))]
    more += [replace(base, bias="masked", position="batch", softcap=1.5, window=50)]
    more += [replace(base, T=300, S=300, window=3, dtype="bfloat16"), replace(base, T=83, sharp=40.0)]
    more += [replace(base, T=90)]  # the first rows sit before the first key
    cases += [PrefillCase(c, sinks=True) for c in more]
    return cases + [PrefillCase(replace(base, **c)) for c in ({"B": 0}, {"T": 0}, {"S": 0}, {"T": 0, "S": 0})]


def _lists() -> list[PrefillCase]:
    base = ScoreCase(B=2, Hq=4, Hkv=2, T=150, S=277, D=16)
    cases = [PrefillCase(base, lists=name, columns=c) for name in LISTS[1:] for c in ("", "q")]
    for i, heads in enumerate(("q", "kv", "one")):
        for j, columns in enumerate(("", "q", "kv", "one")):
            dtype, causal = DTYPES[(i + j) % 3], j % 2 == 0
            one = replace(base, dtype=dtype, causal=causal)
            cases += [PrefillCase(one, None, "random", heads, columns, 64 << (i + j) % 2, 64 << j // 2)]
    for dtype in DTYPES:
        one = replace(base, dtype=dtype, Hq=2, Hkv=1, D=40)
        cases += [PrefillCase(one, dv=24, lists="random", columns="q", block_q=128, block_k=128, sinks=True)]
        changed = [replace(one, lengths=(277, 100), starts=(20, 0)), replace(one, bias="masked", window=70)]
        changed += [replace(one, position="batch", softcap=2.0), replace(one, layout="sliced", T=277)]
        cases += [PrefillCase(c, lists="random", columns="kv", heads="kv") for c in changed]
    for i, dim in enumerate((64, 96, 128, 192, 256)):
        one = replace(base, B=1, Hq=2, Hkv=1, T=130, S=190, D=dim, dtype=DTYPES[i % 3])
        cases += [PrefillCase(one, None, "random", "q", "q", 128 >> i % 2, 64 << i % 2)]
        cases += [PrefillCase(replace(one, dtype=DTYPES[(i + 1) % 3]), lists="all")]
    sizes = [(1, 64), (64, 64), (65, 129), (128, 128), (1, 1)]
    cases += [PrefillCase(replace(base, T=t, S=s), lists="all", columns="q") for t, s in sizes]
    cases += [PrefillCase(replace(base, S=0), lists="empty"), PrefillCase(replace(base, T=0), lists="empty")]
    return cases


PREFILL_CASES = _dense() + _options() + _lists()
