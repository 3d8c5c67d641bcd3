"""The page of a made-up run: what it shows, that nothing in it can become markup, and how a browser takes it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from align.core.errors import RunError
from align.core.html import Html, el
from align.core.plots import best_of_n_chart, charts_of, curve_charts, reliability_chart
from align.report.charts import ladder_chart
from align.report.graph import pipeline_picture
from align.report.page import write_report
from align.report.source import Run, Step, read_run
from tests.report.a_run import EVIL, Builder, completion, quickstart, reward_summary


class Read(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = quickstart(tmp_path_factory.mktemp("run"))
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(run_folder: Path) -> str:
    return (run_folder / "report.html").read_text()


def test_every_step_has_a_card_and_a_box_that_leads_to_it(run_folder: Path, page: str) -> None:
    read = Read(page)
    ids = {value for name, value in read.attributes if name == "id"}
    links = {value for name, value in read.attributes if name == "href"}
    steps = [step.name for step in read_run(run_folder).steps]
    assert {f"step-{name}" for name in steps} <= ids
    assert all(link.removeprefix("#") in ids for link in links), "every link leads somewhere on the page"
    assert read.tags["details"] == len(steps) == 23
    assert "22 of 23" in read.text


def test_what_a_model_said_is_text_and_never_markup(page: str) -> None:
    read = Read(page)
    assert EVIL in read.text, "it is shown as it was said"
    assert read.tags["script"] == 0
    assert read.tags["img"] == 0
    assert not [name for name, _ in read.attributes if name.startswith("on")]


def test_names_in_settings_attributes_and_manifests_are_escaped_too(tmp_path: Path) -> None:
    run = Builder(tmp_path)
    name = "a\"b'<b>"
    run.step(name, f"<i>{EVIL}", rows=[completion(1, 0, "x", True)], settings={EVIL: [EVIL]}, summary={EVIL: {EVIL: 1}})
    run.step(
        "warned", "dpo", {EVIL: name}, summary={"warnings": [EVIL]}, curves=[{"step": 1, EVIL: 1}, {"step": 2, EVIL: 2}]
    )
    read = Read(write_report(run.finish()).read_text())
    assert read.tags["script"] == read.tags["img"] == read.tags["i"] == 0
    assert not [attribute for attribute, _ in read.attributes if attribute.startswith("on")]
    assert ("id", f"step-{name}") in read.attributes


def test_the_page_asks_for_nothing_from_outside(page: str) -> None:
    read = Read(page)
    assert not [value for name, value in read.attributes if name in ("src", "srcset", "action", "data")]
    assert all(value.startswith("#") for name, value in read.attributes if name == "href")
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_the_ladder_compares_neighbours_and_sets_controls_apart(page: str) -> None:
    """`rft` stands against `sft`; the control against the rung that it is a control of, no rung against a control.

    `control_unfiltered` is made by written, demonstrations, sft, pool, tagged, ontology, selected, samples, unfiltered;
    `rft` by eight of these and by kept (8 of 10 alike), `dpo` by rft, scored and pairs as well (8 of 13).
    """
    ladder = page[page.index('id="ladder"') : page.index('id="selection"')]
    rungs, controls = ladder.split("Controls</h3>")
    for before in ("tiny", "sft", "rft"):
        assert len(re.findall(f"<small>{before} · z ", rungs)) == 2, "greedy and sampled"
    assert "control_unfiltered" not in rungs
    assert "<small>rft · z " in controls
    assert "6 cut off" in rungs


def test_the_mcnemar_column_is_of_the_rows_on_disk(run_folder: Path, page: str) -> None:
    from align.evaluate.scores import compare

    steps = {step.name: step for step in read_run(run_folder).steps}
    tables = (steps["sft_eval"].table(), steps["rft_eval"].table())
    assert tables[0] is not None
    assert tables[1] is not None
    found = compare(tables[0], tables[1])["greedy"]
    assert f"sft · z {found['z']:+.1f}" in page
    assert f">{found['b'] - found['a']:+.1f}<" in page


def test_tags_before_and_after_are_shares_of_pool_and_chosen(page: str) -> None:
    """Addition: 1,800 of 2,600 before, 120 of 250 after."""
    assert "69 → 48" in page
    assert "addition, before: 69.2%" in page


def test_a_closed_gate_is_shown_with_its_reason(page: str) -> None:
    reward = page[page.index('id="reward"') : page.index('id="training"')]
    assert reward.count("closed") == 1
    assert "less often (0.40) than samples (0.50)" in reward


def test_what_a_step_kept_and_why_it_lost_the_rest_are_tables(page: str) -> None:
    card = page[page.index('id="step-samples"') : page.index('id="step-kept"')]
    for cell in ("sampled", "1,090", "wrong", "1,000", "&lt;b&gt;cut off&lt;/b&gt;"):
        assert f">{cell}</td>" in card
    assert "Yield" in card and "Lost" in card


def test_training_curves_and_warnings_are_shown(page: str) -> None:
    training = page[page.index('id="training"') : page.index('id="steps"')]
    by_step = {"sft": 4, "rft": 3, "control_unfiltered": 2, "dpo": 7, "reward": 3}
    assert training.count("<polyline") == sum(by_step.values())
    dpo = training[training.index("#step-dpo") : training.index("#step-reward")]
    assert [dpo.index(f"<h4>{heading}</h4>") for heading in ("Learning", "Preferences", "Machinery")]
    assert dpo.count(">logps</text>") == 1, "chosen and rejected in one frame"
    assert dpo.count('class="curve chosen"') == dpo.count('class="curve rejected"') == 1
    assert "the chosen completions lost 0.4 nats" in page[page.index('id="step-dpo"') :]


def test_rows_of_several_verdicts_are_shown_with_their_facts(run_folder: Path) -> None:
    steps = {step.name: step for step in read_run(run_folder).steps}
    rows = steps["samples"].some_rows(4)
    assert {row["verdict"] for row in rows} == {"passed", "failed"}
    assert len({row["family"] for row in rows}) > 1
    assert steps["sft"].some_rows(4) == []


def test_a_step_whose_settings_have_changed_since_counts_as_to_do(tmp_path: Path) -> None:
    run = Builder(tmp_path)
    run.step("one", "prompts", rows=[completion(1, 0, "x", True)])
    run.steps[0]["fingerprint"] = "another"
    step = read_run(run.finish()).steps[0]
    assert step.state == "to do"
    assert step.manifest is None


def test_one_step_alone_and_a_run_without_its_file_have_a_page(tmp_path: Path) -> None:
    folder = quickstart(tmp_path / "run")
    (folder / "run.json").unlink()
    names = [step.name for step in read_run(folder).steps]
    assert names.index("written") < names.index("demonstrations") < names.index("sft") < names.index("sft_eval")
    alone = write_report(folder / "samples", tmp_path / "alone.html")
    assert "samples" in alone.read_text()
    with pytest.raises(RunError, match="is no run"):
        write_report(tmp_path)


def test_boxes_do_not_overlap_and_edges_run_downwards(run_folder: Path) -> None:
    picture = pipeline_picture(read_run(run_folder))
    boxes = [
        (float(x), float(y))
        for x, y in re.findall(r'<rect x="([\d.-]+)" y="([\d.-]+)" width="196.0" height="64.0" rx="9"', picture)
    ]
    assert len(boxes) == 17, "23 steps less 5 evaluations and what only they read"
    for i, (x, y) in enumerate(boxes):
        assert x >= 0
        assert not [1 for ox, oy in boxes[i + 1 :] if abs(ox - x) < 196 and abs(oy - y) < 64]
    for path in re.findall(r'<path d="([^"]+)"', picture):
        heights = [float(number) for number in re.findall(r"[\d.-]+", path)[1::2]]
        assert heights == sorted(heights)


def test_a_run_that_has_not_begun_and_one_that_takes_from_itself_are_drawn() -> None:
    nowhere = Path("nowhere")
    steps = [Step("a", "tag", ("b",), (), "to do", nowhere, None), Step("b", "tag", ("a",), (), "to do", nowhere, None)]
    assert pipeline_picture(Run("x", None, steps)).count("<a ") == 2
    assert "<svg" in pipeline_picture(Run("x", None, []))


def test_the_ladders_points_lie_where_the_scores_are() -> None:
    """The axis runs from x = 170 (0%) to x = 696 (100%): 50% at 433, 25% at 301.5."""
    scores = {"greedy": {"overall": {"score": 50.0, "low": 25.0, "high": 100.0, "n": 9}}}
    chart = ladder_chart([("a", scores)])
    assert 'cx="433.0"' in chart
    assert 'x1="301.5" x2="696.0"' in chart


def test_curves_leave_out_what_is_no_number_and_thin_long_ones() -> None:
    lines = [{"step": i, "loss": float("nan") if i == 5 else 1 / (i + 1), "epoch": i / 9} for i in range(2000)]
    (chart,) = curve_charts(lines)["Learning"]
    points = re.search(r'points="([^"]+)"', chart)
    assert points is not None
    assert len(points[1].split()) == 240
    assert "nan" not in chart
    assert curve_charts([{"step": 1, "loss": 1.0}]) == {}


CURVE = [
    {"n": n, "groups": 40, "sampled": 0.5, "best_of_n": best, "oracle": 0.9, "low": best - 0.1, "high": best + 0.1,
     "gain_low": best - 0.6, "gain_high": best - 0.4}
    for n, best in ((1, 0.5), (2, 0.6), (4, 0.8))
]  # fmt: skip


def test_best_of_n_is_drawn_over_doublings_and_is_green_where_it_is_surely_above_samples() -> None:
    """The frame runs from 40% (y = 116) to 90% (y = 26) and from n = 1 (x = 44) over 2 (x = 132) to 4 (x = 220)."""
    chart = best_of_n_chart("math", CURVE)
    assert chart is not None
    assert 'points="44.0,98.0 132.0,80.0 220.0,44.0" class="curve chosen"' in chart
    assert "best of 4: 80.0%, samples 50.0% (surely above samples)" in chart
    worse = [one | {"gain_low": -0.3, "gain_high": -0.1} for one in CURVE]
    assert 'class="curve rejected"' in (best_of_n_chart("math", worse) or "")
    unsure = [one | {"gain_low": -0.1, "gain_high": 0.1} for one in CURVE]
    assert 'class="curve"' in (best_of_n_chart("math", unsure) or "")
    assert best_of_n_chart("math", CURVE[:1]) is None


def test_calibration_shows_pairs_that_are_less_often_right_than_a_coin() -> None:
    """From 50% said (x = 44) to 100% (x = 220), from 0% right (y = 116) to 100% (y = 26)."""
    bins = [{"said": 0.75, "right": 0.25, "pairs": 9}, {"said": 1.0, "right": 1.0, "pairs": 4}]
    chart = reliability_chart("all", {"bins": bins})
    assert chart is not None
    assert 'cx="132.0" cy="93.5" r="6.0"' in chart and 'cx="220.0" cy="26.0"' in chart
    assert reliability_chart("all", None) is None


def test_a_reward_models_curves_and_calibration_stand_under_its_table(tmp_path: Path) -> None:
    summary = reward_summary()
    bins = [{"said": 0.6, "right": 0.5, "pairs": 9}, {"said": 0.9, "right": 0.8, "pairs": 4}]
    calibration = {"bins": bins, "ece": 0.1, "temperature": 1.5, "ece_fitted": 0.02}
    summary["overall"] |= {"best_of_n_curve": CURVE, "calibration": calibration}
    summary["by_family"]["math"]["best_of_n_curve"] = CURVE
    run = Builder(tmp_path)
    run.step("judge", "reward", summary=summary)
    page = write_report(run.finish()).read_text()
    section = page[page.index('id="reward"') : page.index('id="steps"')]
    assert section.count('class="band"') == 2, "all and math"
    assert "off by 10.0 points on average, 2.0 with scores divided by 1.50" in section


def test_chosen_and_rejected_and_families_share_a_frame_and_machinery_comes_last() -> None:
    names = (
        "grad_norm", "logps/chosen_change", "logps/rejected_change", "reward_better", "reward_worse", "loss",
        "heldout/score", "heldout/score/math", "heldout/score/tag", "kl", "tokens",
    )  # fmt: skip
    lines = [{"step": step, **dict.fromkeys(names, float(step))} for step in (1, 2)]
    assert [(chart.heading, chart.title, list(chart.series)) for chart in charts_of(lines)] == [
        ("Learning", "loss", [""]),
        ("Held out", "heldout/score", [""]),
        ("Held out", "heldout/score by family", ["math", "tag"]),
        ("Preferences", "logps change", ["chosen", "rejected"]),
        ("Preferences", "reward", ["better", "worse"]),
        ("Preferences", "kl", [""]),
        ("Machinery", "grad_norm", [""]),
    ]


def test_what_a_roll_back_undid_stands_beside_the_curve(tmp_path: Path) -> None:
    """The frame runs from step 0 (x = 44) to 20 (x = 220), and from 20 (y = 116) to 60 (y = 26)."""
    looks = [
        {"step": 0, "episode": 0, "heldout/score": 50.0},
        {"step": 10, "episode": 1, "pairs": 9, "rolled_back": 1.0, "heldout/score": 20.0},
        {"step": 20, "episode": 2, "pairs": 9, "rolled_back": 0.0, "heldout/score": 60.0},
    ]
    assert [chart.title for chart in charts_of(looks)] == ["heldout/score"]
    (chart,) = curve_charts(looks)["Held out"]
    assert 'points="44.0,48.5 220.0,26.0"' in chart
    assert '<circle cx="132.0" cy="116.0" r="3.5" class="undone"><title>20 at step 10, rolled back</title>' in chart

    record = {"prompts": 8, "pairs": 9, "reward": -1.25, "length": 17.0, "probe": {"score": 20.0, "kl": 0.5}}
    why = ["the held-out score fell from 50 to 20"]
    bad = record | {"episode": 1, "rolled_back": why, "stopped": ""}
    good = record | {"episode": 2, "rolled_back": [], "stopped": ""}
    run = Builder(tmp_path)
    run.step("online", "online-dpo", summary={"episodes": [bad, good]})
    page = write_report(run.finish()).read_text()
    section = page[page.index('id="training"') : page.index('id="steps"')]
    assert section.count(">kept<") == section.count(">rolled back<") == 1
    assert f"<b>episode 1</b>: {why[0]}" in section
    assert "held-out score" in section and "benign help" not in section  # nothing harmful was asked


def test_markup_comes_from_elements_alone() -> None:
    assert el("p", "<b>", el("b", "&"), None, 3, title='"') == '<p title="&quot;">&lt;b&gt;<b>&amp;</b>3</p>'
    assert el("meta", charset="utf-8") == '<meta charset="utf-8"/>'
    assert isinstance(el("p"), Html)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


browser = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
]


def opened(page: Path, folder: Path, width: int) -> tuple[Read, list[str], str]:
    """The page as a browser has it in the end, the lines of its console, and its network log."""
    assert CHROMIUM is not None
    log = folder / "net.json"
    told = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--disable-background-networking", "--no-first-run", f"--user-data-dir={folder / 'profile'}",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--log-net-log={log}", "--enable-logging=stderr",
            f"--window-size={width},900", f"--screenshot={folder / 'page.png'}", "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    console = [line for line in told.stderr.splitlines() if "CONSOLE" in line]
    return Read(told.stdout), console, log.read_text()


class TestInABrowser:
    pytestmark = browser

    @pytest.mark.parametrize("width", [1280, 500])
    def test_the_page_is_shown_without_errors_or_requests(self, run_folder: Path, tmp_path: Path, width: int) -> None:
        read, console, network = opened(run_folder / "report.html", tmp_path, width)
        assert console == []
        assert "evil.example" not in network
        assert read.tags["svg"] > 20
        assert read.tags["script"] == 0
        assert EVIL in read.text
        assert (tmp_path / "page.png").stat().st_size > 20_000

    def test_these_checks_notice_an_error_and_a_request(self, tmp_path: Path) -> None:
        page = tmp_path / "bad.html"
        page.write_text("<img src=https://evil.example/x.png><script>console.error('x')</script>")
        read, console, network = opened(page, tmp_path, 500)
        assert read.tags["script"] == 1
        assert console
        assert "evil.example" in network
