"""The exercises of lab 07 as a program: cross-validation of a multi-label classifier, from a YAML file.

    python labs/lab07_custom_trainer/train.py labs/lab07_custom_trainer/configs/base.yaml
    torchrun --nproc-per-node 2 labs/lab07_custom_trainer/train.py labs/lab07_custom_trainer/configs/base.yaml
    deepspeed --num_gpus 2 labs/lab07_custom_trainer/train.py labs/lab07_custom_trainer/configs/zero2.yaml
    python labs/lab07_custom_trainer/train.py labs/lab07_custom_trainer/configs/base.yaml --validate

For each fold a model is trained on the other folds, and asked about this one. From these answers, of models that have not seen the
row, come the thresholds; the test rows are asked last. `runs/<name>/tensorboard` has the curves, a folder per fold.

The exercises are those in `src/exercises`. In the course itself, not in a release, SHARDLAB_EXERCISES=solutions in front of the
command takes the reference solutions.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from functools import partial
from pathlib import Path

import torch
from transformers import PrinterCallback, TrainerCallback

from shardlab import hardware, switch
from shardlab.data.comments import LABELS, UNKNOWN, comments, read_csv
from shardlab.data.models import load_classifier, load_tokenizer
from shardlab.errors import CourseError
from shardlab.run.collectives import rank, world_size
from shardlab.run.experiment import Experiment
from shardlab.run.multilabel import Collator, Encoded, TrainingConfig
from shardlab.run.ranks import leave_process_group, run_under_launcher
from shardlab.run.run_folder import Run

RUNS = Path(os.environ.get("SHARDLAB_RUNS") or hardware.ROOT / "runs")


class Patience(TrainerCallback):
    """Ends a training after so many evaluations in a row without a smaller loss."""

    def __init__(self, evaluations: int):
        self.evaluations, self.best, self.since = evaluations, float("inf"), 0

    def on_evaluate(self, args, state, control, metrics=None, **others):
        self.best, self.since = (metrics["eval_loss"], 0) if metrics["eval_loss"] < self.best else (self.best, self.since + 1)
        control.should_training_stop = self.since >= self.evaluations


class Steps(TrainerCallback):
    """Writes each optimizer step into the run folder, counted through the folds: for whoever watches the run.

    Args:
        before: steps of the folds before this one.
        folds: how many are left, with this one.
    """

    def __init__(self, run: Run, before: int, folds: int):
        self.run, self.before, self.folds, self.since = run, before, folds, time.perf_counter()

    def on_log(self, args, state, control, logs=None, **others):
        if "loss" not in logs:
            return
        seconds, self.since = time.perf_counter() - self.since, time.perf_counter()
        samples = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        if state.is_world_process_zero:
            self.run.log_step(
                step=self.before + state.global_step,
                steps=self.before + self.folds * state.max_steps,
                loss=logs["loss"],
                learning_rate=logs["learning_rate"],
                seconds=round(seconds, 4),
                samples_per_second=round(samples / seconds, 3),
            )

    def on_evaluate(self, args, state, control, **others):
        self.since = time.perf_counter()


def rows_of(config: TrainingConfig) -> tuple[list[dict], list[dict], list[str]]:
    """Rows for the folds, test rows, and the labels' names. Of a CSV file every fifth row is a test row."""
    if config.data == "generated":
        return comments("train"), comments("test"), list(LABELS)
    rows, names = read_csv(config.data)
    return [row for n, row in enumerate(rows) if n % 5], rows[::5], names


def loss_of(lab, options: dict, labels: torch.Tensor) -> torch.nn.Module:
    """`options["loss"]`: bce, asymmetric or focal. With class weights, a label counts the more the rarer it is, 3 times at most."""
    weights = None
    if options.get("class_weights"):
        share = (labels == 1).sum(0) / (labels != UNKNOWN).sum(0).clamp(min=1)
        weights = (share.mean() / share.clamp(min=1e-6)).sqrt().clamp(max=3.0)
    name = options.get("loss", "bce")
    if name == "asymmetric":
        return lab.AsymmetricLoss(class_weights=weights)
    return lab.FocalLoss(gamma=0.0 if name == "bce" else 2.0, class_weights=weights)


def probabilities(trainer, rows: Encoded) -> torch.Tensor:
    return torch.sigmoid(torch.from_numpy(trainer.predict(rows).predictions).float())


def program(experiment: Experiment, run: Run) -> dict:
    """What every rank runs. `options`: `config`, the YAML file's content; `loss`, `fgm`, `augment`, `class_weights`, `samples` (of
    dropout) and `lora`, a rank; `folds`, to train only so many of them.

    Returns:
        Metrics on the test rows at 0.5 and at tuned thresholds, the thresholds, samples per second and peak memory.
    """
    lab, options = switch.import_exercise("lab07_custom_trainer"), experiment.options
    config = TrainingConfig(**options["config"])
    params = config.train_params
    rows, test_rows, names = rows_of(config)
    if len(names) != config.num_labels:
        raise ValueError(f"num_labels is {config.num_labels}, and the data has {len(names)} labels")
    tokenizer = load_tokenizer(config.model_name)
    augmented = None
    if options.get("augment"):
        augmented = partial(
            lab.augment,
            share=options["augment"],
            mask_id=tokenizer.mask_token_id,
            special_ids=set(tokenizer.all_special_ids),
            seed=params.seed,
        )
    labels = torch.tensor([row["labels"] for row in rows])
    found, on_test, seconds, losses = torch.zeros(labels.shape), [], 0.0, []
    # Where nothing is trained, the order is free: rows of about the same length in a batch have less to fill up.
    test_rows.sort(key=lambda row: len(row["text"]))
    test_set = Encoded(test_rows, tokenizer, config.max_len)
    folds, steps = lab.stratified_folds(labels, params.folds, params.seed)[: options.get("folds")], 0
    for number, (training, validation) in enumerate(folds):
        validation = sorted(validation, key=lambda n: len(rows[n]["text"]))
        arguments = lab.trainer_arguments(
            config,
            run.folder / "trainer",
            eval_strategy="epoch",
            per_device_eval_batch_size=64,
            disable_tqdm=True,
            ddp_find_unused_parameters=False,
            report_to=["tensorboard"] if rank() == 0 else "none",
        )
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.folder / "tensorboard" / f"fold-{number}")
        model = load_classifier(config.model_name, config.num_labels, seed=params.seed)
        if options.get("samples"):
            model.classifier = lab.MultiSampleDropoutHead(model.config.hidden_size, config.num_labels, options["samples"])
        if options.get("lora"):
            model = lab.add_lora(model, options["lora"])
        trainer = lab.CustomTrainer(
            model=model,
            args=arguments,
            train_dataset=Encoded([rows[n] for n in training], tokenizer, config.max_len, augmented),
            eval_dataset=Encoded([rows[n] for n in validation], tokenizer, config.max_len),
            data_collator=Collator(tokenizer.pad_token_id),
            callbacks=[Patience(params.patience), Steps(run, steps, len(folds) - number)],
            loss=loss_of(lab, options, labels[training]),
            fgm_epsilon=options.get("fgm", 0.0),
        )
        trainer.remove_callback(PrinterCallback)
        started = time.perf_counter()
        trainer.train()
        seconds += time.perf_counter() - started
        steps += trainer.state.global_step
        found[validation] = probabilities(trainer, trainer.eval_dataset)
        on_test.append(probabilities(trainer, test_set))
        losses.append([round(entry["eval_loss"], 4) for entry in trainer.state.log_history if "eval_loss" in entry])
    done = (found > 0).any(1)
    thresholds = lab.best_thresholds(found[done], labels[done])
    answers, truth = torch.stack(on_test).mean(0), torch.tensor([row["labels"] for row in test_rows])
    results = {
        "out_of_fold": lab.multilabel_metrics(found[done], labels[done], names),
        "at_half": lab.multilabel_metrics(answers, truth, names),
        "tuned": lab.multilabel_metrics(answers, truth, names, thresholds),
        "thresholds": dict(zip(names, [round(t, 2) for t in thresholds.tolist()])),
        "eval_losses": losses,
        "samples_per_second": round(steps * params.batch_size * params.grad_accum * world_size() / seconds, 1),
        "train_seconds": round(seconds, 1),
    }
    if torch.cuda.is_available():
        results["peak_bytes"] = torch.cuda.max_memory_allocated()
    return results


def table_of(runs: list[Run]):
    """Runs side by side, as a `rich` table: macro and micro F1 on the test rows, at 0.5 and at tuned thresholds."""
    from rich.table import Table

    table = Table(title="Test rows")
    for name in ("run", "macro F1 at 0.5", "macro F1, tuned", "micro F1, tuned", "ROC-AUC", "samples/s"):
        table.add_column(name, justify="left" if name == "run" else "right", no_wrap=name == "run")
    for run in runs:
        half, tuned = run.results["at_half"], run.results["tuned"]
        numbers = (half["macro_f1"], tuned["macro_f1"], tuned["micro_f1"], tuned["roc_auc"])
        table.add_row(run.name, *(f"{number:.3f}" for number in numbers), f"{run.results['samples_per_second']:.0f}")
    return table


def experiment_of(config: TrainingConfig, name: str, ranks: int, **options) -> Experiment:
    """The run of a configuration. The run folder notes what the DeepSpeed file says."""
    params = config.train_params
    return Experiment(
        name=name,
        program="labs/lab07_custom_trainer/train.py:program",
        method=name,
        model=config.model_name,
        data=config.data,
        deepspeed=None if config.deepspeed is None else json.loads(Path(config.deepspeed).read_text()),
        ranks=ranks,
        micro_batch=params.batch_size,
        accumulation=params.grad_accum,
        epochs=params.epochs,
        learning_rate=params.lr,
        seed=params.seed,
        options=options | {"config": config.model_dump()},
    )


def parse_arguments(arguments: list[str], advanced: dict) -> argparse.Namespace:
    """The command line. The `deepspeed` launcher puts `--local_rank=N` in front of a script's arguments; `torchrun` does not."""
    parser = argparse.ArgumentParser(description="Cross-validate a multi-label classifier; see the text at the top of this file.")
    parser.add_argument("config", type=Path, help="a YAML file, such as those in labs/lab07_custom_trainer/configs")
    parser.add_argument("--validate", action="store_true", help="only look whether everything is there; the status is 1 if not")
    parser.add_argument("--folds", type=int, help="train only the first so many folds")
    for name, value in advanced.items():
        kind = {"type": type(value)} if not isinstance(value, bool) else {"type": lambda text: text == "yes", "metavar": "yes|no"}
        parser.add_argument(f"--{name.replace('_', '-')}", default=value, help=f"default: {value}", **kind)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    return parser.parse_args(arguments)


def main(arguments: list[str], advanced: dict | None = None) -> int:
    """Run the program; `advanced` has the options of `program` that the command line offers, and their defaults."""
    chosen = parse_arguments(arguments, advanced or {})
    lab = switch.import_exercise("lab07_custom_trainer")
    if chosen.validate:
        found = lab.validate_setup(chosen.config)
        for name, reason in found:
            print(f"{name:<15}{reason or 'works'}")
        return int(any(reason not in ("", "not used") for _, reason in found))
    try:
        config = lab.load_training_config(chosen.config)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    if (
        config.deepspeed and "RANK" not in os.environ
    ):  # with plain `python`, DeepSpeed wants to know where its one rank meets itself
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone | {"MASTER_PORT": port})
    options = {name: getattr(chosen, name) for name in advanced or {}}
    options |= {"folds": chosen.folds} if chosen.folds else {}
    name = chosen.config.stem + ("-advanced" if advanced else "")
    try:
        run = run_under_launcher(experiment_of(config, name, int(os.environ.get("WORLD_SIZE", "1")), **options), RUNS)
    except (CourseError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    if rank() == 0:
        from rich import print as show

        show(table_of([run]))
    leave_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
