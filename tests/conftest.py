"Small tasks, quick settings and loaded models that the tests share."
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from coft.clip import load_clip, weights_digest
from coft.collaborate import CoFT
from coft.data import ArrayImages, Audit, Task, glyphs_task
from coft.glyphs import Writing
from helpers import QUICK, ROOT, remember_models


@pytest.fixture(scope="session")
def clip():
    "The embedded model; nothing may change its weights."
    return load_clip("embedded")


@pytest.fixture(scope="session")
def vit():
    "open_clip's ViT-B/32 with random weights: 224 pixels, 77 tokens."
    return load_clip("ViT-B-32-quickgelu", "random")


@pytest.fixture(scope="session")
def task():
    "Four printed digits: 72 unlabelled and 40 test images."
    return glyphs_task("toy", Writing("stix", "0123", 72), n_test=40, seed=3)


@pytest.fixture(scope="session")
def relabelled(task):
    "The same task with its hidden training labels permuted."
    order = np.random.default_rng(0).permutation(len(task.audit.train))
    return replace(task, _labels=Audit(task.audit.train[order], task.audit.test))


@pytest.fixture(scope="session")
def photos():
    "8 unlabelled and 3 test images of random colours, 64 pixels wide."
    rng = np.random.default_rng(0)
    train, test = (ArrayImages(rng.integers(256, size=(n, 64, 64, 3), dtype=np.uint8)) for n in (8, 3))
    return Task("photos", ["cat", "golden retriever", "aeroplane"], train, test)


@pytest.fixture
def quick():
    "Settings with which CoFT on the task takes about a second; independent of what the presets hold."
    return dict(QUICK)


@pytest.fixture
def trained(monkeypatch):
    "Every model that CoFT trains during a test, by the name of its phase."
    return remember_models(monkeypatch)


@pytest.fixture(scope="session")
def quick_run(clip, task):
    "One quick run with seed 0: what it returned, its models, and the digest of the frozen weights before it."
    with pytest.MonkeyPatch.context() as monkeypatch:
        models, before = remember_models(monkeypatch), weights_digest(clip.model)
        fitted = CoFT(**QUICK).fit(clip, task, seed=0, progress=False)
    return SimpleNamespace(fitted=fitted, models=models, digest_before=before, digest_after=weights_digest(clip.model))


@pytest.fixture
def damaged_weights(tmp_path, monkeypatch):
    "The package's embedded model with one byte of its weights changed."
    folder = tmp_path / "embedded"
    shutil.copytree(ROOT / "coft/embedded", folder)
    path = folder / "coft-embedded.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    monkeypatch.setattr("coft.clip.EMBEDDED", folder)
    return path
