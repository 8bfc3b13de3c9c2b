"""Before a job on several nodes: does every rank reach every other, and are all nodes alike?

Slurm starts it once per rank:

    srun --ntasks-per-node=RANKS python -m shardlab.cluster.preflight --address ADDRESS --port PORT

It ends with status 0 on all ranks, or says which node fails and why.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

DISK_NEEDED_GIB = 5


def node_name() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def facts(rank: int, folder: Path) -> dict:
    """What must be equal, and what must be there, on this rank's node."""
    from shardlab import hardware
    from shardlab.zero import ops

    problems = []
    free = shutil.disk_usage(folder).free / 2**30 if folder.is_dir() else None
    if free is None:
        problems.append(f"the folder for runs, {folder}, is not there: is it on a file system that this node has?")
    elif free < DISK_NEEDED_GIB:
        problems.append(f"{free:.1f} GiB free in {folder}; {DISK_NEEDED_GIB} are needed")
    if folder.is_dir() and not os.access(folder, os.W_OK):
        problems.append(f"{folder} cannot be written to")
    cache = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    if "HF_HOME" in os.environ and not cache.is_dir():
        problems.append(f"the cache HF_HOME={cache} is not there")
    return {
        "rank": rank,
        "node": node_name(),
        "versions": hardware.versions(),
        "gpus": hardware.gpu_count(),
        "cores": hardware.cpu_cores(),
        "free_gib": free,
        "ops_built": [op for op in ops.OPS if ops.is_built(op)],
        "problems": problems,
    }


def listen(address: str) -> socket.socket:
    """A socket that answers whoever connects with one byte, until this process ends."""
    server = socket.create_server((address, 0), backlog=512)

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
                connection.sendall(b"1")
                connection.close()
            except OSError:
                return

    threading.Thread(target=serve, daemon=True).start()
    return server


def reaches(address: str, port: int, seconds: float) -> str | None:
    """Why the other rank cannot be reached; None if it answers."""
    try:
        with socket.create_connection((address, port), timeout=seconds) as connection:
            return None if connection.recv(1) == b"1" else "it accepts and says nothing"
    except OSError as error:
        return str(error)


def not_answering(address: str, port: int, seconds: float) -> str | None:
    """Why nothing accepts a connection there within some seconds; None as soon as something does."""
    deadline, why = time.monotonic() + seconds, "no answer"
    while time.monotonic() < deadline:
        try:
            socket.create_connection((address, port), timeout=max(0.1, deadline - time.monotonic())).close()
            return None
        except OSError as error:
            why = str(error)
            time.sleep(0.1)
    return why


def own_address(towards: tuple[str, int]) -> str:
    """The address of this node on the network that leads to the first one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(towards)
        return probe.getsockname()[0]


def uneven(reports: list[dict]) -> list[str]:
    """Where nodes differ in what must be equal: a sentence for each difference, naming the nodes that differ from the most."""
    found = []
    for package in reports[0]["versions"]:
        nodes_by_version: dict[str, set] = {}
        for report in reports:
            nodes_by_version.setdefault(str(report["versions"][package]), set()).add(report["node"])
        if len(nodes_by_version) > 1:
            usual = max(nodes_by_version, key=lambda version: len(nodes_by_version[version]))
            for version, nodes in nodes_by_version.items():
                if version != usual:
                    found.append(f"{', '.join(sorted(nodes))} has {package} {version}, the others {usual}")
    gpus = {report["node"]: report["gpus"] for report in reports}
    if len(set(gpus.values())) > 1:
        found.append("GPUs differ: " + ", ".join(f"{node} {count}" for node, count in sorted(gpus.items())))
    return found


def crowded(reports: list[dict]) -> list[str]:
    """Nodes with more ranks than GPUs, a sentence each."""
    from shardlab.run.placement import too_few

    ranks, gpus = Counter(report["node"] for report in reports), {report["node"]: report["gpus"] for report in reports}
    return [f"{node}: {why}" for node in ranks if (why := too_few(ranks[node], gpus[node]))]


def all_reduce(store, rank: int, ranks: int, seconds: float) -> str | None:
    """An all-reduce over all ranks, as training does it; why it failed, or None."""
    import torch.distributed as dist

    from shardlab import hardware
    from shardlab.run.collectives import try_all_reduce

    gpu = int(os.environ.get("SLURM_LOCALID", "0")) if hardware.gpu_count() else None
    store = dist.PrefixStore("all-reduce", store)
    try:
        try_all_reduce(gpu, store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=seconds))
    except (RuntimeError, ValueError) as error:
        return f"the all-reduce failed: {str(error).splitlines()[0]}"
    return None


def expected_nodes(ranks: int) -> list[str]:
    """The node of each rank, as Slurm has placed them: in blocks."""
    from shardlab.cluster.slurm import hostnames

    nodes = hostnames(os.environ["SLURM_STEP_NODELIST"])
    return [nodes[rank * len(nodes) // ranks] for rank in range(ranks)]


def check(rank: int, ranks: int, address: str, port: int, folder: Path, seconds: float) -> list[str]:
    """Run all checks on this rank.

    Returns:
        What is wrong, a sentence each, on every rank the same; empty if nothing is.
    """
    import torch.distributed as dist

    # Half the time only, so that this node can speak before rank 0 gives it up and ends the step.
    if why := rank and not_answering(address, port, seconds / 2):
        return [
            f"{node_name()} cannot reach the first node at {address}:{port} ({why}). "
            "Is that address on a network that all nodes share? See `interface` in the site profile."
        ]
    store = dist.TCPStore(address, port, ranks, is_master=rank == 0, timeout=timedelta(seconds=seconds), wait_for_workers=False)
    mine = own_address((address, port))
    server = listen(mine)
    store.set(f"facts/{rank}", json.dumps(facts(rank, folder) | {"address": mine, "port": server.getsockname()[1]}))

    nodes, reports, absent = expected_nodes(ranks), {}, []
    deadline = time.monotonic() + seconds
    for other in range(ranks):
        try:
            store.wait([f"facts/{other}"], timedelta(seconds=max(0.1, deadline - time.monotonic())))
            reports[other] = json.loads(store.get(f"facts/{other}"))
        except RuntimeError:
            absent.append(other)
    problems = [f"{nodes[other]}: no word from rank {other} within {seconds:g} s" for other in absent]
    for other, report in reports.items():
        why = reaches(report["address"], report["port"], seconds=5) if other != rank else None
        if why:
            problems.append(f"{node_name()} cannot reach {report['node']} at {report['address']} ({why})")
    store.set(f"problems/{rank}", json.dumps(problems))
    every: list[str] = []
    for other in reports:
        store.wait([f"problems/{other}"], timedelta(seconds=5 * ranks + seconds))
        every += json.loads(store.get(f"problems/{other}"))
    present = list(reports.values())
    every += [f"{report['node']}: {problem}" for report in present for problem in report["problems"]]
    every += uneven(present) + crowded(present)
    if rank == 0:
        print(table(present))
    if not every:
        why = all_reduce(store, rank, ranks, seconds)
        store.set(f"reduced/{rank}", json.dumps([f"{node_name()}: {why}"] if why else []))
        for other in range(ranks):
            store.wait([f"reduced/{other}"], timedelta(seconds=seconds))
            every += json.loads(store.get(f"reduced/{other}"))
    # Rank 0 holds the store, so it leaves last.
    store.set(f"done/{rank}", "1")
    if rank == 0:
        for other in reports:
            store.wait([f"done/{other}"], timedelta(seconds=seconds))
    return list(dict.fromkeys(every))


def table(reports: list[dict]) -> str:
    """A line per node."""
    lines = [f"{'node':<16}{'ranks':>6}{'GPUs':>6}{'cores':>7}{'GiB free':>10}  torch      deepspeed  compiled ops"]
    for node in dict.fromkeys(report["node"] for report in reports):
        mine = [report for report in reports if report["node"] == node]
        one, free = mine[0], mine[0]["free_gib"]
        built = ", ".join(one["ops_built"]) or "none: they are compiled at first use"
        lines.append(
            f"{node:<16}{len(mine):>6}{one['gpus']:>6}{one['cores']:>7}{'-' if free is None else f'{free:.0f}':>10}"
            f"  {one['versions']['torch']:<11}{one['versions']['deepspeed']:<11}{built}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m shardlab.cluster.preflight", description=__doc__.splitlines()[0])
    parser.add_argument("--address", required=True, help="of the first node, on the network that the ranks use")
    parser.add_argument("--port", required=True, type=int, help="a free one on the first node")
    parser.add_argument("--runs", default="runs", type=Path, help="the folder for run folders")
    parser.add_argument("--seconds", default=60.0, type=float, help="how long to wait for a rank")
    chosen = parser.parse_args(arguments)
    if "SLURM_PROCID" not in os.environ:
        parser.error("srun starts this, once per rank: srun --ntasks-per-node=RANKS python -m shardlab.cluster.preflight …")
    # torch warns about each address that has no name, and prints its stack where a peer is late.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    rank, ranks = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    started = time.monotonic()
    problems = check(rank, ranks, chosen.address, chosen.port, chosen.runs, chosen.seconds)
    # A rank that cannot reach the first node is heard by nobody else, so it speaks for itself.
    if rank == 0 or any(problem.startswith(f"{node_name()} cannot reach the first node") for problem in problems):
        for problem in problems:
            print(f"preflight: {problem}", file=sys.stderr)
        if not problems:
            print(
                f"preflight: {ranks} ranks reach each other; an all-reduce gave the right sum; {time.monotonic() - started:.1f} s"
            )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
