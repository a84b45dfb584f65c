"""When to try again and when to give up: attempts, pauses, transfers that drip."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass

from sciexec.errors import RegistryError

SLOWEST = 128  # bytes/s, averaged over an idle time, below which a transfer counts as stalled


@dataclass(frozen=True)
class Patience:
    """How long to try; all times in seconds.

    attempts: in a row without progress, before giving up.  pause: after the first failure, doubled after each, with jitter.
    longest: the longest single pause; a registry that asks for more by Retry-After gets an error instead.
    connect: for a connection, idle: without a byte.
    """

    attempts: int = 6
    pause: float = 0.5
    longest: float = 120.0
    connect: float = 15.0
    idle: float = 60.0


class Again(Exception):
    """This attempt failed, another may succeed.  `error` is what the user is told if none does, `after` is Retry-After in s."""

    def __init__(self, error: RegistryError, after: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.after = after


class Attempts:
    """Counts failures without progress and pauses after each; the pause ends early when `stopped` is set."""

    def __init__(self, patience: Patience, stopped: threading.Event, note: Callable[[str], None]) -> None:
        self._patience, self._stopped, self._note = patience, stopped, note
        self._failures = 0

    def progress(self) -> None:
        self._failures = 0

    def failed(self, again: Again) -> None:
        """Returns when it is time for the next attempt; raises the RegistryError when there is none."""
        self._failures += 1
        if self._failures >= self._patience.attempts:
            raise again.error from None
        if again.after is None:
            # Jitter: the tasks of a job array that were refused together must not come back together.
            pause = self._patience.pause * 2 ** (self._failures - 1) * random.uniform(0.5, 1.0)
        else:
            pause = again.after
            if pause > self._patience.longest:
                raise RegistryError(f"{again.error}; it asks to come back in {pause:.0f} s", again.error.hint) from None
        pause = min(pause, self._patience.longest)
        self._note(f"{again.error}; trying again in {pause:.1f} s")
        self._stopped.wait(pause)


class Pace:
    """Tells a server that drips from one that is slow.  Only the time spent waiting for it counts, not that of our own work."""

    def __init__(self, idle: float) -> None:
        self._idle = idle
        self._seconds, self._bytes = 0.0, 0

    def stalled(self, count: int, seconds: float) -> bool:
        """After `count` bytes that took `seconds` to come."""
        self._bytes += count
        self._seconds += seconds
        if self._seconds < self._idle:
            return False
        stalled = self._bytes < SLOWEST * self._seconds
        self._seconds, self._bytes = 0.0, 0
        return stalled
