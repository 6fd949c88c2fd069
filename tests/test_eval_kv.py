"""Methods on the KV cache in the evaluation: what they report is what the prompt left, and bytes are real."""

from collections.abc import Iterator

import pytest
import tiny_models
import torch
from tokencomp import eval as evaluation
from tokencomp import methods
from tokencomp.eval import Table, compressors, evaluate
from tokencomp.eval.kv import Cached, fitted
from tokencomp.eval.measure import cache_bytes
from tokencomp.zoo import tasks

NAMES = [name for name in evaluation.known("keys") if isinstance(compressors.get("keys", name), Cached)]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


QUANTIZING = [name for name in NAMES if getattr(compressors.get("keys", name), "adaptive", False)]


def test_all_methods_are_there() -> None:
    stages = {entry.name: entry.stage for entry in methods.all_methods()}
    kv = {name for name, stage in stages.items() if stage == "kv"}
    quantizing = {name for name, stage in stages.items() if stage == "kv-quant"}
    assert set(NAMES) - set(QUANTIZING) == kv - {"random_kv", "stride_kv"}
    assert set(QUANTIZING) == quantizing | {"uniform-2", "uniform-8", "kivi-4"}
    assert len(NAMES) > 25


@pytest.mark.parametrize("tokens", [32, 300])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in QUANTIZING])
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
    assert fitted(methods.KIVI(), 64, layers=4) == methods.KIVI(recent=32, edges=0)
    assert fitted(methods.KIVI(), 1000, layers=32) == methods.KIVI()
    assert fitted(methods.Tiered(), 64, layers=16).method == methods.A2SF(budget=1.0)


@pytest.mark.parametrize("name", QUANTIZING)
def test_quantizing_methods_hold_all_tokens_in_fewer_bytes(name: str) -> None:
    model, ids = tiny_models.llama(), tiny_models.ids(1, 300)
    plain = cache_bytes(model(input_ids=ids, use_cache=True).past_key_values)
    before = tiny_models.state(model)
    with compressors.get("keys", name).apply(model, 1.0, seed=0) as handle:
        model(input_ids=ids, use_cache=True)
        report = handle.report()
        assert report is not None
        assert report.total == 300
        kept = sum(report.kept) / len(report.kept)
        assert kept == (240 if name == "tiered" else 300)
        assert handle.handle.report().memory.used < 0.75 * plain  # type: ignore[attr-defined]
    assert tiny_models.state(model) == before


def test_quantizing_methods_have_one_row() -> None:
    table = evaluate(
        tiny_models.llama(512), tasks.Text("text", prompt=160, scored=8), ["uniform", "uniform-2"],
        (0.25, 0.5), samples=2, show=False,
    )  # fmt: skip
    assert [row.method for row in table.rows][-2:] == ["uniform", "uniform-2"]
    four, two = table.row("uniform"), table.row("uniform-2")
    assert four.adaptive
    assert four.versus_random is None
    assert four.kv_bytes is not None
    assert two.kv_bytes is not None
    assert two.kv_bytes < four.kv_bytes
    assert Table.from_json(table.to_json()) == table


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
