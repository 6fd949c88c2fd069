"""Row weights and compositions that turn ``column_score`` into published token scores: pure functions of
tensors.

Forgetting, windows, probes and ramps are vectors of row weights; PageRank is a loop of column scores.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tokencomp import ops


def forgetting_weights(
    rows: int, gamma: float, *, device: torch.device | str | None = None, truncate: float = 0.0
) -> Tensor:
    """``[T]`` weights ``gamma ** (T - 1 - t)``: the newest row counts 1 (A2SF, arXiv 2407.20485).

    By ``exp2``, not by repeated products. With ``truncate > 0`` the rows older than ``forgetting_horizon``
    get weight 0, so that they cost nothing: no key loses more than ``truncate``.
    """
    if not 0 < gamma <= 1:
        raise ValueError(f"forgetting_weights: gamma must be in (0, 1], got {gamma}")
    _check_rows("forgetting_weights", rows)
    age = torch.arange(rows - 1, -1, -1, dtype=torch.float64, device=device)
    weight = torch.exp2(age * math.log2(gamma))
    if truncate > 0 and gamma < 1:
        weight = torch.where(age < forgetting_horizon(gamma, truncate), weight, 0.0)
    return weight.float()


def forgetting_horizon(gamma: float, error: float = 1e-6) -> int:
    """The fewest newest rows W such that older ones add at most ``gamma ** W / (1 - gamma) <= error`` to a
    key.
    """
    if not 0 < gamma < 1:
        raise ValueError(f"forgetting_horizon: gamma must be in (0, 1), got {gamma}")
    if not error > 0:
        raise ValueError(f"forgetting_horizon: error must be > 0, got {error}")
    return max(0, math.ceil(math.log(error * (1 - gamma)) / math.log(gamma)))


def window_weights(rows: int, window: int, *, device: torch.device | str | None = None) -> Tensor:
    """``[T]`` weights: 1 for the last ``window`` rows, 0 before (observation window, SnapKV, arXiv
    2404.14469).
    """
    _check_window("window_weights", rows, window)
    return (torch.arange(rows, device=device) >= rows - window).float()


def ramp_weights(rows: int, window: int, *, device: torch.device | str | None = None) -> Tensor:
    """``[T]`` weights rising from 0 to 1 over the last ``window`` rows, 0 before (SpecPC, arXiv
    2506.08373).
    """
    _check_window("ramp_weights", rows, window)
    weight = torch.zeros(rows, device=device)
    weight[rows - window :] = torch.linspace(0, 1, window, device=device)
    return weight


def probe_weights(
    rows: int,
    *,
    recent: float = 0.05,
    random: float = 0.05,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """``[T]`` weights: 1 for the probes, 0 elsewhere (ZipCache, arXiv 2405.14256).

    Probes are the last ``floor(recent * T)`` rows and ``floor(random * T)`` of the others, drawn without
    replacement by a generator of its own, seeded with ``seed``; at least the last row.
    """
    _check_rows("probe_weights", rows)
    for name, share in (("recent", recent), ("random", random)):
        if not 0 <= share <= 1:
            raise ValueError(f"probe_weights: {name} must be in [0, 1], got {share}")
    newest = min(rows, max(1, int(recent * rows)))
    older = rows - newest
    drawn = torch.randperm(older, generator=torch.Generator().manual_seed(seed))[: int(random * rows)]
    weight = torch.zeros(rows)
    weight[older:] = 1
    weight[drawn] = 1
    return weight.to(device)


def count_correction(
    keys: int,
    rows: int,
    *,
    row_weight: Tensor | None = None,
    q_position: Tensor | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """``[B, S]`` weight of the rows that see each key (the number of rows, without weights): divide scores
    by it.

    B is 1 unless an argument is ragged. Early keys are seen by more rows than late ones; the quotient is the
    mean attention a key receives from those that could give it (observed attention; ZipVL, arXiv 2410.08584).
    Arguments as in ``column_score``, ``row_weight`` ``[T]`` or ``[B, T]``. 0 for a key that nobody sees. O(B
    (T + S)).
    """
    sides = [t for t in (row_weight, q_position, lengths, starts) if t is not None]
    device = sides[0].device if sides else torch.device("cpu")
    batch = max(
        [1, *(t.shape[0] for t in (lengths, starts) if t is not None)]
        + [t.shape[0] for t in (row_weight, q_position) if t is not None and t.dim() == 2]
    )
    weight = torch.ones(batch, rows, dtype=torch.float64, device=device)
    if row_weight is not None:
        weight = row_weight.double().expand(batch, rows).clone()
    begin = (
        torch.zeros(batch, 1, dtype=torch.long, device=device) if starts is None else starts[:, None].long()
    )
    end = torch.full((batch, 1), keys, device=device) if lengths is None else lengths[:, None].long()
    key = torch.arange(keys, device=device)
    exists = (key >= begin) & (key < end)
    if not causal and q_position is None:
        return torch.where(exists, weight.sum(1, keepdim=True), 0.0).float()
    position = torch.arange(rows, device=device) + keys - rows if q_position is None else q_position
    position = position.long().expand(batch, rows)
    weight = torch.where((position >= begin) & (position < end), weight, 0.0)
    if not causal:
        return torch.where(exists, weight.sum(1, keepdim=True), 0.0).float()
    order = position.argsort(dim=1, stable=True)
    total = torch.nn.functional.pad(weight.gather(1, order).cumsum(1), (1, 0))
    before = torch.searchsorted(position.gather(1, order), key.expand(batch, keys).contiguous())
    return torch.where(exists, total[:, -1:] - total.gather(1, before), 0.0).float()


def attention_pagerank(
    q: Tensor,
    k: Tensor,
    *,
    iterations: int,
    temperature: float = 1.0,
    damping: float = 0.0,
    start: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    lse: Tensor | None = None,
    key_bias: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """PageRank of the tokens on the attention graph: ``s <- (1 - damping) A^T s + damping / n``, per query
    head.

    A is ``softmax(scale <q, k> / temperature)`` over the keys that exist; each step is one column score with
    row weights s, so A is never formed. Zero-TPrune (arXiv 2305.17328): ``damping=0`` and ``start`` uniform
    or heavy on CLS; then reduce heads, e.g. by the root mean square. AIM (arXiv 2412.03248):
    ``temperature=0.1``, ``iterations=5``, ``causal=True``.

    Args:
        q, k: ``[B, Hq, N, D]`` and ``[B, Hkv, N, D]``, one row a token.
        iterations: number of steps, >= 0.
        temperature: > 0.
        damping: share of every step that is spread evenly, in [0, 1).
        start: ``[B, Hq, N]`` or broadcastable, not negative; default uniform over the tokens that exist.
        lse: ``[B, Hq, N]`` of the rows at this temperature, computed if not given.
        scale, causal, key_bias, lengths: as in ``column_score``; a bias is not divided by the temperature.

    Returns:
        ``[B, Hq, N]`` float32. Without damping the mass of ``start`` on tokens that exist is kept.

    Raises:
        ValueError: a number that is not as above; RuntimeError as in ``column_score``.
    """
    op = "attention_pagerank"
    if iterations < 0:
        raise ValueError(f"{op}: iterations must be >= 0, got {iterations}")
    if not temperature > 0:
        raise ValueError(f"{op}: temperature must be > 0, got {temperature}")
    if not 0 <= damping < 1:
        raise ValueError(f"{op}: damping must be in [0, 1), got {damping}")
    batch, heads, tokens, dim = q.shape
    scale = (dim**-0.5 if scale is None else scale) / temperature
    position = torch.arange(tokens, device=q.device)
    exists = torch.ones(batch, 1, tokens, device=q.device)
    if lengths is not None:
        exists = (position < lengths[:, None]).float()[:, None]
    even = (exists / exists.sum(-1, keepdim=True).clamp(min=1)).expand(batch, heads, tokens)
    if lse is None:
        lse = ops.attention_lse(
            q, k, scale=scale, causal=causal, key_bias=key_bias, lengths=lengths, q_position=position
        )
    s = even if start is None else (start.float() * exists).expand(batch, heads, tokens)

    def vote(weight: Tensor) -> Tensor:
        return ops.column_score(
            q,
            k,
            lse,
            scale=scale,
            row_weight=weight,
            causal=causal,
            key_bias=key_bias,
            lengths=lengths,
            q_position=position,
        )

    return power_steps(vote, s, even, iterations, damping)


def power_steps(
    vote: Callable[[Tensor], Tensor], start: Tensor, even: Tensor, iterations: int, damping: float
) -> Tensor:
    """``iterations`` times ``s <- (1 - damping) vote(s) + damping * even``, from ``s = start``.

    ``vote`` adds up what every token receives where each gives its own s to the tokens it is linked to.
    Holding the matrix of links between steps was measured: no faster at 40 of them, slower below.
    """
    s = start
    for _ in range(iterations):
        s = vote(s)
        s = s if damping == 0 else (1 - damping) * s + damping * even
    return s


def similarity_pagerank(
    x: Tensor, *, iterations: int = 100, damping: float = 0.15, lengths: Tensor | None = None
) -> Tensor:
    """LexRank centrality with the linear kernel: PageRank on row-normalised cosines, in O(N C) a step.

    With ``u = x / |x|`` and ``W = u u^T``, ``p <- (1 - damping) W^T D^-1 p + damping / n`` where ``D = diag(W
    1)``: the products with W are ``u (u^T v)``, so W is never formed (continuous LexRank, JAIR 2004). Cosines
    should be mostly positive; a token whose cosines sum to zero or less links to nobody, and spreads evenly.

    Args:
        x: tokens ``[B, N, C]``; zero rows have similarity 0 to all.
        iterations: number of steps, >= 0.
        damping: in [0, 1].
        lengths: ``[B]`` tokens of each item; the others get 0.

    Returns:
        ``[B, N]`` float32; sums to 1 where an item has tokens.

    Raises:
        ValueError: a number or shape that is not as above.
    """
    op = "similarity_pagerank"
    if x.dim() != 3:
        raise ValueError(f"{op}: x must have shape [B, N, C], got {list(x.shape)}")
    if iterations < 0 or not 0 <= damping <= 1:
        raise ValueError(
            f"{op}: iterations must be >= 0 and damping in [0, 1], got {iterations} and {damping}"
        )
    u = torch.nn.functional.normalize(x.double(), dim=-1)
    exists = torch.ones(x.shape[:2], dtype=torch.float64, device=x.device)
    if lengths is not None:
        exists = (torch.arange(x.shape[1], device=x.device) < lengths[:, None]).double()
    u = u * exists[..., None]

    def similar(v: Tensor) -> Tensor:
        return (u @ (u.transpose(1, 2) @ v[..., None]))[..., 0]

    degree = similar(exists)
    links = degree > 1e-12
    even = exists / exists.sum(1, keepdim=True).clamp(min=1)

    def vote(p: Tensor) -> Tensor:
        given = similar(torch.where(links, p / torch.where(links, degree, 1.0), 0.0))
        return given + torch.where(links, 0.0, p).sum(1, keepdim=True) * even

    return power_steps(vote, even, even, iterations, damping).float()


def head_filter(score: Tensor, *, low: float = 0.01, high: float = 0.7) -> Tensor:
    """``[B, N]`` from ``[B, H, N]``: root mean square over the heads whose variance is in [low, high].

    Variance (biased) of the scores scaled to mean 1; all heads count where none qualifies (Zero-TPrune, arXiv
    2305.17328).
    """
    unit = score / score.mean(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    variance = unit.var(-1, unbiased=False)
    kept = ((variance >= low) & (variance <= high)).to(score.dtype)
    kept = torch.where(kept.sum(1, keepdim=True) > 0, kept, 1.0)[..., None]
    return ((kept * score.square()).sum(1) / kept.sum(1)).sqrt()


def _check_rows(op: str, rows: int) -> None:
    if rows < 0:
        raise ValueError(f"{op}: rows must be >= 0, got {rows}")


def _check_window(op: str, rows: int, window: int) -> None:
    _check_rows(op, rows)
    if not 0 <= window <= rows:
        raise ValueError(f"{op}: window must be in [0, T={rows}], got {window}")
