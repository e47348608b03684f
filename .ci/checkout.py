"""A copy of the parts of the checkout that the checks work on, so that no check alters the checkout."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ["nbs", "coft", "_quarto.yml", "settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"]
LEFTOVERS = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "_proc", "_docs", ".last_checked")


def copy_checkout(target, root=ROOT):
    "Copy the notebooks, the package and the settings from `root` into the folder `target`."
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for name in PARTS:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=LEFTOVERS)
        elif source.is_file():
            shutil.copy2(source, target / name)
    return target


def run_python(code, cwd):
    "Run Python `code` in the folder `cwd`; return the finished process with its output as text."
    environment = {name: value for name, value in os.environ.items() if name != "IN_TEST"}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
