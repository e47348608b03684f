"Every kind of bad input stops at once, and the message says what was given and what is allowed."
import json
import math
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from coft.adapters import VisualPrompt
from coft.clip import load_clip, tokenize, zero_shot_head
from coft.collaborate import CoFT, CoFTSettings
from coft.core import check_class_names, sha256_of
from coft.data import ArrayImages, Task, load_task
from coft.experiment import Parameters, parameters_from, run_experiment
from coft.protocol import METHODS, get_method, preset
from coft.results import Records, published_table
from coft.rivals import FineTuneSettings, TopKSettings
from coft.trainer import Schedule


def message_of(function, *args, **kwargs):
    "The message of the ValueError that this call must raise"
    with pytest.raises(ValueError) as error:
        function(*args, **kwargs)
    return str(error.value)


def assert_says(message, *parts):
    missing = [p for p in parts if p not in message]
    assert not missing, f"{missing} not said in: {message}"


# Unknown names

@pytest.mark.parametrize("call, parts", [
    (lambda: load_clip("embeded"), ["model: 'embeded'", "Did you mean 'embedded'", "ViT-B-16"]),
    (lambda: load_clip("ViT-B-23-quickgelu", "openai"), ["'ViT-B-23-quickgelu'", "Did you mean", "'ViT-B-32-quickgelu'"]),
    (lambda: load_clip("embedded", "openai"), ["pretrained: 'openai'", "'fonts'", "'random'"]),
    (lambda: load_clip("ViT-B-32", "laion"), ["pretrained: 'laion'", "'ViT-B-32'", "laion2b_s34b_b79k", "path of a checkpoint"]),
    (lambda: load_clip("ViT-B-32"), ["pretrained: nothing was given for 'ViT-B-32'", "'random'"]),
    (lambda: load_clip("ViT-B-32", "openai"), ["'ViT-B-32'", "'openai'", "'ViT-B-32-quickgelu'"]),
    (lambda: load_task("digit"), ["task: 'digit'", "Did you mean 'digits'", "glyphs-dev"]),
    (lambda: get_method("cooft"), ["method: 'cooft'", "Did you mean 'coft'", "top-k", "zero-shot"]),
    (lambda: get_method("coft", topk=3), ["setting of coft: 'topk'", "Did you mean 'top_k'", "phase1_lr"]),
    (lambda: preset("coft", "papers"), ["preset: 'papers'", "Did you mean 'paper'?", "embedded"]),
    (lambda: CoFT("embeded"), ["preset: 'embeded'", "Did you mean 'embedded'?"]),
    (lambda: published_table("coft-11"), ["table: 'coft-11'", "Did you mean 'coft-1'"]),
    (lambda: Parameters(profile="embeded"), ["profile: 'embeded'", "Did you mean 'embedded'?", "paper"]),
    (lambda: Parameters(tasks=["digits", "glyph"]), ["tasks: 'glyph'", "Did you mean 'glyphs'", "digits"]),
    (lambda: Parameters(methods="zeroshot"), ["methods: 'zeroshot'", "Did you mean 'zero-shot'", "supervised"]),
    (lambda: Parameters(tables="coft-9"), ["tables: 'coft-9'", "Did you mean 'coft-", "overview, coft-1"]),
    (lambda: Parameters(device="gpu"), ["device: 'gpu'", "auto, cpu, cuda"]),
    (lambda: Parameters(settings={"cooft": {}}), ["method: 'cooft'", "Did you mean 'coft'"]),
    (lambda: Parameters(settings={"coft": {"lr": 1}}), ["setting of coft: 'lr'", "phase1_lr"]),
], ids=lambda v: None if callable(v) else v[0])
def test_unknown_name_is_named_with_its_neighbours(call, parts):
    assert_says(message_of(call), *parts)


def test_a_name_like_nothing_gets_no_guess():
    message = message_of(load_task, "qqqqqqqq")
    assert_says(message, "task: 'qqqqqqqq' is not known.", "Allowed: digits, glyphs-dev, glyphs, glyphs-toy")
    assert "Did you mean" not in message


def test_an_unknown_model_stops_a_job_before_anything_is_computed(tmp_path):
    message = message_of(run_experiment, Parameters(model="embeded", out_dir=str(tmp_path / "out"), progress=False))
    assert_says(message, "model: 'embeded'", "'embedded'")
    assert not (tmp_path / "out/records.jsonl").exists()


# Class names

BAD_CLASS_NAMES = [
    ([], ["0 given", "at least two"]),
    (["cat"], ["1 given (['cat'])", "at least two"]),
    (["cat", ""], ["position 1 is ''", "non-empty"]),
    (["cat", "  ", "dog"], ["position 1 is ''", "non-empty"]),
    (["cat", None], ["position 1 is None", "non-empty"]),
    (["cat", 7], ["position 1 is 7", "non-empty"]),
    (["cat", "dog", "cat"], ["more than once: cat"]),
    (["cat", "Cat "], ["more than once: cat", "upper and lower case"]),
    (["polar bear", "polar_bear"], ["more than once: polar bear"]),
    ("cat", ["a list of names", "'cat'"]),
]


@pytest.mark.parametrize("names, parts", BAD_CLASS_NAMES, ids=lambda v: None)
def test_bad_class_names(clip, names, parts):
    images = ArrayImages(np.zeros((4, 8, 8), np.uint8))
    for message in (message_of(check_class_names, names), message_of(Task, "toy", names, images, images), message_of(zero_shot_head, clip, names, "the {}.")):
        assert_says(message, "class_names:", *parts)


def test_words_that_the_embedded_model_lacks_are_listed(clip):
    message = message_of(zero_shot_head, clip, ["digit three", "golden retriever"], "a photo of the {}.")
    assert_says(message, "'golden'", "'retriever", "does not know", "CLIP's full vocabulary")
    assert "'digit'" not in message and "'photo'" not in message


def test_words_that_the_embedded_model_lacks_stop_a_run(clip, photos):
    message = message_of(CoFT().fit, clip, photos, progress=False)
    assert_says(message, "the embedded model does not know", "'cat")


def test_a_text_that_would_be_cut_is_named(clip, vit):
    for model in (clip, vit):
        long = "a photo of the " + "three " * 80
        assert_says(message_of(tokenize, model.tokenizer, ["three", long]), "1 text(s)", long[:30], f"at most {model.tokenizer.context_length - 2}")


@pytest.mark.parametrize("template", ["a photo", "{} and {}", []])
def test_templates_need_one_place_for_the_name(clip, template):
    assert_says(message_of(zero_shot_head, clip, ["digit one", "digit two"], template), "templates:", "exactly one {}")


# Numbers

def test_k_larger_than_the_data_allow(clip, task, quick):
    message = message_of(CoFT(**quick | dict(top_k=19)).fit, clip, task, progress=False)
    assert_says(message, "top_k: 19", "4 classes are 76", "72 unlabelled", "at most 18", "fill_short=False")


BAD_NUMBERS = [-1, math.nan, math.inf, -math.inf, "1e-3", None, True, [1]]
WHOLE = ["top_k", "n_context", "n_visual", "phase1_epochs", "phase1_batch_size", "phase2_epochs", "phase2_batch_size"]
REAL = ["context_std", "l2_weight", "phase1_lr", "phase1_weight_decay", "phase2_lr", "phase2_weight_decay"]


@pytest.mark.parametrize("given", BAD_NUMBERS, ids=repr)
@pytest.mark.parametrize("setting", WHOLE + REAL)
def test_bad_numbers_in_the_settings_of_coft(setting, given):
    name = setting.split("_", 1)[1] if setting.startswith("phase") else setting
    message = message_of(CoFTSettings, **{setting: given})
    assert_says(message, f"{name}: {given!r} was given", "whole number" if setting in WHOLE else "finite number", "needed")
    assert_says(message_of(Parameters, settings={"coft": {setting: given}}), f"{given!r} was given")


@pytest.mark.parametrize("setting", WHOLE)
@pytest.mark.parametrize("given", [0, 2.5])
def test_whole_numbers_from_one(setting, given):
    assert_says(message_of(CoFTSettings, **{setting: given}), f"{given!r} was given", "a whole number of at least 1")


@pytest.mark.parametrize("setting", ["phase1_lr", "phase2_lr"])
def test_a_learning_rate_of_zero(setting):
    assert_says(message_of(CoFTSettings, **{setting: 0}), "lr: 0 was given", "above 0")


@pytest.mark.parametrize("setting", ["fill_short", "strict_filter"])
@pytest.mark.parametrize("given", ["false", 0, None])
def test_switches_take_true_or_false_only(setting, given):
    assert_says(message_of(CoFTSettings, **{setting: given}), f"{setting}: {given!r} was given", "true or false")


@pytest.mark.parametrize("setting, given", [("template_set", "many"), ("visual_depth", "medium"), ("l2_grad", "all"), ("head_init", "zero"), ("head_input", "raw"), ("phase1_optimizer", "adam"), ("phase2_optimizer", 3)])
def test_choices_in_the_settings_of_coft(setting, given):
    assert_says(message_of(CoFTSettings, **{setting: given}), setting.split("_", 1)[1] if "phase" in setting else setting, f"{given!r} is not known", "Allowed:")


@pytest.mark.parametrize("settings", [FineTuneSettings, TopKSettings, Schedule])
@pytest.mark.parametrize("given", BAD_NUMBERS, ids=repr)
def test_bad_numbers_in_the_other_settings(settings, given):
    numbers = [f.name for f in fields(settings) if f.type in (int, float, "int", "float")]
    assert {"lr", "epochs", "batch_size", "weight_decay"} <= set(numbers)
    for name in numbers:
        assert_says(message_of(settings, **{name: given}), f"{name}: {given!r} was given")


@pytest.mark.parametrize("images", [np.zeros((5, 8, 8)), np.zeros((5, 8, 8, 4), np.uint8), np.zeros((8, 8), np.uint8)])
def test_images_of_another_kind(images):
    assert_says(message_of(ArrayImages, images), "images: uint8 of shape [n, h, w] or [n, h, w, 3]", str(images.dtype), str(list(images.shape)))


@pytest.mark.parametrize("shots", [0, -1, 2.5, "4"])
def test_bad_shots(task, shots):
    assert_says(message_of(task.labelled, shots), f"shots: {shots!r} was given")


def test_labels_are_refused_where_there_are_none(task):
    for door in (lambda t: t.audit, lambda t: t.labelled(2)):
        with pytest.raises(PermissionError, match="task 'toy'"):
            door(task.blind())


def test_visual_tokens_need_a_transformer():
    resnet = SimpleNamespace(name="RN50", model=SimpleNamespace(visual=torch.nn.Conv2d(3, 3, 1)))
    assert_says(message_of(VisualPrompt, resnet), "vision transformer", "'RN50'", "Conv2d")


def test_text_head_behind_the_projection_only(quick):
    message = message_of(CoFT, **quick | dict(head_init="text", head_input="pre_proj"))
    assert_says(message, "head_input: 'pre_proj'", "head_init='random'")


# Files

@pytest.mark.parametrize("place", ["file", "file/folder"])
def test_a_folder_that_cannot_be_written(tmp_path, place):
    (tmp_path / "file").write_text("kept")
    out = str(tmp_path / place)
    assert_says(message_of(run_experiment, Parameters(methods="zero-shot", out_dir=out, progress=False)), "out_dir:", out, "cannot be written", "Give a folder")
    assert (tmp_path / "file").read_text() == "kept"


def test_damaged_weights_name_both_digests(damaged_weights):
    expected = json.loads(damaged_weights.with_name("coft-embedded.card.json").read_text())["sha256"]
    message = message_of(load_clip, "embedded")
    assert_says(message, damaged_weights.name, f"expected sha256 {expected}", f"found {sha256_of(damaged_weights)}", "Install")
    assert expected != sha256_of(damaged_weights)


@pytest.fixture
def records(tmp_path):
    "A folder with two records, the second cut in mid-line"
    records = Records(tmp_path)
    for i in range(2):
        records.add({"key": f"run{i}", "accuracy": 70.0 + i}, {"correct": np.ones(3)})
    records.path.write_text(records.path.read_text()[:-10])
    return records


def test_cut_record_is_set_aside_and_the_whole_ones_stay(records, capsys):
    assert [r["key"] for r in records.load()] == ["run0"]
    assert_says(capsys.readouterr().out, "records.jsonl", "1 line(s)", "records.cut.jsonl", "other 1")
    aside = (records.folder / "records.cut.jsonl").read_text()
    assert aside.startswith('{"key": "run1"') and len(aside.splitlines()) == 1
    assert [json.loads(line)["key"] for line in records.path.read_text().splitlines()] == ["run0"]


@pytest.mark.parametrize("load_first", [True, False])
def test_a_record_can_be_added_behind_a_cut_one(records, load_first):
    if load_first:
        records.load()
    records.add({"key": "run2", "accuracy": 72.0}, {"correct": np.zeros(3)})
    assert [r["key"] for r in records.load()] == ["run0", "run2"]
    assert (records.arrays("run2")["correct"] == 0).all()
    assert records.find("run1") is None and records.find("run2")["accuracy"] == 72.0
    assert len((records.folder / "records.cut.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("line", ["", "[]", "3", '{"accuracy": 1}', "\x00\x00\x00", "{not json"])
def test_lines_that_are_no_records_lose_nothing(records, line):
    records.load()
    with open(records.path, "a") as f:
        f.write(line + "\n")
    records.add({"key": "run3"}, {})
    assert [r["key"] for r in records.load()] == ["run0", "run3"]


def test_bytes_that_are_no_text_lose_nothing(records):
    records.load()
    with open(records.path, "ab") as f:
        f.write(b"\xff\xfe\x80\n")
    records.add({"key": "run3"}, {})
    assert [r["key"] for r in records.load()] == ["run0", "run3"]


def test_a_record_whose_arrays_are_gone_is_run_again(records):
    records.load()
    records.arrays_path("run0").unlink()
    assert records.find("run0") is None


# Parameters of the job

@pytest.mark.parametrize("given, parts", [
    (dict(profile=3), ["profile: 3", "embedded, paper"]),
    (dict(profile=["embedded"]), ["profile: ['embedded']", "embedded, paper"]),
    (dict(tables=3), ["tables: 3", "coft-1"]),
    (dict(tables={"a": 1}), ["tables: {'a': 1}", "coft-1"]),
    (dict(tasks=3), ["tasks: 3", "digits, glyphs-dev, glyphs"]),
    (dict(tasks=[["digits"]]), ["tasks: ['digits']", "digits"]),
    (dict(tasks=[]), ["tasks: an empty list", "digits"]),
    (dict(tasks=""), ["tasks: ''", "digits"]),
    (dict(methods=3.5), ["methods: 3.5", "coft"]),
    (dict(methods=[]), ["methods: an empty list", "coft"]),
    (dict(methods=["coft", None]), ["methods: None", "coft"]),
    (dict(model=3), ["model: 3"]),
    (dict(model="embeded"), ["model: 'embeded'", "'embedded'"]),
    (dict(model="ViT-B-32"), ["pretrained: nothing was given for 'ViT-B-32'", "laion2b_s34b_b79k"]),
    (dict(pretrained=3), ["pretrained: 3"]),
    (dict(model="ViT-B-32", pretrained=3), ["pretrained: 3"]),
    (dict(seeds="0"), ["seeds: '0'", "whole numbers"]),
    (dict(seeds=1.0), ["seeds: 1.0", "whole numbers"]),
    (dict(seeds=[0, -1]), ["seeds: -1", "from 0"]),
    (dict(seeds=[0, True]), ["seeds: True", "whole numbers"]),
    (dict(seeds=None), ["seeds: None", "whole numbers"]),
    (dict(seeds=[]), ["seeds: an empty list"]),
    (dict(seeds=2**31), ["seeds: 2147483648", "2147483647"]),
    (dict(out_dir=3), ["out_dir: 3", "path"]),
    (dict(out_dir=""), ["out_dir: ''", "path"]),
    (dict(out_dir=None), ["out_dir: None", "path"]),
    (dict(data_root=3), ["data_root: 3", "path"]),
    (dict(data_root="/no/such/folder"), ["data_root:", "/no/such/folder"]),
    (dict(device=0), ["device: 0", "auto, cpu, cuda"]),
    (dict(settings="coft"), ["settings: 'coft'", "mapping"]),
    (dict(settings=[]), ["settings: []", "mapping"]),
    (dict(settings={"coft": 3}), ["settings: {'coft': 3}", "mapping"]),
    (dict(settings={"coft": {3: 4}}), ["setting of coft: 3", "top_k"]),
    (dict(progress="yes"), ["progress: 'yes'", "true or false"]),
    (dict(progress=1), ["progress: 1", "true or false"]),
    (dict(unlabelled=0), ["unlabelled: 0 was given"]),
    (dict(unlabelled="all"), ["unlabelled: 'all' was given"]),
    (dict(trackers="abacus"), ["trackers", "'abacus'", "tensorboard, wandb, mlflow"]),
    (dict(logging_dir=3), ["logging_dir: 3", "path"]),
    (dict(compute="bf16"), ["compute: 'bf16'", "mapping"]),
    (dict(compute={"checkpoints": True}), ["setting of compute: 'checkpoints'", "image_checkpoints"]),
    (dict(compute={"precision": "fp16"}), ["precision: 'fp16'", "auto, fp32, bf16"]),
    (dict(compute={"image_checkpoints": "yes"}), ["image_checkpoints: 'yes'", "true or false"]),
    (dict(grid="long", tables="coft-2"), ["grid: 'long'", "short, full"]),
    (dict(grid="full"), ["grid: 'full'", "overview", "coft-2, coft-3, coft-fig2, harder-folders"]),
], ids=str)
def test_wrong_types_and_values_of_parameters(tmp_path, monkeypatch, given, parts):
    monkeypatch.setattr("coft.experiment.find_or_run", lambda *args: pytest.fail(f"a run was started with {given}"))
    assert_says(message_of(lambda: run_experiment(Parameters(**dict(out_dir=str(tmp_path)) | given))), *parts)


@pytest.mark.parametrize("name, text", [("seeds", "[0, 1, 2]"), ("methods", "[coft, zero-shot]"), ("tasks", '["digits"]'), ("tables", "[coft-1]")])
def test_lists_given_as_text(name, text):
    assert_says(message_of(lambda: Parameters(**{name: text})), f"{name}:", repr(text), "-y")


def test_every_parameter_is_tried_with_a_wrong_value():
    marks = {m.name: m for m in test_wrong_types_and_values_of_parameters.pytestmark}
    tried = {name for given, _ in marks["parametrize"].args[1] for name in given}
    assert tried == {f.name for f in fields(Parameters)}


@pytest.mark.parametrize("all_methods", ["all", ["all"], ["coft", "all"]], ids=str)
def test_all_methods(all_methods):
    assert sorted(Parameters(methods=all_methods).methods) == sorted(METHODS)


def test_good_values_are_accepted_in_every_form(tmp_path):
    p = Parameters(tasks="glyphs", methods=("coft", "coft", "top-k"), seeds=range(3), out_dir=tmp_path, data_root=str(tmp_path), settings={"coft": {"top_k": 8}})
    assert (p.tasks, p.methods, p.seeds, p.out_dir) == (["glyphs"], ["coft", "top-k"], [0, 1, 2], str(tmp_path))
    own = Parameters(tasks=["digits", "glyphs"], seeds={"digits": [0, 1], "glyphs": 3})
    assert (own.seeds_of("digits"), own.seeds_of("glyphs"), own.only("digits").seeds, own.only("digits").tasks) == ([0, 1], [3], [0, 1], ["digits"])
    with pytest.raises(ValueError, match="seeds: seeds of digits were given; the tasks are digits, glyphs"):
        Parameters(tasks=["digits", "glyphs"], seeds={"digits": 0})
    assert Parameters(seeds=5).seeds == [5] and Parameters().tasks == ["digits"] and Parameters(profile="paper").model == "ViT-B-16-quickgelu"


@pytest.mark.parametrize("given, near", [({"seed": 3}, "'seeds'"), ({"outdir": "x"}, "'out_dir'"), ({"method": "coft"}, "'methods'"), ({"seeds": 0, "divice": "cpu"}, "'device'")], ids=str)
def test_misspelt_parameter(given, near):
    assert_says(message_of(parameters_from, given, before=[]), "parameter:", "is not known", f"Did you mean {near}", "profile, tables, tasks")


def test_variables_from_before_the_parameters_cell_are_no_parameters():
    namespace = {"In": [], "Out": {}, "_i1": "", "get_ipython": print, "json": json, "before": {"json"}, "seeds": [2], "device": "cpu"}
    assert parameters_from(namespace, before={"json"}) == replace(Parameters(seeds=2), device="cpu")
