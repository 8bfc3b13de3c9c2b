"""Hidden milestones of lab 06: other nodes, jobs and batches."""

import os
import re
import shlex
import time

import pytest
from hypothesis import strategies as st
from test_lab06_multi_node import JOB, directives, made_run, rendezvous_of, scaled, share_of, task_variables

from shardlab.cluster import slurm
from shardlab.milestones import jobs
from shardlab.milestones.agreement import agree, solution
from shardlab.run.experiment import Experiment

REFERENCE = solution("lab06_multi_node")


@st.composite
def brackets(draw) -> str:
    """What stands in a bracket: numbers and ranges, of which some run backwards, and some are none."""
    items = []
    for _ in range(draw(st.integers(1, 3))):
        first, more, width = draw(st.integers(0, 12)), draw(st.integers(-1, 4)), draw(st.integers(1, 3))
        items.append(draw(st.sampled_from([f"{first:0{width}d}", f"{first:0{width}d}-{first + more:0{width}d}"])))
    return ",".join([*items, *draw(st.sampled_from([[]] * 9 + [["x"], ["1-x"], ["1-2-3"]]))])


@st.composite
def node_lists(draw) -> str:
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        part = draw(st.sampled_from(["n", "gpu-a", "rack2", "r.cluster"]))
        for _ in range(draw(st.integers(0, 3))):
            closed, after = draw(st.sampled_from(["]"] * 19 + [""])), draw(st.sampled_from(["", "n", "-ib", "s4"]))
            part += f"[{draw(brackets())}{closed}{after}"
        parts.append(part)
    return ",".join(parts)


@pytest.mark.milestone(task="6.1")
def test_other_node_lists(lab):
    assert lab.expand_nodelist("gpu[08-11]") == ["gpu08", "gpu09", "gpu10", "gpu11"]
    assert lab.expand_nodelist("a1,b[3,7-8],c") == ["a1", "b3", "b7", "b8", "c"]
    edges = "n n[0] n[9-10] n[09-10] n[1-1] n[1-] n[1]]".split()
    edges += "n[1-2][3]x n[7,1-3] n[1,1] n[1-2-3] n[1_0] n[+1] n[a] n[10-9] n[9-08] n]1[".split()
    edges += "n[01-100] ,a a,,b r[1-2]n[1-2]-ib node.x[1-2] a_b[1-2] a[1][2] [1-2] ok,node[3-1] n[1-٣] n[08,9-11]x,m".split()
    edges += ["", ",", "n[ 1]", "n[1\n]", "nid[000998-001001]", "node[1020-1024]", "a[1-2]b[1]c[1]d[1-2]", "n[99998-100001,7]"]
    edges += ["n[001-3]", "n[01-1]", "GPU[01-02],nodeA", "node[1-3000]", f"n[{','.join(map(str, range(1, 2600, 2)))}]"]
    edges += [",".join(f"n{number}" for number in range(1500))]
    drawn = st.tuples(node_lists())
    agree(lab.expand_nodelist, REFERENCE.expand_nodelist, drawn, first=[(edge,) for edge in edges], record="6.1")


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
    number = (st.integers(0, 3) | st.integers(4, 128) | st.integers(129, 5000)).map(str)
    names = {"SLURM_JOB_ID": st.integers(1, 10**7).map(str), "SLURM_JOB_NUM_NODES": number, "SLURM_NODEID": number}
    missing = st.sampled_from([*names, *[None] * 5])
    given = st.tuples(st.fixed_dictionaries(names), missing)
    variables = given.map(lambda pair: {name: value for name, value in pair[0].items() if name != pair[1]})
    address = st.sampled_from(
        ["10.0.0.7", "node1", "127.1", "127.0.0.1", "127.1.2.3", "localhost", "1.127.0.1", "127a", "mylocalhost"]
    )

    whole = {"SLURM_JOB_ID": "7000", "SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "1"}
    edges = [
        (whole | {"SLURM_NODEID": node, "SLURM_JOB_NUM_NODES": "2100"}, "10.0.0.7", 16)
        for node in ("0", "10", "20", "1", "256", "512", "1024")
    ]
    edges += [
        (whole, where, 2)
        for where in ("127.1", "127.0.0.1.", "10.0.0.7", "10.127.0.5", "127.1.1.1", "127a", "mylocalhost", "localhost")
    ]
    edges += [({name: value for name, value in whole.items() if name != left_out}, "10.0.0.7", 2) for left_out in whole]
    drawn = st.tuples(variables, address, st.integers(1, 8) | st.integers(9, 200))
    agree(rendezvous_of(lab), rendezvous_of(REFERENCE), drawn, first=edges, record="6.2")


@pytest.mark.milestone(task="6.3")
def test_another_hostfile(lab):
    nodes = ["n4", "n2", "n9", "n1"]
    lines = [line.split() for line in lab.hostfile(nodes, "2(x3),7").splitlines() if line.strip()]
    assert lines == [["n4", "slots=2"], ["n2", "slots=2"], ["n9", "slots=2"], ["n1", "slots=7"]]
    count = st.builds(lambda slots, times: (slots, times), st.integers(1, 128), st.sampled_from([1, 1, 2, 11]))

    @st.composite
    def counted(draw) -> tuple:
        counts = draw(st.lists(count, min_size=1, max_size=3))
        text = ",".join(f"{slots}(x{times})" if times > 1 else str(slots) for slots, times in counts)
        nodes = sum(times for _, times in counts) + draw(st.sampled_from([0] * 8 + [-1, 1]))
        return [f"n{number}" for number in range(nodes)], text

    texts = [
        "4(x2))",
        "4(x 2)",
        "4(x+2)",
        "4(x1_0)",
        "4,3,",
        ",4,3",
        "4(x2),",
        "4(x02)",
        "4 (x2)",
        "4(x2)(x2)",
        "",
        "4(x1",
        "4(x12",
        "4(x2]",
        "+4",
        " 4",
        "4, 3",
        "0(x2)",
        "4(x0)",
        "٤",
        "0",
        "4,,4",
        "x",
        "4(x2)",
        "4,4",
        "4",
    ]
    edges = [([f"n{number}" for number in range(count)], text) for text in texts for count in (1, 2, 3, 10)]
    edges += [([f"n{number}" for number in range(128)], "4(x128)"), ([f"n{number}" for number in range(130)], "128(x128),4(x2)")]
    edges += [(["gpu1.cluster.example", "gpu1.other.example"], "4(x2)"), ([f"n{number}" for number in range(1024)], "8(x1024)")]
    edges += [([f"n{number}" for number in range(1200)], ",".join(["4", "3"] * 600))]
    agree(lab.hostfile, REFERENCE.hostfile, counted(), first=edges, record="6.3")


@pytest.mark.milestone(task="6.4")
def test_another_script(lab):
    program = ["-m", "a.module", "$HOME", "it's two words", "--x=*"]
    for nodes, ranks, minutes in ((7, 4, 90), (1, 3, 11)):
        settings = {"name": f"train-{nodes}", "nodes": nodes, "ranks_per_node": ranks, "minutes": minutes, "log": "/a/b.out"}
        text = lab.batch_script(**settings, setup="module load nothing", program=program)
        wanted = {
            "job-name": f"train-{nodes}",
            "nodes": str(nodes),
            "ntasks-per-node": "1",
            "time": str(minutes),
            "output": "/a/b.out",
        }
        assert wanted.items() <= directives(text).items()
        assert "module load nothing" in text.splitlines() and shlex.join(program) in text
        assert re.search(rf"--nproc[-_]per[-_]node[= ]{ranks}\b", text)


@pytest.mark.milestone(task="6.5")
def test_other_shares(lab):
    for global_batch, ranks in ((23, 5), (100, 7), (12, 12)):
        shares = [list(lab.share(global_batch, rank, ranks)) for rank in range(ranks)]
        assert sorted(sum(shares, [])) == list(range(global_batch))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        weights = [lab.loss_weight(global_batch, rank, ranks) for rank in range(ranks)]
        wanted = [len(share) * ranks / global_batch for share in shares]
        assert all(abs(a - b) < 1e-12 for a, b in zip(weights, wanted))
    small = st.tuples(st.integers(1, 60), st.integers(0, 15), st.integers(1, 16))
    large = st.tuples(st.integers(1, 10_000), st.integers(0, 3000), st.integers(65, 4000))
    given = (small | large).filter(lambda given: given[1] < given[2])
    edges = [
        (255, 0, 128),
        (100, 120, 128),
        (1000, 1100, 2000),
        (4096, 1023, 1024),
        (4096, 1000, 1001),
        (512, 3, 4),
        (70_000, 6, 7),
        (3, 0, 4),
        (4, 3, 4),
        (5, 0, 4),
        (5, 3, 4),
        (1, 0, 1),
        (4, 4, 5),
        (7, 7, 8),
        (7, 0, 3),
    ]
    agree(share_of(lab), share_of(REFERENCE), given, first=edges, record="6.5 share")
    shared = given.filter(lambda given: given[2] <= given[0])
    near = lambda wanted, got: abs(wanted - got) < 1e-12
    large = [(300, 0, 200), (300, 150, 200), (5000, 7, 1024), (5000, 1000, 1024)]
    agree(lab.loss_weight, REFERENCE.loss_weight, shared, first=large, same=near, record="6.5 weight")


@pytest.mark.milestone(task="6.6")
def test_another_line(lab):
    given = {"state": "COMPLETED", "reason": "None", "nodes": "gpu[3-9]", "restarts": 5, "time": "3-04:05:06", "code": 0}
    came = lab.read_job(JOB.format(**given))
    assert (came["state"], came["reason"], came["nodes"], came["restarts"]) == ("COMPLETED", None, "gpu[3-9]", 5)
    assert (came["seconds"], came["exit"]) == (((3 * 24 + 4) * 60 + 5) * 60 + 6, 0)
    two = st.integers(0, 59).map("{:02d}".format)
    lines = st.fixed_dictionaries(
        {
            "state": st.sampled_from(["PENDING", "RUNNING", "NODE_FAIL"]),
            "reason": st.sampled_from(["None", "(null)", "", "Resources", "Nodes required for job are DOWN"]),
            "nodes": st.sampled_from(["(null)", "", "n[1-3]", "None"]),
            "restarts": st.integers(0, 12),
            "time": st.builds("{}{}:{}:{}".format, st.sampled_from(["", "1-", "12-"]), st.sampled_from(["00", "23"]), two, two),
            "code": st.sampled_from([0, 1, 143]),
        }
    ).map(lambda given: (JOB.format(**given),))
    plain = {"state": "RUNNING", "reason": "None", "nodes": "node[1-2]", "restarts": 1, "time": "12-00:00:00", "code": 0}
    changes = [{"reason": reason} for reason in ("(null)", "", "None")] + [{"nodes": nodes} for nodes in ("None", "(null)", "")]
    changes += [{"code": 127}, {"time": "00:00:07"}, {"restarts": 0}]
    edges = [JOB.format(**(plain | change)) for change in changes]
    line = JOB.format(**plain)
    edges += [line.replace("JobName=my job", f"JobName={name}") for name in ("run lr2=3", "lr=0.1", "two  words", "a=b c=d", "")]
    names = ("sweep batch-size=16", "a.b x.y=2", "None", "sweep/Restarts=7", "x:Reason=y", "JobState=FAILED")
    edges += [line.replace("JobName=my job", f"JobName={name}") for name in names]
    edges += [line.replace("NodeList=node[1-2]", f"NodeList={nodes}") for nodes in ("node[1-2,5],gpu1", "n1.cluster.example,n_2")]
    edges += [line.replace("RunTime=12-00:00:00", "RunTime=123-01:02:03"), line.replace("RunTime=12-00", "RunTime=1000-00")]
    edges += [line.replace("NodeList=", "ReqNodeList=(null) ExcNodeList=n9 NodeList="), line.replace(":0 RunTime", ":9 RunTime")]
    edges += [
        line.replace("JobName=my job", f"JobName={name}") for name in ("MaxRestarts=3", "a ExitCode:9", "x Restarts", "JobState")
    ]
    edges += [line.replace(" UserId=ada(1000) GroupId=ada(1000)", ""), line.replace("MCS_label=N/A", "Socks/Node=2 A:B=1")]
    edges += [line.replace("ExitCode=", "DerivedExitCode=9:0 ExitCode="), f"{line} Comment=it ended with ExitCode=9:0"]
    edges += [
        f"{line} {key}=z JobState=FAILED Restarts=9 ExitCode=9:0" for key in ("AdminComment", "SystemComment", "Comment", "Extra")
    ]
    edges += [line.replace("WorkDir=/home/ada/my course", "WorkDir=/home/ada/run JobState=FAILED RunTime=1-00:00:00")]
    edges += [f"{line} Comment=x RunTime=5-00:00:00 Reason=later JobState=FAILED Restarts=9 NodeList=z"]
    agree(lab.read_job, REFERENCE.read_job, lines, first=[(edge,) for edge in edges], record="6.6")


@pytest.mark.milestone(task="6.7")
def test_other_speeds(lab, tmp_path):
    weak = [
        made_run(tmp_path, f"w{n}", [9.0, s, s], ranks=n, micro_batch=3, accumulation=4)
        for n, s in ((4, 90.0), (16, 288.0), (3, 75.0))
    ]
    strong = [
        made_run(tmp_path, f"s{n}", [9.0, s, s], ranks=n, micro_batch=24 // n, accumulation=2) for n, s in ((6, 66.0), (3, 44.0))
    ]
    for kind, runs, wanted in (
        ("weak", weak, [(3, 75.0, 25.0, 1.0), (4, 90.0, 22.5, 0.9), (16, 288.0, 18.0, 0.72)]),
        ("strong", strong, [(3, 44.0, 44.0 / 3, 1.0), (6, 66.0, 11.0, 0.75)]),
    ):
        came = lab.scaling(runs)
        rows = [[row[key] for key in ("ranks", "global samples/s", "samples/s per rank", "efficiency")] for row in came["rows"]]
        assert came["kind"] == kind and len(rows) == len(wanted)
        assert all(abs(a - b) < 1e-9 for row, values in zip(rows, wanted) for a, b in zip(row, values)), rows
    sizes = st.tuples(st.integers(1, 9), st.sampled_from([4, 8, 12]), st.sampled_from([1, 2, 3]), st.integers(1, 99))

    def same(wanted: dict, got: dict) -> bool:
        pairs = zip(wanted["rows"], got["rows"], strict=True)
        return wanted["kind"] == got["kind"] and all(set(a) == set(b) and all(abs(a[k] - b[k]) < 1e-9 for k in a) for a, b in pairs)

    several = st.lists(sizes, min_size=1, max_size=3, unique_by=lambda size: size[0])
    weak_or_strong = [([(2, 8, 2, 10), (1, 8, 2, 6)],), ([(4, 4, 1, 9), (2, 8, 1, 5)],), ([(4, 4, 1, 9), (2, 4, 1, 5)],)]
    more = [
        [(2, 4, 2, 10), (2, 4, 2, 12)],
        [(1, 4, 4, 10), (4, 4, 1, 9)],
        [(1, 4, 2, 10), (2, 2, 4, 9)],
        [(1, 4, 2, 10), (2, 4, 2, 23)],
    ]
    more += [[(1, 4, 2, 10), (2, 4, 2, 19), (4, 8, 2, 30)], [(1, 8, 2, 10), (2, 4, 2, 19), (4, 2, 2, 33), (8, 8, 2, 40)]]
    more += [
        [(16, 4, 2, 90), (2, 4, 2, 13)],
        [(1, 4, 1, 7.5, 8, 9.25), (3, 4, 1, 20, 22.75, 31)],
        [(4, 4, 1, 10), (1, 4, 1, 30)],
        [(1, 4, 1, 10)],
    ]
    more += [[(4, 4, 2, 40), (4, 4, 2, 44), (2, 4, 2, 23)], [(1, 8, 1, 9), (2, 4, 1, 8), (4, 4, 1, 7)], []]
    more += [[(4, 16, 1, 9), (6, 11, 1, 9)], [(1, 64, 1, 9), (2, 33, 1, 9)], [(512, 4, 2, 9000), (8, 4, 2, 200)]]
    more += [[(4, 256, 1, 9), (3, 341, 1, 9)], [(n, 8, 1, 9) for n in (1, 2, 4, 8)] + [(16, 1, 1, 9)]]
    more += [[(1, 4, 1, 0.0124), (2, 4, 1, 0.0246)], [(1, 4, 1, 123456.789), (2, 4, 1, 0.5)]]
    edges = weak_or_strong + [(plans,) for plans in more]
    agree(scaled(lab, tmp_path), scaled(REFERENCE, tmp_path), st.tuples(several), first=edges, count=25, same=same, record="6.7")


@pytest.mark.milestone(task="6.8", ranks=3)
def test_three_ranks_stop_together(lab, run_experiments):
    lab.stop_together  # noqa: B018
    plan = Experiment(
        name="stop-three", program="labs/lab06_multi_node/programs.py:stop_at_different_steps", ranks=3, options={"steps": 9}
    )
    last = plan.model_copy(update={"name": "stop-last", "options": {"steps": 9, "asked": [7, 8, 2]}})
    middle = plan.model_copy(update={"name": "stop-middle", "options": {"steps": 9, "asked": [7, 2, 8]}})
    for run in run_experiments([plan, last, middle], timeout=60).values():
        assert run.results["stopped"] == [min(run.results["asked"])] * 3


OTHERS = {
    "ends well": ("true", "COMPLETED", 0),
    # It fails after an old checkpoint, which is none of this life's.
    "fails": ("exit 6", "FAILED", 0),
    "is lost once": (
        'lives=$(cat "$run/n" 2>/dev/null || echo 5); mkdir -p "$run/checkpoints/checkpoint-$lives"; '
        'touch "$run/checkpoints/checkpoint-$lives/complete.json"; echo $((lives + 1)) >"$run/n"; [ "$lives" -gt 5 ] || exit 137',
        "COMPLETED",
        1,
    ),
    "is told": (
        'if [ -e "$run/ready" ]; then [ ! -e "$run/stop" ] || exit 8; touch "$run/again"; exit 0; fi; '
        'mkdir -p "$run"; touch "$run/ready"; '
        'for _ in $(seq 200); do sleep 0.1; [ ! -e "$run/stop" ] || { touch "$run/seen"; exit 0; }; done; exit 9',
        "COMPLETED",
        1,
    ),
}


@pytest.mark.milestone(task="6.9")
def test_other_ends(lab, workspace, slurm_beside_exercises):
    jobs.site()
    token, scripts = os.urandom(4).hex(), []
    folder, logs = jobs.folder_for(workspace, "other ends", token), jobs.log_folder(workspace)
    for number, (program, _, _) in enumerate(OTHERS.values()):
        run = folder / f"a run {number}"
        launch = f"bash -c {shlex.quote(f': {token}; run={shlex.quote(str(run))}; {program}')}"
        scripts.append(
            f"#!/bin/bash\n#SBATCH --output={logs}/{token}-{number}.out\nset -euo pipefail\n{lab.surviving(launch, str(run))}"
        )
    old = folder / "a run 1" / "checkpoints" / "checkpoint-3"
    old.mkdir(parents=True)
    (old / "complete.json").touch()
    told = []

    def tell(numbers) -> None:
        if not told and (folder / "a run 3" / "ready").exists():
            time.sleep(0.7)
            told.append(slurm.command("scancel", "--signal=USR1", "--batch", str(numbers[3])))
        if slurm.job(numbers[1]).restarts > 1:
            slurm.cancel(numbers[1])

    ended = jobs.run_jobs(scripts, "--time=5", "--requeue", "--open-mode=append", meanwhile=tell)
    for (name, (_, state, restarts)), one in zip(OTHERS.items(), ended):
        assert (one.job.state, one.job.restarts) == (state, restarts), (name, one.job.state, one.job.restarts, one.told)
    assert (folder / "a run 3" / "seen").exists() and (folder / "a run 3" / "again").exists()
