"""Render the documentation pages without Quarto and check them.

    python .ci/check_docs.py

nbdev processes the notebooks in a temporary copy, nbconvert renders them, and every page is then checked for
stored errors, dead links, dead anchors, missing images, images without alt text, formulas that cannot be read, and
whatever would be loaded from the network. The YAML files of the site and the links of the Markdown files at the top
are checked too. Where Chromium is installed, every page is opened in it at the width of a phone and of a desktop:
nothing may stick out sideways, and every picture must be shown. The pages stay in _docs, to be opened in a browser.
"""
import difflib
import shutil
import sys
import tempfile
from pathlib import Path

import yaml
from browser import check_sights, chromium
from checkout import ROOT, copy_checkout
from render_docs import NO_ALT, PAGE_SUFFIXES, load_page, local_target, output_names, page_files, process_notebooks, render, render_page


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


def network_loads(soup):
    "Messages about what a browser would fetch from elsewhere to show the page."
    for tag in soup.find_all(["script", "link", "img", "iframe", "source", "video", "object"]):
        url = tag.get("src") or tag.get("href") or tag.get("data") or ""
        if url.startswith(("http:", "https:", "//")):
            yield f"<{tag.name}> loads {url} from the network; keep the file beside the page"


def unread_formulas(soup):
    "Messages about commands of LaTeX that did not become MathML."
    for part in soup.select("math mi, math mo, math mtext"):
        if part.get_text().startswith("\\"):
            yield f"formula with the unknown command {part.get_text()}"


def check_pages(pages, folder, sources):
    "Messages about the links, images and formulas of `pages`, each named by its source; files are looked for in `folder`."
    anchors = {page: {tag["id"] for tag in soup.find_all(id=True)} for page, soup in pages.items()}
    found = []
    for page, soup in pages.items():
        wrong = [check_link(page, link["href"], pages, folder, anchors) for link in soup.find_all("a", href=True)]
        for image in soup.find_all("img"):
            wrong.extend(check_image(page, image, folder))
        wrong += [*network_loads(soup), *unread_formulas(soup)]
        found += [f"{sources[page]}: {message}" for message in dict.fromkeys(wrong) if message]
    return found


def check_site_files(root):
    "Messages about the YAML files of the site: each parses, and those that one names exist."
    nbs, settings, found = root / "nbs", {}, []
    workflows = sorted((root / ".github/workflows").glob("*.yml"))
    for path in [root / "_quarto.yml", nbs / "_quarto.yml", nbs / "nbdev.yml", nbs / "sidebar.yml", *workflows]:
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
        found += check_pages({path.name: render_page(notebook, front)}, root, {path.name: path.name})
    return found


def sidebar(root):
    "What the sidebar of the site lists; nothing where it cannot be read, which `check_site_files` says."
    try:
        return yaml.safe_load((root / "nbs/sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    except (OSError, yaml.YAMLError):
        return []


def build(root, out):
    "Render the pages of the checkout `root` into the folder `out`; return all messages."
    found = stored_errors(root / "nbs") + check_top_files(root)
    with tempfile.TemporaryDirectory() as folder:
        processed = process_notebooks(copy_checkout(Path(folder) / "checkout", root))
        names = output_names(processed)
        pages = render(processed, names, sidebar(root))
        sources = {html: f"nbs/{page}" for page, html in names.items()}
        found += check_pages(pages, processed, sources) + check_site_files(root)
        listed = [name for entry in sidebar(root) for name in (entry["contents"] if isinstance(entry, dict) else [entry])]
        found += [f"nbs/sidebar.yml names {name}, which is no page" for name in listed if name not in names]
        found += [f"{name} is not in nbs/sidebar.yml; run `make readme`" for name in names if name not in listed]
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(processed, out, ignore=shutil.ignore_patterns(*(f"*{suffix}" for suffix in PAGE_SUFFIXES), "*.yml"))
    for html, soup in pages.items():
        (out / html).parent.mkdir(parents=True, exist_ok=True)
        (out / html).write_text(str(soup), encoding="utf-8")
    return found, sources


def main():
    found, sources = build(ROOT, ROOT / "_docs")
    if chromium():
        found += check_sights(ROOT / "_docs", sources, sources)
    else:
        print("Chromium is not installed, so no page was opened in a browser")
    print("\n".join(found) or f"{len(sources)} pages rendered into _docs: links, anchors, images, formulas and outputs are good")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
