"""torch.library.opcheck on every operator, and the operators under torch.compile, fake and meta tensors."""

import pytest
import torch
from backends import Backend
from cases import KCENTER_CASES, KCENTER_EXACT, Inputs, KCenterCase
from tokencomp import ops
from tokencomp.ops import _namespace
from torch._subclasses.fake_tensor import FakeTensorMode

# Operator -> cases small enough for opcheck, which runs each several times.
CASES = {"kcenter_greedy": [c for c in KCENTER_CASES + KCENTER_EXACT if c.work <= 60_000]}
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def test_every_operator_has_cases() -> None:
    assert sorted(CASES) == _namespace.op_names() == sorted(ops.__all__)


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name, cases in CASES.items() for case in cases],
    ids=lambda p: getattr(p, "name", p),
)
def test_opcheck(cpu_backend: Backend, name: str, case: KCenterCase) -> None:
    call = case.inputs()
    op = getattr(getattr(torch.ops, cpu_backend.namespace), name)
    results = torch.library.opcheck(op, (call.x, call.k), call.options, test_utils=CHECKS)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.cuda
@pytest.mark.parametrize("case", CASES["kcenter_greedy"][::7], ids=lambda case: case.name)
def test_opcheck_cuda(case: KCenterCase) -> None:
    from backends import make_backend

    call = case.inputs().to(make_backend("cuda").device)
    torch.library.opcheck(torch.ops.tokencomp.kcenter_greedy, (call.x, call.k), call.options)


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


def test_meta_tensors(cpu_backend: Backend) -> None:
    with cpu_backend.active():
        index, value = ops.kcenter_greedy(torch.empty(2, 7, 3, device="meta"), 4)
    assert index.shape == value.shape == (2, 4)
    assert index.device.type == "meta"


def test_poison_fills_uninitialised_memory() -> None:
    """The fixture every other test relies on: memory nobody wrote is NaN or the largest integer."""
    assert torch.empty(64).isnan().all()
    assert (torch.empty(64, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
