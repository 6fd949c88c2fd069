"""Cases of matches and energies as data; those of maps and merges are in ``cases_merge_map``."""

import zlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from cases import DTYPES, lattice
from torch import Tensor

KINDS = ("elu", "paper", "gauss")
LAYOUTS = ("contiguous", "halves", "channels", "batch")


def generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def name_of(case: Any) -> str:
    """The fields that are not at their defaults."""
    parts = []
    for key, spec in case.__dataclass_fields__.items():
        value = getattr(case, key)
        if value != spec.default and spec.repr:
            parts.append(f"{key}{value}".replace(" ", ""))
    return "-".join(parts)


def tokens(shape: tuple[int, int, int], data: str, g: torch.Generator) -> Tensor:
    """Gaussian tokens, tokens in clusters, or a lattice on which float32 cosines are exact."""
    if data == "lattice":
        return lattice(shape, "cosine", g)
    x = torch.randn(shape, generator=g)
    if data == "clusters":
        centres = torch.randn(shape[0], max(2, shape[1] // 8), shape[2], generator=g)
        which = torch.randint(0, centres.shape[1], shape[:2], generator=g)
        x = centres.gather(1, which[..., None].expand(shape)) + 0.1 * x
    return x


def spoil(x: Tensor, zero: tuple[int, ...], bad: tuple[int, ...]) -> Tensor:
    """Rows of zeros, and rows with NaN, infinity and overflow in turn."""
    for row in zero:
        x[:, row % x.shape[1]] = 0
    for i, row in enumerate(bad):
        huge = 3e38 if x.dtype != torch.float16 else float("inf")
        x[:, row % x.shape[1], (7 * i) % x.shape[2]] = (float("nan"), float("inf"), huge)[i % 3]
    return x


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values behind other strides; what lies between them is NaN."""
    batch, n, c = x.shape
    if layout == "contiguous":
        return x
    if layout == "halves":
        view = x.new_full((batch, 2 * n + 1, c), float("nan"))[:, 1::2]
    elif layout == "channels":
        view = x.new_full((batch, n, c + 5), float("nan"))[:, :, 3 : 3 + c]
    else:
        view = x.new_full((n, batch, c), float("nan")).transpose(0, 1)
    view.copy_(x)
    return view


@dataclass(frozen=True)
class Call:
    """Arguments of one operator."""

    arguments: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MatchCase:
    """One call of ``cosine_match``."""

    B: int
    Na: int
    Nb: int
    C: int
    dtype: str = "float32"
    Ka: int = 0  # > 0: rows by index, with holes
    Kb: int = 0
    C2: int = 0
    alpha: float = 1.0
    weighted: bool = False
    band: int = -1
    protect: tuple[int, int] = (0, 0)
    masked: bool = False
    min_similarity: float = float("-inf")
    top: int = 1
    itself: bool = True  # False: no token matches the one of its own number, and b is a
    data: str = "gauss"
    layout: str = "contiguous"
    zero: tuple[int, ...] = ()
    bad: tuple[int, ...] = ()
    slow: bool = False

    @property
    def name(self) -> str:
        return name_of(self)

    @property
    def work(self) -> int:
        rows, columns = self.Ka or self.Na, self.Kb or self.Nb
        return self.B * max(rows, 64) * max(columns, 64) * (self.C + self.C2)

    def inputs(self) -> Call:
        g = generator(self.name)
        dtype = getattr(torch, self.dtype)
        a, b = (
            spoil(tokens((self.B, n, self.C), self.data, g).to(dtype), self.zero, self.bad)
            for n in (self.Na, self.Nb)
        )
        b = b if self.itself else a
        options: dict[str, Any] = {"top": self.top, "band": self.band, "min_similarity": self.min_similarity}
        options |= {"protect_a": self.protect[0], "protect_b": self.protect[1]}
        if not self.itself:
            options["exclude_self"] = True
        if self.Ka:
            options["a_index"] = torch.randint(-1, self.Na, (self.B, self.Ka), generator=g, dtype=torch.int32)
        if self.Kb:
            options["b_index"] = torch.randint(-1, self.Nb, (self.B, self.Kb), generator=g, dtype=torch.int32)
        if self.C2:
            second = [tokens((self.B, n, self.C2), self.data, g).to(dtype) for n in (self.Na, self.Nb)]
            options |= {"a2": laid_out(second[0], self.layout), "b2": second[1], "alpha": self.alpha}
        for side, places in (("a", self.Ka or self.Na), ("b", self.Kb or self.Nb)):
            if self.weighted:
                options[f"{side}_weight"] = torch.randint(-2, 9, (self.B, places), generator=g).float() / 4
            if self.masked:
                options[f"mask_{side}"] = torch.rand(self.B, places, generator=g) < 0.7
        return Call((laid_out(a, self.layout), laid_out(b, self.layout)), options)


def _match_cases() -> list[MatchCase]:
    base = MatchCase(B=2, Na=67, Nb=53, C=37)
    shapes = [(1, 1, 1, 1), (3, 1, 64, 1), (1, 2, 1, 3), (2, 31, 33, 7), (1, 64, 64, 64), (1, 65, 129, 16)]
    shapes += [
        (5, 99, 98, 64),
        (1, 127, 257, 96),
        (2, 16, 17, 515),
        (1, 300, 20, 129),
        (2, 0, 5, 4),
        (2, 5, 0, 4),
    ]
    shapes += [(0, 5, 3, 4), (1, 40, 35, 1025)]
    cases = [MatchCase(*shape, dtype=d) for shape in shapes for d in DTYPES]
    for d in DTYPES:
        cases += [replace(base, dtype=d, layout=layout) for layout in LAYOUTS[1:]]
        cases += [replace(base, dtype=d, top=top) for top in (2, 7, 32)]
        cases += [replace(base, dtype=d, C2=11, alpha=alpha) for alpha in (0.0, 0.3, 1.0, 1.5)]
        cases += [
            replace(base, dtype=d, zero=(0, 5), bad=(3, 10, 40)),
            replace(base, dtype=d, data="clusters"),
        ]
        cases += [replace(base, dtype=d, Ka=45, Kb=91, top=top, layout="halves") for top in (1, 3)]
    cases += [replace(base, weighted=True, top=top) for top in (1, 5)]
    cases += [replace(base, weighted=True, C2=9, alpha=0.5, Ka=33, masked=True, dtype="bfloat16")]
    cases += [replace(base, band=band, top=top) for band in (0, 1, 9, 1000) for top in (1, 4)]
    cases += [replace(base, band=12, Ka=40, Kb=80, dtype="float16"), MatchCase(1, 300, 300, 16, band=3)]
    cases += [
        replace(base, protect=p, top=top)
        for p in ((1, 0), (3, 2), (67, 0), (0, 53), (1000, 1000))
        for top in (1, 3)
    ]
    cases += [replace(base, masked=True, top=top, C=8) for top in (1, 6)]
    cases += [replace(base, min_similarity=s, top=top) for s in (0.2, 5.0, -5.0) for top in (1, 3)]
    cases += [
        replace(base, Nb=3, top=8),
        replace(base, zero=tuple(range(67))),
        replace(base, bad=tuple(range(67)), C=9),
    ]
    alone = replace(base, Nb=67, itself=False)
    cases += [replace(alone, dtype=d, top=top) for d in DTYPES for top in (1, 32)]
    cases += [replace(alone, Ka=40, Kb=90, top=top, masked=True) for top in (1, 3)]
    cases += [replace(alone, band=9, top=4), replace(alone, C2=5, alpha=0.4)]
    cases += [MatchCase(2, 1, 1, 8, itself=False)]
    cases += [MatchCase(1, 2048, 2048, 64, dtype=d, slow=True) for d in DTYPES]
    cases += [MatchCase(1, 8192, 8192, 4), MatchCase(2, 288, 289, 1024, dtype="bfloat16", slow=True)]
    return cases


def _match_exact() -> list[MatchCase]:
    """Ties everywhere; every back end must equal the reference bit for bit."""
    base = MatchCase(B=2, Na=70, Nb=131, C=16, data="lattice")
    cases = [replace(base, dtype=d, C=c, top=top) for d in DTYPES for c in (1, 4, 64) for top in (1, 5, 32)]
    cases += [replace(base, weighted=True, top=top, dtype=d) for top in (1, 3) for d in DTYPES]
    cases += [replace(base, C2=64, alpha=0.25, top=top, dtype=d) for top in (1, 3) for d in DTYPES]
    cases += [replace(base, Ka=33, Kb=77, band=20, top=top, masked=True) for top in (1, 9)]
    cases += [replace(base, Nb=70, itself=False, top=top, Ka=ka) for top in (1, 5, 32) for ka in (0, 50)]
    cases += [replace(base, protect=(3, 2), min_similarity=0.5, dtype="bfloat16")]
    cases += [replace(base, zero=(0, 5, 69), bad=(1, 9), top=top, layout="halves") for top in (1, 4)]
    cases += [
        replace(base, Nb=9, top=16),
        replace(base, C=256, Na=40, dtype="float16"),
        replace(base, C=1024, dtype="bfloat16"),
    ]
    return cases


@dataclass(frozen=True)
class EnergyCase:
    """One call of ``energy_score``."""

    B: int
    N: int
    C: int
    dtype: str = "float32"
    kind: str = "elu"
    margin: float = 0.5
    alpha: float = 1.0
    prefix: int = 0
    masked: bool = False
    data: str = "gauss"
    layout: str = "contiguous"
    zero: tuple[int, ...] = ()
    bad: tuple[int, ...] = ()
    slow: bool = False

    @property
    def name(self) -> str:
        return name_of(self)

    @property
    def work(self) -> int:
        return self.B * max(64, self.N) ** 2 * self.C

    def inputs(self) -> Call:
        g = generator(self.name)
        x = spoil(
            tokens((self.B, self.N, self.C), self.data, g).to(getattr(torch, self.dtype)), self.zero, self.bad
        )
        options: dict[str, Any] = {"kind": self.kind, "alpha": self.alpha, "prefix": self.prefix}
        if self.masked:
            options["mask"] = torch.rand(self.B, self.N, generator=g) < 0.6
        return Call((laid_out(x, self.layout), self.margin), options)


def _energy_cases() -> list[EnergyCase]:
    base = EnergyCase(B=2, N=67, C=24)
    cases = [replace(base, dtype=d, kind=k, data="clusters") for d in DTYPES for k in KINDS]
    shapes = [
        (1, 1, 1),
        (2, 0, 3),
        (0, 4, 3),
        (3, 2, 64),
        (1, 64, 64),
        (2, 197, 64),
        (1, 33, 1025),
        (1, 401, 5),
    ]
    cases += [EnergyCase(*shape, kind=KINDS[i % 3]) for i, shape in enumerate(shapes)]
    cases += [
        replace(base, prefix=p, masked=m, kind=k)
        for p in (0, 1, 5, 67, 90)
        for m in (False, True)
        for k in KINDS[:2]
    ]
    cases += [
        replace(base, margin=m, alpha=a, kind=k)
        for m, a in ((-0.2, 1.0), (0.9, 0.1), (0.99, 2.0))
        for k in KINDS
    ]
    cases += [replace(base, zero=(0, 4), bad=(2, 9, 33), kind=k, dtype=d) for k in KINDS for d in DTYPES]
    cases += [replace(base, layout=layout, dtype="bfloat16") for layout in LAYOUTS[1:]]
    return [*cases, EnergyCase(1, 2000, 16), EnergyCase(1, 4096, 64, dtype="bfloat16", slow=True)]


MATCH_CASES, MATCH_EXACT, ENERGY_CASES = _match_cases(), _match_exact(), _energy_cases()
