from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as t

from align.core import memory
from align.core.memory import memory_needed, memory_of, memory_there


def config(kind: str = "Qwen2", **sizes: Any) -> Any:
    shape = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    return getattr(t, f"{kind}Config")(**shape | sizes)


def kept_by_autograd(model: Any, tokens: int, checkpointing: bool) -> int:
    """Bytes of all tensors that a forward pass keeps for the backward one, weights apart."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(torch.arange(tokens)[None] % 64, use_cache=False)
    return sum(kept.values())


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("Qwen2", {}),
        ("Llama", {"num_key_value_heads": 4, "num_hidden_layers": 4}),
        ("Qwen3", {"head_dim": 32, "num_hidden_layers": 3}),
        ("Mistral", {"intermediate_size": 256}),
    ],
)
def test_activations_are_what_autograd_keeps(kind: str, sizes: dict[str, Any]) -> None:
    """Within a tenth, that of a model with norms for queries and keys (Qwen3) too."""
    model = t.AutoModelForCausalLM.from_config(config(kind, **sizes))
    estimate = memory_needed(model.config, 256, 64)["activations"]
    assert estimate == pytest.approx(kept_by_autograd(model, 256, False), rel=0.1)


def test_weights_gradients_and_moments_are_counted_one_by_one() -> None:
    """By hand. A layer has 64 · (64 + 2 · 32) + 64 · 64 + 3 · 64 · 128 = 36,864 weights in matrices, 128 biases (q 64,
    k and v 32 each) and two norms of 64. Two layers, 64 · 64 embeddings that the head shares, and the last norm:
    2 · (36,864 + 128 + 128) + 4,096 + 64 = 78,400. LoRA of rank 2 adds 2 · (in + out) to a matrix: 2 layers ·
    2 · ((64 + 64) · 2 + (64 + 32) · 2 + (64 + 128) · 3) = 4,096.
    """
    tied = config(tie_word_embeddings=True)
    whole = memory_needed(tied, 100, 10)
    assert (whole["weights"], whole["gradients"], whole["optimizer"]) == (4 * 78_400, 4 * 78_400, 8 * 78_400)
    assert whole["logits"] == 4 * 4 * 10 * 64
    assert memory_needed(config(tie_word_embeddings=False), 1, 1)["weights"] == 4 * (78_400 + 64 * 64)
    lora = memory_needed(tied, 100, 10, lora_rank=2)
    assert (lora["weights"], lora["gradients"]) == (4 * (78_400 + 4096), 4 * 4096)
    low = memory_needed(tied, 100, 10, lora_rank=2, precision="bf16", reference=True)
    assert (low["weights"], low["reference"]) == (2 * 78_400 + 4 * 4096, 2 * 78_400)
    quantized = memory_needed(tied, 100, 10, lora_rank=2, precision="bf16", quantization="nf4")
    assert quantized["weights"] == int(0.52 * 2 * 36_864) + 2 * (78_400 - 2 * 36_864) + 4 * 4096
    merging = memory_needed(tied, 100, 10, merging=0.24)  # the buffer is not larger than what is merged
    assert merging["optimizer"] == 8 * 78_400 + int(0.24 * 78_400) + 4 * 78_400
    assert memory_needed(tied, 100, 2**22)["logits"] == 4 * 4 * 2**26, "the head goes through more logits in parts"
    assert memory_needed(tied, 100, 0)["logits"] == 0


def test_checkpointing_keeps_the_inputs_of_the_layers_and_one_layer() -> None:
    deep = config(num_hidden_layers=8)
    whole, checkpointed = (memory_needed(deep, 256, 1, checkpointing=on)["activations"] for on in (False, True))
    inputs = kept_by_autograd(t.AutoModelForCausalLM.from_config(deep), 256, True)
    assert inputs + whole / 8 == pytest.approx(checkpointed, rel=0.15)


def test_experts_count_as_many_as_a_token_is_sent_to() -> None:
    moe = t.Qwen2MoeConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts=8,
        num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=64, intermediate_size=999,
    )  # fmt: skip
    dense = config(intermediate_size=2 * 32 + 64)
    assert memory_needed(moe, 256, 1)["activations"] == memory_needed(dense, 256, 1)["activations"]


def test_some_memory_is_there() -> None:
    assert memory_there("cpu") > 2**20


def test_what_loaded_models_have_taken_is_there_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand (see above): 78,400 weights in fp32, and as many in bf16 of a reference. Nothing of them is on a GPU,
    should one be asked for before they are moved there.
    """
    monkeypatch.setattr(memory, "memory_there", lambda device: 1_000_000)
    model, reference = (t.Qwen2ForCausalLM(config(tie_word_embeddings=True)) for _ in range(2))
    told = memory_of(model, 100, 10)
    assert told == {"memory": memory_needed(model.config, 100, 10), "memory_there": 1_000_000 + 4 * 78_400}
    both = memory_of(model, 100, 10, also=[reference.bfloat16()], reference=True)
    assert both["memory_there"] == 1_000_000 + 4 * 78_400 + 2 * 78_400
    assert both["memory"]["reference"] == 4 * 78_400
    assert memory_of(model, 100, 10, device="cuda")["memory_there"] == 1_000_000
