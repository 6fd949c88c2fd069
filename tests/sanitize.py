"""A few small calls on the GPU, every kernel at least once, to be run under compute-sanitizer (see
bench/gpu_check.sh). ``python tests/sanitize.py cpu`` makes the same calls on the CPU.
"""

import sys

import tokencomp
import torch
from tokencomp import ops

DTYPES = (torch.float32, torch.bfloat16)


def main(device: str = "cuda") -> None:
    torch.manual_seed(0)
    for dtype in DTYPES:
        select(device, dtype)
        keep(device, dtype)
        merge(device, dtype)
        score(device, dtype)
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
    order = torch.stack([torch.randperm(197, device=device) for _ in range(2)])
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
        state = torch.zeros(2, 2, keys, device=device)
        ops.decay_score_(state, scores, total, gamma=0.9)
        assert state.isfinite().all()


if __name__ == "__main__":
    main(*sys.argv[1:])
