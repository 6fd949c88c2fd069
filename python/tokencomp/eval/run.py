"""``evaluate``: every method at every budget on the same samples, with the baselines beside them."""

import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tokencomp
from tokencomp.eval import compressors as registry
from tokencomp.eval.compressors import BASELINES, Compressor, Nothing, Report
from tokencomp.eval.measure import Meter, count_flops, peak_bytes
from tokencomp.eval.progress import progress
from tokencomp.eval.statistics import Bootstrap, Floats
from tokencomp.eval.table import Row, Table
from tokencomp.zoo.tasks import Sample, Task

BUDGETS = (0.1, 0.25, 0.5)


@dataclass
class _Config:
    """One method at one budget, and what was found so far."""

    compressor: Compressor
    budget: float
    peak: int = 0
    flops: int = 0
    scores: list[Tensor] = field(default_factory=list)
    meters: list[Meter] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)


def evaluate(
    model: Any,
    task: Task,
    compressors: Iterable[str | Compressor] = (),
    budgets: Sequence[float] = BUDGETS,
    *,
    samples: int | None = None,
    seed: int | None = None,
    name: str = "model",
    show: bool = True,
) -> Table:
    """Score, bytes, and times of ``model`` on ``task`` under each compressor at each budget.

    The model as it is (``none``), random keep and uniform stride are always among them, first. All see the
    same samples, one after the other in turn, so that a busy moment of the machine hits all alike, and what
    is drawn for a sample is drawn from the same seed at every budget. Each combination runs twice beforehand:
    this warms up, measures the peak, and counts operations.

    Args:
        model: of the kind the task was made for, in eval mode, on any device.
        task: of ``zoo.load``, or any other ``zoo.tasks.Task``.
        compressors: names known for this kind of model, or objects (``compressors.Compressor``).
        budgets: shares of tokens kept, in (0, 1].
        samples: how many, at least 2; default: the task's.
        seed: of the samples, the draws and the bootstrap; default: the task's, which is its card's.
        name: of the model, for the table.
        show: progress on standard error, where it takes longer than two seconds.

    Raises:
        ValueError: unknown name, budget out of range, or fewer than 2 samples.
        TypeError: a model of no known kind.
    """
    count = task.samples_default if samples is None else samples
    seed = task.seed if seed is None else seed
    resampling = Bootstrap(count, seed)
    configs = _configs(model, compressors, budgets)
    drawn = task.samples(count, seed)
    with progress(f"{name}, {task.name}", len(configs) * (count + 1), show) as advance:
        for config in configs:
            trial = partial(_once, model, task, config, drawn[0], seed)
            config.peak = peak_bytes(trial, model.device)
            config.flops = count_flops(trial)
            for found in (config.scores, config.meters, config.reports):
                found.clear()
            advance()
        for i, sample in enumerate(drawn):
            for config in configs:
                _once(model, task, config, sample, seed + 7919 * i)
                advance()
    rows = _rows(configs, drawn, resampling)
    return Table(
        model=name,
        task=task.name,
        metric=task.metric,
        unit=task.unit,
        higher_is_better=task.higher_is_better,
        samples=count,
        answers=sum(len(scores) for scores in configs[0].scores),
        seed=seed,
        card_score=task.card_score,
        card_samples=task.card_samples,
        group_label=task.group_label,
        grid=drawn[0].grid,
        environment=_environment(model.device),
        rows=tuple(rows),
        picture=drawn[0].prompt["pixel_values"][0] if drawn[0].grid else None,
    )


def _configs(model: Any, compressors: Iterable[str | Compressor], budgets: Sequence[float]) -> list[_Config]:
    kind = registry.kind_of(model)
    chosen: dict[str, Compressor] = {name: registry.get(kind, name) for name in BASELINES}
    for given in compressors:
        compressor = registry.get(kind, given) if isinstance(given, str) else given
        chosen[compressor.name] = compressor
    chosen.pop("none", None)
    for budget in budgets:
        if not 0.0 < budget <= 1.0:
            raise ValueError(f"evaluate: budgets must be in (0, 1], got {budget!r}")
    if not budgets:
        raise ValueError("evaluate: budgets must not be empty")
    levels = sorted({float(budget) for budget in budgets})
    made = [_Config(Nothing(), 1.0)]
    for compressor in chosen.values():
        own = getattr(compressor, "adaptive", False)
        made += [_Config(compressor, level) for level in ([1.0] if own else levels)]
    return made


def _once(model: Any, task: Task, config: _Config, sample: Sample, seed: int) -> None:
    meter = Meter()
    with config.compressor.apply(model, config.budget, seed=seed) as handle:
        config.scores.append(task.run(model, sample, meter))
        report = handle.report()
    config.reports.append(report or Report(sample.tokens, (float(sample.tokens),)))
    config.meters.append(meter)


def _rows(configs: list[_Config], samples: list[Sample], resampling: Bootstrap) -> list[Row]:
    means: list[Floats] = [np.array([scores.mean().item() for scores in config.scores]) for config in configs]
    random = {c.budget: m for c, m in zip(configs, means, strict=True) if c.compressor.name == "random"}
    rows = []
    for config, mean in zip(configs, means, strict=True):
        method = config.compressor.name
        own = bool(getattr(config.compressor, "adaptive", False))
        base = None if own or method in ("none", "random") else random[config.budget]
        kept = np.array([report.kept for report in config.reports]).mean(axis=0)
        decode = [step for meter in config.meters for step in meter.seconds.get("decode", [])]
        held = [meter.kv_bytes for meter in config.meters if meter.kv_bytes is not None]
        index = config.reports[0].index
        rows.append(
            Row(
                method=method,
                budget=config.budget,
                score=resampling.mean(mean),
                versus_none=resampling.difference(mean, means[0]),
                versus_random=None if base is None else resampling.difference(mean, base),
                tokens_kept=float(kept.mean()),
                tokens_total=statistics.fmean(report.total for report in config.reports),
                kept_per_layer=tuple(kept.tolist()),
                kv_bytes=statistics.fmean(held) if held else None,
                prefill_ms=1e3 * statistics.median(m.seconds["prefill"][0] for m in config.meters),
                decode_ms=1e3 * statistics.median(decode) if decode else None,
                peak_bytes=config.peak,
                flops=config.flops,
                scores=tuple(mean.tolist()),
                groups=_groups(mean, samples),
                kept_tokens=tuple(index.tolist()) if index is not None and samples[0].grid else (),
                adaptive=own,
            )
        )
    return rows


def _groups(mean: Floats, samples: list[Sample]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for score, sample in zip(mean.tolist(), samples, strict=True):
        if sample.group is not None:
            name = sample.group if isinstance(sample.group, str) else f"{sample.group:g}"
            found.setdefault(name, []).append(score)
    return {group: statistics.fmean(scores) for group, scores in found.items()}


def _environment(device: torch.device) -> dict[str, str]:
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": f"{device.type} ({on})",
        "threads": f"{torch.get_num_threads()} threads",
        "torch": f"torch {torch.__version__}",
        "tokencomp": f"tokencomp {tokencomp.__version__}",
    }
