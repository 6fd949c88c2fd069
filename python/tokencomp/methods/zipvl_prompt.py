"""ZipVL: a layer's prompt attends among its important tokens alone (arXiv 2410.08584)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp import ops, scores
from tokencomp.methods import base
from tokencomp.methods.prompts import PromptMethod, rows_of
from tokencomp.methods.sparse import PromptChoice, SparseView, Subset
from tokencomp.prompt_rows import PromptRows

MOST_PROBES = 65536


@base.register("zipvl_prompt", paper="2410.08584", stage="attention")
@dataclass(frozen=True)
class ZipVLPrompt(PromptMethod):
    """The tokens that probe rows attend to, as many in each layer as hold a share of the attention.

    With ``a_j = mean_h sum_i P[h, i, j]`` over the probes i, the last ``recent`` rows and ``random`` others,
    the count p is the fewest tokens of largest ``a`` that hold ``tau`` of it; kept are the p of largest
    ``a_j / n_j``, with n_j the probes that see j, among them the first ``sinks`` and the last ``recent``. The
    kept tokens attend to each other, and in a chunk to all before it; the others' attention output is 0, they
    go through the MLP alone. What the cache holds is up to a method on it; the
    paper's own is mixed precision (v1) or to drop the others (v2). No official code was seen: ``tau`` and the
    numbers of probes are reconstructed. Waits for the device, which alone knows p.
    """

    tau: float = field(default=0.975, metadata={"help": "share of the attention that the kept tokens hold"})
    recent: int = field(default=64, metadata={"help": "last rows that are probes; always kept"})
    random: int = field(default=64, metadata={"help": "other rows that are probes, spread over the prompt"})
    sinks: int = field(default=4, metadata={"help": "first tokens, always kept"})
    seed: int = field(default=0, metadata={"help": "of the random probes"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(0 <= self.tau <= 1, "tau", "in [0, 1]", self.tau)
        self._check(self.sinks >= 0, "sinks", ">= 0", self.sinks)
        for name, least in (("recent", 1), ("random", 0)):
            fits = least <= getattr(self, name) <= MOST_PROBES
            self._check(fits, name, f"in [{least}, {MOST_PROBES}]", getattr(self, name))

    def choose_prompt(self, view: SparseView) -> PromptChoice:
        """See ``SparseMethod``."""
        if view.layer < self.dense_layers or view.size < self.shortest or not view.q.shape[2]:
            return None
        return self.subset(rows_of(view), view.lengths.shape[1])

    def subset(self, rows: PromptRows, heads: int = 1) -> Subset:
        """The rows that attend, by what they receive as keys: the keys from position ``first`` on.

        Of ``heads`` neighbours among the sequences the scores are averaged, and the rows are the same.
        """
        q, position = rows.at(self._probes(rows))
        received, _ = rows.received(q, position)
        assert received is not None
        mass = received.mean(1)
        seen = scores.count_correction(
            rows.keys, q.shape[2], row_weight=(position >= 0).float(), q_position=position,
            lengths=rows.lengths, starts=rows.starts,
        )  # fmt: skip
        normalised = torch.where(seen > 0, mass / seen.clamp(min=1), 0.0)
        own = rows.first[:, None].long() + torch.arange(rows.rows, device=q.device)
        mass, normalised = (x.gather(1, own).unflatten(0, (-1, heads)).mean(1) for x in (mass, normalised))
        tokens = (rows.lengths - rows.first)[::heads]
        sinks = min(self.sinks, rows.rows) if rows.keys == rows.rows else 0
        _, count = ops.topp_select(mass, self.tau, rows.rows, lengths=tokens)
        least = torch.minimum(tokens, torch.full_like(tokens, self.recent + sinks))
        index, count = ops.topk_select(
            normalised, rows.rows, k_per_row=torch.maximum(count, least), head=sinks, tail=self.recent,
            lengths=tokens,
        )  # fmt: skip
        return Subset(index[:, : int(count.max())].contiguous(), count)

    def _probes(self, rows: PromptRows) -> Tensor:
        """``[B, recent + random]`` int32 rows, -1 in holes. One of each of ``random`` equal parts."""
        tokens = (rows.lengths - rows.first)[:, None]
        recent = tokens - 1 - torch.arange(self.recent - 1, -1, -1, device=tokens.device)
        others = (tokens - self.recent).clamp(min=0)
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.rand(self.random, generator=generator).to(tokens.device)
        drawn = (torch.arange(self.random, device=tokens.device) + drawn) * others / max(self.random, 1)
        drawn = torch.minimum(drawn.int(), others - 1)
        again = torch.zeros_like(drawn, dtype=torch.bool)
        again[:, 1:] = drawn[:, 1:] == drawn[:, :-1]  # parts of less than a row
        return torch.cat([torch.where(again, -1, drawn), recent], 1).int().clamp(min=-1)
