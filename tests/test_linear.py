"""Linear attention with decay: worked example, float64, calls in parts, determinism, errors."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import Backend
from cases_linear import LINEAR_CASES, LinearCase
from linear_yardstick import check_case
from tokencomp import ops, reference
from tokencomp.linear import decay_slopes
from torch import Tensor


@pytest.mark.parametrize("case", LINEAR_CASES, ids=lambda c: c.name)
def test_against_float64(backend: Backend, case: LinearCase) -> None:
    check_case(lambda *a, **o: backend.run("decay_linear_attention", *a, **o), case)


def test_worked_example(backend: Backend) -> None:
    """d = 1, slope .5, k = 1 2 1, v = 1 1 2, q = 1: 1, 2.606531, 3.580941."""
    k, v = torch.tensor([1.0, 2, 1]).view(1, 1, 3, 1), torch.tensor([1.0, 1, 2]).view(1, 1, 3, 1)
    out, state = backend.run("decay_linear_attention", torch.ones(1, 1, 3, 1), k, v, torch.tensor([0.5]))
    want = torch.tensor([1, 2.606531, 3.580941])
    torch.testing.assert_close(out.flatten(), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(state.flatten(), want[-1:], rtol=0, atol=1e-6)


def test_published_slopes() -> None:
    """64 heads, 80 layers: the first head in the first layer, and in the last linear one."""
    assert float(decay_slopes(64, 0, 80)[0]) == pytest.approx(0.917013, abs=1e-6)
    assert float(decay_slopes(64, 78, 80)[0]) == pytest.approx(0.0116168, abs=1e-6)
    assert decay_slopes(4).tolist() == pytest.approx([0.25, 0.0625, 2**-6, 2**-8])
    assert decay_slopes(6).tolist() == pytest.approx([0.25, 0.0625, 2**-6, 2**-8, 0.5, 0.125])
    with pytest.raises(ValueError, match=r"decay_slopes: layer must be in \[0, layers=2\), got 2"):
        decay_slopes(4, 2, 2)


def test_is_attention_with_a_matrix(backend: Backend) -> None:
    """Without chunks or a state: weights exp(-slope (t - s)) <q, k> below the diagonal."""
    q, k, v = (torch.randn(2, h, 100, d) for h, d in ((4, 16), (2, 16), (2, 24)))
    slope = torch.tensor([0.0, 0.01, 0.1, 1.0])
    out, _ = backend.run("decay_linear_attention", q, k, v, slope)
    keys, values = (x.double().repeat_interleave(2, 1) for x in (k, v))
    age = torch.arange(100)[:, None] - torch.arange(100)
    weight = torch.where(age >= 0, torch.exp(-slope.double()[:, None, None] * age), 0.0)
    want = (q.double() @ keys.mT * weight) @ values
    assert float((out - want).abs().max()) < 1e-5 * float(want.abs().max())


@pytest.mark.parametrize("parts", [(1,) * 9, (64, 1, 1, 64), (33, 97), (130,)])
def test_in_parts_with_the_state_handed_on(backend: Backend, parts: tuple[int, ...]) -> None:
    q, k, v, slope = _tensors(sum(parts))
    whole, end = backend.run("decay_linear_attention", q, k, v, slope)
    state, done, first = None, [], 0
    for n in parts:
        some = [x[:, :, first : first + n] for x in (q, k, v)]
        out, state = backend.run("decay_linear_attention", *some, slope, state=state)
        done.append(out)
        first += n
    assert state is not None
    torch.testing.assert_close(torch.cat(done, 2), whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))
    torch.testing.assert_close(state, end, rtol=1e-5, atol=1e-5 * float(end.abs().max()))


def test_padding_is_not_read_and_changes_nothing(backend: Backend) -> None:
    q, k, v, slope = _tensors(90)
    lengths = torch.tensor([90, 33])
    for x in (q, k, v):
        x[1, :, 33:] = torch.nan
    out, state = backend.run("decay_linear_attention", q, k, v, slope, lengths=lengths)
    alone, held = backend.run("decay_linear_attention", *(x[1:, :, :33] for x in (q, k, v)), slope)
    assert torch.equal(out[1:, :, :33], alone)
    assert torch.equal(state[1:], held)
    assert bool((out[1, :, 33:] == 0).all())


def test_arguments_are_left_alone(backend: Backend) -> None:
    q, k, v, slope = _tensors(40)
    state = torch.randn(2, 4, 16, 24)
    before = [x.clone() for x in (q, k, v, slope, state)]
    _, new = backend.run("decay_linear_attention", q, k, v, slope, state=state)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v, slope, state), before, strict=True))
    assert new.data_ptr() != state.data_ptr()


def test_bits_do_not_depend_on_the_run(backend: Backend) -> None:
    arguments = _tensors(150)
    first = backend.run("decay_linear_attention", *arguments)
    again = backend.run("decay_linear_attention", *arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    code = (
        "import sys, torch; from tokencomp import ops; torch.set_num_threads(int(sys.argv[1]))\n"
        "torch.manual_seed(0); x = [torch.randn(2, 8, 700, 64) for _ in range(3)]\n"
        "made = ops.decay_linear_attention(*x, torch.arange(8) * 0.01)\n"
        "import hashlib; print([hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in made])"
    )
    said = {
        subprocess.run([sys.executable, "-c", code, n], capture_output=True, text=True, check=True).stdout
        for n in ("1", "2", "3")
    }
    assert len(said) == 1


def _tensors(rows: int) -> tuple[Tensor, ...]:
    q, k, v = (torch.randn(2, h, rows, d) for h, d in ((4, 16), (2, 16), (2, 24)))
    return q, k, v, torch.tensor([0.0, 0.01, 0.1, 1.0])


def changed(**options: Any) -> Callable[[], Any]:
    def call() -> Any:
        given = dict(zip(("q", "k", "v", "slope"), _tensors(9), strict=True)) | options
        return ops.decay_linear_attention(**given)

    return call


OP = "decay_linear_attention: "


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (changed(q=torch.ones(2, 4, 9)), RuntimeError, r"q must have shape \[B, Hq, T, D\], got \[2, 4, 9\]"),
        (changed(k=torch.ones(2, 2, 8, 16)), RuntimeError, "k must have the T=9 tokens of q, got 8"),
        (changed(k=torch.ones(2, 3, 9, 16)), RuntimeError, "Hq must be a multiple of Hkv=3, got 4"),
        (changed(v=torch.ones(2, 2, 9)), RuntimeError, r"v must have shape \[B=2, Hkv=2, T=9, Dv\], got"),
        (changed(v=torch.ones(2, 2, 9, 24).half()), RuntimeError, "v must have the dtype of q, Float, got"),
        (changed(v=torch.ones(2, 2, 9, 257)), RuntimeError, r"value dimension Dv must be in \[1, 256"),
        (changed(slope=torch.ones(3)), RuntimeError, r"slope must have shape \[4\], got \[3\]"),
        (changed(slope=-torch.ones(4)), ValueError, "slope must be finite and >= 0, got"),
        (changed(slope=torch.full((4,), torch.nan)), ValueError, "slope must be finite and >= 0, got"),
        (changed(scale=0.0), RuntimeError, "scale must be finite and > 0, got 0"),
        (changed(state=torch.ones(2, 4, 16, 23)), RuntimeError, r"state must have shape \[2, 4, 16, 24\]"),
        (changed(lengths=torch.tensor([9])), RuntimeError, r"lengths must have shape \[2\], got \[1\]"),
        (changed(lengths=torch.tensor([9, 10])), ValueError, r"lengths must be in \[0, T=9\], got 10"),
        (changed(q=torch.ones(2, 4, 9, 16).double()), RuntimeError, "q must be float32, float16 or bfloat16"),
    ],
)  # fmt: skip
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=OP + message):
        call()


def test_the_reference_is_the_recurrence() -> None:
    q, k, v, slope = (x.double() for x in _tensors(5))
    out, state = reference.decay_linear_attention(q, k, v, slope)
    held = torch.zeros(16, 24, dtype=torch.float64)
    for t in range(5):
        held = torch.exp(-slope[3]) * held + torch.outer(k[1, 1, t], v[1, 1, t])
        torch.testing.assert_close(out[1, 3, t], q[1, 3, t] @ held)
    torch.testing.assert_close(state[1, 3], held)
