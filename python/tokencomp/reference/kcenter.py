"""k-center selection in plain PyTorch: the specification of ``tokencomp.ops.kcenter_greedy``.

A token carries a state that folds in one cost per centre (both smaller = closer):

- cost(i, c): cosine ``-<x_i, x_c> / (|x_i| |x_c|)``; dot ``-<x_i, x_c>``; l2 ``|x_i - x_c|^2``;
- max_min: state = min of costs, starts at +inf; max_sum: state = sum of costs (l2: of their roots), starts at
  0;
- distance(state, centres): cosine ``1 + min`` or ``centres + sum``; l2 under max_min ``sqrt(min)``; else the
  state;
- score = state, with weights (once there is a centre) ``weight * distance``. Largest score first, then lowest
  index.

Rows whose float32 sum of squares is below the normal range are zero rows: similarity 0 to all under cosine.
Invalid rows (float32 sum of squares not finite) are picked only once no other is left, lowest index first,
and are no centres; a seed that names one is skipped like one that is out of range or repeated.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

INF = float("inf")


def _root(square: Tensor) -> Tensor:
    """Correctly rounded, as IEEE 754 asks; torch's own float32 root can be an ulp off."""
    return square.double().sqrt().to(square.dtype)


@dataclass(frozen=True)
class _Item:
    """The tokens of one batch item and the arithmetic on them."""

    x: Tensor  # [n, C], invalid rows zeroed
    inverse: Tensor  # [n], 1 / norm, 0 for zero rows
    valid: Tensor  # [n] bool
    weight: Tensor | None  # [n]
    objective: str
    metric: str

    def cost(self, c: int) -> Tensor:
        if self.metric == "l2":
            return (self.x - self.x[c]).square().sum(-1)
        product = self.x @ self.x[c]
        return -product if self.metric == "dot" else -(product * (self.inverse * self.inverse[c]))

    def start(self) -> Tensor:
        return self.x.new_full((len(self.x),), INF if self.objective == "max_min" else 0.0)

    def fold(self, state: Tensor, cost: Tensor) -> Tensor:
        if self.objective == "max_min":
            return torch.minimum(state, cost)
        return state + (_root(cost) if self.metric == "l2" else cost)

    def distance(self, state: Tensor, centres: int) -> Tensor:
        if self.metric == "cosine":
            return (1 if self.objective == "max_min" else centres) + state
        return _root(state) if self.metric == "l2" and self.objective == "max_min" else state

    def score(self, state: Tensor, centres: int) -> Tensor:
        return self.masked(
            self._weighed(state, centres) if self.weight is not None and centres > 0 else state
        )

    def value(self, state: Tensor, centres: int) -> Tensor:
        return self.masked(self._weighed(state, centres) if centres > 0 else self.distance(state, centres))

    def _weighed(self, state: Tensor, centres: int) -> Tensor:
        distance = self.distance(state, centres)
        return distance if self.weight is None else self.weight * distance

    def masked(self, score: Tensor) -> Tensor:
        return torch.where(self.valid & ~score.isnan(), score, -INF)

    def first_score(self, first: str) -> Tensor:
        """How the first pick is ranked where no seed is given."""
        if first == "index0":
            return self.score(self.start(), 0)
        if first == "centroid":
            unit = self.x * self.inverse[:, None] if self.metric == "cosine" else self.x
            mean = unit[self.valid].mean(0)
            return self.masked(-(unit - mean).square().sum(-1) if self.metric == "l2" else unit @ mean)
        near = replace(self, objective="max_min")
        nearest = near.start()
        others = torch.arange(len(self.x), device=self.x.device)
        for c in self.valid.nonzero()[:, 0].tolist():
            nearest = torch.where(others != c, torch.minimum(nearest, self.cost(c)), nearest)
        return near.score(nearest, 1)


@dataclass(frozen=True)
class _Step:
    score: Tensor  # [n] of every token, taken ones included
    value: Tensor  # [n]
    free: Tensor  # [n] bool, not picked before
    centres: int  # valid centres so far
    wanted: int  # the specified pick, -1 where no token is left
    seeded: bool  # the pick is a given seed


def _best(score: Tensor, free: Tensor, valid: Tensor) -> int:
    open_to = free & valid if bool((free & valid).any()) else free
    if not bool(open_to.any()):
        return -1
    return int((open_to & (score == score[open_to].max())).nonzero()[0])


def _walk(
    item: _Item, k: int, first: str, seed: list[int], picks: list[int] | None = None
) -> Iterator[_Step]:
    """The k steps of the traversal: along ``picks`` where they are given, else by its own choice."""
    state, centres = item.start(), 0
    free = torch.ones_like(item.valid)
    for j in range(k):
        score = item.first_score(first) if j == 0 and not seed else item.score(state, centres)
        seeded = j < len(seed) and 0 <= seed[j] < len(free) and bool((free & item.valid)[seed[j]])
        wanted = seed[j] if seeded else _best(score, free, item.valid)
        yield _Step(score, item.value(state, centres), free.clone(), centres, wanted, seeded)
        pick = wanted if picks is None else picks[j]
        if 0 <= pick < len(free) and bool(free[pick]):
            free[pick] = False
            if bool(item.valid[pick]):
                state, centres = item.fold(state, item.cost(pick)), centres + 1


def _items(
    x: Tensor, weight: Tensor | None, lengths: Tensor | None, objective: str, metric: str, dtype: torch.dtype
) -> Iterator[_Item]:
    for b in range(x.shape[0]):
        n = x.shape[1] if lengths is None else min(max(int(lengths[b]), 0), x.shape[1])
        square = x[b, :n].float().square().sum(-1)
        valid = torch.isfinite(square)
        rows = torch.where(valid[:, None], x[b, :n].to(dtype), 0)
        norm = _root(rows.square().sum(-1))
        inverse = torch.where(valid & (square >= torch.finfo(torch.float32).tiny), 1 / norm, 0)
        yield _Item(
            rows, inverse, valid, None if weight is None else weight[b, :n].to(dtype), objective, metric
        )


def kcenter_greedy(
    x: Tensor,
    k: int,
    *,
    objective: str = "max_min",
    metric: str = "cosine",
    first: str = "largest_nn",
    seed: Tensor | None = None,
    weight: Tensor | None = None,
    lengths: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """``tokencomp.ops.kcenter_greedy`` with the same arguments, computed in ``dtype``.

    Returns:
        ``index`` ``[B, k]`` int32 and ``value`` ``[B, k]`` of ``dtype``. Arguments are not checked: seeds
        that cannot be taken are skipped, lengths are clamped.
    """
    index = torch.full((x.shape[0], k), -1, dtype=torch.int32, device=x.device)
    value = torch.full((x.shape[0], k), -INF, dtype=dtype, device=x.device)
    for b, item in enumerate(_items(x, weight, lengths, objective, metric, dtype)):
        seeds = [] if seed is None else seed[b].tolist()
        for j, step in enumerate(_walk(item, k, first, seeds)):
            if step.wanted >= 0:
                index[b, j], value[b, j] = step.wanted, step.value[step.wanted]
    return index, value


@dataclass(frozen=True)
class Replay:
    """What the specification says about given picks, each judged after the picks before it.

    ``gap`` ``[B, k]``: best available score minus the score of the pick; 0 where the pick is the specified
    one and +inf where it may not be made at all (taken, out of range, not the seed, not the lowest index of
    an exact tie by definition). ``value`` ``[B, k]``: the value of the pick. ``score`` and ``values`` ``[B,
    k, N]``: the same of every token before each pick, NaN for taken tokens and padding.
    """

    gap: Tensor
    value: Tensor
    score: Tensor
    values: Tensor


def replay(
    x: Tensor,
    index: Tensor,
    *,
    objective: str = "max_min",
    metric: str = "cosine",
    first: str = "largest_nn",
    seed: Tensor | None = None,
    weight: Tensor | None = None,
    lengths: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Replay:
    """Judge the picks ``index`` ``[B, k]`` of any implementation; the other arguments are the operator's.

    Two implementations that round differently may part ways at a near-tie and then pick different tokens for
    good reasons. A replay scores every pick against the history it was made in, so that each can be held to a
    tolerance.
    """
    batch, k = index.shape
    out = Replay(
        gap=torch.full((batch, k), INF, dtype=dtype),
        value=torch.full((batch, k), -INF, dtype=dtype),
        score=torch.full((batch, k, x.shape[1]), float("nan"), dtype=dtype),
        values=torch.full((batch, k, x.shape[1]), float("nan"), dtype=dtype),
    )
    for b, item in enumerate(_items(x, weight, lengths, objective, metric, dtype)):
        seeds = [] if seed is None else seed[b].tolist()
        picks = index[b].tolist()
        for j, step in enumerate(_walk(item, k, first, seeds, picks)):
            free = step.free
            out.score[b, j, : len(free)] = torch.where(free, step.score, float("nan"))
            out.values[b, j, : len(free)] = torch.where(free, step.value, float("nan"))
            out.gap[b, j] = _gap(item, step, picks[j], seeds or j > 0 or first == "index0")
            if 0 <= picks[j] < len(free):
                out.value[b, j] = step.value[picks[j]]
    return out


def _gap(item: _Item, step: _Step, pick: int, by_state: object) -> float:
    if pick == step.wanted:
        return 0.0
    if not 0 <= pick < len(step.free) or not bool(step.free[pick]):
        return INF
    if step.seeded or not bool(item.valid[pick]) or (by_state and step.centres == 0):
        return INF
    best, own = float(step.score[step.wanted]), float(step.score[pick])
    return 0.0 if best == own else best - own
