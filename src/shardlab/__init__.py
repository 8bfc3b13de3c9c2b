"""shardlab: training language models beyond one GPU's memory, in graded labs."""

__version__ = "0.1.0"
