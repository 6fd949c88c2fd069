"""MCTF: fuse similar, uninformative and small tokens, in both directions (arXiv 2403.10030)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp import ops
from tokencomp.methods import attention, base, matching, schedule
from tokencomp.methods.layers import LayerView, Reduced, Stateless
from tokencomp.methods.matching import Plan
from tokencomp.methods.schedule import Rate


@base.register("mctf", paper="2403.10030", stage="every encoder layer, between attention and MLP")
@dataclass(frozen=True)
class MCTF(Stateless):
    """Matches by similarity, attention received and size at once, then merges the two halves into each other.

    The weight of a pair of tokens i, j, with a the mean attention a token receives (over heads and queries)
    and s sizes:
    ``((1 + cos(x_i, x_j)) / 2)^(1 / t_sim) * (a'_i a'_j)^(1 / t_info) * (s'_i s'_j)^(1 / t_size)``,
    a' = min(a) / a and s' = min(s) / s: what is read little and stands for little goes first. floor(r / 2)
    even tokens go into their best odd ones, then the other ones of r from odd to the even tokens that are
    left, with the weights from before; what went into an odd token goes with it. Values are averaged with
    weights s a; sizes add up.

    The paper merges ahead of the attention whose probabilities it looks at; here, as for all methods between
    attention and MLP, they are those of the attention just computed. r is capped at half of the tokens that
    are no prefix.
    """

    r: Rate = field(default=16, metadata={"help": schedule.HELP})
    t_sim: float = field(default=1.0, metadata={"help": "temperature of similarity, > 0"})
    t_info: float = field(default=20.0, metadata={"help": "temperature of attention received; 0: ignored"})
    t_size: float = field(default=40.0, metadata={"help": "temperature of size; 0: ignored"})
    bidirectional: bool = field(default=True, metadata={"help": "half of r the other way round"})
    proportional: bool = field(default=True, metadata={"help": "add log size to the attention logits"})

    def __post_init__(self) -> None:
        schedule.check_rate("MCTF", self.r)
        if not (self.t_sim > 0 and self.t_info >= 0 and self.t_size >= 0):
            got = (self.t_sim, self.t_info, self.t_size)
            raise ValueError(f"MCTF: t_sim must be > 0, t_info and t_size >= 0, got {got}")

    def plan(
        self,
        x: Tensor,
        received: Tensor,
        size: Tensor | None = None,
        *,
        prefix: int = 1,
        layer: int = 0,
        layers: int = 1,
        mask: Tensor | None = None,
    ) -> Plan:
        """What ``layer`` of ``layers`` merges: ``(token_map [B, N] int32, out_tokens)``.

        Args:
            x: ``[B, N, C]``, what is compared.
            received: ``[B, N]`` float32, the mean attention each token receives.
            size: ``[B, N]`` float32, input tokens each stands for; None: one each.
            prefix: tokens at the front that stay as they are.
            mask: ``[B, N]`` bool, False at padding.

        Rows: prefix, even tokens that stay, odd tokens that stay, each in ascending order.
        """
        n = x.shape[1]
        r = schedule.cap(schedule.per_layer(self.r, layers)[layer], n, prefix)
        if r == 0:
            return matching.identity(x)
        own = matching.tokens_like(x)
        free = own >= prefix if mask is None else (own >= prefix) & mask
        factor = self.factors(received, size, mask)
        back = r - r // 2 if self.bidirectional else 0
        even, odd = slice(0, None, 2), slice(1, None, 2)
        target = _send(x, factor, free, even, odd, r - back)
        target = _send(x, factor, free & (target == own), odd, even, back).gather(1, target)
        return matching.assemble(target, own + own % 2 * n * (own >= prefix), n - r, mask)

    def factors(self, received: Tensor, size: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """``[B, N]`` float32: a token's share of a pair's weight, to the power ``t_sim``.

        ``(w^(1 / t_sim) f)`` ranks pairs like ``w f^t_sim``, and that is a cosine times two factors.
        """
        factor = torch.ones_like(received, dtype=torch.float32)
        for value, temperature in ((received, self.t_info), (size, self.t_size)):
            if value is not None and temperature > 0:
                positive = value.float().clamp_min(torch.finfo(torch.float32).tiny)
                valid = positive if mask is None else positive.masked_fill(~mask, float("inf"))
                least = valid.amin(dim=1, keepdim=True)
                factor = factor * (least / positive).pow(self.t_sim / temperature)
        return factor

    def reduce(self, view: LayerView) -> Reduced | None:
        """Merge by the tokens themselves and by this layer's attention."""
        r = schedule.per_layer(self.r, view.layers)[view.layer]
        if schedule.cap(r, view.tokens, view.prefix) == 0:
            return None
        received = attention.of(view, proportional=self.proportional).columns().mean(dim=1) / view.tokens
        plan = self.plan(
            view.x,
            received,
            view.size,
            prefix=view.prefix,
            layer=view.layer,
            layers=view.layers,
            mask=view.mask,
        )
        heard = received.detach().clamp_min(1e-20)  # a row that nobody reads, padding too, keeps its value
        x, size = matching.merge(view.x, plan, size=view.size, weight=heard)
        return Reduced(x, size, plan.token_map)


@torch.no_grad()
def _send(x: Tensor, factor: Tensor, free: Tensor, src: slice, dst: slice, r: int) -> Tensor:
    """The token each of all goes into: for the ``r`` best of ``src`` the best ``free`` one of ``dst``.

    (1 + cos) / 2 is the mean of the cosine and a second one that is always 1.
    """
    own = matching.tokens_like(x)
    if r == 0:
        return own
    x = matching.dense(x)
    one = torch.ones_like(x[:, :, :1])
    value, index = ops.cosine_match(
        x[:, src],
        x[:, dst],
        a2=one[:, src],
        b2=one[:, dst],
        alpha=0.5,
        a_weight=factor[:, src],
        b_weight=factor[:, dst],
        mask_a=free[:, src].contiguous(),
        mask_b=free[:, dst].contiguous(),
    )
    goes = (matching.rank_of(matching.ranked(value)) < r) & (index >= 0)
    into = own[:, dst].gather(1, index.long().clamp_min(0))
    result = own.clone()
    result[:, src] = torch.where(goes, into, own[:, src])
    return result
