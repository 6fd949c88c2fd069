"""Progress on standard error: a bar on a terminal, lines elsewhere, nothing for what is short."""

import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

PATIENCE = 2.0  # seconds without a sign
LINE_EVERY = 10.0  # seconds between lines where there is no terminal

Advance = Callable[[], None]


@contextmanager
def progress(label: str, total: int, show: bool = True) -> Iterator[Advance]:
    """Yields a function to call after each of ``total`` steps; shows nothing before ``PATIENCE`` is over."""
    if not show:
        yield lambda: None
        return
    steps = _bar(label, total) if sys.stderr.isatty() and _has_rich() else _lines(label, total)
    next(steps)
    try:
        yield lambda: next(steps)
    finally:
        steps.close()


def _has_rich() -> bool:
    try:
        import rich.progress  # noqa: F401
    except ImportError:
        return False
    return True


def _lines(label: str, total: int) -> Generator[None, None, None]:
    begin, said = time.monotonic(), time.monotonic() + PATIENCE - LINE_EVERY
    done = 0
    while True:
        yield
        done += 1
        now = time.monotonic()
        if now - said >= LINE_EVERY and done < total:
            left = (now - begin) / done * (total - done)
            print(f"{label}: {done} of {total}, about {left:.0f} s left", file=sys.stderr, flush=True)
            said = now


def _bar(label: str, total: int) -> Generator[None, None, None]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task, begin, started = bar.add_task(label, total=total), time.monotonic(), False
    try:
        while True:
            yield
            bar.advance(task)
            if not started and time.monotonic() - begin > PATIENCE:
                bar.start()
                started = True
    finally:
        if started:
            bar.stop()
