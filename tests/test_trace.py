"""What a trace says: collectives and their bytes, and where the time of a step goes; real traces of two ranks, and made ones."""

import json

import pytest

from shardlab.hardware import gpu_count
from shardlab.run.launch import launch, launch_each
from shardlab.run.trace import STEP, TraceError, collectives, holistic_shares, shares, spans
from shardlab.show.charts import create_performance_visualizations, plot_scaling, scaling_efficiency
from shardlab.show.timeline import timeline, traces_of
from shardlab.switch import SOLUTIONS, import_exercise, use_exercises


def event(name: str, start: float, duration: float, *, cat: str = "cpu_op", tid: int = 1, **arguments) -> dict:
    return {"ph": "X", "name": name, "ts": start, "dur": duration, "cat": cat, "tid": tid, "args": arguments}


def write(path, *events) -> str:
    path.write_text(json.dumps({"traceEvents": [event(f"{STEP}0", 0, 100_000, cat="user_annotation"), *events]}))
    return path


def test_collectives_have_the_size_of_the_whole_tensor(tmp_path):
    path = write(
        tmp_path / "rank0.json",
        event("c10d::allreduce_", 10, 5, **{"Input Dims": [[[100], [20]]], "Input type": ["TensorList"]}),
        event("gloo:all_reduce", 11, 5, tid=2, **{"Input Dims": [[120]], "Input type": ["float"]}),
        event("c10d::_allgather_base_", 20, 5, **{"Input Dims": [[8], [4]], "Input type": ["c10::BFloat16", "c10::BFloat16"]}),
        event("c10d::_reduce_scatter_base_", 30, 5, **{"Input Dims": [[4], [8]], "Input type": ["float", "float"]}),
    )
    assert [(one.name, one.elements, one.bytes) for one in collectives(path)] == [
        ("all-reduce", 120, 480),
        ("all-gather", 8, 16),
        ("reduce-scatter", 8, 32),
    ]


def test_a_collective_knows_the_ranks_of_its_own_group_where_nccl_says_them(tmp_path):
    sent = {"Input Dims": [[8], [8]], "Input type": ["float", "float"]}
    path = write(
        tmp_path / "rank0.json",
        event("c10d::alltoall_base_", 10, 5, **sent),
        event("record_param_comms", 11, 3, **{"Group size": 2}),
        event("c10d::_allgather_base_", 20, 5, **sent),
        event("record_param_comms", 21, 3, tid=2, **{"Group size": 4}),
        event("c10d::_allgather_base_", 30, 5, **sent),
        event("record_param_comms", 31, 3, **{"Group size": 8}),
    )
    assert [(one.name, one.ranks) for one in collectives(path)] == [("all-to-all", 2), ("all-gather", None), ("all-gather", 8)]


def test_what_is_no_trace_is_one_sentence(tmp_path):
    path = tmp_path / "rank0.json"
    path.write_text('{"traceEvents": [')
    with pytest.raises(TraceError, match="is no trace"):
        collectives(path)
    write(path, event("c10d::allreduce_", 1, 1))
    with pytest.raises(TraceError, match="record_shapes"):
        collectives(path)
    with pytest.raises(TraceError, match="no step 3"):
        spans(path, 3)


def test_a_rank_that_comes_early_waits_and_does_not_transfer(tmp_path):
    """Rank 0 computes for 40 ms and is in its collective for 50, rank 1 for 80 and for 10."""
    sent = {"Input Dims": [[5]], "Input type": ["float"]}
    traces = [
        write(
            tmp_path / f"rank{rank}.json",
            event("aten::mm", 0, 1000 * busy),
            event("gloo:all_reduce", 1000 * busy, 1000 * rest, tid=2, **sent),
        )
        for rank, (busy, rest) in enumerate(((40, 50), (80, 10)))
    ]
    assert shares(traces) == pytest.approx(
        {"compute": 0.4, "exposed transfer": 0.1, "waiting": 0.4, "neither": 0.1, "hidden transfer": 0.0}
    )
    assert shares(traces, rank=1) == pytest.approx(
        {"compute": 0.8, "exposed transfer": 0.1, "waiting": 0.0, "neither": 0.1, "hidden transfer": 0.0}
    )


def test_what_goes_on_next_to_compute_is_hidden(tmp_path):
    sent = {"Input Dims": [[5]], "Input type": ["float"]}
    trace = write(tmp_path / "rank0.json", event("aten::mm", 0, 60_000), event("gloo:all_reduce", 40_000, 40_000, tid=2, **sent))
    found = shares([trace])
    assert (found["hidden transfer"], found["exposed transfer"], found["compute"]) == pytest.approx((0.2, 0.2, 0.6))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Five methods of lab 05 on two ranks, and one on one rank, in one launch."""
    use_exercises(SOLUTIONS)
    lab = import_exercise("lab05_multi_gpu")
    methods = ("single_gpu_simple", "ddp", "fsdp2", "zero1", "zero2", "zero3")
    planned = [lab.method_experiment(method, ranks=2, train_images=128, test_images=37) for method in methods]
    folder = tmp_path_factory.mktemp("runs")
    return {run.experiment.method: run for run in launch(planned, runs=folder, timeout=300, or_cpu=gpu_count() < 2, exact=True)}


@pytest.mark.ranks
def test_all_methods_train_to_the_same_losses_and_hold_what_the_theory_says(runs):
    on_two = {method: run.results for method, run in runs.items() if run.experiment.ranks == 2}
    for method, results in on_two.items():
        assert results["train_losses"] == pytest.approx(on_two["ddp"]["train_losses"], abs=1e-5), method
        assert results["final_accuracy"] == on_two["ddp"]["final_accuracy"], method
    held = {method: sum(results["held_bytes"].values()) for method, results in on_two.items()}
    assert held["fsdp2"] < held["zero3"] < held["zero2"] <= held["zero1"] < held["ddp"]
    assert set.union(*(set(results) for results in on_two.values())) == set(runs["single_gpu_simple"].results)


@pytest.mark.ranks
def test_timeline_and_charts_are_drawn_from_run_folders(runs, tmp_path):
    timeline(list(runs.values())).savefig(tmp_path / "timeline.png")
    create_performance_visualizations(list(runs.values())).savefig(tmp_path / "charts.png")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("timeline.png", "charts.png"))
    assert scaling_efficiency(list(runs.values()))[runs["single_gpu_simple"].name] == 1.0
    for run in runs.values():
        assert sum(list(shares(traces_of(run), 1).values())[:4]) == pytest.approx(1)


@pytest.mark.ranks
def test_a_run_that_fails_does_not_end_those_after_it(tmp_path):
    use_exercises(SOLUTIONS)
    lab = import_exercise("lab05_multi_gpu")
    small = {"ranks": 1, "train_images": 64, "test_images": 8, "trace": False}
    planned = [
        lab.method_experiment("single_gpu_simple", **small, name="first"),
        lab.method_experiment("zero1", **small, name="fails", deepspeed=None, model="no-such-model"),
        lab.method_experiment("single_gpu_simple", **small, name="last"),
    ]
    found = launch_each(planned, runs=tmp_path, timeout=120, or_cpu=True)
    assert [run.outcome for run in found] == ["finished", "failed", "finished"]
    assert "no-such-model" in found[1].reason


def test_holistic_analysis_wants_a_trace_of_a_gpu(tmp_path):
    trace = write(tmp_path / "rank0.json", event("aten::mm", 0, 60_000))
    with pytest.raises(TraceError, match="no kernels of a GPU"):
        holistic_shares([trace])


def test_holistic_analysis_gives_the_shares_of_each_rank(tmp_path):
    """Rank 0 computes for 40 ms and communicates for 50 of 100; rank 1 computes for 80, and for 10 of them next to a collective."""
    pytest.importorskip("hta")

    def kernel(name: str, start: int, duration: int, stream: int) -> dict:
        return event(name, 1000 * start, 1000 * duration, cat="kernel", tid=stream, stream=stream, correlation=start, device=0)

    mm, reduce, last = "ampere_sgemm_128x64_tn", "ncclDevKernel_AllReduce_Sum_f32_RING_LL", "elementwise_kernel"
    ranks = (
        [kernel(mm, 0, 40, 7), kernel(reduce, 40, 50, 20), kernel(last, 99, 1, 7)],
        [kernel(mm, 0, 80, 7), kernel(reduce, 70, 20, 20), kernel(last, 99, 1, 7)],
    )
    traces = []
    for rank, kernels in enumerate(ranks):
        launched = event("cudaLaunchKernel", 0, 5, cat="cuda_runtime", correlation=0)
        traces.append(write(tmp_path / f"rank{rank}.json", launched, *kernels))
        written = json.loads(traces[-1].read_text())
        traces[-1].write_text(json.dumps(written | {"distributedInfo": {"rank": rank, "world_size": 2}}))
    first, second = holistic_shares(traces)
    assert first == pytest.approx({"rank": 0, "compute": 0.41, "exposed communication": 0.50, "idle": 0.09}, abs=0.002)
    assert second == pytest.approx({"rank": 1, "compute": 0.81, "exposed communication": 0.10, "idle": 0.09}, abs=0.002)


def test_scaling_is_strong_where_the_global_batch_stays_and_weak_where_it_grows():
    def point(ranks: int, global_batch: int, speed: float, method: str = "ddp") -> dict:
        return {"method": method, "ranks": ranks, "global_batch": global_batch, "samples_per_second": speed}

    figure = plot_scaling([point(1, 32, 100), point(1, 64, 120), point(2, 64, 180), point(2, 64, 90, "zero1")])
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
        "ddp, weak: 1.80 × on 2",
        "ddp, strong: 1.50 × on 2",
    ]
    with pytest.raises(ValueError, match="two numbers of ranks"):
        plot_scaling([point(1, 32, 100), point(2, 96, 100)])
