"""A certificate authority for one test, and a broker's certificate for `localhost` from it."""

import datetime
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass
class Certificates:
    """Files: `authority` (DER, what a board verifies against), `certificate` and `key` (PEM, the broker's)."""

    authority: Path
    certificate: Path
    key: Path

    def config(self, port: int) -> str:
        """mosquitto.conf for a TLS listener on loopback."""
        user = "user root\n" if os.getuid() == 0 else ""  # or mosquitto changes user and can't read the key
        return user + (
            f"listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\n"
            f"certfile {self.certificate}\nkeyfile {self.key}\n"
        )


def make_certificates(folder: Path, host: str = "localhost") -> Certificates:
    """A fresh authority, and a certificate of it for `host` and 127.0.0.1, valid for a day."""
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = _certificate("stonechat test CA", authority_key, "stonechat test CA", authority_key, None)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _certificate(host, key, "stonechat test CA", authority_key, host)
    made = Certificates(folder / "ca.der", folder / "broker.pem", folder / "broker.key")
    made.authority.write_bytes(authority.public_bytes(serialization.Encoding.DER))
    made.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    made.key.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return made


def _certificate(
    subject: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey,
    host: str | None,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=host is None, path_length=None), critical=True)
    )
    if host is not None:
        names = [x509.DNSName(host), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())
