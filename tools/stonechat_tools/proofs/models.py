"""The reference models and what they were made from: record what a recipe lacks, list the recordings' hashes, and make
the models' bytes again from them.

Recordings are too large for the repository: it holds the recipes, the hashes (models/recordings.sha256, as sha256sum
writes them) and the models. A folder recordings/ that was kept elsewhere is checked against the list and is put beside
models/ again.

Examples:
  python -m stonechat_tools.proofs.models --record    `make recordings`: as root, an hour and a half, and the list
  python -m stonechat_tools.proofs.models             `make models`: remakes each model whose recordings are here
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from stonechat.errors import StonechatError

from stonechat_tools.console import write_atomic
from stonechat_tools.modeling.options import Options
from stonechat_tools.modeling.provenance import digest_file
from stonechat_tools.modeling.task import Task, make
from stonechat_tools.recording.recipe import Recipe, read_recipe
from stonechat_tools.recording.session import record

HASHES = "recordings.sha256"
FILES = ("model.tflite", "golden.json", "card.md")


@dataclass
class Outcome:
    """state: same, different, missing (not all recordings are here) or foreign (they are others than those listed)."""

    name: str
    state: str
    what: str = ""


def recipes(folder: Path) -> list[Recipe]:
    """Those of folder/NAME/recipe.toml, with their recordings beside `folder`."""
    found = [read_recipe(path) for path in sorted(folder.glob("*/recipe.toml"))]
    for recipe in found:
        recipe.recordings = str(folder.parent / recipe.recordings)
    return found


def read_hashes(path: Path) -> dict[str, str]:
    """-> file name from the folder above: SHA-256."""
    rows = [line.split(None, 1) for line in path.read_text().splitlines()] if path.exists() else []
    return {name.lstrip("*"): digest for digest, name in rows}


def write_hashes(folder: Path) -> int:
    """List all recordings of the recipes that are here; those of the list that are not here stay -> how many."""
    kept = read_hashes(folder / HASHES)
    for recipe in recipes(folder):
        for part in (recipe, *(recipe.part(name) for name in ("later", "test") if getattr(recipe, name))):
            for path in part.traces():
                kept[str(Path(path).relative_to(folder.parent))] = digest_file(path)
    lines = [f"{digest}  {name}\n" for name, digest in sorted(kept.items())]
    write_atomic(folder / HASHES, "".join(lines).encode())
    return len(kept)


def remake(recipe: Recipe, hashes: dict[str, str], folder: Path) -> Outcome:
    """Make the model from its recordings and compare its files with those beside the recipe."""
    root = folder.parent
    prefix = str(Path(recipe.recordings).relative_to(root)) + "/"
    wanted = {prefix + Path(path).name for path in recipe.traces()}
    listed = {name for name in hashes if name.startswith(prefix) and recipe.names(Path(name).name)}
    if not listed:
        return Outcome(recipe.name, "missing", f"no recording of {prefix} is listed in {HASHES}")
    if wanted != listed:
        return Outcome(recipe.name, "missing", ", ".join(sorted(listed - wanted) or sorted(wanted - listed)))
    other = [name for name in sorted(listed) if digest_file(str(root / name)) != hashes[name]]
    if other:
        return Outcome(recipe.name, "foreign", ", ".join(other))
    with tempfile.TemporaryDirectory(prefix="stonechat-models-") as scratch:
        relative = Path(recipe.path).relative_to(root)
        command = f"stonechat train --recipe {relative}" + (" --record" if recipe.record else "")
        options = Options.of(recipe.fit, recipe.path)
        make(
            Task(recipe.traces(), scratch, recipe.name, recipe.version, options, command, recipe.summary, recipe.limits)
        )
        differ = [name for name in FILES if (Path(scratch) / name).read_bytes() != (recipe.folder / name).read_bytes()]
    return Outcome(recipe.name, "different" if differ else "same", ", ".join(differ))


def _record(part: Recipe) -> None:
    def shown(done: int, total: int) -> None:
        print(f"{part.recordings}: {done} of {total} windows", flush=True)

    if part.record:
        record(part, shown)
    elif not part.traces():
        print(f"{part.name}: {part.recordings} is recorded by a program of its own; see the recipe")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of the recipes (default models)")
    parser.add_argument("--record", action="store_true", help="record what is missing, and write the list of hashes")
    parser.add_argument("--hash", action="store_true", help="write the list of hashes of the recordings that are here")
    parser.add_argument("names", nargs="*", help="these models only")
    args = parser.parse_args()
    folder = args.models.resolve()
    chosen = [recipe for recipe in recipes(folder) if not args.names or recipe.name in args.names]
    if args.record or args.hash:
        try:
            for recipe in chosen if args.record else ():
                for part in (recipe, *(recipe.part(name) for name in ("later", "test") if getattr(recipe, name))):
                    _record(part)
        except (StonechatError, OSError) as error:
            print(f"models: {error}", file=sys.stderr)
            return 1
        print(f"{folder / HASHES}: {write_hashes(folder)} recordings")
        return 0
    hashes = read_hashes(folder / HASHES)
    outcomes = [remake(recipe, hashes, folder) for recipe in chosen]
    for outcome in outcomes:
        print(f"{outcome.name}: {outcome.state}" + (f" ({outcome.what})" if outcome.what else ""))
    return 1 if any(outcome.state in ("different", "foreign") for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
