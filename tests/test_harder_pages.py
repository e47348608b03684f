"The pages of harder settings, run with few steps on four characters; and what they count."
import ast
import re
from dataclasses import fields, replace

import IPython.display
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from coft.adapt import SIGN_RULES
from coft.data import TASKS
from coft.datasets import dataset_task
from coft.experiment import TABLES, WITH_GRID, Parameters
from coft.filtering import SIGNS, selection_report
from coft.pages import NINE, accuracy_of_classes, beside_published, caught_strangers, foretelling, mislabelled, shown_with, signs_and_gains, warnings_beside_gains, with_relatives
from coft.protocol import METHODS, get_method
from coft.results import Records
from helpers import ROOT, message_of
from scipy.stats import spearmanr
from test_pages import paper_run
from test_photos import write_tables

QUICK = {"coft": dict(top_k=4, phase1_epochs=1, phase2_epochs=1), "coft-semi": dict(top_k=4, phase1_epochs=1, phase2_epochs=1), "top-k": dict(epochs=1, top_k=4), "ce": dict(epochs=1), "gmm": dict(epochs=1),
         "deft": dict(phase1_epochs=1, phase2_epochs=1), "promptkd": dict(epochs=1, batch_size=64), "grip-semi": dict(epochs=1, steps=2), "fixmatch-da-semi": dict(epochs=1)}


@pytest.fixture
def run_page(task, tmp_path, monkeypatch):
    "Run a page in this process on 72 images; what it shows, as texts, and its names."
    monkeypatch.setitem(TASKS, "glyphs-toy", lambda: replace(task, name="glyphs-toy"))

    def run(name, **given):
        shown, space = [], {}
        monkeypatch.setattr(IPython.display, "display", lambda *things, **_: shown.extend(map(text_of, things)))
        for cell in nbformat.read(ROOT / f"nbs/tables/{name}.ipynb", 4).cells:
            if cell.cell_type != "code":
                continue
            tree = ast.parse(cell.source)
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, name, "exec"), space)
            if "parameters" in cell.metadata.get("tags", []):
                space.update(dict(out_dir=str(tmp_path / "out"), device="cpu", tasks="glyphs-toy") | given, settings={m: QUICK[m] for m in given["methods"] if m in QUICK})
            value = last and eval(compile(ast.Expression(last.value), name, "eval"), space)
            if value is not None:
                shown.append(text_of(value))
        plt.close("all")
        return "\n".join(shown), space, Records(tmp_path / "out").load()
    return run


def text_of(thing):
    return "PNG" if isinstance(thing, plt.Figure) else getattr(thing, "data", None) if isinstance(thing, IPython.display.Markdown) else str(thing)


def test_the_page_of_table_2_runs(run_page):
    text, page, records = run_page("coft-2", methods=["zero-shot", "coft", "ce", "gmm", "deft"], rates=[0.2, 0.4])
    assert "RoLT" in text and "difference from coft" in text and text.count("PNG") == 1
    assert len(re.findall(r"'glyphs-toy-mislabelled-(?:20|40)': '\d\d\.\d % of 72 given labels are wrong; the mistakes about a class are spread as over [1-3]\.\d of 3 others'", text)) == 2
    found = {(r["method"], r["task"]) for r in records}
    assert found == {(m, "glyphs-toy") for m in ("zero-shot", "coft", "coft-phase1")} | {(m, f"glyphs-toy-mislabelled-{r}") for m in ("ce", "gmm", "deft") for r in (20, 40)}
    assert {r["method"] for r in page["runs"] if r["task"] == "glyphs-toy-mislabelled-40"} == {"zero-shot", "coft", "ce", "gmm", "deft"}, "label-free runs stand beside the others"


def test_the_page_of_table_3_runs(run_page):
    text, page, records = run_page("coft-3", methods=["zero-shot", "coft", "promptkd"])
    assert "PromptKD" in text and "zero-shot embedded-l" in text and "coft, its own labels" in text and "so no difference is taken" in text
    teachers = {(r["method"], r["settings"].get("label_model", "")) for r in page["runs"] if r["method"] != "zero-shot"}
    assert teachers == {("coft", "embedded-l"), ("coft, its own labels", ""), ("promptkd", "embedded-l")}
    assert "of the answers that PromptKD's teacher gives" in text


def test_the_page_of_figure_2_runs(run_page):
    text, page, records = run_page("coft-fig2", methods=["zero-shot", "coft-semi", "fixmatch-da-semi", "grip-semi"], shots=[1, 2], places=["both", "phase2"])
    assert "| glyphs-toy | coft-semi |" in text and "| glyphs-toy | coft-semi (phase2) |" in text and "| glyphs-toy | grip-semi |" in text and text.count("PNG") == 1
    assert {(r["settings"]["shots"], r["settings"].get("given_labels")) for r in records if r["method"] == "coft-semi"} == {(k, place) for k in (1, 2) for place in ("both", "phase2")}
    assert "difference from coft-semi, 2" in text


def test_the_page_of_folders_runs(run_page):
    text, page, records = run_page("harder-folders", methods=["zero-shot", "coft"], folders="strangers-30", shifts="turn", grid="full")
    assert {r["task"] for r in page["runs"]} == {"glyphs-toy", "glyphs-toy-strangers-30"} and "glyphs-toy-turn" in text and "coft, not filled" in text
    assert page["foretelling"](page["signs"]).folders.max() == 2 and "starting labels that came by filling" in text
    caught = page["caught_strangers"](page["runs"])
    assert set(caught.task) == {"glyphs-toy-strangers-30"} and (abs(caught.strangers - 30) < 1).all() and caught.accepted.notna().all()
    assert {r["settings"].get("fill_short") for r in records if r["method"] == "coft"} == {True, False}
    counted = page["warnings_beside_gains"](page["signs"], page["SIGN_RULES"])
    assert len(counted) == 2 and all(" of 2" in told for told in counted["runs in folders with harm"]), "this quick CoFT does harm in both folders"
    assert re.search(r"\| glyphs-toy-turn \| coft, not filled \|.* to -?\d", text), "changed test images have paired intervals too"


@pytest.fixture
def small_cifar(tmp_path, monkeypatch):
    "Parameters of CIFAR-10 with the photo model: a miniature of 120 training images of one colour per class, of which 60 are taken, and random weights."
    write_tables(tmp_path / "data/cifar10", [f"kind {k}" for k in range(10)], per_class=12)
    monkeypatch.setitem(TASKS, "cifar10", lambda data_root: dataset_task("cifar10", data_root, check_counts=False))
    return dict(tasks="cifar10", model="photos", pretrained="random", data_root=str(tmp_path / "data"), unlabelled=60)


def test_cifar10_with_the_photo_model_on_the_page_of_table_2(run_page, small_cifar):
    text, page, records = run_page("coft-2", methods=["zero-shot", "coft", "ce"], rates=[0.4], **small_cifar)
    assert {(r["method"], r["task"], r["n_train"], r["model"]) for r in records} == {(m, "cifar10", 60, "photos") for m in ("zero-shot", "coft", "coft-phase1")} | {("ce", "cifar10-mislabelled-40", 60, "photos")}
    wrong, = re.findall(r"(\d+\.\d) % of 60 given labels are wrong", text)
    assert float(wrong) == pytest.approx(40, abs=5), "six images of a class, whole ones"


def test_cifar10_with_the_photo_model_on_the_page_of_folders(run_page, small_cifar):
    text, page, records = run_page("harder-folders", methods=["zero-shot", "coft"], folders=["strangers-30", "strangers-50", "copies"], shifts="turn", **small_cifar)
    folders = {r["task"]: r["n_train"] for r in records if r["method"] == "coft"}
    strangers = [page["loaded"][f"cifar10-strangers-{k}"].audit.train for k in (30, 50)]
    assert folders["cifar10"] == folders["cifar10-copies"] == folders["cifar10-turn"] == 60 and page["loaded"]["cifar10-copies"].unlabelled.changed.sum() == 30
    assert len({(known >= 0).sum() for known in strangers}) == 1 and [(known < 0).mean() for known in strangers] == pytest.approx([0.3, 0.5], abs=0.02)
    assert folders["cifar10-strangers-30"] == len(strangers[0]) < 60


@pytest.mark.parametrize("name, methods, more", [("coft-3", ["zero-shot", "coft"], {}), ("coft-fig2", ["zero-shot", "coft-semi"], dict(shots=[1]))])
def test_the_other_pages_take_a_part_of_the_images(run_page, name, methods, more):
    records = run_page(name, methods=methods, unlabelled=50, **more)[2]
    assert {r["n_train"] for r in records} == {50}


@pytest.mark.parametrize("name", ["coft-2", "harder-folders"])
def test_the_command_for_cifar10_names_parameters_of_the_page(name):
    names, _ = parameters_of(f"tables/{name}.ipynb")
    text = "".join(c.source for c in nbformat.read(ROOT / f"nbs/tables/{name}.ipynb", 4).cells if c.cell_type == "markdown")
    command = next(line for line in text.splitlines() if "-p tasks cifar10" in line)
    assert {"tasks", "model", "pretrained", "data_root", "unlabelled"} == set(re.findall(r"-p (\w+)", command)) <= names and "-p unlabelled 3000" in command


@pytest.mark.parametrize("name, paper", [("coft-2", ["cifar100n"]), ("coft-3", NINE), ("coft-fig2", NINE), ("harder-folders", ["digits", "glyphs"])])
def test_the_short_grid_is_the_default_and_the_paper_profile_is_whole(name, paper):
    def asked(**given):
        space = {}
        for cell in nbformat.read(ROOT / f"nbs/tables/{name}.ipynb", 4).cells:
            if cell.cell_type == "code":
                exec(cell.source.removesuffix("\np"), space)
            if "parameters" in cell.metadata.get("tags", []):
                space.update(given)
            if "parameters_from(" in cell.source:
                return space["p"].tasks, space.get("shots")
    few, all_shots = ([2, 16], [2, 4, 8, 16]) if name == "coft-fig2" else (None, None)
    assert asked() == (["digits"], few) and asked(grid="full") == (["digits", "glyphs"], all_shots)
    assert asked(profile="paper") == (paper, all_shots) and asked(tasks="glyphs-toy", grid="full") == (["glyphs-toy"], all_shots)
    assert "grid: 'long' is not known" in message_of(asked, grid="long", tasks="digits")


def parameters_of(path):
    "The names in a page's cell of parameters, and all of its code."
    cells = [c for c in nbformat.read(ROOT / "nbs" / path, 4).cells if c.cell_type == "code"]
    given = next(c.source for c in cells if "parameters" in c.metadata.get("tags", []))
    return {t.id for s in ast.parse(given).body if isinstance(s, ast.Assign) for t in s.targets}, "\n".join(c.source for c in cells)


def test_the_pages_with_a_grid_are_those_that_the_main_job_names():
    assert {n for n in TABLES if n != "overview" and "grid" in parameters_of(f"tables/{n}.ipynb")[0]} == set(WITH_GRID)
    assert Parameters(tables=["overview", "coft-2"], grid="full").grid == "full"


def test_the_main_job_has_every_parameter_and_hands_it_on():
    names, code = parameters_of("experiments.ipynb")
    handed = next(ast.literal_eval(n.generators[0].iter) for n in ast.walk(ast.parse(code)) if isinstance(n, ast.DictComp))
    assert names == {f.name for f in fields(Parameters)} | {"packed", "workers"} and names - set(handed) == {"tables", "progress"}


def test_in_the_short_grid_filling_is_left_out_where_it_is_asked_about(run_page):
    text, page, records = run_page("harder-folders", methods=["zero-shot", "coft"], folders=["tail-10", "copies"], shifts="turn")
    assert {r["task"] for r in page["runs"] if r["method"] == "coft, not filled"} == {"glyphs-toy-tail-10"}
    assert "difference from coft, points" in text


# What the pages count

def test_strangers_are_counted_in_the_report():
    "Four images, of which the last two are strangers; one of these was selected, and each model takes in another one."
    truth, confident = np.array([0, 1, -1, -1]), np.full((4, 2), [0.9, 0.1])
    trace = {"selected_index": np.array([0, 2]), "selected_labels": np.array([0, 1])} | {f"{k}_{g}": v for g, kept in ((1, [1, 0, 1, 0]), (2, [1, 1, 0, 0])) for k, v in (("labels", np.zeros(4, int)), ("accepted", np.array(kept, bool)), ("phase1_probabilities", confident))}
    report = selection_report(trace, truth)
    assert (report["strangers"], report["selected_strangers"], report["selected_precision"]) == (50.0, 50.0, 50.0)
    assert (report["accepted_strangers_1"], report["accepted_others_1"], report["accepted_strangers_2"], report["accepted_others_2"]) == (50.0, 50.0, 0.0, 100.0)
    assert "strangers" not in selection_report(trace, np.array([0, 1, 0, 0]))
    run = dict(task="t", method="coft", pseudo_labels=report)
    assert caught_strangers([run, dict(task="t", method="zero-shot", pseudo_labels={})]).to_dict("records") == [{"task": "t", "method": "coft", "strangers": 50.0, "selected": 50.0, "accepted": 25.0, "others accepted": 75.0}]


def test_a_sign_that_grows_where_the_method_loses_foretells_harm():
    signs = dict.fromkeys(SIGNS, 1.0)
    runs = [dict(task=t, method=m, seed=s, accuracy=a, signs=x) for t, s, gain, rejected in (("a", 0, 5, 1), ("a", 1, 4, 2), ("b", 0, -3, 9), ("c", 0, 1, 4)) for m, a, x in (("zero-shot", 50, {}), ("coft", 50 + gain, signs | dict(rejected=rejected, agreement=gain)))]
    table = signs_and_gains(runs, "coft")
    assert table.gain.tolist() == [5, 4, -3, 1] and table.rejected.tolist() == [1, 2, 9, 4]
    found = foretelling(table).set_index("sign")
    assert found.correlation[SIGNS["rejected"]] == -1 and found.correlation[SIGNS["agreement"]] == 1 and np.isnan(found.correlation[SIGNS["changed"]])
    assert set(found.index[:2]) == {SIGNS["rejected"], SIGNS["agreement"]} and (found.folders == 3).all(), "two seeds of a folder count once"


def test_the_interval_is_one_over_folders():
    "Ten folders whose ranks nearly agree: drawn anew by hand, and with ten copies of every seed, which add nothing."
    gain, sign = np.array([3, 1, 4, 1.5, 5, 9, 2, 6, 5.5, 3.5]), np.array([2, 0, 5, 1, 7, 8, 1, 3, 6, 6.0])
    table = pd.DataFrame([dict(task=f"t{i}", seed=s, gain=g) | dict.fromkeys(SIGNS, x) for i, (g, x) in enumerate(zip(gain, sign)) for s in range(10)])
    rng, drawn = np.random.default_rng(1), []
    for _ in range(4000):
        rows = rng.integers(10, size=10)
        drawn.append(spearmanr(gain[rows], sign[rows]).statistic)
    found = foretelling(table).iloc[0]
    assert found.correlation == round(spearmanr(gain, sign).statistic, 2) and found.folders == 10
    assert [found.low, found.high] == pytest.approx(np.quantile(drawn, (0.025, 0.975)), abs=0.04) and found.low < found.correlation < found.high


def test_warnings_are_counted_where_the_mean_gain_is_harm():
    "Folder a lost in the mean, though one of its seeds gained."
    rows = [("a", -4, 40, 90), ("a", 1, 60, 70), ("b", 2, 45, 10), ("b", 3, 70, 10), ("c", 0, 90, 85)]
    table = pd.DataFrame([dict(task=t, gain=g, agreement=a, rejected=r) for t, g, a, r in rows])
    assert warnings_beside_gains(table, SIGN_RULES).to_numpy().tolist() == [[SIGNS["agreement"], "1 of 2", "1 of 3"], [SIGNS["rejected"], "1 of 2", "1 of 3"]]


def test_accuracy_of_some_classes_is_counted_from_their_images(task, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "toy", lambda: task)
    right = np.arange(40) % 3 == 0
    run = dict(schema=1, key="k", method="coft", task="toy", seed=0)
    Records(tmp_path).add(run, {"test_right": right[None]})
    found = accuracy_of_classes([run], [1, 2], Parameters(tasks="toy", out_dir=str(tmp_path))).iloc[0]
    of = [right[i] for i in range(40) if task.audit.test[i] in (1, 2)]
    assert found.these == pytest.approx(100 * sum(of) / len(of), abs=0.05) and found.others == pytest.approx(100 * (right.sum() - sum(of)) / (40 - len(of)), abs=0.05)


def test_relatives_take_seeds_and_show_runs():
    p = Parameters(tasks=["digits", "glyphs-toy"], seeds={"digits": [1], "glyphs-toy": [0, 2]})
    relatives = {"digits": list(mislabelled("digits", [0.2, 0.6]).values()), "glyphs-toy": ["glyphs-toy-copies"]}
    more = with_relatives(p, relatives)
    assert more.tasks == ["digits", "digits-mislabelled-20", "digits-mislabelled-60", "glyphs-toy", "glyphs-toy-copies"]
    assert (more.seeds_of("digits-mislabelled-60"), more.seeds_of("glyphs-toy-copies")) == ([1], [0, 2])
    assert [r["task"] for r in shown_with([dict(task="digits")], relatives)] == relatives["digits"] and mislabelled("cifar100n", [0.2]) == {"crowd": "cifar100n"}

def test_differences_of_tables_2_and_3():
    crowd = dict(n_train=50000, n_test=10000)
    found = beside_published([paper_run("deft", 80.04, "cifar100n", **crowd), paper_run("coft", 78.4, "cifar100n", **crowd)], "coft-2")
    assert found.method.tolist() == ["DEFT", "CoFT"] and found.difference.tolist() == [1.0, -1.0]
    taught = dict(label_model="ViT-L-14-quickgelu", label_pretrained="openai")
    run = paper_run("coft", 88.1)
    assert beside_published([run], "coft-3", taught).empty, "CoFT without a teacher is not Table 3's"
    assert beside_published([run | dict(settings=run["settings"] | taught)], "coft-3", taught).difference.tolist() == [1.0]
    assert beside_published([paper_run("promptkd", 70.0)], "coft-3").empty, "the published PromptKD had another teacher"

def test_the_tuning_page_asks_for_nine_trials_that_can_be():
    space = {}
    for cell in nbformat.read(ROOT / "nbs/tuning_noisy.ipynb", 4).cells:
        if cell.cell_type == "code":
            exec(cell.source, space)
        if cell.source.startswith("taught"):
            break
    assert sorted(m for _, group in space["searches"] for m in group) == sorted(m for m, method in METHODS.items() if method.__module__ in ("coft.noisy", "coft.distillation")) == sorted(space["methods"])
    for where, group in space["searches"]:
        assert where.startswith("glyphs-dev") and where in TASKS
        for m, s in group.items():
            assert len(s.changes) + space["n_draws"] + 1 == 9
            for change in [{k: v} for k, values in s.grid.items() for v in values] + s.changes:
                get_method(m, **s.always | s.here | {k: v[0] for k, v in s.grid.items()} | change)
