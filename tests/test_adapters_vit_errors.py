"""What compressing an encoder refuses, and how to teach it another family."""

from collections.abc import Iterator
from typing import Any

import pytest
import tokencomp
import torch
from encoders import BY_NAME, OldAttention, PostNormBlock, VisionTransformer, config, hf, layers_of
from layer_methods import Drop, Nothing, Pairs
from tokencomp import adapters, methods
from tokencomp.adapters import patch, vit_attention
from tokencomp.methods.layers import LayerView, Reduced
from torch import Tensor, nn


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


# ---- what is refused --------------------------------------------------------------------------------------


def test_unknown_models_are_told_the_families() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with pytest.raises(ValueError, match=r"no encoder.*Sequential.*timm.*DINOv2.*adapters\.register"):
        tokencomp.compress(model, Pairs())
    with pytest.raises(ValueError, match="no encoder"):
        tokencomp.compress(BY_NAME["clip"].model().classifier, Pairs())
    with pytest.raises(ValueError, match="no embeddings"):
        tokencomp.compress(BY_NAME["dinov2"].model().dinov2.encoder, Pairs())
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    with pytest.raises(ValueError, match="no encoder"):
        tokencomp.compress(hf.CLIPTextModel(hf.CLIPTextConfig(vocab_size=99, **text)), Pairs())


def test_of_two_encoders_none_is_chosen() -> None:
    both = nn.ModuleDict({"left": BY_NAME["vit"].model(), "right": BY_NAME["dinov2"].model()})
    with pytest.raises(ValueError, match=r"2 encoders.*left\.vit\.\S+ \(vit.*\), right.*pass the part"):
        tokencomp.compress(both, Pairs())
    with tokencomp.compress(both["left"], Pairs(4)) as handle:
        BY_NAME["vit"].run(both["left"], BY_NAME["vit"].inputs())
        assert handle.report().tokens[1] == 33
    clip = hf.CLIPModel(hf.CLIPConfig(**BY_NAME["clip"].model().config.to_dict()))
    with tokencomp.compress(clip, Pairs(4)):
        assert not any(patch.is_patched(module) for module in clip.text_model.modules())


@pytest.mark.parametrize("part", ["", "vit"])
def test_compressing_twice_is_refused(part: str) -> None:
    model = BY_NAME["vit"].model()
    inputs = BY_NAME["vit"].inputs()
    with tokencomp.compress(model, Pairs(4)) as handle:
        with pytest.raises(ValueError, match="compressed already"):
            tokencomp.compress(model.get_submodule(part), Pairs(2))
        model(**inputs)
        assert handle.report().tokens[1] == 33
    with tokencomp.compress(model.vit, Pairs(4)), pytest.raises(ValueError, match="compressed already"):
        tokencomp.compress(model, Pairs(2))
    assert not any(patch.is_patched(module) for module in model.modules())


def test_wrong_arguments() -> None:
    model = BY_NAME["vit"].model()
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        tokencomp.compress("vit", Pairs())
    with pytest.raises(TypeError, match="expected one method, got 0"):
        tokencomp.compress(model)
    for method, hint in (
        ("tome", r"an object, tokencomp\.methods\.ToMe\(\.\.\.\), got 'tome'"),
        (methods.ToMe, r"an object, tokencomp\.methods\.ToMe\(\.\.\.\), got <class"),
        (
            "tom",
            r"such as tokencomp\.methods\.SnapKV\(budget=512\), got 'tom'; `python -m tokencomp methods`",
        ),
    ):
        with pytest.raises(TypeError, match=hint):
            tokencomp.compress(model, method)
    for method in (Pairs, 16, lambda x: x):
        with pytest.raises(TypeError, match="a method has proportional, begin"):
            tokencomp.compress(model, method)
    with tokencomp.compress(model, Pairs()) as handle, pytest.raises(RuntimeError, match="no forward pass"):
        handle.report()


def test_lookalikes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"PostNormBlock \(layer 0\) is not the one that the adapter 'timm'"):
        tokencomp.compress(VisionTransformer(block=PostNormBlock), Pairs())

    model = BY_NAME["vit"].model()
    layer = layers_of(model)[0]
    kind = type(layer)
    changed = type(
        "ViTLayer", (kind,), {"forward": lambda self, *a, **k: kind.forward(self, *a, **k) * 1.0001}
    )
    layer.__class__ = changed
    with pytest.raises(ValueError, match=r"this ViTLayer \(layer 0\) is not the one"):
        tokencomp.compress(model, Pairs())
    assert type(layer) is changed
    assert not any(patch.is_patched(module) for module in model.modules())


def test_layers_of_another_version_are_refused() -> None:
    """A layer of the known name whose parts have other names, as older versions had."""
    for part, missing in (
        ("attention", "no attribute .attention."),
        ("layernorm_after", "'layernorm_after'"),
    ):
        model = BY_NAME["vit"].model()
        for layer in layers_of(model):
            setattr(layer, f"old_{part}", getattr(layer, part))
            delattr(layer, part)
        with pytest.raises(ValueError, match=rf"ViTLayer \(layer 0\) is not the one.*{missing}"):
            tokencomp.compress(model, Pairs())
        assert not any(patch.is_patched(module) for module in model.modules())


def test_timm_gradient_checkpointing_is_refused() -> None:
    model = VisionTransformer().train()
    model.grad_checkpointing = True
    with tokencomp.compress(model, Pairs(4)), pytest.raises(RuntimeError, match="checkpointing"):
        model(torch.randn(1, 3, 24, 24))


def test_instances_with_their_own_forward_are_refused() -> None:
    model = BY_NAME["vit"].model()
    layer = layers_of(model)[1]
    layer.forward = layer.forward
    with pytest.raises(ValueError, match="ViTLayer has its own forward"):
        tokencomp.compress(model, Pairs())
    assert not any(patch.is_patched(module) for module in model.modules())


def test_attention_that_cannot_add_sizes() -> None:
    old = VisionTransformer(attention=OldAttention).eval()
    pixels = torch.randn(2, 3, 24, 24)
    with pytest.raises(ValueError, match="takes no attn_mask"):
        tokencomp.compress(old, Pairs(4))
    plain = old(pixels)
    with tokencomp.compress(old, Nothing(proportional=False)):
        assert torch.equal(old(pixels), plain)
    with tokencomp.compress(old, Pairs(4, proportional=False)) as handle:
        old(pixels)
        assert handle.report().tokens[-1] == 21

    model = BY_NAME["vit"].model()

    def plain_sum(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        return (query + key + value).transpose(1, 2).contiguous(), None

    hf.AttentionInterface.register("tokencomp_test_sum", plain_sum)
    model.set_attn_implementation("tokencomp_test_sum")
    with pytest.raises(ValueError, match=r"'tokencomp_test_sum' cannot add log sizes.*eager, sdpa"):
        tokencomp.compress(model, Pairs(4))
    with tokencomp.compress(model, Drop(4)) as handle:
        model(**BY_NAME["vit"].inputs())
        assert handle.report().attention == "tokencomp_test_sum"
    assert "flash" not in vit_attention.IMPLEMENTATION  # transformers would look for a kernel of that name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": lambda r: r.x.double()}, "Wrong at layer 1: x must be"),
        ({"x": lambda r: r.x[:, :-1]}, r"Wrong at layer 1: size must be \[2, 28\]"),
        ({"token_map": lambda r: r.token_map.long()}, r"token_map must be \[2, 33\] torch.int32"),
        ({"token_map": lambda r: r.token_map[:, :-1]}, r"token_map must be \[2, 33\]"),
        ({"size": lambda r: r.size.double()}, r"size must be \[2, 29\] torch.float32"),
        ({"token_map": lambda r: r.token_map + 1}, r"token_map must be in \[-1, 29\)"),
        ({"token_map": lambda r: (r.token_map - 1).clamp(min=0)}, "the 1 prefix tokens must stay"),
        ({"token_map": lambda r: torch.zeros_like(r.token_map)}, "the 1 prefix tokens must stay"),
        ({"token_map": lambda r: torch.full_like(r.token_map, -1)}, "the 1 prefix tokens must stay"),
    ],
)
def test_results_of_methods_are_checked(change: dict[str, Any], message: str) -> None:
    class Wrong(Pairs):
        def reduce(self, view: LayerView) -> Reduced | None:
            good = super().reduce(view)
            fields = {"x": good.x, "size": good.size, "token_map": good.token_map}
            wrong = {name: make(good) for name, make in change.items()} if view.layer == 1 else {}
            return Reduced(**{**fields, **wrong})

    model = BY_NAME["vit"].model()
    with pytest.raises(ValueError, match=message), tokencomp.compress(model, Wrong(4)):
        model(**BY_NAME["vit"].inputs())


def test_masks_that_cannot_be_merged() -> None:
    encoder = BY_NAME["bert"]
    model, inputs = encoder.model(), encoder.inputs(2)
    causal = torch.ones(33, 33).tril().bool().expand(2, 1, 33, 33)
    with tokencomp.compress(model, Pairs(4)), pytest.raises(ValueError, match="same for all queries"):
        model(**inputs, attention_mask=causal)
    decoder = hf.BertModel(hf.BertConfig(**{**model.config.to_dict(), "is_decoder": True}))
    with pytest.raises(ValueError, match="decoders"):
        tokencomp.compress(decoder, Pairs(4))


def test_layers_out_of_order() -> None:
    model = BY_NAME["vit"].model()
    x = torch.randn(2, 37, 32)
    with tokencomp.compress(model, Pairs(4)):
        with pytest.raises(RuntimeError, match="outside of a forward pass"):
            layers_of(model)[1](x)
        model(**BY_NAME["vit"].inputs())
        with pytest.raises(RuntimeError, match="layer 2 was called"):
            layers_of(model)[2](x)


def test_gradient_checkpointing_is_refused() -> None:
    model = BY_NAME["vit"].model()
    model.gradient_checkpointing_enable()
    model.train()
    with (
        torch.enable_grad(),
        tokencomp.compress(model, Pairs(4)),
        pytest.raises(RuntimeError, match="checkpointing"),
    ):
        model(**BY_NAME["vit"].inputs())


# ---- a family of one's own --------------------------------------------------------------------------------


class OwnLayer(nn.Module):
    """A layer nobody knows."""

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.inner = hf.models.vit.modeling_vit.ViTLayer(cfg)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.inner(x, attention_mask) * 2


class OwnFamily(adapters.Family):
    """How to merge in it."""

    name, models, layer_names, attention = "own", "a model of one's own", ("OwnLayer",), "inner.attention"

    def attend(self, layer: Any, run: Any, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        inner = layer.inner
        return inner.attention(inner.layernorm_before(x), run.key_mask(attention_mask))[0] + x

    def feed(self, layer: Any, x: Tensor) -> Tensor:
        return (layer.inner.mlp(layer.inner.layernorm_after(x)) + x) * 2


def test_own_family() -> None:
    model = hf.ViTModel(config(hf.ViTConfig)).eval()
    if not hasattr(model, "layers"):
        pytest.skip(f"ViTModel of transformers {hf.__version__} keeps its layers in an encoder")
    model.layers = nn.ModuleList([OwnLayer(model.config) for _ in range(2)])
    inputs = BY_NAME["vit"].inputs()
    with pytest.raises(ValueError, match="found no encoder"):
        tokencomp.compress(model, Pairs(4))
    adapters.register(OwnFamily())
    try:
        with pytest.raises(ValueError, match="a new name, got 'own'"):
            adapters.register(OwnFamily())
        plain = model(**inputs).last_hidden_state
        with tokencomp.compress(model, Nothing()):
            assert torch.equal(model(**inputs).last_hidden_state, plain)
        with tokencomp.compress(model, Pairs(4)) as handle:
            assert model(**inputs).last_hidden_state.shape[1] == 29
            assert handle.report().family == "own"
    finally:
        adapters.unregister("own")
    with pytest.raises(KeyError, match="'own'"):
        adapters.unregister("own")
