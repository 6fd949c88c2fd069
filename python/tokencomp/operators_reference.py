"""The operators as Markdown, by family, from their docstrings: ``docs/operators/*.md`` is this."""

import inspect
import re
from collections.abc import Callable
from typing import Any

from tokencomp import ops
from tokencomp.ops import _namespace

FAMILIES = {
    "kcenter": "k-center selection",
    "topk": "Selection by score",
    "merge": "Token merging",
    "score": "Attention scores",
    "kvcache": "KV caches in pages",
    "kvquant": "KV quantization",
    "decode": "Attention of decode steps",
    "prefill": "Attention of prompts",
    "linear": "Linear attention",
}
HEAD = """Made by `python -m tokencomp operators --markdown docs/operators` from the docstrings of
`tokencomp.ops`. What holds for all of them: [operators.md](../operators.md)."""
SECTION = re.compile(r"^(?=(?:Args|Returns|Raises):$)", re.M)


def operators() -> dict[str, list[str]]:
    """Names of the wrappers, by family."""
    found: dict[str, list[str]] = {family: [] for family in FAMILIES}
    for name in ops.__all__:
        module = getattr(ops, name).__module__.rpartition(".")[2]
        found[module.partition("_")[0]].append(name)
    return found


def pages() -> dict[str, str]:
    """One page a family, by name."""
    return {family: _page(family, names) for family, names in operators().items()}


def summary(name: str) -> str:
    """The first paragraph of an operator's docstring."""
    paragraph = inspect.cleandoc(getattr(ops, name).__doc__ or "").partition("\n\n")[0]
    return " ".join(paragraph.split())


def as_json() -> list[dict[str, Any]]:
    """All operators: family, schema, back ends loaded, summary."""
    return [
        {
            "name": name,
            "family": family,
            "schema": _schema(name),
            "back_ends": _namespace.back_ends(name),
            "summary": summary(name),
        }
        for family, names in operators().items()
        for name in names
    ]


def _page(family: str, names: list[str]) -> str:
    parts = [f"# {FAMILIES[family]}", HEAD, "\n".join(f"- [`{name}`](#{name})" for name in names)]
    return "\n\n".join([*parts, *(_section(name) for name in names)]) + "\n"


def _section(name: str) -> str:
    function: Callable[..., Any] = getattr(ops, name)
    body, *sections = SECTION.split(inspect.cleandoc(function.__doc__ or ""))
    parts = [f"## {name}", f"```text\n{_signature(name, function)}\n```", body.strip()]
    parts += [_listed(section) for section in sections]
    return "\n\n".join([*parts, f"Schema: `{_schema(name)}`"])


def _signature(name: str, function: Callable[..., Any]) -> str:
    lines, star = [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            lines.append("    *,")
            star = True
        lines.append(f"    {parameter},")
    text = "\n".join([f"{name}(", *lines, ")"])
    return re.sub(r"\b(?:torch|typing|tokencomp(?:\.\w+)*)\.(?=[A-Z])", "", text)


def _listed(section: str) -> str:
    """``Args:`` and what is indented below, as a list; ``Returns:`` as a paragraph."""
    title, _, rest = section.strip().partition(":\n")
    text = inspect.cleandoc(rest)
    if title == "Returns":
        return f"**{title}**\n\n{text}"
    items = re.split(r"^(?=[\w*, ]+:\s)", text, flags=re.M)
    listed = [f"- {_item(item)}" for item in items if item.strip()]
    return f"**{title}**\n\n" + "\n".join(listed)


def _item(text: str) -> str:
    name, _, rest = text.partition(":")
    lines = [line.strip() for line in rest.strip().splitlines()]
    return f"`{name.strip()}`: " + "\n  ".join(line for line in lines if line)


def _schema(name: str) -> str:
    return str(_namespace.op(name).default._schema)
