"""Pages of the documentation as HTML without Quarto: nbdev prepares the notebooks, nbconvert renders them.

A page needs nothing from the network: formulas are MathML, and style and pictures lie in the page or beside it.
It is light or dark as the reader's system is, and fits a phone.

    python .ci/render_docs.py       leave the prepared pages in _proc, where Quarto finds them
"""
import json
import re
import sys
from functools import cache
from html import escape
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import yaml
from bs4 import BeautifulSoup
from checkout import ROOT, run_python
from jinja2 import pass_context
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from readme import CHANGELOG_PAGE, changelog_text

PAGE_SUFFIXES = {".ipynb", ".md", ".qmd"}
FRONT_MATTER = re.compile(r"^---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
HEADING_ATTRIBUTES = re.compile(r"\s*\{([^{}]*)\}\s*$")
FIGURE_TEXT = re.compile(r"^#\|\s*fig-(?:alt|cap):\s*(\S.*?)\s*$", re.MULTILINE)
CELL_KEYS = {"cell_type", "id", "metadata", "source", "outputs", "execution_count", "attachments"}
HIDDEN_INPUT = re.compile(r"^#\|\s*(?:echo|include):\s*false\s*$", re.MULTILINE)
NO_ALT = "No description has been provided for this image"
ALL_PAGES = "all-pages"


# ---- reading

def process_notebooks(copy):
    "Let nbdev prepare the pages of the checkout `copy`, and add the changelog; return the folder with the prepared pages."
    done = run_python("from nbdev.serve import proc_nbs; proc_nbs(force=True, n_workers=0)", copy)
    if done.returncode:
        sys.exit(f"nbdev could not prepare the pages; the cell that it names fails:\n{done.stderr}")
    prepared = copy / "_proc"
    (prepared / CHANGELOG_PAGE).parent.mkdir(exist_ok=True)
    (prepared / CHANGELOG_PAGE).write_text(changelog_text(copy), encoding="utf-8")
    return prepared


def load_page(path):
    "A page as a notebook without its front matter, and the front matter."
    if path.suffix == ".ipynb":
        content = json.loads(path.read_text(encoding="utf-8"))
        content["cells"] = [{key: cell[key] for key in cell if key in CELL_KEYS} for cell in content["cells"]]
        notebook = nbformat.reads(json.dumps(content), as_version=4)
    else:
        notebook = nbformat.v4.new_notebook()
        text = path.read_text(encoding="utf-8")
        found = FRONT_MATTER.match(text)
        head, body = (found[0], text[found.end():]) if found else ("", text)
        notebook.cells = [nbformat.v4.new_raw_cell(head), nbformat.v4.new_markdown_cell(body)]
    front = {}
    for cell in notebook.cells:
        found = FRONT_MATTER.match(cell.source.strip()) if cell.cell_type == "raw" else None
        front.update(yaml.safe_load(found[1]) if found else {})
    notebook.cells = [cell for cell in notebook.cells if cell.cell_type != "raw"]
    if "title" in front:
        title = f"# {front['title']}\n\n> {front.get('description', '')}"
        notebook.cells.insert(0, nbformat.v4.new_markdown_cell(title))
    return notebook, front


def page_files(folder):
    "The pages below `folder`, without hidden and underscored ones."
    return sorted(path for path in folder.rglob("*") if path.suffix in PAGE_SUFFIXES
                  and not any(part[0] in "._" for part in path.relative_to(folder).parts))


# ---- rendering

class FormulaRenderer(IPythonRenderer):
    "Formulas as MathML, which browsers show without a script."
    def inline_math(self, body):
        return convert(body)

    def block_math(self, body):
        return convert(body, display="block")


class Exporter(HTMLExporter):
    "nbconvert's page with formulas as MathML and without scripts from the network."
    def __init__(self):
        super().__init__(exclude_input_prompt=True, exclude_output_prompt=True, require_js_url="", mathjax_url="")

    @pass_context
    def markdown2html(self, context, source):
        attachments = context.get("cell", {}).get("attachments", {})
        return MarkdownWithMath(renderer=FormulaRenderer(escape=False, attachments=attachments)).render(source)


@cache
def exporter():
    return Exporter()


@cache
def page_style():
    "The style of all pages: that of this site, and nbconvert's dark colours where the reader's system is dark."
    dark = next(path for folder in exporter().template_paths if (path := Path(folder, "static/theme-dark.css")).is_file())
    colours = re.search(r":root\s*\{.*?\n\}", dark.read_text(encoding="utf-8"), re.DOTALL)[0]
    return f"{Path(__file__).with_name('page.css').read_text(encoding='utf-8')}\n@media (prefers-color-scheme: dark) {{\n{colours}\n}}\n"


def heading_id(text):
    "The anchor that Quarto gives to a heading."
    text = re.sub(r"[^\w\s.-]", "", text.strip().lower())
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", text)) or "section"


def set_heading_ids(soup):
    "Give every heading the anchor that Quarto gives it, in place of nbconvert's."
    seen = {}
    for heading in soup.find_all(re.compile("^h[1-6]$")):
        for mark in heading.select("a.anchor-link"):
            mark.decompose()
        text, anchor = heading.get_text(), None
        attributes = HEADING_ATTRIBUTES.search(text)
        if attributes:
            named = re.search(r"#([\w.-]+)", attributes[1])
            anchor = named and named[1]
            for piece in heading.find_all(string=HEADING_ATTRIBUTES):
                piece.replace_with(HEADING_ATTRIBUTES.sub("", piece))
        if not anchor:
            anchor = heading_id(heading.get_text())
            seen[anchor] = seen.get(anchor, -1) + 1
            anchor += f"-{seen[anchor]}" if seen[anchor] else ""
        heading["id"] = anchor


def apply_options(soup, notebook):
    "What Quarto does with the `#|` lines of code cells: a hidden input, the alt text of figures; the lines are not shown."
    for cell in notebook.cells:
        block = soup.find(id=f"cell-id={cell.get('id')}") if cell.cell_type == "code" else None
        if not block:
            continue
        hidden, alt = HIDDEN_INPUT.search(cell.source), FIGURE_TEXT.search(cell.source)
        for part in block.select(".jp-Cell-inputWrapper") if hidden else []:
            part.decompose()
        for comment in block.find_all("span", string=re.compile(r"^#\|")):
            after = comment.next_sibling
            comment.decompose()
            if isinstance(after, str):
                after.replace_with(after.removeprefix("\n"))
        for image in block.find_all("img") if alt else []:
            if image.get("alt", "") in ("", NO_ALT):
                image["alt"] = alt[1].strip("\"'")


def let_wide_parts_scroll(soup):
    "Put tables into boxes of their own that scroll sideways."
    for table in soup.find_all("table"):
        table.wrap(soup.new_tag("div", attrs={"class": "wide"}))


def render_page(notebook, front, navigation=""):
    "The page as parsed HTML, with `navigation` to the other pages beside it."
    body, _ = exporter().from_notebook_node(notebook)
    soup = BeautifulSoup(body, "html.parser")
    for script in soup.find_all("script"):
        script.decompose()
    soup.title.string = str(front.get("title", "coft"))
    set_heading_ids(soup)
    apply_options(soup, notebook)
    let_wide_parts_scroll(soup)
    style = soup.new_tag("style")
    style.string = page_style()
    soup.head.append(style)
    if navigation:
        soup.main.insert(0, BeautifulSoup(f"<p class='to-pages'><a href='#{ALL_PAGES}'>All pages</a></p>", "html.parser"))
        soup.body.append(BeautifulSoup(navigation, "html.parser"))
    return soup


def output_names(folder):
    "For every page below `folder`, its path there and the path of its HTML."
    names = {}
    for path in page_files(folder):
        given = load_page(path)[1].get("output-file")
        html = path.with_name(given).with_suffix(".html") if given else path.with_suffix(".html")
        names[path.relative_to(folder).as_posix()] = html.relative_to(folder).as_posix()
    return names


def page_list(names, page, contents):
    "Links from `page` to the pages that `contents` of the sidebar name, section by section."
    up = "../" * page.count("/")
    def link(name):
        here = " aria-current='page'" if name == page else ""
        text = "Home" if name == "index.ipynb" else Path(name).stem
        return f"<a href='{up}{names[name]}'{here}>{escape(text)}</a>"
    parts = []
    for entry in contents:
        section, listed = (entry["section"], entry["contents"]) if isinstance(entry, dict) else ("", [entry])
        links = "".join(f"<li>{link(name)}</li>" for name in listed if name in names)
        parts.append(f"<h2>{escape(section)}</h2><ul>{links}</ul>" if section else f"<ul>{links}</ul>")
    return f"<nav id='{ALL_PAGES}' aria-label='All pages'>{''.join(parts)}</nav>"


def local_target(page, url):
    "The file (from the site's root) and the anchor that `url` on `page` names; None for an address elsewhere."
    parts = urlsplit(url)
    if parts.scheme or parts.netloc:
        return None, None
    if not parts.path:
        return page, unquote(parts.fragment)
    base = [] if parts.path.startswith("/") else page.split("/")[:-1]
    for part in unquote(parts.path).strip("/").split("/"):
        if part == ".." and base and base[-1] != "..":
            base.pop()
        elif part != ".":
            base.append(part)
    return "/".join(base), unquote(parts.fragment)


def render(folder, names, contents):
    "All pages below `folder` as parsed HTML, by the path of their HTML, with links between pages led to the HTML."
    pages = {}
    for page, html in names.items():
        notebook, front = load_page(folder / page)
        pages[html] = render_page(notebook, front, page_list(names, page, contents))
        for link in pages[html].find_all("a", href=True):
            target, anchor = local_target(html, link["href"])
            if target in names:
                up = "../" * html.count("/")
                link["href"] = up + names[target] + (f"#{anchor}" if anchor else "")
    return pages


if __name__ == "__main__":
    print(f"the pages are prepared in {process_notebooks(ROOT).relative_to(ROOT)}")
