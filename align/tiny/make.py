"""`align make-tiny`: trains the tokenizer and the base model of the embedded world from nothing but `corpus.py`.

A Qwen2-architecture model of 0.84 million parameters; Muon on the matrices, AdamW on the rest (Muon: Keller Jordan,
2024; `torch.optim.Muon`), cosine schedule, instruction tokens weighted 0.2. Nine to ten minutes on two cores.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.tiny.corpus import documents

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML as Qwen2 has it, without a default system message: on a model this small every token counts."""

_PRE_TOKENS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's pre-tokenisation: single digits, words with their leading space."""


def make_tokenizer(vocabulary: int = 768, sample: int = 20_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML, trained on the first `sample` documents."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PRE_TOKENS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    roles = ["user\n", "assistant\n", "system\n"] * 3000  # the chat template should cost few tokens
    tokenizer.train_from_iterator([a + b for a, b in islice(documents(0), sample)] + roles, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, hidden: int = 128, layers: int = 4) -> PreTrainedModel:
    """A Qwen2 model with random weights: `hidden` wide, 4 heads, 2 key-value heads, tied embeddings."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model: PreTrainedModel = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.04,
            use_sliding_window=False,
            bos_token_id=None,
            eos_token_id=tokenizer.convert_tokens_to_ids(TURN_END),
            pad_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        )
    )
    model.generation_config.eos_token_id = [
        tokenizer.convert_tokens_to_ids(TURN_END),
        tokenizer.convert_tokens_to_ids(END_OF_TEXT),
    ]
    return model


def _batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, rows: int, length: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields token ids and loss weights, both (rows, length + 1), from the documents laid end to end."""
    import torch

    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    size = rows * (length + 1)
    ids: list[int] = []
    weights: list[float] = []
    source = documents(seed)
    while True:
        while len(ids) < size:
            chunk = list(islice(source, 256))
            given = tokenizer([a for a, _ in chunk], add_special_tokens=False)["input_ids"]
            learnt = tokenizer([b for _, b in chunk], add_special_tokens=False)["input_ids"]
            for a, b in zip(given, learnt, strict=True):
                ids += [*a, *b, end]
                weights += [0.2] * len(a) + [1.0] * (len(b) + 1)
        yield torch.tensor(ids[:size]).view(rows, -1), torch.tensor(weights[:size]).view(rows, -1)
        del ids[:size], weights[:size]


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int = 0, rows: int = 32
) -> list[float]:
    """Trains in place on `rows` x 128 tokens a step; returns the loss of every step, in nats a weighted token."""
    import torch

    torch.manual_seed(seed)
    model.train()
    matrices = [
        p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name and "lm_head" not in name
    ]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers: list[Any] = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0),
        torch.optim.AdamW(others, lr=3e-3, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    losses = []
    started = time.monotonic()
    for step, (ids, weights) in enumerate(islice(_batches(tokenizer, seed, rows, 128), steps)):
        share = min(1.0, (step + 1) / 30) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for optimizer, peak in zip(optimizers, (0.02, 3e-3), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * share
        logits = model(input_ids=ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weight = weights[:, 1:].flatten()
        loss = (loss * weight).sum() / weight.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}/{steps}  loss {losses[-1]:.3f}  {time.monotonic() - started:5.0f} s", flush=True)
    return losses


def make(out: str | Path, steps: int = 1600, seed: int = 0, hidden: int = 128, layers: int = 4, rows: int = 32) -> Path:
    """Makes tokenizer and base model and writes them to `out`, in bfloat16.

    Raises:
        DataError: `out` holds a model already.
    """
    import torch

    from align.core.errors import DataError

    out = Path(out)
    if (out / "config.json").exists():
        raise DataError(f"{out}: holds a model already; give another folder, or remove it")
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    model = make_model(tokenizer, hidden, layers)
    losses = train(model, tokenizer, steps, seed, rows)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    made = {
        "made_by": "align make-tiny",
        "steps": steps,
        "seed": seed,
        "tokens": steps * rows * 128,
        "parameters": sum(p.numel() for p in model.parameters()),
        "final_loss": round(sum(losses[-50:]) / len(losses[-50:]), 4),
    }
    (out / "made.json").write_text(json.dumps(made, indent=2) + "\n")
    return out
