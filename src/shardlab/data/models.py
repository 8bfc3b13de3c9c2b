"""The course's models by name: bloom-tiny and comment-tiny, which are shipped, and others from the hub or a local folder."""

from __future__ import annotations

import contextlib
from pathlib import Path

from shardlab.errors import CourseError

BLOOM_TINY = Path(__file__).parent / "shipped" / "bloom_tiny"
COMMENT_TINY = Path(__file__).parent / "shipped" / "comment_tiny"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

SHAPES = {
    "bigscience/bloom-560m": {"vocab_size": 250_880, "hidden_size": 1024, "n_layer": 24, "n_head": 16},
    "bigscience/bloom-1b7": {"vocab_size": 250_880, "hidden_size": 2048, "n_layer": 24, "n_head": 16},
    "bigscience/bloom-3b": {"vocab_size": 250_880, "hidden_size": 2560, "n_layer": 30, "n_head": 32},
    "bigscience/bloom-7b1": {"vocab_size": 250_880, "hidden_size": 4096, "n_layer": 30, "n_head": 32},
}
"""Shapes by name, for measuring with random weights where the hub cannot be reached."""

ENCODER_SHAPES = {"microsoft/graphcodebert-base": {"vocab_size": 50_265, "max_position_embeddings": 514, "type_vocab_size": 1}}
"""Of encoders; what is not said is as in `RobertaConfig`: 12 layers of width 768."""

VIT_SHAPES = {
    "vit-tiny": {
        "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 192, "image_size": 32,
        "patch_size": 8, "initializer_range": 0.06,
    },
    "google/vit-huge-patch14-224-in21k": {
        "hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120, "image_size": 224,
        "patch_size": 14,
    },
}  # fmt: skip
"""Of Vision Transformers. The tiny one is the course's own: 329,381 parameters with 101 classes."""


class ModelError(CourseError, ValueError):
    """A model that cannot be had; the message says why and what to do."""


def model_path(name: str) -> str:
    """`bloom-tiny` and `comment-tiny` become the shipped folders; anything else is a hub name or a folder, as it is."""
    return str({"bloom-tiny": BLOOM_TINY, "comment-tiny": COMMENT_TINY}.get(name, name))


def load_tokenizer(name: str = "bloom-tiny"):
    """The model's tokenizer. Those of BLOOM pad on the left, and that of comment-tiny, as RoBERTa's, on the right."""
    from transformers import AutoTokenizer

    _no_bars()
    try:
        return AutoTokenizer.from_pretrained(model_path(name))
    except (OSError, ValueError) as error:
        raise ModelError(_not_found(name, "tokenizer", error)) from error


def load_model(name: str = "bloom-tiny", *, precision: str = "fp32", random_weights: bool = False, seed: int = 0):
    """The model on the CPU, ready to train; under ZeRO-3 each rank has its shards where DeepSpeed puts them.

    Args:
        name: `bloom-tiny`, a name on the hub, or a folder written by `save_pretrained`.
        precision: the type of the parameters: `fp32`, `bf16` or `fp16`.
        random_weights: build the architecture without reading weights; enough for measuring memory and speed.
        seed: of the random weights.

    Raises:
        ModelError: the weights or the configuration cannot be found.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.integrations import is_deepspeed_zero3_enabled

    _no_bars()
    dtype = getattr(torch, DTYPES[precision])
    if not random_weights:
        try:
            return AutoModelForCausalLM.from_pretrained(model_path(name), dtype=dtype)
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(_not_found(name, "weights", error)) from error
    if torch.cuda.is_available() and not is_deepspeed_zero3_enabled():  # ZeRO-3 places its own parameters
        # A GPU draws 3 billion numbers in a moment, and the CPU in a minute; what does not fit on the GPU is drawn on the CPU.
        with contextlib.suppress(torch.OutOfMemoryError), torch.device("cuda"):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(model_config(name), dtype=dtype).cpu()
        torch.cuda.empty_cache()
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(model_config(name), dtype=dtype)


def load_classifier(name: str = "comment-tiny", num_labels: int = 16, *, random_weights: bool = False, seed: int = 0):
    """An encoder with a head for labels that do not exclude each other, on the CPU, in fp32; under ZeRO-3 each rank has its shards.

    Args:
        name: `comment-tiny`, a name on the hub such as `microsoft/graphcodebert-base`, or a folder.
        num_labels: logits per row.
        random_weights: build the architecture without reading weights.
        seed: of the head's weights, which are new, and of all where none are read.

    Raises:
        ModelError: the weights or the configuration cannot be found.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForSequenceClassification, RobertaConfig

    _no_bars()
    settings = {"num_labels": num_labels, "problem_type": "multi_label_classification"}
    torch.manual_seed(seed)
    try:
        if not random_weights:
            with _without_report():
                return AutoModelForSequenceClassification.from_pretrained(model_path(name), dtype=torch.float32, **settings)
        if name in ENCODER_SHAPES:
            config = RobertaConfig(**ENCODER_SHAPES[name], **settings)
        else:
            config = AutoConfig.from_pretrained(model_path(name), **settings)
        return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(_not_found(name, "weights", error)) from error


def model_config(name: str):
    """The model's configuration, without its weights."""
    from transformers import AutoConfig, BloomConfig

    if name in SHAPES:
        return BloomConfig(use_cache=False, bos_token_id=1, eos_token_id=2, pad_token_id=3, **SHAPES[name])
    try:
        return AutoConfig.from_pretrained(model_path(name))
    except (OSError, ValueError) as error:
        raise ModelError(_not_found(name, "configuration", error)) from error


def vit_config(name: str, num_labels: int):
    """The configuration of a Vision Transformer of `VIT_SHAPES`, without dropout.

    Raises:
        ModelError: there is no shape of that name.
    """
    from transformers import ViTConfig

    if name not in VIT_SHAPES:
        raise ModelError(f"Model '{name}': there is no Vision Transformer of that name here; there are {', '.join(VIT_SHAPES)}.")
    return ViTConfig(num_labels=num_labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **VIT_SHAPES[name])


def image_settings(name: str) -> tuple[int, list[float], list[float]]:
    """The size in pixels, and mean and deviation per channel, of the images that a Vision Transformer takes.

    Raises:
        ModelError: the model's image processor cannot be found.
    """
    if name in VIT_SHAPES:  # that of google/vit-huge-patch14-224-in21k says the same
        return VIT_SHAPES[name]["image_size"], [0.5] * 3, [0.5] * 3
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(_not_found(name, "image processor", error)) from error
    size = processor.size
    return size.get("height", size.get("shortest_edge")), list(processor.image_mean), list(processor.image_std)


def parameter_count(model) -> int:
    """Parameters, each counted once: BLOOM's output layer shares its weights with the embedding.

    Under ZeRO-3 a parameter's own shape is empty; its `ds_numel` is the true size.
    """
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


@contextlib.contextmanager
def _without_report():
    """transformers warns that a head is new, in twenty lines, and that nothing is sharded over tensors, in one as long."""
    import logging

    reporters = [logging.getLogger(f"transformers.{name}") for name in ("modeling_utils", "distributed.tensor_parallel")]
    levels = [reporter.level for reporter in reporters]
    for reporter in reporters:
        reporter.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for reporter, level in zip(reporters, levels):
            reporter.setLevel(level)


def _no_bars() -> None:
    """transformers draws a bar for each file that it reads or writes, into notebooks and logs too."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _not_found(name: str, what: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0]
    remedy = "Give the path of a local copy, or use --random-weights to measure without weights"
    known = ", ".join(["bloom-tiny", *SHAPES, "comment-tiny", *ENCODER_SHAPES])
    return f"Model '{name}': no {what} found ({reason}). {remedy}. Names known here: {known}."
