"""Record the simulated firmware: the traces from which models/micropython-1 is trained, and those of its infections.

Several devices, each with its own seed, heap and interpreter, because what a product does is the same everywhere and
what its heap looks like is not.

Examples:
  python firmware_tests/life/record.py recordings/micropython-1
  python firmware_tests/life/record.py /tmp/attacks --windows 60 --infected
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from stonechat_tools.lab.firmware.peers import Peers  # noqa: E402
from stonechat_tools.lab.firmware.sensor import INFECTIONS  # noqa: E402
from targets import ROOT, Target, unix_i386, unix_x64  # noqa: E402

# device: (seed, heap on a 32-bit interpreter, on a 64-bit one)
DEVICES = {
    "sensor-1": (11, "96k", "192k"),
    "sensor-2": (12, "128k", "256k"),
    "sensor-3": (13, "160k", "320k"),
    "sensor-4": (14, "224k", "448k"),
}


def record(target: Target, out: Path, port: int, windows: int, name: str, infection: str = "", seed: int = 0) -> None:
    """Let device `name` live on `target` and write `out`. Raises OSError with what the interpreter said."""
    own_seed, heap_32, heap_64 = DEVICES.get(name, (seed, "96k", "192k"))
    done = target.run(
        str(ROOT / "tools/stonechat_tools/lab/firmware/sensor.py"),
        str(out.resolve()),
        str(port),
        str(windows),
        str(seed or own_seed),
        name,
        *([infection] if infection else []),
        heap=heap_32 if target.bits == 32 else heap_64,
        timeout_s=600.0,
    )
    if done.returncode or done.stderr:
        raise OSError(f"{target.name}: {done.stdout[-500:]}{done.stderr[-500:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--windows", type=int, default=1500, help="of each device (default 1500)")
    parser.add_argument("--infected", action="store_true", help="one trace of each infection in place of benign ones")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    targets = [target for target in (unix_i386(), unix_x64()) if not target.missing]
    with Peers() as port:
        if args.infected:
            for infection in INFECTIONS:
                record(targets[0], args.folder / f"{infection}.csv", port, args.windows, "sensor-1", infection)
                print(args.folder / f"{infection}.csv")
        else:
            for i, name in enumerate(DEVICES):
                record(targets[i % len(targets)], args.folder / f"{name}.csv", port, args.windows, name)
                print(args.folder / f"{name}.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
