"""Choosing visual tokens against the prefill it saves; an encoder and a whole prefill with fewer of them.

    python bench/bench_visual.py [--device cpu|cuda] [--out file.json] [--check] [--quick]

``choose``: score, choose and gather a tenth of the visual tokens of LLaVA-1.5 (576, D=4096, bfloat16) and of
LLaVA-NeXT (2880: an overview and four tiles), with queries, keys and features of CLIP-L/336 at hand, all of
them random numbers; ZOO-Prune with 2 of its 64 directions, each two passes of the projector. The peer is what
32 layers of a 7B decoder (width 4096, 32 heads, MLP 11008) then save beside 64 tokens of text, measured on
one random layer: its ratios say how often a choice fits into the time that it saves. ``encoder``: CLIP-L/336
with a decoder of one small layer, as it is and with methods that look into it or cut patches out of it.
``prefill``: a random LLaVA whose decoder takes most of the time, 576 tokens and 58. Contenders take turns and
the best time counts.
"""

import copy
from collections.abc import Callable
from typing import Any

import tokencomp
import torch
from common import Row, command, interleaved_seconds
from tokencomp import methods, ragged
from tokencomp.adapters import flops as flops_of
from tokencomp.methods.visual import VisualView
from tokencomp.visual_attention import SeenEncoder
from torch import Tensor, nn

TOKENS, WIDTH, TEXT = 576, 4096, 64
HEADS, HEAD, TOWER = 16, 64, 24  # CLIP-L
INNER, LAYERS = 11008, 32  # of the 7B decoder
TENTH = 0.1
SMALL = 58  # a tenth of 576
SLOW = "ZOO-Prune, 2 of 64"  # directions; for LLaVA-1.5 alone: its time is in proportion to tokens
METHODS: dict[str, Any] = {
    "random": methods.RandomVisual(keep=TENTH),
    "down-sampling": methods.StrideVisual(keep=TENTH, average=True),
    "ATP": methods.ATP(methods.FasterVLM(), keep=TENTH),
    "CDPruner": methods.CDPruner(keep=TENTH),
    "DivPrune": methods.DivPrune(keep=TENTH),
    "FasterVLM": methods.FasterVLM(keep=TENTH),
    "FoPru": methods.FoPru(keep=TENTH),
    "GlobalCom2": methods.GlobalCom2(keep=TENTH),
    "HiPrune": methods.HiPrune(keep=TENTH),
    "LexRank": methods.LexRank(keep=TENTH),
    "PruMerge": methods.PruMerge(),
    "SCOPE": methods.Scope(keep=TENTH),
    "SliME": methods.SliME(p=TENTH),
    "ToDRE": methods.ToDRE(keep=TENTH),
    "VisionZip": methods.VisionZip(keep=TENTH),
    "VisPruner": methods.VisPruner(keep=TENTH),
    "VScan": methods.VScan(keep=TENTH),
    "VTC-CLS": methods.VTCCLS(keep=TENTH),
    SLOW: methods.ZOOPrune(keep=TENTH, directions=2),
    "ZOO-Prune, exact": methods.ZOOPrune(keep=TENTH, directions=None),
}
INSIDE: dict[str, Any] = {
    "random": methods.RandomVisual(keep=SMALL),
    "FasterVLM": methods.FasterVLM(keep=SMALL),
    "ToDRE": methods.ToDRE(keep=SMALL),
    "VTC-CLS": methods.VTCCLS(keep=SMALL),
    "FlowCut": methods.FlowCut(keep=SMALL),
}


def view(crops: int, device: str) -> VisualView:
    """One image: what the encoder and the projector gave, all layers looked at."""
    g = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device, torch.bfloat16)

    seen = {
        layer: (noise(crops, HEADS, 1 + TOKENS, HEAD), noise(crops, HEADS, 1 + TOKENS, HEAD), HEAD**-0.5)
        for layer in range(TOWER)
    }
    width = HEADS * HEAD
    projector = nn.Sequential(nn.Linear(width, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
    projector = projector.to(device, torch.bfloat16)
    encoder = SeenEncoder(TOWER, 1, projector, seen, noise(crops, TOKENS, width))
    tiles = (2, 2) if crops == 5 else (0, 0)
    text = noise(1, TEXT, WIDTH), torch.ones(1, TEXT, dtype=torch.bool, device=device)
    x = noise(crops, TOKENS, WIDTH)
    return VisualView(x, encoder, (24, 24), [crops], crops > 1, [tiles], *text)


def chosen(at: VisualView, method: Any) -> Callable[[int], Tensor]:
    """Score, choose, and gather."""

    def call(_: int) -> Tensor:
        at.scratch.clear()
        keep = method.choose(at)
        return ragged.gather_rows(at.x, keep.index) if keep.x is None else keep.x

    return call


def decoder_layer(device: str) -> nn.Module:
    """A random layer of the 7B decoder, bfloat16."""
    import transformers
    from transformers.models.llama import modeling_llama

    config = transformers.LlamaConfig(
        hidden_size=WIDTH, intermediate_size=INNER, num_attention_heads=32, num_key_value_heads=32,
        num_hidden_layers=1, max_position_embeddings=8192,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            layer = modeling_llama.LlamaDecoderLayer(config, 0).eval()
    finally:
        torch.set_default_dtype(before)
    return layer


def over(layer: Any, tokens: int, device: str) -> Callable[[int], Tensor]:
    """``layer`` on a prompt of so many tokens."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    x = torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    rotary = LlamaRotaryEmbedding(layer.self_attn.config).to(device)
    position = rotary(x, torch.arange(tokens, device=device)[None])
    return lambda _: layer(x, position_embeddings=position)


def choices(crops: int, layer: nn.Module, device: str, *, checked: bool) -> list[Row]:
    tokens, at = crops * TOKENS, view(crops, device)
    kept = round(TENTH * tokens)
    prompts = {"all": over(layer, tokens + TEXT, device), "kept": over(layer, kept + TEXT, device)}
    whole = interleaved_seconds(prompts, device, repeats=5, budget=10.0)
    if checked:
        _check(at, kept)
    calls = {name: chosen(at, m) for name, m in METHODS.items() if crops == 1 or name != SLOW}
    best = interleaved_seconds(calls, device, repeats=10, budget=12.0)
    case = f"choose {kept} of {tokens} D={WIDTH} bfloat16"
    size = 2.0 * tokens * WIDTH
    counted = [flops_of.decoder_flops(layer, [n + TEXT]) for n in (tokens, kept)]
    work = float(counted[0] - counted[1])
    saved = LAYERS * (whole["all"] - whole["kept"])
    peer = Row("visual", case, "decoder's saving", saved, LAYERS * work, size, True)
    return [peer, *(Row("visual", case, name, seconds, 0.0, size) for name, seconds in best.items())]


def _check(at: VisualView, kept: int) -> None:
    """ToDRE's picks are those of the plain loop over cosines."""
    x = torch.nn.functional.normalize(at.x.flatten(0, 1).double(), dim=-1)
    first = int(at.encoder.cls(TOWER - 1)[0].argmax())
    total, picks = x @ x[first], [first]
    total[first] = torch.inf
    for _ in range(kept - 1):
        picks.append(int(total.argmin()))
        total += x @ x[picks[-1]]
        total[picks[-1]] = torch.inf
    index = METHODS["ToDRE"].choose(at).index
    found = {crop * TOKENS + i for crop, row in enumerate(index.tolist()) for i in row if i >= 0}
    if len(found & set(picks)) < 0.98 * kept:  # near ties of bfloat16 inputs may fall either way
        raise SystemExit(f"ToDRE: {len(found & set(picks))} of {kept} picks are those of the plain loop")


def llava(device: str, vision: dict[str, Any], text: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """A random LLaVA with the 576 tokens of LLaVA-1.5, and a prompt."""
    import transformers

    tower = transformers.CLIPVisionConfig(image_size=336, patch_size=14, **vision)
    config = transformers.LlavaConfig(
        vision_config=tower, text_config=transformers.LlamaConfig(vocab_size=128, pad_token_id=0, **text),
        image_token_index=100, image_seq_length=TOKENS,
    )  # fmt: skip
    torch.manual_seed(0)
    made: Any = transformers.LlavaForConditionalGeneration(config)
    model = made.eval().to(device, torch.bfloat16)
    g = torch.Generator().manual_seed(2)
    words = torch.randint(3, 99, (TEXT,), generator=g)
    ids = torch.cat([words[:5], torch.full((TOKENS,), 100), words[5:]])[None]
    pixels = torch.randn(1, 3, 336, 336, generator=g).to(device, torch.bfloat16)
    return model, {"input_ids": ids.to(device), "pixel_values": pixels}


def sizes(width: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip(names, (width, inner, layers, heads), strict=True))


def models(
    case: str, vision: dict[str, Any], text: dict[str, Any], device: str, *, checked: bool
) -> list[Row]:
    """Whole prompts of the same model, as it is and with each method ``INSIDE``."""
    calls: dict[str, Callable[[int], Any]] = {}
    handles = {}
    first, prompt = llava(device, vision, text)
    for name, method in {"576 tokens": None, **INSIDE}.items():
        model = copy.deepcopy(first)
        calls[name] = _prefill(model, prompt)
        if method is not None:
            handles[name] = tokencomp.compress(model, method)
    best = interleaved_seconds(calls, device, repeats=15, budget=15.0)
    reports = {name: handle.report() for name, handle in handles.items()}
    for name, report in reports.items():
        if checked and report.kept != SMALL:
            raise SystemExit(f"{name}: kept {report.kept} of {TOKENS} tokens, not {SMALL}")
    flops = {name: float(report.flops) for name, report in reports.items()}
    flops["576 tokens"] = float(reports["random"].dense_flops)
    vision_tower = first.model.vision_tower  # before transformers 5.10 or so a module around the encoder
    encoder = getattr(vision_tower, "vision_model", vision_tower).encoder
    tower = [flops_of.tower_flops(x, x.self_attn, [1 + TOKENS]) for x in encoder.layers]
    for name in flops:
        if name not in reports or not reports[name].encoder_flops:
            flops[name] += sum(tower)
    return [
        Row(
            "visual",
            f"{case} bfloat16",
            name,
            seconds,
            flops[name],
            flops[name] / TOKENS,
            name == "576 tokens",
        )
        for name, seconds in best.items()
    ]


def _prefill(model: Any, prompt: dict[str, Tensor]) -> Callable[[int], Any]:
    return lambda _: model(**prompt, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def run(device: str, *, quick: bool = False, checked: bool = False) -> list[Row]:
    layer = decoder_layer(device)
    rows = choices(1, layer, device, checked=checked)
    if quick:
        return rows
    clip = sizes(HEADS * HEAD, 4 * HEADS * HEAD, TOWER, HEADS)
    rows += choices(5, layer, device, checked=checked)
    rows += models("encoder CLIP-L", clip, sizes(256, 512, 1, 4), device, checked=checked)
    small = sizes(64, 128, 3, 4), sizes(1024, 2752, 8, 16)
    return rows + models(f"prefill {TOKENS} -> {SMALL}", *small, device, checked=checked)


if __name__ == "__main__":
    raise SystemExit(command(run, __doc__))
