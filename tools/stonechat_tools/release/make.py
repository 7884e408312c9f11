"""Make the manifest of a release from a model file, sign it, and add a second signature.

The message is release.cddl's COSE_Sign; the device's own reader (stonechat.manifest) opens what leaves here."""

import hashlib
from dataclasses import dataclass
from typing import Any

import cbor2
from stonechat import manifest
from stonechat.errors import ConfigError, WireError
from stonechat.model import load_model

from .keys import ROLES, PublicKey, SigningKey


@dataclass(frozen=True)
class Plan:
    """What the vendor decides about a release. Times are Unix seconds; notes "" for none; rules: alarm rules that
    replace the model's, in 256ths."""

    version: int
    floor: int
    device_class: str
    not_before_s: int
    expires_s: int
    notes: str = ""
    own_model: bool = True
    next_keys: tuple[PublicKey, ...] = ()
    rules: tuple[tuple[int, int, int], ...] = ()
    policy: bytes = b""  # of the response, as release.cddl has it; empty for none


def payload(plan: Plan, model: bytes | None, sbom: bytes | None = None) -> bytes:
    """The manifest's map, to be signed. model: a .tflite with stonechat's metadata. Raises ConfigError, ModelError."""
    fields: dict[int, Any] = {
        0: 1,
        1: plan.version,
        2: plan.floor,
        3: plan.device_class,
        4: plan.not_before_s,
        5: plan.expires_s,
    }
    if model is not None:
        metadata = load_model(model).metadata
        if metadata is None:
            raise ConfigError("the model has no stonechat metadata; make one with `stonechat train`")
        if not metadata.golden:
            raise ConfigError("the model has no golden vectors: a device could not test it; make it again")
        fields[6] = [
            hashlib.sha256(model).digest(),
            len(model),
            bytes(metadata.schema_id),
            manifest.golden_digest(metadata),
        ]
    if plan.rules:
        fields[7] = [list(rule) for rule in plan.rules]
    if plan.policy:
        fields[8] = plan.policy
    if plan.next_keys:
        fields[9] = [[ROLES[key.role], key.data] for key in plan.next_keys]
    if plan.notes:
        fields[10] = plan.notes
    if not plan.own_model:
        fields[11] = False
    if sbom is not None:
        fields[12] = hashlib.sha256(sbom).digest()
    packed = cbor2.dumps(fields, canonical=True)
    try:
        manifest.read(packed)
    except WireError:
        raise ConfigError(
            "these options make no manifest: version from 1, floor of at most the version, a class of 1 to 32 bytes, "
            "notes of at most 200 bytes, at most 4 keys, at most 4 alarm rules with allowance < cap < 128 and a "
            "threshold below 4096, an end later than the start"
        ) from None
    return packed


def sign(packed: bytes, key: SigningKey, before: bytes | None = None) -> bytes:
    """The manifest with one signature more. before: the message so far, over the same payload. Raises ConfigError."""
    signatures = [] if before is None else frame(before)[3]
    if any(unprotected == {4: manifest.key_id(key.public.data)} for _, unprotected, _ in signatures):
        raise ConfigError(f"{key.path}: has signed this manifest already")
    if len(signatures) == 2:
        raise ConfigError("the manifest has two signatures already; there are no more roles")
    public = key.public.data
    signature = key.sign(manifest.to_sign(public, packed))
    signatures = [*signatures, [manifest.algorithm(public), {4: manifest.key_id(public)}, signature]]
    return cbor2.dumps([b"", {}, packed, signatures], canonical=True)


def frame(message: bytes) -> list[Any]:
    """The four parts of a COSE_Sign message; nothing is verified. Raises ConfigError."""
    try:
        found = cbor2.loads(message)
        if not isinstance(found, list) or len(found) != 4 or not isinstance(found[2], bytes):
            raise ValueError
        for protected, unprotected, signature in found[3]:
            if not (isinstance(protected, bytes) and isinstance(unprotected, dict) and isinstance(signature, bytes)):
                raise ValueError
            if not isinstance(unprotected.get(4, b""), bytes):
                raise ValueError
    except (ValueError, TypeError, cbor2.CBORDecodeError):
        raise ConfigError("not the signed manifest of a release") from None
    return found


def leaf_of(signature: bytes) -> int | None:
    """The number of the leaf that an HSS signature of one level used; None for another signature."""
    return int.from_bytes(signature[4:8], "big") if len(signature) == 2512 else None
