"""The encoder families: where a layer's attention ends and its MLP begins.

A family is one small class: which layers are its own, and their forward in two halves, ``attend`` and
``feed``. ``compress`` checks on a few random tokens that the two halves are, bit for bit, the layer's
own forward.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from tokencomp.adapters.patch import Patches, original_class
from tokencomp.adapters.run import Run
from tokencomp.adapters.vit_attention import check_bias, implementation, show_attention


def class_names(module: nn.Module) -> set[str]:
    """The names of the module's classes: its own and those it is derived from."""
    return {cls.__name__ for cls in type(module).__mro__}


class Family(ABC):
    """Base of all families: Hugging Face encoders whose attention goes through ``AttentionInterface``.

    Derive from it, set the attributes, write ``attend`` and ``feed``, and hand an instance to
    ``tokencomp.adapters.register``.
    """

    name = ""
    models = ""  # for people
    layer_names: tuple[str, ...] = ()  # classes of one layer
    attention = "attention"  # the layer's submodule that calls the attention interface
    outputs = (
        "root"  # whose output holds hidden_states: "root", which has the embeddings, or "owner" of the layers
    )

    def matches(self, layer: nn.Module) -> bool:
        """Whether ``layer`` is one of this family's."""
        return bool(class_names(layer) & set(self.layer_names))

    def accepts(self, root: nn.Module) -> bool:
        """Whether the model around the layers is one to compress: by default, one that embeds patches."""
        return patch_convolution(root) is not None

    def prefix(self, root: nn.Module) -> int:
        """How many tokens at the front are not patches."""
        return special_tokens(root.get_submodule("embeddings"))

    def distill(self, root: nn.Module) -> bool:
        """Whether the second token is a distillation token."""
        return getattr(root.embeddings, "distillation_token", None) is not None

    @abstractmethod
    def attend(self, layer: Any, run: Run, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer up to the sum of residual and attention; the arguments are those of its forward."""

    @abstractmethod
    def feed(self, layer: Any, x: Tensor) -> Any:
        """The layer from there on."""

    def show(self, patches: Patches, layer: nn.Module, stack: Any) -> None:
        """Patch the layer's attention so that the run sees its queries and keys, and keys can have a bias."""
        attention = layer.get_submodule(self.attention)
        if stack.method.proportional:
            check_bias(implementation(attention.config))
        show_attention(patches, attention, stack)

    def attention_name(self, layer: nn.Module) -> str:
        """The attention implementation, for the report."""
        return implementation(layer.get_submodule(self.attention)._tokencomp_config)

    def attention_modules(self, layer: nn.Module) -> list[nn.Module]:
        """The parts of the layer that see its tokens before they are reduced."""
        return [layer.get_submodule(self.attention)]

    def sample(self, layer: nn.Module, x: Tensor, prefix: int) -> dict[str, Any]:
        """Further arguments of the layer's forward for the check on random tokens ``[1, N, C]``."""
        return {}


class ViT(Family):
    """ViT and DeiT: dropout after each half."""

    name = "vit"
    models = "ViT, ViT-MSN, DeiT"
    layer_names: tuple[str, ...] = ("ViTLayer", "DeiTLayer", "ViTMSNLayer")

    def attend(
        self, layer: Any, run: Run, x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        y, _ = layer.attention(layer.layernorm_before(x), run.key_mask(attention_mask), **kwargs)
        return layer.dropout(y) + x

    def feed(self, layer: Any, x: Tensor) -> Any:
        return layer.dropout(layer.mlp(layer.layernorm_after(x))) + x


class NestedViT(ViT):
    """The same in transformers 5.4: attention in attention, and the MLP's second part adds the residual."""

    name = "vit-nested"
    attention = "attention.attention"

    def matches(self, layer: nn.Module) -> bool:
        return super().matches(layer) and is_nested(layer)

    def attend(self, layer: Any, run: Run, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return layer.attention(layer.layernorm_before(x), **kwargs) + x

    def feed(self, layer: Any, x: Tensor) -> Any:
        return layer.output(layer.intermediate(layer.layernorm_after(x)), x)

    def attention_modules(self, layer: nn.Module) -> list[nn.Module]:
        return [layer.get_submodule("attention")]


class DINOv2(Family):
    """DINOv2 with or without registers: layer scale and stochastic depth."""

    name = "dinov2"
    models = "DINOv2, DINOv2 with registers"
    layer_names: tuple[str, ...] = ("Dinov2Layer", "Dinov2WithRegistersLayer")
    outputs = "owner"

    def attend(
        self, layer: Any, run: Run, x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        y, _ = layer.attention(layer.norm1(x), attention_mask=run.key_mask(attention_mask), **kwargs)
        return layer.drop_path(layer.layer_scale1(y)) + x

    def feed(self, layer: Any, x: Tensor) -> Any:
        return layer.drop_path(layer.layer_scale2(layer.mlp(layer.norm2(x)))) + x


class NestedDINOv2(DINOv2):
    """The same in transformers 5.4: attention in attention."""

    name = "dinov2-nested"
    attention = "attention.attention"

    def matches(self, layer: nn.Module) -> bool:
        return super().matches(layer) and is_nested(layer)

    def attend(self, layer: Any, run: Run, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return layer.drop_path(layer.layer_scale1(layer.attention(layer.norm1(x)))) + x

    def attention_modules(self, layer: nn.Module) -> list[nn.Module]:
        return [layer.get_submodule("attention")]


class DINOv3(DINOv2):
    """DINOv3: patches have rotary positions; a merged token gets the mean angle of its patches."""

    name = "dinov3"
    models = "DINOv3 (ViT)"
    layer_names: tuple[str, ...] = ("DINOv3ViTLayer",)

    def attend(
        self,
        layer: Any,
        run: Run,
        x: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        rotation = run.rotation(position_embeddings)
        return super().attend(layer, run, x, attention_mask, position_embeddings=rotation, **kwargs)

    def sample(self, layer: Any, x: Tensor, prefix: int) -> dict[str, Any]:
        shape = (x.shape[1] - prefix, layer.attention.head_dim)
        return {"position_embeddings": (x.new_full(shape, 0.6), x.new_full(shape, 0.8))}


class CLIP(Family):
    """Image encoders of CLIP and SigLIP. Their text encoders, causal or pooled at the end, are left alone."""

    name = "clip"
    models = "CLIP, SigLIP (image encoders)"
    layer_names: tuple[str, ...] = ("CLIPEncoderLayer", "SiglipEncoderLayer")
    attention = "self_attn"

    def attend(
        self, layer: Any, run: Run, x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        mask = run.key_mask(attention_mask)
        y, _ = layer.self_attn(hidden_states=layer.layer_norm1(x), attention_mask=mask, **kwargs)
        return x + y

    def feed(self, layer: Any, x: Tensor) -> Any:
        return x + layer.mlp(layer.layer_norm2(x))

    def sample(self, layer: nn.Module, x: Tensor, prefix: int) -> dict[str, Any]:
        return {"attention_mask": None}


class Bert(Family):
    """BERT and its relatives: norms after the residual, inside ``attention.output`` and ``output``."""

    name = "bert"
    models = "BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA"
    layer_names: tuple[str, ...] = (
        "BertLayer",
        "RobertaLayer",
        "XLMRobertaLayer",
        "CamembertLayer",
        "ElectraLayer",
    )
    attention = "attention.self"

    def accepts(self, root: nn.Module) -> bool:
        return hasattr(root.embeddings, "word_embeddings")

    def prefix(self, root: nn.Module) -> int:
        return 1

    def attend(
        self,
        layer: Any,
        run: Run,
        x: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        if layer.is_decoder or encoder_hidden_states is not None or past_key_values is not None:
            raise ValueError("compress: decoders (causal, cross-attention, key-value cache) cannot be merged")
        return layer.attention(x, run.key_mask(attention_mask), **kwargs)[0]

    def feed(self, layer: Any, x: Tensor) -> Any:
        chunk = layer.chunk_size_feed_forward
        if chunk == 0:
            return layer.feed_forward_chunk(x)
        return torch.cat([layer.feed_forward_chunk(part) for part in x.split(chunk, dim=1)], dim=1)

    def attention_modules(self, layer: nn.Module) -> list[nn.Module]:
        return [layer.get_submodule("attention")]


class DistilBert(Bert):
    """DistilBERT: as BERT, with the norms in the layer."""

    name = "distilbert"
    models = "DistilBERT"
    layer_names: tuple[str, ...] = ("TransformerBlock",)
    attention = "attention"

    def matches(self, layer: nn.Module) -> bool:
        return super().matches(layer) and hasattr(layer, "sa_layer_norm")

    def attend(
        self, layer: Any, run: Run, x: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        y, _ = layer.attention(x, attention_mask=run.key_mask(attention_mask), **kwargs)
        return layer.sa_layer_norm(y + x)

    def feed(self, layer: Any, x: Tensor) -> Any:
        return layer.output_layer_norm(layer.ffn(x) + x)


def is_nested(layer: nn.Module) -> bool:
    """Whether the layer's attention holds another, which gets no mask; ours sees to its key bias."""
    return hasattr(getattr(layer, "attention", None), "attention")


def patch_convolution(root: nn.Module) -> nn.Module | None:
    """The convolution that makes patches of pixels: the only one among the embeddings."""
    embeddings = getattr(root, "embeddings", None) or getattr(root, "patch_embed", None)
    if not isinstance(embeddings, nn.Module):
        return None
    found = [module for module in embeddings.modules() if isinstance(module, nn.Conv2d)]
    return found[0] if len(found) == 1 else None


def layer_width(layer: nn.Module) -> int:
    """The channels of a layer's tokens: what its first linear layer, of the attention or the MLP, takes."""
    return next(module.in_features for module in layer.modules() if isinstance(module, nn.Linear))


def special_tokens(holder: nn.Module) -> int:
    """How many class, distillation and register tokens the embeddings put before the patches."""
    single = ("cls_token", "class_embedding", "distillation_token", "dist_token")
    count = sum(getattr(holder, name, None) is not None for name in single)
    registers = getattr(holder, "register_tokens", None)
    return count + (0 if registers is None else int(registers.shape[1]))


_families: list[Family] = []


def register(family: Family) -> Family:
    """Make a family known to ``compress``; later ones are asked first.

    Raises ValueError where it has no name or one that is taken.
    """
    if not family.name or family.name in {known.name for known in _families}:
        raise ValueError(f"register: a family needs a new name, got {family.name!r}")
    _families.insert(0, family)
    return family


def unregister(name: str) -> None:
    """Forget the family ``name``. Raises KeyError where there is none."""
    family = next((known for known in _families if known.name == name), None)
    if family is None:
        raise KeyError(f"unregister: name must be one of {sorted(f.name for f in _families)}, got {name!r}")
    _families.remove(family)


def families() -> list[Family]:
    """Every known family, in the order in which they are asked."""
    return list(_families)


def plain_name(module: nn.Module) -> str:
    """The name of the module's class, for messages."""
    return original_class(module).__name__


for _family in (DistilBert(), Bert(), CLIP(), DINOv3(), DINOv2(), ViT(), NestedDINOv2(), NestedViT()):
    register(_family)
