from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from align.core.errors import DataError
from align.core.manifest import Manifest, Origin, versions


def a_manifest(**more: object) -> Manifest:
    return Manifest.model_validate({"step": "pairs", "stage": "pair", "fingerprint": "f", **more})


def test_a_manifest_comes_back_as_it_was_written_with_keys_of_others(tmp_path: Path):
    written = a_manifest(
        settings={"min_margin": 0.1}, seed=7, rows=3, summary={"pairs": 3}, gives="preferences",
        inputs={"completions": Origin(name="sample", path="sample", fingerprint="g", step="sample")},
    )  # fmt: skip
    written.write(tmp_path)
    read = Manifest.read(tmp_path)
    assert read == written
    assert json.loads((tmp_path / "manifest.json").read_text())["gives"] == "preferences"
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


def test_a_folder_without_a_manifest_is_unfinished(tmp_path: Path):
    assert Manifest.read(tmp_path) is None


@pytest.mark.parametrize("text", ['{"step": "pairs"', '{"step": "pairs"}', "[]"])
def test_a_damaged_manifest_is_named_with_its_remedy(tmp_path: Path, text: str):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json: can't be read .*remove it to have the step run again"):
        Manifest.read(tmp_path)


def test_versions_are_found_without_importing_the_libraries():
    found = versions()
    assert found["python"].startswith("3.")
    assert {"torch", "transformers", "trl", "datasets"} <= set(found)
    code = (
        "import sys; from align.core.manifest import versions; versions(); "
        "print([m for m in ('torch', 'transformers', 'datasets', 'trl') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={"PYTHONPATH": ":".join(sys.path)})  # fmt: skip
    assert done.stdout.strip() == "[]"
