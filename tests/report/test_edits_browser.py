"""The page of edits in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from fasttrace_edit_pages import evaluation, fill, manifest, page_of, path_of

from fasttrace.report.result import Result


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("no Chromium on this machine: the page was not looked at in a browser")
    return found


@pytest.mark.browser
def test_nothing_is_cut_off_and_a_link_opens_its_edit(chromium: str, traced, tmp_path: Path):
    names = [f"an edit with a rather long name {i}" for i in range(2)]
    rows = [replace(r, before=r.before + 0.123, after=r.after - 0.0123 * i)
            for name in names for i, r in enumerate(evaluation(name))]  # fmt: skip
    page = page_of(fill(tmp_path, rows), {n: manifest("x" * 90) for n in names}, path=path_of(),
                   before=Result(traced[0]), after=Result(traced[1]))  # fmt: skip
    measure = """<script>addEventListener("load", () => {
    const cut = [];
    for (const box of document.querySelectorAll(".scroll"))
        if (box.scrollWidth > box.clientWidth) cut.push(box.textContent.slice(0, 30));
    document.body.dataset.cut = JSON.stringify(cut);
    document.body.dataset.over = document.documentElement.scrollWidth - innerWidth;
    location.hash = "edit-2";
    addEventListener("hashchange", () => {
        document.body.dataset.open = document.getElementById("edit-2").open
            && !document.getElementById("edit-1").open;
    });
    });</script></body>"""
    (tmp_path / "report.html").write_text(page.replace("</body>", measure))
    for width in (1280, 1400):
        done = subprocess.run(
            [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
             "--no-first-run", "--disable-background-networking", "--disable-component-update",
             "--disable-sync", "--virtual-time-budget=3000", f"--window-size={width},1000",
             f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
             (tmp_path / "report.html").as_uri()],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert 'data-cut="[]"' in done.stdout, re.search(r'data-cut="[^"]*"', done.stdout)
        assert int(re.search(r'data-over="(-?\d+)"', done.stdout)[1]) <= 0
        assert 'data-open="true"' in done.stdout
