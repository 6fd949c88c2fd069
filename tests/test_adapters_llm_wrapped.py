"""Decoders under ``torch.autocast``, and with modules that a wrapper such as accelerate has changed."""

from functools import wraps
from typing import Any

import pytest
import tokencomp
import torch
from cache_methods import KeepAll
from decoders import answer, decoder, left, prompt, steps
from tokencomp import methods

pytest.importorskip("transformers", reason="models need the extra hf")
HALVES = [torch.bfloat16, torch.float16]


def under(dtype: torch.dtype | None, model: Any) -> torch.Tensor:
    """Logits of a padded batch, a prompt and five decode steps."""
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        return steps(model, prompt(2, 40), left(2, 40), [35, *[1] * 5]).float()[:, 5:]


def noise(dtype: torch.dtype, model: Any) -> float:
    """What autocast alone does to the model."""
    return float((under(dtype, model) - under(None, model)).abs().max())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("attention", ["paged", "model"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_nothing_lost_is_what_the_model_says(dtype: torch.dtype, attention: Any, family: str) -> None:
    model = decoder(family, "eager" if family == "gemma2" else None)  # transformers 5.4: sdpa has no soft cap
    with tokencomp.compress(model, KeepAll(), attention=attention) as handle:
        ours = under(dtype, model)
        assert handle.cache.paged[0].layer.store.pool.dtype == dtype
    assert (ours - under(None, model)).abs().max() <= 2 * noise(dtype, model)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "method",
    [
        methods.SnapKV(16, window=4, every=2),
        methods.A2SF(24, every=2),
        methods.KeyDiff(16),
        methods.Uniform(bits=8),
    ],
    ids=lambda method: type(method).__name__,
)
def test_methods_run(dtype: torch.dtype, method: Any) -> None:
    model = decoder()
    with tokencomp.compress(model, method, page=16) as handle:
        assert under(dtype, model).isfinite().all()
        assert handle.report().memory.used > 0


@pytest.mark.parametrize("dtype", HALVES)
def test_attention_alone(dtype: torch.dtype) -> None:
    model = decoder()
    expected, allowed = under(None, model), 2 * noise(dtype, model)
    tokencomp.register_attention()
    model.set_attn_implementation("tokencomp")
    assert (under(dtype, model) - expected).abs().max() <= allowed


# ---- modules with a forward of their own, as accelerate's device_map makes them ----------------------------


def wrap(module: torch.nn.Module) -> None:
    forward = module.forward

    @wraps(forward)
    def moved(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    module.forward = moved


def test_layers_on_devices_of_their_own() -> None:
    """A device map that names layers hooks these and all parts of them, not the decoder around."""
    model, ids = decoder(), prompt(2, 40)
    with torch.no_grad(), tokencomp.compress(model, methods.SnapKV(16, window=4, every=2), page=16):
        expected = answer(model, ids, left(2, 40))
    for module in (model, model.model.embed_tokens, *model.model.layers.modules()):
        wrap(module)
    with torch.no_grad(), tokencomp.compress(model, methods.SnapKV(16, window=4, every=2), page=16):
        assert torch.equal(answer(model, ids, left(2, 40)), expected)


def test_a_decoder_with_its_own_forward_is_refused() -> None:
    model = decoder()
    wrap(model.model)
    plain = answer(model, prompt())
    with pytest.raises(
        ValueError, match=r"this LlamaModel has its own forward \(a wrapper such as accelerate"
    ):
        tokencomp.compress(model, KeepAll())
    assert torch.equal(answer(model, prompt()), plain)


@pytest.mark.parametrize("attention", ["paged", "model"])
def test_continuous_batching_is_refused(attention: Any) -> None:
    model = decoder()
    plain = type(model)
    with tokencomp.compress(model, KeepAll(), attention=attention):
        with pytest.raises(
            RuntimeError, match=r"^compress: generate_batch of LlamaForCausalLM has a paged cache"
        ):
            model.generate_batch([[1, 2, 3]], generation_config=model.generation_config)
        assert answer(model, prompt(1, 20), max_new_tokens=3).shape[1] == 23
    assert type(model) is plain
    assert "init_continuous_batching" not in vars(model)
