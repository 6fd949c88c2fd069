"""FlowCut: patches that information does not flow through leave the encoder early (arXiv 2505.19536)."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokencomp.methods import base, encoder, visual
from tokencomp.methods.encoder import EncoderView


@base.register("flowcut", paper="2505.19536", stage="visual tokens, between the layers of the vision encoder")
@dataclass(frozen=True)
class FlowCut(encoder.CutInEncoder):
    """Cuts patches behind every second encoder layer, the fewer the more evenly CLS attends.

    With g the attention of CLS to the patches and z their softmax likeness ``v_cls . v_j`` without a scale,
    means over heads, and ``u_j = |mean_h v_j|_1``: ``s = (g / sum g + z / sum z) u``, accumulated as ``S <-
    (S + s) / 2``. With rho layers left and T tokens to reach, ``round((N - T) / sqrt(rho) (1 - e^2))`` go, e
    the entropy of ``g / sum g`` as a share of ``ln N``, the largest such number of a batch; before the last
    layer that makes the features all but T. What is cut is missing in all later layers.

    Without CLS the mean query stands in for it and ``s = g u`` (the authors' code for Qwen2-VL), over all
    patches also in layers that attend in windows (Qwen2.5-VL, which the authors did not try). Where several
    patches make a token whole tokens go, by the mean of S, and stay in place; that code drops single patches
    and makes tokens of any four. The paper's second stage is ``FlowCutStage2``.
    """

    keep: float = field(
        default=1 / 9, metadata={"help": "ratio of the tokens of each crop that are left, or their count"}
    )

    def __post_init__(self) -> None:
        base.check_keep("FlowCut", self.keep)

    def cuts_after(self, last: int) -> tuple[int, ...]:
        """See ``EncoderMethod``: it looks at all layers before the last. Raises ValueError without any."""
        if last < 1:
            raise ValueError(f"FlowCut: the encoder must have 2 layers or more, got {last + 1}")
        return tuple(range(last))

    def cut(self, view: EncoderView) -> Tensor | None:
        """See ``EncoderMethod``."""
        target, rho = base.budget(self.keep, view.tokens), view.last - 1 - view.layer
        if view.left <= target:
            return None
        g = encoder.softmax_row(encoder.first_query(view), view.k, view.scale, view.prefix)
        z = None
        if view.prefix:
            z = encoder.softmax_row(view.v[:, :, :1], view.v, 1.0, view.prefix)
        new, before = score(g, z, view.v[:, :, view.prefix :]), view.scratch.get("score")
        total = new if before is None else 0.5 * (before + new)
        view.scratch["score"] = total
        if rho % 2:
            return None
        ratio = entropy_ratio(g)
        gone = [cut_count(e, view.left, target, rho) for e in ratio.tolist()]  # waits for a GPU
        kept = view.left - max(gone)
        if kept == view.left:
            return None
        index = visual.best(view.by_token(total), kept)
        view.scratch["score"] = _of_tokens(view, total, index)
        return index


def score(g: Tensor, z: Tensor | None, v: Tensor) -> Tensor:
    """``[M, N]``: ``(g / sum g + z / sum z) |mean_h v|_1``; ``g |mean_h v|_1`` without z.

    Args:
        g, z: ``[M, N]``. v: ``[M, H, N, D]``.
    """
    density = v.float().mean(1).abs().sum(-1)
    if z is None:
        return g * density
    return (g / g.sum(-1, keepdim=True) + z / z.sum(-1, keepdim=True)) * density


def entropy_ratio(g: Tensor) -> Tensor:
    """``[M]``: the entropy of ``g / sum g`` ``[M, N]``, in ``ln N``; 1 where N is 1."""
    if g.shape[-1] == 1:
        return torch.ones_like(g[..., 0])
    p = g / g.sum(-1, keepdim=True)
    entropy: Tensor = torch.special.entr(p).sum(-1)
    return entropy / math.log(g.shape[-1])


def cut_count(ratio: float, left: int, target: int, rho: int) -> int:
    """How many of ``left`` tokens go with ``rho`` layers left, halves to even; without any all but
    ``target``.
    """
    if rho == 0:
        return left - target
    return min(left - target, max(0, round((left - target) / math.sqrt(rho) * (1 - ratio**2))))


def _of_tokens(view: EncoderView, total: Tensor, index: Tensor) -> Tensor:
    """``total`` ``[M, n]`` of the patches of the tokens ``index``, in order."""
    if view.token is None:
        return total.gather(1, index.long())
    stays = torch.zeros(index.shape[0], view.left, dtype=torch.bool, device=index.device)
    stays = stays.scatter(1, index.long(), True).gather(1, view.token)
    return total[stays].view(total.shape[0], -1)
