"""Random arguments for the fuzz test: drawn so that they are right, then sometimes made wrong in one place.

Everything follows from one seed. Each tensor is a view of a larger storage whose other elements are NaN or
the smallest integer, so that a read or write outside the view shows.
"""

import random
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from tokencomp.ops.page_pools import PagePools
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = (
    *FLOATS,
    torch.float64,
    torch.int32,
    torch.int64,
    torch.int16,
    torch.uint8,
    torch.bool,
    torch.complex64,
)
INTEGERS = (-1, 0, 1, 2, 3, 7, 64, 1000, 2**31 - 1, 2**31, 2**32, 2**63 - 1, -(2**31), -(2**63))
NUMBERS = (-1.0, 0.0, 1e-40, 1e30, float("nan"), float("inf"), float("-inf"))
OUT_OF_MEMORY = ("can't allocate memory", "Storage size calculation overflowed")
LAYOUTS = ("contiguous", "contiguous", "offset", "rows", "channels", "permuted", "expanded")


class Draw:
    """Random choices and tensors, all from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def pick(self, *options: Any) -> Any:
        return self.random.choice(options)

    def maybe(self, chance: float = 0.4) -> bool:
        return self.random.random() < chance

    def size(self, high: int, low: int = 1) -> int:
        """A size in [low, high], the ends and the neighbours of powers of two more often than others."""
        special = [n for n in (low, high, 15, 16, 17, 31, 32, 33, 63, 64, 65) if low <= n <= high]
        return self.pick(*special) if self.maybe(0.5) else self.random.randint(low, high)

    def floats(self, *shape: int, dtype: torch.dtype = torch.float32, layout: str | None = None) -> Tensor:
        return self.lay(torch.randn(shape, generator=self.generator).to(dtype), layout)

    def positive(self, *shape: int) -> Tensor:
        return self.lay(torch.rand(shape, generator=self.generator) + 0.01, None)

    def bools(self, *shape: int) -> Tensor:
        return self.lay(torch.rand(shape, generator=self.generator) < 0.7, None)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """In [low, high], int32 or int64."""
        values = torch.randint(low, high + 1, shape, generator=self.generator)
        return self.lay(values.to(self.pick(torch.int32, torch.int64)), None)

    def order(self, n: int, *shape: int) -> Tensor:
        """Permutations of n, ``[*shape, n]``."""
        return torch.rand(*shape, n, generator=self.generator).argsort(-1)

    def ascending(self, counts: Tensor, limits: Tensor, width: int) -> Tensor:
        """Of each row ``counts`` distinct numbers below ``limits``, ascending, then -1: ``[..., width]``."""
        most = int(limits.max()) if limits.numel() else 0
        weight = torch.rand(*limits.shape, most, generator=self.generator)
        weight.masked_fill_(torch.arange(most) >= limits[..., None], 2)
        chosen = weight.argsort(-1)[..., :width]
        chosen = torch.nn.functional.pad(chosen, (0, width - chosen.shape[-1]))
        there = torch.arange(width) < counts[..., None]
        chosen = chosen.masked_fill(~there, most + 1).sort(-1).values
        return chosen.masked_fill(~there, -1).int()

    def lay(self, t: Tensor, layout: str | None) -> Tensor:
        """The same values (``expanded``: of the first slice) inside a larger storage."""
        layout = self.pick(*LAYOUTS) if layout is None else layout
        if t.dim() < 2:
            layout = "offset" if layout != "contiguous" else layout
        if layout == "expanded":
            return _embed(t[:1], "contiguous").expand(t.shape) if len(t) > 1 else _embed(t, "offset")
        return _embed(t, layout)


def _embed(t: Tensor, layout: str) -> Tensor:
    shape = list(t.shape)
    wide, at = list(shape), [slice(0, n) for n in shape]
    if layout == "rows":
        wide[-2], at[-2] = 2 * shape[-2] + 1, slice(1, 2 * shape[-2], 2)
    elif layout == "channels":
        wide[-1], at[-1] = shape[-1] + 5, slice(3, 3 + shape[-1])
    if layout == "permuted":
        back = [*range(t.dim() - 2, -1, -1), t.dim() - 1]
        return _embed(t.permute(back), "contiguous").permute(back)
    count, guard = torch.Size(wide).numel(), 16
    store = torch.full((count + 2 * guard + 1,), _guard(t.dtype), dtype=t.dtype)
    first = guard + int(layout == "offset")
    view = store[first : first + count].view(wide)[tuple(at)]
    return view.copy_(t)


def _guard(dtype: torch.dtype) -> Any:
    if dtype == torch.bool:
        return True
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min


@dataclass
class Call:
    """A call of the function ``name``: arguments by name, those it may change, and whether it was made wrong.

    ``finite``: whether finite results may be expected; ``also``: names of what it may be refused by.
    """

    name: str
    arguments: dict[str, Any]
    changed: tuple[str, ...] = ()
    wrong: str = ""
    finite: bool = True
    also: tuple[str, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, value in self.arguments.items():
            if isinstance(value, Tensor):
                found[name] = value
            elif isinstance(value, PagePools):
                found |= {f"{name}.pools[{i}]": pool for i, pool in enumerate(value.pools)}
                sides = {f"{name}.{f.name}": getattr(value, f.name) for f in fields(value)}
                found |= {key: side for key, side in sides.items() if isinstance(side, Tensor)}
        return found


def spoil(call: Call, draw: Draw) -> Call:
    """The call with one argument replaced; what it was is in ``wrong``."""
    name = draw.pick(*call.arguments)
    value, what = other(call.arguments[name], draw)
    shown = what if isinstance(value, Tensor | PagePools) else f"{what} {value!r}"
    return replace(call, arguments=call.arguments | {name: value}, wrong=f"{name}: {shown}", finite=False)


def other(value: Any, draw: Draw) -> tuple[Any, str]:
    if draw.maybe(0.08):
        return draw.pick(
            None, "x", 2.5, [1], torch.zeros(2), torch.zeros(()), torch.zeros(3, 2), ()
        ), "another type"
    if isinstance(value, bool):
        return not value, "other"
    if isinstance(value, int):
        return draw.pick(*INTEGERS, value - 1, value + 1, 2 * value), "number"
    if isinstance(value, float):
        return draw.pick(*NUMBERS, -value), "number"
    if isinstance(value, str):
        return draw.pick("", "x", value.upper(), value + "\0", "é"), "text"
    if isinstance(value, Tensor):
        return _other_tensor(value, draw)
    if isinstance(value, PagePools) and value.pools:
        pools = tuple(_other_tensor(pool, draw)[0] for pool in value.pools)
        return draw.pick(
            replace(value, pools=pools), replace(value, pools=()), replace(value, formats=())
        ), "pools"
    return draw.pick(1, torch.zeros(2), torch.full((2, 3), 5), "x"), "another type"


def _other_tensor(t: Tensor, draw: Draw) -> tuple[Tensor, str]:
    ways = [_dtype, _values, _values, _rank, _extent, _empty, _strides, _meta, _attached]
    way = draw.pick(*ways)
    return way(t, draw), way.__name__[1:]


def _dtype(t: Tensor, draw: Draw) -> Tensor:
    return t.to(draw.pick(*DTYPES))


def _values(t: Tensor, draw: Draw) -> Tensor:
    """Numbers that no argument of its kind should hold in a few places."""
    out = t.clone(memory_format=torch.contiguous_format)
    flat = out.view(-1)
    for _ in range(draw.size(3)):
        if len(flat) and t.dtype != torch.bool:
            at = draw.random.randrange(len(flat))
            flat[at] = _bad(t, draw)
    return out


def _bad(t: Tensor, draw: Draw) -> Any:
    if t.dtype.is_floating_point or t.dtype.is_complex:
        return draw.pick(*NUMBERS, -1e30)
    info = torch.iinfo(t.dtype)
    fitting = [n for n in (*INTEGERS, 5, 17, 255, 2**28, 2**32 + 1) if info.min <= n <= info.max]
    return draw.pick(*fitting)


def _rank(t: Tensor, draw: Draw) -> Tensor:
    return t[0] if t.dim() and len(t) and draw.maybe(0.5) else t[None]


def _extent(t: Tensor, draw: Draw) -> Tensor:
    if t.dim() == 0:
        return t[None]
    d = draw.random.randrange(t.dim())
    if t.shape[d] and draw.maybe(0.5):
        return t.narrow(d, 0, t.shape[d] - 1)
    return torch.cat([t, t.narrow(d, 0, min(1, t.shape[d]))], d) if t.shape[d] else t


def _empty(t: Tensor, draw: Draw) -> Tensor:
    return t.narrow(draw.random.randrange(t.dim()), 0, 0) if t.dim() else t


def _strides(t: Tensor, draw: Draw) -> Tensor:
    if t.dim() == 0:
        return t
    if t.dim() > 1 and draw.maybe(0.3):
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    return torch.stack([t, t], -1)[..., 0]


def _meta(t: Tensor, draw: Draw) -> Tensor:
    return t.to("meta")


def _attached(t: Tensor, draw: Draw) -> Tensor:
    return t.detach().clone().requires_grad_() if t.dtype.is_floating_point else t
