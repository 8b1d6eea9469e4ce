"""Rooms 1 and 7 on folders: which photos are found, batches, records, resume after kills, shares under torchrun."""

import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import CKPT, DOG, PROGRAM
from PIL import Image

import cnn_visualizations as program_file
from cnn_visualizations import (
    CallError,
    Failed,
    Job,
    Look,
    Results,
    Share,
    Wanted,
    ahead,
    explain_photos,
    find_photos,
    find_places,
    until,
)

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
CLASSES = ["cat", "dog", "狗", "owl", "fox", "eel", "ant"]


def paint(path, seed=0, size=(90, 70)):
    """Writes a photo of soft blobs that looks different for each seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def break_off(path):
    """Makes a photo one that looks whole from its first bytes but cannot be decoded."""
    path.write_bytes(path.read_bytes()[:300])
    return path


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def tree(folder):
    """Every file below a folder by its relative path, the records aside."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".jsonl")
    return sorted(path.relative_to(folder).as_posix() for path in files)


def records(folder):
    """The parsed lines of all the records of an output folder; every line must be whole."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("results*.jsonl"))]
    assert all(text.endswith("\n") or not text for text in texts)
    return [json.loads(line) for text in texts for line in text.splitlines()]


def facts(folder):
    """The records in an order of their own, probabilities rounded and the output folder's name left out."""
    text = [json.dumps(record, ensure_ascii=False).replace(str(folder), "OUT") for record in records(folder)]
    plain = [json.loads(line) for line in text]
    for record in plain:
        record.pop("options", None)  # a hash of, among others, the output folder
        for named in [record["class"], *record["top5"]] if "class" in record else []:
            named["probability"] = round(named["probability"], 3)
    return sorted(plain, key=lambda record: (record["image"], record["method"]))


def assert_same_outcome(folder, expected):
    """The same files with the same pixels to within two levels, and the same records, as in another output folder."""
    assert tree(folder) == tree(expected)
    for name in tree(folder):
        assert np.abs(pixels(folder / name) - pixels(expected / name)).max() <= 2, name
    assert facts(folder) == facts(expected)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small network of random weights: the checkpoint, and the network as torchvision makes it."""
    torch.manual_seed(1)
    model = torchvision.models.squeezenet1_1(num_classes=len(CLASSES)).eval()
    path = tmp_path_factory.mktemp("tiny") / "squeezenet1_1.pth"
    torch.save({"arch": "squeezenet1_1", "classes": CLASSES, "state_dict": model.state_dict()}, path)
    return path, model


@pytest.fixture
def main(tiny, tmp_path, capsys):
    """Runs the program in this process on the small network. Gives the exit status, stdout and stderr."""

    def run(*args, output=tmp_path / "out", ckpt=tiny[0], size=64):
        words = ["--ckpt", ckpt, "--device", "cpu", "--output", output, *args]
        words += ["--input-size", size] if size else []
        try:
            status = program_file.main(program_file.parse_args([str(word) for word in words]))
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def album(tmp_path):
    """A folder of six photos in two folders of equal names."""
    names = ["a.jpg", "b.jpg", "x/1.jpg", "x/2.png", "y/x/1.jpg", "y/狗 3.jpg"]
    for seed, name in enumerate(names):
        paint(tmp_path / "album" / name, seed)
    return tmp_path / "album"


# Which photos


def found(*inputs, stdin=()):
    return [Path(path).as_posix() for path, _ in find_photos([str(name) for name in inputs], stdin)]


def test_a_folder_is_walked_in_sorted_order_without_hidden_files(album, monkeypatch):
    for hidden in (".a.jpg", ".cache/c.jpg", "x/.c.jpg"):
        paint(album / hidden)
    for other in ("notes.txt", "x/labels.json"):
        (album / other).write_text("no photo")
    monkeypatch.chdir(album.parent)
    names = ["a.jpg", "b.jpg", "x/1.jpg", "x/2.png", "y/狗 3.jpg", "y/x/1.jpg"]
    assert found("album") == [f"album/{name}" for name in names]


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_links_to_folders_are_followed_but_not_in_circles(album, tmp_path):
    paint(tmp_path / "elsewhere" / "z.jpg")
    (album / "linked").symlink_to(tmp_path / "elsewhere")
    (album / "x" / "again").symlink_to(tmp_path / "elsewhere")
    (album / "x" / "above").symlink_to(album)
    (album / "further above").symlink_to(tmp_path)
    (tmp_path / "elsewhere" / "back").symlink_to(album / "x")
    assert f"{album.as_posix()}/linked/z.jpg" in found(album)
    assert len(found(album)) == 6 + 3 + 1  # z.jpg and those of x behind the first, z.jpg behind the second


def test_photos_in_a_folder_that_cannot_be_read_are_told_of(album, capsys):
    for name in ("IMG_1.HEIC", "x/IMG_2.heic", "x/b.avif", "._IMG_1.HEIC"):
        (album / name).write_bytes(b"")
    assert len(found(album)) == 6
    assert capsys.readouterr().err.startswith(f"note: 3 photos in {album} are left out, since .heic ")


def test_of_a_folders_files_only_those_are_opened_that_may_be_earlier_pictures(main, album, tmp_path, monkeypatch):
    main("--sheet", "--method", "gradcam++", "--top-k", 2, "--format", "png", album / "a.jpg", album / "b.jpg")
    paint(album / "IMG_0001.jpg")
    paint(album / "gb_c.jpg")
    for picture in (tmp_path / "out").glob("*.png"):
        picture.rename(album / picture.name)
    opened, look = [], program_file.is_ours
    monkeypatch.setattr(program_file, "is_ours", lambda path: opened.append(os.path.basename(path)) or look(path))
    assert len(found(album)) == 6 + 2
    assert len(opened) == 1 + 2 * (2 * 3 + 1)


@pytest.mark.parametrize("name", ["A.JPG", "b.Jpeg", "c.PNG", "d.webp", "e.BMP", "f.tif", "g.TIFF", "h.gif"])
def test_every_promised_kind_of_photo_is_found_in_a_folder(tmp_path, name):
    (tmp_path / name).write_bytes(b"content is looked at later")
    assert found(tmp_path) == [(tmp_path / name).as_posix()]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("album/*.jpg", ["a.jpg", "b.jpg"]),
        ("album/x/?.*", ["x/1.jpg", "x/2.png"]),
        ("album/**/1.jpg", ["x/1.jpg", "y/x/1.jpg"]),
        ("album/[b-z].jpg", ["b.jpg"]),
    ],
)
def test_a_pattern_that_the_shell_left_alone(album, monkeypatch, pattern, names):
    monkeypatch.chdir(album.parent)
    assert found(pattern) == [f"album/{name}" for name in names]


def test_a_photo_whose_name_looks_like_a_pattern_is_that_photo(album, monkeypatch):
    paint(album / "[ab].jpg")
    monkeypatch.chdir(album)
    assert found("[ab].jpg") == ["[ab].jpg"]


def test_a_pattern_that_nothing_matches_is_a_photo_that_is_not_there(main, album):
    status, stdout, stderr = main(album / "*.tiff")
    assert (status, stdout) == (1, "")
    assert stderr.startswith("error: ")
    assert "*.tiff is not there" in stderr


def test_paths_on_standard_input_one_a_line(main, album, monkeypatch, tmp_path):
    photos = [album / "y" / "狗 3.jpg", album / "a.jpg"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{photos[0]}\n\n{photos[1]}\r\n"))
    status, stdout, _ = main("--outputs", "cam", "-", album / "b.jpg")
    assert status == 0
    assert [line.partition(": ")[0] for line in stdout.splitlines()] == [str(p) for p in [*photos, album / "b.jpg"]]
    assert tree(tmp_path / "out") == ["gradcam_cam_a.jpg", "gradcam_cam_b.jpg", "gradcam_cam_狗 3.jpg"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="such names are not possible elsewhere")
def test_a_path_on_standard_input_that_is_no_text_is_no_traceback(tiny, album, tmp_path):
    paint(tmp_path / "good.jpg")
    odd = os.path.join(os.fsencode(tmp_path), b"caf\xe9.jpg")
    os.rename(paint(tmp_path / "cafe.jpg"), odd)
    words = ["--ckpt", tiny[0], "--input-size", "64", "--outputs", "cam", "--output", tmp_path / "out", "-"]
    process = subprocess.run(
        [sys.executable, PROGRAM, *words],
        input=odd + b"\n" + os.fsencode(tmp_path / "good.jpg") + b"\n",
        capture_output=True,
        env={**os.environ, "LC_ALL": "C.UTF-8", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert b"Traceback" not in process.stderr
    assert process.returncode == 0, process.stderr
    assert len(tree(tmp_path / "out")) == 2


@pytest.mark.parametrize("content", [None, "notes.txt", ".hidden.jpg"])
def test_a_folder_without_photos_is_a_wrong_call(main, tmp_path, content):
    (tmp_path / "bare").mkdir()
    if content:
        paint(tmp_path / "photo.jpg").rename(tmp_path / "bare" / content)
    status, stdout, stderr = main(tmp_path / "bare")
    assert (status, stdout) == (2, "")
    assert stderr.startswith("error: no photos in ")
    assert "bare" in stderr
    assert stderr.count("\n") == 1


# Where the pictures go


def test_the_tree_is_mirrored(main, album, tmp_path):
    assert main("--outputs", "cam,gb", album)[0] == 0
    stems = ["a", "b", "x/1", "x/2", "y/x/1", "y/狗 3"]
    expected = [
        os.path.join(*os.path.split(stem)[:1], kind + os.path.basename(stem))
        for stem in stems
        for kind in ("gradcam_cam_", "gb_")
    ]
    assert tree(tmp_path / "out") == sorted(f"{Path(path).as_posix()}.jpg" for path in expected)


def test_several_folders_with_equal_names_do_not_meet(main, tmp_path):
    folders = [tmp_path / "2023" / "photos", tmp_path / "2024" / "photos"]
    for seed, folder in enumerate(folders):
        paint(folder / "1.jpg", seed)
    assert main("--outputs", "cam", *folders)[0] == 0
    assert tree(tmp_path / "out") == ["2023/photos/gradcam_cam_1.jpg", "2024/photos/gradcam_cam_1.jpg"]
    first, second = (pixels(tmp_path / "out" / name) for name in tree(tmp_path / "out"))
    assert np.abs(first - second).mean() > 3


def test_a_jpg_and_a_png_of_one_name_both_keep_their_pictures(main, tmp_path):
    photos = [
        paint(tmp_path / "album" / f"a.{kind}", seed, (80 + 8 * seed,) * 2) for seed, kind in enumerate(["jpg", "png"])
    ]
    assert main("--outputs", "cam", tmp_path / "album")[0] == 0
    by_photo = {record["image"]: record["files"] for record in records(tmp_path / "out")}
    assert set(by_photo) == {str(photo) for photo in photos}
    sizes = [pixels(by_photo[str(photo)][0]).shape[0] for photo in photos]
    assert sizes[1] > sizes[0]
    assert len(tree(tmp_path / "out")) == 2


@pytest.mark.parametrize("inner", [".", "results", "x"])
def test_earlier_pictures_within_the_folder_are_not_taken_for_photos(main, album, inner):
    photos = found(album)
    for method in ("gradcam", "gradcam", "eigencam"):
        status, stdout, stderr = main("--method", method, album, output=album / inner)
        assert status == 0
        assert "6 done, 0 skipped, 0 failed in " in stderr
        assert found(album) == photos
        assert len(stdout.splitlines()) == 6
    assert len(tree(album)) == 6 + 6 * 5
    assert found(f"{album}/**/*.jpg") == sorted(photo for photo in photos if photo.endswith(".jpg"))


def test_ones_own_photo_named_like_a_picture_is_taken_and_never_overwritten(main, tmp_path):
    album = tmp_path / "album"
    own = [paint(album / name, seed) for seed, name in enumerate(["1.jpg", "gb_1.jpg", "gradcam_cam_2.jpg", "2.jpg"])]
    before = [photo.read_bytes() for photo in own]
    for _ in range(2):
        status, _, stderr = main(album, output=album)
        assert status == 0
        assert "4 done" in stderr
        assert [photo.read_bytes() for photo in own] == before
    assert len(tree(album)) == 4 + 4 * 3
    written = [name for record in records(album) for name in record["files"]]
    assert len(set(written)) == 12
    assert set(written).isdisjoint(str(photo) for photo in own)


def test_a_file_of_ones_own_in_the_output_folder_is_never_overwritten(main, tmp_path):
    photo, own = paint(tmp_path / "1.jpg"), paint(tmp_path / "out" / "gb_1.jpg", 7)
    before = own.read_bytes()
    main(photo)
    assert own.read_bytes() == before
    assert len(tree(tmp_path / "out")) == 4


def test_many_photos_of_one_name_are_planned_without_trying_every_number_for_each(monkeypatch, tmp_path):
    names, count = Wanted.files, itertools.count()
    monkeypatch.setattr(Wanted, "files", lambda *args: (next(count), names(*args))[1])
    photos = [(f"{number}/cover.jpg", "") for number in range(400)]
    places = [place for _, place in find_places(photos, tmp_path, Wanted(["gradcam"], ["cam"]))]
    assert len(set(places)) == 400
    assert next(count) < 400 * 10  # not 400 * 400 / 2


# The pipeline


def test_reading_ahead_keeps_order_and_bounds():
    lock, under_way, most = threading.Lock(), set(), []
    gate = threading.Semaphore(0)

    def work(item):
        gate.acquire(timeout=20)
        return item * item

    def items():
        for item in range(30):
            with lock:
                under_way.add(item)
                most.append(len(under_way))
            gate.release()
            yield item

    for number, square in enumerate(ahead(work, items(), 5)):
        assert square == number * number
        with lock:
            under_way.discard(number)
    assert number == 29
    assert max(most) <= 5
    assert max(most) > 1


def test_reading_ahead_takes_no_item_before_there_is_room():
    taken = []
    results = ahead(str, (taken.append(number) or number for number in range(100)), 4)
    assert next(results) == "0"
    assert len(taken) <= 4
    assert next(results) == "1"
    assert len(taken) <= 5
    results.close()
    assert len(taken) <= 5


def test_an_error_of_the_function_comes_out_in_its_place():
    results = ahead(lambda number: 1 // number, [1, 0, 1], 2)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


class Fake:
    """An explainer that notes how many inputs came at once, and fails where it is told to."""

    def __init__(self, fails=lambda inputs: None):
        self.sizes, self.fails = [], fails

    def __call__(self, inputs, targets=None, top=1):
        self.fails(inputs)
        self.sizes.append(len(inputs))
        values = inputs.mean((1, 2, 3))
        return program_file.Explanation(
            {"gradcam": inputs[:, :1].numpy()},
            None,
            torch.stack([values, -values], 1).numpy(),
            np.zeros((len(inputs), 1), int),
        )


def prepared(number):
    picture = np.zeros((4, 4, 3), np.uint8)
    inputs = torch.full((3, 4, 4), float(number))
    return program_file.Prepared(f"{number}.jpg", f"out/{number}", (0, 0), 4, 4, (0, 0, 4, 4), picture, inputs)


def job_of(explainer):
    return Job(None, explainer, None, 1, Wanted(["gradcam"], ["cam"]), Look(), None, False, None)


def outcome_of(outcome):
    """The path of a photo and its number as the network saw it, None where it failed."""
    if isinstance(outcome, Failed):
        return outcome.path, None
    assert outcome.explanation.logits.shape == (1, 2)
    return outcome.photo.path, float(outcome.explanation.logits[0, 0])


def test_batches_fill_up_across_broken_photos():
    explainer = Fake()
    photos = [Failed(f"{n}.jpg", "broken") if n in (1, 2, 5, 9) else prepared(n) for n in range(14)]
    outcomes = sorted(map(outcome_of, explain_photos(photos, job_of(explainer), 4)))
    assert explainer.sizes == [4, 4, 2]
    assert outcomes == sorted((f"{n}.jpg", None if n in (1, 2, 5, 9) else float(n)) for n in range(14))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"),
        torch.OutOfMemoryError("more\nlines"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=repr,
)
def test_too_little_memory_halves_the_batch_goes_on_and_says_so_once(capsys, error):
    def fails(inputs):
        if len(inputs) > 3:
            raise error

    program_file.note_once.cache_clear()
    explainer = Fake(fails)
    outcomes = [outcome_of(o) for o in explain_photos(map(prepared, range(37)), job_of(explainer), 16)]
    assert outcomes == [(f"{n}.jpg", float(n)) for n in range(37)]
    assert max(explainer.sizes) <= 3
    assert len(explainer.sizes) <= 37 / 2 + 2  # two at a time, not one
    stderr = capsys.readouterr().err
    assert stderr.startswith("note: ")
    assert stderr.count("\n") == 1
    assert "memory" in stderr


def test_a_photo_for_which_the_memory_does_not_suffice_alone_is_an_error():
    def fails(inputs):
        if 5 in inputs[:, 0, 0, 0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    outcomes = dict(map(outcome_of, explain_photos(map(prepared, range(8)), job_of(Fake(fails)), 8)))
    assert outcomes == {f"{n}.jpg": None if n == 5 else float(n) for n in range(8)}


def test_a_gpu_that_has_failed_ends_the_run_instead_of_failing_photo_by_photo():
    def fails(inputs):
        if len(explainer.sizes) == 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ...")

    explainer = Fake(fails)
    done = []
    with pytest.raises(CallError, match=r"^the GPU has failed: CUDA error: an .* encountered; .*--skip-existing$"):
        done.extend(map(outcome_of, explain_photos(map(prepared, range(100)), job_of(explainer), 4)))
    assert done == [(f"{n}.jpg", float(n)) for n in range(8)]


def test_a_photo_on_which_the_network_fails_takes_no_other_with_it():
    def fails(inputs):
        if 5 in inputs[:, 0, 0, 0]:
            raise ValueError("the network's answer is not finite")

    outcomes = dict(map(outcome_of, explain_photos(map(prepared, range(8)), job_of(Fake(fails)), 4)))
    assert outcomes == {f"{n}.jpg": None if n == 5 else float(n) for n in range(8)}


def test_several_workers_share_batch_and_cores_and_keep_the_order(monkeypatch):
    threads = set()

    def notes(inputs):
        threads.add(threading.get_ident())
        time.sleep(0.02)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    explainer = Fake(notes)
    photos = [Failed(f"{n}.jpg", "broken") if n == 7 else prepared(n) for n in range(24)]
    outcomes = [outcome_of(o) for o in explain_photos(photos, job_of(explainer), 8, workers=3)]
    assert outcomes == [(f"{n}.jpg", None if n == 7 else float(n)) for n in range(24)]
    assert max(explainer.sizes) == 2
    assert len(threads) > 1
    assert set(given) == {2}


def test_what_takes_long_ends_when_nothing_more_is_wanted():
    def fails(inputs):
        if inputs.max() > 0:
            for _ in until(job.stop, itertools.count()):
                time.sleep(0.01)

    job = job_of(Fake(fails))
    outcomes = explain_photos(map(prepared, range(8)), job, 1)
    assert outcome_of(next(outcomes)) == ("0.jpg", 0.0)
    outcomes.close()  # would wait for ever
    assert job.stop.is_set()


def test_a_wrong_call_ends_the_run():
    def fails(inputs):
        raise CallError("no such layer")

    with pytest.raises(CallError):
        list(explain_photos(map(prepared, range(8)), job_of(Fake(fails)), 4))


def test_a_slow_disk_holds_the_reading_back(main, tmp_path, monkeypatch):
    for seed in range(60):
        paint(tmp_path / "album" / f"{seed:02}.jpg", seed)
    lock, held, most = threading.Lock(), [0], []
    open_photo, write_picture = program_file.open_photo, program_file.write_picture

    def reading(path):
        with lock:
            held[0] += 1
            most.append(held[0])
        return open_photo(path)

    def writing(*args):
        time.sleep(0.02)
        write_picture(*args)
        with lock:
            held[0] -= 1

    monkeypatch.setattr(program_file, "open_photo", reading)
    monkeypatch.setattr(program_file, "write_picture", writing)
    assert main("--batch-size", 2, "--outputs", "cam", tmp_path / "album")[0] == 0
    assert held == [0]
    assert max(most) <= 6 * 2  # what is read ahead, in the network, and being written


def test_a_photo_that_vanishes_on_the_way_is_one_line(main, album, tmp_path, monkeypatch):
    open_photo = program_file.open_photo

    def vanishing(path):
        if path.name == "b.jpg":
            path.unlink()
        return open_photo(path)

    monkeypatch.setattr(program_file, "open_photo", vanishing)
    status, stdout, stderr = main("--outputs", "cam", album)
    assert status == 1
    assert len(stdout.splitlines()) == 5
    error, summary = stderr.splitlines()
    assert error == f"error: {album / 'b.jpg'} is not there"
    assert summary.startswith("5 done, 0 skipped, 1 failed in ")
    assert [Path(r["image"]).name for r in records(tmp_path / "out") if "error" in r] == ["b.jpg"]


# The record


@pytest.mark.parametrize("wanted", [None, 3])
def test_the_record_says_what_the_plain_network_says(main, tiny, tmp_path, wanted):
    names = ["1.jpg", "狗/é 2.png", "狗/3.jpg"]
    photos = [paint(tmp_path / "album" / name, seed, (300 + seed, 260)) for seed, name in enumerate(names)]
    words = [] if wanted is None else ["--target-class", wanted]
    assert main("--target-layer", "features.9", *words, tmp_path / "album", size=None)[0] == 0
    by_photo = {record["image"]: record for record in records(tmp_path / "out")}
    assert set(by_photo) == {str(photo) for photo in photos}
    preset = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1.transforms()
    for photo in photos:
        record = by_photo[str(photo)]
        with torch.no_grad(), Image.open(photo) as image:
            chances = tiny[1](preset(image.convert("RGB"))[None]).softmax(1)[0]
            assert (record["width"], record["height"]) == image.size
        order = chances.argsort(descending=True).tolist()
        for named, index in zip(
            [record["class"], *record["top5"]], [order[0] if wanted is None else wanted, *order[:5]], strict=True
        ):
            assert (named["index"], named["name"]) == (index, CLASSES[index])
            assert named["probability"] == pytest.approx(float(chances[index]), abs=1e-4)
        assert (record["method"], record["target_layer"]) == ("gradcam", "features.9")
        assert len(record["files"]) == 3
        assert all(pixels(file).std() > 0 for file in record["files"])
        assert "error" not in record
    assert "狗" in (tmp_path / "out" / "results.jsonl").read_text(encoding="utf-8")


def test_the_record_holds_the_error_of_a_broken_photo(main, album, tmp_path):
    break_off(album / "b.jpg")
    (album / "x" / "1.jpg").write_bytes(b"")
    status, _, stderr = main("--outputs", "cam", album)
    assert status == 1
    assert "4 done, 0 skipped, 2 failed in " in stderr
    errors = {record["image"]: record["error"] for record in records(tmp_path / "out") if "error" in record}
    assert set(errors) == {str(album / "b.jpg"), str(album / "x" / "1.jpg")}
    for photo, error in errors.items():
        assert photo in error
        assert f"error: {error}\n" in stderr
    assert len(records(tmp_path / "out")) == 6


def test_a_second_run_leaves_no_doubles_and_another_method_adds_its_own_lines(main, album, tmp_path):
    for method in ("gradcam", "gradcam", "eigencam", "gradcam"):
        main("--outputs", "cam", "--method", method, album)
    lines = [(record["image"], record["method"]) for record in records(tmp_path / "out")]
    assert sorted(lines) == sorted((str(Path(p)), m) for p in found(album) for m in ("gradcam", "eigencam"))


@pytest.mark.parametrize(
    "torn", [b'{"image": "', b'{"image": "a", "method": "gradcam"}', '{"image": "狗'.encode()[:-1]]
)
def test_a_torn_last_line_is_dropped_at_the_next_start(main, album, tmp_path, torn):
    main("--outputs", "cam", album / "a.jpg", album / "b.jpg")
    with (tmp_path / "out" / "results.jsonl").open("ab") as file:
        file.write(torn)
    assert main("--outputs", "cam", "--skip-existing", album / "a.jpg", album / "b.jpg", album / "x" / "1.jpg")[0] == 0
    assert sorted(Path(record["image"]).name for record in records(tmp_path / "out")) == ["1.jpg", "a.jpg", "b.jpg"]


@posix
def test_a_record_that_fits_the_disk_only_in_part_is_an_error_and_spoils_no_other(tmp_path):
    import resource

    results = Results(tmp_path, Share())
    (tmp_path / "a.jpg").touch()
    line = {"image": "a" * 60, "method": "gradcam", "files": [str(tmp_path / "a.jpg")], "options": "1234"}
    results.append(line)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "results.jsonl").stat().st_size + 50, hard))
    try:
        with pytest.raises(OSError):
            results.append({**line, "image": "b" * 60})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    results.append({**line, "image": "c" * 60})  # there is room again
    assert {image[0] for image, _ in Results(tmp_path, Share()).finished()} == {"a", "c"}


# Resume


def test_a_second_run_does_nothing_and_does_not_even_load_the_network(main, album, tmp_path, monkeypatch):
    main(album)
    before = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in tree(tmp_path / "out")}
    monkeypatch.setattr(program_file, "load_classifier", None)
    status, stdout, stderr = main("--skip-existing", album)
    assert (status, stdout) == (0, "")
    assert stderr.startswith("0 done, 6 skipped, 0 failed in ")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in tree(tmp_path / "out")} == before
    assert len(records(tmp_path / "out")) == 6


def test_one_photo_that_is_done_already_is_not_passed_over_in_silence(main, album):
    assert main(album / "a.jpg")[2] == ""
    assert main("--skip-existing", album / "a.jpg")[2].startswith("0 done, 1 skipped, 0 failed in ")


@pytest.mark.parametrize(
    "changed", [["--target-class", "0"], ["--alpha", "0.3"], ["--method", "eigencam,gradcam"], ["--output-size", "64"]]
)
def test_another_choice_of_options_is_not_taken_for_done(main, album, changed):
    main(album)
    assert "0 skipped" in main("--skip-existing", *changed, album)[2]
    assert "6 skipped" in main("--skip-existing", *changed, album)[2]


def test_a_checkpoint_that_was_trained_on_is_not_taken_for_the_same(main, album, tmp_path):
    ckpt = tmp_path / "net.pth"
    ckpt.write_bytes(CKPT.read_bytes())
    main(album, ckpt=ckpt)
    assert "6 skipped" in main("--skip-existing", album, ckpt=ckpt)[2]
    os.utime(ckpt, (1, 1))
    assert "0 skipped" in main("--skip-existing", album, ckpt=ckpt)[2]


def test_a_photo_that_was_changed_is_done_again(main, album):
    main("--outputs", "cam", album)
    paint(album / "b.jpg", 30)
    status, stdout, stderr = main("--outputs", "cam", "--skip-existing", album)
    assert (status, "1 done, 5 skipped" in stderr) == (0, True)
    assert stdout.startswith(f"{album / 'b.jpg'}: ")


def test_pictures_that_a_run_with_other_options_has_written_over_are_done_again(main, album, tmp_path):
    gb, again = tmp_path / "out" / "gb_a.jpg", ["--target-class", "0", "--skip-existing", album]
    main("--target-class", "0", album)
    first = gb.read_bytes()
    main("--target-class", "0", "--method", "eigencam", album)
    assert gb.read_bytes() == first
    assert "6 skipped" in main(*again)[2]  # another method's run with the same options has drawn the same
    main("--target-class", "1", "--method", "xgradcam", album)
    assert gb.read_bytes() != first
    assert "6 done, 0 skipped" in main(*again)[2]
    assert gb.read_bytes() == first
    assert "6 skipped" in main(*again)[2]
    assert len(records(tmp_path / "out")) == 18


@pytest.mark.parametrize("file", ["--sheet", "--save-arrays"])
def test_a_file_that_all_methods_share_is_made_again_for_another_method(main, album, file):
    again = [file, "--outputs", "cam", "--skip-existing", album]
    for method in ("gradcam", "layercam", "gradcam"):
        assert "6 done, 0 skipped" in main("--method", method, *again)[2]


def test_of_two_runs_in_two_results_files_nobody_knows_which_was_later(main, share, album):
    options = ["--outputs", "gb", album]
    share(0, 2, "--target-class", "0", *options)
    share(1, 2, "--target-class", "0", *options)
    main("--method", "eigencam", "--target-class", "1", *options)
    assert "6 done, 0 skipped" in main("--target-class", "0", "--skip-existing", *options)[2]


def test_a_line_that_another_process_adds_meanwhile_is_no_hindrance(main, album, tmp_path, monkeypatch):
    main("--outputs", "cam", album)
    lines, passes = (tmp_path / "out" / "results.jsonl").read_text(encoding="utf-8").splitlines(keepends=True), []
    (tmp_path / "out" / "results.jsonl").write_text("".join(lines[:-1]), encoding="utf-8")
    finished_lines = program_file.finished_lines

    def growing(path):
        yield from finished_lines(path)
        passes.append(path)
        if len(passes) == 1:
            path.write_text("".join(lines), encoding="utf-8")

    monkeypatch.setattr(program_file, "finished_lines", growing)
    assert "1 done, 5 skipped" in main("--outputs", "cam", "--skip-existing", album)[2]


@pytest.mark.parametrize("lost", ["gradcam_cam_1.jpg", "gb_1.jpg", "gradcam_cam_gb_1.jpg"])
def test_a_removed_picture_makes_only_that_photo_be_done_again(main, album, tmp_path, lost):
    main(album)
    content = (tmp_path / "out" / "x" / lost).read_bytes()
    (tmp_path / "out" / "x" / lost).unlink()
    status, stdout, stderr = main("--skip-existing", album)
    assert status == 0
    assert stdout.startswith(f"{album / 'x' / '1.jpg'}: ")
    assert stdout.count("\n") == 1
    assert stderr.startswith("1 done, 5 skipped, 0 failed in ")
    assert (tmp_path / "out" / "x" / lost).read_bytes() == content
    assert len(records(tmp_path / "out")) == 6


def test_without_the_option_everything_is_done_again(main, album):
    main("--outputs", "cam", album)
    assert "6 done, 0 skipped" in main("--outputs", "cam", album)[2]


@pytest.mark.parametrize("more", [["--outputs", "cam,gb"], ["--method", "eigencam", "--outputs", "cam"]])
def test_other_pictures_are_not_there_yet(main, album, more):
    main("--outputs", "cam", album)
    assert "6 done, 0 skipped" in main("--skip-existing", *more, album)[2]


def test_a_folder_of_broken_photos_only_has_its_records(main, tmp_path):
    for name in ("a.jpg", "b.png"):
        (tmp_path / "album").mkdir(exist_ok=True)
        (tmp_path / "album" / name).write_bytes(b"no picture")
    status, _, stderr = main(tmp_path / "album")
    assert (status, stderr.count("error: ")) == (1, 2)
    assert [Path(record["image"]).name for record in records(tmp_path / "out")] == ["a.jpg", "b.png"]
    assert all("is not a picture" in record["error"] for record in records(tmp_path / "out"))


def test_what_other_programs_have_written_stays(main, album, tmp_path):
    out, foreign = tmp_path / "out", b'{"epoch": 1, "loss": 0.3}\nmy notes'
    out.mkdir()
    for name in ("results.jsonl", "results_training.jsonl", "results-old.jsonl"):
        (out / name).write_bytes(foreign)
    main("--outputs", "cam", album)
    assert (out / "results_training.jsonl").read_bytes() == foreign
    assert (out / "results-old.jsonl").read_bytes() == foreign
    assert (out / "results.jsonl").read_bytes().startswith(foreign + b"\n")
    assert "6 skipped" in main("--outputs", "cam", "--skip-existing", album)[2]


def test_a_mended_photo_replaces_its_error_and_a_broken_one_is_tried_again(main, album, tmp_path):
    whole = (album / "b.jpg").read_bytes()
    for name in ("b.jpg", "x/1.jpg"):
        break_off(album / name)
    main("--outputs", "cam", album)
    (album / "b.jpg").write_bytes(whole)
    status, _, stderr = main("--outputs", "cam", "--skip-existing", album)
    assert status == 1
    assert "1 done, 4 skipped, 1 failed in " in stderr
    assert len(records(tmp_path / "out")) == 6
    assert [record["image"] for record in records(tmp_path / "out") if "error" in record] == [
        str(album / "x" / "1.jpg")
    ]


def test_a_longer_and_a_shorter_list_go_on(main, album, tmp_path):
    main("--outputs", "cam", album)
    paint(album / "0 first.jpg", 20)
    paint(album / "x" / "15.jpg", 21)
    (album / "a.jpg").unlink()
    assert main("--outputs", "cam", "--skip-existing", album)[2].startswith("2 done, 5 skipped, 0 failed in ")
    assert len(records(tmp_path / "out")) == 8


def test_after_a_change_of_the_list_every_record_still_names_its_own_pictures(main, tmp_path):
    for seed, kind in enumerate(["jpg", "png"]):
        paint(tmp_path / "album" / f"a.{kind}", seed)
    main("--outputs", "gb", tmp_path / "album")
    paint(tmp_path / "album" / "a.bmp", 2)  # stands before the others
    main("--outputs", "gb", "--skip-existing", tmp_path / "album")
    main("--outputs", "gb", tmp_path / "album", output=tmp_path / "fresh")
    files = {record["image"]: record["files"][0] for record in records(tmp_path / "out")}
    fresh = {record["image"]: record["files"][0] for record in records(tmp_path / "fresh")}
    assert set(files) == set(fresh)
    assert len(set(files.values())) == 3
    for photo, file in files.items():
        assert np.abs(pixels(file) - pixels(fresh[photo])).mean() < 1, photo


# Kills


def start(*words, **environment):
    """The program in a process of its own, on the demo's network at a small size."""
    command = [
        sys.executable,
        PROGRAM,
        "--ckpt",
        CKPT,
        "--device",
        "cpu",
        "--input-size",
        65,
        "--batch-size",
        2,
        *words,
    ]
    return subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1", **environment},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_lines(process, record, count):
    """Returns as soon as the record has so many lines, or the process has ended."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if record.exists() and record.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.003)


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """Sixty photos, three of them broken, in three folders."""
    folder = tmp_path_factory.mktemp("crowd")
    for seed in range(60):
        paint(folder / "abc"[seed % 3] / f"{seed:02}.jpg", seed, (200, 150))
    for name in ("a/09.jpg", "b/31.jpg", "c/59.jpg"):
        break_off(folder / name)
    return folder


@posix
def test_killed_three_times_and_resumed_it_ends_like_a_run_that_was_never_stopped(main, crowd, tmp_path):
    output, hits = tmp_path / "out", 0
    for count in (random.randint(3, 12), random.randint(18, 28), random.randint(34, 46)):
        process = start("--skip-existing", "--output", output, crowd)
        wait_for_lines(process, output / "results.jsonl", count)
        time.sleep(random.random() * 0.05)
        process.kill()
        process.communicate()
        whole = [name for name in tree(output) if not name.endswith(".part")]
        assert all(pixels(output / name).shape[2] == 3 for name in whole)  # each can be decoded
        hits += process.returncode == -signal.SIGKILL and 0 < len(whole) < 57 * 3
    assert hits > 0
    options = ["--input-size", 65, "--batch-size", 2]
    status, _, stderr = main("--skip-existing", *options, crowd, ckpt=CKPT, size=None)
    assert status == 1
    summary = stderr.splitlines()[-1]
    done, skipped = int(summary.split()[0]), int(summary.split()[2])
    assert done + skipped == 57
    assert skipped > 0
    assert "3 failed" in summary
    main(*options, crowd, ckpt=CKPT, size=None, output=tmp_path / "undisturbed")
    assert len(tree(output)) == 57 * 3  # so no .part either
    assert_same_outcome(output, tmp_path / "undisturbed")
    assert len(records(output)) == 60


@posix
def test_control_c_finishes_what_is_being_written_and_exits_with_130(crowd, tmp_path):
    output = tmp_path / "out"
    process = start("--output", output, crowd)
    wait_for_lines(process, output / "results.jsonl", 5)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    done = [record for record in records(output) if "error" not in record]
    failed = len(records(output)) - len(done)
    assert 0 < len(done) < 57
    assert stderr.splitlines()[-1].startswith(f"{len(done)} done, 0 skipped, {failed} failed in ")
    assert len(stdout.splitlines()) == len(done)
    assert len(tree(output)) == 3 * len(done)
    assert all(pixels(output / name).shape[2] == 3 for name in tree(output))  # each can be decoded


@posix
def test_control_c_while_the_network_is_loaded_prints_the_summary_too(main, album, monkeypatch):
    def pressed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(program_file, "load_classifier", pressed)
    status, stdout, stderr = main(album)
    assert (status, stdout) == (130, "")
    assert stderr.startswith("0 done, 0 skipped, 0 failed in ")


# Several processes


@pytest.fixture
def share(main, monkeypatch):
    """Runs one process of several as torchrun starts it."""

    def run(rank, world, *args, **kwargs):
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", world)):
            monkeypatch.setenv(name, str(value))
        try:
            return main("--outputs", "cam", *args, **kwargs)
        finally:
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
                monkeypatch.delenv(name)

    return run


@pytest.mark.parametrize("world", [2, 3])
def test_the_union_of_several_processes_is_a_single_run(share, main, album, tmp_path, world):
    break_off(album / "b.jpg")
    main("--outputs", "cam", album, output=tmp_path / "alone")
    for rank in range(world):
        _, _, stderr = share(rank, world, album)
        assert f"by process {rank} of {world} in " in stderr
    assert_same_outcome(tmp_path / "out", tmp_path / "alone")
    parts = sorted(path.name for path in (tmp_path / "out").glob("*.jsonl"))
    assert parts == [f"results.{rank}.jsonl" for rank in range(world)]
    sizes = [(tmp_path / "out" / part).read_bytes().count(b"\n") for part in parts]
    assert sizes == [6 // world] * world


@pytest.mark.parametrize(("first", "second"), [(3, 2), (2, 3), (1, 2), (2, 1)])
@pytest.mark.parametrize("backwards", [False, True])
def test_a_run_goes_on_with_another_number_of_processes(share, main, album, tmp_path, first, second, backwards):
    main("--outputs", "cam", album, output=tmp_path / "alone")
    mended = (album / "b.jpg").read_bytes()
    break_off(album / "b.jpg")
    for rank in range(first):
        share(rank, first, album)
    (tmp_path / "out" / "x" / "gradcam_cam_1.jpg").unlink()
    (tmp_path / "out" / "y" / "gradcam_cam_狗 3.jpg").unlink()
    (album / "b.jpg").write_bytes(mended)
    ranks = reversed(range(second)) if backwards else range(second)
    done = [int(share(rank, second, "--skip-existing", album)[2].splitlines()[-1].split()[0]) for rank in ranks]
    assert sum(done) == 3
    assert_same_outcome(tmp_path / "out", tmp_path / "alone")


@pytest.mark.parametrize(("first", "second"), [(3, 2), (2, 1), (1, 3)])
def test_done_again_by_another_number_of_processes_leaves_no_doubles(share, album, tmp_path, first, second):
    for world in (first, second):
        for rank in range(world):
            share(rank, world, album)
    assert sorted(record["image"] for record in records(tmp_path / "out")) == sorted(str(Path(p)) for p in found(album))


def torchrun(processes, *words):
    """torch's own launcher; gives the finished process."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    environment = {**os.environ, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [str(word) for word in [*launcher, *words]]
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=300)


@posix
def test_the_union_of_three_processes_of_torchrun_is_a_single_run(main, tiny, album, tmp_path):
    for number in range(12):
        paint(album / f"{number:02}.jpg", number)
    options = ["--ckpt", tiny[0], "--device", "cpu", "--input-size", 64, "--batch-size", 2]
    process = torchrun(3, PROGRAM, *options, "--output", tmp_path / "out", album)
    assert process.returncode == 0, process.stderr
    main("--batch-size", 2, album, output=tmp_path / "alone")
    assert_same_outcome(tmp_path / "out", tmp_path / "alone")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.jsonl")) == [f"results.{n}.jsonl" for n in range(3)]
    assert len(process.stdout.splitlines()) == 18
    for rank in range(3):
        assert f"6 done, 0 skipped, 0 failed by process {rank} of 3 in " in process.stderr


UNEVEN = f"""
import os, sys, time
sys.path.insert(0, {str(PROGRAM.parent)!r})
import cnn_visualizations as program
explain = program.Explainer.__call__
def slowly(*args, **options):
    time.sleep(0.5)
    return explain(*args, **options)
program.Explainer.__call__ = slowly
sys.exit(program.main(program.parse_args()))
"""


@posix
def test_under_torchrun_a_process_with_broken_photos_does_not_end_the_others(tiny, tmp_path):
    for number in range(24):
        photo = paint(tmp_path / "album" / f"{number:02}.jpg", number)
        if number % 2 == 0:  # all that the first process gets; it is done long before the other
            break_off(photo)
    (tmp_path / "slow.py").write_text(UNEVEN, encoding="utf-8")
    words = ["--ckpt", tiny[0], "--device", "cpu", "--input-size", 64, "--batch-size", 1, "--outputs", "cam"]
    process = torchrun(2, tmp_path / "slow.py", *words, "--output", tmp_path / "out", tmp_path / "album")
    assert len(tree(tmp_path / "out")) == 12, process.stderr
    assert "0 done, 0 skipped, 12 failed by process 0 of 2" in process.stderr
    assert "12 done, 0 skipped, 0 failed by process 1 of 2" in process.stderr


# Scale


def test_ten_thousand_paths_are_planned_without_opening_them_and_in_little_memory(monkeypatch, tmp_path):
    photo = DOG.read_bytes()[:64]
    (tmp_path / "0.jpg").write_bytes(photo)
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: pytest.fail("decoded while planning"))
    lines = itertools.chain([f"{tmp_path / '0.jpg'}\n"], (f"{tmp_path}/{n // 100}/{n}.jpg\n" for n in range(1, 10_000)))
    monkeypatch.setattr(sys, "stdin", lines)
    tracemalloc.start()
    try:
        args = program_file.parse_args(["--output", str(tmp_path / "out"), "-"])
        todo, skipped = program_file.plan(args, Share(), Results(args.output, Share()))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (len(todo), skipped) == (10_000, 0)
    assert len({place for _, place in todo}) == 10_000
    assert peak < 30_000_000


GROWTH = """
import resource, sys
import cnn_visualizations as program
ckpt, photos, output = sys.argv[1:]
def peak_after(count):
    names = [f"{photos}/{number}.jpg" for number in range(count)]
    options = ["--ckpt", ckpt, "--device", "cpu", "--input-size", "64", "--outputs", "cam", "--output", output]
    assert program.main(program.parse_args([*options, *names])) == 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
first = peak_after(60)
print("GROWTH", peak_after(360) - first)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts in kilobytes there")
def test_three_hundred_photos_take_the_memory_of_sixty(tiny, tmp_path):
    content = paint(tmp_path / "album" / "0.jpg", 5, (640, 480)).read_bytes()  # 0.7 MB decoded
    for number in range(1, 360):
        (tmp_path / "album" / f"{number}.jpg").write_bytes(content)
    words = [sys.executable, "-c", GROWTH, tiny[0], tmp_path / "album", tmp_path / "out"]
    process = subprocess.run(
        [str(word) for word in words],
        cwd=PROGRAM.parent,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert process.returncode == 0, process.stderr
    assert int(process.stdout.rsplit(maxsplit=1)[1]) < 60_000  # kilobytes; 300 decoded photos are 200,000
