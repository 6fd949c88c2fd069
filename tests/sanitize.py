"""A few small calls on the GPU, every kernel at least once, to be run under compute-sanitizer (see
bench/gpu_check.sh). ``python tests/sanitize.py cpu`` makes the same calls on the CPU.
"""

import sys

import tokencomp
import torch
from tokencomp import block_lists, ops
from tokencomp.ops.kvquant_pages import PageFormat
from tokencomp.ops.page_pools import PagePools

DTYPES = (torch.float32, torch.bfloat16)


def main(device: str = "cuda") -> None:
    torch.manual_seed(0)
    for dtype in DTYPES:
        select(device, dtype)
        keep(device, dtype)
        merge(device, dtype)
        score(device, dtype)
        decode(device, dtype)
        quantize(device, dtype)
        cache(device, dtype)
        prefill(device, dtype)
        linear(device, dtype)
    if device == "cuda":
        torch.cuda.synchronize()
    print("tokencomp", tokencomp.__version__, "done")


def select(device: str, dtype: torch.dtype) -> None:
    for shape, k in (((1, 97, 64), 11), ((3, 130, 72), 40), ((1, 600, 128), 5)):
        x = torch.randn(shape, device=device).to(dtype)
        for first in ("largest_nn", "index0", "centroid"):
            index, _ = ops.kcenter_greedy(x, k, first=first)
            assert int(index.min()) >= 0


def keep(device: str, dtype: torch.dtype) -> None:
    for rows, slots in ((5, 1000), (2, 20000), (1, 300000)):
        scores = torch.rand(rows, slots, device=device).to(dtype)
        assert int(ops.topk_select(scores, slots // 8, head=4, tail=16)[1].min()) == slots // 8
        assert int(ops.topp_select(scores, 0.5, slots)[1].min()) > 0
        assert int(ops.topk_budget(scores[None], slots).sum()) == slots


def merge(device: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 197, 96, device=device).to(dtype)
    for top in (1, 5):
        value, index = ops.cosine_match(x[:, 0::2], x[:, 1::2], protect_a=1, top=top)
    value, index = ops.cosine_match(x[:, 0::2], x[:, 1::2], protect_a=1)
    token_map = ops.bipartite_map(value, index, 16, 197)
    for mode in ("mean", "sum", "amax", "drop", "mlerp"):
        _, size = ops.merge_tokens(x, token_map, 181, mode=mode)
        assert mode == "drop" or float(size.sum()) == 2 * 197
    assert torch.equal(ops.bipartite_merge(x, x, 16)[2], token_map)
    order = torch.stack([torch.randperm(197, device=device) for _ in range(2)])
    ops.cosine_match(x, x, exclude_self=True)
    ops.cosine_match(x, x, a_index=order[:, :50], b_index=order[:, 50:130])
    for kind in ("elu", "paper", "gauss"):
        assert ops.energy_score(x, 0.5, kind=kind).isfinite().all()


def score(device: str, dtype: torch.dtype) -> None:
    for rows, keys, dim in ((70, 130, 64), (3, 300, 128), (65, 65, 80)):
        q = torch.randn(2, 8, rows, dim, device=device).to(dtype)
        k = torch.randn(2, 2, keys, dim, device=device).to(dtype)
        lse = ops.attention_lse(q, k)
        for how in ("sum", "max"):
            received = ops.column_score(q, k, lse, rows=how)
            assert received.isfinite().all()
        assert ops.diagonal_score(q, k, lse).isfinite().all()
        scores, total = ops.qk_scores(q[:, :, -1], k)
        assert ops.head_vote(scores, total, groups=2).isfinite().all()
        table = torch.arange(20, device=device).view(2, 2, 5)
        paged, _ = ops.qk_scores(q[:, :, -1], k.new_ones(20, 1, 16, dim), block_table=table)
        assert paged.isfinite().all()
        state = torch.zeros(2, 2, keys, device=device)
        ops.decay_score_(state, scores, total, gamma=0.9)
        assert state.isfinite().all()


def decode(device: str, dtype: torch.dtype) -> None:
    for rows, dim in ((1, 64), (3, 96), (1, 128), (2, 250), (8, 256)):
        k, v = (torch.randn(40, 1, 16, dim, device=device).to(dtype) for _ in range(2))
        table = torch.randperm(40, device=device).view(2, 2, 10).int()
        lengths = torch.tensor([[160, 33], [7, 0]], device=device).int()
        q = torch.randn(2, 8, rows, dim, device=device).to(dtype)
        index = torch.arange(0, 160, 3, device=device).expand(2, 2, -1)
        for options in ({}, {"window": 20}, {"index": index, "logits_out": True}):
            out, lse, _ = ops.paged_decode(q, k, v, table, lengths, **options)
            assert out.isfinite().all()
        ops.merge_states(torch.stack([out, out]), torch.stack([lse, lse]))
    decode_types(device, dtype)


def decode_types(device: str, dtype: torch.dtype) -> None:
    """Working pages and two pools in one table; the last page of each row is partly filled."""
    layout = "linear" if device == "cpu" else "mma16"
    for dim, page in ((64, 16), (128, 32), (256, 64)):
        formats = (PageFormat("int4", "int2", page, dim, layout=layout),
                   PageFormat("fp8", "int8", page, dim, "token", "channel", layout=layout))  # fmt: skip
        k, v = (torch.randn(1, 2, 4 * page, dim, device=device).to(dtype) for _ in range(2))
        pools, everything = [], torch.arange(4 * page, device=device).view(4, page).repeat(2, 1)
        for form in formats:
            pools.append(torch.zeros(8, form.page_bytes, dtype=torch.uint8, device=device))
            sequence, number = (
                torch.arange(2, device=device).repeat_interleave(4),
                torch.arange(8, device=device),
            )
            ops.kv_page_write_(pools[-1], k, v, sequence, everything, number, form)
        table = torch.tensor(
            [[[1 << 28, 2 << 28 | 1, -1, 2], [5, 1 << 28 | 5, 2 << 28 | 6, 7]]], device=device
        )
        working = [x.view(8, 1, page, dim) for x in (k, v)]
        lengths = torch.tensor([[4 * page, 3 * page + 1]], device=device).int()
        q = torch.randn(1, 8, 2, dim, device=device).to(dtype)
        quantized = PagePools(tuple(pools), formats)
        out, _, _ = ops.paged_decode(q, *working, table.int(), lengths, quantized=quantized)
        assert out.isfinite().all()


def quantize(device: str, dtype: torch.dtype) -> None:
    page = PageFormat("int4", "int2", 32, 128, layout="mma16")
    for tokens, dim, layout in ((37, 96, "linear"), (64, 128, "mma16_k"), (48, 64, "mma16_v")):
        x = torch.randn(2, 3, tokens, dim, device=device).to(dtype)
        for bits in (2, 3, 4, 8):
            for axis in ("token", "channel"):
                codes, params = ops.kv_quantize(
                    x, bits, axis=axis, group=-1 if layout == "linear" else 16, layout=layout
                )
                assert params.isfinite().all()
        if layout != "linear":
            assert torch.equal(
                ops.kv_repack(ops.kv_repack(codes, 8, layout, "linear"), 8, "linear", layout), codes
            )
            assert ops.hadamard(x).isfinite().all()
        back = ops.kv_dequantize(
            codes, params, 8, axis=axis, group=-1 if layout == "linear" else 16, layout=layout
        )
        assert float((back - x.float()).abs().max()) < 0.1
        assert ops.channel_stats(x).mean.isfinite().all()
    k = torch.randn(1, 2, 40, 128, device=device).to(dtype)
    pool = torch.zeros(4, page.page_bytes, dtype=torch.uint8, device=device)
    index = torch.arange(32, device=device).repeat(2, 1)
    where = torch.arange(2, device=device)
    ops.kv_page_write_(pool, k, k, where, index, where + 1, page)
    held = torch.randn(4, 1, 32, 128, device=device).to(dtype)
    table = torch.arange(4, dtype=torch.int32, device=device).view(1, 2, 2)
    demoted = torch.zeros_like(pool)
    ops.kv_retier_(demoted, held, held, table, where, index + 5, where + 1, page)
    assert (
        float((ops.kv_page_read(demoted, where[1:], page)[0] - held[:2, 0].flatten(0, 1)[5:37]).abs().max())
        < 1
    )
    keys, _ = ops.kv_page_read(pool, where + 1, page)
    assert float((keys - k[0, :, :32].float()).abs().max()) < 1


def cache(device: str, dtype: torch.dtype) -> None:
    """Appended, turned, merged, compacted, read; the second store's rows are no multiple of 16 bytes."""
    for tokens, dim, page in ((150, 64, 32), (90, 33, 16)):
        places = -(-tokens // page)
        k_pages, v_pages = (torch.zeros(8 * places, 1, page, dim, device=device).to(dtype) for _ in range(2))
        table = torch.randperm(8 * places, device=device).int().view(2, 4, places)
        empty = torch.zeros(2, 4, dtype=torch.int32, device=device)
        x = torch.randn(2, 4, tokens, dim, device=device).to(dtype)
        ops.kv_append_(k_pages, v_pages, x, x, table, empty)
        lengths = empty + tokens
        position = torch.arange(tokens, dtype=torch.int32, device=device).repeat(2, 4, 1)
        rate = 0.5 ** torch.arange(dim // 2, device=device)
        for layout in ("half", "interleaved"):
            ops.rope_shift_(k_pages, table, lengths, position, position // 2, rate, layout=layout)
        keep, member = position[..., ::2].contiguous(), position[..., 1::2].contiguous()
        count, weight = empty + keep.shape[2], torch.rand(member.shape, device=device)
        rows = (k_pages, v_pages, table, lengths)
        target, near = ops.evict_assign(*rows, keep, count, member, similarity="kv")
        assert int(target.min()) >= 0
        center = torch.ones(keep.shape, device=device)
        ops.evict_merge_(*rows, keep, count, member, target, weight, center, keys="direction", by_norm=True)
        for order in ("stable", "holefill"):
            ops.kv_compact_(*rows, keep, count, order=order)
        k, v = ops.kv_gather(k_pages, v_pages, table, count, size=tokens)
        assert bool(k.isfinite().all() and v.isfinite().all() and near.isfinite().all())


def prefill(device: str, dtype: torch.dtype) -> None:
    for rows, keys, dim in ((70, 130, 64), (200, 300, 128), (65, 65, 80), (130, 190, 192), (70, 90, 256)):
        q = torch.randn(2, 4, rows, dim, device=device).to(dtype)
        k, v = (torch.randn(2, 2, keys, dim, device=device).to(dtype) for _ in range(2))
        assert ops.flash_prefill(q, k, v)[0].isfinite().all()
        columns = torch.tensor([[[0, 7, 60]] * 2] * 2, device=device)
        slashes = torch.tensor([[[0, 66]] * 2] * 2, device=device)
        for block in (64, 128):
            lists = block_lists.vertical_slash_index(columns, slashes, rows, keys, block_q=block)
            assert ops.flash_prefill(q, k, v, **lists.arguments())[1].isfinite().all()
    for dim in (64, 128, 256):
        prefill_pages(device, dtype, dim)


def prefill_pages(device: str, dtype: torch.dtype, dim: int) -> None:
    """Rows over four pages a head, of three types in turn."""
    layout = "mma16" if device == "cuda" else "linear"
    formats = tuple(
        PageFormat(*tiers, 16, dim, layout=layout) for tiers in (("int4", "int2"), ("fp8", "int3"))
    )
    k = torch.randn(1, 2, 64, dim, device=device).to(dtype)
    number, index = torch.arange(8, device=device), torch.arange(64, device=device).view(4, 16).repeat(2, 1)
    pools = tuple(torch.zeros(8, page.page_bytes, dtype=torch.uint8, device=device) for page in formats)
    for pool, page in zip(pools, formats, strict=True):
        ops.kv_page_write_(pool, k, k, number // 4, index, number, page)
    table = ((number % 3 << 28) + number).view(1, 2, 4)
    pages = {"block_table": table, "quantized": PagePools(pools, formats)}
    q, working = torch.randn(1, 4, 70, dim, device=device).to(dtype), k.view(8, 1, 16, dim)
    for rows in (20, 70):
        assert ops.flash_prefill(q[:, :, :rows], working, working, **pages)[0].isfinite().all()
    assert ops.qk_scores(q[:, :, 0], working, **pages)[0].isfinite().all()


def linear(device: str, dtype: torch.dtype) -> None:
    for rows, dim in ((70, 64), (1, 80), (33, 128), (130, 256)):
        q = torch.randn(2, 4, rows, dim, device=device).to(dtype)
        k = torch.randn(2, 2, rows, dim, device=device).to(dtype)
        slope = torch.arange(4, device=device) * 0.1
        state = ops.decay_linear_attention(q, k, k, slope)[1]
        out, _ = ops.decay_linear_attention(q, k, k[..., : dim // 2 + 3], slope)
        assert bool(out.isfinite().all() and state.isfinite().all())


if __name__ == "__main__":
    main(*sys.argv[1:])
