"""What one box may take."""

MEMORY = 8 * 2**30
"""Bytes that all processes of a box may hold together."""
DISK = 2**30
"""Bytes that a box may leave on disk, and as many in its /tmp and its /dev/shm."""
PROCESSES = 64
"""How many processes may be in a box at once."""
FILES = 20_000
"""How many files a box may leave behind."""
DEPTH = 50
"""How deep its folders may be."""
RECORD = 16 * 2**20
"""Bytes of a file in JSON that the judge reads."""
