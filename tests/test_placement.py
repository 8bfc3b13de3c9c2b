"""Where ranks run: one rule, on machines with no GPU, with too few, with enough, and with GPUs that others use up."""

import os
import subprocess
import sys
import types
from multiprocessing import forkserver

import pytest

from shardlab import hardware
from shardlab.cluster import preflight
from shardlab.doctor.machine import check_milestone_ranks
from shardlab.milestones.small_runs import text_experiment, zero_config
from shardlab.progress import Quiet
from shardlab.run import launch, placement, ranks
from shardlab.run.experiment import Experiment
from shardlab.run.placement import GIB, Placement, TooFewGpus, place
from shardlab.zero import ops

H100 = hardware.Gpu("NVIDIA H100 80GB HBM3", (9, 0), 80 * GIB, 79 * GIB)
USED_UP = hardware.Gpu("NVIDIA H100 80GB HBM3", (9, 0), 80 * GIB, GIB // 2)


@pytest.fixture
def machine(monkeypatch):
    """`machine(gpu, …)`: this machine seems to have these GPUs."""

    def have(*gpus: hardware.Gpu, driver: bool = True) -> None:
        monkeypatch.delenv("DS_ACCELERATOR", raising=False)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(hardware, "driver_is_here", lambda: driver)
        monkeypatch.setattr(hardware, "_gpu_count", lambda visible: len(gpus))
        monkeypatch.setattr(hardware, "gpus", lambda: list(gpus))

    return have


@pytest.mark.parametrize("or_cpu", [True, False])
def test_without_a_gpu_ranks_run_on_the_cpu_and_nothing_is_said(machine, or_cpu):
    machine(driver=False)
    assert place(2, or_cpu=or_cpu) == Placement("cpu") and not place(2, or_cpu=or_cpu).note


@pytest.mark.parametrize("or_cpu", [True, False])
def test_each_rank_gets_a_gpu_where_there_are_enough(machine, or_cpu):
    machine(H100, H100)
    assert place(2, or_cpu=or_cpu) == place(1, or_cpu=or_cpu) == Placement("cuda")


def test_too_few_gpus_refuse_a_measurement_and_not_a_check(machine):
    machine(H100)
    assert place(2, or_cpu=True).device == "cpu"
    assert place(2, or_cpu=True).note == "Ranks run on the CPU: 2 ranks need 2 GPUs, one each, and 1 is visible."
    with pytest.raises(TooFewGpus, match="2 ranks need 2 GPUs.*1 is visible. Take 1 rank; or run on the CPU: DS_ACCELERATOR=cpu"):
        place(2, or_cpu=False)


def test_a_gpu_that_others_use_up_is_no_place_for_a_rank(machine):
    machine(H100, USED_UP)
    assert place(1, or_cpu=False) == Placement("cuda"), "the first GPU has room"
    assert place(2, or_cpu=True).device == "cpu"
    with pytest.raises(TooFewGpus, match=r"GPU 1 \(NVIDIA H100 80GB HBM3\) has 0.5 of 80 GiB free.*nvidia-smi"):
        place(2, or_cpu=False)


def test_a_driver_without_a_torch_that_can_use_it_is_told(machine):
    machine()
    assert place(2, or_cpu=False).device == "cpu"
    assert "shardlab doctor" in place(2, or_cpu=True).note


HIDING = [("CUDA_VISIBLE_DEVICES", ""), ("CUDA_VISIBLE_DEVICES", "-1"), ("DS_ACCELERATOR", "cpu")]


@pytest.mark.parametrize(("variable", "value"), HIDING)
def test_gpus_can_be_hidden(monkeypatch, variable, value):
    """Nothing is said of a driver then: whoever hides the GPUs knows that they are there."""
    monkeypatch.setattr(hardware, "driver_is_here", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    hardware._gpu_count.cache_clear()
    assert hardware.gpu_count() == 1
    hardware._gpu_count.cache_clear()
    monkeypatch.setenv(variable, value)
    assert hardware.gpu_count() == 0 and hardware.device() == "cpu"
    assert place(4, or_cpu=False) == Placement("cpu")


def test_ranks_on_the_cpu_of_a_machine_with_gpus_see_none(machine):
    machine(H100)
    assert ops.environment("cpu") | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} == ops.environment("cpu")
    assert "CUDA_VISIBLE_DEVICES" not in ops.environment("cuda")
    assert ops.environment("cuda")["TORCH_CUDA_ARCH_LIST"] == "9.0"


def test_ops_for_the_cpu_and_for_gpus_do_not_share_a_folder(machine, monkeypatch, tmp_path):
    """DeepSpeed builds some of them otherwise for the CPU; each process would take the other's for its own."""
    machine(H100)
    for chosen in (None, str(tmp_path)):
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        if chosen:
            monkeypatch.setenv("TORCH_EXTENSIONS_DIR", chosen)
        folders = {device: hardware.ops_folder(device) for device in ("cuda", "cpu")}
        assert folders["cuda"] != folders["cpu"]
        # A launch puts the folder of its own device into the environment; that is nobody's choice.
        for device in ("cuda", "cpu"):
            monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folders[device]))
            assert {device: hardware.ops_folder(device) for device in ("cuda", "cpu")} == folders
        # Nor does it matter whether the process that asks has GPUs.
        machine(driver=False)
        assert {device: hardware.ops_folder(device) for device in ("cuda", "cpu")} == folders
        machine(H100)


def test_a_launch_that_is_refused_leaves_nothing_behind(machine, tmp_path):
    machine(H100)
    with pytest.raises(TooFewGpus):
        launch.launch(Experiment(name="two", ranks=2), runs=tmp_path / "runs", display=Quiet())
    assert not (tmp_path / "runs").exists()


def test_a_program_under_a_launcher_is_refused_in_one_sentence(machine, tmp_path, monkeypatch):
    machine(H100)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for local_rank, said in (("0", "2 ranks need 2 GPUs"), ("1", "1")):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(SystemExit, match=said):
            ranks.run_under_launcher(Experiment(name="two", ranks=2), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.ranks
def test_ranks_that_do_not_fit_on_the_gpu_train_on_the_cpu(machine, tmp_path, monkeypatch):
    """A launcher that takes its machine for one with a GPU: its two ranks come from a server of their own, and train as ever."""
    plan = text_experiment("two", accumulation=1, deepspeed=zero_config(2, adam={"lr": "auto"}))
    for name in ops.environment():
        monkeypatch.setenv(name, os.environ.get(name, ""))  # a launch sets them, and the next test must not find them
    monkeypatch.setattr(launch, "_servers", {})
    machine(H100)
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    said = []
    try:
        (run,) = launch.launch(plan, runs=tmp_path, timeout=120, display=Quiet(said.append), or_cpu=True)
        assert list(launch._servers) == ["cpu"] and launch._servers["cpu"] is not forkserver._forkserver
    finally:
        launch._servers["cpu"]._stop()
    assert "Ranks run on the CPU: 2 ranks need 2 GPUs, one each, and 1 is visible." in said
    assert run.outcome == "finished" and len(run.losses()) == 2
    assert (run.record_json["hardware"]["ranks_on"], run.record_json["hardware"]["gpus"]) == ("cpu", [])
    assert "device_memory" not in run.results


def test_doctor_says_what_ranks_of_milestones_run_on(machine):
    machine(H100)
    assert check_milestone_ranks().detail == "2 ranks run on the CPU: 2 ranks need 2 GPUs, one each, and 1 is visible"
    machine(H100, H100)
    assert check_milestone_ranks().detail == "2 ranks run on GPUs"


def test_preflight_names_the_node_with_more_ranks_than_gpus():
    reports = [{"node": "a", "gpus": 2}] * 2 + [{"node": "b", "gpus": 1}] * 2 + [{"node": "c", "gpus": 0}] * 4
    assert preflight.crowded(reports) == ["b: 2 ranks need 2 GPUs, one each, and 1 is visible"]


def test_page_of_what_was_run_where_is_what_the_results_say():
    program = [sys.executable, str(hardware.ROOT / "bench" / "proof.py"), "--render", "--out", "-"]
    page = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    assert page == (hardware.ROOT / "docs" / "proof.md").read_text(), "python bench/proof.py --render writes it again"


# --- what CUDA_VISIBLE_DEVICES names ----------------------------------------------------------------------------------


@pytest.fixture
def nvml(monkeypatch):
    """NVML of a machine with three GPUs, and a MIG device on the first."""
    uuids = ["GPU-11aa", "GPU-22bb", "GPU-22cc"]
    known = dict(enumerate(uuids)) | {"MIG-77dd": "MIG-77dd"}
    functions = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: len(uuids),
        "nvmlDeviceGetHandleByIndex": known.__getitem__,
        "nvmlDeviceGetHandleByUUID": known.__getitem__,
        "nvmlDeviceGetUUID": lambda handle: handle,
    }
    monkeypatch.setitem(sys.modules, "pynvml", types.SimpleNamespace(**functions))


@pytest.mark.parametrize(
    ("visible", "handles"),
    [
        (None, ["GPU-11aa", "GPU-22bb", "GPU-22cc"]),
        ("", []),
        ("2, 0", ["GPU-22cc", "GPU-11aa"]),
        ("1,7,0", ["GPU-22bb"]),  # as CUDA does: nothing behind a name that is none
        ("GPU-22c", ["GPU-22cc"]),
        ("GPU-11aa,GPU-22bb", ["GPU-11aa", "GPU-22bb"]),
        ("MIG-77dd", ["MIG-77dd"]),
    ],
)
def test_gpus_are_found_under_the_names_that_cuda_takes(nvml, monkeypatch, visible, handles):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert hardware.nvml_handles() == handles


# --- with a real GPU --------------------------------------------------------------------------------------------------

a_gpu = pytest.mark.skipif(not hardware.gpu_count(), reason="there is no GPU here")

TAKE = """
import sys, torch
free, total = torch.cuda.mem_get_info()
taken = torch.empty(free - 2**30, dtype=torch.uint8, device="cuda")
print("taken", flush=True)
sys.stdin.read()
"""


@a_gpu
def test_nvml_and_torch_see_the_same_gpus():
    import torch

    assert len(hardware.gpus()) == torch.cuda.device_count() == hardware.gpu_count()
    assert hardware.describe("cuda")["driver"]
    for index, gpu in enumerate(hardware.gpus()):
        assert (gpu.name, gpu.capability) == (torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))


@a_gpu
def test_a_gpu_by_its_uuid():
    import pynvml

    uuid = pynvml.nvmlDeviceGetUUID(hardware.nvml_handles()[0])
    uuid = uuid if isinstance(uuid, str) else uuid.decode()
    program = "from shardlab import hardware; print(hardware.gpu_count(), len(hardware.gpus()))"
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"CUDA_VISIBLE_DEVICES": uuid}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["1", "1"], done.stderr


@a_gpu
def test_memory_that_another_process_takes_is_seen():
    other = subprocess.Popen([sys.executable, "-c", TAKE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline().strip() == "taken"
        assert hardware.gpus()[0].free < placement.FREE_NEEDED
        assert place(1, or_cpu=True).device == "cpu"
        with pytest.raises(TooFewGpus, match="GPU 0"):
            place(1, or_cpu=False)
    finally:
        other.kill()
        other.wait()


@a_gpu
def test_one_process_launches_ranks_on_gpus_and_on_the_cpu(tmp_path):
    """Turn by turn, with a fork server each: DeepSpeed trains on the device that was chosen, and on no other."""
    settings = {"accumulation": 1, "deepspeed": zero_config(2, adam={"lr": "auto"})}
    losses = {}
    for name, count, device in (("a", 1, "cuda"), ("b", hardware.gpu_count() + 1, "cpu"), ("c", 1, "cuda")):
        plan = text_experiment(name, ranks=count, **settings)
        (run,) = launch.launch(plan, runs=tmp_path, display=Quiet(), or_cpu=True)
        assert run.record_json["hardware"]["ranks_on"] == device
        assert ("device_memory" in run.results) == (device == "cuda")
        losses[name] = run.losses()
    assert losses["a"] == losses["c"]
