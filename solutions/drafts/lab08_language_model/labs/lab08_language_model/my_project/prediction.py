"""What a run will hold on each rank, before it is started: the arithmetic behind `--dry-run`."""

from __future__ import annotations

from dataclasses import dataclass

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass
class Prediction:
    """Bytes of one rank, on the device that computes and in the host's memory.

    Attributes:
        states: weights, gradients and the optimizer's states.
        activations: what a forward pass keeps for the backward pass, about.
        host: states that are offloaded.
    """

    states: float
    activations: float
    host: float


def predict(parameters: int, shape, *, tokens: int, ranks: int, precision: str, zero: dict | None) -> Prediction:
    """States of Adam in mixed precision, 16 bytes a parameter in all, sharded as the ZeRO stage says (Rajbhandari et al., 2020,
    section 3). Activations of a layer are 17 numbers of the hidden size a token where attention keeps no matrix (Korthikanti et
    al., 2022, section 4.1), and 16 more for GPT-2's GELU, which is computed in four steps on four times the hidden size. For each
    entry of the logits come 16 bytes: itself, its float32 copy, the logarithm of its softmax, and the gradients.

    Args:
        parameters: of the model.
        shape: the model's configuration.
        tokens: of a rank's batch.
        zero: `zero_optimization` of the DeepSpeed file; None without DeepSpeed: then weights, gradients and Adam's two moments
            are float32, 16 bytes too, and autocast keeps a copy of the weights in half precision until the backward pass is over.
    """
    size = BYTES[precision]
    hidden, layers = shape.hidden_size, shape.num_hidden_layers
    activations = tokens * (33 * size * hidden * layers + 16 * shape.vocab_size)
    if zero is None:
        return Prediction((16 + (size if size < 4 else 0)) * parameters, activations, 0)
    stage = zero.get("stage", 0)
    weights = size * parameters / (ranks if stage >= 3 else 1)
    gradients = size * parameters / (ranks if stage >= 2 else 1)
    optimizer = 12 * parameters / (ranks if stage >= 1 else 1)

    def offloaded(name: str) -> bool:
        return zero.get(name, {}).get("device", "none") != "none"

    host = optimizer * offloaded("offload_optimizer") + weights * offloaded("offload_param")
    # With the optimizer on the host its gradients go there too, as soon as they are there.
    if offloaded("offload_optimizer"):
        host, gradients = host + 4 * parameters / ranks, 0
    device = weights * (not offloaded("offload_param")) + gradients + optimizer * (not offloaded("offload_optimizer"))
    return Prediction(device, activations, host)


def shown(number: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.4g} {unit}"
        number /= 1000
    return f"{number:.4g} GB"
