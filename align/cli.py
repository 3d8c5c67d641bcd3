"""The command line: `align run RECIPE`, `align STAGE key=value … out=FOLDER`, and what tells about runs.

Nothing heavy is imported at the top, so that help comes at once.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

# Before anything loads torch: idle threads sleep instead of spinning, tokenizers don't fork-warn, nobody phones home.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
if not sys.stderr.isatty():
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import typer

from align.core.errors import AlignError, RecipeError, RunError
from align.stages import TABLE, nearest

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="The Qwen2 report's post-training as a pipeline of stages. `align STAGE --help` tells all about a stage.",
)
recipes_app = typer.Typer(help="List the recipes that come with align, or copy one.", invoke_without_command=True)
app.add_typer(recipes_app, name="recipes")

Arguments = Annotated[list[str] | None, typer.Argument(metavar="[key=value]…", help="overrides", show_default=False)]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a run", show_default=False)]
RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="a YAML file, or a shipped recipe's name")]


def main() -> None:
    """Entry point of `align`."""
    commands = [c.name or getattr(c.callback, "__name__", "") for c in app.registered_commands] + ["recipes"]
    verb = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), None)
    if verb is not None and sys.argv[1] == verb and verb not in commands:
        if ":" not in verb:
            print(f"align {verb}: there is no such command; {nearest(verb, commands)}", file=sys.stderr)
            sys.exit(2)
        _add_stage(verb, "a stage of your own")  # package.module:NAME
    app(prog_name="align")


STOP_WITHIN_S = 10.0
"""How long after Ctrl-C a run may take to end by itself; nothing that is kept needs more than that."""

THREADS_END_WITHIN_S = 2.0
"""How long after all is told the threads of an engine may still wait for answers that nobody wants any more."""


@contextmanager
def _told(again: str = "") -> Iterator[None]:
    """Turns what a user can mend, and a stop by Ctrl-C or SIGTERM, into plain words and an exit status.

    A second Ctrl-C, or an engine or library that doesn't let go, ends the process at once. That is safe at any moment,
    as a kill is.
    """
    stopped_by: list[int] = []

    def stop(number: int, _: object) -> None:
        stopped_by.append(number)
        if len(stopped_by) > 1:
            _end_at_once(128 + number, _stopped(again))
        _end_later(STOP_WITHIN_S, 128 + number, _stopped(again))
        raise KeyboardInterrupt

    signals = [each for each in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(each) is not signal.SIG_IGN]
    before = {each: signal.signal(each, stop) for each in signals}
    try:
        yield
    except (Exception, KeyboardInterrupt) as problem:
        if stopped_by or isinstance(problem, KeyboardInterrupt):  # whatever it became on its way through a library
            status = 128 + (stopped_by or [signal.SIGINT])[0]
            print(_stopped(again), file=sys.stderr, flush=True)
            _end_later(THREADS_END_WITHIN_S, status)
            raise typer.Exit(status) from None
        if not isinstance(problem, AlignError):
            raise
        lines = problem.problems if isinstance(problem, RecipeError) else [str(problem)]
        for line in lines:
            print(line, file=sys.stderr)
        raise typer.Exit(2) from None
    finally:
        if not stopped_by:
            for each, handler in before.items():
                signal.signal(each, handler)


def _stopped(again: str) -> str:
    onwards = f", and `{again}` goes on from here" if again else ""
    return f"\nstopped; what is finished is kept{onwards}"


def _end_later(seconds: float, status: int, text: str = "") -> None:
    """Ends the process after a while, unless it has ended by itself."""
    signal.signal(signal.SIGALRM, lambda *_: _end_at_once(status, text))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)  # by then all threads have ended


def _end_at_once(status: int, text: str) -> None:
    if text:
        os.write(2, f"{text}\n".encode())  # no buffer, whose lock the interrupted thread may hold
    os._exit(status)


@app.command()
def run(
    recipe: RecipeFile,
    arguments: Arguments = None,
    out: Annotated[Path | None, typer.Option(help="folder of the run; runs/NAME where not given")] = None,
) -> None:
    """Run a recipe: the steps that are not done yet."""
    with _told(_command_line()):
        from align import pipeline
        from align.recipe import load_recipe
        from align.shipped import recipe_file

        if _process()[1] > 1:
            raise RunError(
                "align run starts the processes that a step asks for (processes: N in the recipe) by itself; don't "
                "start it under accelerate or torchrun. A stage alone may be: accelerate launch -m align.cli sft …"
            )
        checked = load_recipe(recipe_file(recipe), arguments or [], out)
        print(f"{checked.name}: {len(checked.steps)} steps, in {checked.out}", flush=True)
        manifests = pipeline.run(checked)
        console = _console()
        from align.ladder import print_ladder, print_steps

        print_steps(manifests, console)
        print_ladder(manifests, console)
        print(f"report: {_write_report(checked.out)}")


@app.command()
def check(recipe: RecipeFile, arguments: Arguments = None, out: Annotated[Path | None, typer.Option()] = None) -> None:
    """Check a recipe, and tell what running it would do."""
    with _told():
        from align.overview import print_plan
        from align.pipeline import plan
        from align.recipe import load_recipe
        from align.shipped import recipe_file

        checked = load_recipe(recipe_file(recipe), arguments or [], out)
        print_plan(checked, plan(checked), _console())


@app.command()
def doctor(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|STAGE", help="a recipe, or a stage that trains")],
    arguments: Arguments = None,
    out: Annotated[Path | None, typer.Option(help="folder of the run; runs/NAME where not given")] = None,
) -> None:
    """Rehearse each training of a recipe (or a stage alone) up to its first step: data, batches, memory, time."""
    with _told():
        from align.doctor import examine
        from align.pipeline import plan
        from align.recipe import load_recipe, load_stage
        from align.shipped import name_of, recipe_file, shipped

        given = arguments or []
        # some shipped recipes are named like a stage; whoever names its steps, or nothing, means the recipe
        recipes = {name_of(file) for file in shipped()}
        recipe_meant = recipe in recipes and all(each.startswith(("steps.", "engines.")) for each in given)
        if ":" in recipe or (recipe in TABLE and not recipe_meant):
            somewhere = [] if any(each.startswith("out=") for each in given) else [f"out={out or f'runs/{recipe}'}"]
            checked = load_stage(recipe, [*given, *somewhere])
        else:
            checked = load_recipe(recipe_file(recipe), given, out)
        examine(checked, plan(checked))


@app.command()
def status(folder: RunFolder) -> None:
    """Tell how far a run is."""
    with _told():
        from align.overview import print_status

        print_status(folder, _console())


@app.command()
def report(
    folder: RunFolder,
    out: Annotated[Path | None, typer.Option(help="the page's file; report.html in the run's folder")] = None,
) -> None:
    """Write the report page of a run, finished or not."""
    with _told():
        print(f"report: {_write_report(folder, out)}")


@app.command()
def trace(folder: RunFolder, row_id: Annotated[str, typer.Argument(metavar="ROW_ID")]) -> None:
    """Show a row's way back to its source: step by step, with generator, tags, verdicts and rewards."""
    with _told():
        from align.core.lineage import render_trace
        from align.core.lineage import trace as trace_row

        print(render_trace(trace_row(folder, row_id)))


@app.command()
def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a folder, RUN/STEP, or Hub id", show_default=False)],
    arguments: Arguments = None,
) -> None:
    """Talk to a model: system=…, temperature=…, top_p=…, max_tokens=…, seed=…, device=…, dtype=…."""
    with _told():
        from align.chat import chat as talk

        talk(model, arguments or [])


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a folder, RUN/STEP, or Hub id", show_default=False)],
    arguments: Arguments = None,
) -> None:
    """Write a model whole, LoRA merged, checked: out=FOLDER, dtype=…, push=user/name, private=true."""
    with _told():
        from align.export import export as export_model

        for line in export_model(model, arguments or []):
            print(line)


@app.command("make-tiny")
def make_tiny(arguments: Arguments = None) -> None:
    """Make the embedded world's tokenizer and base model again, from nothing: out=FOLDER, steps=…, seed=…."""
    with _told():
        from inspect import signature

        from align.tiny.make import make
        from align.yamlfile import split_argument

        known = list(signature(make).parameters)
        given = {".".join(keys): value for keys, value in map(split_argument, arguments or [])}
        if unknown := [key for key in given if key not in known]:
            raise RecipeError([f"align make-tiny: {key}: unknown key; {nearest(key, known)}" for key in unknown])
        if "out" not in given:
            raise RecipeError("align make-tiny: out is missing: the folder for the model, such as out=runs/tiny")
        print(make(**given))


@recipes_app.callback()
def recipes(context: typer.Context) -> None:
    """List the recipes that come with align."""
    if context.invoked_subcommand is None:
        from align.shipped import name_of, shipped

        for path, about in shipped().items():
            print(f"{name_of(path):<24} {about}")


@recipes_app.command("copy")
def copy_recipe(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    to: Annotated[Path, typer.Argument(metavar="[DEST]", help="a folder or a file; here where not given")] = Path(),
) -> None:
    """Copy a shipped recipe, to change it, with the files of its own that it reads."""
    with _told():
        from align.shipped import copy

        for made in copy(name, to):
            print(made)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"align {version('align-toolkit')}")
        except PackageNotFoundError:
            print("align, run from a checkout that is not installed")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version")
    ] = False,
) -> None:
    pass


def _stage_command(verb: str) -> Callable[..., None]:
    """The command `align VERB [FILE.yaml] key=value …`."""

    def command(
        arguments: Annotated[list[str] | None, typer.Argument(metavar="[FILE.yaml] key=value…")] = None,
        help_: Annotated[bool, typer.Option("--help", "-h", help="inputs and settings")] = False,
    ) -> None:
        with _told(_command_line()):
            given = arguments or []
            if help_ or not given:
                from align.helptext import print_stage_help
                from align.stages import load

                print_stage_help(load(verb), _console())
            elif verb == "rank" and any(each.startswith("--") for each in given):
                from align.annotate.commands import run as run_annotation

                run_annotation(given)
            elif verb == "replay" and Path(given[0]).is_dir():
                from align.replay import arguments_of

                _run_stage(verb, arguments_of(Path(given[0]), given[1:]))
            else:
                _run_stage(verb, given)

    return command


def _add_stage(verb: str, summary: str) -> None:
    app.command(
        verb,
        help=summary,
        add_help_option=False,
        rich_help_panel="Stages, each alone: align STAGE [FILE.yaml] key=value … out=FOLDER",
        context_settings={"ignore_unknown_options": True},
    )(_stage_command(verb))


for _verb, (_, _summary) in TABLE.items():
    _add_stage(_verb, _summary)


def _run_stage(verb: str, given: list[str]) -> None:
    from align import pipeline
    from align.ladder import print_ladder
    from align.recipe import load_stage

    file = None if "=" in given[0] or given[0].startswith("-") else Path(given[0])
    arguments = given[file is not None :]
    overwrite = [each.removeprefix("overwrite=") for each in arguments if each.startswith("overwrite=")]
    if not set(overwrite) <= {"true", "false"}:
        raise RecipeError(f"align {verb}: overwrite: true or false was expected, found {overwrite[-1]}")
    recipe = load_stage(verb, [each for each in arguments if not each.startswith("overwrite=")], file)
    rank, world = _process()
    (step,) = recipe.steps.values()
    if world > 1 and not step.stage.trains:
        raise RunError(f"align {verb}: it runs in one process; start it without accelerate or torchrun")
    if world > 1 and step.processes > 1:
        raise RunError(f"align {verb}: started in {world} processes, and processes={step.processes}; choose one")
    (manifest,) = pipeline.run(recipe, overwrite[-1:] == ["true"], rank)
    if rank == 0:
        print_ladder([manifest], _console())
        print(f"{recipe.out}")


def _process() -> tuple[int, int]:
    """This process's number and how many there are, as accelerate and torchrun tell it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _write_report(folder: Path, out: Path | None = None) -> Path:
    from align.report.page import write_report

    return write_report(folder, out)


def _command_line() -> str:
    import shlex

    return shlex.join(["align", *sys.argv[1:]])


def _console() -> Any:
    from rich.console import Console

    width = None if sys.stdout.isatty() else 140
    return Console(width=width, highlight=False)


if __name__ == "__main__":
    main()
