"""The models that are judged: found, told apart, and loaded one at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

import fastperturb
from fastperturb import runs
from fastperturb.checkpoint.format import CONFIG_NAME, Checkpoint
from fastperturb.config import PerturbConfig
from fastperturb.data.documents import DocumentTokenizer
from fastperturb.model import EditConfig, PerturbedLM


@dataclass(frozen=True)
class Place:
    """Where a model lies.

    checkpoint: the folder that `fastperturb.load` reads; None for a plain model.
    base, tokenizer: what transformers loads.
    """

    name: str
    checkpoint: Path | None
    base: str
    tokenizer: str

    @property
    def is_edited(self) -> bool:
        """Whether its perturbation is random edits of tokens."""
        return self.checkpoint is not None and isinstance(
            Checkpoint.read(self.checkpoint).config, EditConfig
        )


class LoadOptions(Protocol):
    """What loading asks of a command's options."""

    @property
    def precision(self) -> str: ...

    @property
    def trust_remote_code(self) -> bool: ...

    @property
    def device(self) -> str | None: ...

    @property
    def lengths(self) -> Mapping[str, int]:
        """How long a text gets, by the options that make it so."""
        ...


def find(name: str, where: str, base: str | None) -> Place:
    """The checkpoint or plain model at `where`; of a training run the best, or else the last."""
    folder = Path(where).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or where.startswith((".", "~")) or where.count("/") > 1:
            raise ValueError(f"model {name!r}: there is no folder {where}")
        return Place(name, None, where, where)
    inner = (folder / "best", folder / "model", folder)
    checkpoint = next((each for each in inner if (each / CONFIG_NAME).is_file()), None)
    if checkpoint is None:
        if (folder / "config.json").is_file():
            return Place(name, None, str(folder), str(folder))
        raise ValueError(
            f"model {name!r}: {folder} holds no {CONFIG_NAME}, in best/ or model/ neither, and no "
            "config.json of a plain model. Has its training run finished?"
        )
    saved_over = base or Checkpoint.read(checkpoint).base.name
    # Beside a perturbation there may be the base that trained, and the tokenizer, or not.
    of_base, of_tokenizer = (
        str(checkpoint) if (checkpoint / file).is_file() else saved_over
        for file in ("config.json", "tokenizer_config.json")
    )
    if not of_base or not of_tokenizer:
        raise ValueError(
            f"model {name!r}: {checkpoint} does not say over what it was saved: set base"
        )
    return Place(name, checkpoint, of_base, of_tokenizer)


def common_tokenizer(places: Sequence[Place], *, trust_remote_code: bool) -> Any:
    """The tokenizer of all models: under two, a token would not be the same thing."""
    from transformers import AutoTokenizer

    found = []
    for place in places:
        try:
            found.append(
                AutoTokenizer.from_pretrained(place.tokenizer, trust_remote_code=trust_remote_code)
            )
        except (OSError, ValueError) as error:
            raise _unloadable(place, f"the tokenizer {place.tokenizer}", error) from error
    first, *others = [DocumentTokenizer(each).fingerprint() for each in found]
    for place, other in zip(places[1:], others):
        if other != first:
            raise ValueError(
                f"models {places[0].name!r} and {place.name!r} have different tokenizers "
                f"({places[0].tokenizer}, {place.tokenizer}), and a likelihood is of their tokens: "
                "judge them in separate runs"
            )
    return found[0]


def load(place: Place, options: LoadOptions) -> PerturbedLM:
    """The model in eval mode; a plain one behind a transform that moves nothing."""
    base = _base(place, options)
    for what, tokens in options.lengths.items():
        check_positions(place.name, base, tokens, what)
    if place.checkpoint is not None:
        lm = fastperturb.load(base, place.checkpoint)
    else:
        lm = fastperturb.wrap(base, PerturbConfig(transform="diagonal", num_samples=1))
        nn.init.zeros_(lm.transform.get_parameter("s"))
    return lm.to(runs.torch_device(options.device)).eval()


def autocast(lm: PerturbedLM, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Under which a model of this precision is judged."""
    device = lm.transform.embed_rms.device.type
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def _base(place: Place, options: LoadOptions) -> nn.Module:
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    try:
        return AutoModelForCausalLM.from_pretrained(
            place.base,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=options.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise _unloadable(place, place.base, error) from error


def _unloadable(place: Place, what: str, error: Exception) -> ValueError:
    advice = "" if place.checkpoint is None else ". If what it was saved over has moved, set base"
    return ValueError(f"model {place.name!r}: {what} cannot be loaded: {error}{advice}")


def check_positions(name: str, base: Any, tokens: int, what: str = "block_size") -> None:
    """Refuse texts of more tokens than a model has positions."""
    positions = getattr(base.config, "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise ValueError(
            f"{what} = {tokens} is more than the {positions} positions that model {name!r} was "
            "made for; lower it"
        )
