"""Packaging of coft. All values stand in settings.ini, which nbdev reads too."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
settings = config["DEFAULT"]

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=settings["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require={extra: settings[f"{extra}_requirements"].split() for extra in ("dev", "onnx")},
    # The wheel carries the notebooks as coft/notebooks, so that the main job runs without a checkout.
    packages=[*find_packages(include=["coft", "coft.*"]), "coft.notebooks"],
    package_dir={"coft.notebooks": "nbs"},
    package_data={
        "coft": ["embedded/*", "presets/*.json", "published/*.json", "datasets_info/*.json"],
        "coft.notebooks": ["**/*.ipynb", "**/*.csv", "**/*.png", "**/*.svg", "**/*.npz"],
    },
    include_package_data=False,
    zip_safe=False,
    entry_points={"console_scripts": settings["console_scripts"].split()},
)
