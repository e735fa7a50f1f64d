"""Releases with modified files and a manifest that fits them."""

import hashlib
import json

from hf_xmc.hub import manifest


def forge(folder, files=None, **about):
    """Give files other content, ``None`` for one that is only named, and write the manifest that fits."""
    old = json.loads((folder / manifest.LAYOUT.config).read_text())
    listed = old["files"]
    for name, content in (files or {}).items():
        if content is None:
            listed[name] = {"sha256": "0" * 64, "size": 0}
            continue
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(content)
        listed[name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    new = {**old, "encoder_fingerprint": manifest.fingerprint_of(listed), **about}
    new["digest"] = manifest.digest_of(new)
    (folder / manifest.LAYOUT.config).write_text(json.dumps(new))
