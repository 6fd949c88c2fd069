"""GTP-ViT: drop tokens, but pass their features on to neighbours in a graph first (arXiv 2311.03035)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from tokencomp import ops, ragged
from tokencomp.methods import attention, base, pruning
from tokencomp.methods.layers import LayerView, Reduced

Score = Literal[
    "mixed_max", "mixed_mean", "sum_max", "sum_mean", "column_max", "column_mean", "diagonal_max",
    "diagonal_mean", "cls_max", "cls_mean", "cosine", "random",
]  # fmt: skip
SCORES: tuple[str, ...] = Score.__args__  # type: ignore[attr-defined]
GRAPHS, PASSES = ("mixed", "spatial", "semantic"), ("graph", "none", "mean")
_STATE = "gtp"


@base.register("gtp", paper="2311.03035", stage="encoder layers, between attention and MLP")
@dataclass(frozen=True)
class GTP:
    """Drops P image tokens a layer; kept ones receive their neighbours' features over a graph made once.

    Graph of the image tokens that enter the first layer: the 8 neighbours on the grid and the M most similar
    other tokens (cosine; a token never neighbours itself), directed, ``W = D^-1/2 G D^-1/2`` with D the
    number of neighbours of each row. Kept tokens take ``x_i += alpha * sum_j W_ij x_j`` over the dropped j,
    sizes likewise; a kept token without dropped neighbours stays as it is, and a dropped one without kept
    neighbours is lost. W is not normalised again.

    Score (``mixed_max``): ``max_h A_ii * max_h sum_q A_qi``, the maxima over heads apart, q over all tokens.
    Others: ``sum`` adds instead of multiplying, ``mean`` over heads, ``column`` and ``diagonal`` one factor
    alone, ``cls`` the first token's row, ``cosine`` the negative sum of cosines between a token's head-mean
    attention row and all rows (the head mean is our reading), ``random``.

    Differences: kept tokens stay in their order (the paper's code sorts them by score); M neighbours also
    without CLS (the code then finds M + 1); ``none`` and ``mean`` keep track of sizes; the mean of ``mean``
    is weighted by size. Not covered: the sparse attention matrix also replaces the values' weights in the
    paper; here ``theta`` below 1 only enters the score, which then needs the whole matrix in memory.
    """

    drop: int | Sequence[int] = field(
        default=8, metadata={"help": "tokens dropped a layer; a list is indexed by layer, then none"}
    )
    neighbours: int = field(default=8, metadata={"help": "similar tokens each token is linked to (M)"})
    graph: Literal["mixed", "spatial", "semantic"] = field(
        default="mixed", metadata={"help": "links: mixed (grid or similar), spatial or semantic"}
    )
    score: Score = field(default="mixed_max", metadata={"help": f"what is kept: {', '.join(SCORES)}"})
    passing: Literal["graph", "none", "mean"] = field(
        default="graph",
        metadata={"help": "dropped features: graph (to neighbours), none, mean (one token of their mean)"},
    )
    alpha: float = field(default=0.1, metadata={"help": "share of a dropped token's features passed on"})
    theta: float = field(
        default=1.0, metadata={"help": "share of attention entries the score sees, the largest of each head"}
    )
    proportional: bool = field(
        default=True, metadata={"help": "later layers add log size to their attention logits"}
    )
    seed: int = field(default=0, metadata={"help": "of score random"})

    def __post_init__(self) -> None:
        for name, known in (("graph", GRAPHS), ("score", SCORES), ("passing", PASSES)):
            if getattr(self, name) not in known:
                raise ValueError(f"GTP: {name} must be one of {known}, got {getattr(self, name)!r}")
        if min(self.drop if isinstance(self.drop, Sequence) else (self.drop,), default=0) < 0:
            raise ValueError(f"GTP: drop must not be negative, got {self.drop!r}")
        if not 1 <= self.neighbours <= 32:
            raise ValueError(f"GTP: neighbours must be in [1, 32], got {self.neighbours!r}")
        if not 0.0 < self.theta <= 1.0:
            raise ValueError(f"GTP: theta must be in (0, 1], got {self.theta!r}")

    def begin(self, x: Tensor, prefix: int, grid: tuple[int, int] | None, state: dict[str, Any]) -> None:
        """Builds the graph; see ``LayerMethod``. Raises ValueError where a spatial graph has no grid."""
        if self.passing != "graph":
            return
        links = []
        if self.graph != "semantic":
            if grid is None or grid[0] * grid[1] != x.shape[1] - prefix:
                raise ValueError(f"GTP: a {self.graph} graph needs a grid of all image tokens, got {grid}")
            links.append(spatial_links(*grid, x.device).expand(x.shape[0], -1, -1))
        if self.graph != "spatial":
            links.append(semantic_links(x[:, prefix:], self.neighbours))
        state[_STATE] = link_weights(torch.cat(links, dim=2))

    def reduce(self, view: LayerView) -> Reduced | None:
        """Drops the layer's tokens and passes their features on; see ``LayerMethod``.

        Raises ValueError where the graph is needed and ``begin`` did not run in this forward pass.
        """
        image = view.tokens - view.prefix
        dropped = min(pruning.at(self.drop, view.layer, 0), image - 1)
        if dropped <= 0:
            return None
        kept = pruning.top(self.rank(view), image - dropped, prefix=view.prefix, mask=view.mask)
        rest = pruning.drop(view, kept)
        if self.passing == "none":
            return rest
        out = self._pass_on(view, kept) if self.passing == "graph" else append_mean(view, kept)
        return out if self.proportional or self.passing == "mean" else replace(out, size=rest.size)

    def _pass_on(self, view: LayerView, kept: Tensor) -> Reduced:
        if _STATE not in view.state:
            raise ValueError("GTP: begin must run before the first layer, got no graph in the state")
        lost = ragged.compact_rows(~ragged.kept_mask(kept, view.tokens), view.tokens - kept.shape[1])[0]
        links, weight = view.state[_STATE]
        between = edges(links, weight, view.source[:, view.prefix :], kept, lost, view.mask)
        return propagate(view, kept, lost, between, self.alpha)

    def rank(self, view: LayerView) -> Tensor:
        """``[B, N]`` float32, the score of every token of the layer (that of prefix tokens has no meaning).

        Raises ValueError where a ``cls`` score is asked for and there is no prefix token.
        """
        if self.score == "random":
            generator = torch.Generator().manual_seed(self.seed * 1000 + view.layer)
            return torch.rand(*view.x.shape[:2], generator=generator).to(view.x.device)
        if self.score.startswith("cls") and view.prefix == 0:
            raise ValueError(f"GTP: score {self.score} needs a CLS token, got prefix 0")
        graph = attention.of(view, proportional=self.proportional)
        if self.theta < 1.0 or self.score == "cosine":
            return matrix_score(sparse(graph.probabilities(), self.theta, view.mask), self.score)
        kind, heads = self.score.split("_")
        if kind == "cls":
            return _over_heads(graph.row(0), heads)
        return _combine(kind, heads, graph.columns, graph.diagonal)


def matrix_score(a: Tensor, score: Score) -> Tensor:
    """``[B, N]``: a score of ``GTP`` (not ``random``) from the attention matrix ``[B, H, N, N]`` itself."""
    if score == "cosine":
        rows = torch.nn.functional.normalize(a.mean(1), dim=-1)
        return -(rows @ rows.sum(1)[..., None])[..., 0]
    kind, heads = score.split("_")
    if kind == "cls":
        return _over_heads(a[:, :, 0], heads)
    return _combine(kind, heads, lambda: a.sum(2), lambda: a.diagonal(dim1=2, dim2=3))


def sparse(a: Tensor, theta: float, mask: Tensor | None = None) -> Tensor:
    """The attention ``a`` ``[B, H, N, N]`` without its smallest entries, which become 0; not normalised
    again.

    The threshold of a head is its value of rank ``int(n^2 (1 - theta))`` from below; what is below goes.
    Rows and columns where ``mask`` ``[B, N]`` is False are 0 and not among the n.
    """
    batch, _, tokens, _ = a.shape
    count = torch.full((batch,), tokens, device=a.device) if mask is None else mask.sum(1)
    if mask is not None:
        a = a.masked_fill(~(mask[:, None, :, None] & mask[:, None, None, :]), 0)
    rank = (count.square().double() * (1 - theta)).floor().long()
    place = (rank + tokens * tokens - count.square() - 1).clamp(min=0)
    ordered = a.flatten(2).sort(dim=-1).values
    threshold = ordered.gather(2, place[:, None, None].expand(*a.shape[:2], 1))
    return a.masked_fill((a < threshold[..., None]) & (rank > 0)[:, None, None, None], 0)


def spatial_links(rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """``[1, rows * columns, 8]`` int32: the neighbours of every cell of a grid in reading order, -1
    outside.
    """
    cell = torch.arange(rows * columns, device=device)
    row, column = cell // columns, cell % columns
    links = []
    for down, right in ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)):
        i, j = row + down, column + right
        inside = (i >= 0) & (i < rows) & (j >= 0) & (j < columns)
        links.append(torch.where(inside, i * columns + j, -1))
    return torch.stack(links, dim=1).to(torch.int32)[None]


def semantic_links(x: Tensor, neighbours: int) -> Tensor:
    """``[B, N, M]`` int32: the M tokens of ``x`` ``[B, N, C]`` of largest cosine to each, itself not among
    them.

    M is ``neighbours`` or, where there are fewer others, their number. Ties: lowest index.
    """
    tokens = x.shape[1]
    m = min(neighbours, tokens - 1)
    if m <= 0:
        return torch.full((x.shape[0], tokens, 0), -1, dtype=torch.int32, device=x.device)
    _, nearest = ops.cosine_match(x, x, top=m, exclude_self=True)
    return nearest.view(x.shape[0], tokens, m)


def link_weights(links: Tensor) -> tuple[Tensor, Tensor]:
    """Edges ``(links, weight)``, both ``[B, N, Q]``: ``1 / sqrt(d_i d_j)`` with d the neighbours of each
    token.

    ``links`` ``[B, N, Q]`` int32 may name a neighbour twice and hold -1; both become -1 with weight 0.
    """
    ordered = links.sort(dim=2).values
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    ordered = ordered.masked_fill(again, -1)
    degree = (ordered >= 0).sum(2).to(torch.float32)
    other = ragged.gather_rows(degree, ordered.flatten(1)).view(ordered.shape)
    weight = (degree[..., None] * other).rsqrt()
    return ordered, weight.masked_fill((ordered < 0) | (other == 0), 0)


def propagate(view: LayerView, kept: Tensor, lost: Tensor, weight: Tensor, alpha: float) -> Reduced:
    """``x_i + alpha * sum_j w_ij x_j`` and the same of sizes, for the tokens ``kept`` ``[B, K]``.

    Args:
        view: the layer.
        kept: ``[B, K]`` int32, ascending, the prefix among them.
        lost: ``[B, P]`` int32, the tokens dropped.
        weight: ``[B, K, P]`` float32, edges from kept to dropped tokens.
        alpha: share of the features that is passed on.
    """
    rest, sizes, given = pruning.drop(view, kept), view.sizes(), ragged.gather_rows(view.x, lost).float()
    if view.mask is not None:  # what padding holds may be NaN, and 0 times that is NaN
        given = given.masked_fill(~ragged.gather_rows(view.mask, lost)[..., None], 0)
    x = torch.baddbmm(rest.x.float(), weight, given, alpha=alpha)
    passed = (weight @ ragged.gather_rows(sizes, lost)[..., None])[..., 0]
    size = ragged.gather_rows(sizes, kept) + alpha * passed
    return Reduced(x.to(view.x.dtype), size, rest.token_map)


def append_mean(view: LayerView, kept: Tensor) -> Reduced:
    """The tokens ``kept`` ``[B, K]`` and, behind them, the mean of the others weighted by size.

    Dropped padding goes nowhere; where nothing else is dropped, the mean is 0 with size 0.
    """
    rows = ragged.position_map(kept, view.tokens)
    lost = rows < 0 if view.mask is None else (rows < 0) & view.mask
    token_map = rows.masked_fill(lost, kept.shape[1])
    x, size = ops.merge_tokens(view.x, token_map, kept.shape[1] + 1, size=view.sizes())
    return Reduced(x, size, token_map)


def edges(
    links: Tensor, weight: Tensor, source: Tensor, kept: Tensor, lost: Tensor, mask: Tensor | None = None
) -> Tensor:
    """``[B, K, P]`` float32: the weight of the edge from every kept to every dropped token, 0 without an
    edge.

    Where tokens were merged since the graph was made, a token has the edges of its first member.

    Args:
        links: ``[B, n, Q]`` int32, the neighbours of each of the n image tokens that entered the encoder.
        weight: ``[B, n, Q]`` float32.
        source: ``[B, n]`` int32, where each of them is now, -1 if nowhere.
        kept: ``[B, K]`` int32, tokens of now.
        lost: ``[B, P]`` int32, tokens of now.
        mask: ``[B, N]`` bool, False at padding, which passes nothing on; N tokens are there now.
    """
    tokens = kept.shape[1] + lost.shape[1]
    first = _first_member(source, tokens)
    alive = source >= 0
    represents = alive & (
        ragged.gather_rows(first, source) == torch.arange(source.shape[1], device=source.device)
    )
    column = ragged.position_map(lost, tokens)
    column = column if mask is None else column.masked_fill(~mask, -1)
    column = ragged.gather_rows(column, source).masked_fill(~represents, -1)  # of each original token
    origin = ragged.gather_rows(first, kept)
    nobody = (origin < 0)[..., None]
    neighbours = ragged.gather_rows(links, origin).masked_fill(nobody, -1)
    target = ragged.gather_rows(column, neighbours.flatten(1)).view(neighbours.shape)
    absent = (neighbours < 0) | (target < 0)
    out = weight.new_zeros(kept.shape[0], kept.shape[1], lost.shape[1] + 1)
    where = target.masked_fill(absent, lost.shape[1]).long()
    return out.scatter(2, where, ragged.gather_rows(weight, origin))[..., :-1]


def _first_member(source: Tensor, tokens: int) -> Tensor:
    """``[B, tokens]`` int32: the lowest original token in each token of now, -1 where there is none."""
    none = source.shape[1]
    token = torch.arange(none, dtype=torch.int32, device=source.device).expand(source.shape)
    out = torch.full((source.shape[0], tokens + 1), none, dtype=torch.int32, device=source.device)
    out = out.scatter_reduce(1, torch.where(source < 0, tokens, source).long(), token, "amin")[:, :tokens]
    return out.masked_fill(out == none, -1)


def _over_heads(score: Tensor, heads: str) -> Tensor:
    return score.amax(1) if heads == "max" else score.mean(1)


def _combine(kind: str, heads: str, columns: Callable[[], Tensor], diagonal: Callable[[], Tensor]) -> Tensor:
    if kind == "column":
        return _over_heads(columns(), heads)
    own = _over_heads(diagonal(), heads)
    if kind == "diagonal":
        return own
    received = _over_heads(columns(), heads)
    return own * received if kind == "mixed" else own + received
