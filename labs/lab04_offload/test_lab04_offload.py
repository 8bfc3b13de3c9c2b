"""Milestones of lab 04. The judges are DeepSpeed's configuration, the bytes that ranks hold, files on the disk, and real checkpoints."""

import copy
import json
import operator
import shutil
from math import ceil
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest

from shardlab.hardware import gpu_count
from shardlab.milestones import engine_runs, small_runs
from shardlab.milestones.agreement import agree_as_recorded
from shardlab.milestones.launches import once, shared_folder, visible_folder
from shardlab.milestones.messages import farthest, require, require_equal, require_error
from shardlab.milestones.saved_weights import safely_loaded
from shardlab.milestones.small_runs import zero_config
from shardlab.run.experiment import Experiment, program_of
from shardlab.run.launch import RankError
from shardlab.zero import memory_model

PROGRAMS = "labs/lab04_offload/programs.py"
SUB_GROUP = 300_000  # elements; cuts bloom-tiny into sub-groups of which some are too small for the disk


def fresh(folder: Path) -> Path:
    """The folder, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def config(zero: dict, *, precision: str = "fp32", auto: bool = True, **changes) -> dict:
    sizes = {} if auto else {"micro_batch": 2, "accumulation": 1, "ranks": 2}
    return zero_config(zero, **sizes, precision=precision, adam={"lr": 1e-3}, **changes)


def text_experiment(name: str, **changes) -> Experiment:
    return small_runs.text_experiment(name, **({"train_examples": 16} | changes))


@pytest.fixture
def judge(monkeypatch):
    """DeepSpeed's own check of a configuration, for two ranks."""
    monkeypatch.setenv("DS_ACCELERATOR", "cuda" if gpu_count() else "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    # It asks for a process group first, and takes the world for one rank if there is none.
    monkeypatch.setattr("deepspeed.runtime.config.dist.get_rank", lambda: 0)
    ranks = SimpleNamespace(get_data_parallel_world_size=lambda: 2)
    return lambda part: DeepSpeedConfig(copy.deepcopy(config(auto=False, zero={}) | part), mpu=ranks)


@pytest.mark.milestone(task="4.1", points=15, section="Where states can lie")
def test_offload_configuration(lab, judge, tmp_path):
    create = lab.create_offload_config
    cpu, nvme = {"device": "cpu", "pin_memory": True}, {"device": "nvme", "pin_memory": True, "nvme_path": str(tmp_path)}
    aio = {"block_size": 2**20, "queue_depth": 8, "intra_op_parallelism": 1, "single_submit": False, "overlap_events": True}
    at_once = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    on_disk = {"offload_device": "nvme", "nvme_path": tmp_path}
    cases = [
        ("no offload, stage 1", {"stage": 1}, {"stage": 1}),
        ("no offload, though a path is given", {"stage": 1} | on_disk, {"stage": 1}),
        ("optimizer to the CPU, stage 2", {"stage": 2, "optimizer_offload": True}, {"stage": 2, "offload_optimizer": cpu}),
        (
            "both to the CPU, pageable",
            {"stage": 3, "optimizer_offload": True, "param_offload": True, "pin_memory": False},
            {"stage": 3, "offload_optimizer": cpu | {"pin_memory": False}, "offload_param": cpu | {"pin_memory": False}},
        ),
        ("parameters alone", {"stage": 3, "param_offload": True}, {"stage": 3, "offload_param": cpu}),
        ("optimizer to NVMe", {"stage": 3, "optimizer_offload": True} | on_disk, {"stage": 3, "offload_optimizer": nvme}),
        (
            "both to NVMe",
            {"stage": 3, "optimizer_offload": True, "param_offload": True, "largest_parameter": 1000} | on_disk,
            {"stage": 3, "offload_optimizer": nvme, "offload_param": nvme | {"buffer_size": 1000}} | at_once,
        ),
    ]
    for what, arguments, zero in cases:
        try:
            got = create(**arguments)
        except ValueError as error:
            require(
                False,
                expected=f"no error for {what}: create_offload_config(**{arguments})",
                got=f"ValueError: {error}",
            )
        swapped = any(isinstance(value, dict) and value["device"] == "nvme" for value in zero.values())
        wanted = {"zero_optimization": zero} | ({"aio": aio} if swapped else {})
        require(
            got == wanted,
            expected=f"{wanted} ({what})",
            got=got,
        )
        seen = judge(got).zero_config
        moved = [str(getattr(getattr(seen, part), "device", None)) for part in ("offload_optimizer", "offload_param")]
        require(
            [("nvme" in text or "cpu" in text) for text in moved]
            == [part in zero for part in ("offload_optimizer", "offload_param")],
            expected=f"DeepSpeed to see the same ({what})",
            got=moved,
        )
    got = create(3, optimizer_offload=True, aio={"queue_depth": 32}, **on_disk)["aio"]
    require(
        not list(tmp_path.iterdir()),
        expected="an nvme_path with nothing in it afterwards: what shows that it can be written into is removed again",
        got=[path.name for path in tmp_path.iterdir()],
    )
    require(
        got == aio | {"queue_depth": 32} and lab.AIO == aio,
        expected="the given aio settings over the defaults, and AIO itself unchanged",
        got=got,
    )

    def refused(what: str, mentions: tuple, **arguments) -> None:
        require_error(lambda: create(**arguments), ValueError, mentions=mentions, expected=f"ValueError for {what}")

    both = {"stage": 3, "optimizer_offload": True}
    refused("stage 4", ("stage", "4"), stage=4)
    refused("stage -1", ("stage", "-1"), stage=-1)
    for device in ("disk", "nvm", "c", ""):
        refused(f"the device {device!r}", ("offload_device", device or "device"), stage=1, offload_device=device)
    refused("stage 2.5", ("stage", "2.5"), stage=2.5)
    refused("stage '3', a text", ("stage", "3"), stage="3")
    refused("parameters below stage 3", ("param_offload", "2"), stage=2, param_offload=True)
    refused("the optimizer at stage 0", ("optimizer_offload", "stage", "0"), stage=0, optimizer_offload=True)
    refused(
        "NVMe below stage 3",
        ("nvme", "stage", "2"),
        **(both | on_disk | {"stage": 2}),
    )
    refused("NVMe without a path", ("nvme_path",), offload_device="nvme", **both)
    refused("NVMe with an empty path", ("nvme_path",), **(both | on_disk | {"nvme_path": ""}))
    refused(
        "a path that is not there",
        ("missing",),
        **(both | on_disk | {"nvme_path": tmp_path / "missing"}),
    )
    file = tmp_path / "a-file"
    file.write_text("")
    refused("a path that is a file", ("a-file",), **(both | on_disk | {"nvme_path": file}))
    refused(
        "a folder that nobody can write (/proc)",
        ("/proc",),
        **(both | on_disk | {"nvme_path": "/proc"}),
    )
    refused(
        "a folder that nobody can write, though its permissions say that root can (/sys/devices/system)",
        ("/sys/devices/system",),
        **(both | on_disk | {"nvme_path": "/sys/devices/system"}),
    )
    free = shutil.disk_usage(tmp_path).free
    refused("less room than is needed", (str(tmp_path),), bytes_on_disk=10 * free, **(both | on_disk))
    require(
        sorted(path.name for path in tmp_path.iterdir()) == ["a-file"],
        expected="nothing left in an nvme_path that was refused",
        got=sorted(path.name for path in tmp_path.iterdir()),
    )
    for path in (tmp_path / "missing", file, "/proc", ""):
        require_error(
            lambda path=path: lab.check_nvme_path(path, 0),
            ValueError,
            mentions=(str(path) or "nvme_path",),
            expected=f"ValueError from check_nvme_path({str(path)!r}, 0) itself",
        )
    left_over = tmp_path / "zero_stage_3" / "optimizer" / "rank0" / "0_5.tensor.swp"  # of a run before
    left_over.parent.mkdir(parents=True)
    left_over.write_bytes(b"x" * 4096)
    require_error(
        lambda: lab.observe(f"{PROGRAMS}:configure_offload_with_free_bytes", tmp_path, 1000, 1001),
        ValueError,
        expected="ValueError where 1000 bytes are free of a disk of 100,000, and 1001 are needed",
    )
    for name, words in (
        ("EROFS", "a read-only disk"),
        ("ENOSPC", "a full disk"),
        ("EDQUOT", "a disk whose quota is used up"),
        ("EIO", "a broken disk"),
    ):
        require_error(
            lambda name=name: lab.observe(f"{PROGRAMS}:configure_offload_on_a_disk_that_says", tmp_path, name),
            ValueError,
            mentions=(str(tmp_path),),
            expected=f"ValueError that names the path, on {words} ({name})",
        )
    require_error(
        lambda: lab.observe(f"{PROGRAMS}:configure_offload_where_files_stay_empty", tmp_path),
        ValueError,
        mentions=(str(tmp_path),),
        expected="ValueError that names the path, on a disk where a file can be made and nothing written into it",
    )
    left = sorted(path.name for path in tmp_path.iterdir())
    require_equal(left, ["a-file", "zero_stage_3"], of="what is in that folder afterwards: all as it was")
    shutil.rmtree(tmp_path / "zero_stage_3")
    lost = lab.observe(f"{PROGRAMS}:files_overwritten", tmp_path)
    require(not lost, expected="files that are in the nvme_path to stay as they are, whatever their names", got=f"{lost} lost")
    # Only the folder's own disk counts.
    try:
        lab.observe(f"{PROGRAMS}:configure_offload_with_free_bytes", tmp_path, 1000, 1000)
    except ValueError as error:
        require(
            False,
            expected="no error where just as many bytes are free as are needed",
            got=f"ValueError: {error}",
        )
    for path, needed in ((None, 0), (tmp_path, 10 * free)):
        require_error(
            lambda path=path, needed=needed: lab.check_nvme_path(path, needed),
            ValueError,
            expected=f"ValueError from check_nvme_path({path and 'a folder'}, {needed:,}) itself",
        )
    without_bits = lab.observe(f"{PROGRAMS}:tried_without_write_bits", tmp_path)
    require(
        without_bits["accepted"] == without_bits["can_be_written"],
        expected=f"a folder of mode 0555 {'accepted' if without_bits['can_be_written'] else 'refused'}: this account "
        f"{'can' if without_bits['can_be_written'] else 'cannot'} write into it, as trying shows",
        got="accepted" if without_bits["accepted"] else "ValueError",
    )
    refused("an aio setting that does not exist", ("depth",), aio={"depth": 1}, **(both | on_disk))
    refused("an aio setting that DeepSpeed has and AIO has not", ("use_gds",), aio={"use_gds": True}, **(both | on_disk))
    refused(
        "parameters on NVMe without largest_parameter",
        ("largest_parameter",),
        **(both | on_disk | {"param_offload": True}),
    )
    agree_as_recorded(
        created(lab, tmp_path), __file__, "4.1", "create_offload_config(**…) of {}; 'here' is a folder, 'file' a file"
    )


def created(of, folder):
    """As JSON, where True is not 1; paths within the folder are told by their last part."""

    def create(given: dict) -> str:
        (folder / "file").touch()
        places = {"here": folder, "absent": folder / "absent", "file": folder / "file"}
        named = {"nvme_path": str(places[given["nvme_path"]])} if given.get("nvme_path") else {}
        return json.dumps(of.create_offload_config(**(given | named)), sort_keys=True).replace(str(folder), "here")

    return create


WAYS = {"none": (False, False), "optimizer": (True, False), "parameters": (False, True), "both": (True, True)}
MEASURED = [
    (1, "optimizer", "bf16"),
    (2, "optimizer", "fp32"),
    (2, "optimizer", "bf16"),
    (3, "optimizer", "fp32"),
    (3, "parameters", "fp32"),
    (3, "both", "bf16"),
]
"""What is run on two ranks: stage, what is offloaded, precision."""


def offload_runs(run_experiments) -> dict:
    """A run a row of `MEASURED`, of a model whose shards are all padded."""
    experiments = []
    for stage, what, precision in MEASURED:
        zero: dict = {"stage": stage}
        for part, wanted in zip(("offload_optimizer", "offload_param"), WAYS[what]):
            zero |= {part: {"device": "cpu", "pin_memory": True}} if wanted else {}
        experiments.append(
            text_experiment(
                f"stage{stage}-{what}-{precision}",
                deepspeed=config(zero, precision=precision),
                precision=precision,
                model=engine_runs.odd_model(),
                accumulation=1,
            )
        )
    return run_experiments(experiments, reference=True)


@pytest.mark.milestone(task="4.2", points=20, ops=("cpu_adam",), section="What moves")
def test_offloaded_bytes_are_those_that_ranks_hold(lab, run_experiments):

    def predicted(stage: int, states: dict, shard: int, what: str, precision: str) -> dict:
        optimizer, parameters = WAYS[what]
        return lab.offload_bytes(stage, dict(states), shard, precision, optimizer_offload=optimizer, param_offload=parameters)

    by_hand = {"parameters": 200, "gradients": 100, "optimizer": 600}
    require_equal(
        predicted(2, by_hand, 50, "optimizer", "bf16"),
        {"device": 200, "host": 800},
        of=f"offload_bytes(2, {by_hand}, 50, 'bf16', optimizer_offload=True): the host has (12 + 4)·50 bytes",
    )
    given = {"parameters": 1000, "gradients": 700, "optimizer": 1200}
    for stage, what, precision, device, host in (
        (1, "none", "bf16", 2900, 0),
        (1, "optimizer", "fp32", 1000, 1600),
        (2, "optimizer", "fp16", 1000, 1600),
        (3, "none", "fp32", 2900, 0),
        (3, "optimizer", "bf16", 1000, 1800),
        (3, "optimizer", "fp16", 1000, 1800),
        (3, "optimizer", "fp32", 1000, 2000),
        (3, "parameters", "fp32", 1900, 1000),
        (3, "both", "bf16", 0, 2800),
    ):
        require_equal(
            predicted(stage, given, 100, what, precision),
            {"device": device, "host": host},
            of=f"offload_bytes({stage}, {given}, 100, {precision!r}) with offload of: {what}",
        )
    states = dict(given)
    for parameters in (1000, 5000):
        states["parameters"] = parameters  # one dictionary, filled anew
        got = lab.offload_bytes(2, states, 100, "bf16", optimizer_offload=True)
        require_equal(got["device"], parameters, of=f"offload_bytes(2, {states}, 100, 'bf16', optimizer_offload=True)['device']")
    for (stage, what, precision), run in zip(MEASURED, offload_runs(run_experiments).values(), strict=True):
        held, groups = memory_model.States(**run.states()["ranks"][0]), run.states()["groups"]
        width, shard = {"fp32": 4, "bf16": 2}[precision], (held.optimizer + held.host_optimizer) // 12
        states = {
            "parameters": held.parameters + held.host_parameters,
            "gradients": width * (shard if stage >= 2 else sum(map(sum, groups))),
            "optimizer": held.optimizer + held.host_optimizer,
        }
        require_equal(
            predicted(stage, states, shard, what, precision),
            {"device": held.device, "host": held.host},
            of=f"offload_bytes({stage}, {states}, {shard}, {precision!r}) with offload of: {what}, which rank 0 of 2 held",
        )
    agree_as_recorded(moved(lab), __file__, "4.2", "offload_bytes{}, of (stage, states, shard, precision, **what is offloaded)")


def moved(of):
    """As JSON, where 2 is not 2.0."""
    return lambda *given: json.dumps(of.offload_bytes(*given[:-1], **given[-1]), sort_keys=True)


@pytest.mark.milestone(task="4.3", points=15, ops=("cpu_adam", "pin_memory", "async_io"), section="On disk")
def test_bytes_on_disk(lab, run_experiments, tmp_path):
    cases = [
        ([[2**18]], 1, 3 * 2**20, "a tensor of just 1 MiB is written"),
        ([[2**18 - 1]], 1, 0, "a tensor of less than 1 MiB stays in memory"),
        ([[2**18 + 1]], 1, 3 * (2**20 + 1024), "one element more takes a whole block of 1,024 bytes"),
        (
            [[1001] * 600],
            2,
            3 * 1175 * 1024,
            "each of the 600 parameters is cut on its own, 501 elements on each rank, and together they are one tensor of 300,600",
        ),
        ([[401] * 3000], 2, 3 * 2356 * 1024, "3,000 parameters of 201 elements on each rank"),
        ([[1_572_863]], 6, 3 * 2**20, "⌈1,572,863 / 6⌉ = 262,144 elements on each of 6 ranks"),
        ([[2**18, 2**18 + 1], [100]], 2, 3 * (2**20 + 1024), "stage 3 rounds each parameter up: 131,072 + 131,073 elements"),
    ]
    for groups, ranks, wanted, why in cases:
        shown = groups if len(groups[0]) < 4 else f"[[{groups[0][0]}, … {len(groups[0])} times]]"
        require(
            lab.swapped_bytes(groups, ranks) == wanted,
            expected=f"{wanted:,} bytes for the sub-groups {shown} on {ranks} ranks: {why}",
            got=lab.swapped_bytes(groups, ranks),
        )
    experiments, paths = [], {}
    for name, limit in (("one", 10**9), ("several", SUB_GROUP)):
        paths[name] = visible_folder() / "offload" / f"disk-{name}"
        paths[name].mkdir(parents=True, exist_ok=True)
        zero = {"stage": 3, "sub_group_size": limit, "offload_optimizer": {"device": "nvme", "nvme_path": str(paths[name])}}
        experiments.append(text_experiment(name, deepspeed=config(zero)))
    runs = run_experiments(experiments, reference=True)
    for name, run in runs.items():
        groups = run.states()["groups"]
        real = sum(path.stat().st_size for path in (paths[name] / "zero_stage_3" / "optimizer" / "rank1").iterdir())
        got = lab.bytes_found(paths[name], 1)
        require(
            got == real,
            expected=f"{real:,} bytes in the files of rank 1",
            got=f"{got:,}",
        )
        require(
            lab.swapped_bytes(groups, 2) == real,
            expected=f"{real:,} bytes, as rank 1 has on disk (sub-groups of {[sum(ceil(s / 2) for s in g) for g in groups]} elements)",
            got=f"{lab.swapped_bytes(groups, 2):,}",
        )
    disk = tmp_path / "with_gradient_in_its_name" / "run[1]*"
    parameters = disk / "zero_stage_3" / "bfloat16params" / "rank1"  # of a run with both on NVMe
    parameters.mkdir(parents=True)
    (parameters / "0_param.tensor.swp").write_bytes(b"x" * 512)
    of_another_run = disk / "run2" / "zero_stage_3" / "optimizer" / "rank1"
    of_another_run.mkdir(parents=True)
    (of_another_run / "0_5.tensor.swp").write_bytes(b"x" * 256)
    for rank, block in ((1, 1024), (10, 8192), (0, 2048), (104, 16_384), (4, 512)):
        folder = disk / "zero_stage_3" / "optimizer" / f"rank{rank}"
        folder.mkdir(parents=True)
        for file, blocks in (("0_5.tensor.swp", 1), ("exp_avg-gradients.swp", 2), ("0_5_gradient_0_256.tensor.swp", 4)):
            (folder / file).write_bytes(b"x" * blocks * block)
    for path in (disk, str(disk)):
        require(
            lab.bytes_found(path, 1) == 3072,
            expected="1024 + 2048 bytes in the files of rank 1; the one with _gradient_ in its name is left over from the last step",
            got=lab.bytes_found(path, 1),
        )
    got = [lab.bytes_found(disk, rank) for rank in (0, 10, 104, 4)]
    require_equal(
        got,
        [3 * 2048, 3 * 8192, 3 * 16_384, 3 * 512],
        of="bytes_found() of ranks 0, 10, 104 and 4, each with files of its own size",
    )
    (folder.parent / "rank1" / "1_5.tensor.swp").write_bytes(b"x" * 100)
    require_equal(lab.bytes_found(disk, 1), 3172, of="bytes_found() of rank 1, when a file of 100 bytes has been added since")
    (folder.parent / "rank1" / "1_5.tensor.swp").write_bytes(b"x" * 300)
    require_equal(lab.bytes_found(disk, 1), 3372, of="bytes_found() of rank 1, when that file has grown to 300 bytes")
    agree_as_recorded(swapped(lab), __file__, "4.3", "swapped_bytes{}, of (groups, ranks)")


def swapped(of):
    """As JSON, where 2 is not 2.0."""
    return lambda *given: json.dumps(of.swapped_bytes(*given))


@pytest.mark.milestone(task="4.4", points=10, ops=("cpu_adam",), section="Adam on the host")
def test_two_optimizers_take_the_same_steps(lab):
    import torch

    seen = lab.observe(f"{PROGRAMS}:compare_two_sums", 50, 5, 7)
    got, first, second = seen["returned"], seen["first"], seen["second"]
    require(
        not seen["same_tensor"] and torch.equal(first["start"], second["start"]),
        expected="two parameters with the same numbers, each in a tensor of its own",
        got="one tensor for both" if seen["same_tensor"] else "different numbers",
    )
    drawn = {"parameters": first["start"], "gradients": first["gradients"][0]}
    for what, numbers in drawn.items():
        require(
            len(set(numbers.tolist())) > 40 and numbers.min() < 0 < numbers.max(),
            expected=f"{what} of 50 random numbers, of both signs",
            got=numbers.tolist()[:5],
        )
    require(
        not torch.equal(*drawn.values()),
        expected="a gradient of numbers of its own",
        got="those of the parameter once more: the same generator draws both, one after the other",
    )
    again, other = (lab.observe(f"{PROGRAMS}:compare_two_sums", 50, 2, seed)["first"] for seed in (7, 8))
    for what, wanted, came in (("same", True, again), ("other", False, other)):
        for part, numbers in drawn.items():
            require(
                torch.equal(numbers, came["start"] if part == "parameters" else came["gradients"][0]) == wanted,
                expected=f"the {what} {part} with the {what} seed",
                got="others" if wanted else "the same",
            )
    equal = len(first["gradients"]) == len(second["gradients"]) == 5 and all(
        map(torch.equal, first["gradients"], second["gradients"])
    )
    require(
        equal,
        expected="5 steps each, with the same gradients",
        got=f"{len(first['gradients'])} and {len(second['gradients'])} steps" + ("" if equal else ", with different gradients"),
    )
    require(
        not torch.equal(first["gradients"][0], first["gradients"][1]),
        expected="new gradients for each step",
        got="the same gradients in steps 1 and 2",
    )
    wanted = (2 * sum(first["gradients"])).abs().max().item()
    require(
        isinstance(got["largest_difference"], float) and abs(got["largest_difference"] - wanted) < 1e-5,
        expected=f"the largest absolute difference of the parameters, a float: {wanted:.4f}",
        got=got["largest_difference"],
    )
    require(
        seen["left_alone"],
        expected="torch's own random generator and number of threads as they were before",
        got="changed",
    )
    require(
        seen["threads"] == [2],
        expected="each step taken with the number of threads that was set, 2",
        got=seen["threads"],
    )
    for size, factor, first_element, words in (
        (50, 1.0 + 2e-7, 0, "that differ by rounding"),
        (1_500_000, 3.0, 1_499_999, "of 1.5 million elements that differ in the last one"),
    ):
        close = lab.observe(f"{PROGRAMS}:compare_two_sums", size, 2, 7, factor, first_element)
        require(
            close["returned"]["largest_difference"] == close["apart"] > 0,
            expected=f"a largest_difference of {close['apart']} for two {words}",
            got=close["returned"]["largest_difference"],
        )
    lost = lab.observe(f"{PROGRAMS}:compare_two_sums", 50, 2, 7, float("nan"), 49)["returned"]["largest_difference"]
    require(lost != lost, expected="a largest_difference of nan where an optimizer has made an element nan", got=lost)
    took, timed = seen["seconds"], {"first_seconds": 1, "second_seconds": 3}
    require(
        all(abs(got[key] - median(took[factor][1:])) < 1e-9 for key, factor in timed.items()),
        expected="the median of all steps but the first: "
        + ", ".join(f"{median(took[factor][1:])} of {took[factor]} s" for factor in (1, 3)),
        got={key: got[key] for key in timed},
    )
    for seed in (7, 0):
        draw = torch.Generator().manual_seed(seed)
        wanted = [torch.randn(50, generator=draw) for _ in range(7)]
        seen = lab.observe(f"{PROGRAMS}:compare_two_sums", 50, 6, seed)
        took = {factor: median(seen["seconds"][factor][1:]) for factor in (1, 3)}
        came = {1: seen["returned"]["first_seconds"], 3: seen["returned"]["second_seconds"]}
        require(
            all(abs(came[factor] - took[factor]) < 1e-9 for factor in took),
            expected=f"the median of 5 timed steps, of {seen['seconds'][1][1:]} s: {took[1]}",
            got=came[1],
        )
        for part in ("first", "second"):
            drawn = [seen[part]["start"], *seen[part]["gradients"]]
            wrong = [number for number, (a, b) in enumerate(zip(drawn, wanted, strict=False)) if not torch.equal(a, b)]
            require(
                len(drawn) == 7 and not wrong,
                expected=f"for the {part} optimizer, the parameter and 6 gradients as one generator with seed {seed} draws them in turn",
                got="another parameter"
                if wrong[:1] == [0]
                else f"other gradients in step {wrong[0]}"
                if wrong
                else f"{len(drawn) - 1}",
            )
    seen = lab.observe(f"{PROGRAMS}:compare_two_sums", 50, 20, 7)
    wanted = median(seen["seconds"][1][1:])
    require(
        abs(seen["returned"]["first_seconds"] - wanted) < 1e-9,
        expected=f"the median of all 19 steps after the first, {wanted} s",
        got=seen["returned"]["first_seconds"],
    )
    real = lab.observe(f"{PROGRAMS}:compare_adams", 10_000, 20)
    require(
        real["largest_difference"] < 1e-5,
        expected="DeepSpeedCPUAdam and torch's AdamW within 1e-5 after 20 steps",
        got=real["largest_difference"],
    )
    require(
        min(real["first_seconds"], real["second_seconds"]) > 0,
        expected="seconds as they were measured: a step of 10,000 elements takes some microseconds, and the notebook divides by them",
        got=f"{real['first_seconds']} and {real['second_seconds']} s",
    )


@pytest.mark.milestone(task="4.5", points=15, section="What a step pays")
def test_accumulation_pays_for_offload(lab):
    a, b = lab.fit_step_time([1, 2, 4, 8], [0.5, 0.7, 1.1, 1.9])
    require(
        abs(a - 0.2) < 1e-9 and abs(b - 0.3) < 1e-9,
        expected="a = 0.2 s and b = 0.3 s through (1, 0.5), (2, 0.7), (4, 1.1), (8, 1.9)",
        got=(a, b),
    )
    a, b = lab.fit_step_time([1, 2, 3], [1.0, 1.0, 4.0])
    require(
        abs(a - 1.5) < 1e-9 and abs(b + 1.0) < 1e-9,
        expected="a = 1.5, b = −1 through (1, 1), (2, 1), (3, 4), by least squares",
        got=(a, b),
    )
    plain, offloaded = (0.1, 0.05), (0.125, 0.4)
    for accumulation, wanted in ((1, 0.15 / 0.525), (4, 0.45 / 0.9), (1000, 100.05 / 125.4)):
        got = lab.share_kept(accumulation, plain, offloaded)
        require(
            abs(got - wanted) < 1e-9,
            expected=f"{wanted:.4f} of the samples/s at accumulation {accumulation}, with (a, b) = {plain} and {offloaded}",
            got=got,
        )
    got = lab.share_kept(1, (0.5, -0.25), (0.625, 0.125))
    require(
        abs(got - 0.25 / 0.75) < 1e-9,
        expected="0.3333 for (a, b) = (0.5, -0.25) and (0.625, 0.125), as lines through noise are",
        got=got,
    )
    for share, plain_line, offloaded_line, wanted in (
        (1.0, (1.125, 0.5), (1.0, 3.0), 20),
        (1.0625, (1.125, 0.5), (1.0, 3.0), 43),
        (0.5, (1.0, 0.0), (1.0, 2e6), 2_000_000),
    ):
        got = lab.accumulation_for(share, plain_line, offloaded_line)
        require_equal(got, wanted, of=f"accumulation_for({share}, {plain_line}, {offloaded_line})")
    a, b = lab.fit_step_time(*map(list, zip(*REPEATED)))
    require(
        max(abs(sum(a * x + b - y for x, y in REPEATED)), abs(sum((a * x + b - y) * x for x, y in REPEATED))) < 1e-6,
        expected="the line through all six times of [1, 1, 1, 1, 4, 9], each counted once: the errors add up to 0, and so do the errors times the accumulation",
        got=(a, b),
    )
    far = lab.accumulation_for(0.8 - 1e-9, (1.0, 0.5), (1.25, 100.0))
    require(
        isinstance(far, int) and abs(far / 6.36e10 - 1) < 1e-3,
        expected="about 63,600,000,000 for a share of 0.799999999, just below the limit of 0.8",
        got=far,
    )
    for share in (0.2, 0.28, 0.29, 0.51, 0.6, 0.76, 0.79):
        wanted = next(k for k in range(1, 10_000) if (plain[0] * k + plain[1]) / (offloaded[0] * k + offloaded[1]) >= share)
        got = lab.accumulation_for(share, plain, offloaded)
        require(
            got == wanted and isinstance(got, int),
            expected=f"{wanted}, the smallest accumulation that keeps {share:.0%}",
            got=got,
        )
    for share in (0.9, 0.8):
        got = lab.accumulation_for(share, plain, offloaded)
        require(
            got is None,
            expected=f"None for {share:.0%}: the limit is {plain[0]} / {offloaded[0]} = 80 %, and it is never reached",
            got=got,
        )
    agree_as_recorded(lab.share_kept, __file__, "4.5 share", "share_kept{}, of (accumulation, plain, offloaded)")
    agree_as_recorded(accumulation_of(lab), __file__, "4.5 accumulation", "accumulation_for{}, of (share, plain, offloaded)")
    agree_as_recorded(lab.fit_step_time, __file__, "4.5 fit", "fit_step_time{}, of (accumulations, seconds)")


REPEATED = ((1, 1.0), (1, 1.5), (1, 2.0), (1, 1.5), (4, 3.0), (9, 8.0))


def accumulation_of(of):
    """As text: 2.0 is no accumulation."""
    return lambda *given: repr(of.accumulation_for(*given))


@pytest.mark.milestone(task="4.6", points=5, section="What fits")
def test_largest_model_that_fits(lab):
    limits = {"ranks": 4, "device_bytes": 10_000, "host_bytes": 64_000}
    cases = [
        ("16 bytes per parameter on the device", lambda n: {"device": 16 * n, "host": 0}, 625),
        ("the host is the limit: 4 ranks share it", lambda n: {"device": 2 * n, "host": 40 * n}, 400),
        (
            "padding: 1 to 64 parameters take 100 bytes, 65 to 128 take 200",
            lambda n: {"device": 100 * ceil(n / 64), "host": 0},
            6400,
        ),
        ("padding, and a byte besides", lambda n: {"device": 100 * ceil(n / 64) + 1, "host": 0}, 6336),
        ("less than a byte a parameter, as of ZeRO-3 on many ranks", lambda n: {"device": ceil(n / 8), "host": 0}, 80_000),
        ("less than a byte a parameter on the host", lambda n: {"device": 0, "host": ceil(n / 8)}, 128_000),
        (
            "a formula in integers of 64 bits, 16 bytes per parameter",
            lambda n: {"device": (16 * n + 2**63) % 2**64 - 2**63, "host": 0},
            625,
        ),
        (
            "a formula that is worked out up to 2,000 parameters only",
            lambda n: {"device": 16 * n, "host": 0} if n <= 2000 else {"device": 1 // (n < 0), "host": 0},
            625,
        ),
        ("nothing fits", lambda n: {"device": 20_000 + n, "host": 0}, 0),
        ("5,000 bytes besides", lambda n: {"device": 5_000 + 10 * n, "host": 0}, 500),
        ("a formula for models of at least one parameter", lambda n: {"device": 10 * (n // min(n, 1)), "host": 0}, 1000),
    ]
    for what, bytes_of, wanted in cases:
        got = lab.largest_model(bytes_of, **limits)
        require(
            got == wanted,
            expected=f"{wanted:,} parameters ({what}; 10,000 bytes per device, 64,000 on the host)",
            got=got,
        )
    agree_as_recorded(
        largest(lab), __file__, "4.6", "largest_model() of (device and host bytes per parameter, ranks, room on each) {}"
    )


def largest(of):
    """As text: 2.0 is no number of parameters. Twice, with a formula that remembers what it gave."""

    def found(device: int, host: int, ranks: int, device_bytes: int, host_bytes: int) -> str:
        room = {"ranks": ranks, "device_bytes": device_bytes, "host_bytes": host_bytes}
        given: dict[int, dict] = {}

        def bytes_of(parameters: int) -> dict[str, int]:
            parameters = operator.index(parameters)  # of 4.0 parameters there is no model
            return given.setdefault(parameters, {"device": device * parameters, "host": host * parameters})

        once = of.largest_model(bytes_of, **room)
        return repr(once if once == of.largest_model(bytes_of, **room) else "another one when asked again")

    return found


def nvme_experiment(name: str, program: str, workspace: Path, *, options=None, **changes) -> Experiment:
    path = str(fresh(workspace / "offload" / name))
    zero = {"stage": 3, "sub_group_size": SUB_GROUP, "offload_optimizer": {"device": "nvme", "nvme_path": path}}
    settings = {"program": program, "accumulation": 1, "steps": 4, "options": options or {}}
    return text_experiment(name, **(settings | {"deepspeed": config(zero, auto=False)} | changes))


def whole_run(run_experiments):
    """Four steps with the optimizer on NVMe, without your code; a checkpoint after the second."""
    options = {"save_at": 2, "checkpoints": str(visible_folder() / "offload" / "reference")}
    whole = nvme_experiment("nvme-whole", "shardlab.milestones.engine_runs:train_nvme", shared_folder(), options=options)
    return run_experiments([whole], reference=True)["nvme-whole"]


@pytest.mark.milestone(task="4.7", points=10, ops=("cpu_adam", "pin_memory", "async_io"), section="A checkpoint of states on disk")
def test_saving_what_lies_on_nvme(lab, run_experiments, workspace):
    import torch

    for sizes in ({}, {1: 5, 2: 7, 10: 3, 112: 4}):
        for me in (0, 1):
            seen = lab.observe(f"{PROGRAMS}:save_groups", workspace / f"saved-{len(sizes)}-{me}", sizes, me)
            of = f"save_offloaded() on rank {me}, whose sub-groups on disk have the numbers {list(sizes) or 'none'}"
            require_equal(seen["returned"], workspace / f"saved-{len(sizes)}-{me}" / "step-4", of=f"{of}: what it returns")
            require_equal(
                seen["files"],
                sorted(f"rank{me}-group{number}.pt" for number in sizes),
                of=f"{of}: the files in the folder offloaded, where an earlier checkpoint had others",
            )
            require_equal(seen["on_gpu"], [], of=f"{of}, on a machine with a GPU: what was on it when it was saved")
            require(
                seen["other_tag"], expected="another checkpoint's folder, step-2/offloaded, left as it is", got="files gone from it"
            )
    losses = whole_run(run_experiments).losses()
    try:
        run = run_experiments([nvme_experiment("nvme-saved", f"{PROGRAMS}:save_offloaded", workspace)])["nvme-saved"]
    except RankError as error:
        require(
            "FileExistsError" not in error.error,
            expected="a second save into the same place to replace the first",
            got=error.error,
        )
        raise
    folder = run.folder / "checkpoints"
    require(
        run.results["returned"] == repr(folder / "last"),
        expected="the folder path/tag returned, a Path",
        got=run.results["returned"],
    )
    wanted = [torch.load(run.folder / f"wanted{rank}.pt", weights_only=True) for rank in (0, 1)]
    names = sorted(f"rank{rank}-group{number}.pt" for rank in (0, 1) for number in wanted[rank])
    with_others = sorted([*names, "rank10-group0.pt"])  # there before the second save: no rank of this run may remove it
    for when, wanted_names, by_rank in zip(("first", "second"), (names, with_others), run.results["files_on_return"], strict=True):
        for rank, files in enumerate(by_rank):
            missing, others = sorted(set(wanted_names) - set(files)), sorted(set(files) - set(wanted_names))
            require(
                not missing and not others,
                expected=f"the files of both ranks in {folder.name}/last/offloaded when save_offloaded returns on rank {rank} from the {when} save",
                got=f"missing: {', '.join(missing) or 'none'}; too many: {', '.join(others) or 'none'}",
            )
    require(
        run.results["client_kept"] == [True, True],
        expected="the caller's client_state left as it was",
        got="it was changed",
    )
    require(
        run.results["whole"],
        expected="the engine to save all but the swapped tensors, what is not trained too",
        got="exclude_frozen_parameters switched on",
    )
    require(
        not run.results["two_in_memory"],
        expected="each sub-group saved before the next one is read: only one must fit into memory",
        got="two read and none saved in between",
    )
    for rank in (0, 1):
        for number, state in wanted[rank].items():
            file = folder / "last" / "offloaded" / f"rank{rank}-group{number}.pt"
            found = torch.load(file, weights_only=True)
            require(
                set(found) == set(state) and found["step"] == 2,
                expected=f"master, step, exp_avg and exp_avg_sq in {file.name}, Adam's step 2 (the engine counts skipped steps too)",
                got=f"{sorted(found)}, step {found.get('step')}",
            )
            wrong = [key for key in ("master", "exp_avg", "exp_avg_sq") if not torch.equal(found[key], state[key])]
            require(
                not wrong,
                expected=f"the sub-group's own numbers in {file.name}",
                got=f"others in {', '.join(wrong)}",
            )
            size = 12 * state["master"].numel()
            require(
                file.stat().st_size < 1.02 * size + 10_000,
                expected=f"about {size:,} bytes in {file.name}: 12 an element",
                got=f"{file.stat().st_size:,}",
            )
    for rank in (0, 1):
        model_states = folder / "last" / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        found = safely_loaded(model_states) if model_states.exists() else {}
        client = (found.get("note"), found.get("step"), found.get("tag"), found.get("ranks")) if found else "no such file"
        require(
            client == ("kept", -2, "best", 9),
            expected=f"the engine's own part next to it: {model_states.name}, with the client state as it was given",
            got=client,
        )
    require(
        not (folder / "last" / "offloaded_tensors").exists(),
        expected="no folder offloaded_tensors: that is DeepSpeed's own copy of the swap files",
        got="it is there",
    )
    require(
        farthest(run.losses(), losses) <= 1e-5,
        expected=f"training to go on after saving as if nothing had been saved: {[round(x, 5) for x in losses]}",
        got=[round(x, 5) for x in run.losses()],
    )


@pytest.mark.milestone(task="4.8", points=10, ops=("cpu_adam", "pin_memory", "async_io"), section="A checkpoint of states on disk")
def test_going_on_from_states_on_nvme(lab, run_experiments, workspace):
    import torch

    for sizes in ({}, {1: 5, 2: 7, 10: 3, 11: 4, 112: 6}):
        for me in (0, 1):
            seen = lab.observe(f"{PROGRAMS}:load_groups", workspace / f"loaded-{len(sizes)}-{me}", sizes, me)
            of = f"load_offloaded() on rank {me}, whose sub-groups on disk have the numbers {list(sizes) or 'none'}"
            client = program_of(f"{PROGRAMS}:CLIENT_STATE")
            require_equal(seen["client"], repr(client), of=f"{of}: the client_state {client}, as it comes back")
            require(
                not sizes or f"rank{me}-group1" in seen["refused"] or "offloaded" in seen["refused"],
                expected=f"ValueError that names the folder or the file, where rank{me}-group1.pt is missing and rank{me}-group10.pt is not",
                got=seen["refused"],
            )
            require_equal(seen["left_out"], [], of=f"{of}: what engine.load_checkpoint is told to leave out")
            require(
                seen["masters"] == [float(number + 1) for number in sizes],
                expected=f"the saved master weights in each of {len(sizes)} sub-groups",
                got=seen["masters"],
            )
            require_equal(seen["steps"], [number + 3 for number in sizes], of=f"{of}: Adam's step in each sub-group")
            require(
                seen["alive"] <= 1,
                expected="what was read of a sub-group let go of before the one after the next is read: only one must fit into memory",
                got=f"master weights of {seen['alive']} others in memory while one is read",
            )
    whole = whole_run(run_experiments)
    reference = visible_folder() / "offload" / "reference"
    (reference / "latest").write_text("step-1")  # of which nothing is left: the tag that is asked for counts
    # Another seed: what is not loaded differs.
    loaded = nvme_experiment(
        "nvme-loaded",
        f"{PROGRAMS}:load_offloaded",
        workspace,
        options={"checkpoints": str(reference), "tag": "step-2"},
        seed=11,
    )
    of_rank_10 = reference / "step-2" / "offloaded" / "rank10-group0.pt"
    if not of_rank_10.exists():
        with once("rank-10-offload") as first:
            if first:
                shutil.copy(of_rank_10.with_name("rank0-group0.pt"), of_rank_10)
    no_folder = visible_folder() / "offload" / "broken"
    with once("broken-offload") as first:
        if first:
            shutil.rmtree(no_folder, ignore_errors=True)
            shutil.copytree(reference / "step-2", no_folder / "plain", ignore=shutil.ignore_patterns("offloaded"))
            shutil.copytree(reference / "step-2", no_folder / "lacking")
            (no_folder / "lacking" / "offloaded" / "rank1-group1.pt").unlink()
    plain, lacking = (
        nvme_experiment(
            f"nvme-{tag}", f"{PROGRAMS}:load_offloaded", workspace, options=options | {"checkpoints": str(no_folder)}, seed=11
        )
        for tag, options in (("plain", {"refused": "plain"}), ("lacking", {"tag": "lacking"}))
    )
    # A launch each: an engine keeps its pages locked, and an ordinary account may lock 8 MiB a process (ulimit -l).
    runs = {name: run for plan in (loaded, plain) for name, run in run_experiments([plan]).items()}
    refused = runs["nvme-plain"].results["refused"]
    require(
        all("offloaded" in said and not said.startswith("FileNotFoundError") for said in refused),
        expected="ValueError that names the folder that is missing",
        got=refused[0],
    )
    require(
        runs["nvme-plain"].results["global_steps"] == 0,
        expected="nothing loaded where the folder is missing: optimizer step 0",
        got=f"optimizer step {runs['nvme-plain'].results['global_steps']}",
    )
    run = runs["nvme-loaded"]
    require(
        (run.results["at"], run.results["client"]) == (2 + engine_runs.STEPS_SKIPPED, [["kept", [1, 2], 7, {"at": 3}]] * 2),
        expected=f"optimizer step {2 + engine_runs.STEPS_SKIPPED}, as the engine counts, and on each rank the client state, note 'kept', seen [1, 2], "
        "step 7 and sampler {'at': 3}",
        got=f"step {run.results['at']}, note, seen, step and sampler {run.results['client']!r}",
    )
    require(
        not run.results["two_in_memory"],
        expected="each file put in place before the next one is read: only one must fit into memory",
        got="two read and none put in place in between",
    )
    require(
        run.results["whole"],
        expected="the engine to load all of its part: the scheduler's state too, and no model but its own",
        got="load_lr_scheduler_states or load_module_strict switched off",
    )
    for rank in (0, 1):
        states = torch.load(run.folder / f"loaded{rank}.pt", weights_only=True)
        for number, state in states.items():
            saved = torch.load(reference / "step-2" / "offloaded" / f"rank{rank}-group{number}.pt", weights_only=True)
            wrong = [key for key in ("master", "exp_avg", "exp_avg_sq") if not torch.equal(state[key], saved[key])]
            wrong += ["step"] if state["step"] != saved["step"] else []
            require(
                not wrong,
                expected=f"on rank {rank}, the saved master weights, moments and step of sub-group {number}",
                got=f"others in {', '.join(wrong)}",
            )
    wanted = whole.losses()[2:]
    require(
        farthest(run.losses(), wanted) <= 1e-5,
        expected=f"the losses of the run that never stopped: {[round(x, 5) for x in wanted]}",
        got=[round(x, 5) for x in run.losses()],
    )
    try:
        run_experiments([lacking])
        said = "no error"
    except RankError as error:
        said = error.error
    require(
        said.startswith("ValueError") and ("rank1-group1.pt" in said or str(no_folder / "lacking" / "offloaded") in said),
        expected="ValueError that names the folder, or the file that is missing, where it is one of rank 1's alone: rank1-group1.pt",
        got=said,
    )
