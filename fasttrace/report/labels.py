"""Reading a labelled validation set: which restored pictures a person judged to show the concept.

{"schema": 1, "labels": [{"prompt": "a photo of a dog", "site": "unet.mid_block.resnets.0",
                          "causal": true}]}
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fasttrace.errors import UsageError
from fasttrace.report.causal import CausalLabel


class _Label(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str
    site: str
    causal: bool
    selector: str = "all"


class _LabelFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = Field(alias="schema")
    labels: list[_Label] = Field(min_length=1)


def read_labels(path: Path | str) -> list[CausalLabel]:
    """The labels of a file. Raises `UsageError` naming the entry and the field that is wrong."""
    path = Path(path)
    try:
        found = _LabelFile.model_validate_json(path.read_bytes()).labels
    except OSError as error:
        raise UsageError(f"the validation set {path} can't be read ({error.strerror}).") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UsageError(
            f"the validation set {path} is malformed: {place}: {first['msg'].lower()}. Expected is "
            '{"schema": 1, "labels": [{"prompt": "...", "site": "...", "causal": true}]}.'
        ) from error
    return [CausalLabel(e.prompt, e.site, e.causal, e.selector) for e in found]
