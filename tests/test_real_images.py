"From `load_clip` to `CoFTPlus` on photographs: Caltech101 in CoOp's layout, ViT-B/32 with random weights, a few steps. The numbers mean nothing, the mechanics do."
import json
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from coft import CoFTPlus, load_task
from coft.clip import weights_digest
from coft.results import measured
from helpers import REAL

N_CLASSES, PER_CLASS = 4, 3
FEW_STEPS = dict(top_k=2, rounds=2, phase1_epochs=1, phase1_batch_size=4, phase2_epochs=1, phase2_batch_size=6)


@pytest.fixture(scope="module")
def caltech(tmp_path_factory):
    "Four classes of Caltech101, three training images and one test image each, written out in CoOp's layout."
    if not (REAL / "caltech101/train.parquet").is_file():
        pytest.skip(f"the images of Caltech101 are not in {REAL}; COFT_TEST_DATA names the folder of the test data")
    root = tmp_path_factory.mktemp("data")
    folder = root / "caltech-101"
    with zipfile.ZipFile(REAL / "text/coop_split_zhou.zip") as archive:
        name = next(n for n in archive.namelist() if n.endswith("split_zhou_Caltech101.json"))
        whole = json.loads(archive.read(name))
    split = {"val": []}
    for part, n in (("train", PER_CLASS), ("test", 1)):
        listed = [row for row in whole[part] if row[1] < N_CLASSES]
        split[part] = [row for k in range(N_CLASSES) for row in [r for r in listed if r[1] == k][:n]]
        images = pd.read_parquet(REAL / f"caltech101/{part}.parquet", columns=["path", "image"])
        content = {"/".join(Path(p).parts[-2:]): b for p, b in zip(images.path, images.image)}
        for path, _, _ in split[part]:
            target = folder / "101_ObjectCategories" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content[path])
    (folder / "split_zhou_Caltech101.json").write_text(json.dumps(split))
    return load_task("caltech101", data_root=root, check_counts=False)


@pytest.fixture(scope="module")
def fitted(vit, caltech):
    "CoFT+ with the paper's settings otherwise, what it cost beside it"
    with measured() as cost:
        result = CoFTPlus(**FEW_STEPS).fit(vit, caltech, progress=False)
    print(f"\nCoFT+ on {len(caltech.unlabelled)} photographs at 224 pixels: {cost['seconds']} s, {cost['peak_memory_mb']} MB")
    return result


def test_the_whole_of_coft_plus_ran(fitted):
    histories = fitted.trace["histories"]
    assert {f"Phase I, model {g}{r}" for g in (1, 2) for r in ("", ", round 2")} <= histories.keys()
    assert {"Phase II, model 1", "Phase II, model 2"} & histories.keys()
    for name, history in histories.items():
        assert np.isfinite([h["loss"] for h in history]).all()
        assert name.startswith("Phase I,") or history[0]["L_cont"] > 0


def test_it_answers_for_real_test_images(fitted, caltech):
    P = fitted.predict_proba(caltech.test)
    assert P.shape == (N_CLASSES, N_CLASSES) and np.isfinite(P).all() and np.allclose(P.sum(1), 1, atol=1e-5)


def test_the_templates_are_those_of_a_language_model(caltech):
    assert len(caltech.llm_templates) == 8 and caltech.template == "a photo of a {}."


def test_the_frozen_model_stays_as_it_was(fitted, vit):
    assert weights_digest(vit.model) == vit.weights_sha256
