"""A few small selections on the GPU, one per kernel plan, to be run under compute-sanitizer (see
bench/gpu_check.sh).
"""

import tokencomp
import torch
from tokencomp.ops import kcenter_greedy, topk_budget, topk_select, topp_select


def main() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for shape, k in (((1, 97, 64), 11), ((3, 130, 72), 40), ((1, 600, 128), 5)):
            x = torch.randn(shape, device="cuda").to(dtype)
            for first in ("largest_nn", "index0", "centroid"):
                index, _ = kcenter_greedy(x, k, first=first)
                assert int(index.min()) >= 0
        for rows, slots in ((5, 1000), (2, 20000), (1, 300000)):
            score = torch.rand(rows, slots, device="cuda").to(dtype)
            assert int(topk_select(score, slots // 8, head=4, tail=16)[1].min()) == slots // 8
            assert int(topp_select(score, 0.5, slots)[1].min()) > 0
            assert int(topk_budget(score[None], slots).sum()) == slots
    torch.cuda.synchronize()
    print("tokencomp", tokencomp.__version__, "done")


if __name__ == "__main__":
    main()
