"What the pages of tables share: published numbers, tables of records, what can run, estimates, and the pages themselves."
from dataclasses import asdict, fields

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
from coft.data import TASKS
from coft.experiment import Parameters, known_tables, run_pages, stop_if_failed
from coft.fewshot import CoOp
from coft.pages import NINE, beside_published, estimate, label_rounds, official_settings, overtaken_at, protocol_markdown, rehearse, what_can_run
from coft.protocol import METHODS, get_method
from coft.results import SCHEMA, Records, published_markdown, published_names, published_table, table
from coft.trainer import Rehearsal, rehearsal
from helpers import ROOT, message_of

# Published numbers

def test_printed_averages_recompute_but_where_a_note_says_so():
    for name in published_names():
        frame = published_table(name)
        noted = {(row, column) for row, column, _ in frame.attrs["notes"]}
        assert all(row in frame.index and column in frame.columns for row, column in noted)
        if "Average" not in frame.index or name == "coft-4":
            continue
        rest = frame.drop("Average")
        wrong = {("Average", m) for m in frame if abs(rest[m].mean() - frame.loc["Average", m]) > 0.006}
        assert wrong <= noted, f"{name}: {wrong - noted}"


def test_six_rows_of_table_4_and_its_average_of_nine_leave_these_sums():
    frame = published_table("coft-4")
    missing = 9 * frame.loc["Average"] - frame.drop("Average").sum()
    expected = {"CoOp": (161.65, 176.55, 193.21), "Tip-Adapter": (171.30, 184.11, 193.44), "Tip-Adapter-F": (179.10, 190.88, 205.99)}
    assert all(missing[f"{m} {k}"] == pytest.approx(v, abs=0.01) for m, values in expected.items() for k, v in zip((2, 4, 8), values))
    nine = published_table("coft-1")
    columns = ["CLIP", "CoFT+", "CoFT"]
    pd.testing.assert_frame_equal(frame[columns], nine.loc[frame.index, columns])


def test_tables_of_coft_have_their_shapes():
    assert {n: published_table(n).shape for n in published_names() if n.startswith("coft")} == {"coft-1": (10, 8), "coft-2": (1, 11), "coft-3": (10, 4), "coft-4": (7, 12), "coft-5": (8, 8)}
    assert len(NINE) == 9 and "sun397" not in NINE


def test_a_note_stands_at_its_number():
    assert "71.33 [1] |" in published_markdown("coft-3") and "- [1] Average, PromptKD: The column recomputes to 71.64." in published_markdown("coft-3")


# Tables of records

def made_up(method, task, seed, accuracy, **more):
    return dict(schema=SCHEMA, key=f"{method}/{task}/{seed}", method=method, task=task, seed=seed, accuracy=accuracy) | more


SOME = [made_up("zero-shot", "digits", 0, 70.0), made_up("coft", "digits", 0, 78.0), made_up("coft", "digits", 1, 80.0), made_up("coft", "glyphs", 0, 47.0)]


def test_a_table_says_what_is_partial():
    text = table(SOME)
    assert text.to_dict("list") == {"zero-shot": ["70.0 (1 of 2 seeds)", "", ""], "coft": ["79.0 ± 1.4", "47.0", "63.0"]}
    assert text.index.tolist() == ["digits", "glyphs", "Average"]
    numbers = table(SOME, form="mean", methods="coft")
    assert numbers.coft.tolist() == [79.0, 47.0, 63.0] and table(SOME, form="seeds").coft.tolist() == [2, 1]
    assert table(SOME, tasks="digits").index.tolist() == ["digits"]
    assert "digits,70.0 (1 of 2 seeds),79.0 ± 1.4" in text.to_csv()
    assert text.to_markdown().splitlines()[2].split("|")[1:4] == [" digits  ", " 70.0 (1 of 2 seeds) ", " 79.0 ± 1.4 "]
    assert r"digits & 70.0 (1 of 2 seeds) & 79.0 ± 1.4 \\" in text.to_latex()


def test_a_table_is_also_made_from_a_folder_and_names_what_it_leaves_out(tmp_path):
    for r in [*SOME, made_up("coft", "digits", 2, 0.0, schema=0, key="of an older version")]:
        Records(tmp_path).add(r, {})
    found = table(tmp_path)
    assert found.equals(table(SOME)) and found.attrs["notes"] == [f"1 records of another schema (0; this version has {SCHEMA}) are left out."]


@pytest.mark.parametrize("ask, parts", [
    (lambda: table(SOME, methods="cooft"), ["methods: 'cooft'", "Did you mean 'coft'"]),
    (lambda: table(SOME, tasks=["digit"]), ["tasks: 'digit'", "Did you mean 'digits'"]),
    (lambda: table(SOME, form="median"), ["form: 'median'", "mean"]),
    (lambda: table([]), ["runs: 0 records"]),
    (lambda: table([dict(schema=0, key="a")]), ["none of schema 1", "Run the job again"]),
    (lambda: table("no/such/folder"), ["runs:", "records.jsonl", "out_dir"]),
    (lambda: table([*SOME, made_up("coft", "digits", 0, 77.0, key="b", settings=dict(top_k=8))]), ["'coft' on 'digits' with seed 0", "more than once", "top_k None and 8"]),
    (lambda: published_table("coft-6"), ["table: 'coft-6'", "Did you mean"]),
], ids=range(8))
def test_what_no_table_can_be_made_of_is_said(ask, parts):
    message = message_of(ask)
    assert all(p in message for p in parts), message


# What can run

def test_what_cannot_run_is_told_and_the_rest_runs(tmp_path):
    p = Parameters(tasks=["glyphs-toy", "eurosat", "dtd"], data_root=str(tmp_path), seeds={"glyphs-toy": [0], "eurosat": [0, 1], "dtd": [2]})
    kept, ready, rest = what_can_run(["zero-shot", "tip-adapter"], p, labels=False)
    assert kept == ["zero-shot"] and ready.tasks == ["glyphs-toy"] and ready.seeds == {"glyphs-toy": [0]}
    assert rest["not run"].tolist() == ["tip-adapter", "task eurosat", "task dtd"]
    assert "labelled images" in rest.why[0] and "coft-4" in rest["what to do"][0]
    assert "EuroSAT" in rest.why[1] and "Download" in rest["what to do"][1]
    assert what_can_run(["zero-shot", "tip-adapter"], p.only("glyphs-toy"))[2].empty


def test_without_weights_nothing_runs(tmp_path):
    p = Parameters(tasks="glyphs-toy", model="ViT-B-16-quickgelu", pretrained=str(tmp_path / "absent.pt"))
    kept, ready, rest = what_can_run(["zero-shot"], p)
    assert ready is None and rest["not run"].tolist() == ["model ViT-B-16-quickgelu"] and "absent.pt" in rest.why[0]


# Estimates

def test_a_rehearsal_makes_few_steps_and_notes_the_whole(clip, task):
    with rehearsal(2) as made:
        get_method("top-k", preset="paper", top_k=4, epochs=3, batch_size=8).fit(clip, task, progress=False)
    assert [{k: q[k] for k in ("images", "epochs", "batch_size")} for q in made.phases] == [dict(images=16, epochs=3, batch_size=8)]
    history = get_method("top-k", preset="paper", top_k=4, epochs=3, batch_size=8).fit(clip, task, progress=False).trace["histories"]
    assert len(*history.values()) == 3, "outside the block a training is whole"


@pytest.mark.parametrize("method, settings, steps", [
    ("top-k", dict(top_k=8, epochs=2, batch_size=8), 2 * 4), # 8 images of 4 classes
    ("supervised", dict(epochs=1, batch_size=9), 8), # all 72 images
    ("coop", dict(shots=2, epochs=3, batch_size=4), 3 * 2), # 2 images of 4 classes
    ("upl", dict(top_k=4, epochs=2, batch_size=8, n_prompts=3), 3 * 2 * 2), # 4 images of 4 classes, three times
    ("lafter", dict(n_visual=0, texts="templates", text_epochs=5, epochs=2, batch_size=24), 5 + 2 * 3), # all sentences, then all 72 images
])
def test_an_estimate_counts_the_steps_of_the_whole_run(clip, task, monkeypatch, method, settings, steps):
    def an_hour_each(self, module, images, index, columns, schedule, size, augmentation, seed, phase, title):
        self.phases.append(dict(title=title, images=len(index), of=len(images), epochs=schedule.epochs, batch_size=schedule.batch_size, seconds_per_step=3600.0))
        return [{"loss": 0.0}]

    monkeypatch.setattr(Rehearsal, "play", an_hour_each)
    cost = dict(seconds=3 * 3600.0 * {"upl": 3, "lafter": 2}.get(method, 1), peak_memory_mb=1024.0)

    class Measured:
        def __enter__(self): return cost
        def __exit__(self, *error): return False

    monkeypatch.setattr("coft.pages.measured", Measured)
    assert rehearse(get_method(method, preset="paper", **settings), clip, task) == dict(hours=pytest.approx(steps), memory_gb=1.0)


def test_finished_runs_are_not_in_the_estimate(task, tmp_path, monkeypatch):
    from coft.experiment import run_variants
    monkeypatch.setitem(TASKS, "toy", lambda: task)
    p = Parameters(methods="zero-shot", tasks="toy", seeds=[0, 1], out_dir=str(tmp_path), device="cpu")
    variants = {"zero-shot": ("zero-shot", {})}
    assert estimate(lambda t: variants, p).runs.tolist() == [2, 2]
    run_variants(variants, p, say=lambda line, **_: None)
    assert estimate(lambda t: variants, p).to_dict("records") == [dict(task="all", method="", runs=0, hours=0, memory_gb=0)]


# Beside the published numbers

def paper_run(method, accuracy, task="eurosat", **more):
    name, _, shots = method.partition(", ")
    settings = asdict(get_method(name, **official_settings(name, task, int(shots) if shots else None)).settings_for("paper"))
    return dict(task=task, method=method, model="ViT-B-16-quickgelu", pretrained="openai", n_train=13500, n_test=8100, seed=0, accuracy=accuracy, settings=settings) | more


@pytest.mark.parametrize("change", [dict(pretrained="laion2b_s34b_b88k"), dict(n_train=100), dict(task="digits"), dict(settings={}), dict(model="ViT-B-32-quickgelu")], ids=str)
def test_no_difference_is_taken_from_other_data_weights_or_settings(change):
    assert len(beside_published([paper_run("coft", 85.0)], "coft-1")) == 1
    assert beside_published([paper_run("coft", 85.0) | change], "coft-1").empty


def test_differences_of_few_shot_methods_and_of_other_backbones():
    found = beside_published([paper_run("tip-adapter-f, 8", 83.19), paper_run("coop, 2", 60.06), paper_run("coop, 16", 80.0)], "coft-4")
    assert found.method.tolist() == ["Tip-Adapter-F 8", "CoOp 2"] and found.ours.tolist() == [83.19, 60.06]
    assert np.isnan(found.difference[0]) and "validation images" in found.remark[0], "what was searched on labels is not the same setting"
    assert (found.difference[1], found.remark[1]) == (1.0, "")
    (lafter,) = beside_published([paper_run("lafter", 70.0)], "coft-1").itertuples()
    assert np.isnan(lafter.difference) and "sentences" in lafter.remark
    assert beside_published([paper_run("upl", 65.31, model="ViT-B-32-quickgelu")], "coft-5").to_dict("records") == [dict(task="ViT-B/32, EuroSAT", method="UPL", seeds=1, ours=65.31, published=64.31, difference=1.0, remark="")]


def test_supervision_overtakes_where_its_mean_and_its_interval_do(tmp_path):
    records, runs, right = Records(tmp_path), [], {"coft": 60, "coop, 1": 50, "coop, 2": 61, "coop, 4": 90, "linear-probe, 4": 20}
    for method, n in right.items():
        r = made_up(method, "glyphs-toy", 0, n, seconds=1.0)
        records.add(r, {"test_right": (np.arange(100) < n)[None] if method != "coop, 2" else (np.arange(100) >= 39)[None]})
        runs.append(r)
    found = overtaken_at(runs, "coft", Parameters(tasks="glyphs-toy", out_dir=str(tmp_path)))
    assert found.to_dict("records") == [{"task": "glyphs-toy", "method": "coop", "mean above coft": 2, "interval above coft": 4}, {"task": "glyphs-toy", "method": "linear-probe", "mean above coft": 0, "interval above coft": 0}]


def test_the_protocol_names_who_runs_with_official_settings():
    said = protocol_markdown(Parameters(tasks="glyphs-toy"), lambda t: {"coft": ("coft", {}), "tip-adapter": ("tip-adapter", {}), "transclip": ("transclip", {})})
    assert "| glyphs-toy | a photo of the {}. | 4: " in said and "Images per class (K): coft 64." in said
    assert "First labels come from the template above." in said
    other = protocol_markdown(Parameters(tasks="glyphs-toy"), lambda t: {"coft+": ("coft+", {}), "upl": ("upl", {}), "coft": ("coft", dict(template_set="single"))})
    assert "or from another set: coft+ `llm`, coft `single`." in other and "upl averages 4 prompts." in other
    assert ("tip-adapter" in said.split("of ")[-1]) == ("tip-adapter" not in (ROOT / "coft/presets/embedded.json").read_text())
    assert "transclip is transductive" in said


def test_labels_in_the_end_are_a_round_of_their_own():
    report = dict(selected_size=200, selected_precision=80.0, final_selected_size=900, final_selected_precision=95.0)
    rounds = label_rounds([dict(task="t", method="fixmatch", seed=0, n_train=1000, pseudo_labels=report)])
    assert rounds[["round", "labels", "right", "found"]].values.tolist() == [[1, 200, 80, 16], [2, 900, 95, 85.5]]


@pytest.mark.parametrize("name", ["fixmatch", "lafter"])
def test_methods_that_label_all_images_keep_what_they_say_in_the_end(name, clip, task):
    fitted = get_method(name, epochs=1, **(dict(n_visual=2, text_epochs=2) if name == "lafter" else {})).fit(clip, task, progress=False)
    index, labels = fitted.trace["final_selected_index"], fitted.trace["final_selected_labels"]
    assert (labels == fitted.predict_all(task.unlabelled).mean(0).argmax(1)[index]).all()


# Pages

def test_a_failing_page_does_not_keep_the_others_from_being_made(monkeypatch, tmp_path):
    def run(name, given, out_dir):
        if name == "coft-4":
            raise papermill.PapermillExecutionError(5, 5, "stop", "ValueError", "shots: 0 was given", "")
        return tmp_path / f"{name}.ipynb"

    monkeypatch.setattr("coft.experiment.run_page", run)
    made, failed = run_pages(["coft-4", "coft-1"], {}, str(tmp_path))
    assert made == ["coft-1.ipynb"] and failed == {"coft-4": "ValueError: shots: 0 was given"}
    message = message_of(stop_if_failed, made, failed, kind=RuntimeError)
    assert "1 of 2 pages failed: coft-4 (ValueError: shots: 0 was given)" in message and "Made: coft-1.ipynb" in message
    assert stop_if_failed(made, {}) is None


def test_a_table_that_does_not_exist_is_named_and_the_others_stay():
    right, wrong = known_tables(["coft-1", "coft-11", "craft-1"])
    assert right == ["coft-1", "craft-1"] and list(wrong) == ["coft-11"] and "Did you mean 'coft-1'" in wrong["coft-11"]
    for given in ("coft-1", "coft-11", ["coft-11"], ["all"], []):
        assert known_tables(given) == (given, {}), "nothing is left out where nothing would be left"


def test_what_a_page_does_not_know_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("papermill.execute_notebook", lambda *_, **__: None)
    run_pages(["coft-5"], dict(model="ViT-B-32", seeds=[0, 1], trackers=None, methods=None, unlabelled=300), str(tmp_path))
    assert capsys.readouterr().out == "coft-5 has no model, unlabelled; it is made without.\n"
    run_pages(["coft-1"], dict(model="ViT-B-32", profile="embedded", grid=None, packed=True), str(tmp_path))
    assert capsys.readouterr().out == ""


def run_page(name, folder, **given):
    "Everything that a page shows, as texts; `PNG` for a picture."
    page = papermill.execute_notebook(ROOT / f"nbs/tables/{name}.ipynb", folder / "page.ipynb", dict(out_dir=str(folder / "out"), device="cpu") | given, kernel_name="python3", progress_bar=False)
    outputs = [o["data"] for c in page.cells if c.cell_type == "code" for o in c.outputs if "data" in o]
    return ["PNG" if "image/png" in d else d.get("text/markdown") or d["text/plain"] for d in outputs]


QUICK = {"top-k": dict(epochs=1), "upl": dict(epochs=1, n_prompts=1, top_k=4), "coft": dict(top_k=4, phase1_epochs=1, phase2_epochs=1), "coop": dict(epochs=1)}


def test_the_page_of_table_1_runs_and_tells_what_does_not(tmp_path):
    "Few steps on four characters, with one data set and one method that cannot be."
    methods = ["zero-shot", "transclip", "tip-adapter", "top-k", "upl", "coft"]
    shown = run_page("coft-1", tmp_path, profile="paper", model="embedded", tasks=["glyphs-toy", "eurosat"], data_root=str(tmp_path), methods=methods, settings={m: QUICK[m] for m in ("top-k", "upl", "coft")}, seeds=[0, 1])
    text = "\n".join(shown)
    assert "**ViT-B/16, unlabelled training images" in text and "tip-adapter" in text and "task eurosat" in text
    assert "transclip (transductive)" in text and "memory_gb" in text and "difference from coft" in text
    assert "so no difference is taken" in text and "both models agree" in text and shown.count("PNG") == 1 + 3 + 3 + 1
    assert {r["method"] for r in Records(tmp_path / "out").load()} == {"zero-shot", "transclip", "top-k", "upl", "coft", "coft-phase1"}


def test_a_page_without_weights_ends_below_the_published_numbers(tmp_path):
    shown = run_page("coft-4", tmp_path, model="ViT-B-16-quickgelu", pretrained=str(tmp_path / "absent.pt"), tasks="glyphs-toy")
    assert any("Tip-Adapter-F 8" in s for s in shown) and "absent.pt" in shown[-1]


def test_the_page_of_table_4_runs(tmp_path):
    shown = run_page("coft-4", tmp_path, tasks="glyphs-toy", methods=["zero-shot", "coft", "coop", "tip-adapter"], shots=[1, 2], settings={m: QUICK[m] for m in ("coft", "coop")})
    text = "\n".join(shown)
    assert "| glyphs-toy | coop |" in text and "mean above coft" in text and "difference from coft" in text and "right among accepted" in text and shown.count("PNG") == 1 + 3 + 1


def test_the_page_of_table_5_runs(tmp_path):
    shown = run_page("coft-5", tmp_path, tasks="glyphs-toy", methods=["zero-shot", "top-k"], settings={"top-k": QUICK["top-k"]})
    text = "\n".join(shown)
    assert "ViT-L/14, UCF101" in text and "**embedded**" in text and "**embedded-l**" in text and shown.count("PNG") == 2 * (1 + 3 + 1)


# The tuning page of the rivals

def test_the_tuning_page_of_the_rivals_asks_for_thirty_trials_that_can_be():
    "Nine in the first search, 21 in the second."
    space = {}
    for cell in nbformat.read(ROOT / "nbs/tuning_rivals.ipynb", 4).cells:
        if cell.cell_type == "code":
            exec(cell.source, space)
        if cell.source.startswith("longer"):
            break
    rivals = {m for m, method in METHODS.items() if method.__module__ in ("coft.pseudolabels", "coft.consistency", "coft.transductive", "coft.fewshot")}
    for official, n, name, total in ((1, 0, "first", 9), (0, 1, "second", 21)):
        searches = space[name]
        assert {len(s.changes) + space["n_draws"][n] + official for s in searches.values()} == {total}
        assert set(space["methods"]) == set(searches) == rivals - {CoOp.name}
        for m, s in searches.items():
            assert set(s.grid) <= {f.name for f in fields(METHODS[m].Settings)}
            for change in [{k: v} for k, values in s.grid.items() for v in values] + s.changes:
                get_method(m, **s.always | s.here | {k: v[0] for k, v in s.grid.items()} | change)
