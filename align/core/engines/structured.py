"""Completions of a given form (a JSON schema, one of some texts): which tokens may come next, by llguidance.

The grammar decides token by token what is allowed; what is not gets the probability 0. So whatever the model says
parses, unless `max_tokens` cuts it off.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from align.core.engines.base import SamplingParams
from align.core.errors import EngineError

WHITE_SPACE = r"[ \n\t]{1,16}"
"""Between the parts of a JSON document, at most so much: a small model else writes blanks until it is cut off."""


class Form:
    """The form that completions must have; one serves all the samples of a call.

    Args:
        tokenizer: of the model.
        end_ids: tokens that end a completion; allowed where the text may end, and there alone.
        vocabulary: how many logits the model gives.
        params: `json_schema` or `choices` is set.

    Raises:
        EngineError: llguidance is not installed, or can't use the tokenizer, or the schema is none.
    """

    def __init__(self, tokenizer: Any, end_ids: Iterable[int], vocabulary: int, params: SamplingParams) -> None:
        try:
            import llguidance
            import llguidance.hf
            import llguidance.numpy
        except ImportError as problem:
            raise EngineError(
                "json_schema, choices: the library llguidance is not installed; "
                "`pip install 'align-toolkit[structured]'`"
            ) from problem
        try:
            # The whole vocabulary is read here, about a second for 150,000 tokens.
            wrapped = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=sorted(end_ids))
        except ValueError as problem:
            raise EngineError(f"json_schema, choices: the tokenizer can't be used for them: {problem}") from problem
        self._fill = llguidance.numpy.fill_next_token_bitmask_par
        self._executor = llguidance.LLExecutor(torch.get_num_threads())
        self._vocabulary = vocabulary
        self._first = llguidance.LLMatcher(wrapped, _grammar(llguidance.LLMatcher, params), log_level=0)
        if self._first.is_error():
            what = "json_schema" if params.json_schema is not None else "choices"
            why = " ".join(self._first.get_error().split())[:300]
            raise EngineError(f"{what}: no grammar can be made of it: {why}")

    def begin(self) -> Any:
        """The state of a new sample, which `allowed` and `accept` take."""
        return self._first.deep_copy()

    def allowed(self, states: Sequence[Any]) -> torch.Tensor:
        """Which tokens may come next in each state, bool, (B, V)."""
        bits = np.zeros((len(states), (self._vocabulary + 31) // 32), dtype=np.int32)
        self._fill(self._executor, [(state, row) for row, state in enumerate(states)], bits)
        flags = np.unpackbits(bits.view(np.uint8), axis=1, count=self._vocabulary, bitorder="little")
        return torch.from_numpy(flags.view(bool))

    @staticmethod
    def accept(state: Any, token: int) -> str:
        """Takes a sampled token in; gives why it could not be, or nothing."""
        if state.consume_token(token):
            return ""
        return str(state.get_error()).strip() or f"token {token} is not of the form that was asked for"


def _grammar(matcher: Any, params: SamplingParams) -> str:
    if params.json_schema is None:
        options = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in params.choices)
        return str(matcher.grammar_from_lark(f"start: {options}"))
    return str(matcher.grammar_from_json_schema(params.json_schema, overrides={"whitespace_pattern": WHITE_SPACE}))
