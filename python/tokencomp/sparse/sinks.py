"""ACT: attention with what sinks hold given to the other keys (arXiv 2406.15765), without its matrix."""

import torch
from torch import Tensor

from tokencomp import ops, recipes
from tokencomp.recipes.common import require


def calibrated_attention(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor, *, beta: float = 0.4, scale: float | None = None
) -> Tensor:
    """Causal attention of which the ``sink`` keys keep the share ``beta``: ``recipes.redistribute_sinks`` of
    the matrix times v.

    A merge of attention over the sinks alone and over the others alone, ``recipes.merge_sink_outputs``. For
    the heads that were found to gain from it, in prompts.

    Args:
        q: ``[B, Hq, T, D]``, the last T of the S positions.
        k, v: ``[B, Hkv, S, D]`` and ``[B, Hkv, S, Dv]``.
        sink: ``[B, H, S]`` bool, H one of Hkv and Hq; of ``recipes.attention_sinks``.
        beta: in [0, 1].
        scale: default ``D ** -0.5``.

    Returns:
        ``[B, Hq, T, Dv]`` of the dtype of q.

    Raises:
        ValueError: a shape, dtype or number that is not as above.
    """
    op = "calibrated_attention"
    shapes = [[k.shape[0], heads, k.shape[2]] for heads in (k.shape[1], q.shape[1])]
    good = list(sink.shape) in shapes and sink.dtype == torch.bool
    require(good, op, "sink", f"bool of one of {shapes}", f"{sink.dtype} {list(sink.shape)}")
    require(0 <= beta <= 1, op, "beta", "in [0, 1]", beta)
    group = sink.shape[1] // k.shape[1]  # a bias is of a kv head: keys are repeated where sinks differ
    keys, values = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
    states = [
        ops.flash_prefill(
            q, keys, values, scale=scale, key_bias=torch.zeros_like(taken, dtype=torch.float32).masked_fill(
                ~taken, -torch.inf
            ),
        )
        for taken in (sink, ~sink)
    ]  # fmt: skip
    (sinks, sink_lse), (rest, rest_lse) = states
    return recipes.merge_sink_outputs(sinks, sink_lse, rest, rest_lse, beta).to(q.dtype)
