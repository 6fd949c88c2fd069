"""vid-TLDR: its saliency, its weighted merge, and the traps."""

from dataclasses import replace

import torch
from method_cases import random_view, run, small_view
from tokencomp.methods import VidTLDR, vidtldr


def test_saliency_by_hand() -> None:
    """Min-max (0, .75, 1) has mean .5833, which leaves (0, .4, 1); what is not above the mean is 0."""
    entropy = torch.tensor([[-3.0, -2.0, -1.0], [-3.0, -1.5, -1.0]])
    g = vidtldr.saliency(entropy)
    torch.testing.assert_close(g, torch.tensor([[0.0, 0, 1], [0, 0.4, 1]]))


def test_saliency_of_equals_is_one_and_never_nan() -> None:
    entropy = torch.full((2, 4), -1.25)
    assert vidtldr.saliency(entropy).tolist() == [[1.0] * 4] * 2
    assert vidtldr.saliency(entropy, prefix=1).tolist() == [[0.0, 1, 1, 1]] * 2
    mask = torch.tensor([[True] * 3 + [False], [False] * 4])
    assert vidtldr.saliency(entropy, mask=mask).tolist() == [[1.0, 1, 1, 0], [0.0] * 4]


def test_saliency_does_not_look_at_prefix_and_padding() -> None:
    entropy = torch.randn(2, 6)
    mask = torch.tensor([[True] * 5 + [False]] * 2)
    wild = entropy.clone()
    wild[:, 0], wild[:, 5] = 99, -99
    first, second = (vidtldr.saliency(e, 1, mask) for e in (entropy, wild))
    assert torch.equal(first, second)
    torch.testing.assert_close(first[:, 1:5], vidtldr.saliency(entropy[:, 1:5]))


def test_weighted_merge_of_the_small_view() -> None:
    """Token 2 goes into 3 with its saliency: x, size and the order [CLS, even ones left, odd ones]."""
    rows = small_view().q[0, 0].exp()[1:]
    entropy = torch.special.xlogy(rows, rows).sum(-1)
    scaled = (entropy - entropy.min()) / (entropy.max() - entropy.min())
    g = float((scaled[1] - scaled.mean()) / (1 - scaled.mean()))
    assert 0.3 < g < 0.5
    out = run(VidTLDR(r=1), small_view())
    assert out.token_map.tolist() == [[0, 2, 3, 3, 1]]
    torch.testing.assert_close(out.x[0, :, 0], torch.tensor([9.0, 4, 1, (3 + 2 * g) / (1 + g)]))
    torch.testing.assert_close(out.size, torch.tensor([[1.0, 1, 1, 1 + g]]))


def test_background_leaves_no_trace_and_order_is_that_of_the_code() -> None:
    """Sources of saliency 0 do not move their target; without prefix: even tokens left, then odd ones."""
    view = random_view(image=12, prefix=0)
    out = vidtldr.merge(view, torch.zeros(3, 12), 4)
    assert torch.equal(out.size, torch.ones(3, 8))
    for b in range(3):
        row = out.token_map[b].tolist()
        assert row[1::2] == [2, 3, 4, 5, 6, 7]
        left = [t for t in range(0, 12, 2) if row[t] < 2]
        assert [row[t] for t in left] == [0, 1]
        assert torch.equal(out.x[b], view.x[b, [*left, 1, 3, 5, 7, 9, 11]])
    full = vidtldr.merge(view, torch.ones(3, 12), 4)
    assert torch.equal(full.size.sum(1), torch.full((3,), 12.0))


def test_shares_and_caps() -> None:
    """int(T r) of all tokens, at most half of the image tokens."""
    view = random_view(image=36)
    assert run(VidTLDR(r=0.2), view).x.shape[1] == 37 - 7
    assert run(VidTLDR(r=600), view).x.shape[1] == 37 - 18
    assert run(VidTLDR(), replace(view, layer=3)) is None
