"""The page of a run: what is on it, that nothing of its data acts, how it looks in a browser."""

import json
import math
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megatron_dr.cli import report, report_page
from megatron_dr.data.identities import content
from megatron_dr.report import run_log
from megatron_dr.report.metrics import MetricsFile

from ._record import row, written
from ._runs import write

EVIL = "<script>document.title='run'</script><img src=x onerror=\"document.title='run'\">'&"
VOID = ("meta", "line", "br", "use", "image", "path", "img", "link", "rect")


class Page(HTMLParser):
    """Tags with their attributes, text by tag; every tag that is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.text.append((self._open[-1] if self._open else "", data.strip()))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    def says(self, tag: str) -> list[str]:
        return [text for name, text in self.text if name == tag]


def page(*paths: Path) -> tuple[Page, str]:
    text = report_page.text(run_log.read_all(paths))
    return Page(text), text


def stands_alone(found: Page) -> None:
    """No script, and nothing that is loaded; a name is there once, and each that is asked for."""
    names = {name for _, attrs in found.tags for name in attrs}
    assert not {tag for tag, _ in found.tags} & {"script", "link", "iframe", "img", "object"}
    assert not [name for name in names if name.startswith("on")]
    for _, attrs in found.tags:
        for name in ("src", "href", "xlink:href"):
            assert re.match("#|data:image/png;base64,", attrs.get(name) or "#")
    ids = Counter(attrs["id"] for _, attrs in found.tags if "id" in attrs)
    assert [name for name, count in ids.items() if count > 1] == []
    for _, attrs in found.tags:
        for value in filter(None, attrs.values()):
            for asked in re.findall(r"url\(#?([^)]*)\)|^#(.*)$", value):
                assert "".join(asked) in {*ids, ""}, value


def test_a_run_has_all_its_parts(tmp_path: Path) -> None:
    found, text = page(write(tmp_path / "run-a" / "metrics.jsonl"))
    stands_alone(found)
    sections = [attrs["href"] for attrs in found.of("a")]
    assert sections == ["#main", "#losses", "#the-rule", "#time-network-memory", "#blocks",
                        "#other-figures", "#results", "#the-run"]  # fmt: skip
    titles = found.says("figcaption")
    assert {"Loss in training", "Held-out loss", "Sketch error", "Shares of the update",
            "Cosine of the update with the target", "Effective rows",
            "Sent beside Megatron's own reduction, a rank"} <= set(titles)  # fmt: skip
    drawn = [attrs for attrs in found.of("svg") if attrs.get("role") == "img"]
    assert len(drawn) == len(titles) and all(attrs["aria-label"] for attrs in drawn)
    assert {"step", "loss", "cosine", "ms", "kB a step"} <= set(found.says("text"))  # axes
    assert "Ended at step 6 of 6." in found.says("p")
    assert "c0ffee, with changes" in found.says("td") and "2 x CPU" in found.says("td")
    assert "--lr" in found.says("th") and "target test loss" in found.says("td")
    assert "Grey: no finite number, 1 of 12." in found.says("p")
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    policy = next(a for a in found.of("meta") if "http-equiv" in a)["content"] or ""
    assert policy.startswith("default-src 'none';")


def test_runs_over_each_other(tmp_path: Path) -> None:
    """A legend says which is which; figures that one has not are those of the others."""
    only = ("lm loss", "target loss", "dr sketch ms", "dr solve ms", "learning rate")
    paths = [write(tmp_path / name / "metrics.jsonl", only=only) for name in ("run-a", "run-b")]
    file = MetricsFile(str(paths[1]))
    file.write("train", 7, {"lm loss": 1.0, "kl": 0.5})
    found, _ = page(*paths)
    stands_alone(found)
    legend = found.says("span")
    assert {"run-a: lm loss", "run-b: target loss", "run-b"} <= set(legend)
    assert "kl" in found.says("figcaption") and "Medians over steps." in found.says("p")
    assert {"run-a: Effective rows", "run-b: Effective rows"} <= set(found.says("figcaption"))
    assert found.says("h3") == ["run-a", "run-b"]


def test_a_run_without_numbers_and_one_from_before(tmp_path: Path) -> None:
    empty, old = tmp_path / "empty.jsonl", tmp_path / "old.jsonl"
    empty.touch()
    MetricsFile(str(old)).write("train", 1, {"lm loss": float("nan"), "new": float("inf")})
    found, _ = page(empty)
    assert "no step yet" in " ".join(found.says("p"))
    found, _ = page(old)
    said = " ".join(found.says("p"))
    assert "lm loss is no finite number at 1 of 1 steps: 1" in said
    assert "Its metrics do not say what it was" in said and "inf" in found.says("td")


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of two runs, of which one has a script wherever a run can have text."""
    folder = tmp_path_factory.mktemp("runs")
    about = {
        "flags": [[f"--{EVIL}", EVIL], ["--a", "$\\frac{"]], "program": EVIL, "folder": EVIL,
        "git": {"commit": EVIL}, "versions": {EVIL: EVIL}, "layout": {EVIL: 1}, "device": EVIL,
        "projection": {"set": EVIL}, "machine": {"processor": EVIL},
    }  # fmt: skip
    path = folder / EVIL.replace("/", "_")[:100] / "metrics.jsonl"
    more = {f"{EVIL} loss": 1.0, EVIL: 2.0, f"dr weight {EVIL}": 1.0, "$x_{ loss": 1.0}
    write(path, about=about, blocks=[EVIL, "$\\frac{"], **more)
    MetricsFile(str(path)).write(EVIL, 6, {EVIL: 1.0})
    runs = [path, write(folder / "other" / "metrics.jsonl", **{"validation seconds": 1.0})]
    return report_page.text(run_log.read_all(runs))


def test_nothing_of_the_data_acts(evil: str) -> None:
    """Names of the run, figures, blocks, flags; with runs beside it, too."""
    found = Page(evil)
    stands_alone(found)
    for tag in ("td", "th", "span", "figcaption", "summary", "h1", "h3"):
        held = [text for text in found.says(tag) if "<script>" in text]
        assert held or tag == "summary", tag
    assert any("<script>" in text for text in found.says("text"))
    assert found.says("title")[0].startswith("<script>")


def test_weights_with_their_texts(tmp_path: Path) -> None:
    """Of corpora over steps, of samples with what they say; a sample's script is text."""
    metrics, data = tmp_path / "metrics.jsonl", tmp_path / "a.jsonl"
    texts = [{"text": f"{n} {EVIL}"} for n in range(4)]
    data.write_text("".join(json.dumps(one) + "\n" for one in texts))
    rows = [
        row(step, n, weight=float(n), score=0.1 * n, corpus=EVIL if n % 2 else "b", file="a.jsonl",
            line=n + 1, hash=content(texts[n]), id=EVIL)
        for step in (1, 2) for n in range(4)
    ]  # fmt: skip
    bad = row(2, 4, weight=math.nan, corpus="b", file="a.jsonl", line=9, hash="text:0")
    folder = written(tmp_path / "weights", [*rows, bad], left_out=3)
    about = {"record": str(folder), "folder": str(tmp_path)}
    MetricsFile(str(metrics)).begin(0, about)
    found, _ = page(metrics)
    stands_alone(found)
    assert found.says("pre") == [f"{n} {EVIL}" for n in (3, 2, 1, 0)]
    assert "weight 3, cosine 0.3, 2 rows:" in found.says("summary")
    assert found.says("h4") == ["Samples of most weight"]  # all are in it
    assert {"Mean weight by corpus", "Mean cosine with the target by corpus"} <= set(
        found.says("figcaption")
    )
    said = " ".join(found.says("p"))
    assert "b is no finite number at 1 of 2 steps: 2" in said
    assert "1 samples whose weight is no finite number" in said and "3 rows between" in said
    (moved := tmp_path / "moved").mkdir()
    folder.rename(moved / "weights")
    metrics.rename(moved / "metrics.jsonl")
    assert len(page(moved / "metrics.jsonl")[0].says("pre")) == 4
    (moved / "weights").rename(tmp_path / "gone")
    assert "No weights can be shown: " in " ".join(page(moved)[0].says("p"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(str(path)).write("train", 1, {"lm loss": 1.0})
    assert report.main([str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    for words, says in (
        ([path, "--out", path], "these are a run's metrics: name another file"),
        ([path, "--compare", tmp_path], "the same run twice"),
        ([tmp_path / "none"], "no such run"),
        ([path, "--out", tmp_path / "none" / "a.html"], "a.html: No such file or directory"),
    ):
        capsys.readouterr()
        assert report.main([str(word) for word in words]) == 2
        assert re.search(rf"^report: error: .*{says}.*[.]\n$", capsys.readouterr().err)


# What a browser says of a page: by a script of the test's own, where the page's policy is taken out
PROBE = """<script>addEventListener("load", () => {
  const found = [...document.querySelectorAll("a[href], summary, [tabindex='0']")];
  const box = document.querySelector("figure svg[role]").getBoundingClientRect();
  const style = getComputedStyle, root = document.documentElement;
  const grid = style(document.querySelector(".figures")).gridTemplateColumns;
  const out = {title: document.title, width: innerWidth, needs: root.scrollWidth,
    figures: document.querySelectorAll("figure svg[role]").length, tabbed: found.length,
    drawn: [box.width, box.height], back: style(document.body).backgroundColor,
    ink: style(document.querySelector("figure svg[role] text")).fill,
    first: style(document.querySelector("figure path[style*='--c0']")).stroke,
    columns: grid.split(" ").length};
  const seen = found.filter(one => one.checkVisibility());
  out.missed = seen.filter(one => (one.focus(), document.activeElement !== one)).length;
  parent.postMessage(JSON.stringify(out), "*");
})</script>"""
FRAME = """<body style="margin: 0"><script>addEventListener("message", message => {
  document.body.innerHTML = "<pre id=out></pre>";
  document.getElementById("out").textContent = message.data;
})</script><iframe src="page.html" style="border: 0" width="WIDTH" height="900"></iframe>"""
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
    --disable-background-networking --disable-component-update --virtual-time-budget=2000
    --dump-dom"""


def browser(tmp_path: Path, text: str, width: int, *more: str) -> dict[str, Any]:
    """What is found in a frame of this width: a headless window has at least 500."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium is installed")
    text = re.sub(r"<meta http-equiv=[^>]*>", "", text)
    page = text.replace("</body>", f"{PROBE}</body>")
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    (tmp_path / "frame.html").write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    done = subprocess.run(
        [chromium, *FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}", *more,
         "--window-size=1300,900", f"file://{tmp_path / 'frame.html'}"],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    said = re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.S)
    assert said, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(said[1].replace("&amp;", "&").replace("&lt;", "<"))
    return found


@pytest.mark.parametrize("width, dark, columns", [(390, True, 1), (1280, False, 3)])
def test_in_a_browser(tmp_path: Path, evil: str, width: int, dark: bool, columns: int) -> None:
    """On a telephone and a desk, dark and light: nothing is wider than the window, all links and
    tables are reached by the keyboard, text is seen; and what the data hold does not run."""
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    found = browser(tmp_path, evil, width, *scheme)
    assert found["title"] != "run" and found["figures"] > 15
    assert found["width"] == width and found["needs"] <= width
    assert found["columns"] == columns
    assert found["drawn"][0] > 300 and found["drawn"][1] > 150
    assert found["tabbed"] > 30 and not found["missed"]
    back, ink = ((22, 24, 27), (228, 228, 228)) if dark else ((255, 255, 255), (28, 28, 28))
    assert (found["back"], found["ink"]) == (f"rgb{back}", f"rgb{ink}")
    assert found["first"] == f"rgb{(75, 163, 227) if dark else (0, 114, 178)}"
