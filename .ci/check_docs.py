"""Render the documentation pages without Quarto and check them.

    python .ci/check_docs.py

nbdev processes the notebooks in a temporary copy, nbconvert renders them, and every page is then checked for
stored errors, dead links, dead anchors, missing images and images without alt text. The YAML files of the site
and the links of the Markdown files at the top are checked too. The pages stay in _docs, to be opened in a browser.
"""
import difflib
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import yaml
from bs4 import BeautifulSoup
from checkout import ROOT, copy_checkout, run_python
from nbconvert import HTMLExporter

PAGE_SUFFIXES = {".ipynb", ".md", ".qmd"}
FRONT_MATTER = re.compile(r"^---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
HEADING_ATTRIBUTES = re.compile(r"\s*\{([^{}]*)\}\s*$")
FIGURE_TEXT = re.compile(r"^#\|\s*fig-(?:alt|cap):\s*(\S.*?)\s*$", re.MULTILINE)
CELL_KEYS = {"cell_type", "id", "metadata", "source", "outputs", "execution_count", "attachments"}
HIDDEN_INPUT = re.compile(r"^#\|\s*(?:echo|include):\s*false\s*$", re.MULTILINE)
NO_ALT = "No description has been provided for this image"


# ---- reading

def process_notebooks(copy):
    "Let nbdev prepare the pages of the checkout `copy`; return the folder with the prepared pages."
    done = run_python("from nbdev.serve import proc_nbs; proc_nbs(force=True, n_workers=0)", copy)
    if done.returncode:
        sys.exit(f"nbdev could not prepare the pages; the cell that it names fails:\n{done.stderr}")
    return copy / "_proc"


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


def stored_errors(folder):
    "Messages about error outputs stored in the notebooks below `folder`."
    found = []
    for path in page_files(folder):
        for number, cell in enumerate(load_page(path)[0].cells if path.suffix == ".ipynb" else []):
            for output in cell.get("outputs", []):
                text = output.get("text", "") if output.output_type == "stream" else ""
                if output.output_type == "error" or "Traceback (most recent call last)" in text:
                    start = cell.source.strip().split("\n")[0]
                    found.append(f"{path.relative_to(folder)}: code cell {number} stores an error ({start!r}); run it again, "
                                 "or show the error through a helper that expects it")
    return found


# ---- rendering

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


def render_page(notebook, front, links):
    "The page as parsed HTML, with the `links` to the other pages above it."
    body, _ = HTMLExporter(exclude_input_prompt=True, exclude_output_prompt=True).from_notebook_node(notebook)
    soup = BeautifulSoup(body, "html.parser")
    soup.title.string = str(front.get("title", "coft"))
    set_heading_ids(soup)
    apply_options(soup, notebook)
    if links:
        soup.body.insert(0, BeautifulSoup(f"<nav style='padding:1em'>{links}</nav>", "html.parser"))
    return soup


def output_names(folder):
    "For every page below `folder`, its path there and the path of its HTML."
    names = {}
    for path in page_files(folder):
        given = load_page(path)[1].get("output-file")
        html = path.with_name(given).with_suffix(".html") if given else path.with_suffix(".html")
        names[path.relative_to(folder).as_posix()] = html.relative_to(folder).as_posix()
    return names


def navigation(names, page):
    "Links from `page` to all pages."
    up = "../" * page.count("/")
    ordered = sorted(names.values(), key=lambda html: (html != "index.html", html.count("/")))
    return " · ".join(f"<a href='{up}{html}'>{html.removesuffix('.html')}</a>" for html in ordered)


def render(folder, names):
    "All pages below `folder` as parsed HTML, by the path of their HTML, with links between pages led to the HTML."
    pages = {}
    for page, html in names.items():
        notebook, front = load_page(folder / page)
        pages[html] = render_page(notebook, front, navigation(names, page) if len(names) > 1 else "")
        for link in pages[html].find_all("a", href=True):
            target, anchor = local_target(html, link["href"])
            if target in names:
                up = "../" * html.count("/")
                link["href"] = up + names[target] + (f"#{anchor}" if anchor else "")
    return pages


# ---- checking

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


def near(name, names):
    "A hint with the names nearest to `name`."
    found = difflib.get_close_matches(name, list(names), n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def check_link(page, url, pages, folder, anchors):
    "What is wrong where `url` on `page` leads nowhere, else None."
    target, anchor = local_target(page, url)
    if target is None:
        return None
    if target not in pages:
        if target.startswith("..") or not (folder / target).exists():
            return f"dead link {url}{near(target, pages)}"
        return None
    if anchor and anchor not in anchors[target]:
        return f"dead anchor {url}: {target} has no #{anchor}{near(anchor, anchors[target])}"
    return None


def check_image(page, image, folder):
    "What is wrong with a missing image or a missing alt text."
    url = image.get("src", "")
    target, _ = local_target(page, url)
    shown = "of a code cell" if url.startswith("data:") else url
    if target is not None and not (folder / target).is_file():
        yield f"missing image {shown}"
    if image.get("alt", "").strip() in ("", NO_ALT):
        yield (f"image {shown} has no alt text; write ![text](file), or a line '#| fig-alt: text' at the top of the code cell "
               "that draws it")


def check_pages(pages, folder, sources):
    "Messages about the links and images of `pages`, each named by its source; files are looked for in `folder`."
    anchors = {page: {tag["id"] for tag in soup.find_all(id=True)} for page, soup in pages.items()}
    found = []
    for page, soup in pages.items():
        wrong = [check_link(page, link["href"], pages, folder, anchors) for link in soup.find_all("a", href=True)]
        for image in soup.find_all("img"):
            wrong.extend(check_image(page, image, folder))
        found += [f"{sources[page]}: {message}" for message in dict.fromkeys(wrong) if message]
    return found


def check_site_files(root):
    "Messages about the YAML files of the site: each parses, and those that one names exist."
    nbs, settings, found = root / "nbs", {}, []
    for path in [root / "_quarto.yml", nbs / "_quarto.yml", nbs / "nbdev.yml", nbs / "sidebar.yml"]:
        name = path.relative_to(root).as_posix()
        try:
            settings[name] = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            found.append(f"{name} cannot be read: {error}")
    for name in settings.get("nbs/_quarto.yml", {}).get("metadata-files", []):
        if not (nbs / name).is_file():
            found.append(f"nbs/_quarto.yml names {name}, which is missing")
    return found


def check_top_files(root):
    "Messages about the links of the Markdown files at the top of the repository."
    found = []
    for path in sorted(root.glob("*.md")):
        notebook, front = load_page(path)
        found += check_pages({path.name: render_page(notebook, front, "")}, root, {path.name: path.name})
    return found


def build(root, out):
    "Render the pages of the checkout `root` into the folder `out`; return all messages."
    found = stored_errors(root / "nbs") + check_top_files(root)
    with tempfile.TemporaryDirectory() as folder:
        processed = process_notebooks(copy_checkout(Path(folder) / "checkout", root))
        names = output_names(processed)
        pages = render(processed, names)
        sources = {html: f"nbs/{page}" for page, html in names.items()}
        found += check_pages(pages, processed, sources) + check_site_files(root)
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(processed, out, ignore=shutil.ignore_patterns(*(f"*{suffix}" for suffix in PAGE_SUFFIXES), "*.yml"))
    for html, soup in pages.items():
        (out / html).parent.mkdir(parents=True, exist_ok=True)
        (out / html).write_text(str(soup), encoding="utf-8")
    return found, len(pages)


def main():
    found, count = build(ROOT, ROOT / "_docs")
    print("\n".join(found) or f"{count} pages rendered into _docs: links, anchors, images and outputs are good")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
