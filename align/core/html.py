"""HTML built from elements, so that whatever isn't an element is escaped: no text of a model can become markup."""

from __future__ import annotations

from html import escape

VOID = frozenset({"meta", "br", "line", "rect", "circle", "path", "polyline", "link", "polygon"})
"""Elements without content; the SVG ones among them are closed in themselves."""


class Html(str):
    """Text that is markup already; made by `el` alone."""

    __slots__ = ()


Child = str | int | float | None


def el(tag: str, *children: Child, **attributes: str | int | float | None) -> Html:
    """An element.

    Args:
        tag: its name.
        children: what stands in it; anything but `Html` is escaped, None is left out.
        attributes: an underscore at the end is dropped (`class_`), those within become hyphens; None is left out.
    """
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(str(value), quote=True)}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in VOID and not children:
        return Html(f"<{tag}{written}/>")
    return Html(f"<{tag}{written}>{join(*children)}</{tag}>")


def join(*children: Child) -> Html:
    """Elements and escaped text one after the other."""
    return Html(
        "".join(
            child if isinstance(child, Html) else escape(str(child), quote=True)
            for child in children
            if child is not None
        )
    )


def svg(width: float, height: float, label: str, *children: Child, class_: str = "chart") -> Html:
    """A picture that shrinks with the page; `label` tells it to those who can't see it."""
    return el(
        "svg", *children, viewBox=f"0 0 {width:g} {height:g}", width=f"{width:g}", height=f"{height:g}",
        role="img", aria_label=label, class_=class_,
    )  # fmt: skip


def table(head: list[Child], rows: list[list[Child]], class_: str = "", text_columns: int = 1) -> Html:
    """A table that scrolls by itself where it is wider than the page; all but the first columns are figures."""

    def cells(kind: str, values: list[Child]) -> Html:
        return join(*(el(kind, v, class_="text" if i < text_columns else "figure") for i, v in enumerate(values)))

    body = [el("tr", cells("td", row)) for row in rows]
    return el(
        "div",
        el("table", el("thead", el("tr", cells("th", head))), el("tbody", *body), class_=class_ or None),
        class_="wide",
    )
