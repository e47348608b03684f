"Batches that are made ahead, by other processes and a thread: the same numbers, the same errors, nothing left over."
import multiprocessing
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from coft.collaborate import CoFTSettings, PromptedModel, similarities
from coft.core import generator, uniforms
from coft.data import MOST_WORKERS, ArrayImages, Augmentation, SomeImages, ahead, augment, batches, load_task, sample_task, workers_for
from coft.fewshot import cache_keys
from coft.filtering import frozen_features
from coft.images import FileImages
from coft.members import EncoderMember
from coft.trainer import EncoderWithHead, Schedule, train
from helpers import message_of
from PIL import Image
from torch import nn

VIEWS, STREAM = Augmentation(rotate=0.2, stretch=0.1), (3, "phase1", 1)


@pytest.fixture(autouse=True)
def nothing_left_over():
    "No process and no thread outlives a pass over the images."
    yield
    until = time.monotonic() + 5
    while time.monotonic() < until and (multiprocessing.active_children() or any(t.name.startswith("coft-ahead") for t in threading.enumerate())):
        time.sleep(0.01)
    assert not multiprocessing.active_children() and not any(t.name.startswith("coft-ahead") for t in threading.enumerate())


class Written:
    "Small pictures by number; who asks for one is written into a file."
    def __init__(self, folder, wait=0.0):
        self.log, self.wait = folder / "asked.txt", wait

    def __len__(self):
        return 11

    def __getitem__(self, i):
        time.sleep(self.wait)
        with self.log.open("a") as log:
            log.write(f"{os.getpid()}\n")
        return np.random.default_rng(int(i)).integers(256, size=(20 + i, 30, 3), dtype=np.uint8)

    def asked_by(self):
        "The processes that asked since the last call, one entry for each picture."
        found = self.log.read_text().split() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [int(f) for f in found]


def passes(images, workers, augmentation, index=range(11)):
    "Two passes over the images, as plain arrays."
    stream = None if augmentation is None else STREAM
    return [[(p.tolist(), x.numpy().copy()) for p, x in batches(images, index, 4, 16, stream, augmentation, workers=workers)] for _ in range(2)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("augmentation", [None, VIEWS], ids=["test view", "random views"])
def test_every_batch_is_the_same_whoever_made_it(tmp_path, augmentation):
    sources, rows = Written(tmp_path), np.array([10, 3, 3, 0, 7, 8, 1])
    stored = 16 if augmentation is None else augmentation.stored_size(16)
    for chosen in (None, rows):
        n = 11 if chosen is None else len(rows)
        order = np.arange(n) if augmentation is None else generator(*STREAM, "order").permutation(n)
        made = []
        for workers in (0, 1, 3):
            images = FileImages(sources)
            made.append(passes(images if chosen is None else SomeImages(images, rows), workers, augmentation, range(n)))
        for first, second in made:
            assert sum((p for p, _ in first), []) == order.tolist()
            for (place, x), (again, y), (_, expected) in zip(first, second, made[0][0]):
                whole = FileImages(sources, keep_bytes=0).batch([i if chosen is None else rows[i] for i in place], stored, augmentation is not None)
                alone = whole if augmentation is None else augment(whole, uniforms(*STREAM, "augment", index=place, size=7), 16, augmentation)
                assert place == again and (x == alone.numpy()).all() and (x == y).all() and (x == expected).all()


def test_other_processes_decode_and_what_they_made_is_kept_here(tmp_path):
    sources = Written(tmp_path)
    images = FileImages(sources)
    list(batches(images, range(11), 4, 16, workers=2))
    first = sources.asked_by()
    assert len(first) == 11 and os.getpid() not in first and len(set(first)) == 2
    list(batches(images, range(11), 4, 16, workers=2))
    assert sources.asked_by() == []


def test_only_a_share_of_each_batch_is_made_where_others_make_the_rest(tmp_path):
    sources = Written(tmp_path)
    whole = list(batches(FileImages(sources), range(11), 4, 16, STREAM, VIEWS))
    sources.asked_by()
    part = list(batches(FileImages(sources), range(11), 4, 16, STREAM, VIEWS, share=lambda place: place[1::2], workers=2))
    assert len(sources.asked_by()) == 5
    assert all((p[1::2] == q).all() and torch.equal(x[1::2], y) for (p, x), (q, y) in zip(whole, part))


def test_nothing_is_kept_beyond_the_bound(tmp_path):
    images = FileImages(Written(tmp_path), keep_bytes=3 * 3 * 16 * 16)
    list(batches(images, range(11), 4, 16, workers=2))
    assert len(images.missing(range(11), 16)) == 8


def test_arrays_need_no_process(monkeypatch):
    monkeypatch.setattr("torch.utils.data.DataLoader", lambda *a, **k: pytest.fail("a process was asked for"))
    pixels = np.random.default_rng(0).integers(256, size=(9, 20, 30, 3), dtype=np.uint8)
    assert all((x == y).all() for one, two in zip(*(passes(ArrayImages(pixels), w, VIEWS, range(9)) for w in (0, 4))) for (_, x), (_, y) in zip(one, two))


@pytest.mark.parametrize("what", ["shared memory", "a process that may have none"])
def test_where_no_process_can_be_had_the_thread_works_alone(tmp_path, monkeypatch, what):
    if what == "shared memory":
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), dict(free=1000)))
    else:
        monkeypatch.setattr("coft.data.current_process", lambda: type("process", (), dict(daemon=True)))
    sources = Written(tmp_path)
    list(batches(FileImages(sources), range(11), 4, 16, workers=3))
    assert set(sources.asked_by()) == {os.getpid()}


def test_a_file_that_vanishes_is_told_in_the_same_words(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for path in paths:
        Image.new("RGB", (8, 8)).save(path)
    paths[4].unlink()
    told = [message_of(list, batches(FileImages(paths), range(6), 2, 16, workers=w), kind=OSError) for w in (0, 2)]
    assert told[0] == told[1] and "4.png" in told[0] and "Load the task again" in told[0]


def test_a_pass_may_be_left_early(tmp_path):
    for leave in ("break", "error"):
        begun = batches(FileImages(Written(tmp_path, 0.02)), range(11), 2, 16, workers=2)
        try:
            for place, _ in begun:
                if leave == "break":
                    break
                raise FloatingPointError
        except FloatingPointError:
            pass
        del begun


def test_ctrl_c_ends_a_pass(tmp_path):
    stop = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler) # jobs in the background of a shell ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            stop.start()
            list(batches(FileImages(Written(tmp_path, 0.3)), range(11), 2, 16, workers=2))
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_training_and_the_global_numbers_are_the_same(tmp_path, monkeypatch):
    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3 * 16 * 16, 2)
            nn.init.constant_(self.head.weight, 0.01)
            nn.init.constant_(self.head.bias, 0.0)

        def forward(self, pixels, label, u):
            return {"loss": nn.functional.cross_entropy(self.head(pixels.flatten(1)), label)}

    found = []
    for workers in "02":
        monkeypatch.setenv("COFT_WORKERS", workers)
        torch.manual_seed(5)
        module, sources = Tiny(), Written(tmp_path)
        train(module, FileImages(sources), range(11), {"label": np.arange(11) % 2}, Schedule(epochs=2, batch_size=4), 16, VIEWS, 0, "phase1", progress=False)
        found.append((module.head.weight.detach().clone(), torch.get_rng_state(), os.getpid() in sources.asked_by()))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert [f[2] for f in found] == [True, False]


def test_so_many_processes_decode(monkeypatch):
    monkeypatch.delenv("COFT_WORKERS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    assert workers_for() == workers_for("cpu") == 0 and workers_for("cuda") == workers_for(torch.device("cuda:1")) == 12
    assert workers_for("cuda", workers=0) == 0 and workers_for("cpu", workers=3) == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(192)), raising=False)
    assert workers_for("cuda") == MOST_WORKERS
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert workers_for("cuda") == 3
    monkeypatch.setenv("COFT_WORKERS", "5")
    assert workers_for("cuda") == workers_for() == 5 and workers_for("cuda", workers=1) == 1
    monkeypatch.setenv("COFT_WORKERS", "many")
    assert "COFT_WORKERS" in message_of(workers_for) and "'many'" in message_of(workers_for)


def test_pixels_go_to_the_gpu_of_the_process_that_trains(tmp_path, monkeypatch):
    "The thread that moves them has a current GPU of its own, the first."
    went = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0 if threading.current_thread().name.startswith("coft-ahead") else 3)
    monkeypatch.setattr("coft.data._moved", lambda x, device: went.append((threading.current_thread().name[:10], str(device))) or x)
    list(batches(FileImages(Written(tmp_path)), range(4), 4, 16, device="cuda", workers=1))
    list(batches(FileImages(Written(tmp_path)), range(4), 4, 16, device="cuda:1", workers=0))
    assert went == [("coft-ahead", "cuda:3"), ("MainThread", "cuda:1")]


def test_items_are_made_ahead_and_never_too_many():
    made, closed = [], []

    def make():
        try:
            for i in range(8):
                made.append(i)
                yield i
            raise LookupError("the ninth")
        finally:
            closed.append(True)

    seen, items = [], ahead(make(), depth=2)
    assert next(items) == 0
    time.sleep(0.05)
    assert made == [0, 1, 2] and not closed
    with pytest.raises(LookupError, match="the ninth"):
        for i in items:
            seen.append(i)
    assert seen == list(range(1, 8)) and closed == [True]
    assert list(ahead(i for i in range(5))) == [0, 1, 2, 3, 4] and list(ahead(i for i in ())) == []


def asks_of_all_images(clip, task):
    "Everything that looks at all images of a set without a gradient, by name."
    phase1, encoder = PromptedModel(clip, task.class_names, CoFTSettings(n_context=2, n_visual=2), 0), EncoderWithHead(clip, len(task.class_names))
    light = phase1.member()
    return {"frozen features": lambda images: frozen_features(clip, images), "similarities": lambda images: similarities([phase1], images), "a light member": light,
            "an encoder": EncoderMember(encoder), "cache keys": lambda images: cache_keys(clip, images, range(4), VIEWS, 1)}


@pytest.mark.parametrize("what", ["frozen features", "similarities", "a light member", "an encoder", "cache keys"])
def test_what_is_asked_of_all_images_says_where_it_wants_them(clip, monkeypatch, what):
    "So that for a GPU they are made ahead, in pinned memory, while it computes."
    task, wanted = sample_task(load_task("glyphs-toy"), 8, 8), []
    def spied(*args, **named):
        wanted.append(named.get("device"))
        return batches(*args, **named)
    for module in ("processes", "fewshot"):
        monkeypatch.setattr(f"coft.{module}.batches", spied)
    ask = asks_of_all_images(clip, task)[what]
    ask(task.unlabelled)
    assert wanted == [clip.device]
