"""A clock that only moves when it is told to: what an exercise measures with it is known to the last digit."""

from __future__ import annotations

import contextlib
import time
from unittest import mock


class Clock:
    """Time by hand. `now` is in seconds."""

    def __init__(self, now: float = 1000.0):
        self.now = now

    @contextlib.contextmanager
    def in_place_of_time(self, module):
        """Let the module's code read this clock, however it asks for the time."""
        reads = {name: lambda: self.now for name in ("perf_counter", "monotonic", "time")}
        reads |= {f"{name}_ns": lambda read=read: int(1e9 * read()) for name, read in reads.items()}
        originals = {getattr(time, name): name for name in reads}
        bound = {key: originals[value] for key, value in vars(module).items() if callable(value) and value in originals}
        with contextlib.ExitStack() as stack:
            for owner, names in ((time, {name: name for name in reads}), (module, bound)):
                for key, name in names.items():
                    stack.enter_context(mock.patch.object(owner, key, reads[name]))
            yield
