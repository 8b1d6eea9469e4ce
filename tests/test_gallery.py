"""The page of the results in a real browser: Chromium, driven over its DevTools protocol."""

import json
import os
import select
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from PIL import Image

import cnn_visualizations
from cnn_visualizations import heat_grid, write_gallery

fcntl = pytest.importorskip("fcntl")  # not on Windows
PROGRAMS = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
CHROMIUM = next(filter(None, PROGRAMS), None)
pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="Chromium is not installed (apt-get install chromium)"
)
OPTIONS = ["--headless", "--disable-gpu", "--no-sandbox", "--remote-debugging-pipe"]
# of the command of bash: Chromium reads its commands from file 3 and writes its answers to file 4
REDIRECTED = 'exec "$@" 3<&{} 4>&{}'
DECODED = """Promise.all(
    [...document.querySelectorAll('.figures img:not(.plain)')].map((image) => image.decode()))"""
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
EMPTY = [0] * 64
CORNER = [100] + [0] * 63


class Browser:
    """A tab of Chromium. Commands and answers are JSON, each ended by a NUL."""

    def __init__(self, profile):
        read, self.output = os.pipe()
        self.input, write = os.pipe()
        # the numbers 3 and 4 are free for Chromium's ends
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (read, write)]
        command = ["bash", "-c", REDIRECTED.format(*ends), ""]
        command += [CHROMIUM, *OPTIONS, f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(command, pass_fds=ends, stderr=subprocess.DEVNULL)

        self.rest = b""
        self.messages = []
        self.session = {}
        tab = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=tab, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        self.call("Page.enable")

    def until(self, **wanted):
        """Read messages up to one with these values, and return it."""
        while True:
            while b"\0" not in self.rest:
                assert select.select([self.input], [], [], 20)[0], "Chromium does not answer"
                self.rest += os.read(self.input, 1 << 20)
            message, _, self.rest = self.rest.partition(b"\0")
            self.messages.append(json.loads(message))
            if wanted.items() <= self.messages[-1].items():
                return self.messages[-1]

    def call(self, method, **params):
        command = {"id": len(self.messages), "method": method, "params": params, **self.session}
        os.write(self.output, json.dumps(command).encode() + b"\0")
        return self.until(id=command["id"])["result"]

    def open(self, page, width=1200, scheme="light"):
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self.call("Page.navigate", url=page.resolve().as_uri())
        self.until(method="Page.loadEventFired")

    def run(self, code):
        options = {"awaitPromise": True, "returnByValue": True}
        answer = self.call("Runtime.evaluate", expression=code, **options)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def all(self, selector, value="textContent"):
        """Return a property of all elements that the selector finds."""
        elements = f"[...document.querySelectorAll({json.dumps(selector)})]"
        return self.run(f"{elements}.map((element) => element.{value})")

    def press(self, key):
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)

    def cards(self, **fields):
        """Fill in fields of the form, and return the file names on the cards."""
        for name, value in fields.items():
            self.run(f"form[{json.dumps(name)}].value = {json.dumps(value)}")
        self.run("form.oninput()")
        return self.all(".card small.name")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.process.terminate()
    browser.process.wait()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cnn_visualizations.warn.cache_clear()


def likely(index, probability):
    return {"index": index, "name": NAMES[index], "probability": probability}


def record(
    stem, guess=0, sure=0.9, truth=None, methods="gradcam", explained=None, heat=None, **more
):
    """Return a record of the log; `explained` are indices of classes, `heat` their grids."""
    folder, _, name = stem.rpartition("/")
    classes = []
    for index in [guess] if explained is None else explained:
        label = f"{name}_{index}.png"
        files = {"gb": str(PurePosixPath(folder, f"gb_{label}"))}
        for method in methods.split(","):
            for kind in (f"{method}_cam", f"{method}_cam_gb"):
                files[kind] = str(PurePosixPath(folder, f"{kind}_{label}"))
        classes.append({**likely(index, sure), "files": files})

    made = {
        "image": f"photos/{stem}.png",
        "source": f"../photos/{stem}.png",
        "width": 80,
        "height": 60,
        "box": [14, 4, 66, 56],
        "method": methods,
        "prediction": likely(guess, sure),
        "classes": classes,
        "files": {},
        "top5": [likely(guess, sure), likely((guess + 1) % 3, 0.1)],
        "heat": {"gradcam": [CORNER] * len(classes) if heat is None else heat},
        "output_stem": stem,
    }
    if truth is not None:
        made["truth"] = {"index": truth, "name": NAMES[truth]}
    return {**made, **more}


def paint(path, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


def write(*records, pictures=True, end=b""):
    """Write a log, the photos and pictures that it lists, and the page. Return the page's path."""
    Path("out").mkdir()
    for each in records if pictures else ():
        paint(Path(each["image"]), (80, 60))
        for explained in each.get("classes", ()):
            for file in explained["files"].values():
                paint(Path("out", file), (52, 52))
    lines = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records)
    Path("out/results.jsonl").write_bytes(lines.encode("utf-8", "backslashreplace") + end)
    return write_gallery(Path("out"))


RECORDS = [
    record("10", 0, 0.6, 0),
    record("9", 1, 0.7, 0),
    record("a/1", 1, 0.8, 2, "gradcam,scorecam"),
    record("a/2", 2, 0.5, 2, explained=[]),
    {"image": "3.png", "method": "gradcam", "error": "cannot be decoded"},
]


def test_filters_and_orders(browser):
    browser.open(write(*RECORDS, pictures=False))
    assert browser.all("h1") == ["Heatmaps in out"]
    assert browser.all("#summary") == ["5 photos, 1 failed, 50.0% of 4 right"]

    # the surest mistake first
    assert browser.cards() == ["1.png", "9.png", "2.png", "10.png", "3.png"]
    assert browser.cards(Order="least sure first") == ["2.png", "10.png", "9.png", "1.png", "3.png"]
    assert browser.cards(Order="path") == ["3.png", "9.png", "10.png", "1.png", "2.png"]

    assert browser.cards(Result="failed") == ["3.png"]
    assert "cannot be decoded" in browser.all(".card")[0]
    assert browser.cards(Result="", **{"Predicted class": "dog"}) == ["9.png", "1.png"]
    assert browser.cards(Method="scorecam") == ["1.png"]
    assert browser.cards(**{"Predicted class": ""}, Method="", Text="A/2") == ["2.png"]

    browser.run("choose({})")
    assert browser.all("#mistakes button") == ["cat → dog: 1", f"{NAMES[2]} → dog: 1"]
    browser.run("find('#mistakes button').click()")
    assert browser.cards() == ["9.png"]
    assert browser.all("[role=status]") == ["1 of 5"]
    browser.run("choose({})")
    assert len(browser.cards()) == 5


@pytest.mark.parametrize(("width", "scheme", "red"), [(1200, "light", "245"), (390, "dark", "20")])
def test_large_view(browser, width, scheme, red):
    browser.open(write(*RECORDS), width, scheme)
    background = browser.run("getComputedStyle(document.documentElement).backgroundColor")
    assert background.startswith(f"rgb({red},")
    assert browser.run("document.documentElement.scrollWidth") <= width

    browser.run("main.firstChild.focus()")
    browser.press("Enter")
    assert browser.all("dialog h2, dialog h3") == ["photos/a/1.png", "dog, 80.0%"]
    first = ["source", "gradcam_cam", "gb", "gradcam_cam_gb"]
    assert browser.all("figcaption") == [*first, "scorecam_cam", "scorecam_cam_gb"]
    for link in browser.all("dialog a", "getAttribute('href')"):
        assert os.path.isfile(os.path.join("out", link))
    browser.run(DECODED)
    assert browser.run("dialog.scrollWidth") <= width

    # of the photo's 80 x 60 pixels the network saw 52 x 52
    assert browser.all(".seen", "style.left") == ["17.5%"]
    assert browser.all(".seen", "style.width") == ["65%"]
    assert browser.all("dialog .plain", "style.left")[0].startswith("-26.92")
    assert browser.all("dialog .plain", "style.height")[0].startswith("115.38")

    keys = ["ArrowRight", "ArrowRight", "ArrowLeft", "Escape"]
    for key, photo in zip(keys, ["9.png", "a/2.png", "9.png", "9.png"], strict=True):
        browser.press(key)
        assert browser.all("h2") == [f"photos/{photo}"]
    assert "9.png" in browser.run("document.activeElement.textContent")


def test_heat_is_switched_by_a_key_in_the_overview_and_in_the_large_view(browser):
    browser.open(write(RECORDS[0]))
    shown = "getComputedStyle(document.querySelector('{} .plain')).display"
    assert browser.run(shown.format("main")) == "none"
    browser.press("h")
    assert browser.run(shown.format("main")) == "block"
    browser.run("showItem(0)")
    assert browser.run(shown.format("dialog")) == "block"
    browser.press("H")
    assert browser.run(shown.format("dialog")) == "none"
    assert browser.all(".toggle", "ariaPressed") == ["true", "true"]

    browser.press("Escape")
    browser.run("new Promise(setTimeout)")  # closing moves the focus to the card, a task later
    browser.run("form.Text.focus()")
    browser.press("h")
    assert browser.run(shown.format("main")) == "none"


def test_a_card_shows_the_map_of_the_prediction_and_says_where_a_map_is_empty(browser):
    both = record("1", 1, explained=[0, 1], heat=[EMPTY, CORNER])
    other = record("2", 1, explained=[0], heat=[EMPTY])
    browser.open(write(both, other))
    captions = browser.all(".card small:not(.name)")
    assert captions == ["gradcam_cam for dog", "gradcam_cam for cat"]
    pictures = browser.all(".card img:not(.plain)", "getAttribute('src')")
    assert pictures == ["./gradcam_cam_1_1.png", "./gradcam_cam_2_0.png"]
    assert browser.all(".card:first-child .note") == []
    assert browser.all(".card .note") == ["no positive evidence for cat"]

    browser.run("showItem(0)")
    assert browser.all("dialog h3") == ["cat, 90.0%", "dog, 90.0%"]
    assert browser.all("dialog .note")[0] == "no positive evidence for cat"
    assert browser.all("dialog .figures:last-child .note") == []


def test_mean_heat_of_the_predicted_classes(browser):
    half = [50] + [0] * 63
    page = write(
        record("1", 0, truth=0, heat=[CORNER]),
        record("2", 0, truth=0, heat=[half]),
        record("3", 0, truth=1, heat=[EMPTY]),
        record("4", 0, truth=1, explained=[1], heat=[CORNER]),  # its prediction has no map
        record("5", 1),
        record("5", 1, methods="gradcam,scorecam"),  # counts once
    )
    browser.open(page)
    assert browser.all("#means h3") == ["cat", "dog"]
    assert browser.all("#means small") == ["2 right", "1 wrong", "1 photos"]
    corner = "getContext('2d').getImageData(0, 0, 1, 1).data.join()"
    colours = browser.all("#means canvas", corner)
    assert colours[0] == "255,128,0,255"  # jet at 0.75
    assert colours[1] == "0,0,128,255"

    browser.run("document.querySelector('#means .right').click()")
    assert browser.cards() == ["1.png", "2.png"]


def test_the_mean_heat_of_classes_with_most_mistakes_comes_first(browser):
    right = [record(str(number), 0, truth=0) for number in range(3)]
    browser.open(write(*right, record("3", 1, truth=0), pictures=False))
    assert browser.all("#means h3") == ["dog", "cat"]


def test_heat_grid():
    cam = np.zeros((64, 64), np.float32)
    assert heat_grid(cam) == EMPTY
    cam[:8, :8] = 1
    assert heat_grid(cam) == CORNER
    cam[63, 63] = 0.01  # never rounded to an empty map
    assert heat_grid(cam) == [100] + [0] * 62 + [1]
    assert len(heat_grid(np.ones((7, 5), np.float32))) == 64


@pytest.mark.slow
def test_the_mean_heat_of_a_class_lies_on_the_mark_that_gave_it_away(program):
    """Every star had a mark in the upper left corner, in training as here."""
    trainer = Path(__file__).with_name("train_shapes.py")
    subprocess.run([sys.executable, str(trainer), "--marked", "marked"], check=True)
    folder = Path.cwd() / "marked"
    output = folder / "out"
    assert (
        program("--ckpt", folder / "marked.pth", "--output", output, folder / "scenes").returncode
        == 0
    )

    grids = {}
    for line in (output / "results.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        grid = np.reshape(record["heat"]["gradcam"][0], (8, 8))
        grids.setdefault(record["prediction"]["name"], []).append(grid)

    corner_to_all = {}
    for name, of_class in grids.items():
        mean = np.mean(of_class, 0)
        corner_to_all[name] = mean[:2, :2].mean() / mean.mean()
    assert corner_to_all.pop("star") > 1.5
    assert max(corner_to_all.values()) < 1.2


def test_nasty_names(browser):
    page = write(*(record(f"{name} a/{name}", 2, truth=2) for name in NASTY))
    browser.open(page)
    shown = [name.replace("\n", "\\n") for name in browser.cards()]
    assert sorted(shown) == sorted(f"{name}.png".replace("\n", "\\n") for name in NASTY)
    show_all = f"for (const index in list) {{ showItem(+index); await {DECODED}; }}"
    browser.run(f"(async () => {{ {show_all} }})()")
    assert browser.run("window.x") is None
    assert "http:" not in page.read_text("utf-8")
    assert "form-action 'none'; base-uri 'none'" in page.read_text("utf-8")


FOREIGN = [
    b"[" * 200000,
    b"7",
    b'{"image": 5, "method": "x"}',
    b'{"image": "x", "method": ""}',
    b"\xff",
    b'{"i',
]
ODD = [
    {"box": [1, 1, 1, 5]},
    {"box": [1]},
    {"box": "abcd"},
    {"width": 10**400},
    {"width": float("inf")},
    {"height": 0},
    {"prediction": None},
    {"top5": [likely(0, float("inf"))]},
    {"top5": [likely(0, 10**400)]},
    {"classes": None},
    {"classes": [{**likely(0, 0.9), "files": ["gb_1.png"]}]},
    {"heat": [[1, 2]]},
    {"heat": [[101] * 64]},
    {"heat": [[0.5] * 64]},
    {"heat": []},
]


def test_odd_lines_are_left_out_with_one_warning(browser, capsys):
    odd = [record(f"odd{number}", **fields) for number, fields in enumerate(ODD)]
    lines = [json.dumps(each).encode() for each in odd] + FOREIGN
    earlier = {"image": "photos/b/1.png", "source": "../photos/b/1.png", "method": "gradcam"}
    page = write({**earlier, "error": "?"}, record("b/1"), end=b"\n".join(lines))
    left_out = "lines left out of the page, not records of this program"
    warnings = capsys.readouterr().err.splitlines()
    assert warnings == [f"warning: out/results.jsonl: {left_out}: {len(lines)}"]

    browser.open(page)
    assert browser.all("#summary") == ["1 photos, 0 failed"]
    assert browser.cards() == ["1.png"]
    assert browser.all("[name=Order] option")[0] == "least sure first"  # no truth is known
    browser.run(f"showItem(0), {DECODED}")


def test_a_page_only_of_photos_and_never_over_anothers():
    Path("results.jsonl").touch()
    assert write_gallery(Path()) is None
    page = write(record("1"), pictures=False)
    assert write_gallery(Path("out")) == page
    page.write_text("another program's")
    with pytest.raises(FileExistsError):
        write_gallery(Path("out"))
    assert sorted(os.listdir("out")) == ["index.html", "results.jsonl"]  # no temporary file


def test_ten_thousand(browser):
    records = [record(f"{n // 100}/{n}", n % 3, n / 1e4, n // 2 % 3) for n in range(10000)]
    page = write(*records, pictures=False)
    assert page.stat().st_size < 1e7
    browser.open(page)
    assert browser.run("performance.now()") < 2000
    assert browser.all("[role=status]") == ["10000 of 10000, the first 500 are shown"]
    assert browser.run("main.childElementCount") == 500
    browser.run("showItem(9999), closeDialog()")  # there is no card to go back to
    assert len(browser.cards(Text="/9/")) == 100
