"The reference pages: every setting has a row that says whose choice it is, every word of the glossary a link."
import json
import re
from dataclasses import fields

import pytest
from coft.collaborate import CoFTPlusSettings, CoFTSemiSettings, CoFTSettings
from coft.craft import CraFTSettings
from helpers import ROOT

PAGES = ROOT / "nbs/reference"
ROW = re.compile(r"^\| `(\w+)` \| `(.*?)` \| (paper|code|inferred|ours) \| (\S.*?) \| (.*?) ?\|$", re.MULTILINE)


def cells(name):
    return json.loads((PAGES / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


def stored_rows():
    "The rows that the page of settings shows, as (setting, default) -> (whose, what it is, why)."
    outputs = [output for cell in cells("inferred") for output in cell.get("outputs", [])]
    text = "\n".join("".join(output["data"].get("text/markdown", "")) for output in outputs)
    return {(name, default): (whose, what, why) for name, default, whose, what, why in ROW.findall(text)}


@pytest.mark.parametrize("settings", [CoFTSettings, CoFTPlusSettings, CoFTSemiSettings, CraFTSettings])
def test_every_setting_stands_on_the_page_with_its_default(settings):
    rows = stored_rows()
    missing = [f.name for f in fields(settings) if (f.name, repr(f.default)) not in rows]
    assert not missing, f"nbs/reference/inferred.ipynb has no row, or an old default, for {missing} of {settings.__name__}; give each a note that says whose it is, and run the page again"


def test_the_page_says_what_the_code_says():
    source = "".join((ROOT / f"coft/{module}.py").read_text(encoding="utf-8") for module in ("collaborate", "craft"))
    words = lambda text: set(re.findall(r"[\w*+]+", text)) - {"paper", "code", "inferred", "ours"}
    told = lambda name: [words(note) for note in re.findall(rf"^ +{name}:\w+=.*? # (.*)$", source, re.MULTILINE)]
    stale = [name for (name, _), (whose, *text) in stored_rows().items() if not any(words(" ".join(text)) == note for note in told(name))]
    assert not stale, f"the notes of {stale} in the code have changed; run nbs/reference/inferred.ipynb again"


def test_what_the_paper_leaves_open_is_not_called_the_papers():
    owners = {name: whose for (name, _), (whose, *_) in stored_rows().items()}
    assert {owners[k] for k in ("top_k", "phase1_lr", "phase2_epochs", "rounds", "gamma")} == {"inferred"}
    assert {owners[k] for k in ("judge", "contrastive", "light_module")} == {"paper"} and owners["sigma"] == "code"


def test_every_word_of_the_glossary_leads_to_its_page():
    entries = [line for cell in cells("glossary") for line in "".join(cell["source"]).splitlines() if line.startswith("- ")]
    assert len(entries) > 40
    loose = [entry for entry in entries if not re.match(r"- \*\*.+?\*\*: ?.*\]\(\S+\.ipynb\)", entry)]
    assert not loose, loose
