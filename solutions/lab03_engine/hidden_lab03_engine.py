"""Hidden milestones of lab 03: other seeds, other accumulations, three ranks."""

import json
import shutil

import pytest
import torch
from test_lab03_engine import PROGRAMS, checkpoints, config, experiment, never_stopped, sampled

from shardlab.milestones import engine_runs
from shardlab.milestones.launches import shared_folder, visible_folder
from shardlab.milestones.messages import farthest
from shardlab.milestones.saved_weights import saved_weights
from shardlab.run.experiment import program_of


def other_run(run_experiments):
    """Seven steps with another seed, without anybody's code; a checkpoint and the weights after step 3."""
    options = {"dropout": 0.2, "save_at": [3], "checkpoints": str(visible_folder() / "engine" / "other")}
    options |= {"weights_at": 3, "weights": str(shared_folder() / "other.pt")}
    other = experiment("other", "shardlab.milestones.engine_runs:train", 1, seed=41, options=options)
    return run_experiments([other], reference=True)["other"]


@pytest.mark.milestone(task="3.1", ranks=3)
def test_engine_of_three_ranks(lab, run_experiments):
    lab.initialize_deepspeed  # noqa: B018
    plan = experiment("three", f"{PROGRAMS}:initialize", 1, ranks=3, deepspeed=config(1, ranks=3, clipping=0.25), seed=8)
    got = run_experiments([plan])["three"].results
    assert (got["stage"], got["clipping"], got["workers"]) == (1, 0.25, 0) and not got["config_changed"]
    rows = [sorted(number for batch in share for number in batch) for share in got["seen"]]
    assert sorted(sum(rows, [])) == list(range(24)) and [len(share) for share in rows] == [8, 8, 8]


@pytest.mark.milestone(task="3.2", ranks=3)
def test_losses_of_three_ranks(lab, run_experiments):
    lab.DeepSpeedTrainer  # noqa: B018
    plan = experiment("steps", f"{PROGRAMS}:train_steps", 2, ranks=3, accumulation=2, steps=4, seed=12)
    got = run_experiments([plan])["steps"].results
    wanted = engine_runs.plain_losses(plan, program_of(f"{PROGRAMS}:padded_rows")(plan))
    assert farthest(got["losses"], wanted) <= 1e-5, (got["losses"], wanted)


@pytest.mark.milestone(task="3.3", ranks=3)
def test_epoch_without_accumulation_on_three_ranks(lab, run_experiments):
    lab.DeepSpeedTrainer  # noqa: B018
    got = run_experiments([experiment("single", f"{PROGRAMS}:train_epochs", 2, ranks=3, accumulation=1, steps=24, seed=6)])[
        "single"
    ].results

    def order(epoch: int) -> list[int]:
        return sampled(epoch, 0, 3)

    rows = {name: [n for batch in got[name]["seen"][0] for n in batch] for name in ("first", "second", "resumed")}
    assert rows == {"first": order(0), "second": order(1), "resumed": order(1)[4:]}
    assert [samples for _, samples, _ in got["first"]["told"]] == [6, 12, 18, 24]
    assert got["nothing_left"]["random_at_end"] == got["random_wanted"]


@pytest.mark.milestone(task="3.4", ranks=3)
def test_evaluation_on_three_ranks(lab, run_experiments):
    masked_rows = program_of(f"{PROGRAMS}:masked_rows")

    lab.DeepSpeedTrainer  # noqa: B018
    plan = experiment("three-evaluate", f"{PROGRAMS}:evaluate", 2, ranks=3, options={"dropout": 0.5}, seed=0, max_tokens=40)
    got = run_experiments([plan])["three-evaluate"].results
    wanted = engine_runs.mean_losses(masked_rows(plan))[0]
    assert all(abs(loss - wanted) < 1e-4 for losses in got["losses"] for loss in losses), (got["losses"], wanted)


@pytest.mark.milestone(task="3.5", ranks=3)
def test_checkpoint_of_three_ranks(lab, run_experiments):
    lab.DeepSpeedTrainer  # noqa: B018
    run = run_experiments([experiment("three-save", f"{PROGRAMS}:save", 1, ranks=3, seed=2)], timeout=60)["three-save"]
    folder = run.folder / "checkpoints" / "step-11"
    manifest = json.loads((folder / "complete.json").read_text())
    sizes = {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.name != "complete.json"}
    assert manifest["ranks"] == 3 and manifest["files"] == sizes and len(sizes) >= 4
    assert run.results["complete_at_first"] == [[False]] * 3


@pytest.mark.milestone(task="3.6")
def test_another_run_goes_on(lab, run_experiments):
    lab.DeepSpeedTrainer  # noqa: B018
    whole = other_run(run_experiments)
    options = {"dropout": 0.2, "checkpoints": str(visible_folder() / "engine" / "other"), "tag": "step-3", "broken": "step-9"}
    run = run_experiments([experiment("other-resumed", f"{PROGRAMS}:load", 1, seed=41, options=options)])["other-resumed"]
    assert run.results["position"]["global_steps"] == 3
    assert farthest(run.losses(), whole.losses()[3:]) <= 1e-5


@pytest.mark.milestone(task="3.7")
def test_other_broken_checkpoints(lab, tmp_path):
    folder = tmp_path / "step-123"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "x.pt").write_bytes(b"x" * 11)
    manifest = {"ranks": 5, "universal": False, "files": {"deep/er/x.pt": 11}}
    (folder / "complete.json").write_text(json.dumps(manifest))
    assert lab.check_checkpoint(folder, 5) == manifest
    with pytest.raises(ValueError, match="5"):
        lab.check_checkpoint(folder, 4)
    (folder / "deep" / "er" / "x.pt").write_bytes(b"x" * 12)
    with pytest.raises(ValueError, match="x.pt"):
        lab.check_checkpoint(folder, 5)


@pytest.mark.milestone(task="3.8")
def test_another_model_is_consolidated(lab, run_experiments, tmp_path):
    lab.consolidate  # noqa: B018
    other_run(run_experiments)
    lab.consolidate(visible_folder() / "engine" / "other" / "step-3", engine_runs.odd_model(), tmp_path / "model")
    found = saved_weights(tmp_path / "model", engine_runs.odd_model())
    weights = torch.load(shared_folder() / "other.pt", weights_only=True)
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


@pytest.mark.milestone(task="3.9", ranks=4)
def test_universal_checkpoint_of_another_step(lab, run_experiments, workspace):
    lab.convert_to_universal  # noqa: B018
    wanted = never_stopped(run_experiments)["stage3"].losses()[2]
    parent = workspace / "engine" / "universal-other"
    shutil.rmtree(parent, ignore_errors=True)
    folder = lab.convert_to_universal(checkpoints("stage3") / "step-2", parent)
    plan = experiment(
        "four",
        f"{PROGRAMS}:continue_universal",
        3,
        ranks=4,
        accumulation=1,
        deepspeed=config(3, ranks=4, accumulation=1, universal=True),
        steps=3,
        options={"load": str(folder), "save_at": [3]},
    )
    assert abs(run_experiments([plan])["four"].losses()[0] - wanted) <= 1e-5
