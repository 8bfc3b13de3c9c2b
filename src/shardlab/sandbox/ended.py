"""How a box ends before its exercises have answered."""

from __future__ import annotations


class BoxEnded(RuntimeError):
    """Exercises in a box have gone before they answered; the message says why."""

    likely = "os._exit(), a crash, or more memory, processes or files than a submission may have"


class TookTooLong(BoxEnded):
    """They did not answer in time, and were ended."""

    likely = "a loop that does not end, or something that waits for what never comes"
