"""Milestones of lab 02. DeepSpeed itself is the judge: of configurations, of losses, and of the bytes that ranks hold."""

import copy
import json
import re
from types import SimpleNamespace

import pytest

from shardlab.hardware import gpu_count
from shardlab.milestones import small_runs
from shardlab.milestones.agreement import agree_as_recorded
from shardlab.milestones.engine_runs import odd_model
from shardlab.milestones.messages import farthest, require, require_equal, require_error
from shardlab.milestones.small_runs import zero_config
from shardlab.run.experiment import Experiment
from shardlab.run.run_folder import Run


def text_experiment(name: str, **changes) -> Experiment:
    settings = {"steps": 4, "max_tokens": 48, "train_examples": 64, "clipping": 1.0}
    return small_runs.text_experiment(name, **(settings | changes))


def stage_runs(run_experiments) -> dict[str, Run]:
    """DDP and stages 0 to 3, two ranks; fp32, and stages 1 to 3 in bf16 too."""
    experiments = [text_experiment("ddp")]
    experiments += [text_experiment(f"zero{stage}", deepspeed=zero_config(stage)) for stage in range(4)]
    experiments += [
        text_experiment(f"bf16-zero{stage}", deepspeed=zero_config(stage, precision="bf16"), precision="bf16", steps=2)
        for stage in (1, 2, 3)
    ]
    return run_experiments(experiments, reference=True)


@pytest.fixture
def judge(monkeypatch):
    """DeepSpeed's own check of a configuration, for two ranks."""
    monkeypatch.setenv("DS_ACCELERATOR", "cuda" if gpu_count() else "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    # It asks for a process group first, and takes the world for one rank if there is none.
    monkeypatch.setattr("deepspeed.runtime.config.dist.get_rank", lambda: 0)
    ranks = SimpleNamespace(get_data_parallel_world_size=lambda: 2)

    def check(config: dict):
        return DeepSpeedConfig(copy.deepcopy(config), mpu=ranks)

    return check


@pytest.mark.milestone(task="2.1", points=15, section="The configuration")
def test_configuration_is_what_deepspeed_reads(lab, judge):
    create = lab.create_deepspeed_config
    for stage in range(4):
        config = create(
            stage,
            micro_batch=3,
            accumulation=2,
            world_size=2,
            precision="fp32",
            optimizer="AdamW",
            learning_rate=1e-4,
            clipping=0.5,
        )
        try:
            seen = judge(config)
        except Exception as error:
            require(
                False,
                expected=f"a configuration for stage {stage} that DeepSpeedConfig accepts",
                got=f"{type(error).__name__}: {error}",
            )
        got = (
            seen.zero_optimization_stage,
            seen.train_micro_batch_size_per_gpu,
            seen.gradient_accumulation_steps,
            seen.train_batch_size,
        )
        require(
            got == (stage, 3, 2, 12),
            expected=f"stage {stage}, micro-batch 3, accumulation 2, global batch 3 × 2 × 2 ranks = 12",
            got=got,
        )
        require(
            config.get("gradient_clipping") == 0.5,
            expected="gradient_clipping: 0.5",
            got=config.get("gradient_clipping", "no such key"),
        )
        require(
            seen.optimizer_name == "adamw" and seen.optimizer_params == {"lr": 1e-4, "torch_adam": True},
            expected="optimizer AdamW with just lr 0.0001 and torch_adam where a learning rate is given",
            got=f"as DeepSpeed reads it: {seen.optimizer_name} {seen.optimizer_params}",
        )
        require(
            not seen.float16_config.enabled and not seen.bfloat16_config.enabled,
            expected="neither fp16 nor bf16 for precision fp32",
            got=f"fp16 {config['fp16']}, bf16 {config['bf16']}",
        )
    for precision, enabled in (("bf16", (True, False)), ("fp16", (False, True)), ("auto", ("auto", "auto"))):
        config = create(2, precision=precision)
        got = (config["bf16"]["enabled"], config["fp16"]["enabled"])
        require(
            got == enabled,
            expected=f"bf16, fp16 = {enabled} for precision '{precision}'",
            got=got,
        )
    require(
        judge(
            create(3, micro_batch=1, accumulation=1, world_size=2, precision="bf16")
        ).zero_config.gather_16bit_weights_on_model_save,
        expected="stage3_gather_16bit_weights_on_model_save: True in stage 3",
        got="not set",
    )
    off = {"enabled": False}
    for words, arguments, wanted in (
        (
            "nothing said but micro_batch=4",
            {"stage": 2, "micro_batch": 4},
            {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": "auto", "train_batch_size": "auto"}
            | {
                "gradient_clipping": 1.0,
                "bf16": {"enabled": "auto"},
                "fp16": {"enabled": "auto"},
                "zero_optimization": {"stage": 2},
            },
        ),
        (
            "clipping 0.0, which turns it off, and a world size that is not known",
            {"stage": 1, "micro_batch": 2, "accumulation": 2, "precision": "fp32", "clipping": 0.0},
            {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "train_batch_size": "auto"}
            | {"gradient_clipping": 0.0, "bf16": off, "fp16": off, "zero_optimization": {"stage": 1}},
        ),
        (
            "clipping 'auto', and DeepSpeed's optimizer under Trainer",
            {"stage": 0, "precision": "fp32", "clipping": "auto", "optimizer": "AdamW"},
            {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "train_batch_size": "auto"}
            | {"gradient_clipping": "auto", "bf16": off, "fp16": off, "zero_optimization": {"stage": 0}}
            | {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}}},
        ),
        (
            "offload of the optimizer",
            {"stage": 2, "precision": "fp32", "offload_optimizer": True},
            {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "train_batch_size": "auto"}
            | {"gradient_clipping": 1.0, "bf16": off, "fp16": off}
            | {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}}}
            | {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}}},
        ),
        (
            "offload of both, with DeepSpeed's learning rate",
            {"stage": 3, "precision": "bf16", "offload_optimizer": True, "offload_param": True, "learning_rate": 1e-3},
            {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "train_batch_size": "auto"}
            | {"gradient_clipping": 1.0, "bf16": {"enabled": True}, "fp16": off}
            | {
                "zero_optimization": {
                    "stage": 3,
                    "offload_optimizer": {"device": "cpu", "pin_memory": True},
                    "offload_param": {"device": "cpu", "pin_memory": True},
                    "stage3_gather_16bit_weights_on_model_save": True,
                }
            }
            | {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
        ),
    ):
        require_equal(create(**arguments), wanted, of=f"create_deepspeed_config(**{arguments}): {words}")
    offload = create(
        3,
        micro_batch=1,
        accumulation=1,
        world_size=2,
        precision="bf16",
        learning_rate=1e-4,
        offload_optimizer=True,
        offload_param=True,
    )
    zero = judge(offload).zero_config
    require(
        zero.offload_optimizer is not None
        and zero.offload_param is not None
        and getattr(zero.offload_param.device, "value", zero.offload_param.device) == "cpu"
        and zero.offload_param.pin_memory,
        expected="offload_optimizer and offload_param to the CPU, pinned",
        got=offload["zero_optimization"],
    )
    require(
        offload.get("optimizer", {}).get("params") == {"lr": 1e-4},
        expected="an optimizer of DeepSpeed's with lr 0.0001, and without torch_adam: it steps on the host",
        got=offload.get("optimizer", "none"),
    )
    for arguments, names in (
        ({"stage": 4}, ("stage", "4")),
        ({"stage": -1}, ("stage", "-1")),
        ({"stage": "2"}, ("stage", "2")),
        ({"stage": True}, ("stage", "True")),
        ({"stage": 1, "micro_batch": True}, ("micro_batch", "True")),
        ({"stage": 1, "micro_batch": 0}, ("micro_batch", "0")),
        ({"stage": 1, "micro_batch": "8"}, ("micro_batch", "8")),
        ({"stage": 1, "accumulation": 1.5}, ("accumulation", "1.5")),
        ({"stage": 1, "accumulation": -7}, ("accumulation", "-7")),
        ({"stage": 1, "world_size": 0}, ("world_size", "0")),
        ({"stage": 1, "world_size": "all"}, ("world_size", "all")),
        ({"stage": 1, "precision": "fp8"}, ("precision", "fp8")),
        ({"stage": 1, "clipping": -1.5}, ("clipping", "-1.5")),
        ({"stage": 2, "offload_param": True}, ("offload_param", "stage 3")),
        ({"stage": 0, "offload_optimizer": True}, ("offload_optimizer", "stage", "1", "2", "3")),
    ):
        require_error(
            lambda arguments=arguments: create(**arguments),
            ValueError,
            mentions=names,
            expected=f"ValueError for create_deepspeed_config(**{arguments})",
        )
    given = {"stage": 2, "micro_batch": 3, "optimizer": "AdamW", "learning_rate": 2.5e-7, "clipping": 5.0}
    rate = create(**given)["optimizer"]["params"]["lr"]
    require_equal(rate, 2.5e-7, of=f"the learning rate of create_deepspeed_config(**{given})")
    agree_as_recorded(created(lab), __file__, "2.1", "create_deepspeed_config(**…) of {}")


def created(of):
    """As JSON, where True is not 1."""
    return lambda given: json.dumps(of.create_deepspeed_config(**given), sort_keys=True)


SIZED = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
"""Batch sizes for two ranks: DeepSpeed wants some."""


NESTED: dict = {"lr": "1e-4"}
for _ in range(60):
    NESTED = {"a": NESTED}


def zero(stage, **more) -> dict:
    return SIZED | {"zero_optimization": {"stage": stage} | more}


BAD = [
    ("'auto' without Trainer", {"train_batch_size": "auto"}, False, "train_batch_size"),
    ("'auto' deep inside, without Trainer", zero(3, reduce_bucket_size="auto"), False, "reduce_bucket_size"),
    (
        "'auto' in a list, without Trainer",
        SIZED | {"optimizer": {"type": "AdamW", "params": {"betas": ["auto", 0.9]}}},
        False,
        "betas",
    ),
    ("an unknown key", SIZED | {"zero_optimisation": {"stage": 2}}, True, "zero_optimisation"),
    ("stage 4", zero(4), True, "stage"),
    ("stage '3', a text", zero("3"), True, "stage"),
    ("stage true", zero(True), True, "stage"),
    ("zero_optimization: true", SIZED | {"zero_optimization": True}, True, "zero_optimization"),
    ("zero_optimization: null", SIZED | {"zero_optimization": None}, True, "zero_optimization"),
    ("zero_optimization: a list", SIZED | {"zero_optimization": []}, True, "zero_optimization"),
    ("fp16 with bf16", SIZED | {"fp16": {"enabled": True}, "bf16": {"enabled": True}}, True, "fp16"),
    ("batch sizes that do not multiply for 2 ranks", SIZED | {"train_batch_size": 8}, True, "train_batch"),
    ("an unknown key within zero_optimization", zero(2, reduce_bucket_sise=5e8), True, "reduce_bucket_sise"),
    ("fp16 that is no object", SIZED | {"fp16": True}, True, "fp16"),
    ("a number as text", SIZED | {"gradient_accumulation_steps": "2"}, True, "gradient_accumulation_steps"),
    ("a number as text", zero(2, reduce_bucket_size="5e8"), True, "reduce_bucket_size"),
    ("a boolean as text", SIZED | {"bf16": {"enabled": "true"}}, True, "enabled"),
    ("a boolean as text", SIZED | {"wall_clock_breakdown": "FALSE"}, True, "wall_clock_breakdown"),
    ("a number as text in a list", SIZED | {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, "0.95"]}}}, True, "betas"),
    ("offload_param at stage 2", zero(2, offload_param={"device": "cpu"}), True, "offload_param"),
    ("offload_param at stage 2", zero(2, offload_param={"device": "nvme", "nvme_path": "/scratch"}), True, "offload_param"),
    ("nvme without a path", zero(3, offload_param={"device": "nvme"}), True, "nvme_path"),
    ("nvme without a path", zero(3, offload_optimizer={"device": "nvme"}), True, "nvme_path"),
    ("nvme with an empty path", zero(3, offload_optimizer={"device": "nvme", "nvme_path": ""}), True, "nvme_path"),
    *(
        (f"nvme at stage {stage}", zero(stage, offload_optimizer={"device": "nvme", "nvme_path": "/scratch"}), True, "offload_optimizer")
        for stage in (0, 1, 2)
    ),
    ("nvme with a path that is null", zero(3, offload_param={"device": "nvme", "nvme_path": None}), True, "nvme_path"),
    *((f"the key {key}", SIZED | {key: 0.1}, True, key) for key in ("learning_rate", "epochs", "amp", "$schema", "//", "seed")),
    ("a boolean as text", SIZED | {"tensorboard": {"enabled": "true"}}, True, "enabled"),
    ("a number as text", SIZED | {"wandb": {"enabled": False, "project": "08"}}, True, "project"),
    ("a number as text", zero(2, reduce_bucket_size="08"), True, "reduce_bucket_size"),
    ("a number as text, deep inside", SIZED | {"optimizer": {"type": "AdamW", "params": NESTED}}, True, "lr"),
    ("nvme_path in the wrong place", zero(3, nvme_path="/scratch", offload_optimizer={"device": "nvme"}), True, "nvme_path"),
]
GOOD = [
    (zero(0), False),
    (
        {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": "auto",
            "fp16": {"enabled": "auto"},
            "bf16": {"enabled": "auto"},
        },
        True,
    ),
    (zero(2, offload_param={"device": "none"}) | {"fp16": {"enabled": False}, "bf16": {"enabled": True}}, False),
    (zero(3, offload_param=None, offload_optimizer={"pin_memory": True}), True),
    (zero(3, offload_optimizer={"device": "nvme", "nvme_path": "/scratch"}, offload_param={"device": "cpu"}), True),
    (SIZED | {"bfloat16": {"enabled": True}}, True),
]


@pytest.mark.milestone(task="2.2", points=15, section="What DeepSpeed lets through")
def test_bad_configurations_are_refused(lab):
    for words, config, with_trainer, name in BAD:
        require_error(
            lambda: lab.check_deepspeed_config(copy.deepcopy(config), world_size=2, with_trainer=with_trainer),
            ValueError,
            mentions=(name,),
            expected=f"ValueError for {words}: {json.dumps(config)}",
        )
    # Texts that begin like numbers: a date, a version.
    named = {"tensorboard": {"job_name": "2026-01-31"}, "wandb": {"project": "1.2.0"}}
    for config, with_trainer in [*GOOD, *((SIZED | {key: value}, True) for key, value in named.items())]:
        try:
            lab.check_deepspeed_config(copy.deepcopy(config), world_size=2, with_trainer=with_trainer)
        except ValueError as error:
            require(
                False,
                expected=f"no error for {json.dumps(config)}",
                got=f"ValueError: {error}",
            )
    trained = zero(3, reduce_bucket_size="auto")
    try:
        lab.check_deepspeed_config(copy.deepcopy(trained), world_size=2)
    except ValueError as error:
        require(
            False,
            expected=f"with_trainer to be True where it is not given: no error for {json.dumps(trained)}",
            got=f"ValueError: {error}",
        )
    agree_as_recorded(verdict(lab), __file__, "2.2", "check_deepspeed_config{}, of (config, world_size, with_trainer)")


def verdict(of):
    """Whether a configuration is refused."""

    def refused(config: dict, world_size: int, with_trainer: bool) -> bool:
        try:
            of.check_deepspeed_config(config, world_size=world_size, with_trainer=with_trainer)
        except ValueError:
            return True
        return False

    return refused


@pytest.mark.milestone(task="2.3", points=5)
def test_configuration_survives_a_file(lab, tmp_path):
    config = {
        "zero_optimization": {"stage": 3, "overlap_comm": True, "sub_group_size": 1e9},
        "gradient_clipping": 1.0,
        "fp16": {"enabled": False},
    }
    path = tmp_path / "config.json"
    lab.save_config(config, path)
    text = path.read_text()
    try:
        read_back = json.loads(text)
    except json.JSONDecodeError as error:
        require(
            False,
            expected="a JSON file",
            got=f"{text[:80]} … ({error})",
        )
    require(
        read_back == config,
        expected="the configuration back from the file",
        got=read_back,
    )
    require(
        len(text.splitlines()) > 5 and text.endswith("}\n"),
        expected="indented lines and a newline at the end",
        got=repr(text[:60]),
    )
    require(
        lab.load_config(path) == config,
        expected="load_config to give what save_config was given",
        got=lab.load_config(path),
    )
    path.write_text('{"gradient_clipping": 1.0}', encoding="utf-8-sig")
    require_equal(lab.load_config(path), {"gradient_clipping": 1.0}, of="load_config() of a file with a byte-order mark")
    for broken, names in (
        ('{"zero_optimization": {"stage": 3}', ("config.json",)),
        ("[1, 2]", ("config.json",)),
        ('{"bf16": {"enabled": true}, "bf16": {"enabled": false}}', ("config.json", "bf16")),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', ("config.json", "stage")),
        *(
            (text, ("config.json", "only DeepSpeed reads it", "Trainer"))
            for text in (
                '{"zero_optimization": {"stage": 3,}}',
                '{\n  // per GPU\n  "train_micro_batch_size_per_gpu": 4\n}',
                "{zero_optimization: {stage: 3}}",
                "gradient_clipping: 1.0",
                "{'gradient_clipping': 1.0}",
            )
        ),
        ('{ // a note\n"zero_optimization": {"stage": 2, "stage": 3}}', ("config.json", "stage")),
    ):
        path.write_text(broken)
        require_error(
            lambda: lab.load_config(path),
            ValueError,
            mentions=names,
            expected=f"ValueError for {broken}",
        )
    for neither in (
        *('{"zero_optimization": {"stage": 3}', '{"zero_optimization": {"stage": 3}}}', '{"a": [1, 2}'),
        *("[1, 2,]", '[{"stage": 3}, # a list\n]', '{"a": 1, // x', '{"zero_optimization": {"stage": 3,} # y', '["a", // b\n{}]'),
    ):
        path.write_text(neither)
        with pytest.raises(ValueError) as refused:
            lab.load_config(path)
        require(
            "DeepSpeed" not in str(refused.value) and "Trainer" not in str(refused.value),
            expected=f"neither DeepSpeed nor Trainer named for {neither!r}: hjson.loads gives no object either, so neither reads it",
            got=str(refused.value),
        )
    path.write_text('{"stage": 2, "overlap_comm": true, "stage": 3, "gradient_clipping": 1.0}')
    with pytest.raises(ValueError) as refused:
        lab.load_config(path)
    require(
        "stage" in str(refused.value)
        and "overlap_comm" not in str(refused.value)
        and "gradient_clipping" not in str(refused.value),
        expected="the key that is given twice, stage, and no other",
        got=str(refused.value),
    )
    as_written = {"//": "a note", "nvme_path": "$HOME/nvme", "project": "a\ufeffb", "#": None}
    path.write_text(json.dumps(as_written, ensure_ascii=False), encoding="utf-8-sig")
    require_equal(lab.load_config(path), as_written, of=f"load_config() of a file with {as_written!a}: each key and text as it is")
    other = tmp_path / "zero2.fp16"
    lab.save_config(config, other)
    require(
        other.exists(), expected="the file with the name that was given, zero2.fp16", got=sorted(p.name for p in tmp_path.iterdir())
    )
    require_equal(lab.load_config(str(other)), config, of="load_config() of zero2.fp16")
    path.write_bytes('{"nvme_path": "/données"}'.encode("latin-1"))
    require_error(
        lambda: lab.load_config(path),
        ValueError,
        mentions=("config.json",),
        expected="ValueError that names the file, for a file in Latin-1, where JSON is UTF-8: /données would be another folder",
    )
    for encoding in ("utf-16", "utf-32"):
        path.write_bytes('{"gradient_clipping": 1.0}'.encode(encoding))
        require_error(
            lambda: lab.load_config(path),
            ValueError,
            mentions=("config.json",),
            expected=f"ValueError for a file in {encoding.upper()}",
        )
    for space in ("\u00a0", "\f", "\u2003"):
        path.write_text(f'{{"gradient_clipping": 1.0}}{space}', encoding="utf-8")
        require_error(
            lambda: lab.load_config(path),
            ValueError,
            mentions=("config.json",),
            expected=f"ValueError for a file that ends in {space!a}, which is no white space of JSON's",
        )
    agree_as_recorded(
        saved(lab, tmp_path), __file__, "2.3 save", "save_config{}, over a file that is there: is it JSON, indented by two"
    )
    agree_as_recorded(
        loaded(lab, tmp_path), __file__, "2.3 load", "load_config() of a file with the text {}; None: there is no file"
    )


def saved(of, folder):
    """Whether the file is what the docstring says, in a file that held something else before."""

    def written(config: dict) -> bool:
        path = folder / "drawn.json"
        path.write_text("x" * 2000)
        of.save_config(config, str(path))
        text = path.read_text(encoding="utf-8")
        return text in [json.dumps(config, indent=2, ensure_ascii=ascii) + "\n" for ascii in (True, False)]

    return written


def loaded(of, folder):
    """What comes back, as JSON; an error says whether it names the file."""

    def from_text(text: str | None) -> str:
        path = folder / "read it.json"
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text, encoding="utf-8")
        try:
            return json.dumps(of.load_config(str(path)), sort_keys=True)
        except ValueError as error:
            return f"ValueError that names the file: {'read it.json' in str(error)}"

    return from_text


@pytest.mark.milestone(task="2.4", points=15, section="The same mathematics")
def test_every_stage_trains_to_the_losses_of_ddp(lab, run_experiments):
    baseline = text_experiment("base")
    before = baseline.model_dump()
    made = lab.with_deepspeed(baseline, zero_config(2), "ZeRO-2")
    require(
        made.deepspeed == zero_config(2),
        expected="the configuration in .deepspeed",
        got=made.deepspeed,
    )
    require(
        (made.name, made.method) == ("base-zero-2", "ZeRO-2"),
        expected="name 'base-zero-2' and method 'ZeRO-2'",
        got=(made.name, made.method),
    )
    others = {key: value for key, value in made.model_dump().items() if key not in ("name", "method", "deepspeed")}
    require(
        others == {key: before[key] for key in others},
        expected="every other setting as it was",
        got={key: value for key, value in others.items() if value != before[key]},
    )
    require(
        baseline.model_dump() == before,
        expected="a baseline that is left alone",
        got="it was changed",
    )

    # What the exercise made is compared and not run: an experiment can name any program.
    own = text_experiment("own").model_copy(update={"name": "own-zero-2", "method": "ZeRO-2", "deepspeed": zero_config(2)})
    made = lab.with_deepspeed(text_experiment("own"), zero_config(2), "ZeRO-2")
    require(
        made == own,
        expected=f"the same from another baseline: {own!r}",
        got=made,
    )
    settings = {"ranks": 4, "micro_batch": 3, "accumulation": 5, "epochs": 2.0, "steps": 9, "learning_rate": 3e-3, "clipping": 0.25}
    settings |= {"weight_decay": 0.5, "seed": 8, "precision": "bf16", "max_tokens": 96, "eval_examples": 5, "save_every": 3}
    settings |= {"random_weights": True, "save": True, "evaluate": True, "options": {"note": 1}}
    other = text_experiment("Demo-7", **settings)
    wanted = other.model_copy(update={"name": "Demo-7-offload", "method": "Offload", "deepspeed": zero_config(3)})
    made = lab.with_deepspeed(other, zero_config(3), "Offload")
    require_equal(
        made.model_dump(), wanted.model_dump(), of="with_deepspeed(an experiment with other settings, stage 3, 'Offload')"
    )
    # What stands in a configuration does not become a setting of the experiment, and the configuration is not completed.
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": True},
        "fp16": {"enabled": True},
    }
    config |= {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.3}}, "zero_optimization": {"stage": 1}}
    config |= {"train_batch_size": 8}
    others = {
        "program": "exercises.lab01_baseline:finetune",
        "model": "bigscience/bloom-560m",
        "data": "squad.json",
        "skip_bad": True,
    }
    for name, method, added, settings in (
        ("a-baseline-with-a-name-that-is-as-long-as-names-of-experiments-may-well-be" * 2, "ZeRO-1", "zero-1", {}),
        ("like-zero-1", "ZeRO-1", "zero-1", others),
        ("lab01-baseline", "ZeRO-2", "zero-2", {"ranks": 4}),
    ):
        plain = text_experiment(name, **settings)
        wanted = plain.model_copy(update={"name": f"{name}-{added}", "method": method, "deepspeed": config})
        made = lab.with_deepspeed(plain, copy.deepcopy(config), method)
        require_equal(
            made.model_dump(),
            wanted.model_dump(),
            of=f"with_deepspeed({name!r}, a configuration with sizes of its own, {method!r})",
        )
    for plain, config, method, added in (
        (text_experiment("one-rank", ranks=1), zero_config(2), "ZeRO-2", "zero-2"),
        (text_experiment("base"), zero_config(0), "ZeRO-0", "zero-0"),
        (text_experiment("base"), {}, "ZeRO-0", "zero-0"),
        (text_experiment("base"), zero_config(3), "ZeRO-3+0.5", "zero-3+0.5"),
        (text_experiment("base"), zero_config(3), "ZeRO-3-with-a-name-that-is-long", "zero-3-with-a-name-that-is-long"),
    ):
        wanted = plain.model_copy(update={"name": f"{plain.name}-{added}", "method": method, "deepspeed": config})
        made = lab.with_deepspeed(plain, config, method)
        of = f"with_deepspeed(an experiment on {plain.ranks} ranks, the configuration {config}, {method!r})"
        require_equal(made.model_dump(), wanted.model_dump(), of=of)
        with lab.elsewhere():
            made = lab.with_deepspeed(plain, config, method)
        require_equal(made.model_dump(), wanted.model_dump(), of=f"{of}, on rank 3 of 5")
    for method in ("ZeRO-3 + CPU offload", "gradient_clipping 0.0"):
        name = lab.with_deepspeed(baseline, config, method).name
        try:
            text_experiment(name)
        except ValueError:
            require(False, expected=f"a name that an Experiment may have, for the method {method!r}", got=repr(name))
    named = [
        lab.with_deepspeed(baseline, config, method).name for method in ("ZeRO-3", "ZeRO-3 + CPU offload", "ZeRO-3 + clipping")
    ]
    require(
        len(set(named)) == 3 and all(name.startswith("base-zero-3") for name in named),
        expected="another name for 'ZeRO-3', 'ZeRO-3 + CPU offload' and 'ZeRO-3 + clipping': each wants a run folder of its own",
        got=named,
    )
    runs = stage_runs(run_experiments)
    ours = run_experiments([own], reference=True)["own-zero-2"]
    wanted = runs["ddp"].losses()
    for name, run in [(f"stage {stage}", runs[f"zero{stage}"]) for stage in range(4)] + [("your ZeRO-2 experiment", ours)]:
        worst = farthest(run.losses(), wanted)
        require(
            worst <= 1e-5,
            expected=f"{name}: the losses of DDP to 1e-5, {[round(x, 5) for x in wanted]}",
            got=[round(x, 5) for x in run.losses()],
        )
    states = ours.states()["ranks"][0]
    require(
        states["optimizer"] == runs["zero2"].states()["ranks"][0]["optimizer"],
        expected="a sharded optimizer on each rank",
        got=states,
    )


def odd_runs(run_experiments) -> dict[str, Run]:
    """Stages 1 to 3 with a model whose parameters do not divide evenly."""
    plans = [text_experiment(f"odd-zero{stage}", deepspeed=zero_config(stage), model=odd_model(), steps=2) for stage in (1, 2, 3)]
    return run_experiments(plans, reference=True)


@pytest.mark.milestone(task="2.5", points=10, section="Who holds what")
def test_shards_are_padded_as_deepspeed_pads(lab, run_experiments):
    groups = [[7, 5], [3]]
    for ranks in (1, 2, 4):
        got = lab.shard_elements(1, [[176_247_271_424]], ranks)
        require_equal(got, 176_247_271_424 // ranks, of=f"shard_elements(1, [[176247271424]], {ranks}), which divides evenly")
    got = lab.shard_elements(3, [[0, 5], [0]], 2)
    require_equal(got, 3, of="shard_elements(3, [[0, 5], [0]], 2): what has no elements has none on a rank")
    for stage, ranks, wanted, why in (
        (0, 2, 15, "nothing is sharded at stage 0"),
        (1, 2, 8, "⌈12 / 4⌉·2 + ⌈3 / 4⌉·2"),
        (1, 3, 6, "⌈12 / 6⌉·2 + ⌈3 / 6⌉·2"),
        (2, 4, 6, "⌈12 / 8⌉·2 + ⌈3 / 8⌉·2"),
        (3, 2, 9, "⌈7 / 2⌉ + ⌈5 / 2⌉ + ⌈3 / 2⌉"),
        (3, 1, 15, "one rank holds everything"),
        (1, 1, 16, "⌈12 / 2⌉·2 + ⌈3 / 2⌉·2"),
    ):
        got = lab.shard_elements(stage, groups, ranks)
        require(
            got == wanted,
            expected=f"{wanted} elements for stage {stage}, groups {groups}, {ranks} ranks: {why}",
            got=got,
        )
    for stage in range(4):
        got = lab.shard_elements(stage, [], 2)
        require_equal(got, 0, of=f"shard_elements({stage}, [], 2): no parameter is trained")
        many = [[3] * 3000, [1]]
        got = lab.shard_elements(stage, many, 1)
        require_equal(got, 9001 if stage in (0, 3) else 9002, of=f"shard_elements({stage}, [[3] * 3000, [1]], 1)")
    agree_as_recorded(shard(lab), __file__, "2.5", "shard_elements{}, of (stage, groups, ranks)")
    runs = odd_runs(run_experiments)
    for stage in (1, 2, 3):
        states = runs[f"odd-zero{stage}"].states()
        for rank, held in enumerate(states["ranks"]):
            wanted = 12 * lab.shard_elements(stage, states["groups"], 2)
            require(
                held["optimizer"] == wanted,
                expected=f"stage {stage}, rank {rank}: 12 bytes per element make {held['optimizer']} bytes (measured)",
                got=f"{wanted} bytes (from your shard)",
            )


def shard(of):
    """As text, where 2 is not 2.0."""
    return lambda *given: json.dumps(of.shard_elements(*given))


@pytest.mark.milestone(task="2.6", points=15, section="Who holds what")
def test_predicted_bytes_are_what_ranks_hold(lab, run_experiments):
    lab.state_bytes  # noqa: B018
    # bloom-tiny divides evenly; the odd model shows what is padded.
    runs = stage_runs(run_experiments) | odd_runs(run_experiments)
    # Your shard_elements has a milestone of its own; here the shards that were measured stand in for it: 12 bytes an element.
    shards = {(1, 3, "[[7, 5], [3]]"): 6}
    for name, run in runs.items():
        if "zero" in name and not name.endswith("zero0"):
            states = run.states()
            shards[int(name[-1]), 2, json.dumps(states["groups"])] = states["ranks"][0]["optimizer"] // 12

    def shard_elements(stage: int, groups: list, ranks: int) -> int:
        return shards[stage, ranks, json.dumps(groups)] if stage else sum(map(sum, groups))

    lab.replace("shard_elements", shard_elements)
    for name, precision in [
        (f"{kind}zero{stage}", "fp32") for kind in ("", "odd-") for stage in range(4) if kind == "" or stage
    ] + [(f"bf16-zero{stage}", "bf16") for stage in (1, 2, 3)]:
        stage, states = int(name[-1]), runs[name].states()
        got = lab.state_bytes(stage, states["groups"], 2, precision)
        require(
            set(got) == {"parameters", "gradients", "optimizer"},
            expected="the keys parameters, gradients, optimizer",
            got=sorted(got),
        )
        for kind in ("parameters", "gradients", "optimizer"):
            for rank, held in enumerate(states["ranks"]):
                require(
                    got[kind] == held[kind],
                    expected=f"stage {stage}, {precision}, rank {rank} of 2: {held[kind]} bytes of {kind} (measured)",
                    got=got[kind],
                )
    wanted = {"parameters": 2 * 1000, "gradients": 2 * 1000, "optimizer": 12 * 1000}
    for precision in ("bf16", "fp16"):
        got = lab.state_bytes(0, [[600], [400]], 8, precision)
        require_equal(got, wanted, of=f"state_bytes(0, [[600], [400]], 8, {precision!r}): on any number of ranks")
    got = lab.state_bytes(0, [[7]] * 150, 2, "fp32")
    require_equal(got, {"parameters": 4200, "gradients": 4200, "optimizer": 8400}, of="state_bytes(0, [[7]] * 150, 2, 'fp32')")
    wanted = {"parameters": 4 * 18, "gradients": 4 * 15, "optimizer": 12 * 6}
    got = lab.state_bytes(1, [[7, 5], [3]], 3, "fp32")
    require_equal(got, wanted, of="state_bytes(1, [[7, 5], [3]], 3, 'fp32'), whose shards are 6 elements, padded")
    lab.replace("shard_elements", lambda stage, groups, ranks: 2 * ranks * len(groups) if stage else sum(map(sum, groups)))
    for words, groups, everything in (
        ("BLOOM-176B's embedding, of 250,880 × 14,336 elements", [[250_880 * 14_336], [14_336]], 250_881 * 14_336),
        ("a mixture of experts, with 3,000 parameters in a group", [[1_000_003] * 3000, [7]], 3_000_009_007),
    ):
        for stage, parameters, gradients, optimizer in (
            (0, everything, everything, everything),
            (1, 64, everything, 16),
            (2, 64, 16, 16),
            (3, 16, 16, 16),
        ):
            wanted = {"parameters": 2 * parameters, "gradients": 2 * gradients, "optimizer": 12 * optimizer}
            got = lab.state_bytes(stage, groups, 4, "bf16")
            require_equal(got, wanted, of=f"state_bytes({stage}, …, 4, 'bf16') of {words}, for shards of 16 elements")
    agree_as_recorded(predicted(lab), __file__, "2.6", "state_bytes{}, for shards of 2 × ranks × groups elements")


def predicted(of):
    """As text, where 2 is not 2.0."""
    return lambda *given: json.dumps(of.state_bytes(*given), sort_keys=True)


@pytest.mark.milestone(task="2.7", points=10)
def test_table_row_reads_the_run_folder(lab, tmp_path):
    lab.comparison_row  # noqa: B018
    lab.replace(
        "state_bytes",
        lambda stage, groups, ranks, precision: {
            "parameters": 1000 * stage,
            "gradients": 100 * ranks,
            "optimizer": {"fp32": 1, "bf16": 2}[precision],
        },
    )
    cases = (
        ("plain", None, 0 + 300 + 1),
        ("zero", zero_config(2, precision="bf16"), 2000 + 300 + 2),
        ("no-stage", SIZED | {"zero_optimization": {}, "bf16": {"enabled": True}}, 0 + 300 + 2),
    )
    for name, config, predicted in cases:
        run = Run.create(text_experiment(name, ranks=3, deepspeed=config, method=name, precision="bf16"), tmp_path)
        run.start()
        for step, (loss, speed) in enumerate(((5.0, 1.0), (2.0, 30.0), (1.0, 10.0), (1.5, 20.0)), start=1):
            run.log_step(step=step, loss=loss, samples_per_second=speed, steps=4)
        # The rank that holds most holds neither the most parameters nor the most gradients.
        ranks = [{"parameters": p, "gradients": g, "optimizer": o} for p, g, o in ((6, 4, 8), (4, 4, 20), (4, 5, 12))]
        run.write_states({"parameters": 10, "groups": [[10]], "ranks": ranks})
        run.finish()
        got = lab.comparison_row(Run.read(run.folder))
        wanted = {
            "method": name,
            "ranks": 3,
            "first_loss": 5.0,
            "last_loss": 1.5,
            "samples_per_second": 20.0,
            "measured": 28,
            "predicted": predicted,
        }
        require_equal(got, wanted, of=f"comparison_row() of the run '{name}'")
    run = Run.create(text_experiment("diverged", ranks=1, deepspeed=zero_config(1), method="diverged"), tmp_path)
    run.start()
    for step, loss in enumerate((5.0, 2.0, float("nan")), start=1):
        run.log_step(step=step, loss=loss, samples_per_second=9.0, steps=3)
    run.write_states({"parameters": 10, "groups": [[10]], "ranks": [{"parameters": 1, "gradients": 1, "optimizer": 1}]})
    run.finish()
    last = lab.comparison_row(Run.read(run.folder))["last_loss"]
    require(last != last, expected="last_loss nan where a run has diverged", got=last)
    run = Run.create(text_experiment("offload", ranks=2, deepspeed=zero_config(1), method="offload"), tmp_path)
    run.start()
    run.log_step(step=1, loss=5.0, samples_per_second=9.0, steps=1)
    ranks = [{"parameters": 4, "gradients": 4, "optimizer": 2}, {"parameters": 1, "gradients": 1, "optimizer": 1}]
    run.write_states(
        {"parameters": 10, "groups": [[10]], "ranks": [ranks[0], ranks[1] | {"host_optimizer": 40, "disk_optimizer": 9}]}
    )
    run.finish()
    run = Run.read(run.folder)
    got = lab.comparison_row(run)
    require_equal(got["measured"], 10, of="measured: rank 0 holds 10 bytes of these three, and rank 1 3 of them and 40 on the host")
    require_equal(got["samples_per_second"], None, of="samples_per_second of a run of one step, which warms up and is left out")
    zero = zero_config(3) | {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    }
    run = Run.create(text_experiment("offloaded", ranks=2, deepspeed=zero, method="offload", precision="fp32"), tmp_path)
    run.start()
    for step in (1, 2):
        run.log_step(step=step, loss=5.0, samples_per_second=9.0, steps=2)
    run.write_states({"parameters": 10, "groups": [[10]], "ranks": ranks})
    run.finish()
    got = lab.comparison_row(Run.read(run.folder))
    require_equal(
        got["predicted"],
        3000 + 200 + 1,
        of="predicted, of a run with both offloads: the sum of state_bytes, which knows no offload",
    )
    lab.replace("state_bytes", bytes_by_all_arguments)
    agree_as_recorded(
        row(lab, tmp_path),
        __file__,
        "2.7",
        "comparison_row() of a run with (held by ranks, steps, zero, precision, precision 'auto' in the configuration) {}",
    )


def bytes_by_all_arguments(stage: int, groups: list, ranks: int, precision: str) -> dict[str, int]:
    """Stands for the formula: another number for each argument."""
    return {
        "parameters": 10**6 * (stage + 1),
        "gradients": 10**4 * ranks + sum(map(sum, groups)),
        "optimizer": len(groups) * int(precision[-2:]),
    }


def row(of, folder):
    """The row of a run that is made up."""

    def of_a_run(held: list, steps: list, zero: dict | None, precision: str, filled_in: bool) -> str:
        config = None if zero is None else zero_config(zero, precision=precision)
        if config is not None and filled_in:
            config |= {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}
        if zero is not None and not zero:
            del config["zero_optimization"]
        run = Run.create(
            text_experiment("drawn", ranks=len(held), deepspeed=config, precision=precision, method="A Method"), folder
        )
        run.start()
        for step, (loss, speed) in enumerate(steps, start=1):
            run.log_step(step=step, loss=float(loss), samples_per_second=float(speed), steps=9)
        run.write_states({"parameters": 10, "groups": [[7, 2], [1]], "ranks": held})
        run.finish()
        return json.dumps(of.comparison_row(Run.read(run.folder)), sort_keys=True)

    return of_a_run


@pytest.mark.milestone(task="2.8", points=15, section="Which stage")
def test_lowest_stage_that_fits_is_chosen(lab):
    gib, bloom = 2**30, 559_214_592
    cases = (
        (bloom, 1, 9 * gib, 0, 0, "8.33 GiB fit on one device"),
        (bloom, 8, 9 * gib, 0, 0, "everything fits without sharding"),
        (bloom, 2, 6 * gib, 0, 1, "5.21 GiB at stage 1"),
        (bloom, 4, 3 * gib, 0, 2, "3.65 GiB at stage 1, 2.86 at stage 2"),
        (bloom, 4, round(2.5 * gib), 0, 3, "2.86 GiB at stage 2, 2.08 at stage 3"),
        (bloom, 4, 6 * gib, 3 * gib, 2, "3 of the 6 GiB go to activations"),
        (16 * 1000, 16, 16 * 1000, 0, 3, "exactly full still fits"),
    )
    for parameters, ranks, device, other, wanted, why in cases:
        got = lab.choose_stage(parameters, ranks, device, other)
        require(
            got == wanted,
            expected=f"stage {wanted} for {parameters:,} parameters on {ranks} × {device / gib:.3g} GiB, {other / gib:.3g} GiB of it for other things: {why}",
            got=got,
        )
    for parameters, ranks, device, wanted in (
        (6_738_415_617, 8, 16 * gib, 3),
        (6_738_415_617, 7, 20 * gib, 3),
        (1_000_003, 3, 10**7, 1),
    ):
        got = lab.choose_stage(parameters, ranks, device)
        require_equal(got, wanted, of=f"choose_stage({parameters:,}, {ranks}, {device:,}): parameters that the ranks do not divide")
    require_equal(lab.choose_stage(bloom, 16, 3 * gib), 1, of=f"choose_stage({bloom:,}, 16, 3 GiB), other_bytes not given")
    require_equal(lab.choose_stage(bloom, 1, 9 * gib), 0, of=f"choose_stage({bloom:,}, 1, 9 GiB), other_bytes not given")
    for parameters, ranks, device, other in (
        (7_069_016_064, 4, 16, 0),
        (7_069_016_064, 4, 16, 5),
        (7 * 10**9, 2, 40, 0),
        (176 * 10**9, 1, 80, 0),
        (10**12, 1, 80, 0),
        (176 * 10**9, 8, 80, 0),
        (bloom, 4, 16, 40),
    ):
        missing = 16 * parameters / ranks / gib + other - device
        words = f"ValueError where {missing:.1f} GiB are missing on each: {parameters:,} parameters, {ranks} × {device} GiB, {other} for other things"
        try:
            require(False, expected=words, got=f"stage {lab.choose_stage(parameters, ranks, device * gib, other * gib)}")
        except ValueError as error:
            said = str(error).replace(",", "")
            numbers = [float(number) for number in re.findall(r"(\d+(?:\.\d+)?) *GiB", said)]
            require(
                any(abs(number - missing) < 0.06 for number in numbers), expected=f"{words}, with its unit, GiB", got=str(error)
            )
            require("each" in said, expected=f"{words}: the sentence says that it is on each", got=str(error))
    agree_as_recorded(lab.choose_stage, __file__, "2.8", "choose_stage{}, of (parameters, ranks, device_bytes, other_bytes)")
