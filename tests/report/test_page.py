"""The page: its parts are where they should be, nothing from a run becomes markup or a script, nothing is loaded, a run of any size and in any
state has one, and a real browser shows it on a phone and on a desk without an error and without scrolling sideways."""

from __future__ import annotations

import base64
import itertools
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moetrain.report import write
from tests.browser import Browser, find_chromium
from tests.report.runs import record, write_run

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = (
    "</script><script>alert(1)</script>", "<img src=x onerror=alert(2)>", "\"'><svg onload=alert(3)>", "&lt;b&gt; \u202eevil \ud800 ", "n" * 3000,
)  # fmt: skip
VOID = {"meta", "input", "br", "img", "link"}


class Page(HTMLParser):
    """A strict reader: every element is closed by its own end."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        (self.scripts if self.open and self.open[-1] == "script" else self.texts).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def sections(self) -> list[str | None]:
        return [a["id"] for a in self.all("section")]

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


def page(folder: Path) -> Page:
    return Page(write(folder).read_text(encoding="utf-8"))


def heats(found: Page) -> list[dict]:
    return [json.loads(s) for s in found.scripts if s.startswith("{")]


def alone(found: Page) -> None:
    """No element of a kind, and no attribute, that loads or runs anything; and the policy forbids it besides."""
    allowed = {
        "html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "h3", "ul", "li", "b", "span", "main", "section", "p", "div",
        "figure", "svg", "path", "table", "thead", "tbody", "tr", "th", "td", "canvas", "label", "input", "select", "option", "output", "script",
        "details", "summary", "pre", "footer",
    }  # fmt: skip
    assert {tag for tag, _ in found.elements} <= allowed
    for tag, attributes in found.elements:
        assert not [n for n in attributes if n.startswith("on") or n in ("src", "href", "srcset", "action", "xlink:href")], (tag, attributes)
    runs = [a for a in found.all("script") if a.get("type") != "application/json"]
    assert len(runs) == 1
    policy = next(a["content"] for a in found.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy and "http" not in policy


def test_structure(tmp_path):
    """Every section, in order; curves, marks, heat maps with the right bytes, rows of tables."""
    found = page(write_run(tmp_path / "run"))
    alone(found)
    assert found.sections() == ["loss", "active", "kinds", "load", "sources", "speed", "events", "config"]
    names = [a["data-name"] for a in found.all("path") if "data-name" in a]
    wanted = {"training", "evaluation code", "evaluation prose", "code", "prose", "grad_norm", "lr", "sparsity_coef", "worst layer", "code / prose"}
    assert wanted <= set(names)
    marks = {t for t in found.texts if re.fullmatch(r"\w+ at step \d+", t)}
    assert marks == {"fallback at step 10", "resume at step 5", "resume at step 10", "skipped at step 12"}
    kinds = [a["class"] for a in found.all("path") if (a.get("class") or "").startswith("mark")]
    assert {"mark bad", "mark note"} == set(kinds)
    over_time, load, sets_eval, sets_train = heats(found)
    assert load["names"] == ["5", "10", "15", "20", "25", "30"] and load["rows"] == ["1", "2", "3"] and len(load["columns"]) == 4
    assert sets_eval["names"] == sets_train["names"] == ["code", "prose"] and over_time["top"] > 2
    cells = base64.b64decode(load["frames"][-1])
    assert len(cells) == 12 and cells[8] == 0 and cells[0] == 128 and 128 < cells[1] < cells[3]
    for said in ("Checkpoints: 1, the last at step 10.", "model.bin of code is damaged", "beginning of a word", "waiting for data: 18.6%",
                 "30 of 100", "checkpoint (the run waited): 3.1% (0.5 s)"):  # fmt: skip
        assert said in found.text, said


def test_hostile_names(tmp_path):
    """In sources, sets, events, the config and the folder's name: shown as text, and the structure is that of harmless names."""
    folder = write_run(tmp_path / "<b>&'", names=HOSTILE)
    (folder / "config.yaml").write_text("</pre><script>alert(4)</script>")
    found, harmless = page(folder), page(write_run(tmp_path / "run", names=("a", "b", "c", "d", "e")))
    alone(found)
    assert "<img src=x onerror=alert(2)>" in found.text and "</pre><script>alert(4)</script>" in found.text and "<b>&'" in found.text
    assert [heat["names"][:2] for heat in heats(found)][-1] == list(HOSTILE[:2])
    tags = [[tag for tag, a in p.elements if tag not in ("li", "span", "section", "ul", "h2")] for p in (found, harmless)]
    assert tags[0] == tags[1]


STATES = {
    "no steps": lambda f: (f / "metrics.jsonl").write_text(""),
    "one torn line": lambda f: (f / "metrics.jsonl").write_text('{"step": 1, "lo'),
    "one step": lambda f: (f / "metrics.jsonl").write_text(json.dumps(record(1, 3, 4, load=True)) + "\n"),
    "one step, nothing in it": lambda f: (f / "metrics.jsonl").write_text('{"step": 1}\n'),
    "dense": lambda f: (f / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": 2.0, "lm": 2.0, "step_s": 1}) + "\n" for s in (1, 2))),
    "nothing but NaN": lambda f: (f / "metrics.jsonl").write_text(
        "".join(json.dumps(record(s, 3, 4, loss=math.nan, lm=math.nan, grad_norm=math.inf, moe={"active": [math.nan] * 3})) + "\n" for s in (1, 2))
    ),
    "no events": lambda f: (f / "events.jsonl").unlink(),
    "no config": lambda f: (f / "config.yaml").unlink(),
    "no routing": lambda f: (f / "routing.json").unlink(),
    "torn routing": lambda f: (f / "routing.json").write_text('{"eval": {'),
    "odd routing": lambda f: (f / "routing.json").write_text(
        json.dumps({"eval": {"sets": {"a": {"load": [[0, 0]] * 3, "kinds": {"x": {"active_by_layer": 3}, "y": 1}}, "b": {"load": [[1, 1]] * 3}}}})
    ),
    "other layers": lambda f: open(f / "metrics.jsonl", "a").write(json.dumps(record(31, 5, 4, load=True)) + "\n"),
}  # fmt: skip
SAYS = {
    "no steps": "no step has been done yet", "one torn line": "1 broken line of metrics.jsonl", "one step": "Only one step",
    "dense": "No mixture of experts", "nothing but NaN": "not a finite number at step 1, 2", "no events": "events.jsonl is not there",
    "no config": "config.yaml is not there",
    "no routing": "--eval.routing true", "torn routing": "routing.json can't be read", "odd routing": "No layer in which two sets have routes",
}  # fmt: skip


@pytest.mark.parametrize("state", STATES)
def test_runs_in_any_state(tmp_path, state):
    """A page, whole, that says what is missing."""
    folder = write_run(tmp_path / "run")
    STATES[state](folder)
    found = page(folder)
    alone(found)
    assert SAYS.get(state, "") in found.text
    assert "nan" not in " ".join(a.get("d") or "" for a in found.all("path"))
    assert not (folder / "report.html.tmp").exists()


def write_huge(folder: Path, steps: int = 100_000, layers: int = 64, experts: int = 256) -> Path:
    write_run(folder, steps=1, layers=layers, experts=experts, names=tuple(f"language {i}" for i in range(40)))
    plain = record(1, layers, experts)
    plain["moe"]["active"] = [2.5] * layers
    head, tail = json.dumps(plain).split(", ", 1)
    with_load = json.dumps({"load": [[(7 * e + i) % 300 for e in range(experts)] for i in range(layers)]})[1:]
    assert head == '{"step": 1'
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            file.write(f'{{"step": {step}, ' + (f"{tail[:-1]}, {with_load}\n" if step % (steps // 100) == 0 else f"{tail}\n"))
    with open(folder / "events.jsonl", "a") as file:
        for step in range(1, steps, 10):
            file.write(json.dumps({"event": "skipped", "step": step}) + "\n")
    return folder


def test_a_huge_run(tmp_path):
    """64 layers of 256 experts, 100,000 steps, 40 languages, 10,000 skipped steps: a page below 5 MB."""
    folder = write_huge(tmp_path / "huge")
    found = page(folder)
    (folder / "metrics.jsonl").unlink()  # a quarter of a gigabyte
    size = (folder / "report.html").stat().st_size
    assert 1_000_000 < size < 5_000_000 and len(next(h for h in heats(found) if len(h["frames"]) > 50)["frames"]) == 60
    assert all(len(a["d"]) < 60_000 for a in found.all("path") if "d" in a)


def test_command(tmp_path):
    """`moetrain report RUN` without torch: writes where it is told; a folder that is no run's is one line and status 2."""
    folder = write_run(tmp_path / "run")
    program = "import sys; from moetrain.cli import main; status = main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(status)"

    def start(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)

    assert start("report", str(folder)).stdout == f"{folder / 'report.html'}\n" and "<!doctype html>" in (folder / "report.html").read_text()
    done = start("report", "--run_dir", str(folder), "--report.output", str(tmp_path / "new" / "page.html"))
    assert done.returncode == 0 and (tmp_path / "new" / "page.html").is_file()
    done = start("report", str(tmp_path / "nowhere"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "name the run_dir of a training run" in done.stderr


# --------------------------------------------------------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if find_chromium() is None:
        pytest.skip("no chromium here (Debian: apt-get install chromium)")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("pages")
    found = {"plain": write(write_run(place / "plain")), "hostile": write(write_run(place / "hostile" / "<b>", names=HOSTILE))}
    found["wide"] = write(write_run(place / "wide", layers=40, experts=256, names=tuple(f"language {i}" for i in range(30))))
    dense = write_run(place / "dense")
    STATES["dense"](dense)
    return found | {"dense": write(dense)}


@pytest.mark.parametrize(("name", "width"), list(itertools.product(["plain", "hostile", "wide", "dense"], [360, 1280])))
def test_in_a_browser(browser, pages, name, width):
    """No error, nothing loaded, nothing wider than the window, no chart without a height, and the heat maps are painted."""
    browser.problems.clear()
    browser.open(pages[name], width=width, mobile=width < 500, dark=width < 500)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width == browser.evaluate("innerWidth")
    # What lies outside of the window is cut off, even where the page itself does not scroll; tables scroll in a box of their own.
    outside = f"""[...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll, pre, svg") && !e.closest("details:not([open])")
        && e.getBoundingClientRect().right > {width} + 1).map(e => e.outerHTML.slice(0, 100))"""
    assert browser.evaluate(outside) == []
    assert browser.evaluate('[...document.querySelectorAll(".plot")].every(e => e.clientHeight > 100 && e.clientWidth > 150)')
    painted = '[...document.querySelectorAll("canvas")].map(c => new Set(c.getContext("2d").getImageData(0, 0, c.width, c.height).data).size)'
    sizes = browser.evaluate(painted)
    assert len(sizes) == (0 if name == "dense" else 4) and all(n > 3 for n in sizes), sizes
    assert browser.problems == []


def test_controls_in_a_browser(browser, pages):
    """The slider chooses the step, the list one layer over time, and pointing at a cell or a curve tells its value."""
    browser.problems.clear()
    browser.open(pages["plain"], width=1000)
    heat = 'document.querySelectorAll(".heat")[1]'
    move = "(e, x, y) => { const b = e.getBoundingClientRect(); e.dispatchEvent(new PointerEvent('pointermove', {clientX: b.left + x * b.width, "
    move += "clientY: b.top + y * b.height})) }"
    browser.evaluate(f'({move})({heat}.querySelector("canvas"), 0.01, 0.99)')
    assert browser.evaluate(f'{heat}.querySelector("output.value").textContent') == "30: layer 3, expert 0: no route"
    slide = f'(() => {{ const s = {heat}.querySelector(".frame"); s.value = 1; s.dispatchEvent(new Event("input")) }})()'
    browser.evaluate(slide)
    browser.evaluate(f'({move})({heat}.querySelector("canvas"), 0.99, 0.01)')
    assert browser.evaluate(f'{heat}.querySelector("output").textContent') == "10"
    assert browser.evaluate(f'{heat}.querySelector("output.value").textContent') == "10: layer 1, expert 3: 1.3 × the even share"
    browser.evaluate(f'(() => {{ const s = {heat}.querySelector(".view"); s.value = "2"; s.dispatchEvent(new Event("input")) }})()')
    assert browser.evaluate(f'[{heat}.querySelector("canvas").width, {heat}.querySelector("canvas").height]') == [6, 4]
    browser.evaluate(f'({move})({heat}.querySelector("canvas"), 0.01, 0.01)')
    assert browser.evaluate(f'{heat}.querySelector("output.value").textContent') == "5: layer 3, expert 0: no route"
    browser.evaluate(f'({move})(document.querySelector(".plot"), 1, 0.5)')
    tip = browser.evaluate('document.querySelector(".tip").textContent').split("\n")
    assert tip[0] == "30" and tip[1].startswith("training: 1.") and tip[2].startswith("evaluation code: 0.1")
    assert browser.problems == []


def test_a_script_that_slipped_through_would_not_run(browser, pages, tmp_path):
    """The policy is real: a foreign script in the page is refused by the browser, as is a load from elsewhere."""
    foreign = '<script>document.title = "taken"</script><img src="http://192.0.2.1/x.png"></body>'
    (tmp_path / "page.html").write_text(pages["plain"].read_text().replace("</body>", foreign))
    browser.problems.clear()
    browser.open(tmp_path / "page.html", width=800)
    assert browser.evaluate("document.title") != "taken"
    refused = [p for p in browser.problems if "Content Security Policy" in p and "blocked" in p]
    assert len(refused) == 2 and "inline script" in refused[0] and "x.png" in refused[1]
    browser.problems.clear()
