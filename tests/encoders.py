"""Tiny random encoders of every family, with inputs; and a local model built like timm's."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

hf = pytest.importorskip("transformers", reason="the adapters' models need the extra hf")

SIDE, PATCH, LAYERS, WIDTH, HEADS = 24, 4, 4, 32, 4
ROWS = SIDE // PATCH
COMMON: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": SIDE,
    "patch_size": PATCH,
    "num_labels": 5,
}


class Attention(nn.Module):
    """Self-attention as timm writes it."""

    fused_attn = True

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        norm = (lambda: nn.LayerNorm(width // heads)) if qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        x = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


class OldAttention(Attention):
    """Before masks and norms of queries and keys."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__(width, heads, qk_norm)
        del self.q_norm, self.k_norm

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        weights = ((q * self.scale) @ k.mT).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """A block as timm's: pre-norm, layer scale, stochastic depth."""

    def __init__(
        self, width: int, heads: int, attention: type[Attention], scale: bool, qk_norm: bool
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = attention(width, heads, qk_norm)
        self.ls1, self.ls2 = (LayerScale(width) if scale else nn.Identity() for _ in range(2))
        self.drop_path1, self.drop_path2 = nn.Identity(), nn.Identity()
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        arguments = {} if attn_mask is None else {"attn_mask": attn_mask}
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), **arguments)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class PostNormBlock(Block):
    """Has all the names and is another layer."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        x = x + self.norm1(self.attn(x))
        return x + self.norm2(self.mlp(x))


class VisionTransformer(nn.Module):
    """A model as timm's, with what the adapter looks at."""

    def __init__(
        self,
        *,
        registers: int = 0,
        distilled: bool = False,
        class_token: bool = True,
        pool: str = "token",
        attention: type[Attention] = Attention,
        block: type[Block] = Block,
        qk_norm: bool = True,
    ) -> None:
        super().__init__()
        self.global_pool = pool
        self.patch_embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.num_prefix_tokens = int(class_token) + int(distilled) + registers
        self.dist_token = nn.Parameter(torch.randn(1, 1, WIDTH)) if distilled else None
        self.prefix = nn.Parameter(torch.randn(1, self.num_prefix_tokens, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, ROWS * ROWS, WIDTH) * 0.2)
        blocks = [block(WIDTH, HEADS, attention, True, qk_norm) for _ in range(LAYERS)]
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos_embed
        x = torch.cat([self.prefix.expand(len(x), -1, -1), x], 1)
        return self.norm(self.blocks(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        patches = x[:, self.num_prefix_tokens :]
        if self.global_pool == "avg":
            x = patches.mean(1)
        elif self.global_pool == "avgmax":
            x = (patches.mean(1) + patches.amax(1)) / 2
        else:
            x = x[:, 0]
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


@dataclass(frozen=True)
class Encoder:
    """One tiny model and how to use it."""

    name: str
    build: Callable[[], nn.Module]
    prefix: int = 1
    family: str = ""
    output: str = "logits"  # of the output, which is compared
    text: bool = False
    dense: bool = False  # its default
    part: str = ""  # of the model that has the patch embedding
    extra: dict[str, Any] = field(default_factory=dict)

    def model(self, **options: Any) -> nn.Module:
        """The model in eval mode with distinct random weights everywhere."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = self.build()
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.data += 0.3 * torch.randn_like(parameter)
                else:
                    parameter.data = 0.25 * torch.randn_like(parameter)
        for name, value in options.items():
            getattr(model, name)(value)
        return model.eval()

    def inputs(self, batch: int = 2, seed: int = 0, duplicates: bool = False) -> dict[str, Any]:
        """Random pixels or token numbers; with ``duplicates``, patches 2i and 2i + 1 have equal pixels."""
        generator = torch.Generator().manual_seed(seed)
        if self.text:
            return {"input_ids": torch.randint(3, 90, (batch, 33), generator=generator), **self.extra}
        patches = torch.randn(batch, 3, ROWS, ROWS, PATCH, PATCH, generator=generator)
        if duplicates:
            patches[:, :, :, 1::2] = patches[:, :, :, 0::2]
        return {"pixel_values": patches.permute(0, 1, 2, 4, 3, 5).reshape(batch, 3, SIDE, SIDE), **self.extra}

    def run(self, model: nn.Module, inputs: dict[str, Any], **options: Any) -> Any:
        """The whole output."""
        if self.family == "timm":
            return {"logits": model(inputs["pixel_values"])}
        return model(**inputs, **options)

    def result(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The tensor that is compared."""
        return self.run(model, inputs)[self.output]


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The layers of the encoder, wherever this version of transformers has them."""
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def config(cls: type, **options: Any) -> Any:
    """A tiny configuration."""
    return cls(**{**COMMON, "intermediate_size": 48, **options})


def dino(cls: type, **options: Any) -> Any:
    """A tiny configuration of the DINO families."""
    return cls(**{**COMMON, "layerscale_value": 0.7, **options})


def dual(cls: type) -> Any:
    """A tiny CLIP or SigLIP configuration."""
    vision = {**COMMON, "intermediate_size": 48, "vision_use_head": True}
    text = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS,
            "intermediate_size": 48, "vocab_size": 99}  # fmt: skip
    return cls(vision_config=vision, text_config=text, projection_dim=16, num_labels=5)


def bert(cls: type, **options: Any) -> Any:
    """A tiny configuration of the BERT family."""
    return cls(vocab_size=99, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
               intermediate_size=48, max_position_embeddings=64, num_labels=5, **options)  # fmt: skip


REGISTERS = 4
TIMM = {"family": "timm"}

VISION = (
    Encoder("vit", lambda: hf.ViTForImageClassification(config(hf.ViTConfig)), family="vit"),
    Encoder("vit-model", lambda: hf.ViTModel(config(hf.ViTConfig)), family="vit", output="pooler_output"),
    Encoder("deit", lambda: hf.DeiTForImageClassificationWithTeacher(config(hf.DeiTConfig)), 2, "vit"),
    Encoder("dinov2", lambda: hf.Dinov2ForImageClassification(dino(hf.Dinov2Config)), 1, "dinov2"),
    Encoder("dinov2-swiglu", lambda: hf.Dinov2Model(dino(hf.Dinov2Config, use_swiglu_ffn=True)), 1, "dinov2",
            "pooler_output"),
    Encoder("dinov2-registers", lambda: hf.Dinov2WithRegistersForImageClassification(
        dino(hf.Dinov2WithRegistersConfig, num_register_tokens=REGISTERS)), 1 + REGISTERS, "dinov2"),
    Encoder("dinov3", lambda: hf.DINOv3ViTModel(
        dino(hf.DINOv3ViTConfig, num_register_tokens=REGISTERS, intermediate_size=48)),
        1 + REGISTERS, "dinov3", "pooler_output"),
    Encoder("clip", lambda: hf.CLIPForImageClassification(dual(hf.CLIPConfig)), 1, "clip"),
    Encoder("clip-vision", lambda: hf.CLIPVisionModelWithProjection(config(hf.CLIPVisionConfig)), 1, "clip",
            "image_embeds"),
    Encoder("siglip", lambda: hf.SiglipForImageClassification(dual(hf.SiglipConfig)), 0, "clip"),
    Encoder("siglip-vision", lambda: hf.SiglipVisionModel(config(hf.SiglipVisionConfig)), 0, "clip",
            "pooler_output"),
    Encoder("timm", VisionTransformer, 1, **TIMM),
    Encoder("timm-registers-avg", lambda: VisionTransformer(registers=4, pool="avg"), 5, **TIMM),
    Encoder("timm-distilled", lambda: VisionTransformer(distilled=True, qk_norm=False), 2, **TIMM),
    Encoder("timm-no-class", lambda: VisionTransformer(class_token=False, pool="avgmax"), 0, **TIMM),
)  # fmt: skip
TEXT = (
    Encoder("bert", lambda: hf.BertForSequenceClassification(bert(hf.BertConfig)), 1, "bert", text=True),
    Encoder("bert-mlm", lambda: hf.BertForMaskedLM(bert(hf.BertConfig)), 1, "bert", text=True, dense=True),
    Encoder("roberta", lambda: hf.RobertaModel(bert(hf.RobertaConfig)), 1, "bert", "pooler_output",
            text=True),
    Encoder("electra", lambda: hf.ElectraForSequenceClassification(
        bert(hf.ElectraConfig, embedding_size=WIDTH)), 1, "bert", text=True),
    Encoder("distilbert", lambda: hf.DistilBertForSequenceClassification(hf.DistilBertConfig(
        vocab_size=99, dim=WIDTH, n_layers=LAYERS, n_heads=HEADS, hidden_dim=48, max_position_embeddings=64,
        num_labels=5)), 1, "distilbert", text=True),
)  # fmt: skip
DENSE = (
    Encoder("dinov2-backbone", lambda: hf.Dinov2Backbone(
        dino(hf.Dinov2Config, out_features=["stage2", "stage4"])), 1, "dinov2", "feature_maps", dense=True),
    Encoder("dinov3-backbone", lambda: hf.DINOv3ViTBackbone(
        dino(hf.DINOv3ViTConfig, out_features=["stage2", "stage4"], intermediate_size=48,
             num_register_tokens=REGISTERS)), 1 + REGISTERS, "dinov3", "feature_maps", dense=True),
    Encoder("vit-masked", lambda: hf.ViTForMaskedImageModeling(config(hf.ViTConfig, encoder_stride=PATCH)), 1,
            "vit", "reconstruction", dense=True),
)  # fmt: skip
ALL = VISION + TEXT
BY_NAME = {encoder.name: encoder for encoder in ALL + DENSE}
