"""`make sbom`: a bill of materials (CycloneDX 1.6, JSON) of requirements.lock, without a network.

python tools/sbom.py requirements.lock > sbom.json
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name


def bill(lock: str) -> dict[str, Any]:
    """The bill of a lock file that pins every package by version and sha256.

    Raises:
        ValueError: a line is not `name==version` with hashes.
    """
    components = []
    for line in lock.replace("\\\n", "").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        pinned = re.match(r"([\w.-]+)==([\w.!+-]+)\s+(?=--hash)", line)
        hashes = re.findall(r"--hash=sha256:([0-9a-f]{64})\b", line)
        if not pinned or not hashes:
            raise ValueError(f"{line[:100]!r} must be name==version with --hash=sha256:...")
        name, version = canonicalize_name(pinned[1]), pinned[2]
        purl = f"pkg:pypi/{name}@{version.replace('+', '%2B').replace('!', '%21')}"
        components.append({
            "type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl,
            # one for each file of the package: which of them is installed depends on the machine
            "hashes": [{"alg": "SHA-256", "content": one} for one in hashes],
        })  # fmt: skip
    return {
        "bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1,
        "metadata": {"component": {"type": "library", "name": "megatron_dr"}},
        "components": components,
    }  # fmt: skip


if __name__ == "__main__":
    try:
        print(json.dumps(bill(Path(sys.argv[1]).read_text()), indent=2))
    except (OSError, ValueError) as error:
        sys.exit(f"{sys.argv[1]}: {error}")
