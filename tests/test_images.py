"Image files of every kind, the quarantine list, and tasks made from folders, tables, arrays and data sets."
import errno
import io
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from coft import images as module
from coft.data import ArrayImages, load_task
from coft.images import (FileImages, Part, clip_view, inspect, inspect_all, make_task, read_image, readable, task_from_arrays,
                         task_from_dataset, task_from_folder, task_from_table, to_8_bit)
from coft.rivals import ZeroShot
from PIL import Image, ImageCms

RED, GREEN, BLUE, WHITE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (128, 128, 128)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    "What is remembered about files stays in the test's folder."
    monkeypatch.setenv("COFT_CACHE", str(tmp_path / "cache"))


def message_of(function, *args, kind=ValueError, **kwargs):
    "The message of the error that this call must raise."
    with pytest.raises(kind) as error:
        function(*args, **kwargs)
    return str(error.value)


def coded(image, kind, **how):
    "The image as the bytes of a file."
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def plain(colour, size=(20, 10), mode="RGB"):
    return Image.new(mode, size, colour)


def noise(h, w, seed=0):
    return np.random.default_rng(seed).integers(256, size=(h, w, 3), dtype=np.uint8)


def colour_at(image, x, y):
    return image.getpixel((x, y))


def near(found, wanted, by=3):
    return max(abs(f - w) for f, w in zip(found, wanted, strict=True)) <= by


def half_clear(mode):
    "Left half red, right half transparent with hidden green."
    image = Image.fromarray(np.array([[[*RED, 255]] * 10 + [[*GREEN, 0]] * 10] * 10, dtype=np.uint8), "RGBA")
    return image if mode == "RGBA" else image.convert("LA")


def palette_with_transparency():
    image = Image.new("P", (20, 10), 0)
    image.putpalette([*RED, *GREEN])
    image.paste(1, (10, 0, 20, 10))
    return coded(image, "PNG", transparency=1)


WIDE = np.full((10, 20), 128 * 257)
ODD = {
    "grey": (coded(plain(128, mode="L"), "PNG"), GREY),
    "1 bit": (coded(plain(1, mode="1"), "PNG"), WHITE),
    "CMYK jpeg": (coded(plain(RED).convert("CMYK"), "JPEG", quality=95), RED),
    "CMYK tiff": (coded(plain(RED).convert("CMYK"), "TIFF"), RED),
    "YCbCr jpeg": (coded(plain(BLUE), "JPEG", quality=95, subsampling=0), BLUE),
    "16 bit png": (coded(Image.fromarray(WIDE.astype(np.uint16)), "PNG"), GREY),
    "16 bit big-endian": (coded(Image.fromarray(WIDE.astype(">u2")), "TIFF"), GREY),
    "32 bit tiff": (coded(Image.fromarray(WIDE.astype(np.int32)), "TIFF"), GREY),
    "float tiff 0..1": (coded(Image.fromarray(np.full((10, 20), 0.5, np.float32)), "TIFF"), GREY),
    "float tiff 0..255": (coded(Image.fromarray(np.full((10, 20), 128, np.float32)), "TIFF"), GREY),
    "palette": (coded(plain(RED).quantize(4), "PNG"), RED),
    "palette gif": (coded(plain(BLUE), "GIF"), BLUE),
    "animated gif": (coded(plain(RED), "GIF", save_all=True, append_images=[plain(BLUE)]), RED),
    "palette with alpha": (palette_with_transparency(), RED),
    "alpha": (coded(half_clear("RGBA"), "PNG"), RED),
    "webp": (coded(plain(RED), "WEBP", lossless=True), RED),
    "bmp": (coded(plain(GREEN), "BMP"), GREEN),
    "Lab tiff": (coded(ImageCms.profileToProfile(plain(RED), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"), "TIFF"), None),
    "1 pixel": (coded(plain(RED, (1, 1)), "PNG"), RED),
    "1 pixel wide": (coded(plain(RED, (1, 700)), "PNG"), RED),
}


@pytest.mark.parametrize("kind", ODD)
def test_every_kind_is_decoded_to_the_right_colour(kind):
    content, colour = ODD[kind]
    image = read_image(content)
    assert image.mode == "RGB" and inspect(content)[1] == ""
    view = FileImages([content]).batch([0], 24)
    assert view.shape == (1, 3, 24, 24) and view.dtype == torch.uint8
    assert colour is None or near(colour_at(image, 0, 0), colour) and near(view[0, :, 12, 2].tolist(), colour)


@pytest.mark.parametrize("content", [coded(half_clear("RGBA"), "PNG"), coded(half_clear("LA"), "PNG"), palette_with_transparency(),
                                     coded(half_clear("RGBA"), "WEBP", lossless=True)])
def test_transparent_pixels_are_white_whatever_they_hide(content):
    assert colour_at(read_image(content), 19, 5) == WHITE


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = Image.fromarray(noise(30, 40))
    undo = {1: [], 2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180], 4: [Image.Transpose.FLIP_TOP_BOTTOM], 5: [Image.Transpose.TRANSPOSE],
            6: [Image.Transpose.ROTATE_90], 7: [Image.Transpose.TRANSVERSE], 8: [Image.Transpose.ROTATE_270]}[orientation]
    stored = upright
    for step in undo:
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(np.asarray(read_image(coded(stored, "PNG", exif=exif))), np.asarray(upright))


WHOLE_JPEG, WHOLE_PNG = coded(Image.fromarray(noise(60, 80)), "JPEG", quality=90), coded(Image.fromarray(noise(60, 80)), "PNG")
BROKEN = {
    "empty": (b"", "the file is empty"),
    "text": (b"<html>404 not found</html>", "not an image"),
    "noise": (bytes(range(256)) * 4, "not an image"),
    "float out of range": (coded(Image.fromarray(np.full((10, 20), 300, np.float32)), "TIFF"), "cannot be decoded (ValueError: pixel values from 300"),
    "negative": (coded(Image.fromarray(np.full((10, 20), -5, np.int32)), "TIFF"), "pixel values from -5"),
    **{f"{kind} cut at {share}": (content[:int(len(content) * share)], "") for kind, content in (("jpeg", WHOLE_JPEG), ("png", WHOLE_PNG)) for share in (0.02, 0.1, 0.5, 0.9, 0.99)},
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_cannot_be_read_has_a_reason(kind, tmp_path):
    content, reason = BROKEN[kind]
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    checksum, problem = inspect(path)
    assert checksum == "" and problem and reason in problem
    assert str(tmp_path) not in problem


def test_a_missing_file_and_a_folder_have_a_reason(tmp_path):
    assert inspect(tmp_path / "no.png") == ("", "the file is missing")
    assert "cannot be decoded" in inspect(tmp_path)[1]


@pytest.mark.parametrize("shape", [(60, 80), (80, 60), (224, 224), (7, 7), (225, 224), (301, 457), (90, 640)])
def test_the_view_is_that_of_open_clip(shape):
    from open_clip import image_transform
    image = Image.fromarray(noise(*shape))
    for size in (24, 224):
        theirs = image_transform(size, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))(image).numpy() * 255
        ours = clip_view(image, size).transpose(2, 0, 1)
        assert np.array_equal(ours, theirs.round()), f"{size} pixels"


@pytest.mark.parametrize("shape", [(33, 500), (500, 33), (1, 9)])
def test_the_view_of_a_strip_is_nearly_that_of_open_clip(shape):
    from open_clip import image_transform
    smooth = Image.fromarray(noise(*shape)).resize((shape[1] * 4, shape[0] * 4), Image.Resampling.BILINEAR)
    theirs = image_transform(24, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))(smooth).numpy() * 255
    assert abs(clip_view(smooth, 24).transpose(2, 0, 1) - theirs).max() <= 1.01


def test_arrays_and_files_give_nearly_the_same_pixels():
    pixels = np.array(Image.fromarray(noise(10, 16)).resize((65, 40), Image.Resampling.BILINEAR))
    array, file = ArrayImages(pixels[None]).batch([0], 24), FileImages([coded(Image.fromarray(pixels), "PNG")]).batch([0], 24)
    assert (array.int() - file.int()).abs().max() <= 2


# ---- the image set

def ten_files(folder):
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i}.png" for i in range(10)]
    for i, path in enumerate(paths):
        Image.fromarray(noise(20 + i, 30, i)).save(path)
    return paths


def test_a_batch_is_in_the_order_of_its_indices(tmp_path):
    images = FileImages(ten_files(tmp_path))
    whole = images.batch(range(10), 16)
    for index in ([9, 0, 3], [4, 4, 4], np.array([2, 1]), torch.tensor([7, 7, 0])):
        assert torch.equal(images.batch(index, 16), whole[torch.as_tensor(np.asarray(index))])
    assert images.batch([], 16).shape == (0, 3, 16, 16)


@pytest.mark.parametrize("keep", [0, 3 * 16 * 16 * 4, 2**20])
def test_kept_pixels_change_nothing_and_stay_within_bounds(tmp_path, keep):
    paths = ten_files(tmp_path)
    images, reference = FileImages(paths, keep_bytes=keep), FileImages(paths, keep_bytes=0)
    for _ in range(3):
        for size in (16, 20):
            assert torch.equal(images.batch(range(10), size), reference.batch(range(10), size))
    assert sum(v.nbytes for views in images._kept.values() for v in views.values()) <= 1.5 * keep


def test_epochs_after_the_first_do_not_decode_again(tmp_path, monkeypatch):
    images, calls = FileImages(ten_files(tmp_path)), []
    monkeypatch.setattr(module, "clip_view", lambda source, size, whole: calls.append(1) or np.zeros((size, size, 3), np.uint8))
    for _ in range(3):
        images.batch(range(10), 16)
    assert len(calls) == 10


def test_the_digest_follows_content_and_order_and_decodes_nothing(tmp_path, monkeypatch):
    paths = ten_files(tmp_path)
    images, _, _ = readable(paths)
    digest = images.digest()
    assert FileImages(paths).digest() == digest != FileImages(paths[::-1]).digest()
    monkeypatch.setattr(module, "inspect", lambda source: pytest.fail("decoded again"))
    assert readable(paths)[0].digest() == digest
    monkeypatch.undo()
    moved = [p.rename(p.with_name("moved-" + p.name)) for p in paths]
    assert readable(moved)[0].digest() == digest
    Image.fromarray(noise(20, 30, 99)).save(moved[0])
    assert readable(moved)[0].digest() != digest


def test_large_sets_are_remembered_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("COFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "REMEMBER_FROM", 5)
    paths = ten_files(tmp_path / "a")
    paths[3].write_bytes(b"")
    first = inspect_all(paths)
    monkeypatch.setattr(module, "_known", {})
    monkeypatch.setattr(module, "inspect", lambda source: inspect(source) if source == paths[3] else pytest.fail(f"{source} was read again"))
    assert inspect_all(paths) == first and first[3][1]
    monkeypatch.undo()
    monkeypatch.setenv("COFT_CACHE", str(tmp_path / "cache"))
    Image.fromarray(noise(9, 9)).save(paths[3])
    assert inspect_all(paths)[3][1] == ""


def test_what_is_wrong_with_a_file_is_not_remembered(tmp_path, monkeypatch):
    "Its content, time and size stay as they are when only the permission was missing."
    paths = ten_files(tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(module, "inspect", lambda source: ("", "cannot be decoded (PermissionError)"))
        assert all(problem for _, problem in inspect_all(paths))
    assert not any(problem for _, problem in inspect_all(paths))


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), MemoryError()], ids=["files", "memory"])
def test_a_fault_of_the_machine_is_no_fault_of_the_image(error):
    with pytest.raises(type(error)):
        inspect(error)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.int16, np.uint32, np.uint16])
def test_wide_integers(dtype):
    values = np.array([[0, 100, 255 if dtype != np.uint16 else 65535]], dtype)
    assert to_8_bit(values).tolist() == [[0, 100 if dtype != np.uint16 else 0, 255]]
    assert to_8_bit(np.array([[0, 25700]], np.int32)).tolist() == [[0, 100]]


def test_a_cache_folder_that_cannot_be_written_does_no_harm(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COFT_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(module, "REMEMBER_FROM", 5)
    assert all(not problem for _, problem in inspect_all(ten_files(tmp_path / "b")))


def test_a_file_that_vanishes_is_named(tmp_path):
    images, _, _ = readable(ten_files(tmp_path))
    (tmp_path / "4.png").unlink()
    message = message_of(images.batch, [4], 16, kind=OSError)
    assert "4.png" in message and "missing" in message and "Load the task again" in message


# ---- quarantine

def broken_folder(root, bad=(0, 5, 6, 19)):
    "20 images of two classes whose brightness is their number; some are damaged."
    for i in range(20):
        path = root / ("cat" if i % 2 else "dog") / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"" if i in bad else coded(plain((i * 10,) * 3), "PNG"))
    return root


@pytest.mark.parametrize("bad", [(), (0,), (19,), (0, 5, 6, 19), tuple(range(2, 20))])
def test_quarantine_keeps_images_and_labels_together(tmp_path, bad):
    task = task_from_folder(broken_folder(tmp_path / "pets", bad))
    assert sorted(name for name, _ in task.quarantine) == sorted(f"{'cat' if i % 2 else 'dog'}/{i:02}.png" for i in bad)
    assert {reason for _, reason in task.quarantine} <= {"the file is empty"}
    number = (task.unlabelled.batch(range(len(task.unlabelled)), 8)[:, 0, 0, 0] / 10).round().int().tolist()
    assert sorted(number) == sorted(set(range(20)) - set(bad))
    assert task.class_names == ["cat", "dog"]
    assert [0 if n % 2 else 1 for n in number] == task.audit.train.tolist()
    index, labels = task.labelled(shots=1)
    assert (task.audit.train[index] == labels).all()


def test_given_noisy_labels_follow_the_quarantine():
    sources = [plain(RED), b"", plain(BLUE)]
    task = make_task("toy", ["red", "blue"], Part(sources, labels=[0, 0, 1]), noisy=[1, 0, 0])
    assert task.labelled(noisy=True)[1].tolist() == [1, 0] and task.audit.train.tolist() == [0, 1]
    with pytest.raises(PermissionError):
        task.blind().labelled(noisy=True)


@pytest.mark.parametrize("noisy, expected", [([1, 0], "2 given labels for 3 training images"), ([1, 0, 0, 1], "4 given labels for 3"), ([1, 0, 9], "label 9 was given")])
def test_given_noisy_labels_are_checked(noisy, expected):
    assert expected in message_of(make_task, "toy", ["red", "blue"], Part([plain(RED)] * 3, labels=[0, 0, 1]), noisy=noisy)


def test_nothing_readable_is_an_error(tmp_path):
    message = message_of(task_from_folder, broken_folder(tmp_path / "pets", range(20)))
    assert "none of the 20 images" in message and "cat/01.png" in message and "empty" in message


def test_permuted_labels_do_not_reach_what_a_method_sees(tmp_path):
    sources = [plain((i, i, i)) for i in range(8)]
    tasks = [make_task("toy", ["a", "b"], Part(sources, labels=labels), Part(sources[:1], [0])).blind() for labels in ([0] * 4 + [1] * 4, [1] * 4 + [0] * 4)]
    assert tasks[0].unlabelled.digest() == tasks[1].unlabelled.digest() and tasks[0].data_sha256 == tasks[1].data_sha256
    assert torch.equal(*(t.unlabelled.batch(range(8), 8) for t in tasks))


# ---- folders

def test_train_and_test_folders(tmp_path):
    broken_folder(tmp_path / "pets/train", ())
    broken_folder(tmp_path / "pets/test", (3,))
    task = task_from_folder(tmp_path / "pets")
    assert (len(task.unlabelled), len(task.test), task.name) == (20, 19, "pets")
    assert task.quarantine == (("test/cat/03.png", "the file is empty"),)


def test_class_names_can_be_given_in_any_order_or_mapped(tmp_path):
    root = broken_folder(tmp_path / "pets", ())
    ordered = task_from_folder(root, class_names=["Dog", "Cat", "horse"])
    assert ordered.class_names == ["Dog", "Cat", "horse"] and set(ordered.audit.train[:10]) == {1}
    mapped = task_from_folder(root, class_names={"dog": "a good dog", "cat": "a house cat"})
    assert mapped.class_names == ["a good dog", "a house cat"] and set(mapped.audit.train[:10]) == {1}


def test_flat_images_and_a_labelled_test_folder(tmp_path):
    for i in range(4):
        (tmp_path / "new").mkdir(exist_ok=True)
        plain(RED).save(tmp_path / "new" / f"{i}.jpg")
    (tmp_path / "new/notes.txt").write_text("no image")
    (tmp_path / "new/.hidden.png").write_text("no image")
    task = task_from_folder(tmp_path / "new", class_names=["cat", "dog"], test=broken_folder(tmp_path / "pets", ()), template="a {}.")
    assert len(task.unlabelled) == 4 and task.audit.train is None and len(task.audit.test) == 20 and task.templates == ("a {}.",)
    with pytest.raises(PermissionError):
        task.labelled(shots=1)
    assert "class_names" in message_of(task_from_folder, tmp_path / "new")


@pytest.mark.parametrize("test", ["no-such", "empty"])
def test_a_test_folder_without_images_is_named(tmp_path, test):
    (tmp_path / "empty").mkdir()
    assert test in message_of(task_from_folder, broken_folder(tmp_path / "pets", ()), test=tmp_path / test, kind=FileNotFoundError)


def test_a_stray_image_is_set_aside_or_asked_about(tmp_path):
    root = broken_folder(tmp_path / "pets", ())
    plain(RED).save(root / "preview.png")
    for names in (None, ["cat", "dog"]):
        assert "preview.png" in message_of(task_from_folder, root, class_names=names)
    task = task_from_folder(root, labels=True)
    assert len(task.unlabelled) == 20 and task.quarantine == (("preview.png", "lies in no class sub-folder"),)
    flat = task_from_folder(root, class_names=["cat", "dog"], labels=False, test=root)
    assert len(flat.unlabelled) == 21 and len(flat.test) == 20 and len(flat.audit.test) == 20 and flat.quarantine == task.quarantine


def test_a_folder_train_beside_other_classes_is_asked_about(tmp_path):
    root = broken_folder(tmp_path / "vehicles", ())
    (root / "train").mkdir()
    plain(RED).save(root / "train/1.png")
    assert "holds train/ and, beside it, images in cat, dog" in message_of(task_from_folder, root, class_names=["cat", "dog", "train"])


@pytest.mark.parametrize("folder", ["missing", "empty"])
def test_folders_without_images_are_named(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    assert folder in message_of(task_from_folder, tmp_path / folder, kind=FileNotFoundError)


# ---- tables

def frame_of(root):
    files = sorted(root.rglob("*.png"))
    return pd.DataFrame({"image": [f.relative_to(root).as_posix() for f in files], "label": [f.parent.name for f in files]})


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_tables_of_paths(tmp_path, suffix):
    root = broken_folder(tmp_path / "pets")
    frame, path = frame_of(root), root / f"list.{suffix}"
    frame.to_parquet(path) if suffix == "parquet" else frame.to_csv(path, sep="\t" if suffix == "tsv" else ",", index=False)
    task, folder = task_from_table(path), task_from_folder(root)
    assert task.unlabelled.digest() == folder.unlabelled.digest() and (task.audit.train == folder.audit.train).all()
    assert task.quarantine == folder.quarantine and task.name == "list"


@pytest.mark.parametrize("pair", [False, True])
def test_tables_of_bytes(tmp_path, pair):
    contents = [coded(plain((i, 0, 0)), "PNG") for i in range(6)]
    contents[2] = b""
    cells = [{"bytes": c, "path": None} for c in contents] if pair else contents
    pd.DataFrame({"image": cells, "label": [0, 1] * 3, "part": ["train"] * 4 + ["test", "val"]}).to_parquet(tmp_path / "t.parquet")
    task = task_from_table(tmp_path / "t.parquet", class_names=["a", "b"], split="part")
    assert len(task.unlabelled) == 3 and task.audit.train.tolist() == [0, 1, 1] and task.audit.test.tolist() == [0]
    assert [name for name, _ in task.quarantine] == ["row 2 of t"]
    assert task.unlabelled.batch([2], 8)[0, 0, 0, 0] == 3


def test_tables_without_labels_and_with_a_test_table(tmp_path):
    root = broken_folder(tmp_path / "pets", ())
    frame = frame_of(root)
    task = task_from_table(frame[["image"]], class_names=["a", "b"], label=None, root=root)
    assert len(task.unlabelled) == 20 and task._labels is None
    task = task_from_table(frame[:15], test=frame[15:], root=root)
    assert (len(task.unlabelled), len(task.test)) == (15, 5)


BAD_TABLES = {
    "column": (lambda f: task_from_table(f, image="img"), "column of table: 'img' is not known. Did you mean 'image'?"),
    "class": (lambda f: task_from_table(f, class_names=["cat", "cow"]), "label 'dog' is none of the 2 class names"),
    "number": (lambda f: task_from_table(f.assign(label=7), class_names=["cat", "dog"]), "label 7 was given; with 2 class names"),
    "no names": (lambda f: task_from_table(f.assign(label=1)), "class_names: a list is needed"),
    "a gap": (lambda f: task_from_table(f.assign(label=[None, *f.label[1:]])), "table: row 0 has no label"),
    "file": (lambda f: task_from_table("coft/list.csv"), "does not exist"),
}


@pytest.mark.parametrize("fault", BAD_TABLES)
def test_faults_of_tables_are_named(tmp_path, fault):
    root = broken_folder(tmp_path / "pets", ())
    frame = frame_of(root).assign(image=lambda f: [str(root / p) for p in f.image])
    call, expected = BAD_TABLES[fault]
    assert expected in message_of(call, frame, kind=FileNotFoundError if fault == "file" else ValueError)


@pytest.mark.parametrize("suffix, content, expected", [("csv", "image,label\ncaf\u00e9.png,dog".encode("latin-1"), "Save it as UTF-8"), ("csv", b"", "cannot be read as csv"), ("parquet", b"no parquet", "cannot be read as parquet"),
                                                       ("csv", b"image,label\n", "has no rows"), ("xlsx", b"no matter", "format of the table: '.xlsx' is not known")])
def test_files_that_are_no_tables_are_named(tmp_path, suffix, content, expected):
    path = tmp_path / f"list.{suffix}"
    path.write_bytes(content)
    message = message_of(task_from_table, path)
    assert expected in message and (suffix == "xlsx" or path.name in message)


# ---- arrays and data set objects

def test_a_sorted_frame_keeps_images_and_labels_together():
    frame = pd.DataFrame({"image": [plain((i, 0, 0)) for i in (3, 1, 2, 0)], "label": ["b", "a", "b", "a"]}, index=[7, 0, 9, 3]).sort_values("label")
    for images in (frame.image, frame.image.tolist()):
        task = task_from_arrays(images, ["a", "b"], frame.label)
        red = task.unlabelled.batch(range(4), 8)[:, 0, 0, 0].tolist()
        assert [(r in (2, 3)) * 1 for r in red] == task.audit.train.tolist()


def test_labels_may_be_tensors():
    for labels in (torch.tensor([0, 1, 1]), [torch.tensor(0), torch.tensor(1), torch.tensor(1)]):
        assert task_from_arrays([noise(9, 9)] * 3, ["a", "b"], labels).audit.train.tolist() == [0, 1, 1]


def test_arrays_of_one_size_and_of_many():
    digits = load_task("digits")
    one = task_from_arrays(digits.unlabelled.pixels[:20], digits.class_names, digits.audit.train[:20], digits.test.pixels[:5], digits.audit.test[:5])
    assert isinstance(one.unlabelled, ArrayImages) and torch.equal(one.unlabelled.batch(range(20), 24), digits.unlabelled.batch(range(20), 24))
    many = task_from_arrays([noise(9, 12), noise(30, 8), Image.fromarray(noise(5, 5)), torch.rand(3, 6, 7)], ["a", "b"])
    assert isinstance(many.unlabelled, FileImages) and many.unlabelled.batch(range(4), 8).shape == (4, 3, 8, 8) and many._labels is None
    assert "3 labels for 4 images" in message_of(task_from_arrays, [noise(9, 9)] * 4, ["a", "b"], [0, 1, 1])
    assert "3 training labels for 4 images" in message_of(task_from_arrays, np.stack([noise(9, 9)] * 4), ["a", "b"], [0, 1, 1])


class Pairs(torch.utils.data.Dataset):
    "Pairs of a tensor and a label; number 3 fails."
    classes = ["red_thing", "blue_thing"]

    def __len__(self):
        return 6

    def __getitem__(self, i):
        if i == 3:
            raise OSError("broken pipe")
        return torch.full((3, 9, 9), i / 10), torch.tensor(i % 2)


def test_a_pytorch_data_set():
    task = task_from_dataset(Pairs(), test=Pairs())
    assert task.class_names == ["red thing", "blue thing"] and task.audit.train.tolist() == [0, 1, 0, 0, 1]
    assert task.quarantine == (("image 3", "cannot be decoded (OSError: broken pipe)"),) * 2
    assert task.unlabelled.batch([3], 9)[0, 0, 0, 0] == round(0.4 * 255) and task.unlabelled.digest() == task.test.digest()


def test_pytorch_data_sets_that_cannot_serve_are_refused():
    class Normalised(Pairs):
        def __getitem__(self, i): return torch.full((3, 9, 9), -1.5), 0

    class Random(Pairs):
        def __getitem__(self, i): return torch.rand(3, 9, 9), 0
    assert "pixel values from -1.5" in message_of(task_from_dataset, Normalised())
    assert "random transforms" in message_of(task_from_dataset, Random())


def test_a_pytorch_data_set_with_names_or_dictionaries():
    rows = [("a", 0), ("b", 1), ("b", 1)]
    for items in ([(noise(8, 8, i), name) for i, (name, _) in enumerate(rows)], [{"image": noise(8, 8, i), "label": k} for i, (_, k) in enumerate(rows)]):
        assert task_from_dataset(items, class_names=["a", "b"]).audit.train.tolist() == [0, 1, 1]
    assert task_from_dataset([{"image": noise(8, 8)}], class_names=["a", "b"])._labels is None
    assert "needs 'train'" in message_of(task_from_dataset, {"validation": [noise(8, 8)]}, class_names=["a", "b"])


def test_a_pytorch_data_set_without_labels():
    task = task_from_dataset([Image.fromarray(noise(8, 8, i)) for i in range(3)], class_names=["a", "b"])
    assert len(task.unlabelled) == 3 and task._labels is None
    assert "class_names" in message_of(task_from_dataset, [Image.fromarray(noise(8, 8))])


def test_a_hugging_face_data_set(tmp_path):
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["red_thing", "blue_thing"])})
    contents = [coded(plain((i * 20, 0, 0)), "PNG") for i in range(5)]
    contents[1] = b"no image"
    rows = {"picture": [{"bytes": c, "path": None} for c in contents], "kind": [0, 1, 1, 0, 1]}
    both = datasets.DatasetDict(train=datasets.Dataset.from_dict(rows, features=features), test=datasets.Dataset.from_dict({k: v[2:] for k, v in rows.items()}, features=features))
    task = task_from_dataset(both, image="picture", label="kind")
    assert task.class_names == ["red thing", "blue thing"] and task.audit.train.tolist() == [0, 1, 0, 1] and task.audit.test.tolist() == [1, 0, 1]
    assert task.quarantine == (("row 1", "not an image that Pillow can read"),)
    assert task.unlabelled.batch(range(4), 8)[:, 0, 0, 0].tolist() == [0, 40, 60, 80]
    assert "Did you mean 'picture'?" in message_of(task_from_dataset, both, image="pictures", label="kind")
    assert "'label' is not known" in message_of(task_from_dataset, both, image="picture")
    assert task_from_dataset(both, class_names=["a", "b"], image="picture", label=None)._labels is None


def test_methods_run_on_files_as_on_arrays(clip, tmp_path):
    digits = load_task("digits")
    pictures = [coded(Image.fromarray(p), "PNG") for p in digits.test.pixels[:60]]
    files = make_task("files", digits.class_names, Part(pictures), Part(pictures, digits.audit.test[:60]), template=digits.template)
    arrays = task_from_arrays(digits.test.pixels[:60], digits.class_names, None, digits.test.pixels[:60], digits.audit.test[:60], template=digits.template)
    probabilities = [ZeroShot().fit(clip, t, progress=False).predict_proba(t.test) for t in (files, arrays)]
    assert abs(probabilities[0] - probabilities[1]).max() < 0.05


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_the_threads_survive_a_fork(tmp_path):
    import multiprocessing
    images = FileImages(ten_files(tmp_path))
    images.batch(range(10), 8)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert torch.equal(pool.apply_async(images.batch, (range(10), 16)).get(timeout=60), images.batch(range(10), 16))
