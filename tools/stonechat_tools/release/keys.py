"""Keys that sign releases: made here, kept in a file under a passphrase, and the state of those that wear out.

A key file is JSON of mode 0600; its private part is encrypted with AES-256-GCM under a key that scrypt (RFC 7914) makes
of the passphrase. An HSS/LMS key signs each leaf of its tree once. A leaf that signs twice gives the key away (NIST SP
800-208 section 7), so the number of the next leaf is on the disk before a signature leaves this process; a lock keeps
two processes apart; and the file that holds the number knows its own inode and when that was made, so a copy or a
restored backup is refused. The inode alone would not do: ext4 gives the same numbers again.
"""

import contextlib
import ctypes
import fcntl
import getpass
import json
import os
import secrets
import stat
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stonechat import lms, slh_dsa
from stonechat.errors import ConfigError
from stonechat.manifest import OFFICER, RELEASE

from ..console import read_file, read_json, write_atomic

SLH_DSA = "SLH-DSA-SHA2-128s"
HSS = "HSS/LMS-SHA256-H10-W4"
ALGORITHMS = {"slh-dsa": SLH_DSA, "hss": HSS}
ROLES = {"release": RELEASE, "officer": OFFICER}
LEAVES = 1024
_AT_FDCWD, _STATX_BTIME = -100, 0x800
PUBLIC_BYTES = {SLH_DSA: 32, HSS: 60}
_FORMAT = "stonechat release key 1"
_SCRYPT_LOG2_N = 17  # 128 MiB and about half a second: OWASP's setting for a passphrase
_MOST_SCRYPT_LOG2_N = 20  # a key file may not ask for more memory than 1 GiB
_PRIVATE_BYTES = {SLH_DSA: 64, HSS: 48}  # FIPS 205 section 9.1; LMS: the seed (32) and the identifier (16)


@dataclass(frozen=True)
class PublicKey:
    """role: release or officer; algorithm: one of ALGORITHMS' values; data: 32 bytes, or 60 with HSS's level count."""

    role: str
    algorithm: str
    data: bytes

    def line(self) -> str:
        """How a file of public keys holds it, and `[update] keys` of an agent reads it."""
        return f"{self.role} {self.algorithm} {self.data.hex()}"

    def verify(self, message: bytes, signature: bytes) -> bool:
        verifier = slh_dsa if self.algorithm == SLH_DSA else lms
        return bool(verifier.verify(self.data, message, signature))


def read_public(path: Path) -> list[PublicKey]:
    """The public keys in a file, one a line, # begins a comment. Raises ConfigError, OSError."""
    found = []
    for number, line in enumerate(read_file(path, 65_536).decode("utf-8", "replace").splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            role, algorithm, data = words
            key = PublicKey(role, algorithm, bytes.fromhex(data))
            if role not in ROLES or len(key.data) != PUBLIC_BYTES[algorithm]:
                raise ValueError
        except (ValueError, KeyError):
            raise ConfigError(
                f"{path}: line {number} is no public key: want ROLE ALGORITHM HEX, as `stonechat release keygen` prints"
            ) from None
        found.append(key)
    if not found:
        raise ConfigError(f"{path}: holds no public key")
    return found


def passphrase(path: Path | None, new: bool = False) -> bytes:
    """From the first line of a file, or asked for on the terminal. Raises ConfigError, OSError."""
    if path is not None:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode) and stat.S_IMODE(mode) & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(f"--passphrase-file {path}: others than its owner can read it; run chmod 600 {path}")
        secret = read_file(path, 4096).removeprefix(b"\xef\xbb\xbf").partition(b"\n")[0].removesuffix(b"\r")
    elif sys.stdin.isatty():
        text = getpass.getpass("passphrase: ")
        if new and getpass.getpass("again: ") != text:
            raise ConfigError("the two passphrases differ")
        secret = text.encode("utf-8", "surrogateescape")
    else:
        raise ConfigError("no terminal to ask for the passphrase: give it with --passphrase-file FILE")
    if new and len(secret) < 8:
        raise ConfigError("passphrase: want at least 8 characters")
    return secret


class SigningKey:
    """A key file that is open for signing. Raises ConfigError, OSError."""

    def __init__(self, path: Path, secret: bytes) -> None:
        fields = _read(path)
        self.path = path
        self.public = PublicKey(fields["role"], fields["algorithm"], bytes.fromhex(fields["public"]))
        self._private = _decrypt(path, fields, secret)

    def sign(self, message: bytes) -> bytes:
        """The signature, checked with the verifier of the devices before it leaves. Raises ConfigError, OSError."""
        if self.public.algorithm == SLH_DSA:
            from pqcrypto.sign import slh_dsa_sha2_128s

            signature: bytes = slh_dsa_sha2_128s.sign(self._private, message)
        else:
            with next_leaf(self.path) as leaf:
                signature = b"\0\0\0\0" + _lms(self._private, leaf).sign(message)
        if not self.public.verify(message, signature):
            raise ConfigError(f"{self.path}: its private part does not fit its public key; it is damaged")
        return signature


def make(path: Path, role: str, algorithm: str, secret: bytes) -> PublicKey:
    """Make a key pair; writes PATH, PATH.pub and, for HSS/LMS, PATH.state. Raises ConfigError where one is there."""
    if not path.name:
        raise ConfigError(f"{path}: is a folder; give the name of a file for the key")
    for there in (path, public_path(path), state_path(path)):
        if os.path.lexists(there):
            raise ConfigError(f"{there}: is there already; a key is never overwritten. Choose another name")
    if algorithm == SLH_DSA:
        from pqcrypto.sign import slh_dsa_sha2_128s

        data, private = slh_dsa_sha2_128s.keygen()
    else:
        private = secrets.token_bytes(_PRIVATE_BYTES[HSS])
        data = b"\0\0\0\1" + _lms(private, 0).publicKey().serialize()
    public = PublicKey(role, algorithm, data)
    fields = {"format": _FORMAT, "role": role, "algorithm": algorithm, "public": data.hex()}
    if algorithm == HSS:
        try:
            _write_state(path, 0)
        except ConfigError:
            state_path(path).unlink()  # no key belongs to it yet
            raise
    write_atomic(path, json.dumps(fields | _encrypt(private, data, secret), indent=1) + "\n", 0o600)
    write_atomic(public_path(path), public.line() + "\n", 0o644)
    return public


def public_path(path: Path) -> Path:
    return path.with_name(path.name + ".pub")


def state_path(path: Path) -> Path:
    return path.with_name(path.name + ".state")


def leaves_used(path: Path) -> int:
    """How many leaves an HSS/LMS key has used. Raises ConfigError, OSError."""
    return _read_state(path)


@contextlib.contextmanager
def next_leaf(path: Path) -> Iterator[int]:
    """The leaf to sign with: by then it counts as used on the disk, whatever happens to the signature. Raises
    ConfigError where another process signs, the state is a copy or damaged, or all leaves are used; OSError."""
    lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{path}: another process signs with it now; try again when it has ended") from None
        leaf = _read_state(path)
        if leaf >= LEAVES:
            raise ConfigError(
                f"{path}: all {LEAVES} signatures are used; make a new key and rotate to it (--next-keys)"
            )
        _write_state(path, leaf + 1)
        yield leaf
    finally:
        os.close(lock)


def _read_state(path: Path) -> int:
    """Raises ConfigError, OSError."""
    place = state_path(path)
    advice = "A leaf must never sign twice: use the original, or make a new key and rotate to it (--next-keys)"
    try:
        found = os.stat(place)
    except FileNotFoundError:
        raise ConfigError(f"{place}: is missing. {advice}") from None
    try:
        fields = read_json(place, "the state of a key")
    except ConfigError as error:
        raise ConfigError(f"{error}. {advice}") from None
    try:
        leaf, *known = (fields[name] for name in ("next_leaf", "inode", "born_ns", "machine"))
        if type(leaf) is not int or not 0 <= leaf <= LEAVES:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ConfigError(f"{place}: damaged. {advice}") from None
    if known != [found.st_ino, _born_ns(place), _machine()] or found.st_nlink != 1:
        raise ConfigError(f"{place}: is a copy or was restored from a backup. {advice}")
    return leaf


def _write_state(path: Path, leaf: int) -> None:
    """The new file is on the disk, with its folder's entry, before this returns. Raises OSError."""
    place = state_path(path)
    temporary = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(handle, "wb") as file:
            facts = {"next_leaf": leaf, "inode": os.fstat(handle).st_ino, "born_ns": _born_ns(temporary)}
            file.write(json.dumps(facts | {"machine": _machine()}).encode() + b"\n")
            file.flush()
            os.fsync(handle)
        os.replace(temporary, place)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    folder = os.open(place.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    except OSError as error:
        raise ConfigError(
            f"{place.parent}: nobody can be sure that the state is on its disk ({error.strerror}): this file system has"
            " no fsync for folders. Keep hss keys on a local disk"
        ) from None
    finally:
        os.close(folder)


def _born_ns(path: Path) -> int:
    """When a file was made (statx(2), linux/stat.h); 0 where the file system does not keep that."""
    call = getattr(ctypes.CDLL(None), "statx", None)
    found = ctypes.create_string_buffer(256)
    if call is None or call(_AT_FDCWD, os.fsencode(path), 0, _STATX_BTIME, found) != 0:
        return 0
    mask: int = struct.unpack_from("=I", found)[0]
    seconds, nanoseconds = struct.unpack_from("=qI", found, 80)
    return seconds * 10**9 + nanoseconds if mask & _STATX_BTIME else 0


def _machine() -> str:
    """The id of this installation (machine-id(5)); empty where it has none."""
    with contextlib.suppress(OSError):
        return Path("/etc/machine-id").read_text().strip()
    return ""


def _lms(private: bytes, leaf: int) -> Any:
    """pyhsslms's key of one level, H10, W4. It builds the whole tree: some seconds."""
    import pyhsslms

    return pyhsslms.LmsPrivateKey(
        pyhsslms.lms_sha256_m32_h10, pyhsslms.lmots_sha256_n32_w4, SEED=private[:32], I=private[32:], q=leaf
    )


def _read(path: Path) -> dict[str, Any]:
    """Raises ConfigError, OSError."""
    fields = read_json(path, "a release key")
    try:
        algorithm = fields["algorithm"]
        if fields["format"] != _FORMAT or fields["role"] not in ROLES:
            raise ValueError
        if len(bytes.fromhex(fields["public"])) != PUBLIC_BYTES[algorithm]:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ConfigError(f"{path}: not a release key of this version") from None
    mode = os.stat(path).st_mode
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"{path}: others may read it: chmod 600 {path}")
    found: dict[str, Any] = fields
    return found


def _encrypt(private: bytes, public: bytes, secret: bytes) -> dict[str, Any]:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    salt, nonce = secrets.token_bytes(16), secrets.token_bytes(12)
    sealed = AESGCM(_stretch(secret, salt, _SCRYPT_LOG2_N)).encrypt(nonce, private, public)
    return {
        "kdf": "scrypt",
        "log2_n": _SCRYPT_LOG2_N,
        "salt": salt.hex(),
        "nonce": nonce.hex(),
        "private": sealed.hex(),
    }


def _decrypt(path: Path, fields: dict[str, Any], secret: bytes) -> bytes:
    """Raises ConfigError."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    try:
        log2_n = fields["log2_n"]
        if type(log2_n) is not int or not 14 <= log2_n <= _MOST_SCRYPT_LOG2_N:
            raise ValueError
        salt, nonce, sealed = (bytes.fromhex(fields[name]) for name in ("salt", "nonce", "private"))
        private = AESGCM(_stretch(secret, salt, log2_n)).decrypt(nonce, sealed, bytes.fromhex(fields["public"]))
        if len(private) != _PRIVATE_BYTES[fields["algorithm"]]:
            raise ValueError
    except InvalidTag:
        raise ConfigError(f"{path}: the passphrase is wrong, or the file is damaged") from None
    except (KeyError, TypeError, ValueError):
        raise ConfigError(f"{path}: not a release key of this version") from None
    return private


def _stretch(secret: bytes, salt: bytes, log2_n: int) -> bytes:
    from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

    return Scrypt(salt=salt, length=32, n=1 << log2_n, r=8, p=1).derive(secret)
