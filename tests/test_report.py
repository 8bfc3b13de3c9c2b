"""Tables and plots, from run folders alone."""

import pytest

from shardlab.run.experiment import Experiment
from shardlab.run.run_folder import Run
from shardlab.show import report
from shardlab.zero import memory_model
from shardlab.zero.engine_model import engine_bytes


def make_run(folder, name, *, deepspeed=None, steps=3, states=True):
    run = Run.create(Experiment(name=name, method=name, ranks=2, deepspeed=deepspeed), folder)
    run.start()
    for step in range(1, steps + 1):
        run.log_step(step=step, loss=3.0 / step, samples_per_second=10.0 * step, steps=steps)
    if states:
        held = {
            "parameters": 400,
            "gradients": 400,
            "optimizer": 800,
            "host_parameters": 0,
            "host_gradients": 0,
            "host_optimizer": 0,
        }
        run.write_states({"parameters": 100, "groups": [[100]], "ranks": [held, held | {"optimizer": 900}]})
    run.record(eval_losses=[8.0, 0.5], exact_match=62.5)
    run.finish()
    return Run.read(run.folder)


def test_summary_takes_the_rank_that_holds_most_and_the_memory_model(tmp_path):
    row = report.summary(make_run(tmp_path, "plain"))
    assert row["measured"] == 400 + 400 + 900
    assert row["predicted"] == memory_model.ddp_bytes(100).device
    assert (row["loss_before"], row["loss_after"], row["exact_match"]) == (8.0, 0.5, 62.5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_prediction_follows_the_stage_of_the_configuration(tmp_path, stage):
    run = make_run(tmp_path, "zero", deepspeed={"zero_optimization": {"stage": stage}})
    assert report.predicted_states(run) == engine_bytes(stage, [[100]], 2, precision="fp32")


def test_a_run_that_broke_off_has_its_row_and_breaks_no_plot(tmp_path):
    broken = make_run(tmp_path, "broken", steps=0, states=False)
    whole = make_run(tmp_path, "whole")
    page = report.write_report([broken, whole], tmp_path, "two runs").read_text()
    assert "broken" in page and "whole" in page
    assert (tmp_path / "report.png").stat().st_size > 0


def test_a_plot_that_would_say_nothing_is_left_out(tmp_path):
    def titles(*runs) -> list[str]:
        return [axis.get_title() for axis in report.plot(list(runs)).axes]

    one, other = make_run(tmp_path, "one"), make_run(tmp_path, "other")
    broken, uncounted = make_run(tmp_path, "broken", steps=0, states=False), make_run(tmp_path, "uncounted", states=False)
    loss, held, speed = "Training loss", "Model states held by one rank", "Throughput over all ranks"
    assert titles(one, other) == [loss, held, speed]
    assert titles(one) == [loss, held], "the samples/s of one run are in its table"
    assert titles(uncounted) == [loss]
    assert titles(broken) == []


def test_text_of_a_run_cannot_break_the_page(tmp_path):
    run = Run.create(Experiment(name="odd", method="<script>alert(1)</script>"), tmp_path)
    run.start()
    run.finish()
    page = report.write_report([Run.read(run.folder)], tmp_path, "<b>title</b>").read_text()
    assert "<script>" not in page and "<b>title" not in page


def test_columns_that_say_nothing_are_left_out(tmp_path):
    run = make_run(tmp_path, "plain")
    assert "EM before" not in report.html_table([run])
    assert "EM after" in report.html_table([run])
