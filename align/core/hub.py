"""The Hugging Face Hub's names, and whether it can be asked: one quick attempt, where its client tries for a minute."""

from __future__ import annotations

import re
import threading
import urllib.error
import urllib.request
from functools import cache
from pathlib import Path

from align.core.errors import ModelError

WITHIN_S = 4.0
"""How long the Hub may take to answer at all; a name server that is out of reach is not waited for any longer."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
"""An id without its revision. The few old ids without an owner lead to one that has one; ours must say it."""


def hub_problem(name: str, data: bool = False) -> str:
    """Why something on the Hub can't be had, in words for the end of a message; empty where nothing speaks against it.

    What has been downloaded before is never asked for, nor is anything where HF_HUB_OFFLINE is set: the Hub's client
    then answers at once by itself.

    Args:
        name: a model's folder or Hub id, or a dataset's id; of a folder there is nothing to say.
        data: whether it is a dataset.
    """
    from huggingface_hub import constants

    offline, known = _dataset(name) if data else (constants.HF_HUB_OFFLINE, _model_is_here(name))
    if offline or known or Path(name).exists() or not HUB_ID.fullmatch(name):
        return ""
    problem = _unreachable(str(constants.ENDPOINT))
    if not problem:
        return ""
    return (
        f"it is no folder here and was not downloaded before, and the Hub ({constants.ENDPOINT}) can't be reached: "
        f"{problem}; check the network, give a folder, or download it elsewhere (hf download {name}) and set "
        "HF_HUB_OFFLINE=1"
    )


def check_model(name: str) -> None:
    """Refuses a model that lies on the Hub and can't be had.

    Raises:
        ModelError: see `hub_problem`.
    """
    if problem := hub_problem(name):
        raise ModelError(f"{name}: {problem}")


def _model_is_here(name: str) -> bool:
    from huggingface_hub.constants import HF_HUB_CACHE

    return any(Path(HF_HUB_CACHE).glob(f"models--{name.replace('/', '--')}/snapshots/*/*"))


def _dataset(name: str) -> tuple[bool, bool]:
    """Whether the library of datasets is told to stay offline, and whether it has this one."""
    from datasets import config

    here = any(Path(config.HF_DATASETS_CACHE).glob(f"{name.replace('/', '___')}/*"))
    return bool(config.HF_HUB_OFFLINE), here


@cache
def _unreachable(endpoint: str) -> str:
    """Why no connection to the Hub comes about; empty where one does, whatever it answers."""
    found = [f"no answer within {WITHIN_S:g} s"]

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=WITHIN_S).close()
            found[0] = ""
        except urllib.error.HTTPError:
            found[0] = ""
        except OSError as problem:
            reason = getattr(problem, "reason", problem)
            # Another client may know certificates that this one doesn't.
            found[0] = "" if "CERTIFICATE" in str(reason).upper() else str(reason) or type(reason).__name__

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(WITHIN_S)
    return found[0]
