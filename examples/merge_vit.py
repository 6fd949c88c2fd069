"""Merge tokens inside a vision transformer, and draw which patches became one.

python examples/merge_vit.py
python examples/merge_vit.py --model google/vit-base-patch16-224 --image cat.jpg
"""

import time
from typing import Any

import tokencomp
import torch
from shared import options, run
from tokencomp import methods, zoo


@torch.no_grad()
def main() -> None:
    given = options(
        __doc__.splitlines()[0], "digits-vit",
        keep={"type": float, "default": 0.68, "help": "share of tokens a layer leaves (default 0.68)"},
        image={"help": "a picture, for models of Hugging Face"},
    )  # fmt: skip
    model, pixels, labels = load(given)
    plain, seconds = classify(model, pixels)
    print(f"all tokens: {verdict(model, plain, labels)} in {seconds:.3f} s")
    report = show(given, model, methods.PiToMe(keep=given.keep, metric="tokens"), pixels, labels)
    each = (report.tokens[0] - report.tokens[-1]) // (len(report.tokens) - 1)
    show(given, model, methods.ToMe(r=each, metric="tokens"), pixels, labels)  # as many in all


def show(given: Any, model: Any, method: Any, pixels: torch.Tensor, labels: torch.Tensor | None) -> Any:
    """Classify with ``method``, say what that did, and draw the first picture's patches."""
    with tokencomp.compress(model, method) as handle:
        found, seconds = classify(model, pixels)
        report = handle.report()
    print(f"{verdict(model, found, labels)} in {seconds:.3f} s. {report}")
    path = given.out / f"merge_vit_{type(method).__name__.lower()}.png"
    shown = (pixels[0] - pixels[0].min()) / (pixels[0].max() - pixels[0].min())
    tokencomp.visualize(shown, report.token_map[0], report.grid, prefix=report.prefix, path=path)
    print(f"picture: {path}")
    return report


def load(given: Any) -> tuple[Any, torch.Tensor, torch.Tensor | None]:
    """A model, pixels ``[B, 3, H, W]``, and labels where they are known."""
    if given.model in zoo.names():
        model, _ = zoo.load(given.model)
        return model, *zoo.digits.vit_canvases(48, torch.Generator().manual_seed(given.seed))
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    if given.image is None:
        raise SystemExit("merge_vit: --image is needed with a model of Hugging Face")
    processor = AutoImageProcessor.from_pretrained(given.model, backend="pil")  # needs no torchvision
    model = AutoModelForImageClassification.from_pretrained(given.model).to(given.device).eval()
    image = Image.open(given.image).convert("RGB")
    return model, processor(images=image, return_tensors="pt")["pixel_values"].to(given.device), None


def classify(model: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Logits, and the seconds of the second of two runs."""
    model(pixel_values=pixels)
    begin = time.perf_counter()
    logits = model(pixel_values=pixels).logits
    return logits, time.perf_counter() - begin


def verdict(model: Any, logits: torch.Tensor, labels: torch.Tensor | None) -> str:
    """The share that is right, or what the picture shows."""
    best = logits.argmax(-1)
    if labels is not None:
        return f"{(best == labels).float().mean():.1%} right"
    return str(model.config.id2label[int(best[0])])


if __name__ == "__main__":
    run(main)
