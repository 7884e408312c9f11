"""Fuzzes the .tflite reader: mutated files may raise ModelError, and nothing else, never hang and never eat memory.

    stonechat soak reader              1,000,000 mutated files
    stonechat soak reader --scale 0.01

A plain mutator that knows where FlatBuffers are soft: it flips bits, writes boundary integers, copies pieces about,
truncates and extends. Some mutants load; those are run, because a kernel trusts what the reader has proved. A third of
the files have metadata and a plan; most of their mutants get a checksum that holds, and what loads scores windows. The
same on MicroPython, where the viper kernels run by hostile plans and a fault would end the interpreter.
"""

import json
import random
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from stonechat import model_file
from stonechat.errors import ModelError
from stonechat.features import LEVEL, RATE
from stonechat.model import END_BYTES, MAGIC, load_model
from stonechat.schema import Schema
from stonechat.scorer import Scorer

from . import generated
from .interpreters import interpreter

MUTANTS = 1_000_000
LARGEST_S = 1.0  # no file of a few KB may take longer to refuse, or to load and run
LARGEST_BYTES = 4_000_000  # nor allocate more
_ENDS = (0, 1, 2, 3, 4, 7, 8, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFC, 0xFFFFFFFF)


SCHEMA = Schema("fuzz", tuple((f"c{i}", "1", LEVEL if i else RATE) for i in range(4)))
BOARD_TARGETS = ("unix-x64", "unix-i386")
BOARD = """
from binascii import crc32
from struct import pack
from stonechat.errors import ModelError
from stonechat.model import load_model
with open(sys.argv[1], "rb") as file:
    seed = file.read()
begin, count, state = int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
tally = [0, 0]
def upto(limit):
    global state
    state = state * 69069 + 1 & 0x3FFFFFFF
    return (state >> 14) * limit >> 16
for number in range(count):
    data = bytearray(seed)
    for _ in range(1 + upto(3)):
        at = begin + upto(len(data) - 4 - begin)
        data[at] = (data[at] ^ 1 << upto(8), upto(256), 0, 255)[upto(4)]
    data[-4:] = pack("<I", crc32(data[:-4]))
    try:
        model = load_model(data)
        model.run(bytes(model.input_size))
        tally[1] += 1
    except ModelError:
        tally[0] += 1
print("refused %d run %d" % tuple(tally))
"""


def seeds() -> list[bytes]:
    """Small files of each kind that the reader takes: the smaller, the likelier a mutation hits structure."""
    generator = np.random.default_rng(11)
    return [
        generated.chain(generator, [4, 3, 4], False),
        generated.chain(generator, [5, 2, 5], True),
        generated.operators(generator, 3),
        *planned(),
    ]


def planned() -> list[bytes]:
    """Files with metadata and a plan: a scale for all rows, a scale for each, rows of 64 bits."""
    generator = np.random.default_rng(13)
    kinds = ((False, False), (True, False), (True, True))
    return [generated.planned(generated.chain(generator, [4, 3, 4], *kind), 4, SCHEMA.id) for kind in kinds]


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
    """What happens to one file: "refused", "run" with the model run once, "scored" with windows scored as well. Any
    other exception is a finding."""
    try:
        model = load_model(data)
    except ModelError:
        return "refused"
    model.run(bytes(model.input_size))
    if model.metadata is not None:
        try:
            scorer = Scorer(model, SCHEMA)
        except ModelError:
            return "run"
        for deltas in ([0, 0, 0, 0], [1, 900, 1 << 29, 7]):
            scorer.score(deltas, 1000).explain()
        return "scored"
    return "run"


def mutants(count: int, seed: int) -> Iterator[bytes]:
    chance = random.Random(seed)
    files = seeds()
    for _ in range(count):
        data = chance.choice(files)
        mutant = mutate(chance, data)
        if data[-8:-4] == MAGIC and chance.random() < 0.8:
            mutant = model_file.seal(mutant)
        yield mutant


def fuzz_board(count: int, seed: int = 0) -> tuple[dict[str, str], list[str]]:
    """The same for plans on the MicroPython targets that are here: what each said, and the findings."""
    outputs, findings = {}, []
    for name in BOARD_TARGETS:
        micropython = interpreter(name)
        if micropython.missing:
            outputs[name] = micropython.missing
            continue
        for number, data in enumerate(planned()):
            with tempfile.NamedTemporaryFile(suffix=".tflite") as file:
                file.write(data)
                file.flush()
                begin = len(data) - END_BYTES - sum(model_file.sizes(data))
                done = micropython.run(BOARD, file.name, str(begin), str(count), str(seed + number))
            outputs[name] = (outputs.get(name, "") + "; " + done.stdout.strip()).strip("; ")
            if done.returncode:
                findings.append(f"{name}: {done.returncode} {done.stderr.strip()[-200:]}")
    return outputs, findings


def fuzz(count: int, seed: int = 0, keep: Path | None = None) -> tuple[Counter[str], list[str]]:
    """Tries `count` mutants; returns what happened how often, and the findings. `keep`: a folder for their files."""
    tally: Counter[str] = Counter()
    findings = []
    for number, data in enumerate(mutants(count, seed)):
        began_s = time.process_time()  # a busy machine is no finding
        try:
            outcome = attempt(data)
        except Exception as error:  # noqa: BLE001 - anything but ModelError is what we look for
            outcome = f"{type(error).__name__}: {error}"
            findings.append(outcome)
        took_s = time.process_time() - began_s
        if took_s > LARGEST_S:
            outcome = "slow"
            findings.append(f"mutant {number} took {took_s:.1f} s")
        tally[outcome] += 1
        if keep and outcome not in ("refused", "run", "scored"):
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
    outputs, board = fuzz_board(max(1, count // 100), seed=3)
    findings += more + board
    took_s = time.monotonic() - started
    print(f"{count} mutated files in {took_s:.0f} s: {json.dumps(tally)}; at most {peak / 1e6:.1f} MB allocated")
    for name, said in outputs.items():
        print(f"  {name}, plans with a checksum that holds: {said}")
    for finding in findings[:20]:
        print("  " + finding)
    return not findings and peak < LARGEST_BYTES
