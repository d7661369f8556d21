"""`load`: a pipeline from the bundled model, a folder or the hub, or a sentence why not."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fasttrace.adapters.architectures import ARCHITECTURES, WEIGHTS
from fasttrace.adapters.pipeline import embedded_folder
from fasttrace.errors import FasttraceError, ModelError, UsageError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_HUB_ID = re.compile(r"^\w[\w.-]*/\w[\w.-]*$")
# What a Kandinsky decoder's model card names, diffusers loads with it: the prior, which reads text.
_DECODERS = ("KandinskyPipeline", "KandinskyV22Pipeline")
_PATIENCE = 5.0  # seconds until a hub that doesn't answer counts as out of reach


def load(
    name: str,
    *,
    dtype: str | torch.dtype = "float32",
    device: str = "cpu",
    variant: str | None = None,
) -> Any:
    """Load a diffusers pipeline in evaluation mode, without its safety checker.

    `name` is "embedded", a folder in diffusers' layout, or a hub id ("owner/model"; HF_HUB_OFFLINE
    is respected). `variant` picks weight files by the word in their names, such as "fp16"; `dtype`
    is what they become. A Kandinsky decoder comes with the prior that its card names. Raises
    `UsageError` for an unknown dtype or device string, `ModelError` for an unknown model or
    variant, a damaged folder, an offline hub or an absent device.
    """
    place, kind = parse_device(device), parse_dtype(dtype)
    source = resolve(name)
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the import warns that torchvision, not needed here, is absent
    try:
        from diffusers import (  # noqa: F401
            AutoPipelineForText2Image,
            DiffusionPipeline,
            StableDiffusionPipeline,
        )
    finally:
        logging.set_verbosity(verbosity)

    here: dict[str, Any] = {"local_files_only": local_only(source)}
    options = {_dtype_option(): kind, **here} | ({"variant": variant} if variant else {})
    index = model_index(source) if isinstance(source, Path) else {}
    if "safety_checker" in index:
        options |= {"safety_checker": None, "requires_safety_checker": False}
    plain, joined = DiffusionPipeline, AutoPipelineForText2Image
    try:
        if not isinstance(source, Path):
            index = plain.load_config(str(source), **here)
        in_two = index.get("_class_name") in _DECODERS and _has_card(source)
        read: Any = (joined if in_two else plain).from_pretrained
        pipe = read(str(source), **options)
    except FasttraceError:
        raise
    except Exception as error:
        raise loading_error(name, source, error) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(place)


def _dtype_option() -> str:
    """diffusers before 0.40 knows it by its older name alone, and ignores the newer one."""
    major, minor = version("diffusers").split(".")[:2]
    return "dtype" if (int(major), int(minor)) >= (0, 40) else "torch_dtype"


def _has_card(source: Path | str) -> bool:
    return not isinstance(source, Path) or (source / "README.md").is_file()


def resolve(name: str) -> Path | str:
    """A folder that exists, or a hub id; `ModelError` with what was meant perhaps otherwise."""
    if name == "embedded":
        folder = embedded_folder("model")
        if not (folder / "model_index.json").is_file():
            raise ModelError(
                "The bundled model is not part of this installation; reinstall fasttrace."
            )
        return folder
    path = Path(name)
    with suppress(RuntimeError):  # no such user: then '~user' is a name like any other
        path = path.expanduser()
    if name and path.is_dir():
        return path.resolve()
    if path.is_file():
        raise ModelError(
            f"'{name}' is a single file; fasttrace loads folders in diffusers' layout. Convert it "
            "once with StableDiffusionPipeline.from_single_file(...).save_pretrained(folder)."
        )
    if name in ARCHITECTURES:
        raise ModelError(
            f"'{name}' names an architecture, which has sites but no weights; load a folder or a "
            f"hub id such as '{WEIGHTS[name]}'."
        )
    if is_hub_id(name):
        return name
    known = ["embedded", *ARCHITECTURES]
    begin = [one for one in known if name and one.startswith(name)]  # a family: sd
    close = begin[:3] or get_close_matches(name, known, n=1)
    meant = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise ModelError(
        f"There is no model '{name}': expected 'embedded', a folder, or a hub id 'owner/model'."
        f"{meant}"
    )


def is_hub_id(name: str) -> bool:
    return _HUB_ID.match(name) is not None


def local_only(source: Path | str) -> bool:
    """Whether only files that are here can be had: asked once, since the libraries retry for long.

    Every answer of the hub counts as reached, a refusal too: the loaders explain that better.
    """
    if isinstance(source, Path):
        return True
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except Exception:
        return True
    return False


def model_index(folder: Path) -> dict[str, Any]:
    """A pipeline folder's table of contents; `ModelError` where it is missing or malformed."""
    file = folder / "model_index.json"
    if not file.is_file():
        raise ModelError(
            f"The folder '{folder.name}' has no model_index.json: it is not a diffusers pipeline."
        )
    return json_object(file, f"model_index.json of '{folder.name}'")


def json_object(file: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file of a model. Raises `ModelError` for anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{what} can't be read: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{what} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ModelError(f"{what} holds a {type(found).__name__}; expected a JSON object.")
    return found


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UsageError(f"Unknown dtype '{dtype}'; expected one of {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def parse_device(device: str) -> torch.device:
    """A device that is there. `UsageError` for a misspelt one, `ModelError` for an absent one."""
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UsageError(
            f"Unknown device '{device}'; expected cpu, cuda, cuda:1, mps ..."
        ) from error
    if place.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (place.index or 0) >= count:
            raise ModelError(
                f"Device '{device}' is not there: this torch ({torch.__version__}) sees {count} "
                "CUDA devices. Use --device cpu, or install a CUDA build of torch."
            )
    elif place.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError("Device 'mps' is not there; use cpu.")
    elif place.type == "meta":
        raise ModelError("The meta device holds no numbers; load to cpu or cuda.")
    elif place.type != "cpu":
        try:
            torch.empty(0, device=place)
        except Exception as error:
            raise ModelError(
                f"Device '{device}' is not there: this torch ({torch.__version__}) can't use it. "
                "Use --device cpu, or install a build of torch for it."
            ) from error
    return place


def loading_error(name: str, source: Path | str, error: Exception) -> ModelError:
    """A sentence for what the loaders threw."""
    kinds = {t.__name__ for e in _chain(error) for t in type(e).__mro__}
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if isinstance(source, Path):
        return ModelError(f"The model folder '{source.name}' is damaged or incomplete: {first}")
    if "OfflineModeIsEnabled" in kinds or _offline():
        return ModelError(
            f"'{name}' is not on this machine and the hub is offline (HF_HUB_OFFLINE is set): "
            "download the model first, or give a folder."
        )
    if "GatedRepoError" in kinds:
        return ModelError(f"'{name}' is gated: accept its licence on the hub and log in first.")
    if "RepositoryNotFoundError" in kinds:
        return ModelError(f"The hub has no model '{name}' (or it is private): check the spelling.")
    if kinds & {"LocalEntryNotFoundError", "ConnectionError", "ConnectError", "TimeoutException"}:
        return ModelError(
            f"'{name}' is neither a folder here nor reachable on the hub: check the spelling and "
            "the connection, or give a folder."
        )
    return ModelError(f"'{name}' could not be loaded: {first}")


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _chain(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
