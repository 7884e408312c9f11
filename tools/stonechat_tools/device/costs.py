"""What each feature that --with adds costs a board: the bytes of .mpy with it and what it needs, less those without."""

import tempfile
from pathlib import Path

from stonechat_tools.device.build import build, modules

FEATURES = {  # module -> what a firmware gets by it
    "board/tls": "TLS for the own client",
    "custom_counters": "counters of the product's own",
    "lasting_peers": "a channel of its own for quiet, lasting contacts",
    "replay": "a recording in place of the hook, for tests on a board",
    "update": "new models over the air, signed",
    "int8/plain": "inference without machine code",
    "int8/interpreter": "any .tflite, without a plan",
}


def costs(architecture: str, profile: str) -> dict[str, int]:
    """module -> bytes that it adds to the profile; 0 where the profile has it. Raises ConfigError."""
    there = modules((), profile)
    with tempfile.TemporaryDirectory(prefix="stonechat-costs-") as scratch:
        base = build(architecture, Path(scratch), profile=profile).total
        return {
            name: 0 if name in there else build(architecture, Path(scratch), [name], profile=profile).total - base
            for name in FEATURES
        }


def table(architecture: str, profile: str) -> str:
    lines = [f"--with, for {profile} on {architecture}: bytes of .mpy more"]
    for name, more in costs(architecture, profile).items():
        lines.append(f"  {name:18} {f'{more:,}' if more else 'in it':>8}  {FEATURES[name]}")
    return "\n".join(lines)
