"""Methods on the attention of prompts: their lists against masks, coverage, padding, chunks, errors."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from backends import Backend
from sparse_prompts import LISTED, PROMPT_METHODS, attend, choose, dense, mask_of, tensors, view_of
from tokencomp import block_lists, methods
from tokencomp.block_lists import BlockLists
from tokencomp.methods import sparse
from tokencomp.methods.duo_attention import HeadSearch
from tokencomp.methods.minference import PatternSearch
from tokencomp.prompt_rows import last_rows

every_list = pytest.mark.parametrize("method", LISTED.values(), ids=list(LISTED))


def test_every_method_on_prompts_is_here() -> None:
    known = {type(method) for method in PROMPT_METHODS.values()}
    assert {entry.cls for entry in methods.all_methods() if hasattr(entry.cls, "lists")} == known
    assert all(isinstance(method, sparse.SparseMethod) for method in PROMPT_METHODS.values())


@every_list
def test_attention_is_that_of_the_mask_that_the_lists_mean(backend: Backend, method: Any) -> None:
    view = view_of(*tensors(batch=1, rows=400))
    lists = choose(method, view, backend)
    seen = mask_of(lists, view)
    with backend.active():
        out, _ = attend(lists, view)
    want, share = dense(view, seen)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=2e-5)  # logits up to 60, in float32
    assert share.min() < 0.999, "the method restricts nothing, so the test says nothing"


@every_list
@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (64, 64), (200, 200), (70, 333), (1, 130)])
def test_the_first_and_the_own_key_are_always_seen(method: Any, shape: tuple[int, int]) -> None:
    view = view_of(*tensors(rows=shape[0], keys=shape[1]))
    seen = mask_of(method.choose_prompt(view), view)
    row = torch.arange(shape[0])
    assert seen[:, :, row, row + shape[1] - shape[0]].all()
    first = seen[..., 0].all()
    assert first or isinstance(method, methods.MoBA)  # MoBA gates the first chunk like any other


@every_list
def test_padding_changes_nothing(method: Any) -> None:
    """Sequences of a padded batch get the lists that they get alone, whatever padding holds."""
    q, k, v = tensors(batch=3, rows=190)
    counts = [190, 130, 0]
    for b, n in enumerate(counts):
        q[b, :, n:] = 77.0
        k[b, :, n:] = torch.nan
    seen = mask_of(method.choose_prompt(view_of(q, k, v, counts)), view_of(q, k, v, counts))
    for b, n in enumerate(counts[:2]):
        own = view_of(q[b : b + 1, :, :n], k[b : b + 1, :, :n], v[b : b + 1, :, :n])
        assert torch.equal(seen[b : b + 1, :, :n, :n], mask_of(method.choose_prompt(own), own))
    assert not seen[2].any()


@every_list
def test_a_chunk_sees_its_history(method: Any) -> None:
    """The last rows of a prompt, as a chunk of its own on a multiple of the blocks, where lists are local."""
    q, k, v = tensors(rows=256)
    view = view_of(q[:, :, 128:], k, v)
    seen = mask_of(method.choose_prompt(view), view)
    assert seen.shape == (2, 4, 128, 256)
    if isinstance(method, methods.FlexPrefill):
        return  # pools over all query blocks together: a chunk has others
    whole = view_of(q, k, v)
    torch.testing.assert_close(seen, mask_of(method.choose_prompt(whole), whole)[:, :, 128:])


def test_holes_before_the_first_key_are_not_looked_at() -> None:
    q, k, v = tensors(batch=1, rows=100, keys=228)
    alone = view_of(q, k[:, :, 128:], v[:, :, 128:])
    k = k.clone()
    k[:, :, :128] = torch.nan
    view = view_of(q, k, v)
    view.first = torch.full((1, 2), 128, dtype=torch.int32)
    for name, method in LISTED.items():
        seen = mask_of(method.choose_prompt(view), view)[..., 128:]
        if not isinstance(method, methods.FlexPrefill):  # counts columns in blocks from the first slot on
            assert torch.equal(seen, mask_of(method.choose_prompt(alone), alone)), name


@every_list
def test_all_blocks_are_dense_attention(method: Any) -> None:
    """A method in dense layers and short prompts names nothing; all causal blocks give the same result."""
    view = view_of(*tensors())
    assert replace(method, dense_layers=1).choose_prompt(view) is None
    assert replace(method, shortest=201).choose_prompt(view) is None
    causal = last_rows(view.q, view.keys()).visible(64, 64)
    lists = block_lists.lists_of(causal, 64, 64)
    for one, other in zip(attend(lists, view), attend(None, view), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6)


# --- more listed, more attention ---------------------------------------------------------------------------

SCALES: dict[str, list[Any]] = {
    "minference": [
        methods.MInference(vertical=n, slash=n, queries=32, sinks=1, recent=1) for n in (2, 30, 200, 512)
    ],
    "flexprefill": [methods.FlexPrefill(gamma=g, min_budget=0, block=64) for g in (0.2, 0.6, 0.9, 1.0)],
    "flexprefill-aware": [
        methods.FlexPrefill(gamma=g, min_budget=0, tau=1.0, block=64) for g in (0.2, 0.6, 0.9, 1.0)
    ],
    "xattention": [methods.XAttention(threshold=t, stride=8, block=64) for t in (0.2, 0.6, 0.9, 1.0)],
    "duo": [methods.DuoAttention(sinks=4, recent=n) for n in (1, 64, 200, 500)],
    "moba": [methods.MoBA(chunk=64, top=n) for n in (1, 2, 4, 8)],
}


@pytest.mark.parametrize("name", SCALES)
def test_attention_that_is_kept_grows_with_the_lists(name: str) -> None:
    view = view_of(*tensors(batch=1, rows=512))
    kept, listed = [], []
    visible = last_rows(view.q, view.keys()).visible(64, 64)
    for method in SCALES[name]:
        lists = method.choose_prompt(view)
        kept.append(float(dense(view, mask_of(lists, view))[1].mean()))
        visible = last_rows(view.q, view.keys()).visible(lists.block_q, lists.block_k)
        listed.append(float(block_lists.density(lists, visible).mean()))
    assert kept == sorted(kept)
    assert listed == sorted(listed)
    assert kept[0] < 0.95 * kept[-1]
    assert kept[-1] == pytest.approx(1.0, abs=1e-6)


def test_kept_attention_is_a_difference_of_log_sum_exps() -> None:
    """How evaluation measures it, without the matrix."""
    view = view_of(*tensors(batch=1))
    lists = LISTED["xattention"].choose_prompt(view)
    share = (attend(lists, view)[1] - attend(None, view)[1]).exp()
    torch.testing.assert_close(share.double(), dense(view, mask_of(lists, view))[1], rtol=0, atol=1e-5)


# --- worked examples and rules -----------------------------------------------------------------------------


def test_minference_takes_the_columns_and_the_diagonals_that_the_last_rows_attend_to() -> None:
    """All rows attend to key 70: a column. All rows attend to the key 100 before: a slash."""
    rows = 320
    q, k = torch.zeros(1, 1, rows, 8), torch.zeros(1, 1, rows, 8)
    q[..., 0] = 30.0
    k[:, :, 70, 0] = 3.0
    view = view_of(q.expand(1, 2, -1, -1), k, torch.randn(1, 1, rows, 8))
    method = methods.MInference(vertical=1, slash=1, queries=8, sinks=0, recent=1)
    lists = method.choose_prompt(view)
    assert isinstance(lists, BlockLists)
    assert lists.columns is not None and lists.column_ptr is not None  # noqa: PT018
    assert lists.column_ptr[:6].diff().tolist() == [0, 0, 1, 1, 1]  # block 1, of the diagonal, holds it
    assert lists.columns[:3].tolist() == [70, 70, 70]
    assert lists.indices[:5].tolist() == [0, 1, 2, 3, 4]  # the diagonal
    # Random unit keys, and each query is the key 100 tokens before it.
    k = torch.nn.functional.normalize(torch.randn(1, 1, rows, 8), dim=-1)
    q = 60 * torch.roll(k, 100, 2).expand(1, 2, -1, -1)
    view = view_of(q, k, torch.randn(1, 1, rows, 8))
    lists = replace(method, slash=2).choose_prompt(view)
    assert isinstance(lists, BlockLists)
    seen = mask_of(lists, view)
    row = torch.arange(100, rows)
    assert seen[:, :, row, row - 100].all()


def test_minference_patterns_of_heads() -> None:
    view = view_of(*tensors(batch=1, rows=256))
    seen = mask_of(LISTED["minference-patterns"].choose_prompt(view), view)[0]
    row, key = torch.arange(256)[:, None], torch.arange(256)
    window = ((row // 64 * 64 - 49) // 64 * 64).clamp(min=0)  # the first row of a block sees 50 keys
    assert torch.equal(seen[1], (key <= row) & ((key < 64) | (key >= window)))
    blocks = seen[2].unflatten(0, (4, 64)).unflatten(2, (4, 64)).any(3).any(1)
    assert blocks.sum(1).tolist() == [1, 2, 2, 2]
    assert blocks[:, 0].all()
    assert blocks.diagonal().all()
    with pytest.raises(ValueError, match="MInference: patterns must be of at least 3 layers, got 2 layers"):
        LISTED["minference-patterns"].choose_prompt(replace(view, layer=2))


def test_pattern_search_makes_a_table(tmp_path: Any) -> None:
    """The best candidate has the least error; the table survives JSON; dearer ones can be ruled out."""
    full, small = ("a_shape", 0, 512), ("a_shape", 1, 1)
    views = [
        replace(view_of(*tensors(rows=256, seed=seed)), layer=layer) for seed in (0, 1) for layer in (0, 1)
    ]
    for most, best in ((1.0, full), (0.5, small), (0.01, small)):
        search = PatternSearch(
            (small, full, ("vertical_slash", 1, 1)) if most > 0.01 else (full, small), most
        )
        for view in views:
            assert search.choose_prompt(view) is None
        table = search.patterns()
        assert len(table) == 2
        if most != 0.5:
            assert table == [[list(best)] * 4] * 2
        assert (
            all(pattern[0] != "a_shape" or pattern[2] < 512 for layer in table for pattern in layer)
            or most == 1
        )
        path = tmp_path / "patterns.json"
        path.write_text(json.dumps(table))
        again = methods.MInference(patterns=json.loads(path.read_text()))
        lists = again.choose_prompt(views[0])
        assert torch.equal(
            mask_of(lists, views[0]),
            mask_of(methods.MInference(patterns=table).choose_prompt(views[0]), views[0]),
        )
    with pytest.raises(ValueError, match="PatternSearch: layers must have seen a prompt"):
        PatternSearch().patterns()


def test_head_search_tells_heads_that_look_far(tmp_path: Any) -> None:
    """kv head 0 looks at the key 150 before; kv head 1 at the newest."""
    rows = 320
    k = torch.nn.functional.normalize(torch.randn(1, 2, rows, 16), dim=-1)
    q = 100 * torch.stack([torch.roll(k[:, 0], 150, 1), k[:, 1]], 1).repeat_interleave(2, 1)
    view = view_of(q, k, torch.randn(1, 2, rows, 16))
    search = HeadSearch(sinks=0, recent=16)
    with pytest.raises(ValueError, match="HeadSearch: layers must have seen a prompt"):
        search.gates()
    assert search.choose_prompt(view) is None
    gates = json.loads(json.dumps(search.gates()))
    assert gates[0][0] > 0.3
    assert gates[0][1] < 0.01
    method = methods.DuoAttention(gates, streaming=0.5, sinks=0, recent=16)
    assert method.far() == [[True, False]]
    assert methods.DuoAttention(gates, threshold=0.2).far() == [[True, False]]
    paid = 1 - dense(view, mask_of(methods.DuoAttention(sinks=0, recent=16).choose_prompt(view), view))[1]
    want = paid.mean(2)[0].unflatten(0, (2, 2)).amax(1)
    torch.testing.assert_close(torch.tensor(gates[0], dtype=torch.float64), want, rtol=0, atol=1e-5)


def test_head_search_looks_at_the_last_rows() -> None:
    q, k, v = tensors(batch=2, rows=180)
    counts = [180, 150]
    for some in (1, 60):
        search = HeadSearch(sinks=4, recent=30, rows=some)
        search.choose_prompt(view_of(q, k, v, counts))
        shares = []
        for b, n in enumerate(counts):
            own = view_of(q[b : b + 1, :, :n], k[b : b + 1, :, :n], v[b : b + 1, :, :n])
            lists = methods.DuoAttention(sinks=4, recent=30).choose_prompt(own)
            shares.append(1 - dense(own, mask_of(lists, own))[1][0, :, n - some :])
        want = torch.stack(shares).mean((0, 2)).unflatten(0, (2, 2)).amax(1)
        got = torch.tensor(search.gates()[0], dtype=torch.float64)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="HeadSearch: rows must be None or >= 1, got 0"):
        HeadSearch(rows=0)


def test_duo_attention_in_a_decode_step() -> None:
    view = replace(view_of(*tensors(batch=2, rows=1, keys=50)), step=1, layers=1)
    view.lengths = torch.tensor([[50, 50], [50, 20]], dtype=torch.int32)
    lists = methods.DuoAttention([[0.9, 0.1]], sinks=2, recent=4).choose(view)
    assert lists is not None
    read = [[sorted(set(row.tolist()) - {-1}) for row in sequence] for sequence in lists.index]
    assert read[0] == [list(range(50)), [0, 1, 46, 47, 48, 49]]
    assert read[1] == [list(range(50)), [0, 1, 16, 17, 18, 19]]
    assert methods.DuoAttention([[0.9, 0.1]], streaming=0.0).choose(view) is None


def test_duo_attention_streams_a_share_of_all_heads() -> None:
    gates = [[0.9, 0.2], [0.2, 0.4]]
    assert methods.DuoAttention(gates, streaming=0.25).far() == [[True, False], [True, True]]
    assert methods.DuoAttention(gates, streaming=0.5).far() == [[True, False], [False, True]]
    assert methods.DuoAttention(gates, threshold=0.3).far() == [[True, False], [False, True]]


def test_moba_rows_choose_their_own_chunk_and_the_best() -> None:
    """Means (1, 0), (0, 1), (-1, 0); a query (-1, 2) in the third chunk: its own and the second."""
    k = torch.zeros(1, 1, 6, 2)
    k[0, 0, :2, 0], k[0, 0, 2:4, 1], k[0, 0, 4:, 0] = 1, 1, -1
    q = torch.tensor([-1.0, 2.0]).expand(1, 1, 6, 2)
    from tokencomp.sparse import choose_chunks

    chosen = choose_chunks(last_rows(q, k), 2, 2)[0, 0].int().tolist()
    assert chosen == [[1, 0, 0]] * 2 + [[1, 1, 0]] * 2 + [[0, 1, 1]] * 2


@pytest.mark.parametrize(
    ("method", "knobs", "message"),
    [
        (methods.MInference, {"vertical": 0}, "MInference: vertical must be >= 1, got 0"),
        (methods.MInference, {"patterns": [[["spiral", 1, 1]]]}, "MInference: patterns must be .kind, size"),
        (methods.FlexPrefill, {"gamma": 0.0}, r"FlexPrefill: gamma must be in \(0, 1\], got 0.0"),
        (methods.FlexPrefill, {"block": 32}, "FlexPrefill: block must be 64 or 128, got 32"),
        (methods.FlexPrefill, {"max_budget": 5}, "FlexPrefill: max_budget must be None or >= min_bud"),
        (methods.XAttention, {"threshold": 1.5}, r"XAttention: threshold must be in \(0, 1\], got 1.5"),
        (methods.XAttention, {"threshold": [[0.5, 0.0]]}, r"XAttention: threshold must be in \(0, 1\], got"),
        (methods.XAttention, {"stride": 48}, "XAttention: stride must be a divisor of block=128, got 48"),
        (methods.ZipVLPrompt, {"tau": -0.1}, r"ZipVLPrompt: tau must be in \[0, 1\], got -0.1"),
        (methods.ZipVLPrompt, {"recent": 0}, r"ZipVLPrompt: recent must be in \[1, 65536\], got 0"),
        (methods.DuoAttention, {"gates": [[1.0, -0.1]]}, r"DuoAttention: gates must be in \[0, 1\], got"),
        (methods.DuoAttention, {"streaming": 2.0}, r"DuoAttention: streaming must be None or in \[0, 1\]"),
        (methods.MoBA, {"chunk": 100}, "MoBA: chunk must be a multiple of 64, got 100"),
        (methods.MoBA, {"top": 0}, "MoBA: top must be >= 1, got 0"),
        (methods.MoBA, {"dense_layers": -1}, "MoBA: dense_layers must be >= 0, got -1"),
        (methods.XAttention, {"shortest": -1}, "XAttention: shortest must be >= 0, got -1"),
    ],
)  # fmt: skip
def test_bad_knobs(method: Any, knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(**knobs)
