"""What `stonechat provision add --board` makes of a device: files that `stonechat deploy --identity` copies to a board.

The module holds `device`, the arguments of start() that are this device's own: start(**device) takes them. The DER
files are the CA that the broker's certificate must come from and, where the broker asks for it (mtls), the device's own
certificate and key. Python on a board reads certificates as DER only, and has no store of authorities.
"""

import json
from pathlib import Path
from typing import Any

from stonechat.errors import ConfigError

from .console import write_atomic

FOLDER = "board"
MODULE = "stonechat_device.py"
MODES = {MODULE: 0o600, "stonechat-ca.der": 0o644, "stonechat-client.der": 0o644, "stonechat-client-key.der": 0o600}


def write_board(place: Path, device: str, secret: bytes, auth: str, more: dict[str, Any]) -> list[Path]:
    """place: the device's folder, with what it shows the broker (auth) in it; more: arguments of start() -> the files,
    made or renewed in place/board. Raises ConfigError, OSError."""
    folder = place / FOLDER
    if folder.is_symlink():
        raise ConfigError(f"{folder}: is a link; put a folder of the fleet's own in its place")
    folder.mkdir(mode=0o700, exist_ok=True)
    files: dict[str, bytes] = {}
    if auth in ("mtls", "passwords"):
        files["stonechat-ca.der"] = _certificate(place / "ca.crt")
    if auth == "mtls":
        files["stonechat-client.der"] = _certificate(place / "client.crt")
        files["stonechat-client-key.der"] = _key(place / "client.key")
    password = (place / "password").read_text().strip() if auth == "passwords" else None
    if password is not None:
        more = {**more, "user": device, "password": password}
    files[MODULE] = _module(device, secret, more, list(files)).encode()
    for name in MODES:
        if name not in files:
            (folder / name).unlink(missing_ok=True)
    for name, data in files.items():
        write_atomic(folder / name, data, MODES[name])
    return [folder / name for name in files]


def _module(device: str, secret: bytes, more: dict[str, Any], certificates: list[str]) -> str:
    lines = [
        f"# {device}, made by `stonechat provision`. The device's secret is in it: no other board may have this file.",
        "device = {",
        f'    "device_id": {json.dumps(device)},',
        f'    "key": bytes.fromhex("{secret.hex()}"),',
        *[f"    {json.dumps(name)}: {json.dumps(value)}," for name, value in more.items()],
        "}",
    ]
    if certificates:
        lines.insert(1, "from stonechat.board.tls import tls_context\n")
        lines.append(f"files = [open(name, 'rb').read() for name in {certificates!r}]")
        lines.append('device["tls"] = tls_context(*files)')
    return "\n".join(lines) + "\n"


def _certificate(path: Path) -> bytes:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    return x509.load_pem_x509_certificate(path.read_bytes()).public_bytes(Encoding.DER)


def _key(path: Path) -> bytes:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(path.read_bytes(), None)
    form = serialization.PrivateFormat.TraditionalOpenSSL  # the shortest that mbedtls reads
    return key.private_bytes(serialization.Encoding.DER, form, serialization.NoEncryption())


def read_board(folder: Path) -> list[Path]:
    """The files of such a folder, for the root of a board. Raises ConfigError where it is none."""
    found = [folder / name for name in MODES if (folder / name).is_file()]
    if not folder.is_dir() or folder / MODULE not in found:
        raise ConfigError(f"{folder}: no {MODULE} there; `stonechat provision add DEVICE --board` makes it")
    return found
