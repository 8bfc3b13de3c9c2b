"""DeepSpeed's verdict on configurations as people have them, and the check of the lab on ZeRO next to it.

One case per kind: what DeepSpeed does with the file, what our check does, and what its sentence names. Where the two differ, the
check refuses what DeepSpeed ignores or reads otherwise than it was meant.
"""

import json
from pathlib import Path

import pytest

from shardlab.milestones.agreement import solution
from shardlab.zero.config_verdict import deepspeed_refuses

LAB = solution("lab02_zero_stages")
SIZED = {"train_batch_size": 8}


def zero(**settings) -> str:
    return json.dumps(SIZED | {"zero_optimization": settings})


CASES = {
    "plain": (zero(stage=2), True, ""),
    "old name of bf16": (json.dumps(SIZED | {"bfloat16": {"enabled": True}}), True, ""),
    "byte-order mark": ("\ufeff" + zero(stage=1), True, ""),
    "offload null": (zero(stage=3, offload_param=None, offload_optimizer={"device": "cpu"}), True, ""),
    "offload without a device": (zero(stage=3, offload_optimizer={"pin_memory": True}), True, ""),
    "comments": ('{"train_batch_size": 8 // both\n}', True, "only DeepSpeed reads it, Trainer does not"),
    "a comment, and a key given twice": (
        '{"train_batch_size": 8, // both\n"train_batch_size": 16}',
        False,
        "'train_batch_size' is given twice",
    ),
    "a comma too many": ('{"train_batch_size": 8,}', True, "only DeepSpeed reads it, Trainer does not"),
    "a note as a key": (json.dumps(SIZED | {"_comment": "two nodes"}), True, "'_comment' is no key"),
    "a key misspelt": (json.dumps(SIZED | {"zero_optimisation": {"stage": 2}}), True, "'zero_optimisation' is no key"),
    "old form, false": (json.dumps(SIZED | {"zero_optimization": False}), True, "zero_optimization is false"),
    "stage as text": (zero(stage="3"), True, "zero_optimization.stage is the text '3'"),
    "stage true": (zero(stage=True), True, "zero_optimization.stage is true"),
    "boolean as text": (json.dumps(SIZED | {"bf16": {"enabled": "True"}}), True, "bf16.enabled is the text 'True'"),
    "both precisions as text": (
        json.dumps(SIZED | {name: {"enabled": "true"} for name in ("bf16", "fp16")}),
        False,
        "bf16.enabled is the text 'true'",
    ),
    "number as text": (zero(stage=2, reduce_bucket_size="5e8"), False, "reduce_bucket_size is the text '5e8'"),
    "offload_param at stage 2": (zero(stage=2, offload_param={"device": "cpu"}), True, "offload_param needs stage 3"),
    "nvme without a path": (zero(stage=3, offload_param={"device": "nvme"}), True, "has no nvme_path"),
    "nvme at stage 2": (
        zero(stage=2, offload_optimizer={"device": "nvme", "nvme_path": "/tmp"}),
        True,
        "offload_optimizer goes to nvme, which needs stage 3, not stage 2",
    ),
    "fp16: true": (json.dumps(SIZED | {"fp16": True}), False, "fp16 is True, and has to be an object"),
    "a key given twice": ('{"train_batch_size": 8, "train_batch_size": 16}', False, "'train_batch_size' is given twice"),
    "a key within misspelt": (zero(stage=2, reduce_bucket_sise=5e8), False, "is it reduce_bucket_size?"),
    "a key of the other offload": (
        zero(stage=3, offload_optimizer={"device": "nvme", "nvme_path": "/tmp", "buffer_size": 1000}),
        False,
        "buffer_size is no key of zero_optimization.offload_optimizer; it is one of zero_optimization.offload_param",
    ),
    "removed: mics": (zero(stage=3, mics_shard_size=2), False, "mics_shard_size' is no longer supported"),
    "removed: amp": (json.dumps(SIZED | {"amp": {"enabled": False}}), False, "Apex AMP integration has been removed"),
    "no batch size": (json.dumps({"zero_optimization": {"stage": 1}}), False, "train_batch_size"),
    "sizes that do not multiply": (
        json.dumps(SIZED | {"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 1}),
        False,
        "train_batch_size",
    ),
}


def deepspeeds_own(path: Path, monkeypatch) -> str:
    """What DeepSpeed says of the file when it reads it itself; empty if it takes it."""
    from types import SimpleNamespace

    from deepspeed.runtime.config import DeepSpeedConfig

    monkeypatch.setattr("deepspeed.runtime.config.dist.get_rank", lambda: 0)
    try:
        DeepSpeedConfig(str(path), mpu=SimpleNamespace(get_data_parallel_world_size=lambda: 2))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("case", CASES)
def test_a_configuration_gets_its_verdict_and_its_sentence(case, tmp_path, monkeypatch):
    text, deepspeed_takes_it, says = CASES[case]
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    own = deepspeeds_own(path, monkeypatch)
    assert (own == "") is deepspeed_takes_it, own
    try:
        LAB.check_deepspeed_config(LAB.load_config(path), world_size=2)
        said = ""
    except ValueError as error:
        said = str(error)
    assert bool(said) is bool(says) and says in said, said
    assert says or deepspeed_takes_it, "what DeepSpeed refuses is never let through"
    assert "would ignore" not in said or own == "", "DeepSpeed ignores nothing that it refuses"


def test_auto_is_left_to_trainer():
    config = {"train_batch_size": "auto", "bf16": {"enabled": "auto"}, "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}
    assert deepspeed_refuses(config, 2) == "" and config["train_batch_size"] == "auto", "and nothing is changed"


class Recording(dict):
    """Notes the keys that it is asked for."""

    asked: set[str] = set()

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)


def test_known_keys_are_those_of_the_installed_deepspeed():
    """Every key that DeepSpeed's configuration asks for is known, and every known key stands in its source."""
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfig

    DeepSpeedConfig(Recording(train_micro_batch_size_per_gpu=1))
    source = "".join(path.read_text(errors="replace") for path in Path(deepspeed.__file__).parent.rglob("*.py"))
    missing = {key for key in Recording.asked - LAB.TOP_LEVEL_KEYS if deepspeed_takes(key)}
    assert not missing, f"DeepSpeed asks for {missing}"
    assert not [key for key in LAB.TOP_LEVEL_KEYS if f'"{key}"' not in source and f"'{key}'" not in source]


def deepspeed_takes(key: str) -> bool:
    """Whether a key at the top is no removed one, which it asks for in order to refuse it."""
    return not deepspeed_refuses(SIZED | {key: {}}, 1)
