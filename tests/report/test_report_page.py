"""The page: self-contained, escaped, honest; looked at in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasttrace.errors import StoreError, UsageError
from fasttrace.report.charts import ramp, shade
from fasttrace.report.html import render, write_report
from fasttrace.report.result import Result
from fasttrace.store import Call, Manifest, Store

HOSTILE = '<script>alert("x")</script> & \'"><img src=https://evil.example/x onerror=alert(1)>'


@pytest.fixture(scope="module")
def manifest():
    command = "fasttrace trace fake --probes 'my probes.json' --out out"
    return Manifest(fixed={"dtype": "float32"}, calls=[Call.now(command)])


@pytest.fixture(scope="module")
def page(rows, fakes, manifest):
    pictures = {}
    for row in rows[:70]:
        pictures |= fakes.fake_pictures(row)
    return render(Result(rows, pictures), manifest)


def text_of(page: str) -> str:
    return re.sub(r"<[^>]*>", " ", page)


def test_has_every_section_and_number(page, rows):
    for words in (
        "Where fake keeps what it knows", "In short", "Where it sits", "Layer by token",
        "The causal sites", "n = 3, no interval", "noise floor", "fasttrace 0.1.0",
        "layer 0, self-attention", "mid, attention 0, cross-attention", "picture not kept",
        "There are too few prompts", "torch 2.13.0",
    ):  # fmt: skip
        assert words in page, words
    assert "fasttrace trace fake --probes &#39;my probes.json&#39; --out out" in page
    assert page.count('<rect class="cell') == 2 * 4 * 70 + 4 * 12 * 3 * 4
    assert "not run: unreachable" in page
    assert len(page) < 3_000_000


def test_needs_no_network_and_no_file(page):
    assert not re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?(?!#|data:|\$)[^\"')\s]+", page)
    assert "http:" not in page
    assert "https:" not in page
    assert "default-src 'none'" in page


def test_hostile_text_stays_text(rows, fakes, manifest):
    bad = [
        replace(r, key=f"bad{r.key}", prompt=HOSTILE, subject=HOSTILE, attribute=HOSTILE,
                model=HOSTILE, selector=HOSTILE, status=r.status)
        for r in rows if r.component == "text_encoder"
    ][:144]  # fmt: skip
    other = manifest.model_copy(update={"calls": [Call.now(f"fasttrace trace {HOSTILE}")]})
    page = render(Result(bad), other)
    assert "<script>alert" not in page
    assert "<img src=https" not in page
    assert page.count("<script>") == 1
    assert "&lt;script&gt;alert" in page


def test_groups_have_a_fixed_order(page):
    names = re.findall(r"<header><h3>(\w+)</h3>", page)
    assert names == ["object", "style", "colour", "action"]


def test_names_are_written_as_they_were_given(rows, manifest):
    page = render(Result([replace(r, attribute="van Gogh and SDXL") for r in rows]), manifest)
    assert page.count(">van Gogh and SDXL</h3>") == 3
    assert "capitalize" not in page


def test_numbers_within_the_noise_floor_are_marked(rows, manifest):
    page = render(Result([replace(r, noise_floor=0.4) for r in rows]), manifest)
    assert "within the noise floor of 0.4" in page
    assert 'class="veil"' in page
    below, run = re.search(r"UNet: (\d+) of (\d+) averages are within it", page).groups()
    assert 0 < int(below) < int(run) == 4 * 70


def test_left_out_pairs_are_counted_and_named(fakes, manifest):
    rows = list(fakes.fake_sweep(("object",), prompts=6, components=("unet",)))
    page = render(Result(rows), manifest)
    assert "1 of 6 pairs left out" in page
    score = next(f"{r.corrupt_score:.3g}" for r in rows if r.subject == "clock")
    assert (
        "an old clock on a wall, <mark>clock</mark>, seed 0: corrupting the subject did not "
        f"clearly worsen the score (clean {score}, corrupt {score})"
    ) in page


def test_a_corruption_that_changed_nothing_is_named(rows, manifest):
    failed = [replace(r, total_effect=0.0, effect=0.0, normalised_effect=None) for r in rows]
    page = text_of(render(Result(failed), manifest))
    assert "No site is causal: corrupting the subject did not clearly worsen the score" in page
    assert "above the noise floor and the threshold" not in page
    assert "No site is causal" not in text_of(render(Result(rows), manifest))


def test_whole_streams_carry_their_caveat(rows, manifest):
    page = render(Result([r for r in rows if r.kind == "resnet"]), manifest)
    assert "Among the most causal sites: ResNet. Their output is the whole stream" in page
    page = render(Result([r for r in rows if r.kind == "attn2"]), manifest)
    assert "whole stream" not in page


def test_damaged_pictures_give_one_line(rows, fakes, tmp_path: Path, caplog):
    with Store.open(tmp_path, fixed={}, call=Call.now("fasttrace trace x")) as store:
        for row in rows[:70]:
            store.add(row, fakes.fake_pictures(row))
    for path in (tmp_path / "pictures").glob("*.png"):
        path.write_bytes(b"not a picture")
    write_report(tmp_path)
    (line,) = caplog.messages
    assert "without 72 damaged pictures" in line


def test_the_strips_say_which_way_they_go(page):
    strip = page[page.index('aria-label="UNet sites by causal effect') :].split("</svg>")[0]
    assert re.findall(r'<text class="block"[^>]*>(\w+)<', strip) == ["down", "mid", "up"]


def test_with_enough_prompts_intervals_and_marks_appear(fakes, manifest):
    rows = []
    for seed in range(12):
        rows += list(fakes.fake_sweep(("style",), prompts=2, seeds=(seed,), components=("unet",)))
    page = render(Result(rows), manifest)
    assert "no interval" not in text_of(page)
    assert 'class="range"' in page
    assert re.search(r"p = \S+ \*", page)


def test_unfinished_sweeps_say_so(rows, manifest):
    open_ended = manifest.model_copy(update={"calls": [Call.now("x", planned=10**6)]})
    assert "Unfinished" in render(Result(rows), open_ended)


def test_several_metrics(rows, manifest):
    both = Result([*rows, *(replace(r, key=r.key + "b", metric="attribute") for r in rows)])
    assert "this page shows clip_score" in render(both, manifest)
    assert "this page shows attribute" in render(both, manifest, metric="attribute")
    with pytest.raises(UsageError, match="no row was scored with 'hat'"):
        render(both, manifest, metric="hat")


def test_windows_are_groups_of_their_own(rows, manifest):
    unet = [r for r in rows if r.component == "unet" and r.attribute == "object"]
    late = [replace(r, key=r.key + "w", window_start=10) for r in unet]
    early = [replace(r, window_stop=10) for r in unet]
    page = render(Result([*early, *late]), manifest)
    names = re.findall(r"<header><h3>([^<]+)</h3>", page)
    assert names == ["object, cond, calls 0 to 9", "object, cond, calls 10 to 19"]


def test_sites_without_blocks_or_layers_still_draw(rows, manifest):
    odd = [replace(r, site=f"unet.something.{r.site_index}") for r in rows if r.kind == "ff"]
    assert "something.5" in render(Result(odd), manifest)


def test_written_into_the_directory(rows, fakes, tmp_path: Path):
    with pytest.raises(StoreError, match="holds no results"):
        write_report(tmp_path / "nothing")
    with Store.open(tmp_path, fixed={}, call=Call.now("fasttrace trace x")) as store:
        with pytest.raises(StoreError, match="no finished rows"):
            write_report(tmp_path)
        for row in rows[:70]:
            store.add(row, fakes.fake_pictures(row))
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    assert path.read_text().count("data:image/webp;base64,") > 3
    assert (tmp_path / "results.parquet").is_file()


def test_ramps_go_from_quiet_to_strong():
    for theme in ("light", "dark"):
        light = [sum(bytes.fromhex(c[1:])) for c in ramp(theme, 32)]
        steps = np.diff(light)
        assert (steps < 0).all() if theme == "light" else (steps > -12).all()
    assert shade(0.0, 1.0) == "p0"
    assert shade(1.0, 1.0) == "p31"
    assert shade(-1.0, 1.0) == "n7"
    assert shade(-9.0, 1.0) == "n7"
    assert shade(float("nan"), 1.0) == "none"


FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--virtual-time-budget=3000",
)  # fmt: skip


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("no Chromium on this machine: the page was not looked at in a browser")
    return found


def look(chromium: str, page: Path, profile: Path, *flags: str) -> str:
    done = subprocess.run(
        [chromium, *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def near(picture: Path, colour: str) -> int:
    """How many pixels have a colour, give or take 3 a channel."""
    pixels = np.asarray(Image.open(picture).convert("RGB"), int)
    target = np.array(list(bytes.fromhex(colour[1:])))
    return int((abs(pixels - target).max(-1) <= 3).sum())


@pytest.mark.browser
def test_a_browser_shows_it(chromium: str, page: str, tmp_path: Path):
    """Laid out without overflow; hovering works; coloured in both themes without its script."""
    path = tmp_path / "report.html"
    # What a person would do: point at a cell.
    path.write_text(
        page.replace(
            "</body>",
            """<script>addEventListener("load", () => {
            const cell = document.querySelector("rect.cell[data-sheet]");
            cell.dispatchEvent(new PointerEvent("pointerenter", {clientX: 9, clientY: 9}));
            document.body.dataset.over = document.documentElement.scrollWidth - innerWidth;
            });</script></body>""",
        )
    )
    dom = look(chromium, path, tmp_path / "profile", "--window-size=1400,1000", "--dump-dom")
    assert 'data-ready="yes"' in dom
    assert re.search(r'id="tip"[^>]*display: block.*restored here', dom, re.S)
    assert int(re.search(r'data-over="(-?\d+)"', dom)[1]) <= 0

    path.write_text(re.sub(r"<script>.*?</script>", "", page, flags=re.S))
    for theme, flag in (("light", "1"), ("dark", "0")):
        shot = tmp_path / f"{theme}.png"
        look(
            chromium, path, tmp_path / theme, "--window-size=1400,2200", f"--screenshot={shot}",
            f"--blink-settings=preferredColorScheme={flag}",
        )  # fmt: skip
        strongest, quiet = ramp(theme, 32)[-1], ramp(theme, 32)[0]
        assert near(shot, strongest) > 500, theme
        assert near(shot, quiet) > 5_000, theme


@pytest.mark.browser
def test_nothing_is_cut_off(chromium: str, fakes, manifest, tmp_path: Path):
    """Whole captions as groups, the widest words in the table: at the width of a small laptop."""
    rows = [
        replace(r, prompt=f"{r.prompt}, a very long caption in the style of Van Gogh and others")
        for r in fakes.fake_sweep(prompts=5, components=("unet",))
    ]
    path = tmp_path / "report.html"
    measure = """<script>addEventListener("load", () => {
    const cut = [];
    for (const text of document.querySelectorAll("figure.chart text.group"))
        if (text.getBoundingClientRect().left < text.closest("svg").getBoundingClientRect().left)
            cut.push(text.textContent);
    for (const box of document.querySelectorAll(".scroll"))
        if (box.scrollWidth > box.clientWidth) cut.push(box.textContent.slice(0, 30));
    for (const cell of document.querySelectorAll("table.causal :is(th, td.num)"))
        if (cell.scrollWidth > cell.clientWidth) cut.push(cell.textContent);
    document.body.dataset.cut = JSON.stringify(cut);
    });</script></body>"""
    for by in ("prompt", "all"):
        path.write_text(render(Result(rows), manifest, by=by).replace("</body>", measure))
        for width in (1100, 1280):
            size = f"--window-size={width},1000"
            dom = look(chromium, path, tmp_path / f"{by}{width}", size, "--dump-dom")
            assert 'data-cut="[]"' in dom, re.search(r'data-cut="[^"]*"', dom)
