"""What a compressed decoder refuses, and that nothing is lost when it does."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import tiny_models
import tokencomp
import torch
from cache_methods import KeepAll, Listed, Newest, pages_are_exact, tree
from decoders import answer, decoder, left, prompt, steps
from tokencomp import methods
from tokencomp.adapters import attention, llm
from tokencomp.methods.kv import Keep, KVView

transformers = pytest.importorskip("transformers", reason="models need the extra hf")
from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def unchanged(model: Any, before: Any, ids: Any, tokens: Any) -> None:
    assert tiny_models.state(model) == before
    assert torch.equal(answer(model, ids), tokens)


# ---- models and methods ------------------------------------------------------------------------------------


def test_methods_go_with_their_models() -> None:
    with pytest.raises(
        ValueError, match="found no decoder with a key-value cache in ViTForImageClassification"
    ):
        tokencomp.compress(tiny_models.vit(), KeepAll())
    with pytest.raises(ValueError, match="found no encoder to compress in LlamaForCausalLM"):
        tokencomp.compress(decoder(), methods.ToMe(r=2))
    with pytest.raises(TypeError, match="got 'h2o'"):
        tokencomp.compress(decoder(), "h2o")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="got <class"):
        tokencomp.compress(decoder(), KeepAll)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="KeepAll is a method of decoders, which take no dense"):
        tokencomp.compress(decoder(), KeepAll(), dense=True)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="ToMe is a method of encoders, which take no page"):
        tokencomp.compress(tiny_models.vit(), methods.ToMe(r=2), page=16)  # type: ignore[call-overload]
    with pytest.raises(KeyError, match=r"got name 'h20' \(did you mean 'h2o'\?\), expected one of a2sf, "):
        methods.get("h20")


def test_models_that_are_not_supported() -> None:
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    with pytest.raises(ValueError, match=r"has an encoder|found no decoder|found 2 decoders"):
        tokencomp.compress(transformers.T5ForConditionalGeneration(config), KeepAll())
    both = torch.nn.ModuleDict({"a": decoder(), "b": decoder()})
    with pytest.raises(ValueError, match=r"found 2 decoders in ModuleDict: a\.model, b\.model"):
        tokencomp.compress(both, KeepAll())
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        tokencomp.compress("llama", KeepAll())  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"page": 20}, "page must be 16, 32 or 64"),
        ({"memory_limit": 0}, "memory_limit must be >= 1 byte"),
        ({"memory_limit": "2 bags"}, "bytes must look like '2GiB'"),
        ({"chunks": "some"}, "chunks must be 'each' or 'last'"),
        ({"attention": "flash"}, "attention must be 'paged' or 'model'"),
    ],
)
def test_options(options: dict[str, Any], match: str) -> None:
    model = decoder()
    with pytest.raises(ValueError, match=match):
        tokencomp.compress(model, KeepAll(), **options)
    tokencomp.compress(model, KeepAll()).remove()  # nothing was left behind


def test_attention_of_the_model_needs_a_method_that_looks_at_no_query() -> None:
    with pytest.raises(ValueError, match="SnapKV looks at queries, which attention='model' does not see"):
        tokencomp.compress(decoder(), methods.SnapKV(), attention="model")
    with pytest.raises(ValueError, match="Newest rotates keys"):
        tokencomp.compress(decoder(), Newest(rerotates=True), attention="model")


def test_rotation_that_cannot_be_undone() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ValueError, match="'dynamic' rotary frequencies change with the length"):
        tokencomp.compress(decoder(rope_parameters=rope), Newest(rerotates=True))


def test_budget_below_what_is_protected() -> None:
    with pytest.raises(ValueError, match="budget must be >= "):
        methods.StreamingLLM(budget=3, sinks=4)
    model, ids = decoder(), prompt(1)
    before, tokens = tiny_models.state(model), answer(model, ids)
    with (
        pytest.raises(ValueError, match="StreamingLLM: budget must be >= 4 slots"),
        tokencomp.compress(model, methods.StreamingLLM(budget=0.1)),
    ):
        answer(model, ids)
    unchanged(model, before, ids, tokens)


def test_compressed_twice() -> None:
    model = decoder()
    with (
        tokencomp.compress(model, KeepAll()),
        pytest.raises(ValueError, match="is compressed already"),
    ):
        tokencomp.compress(model, KeepAll())


def test_a_name_that_others_registered() -> None:
    interfaces = (AttentionInterface, AttentionMaskInterface)
    before = [dict(interface._global_mapping) for interface in interfaces]
    model = decoder()
    plain = tiny_models.state(model)
    try:
        AttentionInterface.register(llm.IMPLEMENTATION, lambda *a, **k: None)
        with pytest.raises(ValueError, match="'tokencomp_paged' is taken by another attention function"):
            tokencomp.compress(model, KeepAll())
    finally:
        for interface, mapping in zip(interfaces, before, strict=True):
            interface._global_mapping.clear()
            interface._global_mapping.update(mapping)
    assert tiny_models.state(model) == plain


def test_functions_that_others_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """As importing kvpress does to all that are registered, ours among them."""
    model, calls = decoder(), []
    ids = torch.arange(6)[None]
    with tokencomp.compress(model, KeepAll()):
        want = model(ids).logits

    def wrap(ours: Any) -> Any:
        def wrapper(module: Any, q: Any, k: Any, v: Any, mask: Any, dropout: float, **kwargs: Any) -> Any:
            calls.append(wrapper)  # which refers to itself
            return ours(module, q, k, v, mask, dropout, **kwargs)

        return wrapper

    functions: Any = ALL_ATTENTION_FUNCTIONS
    for name in (llm.IMPLEMENTATION, attention.IMPLEMENTATION):
        tokencomp.register_attention()
        monkeypatch.setitem(functions._local_mapping, name, wrap(functions[name]))
    assert tokencomp.register_attention() == attention.IMPLEMENTATION
    with tokencomp.compress(model, KeepAll()):
        assert torch.equal(model(ids).logits, want)
    assert calls


# ---- caches ------------------------------------------------------------------------------------------------


def test_caches_that_are_not_ours() -> None:
    model, ids = decoder(), prompt()
    filled = model(ids, use_cache=True).past_key_values
    with tokencomp.compress(model, KeepAll()) as handle:
        with pytest.raises(ValueError, match="this DynamicCache holds 20 tokens stored without compression"):
            model(ids, past_key_values=filled)
        with pytest.raises(
            ValueError, match="must be a PagedKVCache or an empty DynamicCache, got StaticCache"
        ):
            answer(model, ids, cache_implementation="static", disable_compile=True)
        with pytest.raises(RuntimeError, match="there was no forward with a cache"):
            handle.report()
        answer(model, ids)
    assert filled.get_seq_length() == 20


def test_a_cache_belongs_to_its_model_and_method() -> None:
    model, other, ids = decoder(), decoder(), prompt()
    with tokencomp.compress(model, Newest(budget=8), page=16) as handle:
        expected = answer(model, ids)
        cache = handle.new_cache()
        steps(model, ids, None, [20], cache)
        held = tree(cache)
        with (
            tokencomp.compress(other, Newest(budget=8)),
            pytest.raises(ValueError, match="made for another model, method or setting"),
        ):
            other(ids, past_key_values=cache)
    with pytest.raises(
        RuntimeError, match="works only with the model it was made for, while that is compressed"
    ):
        model(ids, past_key_values=cache)
    with (
        tokencomp.compress(model, Newest(budget=9)),
        pytest.raises(ValueError, match="made for another model, method or setting"),
    ):
        model(ids, past_key_values=cache)
    assert tree(cache) == held
    with tokencomp.compress(model, Newest(budget=8), page=16):
        full = answer(model, torch.cat([ids, expected[:, 20:21]], 1), past_key_values=cache, max_new_tokens=4)
    assert torch.equal(full, expected[:, :25])


def test_the_batch_stays() -> None:
    model, ids = decoder(), prompt()
    with tokencomp.compress(model, KeepAll(), page=16) as handle:
        output = model(ids, use_cache=True)
        before = tree(handle.cache)
        with pytest.raises(ValueError, match="it holds 2 sequences, got 1"):
            model(ids[:1], past_key_values=output.past_key_values)
        assert tree(handle.cache) == before


def test_masks_that_say_too_little() -> None:
    model, ids = decoder(), prompt()
    with tokencomp.compress(model, KeepAll(), page=16) as handle:
        output = model(ids, use_cache=True)
        before = tree(handle.cache)
        four = torch.ones(2, 1, 20, 40, dtype=torch.bool)
        for mask in (torch.ones(2, 20), four):
            with pytest.raises(ValueError, match=r"attention_mask must be \[B, 40\]"):
                model(ids, attention_mask=mask, past_key_values=output.past_key_values)
        assert tree(handle.cache) == before


def test_attention_of_the_model_needs_equal_lengths() -> None:
    model, ids = decoder(), prompt()
    lists = tiny_models.lists(3, 2, 2, 20, 8)
    lists[1] = lists[1][..., :5]
    with tokencomp.compress(model, Listed(index=lists), attention="model") as handle:
        output = model(ids, use_cache=True)
        model(ids[:, :1], past_key_values=output.past_key_values)  # one row sees all there is
        before = tree(handle.cache)
        with pytest.raises(ValueError, match="layers or heads hold different numbers of tokens"):
            model(ids[:, :2], past_key_values=output.past_key_values)
        assert tree(handle.cache) == before


def test_another_attention_meanwhile() -> None:
    model, ids = decoder(), prompt()
    before, tokens = tiny_models.state(model), answer(model, ids)
    with tokencomp.compress(model, KeepAll(), page=16) as handle:
        cache = model(ids, use_cache=True).past_key_values
        held = tree(cache)
        model.set_attn_implementation("eager")
        with pytest.raises(RuntimeError, match="was changed to 'eager' while the model is compressed"):
            model(ids[:, :1], past_key_values=cache)
        assert tree(cache) == held
        assert handle.cache is cache
    model.set_attn_implementation("sdpa")
    unchanged(model, before, ids, tokens)


def test_a_limit_on_memory() -> None:
    """A step that finds no page leaves every layer without the token; less is still possible afterwards."""
    model, ids = decoder(), prompt()
    page_bytes = 16 * 2 * 8 * 4
    with tokencomp.compress(model, KeepAll(), page=16, memory_limit=30 * page_bytes) as handle:
        cache = steps_cache = model(ids, use_cache=True).past_key_values
        assert cache.memory().pages == 3 * 4 * 2
        for _ in range(12):
            model(ids[:, :1], past_key_values=cache)
        before = tree(cache)
        match = r"12 more pages of 16 slots .* the limit of 30720 bytes is 30 pages"
        with pytest.raises(MemoryError, match=match):
            model(ids[:, :1], past_key_values=cache)
        with pytest.raises(MemoryError):
            model(ids, past_key_values=cache)
        assert tree(cache) == before
        pages_are_exact(cache)
        cache.crop(-3)
        model(ids[:, :1], past_key_values=steps_cache)
        with pytest.raises(MemoryError, match="the limit of 30720 bytes"):
            model(prompt(2, 200), use_cache=True)
        assert handle.cache.get_seq_length() == handle.cache.memory().pages == 0
    with tokencomp.compress(model, Newest(budget=16), page=16, memory_limit=12 * page_bytes):
        model(prompt(2, 200), use_cache=True)  # what is not stored needs no room


class Broken(Newest):
    """Raises in one layer."""

    def after_step(self, view: KVView) -> Keep | None:
        if view.layer == 2:
            raise ArithmeticError("broken")
        return super().after_step(view)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_an_exception_leaves_cache_and_model(family: str) -> None:
    model, ids = (
        decoder(family, layer_types=["full_attention"] * 3) if family == "llama" else decoder(family),
        prompt(),
    )
    before, tokens = tiny_models.state(model), answer(model, ids)
    layer = model.model.layers[2]
    with (  # noqa: PT012
        pytest.raises(ArithmeticError),
        tokencomp.compress(model, Newest(budget=99), page=16) as handle,
    ):
        cache = steps(model, ids, left(), [20]) is not None and handle.cache
        held, copied = tree(cache), copy.deepcopy(cache)

        def fail(*_: Any) -> None:
            raise ArithmeticError("broken")

        hook = layer.mlp.register_forward_hook(fail)
        for given in (ids[:, :1], ids[:, :12]):
            with pytest.raises(ArithmeticError):
                model(given, past_key_values=cache)
            assert tree(cache) == held
            pages_are_exact(cache)
        with pytest.raises(ArithmeticError):
            model(ids, use_cache=True)
        assert handle.cache.memory().pages == 0
        hook.remove()
        one, other = (model(ids[:, :1], past_key_values=c).logits for c in (cache, copied))
        assert torch.equal(one, other)
        fail()
    unchanged(model, before, ids, tokens)


def test_a_method_that_fails() -> None:
    model, ids = decoder(), prompt()
    with tokencomp.compress(model, Broken(budget=30, every=99), page=16) as handle:
        output = model(ids, use_cache=True)
        held = tree(handle.cache)
        with pytest.raises(ArithmeticError):
            model(ids[:, :1], past_key_values=output.past_key_values)
        after = tree(handle.cache)
    assert [layer[0] for layer in after["layers"]] == [layer[0] for layer in held["layers"]]
    assert after["columns"] == held["columns"]


def test_attention_that_transformers_does_not_dispatch() -> None:
    model, ids = decoder(), prompt()
    attention = model.model.layers[1].self_attn

    def own(hidden_states: Any, position_embeddings: Any, past_key_values: Any = None, **_: Any) -> Any:
        k = hidden_states.new_zeros(2, 2, hidden_states.shape[1], 8)
        past_key_values.update(k, k, 1)
        return hidden_states, None

    with tokencomp.compress(model, KeepAll()) as handle:
        attention.forward = own
        with pytest.raises(RuntimeError, match="attention of layer 1 did not go through"):
            model(ids, use_cache=True)
        assert handle.cache.memory().pages == 0
        del attention.forward
        model(ids, use_cache=True)


def test_nothing_is_written_into_shared_configurations() -> None:
    model = decoder()
    config = model.config
    before, plain = config.to_dict(), tiny_models.state(model)
    with tokencomp.compress(model, KeepAll()):
        assert config.to_dict() == before
        assert model.config is config
        same = copy.deepcopy(model)
    assert tiny_models.state(model) == plain
    assert type(same) is type(model)
    assert same.config._attn_implementation == "sdpa"
    with tokencomp.compress(same, KeepAll(), page=16):
        answer(same, prompt())


def test_pages_are_not_offloaded() -> None:
    with (
        tokencomp.compress(decoder(), KeepAll()) as handle,
        pytest.raises(NotImplementedError, match="to\\(device\\)"),
    ):
        handle.new_cache().layers[0].offload()
