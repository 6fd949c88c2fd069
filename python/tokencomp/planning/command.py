"""``python -m tokencomp plan``: which caches fit beside a model's weights, and the call that makes one."""

import argparse
import json
import sys
from typing import Any

import torch

from tokencomp.methods.kv import parse_bytes
from tokencomp.planning import plan, shapes

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PAGES = (16, 32, 64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--model", required=True, help="a name such as llama-3.1-8b, a config.json, a folder or a cached id"
    )
    parser.add_argument("--context", type=int, required=True, help="tokens of a sequence, prompt and answer")
    parser.add_argument("--memory", required=True, help="of the device, e.g. 24GB or 16GiB")
    parser.add_argument("--batch", type=int, default=1, help="sequences (default 1)")
    parser.add_argument("--new", type=int, default=256, help="tokens of the answer (default 256)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the model (default bfloat16)")
    parser.add_argument("--page", type=int, choices=PAGES, default=64, help="slots of a page (default 64)")
    parser.add_argument("--reserve", default="1GB", help="to be left free for all else (default 1GB)")
    parser.add_argument("--weights", help="bytes of the weights, where the model's files do not say")
    parser.add_argument("--chunk", type=int, help="tokens of a forward of the prompt (default: all at once)")
    parser.add_argument("--budgets", default="", help="slots a kv head to compare, separated by commas")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")


def run(options: argparse.Namespace) -> int:
    """Exit status: 0; 1 where nothing fits, or without transformers; 2 for options that make no sense."""
    try:
        found = plan.make(_request(options), _counts(options.budgets))
    except (ValueError, ImportError) as error:
        print(error, file=sys.stderr)
        return 1 if isinstance(error, ImportError) else 2
    print(json.dumps(as_json(found), indent=1) if options.json else text(found))
    return 0 if found.best else 1


def as_json(found: plan.Plan) -> dict[str, Any]:
    """Numbers in bytes and tokens."""
    asked = found.request
    return {
        "model": asked.shape.name,
        "dtype": str(asked.dtype).removeprefix("torch."),
        "context": asked.context,
        "new": asked.new,
        "batch": asked.batch,
        "chunk": asked.chunk,
        "memory": asked.memory,
        "reserve": asked.reserve,
        "weights": asked.weight_bytes,
        "activations": asked.forward_bytes,
        "choices": [
            {
                "name": line.choice.name,
                "call": line.choice.call,
                "bits": line.bytes.bits,
                "pages": line.bytes.pages,
                "side": line.bytes.side,
                "other": line.bytes.other,
                "after_prompt": line.bytes.held,
                "most": line.bytes.most,
                "need": line.need,
                "fits": line.fits,
                "longest": line.longest,
            }
            for line in found.lines
        ],
        "best": found.best.choice.name if found.best else None,
        "code": found.code,
    }


def text(found: plan.Plan) -> str:
    """The same for people."""
    asked = found.request
    end = f"{asked.context:,} tokens each, {asked.new:,} of them generated"
    lines = [
        f"{asked.shape.name}: weights {size(asked.weight_bytes)}; {asked.batch} x {end}",
        f"memory {size(asked.memory)}, {size(asked.reserve)} of it left free; activations of the prompt: "
        f"{size(asked.forward_bytes)} at least",
        "",
        f"{'cache':28}{'bits':>6}{'after the prompt':>18}{'at most':>11}{'in all':>11}  fits"
        f"{'longest context':>18}",
    ]
    for line in found.lines:
        held, most, need = size(line.bytes.held), size(line.bytes.most), size(line.need)
        lines.append(
            f"{line.choice.name:28}{line.bytes.bits:6.2f}{held:>18}{most:>11}{need:>11}"
            f"{'yes' if line.fits else 'no':>6}{line.longest:>18,}"
        )
    return "\n".join([*lines, "", *_advice(found)])


def _advice(found: plan.Plan) -> list[str]:
    asked, best = found.request, found.best
    said = []
    if best is None:
        said.append("Nothing fits.")
    elif not found.code:
        said.append("The model's own cache fits.")
    else:
        said += [f"Best that fits: {best.choice.name}", "", f"    with {found.code}:"]
        said += [f"        model.generate(...{_chunked(asked)}, max_new_tokens={asked.new})"]
    if best is None and asked.weight_bytes + asked.reserve > asked.memory:
        said.append("The weights alone leave no room.")
    elif best is None and asked.chunk is None:
        said.append("A prompt in chunks takes less: --chunk 4096.")
    if asked.shape.positions and asked.context > asked.shape.positions:
        said.append(f"The model was configured for {asked.shape.positions:,} positions.")
    if asked.shape.image_tokens:
        said.append(f"A picture is {asked.shape.image_tokens} tokens of the context.")
    return said


def _chunked(asked: plan.Request) -> str:
    return "" if asked.chunk is None else f", prefill_chunk_size={asked.chunk}"


def size(count: int) -> str:
    """Bytes in a unit of 1000s that leaves three digits or four."""
    for unit, power in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= power:
            return f"{count / power:.2f} {unit}" if count < 100 * power else f"{count / power:.0f} {unit}"
    return f"{count} B"


def _request(options: argparse.Namespace) -> plan.Request:
    return plan.Request(
        shape=shapes.find(options.model),
        context=options.context,
        memory=_bytes("memory", options.memory),
        dtype=DTYPES[options.dtype],
        batch=options.batch,
        new=options.new,
        page=options.page,
        reserve=_bytes("reserve", options.reserve),
        weights=None if options.weights is None else _bytes("weights", options.weights),
        chunk=options.chunk,
    )


def _bytes(name: str, value: str) -> int:
    if value.isdecimal():
        return int(value)
    try:
        return parse_bytes(value)
    except ValueError as error:
        raise ValueError(f"plan: --{name} must look like 24GB, 16GiB or 300MB, got {value!r}") from error


def _counts(value: str) -> list[int]:
    parts = [part.strip() for part in value.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"plan: --budgets must be counts separated by commas, got {value!r}")
    return [int(part) for part in parts]
