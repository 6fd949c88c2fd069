"""Settings of the emulator for tests of operators."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

PLANS = ["gram", "grid3,resident", "grid4,stream"]
PLANS += [f"cluster{size},{tokens}" for size in (1, 4) for tokens in ("stream", "resident")]
LAZY_PLANS = [
    "cluster1,lazy",
    "cluster4,lazy",
    "grid3,lazy",
]  # for scores that only shrink: max_min, no weights
SCHEDULES: list[dict[str, str]] = [
    {"TOKENCOMP_EMU_SCHED": "reverse"},
    {"TOKENCOMP_EMU_SCHED": "random", "TOKENCOMP_EMU_SEED": "1"},
    {"TOKENCOMP_EMU_SCHED": "random", "TOKENCOMP_EMU_SEED": "2", "TOKENCOMP_EMU_ASYNC": "eager"},
]


@contextmanager
def settings(**environment: str) -> Iterator[None]:
    """Environment variables for the duration; the emulator and the plans read them at every call."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
