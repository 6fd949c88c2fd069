"""Attention of rows to the blocks that each of them chose: MoBA (arXiv 2502.13189) and NSA (arXiv
2502.11089), on given weights. Exact, row by row; the cost follows what is chosen.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from tokencomp import block_lists, ops
from tokencomp.prompt_rows import PromptRows, last_rows
from tokencomp.recipes.common import require, require_dims


def choose_chunks(rows: PromptRows, chunk: int, top: int) -> Tensor:
    """``[B, Hq, T, chunks]`` bool: the ``top`` chunks of largest ``<q, mean key>`` of each row, its own one.

    Means are float32. Chunks behind a row are not chosen; ties go to the lower chunk. A padding row chooses
    nothing.
    """
    require(chunk >= 1, "choose_chunks", "chunk", ">= 1", chunk)
    require(top >= 1, "choose_chunks", "top", ">= 1", top)
    score = rows.products(rows.q.float(), rows.pooled_keys(chunk))
    visible = rows.visible(1, chunk)
    return block_lists.topk_blocks(score, top, visible=visible, forced=rows.local(1, chunk))


def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, block: int, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Causal attention in which each row sees the keys of its own blocks only.

    Block by block: the rows that chose it are gathered and attend to it, and the partial results are merged
    by their log-sum-exps. Waits for the device, which alone knows how many rows that are.

    Args:
        q: ``[B, Hq, T, D]``, the last T of the S positions.
        k, v: ``[B, Hkv, S, D]`` and ``[B, Hkv, S, Dv]``.
        chosen: ``[B, H, T, ceil(S / block)]`` bool, H one of 1, Hkv and Hq.
        block: keys of a block.
        scale: default ``D ** -0.5``.

    Returns:
        ``(out, lse)``: ``[B, Hq, T, Dv]`` of the dtype of q, and ``[B, Hq, T]`` float32. A row that chose
        nothing it sees gets 0 and -inf.

    Raises:
        ValueError: a shape or dtype that is not as above.
    """
    op = "selected_attention"
    for name, t in (("q", q), ("k", k), ("v", v)):
        require_dims(op, name, t, "[B, H, N, D]")
    batch, heads, rows = q.shape[:3]
    keys = k.shape[2]
    shape = [[batch, h, rows, -(-keys // block)] for h in (1, k.shape[1], heads)]
    good = list(chosen.shape) in shape and chosen.dtype == torch.bool
    require(good, op, "chosen", f"bool of one of {shape}", f"{chosen.dtype} {list(chosen.shape)}")
    require(rows <= keys, op, "T", f"at most S={keys}", rows)
    position = torch.arange(keys - rows, keys, device=q.device)
    out = q.new_zeros(batch, heads, rows, v.shape[3], dtype=torch.float32)
    lse = torch.full((batch, heads, rows), -torch.inf, device=q.device)
    group = heads // chosen.shape[1]
    for begin in range(0, keys, block):
        own = slice(begin, min(begin + block, keys))
        takes = chosen[..., begin // block] & (position >= begin)
        part, part_lse, row = _of_block(
            q, k[:, :, own], v[:, :, own], takes.repeat_interleave(group, 1), position - begin, scale
        )
        if part.shape[2] == 0:
            continue
        wide = row[..., None].expand_as(part)
        before = out.gather(2, wide), lse.gather(2, row)
        merged = merge(before, (part, part_lse))
        out.scatter_(2, wide, merged[0])
        lse.scatter_(2, row, merged[1])
    return out.to(q.dtype), lse


def _of_block(
    q: Tensor, k: Tensor, v: Tensor, takes: Tensor, position: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, lse and numbers ``[B, Hq, n]`` of rows that hold all of ``takes`` ``[B, Hq, T]``.

    The n rows of each head are distinct; those that do not take the block see nothing of it.
    """
    batch, heads = takes.shape[:2]
    width = int(takes.sum(2).max()) if takes.numel() else 0
    row = (~takes).to(torch.int8).argsort(dim=2, stable=True)[..., :width]
    some = q.gather(2, row[..., None].expand(-1, -1, -1, q.shape[3]))
    at = torch.where(takes.gather(2, row), position[row], -1).clamp(max=k.shape[2] - 1)
    # Positions are of a row of the batch: each query head is one here.
    group = heads // k.shape[1]
    flat = [x[:, :, None].expand(-1, -1, group, -1, -1).flatten(0, 2)[:, None] for x in (k, v)]
    out, lse = ops.flash_prefill(
        some.flatten(0, 1)[:, None], *flat, scale=scale, q_position=at.flatten(0, 1).int()
    )
    return out.float().view(batch, heads, width, v.shape[3]), lse.view(batch, heads, width), row


def merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two partial results ``(out [..., D], lse [...])`` as one; ``ops.merge_states`` of them."""
    out, lse = ops.merge_states(torch.stack([one[0], other[0]]), torch.stack([one[1], other[1]]))
    return out, lse


def chunk_attention(
    q: Tensor, k: Tensor, v: Tensor, *, chunk: int = 2048, top: int = 3, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """MoBA: causal attention to the ``top`` chunks of largest ``<q, mean key>``, the own chunk included.

    Arguments, results and errors as in ``selected_attention``.
    """
    chosen = choose_chunks(last_rows(q, k, scale), chunk, top)
    return selected_attention(q, k, v, chosen, chunk, scale=scale)


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    *,
    block: int = 64,
    top: int = 16,
    window: int = 512,
    compressed: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
) -> Tensor:
    """NSA: compressed, selected and windowed attention, added up with given gates.

    ``out = sum_c gates_c out_c``. Compressed: one softmax over the block keys that lie wholly before or at a
    row. Selected: the ``top`` blocks of largest compressed probability, summed over the group of a kv head;
    the own block counts 1 for each head, and it, the one before and the first are always among them.
    Windowed: the last ``window`` keys. Block keys and values are means, as in FLA; the paper learns a map,
    over blocks of 32 at stride 16; what one learned can be given where it has one row a block.

    Args:
        q, k, v: as in ``selected_attention``.
        gates: ``[B, Hq, T, 3]``: of the compressed, the selected and the windowed branch.
        block: keys of a block.
        top: blocks of a row, >= 1.
        window: keys, >= 1.
        compressed: keys ``[B, Hkv, S // block, D]`` and values; default: means of whole blocks.
        scale: default ``D ** -0.5``.

    Returns:
        ``[B, Hq, T, Dv]`` of the dtype of q.

    Raises:
        ValueError: a shape or number that is not as above.
    """
    op = "block_attention"
    want = [*q.shape[:3], 3]
    require(list(gates.shape) == want, op, "gates", f"of shape {want}", list(gates.shape))
    require(block >= 1, op, "block", ">= 1", block)
    rows, keys = q.shape[2], k.shape[2]
    whole = keys // block
    if compressed is None:
        pooled = (block_lists.block_pool(x[:, :, : whole * block], block).to(q.dtype) for x in (k, v))
        compressed = (*pooled,)  # type: ignore[assignment]
    assert compressed is not None
    require(compressed[0].shape[2] == whole, op, "compressed", f"of {whole} blocks", compressed[0].shape[2])
    at = torch.arange(keys - rows, keys, device=q.device)
    seen = torch.div(at + 1, block, rounding_mode="floor") - 1  # the last whole block up to a row
    coarse = ops.flash_prefill(q, *compressed, scale=scale, q_position=seen)
    chosen = _important(q, compressed[0], coarse[1], at, block, top, scale)
    fine, _ = selected_attention(q, k, v, chosen, block, scale=scale)
    near, _ = ops.flash_prefill(q, k, v, scale=scale, window=window)
    branches = torch.stack([coarse[0].float(), fine.float(), near.float()], -1)
    return (branches * gates[..., None, :].float()).sum(-1).to(q.dtype)


def _important(
    q: Tensor, k: Tensor, lse: Tensor, at: Tensor, block: int, top: int, scale: float | None
) -> Tensor:
    """``[B, Hkv, T, blocks]`` bool: the blocks that each row selects, for its kv head."""
    blocks = torch.div(at[-1], block, rounding_mode="floor") + 1 if len(at) else 0
    found = []
    own = torch.div(at, block, rounding_mode="floor")
    for part in _pieces(q.shape[2]):
        number = torch.arange(int(blocks), device=q.device)
        mine = own[part, None]
        z = q[:, :, part].float().unflatten(1, (k.shape[1], -1)) @ k[:, :, None].float().mT
        z = z * (q.shape[3] ** -0.5 if scale is None else scale)
        z = z - lse[:, :, part].unflatten(1, (k.shape[1], -1))[..., None]
        z = functional.pad(z, (0, len(number) - k.shape[2]), value=-torch.inf)
        past = (number + 1) * block <= at[part, None] + 1
        p = torch.where(past, z, -torch.inf).exp()
        score = torch.where(number == mine, 1.0, p).sum(2)
        forced = (number <= mine) & ((number >= mine - 1) | (number == 0))
        found.append(block_lists.topk_blocks(score, top, visible=number <= mine, forced=forced))
    shape = (q.shape[0], k.shape[1], 0, int(blocks))
    return torch.cat(found, 2) if found else q.new_zeros(shape, dtype=torch.bool)


def _pieces(rows: int, size: int = 1024) -> Iterator[slice]:
    return (slice(begin, min(begin + size, rows)) for begin in range(0, rows, size))
