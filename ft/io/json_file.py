"""Reading JSON objects from files."""

import json
from pathlib import Path
from typing import Any

from ft.errors import FtError
from ft.io.plain_files import read_regular


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FtError: the file cannot be read, is not JSON, or has another value.
    """
    try:
        value = json.loads(read_regular(path).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise FtError(f"cannot read {path} as JSON: {error}") from error
    if not isinstance(value, dict):
        raise FtError(f"{path} must contain a JSON object")
    return value
