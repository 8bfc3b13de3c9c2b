"""The memory model: three accounts of the same states, each held to its source; and the sampler."""

import csv
import time
from dataclasses import asdict
from itertools import product
from random import Random

import pytest
import torch

from shardlab.run.samplers import COLUMNS, MemorySampler, read_samples, summarise_samples
from shardlab.zero.engine_model import engine_bytes, sharded_elements
from shardlab.zero.held_bytes import held_bytes, parameter_groups
from shardlab.zero.memory_model import GIB, MIB, States, ddp_bytes, estimator_bytes, paper_bytes

BLOOM_560M = 559_214_592
LARGEST_LAYER = 256_901_120
KINDS = ("parameters", "gradients", "optimizer")


def total(states: States) -> int:
    return states.device + states.host


# --- the paper --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ranks, by_stage",
    [(1, [8.33, 8.33, 8.33, 8.33]), (2, [8.33, 5.21, 4.69, 4.17]), (4, [8.33, 3.65, 2.86, 2.08]), (8, [8.33, 2.86, 1.95, 1.04])],
)
def test_paper_s_gib_of_bloom_560m(ranks, by_stage):
    assert [round(paper_bytes(stage, BLOOM_560M, ranks).device / GIB, 2) for stage in range(4)] == by_stage


def test_paper_s_parts_of_a_million_parameters():
    """arXiv 1910.02054, figure 1: 2Ψ + 2Ψ + 12Ψ, and each stage divides one part more."""
    psi, ranks = 1_000_000, 4
    whole = {"parameters": 2 * psi, "gradients": 2 * psi, "optimizer": 12 * psi}
    for stage, sharded in enumerate(((), ("optimizer",), ("optimizer", "gradients"), KINDS)):
        states = paper_bytes(stage, psi, ranks)
        assert {kind: getattr(states, kind) for kind in KINDS} == {
            kind: bytes_ // ranks if kind in sharded else bytes_ for kind, bytes_ in whole.items()
        }
        assert states.host == 0


def test_paper_s_limits_for_many_ranks():
    """4× for stage 1 and 8× for stage 2 are reached only as N grows; stage 3 falls as 1/N."""
    psi, many = 10**9, 10**6
    reduction = [16 * psi / paper_bytes(stage, psi, many).device for stage in range(4)]
    assert reduction == pytest.approx([1, 4, 8, many], rel=1e-3)
    assert 16 * psi / paper_bytes(1, psi, 8).device < 3


# --- DeepSpeed's estimators -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters, largest", [(BLOOM_560M, LARGEST_LAYER), (2_866_560, 196_608), (1_000_003, 10_007)])
@pytest.mark.parametrize("gpus, nodes", [(1, 1), (2, 1), (4, 1), (8, 1), (8, 2), (3, 1)])
def test_estimates_are_deepspeed_s_own(parameters, largest, gpus, nodes):
    """Its functions cut off where ours round, so a byte may lie between them."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    no_offload = {"num_gpus_per_node": gpus, "num_nodes": nodes, "cpu_offload": False, "additional_buffer_factor": 1}
    _, stage2 = estimate_zero2_model_states_mem_needs(parameters, **no_offload)
    assert abs(estimator_bytes(2, parameters, gpus * nodes) - stage2) <= 1
    _, stage3, layer = estimate_zero3_model_states_mem_needs(parameters, largest, cpu_offload_params=False, **no_offload)
    with_layer = estimator_bytes(3, parameters, gpus * nodes, largest_layer=largest)
    assert abs(with_layer - stage3) <= 1
    assert with_layer - estimator_bytes(3, parameters, gpus * nodes) == layer


def test_estimators_count_fp32_gradients_that_the_paper_does_not():
    """18Ψ against 14Ψ sharded at stage 2, and 18Ψ against 16Ψ at stage 3."""
    psi, ranks = 10**9, 10
    assert estimator_bytes(2, psi, ranks) - paper_bytes(2, psi, ranks).device == 4 * psi // ranks
    assert estimator_bytes(3, psi, ranks) - paper_bytes(3, psi, ranks).device == 2 * psi // ranks


@pytest.mark.parametrize("stage", [0, 1])
def test_stages_without_an_estimator_are_refused(stage):
    with pytest.raises(ValueError, match=f"stage {stage}"):
        estimator_bytes(stage, 1000, 2)


# --- the engine -------------------------------------------------------------------------------------------------------

RNG = Random(7)
GROUPS = [
    [[10]],
    [[7, 5], [3]],
    [[1], [1]],
    [[5]],
    [[8, 4], []],
    [[RNG.randrange(1, 500) for _ in range(9)], [RNG.randrange(1, 40) for _ in range(4)]],
]
RANKS = [1, 2, 3, 4, 8, 13]


@pytest.mark.parametrize(
    "groups, ranks, stage, wanted",
    [
        ([[7, 5], [3]], 2, 1, 3 * 2 + 1 * 2),  # ⌈12 / 4⌉·2 + ⌈3 / 4⌉·2
        ([[7, 5], [3]], 4, 2, 2 * 2 + 1 * 2),  # ⌈12 / 8⌉·2 + ⌈3 / 8⌉·2
        ([[7, 5], [3]], 2, 3, 4 + 3 + 2),  # ⌈7 / 2⌉ + ⌈5 / 2⌉ + ⌈3 / 2⌉
        ([[7, 5], [3]], 1, 3, 15),
        ([[8]], 2, 1, 4),
        ([[8], []], 2, 2, 4),
    ],
)
def test_shards_counted_by_hand(groups, ranks, stage, wanted):
    assert sharded_elements(groups, ranks, stage) == wanted


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shards_cover_the_model_and_little_more(stage):
    for groups, ranks in product(GROUPS, RANKS):
        parts = [sum(group) for group in groups if group] if stage < 3 else [size for group in groups for size in group]
        unit = 2 * ranks if stage < 3 else ranks
        padding = sharded_elements(groups, ranks, stage) * ranks - sum(parts)
        assert 0 <= padding < unit * len(parts), (groups, ranks)
        if all(part % unit == 0 for part in parts):
            assert padding == 0, (groups, ranks)


def every_engine():
    """Every stage, model, number of ranks and precision that is allowed, without offload."""
    for stage, groups, ranks, precision in product(range(4), GROUPS, RANKS, ("fp32", "bf16", "fp16")):
        yield stage, groups, ranks, precision, engine_bytes(stage, groups, ranks, precision=precision)


def test_all_ranks_together_hold_at_least_one_whole_model():
    for stage, groups, ranks, precision, states in every_engine():
        width, elements = 4 if precision == "fp32" else 2, sum(map(sum, groups))
        per_element = {"parameters": width, "gradients": width, "optimizer": 8 if stage == 0 and precision == "fp32" else 12}
        for sharded_from, kind in ((3, "parameters"), (2, "gradients"), (1, "optimizer")):
            held = getattr(states, kind) * (ranks if stage >= sharded_from else 1)
            assert held >= per_element[kind] * elements, (stage, groups, ranks, precision, kind)


def test_higher_stages_never_hold_more_but_for_padding():
    for groups, ranks, precision in product(GROUPS, RANKS, ("bf16", "fp16")):
        held = [engine_bytes(stage, groups, ranks, precision=precision) for stage in range(4)]
        elements, padded = sum(map(sum, groups)), [0] + [sharded_elements(groups, ranks, stage) * ranks for stage in (1, 2, 3)]
        for stage in (1, 2, 3):
            # Each element of padding costs at most the 16 bytes of an element.
            assert held[stage].device <= held[stage - 1].device + 16 * (padded[stage] - elements), (groups, ranks, stage)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_engine_agrees_with_the_paper_where_nothing_is_padded(precision):
    """16-bit Adam is what the paper counts; 2,400 elements divide by 2N for every N here."""
    for stage, ranks in product(range(4), (1, 2, 3, 4)):
        assert engine_bytes(stage, [[2400]], ranks, precision=precision) == paper_bytes(stage, 2400, ranks)


def test_one_rank_saves_nothing_by_sharding():
    whole = [engine_bytes(stage, [[2400], [48]], 1, precision="bf16") for stage in range(4)]
    assert len(set(whole)) == 1


def test_fp32_without_zero_holds_what_ddp_holds():
    assert engine_bytes(0, [[1000], [24]], 4, precision="fp32") == ddp_bytes(1024)
    assert ddp_bytes(1024).device == 16 * 1024


def test_more_ranks_hold_less_each():
    for stage in (1, 2, 3):
        held = [engine_bytes(stage, [[1680 * 10]], ranks).device for ranks in (1, 2, 4, 8)]
        assert held == sorted(held, reverse=True) and len(set(held)) == 4
    assert len({engine_bytes(0, [[16800]], ranks) for ranks in (1, 2, 4, 8)}) == 1


def test_offload_moves_states_to_the_host():
    for stage, groups, ranks, precision in product((1, 2, 3), GROUPS, RANKS, ("fp32", "bf16")):
        before = engine_bytes(stage, groups, ranks, precision=precision)
        after = engine_bytes(stage, groups, ranks, precision=precision, offload_optimizer=True)
        # Stage 1 reduces gradients after the last micro-batch only; until then the device holds them whole.
        assert (after.optimizer, after.gradients) == (0, before.gradients if stage == 1 else 0)
        assert after.host_optimizer == before.optimizer
        assert after.host_gradients >= 4 * sharded_elements(groups, ranks, stage)  # the step reads them in fp32
        assert (after.parameters, after.host_parameters) == (before.parameters, 0)
        assert after.device < before.device
        assert total(after) >= total(before) - before.gradients
        at_once = engine_bytes(stage, groups, ranks, precision=precision, offload_optimizer=True, accumulates=False)
        assert at_once.gradients == 0
        assert (at_once.host_gradients < after.host_gradients) == (stage == 2)
    both = engine_bytes(3, [[1000]], 2, offload_optimizer=True, offload_param=True)
    assert both.device == 0
    assert both.host_parameters == engine_bytes(3, [[1000]], 2).parameters
    alone, without = engine_bytes(3, [[1000]], 2, offload_param=True), engine_bytes(3, [[1000]], 2)
    assert (alone.parameters, alone.host_parameters) == (0, without.parameters)
    assert (alone.gradients, alone.optimizer, alone.host_optimizer) == (without.gradients, without.optimizer, 0)


def test_stage_1_keeps_whole_gradients_only_while_they_add_up():
    for groups, ranks in product(GROUPS, RANKS):
        assert engine_bytes(1, groups, ranks, accumulates=False) == engine_bytes(2, groups, ranks)
        assert engine_bytes(1, groups, ranks).gradients == engine_bytes(0, groups, ranks).gradients


def test_stage_2_adds_up_whole_parameters_on_the_host():
    """Shards of 8 of a buffer of 16: rank 0 has parts of the parameters of 5 and 7, rank 1 of those of 7 and 3."""
    bf16 = engine_bytes(2, [[5, 7, 3]], 2, offload_optimizer=True)
    assert bf16.host_gradients == 4 * 8 + 2 * (5 + 7)
    assert engine_bytes(2, [[5, 7, 3]], 1, offload_optimizer=True).host_gradients == 4 * 16 + 2 * 15


def test_nvme_takes_what_deepspeed_swaps_out():
    """Sub-groups of at least 1 MiB a rank go to disk, in blocks of 1,024 bytes; the rest stays on the host."""
    groups = [[2 * 2**18, 2 * 300], [2 * 1000]]
    nvme = engine_bytes(3, groups, 2, offload_optimizer=True, nvme=True)
    host = engine_bytes(3, groups, 2, offload_optimizer=True)
    assert nvme.disk_optimizer == 3 * (2**20 + 2 * 1024)  # 300 elements more take two blocks
    assert nvme.disk_gradients == 2**20  # of the large parameter; the small one's stays in memory
    assert nvme.host_optimizer == 12 * 1000
    assert host.host_gradients - nvme.host_gradients == 4 * (2**18 + 300)
    assert nvme.device == host.device
    assert engine_bytes(3, [[1000]], 2, offload_optimizer=True, nvme=True) == engine_bytes(3, [[1000]], 2, offload_optimizer=True)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: paper_bytes(4, 1000, 2), "stage 4"),
        (lambda: paper_bytes(-1, 1000, 2), "stage -1"),
        (lambda: paper_bytes("2", 1000, 2), "stage '2'"),
        (lambda: paper_bytes(1, 1000, 0), "ranks 0"),
        (lambda: paper_bytes(1, 0, 2), "parameters 0"),
        (lambda: estimator_bytes(4, 1000, 2), "stage 4"),
        (lambda: estimator_bytes(2, 1000, 0), "ranks 0"),
        (lambda: engine_bytes(4, [[1000]], 2), "stage 4"),
        (lambda: engine_bytes(1, [[1000]], 0), "ranks 0"),
        (lambda: engine_bytes(1, [[], []], 2), "parameters 0"),
        (lambda: engine_bytes(0, [[1000]], 2, offload_optimizer=True), "needs stage 1, 2 or 3"),
        (lambda: engine_bytes(2, [[1000]], 2, offload_param=True), "needs stage 3"),
        (lambda: engine_bytes(2, [[1000]], 2, offload_optimizer=True, nvme=True), "stage 3"),
        (lambda: engine_bytes(3, [[1000]], 2, nvme=True), "optimizer offload"),
        (lambda: engine_bytes(1, [[1000]], 2, precision="fp8"), "fp8"),
        (lambda: ddp_bytes(0), "parameters 0"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# --- what a live optimizer holds --------------------------------------------------------------------------------------


class Tied(torch.nn.Module):
    """An embedding that is the output layer too, as BLOOM has it, and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 6)
        self.inner = torch.nn.Linear(6, 6)
        self.frozen = torch.nn.Linear(6, 6).requires_grad_(False)
        self.head = torch.nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.frozen(self.inner(self.embedding(ids))))


def test_plain_adam_holds_what_the_formula_says():
    torch.manual_seed(0)
    model = Tied()
    trained, frozen = 11 * 6 + 6 * 6 + 6, 6 * 6 + 6
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    assert held_bytes(model, optimizer, host_is_device=True) == States(parameters=4 * (trained + frozen))
    model(torch.tensor([1, 2, 3])).sum().backward()
    assert held_bytes(model, optimizer, host_is_device=True).gradients == 4 * trained
    optimizer.step()
    held = held_bytes(model, optimizer, host_is_device=True)
    assert States(held.parameters - 4 * frozen, held.gradients, held.optimizer) == ddp_bytes(trained)
    assert held.host == 0
    optimizer.zero_grad(set_to_none=True)
    assert held_bytes(model, optimizer, host_is_device=True).gradients == 0


def test_host_memory_counts_as_the_host_s_beside_a_gpu():
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    held = held_bytes(model, optimizer, host_is_device=False)
    assert (held.device, held.host_parameters) == (0, 4 * sum(p.numel() for p in model.parameters()))


def test_groups_are_the_optimizer_s():
    model = Tied()
    optimizer = torch.optim.AdamW(
        [
            {"params": [model.embedding.weight, model.inner.weight]},
            {"params": [model.inner.bias, model.frozen.weight], "weight_decay": 0.0},
        ],
        lr=1e-3,
    )
    assert parameter_groups(optimizer) == [[66, 36], [6]]


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_sampler_sees_memory_come_and_go(tmp_path):
    path = tmp_path / "memory.csv"
    MemorySampler.write_header(path)
    with MemorySampler(path, rank=3, interval=0.01):
        block = bytearray(b"x") * (200 * MIB)
        deadline = time.monotonic() + 10
        while len(read_samples(path)["rank3"]) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        del block
    rows = list(csv.DictReader(path.open()))
    assert list(rows[0]) == COLUMNS
    assert {row["device"] for row in rows} == {"rank3"}
    seconds = [float(row["seconds"]) for row in rows]
    assert len(rows) >= 6 and seconds == sorted(seconds)
    summary = summarise_samples(path)["rank3"]
    assert summary["minimum"] <= summary["mean"] <= summary["peak"]
    assert summary["peak"] - summary["minimum"] > 150  # MiB
    written = path.read_bytes()
    time.sleep(0.05)
    assert path.read_bytes() == written, "a sampler that was left goes on writing"


def test_samplers_share_a_file_line_by_line(tmp_path):
    path = tmp_path / "memory.csv"
    MemorySampler.write_header(path)
    with MemorySampler(path, rank=0, interval=0.001), MemorySampler(path, rank=1, interval=0.001):
        time.sleep(0.2)
    lines = path.read_text().splitlines()
    samples = read_samples(path)
    assert set(samples) == {"rank0", "rank1"}
    assert sum(map(len, samples.values())) == len(lines) - 1
    assert all(len(rows) > 2 for rows in samples.values())


SAMPLES = "seconds,device,used_bytes\n0.00,rank0,2097152\n0.00,rank1,9437184\n0.10,rank0,4194304\n0.20,rank0,6291456\n"


def test_samples_are_read_and_summed_up_by_device(tmp_path):
    path = tmp_path / "memory.csv"
    path.write_text(SAMPLES)
    assert read_samples(path) == {"rank0": [(0.0, 2 * MIB), (0.1, 4 * MIB), (0.2, 6 * MIB)], "rank1": [(0.0, 9 * MIB)]}
    assert summarise_samples(path) == {
        "rank0": {"peak": 6.0, "mean": 4.0, "minimum": 2.0},
        "rank1": {"peak": 9.0, "mean": 9.0, "minimum": 9.0},
    }


def test_line_cut_short_by_a_kill_is_left_out(tmp_path):
    """However short: `0.30,rank0,52` reads as a number too, and would become the minimum."""
    path, last = tmp_path / "memory.csv", "0.30,rank0,5242880"
    path.write_text(SAMPLES)
    whole, summary = read_samples(path), summarise_samples(path)
    for kept in range(1, len(last)):
        path.write_text(SAMPLES + last[:kept])
        assert read_samples(path) == whole, last[:kept]
        assert summarise_samples(path) == summary, last[:kept]


def test_header_alone_has_no_samples(tmp_path):
    path = tmp_path / "memory.csv"
    MemorySampler.write_header(path)
    assert read_samples(path) == {} == summarise_samples(path)


def test_states_add_up():
    states = States(1, 2, 4, 8, 16, 32)
    assert (states.device, states.host) == (7, 56)
    assert sum(asdict(states).values()) == 63
