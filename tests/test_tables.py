"Variants of a method and the pages that compare them."
from dataclasses import asdict, replace

import IPython.display
import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
from coft.data import TASKS, ArrayImages, Audit
from coft.experiment import TABLES, Parameters, comparison, find_or_run, run_variants, variants_table
from coft.protocol import METHODS, get_method
from coft.results import Records, table_markdown
from helpers import QUICK, ROOT

PAGES = sorted(p.stem for p in (ROOT / "nbs/tables").glob("*.ipynb"))


@pytest.fixture
def toy(task, tmp_path, monkeypatch):
    "Parameters of a job on the small task, two seeds."
    monkeypatch.setitem(TASKS, "toy", lambda: task)
    return Parameters(methods="zero-shot", tasks="toy", seeds=[0, 1], out_dir=tmp_path / "out", device="cpu", progress=False)


def test_variants_are_compared_with_the_baseline(toy):
    variants = {"zero-shot": ("zero-shot", {}), "coft": ("coft", QUICK), "all kept": ("coft", QUICK | dict(judge="nobody")), "Phase I only": ("coft-phase1", QUICK)}
    said = []
    runs = run_variants(variants, toy, say=lambda line, **_: said.append(line))
    table = variants_table(runs, toy, "coft")
    assert [r["method"] for r in runs] == [v for v in variants for _ in (0, 1)] and len(said) == 8
    assert table.method.tolist() == list(variants) and (table.seeds == 2).all()
    assert pd.isna(table.gain[1]) and table.gain.notna().sum() == 3
    accuracy = dict(zip(table.method, table.accuracy))
    assert table.gain[2] == pytest.approx(accuracy["all kept"] - accuracy["coft"], abs=1e-6)
    assert [r["resumed"] for r in runs if r["method"] == "all kept"] == [True, True], "its Phase I was coft's"
    assert table.seconds.isna().tolist() == [False, False, True, False] and "nan" not in table_markdown(table, "coft")
    again = run_variants(variants, toy, say=lambda line, **_: None)
    assert [r["finished"] for r in again] == [r["finished"] for r in runs], "a second time every run is found"


def test_variants_of_the_same_content_run_once(toy):
    said = []
    variants = {"coft": ("coft", QUICK), "K = 4": ("coft", QUICK | dict(top_k=4)), "K = 3": ("coft", QUICK | dict(top_k=3))}
    runs = run_variants(variants, toy, say=lambda line, **_: said.append(line))
    assert [r["method"] for r in runs] == ["coft"] * 2 + ["K = 4"] * 2 + ["K = 3"] * 2
    assert [line.split("]")[1].split(" on ")[0] for line in said] == [" coft = K = 4"] * 2 + [" K = 3"] * 2
    assert [r["key"] for r in runs[:2]] == [r["key"] for r in runs[2:4]] != [r["key"] for r in runs[4:]]


def test_settings_of_a_stage_that_comes_along_are_refused():
    with pytest.raises(ValueError, match=r"'coft-phase1' is a stage of 'coft', which runs too"):
        Parameters(methods=["coft", "coft-phase1"], settings={"coft-phase1": {"top_k": 8}})


def test_all_tasks_at_once_are_refused():
    for given in ("all", ["all"]):
        with pytest.raises(ValueError, match="tasks: 'all' is not known"):
            Parameters(tasks=given)


def test_packed_runs_stand_for_the_runs_themselves(toy, tmp_path):
    variants, packed, silent = {"zero-shot": ("zero-shot", {}), "coft": ("coft", QUICK)}, [tmp_path / "page.runs.npz", tmp_path / "other.runs.npz"], lambda line, **_: None
    runs = run_variants(variants, toy, say=silent)
    table = variants_table(runs, toy, "zero-shot")
    assert Records(toy.out_dir).pack(packed[0]) == len(runs) + 2, "Phase I of coft comes along"
    first = {r["key"] for r in runs if r["method"] == "zero-shot"}
    assert Records(toy.out_dir).pack(packed[1], without=first) == len(runs) + 2 - len(first), "what one file has, the other need not"
    assert Records(toy.out_dir, packed[:1]).pack(packed[0], without={r["key"] for r in runs} - first) == len(first) + 2
    elsewhere = replace(toy, out_dir=tmp_path / "elsewhere")
    taken = run_variants(variants, elsewhere, say=silent, packed=packed)
    assert all(map(Records(tmp_path / "elsewhere", packed[0]).find, first)), "a single file needs no list"
    assert taken == runs and not any((tmp_path / "elsewhere").glob("runs/*"))
    pd.testing.assert_frame_equal(variants_table(taken, elsewhere, "zero-shot", packed), table)
    other = run_variants({"coft": ("coft", QUICK | dict(judge="nobody"))}, elsewhere, say=silent, packed=packed)
    assert other[0]["key"] not in [r["key"] for r in runs] and any((tmp_path / "elsewhere").glob("runs/*")), "what is not packed is run"


def test_a_comparison_shows_zero_shot_where_gains_are_counted_from_it(toy):
    variants = {"zero-shot": ("zero-shot", {}), "K = 3": ("coft-phase1", QUICK | dict(top_k=3)), "K = 4": ("coft-phase1", QUICK)}
    runs = run_variants(variants, toy, say=lambda line, **_: None)
    rows = lambda *args: [[t.get_text() for t in figure.axes[0].get_yticklabels()] for figure in comparison(runs, list(variants), toy, *args)[1]]
    assert rows("zero-shot") == [list(variants)] and rows("K = 4") == [["K = 3", "K = 4"]]
    titles = [comparison(runs, list(variants), toy, "zero-shot", *question)[1][0].axes[0].get_title("left") for question in ((), ("How many?",))]
    assert titles == ["toy", "How many? (toy)"]


def test_a_packed_run_names_its_weights_and_not_their_folder(tmp_path):
    records = Records(tmp_path / "own")
    for key, pretrained in (("a", str(tmp_path / "own/photos.safetensors")), ("b", "laion2b_s34b_b88k"), ("c", None)):
        records.add(dict(key=key, n_test=3, pretrained=pretrained), {"test_right": np.ones((1, 3), bool)})
    records.pack(tmp_path / "page.runs.npz")
    packed = Records(tmp_path / "other", [tmp_path / "page.runs.npz"])
    assert [packed.find(k)["pretrained"] for k in "abc"] == ["photos.safetensors", "laion2b_s34b_b88k", None]


@pytest.mark.parametrize("judge, expected", [("self", "own"), ("nobody", "all"), ("confidence", "half"), ("peer", "peer")])
def test_judges(clip, task, judge, expected):
    trace = get_method("coft", **QUICK, judge=judge).fit(clip, task, progress=False).trace
    for g in (1, 2):
        accepted, p = trace[f"accepted_{g}"], trace[f"p_clean_{g}"]
        if expected in ("own", "peer"):
            assert ((p > 0.5) == accepted).all()
        else:
            assert accepted.all() if expected == "all" else 0.5 <= accepted.mean() < 0.55
    if expected == "own":
        peers = get_method("coft", **QUICK).fit(clip, task, progress=False).trace
        assert (peers["p_clean_1"] != trace["p_clean_1"]).any() and (peers["labels_1"] == trace["labels_1"]).all()


@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_every_light_module_trains(clip, task, kind):
    fitted = get_method("coft", **QUICK, light_module=kind).fit(clip, task, progress=False)
    history = fitted.trace["histories"]["Phase I, model 1"]
    assert history[-1]["loss"] < history[0]["loss"]


def test_a_setting_for_a_method_that_does_not_run_is_named():
    with pytest.raises(ValueError, match=r"settings: 'coft' is given settings, but does not run; methods are zero-shot"):
        Parameters(methods="zero-shot", settings={"coft": {"top_k": 8}})


def page_until(name, begins, **given):
    "Names of a page after its cells up to the one that begins like this, with these parameters in the place of its own."
    space = {}
    for cell in nbformat.read(ROOT / f"nbs/tables/{name}.ipynb", 4).cells:
        if cell.cell_type != "code":
            continue
        source = cell.source.split("\nruns = ")[0].split("\nfew, runs = ")[0]
        exec(source.rsplit("\np", 1)[0] if source.endswith("\np") else source, space)
        if "parameters" in cell.metadata.get("tags", []):
            space.update(given)
        if cell.source.startswith(begins):
            return space
    raise AssertionError(f"{name} has no cell that begins with {begins!r}")


def test_the_page_of_ablations_names_what_exists():
    "Its variants are registered methods with settings that they know, and our additions stand on the settings of coft."
    page = page_until("ablations-coft", "as_coft = ", tasks="glyphs-toy")
    for question in page["questions"].values():
        for method, settings in question.values():
            get_method(method, **settings)
            assert method in METHODS
    coft, ours = (asdict(get_method(m, **s).settings_for("embedded")) for m, s in (page["base"]["coft"], page["questions"]["complement"]["both"]))
    assert all(ours[k] == v for k, v in coft.items())


def test_every_page_has_a_name_and_every_name_a_page():
    assert sorted(TABLES) == sorted([*PAGES, "overview"]), "overview is the main job's own"


def test_the_few_shot_page_runs(tmp_path):
    "On four characters with a fiftieth of the queries."
    ask = dict(tasks="glyphs-toy", seeds=[0, 1], shots=[1, 2], share=0.02, out_dir=str(tmp_path / "out"), device="cpu")
    page = papermill.execute_notebook(ROOT / "nbs/tables/craft-1.ipynb", tmp_path / "page.ipynb", ask, kernel_name="python3", progress_bar=False)
    shown = [str(o["data"].get("text/markdown", "")) for c in page.cells if c.cell_type == "code" for o in c.outputs if "data" in o]
    table = next(t for t in shown if "| 1 shot | 2 shots |" in t)
    assert all(f"| glyphs-toy | {m} |" in table for m in ("zero-shot", "coop", "bbt", "craft")) and table.count("±") == 8
    assert any("difference from craft, 2" in t for t in shown)
    queries = {(r["method"], r["settings"]["shots"]): r["settings"].get("budget") or r["settings"]["epochs"] for r in Records(tmp_path / "out").load() if r["method"] != "zero-shot"}
    epochs = get_method("coop").settings_for("embedded").epochs
    assert queries == {("coop", 1): 0.02 * epochs / 4, ("coop", 2): 0.02 * epochs / 2, ("bbt", 1): 40, ("bbt", 2): 80, ("craft", 1): 40, ("craft", 2): 80}


@pytest.mark.parametrize("name, begins", [("craft-1", "def settings_of"), ("ablations-craft", "def variants_on")])
def test_few_shot_pages_take_the_papers_data_and_model_in_its_profile(name, begins):
    page = page_until(name, begins, profile="paper")
    p = page["p"]
    assert (p.model, p.pretrained) == ("RN50-quickgelu", "openai") and len(p.tasks) == 11 and "imagenet" in p.tasks
    if name == "craft-1":
        settings, coop = page["settings_of"]("craft", "eurosat", 4), [page["settings_of"]("coop", "eurosat", k)["epochs"] for k in (1, 2, 4, 8, 16)]
        assert coop == [50, 100, 100, 200, 200] and settings["budget"] == 4000
    else:
        settings = page["variants_on"]("eurosat")["64 numbers"][1]
        assert settings["intrinsic_dim"] == 64
    assert (settings["sigma"], settings["projection_std"], settings["weight"]) == (0.02, 1.0, 0.01)


def test_coop_epochs_follow_the_shots_in_the_embedded_profile():
    page = page_until("craft-1", "def settings_of")
    epochs = [page["settings_of"]("coop", "digits", k)["epochs"] for k in (1, 2, 4, 8, 16)]
    assert epochs[0] * 4 == epochs[1] * 2 == epochs[2] * 2 == epochs[3] == epochs[4] == get_method("coop").settings_for("embedded").epochs


def test_one_target_may_be_given_as_a_text():
    page = page_until("craft-shift", "if tasks is None", targets="digits-noise", models="embedded-l")
    assert page["targets"] == ["digits-noise"] and page["models"] == ["embedded-l"]


def test_the_page_of_craft_ablations_runs(tmp_path):
    "All questions on four characters, two generations each; what a variant changes is in its record."
    ask = dict(tasks="glyphs-toy", budget=80, out_dir=str(tmp_path / "out"), device="cpu")
    page = papermill.execute_notebook(ROOT / "nbs/tables/ablations-craft.ipynb", tmp_path / "page.ipynb", ask, kernel_name="python3", progress_bar=False)
    outputs = [o for c in page.cells if c.cell_type == "code" for o in c.outputs if "data" in o]
    tables = [o["data"]["text/markdown"] for o in outputs if "text/markdown" in o["data"]]
    able, protocol, *tables = tables
    assert able == "Everything that this page asks for can run." and "| glyphs-toy | a photo of the {}. | 4:" in protocol
    assert len(tables) == 6 and sum("image/png" in o["data"] for o in outputs) == 6, "a table and one picture for each question"
    assert all("difference from craft" in t and "| glyphs-toy | craft |" in t for t in tables)
    settings = {r["settings"]["intrinsic_dim"] for r in Records(tmp_path / "out").load() if r["method"] == "craft"}
    assert settings == {64, 128, 256, 512, 1024}


def test_the_page_of_costs_runs(tmp_path):
    "Few steps on four characters: the black-box method keeps less and the model is not in its memory."
    ask = dict(tasks="glyphs-toy", models="embedded", shots=2, budget=80, epochs=2, out_dir=str(tmp_path))
    page = papermill.execute_notebook(ROOT / "nbs/tables/craft-cost.ipynb", tmp_path / "page.ipynb", ask, kernel_name="python3", progress_bar=False)
    able, said = (o["data"]["text/markdown"] for c in page.cells if c.cell_type == "code" for o in c.outputs if "text/markdown" in o.get("data", {}))
    assert able == "Everything that this page asks for can run."
    assert "`embedded` on glyphs-toy: CraFT keeps 1/" in said and "2 shots, 80 queries" in said


@pytest.mark.parametrize("name, model", [("ablations-coft", {}), ("ablations-craft", {}), ("craft-cost", dict(models="RN50-quickgelu")), ("craft-shift", dict(models="RN50-quickgelu"))], ids=lambda v: v if isinstance(v, str) else "")
def test_a_page_in_the_paper_profile_says_in_one_table_what_is_missing_and_ends(name, model, tmp_path, monkeypatch):
    "No weights are at hand, and no data: the last thing to be seen is a table of both, and no error."
    space, shown = {}, []
    monkeypatch.setattr(IPython.display, "display", lambda *things, **_: shown.extend(t.data for t in things))
    with pytest.raises(SystemExit):
        for cell in nbformat.read(ROOT / f"nbs/tables/{name}.ipynb", 4).cells:
            if cell.cell_type == "code":
                exec(cell.source, space)
            if "parameters" in cell.metadata.get("tags", []):
                space.update(dict(profile="paper", pretrained=str(tmp_path / "absent.pt"), data_root=str(tmp_path), out_dir=str(tmp_path), device="cpu") | model)
    told, = shown
    assert "| not run | why | what to do |" in told and "absent.pt" in told and ("task imagenet" in told or "task eurosat" in told)


def test_the_main_job_hands_a_device_on_that_the_page_of_costs_takes(tmp_path):
    page = papermill.execute_notebook(ROOT / "nbs/tables/craft-cost.ipynb", tmp_path / "page.ipynb", dict(tasks="glyphs-toy", models=["embedded"], shots=1, budget=40, epochs=1, out_dir=str(tmp_path), device="auto"), kernel_name="python3", progress_bar=False)
    assert not any(o.output_type == "error" for c in page.cells if c.cell_type == "code" for o in c.outputs)


def test_the_page_of_shifts_runs(tmp_path):
    "One source, one target, few steps; the methods are fitted once and scored twice."
    ask = dict(targets=["digits-noise"], models=["embedded"], shots=1, budget=40, epochs=1, out_dir=str(tmp_path / "out"), device="cpu")
    page = papermill.execute_notebook(ROOT / "nbs/tables/craft-shift.ipynb", tmp_path / "page.ipynb", ask, kernel_name="python3", progress_bar=False)
    shown = "".join(str(o.get("data", {}).get("text/plain", "")) + str(o.get("data", {}).get("text/markdown", "")) for c in page.cells if c.cell_type == "code" for o in c.outputs)
    assert "6 results of 3 fits" in shown and "average of targets" in shown and "difference from craft" in shown
    records = Records(tmp_path / "out").load()
    assert {(r["method"], r["task"], r["trained_on"]) for r in records} == {(m, t, "digits") for m in ("zero-shot", "coop", "craft") for t in ("digits", "digits-noise")}


def test_scores_elsewhere_are_those_of_a_run_of_its_own(clip, task, tmp_path):
    other = replace(task, name="other", test=ArrayImages(255 - task.test.pixels))
    records = Records(tmp_path)
    own, there = find_or_run("zero-shot", {}, clip, task, 0, records, progress=False, elsewhere=[other])[0]
    assert (own["task"], there["task"], there["trained_on"]) == ("toy", "other", "toy") and own["key"] != there["key"]
    assert there["accuracy"] == find_or_run("zero-shot", {}, clip, other, 0, records, progress=False)[0][0]["accuracy"] != own["accuracy"]
    assert find_or_run("zero-shot", {}, clip, task, 0, records, progress=False, elsewhere=[other])[1]
    fewer = replace(task, name="fewer", class_names=task.class_names[:2], test=ArrayImages(task.test.pixels[task.audit.test < 2]), _labels=Audit(task.audit.train, task.audit.test[task.audit.test < 2]))
    some = find_or_run("zero-shot", {}, clip, task, 0, records, progress=False, elsewhere=[fewer])[0][1]
    P = records.arrays(own["key"])["test_probabilities"][0][task.audit.test < 2][:, :2]
    assert some["accuracy"] == 100 * (P.argmax(1) == task.audit.test[task.audit.test < 2]).mean()
    with pytest.raises(ValueError, match=r"elsewhere: 'cats' has 1 class\(es\) that 'toy' has not, the first being 'cat'"):
        find_or_run("zero-shot", {}, clip, task, 0, records, progress=False, elsewhere=[replace(other, name="cats", class_names=["cat", *task.class_names[1:]])])


def test_an_unknown_question_is_named(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="groups: 'jury' is not known"):
        papermill.execute_notebook(ROOT / "nbs/tables/ablations-coft.ipynb", tmp_path / "page.ipynb", dict(groups="jury", out_dir=str(tmp_path)), kernel_name="python3", progress_bar=False)
