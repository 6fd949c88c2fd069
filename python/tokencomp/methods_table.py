"""The registered methods as Markdown: ``docs/methods.md``, and a page for each place in a model."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from tokencomp import methods
from tokencomp.methods.base import Knob, Method

GROUPS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "kv_cache": ("What the KV cache keeps", lambda stage: stage == "kv"),
    "quantization": ("In how many bits the KV cache keeps it", lambda stage: stage == "kv-quant"),
    "attention": ("What attention reads", lambda stage: stage == "attention"),
    "visual_tokens": (
        "Which visual tokens the language model gets",
        lambda stage: stage.startswith("visual tokens") and "merges" not in stage,
    ),
    "visual_merging": (
        "Which of them become one before it",
        lambda stage: stage.startswith("visual tokens"),
    ),
    "decoder_layers": (
        "Which visual tokens the language model goes on with",
        lambda stage: "decoder layers" in stage,
    ),
    "encoder_layers": ("Which tokens an encoder's layers go on with", lambda stage: "layer" in stage),
    "tensors": ("On plain tensors", lambda stage: True),
}
HEAD = """# Methods

Made by `python -m tokencomp methods --markdown docs`. A name leads to the method's formula, its knobs, and
where and why it departs from its paper or its authors' code. `tokencomp.methods.get(name).cls` is the class.

Parts that are trained and whose weights are not public are left out: ATP-LLaVA's thresholds (its even grid is
`atp`), the compressor of "Token Compression from an Explainability Perspective", HICom, TokenPacker, Vision
Remember, FLASH's anchors, SliME's resampler (its selector is `slime`), Landmark and Core-Context models
(their attention on given weights is in `tokencomp.sparse`).
"""
MARKS = ("<!-- methods: python -m tokencomp methods --markdown docs -->\n", "<!-- end -->")
COLUMNS = "| name | class | source | what it does |\n|---|---|---|---|\n"


def grouped() -> dict[str, list[Method]]:
    """All methods by group, each in the first that it matches."""
    found: dict[str, list[Method]] = {group: [] for group in GROUPS}
    for method in methods.all_methods():
        found[next(group for group, (_, matches) in GROUPS.items() if matches(method.stage))].append(method)
    return found


def markdown() -> str:
    """All tables."""
    tables = [f"## {GROUPS[group][0]}\n\n{COLUMNS}{_rows(group, mine)}" for group, mine in grouped().items()]
    return "\n".join([HEAD, *tables])


def short() -> str:
    """A line a group: the names of all classes."""
    names = {group: ", ".join(f"`{m.cls.__name__}`" for m in mine) for group, mine in grouped().items()}
    lines = [f"| [{GROUPS[group][0]}](docs/methods/{group}.md) | {names[group]} |" for group in names]
    return "\n".join(["| | methods |", "|---|---|", *lines, ""])


def with_short(text: str) -> str:
    """``text`` with ``short()`` between its two marks; as it is where it has none."""
    head, begin, rest = text.partition(MARKS[0])
    _, end, tail = rest.partition(MARKS[1])
    return head + begin + "\n" + short() + end + tail if end else text


def pages() -> dict[str, str]:
    """One page a group, by name: docstrings and knobs."""
    return {group: _page(GROUPS[group][0], mine) for group, mine in grouped().items()}


def as_json() -> list[dict[str, Any]]:
    """All methods with their knobs; what is no JSON is given as Python writes it."""
    return [
        {
            "name": m.name,
            "class": m.cls.__name__,
            "paper": m.paper,
            "stage": m.stage,
            "summary": m.summary,
            "knobs": [_knob(knob) for knob in m.knobs],
        }
        for m in methods.all_methods()
    ]


def _knob(knob: Knob) -> dict[str, Any]:
    required = knob.default is dataclasses.MISSING
    default = knob.default if isinstance(knob.default, str | int | float | None) else repr(knob.default)
    return {
        "name": knob.name,
        "required": required,
        "default": None if required else default,
        "help": knob.help,
    }


def _rows(group: str, found: list[Method]) -> str:
    cells = [
        (f"[`{m.name}`](methods/{group}.md#{m.name})", f"`{m.cls.__name__}`", _source(m.paper), m.summary)
        for m in found
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def _page(title: str, found: list[Method]) -> str:
    head = "Made by `python -m tokencomp methods --markdown docs`. All methods: [methods.md](../methods.md)."
    return "\n\n".join([f"# {title}", head, *map(_section, found)]) + "\n"


def _section(method: Method) -> str:
    about = f"`methods.{method.cls.__name__}`, {_source(method.paper)}; acts on: {method.stage}"
    knobs = "\n".join(f"- `{knob.name}{_default(knob)}`: {knob.help}" for knob in method.knobs)
    parts = [f"## {method.name}", about, inspect.cleandoc(method.cls.__doc__ or ""), knobs]
    return "\n\n".join(part for part in parts if part)


def _default(knob: Knob) -> str:
    return "" if knob.default is dataclasses.MISSING else f"={knob.default!r}"


def _source(paper: str) -> str:
    if not paper:
        return "baseline"
    return f"[{paper}](https://arxiv.org/abs/{paper})" if paper[:4].isdigit() else paper
