"""ACT (arXiv 2406.15765): attention taken from sinks and given to the other keys. ``attention_sinks`` finds
them.
"""

import torch
from torch import Tensor

from tokencomp.recipes.common import require, require_dims


def redistribute_sinks(attention: Tensor, sink: Tensor, beta: float = 0.4) -> Tensor:
    """Attention whose sinks keep the share ``beta`` of what they received; the rest goes to a row's other
    keys in proportion to what those received.

    Rows still sum to 1. A row without attention outside the sinks stays as it is, as does row 0, which sees
    itself alone.

    Args:
        attention: ``[B, H, T, S]`` probabilities.
        sink: ``[B, H, S]`` bool, of ``attention_sinks``.
        beta: in [0, 1].

    Returns:
        ``[B, H, T, S]`` float32.

    Raises:
        ValueError: a shape, dtype or number that is not as above.
    """
    op = "redistribute_sinks"
    require_dims(op, "attention", attention, "[B, H, T, S]")
    shape = [*attention.shape[:2], attention.shape[3]]
    good = list(sink.shape) == shape and sink.dtype == torch.bool
    require(good, op, "sink", f"bool of shape {shape}", f"{sink.dtype} {list(sink.shape)}")
    require(0 <= beta <= 1, op, "beta", "in [0, 1]", beta)
    attention, taken = attention.float(), sink[:, :, None]
    held = torch.where(taken, attention, 0.0).sum(-1, keepdim=True)
    rest = torch.where(taken, 0.0, attention).sum(-1, keepdim=True)
    grown = attention * (1 + (1 - beta) * held / torch.where(rest > 0, rest, 1.0))
    return torch.where(rest > 0, torch.where(taken, beta * attention, grown), attention)


def merge_sink_outputs(
    sink_output: Tensor, sink_lse: Tensor, rest_output: Tensor, rest_lse: Tensor, beta: float = 0.4
) -> Tensor:
    """The output of ``redistribute_sinks`` without its matrix: from attention over the sinks alone and over
    the other keys alone.

    With ``a`` the sinks' share of the mass, ``sigmoid(sink_lse - rest_lse)``, the output is ``beta a O_sink +
    (1 - beta a) O_rest``: the usual merge of two parts with the weight of one of them scaled.

    Args:
        sink_output, rest_output: ``[B, H, T, D]``, each normalised over its own keys.
        sink_lse, rest_lse: ``[B, H, T]`` natural log-sum-exps of the parts, -inf for an empty one.
        beta: in [0, 1].

    Returns:
        ``[B, H, T, D]`` float32; 0 for a row that sees nothing.

    Raises:
        ValueError: a shape or number that is not as above.
    """
    op = "merge_sink_outputs"
    require_dims(op, "sink_output", sink_output, "[B, H, T, D]")
    shape = list(sink_output.shape)
    for name, t, want in (
        ("rest_output", rest_output, shape),
        ("sink_lse", sink_lse, shape[:3]),
        ("rest_lse", rest_lse, shape[:3]),
    ):
        require(list(t.shape) == want, op, name, f"of shape {want}", list(t.shape))
    require(0 <= beta <= 1, op, "beta", "in [0, 1]", beta)
    no_sink, no_rest = (lse == -torch.inf for lse in (sink_lse, rest_lse))
    share = beta * torch.sigmoid(sink_lse.float() - torch.where(no_rest, 0.0, rest_lse.float()))
    share = torch.where(no_rest, 1.0, torch.where(no_sink, 0.0, share))[..., None]
    parts = (
        torch.where(empty[..., None], 0.0, output.float())
        for output, empty in ((sink_output, no_sink), (rest_output, no_rest))
    )
    sinks, others = parts
    return share * sinks + (1 - share) * others
