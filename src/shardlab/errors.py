"""What a person can mend. The command line prints these as one line; any other exception is a bug, and keeps its traceback."""

from __future__ import annotations


class CourseError(Exception):
    """The base of the course's own errors; the message names the thing, the reason and the remedy."""


class UsageError(CourseError, ValueError):
    """Something that was asked for and cannot be."""
