"""What a run folder says of a real run: samples, states under offload; and what DeepSpeed's own NVMe checkpoint loses."""

from functools import cache

import pytest

from shardlab import progress, switch
from shardlab.findings import Finding
from shardlab.milestones.grade import grade
from shardlab.milestones.small_runs import text_experiment, zero_config
from shardlab.run.experiment import Experiment
from shardlab.run.launch import launch
from shardlab.show import report
from shardlab.zero import ops, toolchain

pytestmark = pytest.mark.ranks


@cache
def missing_libaio() -> str:
    finding = toolchain.check_libaio()
    return "" if finding.state == "works" else f"{finding.detail} → {finding.remedy}"


def experiment(name: str, zero: dict | None = None, **changes) -> Experiment:
    if zero is not None:
        changes = {"deepspeed": zero_config(zero, precision=changes.get("precision", "fp32"), adam={"lr": "auto"})} | changes
    return text_experiment(name, **({"learning_rate": 2e-5} | changes))


def test_a_short_last_step_counts_the_samples_that_it_had(tmp_path):
    """40 rows, 16 a step: 16, 16 and 8, then the next epoch. Taken for 16, the third would seem twice as fast."""
    plan = experiment("short", accumulation=4, steps=6, train_examples=40)
    run = launch(plan, runs=tmp_path, timeout=120, display=progress.Quiet(), or_cpu=True)[0]
    assert [round(row["samples_per_second"] * row["seconds"]) for row in run.metrics()] == [16, 16, 8, 16, 16, 8]


def test_states_with_one_micro_batch_per_step(tmp_path):
    """Stage 1 then holds a shard of the gradients, as stage 2 does."""
    ways = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")]
    plans = [experiment(f"zero{s}-{p}", {"stage": s}, precision=p, accumulation=1, steps=2) for s, p in ways]
    held = {}
    for run in launch(plans, runs=tmp_path, timeout=200, display=progress.Quiet(), or_cpu=True):
        held[run.name] = report.measured_states(run)
        assert held[run.name] == report.predicted_states(run), run.name
    assert held["zero1-bf16"] == held["zero2-bf16"] != held["zero0-bf16"]


def test_offloaded_states_while_micro_batches_add_up(tmp_path):
    """Stage 1 keeps whole gradients on the device, stage 2 whole ones of the shard's parameters on the host."""
    cpu = {"device": "cpu", "pin_memory": True}
    ways = [(stage, {"stage": stage, "offload_optimizer": cpu}, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16")]
    plans = [experiment(f"zero{stage}-{precision}", zero, precision=precision) for stage, zero, precision in ways]
    for run in launch(plans, runs=tmp_path, timeout=200, display=progress.Quiet(), or_cpu=True):
        assert report.measured_states(run) == report.predicted_states(run), run.name


@pytest.mark.timeout(900)
def test_states_on_disk_are_predicted_to_the_byte(tmp_path):
    if missing_libaio():
        pytest.skip(missing_libaio())
    plans = []
    for name, limit, precision in (("one", 10**9, "bf16"), ("several", 300_000, "fp32")):
        (tmp_path / name).mkdir()
        nvme = {"device": "nvme", "nvme_path": str(tmp_path / name)}
        zero = {"stage": 3, "sub_group_size": limit, "offload_optimizer": nvme}
        plans.append(experiment(name, zero, precision=precision))
    for run in launch(plans, runs=tmp_path / "runs", timeout=600, display=progress.Quiet(), or_cpu=True):
        measured = report.measured_states(run)
        assert measured == report.predicted_states(run), run.name
        on_disk = sum(path.stat().st_size for path in (tmp_path / run.name).rglob("*.swp"))
        assert on_disk == 2 * measured.disk > 0


@pytest.mark.timeout(900)
def test_deepspeed_s_own_nvme_checkpoint_loses_states(tmp_path):
    """Lecture 04 and lab 04 say so of the pinned version. If this fails, DeepSpeed has mended it, and they must change."""
    if missing_libaio():
        pytest.skip(missing_libaio())

    def part(name: str, steps: int, **options) -> dict:
        (tmp_path / name).mkdir()
        zero = {
            "stage": 3,
            "sub_group_size": 300_000,
            "offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path / name)},
        }
        plan = experiment(name, zero, accumulation=1, steps=steps, program="shardlab.course.lectures:resume_with_deepspeed_alone")
        config = zero_config(zero, micro_batch=2, accumulation=1, ranks=2, adam={"lr": 1e-3})
        options["checkpoints"] = str(tmp_path / "checkpoints")
        plan = plan.model_copy(update={"deepspeed": config, "options": options})
        return launch(plan, runs=tmp_path / "runs", timeout=600, display=progress.Quiet(), or_cpu=True)[0].results

    whole, first, second = part("whole", 4), part("first", 2, save_at=2), part("second", 4, load=True)
    assert first["losses"] == whole["losses"][:2]
    assert "FileExistsError" in first["second save"]
    assert max(abs(a - b) for a, b in zip(second["losses"], whole["losses"][2:], strict=True)) > 1e-3


def test_without_libaio_the_nvme_milestones_are_not_run(monkeypatch):
    monkeypatch.setattr(ops, "is_built", lambda op, device=None: op != "async_io")
    monkeypatch.setattr(
        toolchain, "check_libaio", lambda compiler: Finding("libaio", "not here", "no libaio.h", "apt install libaio-dev")
    )
    for task in ("4.3", "4.7", "4.8"):
        (milestone,) = grade("lab04_offload", exercises=switch.SOLUTIONS, task=task)
        assert milestone.verdict == "not run"
        assert "no libaio.h" in milestone.message and "apt install libaio-dev" in milestone.message
