"""The model of a step's time: volumes of the papers, limits, and measured points that it was not fitted to."""

import json

import pytest

from shardlab.cluster.scaling import Link, StepModel, elements_sent, fit, network
from shardlab.hardware import ROOT

RESULTS = ROOT / "bench" / "results"
NVLINK = Link("NVLink", 300.0, 4e-5)


def test_volumes_are_those_of_the_papers():
    many = 10**9
    assert [round(elements_sent(method, 1, many), 6) for method in ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3")] == [2, 2, 2, 3]
    assert elements_sent("ZeRO++", 4, many, between_nodes=True) == pytest.approx(3.0)
    assert elements_sent("ZeRO-3", 8, 2) == 12
    assert elements_sent("DDP", 8, 1) == 0
    # Accumulation: stage 2 reduces the gradients of each micro-batch, stage 3 also gathers the parameters for it.
    assert [elements_sent(method, 1, many, 4) for method in ("ZeRO-1", "ZeRO-2", "ZeRO-3")] == pytest.approx([2, 5, 12])


def test_more_nodes_never_help_a_single_step_and_a_faster_network_never_hurts():
    model = StepModel("ZeRO-3", 10**9, 1, 0.5, 100)
    slow, fast = network("slow", 100, 1, 5e-6), network("fast", 400, 4, 5e-6)
    taken = [model.seconds(nodes, 8, NVLINK, slow) for nodes in (2, 4, 64, 1024)]
    assert taken == sorted(taken) and model.seconds(1, 8, NVLINK) < taken[0]
    assert model.seconds(64, 8, NVLINK, fast) < taken[2]
    assert model.efficiency(1, 1, NVLINK) == 1
    assert model.efficiency(2, 8, Link("free", float("inf"), 0.0), Link("free", float("inf"), 0.0)) == 1


def test_fit_gives_the_two_points_back():
    slower = fit("DDP", 10**9, 1, 0.5, 0.8, NVLINK)
    assert slower.seconds(1, 1, NVLINK) == 0.5 and slower.seconds(1, 2, NVLINK) == pytest.approx(0.8) and slower.messages > 0
    # Faster than its bytes allow: nothing is left for messages, and the second point is not met.
    faster = fit("DDP", 10**9, 1, 0.5, 0.4, NVLINK)
    assert faster.messages == 0 and faster.seconds(1, 2, NVLINK) > 0.5


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="ZeRO-4"):
        elements_sent("ZeRO-4", 1, 2)
    with pytest.raises(ValueError, match="link between"):
        StepModel("DDP", 1, 1, 1.0, 0).seconds(2, 1, NVLINK)
    with pytest.raises(ValueError, match="bandwidth"):
        network("none", 0, 1, 0)


@pytest.mark.parametrize(
    "method,name,size,within", [("DDP", "baseline", 4, 0.05), ("ZeRO-3", "ZeRO-3", 2, 0.05), ("ZeRO-2", "ZeRO-2", 2, 0.2)]
)
def test_the_point_that_it_was_not_fitted_to(method, name, size, within):
    """Fitted to one and two H200s, it must come near to what four measured; stage 2's shrinking optimizer is left out."""

    def step(gpus: int) -> float:
        record = json.loads((RESULTS / f"stages-{gpus}xh200.json").read_text())
        row = next(row for row in record["results"] if row["method"] == name)
        return row["micro_batch"] * row["accumulation"] * gpus / row["samples_per_second"]

    links = [row for row in json.loads((RESULTS / "links-4xh200.json").read_text())["results"] if row["collective"] == "all-reduce"]
    inside = Link("NVLink", links[-1]["bus_gb_per_second"], links[0]["seconds"])
    model = fit(method, 559_214_592, 2, step(1), step(2), inside, size)
    assert model.seconds(1, 2, inside) == pytest.approx(step(2))
    assert model.seconds(1, 4, inside) == pytest.approx(step(4), rel=within)
