"""Give a vision-language model a part of the visual tokens of an image, and draw which.

python examples/visual_tokens.py
python examples/visual_tokens.py --model llava-hf/llava-1.5-7b-hf --image cat.jpg --question "What is this?"
"""

from typing import Any

import tokencomp
import torch
from shared import options, run
from tokencomp import methods, zoo

METHODS = {"ToDRE": methods.ToDRE, "DivPrune": methods.DivPrune, "every n-th": methods.StrideVisual}


@torch.no_grad()
def main() -> None:
    given = options(
        __doc__.splitlines()[0], "digits-vlm",
        keep={"type": float, "default": 0.25, "help": "share of the visual tokens (default 0.25)"},
        image={"help": "a picture, for models of Hugging Face"},
        question={"default": "What is in this picture?", "help": "about it"},
    )  # fmt: skip
    if given.model in zoo.names():
        digits(given)
    else:
        any_model(given)


def digits(given: Any) -> None:
    """Questions about a canvas of digits."""
    model, _ = zoo.load(given.model)
    batch = zoo.digits.vlm_batch("cell", 64, torch.Generator().manual_seed(given.seed))

    def share_right() -> float:
        said = model.generate(batch.prompts, pixel_values=batch.pixels, max_new_tokens=1, do_sample=False)
        return (said[:, -1] == batch.answers).float().mean().item()

    print(f"all tokens: {share_right():.0%} right")
    for name, make in METHODS.items():
        with tokencomp.compress(model, make(keep=given.keep)) as handle:
            print(f"{name}: {share_right():.0%} right. {handle.report()}")
            draw(given, name, handle, batch.pixels[0])


def any_model(given: Any) -> None:
    """One question about one picture."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if given.image is None:
        raise SystemExit("visual_tokens: --image is needed with a model of Hugging Face")
    processor = AutoProcessor.from_pretrained(given.model)
    model = AutoModelForImageTextToText.from_pretrained(given.model, dtype="auto").to(given.device).eval()
    content = [{"type": "image"}, {"type": "text", "text": given.question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    image = Image.open(given.image).convert("RGB")
    inputs = processor(images=image, text=text, return_tensors="pt").to(given.device, model.dtype)

    def said() -> str:
        out = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    print(f"all tokens: {said()}")
    for name, make in METHODS.items():
        with tokencomp.compress(model, make(keep=given.keep)) as handle:
            print(f"{name}: {said()} ({handle.report()})")
            pixels = inputs["pixel_values"].reshape(-1, *inputs["pixel_values"].shape[-3:])[0].float().cpu()
            pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min())
            draw(given, name, handle, pixels)


def draw(given: Any, name: str, handle: Any, pixels: torch.Tensor) -> None:
    """A picture of what was kept, where the tokens are a grid."""
    path = given.out / f"visual_tokens_{name.lower().replace(' ', '_')}.png"
    try:
        handle.overlay(pixels, path=path)
    except ValueError as error:
        print(f"no picture: {error}")
        return
    print(f"picture: {path}")


if __name__ == "__main__":
    run(main)
