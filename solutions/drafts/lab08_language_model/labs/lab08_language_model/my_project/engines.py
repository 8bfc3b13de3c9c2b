"""What trains a model: DeepSpeed, or torch alone, used alike."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR


def device_of_rank() -> torch.device:
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")


def free_bytes(device: torch.device) -> int:
    """What is free on a GPU, or of the machine's memory (Linux)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return 1024 * int(lines["MemAvailable"].split()[0])


def nothing_compiled() -> bool:
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    return not any(folder.rglob("*.so"))


def start_ranks(deepspeed: bool) -> torch.device:
    """Join the ranks that `torchrun` or `deepspeed` has started. Under `python` there is one, which DeepSpeed wants to meet too."""
    if "RANK" not in os.environ and deepspeed:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    device = device_of_rank()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if deepspeed:
        if os.environ["RANK"] == "0" and nothing_compiled():
            print("DeepSpeed compiles what it needs at its first use: some minutes, once", flush=True)
        from deepspeed import init_distributed

        init_distributed(backend)  # torch's ranks, and DeepSpeed's view of them, which ZeRO-3 asks when a model is loaded
    elif "RANK" in os.environ:
        dist.init_process_group(backend)
    return device


def precision_of(device: torch.device) -> str:
    """bf16 on a GPU that has it, fp16 on one that has not (V100, T4), fp32 on the CPU. Emulated bf16 is slower than either."""
    if device.type == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def falling(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """A learning rate that falls to 0 in a straight line."""
    return LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))


class PlainEngine:
    """torch alone, with the calls of a DeepSpeed engine: AdamW, gradients clipped at 1, and on several ranks DDP.

    Attributes:
        module: the model.
    """

    def __init__(self, model, device: torch.device, learning_rate: float, steps: int):
        self.module, self.device = model.to(device), device
        self.net = self.module
        if dist.is_initialized() and dist.get_world_size() > 1:
            # Without the view each gradient is there twice: in its bucket too.
            self.net = torch.nn.parallel.DistributedDataParallel(self.module, gradient_as_bucket_view=True)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=learning_rate)
        self.schedule = falling(self.optimizer, steps)
        self.precision = precision_of(device)
        self.scaler = torch.amp.GradScaler(enabled=self.precision == "fp16")

    @property
    def training(self) -> bool:
        return self.module.training

    def train(self, mode: bool = True) -> None:
        self.net.train(mode)

    def eval(self) -> None:
        self.net.eval()

    def __call__(self, **inputs):
        types = {"fp16": torch.float16, "bf16": torch.bfloat16}
        half = types.get(self.precision)
        with torch.autocast(self.device.type, half) if half else contextlib.nullcontext():
            return (self.net if self.training else self.module)(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self) -> None:
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad()

    def _parts(self) -> dict:
        return {"model": self.module, "optimizer": self.optimizer, "schedule": self.schedule, "scaler": self.scaler}

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool = True) -> None:
        if not dist.is_initialized() or dist.get_rank() == 0:
            torch.save({name: part.state_dict() for name, part in self._parts().items()}, Path(folder, tag, "plain.pt"))

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str | None, dict]:
        path = Path(folder, tag, "plain.pt")
        if not path.exists():
            return None, {}
        found = torch.load(path, map_location=self.device, weights_only=True)
        for name, part in self._parts().items():
            part.load_state_dict(found[name])
        return str(path), {}


def file_of(path: str) -> dict:
    """A DeepSpeed file.

    Raises:
        ValueError: it is no JSON; the sentence names the file.
    """
    try:
        return json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None


def filled_in(path: str, *, batch_size: int, ranks: int, precision: str, learning_rate: float) -> dict:
    """A DeepSpeed file whose "auto" are numbers."""
    config = file_of(path)
    values = {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": 1,
        "train_batch_size": batch_size * ranks,
        "gradient_clipping": 1.0,
    }
    for name, value in values.items():
        if config.get(name, "auto") == "auto":
            config[name] = value
    for name in ("fp16", "bf16"):
        if config.get(name, {}).get("enabled") == "auto":
            config[name]["enabled"] = precision == name
    if config.get("optimizer", {}).get("params", {}).get("lr") == "auto":
        config["optimizer"]["params"]["lr"] = learning_rate
    return config


def precision_in_use(engine, device: torch.device) -> str:
    """What the engine computes in: a DeepSpeed file may say something else than the device would get."""
    if isinstance(engine, PlainEngine):
        return engine.precision
    return "fp16" if engine.fp16_enabled() else "bf16" if engine.bfloat16_enabled() else "fp32"


def deepspeed_engine(model, config: dict, steps: int):
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
        config=config,
        lr_scheduler=lambda optimizer: falling(optimizer, steps),
    )
    return engine
