"""Hidden milestones of lab 04: the same invariants with other numbers."""

import random
from math import ceil

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from test_lab04_offload import PROGRAMS, accumulation_of, created, largest, moved, nvme_experiment, swapped

from shardlab.milestones.agreement import agree, solution
from shardlab.milestones.engine_runs import STEPS_SKIPPED
from shardlab.milestones.launches import shared_folder, visible_folder
from shardlab.milestones.messages import farthest
from shardlab.zero.engine_model import engine_bytes, sharded_elements

REFERENCE = solution("lab04_offload")
GROUPS = st.lists(st.lists(st.integers(1, 5000), max_size=5), min_size=1, max_size=3)


def numbers(task: str) -> random.Random:
    return random.Random(f"hidden {task}")


@pytest.mark.milestone(task="4.1")
def test_other_offload_configurations(lab, tmp_path):
    made = lab.create_offload_config(3, optimizer_offload=True, pin_memory=False)
    assert made == {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": False}}}
    made = lab.create_offload_config(
        3,
        optimizer_offload=True,
        param_offload=True,
        offload_device="nvme",
        nvme_path=tmp_path,
        largest_parameter=77,
        aio={"block_size": 4096},
    )
    assert made["zero_optimization"]["offload_param"]["buffer_size"] == 77 and made["aio"]["block_size"] == 4096
    assert made["aio"]["queue_depth"] == 8
    for bad in ({"stage": 5}, {"stage": 1, "param_offload": True}, {"stage": 2, "offload_device": "tape"}):
        with pytest.raises(ValueError):
            lab.create_offload_config(**bad)
    arguments = st.fixed_dictionaries(
        {"stage": st.sampled_from([0, 1, 2, 3, 3, 3, 4])},
        optional={
            **dict.fromkeys(("optimizer_offload", "param_offload", "pin_memory"), st.booleans()),
            "offload_device": st.sampled_from(["cpu", "nvme", "nvme", "disk"]),
            "nvme_path": st.sampled_from(["here"] * 4 + ["absent", "file", None]),
            "aio": st.sampled_from([None, {}, {"block_size": 4096}, {"queue_depth": 1, "thread_count": 2}, {"blocks": 1}])
            | st.sampled_from([{"overlap_events": False}, {"queue_depth": 32, "thread_count": 4}, {"block_size": 1, "blocks": 1}]),
            "largest_parameter": st.sampled_from([77, 1, None]),
            "bytes_on_disk": st.sampled_from([0, 1, 10**18]),
        },
    )
    moves = [{"optimizer_offload": a, "param_offload": b} for a in (False, True) for b in (False, True)]
    nvme = {"offload_device": "nvme", "nvme_path": "here", "largest_parameter": 77}
    edges = [{"stage": stage} | move | device for stage in (1, 2, 3) for move in moves for device in ({}, nvme)]
    edges += [{"stage": stage} | move for stage in (0, -1, 4) for move in moves]
    for move in moves[1:]:
        given = {"stage": 3} | move
        edges += [given | {"pin_memory": False}, given | nvme | {"pin_memory": False}, given | nvme | {"aio": {"thread_count": 4}}]
        edges += [given | nvme | {"aio": {"depth": 1}}, given | {"aio": {"depth": 1}}, given | {"nvme_path": "absent"}]
        edges += [given | nvme | {"nvme_path": path} for path in ("absent", "file", "", None)] + [
            given | nvme | {"bytes_on_disk": 10**18}
        ]
    nvme_optimizer = {"stage": 3, "optimizer_offload": True} | nvme
    edges += [
        nvme_optimizer | {"aio": aio} for aio in ({"overlap_events": False}, {"single_submit": True}, {"block_size": 1, "x": 1})
    ]
    edges += [{"stage": 1, "offload_device": "nvme"}, {"stage": 1, "offload_device": "nvme", "nvme_path": "absent"}]
    drawn = st.tuples(arguments)
    agree(created(lab, tmp_path), created(REFERENCE, tmp_path), drawn, first=[(edge,) for edge in edges], count=60, record="4.1")


@pytest.mark.milestone(task="4.2")
def test_bytes_of_other_sizes(lab):
    draw = numbers("4.2")
    for _ in range(12):
        stage, ranks, precision = draw.randint(1, 3), draw.randint(2, 9), draw.choice(("fp32", "bf16"))
        groups = [[draw.randint(1, 4000) for _ in range(draw.randint(1, 5))] for _ in range(draw.randint(1, 3))]
        what = {"optimizer_offload": draw.random() < 0.7, "param_offload": stage == 3 and draw.random() < 0.5}
        offloads = {"offload_optimizer": what["optimizer_offload"], "offload_param": what["param_offload"]}
        accumulates = not what["optimizer_offload"]
        model = engine_bytes(stage, groups, ranks, precision=precision, accumulates=accumulates, **offloads)
        plain = engine_bytes(stage, groups, ranks, precision=precision)
        states = {kind: getattr(plain, kind) for kind in ("parameters", "gradients", "optimizer")}
        got = lab.offload_bytes(stage, states, sharded_elements(groups, ranks, stage), precision, **what)
        assert got == {"device": model.device, "host": model.host}, (stage, groups, ranks, precision, what)
    ways = st.fixed_dictionaries({}, optional={"optimizer_offload": st.booleans(), "param_offload": st.booleans()})
    number = st.integers(0, 10**6) | st.integers(10**9, 10**12)
    precisions = ("fp32", "bf16", "fp16")

    def given(stage: int, shard: int, parameters: int, gradients: int, *others) -> tuple:
        return stage, {"parameters": parameters, "gradients": gradients, "optimizer": 12 * shard}, shard, *others

    arguments = st.builds(given, st.integers(1, 3), number, number, number, st.sampled_from(precisions), ways)
    both = [{"optimizer_offload": a, "param_offload": b} for a in (False, True) for b in (False, True)]
    edges = [
        given(stage, shard, 4000, 3000, precision, way)
        for stage in (1, 2, 3)
        for precision in precisions
        for way in [{}, *both]
        for shard in (1000, 4096, 139_804_672)
    ]
    agree(moved(lab), moved(REFERENCE), arguments, first=edges, record="4.2")


@pytest.mark.milestone(task="4.3")
def test_other_bytes_on_disk(lab):
    draw = numbers("4.3")
    for _ in range(10):
        ranks = draw.randint(1, 5)
        groups = [[draw.randint(1, 900_000) for _ in range(draw.randint(1, 3))] for _ in range(2)]
        wanted = 0
        for group in groups:
            size = 4 * sum(ceil(parameter / ranks) for parameter in group)
            wanted += 3 * 1024 * ceil(size / 1024) if size >= 2**20 else 0
        assert lab.swapped_bytes(groups, ranks) == wanted, (groups, ranks)
    size = st.sampled_from([2**18 + more for more in (-1, 0, 1, 255, 256, 257)]) | st.integers(1, 2**19)
    groups = st.lists(st.lists(size, max_size=3), max_size=3)
    sizes = (2**18, 400_000, 786_431, 786_433, 1_000_001, 1_572_863, 3_145_727)
    edges = [([[size]], ranks) for size in sizes for ranks in (1, 2, 3, 4, 5, 6, 7, 12)]
    edges += [([[10**9]], 1), ([[10**9], [7, 10**9]], 8), ([[262_145] * 130], 128), ([[10**9 + at for at in range(9)]], 512)]
    agree(swapped(lab), swapped(REFERENCE), st.tuples(groups, st.integers(1, 4)), first=edges, record="4.3")


@pytest.mark.milestone(task="4.4")
def test_other_optimizers(lab):
    seen = lab.observe(f"{PROGRAMS}:compare_two_sums", 33, 6, 99)
    first, second = seen["first"]["gradients"], seen["second"]["gradients"]
    assert len(first) == len(second) == 6 and all((a == b).all() for a, b in zip(first, second))
    assert abs(seen["returned"]["largest_difference"] - (2 * sum(first)).abs().max().item()) < 1e-4
    assert abs(seen["returned"]["first_seconds"] - 6) < 1e-6 and abs(seen["returned"]["second_seconds"] - 18) < 1e-6


@pytest.mark.milestone(task="4.5")
def test_other_step_times(lab):
    a, b = lab.fit_step_time([1, 3, 9], [1.5, 2.5, 5.5])
    assert abs(a - 0.5) < 1e-9 and abs(b - 1.0) < 1e-9
    plain, offloaded = (0.2, 0.1), (0.22, 1.3)
    assert abs(lab.share_kept(6, plain, offloaded) - 1.3 / 2.62) < 1e-9
    for share in (0.33, 0.5, 0.85):
        wanted = next(k for k in range(1, 10_000) if (0.2 * k + 0.1) / (0.22 * k + 1.3) >= share)
        assert lab.accumulation_for(share, plain, offloaded) == wanted
    assert lab.accumulation_for(0.95, plain, offloaded) is None
    # Eighths and sixteenths have no rounding errors, so limits are met exactly.
    eighths = st.integers(1, 40).map(lambda number: number / 8)
    line = st.tuples(eighths, eighths)

    @st.composite
    def lines(draw) -> tuple:
        (a, b), (more, much_more) = draw(line), draw(line)
        offloaded = (a + more, b + much_more)
        assume(b / a < offloaded[1] / offloaded[0])  # else the share does not grow with the accumulation
        return draw(st.integers(1, 16)) / 16, (a, b), offloaded

    near = lambda wanted, got: abs(wanted - got) <= 1e-9
    edges = [(k, (0.001, 0.0), (0.001, 64.0)) for k in (1, 999, 1001, 2000, 10**6)]
    drawn = st.tuples(st.integers(1, 200) | st.integers(1, 10**6), line, line)
    agree(lab.share_kept, REFERENCE.share_kept, drawn, first=edges, same=near, record="4.5 share")
    edges = [
        (0.79999, (0.1, 0.05), (0.125, 0.4)),
        (0.5, (1.0, 1.0), (2.0, 4.0)),
        (0.5, (1.0, 0.0), (1.0, 4096.0)),
        (0.99, (1.0, 0.0), (1.0, 64.0)),
    ]
    edges += [
        (0.999, (1.0, 0.0), (1.0, 64.0)),
        (0.75, (0.1, 0.0), (0.1, 0.1)),
        (0.1, (0.1, 0.0), (0.1, 1.8)),
        (0.4, (0.1, 0.0), (0.1, 1.5)),
        (0.6, (0.601, 0.0), (1.0, 1.0)),
        (0.5, (1, 0), (1, 1)),
    ]
    agree(accumulation_of(lab), accumulation_of(REFERENCE), lines(), first=edges, record="4.5 accumulation")

    @st.composite
    def times(draw) -> tuple:
        accumulations = draw(st.lists(st.integers(1, 32), min_size=2, max_size=8, unique=True))
        accumulations = draw(st.permutations(accumulations * draw(st.integers(1, 2))))
        return accumulations, [draw(st.integers(1, 400)) / 8 for _ in accumulations]

    def both_near(wanted: tuple, got: tuple) -> bool:
        return len(got) == 2 and all(abs(a - b) <= 1e-6 for a, b in zip(wanted, got))

    many = [at for at in (1, 2, 4, 8) for _ in range(12)]
    edges = [([1, 2, 4], [0.0014, 0.0024, 0.0044]), (many, [0.1 * at + 0.01 * (number % 5) for number, at in enumerate(many)])]
    edges += [([1, 2, 4], [14e-6, 24e-6, 45e-6])]
    both_nearer = lambda wanted, got: both_near(wanted, got) and all(abs(a - b) <= 1e-9 for a, b in zip(wanted, got))
    agree(lab.fit_step_time, REFERENCE.fit_step_time, times(), first=edges, same=both_nearer, record="4.5 fit")


@pytest.mark.milestone(task="4.6")
def test_other_limits(lab):
    limits = {"ranks": 3, "device_bytes": 5_000, "host_bytes": 90_000}
    assert lab.largest_model(lambda n: {"device": 4 * n, "host": 0}, **limits) == 1250
    assert lab.largest_model(lambda n: {"device": n, "host": 16 * n}, **limits) == 1875
    assert lab.largest_model(lambda n: {"device": 6_000, "host": n}, **limits) == 0

    per_parameter, room = st.integers(1, 16), st.integers(0, 300)
    edges = [
        (16, 16, 1, 16 * 10**9, 16 * 10**9),
        (10_000, 1, 1, 10_000, 10),
        (16, 1, 1, 10, 10),
        (1, 1, 4, 300, 7),
        (1, 2, 3, 300, 100),
        (1, 1, 1, 10**11, 10**12),
        (16, 1, 8, 80 * 2**30, 2**40),
        (0, 18, 8, 80 * 2**30, 2**40),
        (0, 18, 16, 10, 2**40),
        (3, 20, 64, 10**9, 10**10),
        (1, 1, 1, 10**17, 10**18),
    ]
    some = per_parameter | st.just(0)
    drawn = st.tuples(some, some, st.integers(1, 4) | st.integers(8, 64), room, room).filter(lambda given: given[0] or given[1])
    agree(largest(lab), largest(REFERENCE), drawn, first=edges, count=20, record="4.6")


@pytest.mark.milestone(task="4.7", ops=("cpu_adam", "pin_memory", "async_io"))
def test_what_another_run_saves(lab, run_experiments, workspace):
    """The saved states next to those of a run without anybody's exercises, which the box has not seen."""
    lab.save_offloaded  # noqa: B018
    options = {"save_at": 2, "checkpoints": str(shared_folder() / "offload" / "other")}
    other = nvme_experiment("nvme-other", "shardlab.milestones.engine_runs:train_nvme", shared_folder(), options=options, seed=29)
    run_experiments([other], reference=True)
    mine = nvme_experiment("nvme-other-saved", f"{PROGRAMS}:save_offloaded", workspace, seed=29)
    found = run_experiments([mine])["nvme-other-saved"].folder / "checkpoints" / "last" / "offloaded"
    wanted = sorted((shared_folder() / "offload" / "other" / "step-2" / "offloaded").glob("rank*.pt"))
    assert len(wanted) >= 4
    for path in wanted:
        state, saved = (torch.load(file, weights_only=True) for file in (path, found / path.name))
        assert saved["step"] == state["step"]
        assert all(torch.allclose(saved[key], state[key], atol=1e-7) for key in ("master", "exp_avg", "exp_avg_sq"))


@pytest.mark.milestone(task="4.8", ops=("cpu_adam", "pin_memory", "async_io"))
def test_going_on_from_another_step(lab, run_experiments, workspace):
    lab.load_offloaded  # noqa: B018
    folder = visible_folder() / "offload" / "third"
    options = {"save_at": 1, "checkpoints": str(folder)}
    whole = nvme_experiment("nvme-third", "shardlab.milestones.engine_runs:train_nvme", shared_folder(), options=options, seed=31)
    losses = run_experiments([whole], reference=True)["nvme-third"].losses()
    options = {"checkpoints": str(folder), "tag": "step-1"}
    loaded = nvme_experiment("nvme-third-loaded", f"{PROGRAMS}:load_offloaded", workspace, options=options, seed=31)
    run = run_experiments([loaded])["nvme-third-loaded"]
    assert run.results["at"] == 1 + STEPS_SKIPPED and farthest(run.losses(), losses[1:]) <= 1e-5
