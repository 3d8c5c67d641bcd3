"""Small tokenizers with chat templates of the shapes that well-known families have, written here."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

from tokenizers import AddedToken

from tests.train.tiny import make_tokenizer

# ChatML; a system prompt of its own where there is none.
QWEN2 = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# ChatML with tools in the system prompt, calls as tagged JSON, and what tools say in the user's turn.
QWEN25 = (
    "{% set first = messages[0]['content'] if messages[0]['role'] == 'system' else 'You help.' %}"
    "{{ '<|im_start|>system\\n' + first }}"
    "{% if tools %}{{ '\\n<tools>' }}{% for t in tools %}{{ '\\n' + (t | tojson) }}{% endfor %}{{ '\\n</tools>' }}"
    "{% endif %}{{ '<|im_end|>\\n' }}"
    "{% for m in messages %}"
    "{% if m['role'] == 'tool' %}"
    "{% if messages[loop.index0 - 1]['role'] != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\\n<tool_response>\\n' + m['content'] + '\\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1]['role'] != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}"
    "{% elif m['role'] == 'assistant' and m.get('tool_calls') %}{{ '<|im_start|>assistant' }}"
    "{% if m['content'] %}{{ '\\n' + m['content'] }}{% endif %}"
    "{% for c in m['tool_calls'] %}{% set f = c['function'] if 'function' in c else c %}"
    "{{ '\\n<tool_call>\\n{\"name\": \"' + f['name'] + '\", \"arguments\": ' + (f['arguments'] | tojson) + '}"
    "\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% elif m['role'] != 'system' or not loop.first %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# ChatML; thoughts stand before an answer after the last question, an empty pair of tags where it has none, and are
# left out of the turns before that.
QWEN3 = (
    "{% set at = namespace(last=-1) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set at.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% set parts = m['content'].split('</think>') %}{% set said = parts[-1].lstrip('\\n') %}"
    "{% set thought = m.get('reasoning_content') or (parts[0].replace('<think>', '') if parts | length > 1 else '') %}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{% if loop.index0 > at.last %}{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ said + '<|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
# The system prompt stands in the last user's turn, and only while that is the last message of all.
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + (system + '\\n\\n' if loop.last and system else '') + m['content'] }}"
    "{{ '[/INST]' }}"
    "{% elif m.get('tool_calls') %}{{ '[TOOL_CALLS] [' }}{% for c in m['tool_calls'] %}"
    "{{ c['function'] | tojson }}{% if not loop.last %}{{ ', ' }}{% endif %}{% endfor %}{{ ']' + eos_token }}"
    "{% elif m['role'] == 'tool' %}{{ '[TOOL_RESULTS] ' + m['content'] + '[/TOOL_RESULTS]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only the first message may be of the system') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' }}"
    "{{ m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
# The family whose small tokenizer it has, further special tokens, further tokens that aren't, the end token.
SHAPES: dict[str, tuple[str, str, list[str], list[str], str]] = {
    "qwen2": ("qwen2", QWEN2, [], [], "<|im_end|>"),
    "qwen2.5": ("qwen2", QWEN25, [], ["<tool_call>", "</tool_call>"], "<|im_end|>"),
    "qwen3": ("qwen2", QWEN3, [], ["<think>", "</think>"], "<|im_end|>"),
    "llama3": ("llama", LLAMA3, [], [], "<|eot_id|>"),
    "mistral": (
        "mistral", MISTRAL, ["[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"], [], "</s>"
    ),
    "gemma": ("gemma", GEMMA, [], [], "<end_of_turn>"),
}  # fmt: skip


@cache
def tokenizer_of(shape: str) -> Any:
    """A small tokenizer with the shape's template and tokens."""
    family, template, special, plain, _ = SHAPES[shape]
    tokenizer = copy.deepcopy(make_tokenizer(family))
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in special], special_tokens=True)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    tokenizer.chat_template = template
    return tokenizer
