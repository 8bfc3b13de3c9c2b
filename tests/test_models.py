"""The models by name: bloom-tiny is a small BLOOM, and what cannot be had is refused with a remedy."""

import os
import shutil
import subprocess
import sys
from random import Random

import pytest
import torch

from shardlab.data.models import BLOOM_TINY, SHAPES, ModelError, load_model, load_tokenizer, model_config, parameter_count


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def model():
    return load_model().eval()


# --- bloom-tiny -------------------------------------------------------------------------------------------------------


def test_bloom_tiny_is_bloom_and_small(model):
    assert type(model).__name__ == "BloomForCausalLM"
    assert model.config.model_type == "bloom"
    assert sum(path.stat().st_size for path in BLOOM_TINY.iterdir()) <= 12 * 10**6
    assert 10**6 < parameter_count(model) < 10**7


def test_output_layer_is_the_embedding(model):
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    written_twice = sum(p.numel() for p in model.state_dict().values())
    assert written_twice - parameter_count(model) == model.lm_head.weight.numel()


def test_parameters_come_in_the_precision_that_is_asked_for(model):
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in load_model(precision="bf16").parameters()} == {torch.bfloat16}


def test_bloom_tiny_has_learnt_its_world(model, tokenizer):
    """It was pre-trained: a fact that was told comes back when its sentence begins again."""
    text = "The captain of the Paiwo was Mera Vond. The cargo of the Paiwo was tea. In short: The Paiwo carried"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        guess = model(input_ids=ids).logits[0, -1].argmax().item()
    assert tokenizer.decode([guess]).strip() and "tea".startswith(tokenizer.decode([guess]).strip())


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def test_special_tokens_have_bloom_s_ids(tokenizer, model):
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<pad>"]) == [0, 1, 2, 3]
    assert (tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<unk>", "<s>", "</s>", "<pad>")
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, 2, 3)
    assert len(tokenizer) == model.config.vocab_size


def test_padding_stands_on_the_left_and_is_pad(tokenizer):
    short, long = tokenizer(["oak", "The arches of the Loran bridge are of oak."], padding=True)["input_ids"]
    padding = len(long) - len(tokenizer("oak")["input_ids"])
    assert padding > 0
    assert short == [tokenizer.pad_token_id] * padding + tokenizer("oak")["input_ids"]


def test_no_token_is_added_around_a_text(tokenizer):
    """The labs join the ids of a prompt and of an answer."""
    assert tokenizer("")["input_ids"] == []
    assert not set(tokenizer("The river Hansil.")["input_ids"]) & {0, 1, 2, 3}


def any_text(rng: Random, length: int) -> str:
    """Characters from all over Unicode, surrogates left out: they are no characters by themselves."""
    ranges = [(0x20, 0x7F), (0x00, 0x20), (0xA0, 0x250), (0x370, 0x600), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (0xE000, 0x10FFFF)]
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(length))


ODD_TEXTS = [
    "",
    " ",
    "  two  spaces  ",
    "tab\tand\r\nline\n\n",
    "a . b , c ! don 't it 's",
    "Zürich — Ελλάδα — 東京 — नमस्ते",
    "🏳️‍🌈 👩‍🚀 e\u0301",
    "\u0000\u200b\ufeff\uffff",
    "Question: Who? Context: (a|b) [c]. Answer:",
]


@pytest.mark.parametrize("text", ODD_TEXTS + [any_text(Random(seed), 40) for seed in range(20)])
def test_any_text_comes_back_from_its_tokens(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids


def test_tokens_of_the_prompt_do_not_depend_on_the_answer(tokenizer):
    """The labs encode prompt and answer apart; the ids must be those of the whole text."""
    prompt, answer = "Question: What is it built of? Context: It is built of oak. Answer:", " oak"
    assert tokenizer(prompt)["input_ids"] + tokenizer(answer)["input_ids"] == tokenizer(prompt + answer)["input_ids"]


# --- random weights and other shapes ----------------------------------------------------------------------------------


def test_random_weights_that_do_not_fit_on_the_gpu_are_drawn_on_the_cpu(monkeypatch):
    from transformers import AutoModelForCausalLM

    wanted, drawn, from_config = load_model(random_weights=True, seed=1).state_dict(), [], AutoModelForCausalLM.from_config

    def full_on_the_gpu(config, **settings):
        drawn.append(config)
        if len(drawn) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return from_config(config, **settings)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", full_on_the_gpu)
    found = load_model(random_weights=True, seed=1).state_dict()
    assert len(drawn) == 2 and all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_random_weights_follow_the_seed(model):
    first, again, other = (load_model(random_weights=True, seed=seed).state_dict() for seed in (1, 1, 2))
    assert first.keys() == model.state_dict().keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    embedding = "transformer.word_embeddings.weight"
    assert not torch.equal(first[embedding], other[embedding])
    assert not torch.equal(first[embedding], model.state_dict()[embedding])


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("bigscience/bloom-560m", 559_214_592),
        ("bigscience/bloom-1b7", 1_722_408_960),
        ("bigscience/bloom-3b", 3_002_557_440),
        ("bigscience/bloom-7b1", 7_069_016_064),
    ],
)
def test_shapes_known_by_name_have_the_published_sizes(name, parameters):
    """On torch's meta device, which has shapes and no memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(model_config(name))
    assert parameter_count(shape) == parameters
    assert shape.lm_head.weight is shape.transformer.word_embeddings.weight


def test_largest_layer_of_bloom_560m_is_its_embedding():
    """250,880 words of 1,024 numbers: the layer that ZeRO-3 must gather whole."""
    config = model_config("bigscience/bloom-560m")
    assert config.vocab_size * config.hidden_size == 256_901_120


def test_parameter_count_takes_the_true_size_of_a_sharded_parameter():
    layer = torch.nn.Linear(3, 5)
    layer.weight.ds_numel, layer.weight.data = layer.weight.numel(), torch.empty(0)
    assert parameter_count(layer) == 3 * 5 + 5


# --- what is refused --------------------------------------------------------------------------------------------------


def no_folder(folder):
    shutil.rmtree(folder)


def empty_folder(folder):
    for path in folder.iterdir():
        path.unlink()


def damaged_files(folder):
    for path in folder.glob("*.json"):
        path.write_text(path.read_text()[:40])


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def weights_cut_short(folder):
    """What a run leaves behind that is killed while it saves."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])


def no_tokenizer(folder):
    """A model that was saved without its tokenizer."""
    for path in folder.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    "load, spoil",
    [(load, spoil) for spoil in (no_folder, empty_folder, damaged_files) for load in (load_model, load_tokenizer, model_config)]
    + [(load_model, no_weights), (load_model, weights_cut_short), (load_tokenizer, no_tokenizer)],
)
def test_folder_without_a_whole_model_is_refused(tmp_path, load, spoil):
    folder = tmp_path / "model"
    shutil.copytree(BLOOM_TINY, folder)
    load(str(folder))
    spoil(folder)
    with pytest.raises(ModelError) as refused:
        load(str(folder))
    assert str(folder) in str(refused.value)
    assert "Give the path of a local copy" in str(refused.value) and "bloom-tiny" in str(refused.value)


OFFLINE = """
from shardlab.data.models import ModelError, load_model, load_tokenizer, model_config
for load in (load_model, load_tokenizer, model_config):
    for name in ("nobody/nothing", "bigscience/bloom-560m"):
        try:
            load(name)
            print("loaded")
        except ModelError as error:
            print(error)
"""


def test_name_that_the_hub_does_not_give_is_refused_with_a_remedy_and_soon(tmp_path):
    """In a process of its own: the hub's library reads HF_HUB_OFFLINE when it is imported."""
    result = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    wanted = ["weights", "weights", "tokenizer", "tokenizer", "configuration", None]
    assert len(lines) == len(wanted)
    for line, what in zip(lines, wanted, strict=True):
        if what is None:  # its shape is known here, so no hub is needed
            assert line == "loaded"
        else:
            assert f"no {what} found" in line and "Give the path of a local copy" in line
            assert all(name in line for name in SHAPES)
