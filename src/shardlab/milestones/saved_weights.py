"""Weights that exercises have saved, read without trust."""

from __future__ import annotations

import json
from pathlib import Path

from shardlab.milestones.messages import MilestoneFailed, require


def safely_loaded(path: Path) -> dict:
    """What `torch.save` wrote, without running anything that it may hold: tensors and plain values.

    Raises:
        MilestoneFailed: it holds something else.
    """
    import pickle

    import torch

    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        raise MilestoneFailed(
            f"expected  a file of torch.save with tensors and plain values in it: {path.name}\n"
            f"got       {str(error).splitlines()[0][:300]}\n"
            "likely    an object of a class of its own was saved, or the file is not whole"
        ) from None


def saved_weights(folder: Path, base_model: str) -> dict:
    """The weights in a model folder, read as what they are: JSON and safetensors. Nothing else in the folder is looked at.

    Args:
        folder: what `save_pretrained` wrote, with its tokenizer.
        base_model: the model whose shape and tokenizer it must have.

    Returns:
        fp32 tensors by the parameters' names, each shared tensor once.

    Raises:
        MilestoneFailed: it is not a model of this shape that plain transformers can load.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from shardlab.data.models import load_tokenizer, model_config

    def json_in(name: str) -> dict:
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            found = error
        require(
            isinstance(found, dict),
            expected=f"a {name} in the folder",
            got=f"{type(found).__name__}: {found}",
        )
        return found

    wanted = model_config(base_model).to_dict() | {"dtype": "float32"}
    shape = ("model_type", "vocab_size", "hidden_size", "n_layer", "n_head", "tie_word_embeddings", "dtype")
    config = {"tie_word_embeddings": True} | json_in("config.json")
    require(
        [config.get(name) for name in shape] == [wanted[name] for name in shape],
        expected=f"the configuration of {', '.join(f'{name} {wanted[name]}' for name in shape)}",
        got=", ".join(f"{name} {config.get(name)}" for name in shape),
    )
    try:
        weights = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        require(
            False,
            expected="the weights in model.safetensors",
            got=f"{type(error).__name__}: {error}",
        )
    types = sorted({str(weight.dtype) for weight in weights.values()})
    require(
        types == ["torch.float32"],
        expected="fp32 weights",
        got=", ".join(types) or "none",
    )
    tokenizer = load_tokenizer(base_model)
    vocabulary = json_in("tokenizer.json").get("model", {}) if (folder / "tokenizer.json").exists() else {}
    require(
        vocabulary == json.loads(tokenizer.backend_tokenizer.to_str())["model"],
        expected="the tokenizer in the folder",
        got="none that can be read" if not vocabulary else "another one",
    )
    settings, special = json_in("tokenizer_config.json"), ("pad_token", "eos_token", "padding_side")
    require(
        all(settings.get(name) == getattr(tokenizer, name) for name in special),
        expected=f"the tokenizer's settings: {', '.join(f'{name} {getattr(tokenizer, name)!r}' for name in special)}",
        got=", ".join(f"{name} {settings.get(name)!r}" for name in special),
    )
    whole = ("transformer.", "lm_head.")
    return {name if name.startswith(whole) else f"transformer.{name}": weight for name, weight in weights.items()}
