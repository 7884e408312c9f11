"""Fuzzes the .tflite reader: mutated files may raise ModelError, and nothing else, never hang and never eat memory.

    stonechat soak reader              1,000,000 mutated files
    stonechat soak reader --scale 0.01

A plain mutator that knows where FlatBuffers are soft: it flips bits, writes boundary integers, copies pieces about,
truncates and extends. Some mutants load; those are run, because a kernel trusts what the reader has proved.
"""

import json
import random
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from stonechat.errors import ModelError
from stonechat.model import load_model

from . import generated

MUTANTS = 1_000_000
LARGEST_S = 1.0  # no file of a few KB may take longer to refuse, or to load and run
LARGEST_BYTES = 4_000_000  # nor allocate more
_ENDS = (0, 1, 2, 3, 4, 7, 8, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFC, 0xFFFFFFFF)


def seeds() -> list[bytes]:
    """Small files of each kind that the reader takes: the smaller, the likelier a mutation hits structure."""
    generator = np.random.default_rng(11)
    return [
        generated.chain(generator, [4, 3, 4], False),
        generated.chain(generator, [5, 2, 5], True),
        generated.operators(generator, 3),
    ]


def mutate(chance: random.Random, data: bytes) -> bytes:
    """One mutant: one to eight changes."""
    mutant = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        at = chance.randrange(len(mutant))
        kind = chance.randrange(8)
        if kind < 2:
            mutant[at] ^= 1 << chance.randrange(8)
        elif kind == 2:
            mutant[at] = chance.randrange(256)
        elif kind < 5:  # a number, where numbers lie
            width = chance.choice((1, 2, 4, 4, 8))
            at = min(at // width * width, len(mutant) - width)
            value = chance.choice((*_ENDS, chance.getrandbits(8 * width), len(mutant), len(mutant) - at))
            mutant[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
        elif kind == 5:  # a piece of the file elsewhere: tables that point at one another
            length = chance.choice((2, 4, 8, 16))
            source = chance.randrange(len(mutant))
            mutant[at : at + length] = mutant[source : source + length]
        elif kind == 6 and len(mutant) > 40:
            del mutant[chance.randrange(20, len(mutant)) :]
        else:
            mutant[at:at] = bytes(chance.choice((1, 2, 4, 16)))
    return bytes(mutant)


def attempt(data: bytes) -> str:
    """What happens to one file: "refused", or "run" with the model run once. Any other exception is a finding."""
    try:
        model = load_model(data)
    except ModelError:
        return "refused"
    model.run(bytes(model.input_size))
    return "run"


def mutants(count: int, seed: int) -> Iterator[bytes]:
    chance = random.Random(seed)
    files = seeds()
    for _ in range(count):
        yield mutate(chance, chance.choice(files))


def fuzz(count: int, seed: int = 0, keep: Path | None = None) -> tuple[Counter[str], list[str]]:
    """Tries `count` mutants; returns what happened how often, and the findings. `keep`: a folder for their files."""
    tally: Counter[str] = Counter()
    findings = []
    for number, data in enumerate(mutants(count, seed)):
        started = time.monotonic()
        try:
            outcome = attempt(data)
        except Exception as error:  # noqa: BLE001 - anything but ModelError is what we look for
            outcome = f"{type(error).__name__}: {error}"
            findings.append(outcome)
        if time.monotonic() - started > LARGEST_S:
            outcome = "slow"
            findings.append(f"mutant {number} took {time.monotonic() - started:.1f} s")
        tally[outcome] += 1
        if keep and outcome not in ("refused", "run"):
            (keep / f"mutant-{seed}-{number}.tflite").write_bytes(data)
    return tally, findings


def soak(scale: float) -> bool:
    count = max(1, int(MUTANTS * scale))
    started = time.monotonic()
    tracemalloc.start(1)
    _, findings = fuzz(min(count, 20_000), seed=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    tally, more = fuzz(count, seed=2)
    findings += more
    took_s = time.monotonic() - started
    print(f"{count} mutated files in {took_s:.0f} s: {json.dumps(tally)}; at most {peak / 1e6:.1f} MB allocated")
    for finding in findings[:20]:
        print("  " + finding)
    return not findings and peak < LARGEST_BYTES
