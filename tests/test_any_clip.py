"Nothing in CoFT belongs to the embedded model: the same call runs on open_clip's ViT-B/32 at 224 pixels."
import numpy as np
import pytest
from coft import CoFT
from coft.clip import weights_digest

TWO_STEPS = dict(top_k=2, phase1_epochs=1, phase1_batch_size=3, phase2_epochs=1, phase2_batch_size=4)


@pytest.fixture(scope="module")
def fitted(vit, photos):
    "CoFT with the paper's settings, two steps per phase, on 8 images of three classes"
    return CoFT(**TWO_STEPS).fit(vit, photos, progress=False)


def test_the_model_takes_the_settings_of_the_papers(fitted):
    assert fitted.settings["n_context"] == fitted.settings["n_visual"] - 4 == 16
    assert fitted.settings["visual_depth"] == "deep" and fitted.settings["phase1_optimizer"] == "sgd"


def test_both_phases_ran(fitted):
    assert len(fitted.trace["selected_index"]) == 6, "two batches of 3"
    losses = {name: history[0]["loss"] for name, history in fitted.trace["histories"].items()}
    assert {"Phase I, model 1", "Phase I, model 2"} <= losses.keys() and np.isfinite(list(losses.values())).all()
    for g in (1, 2):
        assert (f"Phase II, model {g}" in losses) == fitted.trace[f"accepted_{g}"].any()
    assert fitted.trace["accepted_1"].any() or fitted.trace["accepted_2"].any(), "no Phase II ran, and this test showed half of what it should"


def test_probabilities_are_finite_and_sum_to_one(fitted, photos):
    P = fitted.predict_all(photos.test)
    assert P.shape == (2, 3, 3) and np.isfinite(P).all()
    assert np.allclose(P.sum(-1), 1, atol=1e-5)


def test_frozen_weights_are_unchanged(fitted, vit):
    assert weights_digest(vit.model) == vit.weights_sha256
    assert not any(p.requires_grad or p.grad is not None for p in vit.model.parameters())
