"The benchmarks: the plain way gives our numbers, steps are taken apart without a change, operations are counted right, and the page runs."
import json
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from coft.core import check_number
from coft.data import load_task, sample_task
from helpers import ROOT, message_of
from torch import nn

sys.path.insert(0, str(ROOT))
from benchmarks import measure, pictures  # noqa: E402


@pytest.mark.parametrize("n_classes", [3, 7])
def test_the_plain_way_gives_our_numbers(clip, n_classes):
    case = measure.Phase1(clip, n_classes, 2, n_context=4)
    found = case.differences() | measure.FullFineTuning(clip, 3, 2).differences() | measure.Craft(clip, 3, 4, population=8).differences(2)
    assert max(found.values()) < 1e-4, found
    case.ours.prompt.context.data[1] = case.ours.prompt.context.data[1].roll(1, -1)
    assert case.differences()["V-"] > 1e-3


def test_the_plain_way_gives_our_numbers_with_a_clip_of_77_tokens(vit):
    found = measure.Phase1(vit, 2, 1, n_context=4).differences()
    assert max(found.values()) < 1e-4, found


def test_a_resnet_has_no_plain_way():
    tower = nn.Module()
    assert "vision transformers only" in message_of(measure.plain.image_features, tower, torch.zeros(1, 3, 8, 8), kind=TypeError)
    block = nn.Module()
    block.attn = nn.Identity()
    assert "Identity" in message_of(measure.plain.block, block, torch.zeros(1, 2, 3), kind=TypeError)


def test_a_step_that_is_taken_apart_has_the_gradients_of_the_whole(clip):
    case = measure.Phase1(clip, 3, 4)
    pixels, model = case.draw()[0], case.ours
    model(pixels=pixels, label=case.label, u=case.u)["loss"].backward()
    whole = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.0)
    parts = measure.split_step(lambda: model.image_features(pixels), measure.behind(model, pixels, case.label, case.u), optimizer, clip.device)
    assert set(parts) == {"image tower", "behind it", "optimiser"} and "image_features" not in vars(model)
    for g, p in zip(whole, (p for p in model.parameters() if p.requires_grad)):
        assert torch.allclose(g, p.grad, rtol=1e-4, atol=1e-6)
    unused = nn.Parameter(torch.ones(1))
    assert "cannot be taken apart" in message_of(measure.split_step, lambda: unused * 2, lambda v: unused.sum(), torch.optim.SGD([unused], 0.0), clip.device, kind=RuntimeError)


def test_ways_take_turns_after_a_round_that_does_not_count():
    calls = []
    found = measure.alternating({w: lambda w=w: calls.append(w) or {"whole": len(calls)} for w in "ab"}, 3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab" and [f["a"]["whole"] for f in found] == [3, 6, 7]


def test_every_generation_of_craft_is_encoded_anew_and_is_the_same_for_both_ways(clip, monkeypatch):
    asked = {"ours": [], "plain": []}
    for way, kind in (("ours", measure.PromptEncoder), ("plain", measure.plain.Prompts)):
        monkeypatch.setattr(kind, "forward", lambda self, context, *rest, way=way, forward=kind.forward: asked[way].append(context.cpu()) or forward(self, context, *rest))
    measure.craft(clip, 3, 4, repetitions=2, loop=2)
    assert [len(contexts) for contexts in asked["ours"]] == [40] * 3 and len(asked["plain"]) == 3 * 2, "the round that does not count, and two repetitions"
    assert len({tuple(contexts.flatten().tolist()) for contexts in asked["ours"]}) == 3
    for contexts, i in zip(asked["ours"], (0, 2, 4)):
        assert torch.equal(contexts[:2], torch.stack(asked["plain"][i:i + 2]))


def test_ratios_are_taken_within_a_repetition():
    found = [{"plain": {"whole": 10.0}, "ours": {"whole": 2.0}}, {"plain": {"whole": 30.0}, "ours": {"whole": 3.0}}, {"plain": {"whole": 9.0}, "ours": {"whole": 3.0}}]
    rows = measure.rows_of(found, "step", notes={"plain": "from 3"}, classes=7) + measure.rows_of(found, "step", classes=3)
    made = measure.summary(measure.ratios(rows, "step", ("plain", "whole"), ("ours", "whole")))
    assert set(zip(made.classes, made.note)) == {(7, "from 3"), (3, "")}
    made = made[made.classes == 7].iloc[0]
    assert [made["median"], made.q1, made.q3] == [5.0, *np.quantile([5, 10, 3], [0.25, 0.75])]
    assert (made.way, made.part, made.note, made.classes, made.unit, made.repetitions) == ("plain / ours", "whole", "from 3", 7, "times", 3)
    assert measure.ratios(rows, "another", ("plain", "whole"), ("ours", "whole")) == []


def test_operations_and_bytes_are_counted():
    a, b = torch.zeros(3, 5), torch.zeros(5, 7)
    assert measure.counted(lambda: (a @ b).T) == dict(operations=2 * 3 * 5 * 7, bytes=4 * (15 + 35 + 21))
    w = torch.zeros(5, 7, requires_grad=True)
    assert measure.counted(lambda: (a @ w).sum().backward())["operations"] == 2 * 2 * 3 * 5 * 7


PEAKS = """
import numpy as np, psutil
from benchmarks import peak
held = np.ones(100 * 2**20, np.uint8)
print(peak.peak_bytes() - psutil.Process().memory_info().rss)
del held
print(peak.forget_peak())
before = peak.peak_bytes()
held = np.ones(50 * 2**20, np.uint8)
del held
print(peak.peak_bytes() - before)
"""


def test_the_peak_is_that_of_what_was_held_since():
    above, forgotten, since = subprocess.run([sys.executable, "-c", PEAKS], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert int(above) >= -(2**20)
    if forgotten == "False":
        pytest.skip("this system does not forget a peak")
    assert 45 < int(since) / 2**20 < 60


def test_memory_is_measured_in_a_process_of_its_own(monkeypatch):
    case = dict(what="full fine-tuning step", way="plain", backbone="embedded", pretrained=None, n_classes=3, batch=4)
    made = {r["part"]: r["value"] for r in measure.peak_memory(**case)}
    assert 0 < made["step"] < made["process"] < 4000
    monkeypatch.setattr("subprocess.run", lambda *a, **k: SimpleNamespace(returncode=1, stderr="killed for memory"))
    assert "killed for memory" in message_of(measure.peak_memory, **case, kind=RuntimeError)


def test_names_and_a_whole_run_on_files(clip):
    assert len(set(measure.class_names(clip, 180))) == 180
    assert "there are names of" in message_of(measure.class_names, clip, 10_000)
    run, = measure.whole_run(clip, 8, 2, (20, 30), **FEW)
    assert run["value"] > 0 and run["unit"] == "min"


def test_there_are_class_names_for_a_thousand_classes(vit):
    names = measure.class_names(vit, 1000)
    assert len({n.lower() for n in names}) == 1000 and all(len(vit.tokenizer.encode(n)) < 8 for n in names)


def test_bars_have_hatches_and_lines_have_markers(tmp_path):
    rows = measure.rows_of([{"ours": {"image tower": 1.0, "text tower": 0.5}, "plain": {"image tower": 1.0, "text tower": 3.0}}] * 2, "step", backbone="b", classes=10)
    table = measure.summary(rows)
    bars = pictures.parts_of_steps(table).axes[0].patches
    assert len(bars) == 4 and {b.get_hatch() for b in bars} == {"", "///"}
    lines = pictures.growth({"classes": (table[table.part == "text tower"], "classes")}, "seconds").axes[0].get_legend().get_texts()
    assert [t.get_text() for t in lines] == ["ours", "plain"]


FEW = dict(top_k=2, phase1_epochs=1, phase2_epochs=1, n_context=2, n_visual=2)


def PAIRS(what="Phase I step", times=(1.5, 2.0, 2.5), **where):
    "Rows of two models: so many times faster with two processes, in turn of the repetitions."
    return measure.rows_of([{"one process": {"whole": t}, "two processes": {"whole": 1.0}} for t in times], f"two models, {what}", backbone=where.pop("backbone", "b"), **where)


def test_two_models_make_their_steps_in_turn_and_at_once():
    rows = measure.two_models("Phase I step", "embedded", None, 3, 2, 2, steps=2)
    assert {(r["way"], r["repetition"]) for r in rows} == {(w, r) for w in ("one process", "two processes") for r in (0, 1)}
    assert all(r["value"] > 0 for r in rows)


def test_a_process_of_a_pair_that_fails_is_told(capfd):
    assert "ended before its steps were made" in message_of(measure.Pair, "Phase I step", "embeded", None, 3, 2, ["cpu"] * 2, 1, kind=RuntimeError)
    assert "Did you mean 'embedded'" in capfd.readouterr().err


@pytest.mark.parametrize("times, pays, fastest", [((1.5, 2.0, 2.5), "two processes", "two processes"), ((0.5, 0.6, 0.4), "one process", "one process"), ((0.5, 1.2, 1.3), "one process", "two processes")])
def test_a_way_pays_where_it_is_faster_again_and_again(times, pays, fastest):
    row, = measure.what_pays(PAIRS(times=times)).to_dict("records")
    assert (row["step"], row["backbone"], row["pays"], row["fastest"]) == ("Phase I step", "b", pays, fastest)
    if fastest == "two processes":
        assert row["times faster than one process"].startswith(f"{np.median(times):.3g} ({np.quantile(times, 0.25):.3g} to")


def test_accuracies_by_the_reference_path(clip, monkeypatch):
    calls, plain = [], measure.PromptEncoder.plain
    monkeypatch.setattr(measure.PromptEncoder, "plain", lambda self, *args: calls.append(len(args)) or plain(self, *args))
    before = measure.PromptEncoder.forward
    rows = measure.agreement(clip, sample_task(load_task("glyphs-toy"), 24, 40), [0, 1], **FEW)
    ours, reference = ([r["value"] for r in rows if r["way"] == w] for w in ("ours", "reference"))
    assert calls and measure.PromptEncoder.forward is before, "the reference encodes whole prompts, and nothing stays changed"
    assert np.allclose(ours, reference, atol=100 / 40) and len(ours) == 2
    made = measure.rows_of([{"ours": {"accuracy": a}, "reference": {"accuracy": b}} for a, b in ((80.0, 79.0), (84.0, 83.0))], "accuracy", "%", backbone="b")
    assert measure.within_the_spread(made)[0]["value"] == pytest.approx(1 / np.std([79, 83], ddof=1)) and measure.within_the_spread(made[:2]) == []


def test_memory_of_a_further_class():
    peaks = [{"ours": {"step": 10.0 + n, "process": 1.0}, "plain": {"step": 10.0 + 5 * n, "process": 1.0}} for n in (3, 13)]
    rows = [r for n, p in zip((3, 13), peaks) for r in measure.rows_of([p], "peak memory, Phase I step", "MB", classes=n)]
    made, = measure.memory_per_class(rows)
    assert made["value"] == pytest.approx(0.2) and made["note"] == "from 3 to 13 classes" and measure.memory_per_class(rows[:4]) == []


def run_page(**parameters):
    "The code of the page in this process, with these parameters; what it has defined."
    cells = json.loads((ROOT / "nbs/benchmarks.ipynb").read_text(encoding="utf-8"))["cells"]
    names = {"__name__": "page"}
    for c in cells:
        if c["cell_type"] == "code":
            exec("".join(c["source"]), names)
            if "parameters" in c["metadata"].get("tags", []):
                names.update(parameters)
    return names


def test_the_page_runs_and_keeps_its_table(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "peak_memory", lambda **case: measure.rows_of([{case["way"]: {"step": 2.0, "process": 3.0}}], f"peak memory, {case['what']}", "MB", backbone=case["backbone"], classes=case["n_classes"]))
    monkeypatch.setattr("benchmarks.measure.training.__defaults__", (2,))
    monkeypatch.setattr(measure, "two_models", lambda what, backbone, pretrained, n_classes, *rest: PAIRS(what=what, backbone=backbone, classes=n_classes))
    monkeypatch.setattr(measure, "agreement", partial(measure.agreement, **FEW))
    done = run_page(backbone="embedded", backbones=["embedded-l"], classes=[3, 6], contexts=[2], images=[200], batch=4, repetitions=2, plain_classes=3, craft_classes=3, craft_loop=1, predicted=4, fed=4,
                    task="glyphs-toy", seeds=[0, 1], matrix=64, out_dir=str(tmp_path))
    table, aims = pd.read_csv(tmp_path / "benchmarks.csv"), done["aims"]
    assert {"Phase I step", "full fine-tuning step", "prediction", "feeding", "CraFT generation", "text tower", "selection", "training, both phases", "floor, Phase I step", "peak memory, Phase I step", "two models, Phase I step", "two models, full fine-tuning step", "accuracy"} <= set(table.measure)
    assert (table.repetitions == 2)[table.measure == "Phase I step"].all() and table.machine.nunique() == 1
    assert set(table[(table.measure == "Phase I step") & (table.classes == 6) & (table.way == "plain")].note) == {"from 3 classes"}
    assert set(table[(table.measure == "Phase I step") & (table.backbone == "embedded-l")].classes) == {3}
    assert (aims.measured != "not measured").tolist() == [False] * 8 + [False, True, True, True, False, False]
    assert all(check_number("share", float(a.split()[0]), low=0) >= 0 for a in aims.measured if a != "not measured")
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"benchmarks-step.png", "benchmarks-growth.png"}


def test_a_wrong_name_or_number_stops_the_page():
    assert "clases" in message_of(run_page, clases=[3])
    assert "craft_loop: 41" in message_of(run_page, backbone="embedded", craft_loop=41)


def test_a_summary_reads_by_part():
    rows = measure.rows_of([{"ours": {"a": 1.0, "b": 2.0}, "plain": {"a": 4.0}}, {"ours": {"a": 3.0, "b": 2.0}, "plain": {"a": 4.0}}], "step", backbone="x", classes=3)
    assert measure.wide(measure.summary(rows)).to_dict("records") == [
        {"backbone": "x", "classes": 3, "way": "ours", "a (s)": "2 (1.5 to 2.5)", "b (s)": "2 (2 to 2)"},
        {"backbone": "x", "classes": 3, "way": "plain", "a (s)": "4 (4 to 4)", "b (s)": ""}]
