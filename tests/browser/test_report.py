"""The report as a browser shows it: nothing on its console, no request, every figure, both themes, and the search.

`BCFT_CHROMIUM` names a Chromium; the step `report` of the continuous integration sets it.
"""

import http.server
import os
import re
import subprocess
import threading
from typing import ClassVar

import pytest
from helpers.pages import read_page
from helpers.report_runs import (
    attempt,
    cloned_run,
    evaluated_run,
    filtered_run,
    line,
    measured,
    write_measured,
    write_problems,
)
from PIL import Image

from bcft.reporting.report import write_report

CHROMIUM = os.environ.get("BCFT_CHROMIUM", "")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="BCFT_CHROMIUM names no Chromium")
EVIL = "<script>document.title = 'acted'</script><img src=http://example.org/x><style>@import 'http://example.org/y'"
ACCENT, PAPER = {"light": (18, 87, 181), "dark": (111, 177, 252)}, {"light": (255, 255, 255), "dark": (21, 24, 28)}
FIGURES = {
    "filtered": {"success", "decisions", "rewards", "problems", "diversity", "time"},
    "sft": {"success", "loss"},
    "evaluate": {"success"},
}


class Requests(http.server.BaseHTTPRequestHandler):
    """A proxy that answers nothing and keeps what it was asked for, without what a browser asks for itself."""

    asked: ClassVar[list[str]] = []

    def log_message(self, *_):
        if not re.match(r"(http://)?[\w.]*\b(google|googleapis|gvt1)\.com\b", self.path):
            self.asked.append(self.path)

    def do_GET(self):
        self.send_error(404)

    def do_CONNECT(self):
        self.send_error(404)


@pytest.fixture
def proxy():
    Requests.asked.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Requests) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def chromium(page, folder, proxy, *arguments, dark=False):
    """Open a page with the preferred color scheme; return what was printed, and the lines of the console."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
        f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        f"--proxy-server=http://127.0.0.1:{proxy}", "--proxy-bypass-list=<-loopback>",
        "--enable-logging=stderr", "--window-size=1200,5000", *arguments, page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return done.stdout, [text for text in done.stderr.splitlines() if "CONSOLE" in text]


def page_of(kind, path):
    if kind == "filtered":
        rounds = [line(n, dev=measured(n + 1), failed=1, duplicate=1) for n in (1, 2)]
        attempts = [
            [attempt(n, "a", 0, turns=(EVIL,)), attempt(n, "a", 1, reward=0.0, decision="failed")] for n in (1, 2)
        ]
        filtered_run(path, rounds=rounds, best=2, attempts=attempts)
        write_measured(path / "round_002", measured(3))
        write_problems(path, {"a": EVIL})
    elif kind == "sft":
        cloned_run(path, losses=[{"step": n, "loss": 1 / n, "learning_rate": 0.1} for n in (1, 2, 3)])
    else:
        evaluated_run(path, against=measured(1))
    return write_report(path)


@pytest.mark.parametrize("kind", FIGURES)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_page_is_drawn_in_both_themes_without_a_request_or_a_message(tmp_path, proxy, kind, theme):
    page = page_of(kind, tmp_path / "run")
    picture = tmp_path / "page.png"
    _, console = chromium(page, tmp_path, proxy, f"--screenshot={picture}", dark=theme == "dark")
    assert console == []
    assert Requests.asked == []
    shown = Image.open(picture).convert("RGB")
    assert shown.getpixel((2, 2)) == PAPER[theme]
    colors = {color: n for n, color in shown.getcolors(maxcolors=shown.width * shown.height)}
    assert colors.get(ACCENT[theme], 0) > 200, "nothing is drawn in the accent color"
    other = "dark" if theme == "light" else "light"
    assert ACCENT[other] not in colors


@pytest.mark.parametrize("kind", FIGURES)
def test_every_figure_is_there_and_what_a_policy_said_is_inert(tmp_path, proxy, kind):
    page = page_of(kind, tmp_path / "run")
    dom, console = chromium(page, tmp_path, proxy, "--dump-dom")
    root = read_page(dom)
    figures = root.all("figure")
    assert {node.attributes["data-figure"] for node in figures} == FIGURES[kind]
    for node in figures:
        assert node.all("svg")
        assert all(drawing.all("path") for drawing in node.all("svg"))
    assert root.one("title").text.endswith("run · bcft")
    assert not root.all("img")
    assert (console, Requests.asked) == ([], [])


def test_the_theme_can_be_chosen_without_a_script(tmp_path, proxy):
    page = page_of("sft", tmp_path / "run")
    text = page.read_text(encoding="utf-8")
    chosen = re.sub(
        "<script>.*?</script>", "", text.replace(" checked", "").replace('"theme-dark"', '"theme-dark" checked')
    )
    page.write_text(chosen, encoding="utf-8")
    chromium(page, tmp_path, proxy, f"--screenshot={tmp_path / 'page.png'}")
    assert Image.open(tmp_path / "page.png").convert("RGB").getpixel((2, 2)) == PAPER["dark"]


def test_rows_are_searched_and_filtered(tmp_path, proxy):
    page = page_of("filtered", tmp_path / "run")
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace('type="search"', 'type="search" value="FAILED round"'), encoding="utf-8")
    dom, console = chromium(page, tmp_path, proxy, "--dump-dom")
    root = read_page(dom)
    assert root.one("output").text == "2 of 4"
    assert [row.attributes["data-g"] for row in root.one("div", **{"class": "list"}).children if row != "\n"
            and "hidden" not in row.attributes] == ["failed", "failed"]  # fmt: skip
    assert console == []


def test_the_page_is_as_wide_as_a_phone(tmp_path, proxy):
    """A frame of 400 pixels around it, since a window is never that narrow: nothing is wider than the frame."""
    page = page_of("filtered", tmp_path / "run")
    outer = tmp_path / "outer.html"
    outer.write_text(
        f"""<!doctype html><body style="margin:0"><iframe src="{page.as_uri()}" width=400 height=4000></iframe>
        <script>onload = () => document.title = document.querySelector("iframe").contentDocument
        ? document.querySelector("iframe").contentDocument.documentElement.scrollWidth : "closed"</script>"""
    )
    dom, _ = chromium(outer, tmp_path, proxy, "--dump-dom", "--allow-file-access-from-files")
    assert read_page(dom).one("title").text == "400"


def test_a_request_of_a_page_would_be_noticed(tmp_path, proxy):
    """The proxy of the other tests sees what a page asks for, also by https."""
    page = tmp_path / "asking.html"
    page.write_text("<img src=http://example.org/x><img src=https://example.org/y><script>console.log('z')</script>")
    _, console = chromium(page, tmp_path, proxy, "--dump-dom")
    assert {*Requests.asked} >= {"http://example.org/x", "example.org:443"}
    assert any("z" in text for text in console)
