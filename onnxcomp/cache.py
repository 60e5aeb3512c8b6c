"""What was measured once on this machine and holds until something about the machine changes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["cache_folder", "remembered"]


def cache_folder() -> Path:
    """The user's folder for files that can be made again; it need not exist."""
    from platformdirs import user_cache_path

    return user_cache_path("onnxcomp")


def remembered(name: str, key: Mapping[str, Any], measure: Callable[[], Any], *, folder: Path | None = None) -> Any:
    """The JSON value that `measure` gave for this key before, or gives now.

    `key` (JSON too) holds all that the value depends on. A cache that cannot be read or written is no error: then the
    value is measured each time.
    """
    text = json.dumps(key, sort_keys=True)
    path = (folder or cache_folder()) / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["key"] == json.loads(text):
            return found["value"]
    value = measure()
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps({"key": key, "value": value}), encoding="utf-8")
        os.replace(draft, path)
    return value
