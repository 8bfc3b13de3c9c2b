"""What DeepSpeed itself says of a configuration, in one sentence."""

from __future__ import annotations

import difflib
import logging
from types import SimpleNamespace
from unittest import mock

BATCH_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def deepspeed_refuses(config: dict, world_size: int) -> str:
    """Why DeepSpeed refuses a configuration, in a sentence that names the key; empty if it takes it.

    It takes more than it should: keys that it does not know at the top, for example, it ignores. Values "auto" are left out before
    it is asked, since `Trainer` fills them in.

    Args:
        config: the configuration.
        world_size: ranks.

    Source: deepspeed 0.19.8, `runtime/config.py`; what is asked is its `DeepSpeedConfig`.
    """
    # Here, not at the top: it takes seconds.
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    asked = _without_auto(config)
    if any(config.get(size) == "auto" for size in BATCH_SIZES) and not any(size in asked for size in BATCH_SIZES[:2]):
        asked["train_micro_batch_size_per_gpu"] = 1
    ranks = SimpleNamespace(get_data_parallel_world_size=lambda: world_size)
    # Without a process group it would take the world for one rank.
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with mock.patch("deepspeed.runtime.config.dist.get_rank", lambda: 0):
            DeepSpeedConfig(asked, mpu=ranks)
    except ValidationError as error:
        return "; ".join(_sentence(error.title, each) for each in error.errors())
    except Exception as error:
        return _no_object(asked) or (str(error).strip().splitlines() or [type(error).__name__])[0]
    finally:
        logging.disable(before)
    return ""


def _without_auto(value):
    if isinstance(value, dict):
        return {key: _without_auto(inner) for key, inner in value.items() if inner != "auto"}
    return value


def _no_object(config: dict) -> str:
    """The sentence for a section such as `"fp16": true`, over which DeepSpeed stumbles."""
    for key in ("fp16", "bf16", "bfloat16", "optimizer", "scheduler", "checkpoint", "data_types", "aio"):
        if key in config and not isinstance(config[key], dict):
            return f'{key} is {config[key]!r}, and has to be an object, such as {{"enabled": true}}'
    return ""


def _sentence(title: str, error: dict) -> str:
    """One of pydantic's complaints, with the key's whole path."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

    section = {"DeepSpeedZeroConfig": "zero_optimization", "DeepSpeedFP16Config": "fp16", "DeepSpeedBF16Config": "bf16"}.get(
        title, title
    )
    path = [section, *map(str, error["loc"])]
    if error["type"] != "extra_forbidden":
        return f"{'.'.join(path)} is {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"
    known = {
        "zero_optimization": set(DeepSpeedZeroConfig.model_fields),
        "zero_optimization.offload_optimizer": set(DeepSpeedZeroOffloadOptimizerConfig.model_fields),
        "zero_optimization.offload_param": set(DeepSpeedZeroOffloadParamConfig.model_fields),
    }
    place, key = ".".join(path[:-1]), path[-1]
    elsewhere = [other for other, keys in known.items() if key in keys and other != place]
    nearest = difflib.get_close_matches(key, known.get(place, ()), 1, 0.8)
    hint = f"; it is one of {elsewhere[0]}" if elsewhere else f"; is it {nearest[0]}?" if nearest else ""
    return f"{key} is no key of {place}{hint}"
