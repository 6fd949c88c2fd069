"""``python -m tokencomp eval``: evaluate a model that ships, print tables, write JSON and pictures."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from tokencomp import zoo
from tokencomp.eval import compressors as registry
from tokencomp.eval.extras import need
from tokencomp.eval.run import BUDGETS, evaluate
from tokencomp.zoo.tasks import Task


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--model", required=True, help="one that ships, e.g. recall-lm")
    parser.add_argument("--task", nargs="+", default=[], help="default: the model's usual ones")
    parser.add_argument(
        "--methods",
        default="",
        help="separated by commas; none, random and stride are always there (default: all that are known)",
    )
    parser.add_argument(
        "--budgets", default=",".join(map(str, BUDGETS)), help="shares of tokens kept (default %(default)s)"
    )
    parser.add_argument("--samples", type=int, help="of each task (default: the task's)")
    parser.add_argument("--seed", type=int, help="default: that of the model's card")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default cpu")
    parser.add_argument("--out", type=Path, help="folder for JSON and pictures (default: none are written)")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")


def run(options: argparse.Namespace) -> int:
    """Exit status: 0; 1 for a missing extra or a damaged file; 2 for options that make no sense."""
    try:
        need(*_packages(options))
        budgets = _budgets(options.budgets)
        model, tasks = zoo.load(options.model)
        chosen = _chosen(options, tasks)
        names = _methods(options.methods, registry.kind_of(model))
        if options.samples is not None and options.samples < 2:
            raise ValueError(f"eval: --samples must be >= 2, got {options.samples}")
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("eval: --device must be cpu where PyTorch sees no GPU, got 'cuda'")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except (ImportError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    return _run(options, model, chosen, names, budgets)


def _packages(options: argparse.Namespace) -> list[str]:
    drawn = ["matplotlib"] if options.out else []
    return ["rich", *drawn, "transformers", "safetensors", *["sklearn"] * options.model.startswith("digits")]


def _run(
    options: argparse.Namespace, model: Any, tasks: list[Task], names: list[str], budgets: list[float]
) -> int:
    try:
        model = model.to(options.device)
        tables = []
        for task in tasks:
            table = evaluate(
                model, task, names, budgets,
                samples=options.samples, seed=options.seed, name=options.model,
            )  # fmt: skip
            tables.append(table)
            if not options.json:
                table.print()
            if options.out:
                for path in table.save(options.out):
                    print(f"wrote {path}", file=sys.stderr)
    except ImportError as error:
        print(error, file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps([json.loads(table.to_json()) for table in tables], indent=1))
    return 0


def _budgets(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0.0 < budget <= 1.0 for budget in found):
        raise ValueError(f"eval: --budgets must be numbers in (0, 1] separated by commas, got {text!r}")
    return found


def _chosen(options: argparse.Namespace, tasks: dict[str, Task]) -> list[Task]:
    """The tasks named, or those that are run by default."""
    for name in options.task:
        if name not in tasks:
            raise ValueError(f"eval: --task must be one of {list(tasks)}, got {name!r}")
    return [tasks[name] for name in options.task] or [task for task in tasks.values() if task.usual]


def _methods(text: str, kind: registry.Kind) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()] or registry.known(kind)
    for name in names:
        registry.get(kind, name)
    return names
