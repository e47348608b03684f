"""Copy the outputs of a papermill run into the page that it ran: store_outputs.py EXECUTED PAGE

Cells are matched by their id; a page whose code changed since the run is refused.
Progress bars (stderr) are left out, and so are the counts of execution, which nbdev_clean would take away.
"""
import sys
from pathlib import Path

import nbformat


def store_outputs(executed: Path, page: Path) -> int:
    """Number of cells that received outputs."""
    made = {c.id: c for c in nbformat.read(executed, 4).cells if c.cell_type == "code"}
    notebook = nbformat.read(page, 4)
    cells = [c for c in notebook.cells if c.cell_type == "code"]
    changed = [c.id for c in cells if c.id not in made or c.source != made[c.id].source]
    if changed:
        sys.exit(f"{page}: {len(changed)} cell(s) differ from those of {executed}, the first being {changed[0]}. Run the page again.")
    for cell in cells:
        cell.outputs = [o for o in made[cell.id].outputs if not (o.output_type == "stream" and o.name == "stderr")]
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = None
    page.write_text(nbformat.writes(notebook, 4) + "\n", encoding="utf-8")
    return sum(bool(c.outputs) for c in cells)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(f"{store_outputs(Path(sys.argv[1]), Path(sys.argv[2]))} cells with outputs in {sys.argv[2]}")
