"""README.md from the home page nbs/index.ipynb, so that both say the same thing, and the list of pages in both and in the sidebar.

    python .ci/readme.py            put the last run's table and picture, the list of pages and the commands of the Makefile
                                    into the home page; write README.md and nbs/sidebar.yml
    python .ci/readme.py --check    change nothing; fail where one of them is out of step
"""
import argparse
import difflib
import json
import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\()([^)\s]+)")
SECTIONS = ["Tutorials", "Reference", "Tables", "Pages", "Modules"]
CHANGELOG_PAGE = "reference/changelog.md" # made when the site is built
NOT_A_FILE = re.compile(r"^([a-z][a-z0-9+.-]*:|#|/)", re.IGNORECASE)
NOT_SHOWN = re.compile(r"^#\|\s*(hide|export|exporti|default_exp)\b", re.MULTILINE)


def source(cell):
    "The text of a notebook cell."
    return "".join(cell["source"])


def read_notebook(path):
    return json.loads(path.read_text(encoding="utf-8"))


def write_notebook(path, notebook):
    "Write as nbdev_clean does, so that a second cleaning changes nothing."
    path.write_text(json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def fill_block(notebook, name, text):
    "Replace what stands between the markers `name`:begin and `name`:end in the cells of `notebook`."
    block = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    filled = 0
    for cell in notebook["cells"]:
        new, count = block.subn(lambda found: f"{found[1]}\n{text.strip()}\n\n{found[2]}", source(cell))
        filled += count
        if count:
            cell["source"] = new.splitlines(keepends=True)
    if filled != 1:
        sys.exit(f"nbs/index.ipynb: expected one block between <!-- {name}:begin --> and <!-- {name}:end -->, found {filled}")


def page_summary(path):
    "The one-line `>` summary below the title of a page."
    if path.suffix == ".ipynb":
        text = "\n".join(source(cell) for cell in read_notebook(path)["cells"] if cell["cell_type"] == "markdown")
    else:
        text = path.read_text(encoding="utf-8")
    found = re.search(r"^>\s+(\S.*?)\s*$", text, re.MULTILINE)
    return found[1].replace("|", "\\|") if found else ""


def pages(nbs):
    "All pages of the documentation but the home page, in the order of their names, folders last."
    found = [path for suffix in ("*.ipynb", "*.md") for path in nbs.rglob(suffix)]
    shown = [path for path in found if not any(part[0] in "._" for part in path.relative_to(nbs).parts)]
    return sorted((path for path in shown if path != nbs / "index.ipynb"), key=lambda path: (len(path.parts), str(path)))


def page_table(nbs):
    "A Markdown table: which page holds what."
    rows = [f"| [{path.relative_to(nbs).with_suffix('').as_posix()}]({path.relative_to(nbs).as_posix()}) | {page_summary(path)} |"
            for path in pages(nbs)]
    return "\n".join(["| notebook | what it holds |", "|---|---|", *rows])


def sidebar_text(nbs):
    "The sidebar of the site: the home page, and in the order of `SECTIONS` the modules, the other pages and each folder."
    sections = {}
    for page in [*(path.relative_to(nbs) for path in pages(nbs)), Path(CHANGELOG_PAGE)]:
        section = page.parts[0].capitalize() if len(page.parts) > 1 else "Modules" if page.name[0].isdigit() else "Pages"
        sections.setdefault(section, []).append(page.as_posix())
    lines = ["# Written by `make readme`.", "website:", "  sidebar:", "    contents:", "      - index.ipynb"]
    for section, listed in sorted(sections.items(), key=lambda entry: SECTIONS.index(entry[0])):
        lines += [f"      - section: {section}", "        contents:", *(f"          - {page}" for page in listed)]
    return "\n".join(lines) + "\n"


def plain_commands(root, target):
    "The commands that `make target` runs, as a Markdown block."
    made = subprocess.run(["make", "--no-print-directory", "-n", target, "PYTHON=python3"], cwd=root, check=True, capture_output=True, text=True)
    return f"```sh\n{made.stdout.strip()}\n```"


def move_links(line, place):
    "Give every relative link of a Markdown line the target that `place` makes of it."
    return LINK.sub(lambda found: found[0] if NOT_A_FILE.match(found[2]) else found[1] + place(found[2]), line)


def from_root(line, folder):
    "Make the relative links of a Markdown line start at the repository's root instead of `folder`."
    return move_links(line, lambda target: posixpath.normpath(posixpath.join(folder, target)))


def changelog_text(root):
    "CHANGELOG.md as a page of the site."
    title, _, rest = (root / "CHANGELOG.md").read_text(encoding="utf-8").partition("\n")
    moved = move_links(rest.strip(), lambda target: posixpath.relpath(target, posixpath.join("nbs", posixpath.dirname(CHANGELOG_PAGE))))
    return f"{title}\n\n> What changed for users, and every look at the tasks that only report\n\n{moved}\n"


def cell_markdown(cell, folder):
    "One cell of the home page as Markdown for README.md; empty where the cell is not shown."
    text = source(cell).strip()
    if not text or cell["cell_type"] == "raw" or NOT_SHOWN.search(text):
        return ""
    if cell["cell_type"] == "code":
        return "```python\n" + re.sub(r"^#\|.*\n", "", text, flags=re.MULTILINE).strip() + "\n```"
    lines, fenced = [], False
    for line in text.split("\n"):
        fenced ^= line.startswith("```")
        lines.append(line if fenced else from_root(line, folder))
    return "\n".join(lines)


def readme_text(notebook, folder="nbs"):
    "The text of README.md for the home page `notebook`."
    head = f"<!-- Made from {folder}/index.ipynb by `make readme`: change the notebook, not this file. -->"
    return "\n\n".join([head, *filter(None, (cell_markdown(cell, folder) for cell in notebook["cells"]))]) + "\n"


def update(root, results):
    "Fill the home page from the last run in `results` and write README.md."
    nbs, index = root / "nbs", root / "nbs/index.ipynb"
    notebook = read_notebook(index)
    fill_block(notebook, "notebooks", page_table(nbs))
    for target in ["demo", "test"]:
        fill_block(notebook, target, plain_commands(root, target))
    table, picture = results / "table.md", results / "figures/overview.png"
    if table.is_file():
        fill_block(notebook, "results", table.read_text(encoding="utf-8"))
    else:
        print(f"{table.name} is missing in {results}, so the results stay as they are; `make demo` writes it")
    if picture.is_file():
        (nbs / "images").mkdir(exist_ok=True)
        shutil.copyfile(picture, nbs / "images/overview.png")
    else:
        print(f"figures/{picture.name} is missing in {results}, so the picture stays as it is; `make demo` writes it")
    write_notebook(index, notebook)
    (root / "README.md").write_text(readme_text(notebook), encoding="utf-8")
    (nbs / "sidebar.yml").write_text(sidebar_text(nbs), encoding="utf-8")
    print("wrote nbs/index.ipynb, nbs/sidebar.yml and README.md")


def problems(root):
    "What is out of step between README.md, the home page, the sidebar, the notebooks and the Makefile, as messages."
    notebook = read_notebook(root / "nbs/index.ipynb")
    found = []
    wanted, given = readme_text(notebook), (root / "README.md").read_text(encoding="utf-8")
    if wanted != given:
        lines = difflib.unified_diff(given.splitlines(), wanted.splitlines(), "README.md", "made from nbs/index.ipynb", lineterm="", n=0)
        found.append("README.md differs from nbs/index.ipynb; run `make readme`\n" + "\n".join(lines))
    if page_table(root / "nbs") not in readme_text(notebook, folder=""):
        found.append("the list of notebooks in nbs/index.ipynb differs from the pages in nbs/; run `make readme`")
    if sidebar_text(root / "nbs") != (root / "nbs/sidebar.yml").read_text(encoding="utf-8"):
        found.append("nbs/sidebar.yml differs from the pages in nbs/; run `make readme`")
    for target in ["demo", "test"]:
        if plain_commands(root, target) not in wanted:
            found.append(f"the plain commands of `make {target}` in nbs/index.ipynb differ from the Makefile; run `make readme`")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where something is out of step")
    parser.add_argument("--results", default="results", help="folder of the run whose table and picture are shown (default: results)")
    options = parser.parse_args()
    if not options.check:
        return update(ROOT, Path(options.results))
    found = problems(ROOT)
    print("\n".join(found) or "README.md, the home page, the sidebar and the Makefile are in step")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
