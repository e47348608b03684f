"Every registered data set as a miniature in its true folders and files, loaded by the public call; some in full, where the data is at hand."
import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from coft import load_task, register_task
from coft.data import TASKS, ArrayImages, Augmentation, batches
from coft.datasets import (CIFAR_CROP, DATASETS, INFO, SECOND_NAMES, Listing, check_templates, llm_request, llm_templates, read_imagenet_names,
                           held_out_classes, read_descriptions, read_noisy_labels, read_split)
from coft.images import task_from_table
from coft.results import published_table
from helpers import message_of, real
from PIL import Image

SPLIT_SETS = [name for name, info in DATASETS.items() if info.reader == "split" and not info.size]
CIFAR_SETS = [name for name, info in DATASETS.items() if info.reader == "cifar"]
TEST_ONLY = [name for name, info in DATASETS.items() if info.reader == "imagenet_test"]
WNIDS = {"n01440764": "tench", "n03773504": "missile", "n04008634": "missile", "n04355933": "sunglasses", "n04356056": "sunglasses"}


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    "No data root of the user's, and nothing remembered outside the test."
    monkeypatch.delenv("DATA_ROOT", raising=False)
    monkeypatch.setenv("COFT_CACHE", str(tmp_path / "cache"))


# ---- miniatures

def picture(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), (value, value, value)).save(path, format="PNG" if path.suffix == ".png" else "JPEG")


def split_paths(name, split, k):
    "What a path in the split file of this data set looks like."
    return {"stanford_cars": f"cars_{'test' if split == 'test' else 'train'}/{split}_{k:05}.jpg", "oxford_flowers": f"image_{split}{k:05}.jpg", "oxford_pets": f"Cat_{split}_{k}.jpg",
            "sun397": f"a/abbey_{k}/sun_{split}.jpg", "ucf101": f"Apply_Eye_Makeup/v_{split}_{k}.jpg"}.get(name, f"class_{k}/{split}_{k}.jpg")


def split_miniature(name, root):
    info = DATASETS[name]
    splits = {s: [[split_paths(name, s, k), k, f"Class_of {k}"] for k in (2, 0, 1)] for s in ("train", "val", "test")}
    for rows in splits.values():
        for path, k, _ in rows:
            picture(root / info.folder / info.images / path, 40 * k)
    (root / info.folder / info.split).write_text(json.dumps(splits))
    return ["Class of 0", "Class of 1", "Class of 2"], [2, 0, 1], [2, 0, 1]


def aircraft_miniature(name, root):
    folder = root / "fgvc_aircraft"
    names = ["707-320", "An-12", "Boeing 717"]
    for s, number in (("train", 100), ("val", 200), ("test", 300)):
        for k in range(3):
            picture(folder / "images" / f"{number + k:07}.jpg", 40 * k)
        (folder / f"images_variant_{s}.txt").write_text("".join(f"{number + k:07} {names[k]}\n" for k in (1, 2, 0)))
    (folder / "variants.txt").write_text("\n".join(names) + "\n")
    return names, [1, 2, 0], [1, 2, 0]


def classnames(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classnames.txt").write_text("".join(f"{w} {n}\n" for w, n in WNIDS.items()))
    return ["tench", "missile", "projectile", "sunglasses", "dark glasses"]


def imagenet_miniature(name, root):
    folder = root / "imagenet"
    names = classnames(folder)
    for k, wnid in enumerate(WNIDS):
        picture(folder / "images/train" / wnid / f"{wnid}_10026.JPEG", 40 * k)
        picture(folder / "images/train" / wnid / f"{wnid}_999.JPEG", 40 * k)
        picture(folder / "images/val" / wnid / f"ILSVRC2012_val_{k:08}.JPEG", 40 * k)
    return names, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4], [0, 1, 2, 3, 4]


def imagenet_test_miniature(name, root):
    info = DATASETS[name]
    folder = root / info.folder
    names = classnames(folder)
    present = range(5) if info.classes == 1000 else (0, 2, 4)
    for k in present:
        picture(folder / info.images / (str(k) if name == "imagenetv2" else list(WNIDS)[k]) / "some_image.JPEG", 40 * k)
    (folder / info.images / "README.txt").write_text("not a class")
    return [names[k] for k in present], [], list(range(len(present)))


def cifar_miniature(name, root):
    "Six training and two test images in torchvision's layout."
    info, theirs = DATASETS[name], getattr(torchvision.datasets, DATASETS[name].torchvision)
    folder, hundred = root / info.folder, name != "cifar10"
    folder.mkdir(parents=True)
    key, names = ("fine_labels", [f"fine_{k}" for k in range(100)]) if hundred else ("labels", [f"kind_{k}" for k in range(10)])
    (folder / theirs.meta["filename"]).write_bytes(pickle.dumps({theirs.meta["key"]: names}))
    train, test = [[f for f, _ in files] for files in (theirs.train_list, theirs.test_list)]
    rng, labels = np.random.default_rng(0), {}
    for files, n in ((train, 10 // len(train)), (test, 2)):
        for file in files:
            labels[file] = rng.integers(len(names), size=n).tolist()
            (folder / file).write_bytes(pickle.dumps({"data": rng.integers(256, size=(n, 3072), dtype=np.uint8), key: labels[file]}))
    clean = sum((labels[f] for f in train), [])
    if name == "cifar100n":
        torch.save({"clean_label": np.array(clean), "noisy_label": (np.array(clean) + 1) % 100}, folder / info.split)
    return [n.replace("_", " ") for n in names], clean, labels[test[0]]


def held_out_miniature(name, root):
    "Five classes as tables; the two that pre-training does not see are the task."
    folder, held_out = root / DATASETS[name].folder, held_out_classes(5)
    folder.mkdir(parents=True)
    (folder / "classes.json").write_text(json.dumps([{"name": f"Class_of {k}"} for k in range(5)]))
    for split in ("train", "val"):
        for k in range(5):
            picture(folder / "made" / f"{k}.jpg", 40 * held_out.tolist().index(k) if k in held_out else 250)
        order = [3, 4, 0, 1, 2, 4]
        pd.DataFrame({"image": [(folder / f"made/{k}.jpg").read_bytes() for k in order], "label": order}).to_parquet(folder / f"{split}.parquet")
    labels = [held_out.tolist().index(k) for k in order if k in held_out]
    return [f"Class of {k}" for k in held_out], labels, labels


MAKERS = {"held_out": held_out_miniature, "split": split_miniature, "aircraft": aircraft_miniature, "imagenet": imagenet_miniature, "imagenet_test": imagenet_test_miniature, "cifar": cifar_miniature}


def miniature(name, root):
    "Write a miniature below `root`; its class names, training labels and test labels."
    return MAKERS[DATASETS[name].reader](name, root)


@pytest.mark.parametrize("name", DATASETS)
def test_a_miniature_is_loaded_by_the_public_call(name, tmp_path):
    names, train, test = miniature(name, tmp_path)
    task = load_task(name, data_root=tmp_path, check_counts=False)
    assert (task.name, task.class_names, task.template, task.quarantine) == (name, names, DATASETS[name].template, ())
    assert (len(task.unlabelled), len(task.test)) == (len(train), len(test)) and task.audit.test.tolist() == test
    assert (task.audit.train is None) if name in TEST_ONLY else task.audit.train.tolist() == train
    assert task.unlabelled.batch(range(len(train)), 32).shape == (len(train), 3, 32, 32)
    assert task.template in task.templates and len(task.templates) == (18 if DATASETS[name].size else 8) and all(t.count("{}") == 1 for t in task.templates)
    assert task.augmentation == (CIFAR_CROP if name in CIFAR_SETS or DATASETS[name].size else Augmentation())
    if name not in CIFAR_SETS:
        shown = (task.test.batch(range(len(test)), 16)[:, 0, 8, 8] / 40).round().int().tolist()
        assert shown == (test if len(names) != 3 or name not in TEST_ONLY else [0, 2, 4]), "an image does not belong to its label"


@pytest.mark.parametrize("name", DATASETS)
def test_counts_are_asserted(name, tmp_path):
    miniature(name, tmp_path)
    message = message_of(load_task, name, data_root=tmp_path)
    assert "are expected" in message and "check_counts=False" in message


@pytest.mark.parametrize("name", DATASETS)
def test_missing_files_are_named_with_a_remedy(name, tmp_path):
    info = DATASETS[name]
    message = message_of(load_task, name, data_root=tmp_path, kind=FileNotFoundError)
    assert str(tmp_path / info.folder) in message and info.download in message and len(message.split("\n")) <= 3
    miniature(name, tmp_path)
    file = tmp_path / info.folder / (info.split or {"aircraft": "variants.txt", "cifar": "test_batch" if name == "cifar10" else "test"}[info.reader])
    file.unlink()
    message = message_of(load_task, name, data_root=tmp_path, check_counts=False, kind=FileNotFoundError)
    assert f"{file} is missing" in message


@pytest.mark.parametrize("name", ["dtd", "fgvc_aircraft"])
def test_missing_images_are_an_error_and_broken_ones_are_set_aside(name, tmp_path):
    miniature(name, tmp_path)
    image = sorted((tmp_path / DATASETS[name].folder / "images").rglob("*.jpg"))[0]
    image.write_bytes(image.read_bytes()[:200])
    task = load_task(name, data_root=tmp_path, check_counts=False)
    assert [n for n, _ in task.quarantine] == [image.relative_to(tmp_path / DATASETS[name].folder / "images").as_posix()]
    for path in (tmp_path / DATASETS[name].folder / "images").rglob("*.jpg"):
        path.unlink()
    message = message_of(load_task, name, data_root=tmp_path, check_counts=False, kind=FileNotFoundError)
    assert "6 of 6 images are missing" in message


def test_a_broken_image_takes_its_label_with_it(tmp_path):
    miniature("dtd", tmp_path)
    (tmp_path / "dtd/images/class_0/train_0.jpg").write_bytes(b"")
    task = load_task("dtd", data_root=tmp_path, check_counts=False)
    assert task.quarantine == (("class_0/train_0.jpg", "the file is empty"),)
    assert task.audit.train.tolist() == [2, 1] and (task.unlabelled.batch([0, 1], 8)[:, 0, 4, 4] / 40).round().tolist() == [2, 1]


def test_permuted_labels_in_the_split_file_do_not_reach_the_images(tmp_path):
    miniature("dtd", tmp_path)
    file = tmp_path / "dtd" / DATASETS["dtd"].split
    before = load_task("dtd", data_root=tmp_path, check_counts=False)
    splits = json.loads(file.read_text())
    splits["train"] = [[p, (k + 1) % 3, f"Class_of {(k + 1) % 3}"] for p, k, _ in splits["train"]]
    file.write_text(json.dumps(splits))
    after = load_task("dtd", data_root=tmp_path, check_counts=False)
    assert after.audit.train.tolist() != before.audit.train.tolist()
    assert after.unlabelled.digest() == before.unlabelled.digest() and after.blind().data_sha256 == before.blind().data_sha256 != after.data_sha256
    assert torch.equal(after.unlabelled.batch(range(3), 16), before.unlabelled.batch(range(3), 16))


def test_the_digest_follows_the_files(tmp_path):
    miniature("dtd", tmp_path)
    before = load_task("dtd", data_root=tmp_path, check_counts=False)
    picture(tmp_path / "dtd/images/class_0/train_0.jpg", 250)
    after = load_task("dtd", data_root=tmp_path, check_counts=False)
    assert after.unlabelled.digest() != before.unlabelled.digest() and after.test.digest() == before.test.digest()


@pytest.mark.parametrize("name", [n for n, info in DATASETS.items() if info.torchvision_images])
def test_images_that_torchvision_unpacked_serve_too(name, tmp_path):
    info = DATASETS[name]
    names, train, _ = miniature(name, tmp_path)
    ours, theirs = tmp_path / info.folder / info.images, tmp_path / info.torchvision_images
    if ours != theirs:
        theirs.parent.mkdir(parents=True, exist_ok=True)
        if info.reader == "aircraft":
            theirs.parent.rmdir()
            ours.parent.rename(theirs.parent)
        else:
            ours.rename(theirs)
    task = load_task(name, data_root=tmp_path, check_counts=False)
    assert task.class_names == names and task.audit.train.tolist() == train


def test_download_is_left_to_torchvision(tmp_path, monkeypatch):
    calls = []

    class Theirs:
        def __init__(self, root, download): calls.append((root, download)); miniature("eurosat", tmp_path)
    monkeypatch.setattr(torchvision.datasets, "EuroSAT", Theirs)
    for _ in range(2):
        assert len(load_task("eurosat", data_root=tmp_path, check_counts=False, download=True).test) == 3
    assert calls == [(str(tmp_path), True)]
    assert "torchvision cannot download UCF101" in message_of(load_task, "ucf101", data_root=tmp_path, download=True)


def test_every_named_torchvision_class_exists():
    assert all(hasattr(torchvision.datasets, info.torchvision) for info in DATASETS.values() if info.torchvision)


def test_the_data_root_may_come_from_the_environment(tmp_path, monkeypatch):
    assert "pass data_root" in message_of(load_task, "dtd") and "holds dtd/" in message_of(load_task, "dtd")
    miniature("dtd", tmp_path)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    assert len(load_task("dtd", check_counts=False).test) == 3


def test_embedded_tasks_ignore_the_data_root(tmp_path):
    assert len(load_task("digits", data_root=tmp_path / "nowhere").test) == 540
    assert "has no option check_counts" in message_of(load_task, "digits", check_counts=False)
    assert "it has check_counts, download" in message_of(load_task, "dtd", size=3)


def test_tasks_can_be_registered_once(monkeypatch):
    monkeypatch.setitem(TASKS, "mine", None)
    monkeypatch.delitem(TASKS, "mine")
    register_task("mine", lambda: load_task("digits"))
    assert load_task("mine").name == "digits"
    assert "registered already" in message_of(register_task, "mine", lambda: None)
    assert "Did you mean" in message_of(load_task, "imagenet-a")


def test_a_split_file_with_a_gap_in_its_labels_is_refused(tmp_path):
    miniature("dtd", tmp_path)
    file = tmp_path / "dtd" / DATASETS["dtd"].split
    file.write_text(file.read_text().replace(", 2, ", ", 7, "))
    assert "labels are not the numbers from 0 to 2" in message_of(load_task, "dtd", data_root=tmp_path, check_counts=False)


def test_the_crop_of_small_images_is_padded_enlarged_and_the_same_in_every_batch():
    images = ArrayImages(np.full((40, 32, 32, 3), 200, np.uint8))
    one, five = ({int(i): view for place, views in batches(images, range(40), b, 56, (0, "p", 0), CIFAR_CROP) for i, view in zip(place, views)} for b in (1, 5))
    assert all(torch.allclose(one[i], five[i], atol=1e-6) for i in range(40))
    views = torch.stack([one[i] for i in range(40)])
    assert views.shape == (40, 3, 56, 56) and 0 <= views.min() and views.max() <= 1
    black = (views[:, 0] < 0.05)
    assert black[:, 28, 28].sum() == 0 and black.flatten(1).any(1).sum() >= 30 and black.float().mean() < 0.3


def test_an_empty_split_says_so(tmp_path):
    miniature("imagenet_a", tmp_path)
    task = load_task("imagenet_a", data_root=tmp_path, check_counts=False)
    assert "no training images" in message_of(list, batches(task.unlabelled, range(0), 8, 16))
    assert "nobody has labelled" in message_of(task.labelled, kind=PermissionError)


# ---- the crowd's labels

def test_noisy_labels_have_a_door_of_their_own(tmp_path):
    _, clean, _ = miniature("cifar100n", tmp_path)
    task = load_task("cifar100n", data_root=tmp_path, check_counts=False)
    index, noisy = task.labelled(noisy=True)
    assert noisy.tolist() == [(k + 1) % 100 for k in clean] and task.labelled()[1].tolist() == clean and len(index) == 10
    assert "noisy" in message_of(task.blind().labelled, noisy=True, kind=PermissionError)
    plain = load_task("cifar100", data_root=tmp_path, check_counts=False)
    assert plain.unlabelled.digest() == task.unlabelled.digest()
    assert "cifar100n" in message_of(plain.labelled, noisy=True, kind=PermissionError)


def test_noisy_labels_in_another_order_are_refused(tmp_path):
    _, clean, _ = miniature("cifar100n", tmp_path)
    file = tmp_path / "cifar-100-python/CIFAR-100_human.pt"
    assert "clean labels are not those" in message_of(read_noisy_labels, file, np.array(clean[::-1]))


def test_a_web_page_saved_as_a_file_is_named(tmp_path):
    page = tmp_path / "page.json"
    page.write_text("<!DOCTYPE html>")
    (tmp_path / "labels.pt").write_text("<!DOCTYPE html>")
    assert "labels.pt: this is not CIFAR-N's file" in message_of(read_noisy_labels, tmp_path / "labels.pt", np.zeros(3))
    for read in (lambda: llm_templates("digits", page), lambda: read_descriptions(page, ["cat", "dog"])):
        assert "page.json: this is no JSON" in message_of(read)
    page.write_text("[]")
    assert "an object is needed, list was found" in message_of(read_descriptions, page, ["cat", "dog"])


@pytest.mark.parametrize("content, expected", [("<html>", "this is no JSON"), ("[]", "an object is needed"), ('{"train": []}', "not CoOp's format"), ('{"train": [["a.jpg", 0]], "test": []}', "not CoOp's format")])
def test_a_split_file_of_another_kind_is_named(tmp_path, content, expected):
    info = DATASETS["caltech101"]
    (tmp_path / info.folder / info.images).mkdir(parents=True)
    (tmp_path / info.folder / info.split).write_text(content)
    message = message_of(load_task, "caltech101", data_root=tmp_path)
    assert info.split in message and expected in message


def test_the_label_file_cannot_run_code(tmp_path):
    class Harm:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "harm"),)
    torch.save({"clean_label": Harm(), "noisy_label": np.zeros(3)}, tmp_path / "labels.pt")
    assert "this is not CIFAR-N's file" in message_of(read_noisy_labels, tmp_path / "labels.pt", np.zeros(3))
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_label_files_of_old_numpy_are_read(tmp_path, legacy):
    class Old(pickle._Pickler):
        "Writes names as NumPy 1 did."
        def save_global(self, obj, name=None):
            if getattr(obj, "__module__", "") == "numpy._core.multiarray":
                self.write(b"cnumpy.core.multiarray\n" + obj.__name__.encode() + b"\n")
                self.memoize(obj)
            else:
                super().save_global(obj, name)
        dispatch = dict(pickle._Pickler.dispatch)
    Old.dispatch[type(lambda: 0)] = Old.save_global
    Old.dispatch[type(np.zeros(1).__reduce__()[0])] = Old.save_global
    module = type("module", (), {"Pickler": Old, "dump": staticmethod(lambda obj, file, protocol: Old(file, protocol).dump(obj)), "__name__": "pickle"})
    labels = np.arange(5)
    torch.save({"clean_label": labels, "noisy_label": labels[::-1].copy()}, tmp_path / "labels.pt", pickle_module=module, _use_new_zipfile_serialization=not legacy)
    assert b"numpy.core.multiarray" in (tmp_path / "labels.pt").read_bytes()
    assert read_noisy_labels(tmp_path / "labels.pt", labels).tolist() == [4, 3, 2, 1, 0]


# ---- facts, class names, templates

def test_facts_are_those_of_the_papers_table():
    rows = set(published_table("coft-1").index) - {"Average"}
    assert rows <= {info.title for info in DATASETS.values()} and len(rows) == 9
    assert all(info.reader in MAKERS and info.test > 0 and info.template.count("{}") == 1 for info in DATASETS.values())


def test_imagenet_names_are_told_apart(tmp_path):
    (tmp_path / "classnames.txt").write_text("".join(f"{w} {n}\n" for w, n in WNIDS.items()))
    names = read_imagenet_names(tmp_path / "classnames.txt")
    assert len(set(names.values())) == 5 and names["n03773504"] == "missile" and set(SECOND_NAMES) <= set(names)


def test_templates_written_by_a_language_model_ship_for_the_nine():
    nine = [name for name, info in DATASETS.items() if info.title in published_table("coft-1").index]
    assert all(len(llm_templates(n)) == 8 and llm_templates(n)[0] == DATASETS[n].template.replace("{} texture.", "a {} texture.") for n in [*nine, "cifar100", "cifar100n"])
    assert llm_templates("imagenet") == () and (INFO / "llm_templates.json").exists()


@pytest.mark.parametrize("templates", ["a photo of a {}.", [], ["a photo."], ["{} and {}"], ["a {class}."], ["a {} {0}."], [None]])
def test_templates_need_one_slot(templates):
    assert "templates:" in message_of(check_templates, templates)


def test_own_templates_and_the_request_for_them(tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps(["a {} in a forest.", "the cap of a {}."]))
    (tmp_path / "many.json").write_text(json.dumps({"mushrooms": ["a {} in a forest."]}))
    assert llm_templates("mushrooms", tmp_path / "mine.json") == ("a {} in a forest.", "the cap of a {}.")
    assert llm_templates("mushrooms", tmp_path / "many.json") == ("a {} in a forest.",) and llm_templates("x", tmp_path / "many.json") == ()
    text = llm_request("mushrooms", "photos", [f"kind {i}" for i in range(40)], n=5)
    assert "Write 5" in text and "kind 29, and 10 more" in text and "kind 30" not in text


def test_descriptions_of_classes(tmp_path):
    (tmp_path / "d.json").write_text(json.dumps({"Polka-dotted": ["It has dots.", "Dots."], "banded": "Bands."}))
    found = read_descriptions(tmp_path / "d.json", ["banded", "polka dotted"])
    assert list(found.items()) == [("banded", ("Bands.",)), ("polka dotted", ("It has dots.", "Dots."))]
    assert "no sentence for 'striped'" in message_of(read_descriptions, tmp_path / "d.json", ["banded", "striped"])


# ---- real data

def coop_splits():
    archive = zipfile.ZipFile(real("text", "coop_split_zhou.zip"))
    return {Path(n).name: json.loads(archive.read(n)) for n in archive.namelist() if "split_zhou" in n}


def test_real_split_files_have_the_counts_of_the_registry(tmp_path):
    splits = coop_splits()
    checked = [name for name in SPLIT_SETS if DATASETS[name].split in splits]
    for name in checked:
        info = DATASETS[name]
        (tmp_path / info.folder / info.images).mkdir(parents=True)
        (tmp_path / info.folder / info.split).write_text(json.dumps(splits[info.split]))
        found = read_split(info, tmp_path)
        assert isinstance(found, Listing) and (len(found.class_names), len(found.train), len(found.test)) == (info.classes, info.train, info.test)
    assert len(checked) == 7


def test_caltech101_is_loaded_whole_through_its_split_file(tmp_path):
    splits, folder = coop_splits(), tmp_path / "caltech-101"
    for split in ("train", "test"):
        for row in pd.read_parquet(real("caltech101", f"{split}.parquet")).itertuples():
            path = folder / "101_ObjectCategories" / row.path.split("101_ObjectCategories/")[-1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(row.image)
    (folder / "split_zhou_Caltech101.json").write_text(json.dumps(splits["split_zhou_Caltech101.json"]))
    task = load_task("caltech101", data_root=tmp_path)
    assert (len(task.unlabelled), len(task.test), len(task.class_names), task.quarantine) == (4128, 2465, 100, ())
    assert task.class_names == [n.replace("_", " ") for n in json.loads(real("caltech101", "classes.json").read_text())]
    labels = pd.read_parquet(real("caltech101", "test.parquet"), columns=["label"]).label
    assert np.array_equal(np.bincount(task.audit.test), np.bincount(labels))
    assert task.unlabelled.batch(range(32), 64).shape == (32, 3, 64, 64)
    again = load_task("caltech101", data_root=tmp_path)
    assert again.data_sha256 == task.data_sha256


def test_cifar10_is_loaded_from_torchvisions_layout(tmp_path):
    "All 60,000 labels; one image in 25 is decoded, the others are black, which saves a minute."
    folder, decoded = tmp_path / "cifar-10-batches-py", {}
    folder.mkdir()
    names = json.loads(real("cifar10", "classes.json").read_text())
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    for split, files in (("train", [f"data_batch_{i}" for i in range(1, 6)]), ("test", ["test_batch"])):
        frame = pd.read_parquet(real("cifar10", f"{split}.parquet"), columns=["image", "label"])
        coded, labels = frame.image.tolist(), frame.label.tolist()
        pixels = np.zeros((len(coded), 32, 32, 3), np.uint8)
        for i in range(0, len(coded), 25):
            pixels[i] = np.asarray(Image.open(io.BytesIO(coded[i])).convert("RGB"))
        decoded[split] = pixels
        for file, part in zip(files, np.array_split(np.arange(len(coded)), len(files))):
            rows = pixels[part].transpose(0, 3, 1, 2).reshape(len(part), -1)
            (folder / file).write_bytes(pickle.dumps({"data": rows, "labels": labels[part[0]:part[-1] + 1]}, protocol=4))
    task = load_task("cifar10", data_root=tmp_path)
    assert (len(task.unlabelled), len(task.test)) == (50000, 10000) and task.class_names == names
    assert np.bincount(task.audit.train).tolist() == [5000] * 10 and np.bincount(task.audit.test).tolist() == [1000] * 10
    seen = task.unlabelled.batch(range(0, 50000, 5000), 32)
    assert np.array_equal(seen.permute(0, 2, 3, 1).numpy(), decoded["train"][::5000]) and seen.float().mean() > 50
    assert task.unlabelled.batch([0, 49999], 224).shape == (2, 3, 224, 224)


def test_ten_classes_of_dtd_from_their_table():
    task = task_from_table(real("dtd10", "train.parquet"), class_names=json.loads(real("dtd10", "classes.json").read_text()), test=real("dtd10", "test.parquet"))
    assert (len(task.unlabelled), len(task.test), task.quarantine) == (600, 360, ())
    assert np.bincount(task.audit.train).tolist() == [60] * 10


def test_cupls_descriptions_of_dtd_and_cifar100():
    archive = zipfile.ZipFile(real("text", "cupl.zip"))
    names = json.loads(real("text", "clip_classes_templates.json").read_text())
    for file, key in (("texture", "DescribableTextures"), ("cifar100", "CIFAR100")):
        stored = json.loads(archive.read(f"all_prompts/full_prompts/{file}_prompts_full.json"))
        path = Path(os.environ["COFT_CACHE"]) / f"{file}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(stored))
        found = read_descriptions(path, names[key]["classes"])
        assert list(found) == names[key]["classes"] and min(map(len, found.values())) >= 10
