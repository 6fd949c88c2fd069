"""Sizes of models: those with a name here, and any that Hugging Face's configuration or files describe."""

import difflib
import json
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

_ITEM = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # of safetensors: loaded in the dtype asked for


@dataclass(frozen=True)
class Shape:
    """What a plan needs to know of a model."""

    name: str
    parameters: int  # tied ones once
    layers: int  # with attention to all tokens
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int  # width of the MLP
    positions: int  # that it was configured for
    sliding: int = 0  # layers with sliding attention
    window: int = 0  # of these
    image_tokens: int = 0  # a picture is, in a vision-language model
    fixed_bytes: int = 0  # weights that no dtype changes: quantized ones

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Of all weights in ``dtype``; quantized ones as they are stored."""
        return self.parameters * dtype.itemsize + self.fixed_bytes


NAMED = {
    shape.name: shape
    for shape in (
        Shape("llama-2-7b", 6_738_415_616, 32, 32, 32, 128, 11008, 4096),
        Shape("llama-3.1-8b", 8_030_261_248, 32, 32, 8, 128, 14336, 131072),
        Shape("llama-3.1-70b", 70_553_706_496, 80, 64, 8, 128, 28672, 131072),
        Shape("llama-3.2-1b", 1_235_814_400, 16, 32, 8, 64, 8192, 131072),
        Shape("llama-3.2-3b", 3_212_749_824, 28, 24, 8, 128, 8192, 131072),
        Shape(
            "mistral-7b", 7_248_023_552, 32, 32, 8, 128, 14336, 32768
        ),  # v0.3; v0.1 has sliding layers only
        Shape("qwen2.5-0.5b", 494_032_768, 24, 14, 2, 64, 4864, 32768),
        Shape("qwen2.5-1.5b", 1_543_714_304, 28, 12, 2, 128, 8960, 32768),
        Shape("qwen2.5-7b", 7_615_616_512, 28, 28, 4, 128, 18944, 32768),
        Shape("qwen2.5-14b", 14_770_033_664, 48, 40, 8, 128, 13824, 32768),
        Shape("qwen2.5-32b", 32_763_876_352, 64, 40, 8, 128, 27648, 32768),
        Shape("qwen3-0.6b", 596_049_920, 28, 16, 8, 128, 3072, 40960),
        Shape("qwen3-1.7b", 1_720_574_976, 28, 16, 8, 128, 6144, 40960),
        Shape("qwen3-4b", 4_022_468_096, 36, 32, 8, 128, 9728, 40960),
        Shape("qwen3-8b", 8_190_735_360, 36, 32, 8, 128, 12288, 40960),
        Shape("qwen3-14b", 14_768_307_200, 40, 40, 8, 128, 17408, 40960),
        Shape("qwen3-32b", 32_762_123_264, 64, 64, 8, 128, 25600, 40960),
        Shape("gemma-2-9b", 9_241_705_984, 21, 16, 8, 256, 14336, 8192, sliding=21, window=4096),
        Shape("llava-1.5-7b", 7_063_427_072, 32, 32, 32, 128, 11008, 4096, image_tokens=576),
    )
}
"""Models by name. Instruct and chat versions have the same sizes."""


def find(model: str) -> Shape:
    """The sizes of ``model``: a name of ``NAMED``, a ``config.json``, a folder of Hugging Face, or the id of
    one that is in its cache. Nothing is downloaded.

    Raises ValueError for what is none of these, or has no layer whose cache could be paged; ImportError where
    a configuration is to be read without transformers.
    """
    named = NAMED.get(model) or NAMED.get(_plain(model))
    path = Path(model)
    if named is not None and not path.exists():
        return named
    return _from_config(model, path)


def _plain(model: str) -> str:
    name = model.rpartition("/")[2].lower().removeprefix("meta-")
    return re.sub(r"(-(instruct|chat|base|it|hf|v0\.[23]))+$", "", name)


def _from_config(model: str, path: Path) -> Shape:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"plan: reading a configuration needs transformers: pip install 'tokencomp[hf]' ({error})"
        ) from error
    folder = path if path.is_dir() else path.parent if path.is_file() else None
    try:
        if path.is_file():
            config = _config_of(transformers, json.loads(path.read_text()))
        else:
            config = transformers.AutoConfig.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(_unknown(model, error)) from error
    shape = _of_config(transformers, model, config)
    counted = _of_files(folder) if folder is not None else None
    if counted is not None:
        return replace(shape, parameters=counted[0], fixed_bytes=counted[1])
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"plan: the weights of {model!r} are quantized and not there to be measured; say how many bytes "
            "they are: --weights 5.7GB"
        )
    return replace(shape, parameters=_count(transformers, config))


def _config_of(transformers: Any, values: dict[str, Any]) -> Any:
    kind = values.get("model_type")
    if kind is None:
        raise ValueError("it has no model_type")
    return transformers.AutoConfig.for_model(**values)


def _unknown(model: str, error: Exception) -> str:
    near = difflib.get_close_matches(_plain(model), NAMED, 3, 0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"plan: --model must be a name, a config.json or a folder of Hugging Face, got {model!r} "
        f"({reason[:160]}). {hint}Names: {', '.join(NAMED)}"
    )


def _of_config(transformers: Any, name: str, config: Any) -> Shape:
    text = config.get_text_config(decoder=True)
    try:
        layers = transformers.DynamicCache(config=text).layers
        heads, hidden = text.num_attention_heads, text.hidden_size
        positions = int(getattr(text, "max_position_embeddings", 0) or 0)
    except (AttributeError, KeyError) as error:
        raise ValueError(f"plan: {name!r} does not look like a decoder: {error}") from error
    kinds = [type(layer).__name__ for layer in layers]
    windows = [int(layer.sliding_window) for layer in layers if hasattr(layer, "sliding_window")]
    if "DynamicLayer" not in kinds:
        raise ValueError(f"plan: {name!r} has no full-attention layer whose cache could be paged")
    return Shape(
        name=name,
        parameters=0,
        layers=kinds.count("DynamicLayer"),
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or hidden // heads,
        intermediate=int(getattr(text, "intermediate_size", 0) or 4 * hidden),
        positions=positions,
        sliding=len(windows),
        window=max(windows, default=0),
        image_tokens=int(getattr(config, "image_seq_length", 0) or 0),
    )


def _of_files(folder: Path) -> tuple[int, int] | None:
    """Floating-point elements and other bytes in the ``*.safetensors`` of a folder; None without any."""
    files = sorted(folder.glob("*.safetensors"))
    elements = others = 0
    for file in files:
        with file.open("rb") as stream:
            header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
        for key, tensor in header.items():
            if key == "__metadata__":
                continue
            begin, end = tensor["data_offsets"]
            size = _ITEM.get(tensor["dtype"])
            elements += 0 if size is None else (end - begin) // size
            others += end - begin if size is None else 0
    return (elements, others) if files else None


def _count(transformers: Any, config: Any) -> int:
    """Parameters of the model that ``config`` describes, made without memory."""
    architecture = next(iter(getattr(config, "architectures", None) or ()), "")
    make: Callable[[Any], Any] | None = getattr(transformers, architecture, None)
    try:
        with torch.device("meta"):
            model = make(config) if make else transformers.AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"plan: cannot count the parameters of {config.model_type!r} ({error}); say how many bytes they "
            "are: --weights 14GB"
        ) from error
    model.tie_weights()
    return sum(p.numel() for p in model.parameters())
