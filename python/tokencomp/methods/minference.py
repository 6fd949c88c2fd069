"""MInference: a pattern of attention for each head, filled in by the prompt (arXiv 2407.02490)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tokencomp import block_lists, ops
from tokencomp.block_lists import BlockLists
from tokencomp.methods import base
from tokencomp.methods.prompts import PromptMethod, by_group, rows_of
from tokencomp.methods.sparse import PromptChoice, Sparse, SparseView
from tokencomp.prompt_rows import PromptRows

BLOCK = 64
KINDS = ("vertical_slash", "a_shape", "block_sparse")
Pattern: TypeAlias = Sequence[Any]  # a kind, and its two sizes
Patterns: TypeAlias = Sequence[Sequence[Pattern]]  # of each layer, of each query head

# Of the published tables, vertical-slash but for the last two.
CANDIDATES: tuple[Pattern, ...] = (
    ("vertical_slash", 30, 800),
    ("vertical_slash", 100, 800),
    ("vertical_slash", 500, 700),
    ("vertical_slash", 1000, 6096),
    ("vertical_slash", 3500, 100),
    ("a_shape", 128, 1024),
    ("block_sparse", 100, 0),
)


@base.register("minference", paper="2407.02490", stage="attention")
@dataclass(frozen=True)
class MInference(PromptMethod):
    """Columns and diagonals that the last queries of a prompt attend to, or another pattern of the head.

    ``vertical_slash`` v, s: with ``P`` the softmax of the last ``queries`` rows, the v keys of largest
    ``sum_t P[t, j]``, the first ``sinks`` among them, and the s offsets of largest ``sum P[t, t - o]``, the
    first ``recent`` among them; each query block lists the blocks that its slashes cross, and the columns
    elsewhere. ``a_shape`` i, w: the first i keys and the last w. ``block_sparse`` n, 0: the n blocks of
    largest product of mean query and mean key, that of the first keys and the diagonal among them (the
    official code forces neither). Heads without a pattern have ``vertical`` and ``slash``; those are the ones
    shipped for Llama-3.1-8B at 128K tokens. ``PatternSearch`` finds patterns.
    """

    vertical: int = field(default=512, metadata={"help": "columns of a head"})
    slash: int = field(default=2048, metadata={"help": "diagonals of a head"})
    queries: int = field(default=64, metadata={"help": "last rows that are looked at"})
    sinks: int = field(default=30, metadata={"help": "first keys that are always columns"})
    recent: int = field(default=100, metadata={"help": "nearest diagonals that are always taken"})
    patterns: Patterns | None = field(
        default=None, metadata={"help": "[kind, size, size] of each query head of each layer"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("vertical", 1), ("slash", 1), ("queries", 1), ("sinks", 0), ("recent", 1)):
            self._check(getattr(self, name) >= least, name, f">= {least}", getattr(self, name))
        for pattern in (p for layer in self.patterns or () for p in layer):
            good = len(pattern) >= 3 and pattern[0] in KINDS and pattern[1] >= 0 and pattern[2] >= 0
            expected = f"[kind, size, size] with a kind of {', '.join(KINDS)}"
            self._check(good, "patterns", expected, pattern)

    def lists(self, rows: PromptRows, layer: int) -> BlockLists | None:
        """See ``PromptMethod``."""
        mine = self._of_layer(rows, layer)
        kind, one, two = (by_group(column, rows) for column in mine.T)
        kinds = set(mine[:, 0].tolist())
        chosen = torch.zeros_like(kind, dtype=torch.bool)[..., None, None]
        columns = None
        if 0 in kinds:
            columns, slashes = self._vertical_slash(rows, kind == 0, one, two)
            chosen = block_lists.crossed_blocks(slashes, *rows.blocks(BLOCK), rows.keys, BLOCK)
        if 1 in kinds:
            local = rows.local(BLOCK, BLOCK, two.clamp(min=1), one)
            chosen = torch.where((kind == 1)[..., None, None], local, chosen)
        if 2 in kinds:
            forced = rows.local(BLOCK, BLOCK, sinks=1)
            best = block_lists.topk_blocks(
                rows.pooled_logits(BLOCK, BLOCK), one, visible=rows.visible(BLOCK, BLOCK), forced=forced
            )
            chosen = torch.where((kind == 2)[..., None, None], best | forced, chosen)
        last = rows.blocks(BLOCK)[1]
        return block_lists.lists_of(chosen, BLOCK, BLOCK, columns=columns, last=last, keys=rows.keys)

    def _of_layer(self, rows: PromptRows, layer: int) -> Tensor:
        """``[heads, 3]`` int32: number of the kind and sizes, of each query head or of those of a group."""
        if self.patterns is None:
            return torch.tensor([[0, self.vertical, self.slash]] * rows.q.shape[1], dtype=torch.int32)
        known = len(self.patterns)
        self._check(layer < known, "patterns", f"of at least {layer + 1} layers", f"{known} layers")
        heads = self.patterns[layer]
        group = rows.q.shape[1]
        fits = len(heads) > 0 and len(heads) % group == 0 and rows.q.shape[0] % (len(heads) // group) == 0
        self._check(fits, "patterns", "of every query head of a layer", f"{len(heads)} heads")
        return torch.tensor([[KINDS.index(p[0]), int(p[1]), int(p[2])] for p in heads], dtype=torch.int32)

    def _vertical_slash(
        self, rows: PromptRows, mine: Tensor, vertical: Tensor, slash: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Columns and offsets ``[R, G, n]`` of the heads ``mine``, -1 in holes."""
        q, position = rows.newest(min(self.queries, rows.rows))
        received, along = rows.received(q, position, diagonals=True)
        assert received is not None and along is not None  # noqa: PT018  (for the type checker)
        received = received.masked_fill(rows.is_sink(self.sinks), torch.inf)
        along = along.masked_fill(torch.arange(rows.keys, device=q.device) < self.recent, torch.inf)
        lengths = rows.lengths[:, None].expand(mine.shape).flatten()
        found = []
        for score, size, first in ((received, vertical, self.sinks), (along, slash, self.recent)):
            wanted = torch.where(mine, size.clamp(min=first), 0)
            width = min(int(size.max().clamp(min=first)), rows.keys)
            index, _ = ops.topk_select(
                score.flatten(0, 1), width, k_per_row=wanted.clamp(max=width).flatten(), lengths=lengths
            )
            found.append(index.view(*mine.shape, width))
        return found[0], found[1]


@dataclass
class PatternSearch(Sparse):
    """Finds the pattern of each head on prompts that a model is given while it is compressed with this.

    Of the candidates that list at most a share ``most`` of the visible blocks, the one whose output is
    nearest to that of dense attention, by its squared error over all prompts seen; where there is none, the
    cheapest. The paper lets all candidates have the same cost; here it is bounded, and the rest is up to the
    list. Nothing is restricted meanwhile.
    """

    candidates: Sequence[Pattern] = CANDIDATES
    most: float = 1.0

    def __post_init__(self) -> None:
        MInference(patterns=[self.candidates])
        self._error: dict[int, Tensor] = {}  # [candidates, Hq] of each layer
        self._density: dict[int, list[Tensor]] = {}

    def choose_prompt(self, view: SparseView) -> PromptChoice:
        """See ``SparseMethod``."""
        if view.q.shape[2]:
            rows = rows_of(view)
            v = view.values()[:, :, : view.size].flatten(0, 1)[:, None]
            error, density = zip(*(self._try(p, rows, v) for p in self.candidates), strict=True)
            heads = view.q.shape[1]
            summed = torch.stack([e.view(-1, heads).sum(0) for e in error]).double().cpu()
            self._error[view.layer] = self._error.get(view.layer, 0) + summed
            shares = torch.stack([d.reshape(-1, heads).mean(0) for d in density]).cpu()
            self._density.setdefault(view.layer, []).append(shares)
        return None

    def _try(self, pattern: Pattern, rows: PromptRows, v: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error ``[R, G]`` of the output, and density."""
        lists = MInference(patterns=[[pattern] * rows.q.shape[1]]).lists(rows, 0)
        assert lists is not None
        sides = rows.sides()
        dense, _ = ops.flash_prefill(rows.q, rows.k, v, **sides)
        sparse, _ = ops.flash_prefill(rows.q, rows.k, v, **sides, **lists.arguments())
        return (dense.float() - sparse.float()).square().sum((2, 3)), block_lists.density(
            lists, rows.visible(BLOCK, BLOCK)
        )

    def patterns(self) -> list[list[list[Any]]]:
        """``[kind, size, size]`` of each query head of each layer: for ``MInference.patterns``, and JSON.

        Raises ValueError before all layers have seen a prompt.
        """
        layers = max(self._error, default=-1) + 1
        if not layers or sorted(self._error) != list(range(layers)):
            raise ValueError(f"PatternSearch: layers must have seen a prompt, got {sorted(self._error)}")
        table = []
        for layer in range(layers):
            share = torch.stack(self._density[layer]).mean(0)
            allowed = share <= self.most
            allowed = torch.where(allowed.any(0), allowed, share == share.amin(0))
            best = torch.where(allowed, self._error[layer], torch.inf).argmin(0)
            table.append([list(self.candidates[i]) for i in best.tolist()])
        return table
