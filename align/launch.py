"""One training stage in several processes of this machine, through `python -m torch.distributed.run`.

Every process calls the stage with the same configuration; the first one prints, and leaves the result for the pipeline.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.core import errors
from align.core.errors import AlignError, RunError
from align.core.records import Kind
from align.core.stage import Result, Tools
from align.core.store import ModelRef, Table
from align.folders import cache_folder
from align.plan import Step
from align.progress import Lines, Silent
from align.stages import load


def launch(
    step: Step, inputs: Mapping[str, Table | ModelRef], seed: int, work: Path, out: Path, rehearse: bool = False
) -> Result:
    """Runs a stage in `step.processes` processes.

    Raises:
        AlignError: what the stage raised in one of them.
        RunError: the processes ended otherwise than by their own error; their output says more.
    """
    told, spec_file = work / "processes", work / "processes" / "spec.json"
    told.mkdir(parents=True, exist_ok=True)
    for old in told.iterdir():
        old.unlink()
    spec = {
        "verb": step.verb,
        "name": step.name,
        "config": step.config.model_dump(mode="json"),
        "inputs": {name: _written(opened) for name, opened in inputs.items()},
        "seed": seed,
        "work": str(work),
        "out": str(out),
        "speed": dict(step.speed),
        "rehearse": rehearse,
    }
    spec_file.write_text(json.dumps(spec), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={step.processes}"]
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // step.processes))
    process = subprocess.Popen(
        [*command, "-m", "align.launch", str(spec_file)],
        env={**os.environ, "OMP_NUM_THREADS": threads},
        preexec_fn=_end_with_parent,
        start_new_session=True,  # Ctrl-C is ours to handle
    )
    try:
        status = process.wait()
    except BaseException:
        # Checkpoints are what a training goes on from; where the kernel ends the workers too, the quickest end is best.
        (process.kill if sys.platform == "linux" else process.terminate)()
        process.wait()
        raise
    for file in sorted(told.glob("error-*.json")):
        problem = json.loads(file.read_text(encoding="utf-8"))
        raise getattr(errors, problem["kind"], AlignError)(problem["text"])
    if status != 0 or not (told / "result.json").exists():
        raise RunError(f"its {step.processes} processes ended with status {status}; see what they printed above")
    return Result(summary=json.loads((told / "result.json").read_text(encoding="utf-8")))


def _written(opened: Table | ModelRef) -> dict[str, Any]:
    if isinstance(opened, Table):
        files = [str(file) for file in opened.files]
        return {"files": files, "name": opened.name, "fingerprint": opened.fingerprint}
    known = {"path": opened.path, "kind": opened.kind.value, "name": opened.name}
    return {**known, "fingerprint": opened.fingerprint, "revision": opened.revision}


def _opened(written: dict[str, Any]) -> Table | ModelRef:
    if "files" in written:
        return Table([Path(file) for file in written["files"]], written["name"], written["fingerprint"])
    return ModelRef(**{**written, "kind": Kind(written["kind"])})


def main(spec_file: Path) -> None:
    """One of the processes."""
    _end_with_parent()
    spec = json.loads(spec_file.read_text(encoding="utf-8"))
    rank = int(os.environ["RANK"])
    stage = load(spec["verb"])
    progress = Lines(spec["name"]) if rank == 0 else Silent()
    folders = (Path(spec["work"]), Path(spec["out"]))
    tools = Tools(spec["seed"], {}, progress, *folders, spec["speed"], cache_folder(), spec["rehearse"])
    try:
        inputs = {name: _opened(written) for name, written in spec["inputs"].items()}
        result = stage.run(stage.config.model_validate_json(json.dumps(spec["config"])), inputs, tools)
    except AlignError as problem:
        told = {"kind": type(problem).__name__, "text": str(problem)}
        (spec_file.parent / f"error-{rank}.json").write_text(json.dumps(told), encoding="utf-8")
        raise SystemExit(2) from None
    finally:
        progress.close()
    if rank == 0:
        (spec_file.parent / "result.json").write_text(json.dumps(result.summary), encoding="utf-8")


_LIBC = ctypes.CDLL(None)


def _end_with_parent() -> None:
    """Has the kernel end this process when the one that started it is gone: a killed run leaves no trainers behind."""
    if sys.platform == "linux":
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    main(Path(sys.argv[1]))
