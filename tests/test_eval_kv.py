"""Methods on the KV cache in the evaluation: what they report is what the prompt left, and bytes are real."""

from collections.abc import Iterator

import pytest
import tiny_models
import torch
from tokencomp import eval as evaluation
from tokencomp import methods
from tokencomp.eval import compressors, evaluate
from tokencomp.eval.kv import Cached, fitted
from tokencomp.zoo import tasks

NAMES = [name for name in evaluation.known("keys") if isinstance(compressors.get("keys", name), Cached)]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_all_methods_are_there() -> None:
    kv = {entry.name for entry in methods.all_methods() if entry.stage == "kv"}
    assert set(NAMES) == kv - {"random_kv", "stride_kv"}
    assert len(NAMES) > 15


@pytest.mark.parametrize("tokens", [32, 300])
@pytest.mark.parametrize("name", NAMES)
def test_methods_keep_what_they_report(name: str, tokens: int) -> None:
    model, ids = tiny_models.llama(), tiny_models.ids(1, tokens)
    before = tiny_models.state(model)
    compressor = compressors.get("keys", name)
    for budget in (0.1, 0.5):
        with compressor.apply(model, budget, seed=0) as handle:
            with pytest.raises(RuntimeError, match="nothing to report"):
                handle.report()
            cache = model(input_ids=ids, use_cache=True).past_key_values
            report = handle.report()
            assert report is not None
            assert report.total == tokens
            held = [paged.layer.store.host_lengths.mean() for paged in cache.paged]
            assert list(report.kept) == held
            if name != "lazy_eviction":  # which leaves prompts alone
                assert sum(held) / len(held) == pytest.approx(budget * tokens, abs=16)
            model(input_ids=ids[:, :1], past_key_values=cache)
            assert handle.report() == report
        assert tiny_models.state(model) == before


def test_knobs_are_cut_to_short_prompts() -> None:
    assert fitted(methods.SnapKV(budget=0.25), 1000) == methods.SnapKV(budget=0.25)
    assert fitted(methods.SnapKV(budget=0.25), 32).window == 4
    assert fitted(methods.AdaKV(methods.SnapKV(budget=0.25)), 32).method.window == 4
    assert fitted(methods.StreamingLLM(budget=0.1), 32).sinks == 0
    assert fitted(methods.RandomKV(budget=0.1), 32, seed=5).seed == 5


def test_bytes_in_the_table_are_those_of_the_pools() -> None:
    table = evaluate(
        tiny_models.llama(512),
        tasks.Text("text", prompt=160, scored=8),
        ["h2o"],
        (0.25,),
        samples=2,
        show=False,
    )
    none, ours = (next(row for row in table.rows if row.method == name) for name in ("none", "h2o"))
    slot = 3 * 2 * 2 * 8 * 4  # layers, heads, key and value, width, bytes
    assert none.kv_bytes == 160 * slot
    assert ours.tokens_kept == 40
    assert ours.kv_bytes is not None
    assert 48 * slot <= ours.kv_bytes <= 1.3 * 48 * slot  # 3 pages of 16, tables and scores
