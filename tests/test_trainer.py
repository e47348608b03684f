"The loop and the head that every method shares."
import numpy as np
import pytest
import torch
from coft.clip import FrozenCLIP, load_clip
from coft.collaborate import CoFT
from coft.data import ArrayImages, batches
from coft.trainer import EncoderWithHead, Schedule, train


def test_a_random_head_is_that_of_torchs_linear_layer(clip):
    "Section 2.7: weights and bias uniform within 1 / sqrt(d)."
    head = EncoderWithHead(clip, 500, seed=0).head
    bound = clip.embed_dim ** -0.5
    for numbers in (head.weight.detach(), head.bias.detach()):
        assert numbers.abs().max() <= bound and numbers.abs().max() > 0.97 * bound and abs(numbers.mean().item()) < 0.1 * bound
    assert not EncoderWithHead(clip, 4, torch.eye(4, clip.embed_dim)).head.bias.any()


def test_a_phase_runs_after_accelerate_was_used_otherwise(clip, task):
    "accelerate keeps one state per process; a notebook may have used another precision or device before."
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True, mixed_precision="bf16")
    module = EncoderWithHead(clip, 4, seed=0)
    history = train(module, task.unlabelled, range(8), {"label": task.audit.train[:8]}, Schedule(epochs=1), 24, task.augmentation, 0, "phase", progress=False)
    assert np.isfinite(history[0]["loss"]) and AcceleratorState().mixed_precision == "no"


def test_training_views_show_the_whole_image():
    "Section 2.5: resize to a square, then crop; the test view cuts the middle."
    wide = np.zeros((1, 24, 48, 3), np.uint8)
    wide[:, :, :6] = 255
    seen = []
    view = lambda pixels, u, size: seen.append(pixels) or pixels
    view.n_numbers, view.stored_size = 1, lambda size: size
    list(batches(ArrayImages(wide), [0], 1, 24, (0, "phase", 0), view))
    assert seen[0][..., 0].float().mean() > 200, "the left margin is in the training view"
    assert not ArrayImages(wide).batch([0], 24)[..., 0].any(), "and not in the test view"


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_a_head_that_cannot_be_is_refused_before_any_training(clip, task, monkeypatch, tower):
    import coft.collaborate
    monkeypatch.setattr(coft.collaborate, "train", lambda *args, **kwargs: pytest.fail("a phase was trained"))
    if tower == "vit":
        method, model, message = CoFT(head_input="pre_proj"), clip, "a text head lives in the projected space"
    else:
        method, model, message = CoFT(preset="paper", head_input="pre_proj"), load_clip("RN50-quickgelu", "random"), "projects inside its attention pooling"
    with pytest.raises(ValueError, match=message):
        method.fit(model, task, progress=False)


def test_models_of_one_weights_file_differ_by_architecture_and_pixels(clip):
    "RN50 and RN50-quickgelu have the same tensors and other features."
    other = lambda **change: FrozenCLIP(clip.model, clip.tokenizer, **dict(name=clip.name, pretrained=clip.pretrained, weights_sha256=clip.weights_sha256, mean=clip.mean.flatten().tolist(), std=clip.std.flatten().tolist()) | change)
    assert other().model_sha256 == clip.model_sha256
    assert len({clip.model_sha256, other(name="embedded-quickgelu").model_sha256, other(mean=(0.4, 0.5, 0.6)).model_sha256, other(std=(0.3, 0.3, 0.3)).model_sha256}) == 4
