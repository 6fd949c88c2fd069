"""Methods between attention and MLP: what every one of them has to keep to, knobs, common parts."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from backends import Backend
from method_cases import LAYER_METHOD_CASES, TENSOR_METHOD_CASES, random_view, run, small_view, to
from tokencomp import ragged
from tokencomp.methods import GTP, Random, Stride, VidTLDR, ZeroTPrune, attention, pruning
from tokencomp.methods.layers import LayerMethod, LayerView
from tokencomp.reference import score as reference
from tokencomp.token_map import unmerge

METHODS: list[Any] = [
    GTP(drop=7),
    GTP(drop=7, graph="semantic", score="sum_mean"),
    GTP(drop=7, passing="none", score="cosine", proportional=False),
    GTP(drop=7, passing="mean", score="diagonal_mean", theta=0.7),
    GTP(drop=7, score="random"),
    ZeroTPrune(keep=0.6, layers=None, similar=0.5),
    ZeroTPrune(keep=0.6, layers=None, similar=0.0, init="uniform", damping=0.15),
    VidTLDR(r=8),
    VidTLDR(r=0.2, proportional=True),
    Random(keep=0.5, layers=None),
    Stride(keep=0.5, layers=None),
]
each_method = pytest.mark.parametrize("method", METHODS, ids=str)


@pytest.mark.parametrize(("method", "token_map"), LAYER_METHOD_CASES, ids=str)
def test_layer_case(backend: Backend, method: LayerMethod, token_map: list[int]) -> None:
    with backend.active():
        assert run(method, to(small_view(), backend.device)).token_map.tolist() == [token_map]


@pytest.mark.parametrize(
    ("method", "call", "result"), [pytest.param(*case, id=str(case[0])) for case in TENSOR_METHOD_CASES]
)
def test_tensor_case(backend: Backend, method: Any, call: Any, result: Any) -> None:
    with backend.active():
        assert call(method, backend.device).tolist() == result


@each_method
def test_protocol(method: Any) -> None:
    assert isinstance(method, LayerMethod)
    assert isinstance(method.proportional, bool)


@each_method
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("image", [36, 37])
def test_prefix_stays_and_the_map_is_whole(method: Any, prefix: int, image: int) -> None:
    """Prefix rows are bit-identical and in place; every row of the result has a token; dtypes and shapes."""
    if image == 37 and isinstance(method, GTP) and method.passing == "graph":
        method = replace(method, graph="semantic")
    view = random_view(image=image, prefix=prefix)
    out = run(method, view)
    rows = out.x.shape[1]
    assert prefix < rows < view.tokens
    assert out.x.dtype == view.x.dtype
    assert torch.equal(out.x[:, :prefix], view.x[:, :prefix])
    assert out.token_map.shape == (3, view.tokens)
    assert out.token_map.dtype == torch.int32
    assert torch.equal(out.token_map[:, :prefix], torch.arange(prefix, dtype=torch.int32).repeat(3, 1))
    for row in out.token_map.tolist():
        assert set(row) | {-1} == {-1, *range(rows)}
    if out.size is not None:
        assert out.size.shape == (3, rows)
        assert out.size.dtype == torch.float32
        assert torch.equal(out.size[:, :prefix], torch.ones(3, prefix))


@each_method
def test_runs_repeat_and_items_are_apart(method: Any) -> None:
    view, order = random_view(batch=4), torch.tensor([2, 0, 3, 1])
    first, again = run(method, view), run(method, view)
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.token_map, again.token_map)
    if isinstance(method, Random) or getattr(method, "score", "") == "random":
        return  # draws belong to places in the batch
    moved = run(method, permuted(view, order))
    torch.testing.assert_close(moved.x, first.x[order], rtol=1e-6, atol=1e-6)
    assert torch.equal(moved.token_map, first.token_map[order])


def permuted(view: LayerView, order: torch.Tensor) -> LayerView:
    return replace(view, x=view.x[order], q=view.q[order], k=view.k[order], source=view.source[order])


@each_method
@pytest.mark.parametrize("garbage", ["noise", "nan"])
def test_padding_goes_first_and_changes_nothing(method: Any, garbage: str) -> None:
    """All 4 padding tokens of 37 are gone, and what they held does not matter to the others."""
    view = random_view(image=36)
    mask = torch.ones(3, 37, dtype=torch.bool)
    mask[:, [3, 8, 20, 36]] = False
    noise = random_view(image=36, seed=9)
    if garbage == "nan":
        noise = replace(noise, **{name: getattr(noise, name) * float("nan") for name in ("x", "q", "k")})
    other = replace(
        view,
        x=torch.where(mask[..., None], view.x, noise.x),
        q=torch.where(mask[:, None, :, None], view.q, noise.q),
        k=torch.where(mask[:, None, :, None], view.k, noise.k),
    )
    if isinstance(method, GTP) and method.passing == "graph":
        method = replace(method, graph="spatial")  # begin knows no mask: padding may be a similar token
    first, second = (run(method, replace(v, mask=mask)) for v in (view, other))
    assert torch.equal(first.token_map, second.token_map)
    own, others = (unmerge(out.x, out.token_map)[mask] for out in (first, second))
    torch.testing.assert_close(own, others, rtol=1e-5, atol=1e-5)
    gone = first.token_map[~mask]
    if isinstance(method, VidTLDR):  # an odd token, as ToMe has it, never moves
        assert (gone.view(3, 4)[:, [1, 2, 3]] == -1).all()
    else:
        assert (gone == -1).all()


@each_method
def test_more_padding_than_is_dropped(method: Any) -> None:
    """Then padding fills the rows, and no real token goes."""
    if isinstance(method, VidTLDR):
        pytest.skip("odd tokens never move: real tokens may merge although there is padding")
    view = random_view(image=36)
    mask = torch.arange(37).expand(3, 37) < 5
    token_map = run(method, replace(view, mask=mask)).token_map
    assert torch.equal(token_map[:, :5], torch.arange(5, dtype=torch.int32).repeat(3, 1))


@each_method
def test_sizes_travel(method: Any) -> None:
    """Where sizes are tracked they come out tracked; a dropper hands on those of the tokens it keeps."""
    view = random_view()
    size = torch.rand(3, 37) * 5 + 1
    out = run(method, replace(view, size=size))
    assert out.size is not None
    if not isinstance(method, GTP | VidTLDR) or getattr(method, "passing", "") == "none":
        for b in range(3):
            kept = (out.token_map[b] >= 0).nonzero()[:, 0]
            assert torch.equal(out.size[b], size[b, kept])
            assert torch.equal(out.x[b], view.x[b, kept])


@each_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(method: Any, dtype: torch.dtype) -> None:
    view = random_view()
    half = replace(view, x=view.x.to(dtype), q=view.q.to(dtype), k=view.k.to(dtype))
    out = run(method, half)
    assert out.x.dtype == dtype
    assert out.x.isfinite().all()
    assert out.size is None or out.size.dtype == torch.float32


@pytest.mark.parametrize(
    "method",
    [
        GTP(drop=0),
        GTP(drop=[0, 0, 4]),
        GTP(drop=()),
        ZeroTPrune(keep=1.0),
        ZeroTPrune(layers=(0, 2)),
        VidTLDR(r=0),
        VidTLDR(r=(5,)),
        VidTLDR(r=0.01),
        Random(keep=1.0, layers=None),
        Random(keep=[0.5], layers=None),
        Random(keep=400, layers=None),
        Stride(layers=()),
    ],
    ids=str,
)
def test_nothing_to_drop_leaves_the_layer_alone(method: Any) -> None:
    """P = 0 keeps everything (a slice [:-0] would keep nothing); per-layer knobs are indexed by layer."""
    assert run(method, random_view()) is None


def test_per_layer_knobs_know_the_layer_not_the_call() -> None:
    """The same view twice gives the same: nothing is popped off a list."""
    method = GTP(drop=[0, 3, 5], passing="none")
    rows = [run(method, random_view(layer=layer)) for layer in (2, 1, 2, 0, 3)]
    assert [None if out is None else 37 - out.x.shape[1] for out in rows] == [5, 3, 5, None, None]
    assert [pruning.at((4, 7), layer, 0) for layer in range(3)] == [4, 7, 0]
    assert pruning.at(4, 9, 0) == 4


@pytest.mark.parametrize(
    "method", [GTP(drop=99), Random(keep=1, layers=None), ZeroTPrune(keep=1, layers=None)]
)
@pytest.mark.parametrize("prefix", [0, 1])
def test_one_image_token_always_stays(method: Any, prefix: int) -> None:
    assert run(method, random_view(prefix=prefix)).x.shape[1] == prefix + 1
    for image in (0, 1):
        view = random_view(image=image, prefix=prefix)
        assert view.tokens == 0 or run(method, view) is None


def test_order_puts_nan_last_but_before_padding() -> None:
    inf, nan = float("inf"), float("nan")
    score = torch.tensor([[-inf, 2.0, nan, inf, 2.0, -1.0, 7.0]])
    mask = torch.tensor([[True, True, True, True, True, True, False]])
    assert pruning.order(score, mask=mask).tolist() == [[3, 1, 4, 5, 0, 2, 6]]
    assert pruning.order(score, prefix=2, mask=mask).tolist() == [[0, 1, 3, 4, 5, 2, 6]]
    assert pruning.top(score, 2, prefix=1, mask=mask).tolist() == [[0, 1, 3]]


def test_stride_is_even_and_random_is_uniform() -> None:
    assert Stride(keep=4).select(torch.zeros(2, 10, 1)).tolist() == [[1, 3, 6, 8]] * 2
    assert Stride(keep=0.25).select(torch.zeros(1, 576, 1)).tolist() == [list(range(2, 576, 4))]
    hits = torch.zeros(20)
    for seed in range(200):
        hits += ragged.kept_mask(Random(keep=5, seed=seed).select(torch.zeros(8, 20, 1)), 20).sum(0)
    assert hits.sum() == 8000
    assert (hits - 400).abs().max() < 80  # 400 +- 17 expected
    draws = [Random(keep=5, seed=seed).select(torch.zeros(2, 20, 1)).tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert draws[0][0] != draws[0][1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Random(keep=0.0), r"Random: keep must be a ratio in \(0, 1\] or a count >= 1, got 0.0"),
        (lambda: Stride(keep=(0.5, -1)), "Stride: keep must be .*, got -1"),
        (lambda: ZeroTPrune(keep=2.5), "ZeroTPrune: keep must be .*, got 2.5"),
        (lambda: ZeroTPrune(similar=1.5), r"ZeroTPrune: similar must be in \[0, 1\], got 1.5"),
        (lambda: ZeroTPrune(init="one"), "ZeroTPrune: init must be cls or uniform, got 'one'"),
        (lambda: ZeroTPrune(damping=-1), r"ZeroTPrune: damping must be in \[0, 1\], got -1"),
        (lambda: VidTLDR(r=(3, 1.5)), r"VidTLDR: r must be a count >= 0 or a share in \[0, 1\), got 1.5"),
        (lambda: GTP(drop=(1, -1)), r"GTP: drop must not be negative, got \(1, -1\)"),
        (lambda: GTP(neighbours=33), r"GTP: neighbours must be in \[1, 32\], got 33"),
        (lambda: GTP(theta=0.0), r"GTP: theta must be in \(0, 1\], got 0.0"),
        (lambda: GTP(score="best"), "GTP: score must be one of .*, got 'best'"),
        (lambda: GTP(graph="none"), "GTP: graph must be one of .*, got 'none'"),
        (lambda: GTP(passing="all"), "GTP: passing must be one of .*, got 'all'"),
    ],
)
def test_bad_knobs(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sized", [False, True])
def test_attention_is_that_of_the_matrix(masked: bool, sized: bool) -> None:
    """Column sums, diagonal, rows, entropy and PageRank against the float64 matrix."""
    view = random_view(image=150)
    mask = torch.rand(3, 151) < 0.8 if masked else None
    size = torch.rand(3, 151) * 3 + 0.5 if sized else None
    view = replace(view, mask=mask, size=size)
    bias = torch.zeros(3, 151) if size is None else size.log()
    bias = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
    a = reference.attention_logits(view.q, view.k, scale=view.scale, key_bias=bias, causal=False).softmax(-1)
    voice = torch.ones(3, 1, 151) if mask is None else mask[:, None].float()
    graph = attention.of(view, proportional=sized)
    weight = torch.rand(3, 3, 151)

    def close(ours: torch.Tensor, exact: torch.Tensor) -> None:
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)

    close(graph.columns(), (a * voice[..., None]).sum(2))
    close(graph.columns(weight), (a * (voice * weight)[..., None]).sum(2))
    close(graph.diagonal(), a.diagonal(dim1=2, dim2=3))
    close(graph.row(0), a[:, :, 0])
    close(graph.probabilities(), a)
    mean = a.mean(1)
    close(graph.negative_entropy(), torch.special.xlogy(mean, mean).sum(-1))
    start = (voice / voice.sum(-1, keepdim=True)).expand(3, 3, 151)
    even, s = start.double(), start.double()
    for _ in range(5):
        s = 0.9 * (a.mT @ s[..., None])[..., 0] + 0.1 * even
    close(graph.pagerank(start, 5, 0.1), s)


def test_attention_among_survivors() -> None:
    view = random_view(mask=torch.arange(37).expand(3, 37) != 6)
    index = torch.tensor([[0, 3, 6, 20], [0, 1, 2, 3], [0, 5, 6, 36]], dtype=torch.int32)
    a = attention.of(view).subset(index).probabilities()
    for b, tokens in enumerate(index.tolist()):
        logits = (view.q[b, :, tokens] @ view.k[b, :, tokens].mT) * view.scale
        hidden = torch.tensor([token == 6 for token in tokens])
        exact = logits.masked_fill(hidden, float("-inf")).softmax(-1)
        torch.testing.assert_close(a[b], exact, rtol=1e-5, atol=1e-6)


def test_an_item_of_padding_alone_pays_no_attention() -> None:
    graph = attention.of(random_view(mask=torch.zeros(3, 37, dtype=torch.bool)))
    for quantity in (
        graph.columns(),
        graph.diagonal(),
        graph.row(0),
        graph.probabilities(),
        graph.negative_entropy(),
    ):
        assert (quantity == 0).all()
