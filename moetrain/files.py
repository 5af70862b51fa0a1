"""JSON from a file that a stranger may have written: plain data or one clear error, never more memory than the file's size explains."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MAX_JSON = 1 << 28
"""Bytes. The largest in use, tokenizers and the index of a checkpoint in thousands of files, have some tens of millions."""


def read_json(path: Path | str, limit: int = MAX_JSON) -> Any:
    """The content of a JSON file of at most `limit` bytes.

    Raises OSError (no such file, no right to read it), ValueError that names the file: no regular file, too large, not UTF-8, not JSON. A pipe or
    a device would be read without an end, so none is opened.
    """
    mode = os.stat(path)
    if not stat.S_ISREG(mode.st_mode):
        raise ValueError(f"{path}: is no regular file")
    if mode.st_size > limit:
        raise ValueError(f"{path}: has {mode.st_size:,} bytes; at most {limit:,} are read")
    return parse_json(Path(path).read_bytes(), str(path))


def read_object(path: Path | str) -> dict[str, Any]:
    """As `read_json`, of a file that holds an object (ValueError for anything else)."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be a JSON object, found {json_kind(content)}")
    return content


def check_own(folder: Path | str, names: Iterable[str]) -> None:
    """Before files of these names, or their `.tmp` forms, are written in a folder that may be a stranger's: ValueError if one is a link, through
    which a file elsewhere would be written, or a pipe or device, which would never be done."""
    names = tuple(names)
    for entry in os.scandir(folder) if os.path.isdir(folder) else ():
        ours = any(entry.name == n or (entry.name.startswith(n) and entry.name.endswith(".tmp")) for n in names)
        if ours and not entry.is_file(follow_symlinks=False):
            raise ValueError(f"{entry.path}: is a link or no regular file, so it is not written; remove it")


def json_kind(value: Any) -> str:
    """What JSON calls a value's type."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    return names[type(value)]


def parse_json(raw: bytes, where: str) -> Any:
    """`where` names the text in errors (ValueError)."""
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{where}: is not valid JSON: it is not UTF-8 text") from None
    except RecursionError:
        raise ValueError(f"{where}: is not valid JSON for us: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where}: is not valid JSON: {error}") from None
