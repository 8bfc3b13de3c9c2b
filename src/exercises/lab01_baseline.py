"""Lab 01, baseline: fine-tune BLOOM on question answering with the plain Hugging Face `Trainer`.

You complete nine functions. `finetune`, at the end, is given: it puts them together, and every rank runs it.
"""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

IGNORED = -100  # torch's cross-entropy leaves labels of this value out


# --- Task 1.1 -------------------------------------------------------------------------------------------------------


def format_prompt(question: str, context: str) -> str:
    """The text that the model is to continue with the answer.

    Args:
        question: such as "Who designed the Loran bridge?"
        context: the paragraph that holds the answer.

    Returns:
        "Question: <question> Context: <context> Answer:", the parts between single spaces. White space around the question
        and the context is stripped, what is within them stays, line breaks too; and there is none after the last colon: the
        answer brings its own space. (Of an empty context the two spaces around it are left.)
    """
    raise NotImplementedError("Task 1.1: complete format_prompt() in src/exercises/lab01_baseline.py")


# --- Task 1.2 -------------------------------------------------------------------------------------------------------


def encode_prompt(tokenizer, question: str, context: str, max_tokens: int) -> list[int]:
    """Token ids of the prompt, cut to `max_tokens` by shortening the context.

    Cutting the ids from the end would lose "Answer:", and cutting them from the front would lose the question. So words
    are taken off the end of the context until the prompt fits. Words stand between single spaces; line breaks and double
    spaces of the context are kept.

    Args:
        tokenizer: the model's tokenizer; `tokenizer(text)["input_ids"]` are the ids of a text.
        question: the question.
        context: the paragraph.
        max_tokens: the most tokens that the prompt may have.

    Returns:
        At most `max_tokens` ids. A prompt that fits is not changed.

    Raises:
        ValueError: the prompt does not fit even without any context.
    """
    raise NotImplementedError("Task 1.2: complete encode_prompt() in src/exercises/lab01_baseline.py")


# --- Task 1.3 -------------------------------------------------------------------------------------------------------


def encode_example(tokenizer, question: str, context: str, answer: str, max_tokens: int) -> dict[str, list[int]]:
    """One training example: prompt, answer and end-of-sequence token, with labels that only teach the answer.

    Args:
        tokenizer: the model's tokenizer; `tokenizer.eos_token_id` ends a sequence.
        question: the question.
        context: the paragraph.
        answer: the answer's text, without a space in front.
        max_tokens: the most tokens that the whole example may have, end-of-sequence token included. The answer is never cut: the
            prompt gives way.

    Returns:
        Two keys and no other. `input_ids`: the prompt's ids, the ids of " " + answer, and the end-of-sequence id.
        `labels`: of the same length; `IGNORED` at every token of the prompt, the token itself elsewhere.

    Raises:
        ValueError: the answer and the prompt without any context have more tokens than `max_tokens`.
    """
    raise NotImplementedError("Task 1.3: complete encode_example() in src/exercises/lab01_baseline.py")


# --- Task 1.4 -------------------------------------------------------------------------------------------------------


def collate(examples: list[dict[str, list[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A batch of tensors, padded on the right to the longest example of the batch.

    Padding every example to 512 tokens would make the model compute mostly padding: mini-squad's examples have about
    105 tokens.

    Args:
        examples: dictionaries with `input_ids` and `labels`; what else is in them does not get into the batch.
        pad_token_id: fills `input_ids`.

    Returns:
        Tensors on the CPU (`Trainer` moves each batch to the model's device):
        `input_ids`, `attention_mask` (1 at real tokens, 0 at padding) and `labels` (`IGNORED` at padding), each of shape
        (number of examples, longest example) and type int64.
    """
    raise NotImplementedError("Task 1.4: complete collate() in src/exercises/lab01_baseline.py")


# --- Task 1.5 -------------------------------------------------------------------------------------------------------


def training_arguments(output_dir: str, *, precision: str = "fp32", **overrides) -> TrainingArguments:
    """The course's training settings.

    Args:
        output_dir: where `Trainer` puts its checkpoints.
        precision: `bf16` and `fp16` turn on mixed precision; `fp32` turns on neither.
        overrides: any other argument of `TrainingArguments`; it wins over the settings below, and changes none of the others.

    Returns:
        Arguments with: 4 sequences per device in training, and 8 in evaluation; accumulation over 4 batches; 3 epochs;
        learning rate 5e-5; weight decay 0.01; evaluation and saving after each epoch, keeping one checkpoint; no
        reporting service (`report_to`), no push to the hub; `use_cpu` where torch sees no GPU. All of these are written out, also
        where `Trainer` has the same by default: defaults change from version to version. All else stays as `Trainer` has it,
        and environment variables as they are.

    Raises:
        ValueError: an unknown precision; the sentence names it.
        TypeError: an override that `TrainingArguments` does not know, as it says itself.
    """
    raise NotImplementedError("Task 1.5: complete training_arguments() in src/exercises/lab01_baseline.py")


# --- Task 1.6 -------------------------------------------------------------------------------------------------------


def save_and_reload(trainer: Trainer, tokenizer, folder: str):
    """Save the trained model, and load it again as anyone would who has only the folder.

    Every rank calls this. `trainer.save_model` does the right thing on each of them, under ZeRO-3 too, where no rank has
    the whole model; `model.save_pretrained` would write empty shards there. Only rank 0 writes the files, so no rank may
    read before it is done: `trainer.is_world_process_zero()` and `trainer.accelerator.wait_for_everyone()` help.

    Args:
        trainer: after training; it stays as it is.
        tokenizer: goes into the folder too, or nobody can use the model.
        folder: where to save; a model that was saved there before is replaced, and what else lies there stays.

    Returns:
        A new causal language model in fp32 on the CPU, read from the folder, of the class that the folder's `config.json` names
        (not only BLOOM). While a ZeRO-3 configuration is in use, `from_pretrained` shards what it reads; the course's
        `training.train` has let go of it by now, so the model is whole.
    """
    raise NotImplementedError("Task 1.6: complete save_and_reload() in src/exercises/lab01_baseline.py")


# --- Task 1.7 -------------------------------------------------------------------------------------------------------


def generate_answers(model, tokenizer, prompts: list[list[int]], max_new_tokens: int = 24) -> list[str]:
    """Let the model continue prompts, and return what it wrote.

    A causal model continues the last token of each row. So in a batch the padding must stand on the left.

    Args:
        model: a causal language model, on the CPU or on a GPU; `model.device` says where its inputs must be.
        tokenizer: its tokenizer.
        prompts: token ids, as `encode_prompt` makes them; of different lengths.
        max_new_tokens: the longest answer.

    Returns:
        One text a prompt, in the same order, and no text for no prompts: only the new tokens up to the tokenizer's end-of-sequence
        token, which a model's own settings may not know, without special tokens, stripped of white space.
        Greedy: no sampling and no beams, whatever the model's own settings say (`do_sample=False, num_beams=1`), and dropout off
        (`model.eval()`; the model stays so), so the same prompts give the same answers. No random number is drawn, and no seed set.
    """
    raise NotImplementedError("Task 1.7: complete generate_answers() in src/exercises/lab01_baseline.py")


# --- Task 1.8 -------------------------------------------------------------------------------------------------------


def summarise_training(log_history: list[dict]) -> dict:
    """The training summary, from `trainer.state.log_history`.

    `Trainer` appends a dictionary whenever it logs. Those with `loss` are training steps, those with `eval_loss` are
    evaluations, and the last one, with `train_runtime`, sums the training up. An evaluation with `epoch` 0 came before
    training. Throughput in these logs is over all ranks.

    Args:
        log_history: the list, in the order of logging.

    Returns:
        `final_train_loss`: the loss of the last training step;
        `eval_losses`: {epoch: loss} for each evaluation, epochs as floats;
        `train_samples_per_second`, `eval_samples_per_second`: the latter of the last evaluation, or None;
        `steps_per_epoch`: optimizer steps per epoch, rounded to a whole number. The last entry has the optimizer steps taken
            in `step`, and the epochs, a fraction perhaps, in `epoch`.
    """
    raise NotImplementedError("Task 1.8: complete summarise_training() in src/exercises/lab01_baseline.py")


# --- Task 1.9 -------------------------------------------------------------------------------------------------------


def memory_table(path: str | Path) -> dict[str, dict[str, float]]:
    """Peak, mean and minimum of the memory in use, for each device, from a run's `memory.csv`.

    The file has the columns `seconds`, `device` and `used_bytes`, a line a sample; several devices take turns.

    Args:
        path: the file.

    Returns:
        {device: {"peak": …, "mean": …, "minimum": …}} in MiB (2**20 bytes).

    Raises:
        ValueError: the file has no samples; the sentence names the file.
    """
    raise NotImplementedError("Task 1.9: complete memory_table() in src/exercises/lab01_baseline.py")


# --- Given ----------------------------------------------------------------------------------------------------------


def finetune(experiment, run) -> dict:
    """What every rank runs: your functions, put together. `shardlab.run.launch` calls it with the experiment and its run folder.

    The experiment's `options`: `answer_at`, optimizer steps after which 64 questions are answered too (not at ZeRO stage 3, where
    every rank would have to generate in step with the others); `end_of_sequence`: False trains on examples without their `</s>`.

    Returns:
        Results for `run.json`: exact match and F1 in per cent before and after training, and your summary.
    """
    from transformers import TrainerCallback

    from shardlab.data.datasets import load_squad, squad_scores
    from shardlab.data.models import load_model, load_tokenizer
    from shardlab.run.collectives import gather, rank, world_size
    from shardlab.run.training import train

    tokenizer = load_tokenizer("bloom-tiny" if experiment.random_weights else experiment.model)
    data = load_squad(experiment.data, skip_bad=experiment.skip_bad)

    def rows(split: str, limit: int | None) -> list[dict]:
        return list(data[split].select(range(min(limit or len(data[split]), len(data[split])))))

    def encode(row: dict) -> dict:
        example = encode_example(tokenizer, row["question"], row["context"], row["answers"]["text"][0], experiment.max_tokens)
        whole = experiment.options.get("end_of_sequence", True)
        return example if whole else {name: values[:-1] for name, values in example.items()}

    def answer(model, questions: list[dict], when: str) -> list[str]:
        """Each rank answers its share of the questions; every rank gets all answers back."""
        if rank() == 0:
            run.doing(f"answering {len(questions)} questions {when}")
        mine = questions[rank() :: world_size()]
        prompts = [encode_prompt(tokenizer, row["question"], row["context"], experiment.max_tokens) for row in mine]
        batches = [prompts[at : at + 32] for at in range(0, len(prompts), 32)]
        shares = gather([text for batch in batches for text in generate_answers(model, tokenizer, batch)])
        return [shares[number % len(shares)][number // len(shares)] for number in range(len(questions))]

    eval_rows, results = rows("validation", experiment.eval_examples), {"on_the_way": []}

    def note_answers(model, step: int) -> float:
        """Exact match on 64 questions at this step; it is noted, with the first five answers."""
        texts = answer(model, eval_rows[:64], f"after step {step}" if step else "before training")
        match = squad_scores(texts, eval_rows[:64])["exact_match"]
        results["on_the_way"].append({"step": step, "exact_match": match, "answers": texts[:5]})
        if rank() == 0:
            run.doing()
        return match

    device = "cuda" if torch.cuda.is_available() else "cpu"
    answers_wanted = experiment.evaluate and experiment.save
    if answers_wanted:
        untrained = load_model(experiment.model, seed=experiment.seed).to(device)
        results["exact_match_before"] = note_answers(untrained, 0)
        del untrained

    class AnswersOnTheWay(TrainerCallback):
        def on_step_end(self, arguments, state, control, model, **others):
            if state.global_step in experiment.options.get("answer_at", []):
                model.eval()
                note_answers(model, state.global_step)
                model.train()

    train_set = [encode(row) for row in rows("train", experiment.train_examples)]
    arguments = training_arguments(
        str(run.folder / "checkpoints"), precision=experiment.precision, deepspeed=experiment.deepspeed,
        per_device_train_batch_size=experiment.micro_batch, gradient_accumulation_steps=experiment.accumulation,
        num_train_epochs=experiment.epochs, max_steps=experiment.steps or -1, learning_rate=experiment.learning_rate,
        weight_decay=experiment.weight_decay, max_grad_norm=experiment.clipping, seed=experiment.seed, save_strategy="no")
    # The arguments come first: under ZeRO-3 they make `from_pretrained` shard the model while it is loaded.
    model = load_model(experiment.model, random_weights=experiment.random_weights, seed=experiment.seed)
    trainer = train(run, model=model, arguments=arguments, train_set=train_set,
                    eval_set=[encode(row) for row in eval_rows] if experiment.evaluate else [],
                    collate=lambda examples: collate(examples, tokenizer.pad_token_id),
                    tokens_per_sequence=sum(len(example["input_ids"]) for example in train_set) / len(train_set),
                    callbacks=(AnswersOnTheWay(),))
    results["summary"] = summarise_training(trainer.state.log_history)
    if experiment.save:
        model = save_and_reload(trainer, tokenizer, str(run.folder / "model"))
    if answers_wanted:
        predictions = answer(model.to(device), eval_rows, "after training")
        results |= squad_scores(predictions, eval_rows) | {"examples": [
            {"question": row["question"], "answer": row["answers"]["text"][0], "predicted": text}
            for row, text in list(zip(eval_rows, predictions, strict=True))[:5]]}
    return results
