"""The second half of the demo: what the models that ship answer, and what dropping tokens does to that."""

import json

import torch

from tokencomp import zoo
from tokencomp.eval import Table, evaluate
from tokencomp.zoo import digits, recall
from tokencomp.zoo.tasks import Sample, Task

SEED = 7
# model, task, methods beside random and stride, budgets, samples
SHOWN: tuple[tuple[str, str, tuple[str, ...], tuple[float, ...], int], ...] = (
    ("recall-lm", "recall", ("ends",), (0.25, 0.5), 3),
    ("digits-vit", "digits", ("divprune", "todre"), (0.25,), 48),
    ("digits-vlm", "cell", ("divprune", "todre"), (0.1,), 24),
    ("digits-vlm", "count", ("divprune", "todre"), (0.1,), 24),
)


def run(quiet: bool = False) -> list[object]:
    """Loads each model, prints one real question with the answer, and one table per task.

    ``quiet``: prints nothing. Returns the tables as JSON has them.
    """
    if not quiet:
        print("Models that ship, uncompressed and with tokens dropped; more: python -m tokencomp eval.")
        print("Score: mean over the samples with its 95 % interval; the same samples for all.\n")
    loaded: dict[str, tuple[object, dict[str, Task]]] = {}
    tables: list[object] = []
    for name, task, methods, budgets, samples in SHOWN:
        if name not in loaded:
            loaded[name] = zoo.load(name)
        model, tasks = loaded[name]
        table = evaluate(model, tasks[task], methods, budgets, samples=samples, seed=SEED, name=name)
        tables.append(json.loads(table.to_json()))
        if not quiet:
            print(f"{name}, {tasks[task].name}: {_example(model, tasks[task])}")
            _print_table(table)
    return tables


def _example(model: object, task: Task) -> str:
    """The first sample in words, and whether the model answers it."""
    sample = task.samples(2, SEED)[0]
    right = task.run(model, sample)
    share = f"{int(right.sum())} of {len(right)} answers right" if len(right) > 1 else _verdict(right)
    return f"{_question(task, sample)} -> {share}"


def _verdict(right: torch.Tensor) -> str:
    return "right" if right.item() else "wrong"


def _question(task: Task, sample: Sample) -> str:
    if task.name == "digits":
        return f"which digit is on this canvas? (a {int(sample.answer)})"
    if task.name in digits.KINDS:
        asked = sample.prompt["input_ids"][0, 1 + digits.IMAGE_TOKENS :]
        words = " ".join(digits.VOCABULARY[token] for token in asked)
        return f'"{words}" ({digits.VOCABULARY[int(sample.answer[0])]})'
    assert sample.after is not None
    mark, key, first, second = sample.after[0, : recall.FACT_TOKENS].tolist()
    assert mark == recall.QUERY
    asked_for = f"k{key - recall.KEYS} = v{first - recall.VALUES} v{second - recall.VALUES}"
    questions = sample.after.shape[1] // recall.FACT_TOKENS
    return f"{sample.tokens} tokens of facts and filler, then {questions} questions such as {asked_for}"


def _print_table(table: Table) -> None:
    has_cache = table.rows[0].kv_bytes is not None
    print(f"  {'method':10}{'kept':>14}{table.metric:>14}{'95 % interval':>18}{'KV bytes' * has_cache:>12}")
    for row in table.rows:
        kept = f"{row.tokens_kept:.0f} of {row.tokens_total:.0f}"
        interval = f"[{row.score.low:.2f}, {row.score.high:.2f}]"
        held = f"{row.kv_bytes:12,.0f}" if row.kv_bytes is not None else ""
        print(f"  {row.method:10}{kept:>14}{row.score.mean:14.2f}{interval:>18}{held}")
    print()
