"""Sphinx configuration; `make docs` calls `sphinx-build -W -c docs . build/docs`: warnings are errors.

The source folder is the root of the repository, so that a link means the same here as on a forge.
"""

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import generate  # noqa: E402

project = "stonechat"
author = "the stonechat authors"
release = generate.version()
extensions = ["myst_parser"]
include_patterns = ["docs/**.md", "*.md", "models/**.md", "examples/**.md"]
exclude_patterns = [".*", "agent", "build", "dist", "firmware_tests", "tools", "typings", "**/node_modules"]
root_doc = "docs/index"
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4  # the anchors that forges make, so that page.md#heading resolves in both
html_theme = "furo"
html_title = "stonechat " + release
html_show_sourcelink = False
html_show_copyright = False
highlight_language = "text"
suppress_warnings = ["ref.python"]  # two modules may each have a Layer

# The order of the navigation. It is not in index.md, because a forge would show it as a block of text.
NAVIGATION = {
    "Use": "agent-linux configuration agent-boards embedding fleet scaling managed-brokers dashboard metrics response"
    " home-assistant models-and-detection releases cli limits faults",
    "Reference": "architecture model-file-format trace-format wire-protocol glossary api",
    "Project": "/README /CONTRIBUTING /SECURITY /CHANGELOG",
}
GLOBS = {"docs/api": "api/*", "docs/models-and-detection": "/models/**", "docs/embedding": "/examples/**"}


def add_navigation(app: Any, name: str, source: list[str]) -> None:
    """Append the table of contents to the pages that have one."""
    if name == root_doc:
        for caption, pages in NAVIGATION.items():
            lines = "\n".join(pages.split())
            source[0] += f"\n:::{{toctree}}\n:hidden:\n:caption: {caption}\n\n{lines}\n:::\n"
    elif name in GLOBS:
        source[0] += f"\n:::{{toctree}}\n:hidden:\n:glob:\n\n{GLOBS[name]}\n:::\n"


def setup(app: Any) -> None:
    generate.api_pages(HERE / "api")
    app.connect("source-read", add_navigation)
