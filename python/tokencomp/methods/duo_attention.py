"""DuoAttention: heads that need only the first and the last keys get only these (arXiv 2410.10819)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from tokencomp import block_lists, ops
from tokencomp.block_lists import BlockLists
from tokencomp.methods import base
from tokencomp.methods import sparse_select as select
from tokencomp.methods.prompts import PromptMethod, rows_of
from tokencomp.methods.sparse import PromptChoice, SlotLists, Sparse, SparseView
from tokencomp.prompt_rows import PromptRows
from tokencomp.recipes.common import require

BLOCK = 64
Gates: TypeAlias = Sequence[Sequence[float]]  # of each layer, of each kv head


@base.register("duo_attention", paper="2410.10819", stage="attention")
@dataclass(frozen=True)
class DuoAttention(PromptMethod):
    """Streaming heads read the first and the newest tokens, retrieval heads everything; prompts and decoding.

    ``gates[l][h]`` says of kv head h of layer l how much it needs the tokens between. Heads above
    ``threshold`` are retrieval heads; or, with ``streaming``, all but a share of the model's heads, those of
    lowest gates (of equal ones the earlier). Without gates all heads stream, which is StreamingLLM's pattern
    (arXiv 2309.17453) without its eviction. In prompts what is listed are blocks of 64 keys around ``sinks``
    and ``recent``; decode steps read exactly these. All keys stay in the cache: what is saved here is
    reading. Published gates are trained; ``HeadSearch`` measures them.
    """

    gates: Gates = field(
        default=(), metadata={"help": "per layer and kv head, in [0, 1]; none: all heads stream"}
    )
    threshold: float = field(default=0.5, metadata={"help": "gates above it are those of retrieval heads"})
    sinks: int = field(default=128, metadata={"help": select.SINKS_HELP})
    recent: int = field(default=256, metadata={"help": select.RECENT_HELP})
    streaming: float | None = field(
        default=None, metadata={"help": "share of the heads that stream, instead of a threshold"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(self.sinks >= 0, "sinks", ">= 0", self.sinks)
        self._check(self.recent >= 1, "recent", ">= 1", self.recent)
        numbers = [gate for layer in self.gates for gate in layer]
        self._check(all(0 <= gate <= 1 for gate in numbers), "gates", "in [0, 1]", self.gates)
        share = self.streaming is None or 0 <= self.streaming <= 1
        self._check(share, "streaming", "None or in [0, 1]", self.streaming)

    def far(self) -> list[list[bool]]:
        """Of each layer, of each kv head, whether it is a retrieval head; empty without gates."""
        if self.streaming is None:
            return [[gate > self.threshold for gate in layer] for layer in self.gates]
        places = [(gate, i, h) for i, layer in enumerate(self.gates) for h, gate in enumerate(layer)]
        near = {(i, h) for _, i, h in sorted(places)[: int(self.streaming * len(places))]}
        return [[(i, h) not in near for h in range(len(layer))] for i, layer in enumerate(self.gates)]

    def _far(self, view: SparseView) -> list[bool] | None:
        """Of each kv head of the layer; None where attention stays dense."""
        heads = view.lengths.shape[1]
        if self.gates and (len(self.gates) != view.layers or len(self.gates[view.layer]) != heads):
            shape = [len(layer) for layer in self.gates]
            self._check(False, "gates", f"of {view.layers} layers with {heads} kv heads", shape)
        far = self.far()[view.layer] if self.gates else [False] * heads
        small = self.sinks + max(self.recent, view.q.shape[2] * bool(view.step)) >= view.size
        if all(far) or small or view.layer < self.dense_layers or view.size < self.shortest:
            return None
        return far

    def choose_prompt(self, view: SparseView) -> PromptChoice:
        """See ``SparseMethod``."""
        return None if self._far(view) is None else super().choose_prompt(view)

    def lists(self, rows: PromptRows, layer: int) -> BlockLists | None:
        """See ``PromptMethod``. One list a kv head."""
        far = self.far()[layer] if self.gates else [False]
        everything = torch.tensor(far, device=rows.q.device).repeat(rows.q.shape[0] // len(far))
        near = rows.local(BLOCK, BLOCK, self.recent, self.sinks)
        chosen = rows.visible(BLOCK, BLOCK) & (near | everything[:, None, None, None])
        return block_lists.lists_of(chosen, BLOCK, BLOCK)

    def choose(self, view: SparseView) -> SlotLists | None:
        """See ``SparseMethod``."""
        far = self._far(view)
        if far is None:
            return None
        recent = max(self.recent, view.q.shape[2])
        near = select.parts(
            select.sink_slots(view.lengths, self.sinks), select.newest_slots(view.lengths, recent, self.sinks)
        )
        if not any(far):
            return near
        missing = view.size - near.index.shape[2]
        everything = select.sink_slots(view.lengths, view.size)
        choice = torch.tensor(far, device=view.lengths.device)[None, :]
        index = torch.where(
            choice[..., None], everything, torch.nn.functional.pad(near.index, (0, missing), value=-1)
        )
        return SlotLists(index, torch.where(choice, view.lengths, near.count).int())


@dataclass
class HeadSearch(Sparse):
    """Finds gates on prompts that a model is given while it is compressed with this.

    The gate of a kv head is the attention that its query heads pay to keys which a streaming head does not
    see, ``1 - exp(lse_streaming - lse)``: a mean over the last ``rows`` of each prompt (None: all), of its
    query heads the largest. Let these be rows that need what is far: over all rows the mean finds heads that
    look far, not those that find something there. The paper learns gates on synthetic passkeys instead; this
    asks for no training. Nothing is restricted meanwhile.
    """

    sinks: int = 128
    recent: int = 256
    rows: int | None = None

    def __post_init__(self) -> None:
        require(self.sinks >= 0, "HeadSearch", "sinks", ">= 0", self.sinks)
        require(self.recent >= 1, "HeadSearch", "recent", ">= 1", self.recent)
        require(self.rows is None or self.rows >= 1, "HeadSearch", "rows", "None or >= 1", self.rows)
        self._paid: dict[int, Tensor] = {}  # [Hkv, G, 2]: what is paid elsewhere, and rows

    def choose_prompt(self, view: SparseView) -> PromptChoice:
        """See ``SparseMethod``."""
        if view.q.shape[2]:
            rows = rows_of(view)
            v = view.values()[:, :, : view.size].flatten(0, 1)[:, None]
            sides = rows.sides()
            near = rows.local(BLOCK, BLOCK, self.recent, self.sinks)
            lists = block_lists.lists_of(near, BLOCK, BLOCK).arguments()
            whole = ops.attention_lse(rows.q, rows.k, **sides)
            seen = ops.flash_prefill(rows.q, rows.k, v, **sides, **lists)[1]
            there = whole > -torch.inf
            if self.rows is not None:
                there = there & (rows.position() >= rows.lengths[:, None] - self.rows)[:, None]
            paid = torch.where(there, 1 - (seen - torch.where(there, whole, 0.0)).exp(), 0.0).clamp(min=0)
            found = torch.stack([paid.double().sum(2), there.double().sum(2)], -1)  # [R, G, 2]
            found = found.view(*view.lengths.shape, -1, 2).sum(0).cpu()
            self._paid[view.layer] = self._paid.get(view.layer, 0) + found
        return None

    def gates(self) -> list[list[float]]:
        """Of each kv head of each layer: for ``DuoAttention.gates``, and JSON.

        Raises ValueError before all layers have seen a prompt.
        """
        layers = max(self._paid, default=-1) + 1
        if not layers or sorted(self._paid) != list(range(layers)):
            raise ValueError(f"HeadSearch: layers must have seen a prompt, got {sorted(self._paid)}")
        shares = (paid[..., 0] / paid[..., 1].clamp(min=1) for _, paid in sorted(self._paid.items()))
        return [share.amax(1).tolist() for share in shares]
