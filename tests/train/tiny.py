"""Tokenizers with the chat templates of four families, and random models of their shapes, made in a blink."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
# How Qwen2 and Llama 3 cut a text before its pieces are merged: single digits, and newlines with what is before them.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# template, bos, eos, pad, other special tokens, the end-of-turn token
FAMILIES: dict[str, tuple[str, str | None, str, str, list[str], str]] = {
    "qwen2": (CHATML, None, "<|im_end|>", "<|endoftext|>", ["<|im_start|>"], "<|im_end|>"),
    "llama": (
        LLAMA3,
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|pad|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|eot_id|>",
    ),
    "mistral": (MISTRAL, "<s>", "</s>", "<pad>", [], "</s>"),
    "gemma": (GEMMA, "<bos>", "<eos>", "<pad>", ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>"),
}
FAMILIES["qwen2_moe"] = FAMILIES["qwen2"]


@cache
def make_tokenizer(family: str = "qwen2") -> Any:
    """A byte-level BPE tokenizer of 400 tokens with the family's special tokens and template."""
    template, bos, eos, pad, others, _ = FAMILIES[family]
    core = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    special = [token for token in (pad, bos, eos, *others) if token]
    text = ["What is 3 plus 4? The answer is 7.\n\nYes.\n", "user assistant model hello world\n\n"] * 50
    core.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=pad, extra_special_tokens=others
    )
    tokenizer.chat_template = template
    return tokenizer


def make_model(family: str = "qwen2", seed: int = 0, layers: int = 2) -> Any:
    """A random model of the family's shape: hidden size 32, the tokenizer's vocabulary, fp32."""
    import torch
    import transformers as t

    tokenizer = make_tokenizer(family)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    torch.manual_seed(seed)
    if family == "qwen2":
        return t.Qwen2ForCausalLM(t.Qwen2Config(**sizes, tie_word_embeddings=True))
    if family == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(**sizes))
    if family == "mistral":
        return t.MistralForCausalLM(t.MistralConfig(**sizes))
    if family == "gemma":
        config = t.Gemma2Config(**sizes, head_dim=8, final_logit_softcapping=30.0, attn_implementation="eager")
        return t.Gemma2ForCausalLM(config)
    moe = t.Qwen2MoeConfig(
        **sizes, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16
    )
    return t.Qwen2MoeForCausalLM(moe)


def save_model(folder: Path, family: str = "qwen2", seed: int = 0) -> str:
    """A random model with its tokenizer in a folder; gives the folder's path."""
    make_model(family, seed).save_pretrained(folder)
    make_tokenizer(family).save_pretrained(folder)
    return str(folder)


def demonstrations(count: int) -> list[dict[str, Any]]:
    """Rows of sums, of uneven lengths."""
    rows = []
    for i in range(count):
        a, b = i % 7, (3 * i) % 11
        steps = "".join(f"{a} and {k}. " for k in range(i % 4))
        rows.append(
            {
                "prompt_id": f"p{i}",
                "split": "train",
                "prompt": [{"role": "user", "content": f"What is {a} plus {b}?" + " please" * (i % 3)}],
                "completion": [{"role": "assistant", "content": f"{steps}The answer is {a + b}."}],
            }
        )
    return rows


def preferences(count: int) -> list[dict[str, Any]]:
    """The same sums with a right and a wrong answer."""
    rows = []
    for i, row in enumerate(demonstrations(count)):
        wrong = [{"role": "assistant", "content": f"It is {i}." + " no" * (i % 5)}]
        rows.append(
            {k: row[k] for k in ("prompt_id", "split", "prompt")}
            | {"chosen": row["completion"], "rejected": wrong, "margin": 1.0}
        )
    return rows
