"""The page in a real browser: ranking by keyboard, hostile texts, and a server that is killed in the middle."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reward.annotations import read_annotations
from tests.annotate.answers import ARABIC, EVIL, TURNED, ids, make_table

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PLAYWRIGHT = importlib.util.find_spec("playwright") is not None

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None or not PLAYWRIGHT, reason="there is no Chromium, or no playwright"),
]


class Serving:
    """`align rank --serve` as a process of its own."""

    def __init__(self, table: Path, out: Path) -> None:
        keys = [f"completions={table}", f"out={out}", "annotator=ann"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "align.cli", "rank", "--serve", *keys],
            stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        self.said: list[str] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            if line.startswith("open "):
                self.url = line.split()[1]
                return
        raise AssertionError("".join(self.said))

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        )
        yield chromium
        chromium.close()


class Seen:
    """A page, with what it logged and asked for."""

    def __init__(self, browser: Any, url: str, width: int = 1280) -> None:
        self.page = browser.new_context(viewport={"width": width, "height": 860}).new_page()
        self.console: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.console.append(message.text))
        self.page.on("pageerror", lambda problem: self.console.append(str(problem)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)

    def press(self, keys: str) -> None:
        for key in keys.split():
            self.page.keyboard.press(key)

    def text(self, selector: str) -> str:
        found: str = self.page.locator(selector).inner_text()
        return found

    def comes(self, selector: str, text: str) -> None:
        from playwright.sync_api import expect

        expect(self.page.locator(selector)).to_contain_text(re.compile(text))

    def letters(self) -> list[str]:
        found: list[str] = self.page.locator(".letter").all_inner_texts()
        return found


def test_ranking_by_keyboard_survives_a_kill_and_hostile_texts_stay_texts(browser: Any, tmp_path: Path) -> None:
    """Four prompts are shown (p0, p1, p2, p4). Two are saved, the server is killed with the third on the page."""
    out = tmp_path / "ann.jsonl"
    serving = Serving(make_table(tmp_path / "table"), out)
    try:
        seen = Seen(browser, serving.url)
        seen.comes("#progress", "^0 of 4 ranked$")

        # Hostile texts: shown as they are, and nothing of them happened.
        shown = seen.text("main")
        assert EVIL in shown.replace("\n", "") and "Hello <script>" in shown
        assert "safe U+202Egnp.exeU+202C and U+0007 a bell" in shown
        assert TURNED not in shown
        count = "[...document.querySelectorAll('script, img, iframe')].map((each) => each.tagName)"
        assert seen.page.evaluate(count) == ["SCRIPT"], "the page's own"
        assert seen.page.title() == "0 of 4 · align"
        arabic = seen.page.locator(".text", has_text=ARABIC).first
        assert arabic.evaluate("(each) => getComputedStyle(each).direction") == "rtl"
        assert "secret" not in seen.page.content(), "blind: no generator on the page"
        barred = "(() => { try { document.body.innerHTML = '<b>x</b>'; return 'made' } catch { return 'barred' } })()"
        assert seen.page.evaluate(barred) == "barred"
        seen.console.clear()  # the browser told of that try

        # 2 1 1 leaves the last one out; Enter must wait for it. Then: the third by arrow, to 4.
        seen.press("2 1 1 Enter")
        seen.comes("#message", "Still without a rank: D")
        assert out.read_text() == ""
        seen.press("3 ArrowLeft 4")
        assert seen.letters() == ["A · 2", "B · 1", "C · 4", "D · 3"]
        order = [each["id"] for each in _shown(seen)["answers"]]
        seen.press("x Enter")
        seen.comes("#progress", "^1 of 4 ranked")
        seen.comes("#message", "Saved.")
        (said,) = read_annotations(out).standing.values()
        assert dict(said.ranks) == dict(zip(order, (2, 1, 4, 3), strict=True))
        assert (said.prompt_id, said.annotator, said.good) == ("p0", "ann", False)

        # Help opens and closes, skip and undo: back to what was said, which is saved once more.
        seen.press("?")
        assert seen.page.locator("#help").is_visible()
        seen.press("Escape s")
        seen.comes("#progress", "1 of 4 ranked · 1 skipped")
        seen.press("u")
        seen.comes("#message", "Taken back")
        seen.press("1 1 2 Enter")
        seen.comes("#progress", "^2 of 4 ranked")
        assert seen.page.locator(".card").count() == 8

        # Killed: what the page had said was saved is there; what it shows now is not, and it says so.
        serving.kill()
        seen.press("1 2 3 4 5 6 7 8 Enter")
        seen.comes("#message", "The server does not answer. .* not saved yet")
        assert seen.letters()[0] == "A · 1", "the ranks are still on the page"
        standing = read_annotations(out).standing
        assert list(standing) == [("ann", "p0"), ("ann", "p1")]
        assert sorted(standing["ann", "p1"].ranks.values()) == [1, 1, 2]
        assert [line for line in seen.console if "ERR_CONNECTION_REFUSED" not in line] == []
        with out.open("a") as file:
            file.write('{"prompt_id": "p2", "anno')  # as a crash of the machine might leave it

        serving = Serving(tmp_path / "table", out)
        assert "cut short by a crash" in serving.said[0] and "2 of 4 prompts ranked by ann" in serving.said[1]
        again = Seen(browser, serving.url, width=390)
        again.comes("#progress", "2 of 4 ranked")
        assert again.page.locator(".card").count() == 8, "it goes on where it was"
        assert again.page.evaluate("document.documentElement.scrollWidth") <= 390
        again.press("1 2 3 4 5 6 7 8 Enter")
        again.comes("#progress", "3 of 4 ranked")
        again.press("s")
        again.comes("#done", "That was the last one")
        again.page.get_by_text("Go through the skipped ones").click()
        again.page.get_by_role("button", name="A: rank 1").click()
        again.page.get_by_role("button", name="B: rank 2").click()
        again.page.get_by_role("button", name="Save").click()
        again.comes("#done", "4 ranked, 0 skipped")
        assert {key: len(said.ranks) for key, said in read_annotations(out).standing.items()} == {
            ("ann", "p0"): 4, ("ann", "p1"): 3, ("ann", "p2"): 8, ("ann", "p4"): 2,
        }  # fmt: skip
        assert again.console == []
        assert all(url.startswith("http://127.0.0.1:") for url in seen.requests + again.requests)
        assert set(read_annotations(out).standing["ann", "p2"].ranks) == set(ids(2))
    finally:
        serving.kill()


def _shown(seen: Seen) -> dict[str, Any]:
    """The item on the page, as its server gives it."""
    found = seen.page.evaluate(
        "fetch('/api/next', {headers: {'X-Align-Token': location.hash.slice(1)}}).then((answer) => answer.text())"
    )
    item: dict[str, Any] = json.loads(found)["item"]
    return item
