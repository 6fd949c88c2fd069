"""Untrained vision-language models of every supported make, a few thousand parameters each, and a prompt."""

import inspect
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

IMAGE, VIDEO = 60, 61


def _transformers() -> Any:
    return pytest.importorskip("transformers", reason="models need the extra hf")


def _text(kind: str = "Llama", **more: Any) -> Any:
    config = getattr(_transformers(), f"{kind}Config")
    return config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2, **more,
    )  # fmt: skip


def _clip() -> Any:
    return _transformers().CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=32,
        patch_size=8, projection_dim=16,
    )  # fmt: skip


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def _words(*shape: int) -> Tensor:
    return torch.randint(3, 50, shape, generator=_generator())


def _prompt(counts: list[int], token: int = IMAGE, pieces: int = 1) -> Tensor:
    """Rows of text, an image of so many tokens, text; all as long as the longest. A video of Qwen3-VL comes
    in ``pieces``, a word between two.
    """
    longest = max(counts)
    rows = []
    for i, n in enumerate(counts):
        visual = [torch.full((n // pieces,), token)]
        for _ in range(pieces - 1):
            visual += [_words(1), visual[0]]
        rows.append(torch.cat([_words(3 + longest - n), *visual, _words(4) + i]))
    return torch.stack(rows)


def visual_mask(ids: Tensor) -> Tensor:
    return (ids == IMAGE) | (ids == VIDEO)


def llava() -> tuple[Any, dict[str, Any]]:
    transformers = _transformers()
    config = transformers.LlavaConfig(
        vision_config=_clip(), text_config=_text(), image_token_index=IMAGE, image_seq_length=16
    )
    model = transformers.LlavaForConditionalGeneration(config)
    return model, {
        "input_ids": _prompt([16, 16]),
        "pixel_values": torch.randn(2, 3, 32, 32, generator=_generator()),
    }


def llava_next() -> tuple[Any, dict[str, Any]]:
    transformers = _transformers()
    config = transformers.LlavaNextConfig(
        vision_config=_clip(), text_config=_text(), image_token_index=IMAGE, image_seq_length=16,
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
    )  # fmt: skip
    model = transformers.LlavaNextForConditionalGeneration(config)
    sizes = torch.tensor([[30, 60], [64, 64]])
    pixels = torch.randn(2, 5, 3, 32, 32, generator=_generator())
    with torch.no_grad():
        found = model.model.get_image_features(pixels, sizes)
    counts = [len(f) for f in found.pooler_output]
    return model, {"input_ids": _prompt(counts), "pixel_values": pixels, "image_sizes": sizes}


def llava_siglip() -> tuple[Any, dict[str, Any]]:
    """A tower without CLS."""
    transformers = _transformers()
    config = transformers.LlavaConfig(
        vision_config=_siglip(), text_config=_text(), image_token_index=IMAGE, image_seq_length=16,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config)
    pixels = torch.randn(2, 3, 32, 32, generator=_generator())
    return model, {"input_ids": _prompt([16, 16]), "pixel_values": pixels}


def _siglip() -> Any:
    return _transformers().SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=32,
        patch_size=8, vision_use_head=False,
    )  # fmt: skip


def _onevision() -> Any:
    transformers = _transformers()
    config = transformers.LlavaOnevisionConfig(
        vision_config=_siglip(), text_config=_text("Qwen2"), image_token_index=IMAGE, video_token_index=VIDEO,
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
    )  # fmt: skip
    return transformers.LlavaOnevisionForConditionalGeneration(config)


def onevision() -> tuple[Any, dict[str, Any]]:
    model = _onevision()
    sizes = torch.tensor([[30, 60], [64, 64]])
    pixels = torch.randn(2, 5, 3, 32, 32, generator=_generator())
    with torch.no_grad():
        counts = [len(f) for f in model.model.get_image_features(pixels, sizes).pooler_output]
    return model, {"input_ids": _prompt(counts), "pixel_values": pixels, "image_sizes": sizes}


def onevision_video() -> tuple[Any, dict[str, Any]]:
    """Three frames of 2 x 2 tokens and a newline."""
    pixels = torch.randn(2, 3, 3, 32, 32, generator=_generator())
    model = _onevision()
    if "pixel_values_videos" not in inspect.signature(model.model.get_video_features).parameters:
        version = _transformers().__version__
        pytest.skip(f"transformers {version} adds the newline of a video behind get_video_features")
    return model, {"input_ids": _prompt([13, 13], VIDEO), "pixel_values_videos": pixels}


def internvl() -> tuple[Any, dict[str, Any]]:
    transformers = _transformers()
    vision = transformers.InternVLVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=[64, 64],
        patch_size=[8, 8],
    )  # fmt: skip
    config = transformers.InternVLConfig(
        vision_config=vision, text_config=_text("Qwen2"), image_token_id=IMAGE, image_seq_length=16
    )
    model = transformers.InternVLForConditionalGeneration(config)
    return model, {
        "input_ids": _prompt([16, 16]),
        "pixel_values": torch.randn(2, 3, 64, 64, generator=_generator()),
    }


def _qwen(
    name: str, vision: dict[str, Any], text: Any, depth: str, video: bool = False
) -> tuple[Any, dict[str, Any]]:
    transformers = _transformers()
    kinds = {
        "in_channels": 3, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2, depth: 3,
        "num_heads": 4,
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(
        vision_config=kinds | vision, text_config=text, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=58, vision_end_token_id=59,
    )  # fmt: skip
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    if video:
        grid = torch.tensor([[3, 4, 6], [3, 4, 4]])
        pixels = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 4 * 4, generator=_generator())
        ids = _prompt([18, 12], VIDEO, 3 if name == "Qwen3VL" else 1)
        return model, {
            "input_ids": ids, "pixel_values_videos": pixels, "video_grid_thw": grid,
            "mm_token_type_ids": 2 * (ids == VIDEO).int(),
        }  # fmt: skip
    grid = torch.tensor([[1, 8, 8], [1, 4, 6]])
    pixels = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 4 * 4, generator=_generator())
    ids = _prompt([16, 6])
    return model, {
        "input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid,
        "mm_token_type_ids": (ids == IMAGE).int(),
    }  # fmt: skip


def _qwen_text() -> dict[str, Any]:
    return {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }  # fmt: skip


def qwen2_vl(video: bool = False) -> tuple[Any, dict[str, Any]]:
    vision = {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    return _qwen("Qwen2VL", vision, _qwen_text(), "depth", video)


def qwen2_5_vl(video: bool = False) -> tuple[Any, dict[str, Any]]:
    vision = {
        "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "window_size": 16,
        "fullatt_block_indexes": [1, 2],
    }  # fmt: skip
    return _qwen("Qwen2_5_VL", vision, _qwen_text(), "depth", video)


def qwen3_vl(video: bool = False) -> tuple[Any, dict[str, Any]]:
    vision = {
        "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    return _qwen("Qwen3VL", vision, _qwen_text() | {"head_dim": 8}, "depth", video)


FAMILIES = {
    "llava": llava, "llava_siglip": llava_siglip, "llava_next": llava_next, "onevision": onevision,
    "internvl": internvl, "qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl,
}  # fmt: skip
VIDEO_FAMILIES = {
    "onevision_video": onevision_video, "qwen2_vl_video": partial(qwen2_vl, True),
    "qwen2_5_vl_video": partial(qwen2_5_vl, True), "qwen3_vl_video": partial(qwen3_vl, True),
}  # fmt: skip


def make(family: str, dtype: torch.dtype = torch.float64) -> tuple[Any, dict[str, Any]]:
    """The model, and a prompt of two rows with an image each."""
    torch.manual_seed(3)
    model, prompt = (FAMILIES | VIDEO_FAMILIES)[family]()
    model.eval().to(dtype)
    return model, {name: x.to(dtype) if x.is_floating_point() else x for name, x in prompt.items()}


def encode(model: Any, made: dict[str, Any]) -> list[Tensor]:
    """The features of a prompt's images or videos, through the model's own function."""
    kind = "video" if "pixel_values_videos" in made else "image"
    given = {name: x for name, x in made.items() if name not in ("input_ids", "mm_token_type_ids")}
    return list(getattr(model.model, f"get_{kind}_features")(**given).pooler_output)
