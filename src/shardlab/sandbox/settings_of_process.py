"""The settings of a whole process that an exercise must leave alone: whoever runs next in it would get something else."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple


class Setting(NamedTuple):
    """One setting.

    Attributes:
        name: as a message says it.
        module: that has it. Where it is not imported, nobody has changed it.
        read: its value, of the module.
        write: sets it again; None where nothing does.
    """

    name: str
    module: str
    read: Callable[[ModuleType], object]
    write: Callable[[ModuleType, object], object] | None = None


def _set_default_device(torch: ModuleType, device) -> None:
    torch.set_default_device(None if device.type == "cpu" else device)


def _current_folder(os_: ModuleType) -> str:
    try:
        return os_.getcwd()
    except FileNotFoundError:
        return "one that is gone"


def _hidden_warnings(warnings: ModuleType) -> list[str]:
    """The kinds of warnings that are hidden whatever they say and whoever warns; Python hides some by itself."""
    return sorted(
        {kind.__name__ for action, said, kind, module, _ in warnings.filters if action == "ignore" and not (said or module)}
    )


def _cudnn(torch: ModuleType) -> dict[str, bool]:
    return {name: getattr(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic", "allow_tf32")}


def _plain(name: str, module: str, read: str, write: str = "") -> Setting:
    """A setting with a function of the module that reads it, and one that sets it."""
    return Setting(name, module, lambda of: getattr(of, read)(), (lambda of, was: getattr(of, write)(was)) if write else None)


SETTINGS = (
    Setting("the current folder", "os", _current_folder, lambda os_, was: os_.chdir(was)),
    Setting("whether garbage is collected", "gc", lambda gc: gc.isenabled(), lambda gc, was: gc.enable() if was else gc.disable()),
    Setting("which kinds of warnings are hidden", "warnings", _hidden_warnings),
    Setting("the level below which nothing is logged", "logging", lambda logging: logging.root.manager.disable),
    Setting("what SIGINT does", "signal", lambda of: of.getsignal(signal.SIGINT)),
    Setting("what SIGTERM does", "signal", lambda of: of.getsignal(signal.SIGTERM)),
    _plain("Python's limit of recursion", "sys", "getrecursionlimit", "setrecursionlimit"),
    _plain("whether torch records gradients", "torch", "is_grad_enabled", "set_grad_enabled"),
    _plain("torch's inference mode", "torch", "is_inference_mode_enabled"),
    _plain("torch's default type", "torch", "get_default_dtype", "set_default_dtype"),
    Setting("torch's default device", "torch", lambda torch: torch.get_default_device(), _set_default_device),
    _plain(
        "whether torch's algorithms are deterministic",
        "torch",
        "are_deterministic_algorithms_enabled",
        "use_deterministic_algorithms",
    ),
    _plain("the precision of torch's products", "torch", "get_float32_matmul_precision", "set_float32_matmul_precision"),
    Setting("torch.backends.cudnn", "torch", _cudnn),
    _plain("torch's search for anomalies", "torch", "is_anomaly_enabled"),
    Setting("autocast", "torch", lambda torch: [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")]),
    _plain("torch's number of threads", "torch", "get_num_threads", "set_num_threads"),
    _plain("how much transformers says", "transformers.utils.logging", "get_verbosity", "set_verbosity"),
)


def settings_of_process() -> dict[str, object]:
    """What is set for all of this process now, by name; environment variables as $NAME."""
    found = {setting.name: setting.read(sys.modules[setting.module]) for setting in SETTINGS if setting.module in sys.modules}
    # scikit-learn sets variables of OpenMP, KMP_…, when it is imported.
    return found | {f"${name}": value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "KMP_"))}


def put_back(before: dict[str, object]) -> list[tuple[str, object, object]]:
    """Set again what is no longer as it was, and say what that was, so that nobody is told of another one's change.

    Returns:
        (name, value before, value now) of each change; None for a variable that is or was not set.
    """
    now = settings_of_process()
    known = [setting for setting in SETTINGS if setting.name in before]
    changed = [
        (setting.name, before[setting.name], now[setting.name]) for setting in known if before[setting.name] != now[setting.name]
    ]
    for setting in known:
        if setting.write and before[setting.name] != now[setting.name]:
            setting.write(sys.modules[setting.module], before[setting.name])
    for name in sorted({name for name in (*before, *now) if name.startswith("$")}):
        was, is_ = before.get(name), now.get(name)
        if was != is_:
            changed.append((name, was, is_))
            if was is None:
                del os.environ[name[1:]]
            else:
                os.environ[name[1:]] = str(was)
    return changed
