"""torch.library.opcheck on every operator, and the operators under torch.compile, fake and meta tensors."""

from typing import Any

import pytest
import torch
from backends import Backend
from cases import KCENTER_CASES, KCENTER_EXACT, Inputs
from cases_decode import DECODE_CASES, STATES_CASES
from cases_decode_types import TYPES_CASES, TypesCase
from cases_kvcache import KV_CASES, KVCase
from cases_kvquant import opcheck_cases
from cases_linear import LINEAR_CASES
from cases_merge import ENERGY_CASES, MATCH_CASES, MATCH_EXACT
from cases_merge_map import MAP_CASES, MERGE_CASES, STEP_CASES, MergeCase, StepCase
from cases_prefill import PREFILL_CASES, PrefillCase
from cases_prefill import operator_arguments as prefill_arguments
from cases_prefill_pages import PAGED_CASES, PagedCase
from cases_prefill_pages import operator_arguments as paged_arguments
from cases_score import SCORE_CASES, ScoreCase, operator_arguments
from cases_score_pages import PAGES_CASES
from cases_topk import TOPK_CASES, TOPK_OPS
from tokencomp import ops, token_map
from tokencomp.ops import _namespace
from torch._subclasses.fake_tensor import FakeTensorMode

SCORE_OPS = ("attention_lse", "column_score", "decay_score_", "diagonal_score", "head_vote", "qk_scores")
KV_OPS = ("evict_assign", "evict_merge_", "kv_append_", "kv_compact_", "kv_gather", "rope_shift_")
SMALL_SCORES = [c for c in SCORE_CASES if c.work <= 400_000 and not c.bad]

# Operator -> cases small enough for opcheck, which runs each several times.
CASES: dict[str, list[Any]] = {
    "kcenter_greedy": [c for c in KCENTER_CASES + KCENTER_EXACT if c.work <= 60_000],
    **{op: [c for c in TOPK_CASES if c.op == op and c.work <= 100_000][::4] for op in TOPK_OPS},
    "cosine_match": [c for c in MATCH_CASES + MATCH_EXACT if c.work <= 900_000][::9],
    "energy_score": [c for c in ENERGY_CASES if c.work <= 900_000][::9],
    "bipartite_map": [c for c in MAP_CASES if c.N <= 61][::16],
    "merge_tokens": [c for c in MERGE_CASES if c.work <= 40_000][::9],
    "paged_decode": [c for c in DECODE_CASES if c.work <= 200_000 and not c.bad][::5]
    + [c for c in TYPES_CASES if c.work <= 600_000][::9],
    "merge_states": STATES_CASES[::4],
    **opcheck_cases(),
    "bipartite_merge": [c for c in STEP_CASES if c.work <= 700_000][::9],
    "decay_linear_attention": [c for c in LINEAR_CASES if c.work <= 800_000],
    "flash_prefill": [c for c in PREFILL_CASES if c.work <= 800_000 and not c.base.bad][::5]
    + [c for c in PAGED_CASES if c.work <= 3_000_000][::9],
    **{name: SMALL_SCORES[i::7] for i, name in enumerate(SCORE_OPS)},
    "qk_scores": SMALL_SCORES[5::7] + PAGES_CASES[::4],
    **{name: [c for c in KV_CASES if c.work <= 60_000 and c.D > 1][i::9] for i, name in enumerate(KV_OPS)},
}
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def arguments_of(name: str, case: Any, layout: str = "linear") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the operator below the wrapper is called with; each family's cases draw it in their own way."""
    if isinstance(case, ScoreCase):
        return operator_arguments(name, case)
    if isinstance(case, KVCase):
        return case.arguments(name)
    if isinstance(case, PrefillCase):
        return prefill_arguments(case)
    if isinstance(case, PagedCase):
        return paged_arguments(case, layout)
    if hasattr(case, "arguments"):
        positional, options = case.arguments()
        return tuple(positional), options
    call = case.inputs()
    return call.arguments, call.options


def test_every_operator_has_cases() -> None:
    assert sorted(CASES) == _namespace.op_names() == sorted(ops.__all__)


# Schemas, fake kernels and gradients are one source for both back ends; the emulator is slow.
@pytest.mark.parametrize(
    ("cpu_backend", "name", "case"),
    [("cpu", name, case) for name, cases in CASES.items() for case in cases]
    + [("emu", name, case) for name, cases in CASES.items() for case in cases[::3]],
    ids=lambda p: getattr(p, "name", p),
    indirect=["cpu_backend"],
)
def test_opcheck(cpu_backend: Backend, name: str, case: Any) -> None:
    op = getattr(getattr(torch.ops, cpu_backend.namespace), name)
    layout = "linear" if cpu_backend.name == "cpu" else "mma16"
    if isinstance(case, TypesCase):
        case = case.on(cpu_backend.name)
    arguments, options = arguments_of(name, case, layout)
    results = torch.library.opcheck(op, arguments, options, test_utils=CHECKS)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("mode", ["mean", "sum", "drop"])
def test_opcheck_with_gradient(cpu_backend: Backend, mode: str) -> None:
    for name, case in (
        ("merge_tokens", MergeCase(2, 9, 5, 4, mode=mode, sized=True)),
        ("bipartite_merge", StepCase(2, 9, 5, 4, 3, mode=mode)),
    ):
        arguments, options = arguments_of(name, case)
        arguments[0].requires_grad_()
        op = getattr(getattr(torch.ops, cpu_backend.namespace), name)
        results = torch.library.opcheck(op, arguments, options, test_utils=CHECKS)
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name, cases in CASES.items() for case in cases[::7]],
    ids=lambda p: getattr(p, "name", p),
)
def test_opcheck_cuda(name: str, case: Any) -> None:
    from backends import make_backend

    case = case.on("cuda") if isinstance(case, TypesCase) else case
    moved = make_backend("cuda").here(arguments_of(name, case))
    torch.library.opcheck(getattr(torch.ops.tokencomp, name), *moved)


def select(x: torch.Tensor, seed: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    index, value = ops.kcenter_greedy(x * 2, k, seed=seed)
    return index.sort(dim=1).values, value + 1


def test_compiles_without_graph_breaks(backend: Backend) -> None:
    compiled = torch.compile(select, fullgraph=True, backend="aot_eager", dynamic=True)
    for n, k in ((20, 5), (33, 9)):
        call = Inputs(torch.randn(2, n, 8), k, {"seed": torch.tensor([[1], [3]])}).to(backend.device)
        with backend.active():
            want = select(call.x, call.options["seed"], k)
            got = compiled(call.x, call.options["seed"], k)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


def step(x: torch.Tensor, size: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A whole merge: match, energy, map, merge."""
    value, index = ops.cosine_match(x[:, 0::2], x[:, 1::2], protect_a=1)
    mapped = ops.bipartite_map(value + 0 * ops.energy_score(x, 0.5)[:, 0::2], index, r, x.shape[1])
    return ops.merge_tokens(x * 2, mapped, token_map.merged_count(x.shape[1], r), size=size)


def test_merge_compiles_without_graph_breaks(backend: Backend) -> None:
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for n, r in ((20, 5), (33, 9)):
        x, size = torch.randn(2, n, 8), torch.rand(2, n) + 0.5
        here = x.to(backend.device), x.to(backend.device).requires_grad_(), size.to(backend.device)
        with backend.active():
            want = step(here[0], here[2], r)
            got = compiled(here[1], here[2], r)
            torch.testing.assert_close(got[0].detach(), want[0])
            assert torch.equal(got[1], want[1])
            got[0].sum().backward()
        assert here[1].grad is not None


def test_fake_tensors_give_shapes_and_dtypes(cpu_backend: Backend) -> None:
    with FakeTensorMode() as mode, cpu_backend.active():
        x, lengths = torch.empty(3, 9, 4, dtype=torch.bfloat16), torch.empty(3, dtype=torch.int64)
        index, value = ops.kcenter_greedy(x, 5, lengths=lengths, weight=torch.empty(3, 9))
        assert mode is index.fake_mode
        assert (index.shape, index.dtype) == ((3, 5), torch.int32)
        assert (value.shape, value.dtype) == ((3, 5), torch.float32)
        with pytest.raises(
            RuntimeError, match=r"kcenter_greedy: x must have shape \[B, N, C\], got \[9, 4\]"
        ):
            ops.kcenter_greedy(x[0], 5)


def keep_best(score: torch.Tensor, k: int, lengths: torch.Tensor) -> tuple[torch.Tensor, ...]:
    index, count = ops.topk_select(score + 1, k, tail=2, lengths=lengths)
    share, _ = ops.topp_select(score, 0.5, k)
    budget = ops.topk_budget(score[None], 2 * k, floor=1)
    return index + 1, count * 2, share.clone(), budget.sum(1)


def test_selections_compile_without_graph_breaks(backend: Backend) -> None:
    compiled = torch.compile(keep_best, fullgraph=True, backend="aot_eager", dynamic=True)
    for slots, k in ((20, 5), (33, 9)):
        score, lengths = torch.rand(2, slots).to(backend.device), torch.tensor([slots, 4]).to(backend.device)
        with backend.active():
            want, got = keep_best(score, k, lengths), compiled(score, k, lengths)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def attend(q: torch.Tensor, pages: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor) -> Any:
    out, lse, logits = ops.paged_decode(q * 2, pages, pages, table, lengths, window=5, logits_out=True)
    return *ops.merge_states(torch.stack([out, out]), torch.stack([lse, lse])), logits + 1


def test_decode_compiles_without_graph_breaks(backend: Backend) -> None:
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    for places, used in ((2, 20), (3, 41)):
        q, pages = torch.randn(2, 4, 1, 8), torch.randn(9, 1, 16, 8)
        table = torch.arange(2 * places).view(2, 1, places).int()
        call = [t.to(backend.device) for t in (q, pages, table, torch.full((2, 1), used))]
        with backend.active():
            want, got = attend(*call), compiled(*call)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def prefill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = ops.flash_prefill(q * 2, k, v, window=5)
    return out + 1, lse.exp()


def test_prefill_compiles_without_graph_breaks(backend: Backend) -> None:
    compiled = torch.compile(prefill, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (7, 20):
        q, k = (torch.randn(2, h, rows, 8).to(backend.device) for h in (4, 2))
        with backend.active():
            want, got = prefill(q, k, k), compiled(q, k, k)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_fake_selections_give_shapes_and_dtypes(cpu_backend: Backend) -> None:
    with FakeTensorMode(), cpu_backend.active():
        score = torch.empty(3, 9, dtype=torch.float16)
        for index, count in (ops.topk_select(score, 12), ops.topp_select(score, 0.3, 12)):
            assert (index.shape, index.dtype) == ((3, 12), torch.int32)
            assert (count.shape, count.dtype) == ((3,), torch.int32)
        budget = ops.topk_budget(score[None], 5)
        assert (budget.shape, budget.dtype) == ((1, 3), torch.int32)
        for name, call in (
            ("topk_select", lambda: ops.topk_select(score[0], 1)),
            ("topp_select", lambda: ops.topp_select(score[0], 0.5, 1)),
            ("topk_budget", lambda: ops.topk_budget(score, 1)),
        ):
            with pytest.raises(RuntimeError, match=f"{name}: score must have shape"):
                call()


def test_meta_tensors(cpu_backend: Backend) -> None:
    with cpu_backend.active():
        index, value = ops.kcenter_greedy(torch.empty(2, 7, 3, device="meta"), 4)
    assert index.shape == value.shape == (2, 4)
    assert index.device.type == "meta"


def test_poison_fills_uninitialised_memory() -> None:
    """The fixture every other test relies on: memory nobody wrote is NaN or the largest integer."""
    assert torch.empty(64).isnan().all()
    assert (torch.empty(64, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()


def linear(q: torch.Tensor, k: torch.Tensor, slope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out, state = ops.decay_linear_attention(q * 2, k, k, slope)
    return ops.decay_linear_attention(out, k, k, slope, state=state)


def test_linear_attention_compiles_without_graph_breaks(backend: Backend) -> None:
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (7, 20):
        q, k = (torch.randn(2, h, rows, 8).to(backend.device) for h in (4, 2))
        slope = torch.rand(4).to(backend.device)
        with backend.active():
            want, got = linear(q, k, slope), compiled(q, k, slope)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
