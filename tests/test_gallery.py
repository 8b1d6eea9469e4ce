"""The page of the results in a real browser: Chromium without a window, driven over its DevTools protocol."""

import json
import os
import select
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from cnn_visualizations import write_gallery

fcntl = pytest.importorskip("fcntl")  # not on Windows
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="Chromium is not installed (apt-get install chromium)"
)
OPTIONS = [CHROMIUM, "--headless", "--disable-gpu", "--no-sandbox", "--remote-debugging-pipe"]
DECODED = "Promise.all([...document.querySelectorAll('.row img')].map((image) => image.decode()))"
NAMES = ["cat", "dog", "</script><b>owl"]
NASTY = [
    "<script>x=1;<!--",
    "\"quoted\" '&lt;'",
    "50%25 #1?x=y",
    "中文",
    "line\nbreak",
    "\u2028",
    "byte\udcff",
    "gb_1",
]


class Browser:  # a tab of Chromium: commands go to its file 3, answers come from its file 4, each ended by a NUL
    def __init__(self, profile):
        (read, self.output), (self.input, write) = os.pipe(), os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (read, write)]  # neither 3 nor 4
        command = [
            "bash",
            "-c",
            f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}',
            "",
            *OPTIONS,
            f"--user-data-dir={profile}",
        ]
        self.process = subprocess.Popen(command, pass_fds=ends, stderr=subprocess.DEVNULL)
        self.rest, self.seen, self.session = b"", [], {}
        tab = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {
            "sessionId": self.call("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        }
        self.call("Page.enable")

    def until(self, **wanted):
        while not (self.seen and wanted.items() <= self.seen[-1].items()):
            while b"\0" not in self.rest:
                assert select.select([self.input], [], [], 20)[0], "Chromium does not answer"
                self.rest += os.read(self.input, 1 << 20)
            message, _, self.rest = self.rest.partition(b"\0")
            self.seen.append(json.loads(message))
        return self.seen[-1]

    def call(self, method, **params):
        command = {"id": len(self.seen), "method": method, "params": params, **self.session}
        os.write(self.output, json.dumps(command).encode() + b"\0")
        return self.until(id=command["id"])["result"]

    def open(self, page, width=1200, scheme="light"):
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=800,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        self.call("Page.navigate", url=page.resolve().as_uri())
        self.until(method="Page.loadEventFired")

    def run(self, code):
        answer = self.call(
            "Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def all(self, selector, value="textContent"):
        return self.run(f"[...document.querySelectorAll({selector!r})].map((each) => each.{value})")

    def press(self, key):
        self.call(
            "Input.dispatchKeyEvent",
            type="keyDown",
            key=key,
            **{"text": "\r"} if key == "Enter" else {},
        )

    def cards(self, **fields):
        self.run(
            "".join(f"form.{name}.value = {value!r};" for name, value in fields.items())
            + "form.oninput()"
        )
        return [
            os.path.basename(text.rpartition("\n")[0] or text)
            for text in self.all(".card small.path")
        ]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.process.terminate()
    browser.process.wait()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def record(stem, guess=0, sure=0.9, truth=None, methods="gradcam", **more):
    top = [
        {"index": n, "name": NAMES[n], "probability": p}
        for n, p in ((guess, sure), ((guess + 1) % 3, 0.1))
    ]
    kinds = [
        "gb",
        *(f"{method}_{output}" for method in methods.split(",") for output in ("cam", "cam_gb")),
    ]
    files = [
        os.path.join("out", os.path.dirname(stem), f"{kind}_{os.path.basename(stem)}.png")
        for kind in kinds
    ]
    made = {
        "image": f"photos/{stem}.png",
        "source": f"../photos/{stem}.png",
        "prediction": top[0],
        "class": top[0],
    }
    made |= {"width": 80, "height": 60, "box": [14, 4, 66, 56]}
    made |= {} if truth is None else {"truth": {"index": truth, "name": NAMES[truth]}}
    return {**made, "top5": top, "method": methods, "files": files, "output_stem": stem, **more}


def write(*records, pictures=True, end=b""):
    Path("out").mkdir()
    for path in (
        Path(path)
        for each in records
        if pictures
        for path in (each["image"], *each.get("files", ()))
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (52, 52) if path.parts[0] == "out" else (80, 60)).save(path)
    lines = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records)
    Path("out/results.jsonl").write_bytes(lines.encode("utf-8", "backslashreplace") + end)
    return write_gallery(Path("out"))


RECORDS = [
    record("10", 0, 0.6, 0),
    record("9", 1, 0.7, 0),
    record("a/1", 1, 0.8, 2, "gradcam,scorecam"),
]
RECORDS += [
    record("a/2", 2, 0.5, 2, files=[]),
    {"image": "3.png", "method": "gradcam", "error": "cannot be decoded"},
]


def test_filters_and_orders(browser):
    browser.open(write(*RECORDS, pictures=False))
    assert browser.all("h1, #summary") == [
        "Heatmaps in out",
        "5 photos, 1 failed, 50.0% of 4 right",
    ]
    assert browser.cards() == [
        "1.png",
        "9.png",
        "2.png",
        "10.png",
        "3.png",
    ]  # the surest mistake first
    assert browser.cards(Order="least sure first") == ["2.png", "10.png", "9.png", "1.png", "3.png"]
    assert browser.cards(Order="path") == ["3.png", "9.png", "10.png", "1.png", "2.png"]
    assert (
        browser.cards(Result="failed") == ["3.png"]
        and "cannot be decoded" in browser.all(".card")[0]
    )
    assert browser.cards(Result="", Class="dog") == ["9.png", "1.png"] and browser.cards(
        Method="scorecam"
    ) == ["1.png"]
    assert browser.cards(Class="", Method="", Text="A/2") == ["2.png"]
    browser.run(
        "form.reset(), new Promise(setTimeout).then(() => document.querySelectorAll('td .wrong')[1].click())"
    )
    assert browser.cards() == ["9.png"] and browser.all("[role=status]") == [
        "1 of 5 true cat, predicted dog"
    ]


@pytest.mark.parametrize(("width", "scheme", "red"), [(1200, "light", "245"), (390, "dark", "20")])
def test_large_view(browser, width, scheme, red):
    browser.open(write(*RECORDS), width, scheme)
    assert browser.run("getComputedStyle(document.documentElement).backgroundColor").startswith(
        f"rgb({red},"
    )
    browser.run("main.firstChild.focus()")
    browser.press("Enter")
    assert browser.all("h2, h3") == [
        "photos/a/1.png",
        "gradcam for dog, 80.0%",
        "scorecam for dog, 80.0%",
    ]
    assert browser.all("figcaption")[4:] == ["source", "scorecam_cam", "gb", "scorecam_cam_gb"]
    assert all(
        os.path.isfile(os.path.join("out", link))
        for link in browser.all("a", "getAttribute('href')")
    )
    browser.run(DECODED)
    # the photo behind the heatmap: 80 x 60 pixels, of which the heatmap shows 52 x 52
    place = "left: -26.92%; top: -7.69%; width: 153.85%; height: 115.38%;"
    assert browser.all(".plain", "style.cssText") == [place, place]
    assert browser.run("Math.max(document.documentElement.scrollWidth, view.scrollWidth)") <= width
    browser.press("h")
    assert browser.run("getComputedStyle(document.querySelector('.plain')).opacity") == "1"
    for key, photo in (
        ("ArrowRight", "9.png"),
        ("ArrowRight", "a/2.png"),
        ("ArrowLeft", "9.png"),
        ("Escape", "9.png"),
    ):
        browser.press(key)
        assert browser.all("h2") == [f"photos/{photo}"]
    assert "photos/9.png" in browser.run(
        "new Promise(setTimeout).then(() => document.activeElement.textContent)"
    )


def test_nasty_names(browser):
    page = write(*(record(f"{name} a/{name}", 2, truth=2) for name in NASTY))
    browser.open(page)
    assert sorted(browser.cards()) == sorted(f"{name}.png" for name in NASTY)
    browser.run(
        f"(async () => {{ for (const index in list) {{ turn(+index); await {DECODED}; }} }})()"
    )
    assert browser.run("window.x") is None and "http:" not in page.read_text("utf-8")


def test_lines_and_files(browser):
    Path("results.jsonl").touch()
    assert write_gallery(Path()) is None
    older = {
        key: value
        for key, value in record("b/1").items()
        if key not in ("prediction", "source", "box")
    }
    foreign = [
        b"[" * 200000,
        b"7",
        b'{"image": 5, "method": "x"}',
        b'{"image": "x", "method": ""}',
        b"\xff",
        b'{"i',
    ]
    page = write(
        {"image": "photos/b/1.png", "method": "gradcam", "error": "?"},
        older,
        end=b"\n".join(foreign),
    )
    browser.open(page)
    assert browser.all("#summary") == ["1 photos, 0 failed"] and browser.cards(Order="path") == [
        "1.png"
    ]
    browser.run(f"turn(0), {DECODED}")
    page.write_text("another program's")
    with pytest.raises(FileExistsError):
        write_gallery(Path("out"))
    assert sorted(os.listdir("out")) == ["b", "index.html", "results.jsonl"]  # no temporary file


def test_ten_thousand(browser):
    page = write(
        *(record(f"{n // 100}/{n}", n % 3, n / 1e4, n // 2 % 3) for n in range(10000)),
        pictures=False,
    )
    browser.open(page)
    assert browser.run("performance.now()") < 2000 and page.stat().st_size < 1e7
    browser.run(
        "scrollTo(0, document.body.scrollHeight), new Promise((done) => setTimeout(done, 200))"
    )
    assert (
        browser.all("[role=status]") == ["10000 of 10000 "]
        and browser.run("main.childElementCount") == 400
    )
