"""Reward models that were made elsewhere: any sequence classifier, read the way that its authors read it.

Two builds. A *decoder* (Llama, Qwen2, Gemma, …) reads the whole conversation in its own chat template and is scored at
the last token that is not the pad token. An *encoder* (BERT, DeBERTa, …) sees all tokens at once and pools them itself;
where it has no chat template it reads prompt and completion as the two texts of a pair, as it was trained to.

Nothing of a tokenizer's padding matters: rows are padded on the right here. Where the pad token is the end token, as in
many checkpoints, a decoder is not scored at the end token but at the one before it, padded or not: so its own code does
it (transformers), and its weights were trained under it. The ids given here end there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from align.core.chat import IGNORED, _for_templates, tools_of
from align.core.errors import DataError, ModelError
from align.core.records import Messages
from reward.batches import Encoded

BATCH_TOKENS = 8192
"""Padded tokens of a batch of an encoder."""


def is_encoder(model: Any) -> bool:
    """Whether a classifier pools all its tokens; the head of those that read the last one is called `score`."""
    return not hasattr(model, "score")


def longest_of(model: Any, tokenizer: Any) -> int | None:
    """The most tokens that a model can read, as far as it tells."""
    config = model.config.get_text_config()
    told = [getattr(config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None)]
    known = [int(length) for length in told if length and 0 < length < 10**9]
    return min(known, default=None)


def encode_as_trained(
    model: Any, tokenizer: Any, prompt: Messages, completion: Messages, name: str, tools: Any = None
) -> Encoded:
    """Token ids as a classifier's authors make them; labels only tell the second text of an encoder's pair.

    Tools are given to the chat template, and the arguments of calls as objects; whether it shows them is its authors'
    matter.

    Raises:
        DataError: the template refuses the messages, or there is none and the prompt has tools or more than a user's
            turn; or the tools, or a call's arguments, are none.
        ModelError: a decoder's tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        if not is_encoder(model):
            raise ModelError(
                f"{name}: its tokenizer has no chat template, so messages can't be scored; copy the model and add "
                "the template that it was trained with (chat_template.jinja)"
            )
        if tools:
            raise DataError(
                f"{name}: without a chat template it reads one question and one answer, and this prompt has tools; "
                "leave the column out with columns: {tools: null}, or copy the model and give its tokenizer the "
                "template that it was trained with (chat_template.jinja)"
            )
        return _as_pair(tokenizer, prompt, completion, name)
    messages, schemas = _for_templates(name, [*prompt, *completion]), tools_of(name, tools)
    try:
        text = tokenizer.apply_chat_template(messages, tools=schemas, tokenize=False)
    except Exception as problem:  # templates raise jinja2's errors, and through filters any other
        raise DataError(f"{name}: its chat template refuses a conversation: {problem}") from problem
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not is_encoder(model):
        ids = _up_to_last_read(ids, model.config.get_text_config().pad_token_id)
    return ids, [IGNORED] * len(ids)


def encoder_rewards(model: Any, encoded: Sequence[Encoded], output: int) -> list[float]:
    """Scores of an encoder, batches of like lengths together, in the order that they were given in.

    Raises:
        DataError: one is longer than the model can read.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    scores = [0.0] * len(encoded)
    order = sorted(range(len(encoded)), key=lambda place: len(encoded[place][0]))
    if order and limit and len(encoded[order[-1]][0]) > limit:
        raise DataError(f"a text of {len(encoded[order[-1]][0])} tokens; this model reads {limit} at most")
    batch: list[int] = []
    for number, place in enumerate(order):
        batch.append(place)
        following = order[number + 1 : number + 2]
        if not following or (len(batch) + 1) * len(encoded[following[0]][0]) > BATCH_TOKENS:
            for one, score in zip(batch, _batch(model, [encoded[i] for i in batch], output), strict=True):
                scores[one] = score
            batch = []
    return scores


def keep_output(model: Any, output: int) -> None:
    """Leaves a decoder's head with one of its outputs; an encoder's is left whole, and its output chosen when read."""
    if is_encoder(model):
        return
    head = model.score
    kept = nn.Linear(head.in_features, 1, bias=head.bias is not None, dtype=head.weight.dtype)
    with torch.no_grad():
        kept.weight.copy_(head.weight[output : output + 1])
        if head.bias is not None:
            kept.bias.copy_(head.bias[output : output + 1])
    model.score = kept
    model.config.num_labels = model.num_labels = 1


def _batch(model: Any, encoded: list[Encoded], output: int) -> list[float]:
    config = model.config.get_text_config()
    longest = max(len(ids) for ids, _ in encoded)
    ids = torch.full((len(encoded), longest), config.pad_token_id or 0)
    mask, kinds = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (own, labels) in enumerate(encoded):
        ids[row, : len(own)] = torch.tensor(own)
        mask[row, : len(own)] = 1
        kinds[row, : len(own)] = torch.tensor([int(label != IGNORED) for label in labels])
    batch = {"input_ids": ids, "attention_mask": mask}
    if getattr(config, "type_vocab_size", 0) > 1:
        batch["token_type_ids"] = kinds
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    found: list[float] = model(**batch).logits[:, output].float().tolist()
    return found


def _as_pair(tokenizer: Any, prompt: Messages, completion: Messages, name: str) -> Encoded:
    """`[CLS] prompt [SEP] completion [SEP]`, or what the tokenizer makes of a pair."""
    if len(prompt) != 1 or prompt[0]["role"] != "user" or len(completion) != 1:
        raise DataError(
            f"{name}: without a chat template it reads one question and one answer, and this prompt has "
            f"{len(prompt)} turns; copy the model and give its tokenizer the template that it was trained with "
            "(chat_template.jinja)"
        )
    found = tokenizer(prompt[0]["content"], completion[0]["content"], return_token_type_ids=True)
    ids = list(found["input_ids"])
    return ids, [i if kind else IGNORED for i, kind in zip(ids, found["token_type_ids"], strict=True)]


def _up_to_last_read(ids: list[int], pad_id: int | None) -> list[int]:
    """Ids without the pad tokens at their end, behind the token that a decoder is scored at."""
    end = len(ids)
    while pad_id is not None and end > 1 and ids[end - 1] == pad_id:
        end -= 1
    return ids[:end]
