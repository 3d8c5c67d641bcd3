"""The recipes that come with align: beside the modules in an installed package, at the top of a checkout."""

from __future__ import annotations

from pathlib import Path

from align.core.errors import RecipeError, RunError
from align.stages import nearest


def shipped() -> dict[Path, str]:
    """Each shipped recipe with its first line, which says what it is; other files that recipes read are left out."""
    found = {}
    for path in [*sorted(_folder().glob("*.yaml")), *sorted(_folder().glob("*/*.yaml"))]:
        text = path.read_text(encoding="utf-8")
        if "\nsteps:" in text:
            found[path] = text.split("\n", 1)[0].removeprefix("#").strip()
    return found


def name_of(recipe: Path) -> str:
    """The name of a shipped recipe: `quickstart`, `synthesis/reject`."""
    return recipe.relative_to(_folder()).with_suffix("").as_posix()


def _folder() -> Path:
    here = Path(__file__).resolve().parent
    return here / "recipes" if (here / "recipes").is_dir() else here.parent / "recipes"


def recipe_file(text: str) -> Path:
    """A recipe's file: the one of that path, or the shipped recipe of that name.

    Raises:
        RecipeError: it is a name, and neither a file nor a shipped recipe has it.
    """
    path = Path(text).expanduser()
    if path.is_file() or path.suffix in (".yaml", ".yml"):
        return path
    names = {name_of(each): each for each in shipped()}
    if text not in names and "/" in text and text.split("/")[0] not in {name.split("/")[0] for name in names}:
        return path
    if text not in names:
        raise RecipeError(f"{text}: no such file, and no recipe of that name is shipped; {nearest(text, list(names))}")
    return names[text]


def copy(name: str, to: Path) -> list[Path]:
    """Copies a recipe and the files beside it that it names; gives the copies.

    Raises:
        RecipeError: there is no such recipe.
        RunError: a copy would replace a file.
    """
    source = recipe_file(name)
    to = to / source.name if to.is_dir() else to
    text, recipes = source.read_text(encoding="utf-8"), shipped()
    read = [path for path in source.parent.iterdir() if path.is_file() and path.name in text and path not in recipes]
    copies = {to: source, **{to.parent / path.name: path for path in read}}
    if there := [str(path) for path in copies if path.exists()]:
        raise RunError(f"{', '.join(there)}: is there already; give another name or folder")
    to.parent.mkdir(parents=True, exist_ok=True)
    for path, original in copies.items():
        path.write_bytes(original.read_bytes())
    return list(copies)
