"""Hidden milestones of lab 05: three ranks, other seeds and sizes, and inputs that are drawn."""

import pytest
from hypothesis import strategies as st
from test_lab05_multi_gpu import (
    PROGRAMS,
    check_engine,
    check_epoch,
    check_loaders,
    check_run,
    check_scores,
    check_set_up,
    check_wrapped,
    elements,
    engine_experiment,
    experiment,
    tabled,
    zero_configuration,
)

from shardlab.milestones.agreement import agree, solution
from shardlab.run.experiment import program_of

REFERENCE = solution("lab05_multi_gpu")


class Here:
    """The solution, seen as milestones see a lab."""

    def observe(self, program: str, *given):
        import sys
        from unittest import mock

        module = program_of(program).__globals__
        with mock.patch.dict(module, {"_lab": lambda: sys.modules[REFERENCE.__name__]}):
            return program_of(program)(*given)


@pytest.mark.milestone(task="5.1", ranks=3)
def test_three_ranks_meet(lab, run_experiments):
    lab.setup_distributed  # noqa: B018
    got = run_experiments([experiment("three", "set_up", ranks=3)])["three"].results
    assert got["made"] and got["numbers"] == [[0, 0, 3], [1, 1, 3], [2, 2, 3]] and got["sum"] == 3 and not got["left"], got
    check_set_up(lab, 6, 2, 16, 4)
    check_set_up(lab, 1, 1, 2, 1)
    check_set_up(lab, None, 5, 8, 1)
    check_set_up(lab, 9, 2, 12, 3, there=True)


@pytest.mark.milestone(task="5.2")
def test_images_for_another_model(lab):
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    for name in ("RGB, tall", "RGB, nearly black", "grey", "grey with transparency", "CMYK", "with a palette"):
        got = lab.observe(f"{PROGRAMS}:transform", name, 11, mean, std)
        wanted = Here().observe(f"{PROGRAMS}:transform", name, 11, mean, std)
        assert float((got["values"] - wanted["values"]).abs().max()) < 1e-5, name
        assert got["kept"] and not got["draws"] and got["turns"][0] == got["turns"][1] != got["turns"][2]
        assert all(4 <= turn.count("mirrored") <= 20 for turn in got["turns"]), got["turns"]
        assert got["looks again"], name
    assert 430 <= lab.observe(f"{PROGRAMS}:mirrored", 1000, 8) <= 570


@pytest.mark.milestone(task="5.3")
def test_other_shares(lab):
    for rows, test_rows, micro_batch, ranks, seed in ((50, 51, 6, 4, 2), (31, 8, 5, 5, 9), (12, 2, 3, 4, 1)):
        check_loaders(lab, rows, test_rows, micro_batch, ranks, seed)


@pytest.mark.milestone(task="5.4")
def test_another_head(lab):
    got = lab.observe(f"{PROGRAMS}:load_models", 3, 5)
    assert got["its body"] and got["its head"] == [5, 12] and got["as stored"] and got["loaded"]["labels"] == 5, got
    assert got["loaded"]["computed"] == [2] and got["loaded"]["dtypes"] == ["torch.bfloat16"], got
    fitting = got["fitting"]
    assert got["fits"] and fitting["training"] and fitting["dtypes"] == ["torch.float32"] and fitting["computed"] == [2], got
    assert not got["old rows"] and got["default types"] == ["torch.float32"], got


@pytest.mark.milestone(task="5.5", ranks=3)
def test_wrapped_on_three_ranks(lab, run_experiments):
    lab.wrap_model  # noqa: B018
    plans = [experiment(f"{method}-of-3", "wrap", ranks=3, seed=8, options={"method": method}) for method in ("ddp", "fsdp2")]
    runs = run_experiments(plans)
    for method in ("ddp", "fsdp2"):
        check_wrapped(runs[f"{method}-of-3"].results, method, 3, 8)


@pytest.mark.milestone(task="5.6", ranks=3)
def test_engines_on_three_ranks(lab, run_experiments):
    lab.initialize_deepspeed_model  # noqa: B018
    plans = [engine_experiment(f"engine{stage}-of-3", f"stage {stage}", ranks=3, seed=9, accumulation=3) for stage in (2, 3)]
    runs = run_experiments(plans)
    for stage in (2, 3):
        check_engine(runs[f"engine{stage}-of-3"].results, stage, 3, 3, 9)


@pytest.mark.milestone(task="5.7", ranks=3)
def test_epochs_on_three_ranks(lab, run_experiments):
    lab.train_epoch_standard  # noqa: B018
    got = lab.observe(f"{PROGRAMS}:epoch_on_a_gpu", "float16", 3, 7)
    assert got["autocast"] == ["torch.float16"] * 6 and len(got["apart"]) == 2 and max(got["apart"]) < 1e-3, got
    plans = [
        experiment("ddp-of-3", "train_standard", ranks=3, seed=4, accumulation=3, options={"ddp": True, "count": 7}),
        experiment(
            "engine-of-3", "train_engine", ranks=3, seed=4, accumulation=2, options={"count": 3}, deepspeed=zero_configuration(2)
        ),
    ]
    runs = run_experiments(plans)
    check_epoch(runs["ddp-of-3"].results, 4, 3, 7, 3, "DDP on three ranks")
    assert sum(runs["ddp-of-3"].results["sent"]) == 2 * elements(), runs["ddp-of-3"].results["sent"]
    check_epoch(runs["engine-of-3"].results, 4, 3, 3, 2, "an engine on three ranks")


@pytest.mark.milestone(task="5.8", ranks=3)
def test_evaluation_on_three_ranks(lab, run_experiments):
    lab.evaluate  # noqa: B018
    plans = [
        experiment("ten-of-3", "evaluate", ranks=3, options={"rows": 10, "unlabelled": True}, seed=11),
        experiment("two-of-3", "evaluate", ranks=3, options={"rows": 2}, seed=13),
        experiment("four-of-3", "evaluate", ranks=3, options={"rows": 4}, seed=12, deepspeed=zero_configuration(3)),
    ]
    runs = run_experiments(plans)
    check_scores(runs["ten-of-3"].results, 11, 10, "10 rows, three ranks")
    check_scores(runs["two-of-3"].results, 13, 2, "2 rows, three ranks")
    check_scores(runs["four-of-3"].results, 12, 4, "4 rows, three ranks, ZeRO-3")


@pytest.mark.milestone(task="5.9")
def test_other_bytes(lab):
    names = st.sampled_from(["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "broadcast", "gather", ""])
    sizes = st.integers(0, 2**40)
    edges = [("all-reduce", 0, 1), ("all-gather", 7, 3), ("broadcast", 5, 4096), ("reduce", 1, 2), ("all-reduce", 1, -1)]
    agree(
        lab.bytes_sent,
        REFERENCE.bytes_sent,
        st.tuples(names, sizes, st.integers(-1, 600)),
        first=edges,
        record="5.9 sent",
        same=near,
    )
    rows = st.lists(st.tuples(names, sizes).map(list), max_size=9)
    some = st.sampled_from(["all-reduce", "all-gather", "reduce-scatter", "all-to-all"])
    known = st.lists((st.tuples(some, sizes) | st.tuples(some, sizes, st.integers(1, 64))).map(list), max_size=9)
    tables = st.tuples(known | rows, st.integers(1, 70), st.integers(1, 6))
    agree(tabled(lab), tabled(Here()), tables, first=[([], 2, 1)], record="5.9 table", same=near)


def near(one, other) -> bool:
    """Equal but for the last digits: sums may be taken in another order."""
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(near, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(near(one[key], other[key]) for key in one)
    return one == other or (isinstance(one, float) and isinstance(other, float | int) and abs(one - other) <= 1e-9 * abs(one))


@pytest.mark.milestone(task="5.10")
def test_other_measurements(lab):
    seconds = [7.0, 0.5, 0.25, 0.25, 2.0, 9.0]
    for device in ("cpu", "cuda:3"):
        got = lab.observe(f"{PROGRAMS}:throughput", seconds, 10, device, warm_up_steps=1, measured_steps=4)
        assert got["steps"] == 5 and abs(got["found"] / (4 * 10 / 3) - 1) < 0.01, got
        at = [number for number, entry in enumerate(got["log"]) if entry == "step"][-4:]
        assert at[-1] - at[0] == 3, got["log"]
    got = lab.observe(f"{PROGRAMS}:memory", "cuda:3")
    assert got["found"] == {"peak_allocated_gb": 3.0, "peak_reserved_gb": 5.5} and got["asked"] == ["cuda:3"], got


@pytest.mark.milestone(task="5.11")
def test_other_runs(lab):
    check_run(lab, "zero1", "cpu", 2, 4, epochs=1, accumulation=1, seed=5, profile=False)
    check_run(lab, "ddp", "cuda:1", 1, 8, epochs=4, accumulation=2, dtype="bfloat16", seed=6)
    check_run(lab, "zero2", "cuda:0", 0, 1, epochs=1, accumulation=5, seed=7)
    got = lab.observe(f"{PROGRAMS}:orchestrate", "zeropp", "cuda:0", 0, 3)
    assert got["result"]["not_run"] and not got["log"], got
    assert "single_gpu_ddp" in lab.observe(f"{PROGRAMS}:orchestrate", "single_gpu_ddp", "cuda:0", 1, 4).get("refused", "")
