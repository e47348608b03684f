"The estimators: scikit-learn's checks that need no table, the others restated with images, and every form of input."
import io
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from coft import CoFTClassifier, CoFTPlusClassifier, CraFTClassifier, VLMClassifier
from coft.blackbox import BlackBoxVLM
from coft.data import ArrayImages, SomeImages
from coft.estimator import ImageClassifier
from coft.protocol import METHODS, get_method
from coft.saved import save_fitted
from helpers import QUICK, message_of
from PIL import Image
from sklearn import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import estimator_checks, get_tags

ESTIMATORS = [CoFTClassifier, CoFTPlusClassifier, CraFTClassifier, VLMClassifier]
# checks of scikit-learn 1.3 and later that make no table of numbers; some have other names in some releases
WITHOUT_TABLE = ["check_estimator_cloneable", "check_estimator_tags_renamed", "check_valid_tag_types", "check_estimator_repr", "check_no_attributes_set_in_init",
                 "check_do_not_raise_errors_in_init_or_set_params", "check_mixin_order", "check_parameters_default_constructible", "check_get_params_invariance", "check_set_params"]
PROBE = dict(shots=4, folds=1)
FEW_STEPS = {k: v for k, v in QUICK.items() if k != "preset"}


@pytest.fixture(scope="module")
def X(task):
    return task.unlabelled.pixels


@pytest.fixture(scope="module")
def y(task):
    return task.audit.train


@pytest.fixture(scope="module")
def like(clip, task):
    "Parameters with which an estimator does what the method does with the task."
    return dict(class_names=task.class_names, clip=clip, template=task.template, augmentation=task.augmentation)


@pytest.fixture(scope="module")
def zero_shot(X, like):
    return VLMClassifier(method="zero-shot", **like).fit(X)


@pytest.fixture(scope="module")
def probe(X, y, like):
    return VLMClassifier(method="linear-probe", settings=PROBE, **like).fit(X, y)


# scikit-learn's own checks

@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("check", WITHOUT_TABLE)
def test_check_of_scikit_learn(check, estimator):
    function = getattr(estimator_checks, check, None)
    if function is None:
        pytest.skip(f"this scikit-learn has no {check}")
    function(estimator.__name__, estimator("ab"))


def test_most_checks_of_scikit_learn_run():
    assert sum(hasattr(estimator_checks, check) for check in WITHOUT_TABLE) >= 8


def test_tags_say_that_a_row_is_no_table_and_who_needs_labels():
    tags = get_tags(CoFTClassifier())
    assert tags.estimator_type == "classifier" and not tags.input_tags.two_d_array and tags.input_tags.three_d_array
    needs = {name for name in METHODS if get_tags(VLMClassifier(method=name)).target_tags.required}
    assert needs == {name for name, method in METHODS.items() if method.supervised} and "craft" in needs and "coft" not in needs


# The same with images

def test_fit_returns_the_estimator_and_leaves_parameters_alone(X, like):
    estimator = CoFTClassifier(settings=FEW_STEPS, preset="paper", **like)
    before, attributes = dict(estimator.get_params()), set(vars(estimator))
    assert estimator.fit(X) is estimator
    assert all(estimator.get_params()[k] is v for k, v in before.items())
    assert all(k.startswith("_") or k.endswith("_") for k in set(vars(estimator)) - attributes)


def test_predicting_changes_nothing(X, zero_shot):
    before = dict(vars(zero_shot))
    zero_shot.predict(X), zero_shot.predict_proba(X), zero_shot.score(X, np.zeros(len(X), int))
    assert all(vars(zero_shot)[k] is v for k, v in before.items()) and len(vars(zero_shot)) == len(before)


@pytest.mark.parametrize("call", ["predict", "predict_proba", "score", "save"])
def test_what_is_not_fitted_says_so(call, X, tmp_path):
    arguments = {"score": (X, [0] * len(X)), "save": (tmp_path,)}.get(call, (X,))
    with pytest.raises(NotFittedError):
        getattr(CoFTClassifier("ab"), call)(*arguments)


def test_a_clone_is_not_fitted_and_shares_the_frozen_model(zero_shot):
    again = clone(zero_shot)
    assert not hasattr(again, "fitted_") and again.clip is zero_shot.clip and again.method == "zero-shot"
    assert again.class_names == zero_shot.class_names and again.class_names is not zero_shot.class_names


def test_read_only_and_mapped_input(X, y, probe, like, tmp_path):
    np.save(tmp_path / "X.npy", X)
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    fitted = clone(probe).fit(mapped, y)
    assert (fitted.predict_proba(mapped) == probe.predict_proba(X)).all()


def test_fitting_twice_is_fitting_once(X, y, probe):
    once = probe.predict_proba(X)
    assert (clone(probe).fit(X, y).fit(X, y).predict_proba(X) == once).all()


def test_answers_depend_neither_on_order_nor_on_number(X, probe):
    P, order = probe.predict_proba(X), np.random.default_rng(0).permutation(len(X))
    assert np.allclose(probe.predict_proba(X[order]), P[order], atol=1e-6)
    assert np.allclose(np.concatenate([probe.predict_proba(X[i:i + 7]) for i in range(0, len(X), 7)]), P, atol=1e-6)
    assert np.allclose(probe.predict_proba(X[:1]), P[:1], atol=1e-6)


def test_probabilities_are_probabilities_and_predict_takes_the_largest(X, probe):
    P = probe.predict_proba(X)
    assert P.shape == (len(X), 4) and np.allclose(P.sum(1), 1, atol=1e-5) and (P >= 0).all()
    assert (probe.predict(X) == probe.classes_[P.argmax(1)]).all()


# Classes

def test_classes_are_sorted_names_or_indices(X, y, task, like):
    names = np.array(task.class_names)
    assert (np.sort(names) != names).any(), "the task's names are not in the order of the alphabet, so that this test means something"
    by_name, by_index, unnamed = (VLMClassifier(method="linear-probe", settings=PROBE, **like).fit(X, labels) for labels in (names[y], y, list(names[y])))
    assert by_name.classes_.tolist() == sorted(names) and by_index.classes_.tolist() == [0, 1, 2, 3]
    assert (by_name.predict(X) == names[by_index.predict(X)]).all() and (unnamed.predict(X) == by_name.predict(X)).all()
    assert (by_name.predict_proba(X) == by_index.predict_proba(X)[:, np.argsort(names)]).all()
    assert log_loss(names[y], by_name.predict_proba(X)) == pytest.approx(log_loss(y, by_index.predict_proba(X)), abs=1e-6)
    assert by_name.score(X, y) == by_name.score(X, names[y]) == by_index.score(X, names[y]) == (by_index.predict(X) == y).mean()
    assert by_name.score(X, [n.upper().replace(" ", "_") for n in names[y]]) == by_name.score(X, y)
    weight = np.arange(len(y))
    assert by_index.score(X, y, weight) == pytest.approx(np.average(by_index.predict(X) == y, weights=weight))


def test_without_labels_names_come_back(X, task, zero_shot):
    assert zero_shot.classes_.tolist() == sorted(task.class_names) and set(zero_shot.predict(X)) <= set(task.class_names)


def test_names_come_from_the_labels_where_none_are_given(X, y, task, like):
    names = np.array(task.class_names)
    estimator = VLMClassifier(method="zero-shot", **like | dict(class_names=None)).fit(X, names[y])
    assert estimator.fitted_.class_names == sorted(task.class_names)
    assert "the names of the classes are needed" in message_of(estimator.fit, X, y)
    assert "the names of the classes are needed" in message_of(estimator.fit, X)


def test_label_free_methods_do_not_look_at_labels(X, y, like):
    estimator = VLMClassifier(method="fpl", settings=dict(top_k=2, n_context=2, epochs=2), preset="paper", **like)
    P = clone(estimator).fit(X, y).predict_proba(X)
    assert (clone(estimator).fit(X, np.zeros(3, int)).predict_proba(X) == P).all()
    unlabelled = clone(estimator).fit(X)
    assert (unlabelled.predict_proba(X) == P[:, np.argsort(like["class_names"])]).all()
    with pytest.raises(PermissionError):
        unlabelled.task_.audit


def test_the_estimator_is_the_method(X, clip, task, like, y):
    "Same images, names, templates, settings and seed: the same numbers as through the protocol."
    direct = get_method("linear-probe", **PROBE).fit(clip, task, seed=5, progress=False)
    estimator = VLMClassifier(method="linear-probe", settings=PROBE, seed=5, **like).fit(X, y)
    assert (estimator.predict_proba(task.test) == direct.predict_proba(task.test)).all()


# Pipelines, cross-validation, grids

def test_inside_a_pipeline_and_cross_validation(X, y, probe):
    pipeline = make_pipeline(FunctionTransformer(lambda x: x[:, :, ::-1]), probe)
    direct = clone(probe).fit(X[:, :, ::-1], y).predict_proba(X[:, :, ::-1])
    assert (clone(pipeline).fit(X, y).predict_proba(X) == direct).all()
    names = np.array(probe.class_names)
    for labels in (y, names[y]):
        scores = [cross_val_score(pipeline, X, labels, cv=3, scoring=s) for s in (None, "accuracy")]
        assert len(scores[0]) == 3 and (scores[0] == scores[1]).all()
    assert cross_val_score(probe, list(X), y, cv=3).shape == cross_val_score(probe, torch.from_numpy(X), y, cv=3).shape == (3,)
    assert np.isfinite(cross_val_score(probe, X, names[y], cv=3, scoring="neg_log_loss")).all()


def test_a_grid_over_settings(X, y, probe):
    grid = GridSearchCV(probe, {"settings": [PROBE | dict(C=C) for C in (1e-9, 1.0)]}, cv=3).fit(X, y)
    assert grid.best_params_["settings"]["C"] == 1.0 and grid.best_estimator_.settings["C"] == 1.0


def test_a_black_box_is_not_copied(X, y, clip, like):
    box = BlackBoxVLM(clip)
    estimator = CraFTClassifier(settings=dict(shots=1, budget=8, population=4, intrinsic_dim=4), **like | dict(clip=box))
    clone(estimator).fit(X, y)
    assert box.n_prompt_queries == 8
    assert "requires y to be passed" in message_of(estimator.fit, X)


# Forms of input

class PyTorchSet:
    classes = None

    def __init__(self, X, y=None): self.X, self.y = X, y
    def __len__(self): return len(self.X)
    def __getitem__(self, i): return Image.fromarray(self.X[i]) if self.y is None else (Image.fromarray(self.X[i]), int(self.y[i]))


def encoded(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def files(X, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i, image in enumerate(X):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return folder


FORMS = {"list of arrays": lambda X, folder: list(X), "colour": lambda X, folder: np.repeat(X[..., None], 3, -1), "one channel": lambda X, folder: X[..., None],
         "floats to 1": lambda X, folder: X / 255, "16 bit": lambda X, folder: X.astype(np.uint16) * 257, "tensor": lambda X, folder: torch.from_numpy(X)[:, None],
         "colour tensor": lambda X, folder: torch.from_numpy(X)[:, None].repeat(1, 3, 1, 1), "float tensor": lambda X, folder: torch.from_numpy(X) / 255,
         "pictures": lambda X, folder: [Image.fromarray(x) for x in X], "bytes": lambda X, folder: [encoded(x) for x in X], "folder": lambda X, folder: folder,
         "paths": lambda X, folder: sorted(map(str, folder.iterdir())), "array of paths": lambda X, folder: np.array(sorted(map(str, folder.iterdir()))),
         "column of paths": lambda X, folder: pd.Series(sorted(map(str, folder.iterdir())), index=range(5, 5 + len(X))),
         "table of paths": lambda X, folder: pd.DataFrame({"image": sorted(map(str, folder.iterdir()))}),
         "data set": lambda X, folder: PyTorchSet(X), "labelled data set": lambda X, folder: PyTorchSet(X, np.zeros(len(X))), "items of a data set": lambda X, folder: [PyTorchSet(X, X[:, 0, 0])[i] for i in range(len(X))],
         "image set": lambda X, folder: SomeImages(ArrayImages(X), range(len(X)))}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_images_gives_the_same_answers(form, X, files, zero_shot, like):
    given = FORMS[form](X, files)
    expected = zero_shot.predict_proba(X)
    assert np.allclose(zero_shot.predict_proba(given), expected, atol=2e-3), "resized by Pillow instead of torch, an image may differ by a grey level"
    order = np.argsort(like["class_names"]) if form == "labelled data set" else slice(None)
    assert np.allclose(clone(zero_shot).fit(given).predict_proba(X)[:, order], expected, atol=1e-6)


def test_a_data_set_brings_its_labels_and_names(X, y, task, like):
    data = PyTorchSet(X, y)
    data.classes = task.class_names
    estimator = VLMClassifier(method="linear-probe", settings=PROBE, **like | dict(class_names=None)).fit(data)
    assert estimator.fitted_.class_names == task.class_names and estimator.classes_.tolist() == [0, 1, 2, 3]
    assert estimator.score(data) == (estimator.predict(data) == y).mean() > 0.3


@pytest.mark.parametrize("given, said", [(5, "int was given"), ("nowhere", "no folder"), (np.zeros((4, 10)), "shape [4, 10]"), (np.zeros((2, 3, 8, 8), np.uint8), "channels last"),
                                         (np.full((2, 8, 8), -1.0), "can be shown"), (np.zeros((0, 8, 8), np.uint8), "shape [0, 8, 8]"), ([], "no images"), ([b"no image"], "none of the 1 images")])
def test_what_is_no_image_is_refused(given, said, zero_shot):
    assert said in message_of(zero_shot.predict_proba, given)


def test_broken_images_are_set_aside_in_fit_and_refused_in_predict(files, y, probe, tmp_path):
    folder = shutil.copytree(files, tmp_path / "images")
    (folder / "003.png").write_bytes(b"")
    fitted = clone(probe).fit(folder, y)
    assert len(fitted.task_.unlabelled) == len(y) - 1 and "1 files could not be read" in fitted.fitted_.messages[0]
    assert (fitted.task_.audit.train == np.delete(y, 3)).all()
    assert "1 of 72 images cannot be read" in message_of(fitted.predict, folder) and "003.png: the file is empty" in message_of(fitted.predict, folder)


@pytest.mark.parametrize("labels, said", [([0] * 5, "5 training labels for 72 images"), ([9] * 72, "label 9 was given"), (["cat"] * 72, "'cat' is none of")])
def test_wrong_labels_are_refused(labels, said, X, probe):
    assert said in message_of(clone(probe).fit, X, labels)


def test_wrong_parameters_are_refused_by_fit_alone(X, y, like):
    assert "method: 'upk'" in message_of(VLMClassifier(method="upk", **like).fit, X)
    assert "shotz" in message_of(VLMClassifier(method="linear-probe", settings=dict(shotz=1), **like).fit, X, y)
    assert "a list of names is needed" in message_of(CoFTClassifier("ab", clip=like["clip"]).fit, X)
    assert "no templates by a language model" in message_of(CoFTPlusClassifier(preset="paper", **like).fit, X)


# Saving

@pytest.mark.parametrize("indices", [True, False])
def test_saved_and_loaded(indices, X, y, task, like, clip, tmp_path):
    estimator = VLMClassifier(method="linear-probe", settings=PROBE, seed=2, **like).fit(X, y if indices else np.array(task.class_names)[y])
    loaded = VLMClassifier.load(estimator.save(tmp_path / "saved"), clip=clip)
    assert (loaded.predict_proba(X) == estimator.predict_proba(X)).all() and (loaded.predict(X) == estimator.predict(X)).all()
    assert (loaded.method, loaded.seed, loaded.class_names, loaded.template) == ("linear-probe", 2, task.class_names, task.template)
    assert loaded.settings == estimator.fitted_.settings
    copied = loaded.set_params(seed=7).save(tmp_path / "again")
    assert {p.name: p.read_bytes() for p in copied.iterdir()} == {p.name: p.read_bytes() for p in (tmp_path / "saved").iterdir()}
    loaded.set_params(seed=2)
    assert "reads results of 'coft'" in message_of(CoFTClassifier.load, tmp_path / "saved", clip=clip)
    again = clone(loaded).set_params(augmentation=task.augmentation).fit(X, y)
    assert (again.fitted_.predict_proba(task.test) == estimator.fitted_.predict_proba(task.test)).all()


def test_a_result_of_the_protocol_is_loaded_with_names_and_saved_with_all_that_it_has(clip, task, tmp_path):
    fitted = get_method("zero-shot").fit(clip, task)
    folder = save_fitted(tmp_path / "saved", fitted, clip, task, 3, fitted, [{"accuracy": 0.5}])
    loaded = VLMClassifier.load(folder, clip=clip)
    assert (loaded.predict(task.test) == np.array(task.class_names)[fitted.predict(task.test)]).all()
    copied = loaded.save(tmp_path / "again")
    assert all((copied / p.name).read_bytes() == p.read_bytes() for p in folder.iterdir())


def test_base_has_no_method_of_its_own(X):
    assert "method: ''" in message_of(ImageClassifier(["a", "b"]).fit, X)
