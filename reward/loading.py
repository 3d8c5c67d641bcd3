"""Loading what a reward model is made of: weights under either head, a LoRA adapter's too, and a tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from align.core.errors import ModelError, RecipeError
from align.core.hub import check_model, hub_problem

Head = Literal["scalar", "logprob"]


def device_of(speed: Mapping[str, Any]) -> str:
    """The device that `tools.speed` names; a GPU where there is one, if it says auto or nothing.

    Raises:
        RecipeError: it names a GPU and there is none.
    """
    import torch

    device = str(speed.get("device") or "auto")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise RecipeError(f"device: {device}, but there is no CUDA device here; use cpu or auto")
    return device


def load_model(path: str, head: Head, dtype: str, revision: str | None = None, **config: Any) -> tuple[Any, list[str]]:
    """A language model or sequence classifier of one output, and the names of weights that its checkpoint lacks.

    A LoRA adapter is merged into its base.

    Args:
        path: a folder or a Hub id.
        head: scalar or logprob.
        dtype: auto, float32, bfloat16, float16.
        revision: of a Hub id.
        config: entries of the model's config to set.
    """
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    is_adapter = (Path(path) / "adapter_config.json").is_file()
    kind = AutoModelForSequenceClassification if head == "scalar" else AutoModelForCausalLM
    check_model(path)
    try:
        base = path
        if is_adapter:
            adapter = PeftConfig.from_pretrained(path)
            base, revision = str(adapter.base_model_name_or_path), adapter.revision
            check_model(base)
            adapter.task_type = None  # a policy's adapter fits under a scalar head as well
            if head == "scalar":
                config.setdefault("num_labels", 1)
        with _quiet():  # what is missing is for the caller to judge
            model, info = kind.from_pretrained(
                base, dtype=dtype, revision=revision or "main", output_loading_info=True, **config
            )
        missing = sorted(info["missing_keys"])
        if is_adapter:
            missing = [key for key in missing if not _adapter_has(Path(path), key)]
            if lost := [key for key in missing if key.split(".")[0] in (adapter.modules_to_save or ())]:
                raise ModelError(
                    f"{path}: its adapters were saved without {lost[0]}, which was trained with them and would be "
                    "random now; save them again with it (modules_to_save)"
                )
            model = PeftModel.from_pretrained(model, path, config=adapter).merge_and_unload()
    except (OSError, ValueError, KeyError, RuntimeError) as problem:
        first = str(problem).strip().splitlines()[0]
        raise ModelError(
            f"{path}: it can't be loaded as a reward model with a {head} head: {first}; "
            "give a folder made by save_pretrained, or the id of a model on the Hub"
        ) from problem
    return model, missing


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def load_tokenizer(path: str, revision: str | None = None) -> Any:
    """The tokenizer in a model's folder, or of its base where an adapter's folder has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, revision=revision or "main")
    except (OSError, ValueError, KeyError) as problem:
        first = str(problem).strip().splitlines()[0]
        raise ModelError(f"{path}: no tokenizer can be loaded from it: {first}; save one into the folder") from problem


def template_hash(tokenizer: Any) -> str:
    """A short hash of the chat template."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16]


def distinct_pad_id(tokenizer: Any) -> int:
    """A pad token that no sequence ends with: the classifier's head reads the last token that is not a pad.

    Raises:
        ModelError: the vocabulary has no special token to spare.
    """
    ends = {tokenizer.eos_token_id, tokenizer.get_vocab().get("<|im_end|>")}
    spare = [i for i, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    for candidate in (tokenizer.pad_token_id, tokenizer.unk_token_id, *spare):
        if candidate is not None and candidate not in ends and candidate != tokenizer.bos_token_id:
            return int(candidate)
    raise ModelError(
        f"{tokenizer.name_or_path}: its pad token is its end token, and no other special token is free; "
        "add a pad token to the tokenizer and a row to the embeddings"
    )


def find_file(path: str, name: str, revision: str | None = None) -> Path | None:
    """A file in a model's folder or Hub repository; None where there is none."""
    if Path(path).is_dir():
        return Path(path) / name if (Path(path) / name).is_file() else None
    if hub_problem(path):
        return None  # loading the weights will say so
    from transformers.utils import cached_file

    try:
        found = cached_file(
            path, name, revision=revision or "main",
            _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
    except OSError:  # no folder and no Hub id: loading the weights will say so
        return None
    return None if found is None else Path(found)


def _adapter_has(folder: Path, key: str) -> bool:
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
        return any(name.endswith(f".{key}") for name in weights.keys())  # noqa: SIM118
