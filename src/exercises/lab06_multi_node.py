"""Lab 06, multi-node: from the variables that Slurm sets to a job that trains on several nodes and survives the loss of one.

You complete ten functions. Most of them turn text into text, so they can be tried without a cluster. Nothing here imports torch
before it is needed: a batch job may call these functions on every node.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

# --- Task 6.1 -------------------------------------------------------------------------------------------------------


def expand_nodelist(nodelist: str) -> list[str]:
    """The hosts of a node list, in its order, as `scontrol show hostnames` gives them.

    Slurm writes node1,node2,node3,node7 as node[1-3,7]. Numbers keep their width: n[08-10] is n08, n09, n10. A name can have
    several brackets: rack[1-2]n[1-2] is rack1n1, rack1n2, rack2n1, rack2n2; the last one runs fastest. (Slurm 22.05 orders three
    brackets and more in another way, and refuses text after the last bracket, which newer versions take; take it.) Lists are joined
    by commas, which also stand inside brackets.

    Args:
        nodelist: as in `SLURM_JOB_NODELIST`.

    Raises:
        ValueError: a bracket that is not closed, or closed and not opened; a range that runs backwards or lacks an end; in a
            bracket, something that is no number in the digits 0 to 9; an empty part. The sentence has the part as it was given in
            single quotes, such as 'node[3-1]', or the whole list where a part is empty.

    Source: https://slurm.schedmd.com/scontrol.html, "show hostnames"
    """
    raise NotImplementedError("Task 6.1: complete expand_nodelist() in src/exercises/lab06_multi_node.py")


# --- Task 6.2 -------------------------------------------------------------------------------------------------------


def rendezvous(variables: Mapping[str, str], address: str, ranks_per_node: int) -> dict[str, str | int]:
    """The options with which `torchrun` is started on one node of a job.

    All nodes meet at a store. One node, the first, holds it; all are given its address and one port. Two jobs can share a node,
    so the port is 12000 + (job's number modulo 10000).

    Args:
        variables: the environment of a task that `srun` has started. `SLURM_NODEID` counts nodes from 0, `SLURM_PROCID` tasks.
        address: of the job's first node, on the network that all nodes share.
        ranks_per_node: processes that each node runs.

    Returns:
        {"nnodes": …, "nproc-per-node": …, "rdzv-backend": "c10d", "rdzv-id": the job's number, "rdzv-endpoint": "address:port",
        "rdzv-conf": "is_host=true" on the node that holds the store, "is_host=false" on the others}; the first two are numbers, the
        others text. Without is_host, torchrun guesses from host names which node it is on.

    Raises:
        ValueError: a variable is missing; or the address is localhost or begins with 127., where each node would find itself alone.
            The sentence names the variable, or the address.

    Source: https://docs.pytorch.org/docs/stable/elastic/run.html and .../elastic/rendezvous.html
    """
    raise NotImplementedError("Task 6.2: complete rendezvous() in src/exercises/lab06_multi_node.py")


# --- Task 6.3 -------------------------------------------------------------------------------------------------------


def hostfile(nodes: Sequence[str], tasks_per_node: str) -> str:
    """The file that tells the `deepspeed` launcher which nodes there are, and how many ranks each runs.

    One line per node, in order, with its line end: `node1 slots=4`. Slurm gives the counts in a short form: "4(x2),3" is 4, 4, 3.

    Args:
        nodes: the hosts.
        tasks_per_node: as in `SLURM_TASKS_PER_NODE`.

    Raises:
        ValueError: there are more or fewer counts than nodes; the sentence names both numbers. Or a count is of neither form, such
            as "", "x", "4(x1" or "0"; the sentence quotes `tasks_per_node`.
    """
    raise NotImplementedError("Task 6.3: complete hostfile() in src/exercises/lab06_multi_node.py")


# --- Task 6.4 -------------------------------------------------------------------------------------------------------


def batch_script(*, name: str, nodes: int, ranks_per_node: int, minutes: int, log: str, setup: str, program: list[str]) -> str:
    """A script for `sbatch` that trains on several nodes.

    It has, in this order:

    1. `#!/bin/bash`;
    2. directives, `#SBATCH --option=value` (with a space after the # they would be comments): job-name, nodes, ntasks-per-node
       (one task per node: torchrun starts the ranks), time (in minutes), output;
    3. `set -euo pipefail`, so that a command that fails ends the job; then the lines of `setup`;
    4. the first node's address. The script runs on the first node, so that is its own: the first word that
       `getent ahostsv4 "$(hostname)"` prints. No other address in its place if that fails;
    5. `srun --kill-on-bad-exit=1`, which starts one `torchrun` on each node, with the options of task 6.2, then `program`.
       `SLURM_NODEID` must be each task's own: the script's shell knows it too, as 0. Single quotes keep that shell away from it:
       `srun … bash -c 'torchrun … is_host=$((SLURM_NODEID == 0)) "${@:2}"' bash "$address:$port" …`. There, `$1` is the first word
       after `bash`, and `"${@:2}"` all words from the second on.

    Args:
        name: of the job.
        nodes, ranks_per_node: how many.
        minutes: the time limit.
        log: the file for what the job prints; without spaces.
        setup: lines of shell that find Python.
        program: the words after torchrun's options, such as ["-m", "shardlab.cli", "run", "my run"]; `shlex.join` quotes them.

    Returns:
        The script's text.
    """
    raise NotImplementedError("Task 6.4: complete batch_script() in src/exercises/lab06_multi_node.py")


# --- Task 6.5 -------------------------------------------------------------------------------------------------------


def share(global_batch: int, rank: int, ranks: int) -> range:
    """Which sequences of an optimizer step's global batch a rank trains on, as positions in it.

    Consecutive ones, rank by rank; no rank has more than one more than another, and the first ranks have those. So the step is the
    same step on any number of ranks.

    Raises:
        ValueError: there are more ranks than sequences; the sentence names both numbers.
    """
    raise NotImplementedError("Task 6.5: complete share() in src/exercises/lab06_multi_node.py")


def loss_weight(global_batch: int, rank: int, ranks: int) -> float:
    """The factor for a rank's loss, so that the gradient is that of the mean over the global batch.

    A rank's loss is the mean over its own sequences, and gradients are averaged over the ranks, each counted once. With unequal
    shares a sequence of a smaller share would count more.
    """
    raise NotImplementedError("Task 6.5: complete loss_weight() in src/exercises/lab06_multi_node.py")


# --- Task 6.6 -------------------------------------------------------------------------------------------------------


def read_job(line: str) -> dict:
    """What `scontrol --oneliner show job NUMBER` says.

    The line is Key=Value pairs with spaces between them. Values can hold spaces (a job's name, the path of its script), so a value
    ends where the next key begins: a space, letters (with underscores, colons or slashes among them, as in MCS_label), and =. Of a
    key that stands twice the first counts: a comment, which comes later, can hold anything, `JobState=FAILED` too.

    Returns:
        {"state": JobState, "reason": Reason or None, "nodes": NodeList or None, "restarts": Restarts as a number,
        "seconds": RunTime in seconds, "exit": the number before the colon in ExitCode, "name": JobName}. Where there is nothing,
        Slurm writes "None", "(null)", or nothing at all after the =. A time is hours:minutes:seconds; after a day it has days and
        a hyphen in front, 1-00:00:00.
    """
    raise NotImplementedError("Task 6.6: complete read_job() in src/exercises/lab06_multi_node.py")


# --- Task 6.7 -------------------------------------------------------------------------------------------------------


def scaling(runs: list) -> dict:
    """How well training scales, from the run folders of the same training on different numbers of ranks.

    Strong scaling: the global batch stays the same, so each rank has less to do. Weak scaling: each rank's part, micro-batch ×
    accumulation, stays the same, so the global batch grows. Either way the efficiency is samples/s per rank, relative to the run
    with the fewest ranks.

    Args:
        runs: `shardlab.run.run_folder.Run`s. `run.samples_per_second()` is global: over all ranks. `run.experiment` has `ranks`,
            `micro_batch`, `accumulation` and `global_batch`.

    Returns:
        {"kind": "strong" or "weak", "rows": by rising ranks, [{"ranks", "global samples/s", "samples/s per rank", "efficiency"}]}.

    Raises:
        ValueError: fewer than two numbers of ranks, or neither the global batch nor each rank's part is the same in all.
    """
    raise NotImplementedError("Task 6.7: complete scaling() in src/exercises/lab06_multi_node.py")


# --- Task 6.8 -------------------------------------------------------------------------------------------------------


def stop_together(asked: bool) -> bool:
    """Whether all ranks stop now: as soon as one of them was asked to. Every rank calls this after each optimizer step.

    A signal, or a file on a shared file system, reaches one rank a step before another. If that one stopped alone, the others
    would wait for it in their next all-reduce for ever. There is a process group. What it exchanges must lie where it can reach
    it: on this rank's GPU with NCCL, on the CPU with gloo (`dist.get_backend()` says which).

    Args:
        asked: whether this rank was asked.

    Returns:
        The same on every rank.
    """
    raise NotImplementedError("Task 6.8: complete stop_together() in src/exercises/lab06_multi_node.py")


# --- Task 6.9 -------------------------------------------------------------------------------------------------------


def surviving(launch: str, run: str) -> str:
    """Shell lines that start the ranks, and put the job back into the queue when it can go on.

    Slurm sends SIGUSR1 to the script's shell before the time limit. A shell that waits for a command in the foreground looks at a
    signal when the command has ended, so the command must run in the background (`&`, `$!`), with `wait` after it. A signal
    interrupts `wait`, with a status of its own, which under `set -e` would end the script (`|| true`); so wait again until the
    process is gone (`kill -0` fails then). bash keeps the status of a process that has ended: one more `wait` gives it.

    The ranks continue from the newest checkpoint by themselves. They save one and end, with status 0, when the file `stop` is in
    the run folder.

    Requeue the job (`scontrol requeue "$SLURM_JOB_ID"`, which also ends this script):
    - when the ranks ended with status 0 because the file was there (remove the file, or the next life stops at once); or
    - when they ended with another status, as they do when a node is lost, and there is a newer checkpoint than when this life
      began: `find "$run/checkpoints" -name complete.json` lists them. Older ones are removed on the way, so their number
      says nothing. Without a new one, what went wrong would go wrong again.
    Otherwise the script's status is that of the ranks.

    Args:
        launch: the command line that starts the ranks, such as `srun …`.
        run: the run folder; its name may hold spaces. Do not make it: the ranks do, and refuse a folder that is no run. So it may
            not be there at the beginning. A signal that comes so early must not be lost: a loop in the background
            (`{ until touch …; do sleep 1; done; } &`) puts the file there when there is a folder, and ends with the script.

    Returns:
        The lines; `set -euo pipefail` stands above them.
    """
    raise NotImplementedError("Task 6.9: complete surviving() in src/exercises/lab06_multi_node.py")
