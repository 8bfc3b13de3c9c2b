"""What a failing milestone says: where values differ, what is wrong with a file, and no cause that is not known."""

import functools
import gc
import itertools
import json
import logging
import os
import signal
import types
import warnings

import pytest
import torch

from shardlab.course.authoring import AuthoringError, skeleton_of
from shardlab.course.matrix import mutants
from shardlab.hardware import ROOT
from shardlab.labs import LabError, catalogue, named, stems
from shardlab.milestones.grade import grade
from shardlab.milestones.messages import MilestoneFailed, fingerprint, known_mistakes, require, require_equal, require_error
from shardlab.sandbox.calls import CallAtFault, WatchedModule, is_exercise, watched
from shardlab.sandbox.wire import described, rebuilt

STEM = stems()[0]
"""The first lab, whose first task needs no ranks."""


@pytest.mark.parametrize(
    "wanted, got, says",
    [
        ("Answer:", "Answer: ", "differs   in white space alone: at character 7, ' ' for ''"),
        ("a\nb", "a b", "in white space alone: at character 1, ' ' for '\\n'"),
        ("abc", "abcd", "at its end: 'd' too much"),
        ("abcd", "ab", "at its end: 'cd' is missing"),
        ("x" * 500 + "a" + "y" * 500, "x" * 500 + "b" + "y" * 500, "from character 500 on"),
        ({"a": 1, "b": 2}, {"a": 1, "c": 2}, "without the key 'b'; with the key 'c' more"),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}, "at 'a', at 'b', at place 1: 3 for 2"),
        ([1, 2, 3], [1, 2], "in length: 2 for 3"),
        ([1, 2], (1, 2), "a tuple for a list"),
        (1, True, "in type: bool for int"),
        ("1", 1, "in type: int for str"),
        (2, None, "in type: NoneType for int"),
    ],
)
def test_the_place_where_two_values_differ_is_said(wanted, got, says):
    with pytest.raises(MilestoneFailed) as failed:
        require_equal(got, wanted, of="made(3)")
    text = str(failed.value)
    assert says in text and "of        made(3)" in text and "likely" not in text
    assert len(text) < 1400, "long values are shown around the place where they differ"


def test_long_values_are_shown_where_they_differ():
    wanted = list(range(1000))
    with pytest.raises(MilestoneFailed) as failed:
        require_equal([*wanted[:700], -5, *wanted[701:]], wanted, of="it()")
    assert "-5" in str(failed.value) and "700" in str(failed.value) and "at place 700" in str(failed.value)


@pytest.mark.parametrize("got, wanted", [(2.0, 2), ({"a": 1}, {"a": 1.0}), ("a", "a"), ([], [])])
def test_equal_values_pass(got, wanted):
    require_equal(got, wanted, of="it()")


def test_a_cause_is_said_only_where_there_is_one():
    with pytest.raises(MilestoneFailed) as failed:
        require(False, expected="four", got=5)
    assert str(failed.value) == "expected  four\ngot       5"
    with pytest.raises(MilestoneFailed) as failed:
        require(False, expected="four", got=5, likely="a slip", log="node2: out of memory")
    assert str(failed.value) == "expected  four\ngot       5\nlog       node2: out of memory\nlikely    a slip"


# --- known mistakes ---------------------------------------------------------------------------------------------------


def test_a_fingerprint_is_of_the_result_and_not_of_the_machine():
    def mark(text: str) -> str:
        return fingerprint("1.2", "test_it", text)

    assert mark("12 bytes in /tmp/a/config.json") == mark("12 bytes in /home/b c/x/config.json".replace("b c", "b"))
    assert mark("loss 7.123456") == mark("loss 7.123461") != mark("loss 7.13")
    assert mark("1234567 bytes") != mark("1234568 bytes")
    assert mark("a") != fingerprint("1.3", "test_it", "a") != fingerprint("1.3", "test_other", "a")


@pytest.mark.parametrize("stem", stems())
def test_what_is_said_of_known_mistakes_is_what_mutants_say(stem):
    said = set(known_mistakes(named(stem).mistakes).values())
    assert said == {mutant.likely for mutant in mutants(stem) if mutant.likely}, f"shardlab matrix {stem} --record"
    assert all(mutant.likely or mutant.says for mutant in mutants(stem))


# --- the file ---------------------------------------------------------------------------------------------------------


def outcome(tmp_path, source: str | bytes | None) -> str:
    """The message of the lab's first task for a file with this source; None for no file."""
    package = tmp_path / "exercises"
    package.mkdir()
    (package / "__init__.py").touch()
    if source is not None:
        (package / f"{STEM}.py").write_bytes(source if isinstance(source, bytes) else source.encode())
    (milestone,) = grade(STEM, exercises=tmp_path, task="1.1")
    assert milestone.verdict == "failed"
    return milestone.message


SOLUTION = named(STEM).solution.read_text()
FIRST = '    return f"Question: {question.strip()} Context: {context.strip()} Answer:"\n'


@pytest.mark.parametrize(
    "source, says",
    [
        (SOLUTION.replace(FIRST, "    return (question\n"), ("SyntaxError, line", "'(' was never closed", "return (question")),
        (SOLUTION.replace(FIRST, "   return 1\n"), ("IndentationError, line", "return 1")),
        (None, (f"a file {STEM}.py", "none there", f"skeleton {STEM}")),
        (b"x = '\xff'\n", (f"{STEM}.py to be Python", "line 1")),
        (SOLUTION.replace("import csv\n", "import torch_geo\n"), ("ModuleNotFoundError", "torch_geo", ": import torch_geo")),
        (SOLUTION.replace("import csv\n", "import csv\n1 / 0\n"), ("to be imported", "ZeroDivisionError", ": 1 / 0")),
        (SOLUTION.replace("def format_prompt", "def form_prompt"), ("a function format_prompt()", f"skeleton {STEM}")),
        (SOLUTION.replace(FIRST, FIRST.replace("return", "text =")), ("format_prompt() to return", "None", "`return` is missing")),
        (SOLUTION.replace(FIRST, "    return question.nothing\n"), ("AttributeError", "at        ", "return question.nothing")),
    ],
    ids=["syntax", "indentation", "no file", "not UTF-8", "import", "raises", "renamed", "no return", "error"],
)
def test_what_is_wrong_with_a_file_is_said_as_that(tmp_path, source, says):
    message = outcome(tmp_path, source)
    assert all(part in message for part in says), message
    assert message.startswith("expected  ") and "of another form" not in message
    assert message.splitlines()[-1].startswith("read      ")


# --- calls ------------------------------------------------------------------------------------------------------------


def test_changed_arguments_are_a_fault():
    def pad(rows: list) -> list:
        rows[0]["ids"].append(0)
        return rows

    with pytest.raises(CallAtFault, match="pad\\(\\) to leave what it is given .*\n.*argument number 1 was changed from"):
        watched(pad)([{"ids": [1]}])
    with pytest.raises(CallAtFault, match="rows was changed"):
        watched(pad)(rows=[{"ids": [1]}])
    assert watched(lambda rows: [*rows, 1])([2]) == [2, 1]

    def refuse(config: dict) -> None:
        config.pop("stage")
        raise ValueError("refused")

    with pytest.raises(CallAtFault, match="argument number 1 was changed from"):
        watched(refuse)({"stage": 3})


def test_an_error_names_the_call_that_it_came_of():
    def fits(sizes: list, limit: int) -> bool:
        raise IndexError("list index out of range")

    with pytest.raises(IndexError) as raised:
        watched(fits)([1] * 500, limit=7)
    assert (
        raised.value.exercise_call.startswith("fits([1, 1, ")
        and raised.value.exercise_call.endswith("limit=7)")
        and len(raised.value.exercise_call) < 250
    )
    assert rebuilt(described(raised.value)).exercise_call == raised.value.exercise_call, "out of a box too"


def test_an_error_that_takes_no_attributes_is_still_told():
    class Stubborn(ValueError):
        def __setattr__(self, name, value):
            raise RuntimeError("no")

        @property
        def exercise_call(self):
            raise RuntimeError("no")

    def fails() -> None:
        raise Stubborn("so it is")

    with pytest.raises(Stubborn) as raised:
        watched(fails)()
    assert str(rebuilt(described(raised.value))) == "so it is"


def test_a_changed_setting_of_a_tokenizer_or_model_is_a_fault():
    from shardlab.data.models import load_model, load_tokenizer

    def shorten(tokenizer) -> int:
        tokenizer.model_max_length = 7
        return 1

    def sample(model) -> int:
        model.generation_config.do_sample = True
        return 1

    with pytest.raises(CallAtFault, match="changed at 'model_max_length', from .* to '7'"):
        watched(shorten)(load_tokenizer())

    def freeze(model) -> int:
        model.transformer.ln_f.weight.requires_grad_(False)
        return 1

    with pytest.raises(CallAtFault, match="changed at 'generation_config.do_sample'"):
        watched(sample)(load_model())
    with pytest.raises(CallAtFault, match="changed at 'requires_grad of transformer.ln_f.weight'"):
        watched(freeze)(load_model())


def test_a_changed_part_of_a_trainer_is_a_fault(tmp_path):
    from transformers import Trainer, TrainingArguments

    from shardlab.data.models import load_model

    def set_on(trainer, **parts) -> int:
        for name, value in parts.items():
            setattr(trainer, name, value)
        return 1

    def train_less(trainer) -> int:
        trainer.args.max_steps = 1
        return 1

    trainer = Trainer(load_model(), TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"))
    assert watched(set_on)(trainer) == 1
    with pytest.raises(CallAtFault, match="changed at 'data_collator'"):
        watched(set_on)(trainer, data_collator=list)
    with pytest.raises(CallAtFault, match="changed at 'args.max_steps', from '-1' to '1'"):
        watched(train_less)(trainer)


@pytest.mark.parametrize(
    "name, change",
    [
        ("whether torch records gradients", lambda: torch.set_grad_enabled(False)),
        ("torch's default type", lambda: torch.set_default_dtype(torch.float64)),
        ("torch's default device", lambda: torch.set_default_device("meta")),
        ("whether torch's algorithms are deterministic", lambda: torch.use_deterministic_algorithms(True)),
        ("torch's number of threads", lambda: torch.set_num_threads(torch.get_num_threads() + 1)),
        ("whether garbage is collected", gc.disable),
        ("the current folder", lambda: os.chdir("/")),
        ("which kinds of warnings are hidden", lambda: warnings.simplefilter("ignore", BytesWarning)),
        ("the level below which nothing is logged", lambda: logging.disable(logging.CRITICAL)),
        ("what SIGINT does", lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)),
        (r"\$SHARDLAB_NEW", lambda: os.environ.update(SHARDLAB_NEW="1")),
        (r"\$PATH", lambda: os.environ.pop("PATH")),
    ],
)
def test_a_changed_setting_of_the_process_is_a_fault(name, change):
    def set_it() -> None:
        change()

    handler, disabled = signal.getsignal(signal.SIGINT), logging.root.manager.disable
    with warnings.catch_warnings():
        with pytest.raises(CallAtFault, match=f"whole process as they were.*\ngot       {name} changed from "):
            watched(set_it)()
    signal.signal(signal.SIGINT, handler)
    logging.disable(disabled)
    assert torch.is_grad_enabled() and gc.isenabled() and os.environ["PATH"] and "SHARDLAB_NEW" not in os.environ
    assert torch.get_default_dtype() == torch.float32 and os.getcwd() != "/" and torch.zeros(1).device.type == "cpu"


def test_exercises_on_a_rank_are_looked_at_too():
    class Trainer:
        def step(self, rows: list) -> int:
            rows.append(1)
            return len(rows)

        @property
        def at(self) -> int:
            return 3

    module = types.ModuleType("exercises.some_lab")
    module.Trainer, module.KINDS, Trainer.__module__ = Trainer, ("a", "b"), module.__name__
    module.shared = lambda: module.KINDS
    looked_at = WatchedModule(module)
    assert looked_at.KINDS == ("a", "b") and looked_at.shared() == ("a", "b") and looked_at.Trainer().at == 3
    with pytest.raises(CallAtFault, match=r"step\(\) to leave what it is given as it was"):
        looked_at.Trainer().step([0])
    assert issubclass(type(looked_at.Trainer()), Trainer)


def test_a_number_in_an_error_stands_by_itself():
    def says(text: str):
        def call():
            raise ValueError(text)

        return call

    for text in ("stage 13", "stage 3.5", "stage 30"):
        with pytest.raises(MilestoneFailed, match="in a sentence that names '3'"):
            require_error(says(text), ValueError, mentions=("3",), expected="ValueError")
    for text in ("stage 3", "stage 3.", "stage3: no", "(2, 3)"):
        require_error(says(text), ValueError, mentions=("3",), expected="ValueError")


def test_a_result_that_is_shared_is_a_fault():
    kept, tensor = {"lr": 1}, torch.zeros(3)
    assert watched(lambda: kept)() is kept, "one call alone cannot tell"
    for shared in (lambda: kept, lambda: {"optimizer": kept}, lambda: [tensor], lambda: {"row": tensor[:2]}):
        call = watched(shared)
        call()
        with pytest.raises(CallAtFault, match="return something new at each call"):
            call()
    with pytest.raises(CallAtFault, match="a dictionary of its own at each place"):
        watched(lambda: dict.fromkeys(("bf16", "fp16"), {"enabled": "auto"}))()
    with pytest.raises(CallAtFault, match="a tensor of its own at each place"):
        watched(lambda: dict.fromkeys(("input_ids", "labels"), torch.zeros(3)))()
    ring = itertools.cycle([torch.zeros(3) for _ in range(8)])
    in_turn = watched(lambda: {"ids": next(ring)})
    assert len([in_turn() for _ in range(8)]) == 8
    with pytest.raises(CallAtFault, match="something new at each call"):
        in_turn()
    for fine in (lambda: [{"lr": 1}, {"lr": 1}], lambda: {"rows": ("a", "b")}, lambda: "text", lambda: torch.zeros(3)):
        assert all(watched(fine)() is not None for _ in range(5))
    rows = [[1]]
    assert all(watched(lambda given: given)(rows) is rows for _ in range(3)), "what was given may come back"


def test_a_function_that_is_an_object_is_looked_at_too():
    for made in (functools.cache(lambda: [1]), functools.partial(lambda kept: kept, [1])):
        assert is_exercise(made)
        call = watched(made)
        call()
        with pytest.raises(CallAtFault, match="something new at each call"):
            call()
    assert not is_exercise(dict) and not is_exercise(3)


def test_nothing_returned_is_a_fault_where_something_was_promised():
    def promises(x: int) -> int:
        pass

    def promises_nothing(x: int) -> None:
        pass

    def perhaps(x: int) -> "int | None":
        pass

    with pytest.raises(CallAtFault, match="`return` is missing"):
        watched(promises)(1)
    assert watched(promises_nothing)(1) is watched(perhaps)(1) is watched(lambda x: None)(1) is None
    with pytest.raises(MilestoneFailed, match="no error; it returned None"):
        require_error(lambda: watched(promises)(1), ValueError, expected="ValueError")


# --- skeletons --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lab", catalogue(), ids=lambda lab: lab.stem)
def test_a_skeleton_can_be_had_again(lab):
    whole = skeleton_of(str(lab.number))
    assert whole == lab.exercises.read_text() == skeleton_of(lab.stem)
    for task in {mutant.task for mutant in mutants(lab.stem)}:
        part = skeleton_of(task)
        assert f"Task {task}: complete" in part and part.strip() in whole


def test_a_task_that_is_not_there_is_said():
    with pytest.raises(AuthoringError, match="has no task 1.77; it has 1.1, 1.2"):
        skeleton_of("1.77")
    with pytest.raises(LabError, match="there is no lab '77'"):
        skeleton_of("77.1")


def test_mistakes_are_no_answers():
    """What a release holds of the mutants are hashes and sentences."""
    for lab in catalogue():
        found = json.loads((ROOT / "labs" / lab.stem / "mistakes.json").read_text())
        assert all(len(mark) == 16 and int(mark, 16) >= 0 for mark in found)
