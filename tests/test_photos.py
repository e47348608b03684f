"Small photographs: an open vocabulary, the model `photos`, what pre-training takes, tasks from tables; and the whole page on made-up data."
import io
import json
import shutil
import zipfile
from dataclasses import replace

import numpy as np
import open_clip
import pandas as pd
import papermill
import pytest
import torch
import torch.nn.functional as F
from coft import load_task
from coft.clip import MERGES, PHOTO_MODEL, CompactTokenizer, PromptEncoder, build_embedded, load_clip, open_vocabulary, tokenize, weights_digest, zero_shot_head
from coft.contrast import ContrastView
from coft.core import generator
from coft.data import TASKS, ArrayImages, Augmentation
from coft.datasets import CIFAR_CROP, DATASETS, SMALL_TEMPLATES, dataset_task, held_out_classes, only_classes, read_descriptions, read_tables
from coft.experiment import Parameters, run_variants
from coft.pages import what_can_run
from coft.pretrain import Captions, ImageTraining, KeepPatches, blotted, caption_features, contrastive_loss, save_half, spread, without_mention, zero_shot_accuracy
from coft.protocol import get_method
from coft.trainer import Schedule, train
from helpers import QUICK, QUICK_PLUS, REAL, ROOT, message_of, real, same_tensors
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from safetensors.torch import load_file, save_file

CLIPS = SimpleTokenizer()


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    "No data root of the user's, and nothing remembered outside the test."
    monkeypatch.delenv("DATA_ROOT", raising=False)
    monkeypatch.setenv("COFT_CACHE", str(tmp_path / "cache"))


# ---- the open vocabulary

ANYTHING = ["a photo of a cat.", "An  armadillo's burrow, 1.5 m DEEP!", "supercalifragilisticexpialidocious", "été à Zürich", "猫とロケット", "\U0001f680\U0001f469\u200d\U0001f680 fly", "<>{}[]~^|\\ @#%&*_-+=", "x" * 30, "0123456789", ""]


@pytest.fixture(scope="module")
def vocabulary():
    return open_vocabulary(context_length=48)


@pytest.mark.parametrize("text", ANYTHING, ids=range(len(ANYTHING)))
def test_any_text_is_written_and_read_back(vocabulary, text):
    ids, clips = vocabulary.encode(text), CLIPS
    assert all(0 <= i < vocabulary.sot_token_id for i in ids)
    assert vocabulary.decode(ids) == clips.decode(clips.encode(text))
    assert "".join(vocabulary.decode(ids).split()) == "".join(text.lower().split())


def test_every_character_of_the_plane_is_in_range(vocabulary):
    text = "".join(map(chr, [*range(0x20, 0xd800, 7), *range(0xe000, 0x11000, 11)]))
    ids = vocabulary.encode(text)
    assert len(ids) > 5000 and max(ids) < vocabulary.sot_token_id and min(ids) >= 0


def test_common_words_stay_one_piece(vocabulary):
    words = "a photo of the and with in on small big good bad black white cat dog bird ship truck horse car house water red green blue round long wings tree".split()
    assert [w for w in words if len(vocabulary.encode(w)) > 1] == []
    assert len(vocabulary.encode("armadillo")) > 1


def test_pieces_keep_clips_numbers_and_the_end_is_the_largest(vocabulary):
    clips = CLIPS
    assert vocabulary.encode("a photo of a cat.") == clips.encode("a photo of a cat.")
    assert vocabulary.eot_token_id == vocabulary.sot_token_id + 1 == len(vocabulary.kept) - 1 == 512 + MERGES + 1
    tokens = tokenize(vocabulary, ["a photo of a cat.", "cat"])
    assert tokens.argmax(1).tolist() == [7, 2] and tokens[0, 0] == vocabulary.sot_token_id


@pytest.mark.parametrize("text", ANYTHING, ids=range(len(ANYTHING)))
def test_with_all_merges_it_is_clips_tokenizer(text):
    whole = open_vocabulary(77, merges=49408 - 512 - 2)
    assert whole.encode(text) == CLIPS.encode(text) and len(whole.kept) == 49408


def test_fewer_merges_give_more_pieces_of_the_same_text(vocabulary):
    few = open_vocabulary(48, merges=500)
    assert len(few.encode("a golden retriever")) > len(vocabulary.encode("a golden retriever"))
    assert few.decode(few.encode("a golden retriever")) == vocabulary.decode(vocabulary.encode("a golden retriever"))


def test_the_closed_vocabulary_is_as_it_was(clip):
    kept = json.loads((ROOT / "coft/embedded/vocabulary.json").read_text())
    assert isinstance(clip.tokenizer, CompactTokenizer) and clip.tokenizer.merges is None and clip.tokenizer.kept == sorted(kept)
    assert clip.tokenizer.decode(clip.tokenizer.encode("a photo of the digit three.")) == "a photo of the digit three . "
    assert "does not know" in message_of(clip.tokenizer.encode, "armadillo")


# ---- the model

@pytest.fixture(scope="module")
def net():
    "The architecture of the photo model with random weights of another seed, and its tokenizer."
    return build_embedded(f"coft-{PHOTO_MODEL}", seed=3)


@pytest.fixture(scope="module")
def random_photos():
    return load_clip(PHOTO_MODEL, "random")


def test_the_architecture_is_small_and_has_room_for_prompts(random_photos):
    assert sum(p.numel() for p in random_photos.model.parameters()) <= 6e6
    assert (random_photos.image_size, random_photos.preset, random_photos.name, random_photos.pretrained) == (32, "photos", "photos", "random")
    assert random_photos.mean.flatten().tolist() == random_photos.std.flatten().tolist() == [0.5] * 3
    assert len(random_photos.tokenizer.kept) == random_photos.model.vocab_size
    prompts = PromptEncoder(random_photos, ["magnetic compass", "a small armadillo with nine bands of leathery plates around its body"], n_context=16)
    context = torch.randn(1, 16, random_photos.model.transformer.width, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(prompts(context), prompts.plain(context), atol=1e-5)


def test_settings_of_another_model_are_not_taken_in_silence(random_photos, task, monkeypatch):
    monkeypatch.setattr("coft.protocol.PRESET_NAMES", ("paper", "embedded"))
    for method in ("coft", "coft-phase1", "top-k", "craft"):
        message = message_of(get_method(method).fit, random_photos, task, progress=False)
        assert all(part in message for part in ("'photos'", "presets/photos.json", "preset='paper' or 'embedded'")), message
    assert get_method("zero-shot").settings_for("photos") == get_method("zero-shot").settings_for("paper"), "there is nothing to choose"
    named = get_method("top-k", preset="embedded")
    assert named.settings_for("photos") == named.settings_for("embedded") != get_method("top-k").settings_for("paper")
    assert "preset: 'photos' is not known" in message_of(get_method, "coft", preset="photos")


def test_a_preset_is_there_as_soon_as_its_file_is(tmp_path, monkeypatch):
    (tmp_path / "photos.json").write_text('{"top-k": {"top_k": 5}}')
    monkeypatch.setattr("coft.protocol.PRESETS", tmp_path)
    monkeypatch.setattr("coft.protocol.PRESET_NAMES", ("paper", "photos"))
    assert get_method("top-k").settings_for("photos").top_k == get_method("top-k", preset="photos").settings_for("paper").top_k == 5
    assert get_method("coft").settings_for("photos") == get_method("coft").settings_for("paper"), "what the file does not name is the paper's"


def test_no_weights_of_it_are_in_the_package():
    assert not (ROOT / "coft/embedded/coft-photos.safetensors").exists()
    for given in (None, "nowhere.safetensors", 3):
        message = message_of(load_clip, PHOTO_MODEL, given)
        assert "pretraining_photos.ipynb" in message and "path" in message and "'random'" in message and (str(given) in message or given is None)


def test_a_checkpoint_comes_back(net, tmp_path):
    path = tmp_path / "photos.safetensors"
    stored = save_half(net[0], path)
    clip = load_clip(PHOTO_MODEL, path)
    assert clip.weights_sha256 == weights_digest(net[0]) and clip.pretrained == str(path) and stored["bytes"] == path.stat().st_size < 12e6
    assert all(v.dtype == torch.float16 for v in load_file(path).values())
    assert load_clip(PHOTO_MODEL, str(path), mean=(0.4, 0.4, 0.4)).model_sha256 != clip.model_sha256
    assert "only a local checkpoint" in message_of(load_clip, PHOTO_MODEL, "random", std=(1, 1, 1))


@pytest.mark.parametrize("change, parts", [
    (lambda w: w | {"visual.proj": torch.zeros(192, 7)}, ["1 shapes differ", "visual.proj is expected as [192, 192] and found as [192, 7]"]),
    (lambda w: {k: v for k, v in w.items() if k != "ln_final.bias"}, ["expected are missing: ln_final.bias"]),
    (lambda w: w | {"head.weight": torch.zeros(2)}, ["found are unknown: head.weight"]),
], ids=["shape", "missing", "unknown"])
def test_a_checkpoint_that_does_not_fit_is_refused(net, tmp_path, change, parts):
    path = tmp_path / "other.safetensors"
    save_file({k: v.contiguous() for k, v in change(net[0].state_dict()).items()}, path)
    message = message_of(load_clip, PHOTO_MODEL, path)
    assert all(p in message for p in [*parts, "does not fit 'photos'", str(path)]), message


def test_weights_of_another_model_and_no_weights_at_all_are_refused(tmp_path):
    assert "shapes differ" in message_of(load_clip, PHOTO_MODEL, ROOT / "coft/embedded/coft-embedded.safetensors")
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html>")
    assert "cannot be read as a checkpoint" in message_of(load_clip, PHOTO_MODEL, tmp_path / "page.safetensors")


def test_images_of_another_size_are_refused(random_photos, clip):
    assert "images of 24 x 24 were given; 'photos' takes 32 x 32" in message_of(random_photos.image_features, torch.zeros(1, 3, 24, 24, dtype=torch.uint8))
    assert "images of 32 x 30 were given; 'embedded' takes 24 x 24" in message_of(clip.image_features, torch.zeros(1, 3, 32, 30))
    assert random_photos.image_features(ArrayImages(np.zeros((1, 50, 40, 3), np.uint8)).batch([0], 32)).shape == (1, 192)


def test_any_word_can_be_classified(random_photos):
    assert zero_shot_head(random_photos, ["aeroplane", "猫"], "a photo of a {}.").shape == (2, 192)
    assert "would be cut" in message_of(random_photos.text_features, ["a very long description " * 20])


# ---- the loss

def test_the_loss_is_that_of_a_plain_restatement():
    rng = np.random.default_rng(0)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    v, t, label, scale = unit(rng.normal(size=(9, 6))), unit(rng.normal(size=(5, 6))), np.array([0, 0, 0, 1, 1, 3, 3, 3, 4]), 7.0
    to_text = to_image = right = 0.0
    for i, k in enumerate(label):
        scores = [scale * v[i] @ t[c] for c in range(5)]
        to_text -= scores[k] - np.log(sum(np.exp(s) for s in scores))
        right += max(range(5), key=lambda c: scores[c]) == k
    for c in (0, 1, 3, 4):
        scores = [scale * v[i] @ t[c] for i in range(9)]
        whole = np.log(sum(np.exp(s) for s in scores))
        own = [i for i in range(9) if label[i] == c]
        to_image -= sum(scores[i] - whole for i in own) / len(own) / 4
    found = contrastive_loss(*(torch.from_numpy(x) for x in (v, t, label)), torch.tensor(scale, dtype=torch.float64))
    assert float(found["loss"]) == pytest.approx((to_text / 9 + to_image) / 2, abs=1e-6)
    assert float(found["accuracy"]) == pytest.approx(right / 9)


def test_cut_captions_have_open_clips_features(random_photos):
    tokens = tokenize(random_photos.tokenizer, ["a photo of a cat.", "a long one, with a few more words than the first.", "cat"])
    expected = F.normalize(random_photos.model.encode_text(tokens), dim=-1)
    assert (caption_features(random_photos.model, tokens) - expected).abs().max() < 1e-5
    assert (caption_features(random_photos.model, tokens[:1, :9]) - expected[:1]).abs().max() < 1e-5


@pytest.mark.parametrize("effort, parts", [(0, 5), (20, 2), (10 ** 6, 1)])
def test_captions_encoded_in_parts_have_the_features_and_gradients_of_one_batch(net, monkeypatch, effort, parts):
    net, tokenizer = net
    tokens = tokenize(tokenizer, ["the longest of all of them, which names a goose and a dam", "a photo of a cat.", "a long one, with a few more words.", "cat", "a sports car", "dog"])
    lengths, attend = [], net.transformer.forward
    monkeypatch.setattr(net.transformer, "forward", lambda x, **more: (lengths.append(x.shape[1]), attend(x, **more))[1])
    monkeypatch.setattr("coft.pretrain.PART_EFFORT", {"cpu": effort})
    features = caption_features(net, tokens)
    whole = F.normalize(net.encode_text(tokens), dim=-1)
    gradient = lambda x: torch.autograd.grad(x[:, 0].sum(), net.token_embedding.weight)[0]
    assert (features - whole).abs().max() < 1e-5 and (gradient(features) - gradient(whole)).abs().max() < 1e-5
    assert len(lengths[:-1]) == parts and lengths[:-1] == sorted(set(lengths[:-1])), lengths


# ---- captions

NAMED = {n: (f"a photo of a {n}.", f"a small {n}.") for n in ("cat", "dog", "oak")}
TOLD = {"cat": ("whiskers and soft paws.",), "dog": ("a wet nose, and a tail that wags when its owner comes home from work in the evening.",)}


def test_captions_are_drawn_by_step_and_fall_back_to_names(vocabulary):
    captions = Captions(vocabulary, list(NAMED), [NAMED, TOLD], shares=[1, 3], longest=16)
    assert captions.left_out == 1 and len(captions) == 3
    texts = [[vocabulary.decode(row[1:row.argmax()].tolist()) for row in captions.draw(generator(0, "captions", s))] for s in range(60)]
    again = [[vocabulary.decode(row[1:row.argmax()].tolist()) for row in captions.draw(generator(0, "captions", s))] for s in range(60)]
    assert texts == again
    cats, dogs, oaks = zip(*texts)
    assert set(cats) == {"a photo of a cat . ", "a small cat . ", "whiskers and soft paws . "}
    assert set(dogs) == {"a photo of a dog . ", "a small dog . "} and set(oaks) == {"a photo of a oak . ", "a small oak . "}
    assert 30 < sum("whiskers" in c for c in cats) < 58
    assert captions.digest() != Captions(vocabulary, list(NAMED), [NAMED, TOLD], shares=[1, 1], longest=16).digest()


def test_a_class_without_any_text_is_named(vocabulary):
    assert "1 of 4 classes have no text of the first kind with at most 48 tokens, the first being 'elm'" in message_of(Captions, vocabulary, [*NAMED, "elm"], [NAMED, TOLD], [1, 1])


def test_sentences_that_name_a_kept_out_class_are_left_out():
    own = {"sports car": ["sports car"], "swan": ["swan", "cygnet"]}
    texts = {"sports car": ("Faster than a school bus.", "A sports car is low.", "Sports cars and other cars."), "swan": ("Like a GOOSE but larger.", "It eats geese.", "mongoose-like", "It lives near school buses.")}
    left = without_mention(texts, own, ["school bus", "goose", "car"])
    assert left == {"sports car": ("A sports car is low.",), "swan": ("It eats geese.", "mongoose-like")}
    assert without_mention(texts, own, []) == texts
    assert blotted({"swan": ("A swan is white, the cygnet grey; swans sing.",)}, own)["swan"] == ("it is white, it grey; it sing.",)


def test_descriptions_by_synonym_and_missing_classes(tmp_path):
    (tmp_path / "d.json").write_text(json.dumps({"red panda": ["It is red."], "Goose": "It is grey.", "empty": []}))
    names, also = ["lesser panda", "goose", "reel"], {"lesser panda": ["lesser panda", "red-panda"]}
    message = message_of(read_descriptions, tmp_path / "d.json", names, also)
    assert message.startswith("d.json: no sentence for 'reel'; it describes 'red panda', 'goose'")
    assert read_descriptions(tmp_path / "d.json", names, also, missing="leave out") == {"lesser panda": ("It is red.",), "goose": ("It is grey.",)}
    assert "missing: 'skip' is not known" in message_of(read_descriptions, tmp_path / "d.json", names, missing="skip")
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        archive.write(tmp_path / "d.json", "inside/d.json")
    assert read_descriptions(zipfile.Path(tmp_path / "d.zip", "inside/d.json"), ["goose"]) == {"goose": ("It is grey.",)}
    assert "d.json: no sentence for 'reel'" in message_of(read_descriptions, zipfile.Path(tmp_path / "d.zip", "inside/d.json"), ["reel"])


# ---- a step

VIEW = ContrastView(Augmentation(crop=1.0), area=0.4, jitter=0.2, hue=0.02)
LABEL = np.arange(24) % 3
PICTURES = ArrayImages(np.random.default_rng(0).integers(256, size=(24, 32, 32, 3), dtype=np.uint8))


def fresh(n_other=0, keep=0.5, seed=0):
    "An untrained photo model of its own, in its training module."
    net, tokenizer = build_embedded(f"coft-{PHOTO_MODEL}", seed=0)
    other = Captions(tokenizer, ["elm", "fir"], [{n: [f"a photo of a {n}."] for n in ("elm", "fir")}, {"elm": ["it has round leaves."], "fir": ["it has needles."]}], [1, 1])
    return ImageTraining(net.train(), Captions(tokenizer, list(NAMED), [NAMED, TOLD], [1, 1]), VIEW, seed, keep, other=other, n_other=n_other)


def batch(rows=range(24)):
    u = torch.rand(24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return dict(pixels=PICTURES.batch(rows, 32), u=u[list(rows)], label=torch.from_numpy(LABEL)[list(rows)])


def test_a_view_is_a_function_of_the_images_own_number():
    module, whole, part = fresh(), batch(), batch([5, 2])
    seen = module.views(**whole)
    assert seen.shape == (24, 3, 32, 32) and -1 <= seen.min() < -0.5 and 0.5 < seen.max() <= 1
    assert torch.allclose(module.views(**part), seen[[5, 2]], atol=1e-6)
    assert not torch.allclose(module.views(whole["pixels"], whole["u"].flip(0), whole["label"]), seen, atol=0.1)


def test_numbers_out_of_one_stay_below_one():
    u = torch.cat([torch.rand(50000, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.tensor([0.0, 1 - 2**-53])])
    numbers = spread(u, 75)
    assert numbers.dtype == torch.float32 and numbers.min() >= 0 and numbers.max() < 1
    assert torch.equal(spread(u[7:9], 75), numbers[7:9])


def test_patches_are_kept_by_number_and_all_outside_training():
    x = torch.arange(5.0)[None, :, None].expand(2, -1, 3)
    keep = KeepPatches(0.5)
    assert torch.equal(keep(x), x)
    keep.numbers = torch.tensor([[0.9, 0.1, 0.5, 0.2], [0.1, 0.2, 0.3, 0.4]])
    assert keep(x)[:, :, 0].tolist() == [[0, 2, 4], [0, 1, 2]]
    with pytest.raises(ValueError, match="keep: 0 was given"):
        KeepPatches(0)
    module = fresh(keep=0.25)
    seen = []
    module.net.visual.ln_pre.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    module(**batch())
    module.net.visual(torch.zeros(1, 3, 32, 32))
    assert seen == [1 + module.n_patches // 4, 1 + module.n_patches]


def test_the_same_step_in_half_precision():
    whole, half = fresh(n_other=2), fresh(n_other=2)
    expected = whole(**batch())["loss"].detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = half(**batch())
    assert found["loss"].dtype == torch.float32 and found["loss"].item() == pytest.approx(expected.item(), rel=0.02)
    found["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in half.parameters() if p.grad is not None)


def test_texts_alone_add_a_loss_and_change_nothing_else():
    without, with_texts = fresh(), fresh(n_other=2)
    a, b = without(**batch()), with_texts(**batch())
    assert "text_loss" not in a and torch.equal(b["loss"], a["loss"] + b["text_loss"]) and torch.equal(a["accuracy"], b["accuracy"]) and b["text_loss"] > 0
    b["text_loss"].backward()
    assert with_texts.net.token_embedding.weight.grad.norm() > 0 and with_texts.net.visual.conv1.weight.grad is None
    assert "n_other: 3 was given" in message_of(fresh, n_other=3)


def learn(folder=None, max_steps=None, **options):
    module = fresh(**options)
    history = train(module, PICTURES, range(24), {"label": LABEL}, Schedule("adamw", lr=5e-4, epochs=3, batch_size=12, warmup=0.1), 32, None, 0, "pre-training", progress=False, folder=folder, max_steps=max_steps, content={"captions": module.texts.digest()})
    return module, [h["loss"] for h in history]


def test_it_learns_and_a_killed_run_ends_bit_identical(tmp_path):
    whole, losses = learn(n_other=2)
    assert losses[-1] < losses[0] and int(whole.step) == 6
    learn(tmp_path, max_steps=3, n_other=2)
    resumed, again = learn(tmp_path, n_other=2)
    assert again == losses and same_tensors(whole, resumed)
    finished, same = learn(tmp_path, n_other=2)
    assert same == losses and same_tensors(whole, finished)


# ---- tasks from tables

def encoded(value, size=(32, 32), kind="PNG"):
    "An image of one colour, encoded."
    file = io.BytesIO()
    Image.new("RGB", size, tuple(int(v) for v in np.broadcast_to(value, 3))).save(file, kind)
    return file.getvalue()


def write_tables(folder, classes, test="test", per_class=4, **options):
    "A packed data set in which class k has the grey value 10 k."
    folder.mkdir(parents=True)
    (folder / "classes.json").write_text(json.dumps(classes))
    label = np.repeat(np.arange(len(classes)), per_class)
    for split in ("train", test):
        pd.DataFrame({"image": [encoded(10 * k, **options) for k in label], "label": label, "class_name": "x", "path": "y"}).to_parquet(folder / f"{split}.parquet")
    return folder


def values(images, size=32):
    "Grey values of an image set over 10."
    return (images.batch(range(len(images)), size)[:, 0, size // 2, size // 2] / 10).round().int().tolist()


KINDS = ["airplane", "automobile", "bird"]


def test_a_packed_data_set_is_decoded_once_until_its_files_change(tmp_path):
    load = lambda name: load_task(name, tmp_path, check_counts=False)
    for folder in ("cifar10", "caltech101"):
        write_tables(tmp_path / folder, KINDS)
    first, other = load("cifar10"), load("caltech101-32")
    assert load("cifar10") is first and load("caltech101-32") is other and (first.name, other.name) == ("cifar10", "caltech101-32")
    assert "3 classes were found" in message_of(load_task, "cifar10", tmp_path), "what was kept without a check is not taken for checked"
    shutil.rmtree(tmp_path / "cifar10")
    write_tables(tmp_path / "cifar10", KINDS[::-1], per_class=5)
    again = load("cifar10")
    assert len(again.unlabelled) == 15 and again.class_names == KINDS[::-1] and again.data_sha256 != first.data_sha256
    shutil.rmtree(tmp_path / "cifar10")
    assert "is missing" in message_of(load, "cifar10", kind=FileNotFoundError)


def test_cifar10_from_tables(tmp_path):
    write_tables(tmp_path / "cifar10", KINDS)
    task = load_task("cifar10", data_root=tmp_path, check_counts=False)
    assert (task.name, task.class_names, task.template, task.augmentation) == ("cifar10", KINDS, "a photo of a {}.", CIFAR_CROP)
    assert values(task.unlabelled) == task.audit.train.tolist() == np.repeat(range(3), 4).tolist() and task.unlabelled.pixels.shape == (12, 32, 32, 3)
    assert task.templates == SMALL_TEMPLATES and len(task.llm_templates) == 8
    assert "classes were found, 10 are expected" in message_of(load_task, "cifar10", data_root=tmp_path)


def test_torchvisions_copy_comes_first(tmp_path):
    write_tables(tmp_path / "cifar10", KINDS)
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert "data_batch_1 is missing" in message_of(load_task, "cifar10", data_root=tmp_path, kind=FileNotFoundError)


def test_a_missing_folder_says_what_is_needed(tmp_path):
    for name, parts in (("cifar10", ["cifar-10-batches-py", str(tmp_path / "cifar10"), "classes.json, train.parquet and test.parquet"]),
                        ("caltech101-32", ["101_ObjectCategories", str(tmp_path / "caltech101"), "train.parquet"]),
                        ("photos-dev", [str(tmp_path / "tiny_imagenet32"), "train.parquet and val.parquet", "image and label"])):
        message = message_of(load_task, name, data_root=tmp_path, kind=FileNotFoundError)
        assert all(p in message for p in parts), message


def test_caltech_at_32_pixels_is_the_same_from_tables_and_from_coops_folder(tmp_path):
    write_tables(tmp_path / "a/caltech101", ["face", "car_side", "yin_yang"], size=(60, 40))
    tables, splits = read_tables(tmp_path / "a/caltech101"), {"val": []}
    for split, frame in (("train", tables.train), ("test", tables.test)):
        splits[split] = [[f"{split}_{i}.jpg", int(k), ["face", "car_side", "yin_yang"][k]] for i, k in enumerate(frame.label)]
        for (path, _, _), content in zip(splits[split], frame.image):
            place = tmp_path / "b/caltech-101/101_ObjectCategories" / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
    (tmp_path / "b/caltech-101" / DATASETS["caltech101-32"].split).write_text(json.dumps(splits))
    packed, folder = (load_task("caltech101-32", data_root=tmp_path / r, check_counts=False) for r in "ab")
    assert packed.class_names == folder.class_names == ["face", "car side", "yin yang"]
    assert packed.data_sha256 == folder.data_sha256 and packed.unlabelled.pixels.shape == (12, 32, 32, 3)
    whole = load_task("caltech101", data_root=tmp_path / "b", check_counts=False)
    assert torch.equal(whole.unlabelled.batch(range(12), 32), folder.unlabelled.batch(range(12), 32))


def test_held_out_classes_are_those_that_pre_training_does_not_see(tmp_path):
    names = [{"name": f"kind_{k}", "synonyms": f"kind {k}"} for k in range(20)]
    write_tables(tmp_path / "tiny_imagenet32", names, test="val", per_class=2)
    held_out, tables = held_out_classes(20), read_tables(tmp_path / "tiny_imagenet32")
    task = load_task("photos-dev", data_root=tmp_path, check_counts=False)
    assert len(held_out) == 2 and task.class_names == [f"kind {k}" for k in held_out]
    assert values(task.unlabelled) == np.repeat(held_out, 2).tolist() and task.audit.test.tolist() == [0, 0, 1, 1]
    seen = only_classes(tables.train, np.setdiff1d(np.arange(20), held_out))
    assert sorted(set(seen.label)) == list(range(18)) and len(seen) == 36
    assert len(held_out_classes(200)) == 20 and (held_out_classes(200) == held_out_classes(200)).all() and len(held_out_classes(3)) == 2


def test_a_broken_row_takes_its_label_with_it(tmp_path):
    folder = write_tables(tmp_path / "cifar10", KINDS, per_class=2)
    frame = pd.read_parquet(folder / "train.parquet")
    frame.at[1, "image"] = frame.image[1][:40]
    frame.to_parquet(folder / "train.parquet")
    task = load_task("cifar10", data_root=tmp_path, check_counts=False)
    assert [name for name, _ in task.quarantine] == ["row 1 of the training table"]
    assert task.audit.train.tolist() == values(task.unlabelled) == [0, 1, 1, 2, 2]


@pytest.mark.parametrize("change, kind, expected", [
    (lambda f: (f / "classes.json").unlink(), FileNotFoundError, "classes.json is missing"),
    (lambda f: (f / "test.parquet").unlink(), FileNotFoundError, "test.parquet or val.parquet"),
    (lambda f: (f / "classes.json").write_text('[{"wnid": "n1"}, "dog", "cat"]'), ValueError, "the class at position 0 has no name"),
    (lambda f: (f / "classes.json").write_text('["dog", "cat"]'), ValueError, "label 2 was given; with 2 class names"),
    (lambda f: (f / "train.parquet").write_bytes(b"no table"), ValueError, "train.parquet cannot be read"),
    (lambda f: pd.DataFrame({"picture": [b""], "label": [0]}).to_parquet(f / "train.parquet"), ValueError, "column of train.parquet: 'image' is not known"),
], ids=["no names", "no test table", "nameless", "label", "no table", "column"])
def test_tables_that_cannot_be_used(tmp_path, change, kind, expected):
    change(write_tables(tmp_path / "cifar10", KINDS))
    assert expected in message_of(load_task, "cifar10", data_root=tmp_path, check_counts=False, kind=kind)


def test_images_of_another_size_in_a_table_are_resized_as_clip_does(tmp_path):
    folder = write_tables(tmp_path / "cifar10", KINDS, per_class=1, size=(48, 30))
    task = load_task("cifar10", data_root=tmp_path, check_counts=False)
    from coft.images import clip_view
    expected = np.stack([clip_view(b, 32) for b in pd.read_parquet(folder / "train.parquet").image])
    assert np.array_equal(task.unlabelled.pixels, expected)


# ---- real data

def test_the_templates_are_clips_own_for_cifar():
    stored = json.loads(real("text", "clip_classes_templates.json").read_text())
    assert list(SMALL_TEMPLATES) == stored["CIFAR10"]["templates"]


@pytest.mark.parametrize("name", ["photos-dev", "caltech101-32"])
def test_real_tasks_have_their_counts(name):
    real(DATASETS[name].tables, "train.parquet")
    task = load_task(name, data_root=REAL)
    assert task.quarantine == () and task.unlabelled.pixels.shape[1:] == (32, 32, 3) and len(set(task.audit.train)) == len(task.class_names)
    if name == "photos-dev":
        assert np.bincount(task.audit.train).tolist() == [500] * 20 and np.bincount(task.audit.test).tolist() == [50] * 20


def test_real_cifar10_keeps_its_pixels(tmp_path):
    "Its test table twice, which saves ten seconds."
    (tmp_path / "cifar10").mkdir()
    for split in ("train", "test"):
        (tmp_path / f"cifar10/{split}.parquet").symlink_to(real("cifar10", "test.parquet").resolve())
    (tmp_path / "cifar10/classes.json").write_text(real("cifar10", "classes.json").read_text())
    task = load_task("cifar10", data_root=tmp_path, check_counts=False)
    stored = pd.read_parquet(real("cifar10", "test.parquet"), columns=["image"]).image
    assert np.bincount(task.audit.test).tolist() == [1000] * 10 and task.class_names[0] == "airplane"
    assert all(np.array_equal(task.test.pixels[i], np.asarray(Image.open(io.BytesIO(stored[i])))) for i in (0, 4321, 9999))


# ---- the page

THINGS = ["goose", "lemon", "torch", "barn", "kimono", "snail", "acorn", "desk", "bee", "sock", "pole", "dam"]


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    "Twelve made-up classes of six images, descriptions of some of them and of other things, and both tasks of the report."
    root = tmp_path_factory.mktemp("data")
    write_tables(root / "tiny_imagenet32", [{"name": n, "synonyms": f"{n}, {n} thing"} for n in THINGS], test="val", per_class=6)
    write_tables(root / "cifar10", KINDS, per_class=2)
    write_tables(root / "caltech101", ["face", "car_side"], per_class=2, size=(50, 40))
    held_out = THINGS[held_out_classes(12)[0]]
    (root / "text").mkdir()
    for archive, inside, sentences in (("cupl.zip", "all_prompts/base_prompts/imagenet_prompts_base.json", lambda n: [f"A {n} is a thing.", f"The {n} is larger than a {held_out}."]),
                                       ("menon_descriptors.zip", "descriptors/descriptors_imagenet.json", lambda n: ["made of wood", "often round"])):
        with zipfile.ZipFile(root / "text" / archive, "w") as file:
            file.writestr(inside, json.dumps({n: sentences(n) for n in [*THINGS[2:], "airliner", "sorrel", f"{held_out} nest"]}))
    return root


PAGE = ROOT / "nbs/pretraining_photos.ipynb"


def check_parameters(monkeypatch, **parameters):
    "Run the page up to the cell behind its parameters, which papermill would inject between the two."
    monkeypatch.chdir(ROOT / "nbs")
    cells = ["".join(c["source"]) for c in json.loads(PAGE.read_text())["cells"] if c["cell_type"] == "code"]
    checks = next(i for i, c in enumerate(cells) if "parameters_from(" in c)
    namespace = {}
    for cell in cells[:checks]:
        exec(cell, namespace)
    namespace.update(parameters)
    exec(cells[checks], namespace)
    return namespace


def test_the_page_makes_weights_that_load(data_root, tmp_path):
    papermill.execute_notebook(PAGE, tmp_path / "page.ipynb", kernel_name="python3", progress_bar=False, cwd=ROOT / "nbs",
                               parameters=dict(data_root=str(data_root), out_dir=str(tmp_path / "made"), max_steps=3, check_counts=False, device="cpu", text_only=2, seed=5))
    card = json.loads((tmp_path / "made/photos.card.json").read_text())
    path = tmp_path / "made/photos.safetensors"
    clip = load_clip(PHOTO_MODEL, path)
    assert (card["steps"], card["seed"], card["recipe"], card["text_only"], card["seconds"], card["images"]) == (3, 5, "cpu", 2, None, 60)
    assert card["bytes"] == path.stat().st_size and card["command"].endswith("-p seed 5 -p max_steps 3 -p text_only 2") and np.isfinite(card["first_losses"]).all()
    assert set(card["held_out"]) == {THINGS[k] for k in held_out_classes(12)}
    assert set(card["zero_shot_accuracy"]) == {"photos-dev", "cifar10", "caltech101-32"}
    task = load_task("cifar10", data_root=data_root, check_counts=False)
    assert zero_shot_accuracy(clip, task) == card["zero_shot_accuracy"]["cifar10"]
    assert weights_digest(build_embedded(f"coft-{PHOTO_MODEL}", seed=5)[0]) != clip.weights_sha256
    assert [f.parent.name for f in (ROOT / "coft").rglob("photos.*")] == ["presets"], "its settings alone come with the package"


@pytest.mark.parametrize("wrong, kind, expected", [
    ({"data_root": "nowhere"}, FileNotFoundError, "lacks tiny_imagenet32, text/cupl.zip, text/menon_descriptors.zip"),
    ({"max_step": 3}, ValueError, "parameter: 'max_step' is not known. Did you mean 'max_steps'"),
    ({"out_dir": "coft/embedded"}, ValueError, "lies in the package"),
    ({"seed": -1}, ValueError, "seed: -1 was given"),
    ({"threads": 0.5}, ValueError, "threads: 0.5 was given"),
    ({"device": "gpu"}, ValueError, "device: 'gpu' is not known"),
    ({"name_held_out": True}, ValueError, "with text_only=0 nothing is learned from texts alone. Give text_only as well"),
    ({"name_held_out": 1, "text_only": 2}, ValueError, "name_held_out: 1 was given; true or false is needed"),
], ids=lambda v: next(iter(v)) if isinstance(v, dict) else "")
def test_the_page_refuses_before_it_computes(data_root, tmp_path, monkeypatch, wrong, kind, expected):
    message = message_of(check_parameters, monkeypatch, kind=kind, **{"data_root": str(data_root), "out_dir": str(tmp_path / "made")} | wrong)
    assert expected in message and not (tmp_path / "made").exists()


def texts_alone(monkeypatch, data_root, tmp_path, **parameters):
    "Run the page up to its texts without images, and read them back: those of images, those of other things, and the names of these."
    cells = ["".join(c["source"]) for c in json.loads(PAGE.read_text())["cells"] if c["cell_type"] == "code"]
    first = next(i for i, c in enumerate(cells) if "parameters_from(" in c)
    space = check_parameters(monkeypatch, data_root=str(data_root), out_dir=str(tmp_path / "made"), report=[], **parameters)
    for cell in cells[first + 1:1 + next(i for i, c in enumerate(cells) if "def other_texts" in c)]:
        exec(cell, space)
    read = lambda captions: [space["tokenizer"].decode(row[1:row.argmax()].tolist()) for row in captions.tokens]
    return read(space["captions"]), read(space["other"]), [space["all_names"][k][0] for k in space["held_out"]]


def test_kept_out_names_are_read_and_never_seen(data_root, tmp_path, monkeypatch):
    "With name_held_out their names and what is told of them are among the texts without images, and still in no caption."
    shown, other, held_out = texts_alone(monkeypatch, data_root, tmp_path, text_only=2)
    assert held_out and not any(n in text.split() for n in held_out for text in [*shown, *other])
    again, named, _ = texts_alone(monkeypatch, data_root, tmp_path, text_only=2, name_held_out=True)
    described = [n for n in held_out if n in THINGS[2:]]
    assert again == shown and described
    for n in described:
        assert f"a photo of a {n} . " in named and f"a photo of a {n} thing . " in named, "all its names"
    assert any("it is a thing" in text for text in named), "the description does not give the name away"


def test_the_data_are_found_by_the_environment(data_root, tmp_path, monkeypatch):
    monkeypatch.setenv("COFT_TEST_DATA", str(data_root))
    found = check_parameters(monkeypatch, out_dir=str(tmp_path / "made"))
    assert found["root"] == data_root and found["path"] == tmp_path.resolve() / "made/photos.safetensors"


def test_no_module_but_those_of_clip_and_data_names_the_model():
    for path in (ROOT / "coft").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.name not in ("clip.py", "datasets.py", "_modidx.py"):
            pages = 1 if path.name == "experiment.py" else 0 # the page of this name
            assert "PHOTO_MODEL" not in text and text.count('"photos"') == pages and "photos-dev" not in text, path.name


def test_open_clip_knows_the_configuration_only_under_its_own_prefix(random_photos):
    assert f"coft-{PHOTO_MODEL}" in open_clip.list_models() and PHOTO_MODEL not in open_clip.list_models()


# ---- the page of results

def display_page(**given):
    "Run the page of results in this process; return what it displays, Markdown as text and figures as they are."
    space, displayed = {}, []
    for cell in json.loads((ROOT / "nbs/tables/photos.ipynb").read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        try:
            exec("".join(cell["source"]), space)
        except SystemExit:
            break
        if "parameters" in cell["metadata"].get("tags", []):
            space.update(given)
        space["display"] = lambda *objects: displayed.extend(getattr(o, "data", o) for o in objects)
    return displayed, space


QUICK_RUNS = {"top-k": dict(top_k=4, epochs=1), "coft": {k: v for k, v in QUICK.items() if k != "preset"}, "coft+": {k: v for k, v in QUICK_PLUS.items() if k != "preset"}, "craft": dict(budget=40), "coop": dict(epochs=1)}


def test_the_page_of_results_says_what_is_missing(tmp_path, monkeypatch):
    displayed, space = display_page(data_root=str(tmp_path), out_dir=str(tmp_path / "out"))
    table, = displayed
    assert "| model photos | pretrained: nothing was given for 'photos'" in table and "pretraining_photos.ipynb" in table
    assert f"| task cifar10 | CIFAR-10: {tmp_path / 'cifar-10-batches-py'} is missing" in table and "| task caltech101-32 |" in table
    assert table.count("\n") == 5 and "runs" not in space and not (tmp_path / "out").exists()


def test_without_settings_of_its_own_only_zero_shot_runs(monkeypatch):
    "The embedded settings are not taken silently; one row names all methods that lack settings."
    monkeypatch.setattr("coft.protocol.PRESET_NAMES", ("paper", "embedded"))
    kept, ready, rest = what_can_run(["zero-shot", "coft", "craft"], Parameters(model=PHOTO_MODEL, pretrained="random", tasks="glyphs-toy"))
    assert kept == ["zero-shot"] and ready.tasks == ["glyphs-toy"]
    assert rest["not run"].tolist() == ["coft, craft"] and "the model takes the settings 'photos', which nobody has chosen yet" in rest.why[0]
    assert what_can_run(["coft"], Parameters(model=PHOTO_MODEL, pretrained="random", tasks="glyphs-toy"), settings=dict(preset="embedded"))[0] == ["coft"]


def test_the_page_of_results_runs(data_root, tmp_path, monkeypatch):
    "Every method on made-up CIFAR-10 with random weights; the labels beside those of the embedded model, which takes quick settings."
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets/embedded.json").write_text(json.dumps({"coft": QUICK_RUNS["coft"]}))
    monkeypatch.setattr("coft.protocol.PRESETS", tmp_path / "presets")
    write_tables(tmp_path / "data/cifar10", KINDS, per_class=12)
    monkeypatch.setitem(TASKS, "cifar10", lambda data_root: dataset_task("cifar10", data_root, check_counts=False))
    displayed, space = display_page(tasks="cifar10", pretrained="random", preset="paper", unlabelled=30, seeds=[0], shots=2, settings=QUICK_RUNS, beside="glyphs-toy", data_root=str(tmp_path / "data"), out_dir=str(tmp_path / "out"), device="cpu")
    texts, figures = [d for d in displayed if isinstance(d, str)], [d for d in displayed if not isinstance(d, str)]
    assert "30 unlabelled images (at most 30, drawn at random once" in texts[1] and "36 test images, seeds [0]" in texts[1]
    assert all(f"| cifar10 | {m} |" in texts[2] for m in space["methods"]) and "gain over zero-shot" in texts[2] and "difference from coft" in texts[3]
    assert len(figures) == 2 + 5, "two of accuracies and five of labels; no pictures of the images"
    told = space["told"]([r for r in space["runs"] if r["task"] == "cifar10"], space["data"]["cifar10"])
    coft, = (r["pseudo_labels"] for r in space["runs"] if (r["task"], r["method"]) == ("cifar10", "coft"))
    assert told["unlabelled images (number)"] == 30 and told["S* (number)"] == 12
    assert told["accepted, of all"] == pytest.approx((coft["accepted_share_1"] + coft["accepted_share_2"]) / 2, abs=0.1)
    assert {(r["task"], r["model"]) for r in space["runs"]} == {("cifar10", "photos"), ("glyphs-toy", "embedded")}


def test_with_a_checkpoint_of_another_model_nothing_runs():
    path = str(ROOT / "coft/embedded/coft-embedded.safetensors")
    _, ready, rest = what_can_run(["zero-shot"], Parameters(model=PHOTO_MODEL, pretrained=path, tasks="glyphs-toy"))
    assert ready is None and rest["not run"].tolist() == ["model photos"] and "does not fit 'photos'" in rest.why[0] and path in rest.why[0]


# ---- a part of the unlabelled images

def test_a_job_may_keep_some_of_the_unlabelled_images(task, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "toy", lambda: task)
    p = Parameters(tasks="toy", out_dir=str(tmp_path), device="cpu", progress=False, unlabelled=20)
    some, again = p.load("toy"), p.load("toy")
    pixels, whole = some.unlabelled.batch(range(20), 24), task.unlabelled.batch(range(72), 24)
    places = [int((whole == image).flatten(1).all(1).nonzero()[0]) for image in pixels]
    assert len(set(places)) == 20 and some.audit.train.tolist() == task.audit.train[places].tolist() and len(some.test) == 40
    assert some.data_sha256 == again.data_sha256 != task.data_sha256
    assert replace(p, unlabelled=500).load("toy").data_sha256 == task.data_sha256, "a task with fewer keeps all"
    record, = run_variants({"zero-shot": ("zero-shot", {})}, p, say=lambda *a, **k: None)
    assert (record["n_train"], record["n_test"]) == (20, 40)


# ---- the page of settings

def test_settings_are_not_chosen_where_names_mean_nothing(tmp_path, monkeypatch):
    "With random weights zero-shot answers are guesses, and the search says so before it starts."
    names = [{"name": f"kind {k}"} for k in range(20)]
    write_tables(tmp_path / "tiny_imagenet32", names, test="val", per_class=2)
    cells = ["".join(c["source"]) for c in json.loads((ROOT / "nbs/tuning_photos.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    space = {}
    for cell in cells[:2]:
        exec(cell, space)
    space.update(pretrained="random", data_root=str(tmp_path), out_dir=str(tmp_path / "out"), least=2.5)
    monkeypatch.setattr(Parameters, "load", lambda p, t: load_task(t, p.data_root, check_counts=False))
    message = message_of(exec, cells[2], space)
    assert "guessing in 50.0 %; at least 125.0 % are needed" in message and "name_held_out" in message and not (tmp_path / "out").exists()
    exec(cells[3], space)
    for method, search in space["searches"].items():
        get_method(method, **search.here | {k: v[0] for k, v in search.grid.items()})
        for change in search.changes:
            get_method(method, **change)
    assert len({len(s.changes) for s in space["searches"].values()}) == 1
