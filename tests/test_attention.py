"""``scaled_dot_product_attention``: torch's output, and extras that follow from the whole matrix."""

import re
from typing import Any

import pytest
import tokencomp
import torch
from tokencomp import attention
from tokencomp.scores import forgetting_weights
from torch import Tensor
from torch.nn import functional

INF = float("inf")
WEIGHTS = {"none": None, "rows": (), "batch": (2,), "batch1": (2, 1), "heads": (2, 8)}


def qkv(rows: int, keys: int, dtype: torch.dtype = torch.float32, kv_heads: int = 2) -> list[Tensor]:
    shapes = ((8, rows, 8), (kv_heads, keys, 8), (kv_heads, keys, 12))
    return [torch.randn(2, *shape).mul(1.5).to(dtype) for shape in shapes]


def expected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, lse and probabilities in float64 from the whole matrix."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
    z = q.double() @ k.mT / q.shape[-1] ** 0.5
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = torch.where(seen, z + bias, -INF)
    if sinks is not None:
        z = torch.cat([z, sinks.double()[None, :, None, None].expand(*z.shape[:3], 1)], -1)
    p = z.softmax(-1).nan_to_num(0)[..., : k.shape[2]]
    return p @ v, z.logsumexp(-1), p


def causal(rows: int, keys: int, window: int | None = None) -> Tensor:
    """Rows are the last of the keys."""
    place = torch.arange(keys - rows, keys)[:, None]
    key = torch.arange(keys)
    return (key <= place) & (key > place - (keys + rows if window is None else window))


def check(result: Any, output: Tensor, lse: Tensor, columns: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(result.output.double(), output, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(result.lse.double(), lse, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(result.columns.double(), columns, atol=tolerance, rtol=tolerance)
    assert result.lse.dtype == result.columns.dtype == torch.float32


@pytest.mark.parametrize(("rows", "keys"), [(7, 7), (300, 300), (5, 20), (1, 20), (9, 5)])
@pytest.mark.parametrize("window", [None, 4])
def test_causal(rows: int, keys: int, window: int | None) -> None:
    q, k, v = qkv(rows, keys)
    result = tokencomp.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True, window=window, return_lse=True, return_columns=True
    )
    output, lse, p = expected(q, k, v, causal(rows, keys, window))
    check(result, output, lse, p.sum(2), 2e-5)


def test_causal_rows_are_the_last_keys_and_torch_says_the_first() -> None:
    q, k, v = qkv(3, 8, kv_heads=8)
    ours = tokencomp.scaled_dot_product_attention(q, k, v, is_causal=True)
    theirs = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(
        ours, functional.scaled_dot_product_attention(q, k, v, torch.ones(3, 8).tril(5).bool())
    )
    torch.testing.assert_close(
        theirs, functional.scaled_dot_product_attention(q, k, v, torch.ones(3, 8).tril(0).bool())
    )
    assert not torch.allclose(ours, theirs, atol=1e-2)
    square = (q, k[:, :, :3], v[:, :, :3])
    assert torch.equal(
        tokencomp.scaled_dot_product_attention(*square, is_causal=True, kernel="torch"),
        functional.scaled_dot_product_attention(*square, is_causal=True),
    )


@pytest.mark.parametrize("rows", [1, 6])
def test_not_causal_sees_all(rows: int) -> None:
    q, k, v = qkv(rows, 9)
    result = attention.attend(q, k, v, enable_gqa=True, return_lse=True, return_columns=True)
    output, lse, p = expected(q, k, v, torch.ones(rows, 9, dtype=torch.bool))
    check(result, output, lse, p.sum(2))


@pytest.mark.parametrize("kind", ["bool", "float", "2d", "row"])
@pytest.mark.parametrize("rows", [6, 130])
def test_any_mask(kind: str, rows: int) -> None:
    q, k, v = qkv(rows, 9)
    seen = torch.rand(2, 8, rows, 9) < 0.7
    seen[..., 0] = True
    seen = {"2d": seen[0, 0], "row": seen[:1, :1, :1]}.get(kind, seen)
    bias = torch.randn(seen.shape) if kind == "float" else torch.zeros(seen.shape)
    mask = bias.masked_fill(~seen, -INF) if kind == "float" else seen
    result = attention.attend(q, k, v, mask, enable_gqa=True, return_lse=True, return_columns=True)
    output, lse, p = expected(q, k, v, seen, bias=bias)
    check(result, output, lse, p.sum(2), 2e-5)


@pytest.mark.parametrize("padding", ["left", "right", "hole"])
@pytest.mark.parametrize("rows", [12, 4])
def test_padding_rows_add_nothing(padding: str, rows: int) -> None:
    q, k, v = qkv(rows, 12)
    real = torch.ones(2, 12, dtype=torch.bool)
    real[0, {"left": slice(0, 5), "right": slice(7, 12), "hole": slice(9, 11)}[padding]] = False
    result = attention.attend(
        q, k, v, is_causal=True, enable_gqa=True, key_mask=real, return_lse=True, return_columns=True
    )
    output, lse, p = expected(q, k, v, causal(rows, 12) & real[:, None, None])
    check(result, output, lse, (p * real[:, None, 12 - rows :, None]).sum(2))
    assert (result.columns[0, :, ~real[0]] == 0).all()


def test_an_arbitrary_mask_gives_what_the_operators_give() -> None:
    q, k, v = qkv(12, 12)
    real = torch.ones(2, 12, dtype=torch.bool)
    real[0, 7:] = False
    options: Any = dict(enable_gqa=True, return_lse=True, return_columns=True)
    ours = attention.attend(q, k, v, is_causal=True, key_mask=real, **options)
    mask = causal(12, 12) & real[:, None, None]
    rows = attention.attend(q, k, v, mask, query_mask=real, **options)
    for one, other in zip(ours[:3], rows[:3], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"sinks": True}, {"softcap": 2.0, "sinks": True}])
@pytest.mark.parametrize("rows", [5, 140])
def test_softcap_and_sinks(options: dict[str, Any], rows: int) -> None:
    q, k, v = qkv(rows, 150)
    options = {**options, "sinks": torch.randn(8) * 2} if "sinks" in options else options
    result = attention.attend(
        q, k, v, is_causal=True, enable_gqa=True, return_lse=True, return_columns=True, **options
    )
    output, lse, p = expected(q, k, v, causal(rows, 150), **options)
    check(result, output, lse, p.sum(2), 2e-5)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_column_weights(kind: str, mask: bool) -> None:
    q, k, v = qkv(10, 10)
    shape = WEIGHTS[kind]
    weights = None if shape is None else torch.rand(*shape, 10)
    rule: dict[str, Any] = {"attn_mask": causal(10, 10)} if mask else {"is_causal": True}
    result = attention.attend(q, k, v, enable_gqa=True, column_weights=weights, return_columns=True, **rule)
    p = expected(q, k, v, causal(10, 10))[2]
    full = torch.ones(1) if weights is None else weights
    full = full[:, None] if kind == "batch" else full
    columns = (p * full.double()[..., None]).sum(2) if weights is not None else p.sum(2)
    assert result.columns is not None
    torch.testing.assert_close(result.columns.double(), columns, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", attention.HEADS)
def test_heads_reduce_alike_on_both_ways(heads: Any) -> None:
    q, k, v = qkv(10, 10)
    options: Any = dict(enable_gqa=True, return_columns=True, heads=heads)
    ours = attention.attend(q, k, v, is_causal=True, **options).columns
    rows = attention.attend(q, k, v, causal(10, 10), **options).columns
    torch.testing.assert_close(ours, rows, atol=1e-5, rtol=1e-5)
    p = expected(q, k, v, causal(10, 10))[2].sum(2)
    if heads == "kv_max":
        torch.testing.assert_close(ours.double(), p.unflatten(1, (2, 4)).amax(2), atol=1e-5, rtol=1e-5)


def test_forgetting_weights_ask_for_columns() -> None:
    q, k, v = qkv(10, 10)
    result = tokencomp.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True, column_weights=forgetting_weights(10, 0.9)
    )
    assert isinstance(result, tokencomp.Attention)
    assert result.lse is None
    torch.testing.assert_close(
        result.columns.sum(-1), forgetting_weights(10, 0.9).sum().expand(2, 8), atol=1e-4, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}])
def test_half_precision(dtype: torch.dtype, options: dict[str, Any]) -> None:
    q, k, v = qkv(33, 33, dtype)
    result = attention.attend(
        q, k, v, is_causal=True, enable_gqa=True, return_lse=True, return_columns=True, **options
    )
    output, lse, p = expected(q, k, v, causal(33, 33), **options)
    assert result.output.dtype == dtype
    torch.testing.assert_close(result.output.double(), output, atol=4 * torch.finfo(dtype).eps, rtol=0.02)
    check(result._replace(output=output), output, lse, p.sum(2), 2e-4)


def test_without_extras_it_is_torch() -> None:
    q, k, v = qkv(7, 9, kv_heads=8)
    mask = torch.rand(7, 9) < 0.8
    ours = tokencomp.scaled_dot_product_attention(q, k, v, mask, 0.0, False, scale=0.3)
    assert torch.equal(ours, functional.scaled_dot_product_attention(q, k, v, mask, scale=0.3))


def test_gradients_reach_the_output_only() -> None:
    for options in ({}, {"softcap": 2.0}, {"sinks": torch.zeros(8, requires_grad=True)}):
        q, k, v = (t.requires_grad_() for t in qkv(5, 5))
        result = attention.attend(
            q, k, v, is_causal=True, enable_gqa=True, return_lse=True, return_columns=True, **options
        )
        assert not result.columns.requires_grad
        assert not result.lse.requires_grad
        result.output.sum().backward()
        assert all(t.grad.abs().sum() > 0 for t in (q, k, v))
        assert all(s.grad.abs().sum() > 0 for name, s in options.items() if name == "sinks")


def test_gradients_survive_rows_that_see_nothing() -> None:
    q, k, v = (t.requires_grad_() for t in qkv(5, 5))
    real = torch.ones(2, 5, dtype=torch.bool)
    real[0, :2] = False
    sinks = torch.zeros(8, requires_grad=True)
    bias = torch.zeros(2, 1, 5, 5).masked_fill(~(causal(5, 5) & real[:, None, None]), -INF)
    for rule in ({"is_causal": True, "key_mask": real}, {"attn_mask": bias}):
        for given in (None, sinks):
            result = attention.attend(q, k, v, enable_gqa=True, softcap=2.0, sinks=given, **rule)
            assert (result.output[0, :, :2] == 0).all()
            result.output.sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v, sinks))


def test_dropout_is_of_the_output_only() -> None:
    q, k, v = qkv(20, 20)
    for options in ({}, {"softcap": 50.0}):
        dry, wet = (
            attention.attend(q, k, v, None, p, True, enable_gqa=True, return_columns=True, **options)
            for p in (0.0, 0.5)
        )
        assert torch.equal(dry.columns, wet.columns)
        assert not torch.allclose(dry.output, wet.output)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_mask": torch.ones(4, 6).bool(), "is_causal": True}, "attn_mask excludes"),
        ({"attn_mask": torch.ones(4, 6).bool(), "key_mask": torch.ones(2, 6).bool()}, "attn_mask excludes"),
        ({"window": 3}, "window needs is_causal"),
        ({"window": 0, "is_causal": True}, "window must be >= 1, got 0"),
        ({"key_mask": torch.ones(2, 4).bool()}, r"key_mask must be bool of shape \[B=2, 6\]"),
        ({"query_mask": torch.ones(2, 4)}, r"query_mask must be bool of shape \[B=2, 4\]"),
        ({"sinks": torch.ones(3)}, r"sinks must have shape \[Hq=8\], got \[3\]"),
        ({"column_weights": torch.ones(3)}, r"column_weights must be of T=4 rows"),
        ({"heads": "median"}, "heads must be one of none, .* got 'median'"),
        ({"enable_gqa": False}, "k must have Hq=8 heads without enable_gqa, got 2"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    q, k, v = qkv(4, 6)
    with pytest.raises(ValueError, match=f"scaled_dot_product_attention: {message}"):
        tokencomp.scaled_dot_product_attention(q, k, v, **{"enable_gqa": True, **options})


@pytest.mark.parametrize("rows", [1, 6, 20, 40])
def test_compiles_without_breaks(rows: int) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attention.attend(
            q, k, v, is_causal=True, enable_gqa=True, return_lse=True, return_columns=True
        )

    inputs = qkv(rows, rows)
    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")(*inputs)
    plain = run(*inputs)
    assert compiled.kernel == plain.kernel == ("torch" if rows == 20 else "tokencomp")
    for one, other in zip(compiled[:3], plain[:3], strict=True):
        assert torch.equal(one, other)


# --- which kernel -----------------------------------------------------------------------------------------

RULES: list[dict[str, Any]] = [
    {"is_causal": True},
    {},
    {"is_causal": True, "window": 7},
    {"is_causal": True, "softcap": 2.0, "scale": 0.5},
    {"is_causal": True, "sinks": torch.tensor([0.0, 1, -1, 3])},
    {"is_causal": True, "key_mask": torch.arange(50).expand(2, 50) >= torch.tensor([[0], [20]])},
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(rule) or "all")
@pytest.mark.parametrize("heads", ["none", "kv_sum"])
@pytest.mark.parametrize("rows", [1, 8, 40])
def test_both_kernels_give_the_same(rule: dict[str, Any], heads: Any, rows: int) -> None:
    q, k, v = torch.randn(2, 4, rows, 16), torch.randn(2, 2, 50, 16), torch.randn(2, 2, 50, 8)
    options = {"enable_gqa": True, "return_lse": True, "return_columns": True, "heads": heads, **rule}
    ours = attention.attend(q, k, v, kernel="tokencomp", **options)
    torchs = attention.attend(q, k, v, kernel="torch", **options)
    assert (ours.kernel, torchs.kernel) == ("tokencomp", "torch")
    if "key_mask" in rule:  # rows before the first key: torch's output there depends on its kernel
        seen = torchs.lse.isfinite()[..., None]  # type: ignore[union-attr]
        ours, torchs = (r._replace(output=torch.where(seen, r.output, 0)) for r in (ours, torchs))
    for one, other in zip(ours[:3], torchs[:3], strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", ["bool", "float", "keys", "batch"])
def test_the_mask_of_one_row_is_one_of_keys(kind: str) -> None:
    """As static caches mask their empty places."""
    q, k, v = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 50, 16), torch.randn(2, 2, 50, 8)
    seen = torch.arange(50) < torch.tensor([30, 17])[:, None]
    mask = {
        "bool": seen[:, None, None], "float": torch.where(seen, 0.5, -INF)[:, None, None],
        "keys": seen[1][None], "batch": seen[1:, None, None],
    }[kind]  # fmt: skip
    options = {"enable_gqa": True, "return_lse": True}
    ours = attention.attend(q, k, v, mask, **options)
    torchs = attention.attend(q, k, v, mask, kernel="torch", **options)
    assert (ours.kernel, torchs.kernel) == ("tokencomp", "torch")
    torch.testing.assert_close(ours.output, torchs.output)
    torch.testing.assert_close(ours.lse, torchs.lse)
    by_head = torch.rand(2, 4, 1, 50) < 0.5
    assert attention.attend(q, k, v, by_head, **options).kernel == "torch"


def test_the_default_kernel_follows_its_rule() -> None:
    q, short = torch.randn(1, 2, 32, 8), torch.randn(1, 2, 31, 8)
    mask = torch.ones(32, 32, dtype=torch.bool)
    assert attention.attend(q, q, q).kernel == "tokencomp"
    assert attention.attend(short, q, q).kernel == "torch"
    assert attention.attend(short, q, q, kernel="tokencomp").kernel == "tokencomp"
    assert attention.attend(q, q, q, mask).kernel == "torch"
    assert attention.attend(q, q, q, dropout_p=0.5).kernel == "torch"
    assert attention.attend(q.double(), q.double(), q.double()).kernel == "torch"
    wanting = q.clone().requires_grad_()
    assert attention.attend(wanting, q, q).kernel == "torch"
    with torch.no_grad():
        assert attention.attend(wanting, q, q).kernel == "tokencomp"
    across = q.mT.contiguous().mT
    assert attention.attend(across, q, q).kernel == "torch"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_mask": torch.ones(32, 32)}, "kernel 'tokencomp' takes no attn_mask; use kernel='torch'"),
        ({"dropout_p": 0.1}, "kernel 'tokencomp' takes no dropout"),
        ({"q": torch.randn(1, 2, 32, 8, requires_grad=True)}, "kernel 'tokencomp' takes no gradients"),
        (
            dict.fromkeys("qkv", torch.randn(1, 2, 32, 8).double()),
            "kernel 'tokencomp' takes no dtypes torch.float64",
        ),
        ({"v": torch.randn(1, 2, 32, 300)}, "kernel 'tokencomp' takes no head dimensions 8, 300"),
        ({"kernel": "flash"}, "kernel must be one of auto, tokencomp, torch, got 'flash'"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_the_kernel_does_not_take_is_an_error(change: dict[str, Any], message: str) -> None:
    q = torch.randn(1, 2, 32, 8)
    arguments: dict[str, Any] = {"q": q, "k": q, "v": q, "kernel": "tokencomp"} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        tokencomp.scaled_dot_product_attention(**arguments)
