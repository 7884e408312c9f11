"""Copy the agent, and a model, to a MicroPython board over USB (mpremote). Nothing is flashed.

The board then needs two lines in boot.py and three in main.py (see stonechat.board.full, or stonechat.board.core
for --profile core); --hook appends the two lines to boot.py where they are not there yet.

Examples:
  stonechat deploy --port /dev/ttyUSB0 --arch xtensawin --model models/micropython-1/model.tflite
  stonechat deploy --port /dev/ttyACM0 --arch armv6m --dry-run
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from stonechat.errors import ConfigError

from stonechat_tools.console import model_path
from stonechat_tools.device.build import ARCHITECTURES, PROFILES, build

TIMEOUT_S = 300.0
HOOK = """
try:
    text = open("boot.py").read()
except OSError:
    text = ""
if "stonechat" not in text:
    open("boot.py", "w").write("from stonechat.board import hooks\\nhooks.install()\\n" + text)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", required=True, help="the board's serial port, as mpremote takes it")
    parser.add_argument("--arch", required=True, help="of " + ", ".join(ARCHITECTURES))
    parser.add_argument(
        "--profile", choices=PROFILES, default="full", help="full, or core: the smallest (default full)"
    )
    parser.add_argument("--model", type=model_path, help="a .tflite or a shipped model: becomes /model.tflite")
    parser.add_argument("--with", dest="extra", default="", metavar="A,B", help="more modules: custom_counters, replay")
    parser.add_argument("--target", default="/lib", help="folder on the board (default /lib)")
    parser.add_argument("--hook", action="store_true", help="make boot.py install the hook first")
    parser.add_argument("--no-reset", action="store_true", help="leave the board as it is afterwards")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")


def run(args: argparse.Namespace) -> int:
    extra = [name for name in args.extra.split(",") if name]
    with tempfile.TemporaryDirectory(prefix="stonechat-") as folder:
        built = build(args.arch, Path(folder), extra, args.model, profile=args.profile)
        files = [(Path(folder) / "stonechat" / f"{module}.mpy", f"stonechat/{module}.mpy") for module in built.sizes]
        commands = plan(args.port, files, args.model, args.target.rstrip("/"), args.hook, not args.no_reset)
        for command in commands:
            if args.dry_run:
                print(shlex.join(["mpremote", *command]))
            else:
                _mpremote(command)
    if not args.dry_run:
        print(f"{args.port}: {len(built.sizes)} files, {built.total:,} bytes in {args.target}")
    return 0


def plan(
    port: str, files: list[tuple[Path, str]], model: Path | None, target: str, hook: bool, reset: bool
) -> list[list[str]]:
    """files: (here, name in the target folder) -> the arguments of mpremote, call by call."""
    folders = ["", *sorted({str(Path(name).parent) for _, name in files})]
    commands = [["connect", port, "exec", _folders_script([f"{target}/{folder}".rstrip("/") for folder in folders])]]
    for here, name in files:
        commands.append(["connect", port, "fs", "cp", str(here), f":{target}/{name}"])
    if model is not None:
        commands.append(["connect", port, "fs", "cp", str(model), ":/model.tflite"])
    if hook:
        commands.append(["connect", port, "exec", HOOK])
    if reset:
        commands.append(["connect", port, "reset"])
    return commands


def _folders_script(folders: list[str]) -> str:
    return f"import os\nfor folder in {folders!r}:\n try:\n  os.mkdir(folder)\n except OSError: pass\n"


def mpremote() -> list[str]:
    beside = Path(sys.executable).parent / "mpremote"
    found = str(beside) if beside.exists() else shutil.which("mpremote")
    if not found:
        raise ConfigError("mpremote is not installed: pip install mpremote")
    return [found]


def _mpremote(arguments: list[str]) -> None:
    try:
        done = subprocess.run([*mpremote(), *arguments], capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"the board does not answer within {TIMEOUT_S:g} s") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise ConfigError(f"mpremote {arguments[2]}: {said[-1] if said else done.returncode}")
