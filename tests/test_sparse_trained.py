"""Attention of models trained to be sparse: worked examples, plain formulas in float64, decoding, errors."""

import math

import pytest
import torch
from backends import Backend
from sparse_prompts import tensors, view_of
from tokencomp import methods, recipes, sparse
from tokencomp.methods.sparse import Subset
from tokencomp.prompt_rows import last_rows
from torch import Tensor


def with_attention(attention: list[list[float]]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of one head whose causal attention at scale 1 is as given, and whose output are its rows."""
    rows = torch.tensor(attention)
    eye = torch.eye(rows.shape[1])[None, None]
    return rows.clamp(min=1e-30).log()[None, None], eye, eye


def grouped(k: Tensor, q: Tensor) -> Tensor:
    return k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)


def logits(q: Tensor, k: Tensor) -> Tensor:
    """``[B, Hq, T, S]`` float64, -inf behind a row."""
    z = q.double() @ grouped(k, q).mT * q.shape[3] ** -0.5
    row = torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None]
    return z.masked_fill(torch.arange(k.shape[2]) > row, -math.inf)


def close(got: Tensor, want: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=atol)


SHAPES = [(1, 1), (1, 50), (7, 7), (33, 90), (150, 150)]


# --- ZipVL -------------------------------------------------------------------------------------------------

ZIPVL = [[1, 0, 0, 0], [0.6, 0.4, 0, 0], [0.1, 0.2, 0.7, 0], [0.3, 0.1, 0.1, 0.5]]


@pytest.mark.parametrize(("tau", "kept"), [(0.6, [0, 3]), (0.9, [0, 1, 2, 3])])
def test_zipvl_worked_example(backend: Backend, tau: float, kept: list[int]) -> None:
    """Sums 2.0, .7, .8, .5: two hold .6 of 4, four .9; means .5, .2333, .4, .5 pick 0 and 3, not 2."""
    q, k, _ = (x.to(backend.device) for x in with_attention(ZIPVL))
    method = methods.ZipVLPrompt(tau=tau, recent=1, random=3, sinks=0)
    with backend.active():
        chosen = method.subset(last_rows(q, k, 1.0))
    assert chosen.tokens.tolist() == [kept]
    assert chosen.count.tolist() == [len(kept)]


def test_zipvl_keeps_the_ends_and_ignores_padding() -> None:
    q, k, v = tensors(batch=3, rows=90)
    counts = [90, 60, 3]
    for b, n in enumerate(counts):
        k[b, :, n:] = torch.nan
    method = methods.ZipVLPrompt(tau=0.4, recent=8, random=8, sinks=4)
    chosen = method.choose_prompt(view_of(q, k, v, counts))
    assert isinstance(chosen, Subset)
    assert chosen.tokens.shape[1] == int(chosen.count.max()) < 90
    for b, n in enumerate(counts):
        own = chosen.tokens[b, : chosen.count[b]].tolist()
        assert own == sorted(set(own))
        assert (chosen.tokens[b, chosen.count[b] :] == -1).all()
        assert {*range(min(4, n)), *range(max(0, n - 8), n)} <= set(own)
        assert max(own) < n
        alone = method.choose_prompt(view_of(q[b : b + 1, :, :n], k[b : b + 1, :, :n], v[b : b + 1, :, :n]))
        assert isinstance(alone, Subset)
        assert alone.tokens[0].tolist() == own
    more = methods.ZipVLPrompt(tau=0.95, recent=8, random=8).choose_prompt(view_of(q, k, v, counts))
    assert isinstance(more, Subset)
    assert (more.count >= chosen.count).all()
    assert int(more.count[0]) > int(chosen.count[0])


def test_zipvl_of_a_chunk_names_its_rows() -> None:
    q, k, v = tensors(batch=2, rows=50, keys=170)
    chosen = methods.ZipVLPrompt(tau=0.3, recent=8, random=8).choose_prompt(view_of(q, k, v))
    assert isinstance(chosen, Subset)
    assert int(chosen.tokens.max()) == 49
    assert int(chosen.count.max()) < 50


# --- landmarks ---------------------------------------------------------------------------------------------


def test_landmark_worked_example(backend: Backend) -> None:
    """[a b L1 | c d L2 | e f]: gates over L1, L2, e, f are .5793, .2131, .1293, .0784."""
    q = torch.tensor([1, 0, 2, 0, 1, 1, 0.5, 0])[None, None, None]
    eye = torch.eye(8)[None, None]
    with backend.active():
        q, eye = q.to(backend.device), eye.to(backend.device)
        weight = sparse.landmark_attention(q, eye, eye, block=3, scale=1.0)[0, 0, 0].cpu()
        best = sparse.landmark_attention(q, eye, eye, block=3, top=1, scale=1.0)[0, 0, 0].cpu()
    close(weight, torch.tensor([0.4235, 0.1558, 0, 0.0573, 0.1558, 0, 0.1293, 0.0784]))
    gate = torch.tensor([2, 0.5, 0.0]).softmax(0)
    inside = torch.tensor([1.0, 0]).softmax(0) * gate[0]
    close(best, torch.tensor([*inside, 0, 0, 0, 0, *gate[1:]]))


def landmark(q: Tensor, k: Tensor, v: Tensor, block: int, top: int | None) -> Tensor:
    z, rows, keys = logits(q, k), q.shape[2], k.shape[2]
    weight = torch.zeros_like(z)
    for t in range(rows):
        own = (t + keys - rows) // block
        for b, h in ((b, h) for b in range(q.shape[0]) for h in range(q.shape[1])):
            x = z[b, h, t]
            marks = [n * block + block - 1 for n in range(own)]
            marks = sorted(sorted(marks, key=lambda j: (-float(x[j]), j))[:top])
            mine = [j for j in range(own * block, min(own * block + block - 1, keys)) if x[j] > -math.inf]
            gate = x[[*marks, *mine]].softmax(0)
            for mark, g in zip(marks, gate, strict=False):
                inside = range(mark - block + 1, mark)
                weight[b, h, t, list(inside)] = g * x[list(inside)].softmax(0)
            weight[b, h, t, mine] = gate[len(marks) :]
    return weight @ grouped(v, q)


@pytest.mark.parametrize("top", [None, 2, 0])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] < 40])
def test_landmark_attention(shape: tuple[int, int], top: int | None) -> None:
    q, k, v = tensors(rows=shape[0], keys=shape[1])
    close(sparse.landmark_attention(q, k, v, block=8, top=top), landmark(q, k, v, 8, top))


def test_landmarks_in_chunks_are_landmarks_in_one() -> None:
    q, k, v = tensors(batch=1, rows=45)
    whole = sparse.landmark_attention(q, k, v, block=7)
    parts = [(0, 20), (20, 41), (41, 42), (42, 45)]
    chunks = [sparse.landmark_attention(q[:, :, a:b], k[:, :, :b], v[:, :, :b], block=7) for a, b in parts]
    close(torch.cat(chunks, 2), whole, 1e-5)


# --- core contexts -----------------------------------------------------------------------------------------


def test_core_pool_worked_example() -> None:
    """q = (1, 1), keys (1, 0) and (0, 2), d = 2: weights .3302, .6698."""
    k = torch.tensor([[1.0, 0], [0, 2]])[None, None]
    core, value = sparse.core_pool(torch.ones(1, 1, 1, 2), k, torch.eye(2)[None, None], 2)
    close(core[0, 0, 0], torch.tensor([0.3302, 1.3395]))
    close(value[0, 0, 0], torch.tensor([0.3302, 0.6698]))


def test_core_visibility_worked_example() -> None:
    """g = w = 2, rows 1 ... 8: cores 0 0 0 1 1 2 2 3, local from 1 1 1 3 3 5 5 7."""
    k = torch.zeros(1, 1, 8, 4)
    v = torch.eye(8)[None, None]
    cores = torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 8), 100.0)
    out = sparse.core_context_attention(k, k, v, cores, group=2, window=2)[0, 0]
    for r, (seen, start) in enumerate(
        zip([0, 0, 0, 1, 1, 2, 2, 3], [1, 1, 1, 3, 3, 5, 5, 7], strict=True), 1
    ):
        count = seen + r - start + 1
        want = torch.full((8,), 100.0 * seen / count)
        want[start - 1 : r] += 1 / count
        close(out[r - 1], want, 1e-4)


@pytest.mark.parametrize("sizes", [(4, 8), (4, 10), (1, 5), (16, 3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_core_context_attention(shape: tuple[int, int], sizes: tuple[int, int]) -> None:
    group, window = sizes
    q, k, v = tensors(rows=shape[0], keys=shape[1])
    last = torch.randn(2, 4, shape[1] // group, 16)
    cores = sparse.core_pool(last, k, v, group)
    z = logits(q, k)
    coarse = q.double() @ grouped(cores[0], q).mT * 16**-0.5
    count = torch.arange(shape[1] - shape[0], shape[1])[:, None] + 1
    seen = ((count - window).clamp(min=0)) // group
    z = z.masked_fill(torch.arange(shape[1]) < seen * group, -math.inf)
    coarse = coarse.masked_fill(torch.arange(coarse.shape[3]) >= seen, -math.inf)
    p = torch.cat([coarse, z], 3).softmax(3)
    want = p @ torch.cat([grouped(cores[1], q), grouped(v, q)], 2)
    close(sparse.core_context_attention(q, k, v, cores, group=group, window=window), want)


def test_core_pool_averages_over_a_group() -> None:
    q, k, v = tensors(rows=6, keys=24)
    core, _ = sparse.core_pool(q, k, v, 4)
    z = (q.double()[:, :, :, None] * grouped(k, q).unflatten(2, (6, 4))).sum(-1) / 4
    weight = z.softmax(-1).unflatten(1, (2, 2)).mean(2)
    close(core, (weight[..., None] * k.double().unflatten(2, (6, 4))).sum(3))


# --- chosen blocks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_selected_attention(backend: Backend, shape: tuple[int, int], heads: int) -> None:
    q, k, v = tensors(rows=shape[0], keys=shape[1])
    chosen = torch.rand(2, heads, shape[0], -(-shape[1] // 16)) < 0.4
    with backend.active():
        out, lse = sparse.selected_attention(*(x.to(backend.device) for x in (q, k, v, chosen)), 16)
    seen = chosen.repeat_interleave(4 // heads, 1).repeat_interleave(16, 3)[..., : shape[1]]
    z = logits(q, k).masked_fill(~seen, -math.inf)
    close(lse.cpu(), torch.logsumexp(z, -1))
    close(out.cpu(), z.softmax(-1).nan_to_num(0.0) @ grouped(v, q))


def test_chunk_attention_with_all_chunks_is_dense() -> None:
    q, k, v = tensors(rows=60, keys=100)
    want = logits(q, k).softmax(-1) @ grouped(v, q)
    close(sparse.chunk_attention(q, k, v, chunk=16, top=7)[0], want)
    mean = torch.stack([part.mean(2) for part in k.double().split(16, 2)], 2)
    gate = q.double() @ grouped(mean, q).mT
    row = torch.arange(40, 100)[:, None]
    number = torch.arange(7)
    gate = gate.masked_fill(number * 16 > row, -math.inf).masked_fill(number == row // 16, math.inf)
    chosen = torch.zeros_like(gate, dtype=torch.bool).scatter(3, gate.topk(3, 3).indices, True)
    some = logits(q, k).masked_fill(~chosen.repeat_interleave(16, 3)[..., :100], -math.inf)
    close(sparse.chunk_attention(q, k, v, chunk=16, top=3)[0], some.softmax(-1) @ grouped(v, q))


def nsa(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, block: int, top: int, window: int) -> Tensor:
    z, rows, keys = logits(q, k), q.shape[2], k.shape[2]
    whole = keys // block
    mean = [x.double()[:, :, : whole * block].unflatten(2, (whole, block)).mean(3) for x in (k, v)]
    row = torch.arange(keys - rows, keys)[:, None]
    coarse = q.double() @ grouped(mean[0], q).mT * q.shape[3] ** -0.5
    coarse = coarse.masked_fill((torch.arange(whole) + 1) * block > row + 1, -math.inf)
    p = coarse.softmax(-1).nan_to_num(0.0)
    blocks = -(-keys // block)
    score = torch.nn.functional.pad(p, (0, blocks - whole))
    number, own = torch.arange(blocks), row // block
    score = torch.where(number == own, 1.0, score).unflatten(1, (k.shape[1], -1)).sum(2)
    score = score.masked_fill((number == 0) | (number == own) | (number == own - 1), math.inf)
    score = score.masked_fill(number > own, -math.inf)
    best = score.topk(min(top, blocks), 3).indices
    chosen = torch.zeros_like(score, dtype=torch.bool).scatter(3, best, True)
    chosen = chosen.repeat_interleave(q.shape[1] // k.shape[1], 1).repeat_interleave(block, 3)[..., :keys]
    fine = z.masked_fill(~chosen, -math.inf).softmax(-1) @ grouped(v, q)
    near = z.masked_fill(torch.arange(keys) <= row - window, -math.inf).softmax(-1) @ grouped(v, q)
    parts = torch.stack([p @ grouped(mean[1], q), fine, near], -1)
    return (parts * gates[..., None, :].double()).sum(-1)


@pytest.mark.parametrize("top", [3, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_block_attention(shape: tuple[int, int], top: int) -> None:
    q, k, v = tensors(rows=shape[0], keys=shape[1])
    gates = torch.rand(2, 4, shape[0], 3)
    out = sparse.block_attention(q, k, v, gates, block=16, top=top, window=20)
    close(out, nsa(q, k, v, gates, 16, top, 20))


# --- sinks -------------------------------------------------------------------------------------------------

ACT = [[1, 0, 0, 0], [0.6, 0.4, 0, 0], [0.5, 0.3, 0.2, 0], [0.4, 0.4, 0.1, 0.1]]


def test_calibrated_attention_worked_example(backend: Backend) -> None:
    q, k, v = (x.to(backend.device) for x in with_attention(ACT))
    with backend.active():
        mean = recipes.accumulated_attention(q, k, corrected=True, heads="none", scale=1.0)
        close(mean[0, 0].cpu(), torch.tensor([0.625, 0.366667, 0.15, 0.1]), 1e-5)
        sink = recipes.attention_sinks(mean, 0.25)
        assert sink[0, 0].tolist() == [False, True, False, False]
        out = sparse.calibrated_attention(q, k, v, sink, beta=0.4, scale=1.0)[0, 0].cpu()
    want = [[1, 0, 0, 0], [0.84, 0.16, 0, 0], [0.628571, 0.12, 0.251429, 0], [0.56, 0.16, 0.14, 0.14]]
    close(out, torch.tensor(want), 1e-5)


@pytest.mark.parametrize("heads", [2, 4])
def test_calibrated_attention(heads: int) -> None:
    q, k, v = tensors(rows=40, keys=70)
    sink = torch.rand(2, heads, 70) < 0.2
    attention = logits(q, k).softmax(-1).float()
    full = sink.repeat_interleave(4 // heads, 1)
    want = recipes.redistribute_sinks(attention, full, 0.3).double() @ grouped(v, q)
    close(sparse.calibrated_attention(q, k, v, sink, beta=0.3), want)


# --- all of them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_come_back_as_they_are(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in tensors(rows=40, keys=70))
    cores = sparse.core_pool(q[:, :, :17], k, v, 4)
    gates = torch.rand(2, 4, 40, 3).to(dtype)
    sink = torch.rand(2, 2, 70) < 0.2
    exact = [x.float() for x in (q, k, v)]
    pairs = [
        (sparse.landmark_attention(q, k, v, block=8), sparse.landmark_attention(*exact, block=8)),
        (
            sparse.core_context_attention(q, k, v, cores, group=4, window=8),
            sparse.core_context_attention(*exact, (cores[0].float(), cores[1].float()), group=4, window=8),
        ),
        (
            sparse.block_attention(q, k, v, gates, block=16, top=5, window=9),
            sparse.block_attention(*exact, gates.float(), block=16, top=5, window=9),
        ),
        (sparse.calibrated_attention(q, k, v, sink), sparse.calibrated_attention(*exact, sink)),
    ]
    for got, want in pairs:
        assert got.dtype == dtype
        close(got, want, 0.05)  # values up to 5, of 8 bits, in up to five parts
    assert cores[0].dtype == dtype


def test_errors() -> None:
    q, k, v = tensors(rows=40, keys=70)
    with pytest.raises(ValueError, match="landmark_attention: block must be >= 2, got 1"):
        sparse.landmark_attention(q, k, v, block=1)
    with pytest.raises(ValueError, match="landmark_attention: T must be at most S=70, got 80"):
        sparse.landmark_attention(torch.cat([q, q], 2), k, v, block=4)
    with pytest.raises(ValueError, match="core_pool: q_last must be of 17 groups, got 40"):
        sparse.core_pool(q, k, v, 4)
    with pytest.raises(
        ValueError, match="core_context_attention: cores must be of at least 15 groups, got 3"
    ):
        sparse.core_context_attention(q, k, v, (k[:, :, :3], v[:, :, :3]), group=4, window=10)
    with pytest.raises(ValueError, match="selected_attention: chosen must be bool of one of"):
        sparse.selected_attention(q, k, v, torch.ones(2, 3, 40, 5, dtype=torch.bool), 16)
    with pytest.raises(ValueError, match="choose_chunks: top must be >= 1, got 0"):
        sparse.chunk_attention(q, k, v, chunk=16, top=0)
    with pytest.raises(ValueError, match=r"block_attention: gates must be of shape \[2, 4, 40, 3\]"):
        sparse.block_attention(q, k, v, torch.ones(2, 4, 40))
    with pytest.raises(ValueError, match="calibrated_attention: sink must be bool of one of"):
        sparse.calibrated_attention(q, k, v, torch.zeros(2, 2, 70))
    with pytest.raises(ValueError, match=r"calibrated_attention: beta must be in \[0, 1\], got 2"):
        sparse.calibrated_attention(q, k, v, torch.zeros(2, 2, 70, dtype=torch.bool), beta=2)
