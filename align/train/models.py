"""Policies from folder to folder: loading, LoRA, and writing what was trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers.utils import logging

from align.core.chat import end_of_turn_id
from align.core.errors import ModelError, RunError
from align.core.store import ModelRef
from align.train.settings import Speed, TrainSettings

logging.disable_progress_bar()  # the step has its own


def load_tokenizer(model: ModelRef) -> Any:
    """The tokenizer that lies beside a model's weights.

    Raises:
        ModelError: there is none, or it has no chat template.
    """
    from transformers import AutoTokenizer

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


def load_policy(model: ModelRef, speed: Speed, frozen: bool = False) -> Any:
    """A causal language model, in training precision. An adapter folder is merged into its base.

    Weights are fp32 (the optimizer's updates are too small for bf16); where only adapters or nothing will be trained
    they have the computation's precision.

    Args:
        frozen: whether the base weights stay as they are.

    Raises:
        ModelError: the folder holds no causal language model.
    """
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if frozen and speed.precision == "bf16" else torch.float32
    path = Path(model.path)
    try:
        if (path / "adapter_config.json").exists():
            from peft import AutoPeftModelForCausalLM

            adapted = AutoPeftModelForCausalLM.from_pretrained(model.path, dtype=dtype)
            loaded = adapted.merge_and_unload().requires_grad_(True)
        else:
            revision = model.revision or "main"
            loaded, info = AutoModelForCausalLM.from_pretrained(
                model.path, dtype=dtype, revision=revision, output_loading_info=True
            )
            if info["missing_keys"]:
                raise ModelError(
                    f"{model.name}: its checkpoint has no {sorted(info['missing_keys'])[0]} (in all "
                    f"{len(info['missing_keys'])} weights are missing), which would be random; give a whole causal "
                    "language model"
                )
    except (OSError, ValueError, RuntimeError) as problem:
        raise ModelError(
            f"{model.name}: no causal language model can be loaded from {model.path}: {_first_line(problem)}; give a "
            "folder made by save_pretrained, or the id of a model on the Hub"
        ) from problem
    return loaded


def _first_line(problem: Exception) -> str:
    """What the library's error says, without its advice; weights of other shapes it tells about in a table apart."""
    first = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
    return "its weights have other shapes than its config.json says" if "mismatched_sizes" in first else first


def source_dtype(model: ModelRef) -> torch.dtype:
    """The precision in which a model's weights lie on disk, and in which what is made from it is written."""
    from transformers import AutoConfig

    path = Path(model.path)
    if (path / "adapter_config.json").exists():
        from peft import PeftConfig

        adapter = PeftConfig.from_pretrained(model.path)
        return source_dtype(ModelRef(adapter.base_model_name_or_path, model.kind, "", "", adapter.revision))
    dtype = AutoConfig.from_pretrained(model.path, revision=model.revision or "main").dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def lora_of(settings: TrainSettings, base: ModelRef) -> Any:
    """The adapters' configuration, or None where all weights are trained.

    Raises:
        ModelError: they would be saved alone, and what they are trained on top of is nowhere on disk.
    """
    if not settings.lora_rank:
        return None
    from peft import LoraConfig

    if not settings.save_merged and (Path(base.path) / "adapter_config.json").exists():
        raise ModelError(
            f"{base.name}: is a LoRA adapter itself, and new adapters can't be saved on top of it; use save_merged=true"
        )
    targets = settings.lora_targets
    return LoraConfig(
        task_type="CAUSAL_LM",
        revision=base.revision,
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=[targets] if isinstance(targets, str) and targets != "all-linear" else targets,
    )


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


def save_policy(trainer: Any, tokenizer: Any, folder: Path, dtype: torch.dtype, merged: bool) -> None:
    """Writes the trained model with its tokenizer: full weights, or the adapters where `merged` is false.

    Every process calls it; the main one writes. Weights are rounded to `dtype`.
    """
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
    if trainer.accelerator.is_main_process:
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        model.config.use_cache = True  # the trainer turned it off
        for config in (model.config, model.config.get_text_config()):
            if hasattr(config, "output_router_logits"):
                config.output_router_logits = False  # the trainer turned it on, for the balancing loss of experts
        stop_at_end_of_turn(model, tokenizer)
        check_finite(state or dict(model.named_parameters()))
        if is_peft_model(model) and merged:
            model, state = model.float().merge_and_unload(), None
        if not is_peft_model(model):
            model = model.to(dtype)
            state = state and {name: tensor.to(dtype) for name, tensor in state.items()}
        if is_peft_model(model):
            adapters = model.peft_config["default"]
            base = adapters.base_model_name_or_path
            if base and Path(base).is_dir():  # so that it is found from any folder
                adapters.base_model_name_or_path = str(Path(base).resolve())
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
    trainer.accelerator.wait_for_everyone()
