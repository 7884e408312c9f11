"""The bill of materials of a release: CycloneDX 1.6 (ECMA-424), JSON, of the model and the agent that it was made for.

Its SHA-256 is in the signed manifest, so it is signed, too. The same release gives the same bytes."""

import hashlib
import json
import uuid
from pathlib import Path
from typing import Any

import stonechat
from stonechat.metadata import Metadata


def make(model: bytes | None, metadata: Metadata | None, version: int, device_class: str) -> bytes:
    """-> the JSON, UTF-8. Raises OSError where the agent's own files can't be read."""
    components: list[dict[str, Any]] = []
    if model is not None and metadata is not None:
        components.append(
            {
                "type": "machine-learning-model",
                "bom-ref": "model",
                "name": metadata.name,
                "version": str(metadata.version),
                "hashes": [_hash(model)],
                "properties": [
                    {"name": "stonechat:schema", "value": metadata.schema_name},
                    {"name": "stonechat:schema-id", "value": bytes(metadata.schema_id).hex()},
                    {"name": "stonechat:window-ms", "value": str(metadata.window_ms)},
                ],
            }
        )
    components.append(
        {
            "type": "library",
            "bom-ref": "agent",
            "name": "stonechat",
            "version": stonechat.__version__,
            "licenses": [{"license": {"id": "Apache-2.0"}}],
            "purl": f"pkg:pypi/stonechat@{stonechat.__version__}",
            "components": _files(Path(stonechat.__file__).parent),
        }
    )
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "firmware",
                "bom-ref": "release",
                "name": f"{device_class} detection model",
                "version": str(version),
            }
        },
        "components": components,
        "dependencies": [{"ref": "release", "dependsOn": [component["bom-ref"] for component in components]}],
    }
    unique = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    document["serialNumber"] = f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, unique)}"
    return json.dumps(document, indent=1, sort_keys=True).encode() + b"\n"


def _hash(data: bytes) -> dict[str, str]:
    return {"alg": "SHA-256", "content": hashlib.sha256(data).hexdigest()}


def _files(folder: Path) -> list[dict[str, Any]]:
    return [
        {
            "type": "file",
            "bom-ref": f"agent/{path.relative_to(folder)}",
            "name": str(path.relative_to(folder)),
            "hashes": [_hash(path.read_bytes())],
        }
        for path in sorted(folder.rglob("*.py"))
    ]
