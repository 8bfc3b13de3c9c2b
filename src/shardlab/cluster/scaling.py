"""What training would take on more nodes than there are: a step's time, fitted to measured points, checked against others.

    step(N) = step on one GPU + messages × latency + bytes / bandwidth

Bytes are those that each rank sends for an optimizer step. With Ψ parameters (ZeRO paper, arXiv 1910.02054, section 7) a rank
moves 2Ψ elements in DDP and ZeRO stages 1 and 2, and 3Ψ in stage 3, each times (N − 1) / N. ZeRO++ (arXiv 2306.10209, section 3)
brings stage 3's traffic between nodes from 3Ψ to 0.75Ψ: weights in 8 bits (0.5Ψ), a copy of them in each node (0), gradients in
4 bits (0.25Ψ).

What it leaves out: communication that runs while the GPU computes is counted as if it did not; every link is free of other
traffic; latency grows with the logarithm of the number of nodes, as in trees, not with their number, as in rings; the optimizer's
part of a step stays, although a sharded optimizer has less to do on each of more GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

METHODS = ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "ZeRO++")


@dataclass(frozen=True)
class Link:
    """What moves a collective's bytes.

    Attributes:
        name: for tables.
        gb_per_second: 10⁹ bytes a second of each rank's traffic (NCCL's bus bandwidth).
        latency: seconds of a message that holds nothing.
    """

    name: str
    gb_per_second: float
    latency: float


def network(name: str, gigabits: float, adapters: int, latency: float) -> Link:
    """The link between nodes. A ring over all GPUs enters and leaves each node once, so a node's adapters together carry what each
    of its GPUs sends.

    Args:
        name: for tables.
        gigabits: of one adapter, a second.
        adapters: of a node.
        latency: seconds of an empty message between nodes.
    """
    if gigabits <= 0 or adapters < 1:
        raise ValueError("a network needs some bandwidth and an adapter")
    return Link(name, adapters * gigabits / 8, latency)


def elements_sent(method: str, parameters: int, ranks: int, micro_batches: int = 1, *, between_nodes: bool = False) -> float:
    """Elements of two bytes that each rank sends in an optimizer step.

    Args:
        method: one of `METHODS`.
        parameters: Ψ.
        ranks: N.
        micro_batches: of an optimizer step. DDP and stage 1 exchange gradients once per step; stage 2 reduces those of every
            micro-batch; stage 3 gathers the parameters for every micro-batch, too.
        between_nodes: for ZeRO++, whose savings are between nodes.

    Raises:
        ValueError: the method is unknown.
    """
    if method not in METHODS:
        raise ValueError(f"there is no method '{method}'; there are {', '.join(METHODS)}")
    each = {
        "DDP": 2.0,
        "ZeRO-1": 2.0,
        "ZeRO-2": 1.0 + 1.0 * micro_batches,
        "ZeRO-3": 3.0 * micro_batches,
        "ZeRO++": (0.75 if between_nodes else 3.0) * micro_batches,
    }[method]
    return each * parameters * (ranks - 1) / ranks


@dataclass(frozen=True)
class StepModel:
    """A method's step on N GPUs: `alone` seconds on one, and `messages` collectives that wait for each other.

    `messages` is fitted: it holds what a step pays for each collective besides its bytes.
    """

    method: str
    parameters: int
    micro_batches: int
    alone: float
    messages: float
    bytes_per_element: int = 2

    def seconds(self, nodes: int, gpus_per_node: int, inside: Link, between: Link | None = None) -> float:
        """A step on `nodes` × `gpus_per_node` GPUs. On several nodes the slower of the two links sets the pace.

        Raises:
            ValueError: several nodes without a link between them.
        """
        ranks = nodes * gpus_per_node
        if ranks == 1:
            return self.alone
        if nodes > 1 and between is None:
            raise ValueError("several nodes need a link between them")
        size = self.bytes_per_element * elements_sent(
            self.method, self.parameters, ranks, self.micro_batches, between_nodes=nodes > 1
        )
        speed = inside.gb_per_second if nodes == 1 else min(inside.gb_per_second, between.gb_per_second)
        latency = inside.latency + (between.latency * log2(nodes) if nodes > 1 else 0.0)
        return self.alone + self.messages * latency + size / (speed * 1e9)

    def efficiency(self, nodes: int, gpus_per_node: int, inside: Link, between: Link | None = None) -> float:
        """Weak scaling: samples/s per GPU, relative to one GPU."""
        return self.alone / self.seconds(nodes, gpus_per_node, inside, between)


def fit(
    method: str, parameters: int, micro_batches: int, alone: float, on_two: float, inside: Link, bytes_per_element: int = 2
) -> StepModel:
    """The model that gives the two measured steps: on one GPU, and on two of one node.

    Where two GPUs were faster than the bytes allow (a sharded optimizer has less to do on each), no messages are counted.
    """
    free = StepModel(method, parameters, micro_batches, alone, 0.0, bytes_per_element)
    more = on_two - free.seconds(1, 2, inside)
    return StepModel(method, parameters, micro_batches, alone, max(0.0, more / inside.latency), bytes_per_element)
