"The papers' claims against records: which run counts, which rival decides, and by how much."
from dataclasses import asdict

import numpy as np
import pytest
from coft.claims import CHANGED, CLAIMS, Claim, all_runs, check_claims, claims_markdown, is_run
from coft.protocol import METHODS, get_method
from coft.results import SCHEMA, Records


def record(method, seed=0, task="digits", preset="paper", **settings):
    settings = asdict(get_method(method, preset, **settings).settings_for(preset))
    return dict(schema=SCHEMA, key=f"{method}{seed}{task}{sorted(settings.items())}", method=method, model="embedded", model_sha256="0", n_train=1257, task=task, trained_on=task, seed=seed, preset=preset, settings=settings, n_test=200)


def run(n_right, *args, **more):
    return record(*args, **more), (np.arange(200) < n_right).astype(float)


def test_every_side_of_every_claim_is_a_run_that_can_be_made():
    for name in {n for c in CLAIMS for n in (c.ahead, *c.of)}:
        called, change = CHANGED.get(name, (name, {}))
        method, _, how = called.partition(", ")
        given = dict(label_model="embedded-l", label_pretrained="") if how == "taught" else dict(shots=int(how)) | (dict(epochs={2: 100, 4: 100, 8: 200, 16: 200}[int(how)]) if method == "coop" else {}) if how else {}
        assert METHODS[method].supervised == (how.isdigit() or METHODS[method].noisy)
        assert is_run(record(method, task="digits-mislabelled-40" if METHODS[method].noisy else "digits", **change, **given), name), name


def test_methods_on_given_labels_count_where_40_percent_are_wrong_and_are_compared_with_runs_without_labels():
    claim = Claim("no label is better than a wrong one", "a paper", "coft", ("ce",))
    labelled = [run(60, "ce", task="digits-mislabelled-40"), run(160, "ce", task="digits-mislabelled-20"), run(180, "ce", task="digits")]
    (verdict,) = check_claims([run(100, "coft"), *labelled], [claim])
    assert (verdict.task, verdict.difference, verdict.says) == ("digits", 20.0, "holds")
    assert check_claims([run(100, "coft"), *labelled[1:]], [claim]) == []
    (crowd,) = check_claims([run(100, "coft", task="cifar100n"), run(120, "ce", task="cifar100n")], [claim])
    assert (crowd.task, crowd.difference) == ("cifar100n", -10.0)


def test_taught_is_who_has_the_teacher_of_the_page():
    claim = Claim("a teacher helps", "a paper", "coft, taught", ("coft",))
    own, teacher = run(100, "coft"), dict(label_pretrained="")
    (verdict,) = check_claims([own, run(120, "coft", label_model="embedded-l", **teacher)], [claim])
    assert verdict.difference == 10.0
    assert check_claims([own, run(120, "coft", label_model="embedded", **teacher)], [claim]) == [], "another teacher"
    assert not is_run(record("coft") | dict(model="ViT-B-32-quickgelu"), "coft, taught"), "no teacher is known for this model"


@pytest.mark.parametrize("change", [dict(trained_on="glyphs"), dict(schema=0), dict(method="coft+"), dict(preset="embedded")], ids=str)
def test_other_runs_are_not_taken_for_it(change):
    assert is_run(record("coft"), "coft") and not is_run(record("coft") | change, "coft")


def test_the_rival_that_is_ahead_decides_and_only_shared_seeds_count():
    claim = Claim("it wins", "a paper", "coft", ("upl", "top-k"))
    runs = [run(120, "coft"), run(120, "coft", seed=1), run(0, "coft", seed=2), run(60, "upl"), run(60, "upl", seed=1), run(150, "top-k", seed=1)]
    (verdict,) = check_claims(runs, [claim])
    assert (verdict.decided_by, verdict.difference, verdict.seeds, verdict.says) == ("top-k", -15.0, 1, "fails")
    assert check_claims(runs[:5], [claim]) == [], "a rival without runs leaves the claim unchecked"
    assert check_claims(runs[:5] + [run(150, "top-k", seed=7)], [claim]) == [], "no seed in common"


def test_a_claim_on_several_rivals_holds_only_where_every_one_is_beaten():
    "One rival is 4 points behind with little spread over images, the other 5 points behind, right on quite other images."
    claim, n = Claim("it wins", "a paper", "coft", ("upl", "top-k")), np.arange(200)
    runs = [run(100, "coft"), (record("upl"), (n < 92).astype(float)), (record("top-k"), (n >= 110).astype(float))]
    (verdict,) = check_claims(runs, [claim])
    assert (verdict.decided_by, verdict.difference, verdict.says) == ("top-k", 5.0, "open")
    (near,) = check_claims(runs, [Claim("it wins", "a paper", "coft", ("upl",))])
    assert (near.difference, near.says) == (4.0, "holds")


def test_runs_of_another_size_or_model_are_not_compared():
    claim = Claim("it wins", "a paper", "coft", ("zero-shot",))
    (coft, right), base = run(100, "coft"), run(60, "zero-shot")
    for change in (dict(n_train=300), dict(model_sha256="1")):
        assert check_claims([(coft | change, right), base], [claim]) == []
        small = record("zero-shot", seed=0) | change | dict(key="small")
        both = check_claims([(coft, right), (coft | change, right), base, (small, base[1] * 0)], [claim])
        assert sorted((v.images, v.difference) for v in both) == sorted([(1257, 20.0), (change.get("n_train", 1257), 50.0)])


def test_a_method_for_which_nobody_chose_settings_does_not_count():
    claim = Claim("it wins", "a paper", "coft", ("ce",))
    sides = lambda preset: [run(100, "coft", preset=preset), run(60, "ce", task="digits-mislabelled-40", preset=preset)]
    assert len(check_claims(sides("embedded"), [claim])) == 1 and check_claims(sides("photos"), [claim]) == []
    assert is_run(record("zero-shot", preset="photos"), "zero-shot"), "it has no settings"


@pytest.mark.parametrize("by, says", [(0.0, "holds"), (20.0, "open"), (40.0, "fails"), (-50.0, "holds")])
def test_the_margin_is_part_of_the_claim(by, says):
    claim = Claim("it wins", "a paper", "coft", ("zero-shot",), by)
    (verdict,) = check_claims([run(100, "coft"), run(60, "zero-shot")], [claim])
    assert verdict.says == says
    assert "+20.0 points" in claims_markdown([verdict], [claim]) and "Not checked" not in claims_markdown([verdict], [claim])


def test_a_packed_run_that_is_in_the_folder_too_counts_once(tmp_path):
    made, right = run(60, "zero-shot")
    records = Records(tmp_path / "own")
    records.add(made | dict(key="abc"), {"test_right": right[None].astype(bool)})
    records.pack(tmp_path / "packed.npz")
    for folder, packed in (("own", ["packed.npz"]), ("empty", ["packed.npz"]), ("own", [])):
        ((found, what),) = all_runs(tmp_path / folder, [tmp_path / p for p in packed])
        assert found["key"] == "abc" and what.sum() == 60
