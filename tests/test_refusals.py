"""Arguments and knobs of a wrong type or at an edge: what the fuzz test found is refused by name."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import tokencomp
import torch
from tokencomp import methods, ops, recipes
from tokencomp._typed import is_of, typed
from tokencomp.methods.atp import grid_mask
from tokencomp.ops.kvquant_pages import PageFormat

X = torch.randn(2, 9, 8)
Q = torch.randn(2, 4, 3, 8)
PAGES = torch.randn(6, 1, 16, 8)
TABLE = torch.arange(6, dtype=torch.int32).view(2, 1, 3)
LENGTHS = torch.full((2, 1), 40, dtype=torch.int32)


@typed
def scaled(x: torch.Tensor, by: float = 1.0, *, times: int | None = None) -> torch.Tensor:
    if by < 0:
        raise ValueError(f"scaled: by must be >= 0, got {by}")
    return x.mul(by) * (1 if times is None else times)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scaled("x"), "scaled: x must be Tensor, got 'x'"),
        (lambda: scaled(X, [2]), "scaled: by must be float, got [2]"),
        (lambda: scaled(X, times="x"), "scaled: times must be int | None, got 'x'"),
        (lambda: ops.kcenter_greedy(None, 3), "kcenter_greedy: x must be Tensor, got None"),
        (lambda: ops.kcenter_greedy(X, "3"), "kcenter_greedy: k must be int, got '3'"),
        (lambda: ops.topk_select(X[0], 3, keep=[9]), "topk_select: keep must be torch.Tensor | None, got"),
        (lambda: ops.hadamard(5), "hadamard: x must be Tensor, got 5"),
        (lambda: methods.A2SF(budget=16, sinks="x"), "A2SF: sinks must be int, got 'x'"),
        (lambda: methods.KIVI(group=torch.zeros(2)), "KIVI: group must be int, got Tensor"),
        (lambda: methods.RKV(budget=64, kernel=2.5), "RKV: kernel must be int, got 2.5"),
    ],
)  # fmt: skip
def test_wrong_types_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        call()


def test_errors_of_checks_stay_as_they_are() -> None:
    with pytest.raises(ValueError, match="scaled: by must be >= 0, got -1"):
        scaled(X, -1)
    with pytest.raises(ValueError, match="by must be >= 0"):
        scaled(X, -1, times="x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        scaled()  # type: ignore[call-arg]
    with pytest.raises(RuntimeError, match="objective must be one of"):
        ops.kcenter_greedy(X, 3, objective="x")  # type: ignore[arg-type]


def test_what_is_of_a_type() -> None:
    for value, expected in ((2, float), (True, int), (None, int | None), ((1, 2), tuple[int, ...])):
        assert is_of(value, expected)
    for value, expected in ((2.5, int), ("2", float), (torch.ones(()), int), ((1, "2"), tuple[int, ...])):
        assert not is_of(value, expected)


def sdpa(**options: Any) -> Any:
    return tokencomp.scaled_dot_product_attention(**({"q": Q, "k": Q, "v": Q} | options))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sdpa(k=Q.double()), "q, k and v must have one dtype, got torch.float32, torch.float64"),
        (lambda: sdpa(k=Q[..., :0]), "q and k must agree in B and D, got [2, 4, 3, 8], [2, 4, 3, 0]"),
        (lambda: sdpa(softcap=float("nan")), "softcap must be finite and > 0, got nan"),
        (lambda: sdpa(v=Q.to("meta")), "v must be on the device of q, cpu, got meta"),
        (lambda: sdpa(is_causal=True, key_mask=torch.ones(2, 3, dtype=torch.bool, device="meta")),
         "key_mask must be on the device of q, cpu, got meta"),
        (lambda: sdpa(attn_mask=torch.ones(3, 0)), "attn_mask must broadcast to [2, 4, 3, 3], got [3, 0]"),
        (lambda: sdpa(attn_mask=torch.ones(2, 1, 1, 3, 3)), "attn_mask must broadcast to [2, 4, 3, 3]"),
        (lambda: PageFormat(group_v=0).page_bytes, "PageFormat: a group must be -1 or >= 1, got 0"),
        (lambda: PageFormat("int5").page_bytes, "PageFormat: a tier must be one of fp8, int8"),  # type: ignore[arg-type]
        (lambda: methods.MiKV(group=0), "page_spec: k_group must be -1 or >= 1, got 0"),
        (lambda: methods.RKV(budget=64, kernel=2**63 - 1), "RKV: kernel must be in [1, 4096], got"),
        (lambda: methods.SnapKV(budget=64, kernel=0), "SnapKV: kernel must be in [1, 4096], got 0"),
        (lambda: recipes.pool_scores(X, 5000), "pool_scores: kernel must be in [1, 4096], got 5000"),
        (lambda: methods.Tiered(methods.A2SF(1.0), X), "Tiered: tiers must be shares by bits, got"),
        (lambda: methods.RandomKV(recent=float("nan")), "RandomKV: recent must be a count or a share"),
        (lambda: methods.LexRank(iterations=2**63), "LexRank: iterations must be in [0, 10000], got"),
        (lambda: methods.ZeroTPrune(iterations=[5, -1]), "ZeroTPrune: iterations must be in [0, 10000], got"),
        (lambda: methods.ZipVLPrompt(random=2**31), "ZipVLPrompt: random must be in [0, 65536], got"),
        (lambda: methods.RandomKV(seed=-(2**63)), "RandomKV: seed must be in [-2^31, 2^31), got"),
    ],
)  # fmt: skip
def test_values_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: ops.kcenter_greedy(X, 3, weight=z[:, :9]), "kcenter_greedy: weight must"),
        (lambda z: ops.merge_tokens(X, z, 4), "merge_tokens: token_map must"),
        (lambda z: ops.cosine_match(X, X, a_index=z), "cosine_match: a_index must"),
        (lambda z: ops.flash_prefill(Q, Q, Q, key_bias=z), "flash_prefill: key_bias must"),
    ],
)
def test_complex_numbers_are_refused_by_the_operator(call: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(torch.zeros(2, 9, dtype=torch.complex64))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.paged_decode(torch.ones(()), PAGES, PAGES, TABLE, LENGTHS), "paged_decode: q must"),
        (
            lambda: ops.qk_scores(torch.ones(()), PAGES, block_table=TABLE, lengths=LENGTHS),
            "qk_scores: q must",
        ),
        (lambda: ops.attention_lse(torch.ones(()), Q), "attention_lse: q must"),
    ],
)
def test_numbers_are_no_queries(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()


def test_empty_tensors() -> None:
    for shape in ((0, 8), (3, 0, 8), (0, 2, 5, 8)):
        assert ops.hadamard(torch.ones(shape)).shape == shape
    pool = torch.zeros(2, PageFormat(tokens=16, head_dim=8).page_bytes, dtype=torch.uint8)
    none = torch.zeros(1, dtype=torch.int32)
    slots, table = torch.full((1, 16), -1), TABLE[:, :, :0]
    page = PageFormat(tokens=16, head_dim=8)
    ops.kv_retier_(pool, PAGES, PAGES, table, none, slots, none, page)
    pointer, empty = torch.zeros(3, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    out, _ = ops.flash_prefill(
        Q, Q[:, :, :0], Q[:, :, :0], indptr=pointer, indices=empty, column_ptr=pointer, columns=empty
    )
    assert (out == 0).all()


def test_a_grid_of_one_token() -> None:
    for rate in (1e-40, 1e-3):
        assert grid_mask((3, 9), rate, X.device).flatten().tolist() == [True] + [False] * 26


def test_strided_values_of_a_match() -> None:
    value, index = torch.randn(2, 10)[:, ::2], torch.zeros(2, 5, dtype=torch.int32)
    got, want = (ops.bipartite_map(v, index, 2, 10) for v in (value, value.contiguous()))
    assert torch.equal(got, want)
