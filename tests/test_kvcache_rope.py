"""Turning keys to new positions: against the reference, Hugging Face's frequencies and its rotation."""

import pytest
import torch
from backends import Backend
from cases_kvcache import KV_CASES, KVCase
from kvcache_yardstick import check_shift, run_in_place
from tokencomp import reference, rope
from tokencomp.reference.kvcache import slots
from torch import Tensor

case_of = pytest.mark.parametrize("case", [c for c in KV_CASES if c.D > 1][::2], ids=lambda c: c.name)
LAYOUTS = ("half", "interleaved")


@case_of
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shift(backend: Backend, case: KVCase, layout: str) -> None:
    check_shift(backend, case, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("context", [900, 100_000])
def test_shift_of_a_rotated_key_is_the_key_rotated_anew(backend: Backend, layout: str, context: int) -> None:
    """rotate(raw, new) == shift(rotate(raw, old), old, new) to 1e-5."""
    case = KVCase(((40, 25),), D=64)
    cache, g = case.cache(), case.generator()
    inv_freq = rope.inverse_frequencies({"rope_theta": 10000.0}, 64)
    old, new = (torch.randint(0, context, (1, 2, 40), generator=g).int() for _ in range(2))
    raw = reference.kv_gather(*cache.parts, size=40)[0][0].double()

    def rotated(position: Tensor, h: int) -> Tensor:
        angle = position[0, h, :, None].double() * inv_freq.double()
        return reference.rotate(raw[h], angle, layout)

    for h, n in enumerate(case.lengths[0]):
        page, head, place = slots(cache.k_pages, cache.block_table, 0, h, n)
        cache.k_pages[page, head, place] = rotated(old, h)[:n].float()
    got = run_in_place(backend, "rope_shift_", cache, old, new, inv_freq, layout=layout)
    keys = reference.kv_gather(*got.parts, size=40)[0][0]
    for h, n in enumerate(case.lengths[0]):
        torch.testing.assert_close(keys[h, :n].double(), rotated(new, h)[:n], atol=1e-5, rtol=0)


SCALED = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 4096},
}


@pytest.mark.parametrize(("kind", "extra"), [
    *SCALED.items(),
    ("default", {"partial_rotary_factor": 0.5}),
    ("linear", {"factor": 2.0, "partial_rotary_factor": 0.25}),
    ("yarn", {"factor": 16.0, "original_max_position_embeddings": 2048, "beta_fast": 20.0, "beta_slow": 2.0}),
    ("yarn", {"factor": 4.0, "original_max_position_embeddings": 4096, "truncate": False}),
])  # fmt: skip
def test_frequencies_are_those_of_hugging_face(kind: str, extra: dict[str, float]) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_type": kind, "rope_theta": 500000.0, **extra}
    config = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=16384, rope_parameters=parameters
    )
    if kind == "default" and "partial_rotary_factor" in extra:  # Llama itself has no partial rotation
        want = LlamaRotaryEmbedding(config).inv_freq[::2]
    else:
        want = LlamaRotaryEmbedding(config).inv_freq
    got = rope.inverse_frequencies(parameters, 64)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=2e-6, atol=0)


def test_frequencies_of_older_configurations() -> None:
    old = rope.inverse_frequencies({"type": "linear", "factor": 2, "rope_theta": 10000}, 8)
    torch.testing.assert_close(old, torch.tensor([1, 0.1, 0.01, 0.001]) / 2)
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0}
    given = rope.inverse_frequencies({**yarn, "factor": 4.0, "original_max_position_embeddings": 4096}, 64)
    taken = rope.inverse_frequencies(
        {**yarn, "original_max_position_embeddings": 4096}, 64, max_position=16384
    )
    assert torch.equal(given, taken)


@pytest.mark.parametrize(("parameters", "message"), [
    ({"rope_type": "dynamic", "factor": 2.0}, "got 'dynamic', whose frequencies change"),
    ({"rope_type": "longrope"}, "got 'longrope', whose frequencies change"),
    ({"rope_type": "new"}, r"rope_type must be one of \('default', 'linear', 'llama3', 'yarn'\), got 'new'"),
    ({"rope_type": "linear"}, "factor must be given, got None"),
    ({"rope_type": "linear", "factor": 0.5}, r"factor must be in \[1.0, inf\], got 0.5"),
    ({"rope_type": "linear", "factor": "2"}, "factor must be"),
    ({"rope_theta": -1}, "rope_theta must be finite and > 0, got -1"),
    ({"partial_rotary_factor": 1.5}, r"partial_rotary_factor must be in \[0.0, 1.0\], got 1.5"),
    ({"partial_rotary_factor": 0.02}, "rotated channels must be even and >= 2, got 1"),
    ({"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings must be given"),
    ({"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 1}, "above 4.0, got 1.0"),
])  # fmt: skip
def test_frequencies_that_cannot_be(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"inverse_frequencies: .*{message}"):
        rope.inverse_frequencies(parameters, 64)
