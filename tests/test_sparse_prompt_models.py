"""Prompts of whole models that attend as methods choose: everything listed, padding, chunks, calibration."""

import json
from typing import Any

import pytest
import tokencomp
import torch
from decoders import answer, decoder, left, prompt, steps
from sparse_prompts import PROMPT_METHODS
from tokencomp import methods
from tokencomp.methods import DuoAttention, FlexPrefill, MInference, MoBA, SnapKV, XAttention, ZipVLPrompt
from tokencomp.methods.duo_attention import HeadSearch
from tokencomp.methods.minference import PatternSearch

LAYERS = 3

# Methods with knobs that list everything, of prompts of 200 tokens.
ALL: dict[str, Any] = {
    "minference": MInference(vertical=512, slash=512),
    "flexprefill": FlexPrefill(gamma=1.0, min_budget=4096),
    "xattention": XAttention(threshold=1.0, stride=8),
    "duo": DuoAttention(recent=150, sinks=20),
    "moba": MoBA(chunk=64, top=9),
    "zipvl": ZipVLPrompt(tau=1.0),
}

# What fits the tiny models: three layers, eight query heads.
PATTERNS = [[["vertical_slash", 4, 3], ["a_shape", 10, 50]] * 4] * LAYERS
FITTED = {
    "minference-patterns": MInference(patterns=PATTERNS, queries=16, sinks=4, recent=2),
    "xattention-heads": XAttention(threshold=[[0.3, 0.6] * 4] * LAYERS, block=64, stride=8),
    "duo": DuoAttention([[0.1, 0.9]] * LAYERS, sinks=8, recent=30),
}
TINY = {name: FITTED.get(name, method) for name, method in PROMPT_METHODS.items()}
TINY["minference"] = MInference(vertical=4, slash=2, queries=16, sinks=2, recent=1)
TINY["moba"] = MoBA(chunk=64, top=1)
TINY["flexprefill-aware"] = FlexPrefill(gamma=0.3, tau=1.0, min_budget=0, block=64)


def logits(model: Any, method: Any, ids: Any, mask: Any = None, chunks: Any = None) -> tuple[Any, Any]:
    with torch.no_grad(), tokencomp.compress(model, method) as handle:
        said = steps(model, ids, mask, chunks or [ids.shape[1]])
        return said, handle.report()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_everything_listed_is_the_model_itself(family: str, name: str) -> None:
    model, ids = decoder(family), prompt(2, 200)
    with torch.no_grad():
        want = model(ids).logits
    said, _ = logits(model, ALL[name], ids)
    assert float((said - want).abs().max()) < 1e-4 * float(want.abs().max())


@pytest.mark.parametrize("name", TINY)
def test_padding_and_other_sequences_change_nothing(name: str) -> None:
    model, ids, mask = decoder(), prompt(2, 210), left(2, 210, 30)
    said, _ = logits(model, TINY[name], ids, mask)
    alone, _ = logits(model, TINY[name], ids[:1, 30:])
    torch.testing.assert_close(said[:1, 30:], alone, rtol=0, atol=1e-4 * float(alone.abs().max()))


@pytest.mark.parametrize("name", TINY)
def test_prompts_read_less_and_answers_go_on(name: str) -> None:
    model, ids = decoder(), prompt(2, 300)
    dense, _ = logits(model, ALL["xattention"], ids)
    said, _ = logits(model, TINY[name], ids)
    assert not torch.allclose(said, dense, atol=1e-3 * float(dense.abs().max()))
    with torch.no_grad(), tokencomp.compress(model, TINY[name]) as handle:
        model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
        text = str(handle.report())
    assert text


@pytest.mark.parametrize("name", TINY)
def test_chunks_of_a_prompt(name: str) -> None:
    """Chunks choose by their own rows: finite, and of full lists the same as in one."""
    model, ids = decoder(), prompt(2, 230)
    said, _ = logits(model, TINY[name], ids, left(2, 230, 17), [100, 130])
    assert said[1].isfinite().all()
    base = name.split("-")[0]
    if base in ("xattention", "moba", "minference"):
        whole, _ = logits(model, ALL[base], ids)
        parts, _ = logits(model, ALL[base], ids, None, [100, 64, 66])
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-4 * float(whole.abs().max()))


@pytest.mark.parametrize("name", ["minference", "xattention", "zipvl", "duo"])
def test_beside_a_method_on_the_cache(name: str) -> None:
    model, ids = decoder(), prompt(2, 150)
    with tokencomp.compress(model, TINY[name], SnapKV(budget=40, window=8)):
        out = answer(model, ids, left(2, 150, 9), max_new_tokens=12)
    assert out.shape == (2, 162)


def test_patterns_and_gates_from_calibration_text() -> None:
    model, ids = decoder(), prompt(2, 200)
    search = PatternSearch(candidates=(("vertical_slash", 4, 2), ("a_shape", 4, 16)), most=0.9)
    heads = HeadSearch(sinks=4, recent=16)
    with torch.no_grad():
        want = model(ids).logits
        for probe in (search, heads):
            with tokencomp.compress(model, probe):
                said = model(ids).logits
            torch.testing.assert_close(said, want, rtol=0, atol=1e-4 * float(want.abs().max()))
    table = json.loads(json.dumps(search.patterns()))
    gates = json.loads(json.dumps(heads.gates()))
    assert [len(layer) for layer in table] == [8] * LAYERS
    assert [len(layer) for layer in gates] == [2] * LAYERS
    assert all(0 < gate < 1 for layer in gates for gate in layer)
    for method in (
        methods.MInference(patterns=table),
        DuoAttention(gates, streaming=0.5, sinks=4, recent=16),
    ):
        said, _ = logits(model, method, ids)
        assert said.isfinite().all()
