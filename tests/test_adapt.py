"From a folder of images to a model, predictions, an evaluation and a report, as a user goes: through the command `coft`."
import csv
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import coft.adapt as room
import numpy as np
import pandas as pd
import pytest
from browser import check_sights, chromium
from bs4 import BeautifulSoup
from coft.awkward import AWKWARD_FILES, AWKWARD_FOLDERS, CLASS_FILES, LOCKED_FILES, make_awkward
from coft.cli import app
from coft.clip import Compute
from coft.data import load_task, read_class_names, read_templates
from coft.filtering import SIGNS
from coft.images import FileImages, task_from_arrays, walk_images
from coft.report import write_report
from coft.saved import load_fitted
from helpers import QUICK, REAL, message_of
from PIL import Image
from pyarrow.parquet import ParquetFile
from typer.testing import CliRunner

COMMAND = Path(sys.executable).parent / "coft"
SETTINGS = ["--preset", QUICK["preset"], *(part for k, v in QUICK.items() if k != "preset" for part in ("--set", f"{k}={v}"))]
FEW = ["digit zero", "digit one", "digit two", "digit three"]


def command(*arguments):
    "The answer of the command in this process."
    return CliRunner().invoke(app, [str(a) for a in arguments])


def installed(*arguments, cwd=None, **how):
    "The answer of the installed command, in a process of its own."
    return subprocess.run([COMMAND, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, **how)


def is_no_administrator():
    "Take from this process, and from what it starts, the right to read what is locked (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH)."
    if os.geteuid() == 0:
        kernel = ctypes.CDLL(None, use_errno=True)
        for right in (1, 2):
            if kernel.prctl(24, right, 0, 0, 0): # PR_CAPBSET_DROP
                raise OSError(ctypes.get_errno(), "prctl")


@pytest.fixture(scope="module")
def digits():
    "60 real digits of four classes: images and labels."
    task = load_task("digits")
    few = np.flatnonzero(task.audit.train < len(FEW))[:60]
    return [Image.fromarray(task.unlabelled.pixels[i]) for i in few], task.audit.train[few]


@pytest.fixture(scope="module")
def home(tmp_path_factory, digits):
    "`photos` with the awkward files among real ones, `labelled` with class folders, `classes.txt`."
    home = tmp_path_factory.mktemp("user")
    images, labels = digits
    make_awkward(home / "photos", images)
    for i, (image, k) in enumerate(zip(images, labels)):
        image.save(home / "photos" / f"{i:03}.png")
        folder = home / "labelled" / FEW[k].replace(" ", "_").upper()
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i:03}.png")
    # byte-order mark, empty lines, spaces around, line ends of Windows, old Macs and Unix, no new line at the end
    (home / "classes.txt").write_bytes("\ufeff\r\n digit zero \r\n\r\n   \r\ndigit one\rdigit two\n\ndigit three".encode())
    return home


@pytest.fixture(scope="module")
def adapted(home):
    "`model`, `predictions.csv`, made by the installed command in processes of their own; what they printed."
    adapt = installed("adapt", "photos", "--classes", "classes.txt", "--out", "model", *SETTINGS, "--quiet", "--json", cwd=home)
    return SimpleNamespace(home=home, adapt=adapt, predict=installed("predict", "model", "photos", "--out", "predictions.csv", "--quiet", cwd=home))


def rows(path):
    "The rows of a table by their path; file names may hold bytes that are no UTF-8."
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as f:
        return {row["path"]: row for row in csv.DictReader(f)}


# ---- adapt and predict, with every awkward file in the folder

def test_adapt_ends_well_and_says_how_long_it_will_take(adapted):
    assert adapted.adapt.returncode == 0, adapted.adapt.stderr
    assert "GiB of memory, from a few timed steps" in adapted.adapt.stderr and "Traceback" not in adapted.adapt.stderr
    assert not (adapted.home / "model.unfinished").exists()


def test_adapt_tells_machines_what_it_tells_people(adapted):
    told = json.loads(adapted.adapt.stdout)
    assert told == json.loads((adapted.home / "model/adaptation.json").read_text())
    wanted = [c for c in AWKWARD_FILES if c.outcome == "set aside"]
    assert {name for name, _ in told["set_aside"]} == {c.name for c in wanted}
    assert told["images"] == 60 + sum(c.outcome == "read" for c in AWKWARD_FILES)
    assert [c["class"] for c in told["classes"]] == FEW and sum(c["images"] for c in told["classes"]) == told["images"]
    assert told["copies"] >= 2 and told["other_files"] == {".db": 1, ".txt": 1}
    assert "accuracy" not in adapted.adapt.stdout
    text = room.summary_text(told)
    assert "no measure of accuracy" in text and "2 files of other kinds" in text and "and 4 more, listed" in text
    shown = dict(re.split(r"\s{2,}", line.strip()) for line in text.split("counted after Phase I:\n")[1].split("\n\n")[0].splitlines())
    assert shown == {words: "-" if told["signs"][k] is None else f"{told['signs'][k]:.0f} %" for k, words in SIGNS.items() if k not in ("agreement", "rejected")}, "these two have a sentence of their own"


def test_signs_that_could_not_be_counted_have_no_number(adapted):
    told = json.loads(adapted.adapt.stdout)
    none = re.compile(r"of these, labels that look right to both models +-$", re.M)
    assert none.search(room.summary_text(told | dict(signs=told["signs"] | dict(filled=0.0, filled_believed=None))))
    assert "Further signs" not in room.summary_text(told | dict(signs={}))


@pytest.mark.parametrize("case", AWKWARD_FILES, ids=lambda case: case.what)
def test_awkward_file(adapted, case):
    row = rows(adapted.home / "predictions.csv").get(case.name)
    if case.outcome == "passed over":
        assert row is None
    elif case.outcome == "set aside":
        assert case.reason in row["problem"] and row["class"] == row["probability"] == ""
    else:
        assert row["class"] in FEW and 0.25 <= float(row["probability"]) <= 1 and row["problem"] == ""


def test_predict_says_that_files_were_set_aside(adapted):
    n = sum(c.outcome == "set aside" for c in AWKWARD_FILES)
    assert adapted.predict.returncode == 3, adapted.predict.stderr
    assert f"{n} files set aside" in adapted.predict.stdout and adapted.predict.stderr == ""


def test_the_table_holds_what_the_model_answers(adapted):
    table, model = rows(adapted.home / "predictions.csv"), load_fitted(adapted.home / "model")
    paths = [p for p, row in table.items() if not row["problem"]]
    P = model.fitted.predict_proba(FileImages([adapted.home / "photos" / p for p in paths]))
    order = np.argsort(-P, axis=1, kind="stable")
    for rank, suffix in enumerate(("", "_2", "_3", "_4")):
        assert [table[p][f"class{suffix}"] for p in paths] == [FEW[k] for k in order[:, rank]]
        assert np.allclose([float(table[p][f"probability{suffix}"]) for p in paths], np.take_along_axis(P, order, 1)[:, rank], atol=1e-5)
    assert list(table) == [path.relative_to(adapted.home / "photos").as_posix() for path, _ in walk_images(adapted.home / "photos")]
    seen = rows(adapted.home / "model/images.csv")
    assert {p: row["class"] for p, row in seen.items()} == {p: table[p]["class"] for p in paths}


def test_the_fallback_is_zero_shot(adapted):
    answer = command("predict", adapted.home / "model", adapted.home / "labelled", "-o", adapted.home / "fallback.csv", "--fallback", "-q", "--json")
    assert answer.exit_code == 0 and json.loads(answer.stdout)["files"] == 60
    before = pd.read_csv(adapted.home / "model/images.csv", encoding_errors="surrogateescape", dtype={"path": object}).set_index("path").zero_shot_class
    for path, row in rows(adapted.home / "fallback.csv").items():
        assert row["class"] == before[Path(path).name]


def test_a_finished_adaptation_is_not_replaced(adapted):
    answer = command("adapt", adapted.home / "photos", "-c", adapted.home / "classes.txt", "-o", adapted.home / "model")
    assert answer.exit_code == 2 and "holds a finished adaptation already" in answer.stderr and "--overwrite" in answer.stderr
    message = message_of(room.check_out, adapted.home / "photos", True, kind=FileExistsError)
    assert "something else" in message, "--overwrite never removes what is no adaptation"


# ---- lists of class names, folders, arguments

@pytest.mark.parametrize("kind", [kind for kind, (_, wanted) in CLASS_FILES.items() if isinstance(wanted, int)])
def test_class_file_that_can_be_read(tmp_path, kind):
    content, wanted = CLASS_FILES[kind]
    (tmp_path / "classes.txt").write_bytes(content)
    assert len(read_class_names(tmp_path / "classes.txt")) == wanted


@pytest.mark.parametrize("kind", [kind for kind, (_, wanted) in CLASS_FILES.items() if isinstance(wanted, str)])
def test_class_file_that_is_refused(home, tmp_path, kind):
    content, wanted = CLASS_FILES[kind]
    (tmp_path / "classes.txt").write_bytes(content)
    answer = installed("adapt", home / "photos", "-c", "classes.txt", "-o", "model", cwd=tmp_path)
    assert answer.returncode == 2 and answer.stderr.startswith("coft adapt: classes.txt") and wanted in answer.stderr, answer.stderr
    assert os.listdir(tmp_path) == ["classes.txt"]


@pytest.mark.parametrize("case", AWKWARD_FOLDERS, ids=lambda case: case.what)
def test_folder_that_cannot_be_adapted_to(tmp_path, digits, case):
    folder = case.make(tmp_path / "photos", digits[0])
    (tmp_path / "classes.txt").write_text("\n".join(case.names), encoding="utf-8")
    answer = installed("adapt", folder, "-c", "classes.txt", "-o", "model", "--set", "top_k=16", cwd=tmp_path)
    assert answer.returncode == 2 and all(part in answer.stderr for part in case.said), answer.stderr
    assert answer.stderr.startswith("coft adapt: ") and "Traceback" not in answer.stderr and not list(tmp_path.glob("model*"))


def test_one_image_10_000_classes_and_files_that_may_not_be_read(tmp_path, digits):
    "What is fewer than the classes is enough for zero-shot; one process for all of these."
    make_awkward(tmp_path / "photos", digits[0], LOCKED_FILES)
    digits[0][0].save(tmp_path / "photos/open.png")
    (tmp_path / "classes.txt").write_bytes(CLASS_FILES["10,000 classes"][0])
    answer = installed("adapt", "photos", "-c", "classes.txt", "-o", "model", "--method", "zero-shot", "--no-estimate", "-q", "--json", cwd=tmp_path, preexec_fn=is_no_administrator)
    (tmp_path / "photos/private").chmod(0o700)
    assert answer.returncode == 0, answer.stderr
    told = json.loads(answer.stdout)
    assert told["images"] == 1 and len(told["classes"]) == 10_000 and sum(c["images"] for c in told["classes"]) == 1
    aside = dict(told["set_aside"])
    assert aside.keys() == {case.name for case in LOCKED_FILES} and all(case.reason in aside[case.name] for case in LOCKED_FILES)


def test_photographs_a_model_of_open_clip_and_names_in_other_scripts(tmp_path, digits):
    "Caltech101's own files where they are present, else the digits; the weights are random, so only the way is tested."
    (tmp_path / "my photos").mkdir()
    if (REAL / "caltech101/train.parquet").is_file():
        rows = next(ParquetFile(REAL / "caltech101/train.parquet").iter_batches(12, columns=["image"])).to_pydict()
        for i, content in enumerate(rows["image"]):
            (tmp_path / f"my photos/{i}.jpg").write_bytes(content)
    else:
        for i, image in enumerate(digits[0][:12]):
            image.save(tmp_path / f"my photos/{i}.jpg")
    (tmp_path / "classes.txt").write_bytes(CLASS_FILES["other scripts"][0])
    answer = installed("adapt", "my photos", "-c", "classes.txt", "-o", "model", "--model", "ViT-B-32-quickgelu", "--pretrained", "random", "--method", "zero-shot", "--no-estimate", "-q", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    told = json.loads((tmp_path / "model/adaptation.json").read_text())
    assert told["images"] == 12 and told["class_names"] == ["猫", "собака", "ĉevalo"] and told["set_aside"] == []
    assert "coft predict model 'my photos' --out" in answer.stdout, "what comes next can be typed as it stands"


@pytest.mark.parametrize("given, parts", [
    (["--method", "cotf"], ["'cotf' is not known", "Did you mean 'coft'"]),
    (["--method", "supervised"], ["learns from labelled images", "coft+"]),
    (["--method", "transclip"], ["no model to keep"]),
    (["--set", "top_q=3"], ["setting of coft: 'top_q'", "top_k"]),
    (["--set", "top_k"], ["NAME=VALUE is needed"]),
    (["--set", "top_k=many"], ["top_k: 'many' was given"]),
    (["--model", "ViT-B-32-quickgelu"], ["pretrained: nothing was given"]),
    (["--preset", "best"], ["preset: 'best'"]),
    (["--templates", "classes.txt"], ["classes.txt: line 2 is 'digit zero'", "one {}"]),
], ids=lambda given: " ".join(given))
def test_wrong_argument(home, tmp_path, given, parts):
    answer = installed("adapt", "photos", "-c", "classes.txt", "-o", tmp_path / "model", *given, cwd=home)
    assert answer.returncode == 2 and all(part in answer.stderr for part in parts), answer.stderr
    assert not (tmp_path / "model").exists() and not (tmp_path / "model.unfinished").exists()


def test_several_templates_are_asked_for_where_a_method_starts_from_them(digits):
    model = SimpleNamespace(preset="paper")
    task = task_from_arrays(np.zeros((80, 8, 8), np.uint8), FEW)
    assert "Give a file of templates" in message_of(room.label_free_method, "coft+", model, task)
    assert room.label_free_method("coft+", model, task, template_set="coop").name == "coft+"


@pytest.mark.parametrize("text, wrong", [("a {}.\nthe {name}.", 2), ("a {} or {}.", 1), ("a {0}.", 1), ("{} {{}}", 1), ("a photo", 1)])
def test_templates_with_other_brackets(tmp_path, text, wrong):
    (tmp_path / "t.txt").write_text(text)
    assert f"t.txt: line {wrong} is" in message_of(read_templates, tmp_path / "t.txt")


def test_only_estimate_stops_after_the_estimate(home, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "foresee", lambda *args: dict(hours=2.5, memory_gb=0.75))
    (tmp_path / "model.unfinished").mkdir()
    answer = command("adapt", home / "labelled", "-c", home / "classes.txt", "-o", tmp_path / "model", "--set", "top_k=4", "--only-estimate")
    assert answer.exit_code == 0 and "60 images, 4 classes: about 2 h 30 min and 0.8 GiB" in answer.stdout
    assert os.listdir(tmp_path) == ["model.unfinished"] and not os.listdir(tmp_path / "model.unfinished")


def test_a_prediction_of_nothing_leaves_nothing(adapted, tmp_path):
    (tmp_path / "empty").mkdir()
    answer = command("predict", adapted.home / "model", tmp_path / "empty", "-o", tmp_path / "out.csv", "-q")
    assert answer.exit_code == 2 and "holds no image file" in answer.stderr and os.listdir(tmp_path) == ["empty"]


def test_a_link_out_of_the_folder_is_not_followed(tmp_path, digits):
    for name in ("outside/b.png", "photos/a.png"):
        (tmp_path / name).parent.mkdir()
        digits[0][0].save(tmp_path / name)
    (tmp_path / "photos/more").symlink_to(tmp_path / "outside", target_is_directory=True)
    (tmp_path / "entry").symlink_to(tmp_path / "photos", target_is_directory=True)
    assert [(path.name, bool(problem)) for path, problem in walk_images(tmp_path / "entry")] == [("a.png", False), ("more", True)]


# ---- stopped and gone on

def test_ctrl_c_leaves_a_state_from_which_the_same_command_goes_on(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    arguments = ["adapt", "photos", "-c", "classes.txt", "-o", str(tmp_path / "model"), *SETTINGS, "--set", "phase1_epochs=20", "--set", "phase1_batch_size=32", "--no-estimate", "--quiet"]
    heard = lambda: signal.signal(signal.SIGINT, signal.default_int_handler) # jobs in the background of a shell ignore it
    running = subprocess.Popen([COMMAND, *arguments], cwd=home, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    state = tmp_path / "model.unfinished/phases/phase-i-model-1.pt"
    deadline = time.monotonic() + 300
    while not state.exists() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, error = running.communicate(timeout=120)
    assert running.returncode == 130 and "The same command goes on" in error and "Traceback" not in error, error
    assert state.exists() and not (tmp_path / "model").exists()
    answer = command(*arguments)
    assert answer.exit_code == 0 and "Going on with what stands in" in answer.stdout, answer.stderr
    assert (tmp_path / "model/adaptation.json").exists() and not (tmp_path / "model.unfinished").exists()


def test_a_stopped_prediction_goes_on_behind_the_last_whole_chunk(adapted, tmp_path, monkeypatch):
    saved, photos = load_fitted(adapted.home / "model"), adapted.home / "photos"
    monkeypatch.setattr(room.image_chunks, "__defaults__", (10, 0))
    asked, note = [], room._Journal.note

    def stop(self, seen):
        note(self, seen)
        if self.files >= 30:
            self.text.write("half a row")
            raise KeyboardInterrupt

    predict = lambda images: asked.append(len(images)) or saved.fitted.predict_proba(images)
    counting = SimpleNamespace(about=saved.about, clip=saved.clip, fallback=None, fitted=SimpleNamespace(method="coft", class_names=FEW, predict_proba=predict))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(room._Journal, "note", stop)
        room.predict_folder(counting, photos, tmp_path / "out.csv", progress=False)
    assert not (tmp_path / "out.csv").exists()
    done = room.predict_folder(counting, photos, tmp_path / "out.csv", progress=False)
    assert (tmp_path / "out.csv").read_bytes() == (adapted.home / "predictions.csv").read_bytes()
    assert done.set_aside == sum(c.outcome == "set aside" for c in AWKWARD_FILES) and max(asked) <= 10
    assert sum(asked) == done.files - done.set_aside, "no image is predicted twice"
    assert os.listdir(tmp_path) == ["out.csv"]


# ---- evaluate

def test_evaluation_beside_numpy(adapted, digits):
    answer = command("evaluate", adapted.home / "model", adapted.home / "labelled", "-q", "--json")
    assert answer.exit_code == 0, answer.stderr
    told, (images, truth) = json.loads(answer.stdout), digits
    saved, pixels = load_fitted(adapted.home / "model"), FileImages(images)
    for who, fitted in (("adapted", saved.fitted), ("zero_shot", saved.fallback)):
        P, mine = fitted.predict_proba(pixels), told[who]
        said = P.argmax(1)
        assert mine["accuracy"] == pytest.approx(100 * np.mean(said == truth))
        counts = np.zeros((4, 4), int)
        np.add.at(counts, (truth, said), 1)
        assert mine["confusion"] == counts.tolist()
        for k in range(4):
            assert mine["recall"][k] == pytest.approx(counts[k, k] / counts[k].sum())
            assert mine["precision"][k] == (pytest.approx(counts[k, k] / counts[:, k].sum()) if counts[:, k].sum() else None)
        assert sum(mine["reliability"]["count"]) == 60
    right = [told[who]["accuracy"] for who in ("adapted", "zero_shot")]
    assert told["difference"]["mean"] == pytest.approx(right[0] - right[1]) and told["difference"]["low"] <= told["difference"]["mean"] <= told["difference"]["high"]
    assert told["adapted"]["accuracy_of_models"] == pytest.approx([100 * np.mean(p.argmax(1) == truth) for p in saved.fitted.predict_all(pixels)])


def test_evaluation_for_people_and_files_beside_the_folders(adapted, digits, tmp_path):
    shutil.copytree(adapted.home / "labelled", tmp_path / "labelled")
    digits[0][0].save(tmp_path / "labelled/stray.png")
    answer = command("evaluate", adapted.home / "model", tmp_path / "labelled", "-q")
    assert answer.exit_code == 3 and "stray.png: lies in no class sub-folder" in answer.stdout and "zero-shot" in answer.stdout
    (tmp_path / "labelled/otter").mkdir()
    answer = command("evaluate", adapted.home / "model", tmp_path / "labelled", "-q")
    assert answer.exit_code == 2 and "'otter'" in answer.stderr and "digit zero" in answer.stderr
    assert command("evaluate", adapted.home / "model", adapted.home / "photos/2024", "-q").exit_code == 2


@pytest.mark.parametrize("name", ["predict", "evaluate", "report"])
def test_a_folder_that_holds_no_model(home, name):
    answer = command(name, home / "labelled", *([home / "photos"] if name != "report" else []))
    assert answer.exit_code == 2 and answer.stderr.startswith(f"coft {name}: ") and "labelled" in answer.stderr


# ---- signs

def made_up(now, before):
    "An image table with these classes."
    names = lambda counts: [c for c, k in counts.items() for _ in range(k)]
    return pd.DataFrame({"class": names(now), "zero_shot_class": names(before), "label_1": names(now), "label_2": names(now), "accepted_1": True, "accepted_2": True})


EVEN = {"a": 25, "b": 25, "c": 25, "d": 25}


@pytest.mark.parametrize("images, peers, sign", [
    (made_up(EVEN, EVEN), {}, None),
    (made_up(EVEN, EVEN), dict(agreement=60.0, rejected=70.0), None),
    (made_up({"a": 50, "c": 25, "d": 25}, EVEN), {}, "Class 'b' was lost: zero-shot gave it to 25 images"),
    (made_up({"a": 55, "b": 15, "c": 15, "d": 15}, EVEN), {}, "55 of 100 images are now called 'a'; zero-shot called 25 so"),
    (made_up({"a": 55, "b": 15, "c": 15, "d": 15}, {"a": 40, "b": 20, "c": 20, "d": 20}), {}, None),
    (made_up(EVEN, {"d": 25, "c": 25, "b": 25, "a": 25}), {}, "100 % of the images are called something else"),
    (made_up(EVEN, EVEN), dict(agreement=40.0, rejected=0.0), "agree on only 40 % of the images"),
    (made_up(EVEN, EVEN), dict(agreement=90.0, rejected=90.0), "accepted only 10 % of each other's labels"),
], ids=str)
def test_warning_signs(images, peers, sign):
    signs = room.signs_against_zero_shot(images, room.class_table(images, list(EVEN)), peers)
    assert signs == [] if sign is None else any(sign in s for s in signs)


def test_classes_that_look_underserved():
    images = made_up({"a": 60, "b": 32, "c": 4, "d": 4}, EVEN)
    images["accepted_1"] = images["accepted_2"] = images.label_1 != "b"
    table = room.class_table(images, list(EVEN)).set_index("class")
    assert table.underserved.to_dict() == {"a": False, "b": True, "c": True, "d": True}
    assert table.accepted.to_dict() == {"a": 1, "b": 0, "c": 1, "d": 1}


# ---- report

def test_report_is_one_file_that_asks_for_nothing(adapted):
    answer = command("report", adapted.home / "model", "--json")
    assert answer.exit_code == 0 and json.loads(answer.stdout) == {"report": str(adapted.home / "model/report.html")}, answer.stderr
    page = BeautifulSoup((adapted.home / "model/report.html").read_text(encoding="utf-8"), "html.parser")
    assert not page.find_all(["script", "link", "iframe", "object"]) and not page.find_all(onerror=True)
    assert "default-src 'none'" in page.find("meta", attrs={"http-equiv": True})["content"]
    pictures = page.find_all("img")
    assert len(pictures) >= 20 and all(i["src"].startswith("data:image/") and i["alt"] for i in pictures)
    text = page.get_text()
    for case in AWKWARD_FILES:
        assert case.outcome != "set aside" or case.reason in text
    assert all(name in text for name in FEW) and "phase1_lr" in text and "sha256" in text and "no accuracy" in text


@pytest.mark.skipif(not chromium(), reason="Chromium is not installed")
def test_report_on_a_phone_and_on_a_desk(adapted):
    write_report(adapted.home / "model")
    assert not check_sights(adapted.home / "model", ["report.html"], {"report.html": "report"})


def test_report_finds_images_that_have_moved(adapted, tmp_path):
    message = message_of(lambda: write_report(moved(adapted, tmp_path), None), kind=FileNotFoundError)
    assert "not there any more" in message
    assert write_report(tmp_path / "model", adapted.home / "photos").exists()


def moved(adapted, tmp_path):
    "A copy of the model whose images are said to lie elsewhere."
    shutil.copytree(adapted.home / "model", tmp_path / "model")
    told = json.loads((tmp_path / "model/adaptation.json").read_text())
    (tmp_path / "model/adaptation.json").write_text(json.dumps(told | {"folder": str(tmp_path / "gone")}))
    return tmp_path / "model"


# ---- how the model is computed

def three_images(folder, digits):
    "The arguments of an adaptation to three images."
    folder.mkdir()
    for i in range(3):
        digits[0][i].save(folder / f"{i}.png")
    (folder.parent / "classes.txt").write_text("digit one\ndigit two")
    return "adapt", folder, "-c", folder.parent / "classes.txt", "-o", folder.parent / "model"


@pytest.mark.parametrize("given, parts", [("checkpoints=true", ["setting of compute: 'checkpoints'", "image_checkpoints"]), ("precision=fp16", ["precision: 'fp16'", "auto, fp32, bf16"]),
                                          ("text_memory=0", ["text_memory: 0"]), ("bf16", ["--compute: 'bf16'", "--compute precision=bf16"])])
def test_a_way_to_compute_that_cannot_be(tmp_path, digits, given, parts):
    answer = command(*three_images(tmp_path / "images", digits), "--compute", given)
    assert answer.exit_code == 2 and all(part in answer.stderr for part in parts), answer.stderr
    assert not (tmp_path / "model").exists()


def test_the_model_is_computed_as_the_command_says(tmp_path, digits, monkeypatch):
    asked = []
    monkeypatch.setattr("coft.adapt.foresee", lambda method, clip, task: asked.append(clip.compute) or dict(hours=0.1, memory_gb=1.0))
    answer = command(*three_images(tmp_path / "images", digits), "--compute", "image_checkpoints=true", "--compute", "text_memory=0.5", "--set", "top_k=1", "--only-estimate")
    assert answer.exit_code == 0 and asked == [Compute(image_checkpoints=True, text_memory=0.5)], answer.output
