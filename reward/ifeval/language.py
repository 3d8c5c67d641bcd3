"""The language of a text, by langdetect with a fixed seed: the same text always has the same answer."""

from __future__ import annotations

from functools import lru_cache

from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory
from langdetect.lang_detect_exception import LangDetectException

_CODES = """
    af ar bg bn ca cs cy da de el en es et fa fi fr gu he hi hr hu id it ja kn ko lt lv mk ml mr ne nl no pa pl
    pt ro ru sk sl so sq sv sw ta te th tl tr uk ur vi zh-cn zh-tw
"""
LANGUAGES = frozenset(_CODES.split())
"""The codes that langdetect can answer with."""

_MOST_CHARACTERS = 30_000
"""langdetect reads 10,000 characters once it has dropped addresses; on a huge text the dropping takes seconds."""


@lru_cache(maxsize=64)
def detect(text: str) -> str | None:
    """The language code of `text`; None where nothing in it tells (no letters)."""
    detector = _factory().create()
    detector.append(text[:_MOST_CHARACTERS])
    try:
        return str(detector.detect())
    except LangDetectException:
        return None


@lru_cache(maxsize=1)
def _factory() -> DetectorFactory:
    """langdetect's profiles, with a seed of their own: the library's global one is left alone."""
    factory = DetectorFactory()
    factory.seed = 0
    factory.load_profile(PROFILES_DIRECTORY)
    return factory
