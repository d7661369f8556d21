"""An edit on disk: for fasttrace, as a LoRA for others, or as a whole pipeline.

edit.json            the manifest, and what was written
edit.safetensors     the factors, for `load_edit`
pytorch_lora_weights.safetensors    PEFT keys: pipe.load_lora_weights(folder)
kohya.safetensors    Kohya keys: ComfyUI, A1111
pipeline/            the edited pipeline, where its rank is too high for a LoRA to be smaller
README.md            the model card
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import torch
from jinja2 import Environment, PackageLoader
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from fasttrace.edit.edit import Edit
from fasttrace.edit.factors import Factors, factorise
from fasttrace.edit.solver import Change
from fasttrace.errors import StoreError, UsageError
from fasttrace.store.disk import EDIT, OURS, disk_errors, read_errors

FORMS = ("peft", "kohya", "pipeline")
MANIFEST, FACTORS, CARD = "edit.json", "edit.safetensors", "README.md"
_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO)
_PEFT_SIDES = (("down", "lora_A"), ("up", "lora_B"))
PEFT, KOHYA, PIPELINE = "pytorch_lora_weights.safetensors", "kohya.safetensors", "pipeline"


class Written(BaseModel):
    """The content of `edit.json`. ranks, discarded: of each matrix's LoRA, where there is one."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["fasttrace edit"] = "fasttrace edit"
    version: Literal[1] = 1
    forms: list[str]
    ranks: dict[str, int]
    discarded: dict[str, float]
    edit: dict[str, Any]


class _Pair(BaseModel):
    model_config = ConfigDict(strict=True)

    old: str
    new: list[str]
    strength: float
    shares: list[float]


class _Manifest(BaseModel):
    """What an edit's own manifest has to hold."""

    model_config = ConfigDict(strict=True)

    model: str
    method: str
    source: str
    encoders: int
    pairs: list[_Pair]
    lam: float
    tokens: str
    templates: list[str]
    bias: str
    preserve: list[str]
    base: dict[str, str]
    versions: dict[str, str]
    after: list[_Manifest]


def save(
    edit: Edit,
    folder: str | Path,
    *,
    forms: Sequence[str] | None = None,
    rank: int | None = None,
    pipe: Any = None,
) -> Path:
    """Write a new folder; nothing of it is there unless all of it is.

    forms: of `FORMS`; by default both LoRA forms, or, where the change's rank is above half its
    size and `pipe` is given, the pipeline. rank: truncate the LoRA. pipe: unedited, for "pipeline".
    Raises `UsageError` for a wrong call, `StoreError` where the folder exists or can't be written.
    """
    folder = _folder(folder)
    factors = {name: factorise(change, _rank(rank)) for name, change in edit.changes.items()}
    if rank is not None:  # what is left of it is what is saved, in every form
        left = {name: Change(f.up, f.down) for name, f in factors.items()}
        edit = Edit(left, edit.manifest)
    chosen = _forms(edit, forms, rank, factors, pipe)
    with _writing(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise StoreError(f"{folder} is there already; choose a new folder for the edit.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.parent / f"{OURS}-{secrets.token_hex(6)}.tmp"
        try:
            temporary.mkdir()
            _fill(edit, temporary, chosen, factors, pipe)
            if folder.exists():
                folder.rmdir()
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """safetensors has an error of its own for what the system refuses."""
    with disk_errors(folder, EDIT):
        try:
            yield
        except SafetensorError as error:
            refused = next((e for e in _REFUSALS if os.strerror(e) in str(error)), None)
            if refused is None:
                raise StoreError(
                    f"{EDIT.what}{folder} could not be written ({error}); {EDIT.kept}."
                ) from error
            raise OSError(refused, os.strerror(refused)) from error


def read_written(folder: str | Path) -> Written:
    """What `save` said of itself. Raises `StoreError` where there is no edit or a damaged one."""
    folder = _folder(folder)
    with read_errors(folder):
        if not (folder / MANIFEST).is_file():
            raise StoreError(f"{folder} holds no edit: there is no {MANIFEST} in it.")
        text = (folder / MANIFEST).read_bytes()
    try:
        written = Written.model_validate_json(text)
        _Manifest.model_validate(written.edit)
        return written
    except ValidationError as error:
        raise _damaged(folder, error) from error


def load_edit(folder: str | Path) -> Edit:
    """What `save` wrote. Raises `StoreError` for anything else."""
    folder = _folder(folder)
    written = read_written(folder)
    try:
        with safe_open(folder / FACTORS, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Edit(_changes(written.edit["base"], tensors), written.edit)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> StoreError:
    reason = (str(error).splitlines() or [""])[0]
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        reason = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg'].lower()}"
    return StoreError(f"The edit in {folder} is damaged ({reason[:120]}).")


def _changes(names: Iterable[str], tensors: dict[str, Tensor]) -> dict[str, Change]:
    changes = {}
    for name in names:
        left, right = tensors.pop(f"{name}.left"), tensors.pop(f"{name}.right")
        if not left.ndim == right.ndim == 2 or left.shape[1] != right.shape[0]:
            raise ValueError(f"the factors of {name} don't fit each other")
        if not all(t.is_floating_point() and t.numel() for t in (left, right)):
            raise ValueError(f"the factors of {name} hold no numbers")
        if not bool(torch.isfinite(left).all() & torch.isfinite(right).all()):
            raise ValueError(f"the factors of {name} hold NaN")
        changes[name] = Change(left.double(), right.double())
    if tensors:
        raise ValueError(f"{next(iter(tensors))} belongs to no matrix of it")
    return changes


def peft_keys(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Text encoders' keys hold `text_model.`: so they load under every layout of transformers."""
    found = {}
    for name, f in factors.items():
        component, path = _path(name)
        # diffusers 0.42 refuses a file whose only text layers are fc2 in the newer words.
        old = path.endswith(".fc2")
        down, up = (f"lora_linear_layer.{s}" if old else n for s, n in _PEFT_SIDES)
        found[f"{component}.{path}.{down}.weight"] = _single(f.down)
        found[f"{component}.{path}.{up}.weight"] = _single(f.up)
    return found


def kohya_keys(factors: Mapping[str, Factors], encoders: int) -> dict[str, Tensor]:
    """As ComfyUI and A1111 read them; where a pipeline has two encoders they are numbered."""
    first = "lora_te1" if encoders > 1 else "lora_te"
    prefixes = {"unet": "lora_unet", "text_encoder": first}
    prefixes["text_encoder_2"] = "lora_te2"
    found = {}
    for name, f in factors.items():
        component, path = _path(name)
        key = f"{prefixes[component]}_{path.replace('.', '_')}"
        found[f"{key}.lora_down.weight"] = _single(f.down)
        found[f"{key}.lora_up.weight"] = _single(f.up)
        # A scale of alpha / rank is applied: this one is 1.
        found[f"{key}.alpha"] = torch.tensor(float(f.down.shape[0]))
    return found


def even(factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """All matrices of a component at its largest rank, by zeros.

    diffusers loses the scales of matrices whose rank is another than most (Kohya in 0.42, PEFT
    before).
    """
    most: dict[str, int] = {}
    for name, f in factors.items():
        component, _ = _path(name)
        most[component] = max(most.get(component, 0), len(f.down))
    found = {}
    for name, f in factors.items():
        more = most[_path(name)[0]] - len(f.down)
        found[name] = replace(f, up=pad(f.up, (0, more)), down=pad(f.down, (0, 0, 0, more)))
    return found


def is_full(factors: Mapping[str, Factors]) -> bool:
    """Whether some change has more than half the rank it could have, so a LoRA is no smaller."""
    return any(2 * f.rank > min(f.up.shape[0], f.down.shape[1]) for f in factors.values())


def _path(name: str) -> tuple[str, str]:
    """(component, path in it): "text_encoder.layers.0.mlp.fc2" lies under text_model.encoder."""
    component, path = name.split(".", 1)
    return component, path if component == "unet" else f"text_model.encoder.{path}"


def _single(tensor: Tensor) -> Tensor:
    return tensor.float().cpu().contiguous()


def _folder(folder: Any) -> Path:
    if not isinstance(folder, str | os.PathLike):
        raise UsageError(f"The folder of an edit is a path, such as 'no-dogs'; not {folder!r}.")
    return Path(folder)


def _rank(rank: Any) -> int | None:
    if rank is None:
        return None
    if isinstance(rank, bool) or not isinstance(rank, Integral) or rank < 1:
        raise UsageError(f"rank is {rank!r}; it has to be a whole number above 0.")
    return int(rank)


def _forms(
    edit: Edit,
    forms: Sequence[str] | None,
    rank: int | None,
    factors: Mapping[str, Factors],
    pipe: Any,
) -> list[str]:
    if not edit.manifest.get("lora", True):
        if pipe is None or {"peft", "kohya"} & set(forms or ()):
            raise UsageError(
                "diffusers loads no LoRA into this kind of pipeline, so an edit of it is saved as "
                "a whole: give pipe=, the unedited pipeline, and forms=['pipeline'] or none."
            )
        return ["pipeline"]
    if forms is None:
        full = is_full(factors) and rank is None and pipe is not None
        return ["pipeline"] if full else ["peft", "kohya"]
    several = isinstance(forms, list | tuple | set | frozenset)
    if not several or not forms or any(form not in FORMS for form in forms):
        raise UsageError(f"forms is {forms!r}; expected some of {', '.join(FORMS)}.")
    if "pipeline" in forms and pipe is None:
        raise UsageError("The form 'pipeline' needs pipe=, the unedited pipeline it was made on.")
    return [form for form in FORMS if form in forms]


def _fill(
    edit: Edit, folder: Path, forms: Sequence[str], factors: Mapping[str, Factors], pipe: Any
) -> None:
    written = Written(
        forms=list(forms),
        ranks={name: f.down.shape[0] for name, f in factors.items()},
        discarded={name: f.discarded for name, f in factors.items()},
        edit=dict(edit.manifest),
    )
    whole = {name: factorise(change) for name, change in edit.changes.items()}
    sides = {f"{n}.left": _single(f.up) for n, f in whole.items()}
    sides |= {f"{n}.right": _single(f.down) for n, f in whole.items()}
    save_file(sides, folder / FACTORS)
    padded = even(factors)
    if "peft" in forms:
        save_file(peft_keys(padded), folder / PEFT, metadata={"format": "pt"})
    if "kohya" in forms:
        keys = kohya_keys(padded, edit.manifest["encoders"])
        save_file(keys, folder / KOHYA, metadata={"format": "pt"})
    if "pipeline" in forms:
        with edit.applied(pipe):
            pipe.save_pretrained(folder / PIPELINE, safe_serialization=True)
    card = Environment(
        loader=PackageLoader("fasttrace.edit"), trim_blocks=True, lstrip_blocks=True
    ).get_template("card.md.j2")
    about = card.render(m=edit.manifest, edit=edit, written=written, files=(PEFT, KOHYA, PIPELINE))
    (folder / CARD).write_text(about, encoding="utf-8")
    (folder / MANIFEST).write_text(
        json.dumps(written.model_dump(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    for file in folder.glob("*.safetensors"):  # written for the owner alone, unlike the rest
        file.chmod((folder / MANIFEST).stat().st_mode & 0o777)
