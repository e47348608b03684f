"Pages as a reader's browser shows them."
import shutil

import nbformat
import pytest
from browser import PHONE, check_sights, chromium, look_at
from render_docs import load_page, output_names, render
from test_repository import ROOT

needs_chromium = pytest.mark.skipif(not chromium(), reason="Chromium is not installed")
DOT = "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' width='8' height='8'/%3E"


def write_page(folder, name, text):
    (folder / f"{name}.html").write_text(f"<!DOCTYPE html><meta charset='utf-8'><body style='margin:0'><main>{text}</main>", encoding="utf-8")


@needs_chromium
def test_what_sticks_out_and_what_is_not_shown_is_found(tmp_path):
    write_page(tmp_path, "good", f"<p>words</p><img src=\"{DOT}\" alt='dot'>")
    write_page(tmp_path, "wide", "<div id='ruler' style='width:700px'>ruler</div>")
    write_page(tmp_path, "blank", "<img src='gone.png' alt='gone'>")
    found = check_sights(tmp_path, ["good.html", "wide.html", "blank.html"], {f"{name}.html": name for name in ("good", "wide", "blank")})
    assert found == ["blank: at 390 pixels the picture gone.png is not shown", "blank: at 1280 pixels the picture gone.png is not shown",
                     "wide: at 390 pixels the page is 310 pixels too wide; the first wide part is ruler"]


@needs_chromium
def test_long_tables_formulas_code_and_pictures_fit_a_phone(tmp_path):
    source, out = tmp_path / "nbs", tmp_path / "site"
    source.mkdir(), out.mkdir()
    row = " | ".join(f"column_{k}" for k in range(30))
    text = "\n\n".join([
        "# Wide", f"| {row} |\n|{'---|' * 30}\n| {row} |", "$$" + " + ".join(f"x_{{{k}}}" for k in range(80)) + "$$",
        "```python\n" + "very_long_name = " * 40 + "1\n```", "`" + "a_name_without_a_space_" * 10 + "`",
        "![ruler](ruler.svg)"])
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)]), source / "index.ipynb")
    (out / "ruler.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg' width='3000' height='10'/>", encoding="utf-8")
    pages = render(source, output_names(source), ["index.ipynb"])
    (out / "index.html").write_text(str(pages["index.html"]), encoding="utf-8")
    sight, = look_at(out, pages, [PHONE])
    assert sight["sideways"] == 0 and not sight["broken"]


def test_a_browser_that_ends_by_itself_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("browser.chromium", lambda: shutil.which("false"))
    assert check_sights(tmp_path, ["a.html"], {}) == ["Chromium did not get through 1 page(s); it ended by itself"]


def test_a_page_needs_no_network_and_has_formulas_without_scripts(tmp_path):
    notebook, front = load_page(ROOT / "nbs/03_prompts.ipynb")
    (tmp_path / "nbs").mkdir()
    nbformat.write(notebook, tmp_path / "nbs/index.ipynb")
    page = render(tmp_path / "nbs", {"index.ipynb": "index.html"}, ["index.ipynb"])["index.html"]
    formulas = sum(cell.source.count("$$") // 2 for cell in notebook.cells if cell.cell_type == "markdown")
    assert len(page.select("math[display=block]")) == formulas > 0
    assert not page.find_all("script") and "prefers-color-scheme: dark" in str(page.head)
    assert page.find("meta", attrs={"name": "viewport"})
