"""What a conversion tells its user: live lines on a terminal, one plain line a step in a log, nothing with --quiet.

Everything goes to stderr; stdout carries only results.  The library works without any of it: every `progress` argument
may be None.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress


class Progress(Protocol):
    """The contract: step() and warn() say one thing, download() and task() count bytes towards a total (-1 unknown)."""

    def step(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def download(self, name: str, total: int) -> Callable[[int], None]: ...


class Silent:
    """--quiet: warnings too are kept back, as the peers do; errors are not its business."""

    def step(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def download(self, name: str, total: int) -> Callable[[int], None]:
        return lambda count: None

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


class Log(Silent):
    """Not a terminal: one line when a step begins, one when a count is complete."""

    def step(self, text: str) -> None:
        print(f"INFO:    {text}", file=sys.stderr)

    def warn(self, text: str) -> None:
        print(f"WARNING: {text}", file=sys.stderr)

    def download(self, name: str, total: int) -> Callable[[int], None]:
        done = 0
        started = time.monotonic()
        lock = threading.Lock()

        def count(size: int) -> None:
            nonlocal done
            with lock:
                before, done = done, done + size
            if before < total <= done:
                self.step(f"{name}: {total / 1e6:.1f} MB in {time.monotonic() - started:.1f} s")

        return count


class Live(Log):
    """A terminal: one live line per download and one for the conversion."""

    def __init__(self) -> None:
        self._rich: RichProgress | None = None

    def __enter__(self) -> Live:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as RichProgress

        self._rich = RichProgress(
            TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
            console=Console(stderr=True), transient=True, refresh_per_second=5,
        )  # fmt: skip
        self._rich.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._rich is not None:
            self._rich.stop()

    def download(self, name: str, total: int) -> Callable[[int], None]:
        if self._rich is None:
            return super().download(name, total)
        rich = self._rich
        task = rich.add_task(name, total=total if total >= 0 else None)
        return lambda size: rich.advance(task, size)

    def step(self, text: str) -> None:
        if self._rich is None:
            super().step(text)
        else:
            self._rich.console.print(f"INFO:    {text}", markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        if self._rich is None:
            super().warn(text)
        else:
            self._rich.console.print(f"WARNING: {text}", markup=False, highlight=False, soft_wrap=True)


def progress(quiet: bool) -> Silent:
    """The one that fits where stderr goes; to be used as a context manager."""
    if quiet:
        return Silent()
    return Live() if sys.stderr.isatty() else Log()
