"""What a model file records of the windows that it was made from, and whether a recording holds some of them.

Windows that a model was trained on are quieter by it than any later ones: figures measured on them are in-sample and
prove nothing. The file keeps the least hashes of its training windows, so that they are recognized under any file name,
format, label and order, also in part: a recording that holds half of them is missed once in 300 times. A device whose
clock begins anew with every start gives quiet windows of the same time again: only windows whose counters came once are
sampled, and a quarter of them must be found.
"""

import hashlib
from collections.abc import Collection
from typing import Any

import numpy as np
from stonechat.cbor_decode import loads
from stonechat.errors import StonechatError
from stonechat.int8 import tflite
from stonechat.model_file import INFO_BUFFER

from ..traces.trace import Trace

_HASHES = 24
_HASH_BYTES = 6
_FOUND = 0.25


def digest_file(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sample(trace: Trace) -> bytes:
    """trace -> the _HASHES least hashes of its windows whose counters came once, _HASH_BYTES each: by time, length and
    counters, not by label or device."""
    _, first, counts = np.unique(trace.deltas, axis=0, return_index=True, return_counts=True)
    return b"".join(sorted(_hashes(trace.select(first[counts == 1])))[:_HASHES])


def holds_training_windows(data: bytes, trace: Trace, digests: Collection[str] = ()) -> bool | None:
    """data: a model's file; digests: the SHA-256 of the trace's files, for a model without a sample -> whether it was
    made from windows of the trace; None where it does not record that."""
    provenance = _provenance(data)
    recordings = provenance.get("recordings")
    if isinstance(recordings, dict) and not set(digests).isdisjoint(map(str, recordings.values())):
        return True
    kept = provenance.get("windows")
    if isinstance(kept, bytes | memoryview) and kept:
        kept = bytes(kept)
        hashes = {kept[at : at + _HASH_BYTES] for at in range(0, len(kept) - _HASH_BYTES + 1, _HASH_BYTES)}
        return len(hashes & _hashes(trace)) >= max(2, len(hashes) * _FOUND)
    return False if recordings else None


def _hashes(trace: Trace) -> set[bytes]:
    times_ms = np.rint(trace.t_s * 1000).astype(np.int64)
    rows = np.column_stack([times_ms, trace.elapsed_ms, trace.deltas]).astype("<i8")
    return {hashlib.blake2b(row.tobytes(), digest_size=_HASH_BYTES).digest() for row in rows}


def _provenance(data: bytes) -> dict[str, Any]:
    """Raises nothing: a model of another tool records nothing, or something else."""
    try:
        info = tflite.read(data).metadata(INFO_BUFFER)
        found = loads(bytes(info)).get("provenance") if info else None
    except (StonechatError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}
