"""The steps of a run in TensorBoard, and in Weights & Biases where there is a key for it.

A key is looked for where people keep one: the environment, wandb's own login, Kaggle's secrets. It is never printed, never asked
for (a batch job would wait for ever) and never in a run folder. Without the server a run is kept offline, in the run folder, and
`wandb sync` sends it later.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import json
import netrc
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from unittest import mock
from urllib.parse import urlparse

from shardlab.run.run_folder import Run

PROJECT = "shardlab"
SECONDS = 5
"""To wait for the server of Weights & Biases."""


def _server() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").rstrip("/")


def _from_login() -> str | None:
    """What `wandb login` has written."""
    try:
        entry = netrc.netrc(os.environ.get("NETRC")).authenticators(urlparse(_server()).hostname)
    except (OSError, netrc.NetrcParseError):
        return None
    return entry and entry[2]


def _from_kaggle() -> str | None:
    if importlib.util.find_spec("kaggle_secrets") is None:
        return None
    from kaggle_secrets import UserSecretsClient

    try:
        return UserSecretsClient().get_secret("WANDB_API_KEY")
    except Exception:  # of Kaggle's own: no such secret, or it is not attached to this notebook
        return None


SOURCES = {
    "the environment, WANDB_API_KEY": lambda: os.environ.get("WANDB_API_KEY"),
    "the login of wandb": _from_login,
    "the secret WANDB_API_KEY on Kaggle": _from_kaggle,
}


def _key() -> tuple[str, str] | None:
    """Where the first key comes from, and the key."""
    return next(((source, key) for source, find in SOURCES.items() if (key := find())), None)


def is_wandb_authenticated() -> bool:
    """Whether there is a key for Weights & Biases; prints where it comes from, or what to do. Nothing is sent."""
    if found := _key():
        print(f"Weights & Biases: there is a key, from {found[0]}.")
        return True
    print(
        "Weights & Biases: no key found, so runs are tracked by TensorBoard alone. To change that: set WANDB_API_KEY, run "
        "`wandb login`, or add the secret WANDB_API_KEY on Kaggle. A key is at https://wandb.ai/authorize."
    )
    return False


def test_wandb_connection() -> bool:
    """Whether the server of Weights & Biases answers and takes the key; prints which, or what to do."""
    if not is_wandb_authenticated():
        return False
    problem, name = _asked_for_its_user(_key()[1])
    print(f"Weights & Biases: {problem}" if problem else f"Weights & Biases: {_server()} answers, and knows you as {name}.")
    return not problem


test_wandb_connection.__test__ = False  # no test of pytest's, though it has the name of one


def _asked_for_its_user(key: str) -> tuple[str, str]:
    """What keeps the server from knowing this key's user, and the user's name; one of them is empty."""
    request = urllib.request.Request(
        f"{_server()}/graphql",
        data=json.dumps({"query": "query { viewer { username } }"}).encode(),
        headers={
            "Content-Type": "application/json",
            "Authorization": "Basic " + base64.b64encode(f"api:{key}".encode()).decode(),
        },
    )
    offline = "Runs are kept offline, in their folders; `wandb sync <run folder>/wandb/offline-run-*` sends them later."
    refused = "the key is not taken. Get another at https://wandb.ai/authorize, and run `wandb login --relogin`."
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            user = (json.load(answer).get("data") or {}).get("viewer")
    except urllib.error.HTTPError as error:
        return (refused if error.code in (401, 403) else f"{_server()} answers with an error, {error.code}. {offline}"), ""
    except (OSError, ValueError) as error:
        return f"{_server()} cannot be reached ({getattr(error, 'reason', error)}). {offline}", ""
    return ("", user["username"]) if user else (refused, "")


@contextlib.contextmanager
def tracked(run: Run) -> Iterator:
    """Track a run while this lasts; on one rank only.

    TensorBoard's file goes into `tensorboard/` of the run folder. Where wandb is installed and has a key, the run is sent to the
    project `shardlab`, or kept in `wandb/` of the run folder while the server cannot be reached. WANDB_MODE (`online`, `offline`,
    `disabled`) and WANDB_PROJECT are heeded.

    Yields:
        `log(step, **numbers)`, to be called once a step.
    """
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(one) for one in (_tensorboard(run.folder), _wandb(run)) if one is not None]

        def log(step: int, **numbers: float) -> None:
            for each in logs:
                each(step, numbers)

        yield log


def _tensorboard(folder: Path):
    if importlib.util.find_spec("tensorboard") is None:
        return None

    @contextlib.contextmanager
    def writing():
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(folder / "tensorboard")) as writer:
            yield lambda step, numbers: [writer.add_scalar(name, number, step) for name, number in numbers.items()]

    return writing()


def _wandb(run: Run):
    found = _key()
    if found is None or importlib.util.find_spec("wandb") is None or os.environ.get("WANDB_MODE") == "disabled":
        return None
    key = found[1]

    @contextlib.contextmanager
    def sending():
        import wandb

        mode = os.environ.get("WANDB_MODE") or ("offline" if _asked_for_its_user(key)[0] else "online")
        # wandb reads the key from the environment; its own login it would find, and Kaggle's it would not.
        with mock.patch.dict(os.environ, {"WANDB_API_KEY": key}):
            tracking = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=run.name,
                dir=str(run.folder),
                mode=mode,
                config=run.experiment.model_dump(),
                settings=wandb.Settings(silent=True, console="off"),
            )
            status = 1
            try:
                yield lambda step, numbers: tracking.log(numbers, step=step)
                status = 0
            finally:
                tracking.finish(exit_code=status)
                # finish only asks wandb's own process to write the rest of the file; this waits until it has.
                wandb.teardown()

    return sending()
