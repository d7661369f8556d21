"""The words of fasttrace, one record a word. Imports nothing of ours.

*clean*, *corrupt* and *patched* name the three kinds of run; a *site* says where, a *selector*
which part of it, a *patch* what is written there, a *lane* is one counterfactual, an *effect* the
number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Branch = Literal["cond", "uncond", "both"]
CorruptionKind = Literal["embedding_noise", "output_noise", "replace"]
MetricInput = Literal["picture", "latent"]


@dataclass(frozen=True)
class Site:
    """Where: one module's output. `shape` is that of one row, without the batch."""

    name: (
        str  # the diffusers path: "unet.down_blocks.1.resnets.1", "text_encoder.layers.0.self_attn"
    )
    kind: str  # denoiser: resnet, attn1, attn2, ff; text encoder: attn, mlp, hidden
    component: str  # "unet", "text_encoder", "text_encoder_2"
    index: int  # execution order within the component
    shape: tuple[int, ...]
    aliases: tuple[str, ...] = ()  # the paper's names: "down-1-resnet-1", "self-attn-0-down"
    reaches: Literal["denoiser", "pooled", "nothing"] = "denoiser"


@dataclass(frozen=True)
class Selector:
    """Which part of a site's output: text tokens, guidance branch, denoiser calls."""

    label: str = "all"  # shown in tables: "all", "last subject", "EOS", "padding", "token 7 'dog'"
    tokens: tuple[int, ...] | None = None  # positions in the padded prompt; None is all of them
    branch: Branch = "cond"
    window: tuple[int, int] | None = None  # half-open, denoiser calls from 0; None is every call


@dataclass(frozen=True)
class Patch:
    """What is written: `source`'s activation at `site`, where `selector` says, at `strength`."""

    site: Site
    selector: Selector = Selector()
    # "clean", "corrupt", "prompt:...": that run's activation. "zero", "mean" (of the clean one's
    # positions), "tensor:...": written instead. "add:...": a tensor is added, `strength` times.
    # "text:clean", "text:corrupt": the module stays, and reads that run's text embedding
    # (cross-attention alone)
    source: str = "clean"
    strength: float = 1.0


@dataclass(frozen=True)
class Span:
    """Token positions [start, stop) of a subject in the padded prompt of one tokenizer."""

    start: int
    stop: int
    text: str


@dataclass(frozen=True)
class Probe:
    """A caption, the subject destroyed in it, and what attribute the subject is an instance of."""

    prompt: str
    subject: str
    attribute: str = ""  # object, style, colour, action, or the user's own
    occurrence: int = 0  # which appearance of the subject in the prompt, from 0
    negative_prompt: str = ""


@dataclass(frozen=True)
class Corruption:
    """How the subject is destroyed in the conditional text (never in the unconditional one).

    embedding_noise: Gaussian noise on the subject's word embeddings before the text encoder.
    output_noise: the same on the encoder's output (refused when the text encoder is traced).
    replace: the subject's words become `replacement`.
    """

    kind: CorruptionKind = "embedding_noise"
    scale: float = 3.0  # sigma = scale x std over all entries of the probes' subject embeddings ...
    # ... unless an absolute sigma is given: one number, or one per text encoder (SDXL)
    sigma: float | tuple[float, ...] | None = None
    replacement: str | None = None
    # the run's noise seed: with the prompt it fixes the noise; the latent seed plays no part
    seed: int = 0


@dataclass(frozen=True)
class Sampling:
    """How pictures are made; diffusers' names with diffusers' meaning."""

    steps: int
    guidance: float
    height: int
    width: int
    eta: float = 0.0


@dataclass(frozen=True)
class Lane:
    """One counterfactual: a corrupt run with patches. No patches is the corrupt run itself."""

    patches: tuple[Patch, ...] = ()


@dataclass(frozen=True)
class Metric:
    """A score as a frozen record.

    `function(pictures [B,3,H,W] in [0,1] or latents [B,C,h,w], context) -> [B]` floats; `context`
    is a `MetricContext`. `higher_is_closer`: restoring a concept raises the score.
    """

    key: str
    label: str
    function: Callable[..., Any] = field(compare=False)
    needs: MetricInput = "picture"
    unit: str = ""
    higher_is_closer: bool = True
    fingerprint: str = ""  # of the scoring model: part of a row's key


@dataclass(frozen=True)
class MetricContext:
    """What a metric may look at besides the picture it scores."""

    probe: Probe
    clean_picture: Any = None  # [1,3,H,W] in [0,1]
    clean_latent: Any = None  # [1,C,h,w]
    corrupt_latent: Any = None


@dataclass(frozen=True)
class Row:
    """One line of the results table: one lane of one (probe, seed).

    score, clean_score, corrupt_score are in the metric's unit; total_effect = clean - corrupt;
    effect = score - corrupt; normalised_effect = effect / total_effect (None where that is 0).
    Where lower is closer (a distance) both are turned, so that positive always means towards the
    clean run. Rows of a prompt swap (kind "swap") measure the way from the clean run instead:
    effect = clean - score, so that 1 normalised still means "this place carries all of it".
    `status` is "run", or why a listed site needed no run ("zero: causal mask", "unreachable").
    """

    key: str  # content hash of everything that determines the score
    model: str
    fingerprint: str
    component: str
    attribute: str
    prompt: str
    subject: str
    occurrence: int
    negative_prompt: str
    seed: int
    site: str
    site_index: int
    kind: str
    selector: str
    tokens: tuple[int, ...] | None
    branch: str
    window_start: int
    window_stop: int
    corruption: str  # canonical JSON of the Corruption with sigma resolved
    sampling: str  # canonical JSON of Sampling and the scheduler's class
    metric: str
    score: float
    clean_score: float
    corrupt_score: float
    total_effect: float
    effect: float
    normalised_effect: float | None
    noise_floor: float
    engine: str
    status: str
    picture: str | None  # name under pictures/ of the store, without suffix
    versions: str  # canonical JSON: fasttrace, torch, diffusers, transformers, python


def pair_pictures(row: Row) -> tuple[str, str] | None:
    """Names of the clean and the corrupt picture beside `row.picture`; None without pictures."""
    if row.picture is None:
        return None
    pair = row.picture.rsplit("_", 1)[0]
    return f"{pair}_clean", f"{pair}_corrupt"


@dataclass(frozen=True)
class Judgement:
    """One line of an evaluation's table: one picture of one edit, beside the unedited model's.

    before, after: score of the prompt's own meaning on either picture. new_before, new_after: score
    of the prompt with the edit's target in place of the phrase; None where nothing was to change.
    expected, shown_before, shown_after: attribute -> class as JSON, empty without classifiers.
    """

    edit: str  # the folder's name
    role: str  # edited, paraphrase, misspelling; neighbour, other: nothing was to change
    phrase: str
    attribute: str
    prompt: str
    seed: int
    metric: str
    before: float
    after: float
    new_before: float | None
    new_after: float | None
    expected: str
    shown_before: str
    shown_after: str
    picture_before: str | None  # names under pictures/, without suffix
    picture_after: str | None
