"""Milestones of lab 05. The judges are plain PyTorch on all rows, the profiler's record of collectives, and a clock moved by hand."""

import json
import math

import numpy
import pytest

from shardlab.milestones.agreement import agree_as_recorded
from shardlab.milestones.launches import once, ranks_come_back, visible_folder
from shardlab.milestones.messages import farthest, require, require_equal, require_error
from shardlab.run.experiment import Experiment, program_of

PROGRAMS = "labs/lab05_multi_gpu/programs.py"


def experiment(
    name: str, program: str, *, ranks: int = 2, accumulation: int = 1, seed: int = 3, options=None, **more
) -> Experiment:
    sizes = {"ranks": ranks, "micro_batch": 3, "accumulation": accumulation, "steps": 4}
    return Experiment(name=name, program=f"{PROGRAMS}:{program}", method=name, seed=seed, options=options or {}, **(sizes | more))


def reference(name: str, *given):
    """A function of programs.py, without anybody's exercises."""
    return program_of(f"{PROGRAMS}:{name}")(*given)


def small_parameters() -> list[list[int]]:
    """The shapes of the small model's parameters."""
    return [list(parameter.shape) for parameter in reference("small", 0).parameters()]


def elements(ranks: int | None = None) -> int:
    """Of the small model; with ranks, after FSDP2 has padded each first dimension to a multiple of them."""
    padded = [[math.ceil(shape[0] / ranks) * ranks if ranks else shape[0], *shape[1:]] for shape in small_parameters()]
    return sum(math.prod(shape) for shape in padded)


def padded_elements(ranks: int) -> int:
    """Of the small model, after ZeRO-3 has padded each parameter to a multiple of the ranks."""
    return sum(math.ceil(math.prod(shape) / ranks) * ranks for shape in small_parameters())


def zero_configuration(stage: int) -> dict:
    """For an engine that is no exercise's."""
    adam = {"type": "AdamW", "params": reference_adam() | {"torch_adam": True}}
    return {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.0,
        "optimizer": adam,
        "zero_optimization": {"stage": stage},
    }


def reference_adam() -> dict:
    return dict(program_of(f"{PROGRAMS}:zero_file").__globals__["ADAM"])


def check_set_up(lab, rank: int | None, local_rank: int, ranks: int, gpus: int, *, there: bool = False) -> None:
    """What setup_distributed has to ask torch for where torch sees GPUs."""
    got = lab.observe(f"{PROGRAMS}:set_up_with_gpus", rank, local_rank, ranks, gpus, there)
    numbers = [0, 0, 1] if rank is None else [rank, local_rank, ranks]
    where = (
        f"in a lone process, where RANK is not set, and LOCAL_RANK is {local_rank} and WORLD_SIZE {ranks}"
        if rank is None
        else f"on rank {rank} of {ranks}, local rank {local_rank}"
    )
    where += f", where torch sees {gpus} GPUs" + " and a process group is there already" * there
    if rank is not None and local_rank >= gpus:
        require(
            str(local_rank) in got.get("refused", "") and str(gpus) in got.get("refused", ""),
            expected=f"ValueError for LOCAL_RANK={local_rank} where torch sees {gpus} GPUs{' and a process group is there' * there}, "
            "in a sentence with both numbers",
            got=got.get("ended", got.get("refused", f"no error: {got.get('device')}")),
        )
        require(not got["groups"], expected="no process group where the local rank has no GPU", got=got["groups"])
        return
    require(
        got.get("device") == f"cuda:{numbers[1]}" and got["numbers"] == numbers,
        expected=f"cuda:{numbers[1]}, and {numbers} for rank, local rank and world size, {where}",
        got=got.get("ended", got.get("refused", f"{got.get('device')}, {got.get('numbers')}")),
    )
    require_equal(
        got["groups"], [] if there else ["nccl"], of=f"the backends that init_process_group is asked for by one call, {where}"
    )
    require(
        got["current"][-1:] == [f"cuda:{numbers[1]}"],
        expected=f"the current device set to cuda:{numbers[1]} (torch.cuda.set_device), {where}",
        got=got["current"] or "it is not set",
    )
    if rank is None:
        require(
            got["stores"][0] != "NoneType",
            expected="a store of its own for a lone process, dist.HashStore(): it has no meeting place",
            got="none given to init_process_group",
        )
    require(
        got["anew"],
        expected=f"a process group again from setup_distributed() after cleanup_distributed(), {where}",
        got="none",
    )


@pytest.mark.milestone(task="5.1", points=10, section="A process group")
def test_process_group(lab, run_experiments):
    lab.setup_distributed  # noqa: B018
    check_set_up(lab, 6, 1, 8, 2)
    check_set_up(lab, 3, 3, 4, 2)
    check_set_up(lab, None, 3, 4, 2)
    check_set_up(lab, None, 3, 4, 8)
    check_set_up(lab, 3, 1, 4, 2, there=True)
    check_set_up(lab, 2, 2, 3, 2)
    check_set_up(lab, 3, 3, 4, 2, there=True)
    with ranks_come_back():
        runs = run_experiments([experiment("alone", "set_up", ranks=1), experiment("two", "set_up")], timeout=60)
    for name, wanted, where in (
        ("two", [[0, 0, 2], [1, 1, 2]], "on two ranks"),
        ("alone", [[0, 0, 1]], "in a lone process, where RANK is not set, and WORLD_SIZE is 4 and LOCAL_RANK 3"),
    ):
        got = runs[name].results
        require(got["made"], expected=f"a process group after setup_distributed(), {where}", got="none")
        require_equal(got["numbers"], wanted, of=f"rank, local rank and world size of setup_distributed(), {where}, by rank")
        require(got["kind"] == "device", expected="a torch.device first", got=got["kind"])
        require_equal(got["devices"], got["wanted_devices"], of=f"the device of setup_distributed(), {where}, by rank")
        require(got["sum"] == len(wanted), expected=f"an all-reduce that reaches all ranks, {where}: {len(wanted)}", got=got["sum"])
        require(all(got["again"]), expected=f"the same from a second call, {where}", got="something else, on a rank")
        require(not got["left"], expected=f"no process group after cleanup_distributed(), {where}", got="one that is still there")
        require(
            all(got["environment"]),
            expected=f"RANK, LOCAL_RANK and WORLD_SIZE of the environment left as they were, {where}: what comes later reads them too",
            got="others, on a rank",
        )


@pytest.mark.milestone(task="5.2", points=5, section="Images in, numbers out")
def test_image_transforms(lab):
    programs = program_of(f"{PROGRAMS}:image").__globals__
    mean, std = [0.5, 0.25, 0.75], [0.5, 0.2, 0.3]
    for name, given in programs["IMAGES"].items():
        got = lab.observe(f"{PROGRAMS}:transform", name, 16, mean, std)
        if "ended" in got:
            require(False, expected=f"a tensor of an image of any mode ({name})", got=got["ended"])
        values = got["values"]
        require(
            list(values.shape) == [3, 16, 16] and str(values.dtype) == "torch.float32" and values.device.type == "cpu",
            expected=f"a float32 tensor of shape [3, 16, 16] on the CPU for an image ({name})",
            got=f"{values.dtype}, {list(values.shape)}, {values.device}",
        )
        image = programs["image"](*given).convert("RGB").resize((16, 16), 2)
        wanted = (numpy.asarray(image, dtype=numpy.float64) / 255 - mean) / std
        difference = float(abs(values.permute(1, 2, 0).double().numpy() - wanted).max())
        require(
            difference < 1e-4,
            expected=f"the resized image, scaled to 0…1, less the mean, over the deviation, channel by channel ({name})",
            got=f"values that differ by {difference:.3g}; the first pixel is {[round(v, 4) for v in values[:, 0, 0].tolist()]}, "
            f"and {[round(v, 4) for v in wanted[0, 0].tolist()]} was expected",
        )
        require(
            not got["draws"] and got["again"],
            expected="a validation transform that draws nothing",
            got="one that draws random numbers",
        )
        require(got["kept"], expected="an image that is left as it was", got="it was changed")
        require(
            got["own memory"],
            expected="a tensor with memory of its own for each call: a loader keeps those of a batch until it has all",
            got="one whose values the next call changes",
        )
        require(
            got["looks again"],
            expected=f"the pixels that an image has now, where it has got others since the last call ({name})",
            got="the tensor of the earlier ones",
        )
        turns = got["turns"]
        require(
            set(sum(turns, [])) <= {"as it was", "mirrored"},
            expected=f"in training the same tensor as in validation, or that with left and right exchanged ({name})",
            got="neither of them",
        )
        mirrored = [turn.count("mirrored") for turn in turns]
        require(
            all(4 <= count <= 20 for count in mirrored),
            expected="about half of 24 images mirrored, in each of three turns",
            got=f"{mirrored} of 24",
        )
        require(
            turns[0] == turns[1] != turns[2],
            expected="torch's random numbers to say which are mirrored: the same ones after the same torch.manual_seed, others after another",
            got="others after the same seed" if turns[0] != turns[1] else "the same after any seed",
        )
    got = lab.observe(f"{PROGRAMS}:from_a_file")
    require_equal(got["size"], [640, 480], of="the size of a JPEG that was opened and not read yet, after it was transformed")
    require(got["same"], expected="the same tensor of a JPEG that was not read yet as of one that was", got="another")
    count = lab.observe(f"{PROGRAMS}:mirrored", 1000, 3)
    require(430 <= count <= 570, expected="about half of 1000 images mirrored: 500, and 70 more or fewer at most", got=count)


def check_loaders(lab, rows: int, test_rows: int, micro_batch: int, ranks: int, seed: int = 0) -> None:
    """What a rank's loaders have to be, whatever the numbers."""
    got = lab.observe(f"{PROGRAMS}:load", rows, test_rows, micro_batch, ranks, seed)
    case = f"{rows} rows to train and {test_rows} to evaluate on, {ranks} ranks, micro-batch {micro_batch}"
    for epoch in range(3):
        shares = [sum(rank["epochs"][epoch], []) for rank in got]
        seen = sum(shares, [])
        twice = sorted({row for row in seen if seen.count(row) > 1})
        require(not twice, expected=f"no row twice in an epoch of training ({case})", got=f"rows {twice[:10]} in epoch {epoch}")
        require(
            len(seen) == rows // ranks * ranks,
            expected=f"{rows // ranks * ranks} rows in an epoch of training ({case}): all but those that do not divide by the ranks",
            got=f"{len(seen)} in epoch {epoch}",
        )
        sizes = [[len(batch) for batch in rank["epochs"][epoch]] for rank in got]
        share = rows // ranks
        wanted = [micro_batch] * (share // micro_batch) + [share % micro_batch] * bool(share % micro_batch)
        require_equal(sizes, [wanted] * ranks, of=f"the sizes of the batches of epoch {epoch}, by rank ({case})")
    for number, rank in enumerate(got):
        require(
            not rank["draws"],
            expected="torch's random numbers left as they are: the seed is of the order only",
            got="torch's generator in another state after create_data_loaders",
        )
        require(
            not rank["read at once"],
            expected="no row read before a loader is asked for batches: a data set of images does not fit in memory",
            got=f"{rank['read at once']} rows read by create_data_loaders ({case})",
        )
        require(rank["labels"], expected=f"each image with its own label ({case})", got="another label")
        require_equal(rank["types"], ["torch.int64"], of="the type of the labels of a batch, as cross-entropy wants it")
        share = rows // ranks
        require(
            all(read >= share for read in rank["reads"]),
            expected=f"each row read in the epoch in which it is used, since a transform may draw: {share} reads in each of three epochs ({case})",
            got=rank["reads"],
        )
        require(
            rank["again"],
            expected="an order that the seed and the epoch draw, and nothing else",
            got="another after torch.manual_seed",
        )
        require_equal(rank["workers"], [0, 0], of=f"num_workers of the two loaders of rank {number}")
        require(
            rank["samplers"][0] == "DistributedSampler",
            expected="a training loader whose sampler is told the epoch",
            got=rank["samplers"][0],
        )
    orders = [[rank["epochs"][epoch] for rank in got] for epoch in range(3)]
    if rows > 6:
        require(orders[0] != orders[1], expected=f"another order in the next epoch ({case})", got="the same")
        flat = sum(sum(orders[0], []), [])
        require(flat != sorted(flat), expected=f"rows in an order that is drawn ({case})", got="in their own order")
    if rows > 20:
        epochs = [[{row for batch in rank for row in batch} for rank in order] for order in orders]
        over = [sorted(set(range(rows)) - set().union(*epoch)) for epoch in epochs]
        require(
            not over[0] or over[0] != over[1] or over[0] != over[2],
            expected=f"other rows left out in the next epoch ({case})",
            got=f"rows {over[0][:10]} in three epochs",
        )
        require(
            ranks == 1 or all(one != other for one, other in zip(epochs[0], epochs[1], strict=True)),
            expected=f"an order over all rows, dealt to the ranks: other rows for each rank in the next epoch ({case})",
            got="the same rows for a rank in each epoch",
        )
    batches = [[len(batch) for batch in rank["evaluation"]] for rank in got]
    require(len({str(sizes) for sizes in batches}) == 1, expected=f"equal batches on all ranks in evaluation ({case})", got=batches)
    require(max(batches[0]) <= micro_batch, expected=f"batches of at most {micro_batch} rows in evaluation", got=batches[0])
    counted = sorted(row for rank in got for batch in rank["evaluation"] for row, label in batch if label != -100)
    require(
        counted == list(range(test_rows)),
        expected=f"each row once in evaluation, those with the label IGNORED not counted ({case})",
        got=f"{len(counted)} rows with a label, {len(set(counted))} different ones",
    )
    filled = sum(len(batch) for rank in got for batch in rank["evaluation"]) - test_rows
    require(
        filled == -test_rows % ranks,
        expected=f"{-test_rows % ranks} rows that only fill up ({case})",
        got=f"{filled} rows with the label IGNORED",
    )
    order = [sum(rank["evaluation"], []) for rank in got]
    numbers = [row for together in zip(*order, strict=True) for row, _ in together][:test_rows]
    require(numbers == list(range(test_rows)), expected=f"rows in order in evaluation ({case})", got=numbers[:20])
    require(all(rank["evaluation_again"] for rank in got), expected="the same number of batches a second time", got="another")


@pytest.mark.milestone(task="5.3", points=10, section="Who sees which row")
def test_data_loaders(lab):
    for rows, test_rows, micro_batch, ranks in (
        (101, 103, 4, 2),
        (103, 101, 8, 3),
        (24, 24, 4, 2),
        (7, 7, 2, 2),
        (7, 7, 2, 3),
        (7, 1, 8, 2),
        (9, 5, 2, 1),
    ):
        check_loaders(lab, rows, test_rows, micro_batch, ranks)
    orders = [lab.observe(f"{PROGRAMS}:load", 40, 8, 4, 2, seed, 9)[0]["epochs"] for seed in (0, 0, 5)]
    require(
        orders[0] == orders[1] != orders[2],
        expected="an order that the seed draws",
        got="the same for any seed" if orders[0] == orders[2] else "another each time",
    )
    first = sum(lab.observe(f"{PROGRAMS}:load", 1000, 4, 8, 2, 0, 1)[0]["epochs"][0][:2], [])
    require(
        max(first) - min(first) > 200,
        expected="an order drawn over all 1000 rows: the first 16 come from everywhere",
        got=sorted(first),
    )
    different = len({str(order) for order in orders[0]})
    require(different == 9, expected="nine orders in nine epochs", got=f"{different} different ones")
    for gpu in (True, False):
        got = lab.observe(f"{PROGRAMS}:pinned", gpu)
        require_equal(got, [gpu, gpu], of=f"pin_memory of the two loaders, where torch sees {'a' if gpu else 'no'} GPU")


@pytest.mark.milestone(task="5.4", points=5, section="A Vision Transformer")
def test_vision_transformer(lab):
    got = lab.observe(f"{PROGRAMS}:load_models")
    for name, parameters, labels, dtype, checkpointing in (
        ("tiny", 329_381, 101, "torch.float32", False),
        ("in bf16", 320_263, 7, "torch.bfloat16", False),
        ("in fp16", 320_263, 7, "torch.float16", False),
        ("checkpointed", 320_263, 7, "torch.float32", True),
        ("loaded", 4_565, 101, "torch.bfloat16", True),
        ("fitting", 3_382, 10, "torch.float32", True),
    ):
        facts = got[name]
        what = {
            "loaded": "a model from a folder, 101 classes, bf16, gradient checkpointing",
            "fitting": "a model from a folder whose weights are in bf16 and whose head fits, 10 classes, float32, gradient checkpointing",
        }.get(name, f"vit-tiny ({name})")
        for key, wanted in (
            ("class", "ViTForImageClassification"),
            ("labels", labels),
            ("parameters", parameters),
            ("dtypes", [dtype]),
            ("devices", ["cpu"]),
            ("training", True),
            ("trained", True),
        ):
            require(facts[key] == wanted, expected=f"{key} {wanted} of {what}", got=facts[key])
        times = ["once", "twice"]
        require(
            facts.get("computed", [1 + checkpointing]) == [1 + checkpointing],
            expected=f"each block's activations computed {times[checkpointing]} in a forward and a backward pass of {what}",
            got=f"{facts.get('computed')} times",
        )
    require(got["same seed"], expected="the same weights of vit-tiny after the same torch.manual_seed", got="others")
    require(not got["other seed"], expected="other weights of vit-tiny after another torch.manual_seed", got="the same")
    require(
        not got["in a row"],
        expected="other weights for a second vit-tiny, where torch was seeded before the first one only",
        got="the same: the random numbers of the first are drawn again",
    )
    require_equal(
        got["another kind"],
        "DeiTForImageClassification",
        of="the class of a model from a folder that holds a DeiT: AutoModelForImageClassification finds it",
    )
    require(got["its weights"], expected="a DeiT's weights as its folder has them", got="others")
    require(got["its body"], expected="the body's weights as the folder has them", got="others")
    require(got["its head"] == [101, 12], expected="a new head of 101 classes where the folder's has 10", got=got["its head"])
    require(
        not got["old rows"],
        expected="a head that is new in all of its classes where the folder's has 10",
        got=f"{got['old rows']} rows of the folder's head",
    )
    require(
        got["fits"], expected="all weights as the folder has them, where it has them in bf16 and float32 is asked for", got="others"
    )
    require_equal(got["default types"], ["torch.float32"], of="torch's default type (torch.get_default_dtype) after load_vit_model")
    require(
        got["as stored"], expected="all weights as the folder has them, in fp32, where its head has as many classes", got="others"
    )
    require(
        got["of the hub"],
        expected="the weights that the hub has of google/vit-huge-patch14-224-in21k: a shape that vit_config knows too",
        got="others",
    )


def check_wrapped(got: dict, method: str, ranks: int, seed: int) -> None:
    """What a wrapped model has to be, and to do in four steps."""
    whole, padded = elements(), elements(ranks)
    wanted = reference("plain_losses", seed, ranks, 4, 3, 1)
    require(
        farthest(got["losses"], wanted) < 1e-5,
        expected=f"the losses of plain PyTorch on the rows of {ranks} rank{'s' * (ranks > 1)}, {[round(loss, 5) for loss in wanted]} ({method})",
        got=[round(loss, 5) for loss in got["losses"]],
    )
    sharded = method == "fsdp2"
    if method == "ddp":
        require(
            (got["bucket"] or 0) <= 25 * 2**20,
            expected="buckets of at most 25 MiB, as DistributedDataParallel has them by itself",
            got=f"{got['bucket']} bytes",
        )
    if sharded:
        require(
            None not in got["meshes"],
            expected="a mesh given to each fully_shard: without one torch takes the machine's accelerator, whatever the device is",
            got="a call of fully_shard without mesh",
        )
        require(
            all(mesh == got["wanted_mesh"] for mesh in got["meshes"]),
            expected=f"a mesh of all ranks of the device's kind, {got['wanted_mesh']}, wherever they run",
            got=got["meshes"],
        )
        require(
            got["gathered_together"] == 3,
            expected="the two blocks and the whole model, each sharded by a fully_shard of its own: 3",
            got=got["gathered_together"],
        )
        require(
            got["sharded"] == len(small_parameters()),
            expected="every parameter sharded",
            got=f"{got['sharded']} of {len(small_parameters())}",
        )
        require(sum(got["elements"]) == whole, expected=f"{whole} elements on all ranks together", got=got["elements"])
        # The root's own parameters are gathered once, each block's in the forward pass and again in the backward pass.
        require_equal(sorted(got["sent"]), ["all-gather", "reduce-scatter"], of="the collectives of a step (fsdp2)")
        require(
            sum(got["sent"]["reduce-scatter"]) == padded,
            expected=f"{padded} elements in a step's reduce-scatters: each parameter, its first dimension padded to a multiple of {ranks}",
            got=got["sent"]["reduce-scatter"],
        )
        require(
            len(got["sent"]["all-gather"]) == 5,
            expected="5 all-gathers in a step: root, and each block twice",
            got=got["sent"]["all-gather"],
        )
    else:
        require(got["elements"] == [whole] * ranks, expected=f"all {whole} elements on each rank ({method})", got=got["elements"])
        wanted_sent = {"all-reduce": whole} if method == "ddp" else {}
        require_equal(
            {name: sum(sizes) for name, sizes in got["sent"].items()},
            wanted_sent,
            of=f"the elements of a step's collectives ({method})",
        )
    held = [[rank["parameters"], rank["gradients"], rank["optimizer"]] for rank in got["held"]]
    # FSDP2's shards of parameters are padded in memory, gradients and moments are not.
    own = 4 * padded // ranks if sharded else 4 * whole
    require_equal(
        held,
        [[own, 4 * count, 8 * count] for count in got["elements"]],
        of=f"bytes of parameters, gradients and Adam's moments just before a step, by rank ({method})",
    )
    for name, said in got["refused"].items():
        require(name in said, expected=f"ValueError for method {name!r}, which names it", got=said)


@pytest.mark.milestone(task="5.5", points=10, section="What each method sends, and when")
def test_wrapped_models(lab, run_experiments):
    lab.wrap_model  # noqa: B018
    plans = [
        experiment("ddp", "wrap", options={"method": "ddp"}),
        experiment("fsdp2", "wrap", options={"method": "fsdp2"}),
        experiment("simple", "wrap", ranks=1, options={"method": "single_gpu_simple"}),
    ]
    with ranks_come_back():
        runs = run_experiments(plans, timeout=60)
    got = runs["simple"].results
    require(got["same"], expected="the model itself for single_gpu_simple", got=got["class"])
    require(
        lab.observe(f"{PROGRAMS}:moved", "single_gpu_simple"),
        expected="the model on its device for single_gpu_simple: cuda:0",
        got="parameters that are still on the CPU",
    )
    got = runs["ddp"].results
    require(got["class"] == "DistributedDataParallel", expected="DistributedDataParallel for ddp", got=got["class"])
    got = lab.observe(f"{PROGRAMS}:ddp_on_a_gpu")
    require(
        got["moved"], expected="the model on its device before DistributedDataParallel gets it: cuda:1", got="parameters on the CPU"
    )
    require(
        got["numbers"] in (None, [1]),
        expected="device_ids [1], or none, on rank 9 of 16, whose device is cuda:1",
        got=f"device_ids {got['numbers']}",
    )
    got = lab.observe(f"{PROGRAMS}:mesh_beside_a_gpu")
    require_equal(got, ["cpu"], of="the kind of the mesh, for a device that is the CPU of a machine with a GPU")
    for name, method, ranks in (("simple", "single_gpu_simple", 1), ("ddp", "ddp", 2), ("fsdp2", "fsdp2", 2)):
        check_wrapped(runs[name].results, method, ranks, 3)


def zero_files() -> dict[str, str]:
    """Configuration files of stages 1 to 3, and one whose sizes are numbers already, where exercises can read them."""
    folder = visible_folder() / "configurations"
    numbers = {
        "train_micro_batch_size_per_gpu": 7,
        "gradient_accumulation_steps": 5,
        "train_batch_size": 70,
        "gradient_clipping": 0.25,
    }
    with once("configurations") as first:
        if first:
            (folder / "numbers").mkdir(parents=True)
            for stage in (1, 2, 3):
                reference("zero_file", folder, stage)
            program_of(f"{PROGRAMS}:zero_file")(folder / "numbers", 1, 0.5, **numbers)
    return {f"stage {stage}": str(folder / f"zero{stage}.json") for stage in (1, 2, 3)} | {
        "numbers": str(folder / "numbers" / "zero1.json")
    }


def engine_experiment(name: str, file: str, *, accumulation: int = 1, ranks: int = 2, seed: int = 3, **options) -> Experiment:
    """An engine of one of `zero_files`. That DeepSpeed will be used is said to the launcher too, which then prepares it on the ranks."""
    given = {"file": zero_files()[file]} | options
    return experiment(
        name, "engine", ranks=ranks, seed=seed, accumulation=accumulation, options=given, deepspeed=zero_configuration(1)
    )


def check_engine(got: dict, stage: int, ranks: int, accumulation: int, seed: int, clipping: float = 0.0) -> None:
    """What an engine has to be, and to do in three steps."""
    what = f"stage {stage}, {ranks} ranks, accumulation {accumulation}"
    sizes = [3 * accumulation * ranks, 3, accumulation]
    require_equal(got["sizes"], sizes, of=f"global batch, micro-batch and accumulation of the engine ({what})")
    require(got["stage"] == stage, expected=f"the file's stage {stage}", got=got["stage"])
    require(got["clipping"] == clipping, expected=f"the file's gradient_clipping {clipping}", got=got["clipping"])
    adam = reference_adam()
    wanted = [adam["lr"], adam["eps"], adam["weight_decay"]]
    require(
        all(group == wanted for group in got["optimizer"]),
        expected=f"lr, eps and weight_decay {wanted}, the last two from the file",
        got=got["optimizer"],
    )
    require(got["file_kept"], expected="a file that is left as it was", got="it was changed")
    if clipping:
        return
    losses = reference("plain_losses", seed, ranks, 3 * accumulation, 3, accumulation)
    require(
        farthest(got["losses"], losses) < 1e-5,
        expected=f"the losses of plain PyTorch, {[round(x, 5) for x in losses]} ({what})",
        got=[round(x, 5) for x in got["losses"]],
    )
    whole = math.ceil(elements() / (2 * ranks)) * 2 * ranks  # DeepSpeed pads to pairs of elements for each rank
    if stage == 3:
        sent = {"reduce-scatter": accumulation * padded_elements(ranks)}
    else:
        # Stage 1 reduces once per step, stage 2 after every micro-batch; both then gather the parameters that were updated.
        sent = {"all-reduce": (elements() if stage == 1 else accumulation * elements()), "all-gather": whole}
    counted = {name: sum(sizes) for name, sizes in got["sent"].items()}
    for name, count in sent.items():
        require(
            abs(counted.get(name, 0) - count) <= ranks, expected=f"{count} elements per step in each {name} ({what})", got=counted
        )
    parameters = [rank["parameters"] for rank in got["held"]]
    share = 4 * (padded_elements(ranks) // ranks if stage == 3 else whole)
    require(parameters == [share] * ranks, expected=f"{share} bytes of parameters on each rank ({what})", got=parameters)


@pytest.mark.milestone(task="5.6", points=10, section="An engine without Trainer")
def test_engines(lab, run_experiments):
    lab.initialize_deepspeed_model  # noqa: B018
    for text, mentions, what in (
        ('{"optimizer": {"type": "AdamW"}, "bf16": {"enabled": "auto"}}', ("bf16.enabled",), "'auto' at bf16.enabled"),
        (
            '{"optimizer": {"type": "AdamW", "params": {"weight_decay": "auto"}}}',
            ("optimizer.params.weight_decay",),
            "'auto' at optimizer.params.weight_decay",
        ),
        ('{"optimizer": {"type": "AdamW", "lr": "auto"}}', ("optimizer.lr",), "'auto' at optimizer.lr, beside params"),
        (
            '{"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR", "params": {"train_batch_size": "auto"}}}',
            ("scheduler.params.train_batch_size",),
            "'auto' at scheduler.params.train_batch_size",
        ),
        ('{"train_batch_size": "auto"}', ("optimizer",), "a file without an optimizer"),
    ):
        said = lab.observe(f"{PROGRAMS}:refuse", text)
        require(
            all(word in said for word in mentions) and said != "no error",
            expected=f"ValueError for {what}, in a sentence that says {mentions[0]!r}",
            got=said,
        )
        require("an engine was made" not in said, expected=f"ValueError for {what} before an engine is made", got=said)
    quantized = '{"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 3, "zero_quantized_weights": true}}'
    for text, dtype, wanted in (
        (quantized, "bfloat16", {"bf16": {"enabled": True}}),
        (quantized, "float32", {}),
        (quantized, "float16", {"bf16": {"enabled": True}}),
        ('{"optimizer": {"type": "AdamW"}}', "bfloat16", {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
        (
            quantized.replace("weights", "gradients"),
            "bfloat16",
            {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
        ),
        (quantized.replace("true", "false"), "bfloat16", {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
        (quantized.replace("true", "false"), "float16", {"torch_autocast": {"enabled": True, "dtype": "float16"}}),
    ):
        given = lab.observe(f"{PROGRAMS}:configure", text, dtype)
        require(
            "ended" not in given,
            expected=f"an engine with torch.{dtype} and {text}, the path given as text",
            got=given.get("ended"),
        )
        got = {key: value for key, value in given.items() if key in ("bf16", "fp16", "torch_autocast")}
        require_equal(got, wanted, of=f"what the engine's configuration says of types, with torch.{dtype} and {text}")
    others = {
        "steps_per_print": 7,
        "communication_data_type": "fp32",
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9}},
    }
    text = json.dumps({"optimizer": {"type": "AdamW", "params": {"lr": 0.5, "eps": 0.25}}, "train_batch_size": 64} | others)
    got = lab.observe(f"{PROGRAMS}:configure", text, "float32")
    require("ended" not in got, expected=f"an engine with {text}", got=got.get("ended"))
    require_equal({key: got.get(key) for key in others}, others, of=f"the other entries of the configuration, with {text}")
    require_equal(
        got["optimizer"],
        {"type": "AdamW", "params": {"lr": 0.1, "eps": 0.25}},
        of=f"the configuration's optimizer, with learning_rate 0.1 and {text}",
    )
    require(
        got.get("train_batch_size", 30) == 30,
        expected="train_batch_size 30 for a micro-batch of 3, accumulation 5 and a process group of 2 ranks, where WORLD_SIZE is 4",
        got=got.get("train_batch_size"),
    )
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    got = lab.observe(f"{PROGRAMS}:configure", '{"optimizer": {"type": "AdamW"}}', "float32")
    require_equal(
        [got.get(name) for name in names], [3, 5], of=f"{' and '.join(names)} of the configuration, where the file has neither"
    )
    said = lab.observe(f"{PROGRAMS}:refuse", '{"optimizer": {"type": "AdamW"}}')
    require(said == "no error", expected="no error for an optimizer without params: lr is put there", got=said)
    plans = [
        engine_experiment("stage1", "stage 1", accumulation=2),
        engine_experiment("stage2", "stage 2", accumulation=2),
        engine_experiment("stage3", "stage 3"),
        engine_experiment("numbers", "numbers"),
        engine_experiment("bf16", "stage 1", dtype="bfloat16"),
    ]
    with ranks_come_back():
        runs = run_experiments(plans, timeout=90)
    for stage, accumulation in ((1, 2), (2, 2), (3, 1)):
        check_engine(runs[f"stage{stage}"].results, stage, 2, accumulation, 3)
    check_engine(runs["numbers"].results, 1, 2, 1, 3, clipping=0.25)
    for name, dtype in (("stage2", "torch.float32"), ("bf16", "torch.bfloat16")):
        got = runs[name].results
        require(got["dtypes"] == [dtype], expected=f"logits in {dtype}, where torch_dtype is {dtype}", got=got["dtypes"])
        require(got["parameters"] == ["torch.float32"], expected="parameters that stay float32", got=got["parameters"])


def check_epoch(got: dict, seed: int, ranks: int, count: int, accumulation: int, what: str, *, exact: bool = True) -> None:
    """What an epoch has to return, and what has to happen in it."""
    steps = count // accumulation
    wanted = reference("plain_losses", seed, ranks, count, 3, accumulation)
    require(
        isinstance(got["losses"], list) and got["kind"] in ([], ["float"]), expected=f"a list of floats ({what})", got=got["kind"]
    )
    require(
        len(got["losses"]) == steps,
        expected=f"{steps} losses, one per optimizer step, for {count} micro-batches ({what})",
        got=len(got["losses"]),
    )
    require(
        got["passes"] == steps * accumulation,
        expected=f"{steps * accumulation} forward passes: what makes no whole step is left out ({what})",
        got=got["passes"],
    )
    near = 1e-5 if exact else 3e-2
    require(
        farthest(got["losses"], wanted) < near,
        expected=f"the losses of plain PyTorch, means over micro-batches and ranks: {[round(loss, 5) for loss in wanted]} ({what})",
        got=[round(loss, 5) for loss in got["losses"]],
    )
    require(
        all(losses == got["losses"] for losses in got["by_rank"]),
        expected=f"the same losses on every rank ({what})",
        got=got["by_rank"],
    )
    require(got["moved"], expected=f"images and labels on the model's device ({what})", got="a batch left where it was")
    require(got["training"], expected=f"the model in training mode, whatever it was in before ({what})", got="evaluation mode")


def check_on_a_gpu(lab) -> None:
    """What an epoch by hand has to do where the device is a GPU, and what both return where there is no whole step."""
    for dtype, accumulation, count in (("bfloat16", 2, 5), ("float16", 1, 2), ("float32", 2, 2), ("float32", 3, 2)):
        got = lab.observe(f"{PROGRAMS}:epoch_on_a_gpu", dtype, accumulation, count)
        steps = count // accumulation
        case = f"train_epoch_standard on cuda:0, accumulation {accumulation}, torch.{dtype}, {count} micro-batches"
        require(not got["ended"], expected=f"{steps} losses of {case}", got=got["ended"])
        require(got["losses"] == steps, expected=f"{steps} losses of {case}", got=got["losses"])
        require_equal(
            got["autocast"],
            [f"torch.{dtype}"] * (steps * accumulation),
            of=f"the type of the autocast for GPUs, by forward pass ({case})",
        )
        require(
            len(got["apart"]) == steps and max(got["apart"], default=0.0) < 1e-3,
            expected=f"{steps} steps, each with the mean gradient of its micro-batches, as it is, however large ({case})",
            got=f"{len(got['apart'])} steps, with gradients that differ by {max(got['apart'], default=0.0):.2g} of them",
        )
        require(
            False not in got["sync"],
            expected=f"a model without no_sync that reduces after each micro-batch, as FSDP2 does ({case})",
            got="set_requires_gradient_sync(False): then each rank keeps whole gradients",
        )
        require(
            False not in got["reshard"],
            expected=f"parameters that are let go after each backward pass, as FSDP2 does by itself ({case})",
            got="set_reshard_after_backward(False): then each rank keeps the whole model",
        )
        require(
            got["ahead"] <= 1,
            expected=f"batches read one after the other: no more than one ahead of the forward pass ({case})",
            got=f"{got['ahead']} read ahead: an epoch's images do not fit in memory",
        )
    got = lab.observe(f"{PROGRAMS}:short_epoch", 3, 2)
    require(
        not got["ended"] and got["losses"] == [] and not got["passes"],
        expected="[] and no forward pass by train_epoch_deepspeed, where two micro-batches make no whole step of three",
        got=got["ended"] or f"{got.get('losses')} after {got['passes']} forward passes",
    )
    got = lab.observe(f"{PROGRAMS}:short_epoch", 3, 7)
    require(
        not got["ended"] and got["losses"] == [1.0, 1.0] and got["passes"] == 6,
        expected="two losses after six forward passes by train_epoch_deepspeed, of seven micro-batches with accumulation 3",
        got=got["ended"] or f"{got.get('losses')} after {got['passes']} forward passes",
    )
    require(
        got["ahead"] <= 1,
        expected="batches read one after the other by train_epoch_deepspeed: no more than one ahead of the forward pass",
        got=f"{got['ahead']} read ahead: an epoch's images do not fit in memory",
    )


@pytest.mark.milestone(task="5.7", points=15, section="A step, by hand and by an engine")
def test_epochs(lab, run_experiments):
    lab.train_epoch_standard, lab.train_epoch_deepspeed  # noqa: B018
    check_on_a_gpu(lab)
    plans = [
        experiment("ddp", "train_standard", accumulation=2, options={"ddp": True, "count": 5}),
        experiment("bf16", "train_standard", accumulation=1, options={"ddp": True, "count": 3, "dtype": "bfloat16"}),
        experiment("engine", "train_engine", accumulation=2, options={"count": 5}, deepspeed=zero_configuration(1)),
        experiment("simple", "train_standard", ranks=1, accumulation=3, options={"count": 8}),
    ]
    with ranks_come_back():
        runs = run_experiments(plans, timeout=90)
    check_epoch(runs["simple"].results, 3, 1, 8, 3, "one rank, accumulation 3")
    check_epoch(runs["ddp"].results, 3, 2, 5, 2, "DDP, accumulation 2")
    got = runs["ddp"].results
    require(
        sum(got["sent"]) == 2 * elements(),
        expected=f"gradients reduced in the last micro-batch of a step only: {2 * elements()} elements in an epoch of two steps",
        got=f"{sum(got['sent'])} elements: {got['sent']}",
    )
    for name, dtype in (("ddp", "torch.float32"), ("bf16", "torch.bfloat16")):
        got = runs[name].results
        require(got["dtypes"] == [dtype], expected=f"logits in {dtype}, where dtype is {dtype}", got=got["dtypes"])
        require(got["parameters"] == ["torch.float32"], expected="parameters that stay float32", got=got["parameters"])
        require(not got["left"], expected="no gradients left after the epoch", got="gradients that the next step would add to")
    check_epoch(runs["bf16"].results, 3, 2, 3, 1, "DDP, bf16", exact=False)
    got = runs["engine"].results
    check_epoch(got, 3, 2, 5, 2, "an engine, accumulation 2")
    require(
        (got["micro_steps"], got["steps"]) == (4, 2),
        expected="4 micro-steps and 2 optimizer steps of the engine",
        got=(got["micro_steps"], got["steps"]),
    )


def check_scores(got: dict, seed: int, rows: int, what: str) -> None:
    wanted = reference("scores_of", seed, rows)
    for by_training in zip(*got["scores"], strict=True):
        for scores in by_training:
            require(set(scores) == set(wanted), expected=f"the keys {', '.join(wanted)}", got=list(scores))
            for name, value in wanted.items():
                require(
                    abs(scores[name] - value) < 1e-5,
                    expected=f"{name} {value:.5f}, as one process has for all {rows} rows ({what})",
                    got=f"{scores[name]:.5f}" if isinstance(scores[name], float) else scores[name],
                )
    require(got["kinds"] == ["float"], expected="floats", got=got["kinds"])
    require(
        got["passes"] == got["batches"],
        expected=f"the model called once for each batch, filled up or not ({what}): {got['batches']}",
        got=got["passes"],
    )
    require(got["off"], expected="a model in evaluation mode: dropout off", got="training mode")
    for modes in got["modes"]:
        require_equal(
            modes,
            [True, False],
            of="whether the model is in training mode afterwards, where it was before but for one block, and where it was not",
        )
    require(
        not got["gradients"], expected="forward passes that keep nothing for a backward pass (torch.no_grad)", got="with gradients"
    )
    require(
        not got["inference"],
        expected="forward passes under torch.no_grad: what FSDP2 and ZeRO-3 gather stays, and is trained on afterwards",
        got="torch.inference_mode, whose tensors no backward pass takes",
    )
    require(
        got["outside"] == got["batches"],
        expected=f"what evaluate was given called itself, with its engine if it has one ({what}): {got['batches']} calls",
        got=got["outside"],
    )
    require(got["enabled"], expected="gradients enabled again after the evaluation", got="torch.is_grad_enabled() is False")
    require(got["moved"], expected="images on the model's device", got="a batch left where it was")
    require(got["kept"], expected="batches that are left as they were", got="they were changed")


def check_loss_alone(lab) -> None:
    """The loss of a model in bf16 over many batches, and of a few on a GPU."""
    for rows, size, gpu, near in ((300, 1, False, 0.02), (8, 3, True, 0.02), (256, 256, False, 1e-4)):
        got = lab.observe(f"{PROGRAMS}:evaluate_alone", rows, size, gpu)
        what = f"{rows} rows in batches of {size}, a model in bf16{' on cuda:0' * gpu}"
        require(not got["ended"], expected=f"loss {got['wanted']:.4f} of {what}", got=got["ended"])
        require(
            isinstance(got["loss"], float) and abs(got["loss"] / got["wanted"] - 1) < near,
            expected=f"loss {got['wanted']:.5f} of {what}, computed and added up in float32",
            got=f"{got['loss']:.5f}" if isinstance(got["loss"], float) else got["loss"],
        )
        require(
            not got["sent from the CPU"],
            expected=f"what is added up over the ranks on the device ({what}): NCCL takes nothing else",
            got=f"{got['sent from the CPU']} tensors on the CPU, given to a collective",
        )


@pytest.mark.milestone(task="5.8", points=10, section="Means of means")
def test_evaluation(lab, run_experiments):
    lab.evaluate  # noqa: B018
    check_loss_alone(lab)
    require(
        lab.observe(f"{PROGRAMS}:nothing_counts"),
        expected="a part in what is added up over the ranks, also from a rank all of whose rows only fill up",
        got="no collective called there: the other ranks would wait for ever",
    )
    plans = [
        experiment("seven", "evaluate", options={"rows": 7}, seed=5),
        experiment("nine", "evaluate", options={"rows": 9, "unlabelled": True}, seed=6),
        experiment("one", "evaluate", options={"rows": 1}, seed=9),
        experiment("zero3", "evaluate", options={"rows": 13}, seed=7, deepspeed=zero_configuration(3)),
        experiment("lone", "evaluate", ranks=1, options={"rows": 8}, seed=8, deepspeed=zero_configuration(1)),
    ]
    with ranks_come_back():
        runs = run_experiments(plans, timeout=90)
    for name, seed, rows in (("lone", 8, 8), ("seven", 5, 7), ("nine", 6, 9), ("one", 9, 1), ("zero3", 7, 13)):
        check_scores(
            runs[name].results,
            seed,
            rows,
            f"{rows} row{'s' * (rows > 1)}, {'one rank' if name == 'lone' else 'two ranks'}{', ZeRO-3' * (name == 'zero3')}"
            + ", a row without a label before them" * (name == "nine"),
        )


@pytest.mark.milestone(task="5.9", points=10, section="A ring")
def test_bytes_sent(lab):
    for collective, size, ranks, wanted in (
        ("all-reduce", 1000, 2, 1000.0),
        ("all-reduce", 1200, 4, 1800.0),
        ("all-gather", 1200, 4, 900.0),
        ("reduce-scatter", 1200, 3, 800.0),
        ("broadcast", 1200, 2, 600.0),
        ("all-to-all", 1200, 4, 900.0),
        ("all-reduce", 1200, 1, 0.0),
        ("all-gather", 16384, 16384, 16383.0),
    ):
        require_equal(lab.bytes_sent(collective, size, ranks), wanted, of=f"bytes_sent({collective!r}, {size}, {ranks})")
    for given, name in (
        (("all-to-none", 10, 2), "all-to-none"),
        (("All_Reduce", 10, 2), "All_Reduce"),
        (("all-reduce-coalesced", 10, 2), "all-reduce-coalesced"),
        (("all-reduce", 10, 0), "0"),
    ):
        require_error(
            lambda given=given: lab.bytes_sent(*given), ValueError, mentions=(name,), expected=f"ValueError for bytes_sent{given}"
        )
    agree_as_recorded(lab.bytes_sent, __file__, "5.9 sent", "bytes_sent{}, of (collective, size, ranks)")
    rows = [["all-reduce", 400], ["all-gather", 80], ["all-reduce", 4], ["all-gather", 80]]
    got = lab.observe(f"{PROGRAMS}:table", rows, 4, 2)
    require_equal(
        got["table"],
        [
            ["all-reduce", {"calls": 1.0, "bytes": 202.0, "sent": 303.0}],
            ["all-gather", {"calls": 1.0, "bytes": 80.0, "sent": 60.0}],
        ],
        of="communication_table() of two all-reduces of 400 and 4 bytes and two all-gathers of 80, 4 ranks, 2 steps",
    )
    require(got["kept"], expected="a list of collectives that is left as it was", got="it was changed")
    got = lab.observe(
        f"{PROGRAMS}:table", [["all-gather", 800, 2], ["all-to-all", 800], ["all-gather", 800], ["all-gather", 800, 1]], 8, 1
    )["table"]
    require_equal(
        [[name, row["sent"]] for name, row in got],
        [["all-gather", 1100.0], ["all-to-all", 700.0]],
        of="what communication_table() says is sent, of an all-gather of 800 bytes on 2 of 8 ranks, an all-to-all of 800 on all, an "
        "all-gather of 800 on all, and one within a group of a single rank",
    )
    for name in ("all-to-none", "reduce"):
        got = lab.observe(f"{PROGRAMS}:table", [[name, 80]], 4, 2)
        require(
            name in got.get("refused", str(got.get("table"))),
            expected=f"no collective left out: for a trace of {name!r} the ValueError of bytes_sent, which names it",
            got=got.get("refused", f"no error: {got.get('table')}"),
        )
    agree_as_recorded(
        tabled(lab),
        __file__,
        "5.9 table",
        "communication_table{}, of (collectives as name, bytes and their own ranks if known; ranks, steps)",
    )


def tabled(of):
    """The table's rows in their order, or the error."""
    return lambda *given: of.observe(f"{PROGRAMS}:table", *given, True)["table"]


@pytest.mark.milestone(task="5.10", points=5, section="Seconds and bytes")
def test_measurements(lab):
    seconds = [100.0, 50.0, 1.0, 2.0, 3.0, 4.0, 10.0, 1000.0]
    for device in ("cpu", "cuda:0"):
        for named, wanted, steps in (
            ({}, 5 * 24 / 20, 7),
            ({"warm_up_steps": 0, "measured_steps": 2}, 2 * 24 / 150, 2),
            ({"warm_up_steps": 3, "measured_steps": 1}, 24 / 2, 4),
        ):
            got = lab.observe(f"{PROGRAMS}:throughput", seconds, 24, device, **named)
            case = f"measure_throughput(…, 24, torch.device('{device}'){''.join(f', {key}={value}' for key, value in named.items())}) of steps of {', '.join(f'{s:g}' for s in seconds)} s"
            require(got["steps"] == steps, expected=f"{steps} steps by {case}", got=got["steps"])
            measured = named.get("measured_steps", 5)
            at = [number for number, entry in enumerate(got["log"]) if entry == "step"][-measured:]
            between = [entry for entry in got["log"][at[0] : at[-1]] if entry != "step"]
            require(
                not between,
                expected=f"{measured} measured steps one after the other, with no wait for the GPU between them, by {case}",
                got=f"{', '.join(between)} between them",
            )
            require(
                "empty_cache" not in got["log"],
                expected=f"an allocator's cache that stays as the warm-up has left it, by {case}",
                got="torch.cuda.empty_cache()",
            )
            require(
                isinstance(got["found"], float) and abs(got["found"] / wanted - 1) < 0.01,
                expected=f"{wanted:.4g} samples/s by {case}",
                got=got["found"],
            )
        slow = lab.observe(f"{PROGRAMS}:throughput", [300.0] * 7, 1, device)["found"]
        require(
            isinstance(slow, float) and abs(slow * 300 - 1) < 0.01,
            expected=f"0.003333 samples/s on {device}, of a sample that takes 300 s, as with offload on a CPU",
            got=slow,
        )
        synchronized = [entry for entry in got["log"] if entry.startswith("synchronize")]
        require(
            bool(synchronized) == (device != "cpu"),
            expected=f"{'no ' * (device == 'cpu')}torch.cuda.synchronize on {device}",
            got=synchronized,
        )
        require(set(synchronized) <= {"synchronize cuda:0"}, expected="the given device synchronized", got=synchronized)
    for device, wanted in (
        ("cpu", {"peak_allocated_gb": 2.048, "peak_reserved_gb": 2.048}),
        ("cuda:1", {"peak_allocated_gb": 3.0, "peak_reserved_gb": 5.5}),
    ):
        got = lab.observe(f"{PROGRAMS}:memory", device)
        where = (
            "ru_maxrss is 2,000,000 KiB"
            if device == "cpu"
            else "3,000,000,000 bytes at most were allocated and 5,500,000,000 reserved"
        )
        if device == "cpu":
            where += " for this process and 9,000,000 for its children"
        require(
            set(got["found"]) == set(wanted) and all(abs(got["found"][key] - value) < 1e-6 for key, value in wanted.items()),
            expected=f"{wanted} of get_memory_stats(torch.device('{device}')), where {where}",
            got=got["found"],
        )
        require(got["asked"] in ([], [device]), expected=f"the memory of {device}", got=got["asked"])
        require(
            got["again"] == got["found"],
            expected="the same from a second call: the most that the process has had so far",
            got=got["again"],
        )


HELD = [
    "parameters",
    "gradients",
    "optimizer",
    "host_parameters",
    "host_gradients",
    "host_optimizer",
    "disk_gradients",
    "disk_optimizer",
]
KEYS = ["method", "not_run", "final_accuracy", "final_top5", "eval_loss", "train_losses", "epoch_duration", "throughput", "held_bytes",
        "peak_memory_gb", "communication"]  # fmt: skip


def check_run(
    lab,
    method: str,
    device: str,
    rank: int,
    ranks: int,
    *,
    epochs: int = 2,
    accumulation: int = 3,
    dtype: str = "float32",
    seed: int = 17,
    profile: bool = True,
) -> None:
    """What the runner has to call, with what, and to make of it."""
    settings = {
        "epochs": epochs,
        "accumulation": accumulation,
        "dtype": dtype,
        "seed": seed,
        "profile": profile,
        "checkpointing": dtype != "float32",
    }
    got = lab.observe(f"{PROGRAMS}:orchestrate", method, device, rank, ranks, **settings)
    what = f"{method}, rank {rank} of {ranks}, {epochs} epochs"
    log = [(name, given) for name, given in got["log"]]
    names = [name for name, _ in log]
    deepspeed = method in ("single_gpu_offload", "zero1", "zero2", "zero3", "zeropp")
    epoch, made = ("train_epoch_deepspeed", "initialize_deepspeed_model") if deepspeed else ("train_epoch_standard", "wrap_model")

    def calls(name: str) -> list[dict]:
        return [given for called, given in log if called == name]

    require("refused" not in got, expected=f"a run of {what}", got=f"ValueError: {got.get('refused')}")
    result = got["result"]
    require_equal(sorted(result), sorted(KEYS), of=f"the keys of the result ({what})")
    require_equal(calls("seed"), [seed], of=f"the seed that torch has when the model is loaded ({what})")
    require_equal(
        calls("load_vit_model"),
        [
            {
                "model_name": "some-vit",
                "num_labels": 9,
                "torch_dtype": "torch.float32",
                "enable_gradient_checkpointing": dtype != "float32",
            }
        ],
        of=f"the calls of load_vit_model ({what})",
    )
    if deepspeed:
        given = calls(made)
        require(
            len(given) == 1 and given[0]["config_path"].endswith(f"labs/lab05_multi_gpu/configs/{method}.json"),
            expected=f"one engine, by CONFIGS/{method}.json",
            got=[one.get("config_path") for one in given],
        )
        sizes = {key: given[0][key] for key in ("micro_batch_size", "gradient_accumulation_steps", "learning_rate", "torch_dtype")}
        wanted = {
            "micro_batch_size": 4,
            "gradient_accumulation_steps": accumulation,
            "learning_rate": 0.125,
            "torch_dtype": f"torch.{dtype}",
        }
        require_equal(sizes, wanted, of=f"what initialize_deepspeed_model is called with ({what})")
    else:
        require_equal(
            calls(made),
            [{"model": "the model without its wrapper" if method == "ddp" else "the model", "method": method, "device": device}],
            of=f"the calls of wrap_model ({what})",
        )
    require_equal(calls("set_epoch")[:epochs], list(range(epochs)), of=f"the epochs that the sampler is told ({what})")
    whole = [at for at, (name, given) in enumerate(log) if name == epoch and given["loader"] == "train"]
    require(
        len(whole) == epochs,
        expected=f"{epochs} epochs over the training loader by {epoch} ({what})",
        got=f"{len(whole)}; called were {names}",
    )
    told = [at for at, name in enumerate(names) if name == "set_epoch"]
    require(
        all(a < b for a, b in zip(told, whole, strict=False)),
        expected=f"each epoch told to the sampler before it begins ({what})",
        got=names,
    )
    evaluated = names.index("evaluate") if "evaluate" in names else -1
    require(
        evaluated > whole[-1] and names.count("evaluate") == 1, expected=f"one evaluation, after the last epoch ({what})", got=names
    )
    extra = [at for at, (name, given) in enumerate(log) if name == epoch and given["loader"] != "train"]
    require(
        not extra or extra[0] > evaluated,
        expected=f"no step between the last epoch and the evaluation ({what})",
        got=names,
    )
    require(
        "get_memory_stats" in names and names.index("get_memory_stats") > whole[-1],
        expected=f"the peak of memory asked for after the training ({what})",
        got=names,
    )
    model = "the engine" if deepspeed else "the model"
    require_equal(
        calls("evaluate"),
        [{"model": model, "loader": "test", "device": device, "num_classes": 9}],
        of=f"what evaluate is called with ({what})",
    )
    for given in calls(epoch):
        require(
            given["model"] == model and given["device"] == device,
            expected=f"{epoch} with what {made} has returned, on {device} ({what})",
            got=given,
        )
        if not deepspeed:
            require_equal(
                given["optimizer"],
                ["AdamW", 0.125, 0.01, 0],
                of=f"the optimizer, its lr and weight_decay, and its number: one for all steps ({what})",
            )
            require(
                all(others == [[0.9, 0.999], 1e-8, False, False] for others in given["others"]),
                expected=f"torch's defaults for AdamW's betas, eps, amsgrad and maximize: (0.9, 0.999), 1e-8, False, False ({what})",
                got=given["others"],
            )
            require(
                given["trains the model"],
                expected=f"an optimizer of the parameters of what wrap_model has returned ({what})",
                got="another model's, or those that the model had before",
            )
            require(
                given["accumulation"] == accumulation and given["dtype"] == f"torch.{dtype}",
                expected=f"accumulation {accumulation} and dtype torch.{dtype} ({what})",
                got=given,
            )
    measured = calls("measure_throughput")
    require(
        len(measured) == 1 and names.index("measure_throughput") > evaluated,
        expected=f"throughput measured once, after the evaluation, so that its steps change no result ({what})",
        got=names,
    )
    require(
        measured[0]["samples_per_step"] == str(4 * accumulation * ranks),
        expected=f"{4 * accumulation * ranks} samples per step: micro-batch 4 × accumulation {accumulation} × {ranks} ranks",
        got=measured[0]["samples_per_step"],
    )
    steps = [given["loader"] for name, given in log if name == epoch and given["loader"] != "train"]
    require(
        steps and all(step == ["train 0"] * accumulation for step in steps),
        expected=f"measured steps of {accumulation} times the training loader's first micro-batch ({what})",
        got=steps,
    )
    held = calls("held_before_step")
    owner = "the engine's" if deepspeed else "AdamW"
    require(
        len(held) == 1 and held[0]["model"] == model and held[0]["optimizer"] == owner,
        expected=f"held_before_step({model}, the optimizer of it, …) once ({what})",
        got=held,
    )
    traced = calls("profile_to")
    path = f"/traces/rank{rank}.json"
    wanted = [{"path": path, "steps": "2"}] if profile else []
    require_equal(traced, wanted, of=f"the calls of profile_to, without the step ({what})")
    if profile:
        require_equal(calls("collectives"), [{"path": path}], of=f"the calls of collectives ({what})")
        require_equal(
            calls("communication_table"),
            [{"found": ["found"], "ranks": ranks, "steps": 2}],
            of=f"the calls of communication_table ({what})",
        )
    wanted = {
        "method": method,
        "not_run": "",
        "final_accuracy": 0.5,
        "final_top5": 0.75,
        "eval_loss": 0.25,
        "train_losses": [float(number) for number in range(2 * epochs)],
        "epoch_duration": [10.0 + number for number in range(epochs)],
        "throughput": 321.5,
        "held_bytes": dict(zip(HELD, (8, 4, 2, 0, 0, 16, 0, 0), strict=True)),
        "peak_memory_gb": 1.5,
        "communication": {"all-reduce": {"calls": 1.0}} if profile else None,
    }
    for key, value in wanted.items():
        require(result[key] == value, expected=f"{key}: {value!r} ({what})", got=repr(result[key]))


@pytest.mark.milestone(task="5.11", points=10, section="A fair comparison")
def test_runner(lab):
    check_run(lab, "ddp", "cpu", 1, 2)
    check_run(lab, "fsdp2", "cpu", 0, 3, epochs=1, accumulation=1, dtype="bfloat16", seed=4)
    check_run(lab, "single_gpu_simple", "cpu", 0, 1, profile=False)
    check_run(lab, "single_gpu_offload", "cpu", 0, 1, accumulation=2)
    check_run(lab, "zero3", "cpu", 1, 2, epochs=3)
    check_run(lab, "zeropp", "cuda:0", 0, 2, dtype="bfloat16")
    for method, device, ranks in (("zeropp", "cpu", 2), ("single_gpu_simple", "cpu", 2), ("single_gpu_offload", "cpu", 4)):
        got = lab.observe(f"{PROGRAMS}:orchestrate", method, device, 0, ranks)
        require(
            "refused" not in got,
            expected=f"no error for {method} on {ranks} ranks of {device}: a dictionary that says why it was not run",
            got=got.get("refused"),
        )
        require(
            not got["log"],
            expected=f"nothing called for {method} on {ranks} ranks of {device}",
            got=[name for name, _ in got["log"]],
        )
        result = got["result"]
        require(
            result.get("not_run"),
            expected=f"`not_run`, the reason of why_not, for {method} on {ranks} ranks of {device}",
            got=result,
        )
        rest = {key: None for key in KEYS} | {"method": method, "not_run": result["not_run"]}
        require_equal(result, rest, of=f"the result of {method}, which cannot run on {ranks} ranks of {device}")
    got = lab.observe(f"{PROGRAMS}:orchestrate", "ddp", "cpu", 0, 2, epochs=0)["result"]
    require_equal(
        [got["train_losses"], got["epoch_duration"], got["final_accuracy"], got["throughput"]],
        [[], [], 0.5, 321.5],
        of="losses, durations, accuracy and throughput of a run of no epoch, which evaluates the model as it is",
    )
    for method in ("zero4", "single_gpu_zero3"):
        got = lab.observe(f"{PROGRAMS}:orchestrate", method, "cpu", 0, 2)
        require(
            method in got.get("refused", ""),
            expected=f"ValueError for method {method!r} on 2 ranks, which names it",
            got=got.get("refused", f"no error: {got.get('result')}"),
        )
