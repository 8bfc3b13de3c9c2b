"""Lab 07, custom Trainer: a hand-written loop becomes a `Trainer` of your own, and nothing changes that was not meant to.

You complete 11 tasks. `labs/lab07_custom_trainer/train.py` and `train_advanced.py` put them together. The loop that all this
begins with, its settings and its data are in `src/shardlab/run/multilabel.py`. A function works on the device of what it is given.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import math
from pathlib import Path

import torch
import yaml
from pydantic import ValidationError
from torch import nn
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from shardlab.data.comments import UNKNOWN
from shardlab.run.multilabel import EpochOrder, TrainingConfig
from shardlab.zero.config_verdict import deepspeed_refuses

# --- Task 7.1 -------------------------------------------------------------------------------------------------------


class AsymmetricLoss(nn.Module):
    """Binary cross-entropy that lets easy negatives count less, for labels that are mostly 0.

    With p = σ(logit), the loss of one entry is −(1−p)^γ₊ · log p where the label is 1, and −q^γ₋ · log(1−q) where it
    is 0, with q = max(p − clip, 0): without label smoothing a negative below `clip` costs nothing at all. With both
    gammas 0 and `clip` 0 it is binary cross-entropy. (1−q with a clip is min(1−p+clip, 1), which is never near 0.)

    With label smoothing s, t = y·(1−s) + s/2 stands for the label y, and the loss is the first term times t plus the second
    times 1−t.

    Args:
        gamma_positive, gamma_negative: 0, or at least 1: between them the gradient is infinite where p is 0 or 1.
        clip: from 0 to less than 1.
        class_weights: a factor per label, of all its entries; [labels]. `Trainer` moves no loss, so they may lie on another device
            than the logits.
        label_smoothing: from 0 to less than 1.

    Raises:
        ValueError: a number outside of these; the sentence names the argument and its value.

    Source: Ben-Baruch et al., "Asymmetric Loss For Multi-Label Classification", https://arxiv.org/abs/2009.14119, section 2.
    """

    def __init__(
        self,
        gamma_positive: float = 1.0,
        gamma_negative: float = 4.0,
        clip: float = 0.05,
        class_weights: torch.Tensor | None = None,
        label_smoothing: float = 0.0,
    ):
        raise NotImplementedError("Task 7.1: complete AsymmetricLoss.__init__() in src/exercises/lab07_custom_trainer.py")

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of each entry, [rows, labels]; nothing is summed up yet.

        Args:
            logits: [rows, labels], in any floating type. In a half type, the loss is computed in float32.
            labels: [rows, labels], floats or integers: 0 or 1, and `UNKNOWN` (−100) where nobody has said which: there the loss
                is 0, and its gradient too.

        Returns:
            Losses in float32, or float64 for logits in float64. For logits from −10⁶ to 10⁶ they are finite, and so are the
            gradients.
        """
        raise NotImplementedError("Task 7.1: complete AsymmetricLoss.forward() in src/exercises/lab07_custom_trainer.py")


class FocalLoss(AsymmetricLoss):
    """Binary cross-entropy that lets easy entries count less, of either label: the asymmetric loss with one gamma, and no clip.

    A gamma that is refused may be called `gamma_positive` in the sentence, as in `AsymmetricLoss`.

    Source: Lin et al., "Focal Loss for Dense Object Detection", https://arxiv.org/abs/1708.02002, equation 4.
    """

    def __init__(self, gamma: float = 2.0, class_weights: torch.Tensor | None = None, label_smoothing: float = 0.0):
        raise NotImplementedError("Task 7.1: complete FocalLoss.__init__() in src/exercises/lab07_custom_trainer.py")


# --- Task 7.2 -------------------------------------------------------------------------------------------------------


def trainer_arguments(config: TrainingConfig, output_dir: str | Path, **overrides) -> TrainingArguments:
    """Settings with which `Trainer` does what the loop, `train_by_hand`, does, and DeepSpeed where the configuration names a file.

    Alike are: micro-batch, accumulation and epochs; AdamW with its learning rate, decay and torch's betas; a rate that
    falls in a straight line to 0, without warm-up; the clipping; the seed. What the loop does not do is off: saving,
    evaluation, reports to other programs. A loss is logged at each step. `Trainer` keeps all columns of the rows, whatever
    the model's `forward` takes. Without a GPU it runs on the CPU.

    Args:
        output_dir: where `Trainer` may write.
        overrides: arguments of `TrainingArguments`; they win.
    """
    raise NotImplementedError("Task 7.2: complete trainer_arguments() in src/exercises/lab07_custom_trainer.py")


# --- Tasks 7.3 and 7.4 ----------------------------------------------------------------------------------------------


class CustomTrainer(Trainer):
    """`Trainer` with a loss of one's own, and adversarial training where `fgm_epsilon` is not 0.

    Args:
        loss: gives the loss of each entry, as `AsymmetricLoss` does.
        fgm_epsilon: how far `FGM` moves the word embeddings.
        all others: as `Trainer` has them.
    """

    def __init__(self, *args, loss: nn.Module, fgm_epsilon: float = 0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss, self.fgm_epsilon = loss, fgm_epsilon
        # With these, transformers 5 counts the labels of a step on all ranks, hands the number to `compute_loss`, and leaves
        # the loss as it is. By itself it asks the model's `forward` whether it takes more arguments than it names; if not, there
        # is no number, and each micro-batch's mean is divided by the accumulation: a mean of means.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True

    def _get_train_sampler(self, train_dataset=None) -> EpochOrder:
        """The loop's order; `set_epoch` is called by accelerate, which deals the micro-batches to the ranks in turn."""
        data = self.train_dataset if train_dataset is None else train_dataset
        return EpochOrder(len(data), self.args.seed, self.args.per_device_train_batch_size * self.args.world_size, data)

    def compute_loss(self, model, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        """The loss of a micro-batch, so that the micro-batches and ranks of a step add up to the mean over the step's labels.

        An optimizer step adds up the gradients of a rank's micro-batches, and takes the mean over the ranks. So a micro-batch's
        loss is the sum over its own entries, divided by the number of labels of the whole step, times the number of ranks
        (`self.args.world_size`).

        Args:
            model: gives an output with `logits`, [rows, labels].
            inputs: a batch, with `labels`. The model gets all of it but the labels, and the batch stays as it is.
            num_items_in_batch: how many labels of the whole step, over all micro-batches and ranks, are not `UNKNOWN`: a tensor on
                the device. In an evaluation `Trainer` gives it too, of the batch on all ranks, and the same rule holds. It is None
                where somebody calls this without it: then the loss is the mean over this batch, without the ranks.

        Returns:
            The loss; with `return_outputs`, the loss and the model's output. 0 where no label is known, else nan where a logit is.
        """
        raise NotImplementedError("Task 7.3: complete CustomTrainer.compute_loss() in src/exercises/lab07_custom_trainer.py")

    def training_step(self, model, inputs: dict, num_items_in_batch=None) -> torch.Tensor:
        """The gradients of a micro-batch are added up; the loss, detached."""
        step = self.adversarial_step if self.fgm_epsilon else super().training_step
        return step(model, inputs, num_items_in_batch)

    def adversarial_step(self, model, inputs: dict, num_items_in_batch=None) -> torch.Tensor:
        """The gradients of a micro-batch, and to them those of the same batch with moved embeddings.

        `super().training_step(…)` computes the loss and adds its gradients up. In a step's last micro-batch it would ask the
        other ranks for theirs, and DeepSpeed would take its optimizer step at once. So the first pass goes into
        `no_step(self, model)`. In the second, DeepSpeed's step is due right after the backward pass, and it must find the
        embeddings in their place: `before_step(self, fgm.restore)`.

        `FGM` gets the model itself, `self.accelerator.unwrap_model(model)`, and the gradient of this micro-batch alone. That is
        not `weight.grad`: there the earlier micro-batches' gradients lie too, and under ZeRO-2 nothing. After
        `weight.register_hook(function)` each backward pass calls `function` once with the gradient, when it has been computed and
        before anybody adds it up or sends it. What it returns, if not None, takes the gradient's place. Remove the hook when the
        first pass is over. The second pass is made even where `FGM` has moved nothing: all ranks must make the same passes.

        Returns:
            The loss of the batch as it is, detached.
        """
        raise NotImplementedError("Task 7.4: complete CustomTrainer.adversarial_step() in src/exercises/lab07_custom_trainer.py")


class FGM:
    """The fast gradient method: the word embeddings, and nothing else, moved by ε·g/‖g‖, and put back.

    Args:
        model: with `get_input_embeddings()`.
        epsilon: ε, the length of the move.

    Raises:
        ValueError: the embeddings are sharded by ZeRO-3 (their parameter has a `ds_id`), so no rank can move them; the sentence
            names ZeRO-3. Or they are frozen, as LoRA freezes them, and have no gradient; the sentence says frozen.

    Source: Miyato et al., "Adversarial Training Methods for Semi-Supervised Text Classification",
        https://arxiv.org/abs/1605.07725, equation 5, for the whole matrix at once.
    """

    def __init__(self, model: nn.Module, epsilon: float):
        raise NotImplementedError("Task 7.4: complete FGM.__init__() in src/exercises/lab07_custom_trainer.py")

    def attack(self, gradient: torch.Tensor) -> None:
        """Move the embeddings along their gradient. Where its norm, in float32, is 0 or not finite, they stay."""
        raise NotImplementedError("Task 7.4: complete FGM.attack() in src/exercises/lab07_custom_trainer.py")

    def restore(self) -> None:
        """Put back the very values of before `attack`. A second call changes nothing: a step may lie between the two."""
        raise NotImplementedError("Task 7.4: complete FGM.restore() in src/exercises/lab07_custom_trainer.py")


@contextlib.contextmanager
def no_step(trainer: Trainer, model: nn.Module):
    """Backward passes in here only add gradients up: no rank waits for another's, and DeepSpeed takes no step."""
    from accelerate import DistributedType

    state = trainer.accelerator.gradient_state
    due = state.sync_gradients
    state._set_sync_gradients(False)
    on_deepspeed = trainer.accelerator.distributed_type == DistributedType.DEEPSPEED
    try:
        with contextlib.nullcontext() if on_deepspeed else trainer.accelerator.no_sync(model):
            yield
    finally:
        state._set_sync_gradients(due)


@contextlib.contextmanager
def before_step(trainer: Trainer, function):
    """Call `function` after the backward pass in here, and before DeepSpeed's step, which accelerate takes within it."""
    engine = getattr(getattr(trainer.accelerator, "deepspeed_engine_wrapped", None), "engine", None)
    if engine is not None:
        step = engine.step

        def step_after(*args, **kwargs):
            function()
            return step(*args, **kwargs)

        engine.step = step_after
    try:
        yield
    finally:
        if engine is not None:
            del engine.step
        function()


# --- Task 7.5 -------------------------------------------------------------------------------------------------------


class MultiSampleDropoutHead(nn.Module):
    """A linear layer on the first token's vector, in training the mean over several dropout masks.

    Args:
        hidden_size: of the encoder's vectors.
        num_labels: logits per row.
        samples: masks; each is drawn anew in each forward pass.
        dropout: the probability that an entry is dropped.

    Source: Inoue, "Multi-Sample Dropout for Accelerated Training and Better Generalization", https://arxiv.org/abs/1905.09788.
    """

    def __init__(self, hidden_size: int, num_labels: int, samples: int = 5, dropout: float = 0.3):
        raise NotImplementedError("Task 7.5: complete MultiSampleDropoutHead.__init__() in src/exercises/lab07_custom_trainer.py")

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits [rows, labels] of the encoder's vectors [rows, tokens, hidden_size]. In evaluation nothing is dropped."""
        raise NotImplementedError("Task 7.5: complete MultiSampleDropoutHead.forward() in src/exercises/lab07_custom_trainer.py")


def augment(
    input_ids: list[int], *, share: float, mask_id: int, special_ids: set[int], seed: int, epoch: int, row: int
) -> list[int]:
    """Token ids with some of them masked: each that is not special becomes `mask_id` with the probability `share`.

    Which places depends on seed, epoch and row alone (so there is a draw for each place, special or not): the same on any rank and
    any number of ranks, others in the next epoch, others in the next row. Nothing is drawn from the generators that others draw
    from: torch's, numpy's and Python's global ones; a `random.Random` or `torch.Generator` of its own is free.
    `input_ids` stays as it is.

    Returns:
        A new list of the same length.
    """
    raise NotImplementedError("Task 7.5: complete augment() in src/exercises/lab07_custom_trainer.py")


# --- Task 7.6 -------------------------------------------------------------------------------------------------------


def lora_parameters(model: nn.Module, rank: int, targets: tuple[str, ...]) -> int:
    """How many parameters LoRA will train: its two matrices beside each target, and the whole head, `model.classifier`.

    A target is a linear layer outside of the head whose own name (after the last dot) is in `targets`; one that names none adds
    nothing. Beside a weight [out, in] stand A [rank, in] and B [out, rank].
    """
    raise NotImplementedError("Task 7.6: complete lora_parameters() in src/exercises/lab07_custom_trainer.py")


def add_lora(model: nn.Module, rank: int, targets: tuple[str, ...] = ("query", "value"), alpha: float = 16.0):
    """The model with LoRA beside its targets, through peft: `get_peft_model(model, LoraConfig(…))`.

    The head, `model.classifier`, is trained whole (`modules_to_save`), and has no LoRA, whatever its layers are called: peft leaves
    what is trained whole out of the targets. All else is frozen. The adapters drop nothing (`lora_dropout` 0).

    Args:
        rank: r, the rank of the update B·A.
        targets: as in `lora_parameters`.
        alpha: the update is scaled by alpha / rank.

    Returns:
        A `PeftModel`, of which the given model is a part from now on. `save_pretrained` writes the adapters and the head, and
        nothing else.

    Raises:
        ValueError: a target names no linear layer; the sentence names it.

    Source: Hu et al., https://arxiv.org/abs/2106.09685; https://huggingface.co/docs/peft/package_reference/lora
    """
    raise NotImplementedError("Task 7.6: complete add_lora() in src/exercises/lab07_custom_trainer.py")


def merged(adapted) -> nn.Module:
    """A plain model that gives what the adapted one gives, without peft, to export (`merge_and_unload`). The adapted model stays as
    it is.
    """
    raise NotImplementedError("Task 7.6: complete merged() in src/exercises/lab07_custom_trainer.py")


# --- Task 7.7 -------------------------------------------------------------------------------------------------------


def multilabel_metrics(probabilities: torch.Tensor, labels: torch.Tensor, names: list[str], thresholds=0.5) -> dict:
    """F1 and its kin, of all entries that somebody has labelled; an entry is predicted where p ≥ its label's threshold.

    Micro counts all entries together. Macro is the mean over labels, each of which counts the same; a label without any
    positive has no recall, so it is left out of the macro means, and named. A label that is never predicted has precision 0 and
    F1 0. ROC-AUC needs both kinds: a label without positives or without negatives is left out of its mean.

    Args:
        probabilities: [rows, labels], from 0 to 1.
        labels: [rows, labels], 0, 1 or `UNKNOWN`.
        names: of the labels.
        thresholds: a number for all, or a tensor with one per label, [labels].

    Returns:
        {"micro_f1", "macro_f1", "macro_precision", "macro_recall", "roc_auc": numbers, "without_positives": the names}.
        A mean over no label is nan. Micro F1 is 0 where there is no positive and none is predicted. In ROC-AUC two that are
        equally likely count a half. (`torchmetrics.functional.classification` has them. Give it a label's known rows at a time,
        and 0 or 1 as predictions: of probabilities it takes those *above* a threshold.)
    """
    raise NotImplementedError("Task 7.7: complete multilabel_metrics() in src/exercises/lab07_custom_trainer.py")


# --- Task 7.8 -------------------------------------------------------------------------------------------------------


def best_thresholds(probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """For each label the threshold with the largest F1, of n/20 in float32, n from 1 to 19: of validation data, never of those
    that you report.

    F1 is 2·tp / (2·tp + fp + fn), and an entry is predicted where p ≥ threshold. Of several that are equally good it is the one
    nearest to 0.5, and of two that are equally near the lower one: 0.3 and not 0.7. Labels that nobody has given count
    nowhere. Where a label has no positive, it is 0.5.

    Args:
        probabilities: [rows, labels].
        labels: [rows, labels], 0, 1 or `UNKNOWN`.

    Returns:
        Thresholds [labels], float32, on the device of the probabilities.
    """
    raise NotImplementedError("Task 7.8: complete best_thresholds() in src/exercises/lab07_custom_trainer.py")


# --- Task 7.9 -------------------------------------------------------------------------------------------------------


def stratified_folds(labels: torch.Tensor, folds: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Rows for training and for validation, fold by fold: each row is in one fold's validation, and each label has its share there.

    Take `MultilabelStratifiedKFold` of `iterstrat.ml_stratifiers`, and shuffle. It deals the rarest label first, and comes near
    to equal shares. A label that nobody has given counts as 0. The order of the rows within a part is that of the data.

    Args:
        labels: [rows, labels], 0, 1 or `UNKNOWN`. One column alone the library takes for two classes, and refuses: a second one, of
            nothing but 0, changes no share.
        folds: at least 2.
        seed: of what is drawn.

    Raises:
        ValueError: fewer than 2 folds; or a label has fewer positives than folds, though it has some. The sentence names the
            label's number, from 0, and how many it has; of several, one.

    Source: Sechidis et al., "On the Stratification of Multi-label Data", 2011; https://pypi.org/project/iterative-stratification/
    """
    raise NotImplementedError("Task 7.9: complete stratified_folds() in src/exercises/lab07_custom_trainer.py")


# --- Task 7.10 ------------------------------------------------------------------------------------------------------


def load_training_config(path: str | Path) -> TrainingConfig:
    """Read a YAML file. An entry that is not there keeps its default; so a file from before DeepSpeed is read as ever.

    A path in `deepspeed` begins in the folder of the YAML file, not in the current one; it is returned as text, with that
    folder before it.

    Raises:
        ValueError: with a sentence that names the file. For an entry at fault it also names the key (the last part is enough),
            the line of the key, "line 3" (the first is 1), and the value as Python has it, where that is one value. Of several
            faults one is enough. Faults are
            no YAML, or no UTF-8;
            no mapping at the top (an empty file is a mapping without entries);
            an unknown key; a key given twice, of which the second is at fault;
            a value of the wrong type or outside of its range (`1e-3` is text for YAML; it reads `1.0e-3` as a number);
            a file of `deepspeed` that is not there; the sentence names its path.
            (A missing YAML file raises FileNotFoundError by itself.)
    """
    raise NotImplementedError("Task 7.10: complete load_training_config() in src/exercises/lab07_custom_trainer.py")


# --- Task 7.11 ------------------------------------------------------------------------------------------------------


IMPORTS = ("torch", "transformers", "accelerate", "peft", "torchmetrics", "iterstrat")
"""What a training needs; with `deepspeed` in its configuration, deepspeed too."""


def validate_setup(path: str | Path) -> list[tuple[str, str]]:
    """Look at everything that can fail before the first step, and go on after a failure.

    In this order, by name:
        "configuration": `load_training_config` reads it;
        "imports": each of `IMPORTS` is imported, and deepspeed where the configuration names a file; of several that fail the
            first is named;
        "deepspeed": that file is JSON (where it is not, the reason names the file), and `deepspeed_refuses(its dictionary, 1)`, for
            one rank, gives no reason against it;
        "model": `load_classifier` of `shardlab.data.models` finds it, and one batch of two short texts gives logits
            [2, num_labels];
        "trainer": `trainer_arguments` can be made, without DeepSpeed, in a temporary folder.
    What the model has fetched into the hub's cache may stay there.

    Args:
        path: the YAML file.

    Returns:
        Pairs of name and reason: "" where all is well, "not used" as that of "deepspeed" without a file, else the error's type
        and text in one line. Where the configuration cannot be read, the imports are looked at all the same, and the reason of the
        other three is "not looked at". Nothing is raised, and nothing else stays on disk.
    """
    raise NotImplementedError("Task 7.11: complete validate_setup() in src/exercises/lab07_custom_trainer.py")
