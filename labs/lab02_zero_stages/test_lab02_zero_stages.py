"""Milestones of lab 02. DeepSpeed itself is the judge: of configurations, of losses, and of the bytes that ranks hold."""

import copy
import json
from math import ceil
from types import SimpleNamespace

import pytest

from shardlab.hardware import gpu_count
from shardlab.milestones import small_runs
from shardlab.milestones.engine_runs import odd_model
from shardlab.milestones.messages import farthest, require, require_error
from shardlab.milestones.small_runs import zero_config
from shardlab.run.experiment import Experiment
from shardlab.run.run_folder import Run
from shardlab.zero import memory_model


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
                likely="a key in the wrong place, or batch sizes that do not multiply",
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
            likely="the world size left out of train_batch_size",
        )
        require(
            config.get("gradient_clipping") == 0.5,
            expected="gradient_clipping: 0.5",
            got=config.get("gradient_clipping", "no such key"),
            likely="clipping not written out; left out, DeepSpeed clips at 1.0",
        )
        require(
            seen.optimizer_name == "adamw" and seen.optimizer_params == {"lr": 1e-4, "torch_adam": True},
            expected="optimizer AdamW with lr 0.0001 and torch_adam",
            got=f"{seen.optimizer_name} {seen.optimizer_params}",
            likely="params of the optimizer at the wrong level, or weight_decay 'auto' together with a learning rate that is a number",
        )
        require(
            not seen.float16_config.enabled and not seen.bfloat16_config.enabled,
            expected="neither fp16 nor bf16 for precision fp32",
            got=f"fp16 {config['fp16']}, bf16 {config['bf16']}",
            likely="enabled left at 'auto' for a given precision",
        )
    for precision, enabled in (("bf16", (True, False)), ("fp16", (False, True)), ("auto", ("auto", "auto"))):
        config = create(2, precision=precision)
        got = (config["bf16"]["enabled"], config["fp16"]["enabled"])
        require(
            got == enabled,
            expected=f"bf16, fp16 = {enabled} for precision '{precision}'",
            got=got,
            likely="both switched on, or the two swapped",
        )
    require(
        judge(
            create(3, micro_batch=1, accumulation=1, world_size=2, precision="bf16")
        ).zero_config.gather_16bit_weights_on_model_save,
        expected="stage3_gather_16bit_weights_on_model_save: True in stage 3",
        got="not set",
        likely="left out; saving a sharded model would write no weights",
    )
    config = create(2, micro_batch=4)
    require(
        config["train_batch_size"] == "auto" and config["gradient_clipping"] == 1.0 and "optimizer" not in config,
        expected="train_batch_size 'auto', gradient_clipping 1.0 and no optimizer, where nothing else is said",
        got={k: config.get(k) for k in ("train_batch_size", "gradient_clipping", "optimizer")},
        likely="a product with 'auto' in it ('auto' * 4 is a text), or defaults left out",
    )
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
        likely="offload flags ignored, or put outside zero_optimization",
    )
    require(
        offload.get("optimizer", {}).get("params") == {"lr": 1e-4},
        expected="an optimizer of DeepSpeed's with lr 0.0001, and without torch_adam: it steps on the host",
        got=offload.get("optimizer", "none"),
        likely="Trainer's optimizer kept under offload, or torch_adam left in",
    )
    for words, call, name in (
        ("stage 4", lambda: create(4), "4"),
        ("precision fp8", lambda: create(1, precision="fp8"), "fp8"),
        ("micro_batch 0", lambda: create(1, micro_batch=0), "micro_batch"),
        ("accumulation 1.5", lambda: create(1, accumulation=1.5), "accumulation"),
        ("a negative clipping", lambda: create(1, clipping=-1.0), "clipping"),
        ("offload_param at stage 2", lambda: create(2, offload_param=True), "stage 3"),
        ("offload_optimizer at stage 0", lambda: create(0, offload_optimizer=True), "stage"),
    ):
        require_error(
            call,
            ValueError,
            mentions=(name,),
            expected=f"ValueError for {words}",
            likely="input that is not checked ends up in the configuration",
        )


BAD = [
    (
        "an unknown key",
        {"zero_optimisation": {"stage": 2}},
        True,
        "zero_optimisation",
        "keys not compared with TOP_LEVEL_KEYS; this one trains at stage 0",
    ),
    ("stage 4", {"zero_optimization": {"stage": 4}}, True, "4", "the stage is not checked"),
    ("fp16 with bf16", {"fp16": {"enabled": True}, "bf16": {"enabled": True}}, True, "bf16", "the two are checked apart"),
    (
        "batch sizes that do not multiply for 2 ranks",
        {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2},
        True,
        "16",
        "the world size left out: 4 × 2 is 8, and 4 × 2 × 2 ranks is 16",
    ),
    (
        "offload_param at stage 2",
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
        True,
        "offload_param",
        "DeepSpeed lets it through; you should not",
    ),
    (
        "nvme without a path",
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
        True,
        "nvme_path",
        "only one of the two offloads is looked at",
    ),
    (
        "nvme without a path",
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
        True,
        "nvme_path",
        "only one of the two offloads is looked at",
    ),
    (
        "nvme with the path in the wrong place",
        {"zero_optimization": {"stage": 2, "nvme_path": "/scratch", "offload_optimizer": {"device": "nvme"}}},
        True,
        "nvme_path",
        "nvme_path is looked for next to the offload; DeepSpeed reads it inside",
    ),
    ("'auto' without Trainer", {"train_batch_size": "auto"}, False, "train_batch_size", "with_trainer is not looked at"),
    (
        "'auto' deep inside, without Trainer",
        {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}},
        False,
        "reduce_bucket_size",
        "only the top level is searched; inside zero_optimization 'auto' quietly becomes a default",
    ),
    (
        "'auto' in a list, without Trainer",
        {"optimizer": {"type": "AdamW", "params": {"betas": ["auto", 0.999]}}},
        False,
        "betas",
        "dictionaries are searched, lists are not",
    ),
]
GOOD = [
    (
        {
            "train_batch_size": 16,
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 2,
            "zero_optimization": {"stage": 0},
        },
        False,
    ),
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
    (
        {
            "fp16": {"enabled": False},
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 2, "offload_param": {"device": "none"}},
        },
        False,
    ),
    (
        {
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": {"device": "nvme", "nvme_path": "/scratch"},
                "offload_param": {"device": "cpu"},
            }
        },
        True,
    ),
]


@pytest.mark.milestone(task="2.2", points=15, section="What DeepSpeed lets through")
def test_bad_configurations_are_refused(lab):
    for words, config, with_trainer, name, likely in BAD:
        require_error(
            lambda: lab.check_deepspeed_config(copy.deepcopy(config), world_size=2, with_trainer=with_trainer),
            ValueError,
            mentions=(name,),
            expected=f"ValueError for {words}: {json.dumps(config)}",
            likely=likely,
        )
    for config, with_trainer in GOOD:
        try:
            lab.check_deepspeed_config(copy.deepcopy(config), world_size=2, with_trainer=with_trainer)
        except ValueError as error:
            require(
                False,
                expected=f"no error for {json.dumps(config)}",
                got=f"ValueError: {error}",
                likely="a key that is missing, a device of 'none', or 'auto' under Trainer is taken for a mistake",
            )


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
            likely="str(config) instead of JSON: Python writes True and single quotes",
        )
    require(
        read_back == config,
        expected="the configuration back from the file",
        got=read_back,
        likely="values changed on the way",
    )
    require(
        len(text.splitlines()) > 5 and text.endswith("}\n"),
        expected="indented lines and a newline at the end",
        got=repr(text[:60]),
        likely="json.dumps without indent",
    )
    require(
        lab.load_config(path) == config,
        expected="load_config to give what save_config was given",
        got=lab.load_config(path),
        likely="two formats",
    )
    for broken in ('{"zero_optimization": {"stage": 3,}}', "[1, 2]"):
        path.write_text(broken)
        require_error(
            lambda: lab.load_config(path),
            ValueError,
            mentions=("config.json",),
            expected=f"ValueError that names the file, for {broken}",
            likely="the error of json names no file, and a list is no configuration",
        )


@pytest.mark.milestone(task="2.4", points=15, section="The same mathematics")
def test_every_stage_trains_to_the_losses_of_ddp(lab, run_experiments):
    baseline = text_experiment("base")
    before = baseline.model_dump()
    made = lab.with_deepspeed(baseline, zero_config(2), "ZeRO-2")
    require(
        made.deepspeed == zero_config(2),
        expected="the configuration in .deepspeed",
        got=made.deepspeed,
        likely="the copy is made without it; it would train with DDP",
    )
    require(
        (made.name, made.method) == ("base-zero-2", "ZeRO-2"),
        expected="name 'base-zero-2' and method 'ZeRO-2'",
        got=(made.name, made.method),
        likely="the name kept; two runs would want one folder",
    )
    others = {key: value for key, value in made.model_dump().items() if key not in ("name", "method", "deepspeed")}
    require(
        others == {key: before[key] for key in others},
        expected="every other setting as it was",
        got={key: value for key, value in others.items() if value != before[key]},
        likely="a setting built anew instead of copied",
    )
    require(baseline.model_dump() == before, expected="a baseline that is left alone", got="it was changed", likely="no copy")

    # What the exercise made is compared and not run: an experiment can name any program.
    own = text_experiment("own").model_copy(update={"name": "own-zero-2", "method": "ZeRO-2", "deepspeed": zero_config(2)})
    made = lab.with_deepspeed(text_experiment("own"), zero_config(2), "ZeRO-2")
    require(
        made == own,
        expected=f"the same from another baseline: {own!r}",
        got=made,
        likely="something that depends on the baseline's name",
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
            likely="another batch, learning rate or clipping than the baseline",
        )
    states = ours.states()["ranks"][0]
    require(
        states["optimizer"] == runs["zero2"].states()["ranks"][0]["optimizer"],
        expected="a sharded optimizer on each rank",
        got=states,
        likely="DeepSpeed was not switched on",
    )


@pytest.mark.milestone(task="2.5", points=10, section="Who holds what")
def test_shards_are_padded_as_deepspeed_pads(lab, run_experiments):
    groups = [[7, 5], [3]]
    for stage, ranks, wanted, why in (
        (0, 2, 15, "nothing is sharded at stage 0"),
        (1, 2, 8, "⌈12 / 4⌉·2 + ⌈3 / 4⌉·2"),
        (2, 4, 6, "⌈12 / 8⌉·2 + ⌈3 / 8⌉·2"),
        (3, 2, 9, "⌈7 / 2⌉ + ⌈5 / 2⌉ + ⌈3 / 2⌉"),
        (3, 1, 15, "one rank holds everything"),
        (1, 1, 16, "⌈12 / 2⌉·2 + ⌈3 / 2⌉·2"),
    ):
        got = lab.shard_elements(stage, groups, ranks)
        mistakes = {
            "a shard at stage 0; nothing is sharded there": sum(2 * ceil(sum(group) / (2 * ranks)) for group in groups),
            "rounded down": sum(2 * (sum(group) // (2 * ranks)) for group in groups) if stage < 3 else 15 // ranks,
            "each parameter rounded by itself, as stage 3 does": sum(ceil(size / ranks) for group in groups for size in group),
            "each group rounded as a whole, as stages 1 and 2 do": sum(2 * ceil(sum(group) / (2 * ranks)) for group in groups),
            "each group rounded to a multiple of N instead of 2N": sum(ceil(sum(group) / ranks) for group in groups),
            "both groups joined before rounding": 2 * ceil(15 / (2 * ranks)),
            "the elements of all ranks, not of one": wanted * ranks,
        }
        likely = [mistake for mistake, value in mistakes.items() if value == got and (stage == 0) == ("stage 0" in mistake)]
        require(
            got == wanted,
            expected=f"{wanted} elements for stage {stage}, groups {groups}, {ranks} ranks: {why}",
            got=got,
            likely=" or ".join(likely) or "the rounding; ⌈x⌉ is math.ceil(x)",
        )
    runs = run_experiments(
        [text_experiment(f"odd-zero{stage}", deepspeed=zero_config(stage), model=odd_model(), steps=2) for stage in (1, 2, 3)],
        reference=True,
    )
    for stage in (1, 2, 3):
        states = runs[f"odd-zero{stage}"].states()
        for rank, held in enumerate(states["ranks"]):
            wanted = 12 * lab.shard_elements(stage, states["groups"], 2)
            require(
                held["optimizer"] == wanted,
                expected=f"stage {stage}, rank {rank}: 12 bytes per element make {held['optimizer']} bytes (measured)",
                got=f"{wanted} bytes (from your shard)",
                likely="padding left out",
            )


@pytest.mark.milestone(task="2.6", points=15, section="Who holds what")
def test_predicted_bytes_are_what_ranks_hold(lab, run_experiments):
    lab.state_bytes  # noqa: B018
    # Your shard_elements has a milestone of its own; here the library's stands in for it.
    lab.replace(
        "shard_elements",
        lambda stage, groups, ranks: memory_model.sharded_elements(groups, ranks, stage) if stage else sum(map(sum, groups)),
    )
    runs = stage_runs(run_experiments)
    for name, precision in [(f"zero{stage}", "fp32") for stage in range(4)] + [
        (f"bf16-zero{stage}", "bf16") for stage in (1, 2, 3)
    ]:
        stage, states = int(name[-1]), runs[name].states()
        got = lab.state_bytes(stage, states["groups"], 2, precision)
        require(
            set(got) == {"parameters", "gradients", "optimizer"},
            expected="the keys parameters, gradients, optimizer",
            got=sorted(got),
            likely="a key misspelt",
        )
        for kind in ("parameters", "gradients", "optimizer"):
            for rank, held in enumerate(states["ranks"]):
                require(
                    got[kind] == held[kind],
                    expected=f"stage {stage}, {precision}, rank {rank} of 2: {held[kind]} bytes of {kind} (measured)",
                    got=got[kind],
                    likely={
                        "parameters": "stage 3 alone shards parameters; fp32 takes 4 bytes",
                        "gradients": "stage 2 is the first to shard gradients; before it they are held whole, once, and not padded",
                        "optimizer": "stage 1 is the first to shard; 12 bytes, but 8 at stage 0 in fp32",
                    }[kind],
                )
    wanted = {"parameters": 2 * 1000, "gradients": 2 * 1000, "optimizer": 12 * 1000}
    require(
        lab.state_bytes(0, [[600], [400]], 8, "bf16") == wanted,
        expected=f"stage 0 in bf16, 1,000 parameters: {wanted}, on any number of ranks",
        got=lab.state_bytes(0, [[600], [400]], 8, "bf16"),
        likely="stage 0 divided by the ranks, or without its fp32 master weights",
    )


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
        ("plain", None, 0 + 300 + 1, "without DeepSpeed, stage 0 in fp32: autocast keeps the parameters in fp32"),
        ("zero", zero_config(2, precision="bf16"), 2000 + 300 + 2, "the stage and precision of the experiment"),
    )
    for name, config, predicted, why in cases:
        run = Run.create(text_experiment(name, ranks=3, deepspeed=config, method=name, precision="bf16"), tmp_path)
        run.start()
        for step, (loss, speed) in enumerate(((5.0, 1.0), (2.0, 30.0), (1.0, 10.0), (1.5, 20.0)), start=1):
            run.log_step(step=step, loss=loss, samples_per_second=speed, steps=4)
        run.write_states(
            {"parameters": 10, "groups": [[10]], "ranks": [{"parameters": 4, "gradients": 4, "optimizer": o} for o in (8, 20, 12)]}
        )
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
        require(
            set(got) == set(wanted),
            expected=f"the keys {sorted(wanted)}",
            got=sorted(got),
            likely="a key misspelt or left out",
        )
        likely = {
            "measured": "the first rank taken instead of the one that holds most, or the sum of all ranks",
            "predicted": why,
            "samples_per_second": "divided by the ranks, or the mean with the first step in it",
            "last_loss": "the smallest loss instead of the last",
            "first_loss": "the largest loss, or the second",
        }
        for key, value in wanted.items():
            require(
                got[key] == value,
                expected=f"{key} = {value}",
                got=got[key],
                likely=likely.get(key, "read from run.experiment"),
            )


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
            likely="a part divided by the ranks from the wrong stage on, other_bytes left out, or stages tried from the top",
        )
    require_error(
        lambda: lab.choose_stage(7_069_016_064, 4, 16 * gib),
        ValueError,
        mentions=("10.3",),
        expected="ValueError that says 10.3 GiB (2**30 bytes) are missing on each",
        likely="3 returned although it does not fit, or the missing amount left out",
    )
