"""What compressing leaves of a model, and between passes, threads and models; precision; compilation."""

import copy
import io
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import tokencomp
import torch
from encoders import BY_NAME, LAYERS, config, hf, layers_of
from layer_methods import Duplicates, Nothing, Pairs, nothing_done
from tokencomp.adapters import patch
from tokencomp.methods.layers import LayerView, Reduced
from torch import nn

ONE_EACH = [
    "vit",
    "dinov2-registers",
    "dinov3",
    "clip",
    "siglip",
    "siglip-vision",
    "timm-registers-avg",
    "bert",
]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def fingerprint(model: nn.Module) -> list[Any]:
    """Classes, instance attributes and hooks of every module."""
    return [
        (name, type(module), {k: id(v) for k, v in vars(module).items() if k != "_modules"})
        for name, module in model.named_modules()
    ]


# ---- the model is given back ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_EACH)
def test_model_is_given_back_exactly(name: str) -> None:
    encoder = BY_NAME[name]
    model, inputs = encoder.model(), encoder.inputs()
    encoder.run(model, inputs)
    before, weights = fingerprint(model), {k: v.clone() for k, v in model.state_dict().items()}
    names = [n for n, _ in model.named_modules()]
    handle = tokencomp.compress(model, Pairs(4))
    encoder.run(model, inputs)
    assert [n for n, _ in model.named_modules()] == names
    assert list(model.state_dict()) == list(weights)
    for (_, old, attributes), (_, new, now) in zip(before, fingerprint(model), strict=True):
        assert issubclass(new, old)
        assert repr(new) == repr(old)
        assert attributes == now
    handle.remove()
    assert fingerprint(model) == before
    handle.remove()
    with pytest.raises(RuntimeError, match="no forward pass"):
        handle.report()
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_model_is_given_back_after_exceptions() -> None:
    encoder = BY_NAME["vit"]
    model = encoder.model()
    before = fingerprint(model)

    class Broken(Pairs):
        def reduce(self, view: LayerView) -> Reduced | None:
            if view.layer == 2:
                raise ZeroDivisionError
            return super().reduce(view)

    with pytest.raises(ZeroDivisionError), tokencomp.compress(model, Broken(4)):
        encoder.run(model, encoder.inputs())
    assert fingerprint(model) == before
    with pytest.raises(KeyError), tokencomp.compress(model, Pairs(4)):
        raise KeyError
    assert fingerprint(model) == before


def test_a_failed_pass_leaves_nothing_for_the_next() -> None:
    encoder = BY_NAME["vit"]
    model, inputs = encoder.model(), encoder.inputs()

    class Flaky(Pairs):
        broken = False

        def reduce(self, view: LayerView) -> Reduced | None:
            if Flaky.broken and view.layer == 2:
                raise ZeroDivisionError
            return super().reduce(view)

    with tokencomp.compress(model, Flaky(4)) as handle:
        expected = encoder.result(model, inputs)
        Flaky.broken = True
        with pytest.raises(ZeroDivisionError):
            encoder.run(model, inputs)
        with pytest.raises(RuntimeError, match="ended in layer 2"):
            handle.report()
        Flaky.broken = False
        assert torch.equal(encoder.result(model, inputs), expected)


@pytest.mark.parametrize("name", ["vit", "dinov2-registers", "siglip-vision", "timm"])
def test_copies_and_pickles_are_of_the_plain_model(name: str) -> None:
    encoder = BY_NAME[name]
    model, inputs = encoder.model(), encoder.inputs()
    plain = encoder.result(model, inputs)
    with tokencomp.compress(model, Pairs(4)) as handle:
        merged = encoder.result(model, inputs)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copies.append(torch.load(file, weights_only=False))
        for made in copies:
            assert not any(patch.is_patched(module) for module in made.modules())
            assert [type(m) for m in made.modules()] == [patch.original_class(m) for m in model.modules()]
            assert torch.equal(encoder.result(made, inputs), plain)
        assert handle.report().tokens[-1] < handle.report().tokens[0]
        with tokencomp.compress(copies[0], Pairs(1)):
            assert torch.equal(encoder.result(model, inputs), merged)
    assert torch.equal(encoder.result(model, inputs), plain)


def test_a_class_changed_meanwhile_is_reported() -> None:
    encoder = BY_NAME["vit"]
    model = encoder.model()
    handle = tokencomp.compress(model, Pairs(4))
    layer = layers_of(model)[1]
    layer.__class__ = type("Wrapped", (type(layer),), {})
    with pytest.raises(RuntimeError, match="class was changed after compress of: Wrapped"):
        handle.remove()
    assert not patch.is_patched(layers_of(model)[0])


# ---- passes, models, threads ------------------------------------------------------------------------------


def test_models_that_share_a_configuration_do_not_meet() -> None:
    shared = config(hf.ViTConfig)
    one, two = (hf.ViTForImageClassification(shared).eval() for _ in range(2))
    parts = [next(m for m in layers_of(model)[0].modules() if hasattr(m, "config")) for model in (one, two)]
    assert parts[0].config is parts[1].config
    inputs, chosen = BY_NAME["vit"].inputs(), shared._attn_implementation
    plain = two(**inputs).logits
    with tokencomp.compress(one, Pairs(4)) as handle:
        assert torch.equal(two(**inputs).logits, plain)
        assert shared._attn_implementation == chosen
        with tokencomp.compress(two, Pairs(2)) as other:
            one(**inputs), two(**inputs)
            assert (handle.report().tokens[1], other.report().tokens[1]) == (33, 35)
        # what the user chooses meanwhile is what runs
        one.set_attn_implementation("eager")
        assert one(**inputs, output_attentions=True).attentions[0].shape[-1] == 37
        assert handle.report().attention == "eager"


def test_threads_do_not_meet() -> None:
    """Passes of several threads through one model, each waiting in its middle for the others."""
    encoder = BY_NAME["siglip-vision"]
    model = encoder.model()
    cases = [encoder.inputs(batch, seed=batch) for batch in (1, 2, 3)]
    everybody = threading.Barrier(len(cases))
    meeting = False

    class Meeting(Pairs):
        def reduce(self, view: LayerView) -> Reduced | None:
            if meeting and view.layer == 1:
                everybody.wait(timeout=60)
            return super().reduce(view)

    with tokencomp.compress(model, Meeting(4)) as handle:
        alone = [(encoder.result(model, inputs), handle.report().token_map) for inputs in cases]
        meeting = True
        together: list[Any] = [None] * len(cases)

        def work(case: int) -> None:
            with torch.no_grad():
                result = encoder.result(model, cases[case])
                together[case] = (result, handle.report().token_map)

        threads = [threading.Thread(target=work, args=(case,)) for case in range(len(cases))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for expected, found in zip(alone, together, strict=True):
        assert found is not None
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_every_pass_begins_anew() -> None:
    encoder = BY_NAME["vit"]
    model = encoder.model()
    seen: list[LayerView] = []
    with tokencomp.compress(model, Nothing(seen=seen)):
        for batch in (2, 3):
            encoder.run(model, encoder.inputs(batch))
    assert [view.layer for view in seen] == [*range(LAYERS)] * 2
    assert [view.state["begun"] for view in seen] == [1] * 2 * LAYERS
    assert seen[0].state is seen[LAYERS - 1].state
    assert seen[0].state is not seen[LAYERS].state
    assert seen[LAYERS].size is None


def test_images_of_another_size_have_another_grid() -> None:
    encoder = BY_NAME["dinov2"]
    model = encoder.model()
    pixels = torch.randn(1, 3, 16, 32)
    with tokencomp.compress(model, Pairs(4)) as handle:
        model(pixel_values=pixels)
        assert handle.report().grid == (4, 8)
        assert handle.report().tokens[0] == 33
        encoder.run(model, encoder.inputs())
        assert handle.report().grid == (6, 6)


# ---- numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in ONE_EACH if n != "bert"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(name: str, dtype: torch.dtype) -> None:
    """As far from float32 as half precision is without merging. The map does not depend on values."""
    encoder = BY_NAME[name]
    model, inputs, method = encoder.model(), encoder.inputs(2), Duplicates(1)
    low, low_inputs = copy.deepcopy(model).to(dtype), {k: v.to(dtype) for k, v in inputs.items()}
    plain = encoder.result(model, inputs)
    noise = (encoder.result(low, low_inputs).float() - plain).abs().max()
    with torch.autocast("cpu", dtype=dtype):
        plain_cast = encoder.result(model, inputs)
        noise_cast = (plain_cast - plain).abs().max()
        with tokencomp.compress(model, Nothing()):
            assert torch.equal(encoder.result(model, inputs), plain_cast)
        with tokencomp.compress(model, method):
            merged_cast = encoder.result(model, inputs)
    with tokencomp.compress(low, method):
        merged_low = encoder.result(low, low_inputs)
    with tokencomp.compress(model, method):
        merged = encoder.result(model, inputs)
    assert merged_low.dtype == dtype
    assert (merged_low.float() - merged).abs().max() <= 2 * noise
    assert (merged_cast.float() - merged).abs().max() <= 2 * noise_cast


@pytest.mark.parametrize("name", ONE_EACH)
def test_compiled_without_graph_breaks(name: str) -> None:
    encoder = BY_NAME[name]
    model, inputs = encoder.model(), encoder.inputs(2)
    plain = encoder.result(model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(lambda given: encoder.result(model, given), fullgraph=True, backend="eager")
    assert torch.equal(compiled(inputs), plain)
    with tokencomp.compress(model, Pairs(4)) as handle:
        expected, tokens = encoder.result(model, inputs), handle.report().tokens
        assert torch.equal(compiled(inputs), expected)
        assert handle.report().tokens == tokens
        again = encoder.inputs(2, seed=5)
        with torch.compiler.set_stance("fail_on_recompile"):
            result = compiled(again)
            found = handle.report().token_map
        assert torch.equal(result, encoder.result(model, again))
        assert torch.equal(found, handle.report().token_map)
    assert torch.equal(compiled(inputs), plain)
    torch._dynamo.reset()


def test_gradients_flow_through_merges() -> None:
    model = BY_NAME["dinov2"].model().train()
    with torch.enable_grad(), tokencomp.compress(model, Pairs(4)):
        model(**BY_NAME["dinov2"].inputs()).logits.square().sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "mask_token" not in n)


def test_methods_see_no_leftovers() -> None:
    """The queries of one layer are let go once the method has seen them."""
    model = BY_NAME["vit"].model()

    class Keeps:
        proportional = False
        begin = nothing_done

        def reduce(self, view: LayerView) -> Reduced | None:
            return None

    with tokencomp.compress(model, Keeps()) as handle:
        model(**BY_NAME["vit"].inputs())
        run = handle._last()[1]
        assert run.q is None
        assert run.k is None
