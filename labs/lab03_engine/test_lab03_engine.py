"""Milestones of lab 03. The judges are plain PyTorch, the engine used without your code, and the checkpoint's own files."""

import json

import pytest

from shardlab.milestones import engine_runs
from shardlab.milestones.launches import once, shared_folder, visible_folder
from shardlab.milestones.messages import farthest, require, require_error
from shardlab.milestones.saved_weights import safely_loaded, saved_weights
from shardlab.milestones.small_runs import text_experiment, zero_config
from shardlab.run.experiment import Experiment, program_of

PROGRAMS = "labs/lab03_engine/programs.py"
STEPS = 6
DROPOUT = {1: 0.0, 2: 0.1, 3: 0.0}


def config(stage: int, *, ranks: int = 2, accumulation: int = 2, clipping: float = 0.5, universal: bool = False) -> dict:
    # With an epsilon this large, AdamW feels the scale of its gradients; with the usual 1e-8 it would not.
    adam = {"lr": 1e-2, "eps": 0.1, "weight_decay": 0.01}
    sizes = {"micro_batch": 2, "accumulation": accumulation, "ranks": ranks}
    return zero_config(stage, **sizes, clipping=clipping, adam=adam, checkpoint={"load_universal": universal})


def experiment(
    name: str, program: str, stage: int, *, ranks: int = 2, accumulation: int = 2, options=None, **changes
) -> Experiment:
    settings = {
        "program": program,
        "method": f"stage {stage}",
        "ranks": ranks,
        "deepspeed": config(stage, ranks=ranks, accumulation=accumulation),
        "model": engine_runs.odd_model(),
        "accumulation": accumulation,
        "steps": STEPS,
        "train_examples": 24,
        "options": options or {},
    }
    return text_experiment(name, **(settings | changes))


def never_stopped(run_experiments) -> dict:
    """Six steps of the engine without your code, stage 2 with dropout; checkpoints after steps 2 and 4."""
    folder = visible_folder() / "engine"
    folder.mkdir(exist_ok=True)
    experiments = []
    for stage in (1, 2, 3):
        name = f"stage{stage}"
        options = {"dropout": DROPOUT[stage], "save_at": [2, 4], "checkpoints": str(folder / name)}
        options |= {"weights_at": 2, "weights": str(shared_folder() / f"{name}.pt")}
        experiments.append(experiment(name, "shardlab.milestones.engine_runs:train", stage, options=options))
    return run_experiments(experiments, reference=True)


def checkpoints(name: str):
    return visible_folder() / "engine" / name


@pytest.mark.milestone(task="3.1", points=10, section="What initialize makes")
def test_engine_is_what_the_configuration_says(lab, run_experiments):
    with_optimizer, without = config(2), {key: value for key, value in config(2).items() if key != "optimizer"}
    for words, configuration, optimizer, name in (
        ("neither an optimizer nor one in the configuration", without, None, "optimizer"),
        ("two optimizers", with_optimizer, "another", "optimizer"),
        ("train_batch_size 'auto'", with_optimizer | {"train_batch_size": "auto"}, None, "train_batch_size"),
        ("'auto' accumulation", with_optimizer | {"gradient_accumulation_steps": "auto"}, None, "gradient_accumulation_steps"),
    ):
        require_error(
            lambda: lab.initialize_deepspeed(None, configuration, optimizer),
            ValueError,
            mentions=(name,),
            expected=f"ValueError for {words}, before the engine is made",
            likely="the check is missing, or comes after deepspeed.initialize",
        )
    runs = run_experiments(
        [
            experiment("initialize", f"{PROGRAMS}:initialize", 3, deepspeed=config(3)),
            experiment("own", f"{PROGRAMS}:initialize", 2, deepspeed=without, options={"own_optimizer": True, "no_data": True}),
        ]
    )
    own, got = runs["own"].results, runs["initialize"].results
    for result in (got, own):
        require(
            result["returned"] == "engine, optimizer, data loader, scheduler",
            expected="a tuple of four: engine, optimizer, data loader, scheduler",
            got=result["returned"],
            likely="only the engine returned",
        )
    require(
        (own["stage"], own["learning_rate"], own["seen"]) == (2, 0.125, [None, None]),
        expected="stage 2, the given optimizer with its learning rate 0.125, and no data loader where there is no data",
        got=f"stage {own['stage']}, learning rate {own['learning_rate']}, data loader: {own['seen'] != [None, None]}",
        likely="the optimizer is not passed on, or DeepSpeed's own takes its place",
    )
    require(
        own["stepped"] == own["parameters"],
        expected=f"an optimizer over all {own['parameters']:,} parameters, the tied embedding once",
        got=f"{own['stepped']:,}",
        likely="model_parameters left out, or a part of them",
    )
    require(
        (got["stage"], got["clipping"], got["learning_rate"]) == (3, 0.5, 1e-2),
        expected="stage 3, clipping 0.5, learning rate 0.01, as the configuration says",
        got=(got["stage"], got["clipping"], got["learning_rate"]),
        likely="the configuration is not passed on whole",
    )
    require(
        not got["config_changed"],
        expected="a configuration that is left as it was",
        got="it was changed",
        likely="keys added to the caller's dictionary; copy it first",
    )
    seen = got["seen"]
    rows = [sorted(number for batch in share or [] for number in batch) for share in seen]
    require(
        all(share is not None for share in seen) and sorted(rows[0] + rows[1]) == list(range(24)),
        expected="a data loader that gives each of 2 ranks its own 12 of the 24 rows",
        got=f"rank 0 sees {rows[0]}, rank 1 sees {rows[1]}",
        likely="a DataLoader without a sampler, so that both ranks see the same rows; use engine.deepspeed_io",
    )
    require(
        {len(batch) for batch in seen[0]} == {2},
        expected="batches of 2, the configuration's micro-batch",
        got={len(batch) for batch in seen[0]},
        likely="another batch size given to the loader",
    )
    require(
        got["workers"] == 0,
        expected="a loader without processes of its own",
        got=f"{got['workers']} a rank",
        likely="the loader that deepspeed.initialize makes of training_data, or engine.deepspeed_io without num_local_io_workers=0",
    )


@pytest.mark.milestone(task="3.2", points=15, section="A step")
def test_losses_are_those_of_plain_pytorch(lab, run_experiments):
    from shardlab.run.launch import RankError

    cases = {
        "zero0": {"stage": 0, "accumulation": 4, "clipping": 0.5},
        "zero1": {"stage": 1, "accumulation": 4, "clipping": 0.5},
        "zero2": {"stage": 2, "accumulation": 1, "clipping": 0.0},
        "zero3": {"stage": 3, "accumulation": 4, "clipping": 0.5},
    }
    experiments = {
        name: experiment(
            name,
            f"{PROGRAMS}:train_steps",
            case["stage"],
            accumulation=case["accumulation"],
            deepspeed=config(case["stage"], accumulation=case["accumulation"], clipping=case["clipping"]),
            steps=3,
        )
        for name, case in cases.items()
    }
    lab.DeepSpeedTrainer  # noqa: B018
    try:
        runs = run_experiments(list(experiments.values()))
    except RankError as error:
        require(
            ", in step\n" not in error.rank_traceback,
            expected="gradients to be there when engine.step() takes the optimizer step",
            got=f"rank {error.rank}, {error.experiment}: {error.error}",
            likely="an optimizer step besides engine.step(), or a zero_grad() in front of it, has used them up",
        )
        raise
    plain = {accumulation: None for accumulation in (4, 1)}
    for name, case in cases.items():
        accumulation, got = case["accumulation"], runs[name].results
        if plain[accumulation] is None:
            plain[accumulation] = engine_runs.plain_losses(experiments[name])
        wanted = plain[accumulation]
        require(
            got["kind"] == "float",
            expected="a float",
            got=got["kind"],
            likely="the loss tensor returned; it would keep its graph alive",
        )
        require(
            got["training"],
            expected="the model in training mode",
            got="evaluation mode",
            likely="engine.train() left out; after an evaluation dropout would stay off",
        )
        require(
            got["by_rank"][0] == got["by_rank"][1],
            expected="the same loss on both ranks: the mean over them",
            got=f"first micro-batch: {got['by_rank'][0][0]:.4f} on rank 0, {got['by_rank'][1][0]:.4f} on rank 1",
            likely="this rank's own loss returned",
        )
        require(
            got["micro_steps"] == 3 * accumulation and got["global_steps"] == 3,
            expected=f"{3 * accumulation} micro-batches and 3 optimizer steps, accumulation {accumulation}",
            got=f"{got['micro_steps']} and {got['global_steps']}",
            likely="engine.step() not called for every micro-batch; the engine finds the boundary itself",
        )
        first = abs(got["losses"][0] - wanted[0])
        require(
            first <= 1e-5,
            expected=f"the model's loss before the first step, {wanted[0]:.5f} (stage {case['stage']}, accumulation {accumulation})",
            got=f"{got['losses'][0]:.5f}",
            likely="the return value of engine.backward, which is divided by the accumulation, instead of the loss",
        )
        worst = farthest(got["losses"], wanted)
        require(
            worst <= 1e-5,
            expected=f"stage {case['stage']}, accumulation {accumulation}: plain PyTorch's losses to 1e-5, {[round(x, 5) for x in wanted]}",
            got=[round(x, 5) for x in got["losses"]],
            likely="the loss divided by the accumulation a second time, or an optimizer step besides engine.step()",
        )


@pytest.mark.milestone(task="3.3", points=15, section="An epoch")
def test_epoch_keeps_its_place(lab, run_experiments):
    from torch.utils.data import DistributedSampler

    lab.DeepSpeedTrainer  # noqa: B018
    run = run_experiments([experiment("epochs", f"{PROGRAMS}:train_epochs", 1, steps=12)])["epochs"]
    got = run.results

    def order(epoch: int, rank: int) -> list[int]:
        sampler = DistributedSampler(range(24), 2, rank)
        sampler.set_epoch(epoch)
        return list(sampler)

    def rows(call: dict, rank: int = 0) -> list[int]:
        return [number for batch in call["seen"][rank] for number in batch]

    first, second, cut, resumed = (got[name] for name in ("first", "second", "cut", "resumed"))
    for rank in (0, 1):
        require(
            rows(first, rank) == order(0, rank),
            expected=f"rank {rank} to see its 12 rows once, in the sampler's order for epoch 0",
            got=rows(first, rank),
            likely="the loader is not gone through from beginning to end",
        )
    require(
        (first["epoch"], first["samples"], second["epoch"], second["samples"]) == (1, 0, 2, 0),
        expected="epoch 1 and 2 after the first and second epoch, and samples 0",
        got=f"epoch {first['epoch']}, samples {first['samples']}; epoch {second['epoch']}, samples {second['samples']}",
        likely="epoch or samples not carried forward at the end",
    )
    require(
        rows(second) == order(1, 0),
        expected=f"another order in the second epoch: {order(1, 0)}",
        got=rows(second),
        likely="data_sampler.set_epoch not called; every epoch would have the same order",
    )
    wanted = [[(a + b) / 2, 8 * (k + 1), k + 1] for k, (a, b) in enumerate(zip(first["losses"][::2], first["losses"][1::2]))]
    same = len(first["told"]) == 3 and all(
        abs(a[0] - b[0]) < 1e-6 and a[1:] == b[1:] for a, b in zip(first["told"], wanted, strict=False)
    )
    require(
        same,
        expected=f"after_step called after each of 3 optimizer steps with the mean loss of its 2 micro-batches, samples at 8, 16, 24: {wanted}",
        got=f"(loss, samples, optimizer steps): {first['told']}",
        likely="called after each micro-batch, with the last micro-batch's loss, or before samples has grown",
    )
    mean = sum(first["losses"]) / len(first["losses"])
    require(
        first["returned"] is not None and abs(first["returned"] - mean) < 1e-6,
        expected=f"the mean loss of the epoch's micro-batches, {mean:.5f}",
        got=first["returned"],
        likely="the last loss, or the mean over optimizer steps of something else",
    )
    require(
        (cut["global_steps"], cut["epoch"], cut["samples"], len(cut["seen"][0])) == (7, 2, 8, 2),
        expected="with last_step 7: back after optimizer step 7, epoch 2, samples 8, 2 micro-batches",
        got=f"step {cut['global_steps']}, epoch {cut['epoch']}, samples {cut['samples']}, {len(cut['seen'][0])} micro-batches",
        likely="last_step ignored, or taken for the steps of this epoch instead of all",
    )
    require(
        rows(resumed) == order(1, 0)[8:],
        expected=f"with epoch 1 and samples 16 of 24: the 4 rows of rank 0 that are left, {order(1, 0)[8:]}",
        got=rows(resumed),
        likely="samples ignored or taken for batches; or iter() called twice, so that the loader started anew",
    )
    require(
        resumed["random_at_first"] == [got["random_wanted"]],
        expected="the restored random state at the first step after a checkpoint",
        got="another one",
        likely="restore_random_state not called, or before the batches were passed over, which draws random numbers",
    )
    left = got["nothing_left"]
    require(
        left["nan"] and not left["seen"][0] and (left["epoch"], left["samples"]) == (1, 0),
        expected="nan, and the next epoch, where all rows of an epoch had been seen",
        got=f"{left['returned']}, epoch {left['epoch']}, samples {left['samples']}",
        likely="a mean over no losses",
    )
    require(
        left["random_at_end"] == got["random_wanted"],
        expected="the restored random state on return, where a checkpoint was saved at the end of an epoch and no batch is left",
        got="another one; the next epoch would draw other numbers than in a run that was never stopped",
        likely="restore_random_state called in the loop only, which comes to no step then",
    )


@pytest.mark.milestone(task="3.4", points=10, section="Evaluation")
def test_evaluation_counts_tokens_and_changes_nothing(lab, run_experiments):
    masked_rows = program_of(f"{PROGRAMS}:masked_rows")

    lab.DeepSpeedTrainer  # noqa: B018
    plan = experiment("evaluate", f"{PROGRAMS}:evaluate", 3, options={"dropout": 0.3})
    got = run_experiments([plan])["evaluate"].results
    by_token, by_row = engine_runs.mean_losses(masked_rows(plan))
    mine, other = [losses[0] for losses in got["losses"]]
    require(
        abs(mine - other) < 1e-6,
        expected="the same loss on both ranks",
        got=f"{mine:.5f} on rank 0, {other:.5f} on rank 1",
        likely="this rank's own share only; all-reduce sum and count",
    )
    require(
        got["losses"][0][0] == got["losses"][0][1],
        expected="the same loss twice",
        got=got["losses"][0],
        likely="dropout is on: engine.eval() left out",
    )
    require(
        abs(mine - by_token) < 1e-4,
        expected=f"the mean over tokens, {by_token:.5f} (the mean over rows would be {by_row:.5f})",
        got=f"{mine:.5f}",
        likely="a mean of the batches' or of the ranks' means, or labels counted that nothing predicts (the first of each row)",
    )
    require(
        got["training"] and got["micro_steps"] == 0,
        expected="training mode afterwards, and no step taken",
        got=f"training mode: {got['training']}, micro-batches: {got['micro_steps']}",
        likely="engine.train() left out at the end; dropout would stay off in training",
    )


@pytest.mark.milestone(task="3.5", points=15, section="A checkpoint")
def test_checkpoint_is_complete(lab, run_experiments):

    fingerprint = program_of(f"{PROGRAMS}:fingerprint")
    from shardlab.run.launch import LaunchTimeout

    lab.DeepSpeedTrainer  # noqa: B018
    try:
        runs = run_experiments([experiment(f"save{stage}", f"{PROGRAMS}:save", stage) for stage in (2, 3)], timeout=45)
    except LaunchTimeout:
        require(
            False,
            expected="both ranks to come back",
            got="one waits for the other for ever",
            likely="engine.save_checkpoint, gather or barrier called on one rank only; all are collectives",
        )
    for stage, run in ((2, runs["save2"]), (3, runs["save3"])):
        got, parent = run.results, run.folder / "checkpoints"
        folder = parent / "step-1"
        require(
            folder.is_dir() and got["returned"] == str(folder),
            expected=f"the folder step-1 after one optimizer step, and its path returned (stage {stage})",
            got=f"returned {got['returned']!r}; in the folder: {sorted(path.name for path in parent.glob('*'))}",
            likely="another tag, or nothing returned",
        )
        require(
            all(got["refused"]),
            expected="ValueError between two micro-batches of one optimizer step",
            got="a checkpoint whose gradients are lost",
            likely="self.accumulating not looked at",
        )
        names = sorted(path.name for path in folder.rglob("*") if path.is_file())
        missing = [rank for rank in (0, 1) if not any(f"zero_pp_rank_{rank}_" in name and "optim" in name for name in names)]
        require(
            not missing,
            expected=f"optimizer shards of both ranks (stage {stage})",
            got=f"none of rank {missing}: {names}",
            likely="engine.save_checkpoint called on rank 0 only",
        )
        require(
            (folder / "complete.json").exists(),
            expected="complete.json in the folder",
            got=names,
            likely="write_manifest left out",
        )
        manifest = json.loads((folder / "complete.json").read_text())
        sizes = {
            str(path.relative_to(folder)): path.stat().st_size
            for path in folder.rglob("*")
            if path.is_file() and path.name != "complete.json"
        }
        require(
            manifest["ranks"] == 2 and manifest["files"] == sizes,
            expected=f"complete.json with 2 ranks and the {len(sizes)} files in their final sizes",
            got=f"{manifest['ranks']} ranks, {len(manifest['files'])} files",
            likely="written before all ranks had written theirs",
        )
        require(
            got["complete_at_first"] == [[False], [False]],
            expected="no complete.json while DeepSpeed saves, though the folder had one from an earlier life of the run",
            got="the old one: were the job killed now, half a checkpoint would be taken for whole",
            likely="it is not removed before engine.save_checkpoint, or a rank does not wait until it is (barrier)",
        )
        require(
            all(got["complete_on_return"]),
            expected="complete.json there when save_checkpoint returns, on every rank",
            got=got["complete_on_return"],
            likely="no barrier after write_manifest",
        )
        stage3 = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in (0, 1)]
        for name in stage3 if stage == 3 else ["mp_rank_00_model_states.pt"]:
            state = safely_loaded(folder / name)
            require(
                (state.get("epoch"), state.get("samples")) == (3, 8),
                expected="epoch 3 and samples 8 in DeepSpeed's client_state",
                got=(state.get("epoch"), state.get("samples")),
                likely="the position in the data is not saved; training would begin anew with the first row",
            )
            require(
                state.get("client") == {"note": [1, "two"], "rank": "any"},
                expected="the caller's client_state under 'client'",
                got=state.get("client"),
                likely="client_state dropped, or mixed with the trainer's own",
            )
            random = state.get("random")
            fingerprints = [fingerprint(s["torch"]) for s in random] if isinstance(random, list) else random
            require(
                fingerprints == got["random"],
                expected="the random states of both ranks, by rank, under 'random'",
                got="none"
                if random is None
                else f"{len(random) if isinstance(random, list) else 'not a list'}; not those of ranks 0 and 1",
                likely="only this rank's state; DeepSpeed keeps rank 0's client_state in stages 0 to 2, so gather first",
            )


@pytest.mark.milestone(task="3.6", points=10, section="A checkpoint")
def test_resumed_training_goes_on_as_if_never_stopped(lab, run_experiments):
    """Stages 1, 2 and 3, in new processes; and from the checkpoints of a run that lost a rank to SIGKILL."""
    import shutil

    from shardlab.run.launch import RankError

    lab.DeepSpeedTrainer  # noqa: B018
    runs = never_stopped(run_experiments)
    killed = checkpoints("killed")
    with once("killed") as first:
        if first:
            shutil.rmtree(killed, ignore_errors=True)
            plan = {"dropout": DROPOUT[2], "save_at": [2, 4], "checkpoints": str(killed), "kill_at": 6}
            with pytest.raises(RankError) as caught:
                run_experiments([experiment("killed", "shardlab.milestones.engine_runs:train", 2, options=plan)], reference=True)
            assert caught.value.rank == 1, "the run must say which rank was killed"
            # A save that did not come to its end, newer than the whole ones.
            shutil.copytree(killed / "step-4", killed / "step-5")
            (killed / "step-5" / "complete.json").unlink()
    plans, wanted = [], {}
    for stage, source, tag, at in ((1, "stage1", "step-2", 2), (2, "killed", None, 4), (3, "stage3", "step-4", 4)):
        options = {
            "dropout": DROPOUT[stage],
            "checkpoints": str(checkpoints(source)),
            "tag": tag,
            "broken": "step-5" if tag is None else "step-9",
        }
        plans.append(experiment(f"resumed-{source}", f"{PROGRAMS}:load", stage, options=options))
        wanted[f"resumed-{source}"] = (at, runs[f"stage{stage}"].losses()[at:], source)
    for name, run in run_experiments(plans).items():
        at, losses, source = wanted[name]
        got = run.results
        require(
            got["refused"] and got["untouched"],
            expected="the error of check_checkpoint for a broken checkpoint, before the engine loads anything",
            got=got["refused"] or "no error",
            likely="check_checkpoint not called, or called too late",
        )
        require(
            got["position"]["global_steps"] == at,
            expected=f"the engine at optimizer step {at}",
            got=got["position"],
            likely="the tag is ignored, or the newest folder taken although it is not whole",
        )
        position = {2: {"epoch": 0, "samples": 16}, 4: {"epoch": 1, "samples": 8}}[at] | {"global_steps": at}
        require(
            got["position"] == position,
            expected=f"{position}",
            got=got["position"],
            likely="epoch or samples not taken out of the checkpoint",
        )
        client = repr({"name": source})
        require(
            got["client"] == client,
            expected=f"the caller's client_state back: {client}",
            got=got["client"][:200],
            likely="the whole state returned, or nothing",
        )
        require(
            got["restored"],
            expected="a random_state_to_restore",
            got="None",
            likely="random_state_to_restore is not set; state['random'] has one for each rank",
        )
        worst = farthest(run.losses(), losses)
        require(
            worst <= 1e-5,
            expected=f"the losses of the run that never stopped, {[round(x, 5) for x in losses]} ({name})",
            got=[round(x, 5) for x in run.losses()],
            likely="the random state of another rank, so that dropout differs; or optimizer states not loaded",
        )


@pytest.mark.milestone(task="3.7", points=10, section="A checkpoint")
def test_broken_checkpoints_are_refused(lab, tmp_path):
    whole = tmp_path / "step-4"
    (whole / "zero").mkdir(parents=True)
    contents = {"mp_rank_00_model_states.pt": b"m" * 100, "zero/fp32.pt": b"z" * 50}
    for name, content in contents.items():
        (whole / name).write_bytes(content)
    manifest = {"ranks": 2, "universal": False, "files": {name: len(content) for name, content in contents.items()}}
    (whole / "complete.json").write_text(json.dumps(manifest))
    require(
        lab.check_checkpoint(whole, 2) == manifest,
        expected="no error for a whole checkpoint of 2 ranks, and what complete.json says",
        got=lab.check_checkpoint(whole, 2),
        likely="something else returned",
    )

    def refused(name: str, change, ranks: int, mentions: tuple, expected: str, likely: str) -> None:
        import shutil

        folder = tmp_path / name
        shutil.copytree(whole, folder)
        change(folder)
        require_error(lambda: lab.check_checkpoint(folder, ranks), ValueError, mentions=mentions, expected=expected, likely=likely)

    require_error(
        lambda: lab.check_checkpoint(tmp_path / "step-9", 2),
        ValueError,
        mentions=("step-9",),
        expected="ValueError that names the folder, where there is none",
        likely="FileNotFoundError from reading complete.json",
    )
    refused(
        "half",
        lambda folder: (folder / "complete.json").unlink(),
        2,
        ("half",),
        "ValueError that names the folder, without complete.json",
        "the folder is taken for whole because it is there",
    )
    refused(
        "missing",
        lambda folder: (folder / "zero" / "fp32.pt").unlink(),
        2,
        ("fp32.pt",),
        "ValueError that names the missing file",
        "the files in complete.json are not looked for",
    )
    refused(
        "truncated",
        lambda folder: (folder / "zero" / "fp32.pt").write_bytes(b"z" * 20),
        2,
        ("fp32.pt",),
        "ValueError that names the truncated file",
        "existence is checked, the size is not",
    )
    refused(
        "longer",
        lambda folder: (folder / "zero" / "fp32.pt").write_bytes(b"z" * 70),
        2,
        ("fp32.pt",),
        "ValueError that names a file of another size, longer too",
        "only shorter files are refused",
    )
    refused(
        "ranks",
        lambda folder: None,
        3,
        ("2", "3"),
        "ValueError that names 2 ranks and 3",
        "the number of ranks is not compared",
    )
    (whole / "complete.json").write_text(json.dumps(manifest | {"universal": True}))
    try:
        lab.check_checkpoint(whole, 3)
    except ValueError as error:
        require(
            False,
            expected="a universal checkpoint accepted for any number of ranks",
            got=f"ValueError: {error}",
            likely="universal is not looked at",
        )


@pytest.mark.milestone(task="3.8", points=10, section="One model again")
def test_consolidated_model_is_the_engines(lab, run_experiments, tmp_path):
    import math

    import torch

    lab.consolidate  # noqa: B018
    never_stopped(run_experiments)
    for stage in (2, 3):
        out = tmp_path / f"model{stage}"
        returned = lab.consolidate(checkpoints(f"stage{stage}") / "step-2", engine_runs.odd_model(), out)
        weights = torch.load(shared_folder() / f"stage{stage}.pt", weights_only=True, map_location="cpu")
        found = saved_weights(out, engine_runs.odd_model())
        worst = max((found[name] - weights[name]).abs().max().item() if name in found else math.inf for name in weights)
        require(
            worst == 0,
            expected=f"the engine's own weights after step 2, bit for bit (ZeRO-{stage}, 2 ranks)",
            got=f"weights that differ by up to {worst:.3g}",
            likely="the tag left out, so that the newest checkpoint is read; or the weights never loaded into the model",
        )
        require(
            returned is not None and torch.equal(returned.lm_head.weight.cpu(), weights["transformer.word_embeddings.weight"]),
            expected="the model returned",
            got=type(returned).__name__,
            likely="nothing returned",
        )


@pytest.mark.milestone(task="3.9", points=5, section="Another number of ranks")
def test_universal_checkpoint_fits_any_number_of_ranks(lab, run_experiments, workspace):
    """Trained on 2 ranks, continued on 1, and back on 2: the losses of a run that had 2 all along."""
    import shutil

    lab.convert_to_universal  # noqa: B018
    whole = never_stopped(run_experiments)

    def convert(source, name: str):
        parent = workspace / "engine" / name
        shutil.rmtree(parent, ignore_errors=True)
        out = lab.convert_to_universal(source, parent)
        require(
            out == parent / source.name and (out / "complete.json").exists(),
            expected=f"the folder {source.name} in the given path, with a complete.json, and its path returned",
            got=f"returned {out}; {sorted(path.name for path in parent.rglob('complete.json'))}",
            likely="write_manifest left out, or another folder",
        )
        manifest = json.loads((out / "complete.json").read_text())
        ranks = json.loads((source / "complete.json").read_text())["ranks"]
        require(
            (manifest["universal"], manifest["ranks"]) == (True, ranks) and (out / "zero").is_dir(),
            expected=f"universal, saved by {ranks} ranks, and a folder 'zero' with the merged states",
            got=f"universal {manifest['universal']}, {manifest['ranks']} ranks, {sorted(path.name for path in out.iterdir())}",
            likely="universal=True left out, or the checkpoint only copied",
        )
        return out

    def continued(name: str, stage: int, ranks: int, folder, step: int):
        accumulation = 4 // ranks
        plan = experiment(
            name,
            f"{PROGRAMS}:continue_universal",
            stage,
            ranks=ranks,
            accumulation=accumulation,
            deepspeed=config(stage, ranks=ranks, accumulation=accumulation, universal=True),
            steps=step,
            options={"load": str(folder), "save_at": [step]},
        )
        return run_experiments([plan])[name]

    for stage in (1, 3):
        wanted = whole[f"stage{stage}"].losses()
        folder = convert(checkpoints(f"stage{stage}") / "step-4", f"universal{stage}")
        single = continued(f"single{stage}", stage, 1, folder, 5)
        require(
            abs(single.losses()[0] - wanted[4]) <= 1e-5,
            expected=f"step 5 on one rank as on two: {wanted[4]:.5f} (stage {stage})",
            got=f"{single.losses()[0]:.5f}",
            likely="states lost in the conversion",
        )
        if stage == 1:
            back = continued("back", stage, 2, convert(single.folder / "checkpoints" / "step-5", "back"), 6)
            require(
                abs(back.losses()[0] - wanted[5]) <= 1e-5,
                expected=f"step 6 back on two ranks: {wanted[5]:.5f}",
                got=f"{back.losses()[0]:.5f}",
                likely="states lost in the conversion",
            )
