"""Files that are either whole or not there."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from coembed.errors import OutputError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it into place in one step.

    Raises:
        OutputError: the folder cannot be written or the disk is full; `path` is as it was before.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise cannot_write(path, error) from error
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # h5py raises either at a full disk
        raise cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically; see `write_atomically`."""
    write_atomically(path, lambda temporary: _put(temporary, data))


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON (no NaN) to `path` atomically; see `write_atomically`."""
    write_bytes(path, json.dumps(value, indent=1, allow_nan=False).encode())


def write_tensors(path: Path, tensors: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write torch tensors and a JSON description as one safetensors file, atomically."""
    from safetensors.torch import save

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(whole, metadata={"about": json.dumps(about, allow_nan=False)}))


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what `write_tensors` wrote. Nothing in the file is executed.

    Raises:
        OSError, ValueError: the file cannot be read or is not a whole safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _put(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def cannot_write(path: Path, error: Exception) -> OutputError:
    """Return what to tell a user who cannot have `path` written."""
    reason = getattr(error, "strerror", None) or error
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space" in str(error):
        what, remedy = f"no space is left on the disk ({reason})", "Free some"
    else:
        what, remedy = f"cannot be written ({reason})", "Choose another place with -o"
    return OutputError(what, where=str(path), remedy=f"{remedy}; nothing was left half written")
