"""Embeddings of images and videos to keep masks, as serving engines ask for them."""

import pytest
import torch
from tokencomp import integrations, methods, reference
from torch import Tensor

FROM_EMBEDDINGS = ("todre", "divprune", "lexrank", "cdpruner")


def items(*sizes: int, channels: int = 24, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(sum(sizes))
    return [torch.randn(n, channels, generator=g).to(dtype) for n in sizes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_masks_are_the_greedy_picks_of_the_reference(dtype: torch.dtype) -> None:
    x = items(49, 1, 100, 49, dtype=dtype)
    masks = integrations.visual_keep_masks(x, "divprune", keep=0.25)
    for mask, one in zip(masks, x, strict=True):
        count = max(1, round(0.25 * len(one)))
        picks, _ = reference.kcenter_greedy(one[None].double(), count, first="largest_nn")
        assert mask.dtype == torch.bool
        assert mask.nonzero()[:, 0].tolist() == sorted(picks[0].tolist())


@pytest.mark.parametrize("name", FROM_EMBEDDINGS)
def test_an_item_depends_on_itself_alone(name: str) -> None:
    x = items(36, 64, 36, 0, 7)
    together = integrations.visual_keep_masks(x, name, keep=0.3)
    for mask, one in zip(together, x, strict=True):
        alone = integrations.visual_keep_masks([one], name, keep=0.3)[0]
        assert mask.shape == (len(one),)
        assert torch.equal(mask, alone)
    counts = [int(mask.sum()) for mask in together]
    assert counts == [max(1, round(0.3 * len(one))) if len(one) else 0 for one in x]


def test_frames_of_a_video_share_its_budget() -> None:
    x = items(4 * 9, 9)
    mask, single = integrations.visual_keep_masks(x, methods.DivPrune(keep=10), frames=[4, 1])
    assert int(mask.sum()) == 10
    assert int(single.sum()) == 9
    assert torch.equal(mask, integrations.visual_keep_masks(x[:1], methods.DivPrune(keep=10))[0])


def test_strides_do_not_matter() -> None:
    x = items(60)[0]
    wide = torch.randn(60, 48)
    wide[:, ::2] = x
    turned = x.T.contiguous().T
    for other in (wide[:, ::2], turned):
        assert not other.is_contiguous()
        masks = integrations.visual_keep_masks([other, x], "todre")
        assert torch.equal(*masks)


def test_attention_of_cls_is_taken_where_it_is_given() -> None:
    x = items(16, 25)
    cls = [torch.rand(1, 16), torch.rand(1, 25)]
    masks = integrations.visual_keep_masks(x, "fastervlm", keep=4, encoder={"cls": cls})
    for mask, score in zip(masks, cls, strict=True):
        assert sorted(score[0].topk(4).indices.tolist()) == mask.nonzero()[:, 0].tolist()
    pivot = integrations.visual_keep_masks(x, methods.ToDRE(keep=1), encoder={"cls": cls})
    assert [int(mask.nonzero()) for mask in pivot] == [int(score.argmax()) for score in cls]


def test_text_is_read_where_it_is_given() -> None:
    x, words = items(30, 12), items(5, 3)
    with_text = integrations.visual_keep_masks(x, "cdpruner", keep=6, text=words)
    one = integrations.visual_keep_masks(x[1:], "cdpruner", keep=6, text=words[1:])[0]
    assert torch.equal(with_text[1], one)
    without = integrations.visual_keep_masks(x, "cdpruner", keep=6)
    assert not all(torch.equal(a, b) for a, b in zip(with_text, without, strict=True))


def test_methods_that_merge_say_what_tokens_become() -> None:
    x = items(36, 20)
    encoder = {"cls": [torch.rand(1, 36), torch.rand(1, 20)]}
    encoder["keys"] = [torch.randn(1, 2, 36, 8), torch.randn(1, 2, 20, 8)]
    kept = integrations.visual_tokens(x, "visionzip", keep=12, encoder=encoder)
    for tokens, one in zip(kept, x, strict=True):
        assert tokens.x.shape == (int(tokens.mask.sum()), one.shape[1])
        assert not torch.equal(tokens.x, one[tokens.mask])
    with pytest.raises(ValueError, match=r"visual_keep_masks: method must keep tokens as they are.*merges"):
        integrations.visual_keep_masks(x, "visionzip", encoder=encoder)
    plain = integrations.visual_tokens(x, "divprune", keep=5)
    assert all(torch.equal(tokens.x, one[tokens.mask]) for tokens, one in zip(plain, x, strict=True))


def test_a_batch_is_a_list_of_items() -> None:
    batch = torch.stack(items(36, 36))
    masks = integrations.visual_keep_masks(batch, "todre")
    assert all(map(torch.equal, masks, integrations.visual_keep_masks(list(batch), "todre")))


def test_nothing_is_no_error() -> None:
    assert integrations.visual_keep_masks([], "todre") == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"method": "nosuch"}, r"method must be one of \[.*'todre'.*got 'nosuch'"),
        ({"method": "snapkv"}, r"method must be one of .*got 'snapkv'"),
        ({"method": methods.ToDRE(), "keep": 0.5}, "keep must be left out"),
        ({"method": "fastervlm"}, r"FasterVLM needs encoder=\{'cls': one tensor an item\}, got None"),
        (
            {"method": "hiprune", "grids": [(6, 6)], "encoder": {"columns": [torch.rand(1, 36)]}},
            "several encoder layers",
        ),
        (
            {"method": "prumerge", "encoder": {"keys": [torch.rand(1, 2, 36, 4)]}},
            "needs 'cls_query'.*tokencomp.compress",
        ),
        ({"frames": [5]}, r"frames\[0\] must be >= 1 and a divisor of n=36, got 5"),
        ({"frames": [1, 1]}, "frames must be a list with one entry for each of 1 items, got 2"),
        ({"grids": [(5, 7)]}, r"grids\[0\] must be rows and columns of 36 tokens, got \(5, 7\)"),
        (
            {"encoder": {"cls": [torch.rand(1, 35)]}},
            r"encoder\['cls'\]\[0\] must be of 1 frames and 36 tokens",
        ),
        ({"text": [torch.rand(3, 5)]}, r"text\[0\] must be \[T, C=24\], got \[3, 5\]"),
    ],
)
def test_errors_say_what_is_wrong(call: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        integrations.visual_keep_masks(items(36), **call)


def test_wrong_types_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"visual_keep_masks: method must be .*VisualMethod, got SnapKV"):
        integrations.visual_keep_masks(items(36), methods.SnapKV())
    with pytest.raises(TypeError, match=r"visual_tokens: embeddings must be .*Sequence.*, got 3"):
        integrations.visual_tokens(3)
    with pytest.raises(ValueError, match=r"embeddings\[1\] must be \[n, C=4\], got \[3, 5\]"):
        integrations.visual_keep_masks([torch.rand(2, 4), torch.rand(3, 5)])
