"""The reference call of every CUDA kernel: shapes of real models, what each launch moves and multiplies.

The calls run on the emulator with TOKENCOMP_EMU_DRY, so tensors hold nothing and may be of any size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tokencomp import block_lists, ops
from tokencomp.ops.kvquant_pages import PageFormat, page_entry
from tokencomp.ops.page_pools import PagePools
from torch import Tensor

from gpu.model import Work

HQ, HKV, D = 32, 8, 128  # a layer of Llama-3.1-8B or Qwen3-8B
GROUP = HQ // HKV
S, PROMPT, WINDOW, PAGE, LISTED = 65536, 32768, 64, 64, 2048
HALF = torch.bfloat16


@dataclass(frozen=True)
class Call:
    """``run`` launches kernels; ``work`` by the kernel's plain name. Its other launches are not looked at."""

    name: str
    shape: str
    run: Callable[[], Any]
    work: dict[str, Work]


def empty(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(*shape, dtype=dtype)


def floats(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.float32)


def ints(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.int32)


def tables(tokens: int, kind: int = 0) -> tuple[Tensor, Tensor]:
    """A table of one sequence, and its lengths."""
    pages = torch.arange(HKV * tokens // PAGE, dtype=torch.int32).view(1, HKV, -1)
    return pages + page_entry(kind, 0), ints(1, HKV) + tokens


def decode() -> Iterator[Call]:
    q, (table, lengths) = empty(1, HQ, 1, D), tables(S)
    kv, flops = 4.0 * HKV * S * D, 4.0 * HQ * S * D
    pool, wide = empty(HKV * S // PAGE, 2, PAGE, D), floats(HKV * S // PAGE, 2, PAGE, D)
    shape = f"Hq={HQ} Hkv={HKV} D={D}, S={S}"
    yield Call(
        "paged_decode",
        f"{shape} bfloat16",
        lambda: ops.paged_decode(q, pool[:, :1], pool[:, 1:], table, lengths),
        {"decode_tiles": Work(kv, flops, "tensor", turns=HKV * S / 16)},
    )
    yield Call(
        "paged_decode, float32",
        f"{shape} float32, logits",
        lambda: ops.paged_decode(q.float(), wide[:, :1], wide[:, 1:], table, lengths, logits_out=True),
        {"decode_plain": Work(2 * kv, flops), "decode_hide": Work(4.0 * HQ * S)},
    )
    form = PageFormat("int4", "int4", PAGE, D, group_k=64, group_v=128, layout="mma16")
    packed = torch.empty(HKV * S // PAGE, form.page_bytes, dtype=torch.uint8)
    quantized = PagePools((packed,), (form,))
    names, size = tables(S, kind=1)[0], float(packed.numel())
    what = "keys by channel of 64, values by token; loop: the dearest type, 64 tokens"
    yield Call(
        "paged_decode, int4 pages",
        f"{shape}, {what}",
        lambda: ops.paged_decode(q, pool[:1, :1], pool[:1, 1:], names, lengths, quantized=quantized),
        {"decode_types": Work(size, flops, "tensor", turns=HKV * S / 64)},
    )
    parts = floats(8, 16, HQ, 1, D)
    yield Call(
        "merge_states",
        f"8 states of B=16 Hq={HQ} D={D}",
        lambda: ops.merge_states(parts, floats(8, 16, HQ, 1)),
        {"decode_merge": Work(4.0 * 9 * 16 * HQ * (D + 1), reads=4.0 * 8 * 16 * HQ * (D + 1))},
    )


def prefill() -> Iterator[Call]:
    q, k = empty(1, HQ, PROMPT, D), empty(1, HKV, PROMPT, D)
    moved = 2.0 * 2 * (HQ + HKV) * PROMPT * D
    flops = 2.0 * HQ * D * PROMPT * PROMPT
    shape = f"Hq={HQ} Hkv={HKV} D={D}"
    yield Call(
        "flash_prefill",
        f"{shape}, T=S={PROMPT} causal bfloat16",
        lambda: ops.flash_prefill(q, k, k),
        {"prefill_wgmma": Work(moved, flops, "tensor")},
    )
    columns = torch.arange(0, PROMPT, 64, dtype=torch.int32).expand(1, HQ, -1)
    slashes = torch.arange(0, 1024, 64, dtype=torch.int32).expand(1, HQ, -1)
    small = 8192
    lists = block_lists.vertical_slash_index(columns[..., :64], slashes, small, small, block_q=128)
    yield Call(
        "flash_prefill, lists",
        f"{shape}, T=S={small}, 64 columns and 16 slashes",
        lambda: ops.flash_prefill(q[:, :, :small], k[:, :, :small], k[:, :, :small], **lists.arguments()),
        {"prefill_order": Work(8.0 * HQ * small / 128)},
    )
    rows, (table, _) = 512, tables(PROMPT)
    pool = empty(HKV * PROMPT // PAGE, 2, PAGE, D)
    pairs = rows * (PROMPT - rows / 2)
    yield Call(
        "flash_prefill, pages",
        f"{shape}, T={rows}, S={PROMPT} in pages, bfloat16",
        lambda: ops.flash_prefill(q[:, :, :rows], pool[:, :1], pool[:, 1:], block_table=table),
        {"prefill_attend": Work(4.0 * (HKV * PROMPT + HQ * rows) * D, 4.0 * HQ * D * pairs, "tensor")},
    )


def score() -> Iterator[Call]:
    q, k, lse = empty(1, HQ, PROMPT, D), empty(1, HKV, PROMPT, D), floats(1, HQ, PROMPT)
    pairs = PROMPT * (PROMPT + 1) / 2
    shape, operands = f"Hq={HQ} Hkv={HKV} D={D}", 2.0 * (HQ + HKV) * PROMPT * D
    out = 4.0 * HQ * PROMPT
    yield Call(
        "column_score",
        f"{shape}, T=S={PROMPT} causal bfloat16",
        lambda: ops.column_score(q, k, lse, heads="kv_mean"),
        {
            "score_columns_wgmma": Work(operands + out, 2.0 * HQ * D * pairs, "tensor"),
            "score_rows": Work(2 * out, reads=out),
            "score_heads": Work(out * (1 + 1 / GROUP), reads=out),
        },
    )
    yield Call(
        "attention_lse",
        f"{shape}, T=S={PROMPT} causal bfloat16",
        lambda: ops.attention_lse(q, k),
        {"score_lse": Work(operands + out, 2.0 * HQ * D * pairs, "tensor")},
    )
    last, kv = q[:, :, -WINDOW:], 2.0 * HKV * PROMPT * D
    few, tall = 2.0 * HQ * D * WINDOW * PROMPT, lse[:, :, -WINDOW:]
    yield Call(
        "column_score, window",
        f"{shape}, T={WINDOW}, S={PROMPT} bfloat16",
        lambda: ops.column_score(last, k, tall),
        {"score_columns": Work(kv + out, few, "tensor")},
    )
    yield Call(
        "diagonal_score",
        f"{shape}, T={WINDOW}, S={PROMPT} bfloat16",
        lambda: ops.diagonal_score(last, k, tall),
        {"score_diagonals": Work(kv + out, few, "tensor")},
    )
    one, logits = empty(1, HQ, D), floats(1, HQ, S)
    keys = empty(1, HKV, S, D)
    yield Call(
        "qk_scores",
        f"{shape}, S={S} bfloat16",
        lambda: ops.qk_scores(one, keys),
        {"score_merge": Work(4.0 * HQ * 256)},
    )
    yield Call(
        "head_vote",
        f"Hq={HQ}, S={S}, one group",
        lambda: ops.head_vote(logits, floats(1, HQ)),
        {"score_vote": Work(4.0 * (HQ + 1) * S, reads=4.0 * HQ * S)},
    )
    state = floats(1, HKV, S)
    yield Call(
        "decay_score_",
        f"Hq={HQ} Hkv={HKV}, S={S}",
        lambda: ops.decay_score_(state, logits, floats(1, HQ), gamma=0.99),
        {"score_decay": Work(4.0 * (HQ + 2 * HKV) * S, reads=4.0 * (HQ + HKV) * S)},
    )


def kcenter() -> Iterator[Call]:
    n, c, k = 2880, 1024, 288
    x = empty(1, n, c)
    yield Call(
        "kcenter_greedy",
        f"LLaVA-NeXT: N={n} C={c} k={k} bfloat16",
        lambda: ops.kcenter_greedy(x, k),
        {"kcenter_gram": Work(2.0 * n * c, 2.0 * c * n * n / 2, "tensor")},
    )
    many, wide = 32768, 3584
    long = empty(1, many, wide)
    yield Call(
        "kcenter_greedy, video",
        f"N={many} C={wide} k=1024, first=index0, bfloat16",
        lambda: ops.kcenter_greedy(long, 1024, first="index0"),
        {"kcenter_stream": Work(2.0 * many * wide * 1024, 2.0 * many * wide * 1024, "fp32")},
    )


def topk() -> Iterator[Call]:
    scores, rows, slots = floats(HKV, 131072), HKV, 131072
    size = 4.0 * rows * slots
    yield Call(
        "topk_select",
        f"{rows} rows of {slots}, k=2048",
        lambda: ops.topk_select(scores, 2048),
        {"topk_row": Work(size + 4.0 * rows * 2048)},
    )
    yield Call(
        "topk_budget",
        f"one budget for {rows} heads of {slots}",
        lambda: ops.topk_budget(scores[None], 2048 * rows),
        {"topk_budget_count": Work(size), "topk_budget_narrow": Work(4.0 * 256 * 128)},
    )


def merge() -> Iterator[Call]:
    b, n, c, d, r = 8, 577, 1024, 64, 16
    x, metric, size = empty(b, n, c), empty(b, n, d), floats(b, n)
    value, index = floats(b, 289), ints(b, 289)
    mapped = torch.arange(n, dtype=torch.int32).clamp(max=n - r - 1).expand(b, n).contiguous()
    shape = f"ViT-L/14: B={b} N={n} C={c}"
    half, rows = 2.0 * b * n * d, 2.0 * b * (2 * n - r) * c
    pairs = 2.0 * b * d * 289 * 288
    yield Call(
        "cosine_match",
        f"{shape} D={d}",
        lambda: ops.cosine_match(metric[:, 0::2], metric[:, 1::2]),
        {
            "merge_factors": Work(half),
            "merge_match": Work(half, pairs, "tensor"),
            "merge_match_finish": Work(8.0 * b * 289 * 2),
        },
    )
    yield Call(
        "cosine_match, top 5",
        f"{shape} D={d}",
        lambda: ops.cosine_match(metric[:, 0::2], metric[:, 1::2], top=5),
        {"merge_match_top": Work(half, pairs, "tensor")},
    )
    yield Call(
        "energy_score",
        f"{shape} D={d}",
        lambda: ops.energy_score(metric, 0.5),
        {"merge_energy": Work(half, 2.0 * b * n * n * d, "tensor"), "merge_energy_finish": Work(8.0 * b * n)},
    )
    yield Call(
        "bipartite_map",
        f"{shape} r={r}",
        lambda: ops.bipartite_map(value, index, r, n),
        {"merge_map": Work(12.0 * b * n)},
    )
    yield Call(
        "merge_tokens",
        f"{shape} r={r} bfloat16",
        lambda: ops.merge_tokens(x, mapped, n - r, size=size),
        {"merge_groups": Work(12.0 * b * n), "merge_rows": Work(rows, reads=2.0 * b * n * c)},
    )


def kvcache() -> Iterator[Call]:
    tokens = 32768
    table, lengths = tables(tokens)
    pool = empty(HKV * tokens // PAGE, 2, PAGE, D)
    rows = (pool[:, :1], pool[:, 1:], table, lengths)
    k, shape = empty(1, HKV, tokens, D), f"Hkv={HKV} D={D}, {tokens} tokens, bfloat16"
    both = 2.0 * 2 * 2 * HKV * tokens * D
    keep, count = torch.arange(0, tokens, 4).int().expand(1, HKV, -1).contiguous(), ints(1, HKV) + tokens // 4
    member = torch.arange(1, tokens, 4).int().expand(1, HKV, -1).contiguous()
    position, rate = torch.arange(tokens).int().expand(1, HKV, -1).contiguous(), floats(D // 2)
    target, weight, center = member // 4, torch.ones(member.shape), torch.ones(keep.shape)
    pairs = 2.0 * 2 * HKV * D * member.shape[2] * keep.shape[2]
    yield Call(
        "kv_append_",
        shape,
        lambda: ops.kv_append_(*rows[:2], k, k, table, ints(1, HKV)),
        {"append_slots": Work(both, reads=both / 2)},
    )
    yield Call(
        "kv_gather",
        shape,
        lambda: ops.kv_gather(*rows, size=tokens),
        {"gather_slots": Work(both, reads=both / 2)},
    )
    yield Call(
        "kv_compact_",
        f"{shape} to a quarter",
        lambda: ops.kv_compact_(*rows, keep, count),
        {"compact_slots": Work(both / 4, reads=both / 8)},
    )
    yield Call(
        "rope_shift_",
        shape,
        lambda: ops.rope_shift_(pool[:, :1], table, lengths, position, position // 2, rate),
        {"shift_keys": Work(both / 2, reads=both / 4)},
    )
    yield Call(
        "evict_assign",
        f"{shape}: a quarter to a quarter",
        lambda: ops.evict_assign(*rows, keep, count, member, similarity="kv"),
        {"inverse_norms": Work(both / 4), "assign_members": Work(both / 4, pairs, "tensor")},
    )
    yield Call(
        "evict_merge_",
        f"{shape}: a quarter into a quarter",
        lambda: ops.evict_merge_(
            *rows, keep, count, member, target, weight, center, keys="mean", by_norm=True
        ),
        {"weigh_members": Work(both / 8), "merge_members": Work(3 * both / 8, reads=both / 4)},
    )


def kvquant() -> Iterator[Call]:
    tokens = 65536
    x, shape = empty(1, HKV, tokens, D), f"Hkv={HKV} D={D}, {tokens} tokens, bfloat16"
    size = 2.0 * x.numel()
    codes = torch.empty(1, HKV, tokens, D // 2, dtype=torch.uint8)
    params = empty(1, HKV, tokens, 1, 2, dtype=torch.float16)
    yield Call(
        "kv_quantize",
        f"{shape}, int4 by token",
        lambda: ops.kv_quantize(x, 4, group=128),
        {"kv_quantize_tiles": Work(1.27 * size, reads=size)},
    )
    yield Call(
        "kv_dequantize",
        f"{shape}, int4 by token",
        lambda: ops.kv_dequantize(codes, params, 4, group=128, dtype=HALF),
        {"kv_dequantize_tiles": Work(1.27 * size, reads=0.27 * size)},
    )
    yield Call(
        "kv_repack",
        f"{shape}, int4, linear to mma16_k",
        lambda: ops.kv_repack(codes, 4, "linear", "mma16_k"),
        {"kv_repack_blocks": Work(size / 2, reads=size / 4)},
    )
    yield Call(
        "kv_repack, copy",
        f"{shape}, int4, linear to linear",
        lambda: ops.kv_repack(codes, 4, "linear", "linear"),
        {"kv_repack_copy": Work(size / 2, reads=size / 4)},
    )
    yield Call("hadamard", shape, lambda: ops.hadamard(x), {"hadamard_rows": Work(2 * size, reads=size)})
    yield Call(
        "channel_stats",
        shape,
        lambda: ops.channel_stats(x),
        {"channel_stat_parts": Work(size), "channel_stat_sequences": Work(16.0 * HKV * D * 128)},
    )


def linear() -> Iterator[Call]:
    heads, rows = 64, 8192
    q = empty(1, heads, rows, D)
    chunk = 64
    flops = 4.0 * heads * rows * D * (chunk + D)
    moved = 2.0 * 4 * q.numel()
    yield Call(
        "decay_linear_attention",
        f"MiniMax-Text-01: H={heads} T={rows} D={D} bfloat16",
        lambda: ops.decay_linear_attention(q, q, q, torch.zeros(heads)),
        {"linear_attend": Work(moved, flops, "fp32")},
    )


def every() -> dict[str, list[Call]]:
    """Reference calls by family."""
    families = (decode, prefill, score, kcenter, topk, merge, kvcache, kvquant, linear)
    return {family.__name__: list(family()) for family in families}
