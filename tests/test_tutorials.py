"The cells of the tutorials, run on a small task: what a page shows must be what the package still does."
import json

import matplotlib.pyplot as plt
import pytest
from coft.protocol import METHODS
from helpers import QUICK, ROOT


def run_cells(name, until="", **parameters):
    "Run the code cells of a tutorial with these parameters, up to the cell that holds `until`; return its names."
    notebook = json.loads((ROOT / f"nbs/tutorials/{name}.ipynb").read_text(encoding="utf-8"))
    names = {"__name__": "__main__"}
    for cell in (cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
        source = "".join(cell["source"])
        if until and until in source:
            break
        exec(compile(source, cell["id"], "exec"), names)
        if "parameters" in cell["metadata"].get("tags", []):
            assert parameters.keys() <= names.keys()
            names |= parameters
    return names


@pytest.fixture
def methods_as_before():
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


def test_a_method_of_your_own_is_registered_and_fits(methods_as_before):
    names = run_cells("own_method", until="run_variants(weights")
    assert METHODS["prototypes"] is names["Prototypes"]
    accuracy = (names["fitted"].predict(names["toy"].test) == names["toy"].audit.test).mean()
    assert accuracy > (names["plain"].argmax(1) == names["toy"].audit.test).mean()


def test_the_dual_prompt_in_pictures_runs_on_another_task(tmp_path, monkeypatch):
    plt.switch_backend("agg")
    monkeypatch.setattr(plt, "show", plt.close)
    names = run_cells("dual_prompt", task="glyphs-toy", overrides=QUICK, out_dir=str(tmp_path))
    assert len(names["labels"]) == len(names["data"].unlabelled) and names["accepted"].dtype == bool
    assert ((names["p_clean"] > 0.5) == names["accepted"]).all()
