"The search for settings: as many trials for every method, chosen by the mean over seeds."
import json

import pandas as pd
import pytest
from coft.experiment import Parameters
from coft.search import Search, draw, finalists, keep_choice, means, tune, winners
from helpers import ROOT, message_of

GRID = dict(lr=[1, 2, 3], epochs=[10, 20])


@pytest.fixture
def scored(monkeypatch):
    "Trials that take no time: what was run, and an accuracy that depends on settings and seed alone."
    ran = []

    def trial(method, settings, p, seed):
        ran.append((method, settings, seed))
        return dict(accuracy=settings.get("lr", 0) * 10 - 15.0 * seed * (settings.get("lr") == 3), seconds=1.0, remark="")

    monkeypatch.setattr("coft.search.trial", trial)
    monkeypatch.setattr("coft.search._all_settings", lambda method, settings: dict(epochs=100) | settings)
    return ran


def asked(tmp_path, **given):
    "Parameters with the task that the search needs."
    return Parameters(**dict(tasks="glyphs-toy", out_dir=str(tmp_path), progress=False) | given)


def test_draws_are_those_that_the_stored_logs_were_made_with():
    "Trial 1 of top-k in the log of the embedded preset, drawn anew from the grid of its first sweep."
    grid = dict(optimizer=["adamw"], lr=[1e-4, 3e-4, 1e-3], epochs=[8, 15], head_init=["text"], weight_decay=[0.05], top_k=[16, 32, 64, 96], template_set=["coop", "ensemble"])
    log = pd.read_csv(ROOT / "nbs/tuning_trials.csv")
    stored, = log[(log.method == "top-k") & (log.trial == 1)].settings
    assert draw(grid, "tuning", "top-k", 1) == json.loads(stored)


def test_every_method_gets_as_many_trials(tmp_path, scored):
    searches = {m: Search(GRID, [dict(epochs=5), dict(lr=3)], always=dict(kept=1), here=dict(shots=2)) for m in ("a", "b")}
    found = tune(searches, asked(tmp_path), "a test", n_draws=4, n_finalists=2, final_seeds=3)
    runs = found.log.groupby(["method", "seed"]).size()
    assert runs.loc["a"].tolist() == runs.loc["b"].tolist() == [7, 2, 2, 2]
    assert all(settings["kept"] == 1 and settings["shots"] == 2 for _, settings, _ in scored) and len(scored) == 26
    assert json.loads(found.log.settings[0]) == {} and (found.scores["count"] == 4).all()


def test_the_mean_over_seeds_decides_and_not_the_first_seed(tmp_path, scored):
    "With lr 3 the first seed is best, and the others are far below those of lr 2."
    searches = {"a": Search(dict(lr=[2]), [dict(lr=3)], always=dict(kept=1))}
    found = tune(searches, asked(tmp_path), "a test", n_draws=1, n_finalists=2, final_seeds=2)
    assert found.log[found.log.seed == 0].accuracy.idxmax() == 2
    assert found.chosen == {"a": dict(kept=1, lr=2)}


def test_changes_are_made_to_the_best_draw(tmp_path, scored):
    searches = {"a": Search(GRID, [dict(epochs=7)])}
    found = tune(searches, asked(tmp_path), "a test", n_draws=6, n_finalists=1, final_seeds=1)
    tried = [json.loads(s) for s in found.log[found.log.seed == 0].settings]
    best = max(tried[:7], key=lambda s: s.get("lr", 0))
    assert tried[7] == best | dict(epochs=7)


def test_no_trial_is_made_twice(tmp_path, scored):
    "One change gives the leader again, the other the defaults; both give way to draws."
    searches = {"a": Search(dict(lr=[1, 2, 3, 4, 5, 6]), [dict(epochs=100), dict(lr=6)])}
    found = tune(searches, asked(tmp_path), "a test", n_draws=4, n_finalists=1, final_seeds=1)
    tried = [json.loads(s) for s in found.log[found.log.seed == 0].settings]
    assert len(tried) == 7 and len({s.get("lr") for s in tried}) == 7
    with pytest.raises(ValueError, match="the grid of a has too few settings"):
        tune({"a": Search(dict(lr=[1, 2]), [dict(epochs=100)])}, asked(tmp_path), "a test", n_draws=2, n_finalists=1, final_seeds=1)


def test_a_second_search_goes_on_from_the_log_of_the_first(tmp_path, scored):
    first = tune({"a": Search(dict(lr=[1, 2]), [dict(epochs=7)])}, asked(tmp_path), "a test", n_draws=2, n_finalists=2, final_seeds=2)
    stored = tmp_path / "log.csv"
    first.log.to_csv(stored, index=False)
    n = len(scored)
    second = tune({"a": Search(dict(lr=[1, 4, 5]), [dict(epochs=8)])}, asked(tmp_path), "second", n_draws=2, n_finalists=2, final_seeds=2, before=pd.read_csv(stored))
    tried = [json.loads(s) for s in second.log[second.log.seed == 0].settings]
    assert tried[:4] == [json.loads(s) for s in first.log[first.log.seed == 0].settings] and tried[6] == dict(lr=5, epochs=8)
    assert sorted(s["lr"] for s in tried[4:6]) == [4, 5], "1 was tried before"
    assert [settings for _, settings, seed in scored[n:] if not seed] == tried[4:] and len(scored) == n + 3 + 4, "nothing of the first is made again"
    assert second.chosen["a"]["lr"] == 5 and len(second.log) == len(first.log) + 3 + 4
    with pytest.raises(ValueError, match="before: the numbers of trials are 4 of a, 0 of b"):
        tune({m: Search(dict(lr=[1]), []) for m in "ab"}, asked(tmp_path), "second", 1, 1, 1, before=first.log)


def test_a_trial_that_breaks_down_has_lost(tmp_path, monkeypatch):
    def diverges(method, settings, *args, **kwargs):
        if settings.get("lr") == 2:
            raise FloatingPointError("the loss is nan")
        return [dict(accuracy=1.0, seconds=2.0, resumed=False)]

    monkeypatch.setattr("coft.search.run_variant", diverges)
    monkeypatch.setattr("coft.search._all_settings", lambda method, settings: settings)
    found = tune({"a": Search(dict(lr=[1]), [dict(lr=2)])}, asked(tmp_path), "a test", 1, 1, 1)
    lost = found.log[found.log.trial == 2].iloc[0]
    assert (lost.accuracy, lost.remark) == (0.0, "the loss is nan") and found.chosen != {"a": dict(lr=2)}


def test_finalists_means_winners():
    log = pd.DataFrame(dict(method=["a", "a", "a", "b"], trial=[0, 1, 2, 0], accuracy=[1.0, 3.0, 2.0, 5.0]))
    best = finalists(log, 2)
    assert best == {"a": [1, 2], "b": [0]}
    more = pd.concat([log, pd.DataFrame(dict(method=["a", "a", "a"], trial=[0, 1, 2], accuracy=[99.0, 0.0, 2.0]))])
    scores = means(more, best)
    assert ("a", 0) not in scores.index and scores.loc[("a", 1), "mean"] == 1.5
    assert winners(scores) == {"a": 2, "b": 0}


@pytest.mark.parametrize("given, expected", [
    (dict(searches={"a": Search(GRID, []), "b": Search(GRID, [dict(lr=1)])}), "the numbers of changes differ (a 0, b 1)"),
    (dict(p=dict(tasks=["digits", "glyphs"])), "tasks: digits, glyphs were given; a search needs one task"),
    (dict(n_draws=0), "n_draws: 0 was given"),
    (dict(workers=0.5), "workers: 0.5 was given"),
], ids=["unequal", "tasks", "draws", "workers"])
def test_a_search_that_cannot_be_fair_is_refused(tmp_path, scored, given, expected):
    ask = dict(searches={"a": Search(GRID, [])}, name="a test", n_draws=1, n_finalists=1, final_seeds=1) | given
    message = message_of(tune, **ask | dict(p=asked(tmp_path, **given.get("p", {}))))
    assert expected in message and not scored


def test_a_choice_keeps_what_other_methods_had(tmp_path, monkeypatch):
    (tmp_path / "package").mkdir()
    (tmp_path / "package/small.json").write_text('{"a": {"lr": 1}, "b": {"lr": 2}}')
    monkeypatch.setattr("coft.search.PRESETS", tmp_path / "package")
    log = pd.DataFrame(dict(method=["b"], accuracy=[1.0]))
    for name, expected in (("small", {"a": {"lr": 1}, "b": {"lr": 3}}), ("new", {"b": {"lr": 3}})):
        keep_choice(tmp_path / "out", log, f"{name}.csv", {"b": {"lr": 3}}, name)
        assert json.loads((tmp_path / f"out/{name}.json").read_text()) == expected
    assert json.loads((tmp_path / "package/small.json").read_text())["b"] == {"lr": 2}, "the package is not touched"
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out/small.csv"), log)


def test_draws_differ_between_trials_and_searches():
    wide = dict(x=list(range(1000)), y=list(range(1000)))
    drawn = [draw(wide, name, "a", i) for name in ("one", "two") for i in range(3)]
    assert len({d["x"] for d in drawn}) > 3 and all(d["x"] != d["y"] for d in drawn) and drawn[0] == draw(wide, "one", "a", 0)
