"""Real stages with the shipped model, killed with SIGKILL at several moments: same result, nothing sampled twice.

What is sampled after a kill is sampled beside other prompts than without one, so its logits differ by float rounding.
With this seed one draw lies 6e-8 from the border between two tokens, nearer than that rounding: see `draws`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from align.core.engines.completion_file import kept_in
from align.core.manifest import Manifest
from align.core.store import TINY, Table

ROOT = Path(__file__).parents[2]
RECIPE = """\
name: killed
seed: 5
steps:
  prompts:
    stage: prompts
    with: {source: {tiny: {families: {math: 40, format: 40}, seed: 3}}}
  reject:
    stage: reject
    in: {prompts: prompts}
    engines: {sampler: {model: tiny, slots: 16}}
    with: {samples: 4, temperature: 1.0, max_tokens: 48}
"""


def start(out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "align.cli", "run", str(out.parent / "k.yaml"), "--out", str(out)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(out: Path) -> None:
    process = start(out)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said


@pytest.mark.slow
@pytest.mark.skipif(not TINY.is_dir(), reason="the checkpoint of the package is not there")
def test_rejection_sampling_killed_twice_gives_the_same_rows_and_samples_nothing_twice(tmp_path: Path) -> None:
    (tmp_path / "k.yaml").write_text(RECIPE)
    finish(tmp_path / "whole")
    whole = list(Table.open(tmp_path / "whole" / "reject").rows())
    assert len(whole) == 4 * sum(
        1 for row in Table.open(tmp_path / "whole" / "prompts").rows() if row["split"] == "train"
    )

    out = tmp_path / "killed"
    cache = out / "reject" / "work" / "completions-sampler"
    kept = 0
    for share in (0.2, 0.7):
        process = start(out)
        until = time.monotonic() + 120
        while kept_in(cache)[0] < share * len(whole):
            assert process.poll() is None and time.monotonic() < until, process.communicate()
            time.sleep(0.05)
        process.kill()
        process.communicate()
        assert Manifest.read(out / "reject") is None
        assert kept_in(cache)[0] >= kept, "what an attempt had finished is still there after the next one"
        kept = kept_in(cache)[0]
    finish(out)
    manifest = Manifest.read(out / "reject")
    assert manifest is not None
    engine: dict[str, Any] = manifest.engines["sampler"].model_dump()
    assert (engine["reused"], engine["sampled"]) == (kept, len(whole) - kept)
    assert list(Table.open(out / "reject").rows()) == whole
