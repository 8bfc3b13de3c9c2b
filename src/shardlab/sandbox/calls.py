"""A call of an exercise, and what is wrong with it whatever the task: arguments changed, a `return` forgotten, a result shared."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import types
from collections.abc import Callable, Mapping
from pathlib import Path

from shardlab.sandbox.settings_of_process import put_back, settings_of_process

PLAIN = (str, int, float, bool, bytes, types.NoneType)


class CallAtFault(AssertionError):
    """What a call did that no exercise may; its text is a message. Of a built-in type, so that it leaves a box as one."""


def watched(function: Callable) -> Callable:
    """The function, with its calls looked at.

    Lists and dictionaries of plain values must be the same afterwards, and the settings of a tokenizer, a model, a trainer and of
    the process: who calls with the same ones again would get something else. What is returned must be new each time: who changes
    one result would change another. A function that says what it returns must not return None.

    Raises:
        CallAtFault: by the returned function, when a call did one of these.
    """
    name = getattr(function, "__name__", "the function")

    @functools.wraps(function)
    def call(*args, **kwargs):
        given = {**dict(enumerate(args, 1)), **kwargs}
        before = {key: noted for key, value in given.items() if (noted := _noted(value)) is not None}
        process = settings_of_process()

        def look() -> None:
            for setting, was, now in put_back(process)[:1]:
                raise CallAtFault(
                    f"expected  {name}() to leave the settings of the whole process as they were: others compute in it too\n"
                    f"got       {setting} changed from {_short(was)} to {_short(now)}"
                )
            for key, was in before.items():
                if (now := _noted(given[key])) != was:
                    raise CallAtFault(
                        f"expected  {name}() to leave what it is given as it was\n"
                        f"got       {f'argument number {key}' if isinstance(key, int) else key} was changed {_change(was, now)}\n"
                        "likely    something changed in place (append, pop, +=, update, an entry or a setting set): make a new one"
                    )

        try:
            result = function(*args, **kwargs)
        except Exception as error:
            look()
            with contextlib.suppress(Exception):  # an error of the exercises' own may refuse it
                error.exercise_call = shown_call(name, args, kwargs)
            raise
        look()
        if result is None and _promises_a_value(function):
            raise CallAtFault(
                f"expected  {name}() to return what its docstring says\ngot       None\n"
                "likely    `return` is missing, at its end or on one of the ways through it"
            )
        _look_for_shared(name, function, result, list(given.values()))
        return result

    return call


def is_exercise(found) -> bool:
    """Whether what a module holds under a name is called as a function is: `@cache` and `partial` make objects of functions."""
    return callable(found) and not isinstance(found, type)


def shown_call(name: str, args: tuple, kwargs: dict) -> str:
    """A call as a message shows it: plain values shortened, and of everything else its type."""

    def shown(value) -> str:
        if isinstance(value, PLAIN) or is_plain_container(value):
            return _short(value)
        return f"<{type(value).__name__}>" if not isinstance(value, Path) else repr(str(value))

    return f"{name}({', '.join([*map(shown, args), *(f'{key}={shown(value)}' for key, value in kwargs.items())])})"


def watched_class(kind: type) -> type:
    """A class like this one, with the calls of its own methods looked at."""
    methods = {name: watched(found) for name, found in vars(kind).items() if inspect.isfunction(found) and not name.startswith("_")}
    return type(kind.__name__, (kind,), methods)


class WatchedModule:
    """A module of exercises, with calls of its functions and methods looked at, for programs that run where they are."""

    def __init__(self, module: types.ModuleType):
        self._module = module

    def __getattr__(self, name: str):
        found = getattr(self._module, name)
        if is_exercise(found):
            return watched(found)
        return watched_class(found) if getattr(found, "__module__", "") == self._module.__name__ else found


def _noted(value):
    """What must be the same after a call; None if nothing of this value."""
    if is_plain_container(value):
        return copy.deepcopy(value)
    if hasattr(value, "padding_side"):  # a tokenizer
        names = ("model_max_length", "padding_side", "truncation_side", "special_tokens_map", "chat_template")
        return {name: str(getattr(value, name, None)) for name in names}
    if type(value).__module__.startswith("transformers."):
        if hasattr(value, "named_parameters"):
            return _settings_of_model(value)
        if hasattr(value, "processing_class"):
            return _settings_of_trainer(value)
    return None


def _settings_of_model(model) -> dict[str, str]:
    """A model's own settings, and which parameters are trained. Type and place of its weights are an engine's to change.

    What saving notes in a configuration is left out.
    """
    noted = ("dtype", "architectures", "transformers_version")
    found = {f"config.{name}": str(setting) for name, setting in model.config.to_dict().items() if name not in noted}
    if getattr(model, "generation_config", None) is not None:
        found |= {f"generation_config.{name}": str(setting) for name, setting in model.generation_config.to_dict().items()}
    found |= {f"requires_grad of {name}": str(parameter.requires_grad) for name, parameter in model.named_parameters()}
    return found | {"gradient checkpointing": str(model.is_gradient_checkpointing)}


def _settings_of_trainer(trainer) -> dict[str, str]:
    """A trainer's arguments, and which objects are its parts."""
    parts = (
        "model",
        "model_wrapped",
        "optimizer",
        "lr_scheduler",
        "train_dataset",
        "eval_dataset",
        "data_collator",
        "processing_class",
    )
    found = {f"args.{name}": str(setting) for name, setting in trainer.args.to_dict().items()}
    found |= {name: f"{type(part).__name__} {id(part)}" for name in parts for part in [getattr(trainer, name, None)]}
    found["callbacks"] = str([type(callback).__name__ for callback in trainer.callback_handler.callbacks])
    found |= {"model.training": str(trainer.model.training), "state.global_step": str(trainer.state.global_step)}
    found["state.log_history"] = f"{len(trainer.state.log_history)} entries"
    return found | {f"model.{name}": setting for name, setting in _settings_of_model(trainer.model).items()}


def _change(was, now) -> str:
    if isinstance(was, dict) and isinstance(now, dict) and was.keys() == now.keys():
        key = next(key for key in was if was[key] != now[key])
        return f"at {key!r}, from {_short(was[key])} to {_short(now[key])}"
    return f"from {_short(was)} to {_short(now)}"


def _look_for_shared(name: str, function: Callable, result, given: list) -> None:
    earlier = getattr(function, "_shardlab_results", [])
    theirs = {part for value in given for part in _parts(value)}
    mine = [part for part in _parts(result) if part not in theirs]
    if any(not parts.isdisjoint(mine) for _, parts in earlier):
        raise CallAtFault(
            f"expected  {name}() to return something new at each call\n"
            "got       a list, dictionary or tensor that an earlier call has returned too: who changes the one changes the other\n"
            "likely    it is kept outside of the function (a global, a default argument, @cache)"
        )
    for kind, called in (("dict", "dictionary"), ("tensor", "tensor")):
        of_kind = [part for part in mine if part[0] == kind]
        if len(of_kind) != len(set(of_kind)):
            raise CallAtFault(
                f"expected  {name}() to return a {called} of its own at each place\n"
                f"got       one and the same {called} at two places of the result: who changes the one changes the other\n"
                "likely    it was made once and entered twice"
            )
    # As long as they are kept here, nothing new can get their places in memory.
    with contextlib.suppress(AttributeError):  # an object that takes none
        function._shardlab_results = [*earlier[-11:], (result, set(mine))]


def _parts(value, depth: int = 6) -> list[tuple[str, int]]:
    """What can be changed in a value: its lists, dictionaries and sets, and the memory of its tensors."""
    if hasattr(value, "untyped_storage"):
        place = value.untyped_storage().data_ptr()
        return [("tensor", place)] if place else []
    if depth == 0 or not isinstance(value, list | tuple | set | dict):
        return []
    inner = value.values() if isinstance(value, dict) else value
    own = [] if isinstance(value, tuple) else [("dict" if isinstance(value, dict) else "list", id(value))]
    return own + [part for entry in inner if not isinstance(entry, PLAIN) for part in _parts(entry, depth - 1)]


def is_plain_container(value, depth: int = 6) -> bool:
    """Whether a value is a list, dictionary, tuple or set of plain values only, so that it can be copied and compared."""
    if depth == 0:
        return False
    if isinstance(value, list | tuple | set):
        return all(isinstance(entry, PLAIN) or is_plain_container(entry, depth - 1) for entry in value)
    if isinstance(value, Mapping):
        return all(isinstance(entry, PLAIN) or is_plain_container(entry, depth - 1) for entry in value.values())
    return False


def _promises_a_value(function: Callable) -> bool:
    try:
        promised = inspect.signature(function).return_annotation
    except (TypeError, ValueError):
        return False
    text = promised if isinstance(promised, str) else getattr(promised, "__name__", str(promised))
    return promised is not inspect.Signature.empty and promised is not None and "None" not in text and "Any" not in text


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} …"
