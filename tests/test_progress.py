"""What a launch says while it runs, where no screen can be redrawn."""

from shardlab.run.experiment import Experiment
from shardlab.run.progress import Row, Terminal
from shardlab.run.run_folder import Run


def test_a_log_file_says_what_goes_on_and_how_each_run_ended(tmp_path, capsys):
    run = Run.create(Experiment(name="a", method="ZeRO-2", steps=4), tmp_path)
    display = Terminal()
    assert not display.live
    display.heartbeat = 0.0
    display.begin([Row(run)])
    display.update()
    assert capsys.readouterr().out == "", "what waits says nothing"
    run.start()
    display.update()
    for step in (1, 4):
        run.log_step(step=step, steps=4, loss=2.5, samples_per_second=3.0)
        display.update()
    run.finish()
    display.end()
    display.update()
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "ZeRO-2: starting",
        "ZeRO-2: step 1/4, loss 2.500",
        "ZeRO-2: evaluating",
        "ZeRO-2: finished, 4/4 steps, loss 2.500, 3.0 samples/s",
    ]
