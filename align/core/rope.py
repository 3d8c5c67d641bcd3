"""How far a model can tell positions apart, and stretching that with YaRN (arXiv:2309.00071).

The Qwen2 report trains at 32,768 tokens and reaches 131,072 with YaRN (section 3.2). The stretched frequencies stand in
the model's config, so whatever loads what was trained with them computes with them.
"""

from __future__ import annotations

from typing import Any

from align.core.errors import ModelError


def positions(config: Any) -> int | None:
    """Most tokens of a text that a model can read, by its config; None where it says nothing."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(most) if most else None


def check_fits(config: Any, name: str, longest: int) -> None:
    """Refuses rows that reach beyond a model's positions.

    Raises:
        ModelError: the longest row does.
    """
    most = positions(config)
    if most is not None and longest > most:
        remedy = "stretch them with rope_scaling=yarn, or " if _is_rotary(config) else ""
        raise ModelError(
            f"{name}: the longest row has {longest} tokens, and the model can tell {most} positions apart; "
            f"{remedy}leave longer rows out with max_length={most}"
        )


def stretch(config: Any, name: str, factor: float | None, max_length: int) -> None:
    """Sets YaRN in a model's config, in place.

    Args:
        config: of transformers.
        name: of the model, for messages.
        factor: by how much; max_length over the trained length where not given.
        max_length: longest row, in tokens.

    Raises:
        ModelError: the model has no rotary positions, they are scaled in another way, or no factor is needed.
    """
    text = config.get_text_config()
    if not _is_rotary(config):
        raise ModelError(
            f"{name}: rope_scaling is yarn, but {config.model_type} has no rotary positions that could be stretched; "
            "leave it out, and give a max_length that the model can read"
        )
    rope = text.rope_parameters
    full = rope.get("full_attention", rope)  # some models have others for their windowed layers
    kind = full.get("rope_type", "default")
    if kind not in ("default", "yarn"):
        raise ModelError(
            f"{name}: rope_scaling is yarn, but the model's positions are scaled already ({kind}); leave it out"
        )
    trained = int(full.get("original_max_position_embeddings") or positions(config) or 0)
    if factor is None:
        if max_length <= trained:
            raise ModelError(
                f"{name}: rope_scaling is yarn, but max_length {max_length} is within the {trained} positions that the "
                "model was trained on; leave it out, or say how far to stretch with rope_factor"
            )
        factor = max_length / trained
    stretched = full | {
        "rope_type": "yarn",
        "factor": float(factor),
        "original_max_position_embeddings": trained,
    }
    text.rope_parameters = rope | {"full_attention": stretched} if full is not rope else stretched
    text.max_position_embeddings = round(trained * factor)


def _is_rotary(config: Any) -> bool:
    """Whether a config says how its rotary positions turn."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return "rope_theta" in rope.get("full_attention", rope)
