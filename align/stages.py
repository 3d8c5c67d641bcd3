"""Which stages there are: one literal table, verb to module. A module is imported when its stage is asked for.

A recipe may also name a stage of your own as `package.module:NAME`; it follows the same contract (align/core/stage.py).
"""

from __future__ import annotations

import importlib

from rapidfuzz import fuzz, process

from align.core.errors import RecipeError
from align.core.stage import Stage

TABLE: dict[str, tuple[str, str]] = {
    # verb: (where its Stage is, the one line of `align --help`; it stands here so that help imports no stage)
    "prompts": (
        "data_synthesis.prompts:STAGE",
        "instructions from files, folders or the Hub: read, converted, deduplicated, divided into splits",
    ),
    "tag": ("data_synthesis.tag:STAGE", "the intentions of every instruction, named by a model"),
    "probe-tags": (
        "data_synthesis.probe_tags:STAGE",
        "precision and consistency of tags by a judge, with counterfactual probes",
    ),
    "distil-tags": (
        "data_synthesis.distil_tags:STAGE",
        "demonstrations for a small tagger from tagged instructions (InsTagger)",
    ),
    "compare-tags": (
        "data_synthesis.compare_tags:STAGE",
        "a tagger's tags against reference tags: exact and fuzzy F1",
    ),
    "ontology": ("data_synthesis.ontology:STAGE", "raw tags merged into an ontology that a person can refine"),
    "select": ("data_synthesis.select:STAGE", "a diverse set of complex instructions"),
    "evolve": (
        "data_synthesis.evolve:STAGE",
        "instructions made harder, and new ones after their model, by a model",
    ),
    "decontaminate": (
        "data_synthesis.decontaminate:STAGE",
        "leaves out rows that repeat test sets: runs of words, then the longest common subsequence",
    ),
    "reject": ("data_synthesis.reject:STAGE", "sampled completions with verdicts; the distinct right ones marked"),
    "execute": ("data_synthesis.execute:STAGE", "sampled programs, run against tests in the sandbox"),
    "constraints": (
        "data_synthesis.constraints:STAGE",
        "constraints on the form of answers, with functions that check them, cross-validated (AutoIF)",
    ),
    "constrain": (
        "data_synthesis.constrain:STAGE",
        "queries under constraints: prompts that functions can check (AutoIF)",
    ),
    "follow": (
        "data_synthesis.follow:STAGE",
        "completions of constrained prompts, checked by the constraints' functions and a judge (AutoIF)",
    ),
    "constitute": (
        "data_synthesis.constitute:STAGE",
        "completions that follow and that deviate from principles, and revised ones, checked",
    ),
    "lookalikes": (
        "data_synthesis.lookalikes:STAGE",
        "harmless requests that look harmful, written after harmful ones",
    ),
    "rank": (
        "data_synthesis.rank:STAGE",
        "completions of several models ranked by a judge, a reward model or people; the best kept",
    ),
    "repurpose": (
        "data_synthesis.repurpose:STAGE",
        "passages that people wrote, with model-written instructions at three levels of detail",
    ),
    "reverse": (
        "data_synthesis.reverse:STAGE",
        "demonstrations turned round, answer to instruction, to train a backward model",
    ),
    "back-translate": (
        "data_synthesis.back_translate:STAGE",
        "texts with the instructions that a backward model finds for them, rated; the best ones kept",
    ),
    "role-play": (
        "data_synthesis.role_play:STAGE",
        "profiles of characters to dialogues: what they know, and what they can't know",
    ),
    "verify": ("reward.verify:STAGE", "verdicts for completions that were made elsewhere"),
    "demonstrate": ("data_synthesis.demonstrate:STAGE", "demonstrations for SFT from scored completions"),
    "pair": ("data_synthesis.pair:STAGE", "preferences for DPO and the reward model from scored completions"),
    "sft": ("align.train.sft:STAGE", "fine-tune a model on demonstrations"),
    "reward": ("reward.train:STAGE", "trains a reward model on scored completions, and finds where it may be believed"),
    "ensemble": (
        "reward.ensemble:STAGE",
        "several reward models as one: their mean, the mean less their disagreement, or the lowest",
    ),
    "score": ("reward.score:STAGE", "rewards of any completions or preferences by a reward model"),
    "reward-bench": (
        "reward.bench:STAGE",
        "how often a reward model prefers what people or programs prefer, by subset, with 95% intervals",
    ),
    "dpo": ("align.train.dpo:STAGE", "prefer the chosen to the rejected (DPO on a fixed set of pairs)"),
    "online-dpo": ("align.train.online_dpo:STAGE", "sample, score, pair and train in episodes (online DPO)"),
    "replay": (
        "align.train.replay:STAGE",
        "train again on the episodes of an online-dpo run, without sampling",
    ),
    "evaluate": (
        "align.evaluate.evaluate:STAGE",
        "the verified score of a model on held-out prompts, by family, with 95% intervals",
    ),
}


def nearest(word: str, known: list[str] | tuple[str, ...]) -> str:
    """A clause for an error message: the known name nearest to `word`, or all names where none is near."""
    found = process.extractOne(word, known, scorer=fuzz.ratio, score_cutoff=60) if known else None
    if found:
        return f"did you mean '{found[0]}'?"
    return f"known: {', '.join(known)}" if known else "there is none"


def load(verb: str) -> Stage:
    """The stage of a verb, or of `package.module:NAME`.

    Raises:
        RecipeError: there is no such stage.
    """
    place = TABLE[verb][0] if verb in TABLE else verb
    module, colon, name = place.partition(":")
    if not colon:
        raise RecipeError(f"'{verb}': unknown stage; {nearest(verb, list(TABLE))}")
    try:
        stage = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as problem:
        if verb in TABLE:
            raise
        raise RecipeError(
            f"'{verb}': {problem}; a stage of your own is named package.module:NAME, and Python must find it"
        ) from problem
    if not isinstance(stage, Stage):
        raise RecipeError(f"'{verb}': it is a {type(stage).__name__}, not a Stage (align.core.stage)")
    return stage
