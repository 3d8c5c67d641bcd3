"""Policies from folder to folder: loading them for training, and writing what was trained."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers.utils import logging

from align.core.chat import end_of_turn_id
from align.core.errors import ModelError, RecipeError, RunError
from align.core.hub import check_model
from align.core.rope import check_fits, stretch
from align.core.store import ModelRef
from align.train.adapters import adapter_of, save_adapters
from align.train.settings import Speed, TrainSettings

logging.disable_progress_bar()  # the step has its own


def load_tokenizer(model: ModelRef) -> Any:
    """The tokenizer that lies beside a model's weights.

    Raises:
        ModelError: there is none, or it has no chat template.
    """
    from transformers import AutoTokenizer

    check_model(model.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.path, revision=model.revision or "main")
    except (OSError, ValueError) as problem:
        raise ModelError(
            f"{model.name}: no tokenizer can be loaded from {model.path}: {_first_line(problem)}; save the tokenizer "
            "into the model's folder (tokenizer.save_pretrained)"
        ) from problem
    if tokenizer.chat_template is None:
        raise ModelError(
            f"{model.name}: its tokenizer has no chat template, so nobody knows what a turn looks like; add one as "
            f"chat_template.jinja in {model.path}, or take an instruct model's tokenizer"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked by length, never by id
    return tokenizer


def load_policy(model: ModelRef, speed: Speed, settings: TrainSettings | None = None, longest: int = 0) -> Any:
    """A causal language model, in training precision. An adapter folder is merged into its base.

    Weights are fp32 (the optimizer's updates are too small for bf16); where only adapters will be trained they have the
    computation's precision, or 4 bits where the settings say so.

    Args:
        settings: of the training; adapters, quantization and stretched positions are read off them. A reference model
            is loaded with its policy's.
        longest: tokens of the longest row that the model will read, where that is known.

    Raises:
        ModelError: the folder holds no causal language model, or its positions don't reach so far.
        RecipeError: the weights can't be in 4 bits here.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    frozen = settings is not None and settings.lora_rank > 0
    dtype = torch.bfloat16 if frozen and speed.precision == "bf16" else torch.float32
    adapters = adapter_of(model)
    base, revision = (model.path, model.revision)
    if adapters is not None:
        base, revision = str(adapters.base_model_name_or_path), adapters.revision
    more: dict[str, Any] = {"dtype": torch.float32 if adapters is not None else dtype}
    if settings is not None and settings.quantization == "nf4":
        more |= nf4(speed, model.name if adapters is not None else "")
    check_model(base)
    try:
        config = AutoConfig.from_pretrained(base, revision=revision or "main")
        if settings is not None and settings.rope_scaling == "yarn":
            stretch(config, model.name, settings.rope_factor, settings.max_length)
        check_fits(config, model.name, longest)
        loaded, info = AutoModelForCausalLM.from_pretrained(
            base, config=config, revision=revision or "main", output_loading_info=True, **more
        )
        if info["missing_keys"]:
            raise ModelError(
                f"{model.name}: its checkpoint has no {sorted(info['missing_keys'])[0]} (in all "
                f"{len(info['missing_keys'])} weights are missing), which would be random; give a whole causal "
                "language model"
            )
        if adapters is not None:
            from peft import PeftModel

            merged = PeftModel.from_pretrained(loaded, model.path).merge_and_unload()
            loaded = merged.to(dtype).requires_grad_(True)
    except (OSError, ValueError, RuntimeError) as problem:
        raise ModelError(
            f"{model.name}: no causal language model can be loaded from {model.path}: {_first_line(problem)}; give a "
            "folder made by save_pretrained, or the id of a model on the Hub"
        ) from problem
    return loaded


def nf4(speed: Speed, adapters: str = "") -> dict[str, Any]:
    """What loads weights in 4 bits (QLoRA, arXiv:2305.14314: NormalFloat, its constants quantized once more).

    Args:
        adapters: the policy's name, where that is a LoRA adapter.

    Raises:
        RecipeError: there is no CUDA device or no bitsandbytes, or the base would have to be merged first.
    """
    if adapters:
        raise RecipeError(
            f"quantization: nf4, but {adapters} is a LoRA adapter, which can't be merged into weights of 4 bits; merge "
            f"it first (align export {adapters} out=FOLDER) and give that folder"
        )
    if speed.device != "cuda":
        raise RecipeError(
            f"quantization: nf4 needs a CUDA device, and this step runs on {speed.device}; use lora_rank without it"
        )
    if find_spec("bitsandbytes") is None:
        raise RecipeError("quantization: nf4 needs the package bitsandbytes; pip install 'align-toolkit[quantization]'")
    from transformers import BitsAndBytesConfig

    kind = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if speed.precision == "bf16" else torch.float32,
    )
    return {"quantization_config": kind, "device_map": {"": torch.cuda.current_device()}}


def _first_line(problem: Exception) -> str:
    """What the library's error says, without its advice; weights of other shapes it tells about in a table apart."""
    first = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
    return "its weights have other shapes than its config.json says" if "mismatched_sizes" in first else first


def source_dtype(model: ModelRef) -> torch.dtype:
    """The precision in which a model's weights lie on disk, and in which what is made from it is written."""
    from transformers import AutoConfig

    adapters = adapter_of(model)
    if adapters is not None:
        return source_dtype(ModelRef(adapters.base_model_name_or_path, model.kind, "", "", adapters.revision))
    check_model(model.path)
    dtype = AutoConfig.from_pretrained(model.path, revision=model.revision or "main").dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def stop_at_end_of_turn(model: Any, tokenizer: Any) -> None:
    """Tells a model's generation settings the end-of-turn token, so that whoever samples from it stops there."""
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    model.generation_config.eos_token_id = [*ends, *({end_of_turn_id(tokenizer)} - set(ends))]


def check_finite(weights: Mapping[str, torch.Tensor]) -> None:
    """Refuses weights that the last step has ruined; no loss was computed after it that would have told.

    Raises:
        RunError: a weight is infinite or no number.
    """
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise RunError(
                f"the training diverged: {name} holds numbers that are infinite or NaN, so no model is written; "
                "lower learning_rate, or clip the gradient (max_grad_norm)"
            )


def save_policy(trainer: Any, tokenizer: Any, folder: Path, settings: TrainSettings, policy: ModelRef) -> None:
    """Writes the trained model with its tokenizer: full weights, or the adapters where `save_merged` is false.

    Every process calls it; the main one writes. Weights are rounded to the precision that the policy has on disk.
    Adapters over weights of fewer bits than the policy has are merged into the policy as it lies on disk.
    """
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
    if trainer.accelerator.is_main_process:
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        model.config.use_cache = True  # the trainer turned it off
        stop_at_end_of_turn(model, tokenizer)
        check_finite(state or dict(model.named_parameters()))
        if not is_peft_model(model):
            _write(model, folder, source_dtype(policy), state)
        elif not settings.save_merged:
            save_adapters(model, folder, policy)
        elif settings.quantization == "nf4" or _was_rounded(model, policy):
            apart = folder.with_name("adapters")
            model.save_pretrained(apart)  # the new ones alone: what the policy has of its own is in it when loaded
            _write(merged_on_cpu(apart, policy, model.generation_config, settings), folder, source_dtype(policy))
            shutil.rmtree(apart)
        else:
            _write(model.float().merge_and_unload(), folder, source_dtype(policy))
        tokenizer.save_pretrained(folder)
    trainer.accelerator.wait_for_everyone()


def _was_rounded(model: Any, policy: ModelRef) -> bool:
    """Whether the weights under a peft model's adapters have lost bits that the policy has on disk."""
    held = model.get_base_model().dtype
    return held != torch.float32 and (held != source_dtype(policy) or adapter_of(policy) is not None)


def merged_on_cpu(adapters: Path, policy: ModelRef, generation: Any, settings: TrainSettings) -> Any:
    """The policy's full weights in fp32 with adapters merged into them, and with the generation settings given.

    Its positions are stretched as the training's settings say.
    """
    from peft import PeftModel

    whole = settings.model_copy(update={"quantization": "none"})
    base = load_policy(policy, Speed(device="cpu", precision="fp32"), whole)
    base.generation_config = generation
    return PeftModel.from_pretrained(base, adapters).merge_and_unload()


def _write(model: Any, folder: Path, dtype: torch.dtype, state: Mapping[str, torch.Tensor] | None = None) -> None:
    model = model.to(dtype)
    model.save_pretrained(folder, state_dict=state and {name: tensor.to(dtype) for name, tensor in state.items()})
