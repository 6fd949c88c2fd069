"""The registered methods as Markdown tables, by where in a model they act: ``docs/methods.md`` is this."""

import dataclasses
from typing import Any

from tokencomp import methods
from tokencomp.methods.base import Knob, Method

GROUPS = (
    ("What the KV cache keeps", lambda stage: stage == "kv"),
    ("In how many bits the KV cache keeps it", lambda stage: stage == "kv-quant"),
    ("What attention reads", lambda stage: stage == "attention"),
    ("Which visual tokens the language model gets", lambda stage: stage.startswith("visual tokens")),
    ("Which visual tokens the language model goes on with", lambda stage: "decoder layers" in stage),
    ("Which tokens an encoder's layers go on with", lambda stage: "layer" in stage),
    ("On plain tensors", lambda stage: True),
)
HEAD = """# Methods

Made by `python -m tokencomp methods --markdown`. Where a method departs from its paper or its authors' code,
its docstring says so and why. `tokencomp.methods.get(name).cls` is the class; its knobs are in its docstring
and in `python -m tokencomp methods`.

Parts that are trained and whose weights are not public are left out: ATP-LLaVA's thresholds (its even grid is
`atp`), the compressor of "Token Compression from an Explainability Perspective", HICom, TokenPacker, Vision
Remember, FLASH's anchors, SliME's resampler (its selector is `slime`), Landmark and Core-Context models
(their attention on given weights is in `tokencomp.sparse`).
"""
COLUMNS = "| name | class | source | what it does |\n|---|---|---|---|\n"


def markdown() -> str:
    """All tables."""
    left = list(methods.all_methods())
    parts = [HEAD]
    for title, matches in GROUPS:
        mine = [method for method in left if matches(method.stage)]
        left = [method for method in left if method not in mine]
        if mine:
            parts.append(f"## {title}\n\n{COLUMNS}{_rows(mine)}")
    return "\n".join(parts)


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


def _rows(found: list[Method]) -> str:
    return "".join(f"| `{m.name}` | `{m.cls.__name__}` | {_source(m.paper)} | {m.summary} |\n" for m in found)


def _source(paper: str) -> str:
    if not paper:
        return "baseline"
    return f"[{paper}](https://arxiv.org/abs/{paper})" if paper[:4].isdigit() else paper
