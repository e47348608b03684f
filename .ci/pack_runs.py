"""Keep the finished runs of a folder beside the page that they belong to: pack_runs.py OUT_DIR PAGE

Runs that are packed already stay, and those that another page carries are left to it. After a change of `REVISION` none of them is found again: delete the file first.
"""
import sys
from pathlib import Path

from coft.results import Records


def pack_runs(out_dir: Path, page: Path) -> int:
    """Number of runs in the file."""
    target = page.with_suffix(".runs.npz")
    others = Records(out_dir, [f for f in page.parent.glob("*.runs.npz") if f != target]).packed
    return Records(out_dir, [target] if target.exists() else []).pack(target, without=others)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(f"{pack_runs(Path(sys.argv[1]), Path(sys.argv[2]))} runs packed for {sys.argv[2]}")
