"""Hidden milestones of lab 02: the same invariants with other numbers, so that nobody passes by knowing the published ones."""

import copy
import json
import random
import re

import pytest
import test_lab02_zero_stages as public
from hypothesis import strategies as st

from shardlab.milestones.agreement import agree, solution
from shardlab.milestones.engine_runs import odd_model
from shardlab.run.run_folder import Run
from shardlab.zero.engine_model import sharded_elements

REFERENCE = solution("lab02_zero_stages")
SIZE = st.integers(1, 5000) | st.integers(1, 2 * 10**9)
GROUPS = st.lists(st.lists(SIZE, max_size=5), min_size=1, max_size=6)
MANY = [[[n + at for at in range(6)] for n in range(1, 60)], [[977 + at for at in range(300)], [10**10 + 7]], [[1] * 1000]]
"""Groups as for each layer, groups of many parameters, and one of many small ones."""
RANKS = st.integers(1, 9) | st.sampled_from([16, 24, 64, 512, 2048, 16_384])


def numbers(task: str) -> random.Random:
    return random.Random(f"hidden {task}")


@pytest.mark.milestone(task="2.1")
def test_configuration_follows_its_arguments(lab):
    draw = numbers("2.1")
    for _ in range(6):
        stage, micro, accumulation, world = draw.randint(1, 3), draw.randint(1, 9), draw.randint(1, 9), draw.randint(2, 9)
        rate, clipping = draw.choice((3e-4, 7e-5, 2e-3)), draw.choice((0.0, 0.3, 2.0))
        given = {"micro_batch": micro, "accumulation": accumulation, "world_size": world, "learning_rate": rate}
        made = lab.create_deepspeed_config(stage, precision="bf16", optimizer="AdamW", clipping=clipping, **given)
        assert made["train_batch_size"] == micro * accumulation * world
        assert made["train_micro_batch_size_per_gpu"] == micro and made["gradient_accumulation_steps"] == accumulation
        assert made["gradient_clipping"] == clipping and made["zero_optimization"]["stage"] == stage
        assert made["optimizer"]["params"]["lr"] == rate
        assert made["bf16"]["enabled"] is True and made["fp16"]["enabled"] is False
    for bad in ({"stage": -1}, {"stage": 7}, {"stage": 2, "precision": "int8"}, {"stage": 2, "micro_batch": -3}):
        with pytest.raises(ValueError):
            lab.create_deepspeed_config(**bad)
    names, size = ("micro_batch", "accumulation", "world_size"), st.sampled_from([1, 2, 7, 1024, 6000, "auto"])
    valid = st.fixed_dictionaries(
        {"stage": st.integers(0, 3)},
        optional={
            **dict.fromkeys(names, size),
            "precision": st.sampled_from(["auto", "fp32", "bf16", "fp16"]),
            "optimizer": st.sampled_from([None, "AdamW"]),
            "learning_rate": st.sampled_from(["auto", 1e-3, 0.0, 2.5e-7, 1.23456789e-6]),
            "clipping": st.sampled_from(["auto", 0, 0.0, 0.5, 1e-5, 5.0, 1000.0]),
            **dict.fromkeys(("offload_optimizer", "offload_param"), st.booleans()),
        },
    )
    bad = [{"stage": stage} for stage in (-1, 4, "2", True, False, 2.5)]
    bad += [{name: value} for name in names for value in (0, -1, 2.5, "2", True, None, "", "a", "to", "AUTO")]
    bad += [{"precision": name} for name in ("fp8", "", "BF16", "Fp16", "FP32", "Auto", "float16", "16")]
    bad += [{"clipping": -1e-9}, {"clipping": -0.5}, {"clipping": -1}]
    edges = [({"stage": 2} | one,) for one in bad]
    edges += [
        ({"stage": stage, "offload_optimizer": moved, "offload_param": too, "optimizer": optimizer, "learning_rate": rate},)
        for stage in range(4)
        for moved in (False, True)
        for too in (False, True)
        for optimizer in (None, "AdamW")
        for rate in ("auto", 1, 0.0)
    ]
    sizes = [dict(zip(names, (m, a, w))) for m in (3, "auto") for a in (5, "auto") for w in (7, "auto")]
    edges += [({"stage": 1} | one,) for one in sizes]
    edges += [({"stage": 2, "optimizer": "AdamW", "learning_rate": rate},) for rate in (2.5e-7, 1.23456789e-6)]
    one_bad = st.builds(lambda given, wrong: given | wrong, valid, st.sampled_from(bad))
    agree(public.created(lab), public.created(REFERENCE), st.tuples(valid | one_bad), first=edges, count=60, record="2.1")


@pytest.mark.milestone(task="2.2")
def test_other_bad_configurations_are_refused(lab):
    check = lab.check_deepspeed_config
    sized = {"train_batch_size": 18, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}
    bad = [
        (sized | {"gradient_cliping": 1.0}, 3, True, "gradient_cliping"),
        (sized | {"zero_optimization": {"stage": 9}}, 3, True, "stage"),
        (sized, 4, False, "train_batch_size"),
        (sized | {"zero_optimization": {"stage": 1, "offload_param": {"device": "cpu"}}}, 3, True, "offload_param"),
        (sized | {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, 3, False, "lr"),
        (sized | {"optimizer": {"type": "AdamW", "params": {"lr": "1e-4"}}}, 3, True, "lr"),
        (sized | {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket": 5}}, 3, True, "stage3_prefetch_bucket"),
    ]
    for config, world, trainer, named in bad:
        with pytest.raises(ValueError, match=named):
            check(copy.deepcopy(config), world_size=world, with_trainer=trainer)
    check(sized | {"zero_optimization": {"stage": 3}}, world_size=3, with_trainer=False)
    offload = st.fixed_dictionaries(
        {},
        optional={
            "device": st.sampled_from(["none", "cpu", "nvme"]),
            "nvme_path": st.sampled_from(["/nvme", "", None]),
            "pin_memory": st.sampled_from([True, "True"]),
        },
    )
    zero = st.fixed_dictionaries(
        {},
        optional={
            "stage": st.sampled_from([0, 1, 2, 3]) | st.sampled_from([-1, 4, "3", True, None]),
            "offload_optimizer": offload | st.none(),
            "offload_param": offload | st.none(),
            "reduce_bucket_size": st.sampled_from(["auto", 5e8, "5e8"]),
        },
    )
    switch = st.fixed_dictionaries({}, optional={"enabled": st.sampled_from([True, False, "auto", "false"])}) | st.just(True)
    whole = st.integers(1, 3) | st.sampled_from(["auto", "2"])
    configs = st.fixed_dictionaries(
        {"train_batch_size": st.sampled_from([2, 4, 6, 8, 12, "auto"])},
        optional={
            "zero_optimization": zero | st.booleans(),
            "fp16": switch,
            "bf16": switch,
            "train_micro_batch_size_per_gpu": whole,
            "gradient_accumulation_steps": whole,
            "optimizer": st.sampled_from([{"params": {"betas": [0.9, "auto"]}}, {"params": {"lr": 0.1}}]),
            "zero_optimisation": st.just({"stage": 3}),
        },
    )
    drawn = st.tuples(configs, st.integers(1, 2), st.booleans())
    agree(public.verdict(lab), public.verdict(REFERENCE), drawn, first=edges_of_configurations(), count=100, record="2.2")


def edges_of_configurations() -> list[tuple]:
    """One thing at a time, right or wrong, with `Trainer` and without it."""
    sized = public.SIZED
    zeros = [{}, False, True, None, *({"stage": stage} for stage in (0, 3, -1, 4, False, "1", None))]
    zeros += [{"stage": stage, "offload_param": {"device": "cpu"}} for stage in range(4)] + [{"offload_param": {"device": "cpu"}}]
    zeros += [{"stage": 2, part: {"pin_memory": True}} for part in ("offload_param", "offload_optimizer")]
    zeros += [{"stage": 3, part: None} for part in ("offload_param", "offload_optimizer")]
    for part in ("offload_param", "offload_optimizer"):
        zeros += [{"stage": 3, part: {"device": "nvme"} | more} for more in ({}, {"nvme_path": ""}, {"nvme_path": None})]
        zeros += [{"stage": 3, part: {"device": "nvme", "nvme_path": path}} for path in ("/mnt/nvme0", "/autofs/x1", "/true")]
    for stage in (0, 1, 2):
        zeros.append({"stage": stage, "offload_optimizer": {"device": "nvme", "nvme_path": "/mnt/nvme0"}})
    zeros += [{"stage": 2, "overlap_comm": text} for text in ("true", "false", "False", True)]
    zeros += [{"stage": 3, "reduce_bucket_size": size} for size in ("auto", "5e8", 5e8)]
    configs = [sized | {"zero_optimization": zero} for zero in zeros]
    for rate in ("5e-5", "+5e-5", "-1", "1E5", "1e+5", ".5", "1.e-5", "8.", " 5e-5", "5e-5 ", 1e-4, "auto"):
        configs.append(sized | {"optimizer": {"type": "AdamW", "params": {"lr": rate}}})
    for switch in ("true", "false", "True", "TRUE", "FALSE", "tRUE", True):
        configs.append(sized | {"wall_clock_breakdown": switch})
    configs += [sized | {key: {}} for key in ("Zero_Optimization", "gradient_cliping", "_comment", "zero_optimisation")]
    configs += [sized | {"communication_data_type": "fp16"}, sized | {"train_batch_size": 7}, sized | {"train_batch_size": "auto"}]
    configs += [sized | {"data_types": {"grad_accum_dtype": "fp32"}}]
    configs += [sized | {"tensorboard": {"job_name": "run 3", "enabled": False}}]
    configs += [sized | {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": steps}}} for steps in (10, "10", "auto")]
    configs += [sized | {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, inner]}}} for inner in (0.95, "0.95", ["auto"])]
    zeros = [{"stage": 3, part: value} for part in ("offload_param", "offload_optimizer") for value in ("cpu", True, ["cpu"])]
    zeros += [{"stage": "auto"}, {"stage": 1, "offload_optimizer": {"device": "nvme"}}, {"stage": 1, "offload_optimizer": {}}]
    configs += [sized | {"zero_optimization": zero} for zero in zeros]
    for value in (8, "8", "auto"):
        configs += [sized | {"aio": {"queue_depth": value}}, sized | {"flops_profiler": {"profile_step": value}}]
        configs += [
            sized | {"data_efficiency": {"data_sampling": {"curriculum_learning": {"curriculum_metrics": {"a": {"b": value}}}}}}
        ]
    others = [(sized, 3, True), (sized, 3, False)]
    for batch, ranks in ((64, 8), (24, 8), (32, 8), (64, 16), (32, 16), (512, 128), (64, 128)):
        others += [(sized | {"train_batch_size": batch}, ranks, with_trainer) for with_trainer in (True, False)]
    deep = "8"
    for _ in range(30):
        deep = {"a": deep}
    for inner in (deep, {"groups": [{"lr": "1e-4"}]}, {"groups": [[{"lr": "auto"}]]}, {"groups": [{"lr": 1e-4}]}):
        configs.append(sized | {"optimizer": {"type": "AdamW", "params": inner}})
    filled_in = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}
    for more in (
        {"fp16": {"enabled": True}, "bf16": {"enabled": True}},
        {"zero_optimization": {"stage": 4}},
        {"gradient_clipping": "auto"},
    ):
        configs.append(filled_in | more)
    configs.append(filled_in | {"zero_optimization": {"stage": 2, "no_such_key": 1}})
    configs += [sized | {"zero_optimization": zero} for zero in ([], "3", 3)]
    return [(config, 2, with_trainer) for config in configs for with_trainer in (True, False)] + others


@pytest.mark.milestone(task="2.3")
def test_another_configuration_survives_a_file(lab, tmp_path):
    config = {"optimizer": {"type": "AdamW", "params": {"lr": 3e-7, "betas": [0.9, 0.95]}}, "bf16": {"enabled": True}, "x": None}
    lab.save_config(config, tmp_path / "other name.json")
    assert json.loads((tmp_path / "other name.json").read_text()) == config
    assert lab.load_config(tmp_path / "other name.json") == config
    plain = st.none() | st.booleans() | st.integers() | st.sampled_from([0.5, 1e-8, 2.5e-7, 123456.789, "auto", "naïve", "a\nb"])
    inner = st.recursive(plain, lambda values: st.lists(values, max_size=3) | st.dictionaries(st.sampled_from("abc"), values))

    plans = st.tuples(st.dictionaries(st.sampled_from(["stage", "ü"]), inner))
    agree(public.saved(lab, tmp_path), public.saved(REFERENCE, tmp_path), plans, first=[({},)], count=25, record="2.3 save")
    texts = [None, "\ufeff{}", "", "[]", "null", "3", '"{}"', "{", "{}", '{"a": 1}\n\n', '{"a": 1} 2', "hello", "[1,2,]"]
    texts += [
        '{"zero_optimization": null}',
        '{"_comment": "x", "a": {"b": null, "_c": 1}}',
        '{"lr": 2.5e-7, "eps": 1e-8}',
        '# a\n{"a": 1}',
    ]
    texts += ['{"_note": 1, "_note": 2}', '{"wandb": {"host": "https://wandb.example", "group": "#3", "x": "/* no */"}}']
    texts += ['{"a": 1}\n# b', '{"a": 1,\n# b\n"c": 2}', '{"stage": 2, "stage": 3, "overlap_comm": true}']
    texts += ['{"a": 1, "a": 1}', '[{"a": 1, "a": 2}]', '{"a": 1, "b": 2, "a": 3}', '{"a": 1, "A": 2}', '{"path": "/données"}']
    read = public.loaded(lab, tmp_path), public.loaded(REFERENCE, tmp_path)
    agree(*read, st.tuples(inner.map(json.dumps)), first=[(text,) for text in texts], count=25, record="2.3 load")
    for broken, said in (
        ('{"a": {"lr": 1, "lr": 2}}', "lr"),
        ('{"a": 1, # note\n "b": 2}', "DeepSpeed"),
        ("{'a': True}", "read.json"),
    ):
        (tmp_path / "read.json").write_text(broken, encoding="utf-8")
        with pytest.raises(ValueError, match=said):
            lab.load_config(tmp_path / "read.json")


@pytest.mark.milestone(task="2.4")
def test_another_experiment_gets_its_configuration(lab):
    plain = public.text_experiment("long", ranks=4, micro_batch=3, seed=5, max_tokens=96)
    made = lab.with_deepspeed(plain, public.zero_config(3, precision="bf16"), "ZeRO-3 + offload")
    assert (
        made.deepspeed == public.zero_config(3, precision="bf16")
        and made.method == "ZeRO-3 + offload"
        and made.name.startswith("long-")
    )
    assert made.name != lab.with_deepspeed(plain, public.zero_config(1), "ZeRO-1").name
    same = {"name", "method", "deepspeed"}
    assert made.model_dump(exclude=same) == plain.model_dump(exclude=same) and plain.deepspeed is None


@pytest.mark.milestone(task="2.5")
def test_shards_of_other_sizes(lab):
    draw = numbers("2.5")
    for _ in range(12):
        groups = [[draw.randint(1, 5000) for _ in range(draw.randint(1, 6))] for _ in range(draw.randint(1, 3))]
        ranks, stage = draw.randint(2, 17), draw.randint(1, 3)
        wanted = sharded_elements(groups, ranks, stage)
        assert lab.shard_elements(stage, groups, ranks) == wanted, f"{groups} on {ranks} ranks, stage {stage}"
    several = ([[7, 5], [3]], [[4], []], [[9], [2], [1]])
    edges = [(stage, groups, ranks) for stage in range(4) for groups in several for ranks in (1, 3, 4)]
    edges += [(stage, groups, ranks) for stage in range(4) for groups in MANY for ranks in (7, 5000)]
    edges += [(3, groups, 2) for groups in ([[7, 5], [3]], [[6, 6], [3]], [[12], [3]], [[7, 5, 3]])]
    edges += [(1, [[500_000_001]], 2), (1, [[129]], 64), (2, [[33]], 16), (3, [[100_001]], 2), (1, [[1], [2], [3], [4], [5]], 3)]
    drawn = st.tuples(st.integers(0, 3), GROUPS, RANKS)
    agree(public.shard(lab), public.shard(REFERENCE), drawn, first=edges, record="2.5")


@pytest.mark.milestone(task="2.6", ranks=3)
def test_bytes_that_three_ranks_hold(lab, run_experiments):
    lab.replace("shard_elements", REFERENCE.shard_elements)
    plans = [
        public.text_experiment(
            f"three-zero{stage}", deepspeed=public.zero_config(stage), model=odd_model(), ranks=3, steps=2, seed=3
        )
        for stage in (1, 2, 3)
    ]
    for stage, run in enumerate(run_experiments(plans, reference=True).values(), start=1):
        states = run.states()
        for held in states["ranks"]:
            got = lab.state_bytes(stage, states["groups"], 3, "fp32")
            assert got == {kind: held[kind] for kind in ("parameters", "gradients", "optimizer")}, f"stage {stage}"
    arguments = st.tuples(st.integers(0, 3), GROUPS, RANKS, st.sampled_from(["fp32", "bf16", "fp16"]))
    precisions, groups = ("fp32", "bf16", "fp16"), [[7, 5], [3]]
    edges = [(stage, groups, ranks, precision) for stage in range(4) for ranks in (1, 2, 3, 64) for precision in precisions]
    edges += [(stage, [[at + 1, 10**9 + at] for at in range(70)], ranks, "bf16") for stage in range(4) for ranks in (8, 4096)]
    stand_in = lambda stage, groups, ranks: 2 * ranks * len(groups) if stage else sum(map(sum, groups))
    lab.replace("shard_elements", stand_in)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(REFERENCE, "shard_elements", stand_in)
        agree(public.predicted(lab), public.predicted(REFERENCE), arguments, first=edges, record="2.6")


@pytest.mark.milestone(task="2.7")
def test_row_of_another_run(lab, tmp_path):
    lab.replace(
        "state_bytes", lambda stage, groups, ranks, precision: {"parameters": 7 * stage, "gradients": ranks, "optimizer": 0}
    )
    plan = public.text_experiment("other", ranks=5, deepspeed=public.zero_config(3), method="three", precision="fp32")
    run = Run.create(plan, tmp_path)
    run.start()
    for step, (loss, speed) in enumerate(((9.0, 2.0), (8.0, 50.0), (8.5, 70.0), (4.0, 60.0), (5.0, 65.0)), start=1):
        run.log_step(step=step, loss=loss, samples_per_second=speed, steps=5)
    ranks = [{"parameters": p, "gradients": 1, "optimizer": o} for p, o in ((5, 5), (9, 2), (4, 9), (1, 1), (8, 4))]
    run.write_states({"parameters": 10, "groups": [[10]], "ranks": ranks})
    run.finish()
    got = lab.comparison_row(Run.read(run.folder))
    assert (got["first_loss"], got["last_loss"], got["ranks"], got["method"]) == (9.0, 5.0, 5, "three")
    assert (got["measured"], got["predicted"]) == (14, 26)
    assert got["samples_per_second"] == run.samples_per_second()
    kinds = st.fixed_dictionaries(dict.fromkeys(("parameters", "gradients", "optimizer"), st.integers(0, 20)))
    loss, speed = (
        st.integers(1, 9_999_999).map(lambda number: number / 1_000_000),
        st.integers(1, 9999).map(lambda number: number / 100),
    )
    steps = st.lists(st.tuples(loss, speed), min_size=2, max_size=6)
    zero = st.none() | st.fixed_dictionaries({}, optional={"stage": st.integers(0, 3)})
    held = st.lists(kinds, min_size=1, max_size=4) | st.lists(kinds, min_size=12, max_size=17)
    row = dict.fromkeys(("parameters", "gradients", "optimizer"), 1)
    long = [(9.0 - at / 50, 10.0 + at) for at in range(60)]
    offloaded = [row | {"host_parameters": 9, "host_optimizer": 40, "disk_optimizer": 100}]
    edges = [([row] * 99 + [row | {"optimizer": 30}], long, {"stage": 2}, "bf16", True), (offloaded, long, None, "fp32", False)]
    drawn = st.tuples(held, steps, zero, st.sampled_from(["fp32", "bf16", "fp16"]), st.booleans())

    lab.replace("state_bytes", public.bytes_by_all_arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(REFERENCE, "state_bytes", public.bytes_by_all_arguments)
        agree(public.row(lab, tmp_path), public.row(REFERENCE, tmp_path), drawn, first=edges, count=25, record="2.7")


@pytest.mark.milestone(task="2.8")
def test_other_models_and_devices(lab):
    draw = numbers("2.8")

    def bytes_of(stage: int, parameters: int, ranks: int) -> float:
        parts = ((2, stage >= 3), (2, stage >= 2), (12, stage >= 1))
        return sum(each * parameters / (ranks if sharded else 1) for each, sharded in parts)

    for _ in range(20):
        parameters, ranks = 1000 * 2 ** draw.randint(3, 12), 2 ** draw.randint(1, 5)
        other = draw.choice((0, parameters))
        device = int(parameters * draw.uniform(1, 18)) + other
        fits = [stage for stage in range(4) if bytes_of(stage, parameters, ranks) + other <= device]
        if fits:
            assert lab.choose_stage(parameters, ranks, device, other) == fits[0], (parameters, ranks, device, other)
        else:
            with pytest.raises(ValueError):
                lab.choose_stage(parameters, ranks, device, other)

    @st.composite
    def models(draw) -> tuple:
        ranks = draw(st.integers(1, 64) | st.sampled_from([128, 512, 2048, 10_000]))
        parameters = ranks * draw(st.integers(1, 10**8) | st.integers(10**9, 10**11))
        other = draw(st.sampled_from([0, 1, parameters, 3 * 2**30]))
        at_the_limit = int(bytes_of(draw(st.integers(0, 3)), parameters, ranks)) + other + draw(st.sampled_from([-1, 0, 1]))
        return parameters, ranks, draw(st.just(at_the_limit) | st.integers(1, 20 * parameters)), other

    agree(lab.choose_stage, REFERENCE.choose_stage, models(), count=80, record="2.8")
    cases = [
        (10**10, 4, 10**10, 7 * 2**30),
        (3 * 10**10, 8, 2**34, 0),
        (7 * 10**9, 2, 40 * 2**30, 0),
        (176 * 10**9, 8, 80 * 2**30, 0),
    ]
    for parameters, ranks, device, other in [*cases, (10**10, 4, 16 * 2**30, 40 * 2**30)]:
        with pytest.raises(ValueError) as refused:
            lab.choose_stage(parameters, ranks, device, other)
        missing = (bytes_of(3, parameters, ranks) + other - device) / 2**30
        assert any(abs(float(number) - missing) < 0.06 for number in re.findall(r"\d+(?:\.\d+)?", str(refused.value)))
