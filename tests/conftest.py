"""Back ends, poison, profiles and seeds for every test.

- ``backend``: ``cpu`` | ``emu`` (the CUDA source on the CPU) | ``cuda``; a test that takes it runs on each.
- Uninitialised memory is filled with NaN and maximal integers, so that an output nobody wrote is seen.
- Cases too big for the emulator are deselected there and slow ones are marked; the summary says how many.
"""

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch
from backends import Backend, cuda_missing, make_backend

EMULATOR_LIMIT = 20_000_000  # multiply-adds of one case

_notes: dict[str, int] = {}


@pytest.fixture(params=["cpu", "emu", pytest.param("cuda", marks=pytest.mark.cuda)])
def backend(request: pytest.FixtureRequest) -> Backend:
    return make_backend(request.param)


@pytest.fixture(params=["cpu", "emu"])
def cpu_backend(request: pytest.FixtureRequest) -> Backend:
    """The back ends whose tensors live on the CPU."""
    return make_backend(request.param)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fill uninitialised memory, so that an element nobody wrote shows as NaN or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


hypothesis.settings.register_profile("ci", derandomize=True, max_examples=15, deadline=None, database=None)
hypothesis.settings.register_profile("deep", max_examples=500, deadline=None)
hypothesis.settings.load_profile("ci")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
    config.addinivalue_line("markers", "cuda: needs a GPU and the CUDA library")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, too_big = [], []
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        case = params.get("case")
        if getattr(case, "slow", False):
            item.add_marker(pytest.mark.slow)
        emulated = "emu" in (params.get("backend"), params.get("cpu_backend"))
        (too_big if emulated and getattr(case, "work", 0) > EMULATOR_LIMIT else kept).append(item)
    _notes["too big"] = len(too_big)
    if too_big:
        config.hook.pytest_deselected(items=too_big)
        items[:] = kept


def pytest_terminal_summary(terminalreporter: Any) -> None:
    stats = terminalreporter.stats
    skipped = [report for report in stats.get("skipped", []) if "cuda" in getattr(report, "keywords", {})]
    if skipped:
        terminalreporter.write_line(f"cuda: {len(skipped)} cases skipped: {cuda_missing()}")
    if _notes.get("too big"):
        terminalreporter.write_line(
            f"emu: {_notes['too big']} cases not run, above the emulator's work limit"
        )


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist: the controller writes the summary
        session.config.workeroutput["too big"] = _notes["too big"]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    _notes["too big"] = getattr(node, "workeroutput", {}).get("too big", 0)
