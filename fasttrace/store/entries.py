"""Files that users write: JSON of a known form, or a sentence that names what is wrong in it."""

from __future__ import annotations

from codecs import BOM_UTF8
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from fasttrace.errors import UsageError

Form = TypeVar("Form", bound=BaseModel)
Location = tuple[int | str, ...]


def read_entries(path: Path | str, form: type[Form], name: str, expected: str) -> Form:
    """The whole file. name: "probes" or the like; the form's field of that name is a list.

    Raises `UsageError` naming the entry and the field that is wrong.
    """
    path = Path(path)
    try:
        text = path.read_bytes().removeprefix(BOM_UTF8)  # some editors begin a file with it
    except OSError as error:
        raise UsageError(f"the {name} file {path} can't be read ({error.strerror}).") from error
    try:
        return form.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        more = f" ({error.error_count() - 1} more like it)" if error.error_count() > 1 else ""
        raise UsageError(
            f"the {name} file {path} is malformed: {_place(first['loc'], name)}: "
            f"{first['msg'].lower()}{more}. Expected is {expected}."
        ) from error


def _place(location: Location, name: str) -> str:
    match location:
        case (str(listed), int(index), *rest) if listed == name:
            field = ".".join(str(part) for part in rest)
            return f"entry {index + 1}" + (f", {field}" if field else "")
        case ():
            return "the file"
    return ".".join(str(part) for part in location)
