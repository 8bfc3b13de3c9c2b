"""Values over a socket between a milestone, which judges, and the process that runs somebody's exercises.

What comes back is decoded into plain values and tensors, and nothing in it is ever executed: no pickle, no class of the other
side's. An object of another kind comes back as a `Remote`, whose attributes are asked for one by one.
"""

from __future__ import annotations

import base64
import contextlib
import enum
import itertools
import json
import select
import socket
import struct
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath

LIMIT = 64 * 2**20
"""Bytes of the largest message."""

ITEMS = 1_000_000
"""How much of an iterator or a range is taken: one that never ends is not waited for."""


class WireError(RuntimeError):
    """The other side has sent what is no message, or nothing."""


class Gone(WireError):
    """The other side has closed its end, or its process has ended."""


class WireTimeout(WireError):
    """Nothing came in the given time."""


class Remote:
    """An object that stays on the other side. `Remote.attribute` asks for an attribute, `Remote(...)` calls it."""

    def __init__(self, ask: Callable, number: int, kind: str, text: str):
        self.__dict__.update(_ask=ask, _number=number, _kind=kind, _text=text)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask({"op": "attribute", "of": self._number, "name": name})

    def __call__(self, *args, **kwargs):
        return self._ask({"op": "call", "of": self._number}, args, kwargs)

    def __repr__(self) -> str:
        return self._text


class Codec:
    """One side of a connection: what it has lent to the other side, by number, and how values become JSON.

    Args:
        ask: sends a request and returns the decoded answer; only the judging side has one.
        callback: called as `callback(number, args, kwargs)` where a function of the judging side is called; only the other has one.
    """

    def __init__(self, ask: Callable | None = None, callback: Callable | None = None):
        self.ask, self.callback = ask, callback
        self.lent: dict[int, object] = {}
        self._numbers: dict[int, int] = {}
        self._received: dict[int, object] = {}

    def lend(self, value) -> int:
        if id(value) not in self._numbers:
            number = len(self.lent)
            self._numbers[id(value)], self.lent[number] = number, value
        return self._numbers[id(value)]

    # --- to JSON -----------------------------------------------------------------------------------------------------

    def encode(self, value):
        """`value` as JSON's types. Whatever is not a plain value, a tensor or one of the course's own becomes a number here."""
        if isinstance(value, enum.Enum):
            value = value.value
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return float(value)
        if isinstance(value, list):
            return [self.encode(entry) for entry in value]
        if isinstance(value, Mapping):
            return {"$": "dict", "items": [[self.encode(key), self.encode(entry)] for key, entry in value.items()]}
        if isinstance(value, tuple):
            return {"$": "tuple", "items": [self.encode(entry) for entry in value]}
        if isinstance(value, set | frozenset):
            return {"$": "set", "items": [self.encode(entry) for entry in value]}
        if isinstance(value, range):
            return {"$": "range", "of": [value.start, value.stop, value.step]}
        if isinstance(value, bytes | bytearray):
            return {"$": "bytes", "data": base64.b64encode(value).decode()}
        if isinstance(value, PurePath):
            return {"$": "path", "text": str(value)}
        return self._encode_object(value)

    def _encode_object(self, value):
        import numpy
        import torch
        from transformers import PreTrainedModel, PreTrainedTokenizerBase

        from shardlab.run.experiment import Experiment
        from shardlab.run.run_folder import Run

        if isinstance(value, torch.Tensor):
            return {"$": "tensor", "data": _encode_tensors({"": value})}
        if isinstance(value, numpy.ndarray | numpy.generic) and value.dtype.kind in "biufc":
            array = numpy.ascontiguousarray(value)
            return {"$": "numpy", "dtype": array.dtype.str, "shape": list(numpy.shape(value)), "data": _text(array.tobytes())}
        if isinstance(value, Experiment):
            return {"$": "experiment", "json": value.model_dump_json()}
        if isinstance(value, Run):
            return {"$": "run", "folder": str(value.folder)}
        if self.ask is not None:  # the judging side lends what it made itself
            if isinstance(value, Remote):
                return {"$": "lent", "number": value._number}
            if isinstance(value, PreTrainedTokenizerBase):
                return {"$": "tokenizer"}
            if isinstance(value, PreTrainedModel):
                known = id(value) in self._numbers
                return {"$": "model", "number": self.lend(value)} | ({} if known else _encode_model(value))
            if callable(value):
                return {"$": "function", "number": self.lend(value)}
            raise TypeError(f"{type(value).__name__} cannot be sent to somebody's exercises")
        if hasattr(value, "__next__"):
            return {"$": "iterator", "items": [self.encode(entry) for entry in itertools.islice(value, ITEMS)]}
        return {
            "$": "object",
            "number": self.lend(value),
            "kind": f"{type(value).__module__}.{type(value).__qualname__}",
            "text": _short(value),
            "callable": callable(value),
        }

    # --- from JSON ---------------------------------------------------------------------------------------------------

    def decode(self, message):
        """The value that `encode`'s JSON stands for.

        Raises:
            WireError: it is not of that form.
        """
        try:
            return self._decode(message)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError, OverflowError) as error:
            raise WireError(f"the answer is no message: {type(error).__name__}: {error}") from None

    def _decode(self, message):
        if isinstance(message, list):
            return [self._decode(entry) for entry in message]
        if not isinstance(message, dict):
            return message
        match message["$"]:
            case "dict":
                return {self._decode(key): self._decode(value) for key, value in message["items"]}
            case "tuple":
                return tuple(self._decode(entry) for entry in message["items"])
            case "set":
                return {self._decode(entry) for entry in message["items"]}
            case "iterator":
                return iter([self._decode(entry) for entry in message["items"]])
            case "range":
                numbers = range(*message["of"])
                if len(numbers) > ITEMS:
                    raise ValueError(f"a range of {len(numbers):,} numbers")
                return numbers
            case "bytes":
                return base64.b64decode(message["data"])
            case "path":
                return Path(message["text"])
            case "tensor":
                return _decode_tensors(message["data"])[""]
            case "numpy":
                import numpy

                dtype = numpy.dtype(message["dtype"])
                if dtype.kind not in "biufc":
                    raise ValueError(f"dtype {dtype}")
                array = numpy.frombuffer(base64.b64decode(message["data"]), dtype=dtype).reshape(message["shape"])
                return array.copy() if message["shape"] else array[()]
            case "experiment":
                from shardlab.run.experiment import Experiment

                return Experiment.model_validate_json(message["json"])
            case "run" if self.ask is None:
                from shardlab.run.run_folder import Run

                return Run.read(message["folder"])
            case "object" if self.ask is not None:
                return Remote(self.ask, int(message["number"]), str(message["kind"]), str(message["text"])[:400])
            case "lent" if self.ask is None:
                return self.lent[message["number"]]
            case "tokenizer" if self.ask is None:
                from shardlab.data.models import load_tokenizer

                return load_tokenizer()
            case "model" if self.ask is None:
                return self._decode_model(message)
            case "function" if self.ask is None:
                number = message["number"]
                return lambda *args, **kwargs: self.callback(number, args, kwargs)
            case kind:
                raise ValueError(f"a value of kind {kind!r}")

    def _decode_model(self, message):
        if message["number"] not in self._received:
            from transformers import BloomConfig, BloomForCausalLM

            model = BloomForCausalLM(BloomConfig(**json.loads(message["config"])))
            model.load_state_dict(_decode_tensors(message["weights"]), strict=False)
            self._received[message["number"]] = model.train(message["training"])
        return self._received[message["number"]]


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _short(value) -> str:
    try:
        return repr(value)[:400]
    except Exception as error:
        return f"<{type(value).__name__}, whose repr() raises {type(error).__name__}>"


def _encode_tensors(tensors: dict) -> str:
    from safetensors.torch import save

    return _text(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def _decode_tensors(data: str) -> dict:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(base64.b64decode(data))
    except SafetensorError as error:
        raise ValueError(str(error)) from None


def _encode_model(model) -> dict:
    tied = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        "config": model.config.to_json_string(use_diff=False),
        "weights": _encode_tensors({name: value for name, value in model.named_parameters() if tied[id(value)] == name}),
        "training": model.training,
    }


# --- messages ---------------------------------------------------------------------------------------------------------


def send(connection: socket.socket, message: dict, deadline: float | None = None) -> None:
    """Send one message whole.

    Raises:
        Gone: the other side has gone.
        WireTimeout: it does not read.
    """
    data = json.dumps(message).encode()
    rest = memoryview(struct.pack(">Q", len(data)) + data)
    while rest:
        _wait(connection, deadline, writing=True)
        try:
            rest = rest[connection.send(rest[: 2**20], socket.MSG_DONTWAIT) :]
        except BlockingIOError:
            continue
        except OSError as error:
            raise Gone(f"the other side has gone ({error.strerror})") from None


def receive(connection: socket.socket, deadline: float | None = None) -> dict:
    """The next message.

    Raises:
        WireTimeout: it did not come before `deadline` (of `time.monotonic()`).
        Gone: the other side has gone.
        WireError: it has sent something else.
    """
    (length,) = struct.unpack(">Q", _read(connection, 8, deadline))
    if length > LIMIT:
        raise WireError(f"a message of {length:,} bytes; {LIMIT:,} are allowed")
    try:
        message = json.loads(_read(connection, length, deadline))
    except (ValueError, RecursionError, UnicodeDecodeError) as error:
        raise WireError(f"the answer is no message: {type(error).__name__}") from None
    if not isinstance(message, dict):
        raise WireError("the answer is no message")
    return message


def _read(connection: socket.socket, length: int, deadline: float | None) -> bytes:
    data = bytearray()
    while len(data) < length:
        _wait(connection, deadline)
        try:
            part = connection.recv(min(length - len(data), 2**20))
        except OSError as error:
            raise Gone(f"the other side has gone ({error.strerror})") from None
        if not part:
            raise Gone("the other side has gone")
        data += part
    return bytes(data)


def _wait(connection: socket.socket, deadline: float | None, writing: bool = False) -> None:
    left = None if deadline is None else deadline - time.monotonic()
    if left is not None and left <= 0:
        raise WireTimeout("nothing came in time")
    ready = select.select([] if writing else [connection], [connection] if writing else [], [], left)
    if not (ready[0] or ready[1]):
        raise WireTimeout("nothing came in time")


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


def send_with_end(connection: socket.socket, message: dict, end: socket.socket) -> None:
    """Send a short message together with one end of a new connection."""
    socket.send_fds(connection, [json.dumps(message).encode() + b"\n"], [end.fileno()])


def receive_with_end(connection: socket.socket) -> tuple[dict, socket.socket] | None:
    """What `send_with_end` sent; None where the other side has gone."""
    data, ends, _, _ = socket.recv_fds(connection, 2**16, 1)
    while data and not data.endswith(b"\n"):
        more, _, _, _ = socket.recv_fds(connection, 2**16, 0)
        if not more:
            return None
        data += more
    if not data:
        return None
    return json.loads(data), socket.socket(fileno=ends[0])


# --- errors -------------------------------------------------------------------------------------------------------------


class RemoteError(Exception):
    """An error in somebody's exercises.

    Attributes:
        kind: the name of its type.
        places: their own lines that it came through.
        exercise_call: the call that raised it, for reading.
    """

    kind, places, exercise_call = "Exception", (), ""


def described(error: BaseException, folder: str = "") -> dict:
    """An error in plain values, for `rebuilt` on the other side.

    Args:
        error: what was raised.
        folder: whose lines of the traceback go with it; none by default.
    """
    try:
        text = str(error)
    except Exception:  # an error of the exercises' own, whose text is their code too; it is still reported, by its type
        text = "(its text cannot be read)"
    frames = traceback.extract_tb(error.__traceback__) if folder else []
    places = [f"{Path(f.filename).name}, line {f.lineno}: {f.line}" for f in frames if f.filename.startswith(folder)]
    call = vars(error).get("exercise_call", "")  # not `getattr`, which can be the exercises' code
    told = {"kinds": [kind.__name__ for kind in type(error).__mro__], "text": text[:10_000], "places": places[-20:]}
    return told | {"call": call[:400] if type(call) is str else ""}


def rebuilt(told) -> Exception:
    """The error that a box described: of the first built-in type among its types that takes a text, else a `RemoteError`.

    Args:
        told: the answer; anything at all.
    """
    import builtins

    kinds = [str(kind)[:100] for kind in told.get("kinds", [])][:50] if isinstance(told, dict) else []
    text = str(told.get("text", ""))[:10_000] if isinstance(told, dict) else ""
    made: Exception = RemoteError(f"{kinds[0] if kinds else 'an error'}: {text}" if text else kinds[0] if kinds else "an error")
    for kind in kinds:
        found = getattr(builtins, kind, None)
        if isinstance(found, type) and issubclass(found, Exception) and found is not Exception:
            with contextlib.suppress(Exception):
                made = found(text)
                break
    made.places = [str(place)[:300] for place in told.get("places", [])][-20:] if isinstance(told, dict) else []
    made.kind = kinds[0] if kinds else "Exception"
    made.exercise_call = str(told.get("call", ""))[:400] if isinstance(told, dict) else ""
    return made
