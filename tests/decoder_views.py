"""Prompts between decoder layers for tests of methods: attention is given."""

from collections.abc import Sequence
from typing import Any

import torch
from tokencomp import methods
from tokencomp.methods.decoder import DecoderView, Transition
from tokencomp.methods.decoder_attention import PromptAttention
from torch import Tensor


def attention_of(rows: Any) -> PromptAttention:
    """A layer of one sequence whose heads attend as ``rows`` ``[W, W]`` or ``[H, W, W]`` says."""
    heads = torch.as_tensor(rows).float()
    heads = heads[None] if heads.dim() == 2 else heads
    eye = torch.eye(heads.shape[-1]).expand(1, heads.shape[0], -1, -1)
    return PromptAttention(heads.clamp(min=1e-30).log()[None], eye, 1.0)


def causal(width: int, **rows: Sequence[float]) -> Tensor:
    """Rows that attend evenly to what is there; ``r3=(...)`` sets the first entries of row 3."""
    whole = torch.ones(width, width).tril()
    for name, values in rows.items():
        whole[int(name[1:]), : len(values)] = torch.tensor(values)
    return whole / whole.sum(1, keepdim=True)


def view_of(visual: Sequence[int], width: int, attention: Any = None, **more: Any) -> DecoderView:
    """One sequence of ``width`` tokens, of which ``visual`` are visual."""
    token = torch.arange(width)
    is_visual = torch.isin(token, torch.tensor(visual))[None]
    text = ~is_visual & (token > min(visual))
    x = more.pop("x", torch.zeros(width, 2))[None]
    given = None if attention is None else attention_of(attention)
    following = more.pop("following", None)
    return DecoderView(
        layer=more.pop("layer", 0), layers=more.pop("layers", 32), x=x, visual=is_visual, text=text,
        column=token[None], tokens=[len(visual)], embeds=more.pop("embeds", x[0])[None], attention=given,
        following=None if following is None else lambda: attention_of(following), **more,
    )  # fmt: skip


def random_view(counts: Sequence[int] = (9, 6, 0), *, layer: int = 0) -> DecoderView:
    """Sequences of text, so many visual tokens and text; shorter ones padded in front. Wide tensors too."""
    g, batch, width, heads, dim = torch.Generator().manual_seed(3), len(counts), 16, 4, 8
    column = torch.arange(width).expand(batch, -1)
    missing = torch.tensor([max(counts) - n for n in counts])[:, None]
    real = column >= missing
    visual = real & (column >= 3 + missing) & (column < 3 + max(counts))
    text = real & ~visual & (visual.long().cumsum(1) > 0)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    bias = torch.where(real, 0.0, -torch.inf)[:, None].expand(-1, 2, -1).contiguous()

    def attention() -> PromptAttention:
        q, k = make(batch, heads, width, dim), make(batch, 2, width, dim)
        return PromptAttention(q, k, dim**-0.5, bias=bias)

    own, after, x = attention(), attention(), make(batch, width, 12)
    change = (Transition(x, make(batch, width, 12)), Transition(make(batch, width, 12), x))
    return DecoderView(
        layer=layer, layers=3, x=x, visual=visual, text=text, column=torch.where(real, column, -1),
        tokens=visual.sum(1).tolist(), embeds=make(batch, width, 12), attention=own, following=lambda: after,
        transition=change, activation=make(batch, width, 20), value=make(batch, 2, width, dim),
    )  # fmt: skip


def alone(view: DecoderView, row: int) -> DecoderView:
    """One sequence of a view."""

    def part(attention: PromptAttention) -> PromptAttention:
        assert attention.bias is not None
        rows = slice(row, row + 1)
        return PromptAttention(
            attention.q[rows], attention.k[rows], attention.scale, attention.softcap, attention.bias[rows]
        )

    one = slice(row, row + 1)
    assert view.transition is not None
    assert view.activation is not None
    change = [Transition(part.before[one], part.after[one]) for part in view.transition]
    return DecoderView(
        view.layer, view.layers, view.x[one], view.visual[one], view.text[one], view.column[one],
        view.tokens[one], view.embeds[one], part(view.own), lambda: part(view.next()), (change[0], change[1]),
        view.activation[one], value=None if view.value is None else view.value[one],
    )  # fmt: skip


DECODER_METHODS: list[Any] = [
    methods.FastV(layer=1), methods.PyramidDrop(keep=(0.5, 0.25), layers=(1, 2)),
    methods.ToDREStage2(tau=0.5, layer=0), methods.VScanStage2(layer=0), methods.FlowCutStage2(layer=0),
    methods.SparseVLM(keep=(0.5, 0.25), layers=(0, 1)), methods.SparseVLM(layers=(0, 1), rate=0.5),
    methods.AIM(start=0, span=2), methods.MustDrop(layers=(0, 1), share=0.2, peak=0.2, window=2),
    methods.TransPrune(keep=(0.5, 0.25), layers=(1, 2), since=0), methods.CoreMatching(layers=(0, 1)),
    methods.CoreMatching(layers=(0, 1), mode="core"), methods.Probe(keep=0.4),
]  # fmt: skip
