"""Hidden milestones of lab 06: other nodes, jobs and batches."""

import pytest
from test_lab06_multi_node import JOB, task_variables

from shardlab.runs import Experiment


@pytest.mark.milestone(task="6.1")
def test_other_node_lists(lab):
    assert lab.expand_nodelist("gpu[08-11]") == ["gpu08", "gpu09", "gpu10", "gpu11"]
    assert lab.expand_nodelist("a1,b[3,7-8],c") == ["a1", "b3", "b7", "b8", "c"]


@pytest.mark.milestone(task="6.2")
def test_another_job(lab):
    variables = task_variables(SLURM_JOB_ID="98765", SLURM_JOB_NUM_NODES="5", SLURM_NODEID="3")
    came = lab.rendezvous(variables, "192.168.7.9", 2)
    assert {key: str(value) for key, value in came.items()} == {
        "nnodes": "5",
        "nproc-per-node": "2",
        "rdzv-backend": "c10d",
        "rdzv-id": "98765",
        "rdzv-endpoint": f"192.168.7.9:{12000 + 98765 % 10000}",
        "rdzv-conf": "is_host=false",
    }


@pytest.mark.milestone(task="6.3")
def test_another_hostfile(lab):
    nodes = ["n4", "n2", "n9", "n1"]
    lines = [line.split() for line in lab.hostfile(nodes, "2(x3),7").splitlines() if line.strip()]
    assert lines == [["n4", "slots=2"], ["n2", "slots=2"], ["n9", "slots=2"], ["n1", "slots=7"]]


@pytest.mark.milestone(task="6.5")
def test_other_shares(lab):
    for global_batch, ranks in ((23, 5), (100, 7), (12, 12)):
        shares = [list(lab.share(global_batch, rank, ranks)) for rank in range(ranks)]
        assert sorted(sum(shares, [])) == list(range(global_batch))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        weights = [lab.loss_weight(global_batch, rank, ranks) for rank in range(ranks)]
        wanted = [len(share) * ranks / global_batch for share in shares]
        assert all(abs(a - b) < 1e-12 for a, b in zip(weights, wanted))


@pytest.mark.milestone(task="6.6")
def test_another_line(lab):
    given = {"state": "COMPLETED", "reason": "None", "nodes": "gpu[3-9]", "restarts": 5, "time": "3-04:05:06", "code": 0}
    came = lab.read_job(JOB.format(**given))
    assert (came["state"], came["reason"], came["nodes"], came["restarts"]) == ("COMPLETED", None, "gpu[3-9]", 5)
    assert (came["seconds"], came["exit"]) == (((3 * 24 + 4) * 60 + 5) * 60 + 6, 0)


@pytest.mark.milestone(task="6.8")
def test_three_ranks_stop_together(lab, run_experiments):
    lab.stop_together  # noqa: B018
    options = {"asked": [7, 4, 6], "steps": 9}
    plan = Experiment(name="stop-three", program="shardlab.grading.programs:stop_at_different_steps", ranks=3, options=options)
    (run,) = run_experiments([plan], timeout=60).values()
    assert run.results["stopped"] == [4, 4, 4]
