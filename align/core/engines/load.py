"""Loading a causal language model and its tokenizer for sampling, with errors that say what to do."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from align.core.errors import EngineError, ModelError
from align.core.hub import check_model

# What peft asks of a model when it puts adapters on it goes by an old name.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "spiece*")


def find_device(name: str) -> torch.device:
    """The torch device of a setting: auto, cpu, cuda or cuda:N."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as problem:
        raise EngineError(f"device: found '{name}', expected auto, cpu, cuda or cuda:N") from problem
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EngineError(f"device: found '{name}', but torch sees {torch.cuda.device_count()} CUDA devices; use auto")
    return device


def load_model(path: str, device: torch.device, dtype: str) -> Any:
    """Loads a causal language model; a LoRA adapter is merged into its base.

    Args:
        path: a folder, or a Hub id, with `@revision` where it is pinned.
        device: where to.
        dtype: auto, float32, bfloat16 or float16.

    Raises:
        ModelError: there is no such model, or it is no causal language model.
        EngineError: there is no such precision.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if dtype not in ("auto", *_DTYPES):
        raise EngineError(f"dtype: found '{dtype}', expected auto, {', '.join(_DTYPES)}")
    base, revision = pinned(path)
    is_adapter = (Path(path) / "adapter_config.json").is_file()
    wanted = torch.float32 if dtype == "auto" and device.type == "cpu" else _DTYPES.get(dtype, "auto")
    remedy = "give a folder made by save_pretrained, or the id of a model on the Hub"
    try:
        if is_adapter:
            from peft import PeftConfig, PeftModel

            adapter = PeftConfig.from_pretrained(path)
            base, revision = str(adapter.base_model_name_or_path), adapter.revision
        check_model(base)
        config = AutoConfig.from_pretrained(base, revision=revision or "main")
        made_as = getattr(config, "architectures", None) or []
        causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
        if made_as and not any(name in causal for name in made_as):
            raise ModelError(f"{path}: it is a {made_as[0]}, expected a causal language model")
        model, info = AutoModelForCausalLM.from_pretrained(
            base, dtype=wanted, revision=revision or "main", output_loading_info=True
        )
        if info["missing_keys"]:
            raise ModelError(
                f"{path}: its checkpoint lacks {len(info['missing_keys'])} weights ({sorted(info['missing_keys'])[0]}, "
                f"...), which would be random; {remedy}"
            )
        if is_adapter:
            model = PeftModel.from_pretrained(model, path).merge_and_unload()
    except (OSError, ValueError, KeyError, RuntimeError) as problem:
        first = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        if "mismatched_sizes" in first:  # transformers tells which in a table apart
            first = "its weights have other shapes than its config.json says"
        raise ModelError(f"{path}: it can't be loaded as a causal language model: {first}; {remedy}") from problem
    return model.to(device).eval()


def load_tokenizer(path: str) -> Any:
    """The tokenizer in a model's folder (or, for an adapter without one, in its base model's)."""
    from transformers import AutoTokenizer

    folder = Path(path)
    remedy = "save the tokenizer into the model's folder (tokenizer.save_pretrained)"
    if folder.is_dir() and not any(file for form in _TOKENIZER_FILES for file in folder.glob(form)):
        adapter = folder / "adapter_config.json"
        base = json.loads(adapter.read_text()).get("base_model_name_or_path") if adapter.is_file() else None
        if base:
            return load_tokenizer(base)
        # transformers would make one with an empty vocabulary from the config alone
        raise ModelError(f"{path}: there is no tokenizer in this folder; {remedy}")
    name, revision = pinned(path)
    check_model(name)
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision or "main")
    except (OSError, ValueError, KeyError) as problem:
        first = str(problem).strip().splitlines()[0]
        raise ModelError(f"{path}: no tokenizer can be loaded from it: {first}; {remedy}") from problem


def pinned(path: str) -> tuple[str, str | None]:
    """A folder or Hub id, and the revision of an `id@revision`."""
    name, _, revision = (path, "", "") if Path(path).exists() else path.partition("@")
    return name, revision or None


def end_ids(tokenizer: Any, model: Any) -> set[int]:
    """End tokens: the tokenizer's, the generation config's, and ChatML's end of turn where the vocabulary has it."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(ends if isinstance(ends, (list, tuple)) else [ends])}
    found.add(tokenizer.get_vocab().get("<|im_end|>"))
    return {int(i) for i in found if i is not None}


def content_hash(model: Any, tokenizer: Any) -> str:
    """Hash of weights, config, vocabulary and chat template."""
    hasher = hashlib.blake2b(digest_size=16)
    hasher.update(model.config.to_json_string().encode())
    for name, tensor in sorted(model.state_dict().items()):
        hasher.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        hasher.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    hasher.update((backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))).encode())
    hasher.update(str(tokenizer.chat_template).encode())
    return hasher.hexdigest()


def misfit(ids: Sequence[int], max_tokens: int, max_context: int | None, vocabulary: int) -> str:
    """Why a prompt can't be sampled from; empty if it can. A completion is never cut short to make it fit."""
    if not ids:
        return "the prompt is empty: it has no tokens"
    if max_context is not None and len(ids) + max_tokens > max_context:
        return (
            f"the prompt doesn't fit: {len(ids)} tokens and max_tokens {max_tokens} exceed the context of "
            f"{max_context} tokens; shorten the prompt or lower max_tokens"
        )
    if not 0 <= min(ids) <= max(ids) < vocabulary:
        return f"the prompt has token ids outside the model's vocabulary of {vocabulary}"
    return ""
