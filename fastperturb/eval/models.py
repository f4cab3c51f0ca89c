"""Finding and loading the models of an evaluation, one at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from fastperturb import runs
from fastperturb.checkpoint.format import CONFIG_NAME, Checkpoint
from fastperturb.checkpoint.pretrained import check_positions, load_causal_lm, load_tokenizer
from fastperturb.config import PerturbConfig
from fastperturb.data.documents import DocumentTokenizer
from fastperturb.model import PerturbedLM, wrap
from fastperturb.model import load as load_checkpoint


@dataclass(frozen=True)
class Place:
    """The folders or Hugging Face ids that make up a model.

    checkpoint: the folder that `fastperturb.load` reads; None for a plain model.
    base, tokenizer: the folder or id that transformers loads.
    """

    name: str
    checkpoint: Path | None
    base: str
    tokenizer: str

    @property
    def is_edited(self) -> bool:
        """True where the perturbation edits tokens at random."""
        return (
            self.checkpoint is not None
            and not Checkpoint.read(self.checkpoint).perturbation.keeps_prefix
        )


class LoadOptions(Protocol):
    """The options of a command that loading a model needs."""

    @property
    def precision(self) -> str: ...

    @property
    def trust_remote_code(self) -> bool: ...

    @property
    def device(self) -> str | None: ...

    @property
    def lengths(self) -> Mapping[str, int]:
        """The lengths of text that the model must have positions for, by option."""
        ...


def find(name: str, where: str, base: str | None) -> Place:
    """Find the checkpoint or plain model at `where`; of a training run the best, or else the last.

    where: a folder or a Hugging Face id. base: replaces the base that the checkpoint names.
    """
    folder = Path(where).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or where.startswith((".", "~")) or where.count("/") > 1:
            raise ValueError(f"model {name!r}: there is no folder {where}")
        return Place(name, None, where, where)
    candidates = (folder / "best", folder / "model", folder)
    checkpoint = next((path for path in candidates if (path / CONFIG_NAME).is_file()), None)
    if checkpoint is None:
        if (folder / "config.json").is_file():
            return Place(name, None, str(folder), str(folder))
        raise ValueError(
            f"model {name!r}: {folder} holds no {CONFIG_NAME}, nor do best/ and model/ in it, and "
            "no config.json of a plain model. Has its training run finished?"
        )
    saved_over = base or Checkpoint.read(checkpoint).base.name
    # A checkpoint folder may also hold the base, if it was trained, and the tokenizer.
    base_source, tokenizer_source = (
        str(checkpoint) if (checkpoint / file).is_file() else saved_over
        for file in ("config.json", "tokenizer_config.json")
    )
    if not base_source or not tokenizer_source:
        raise ValueError(
            f"model {name!r}: {checkpoint} does not name the base model it was saved with: set base"
        )
    return Place(name, checkpoint, base_source, tokenizer_source)


def common_tokenizer(places: Sequence[Place], *, trust_remote_code: bool) -> Any:
    """Load the tokenizer that all models share, and reject models with different ones."""
    tokenizers = []
    for place in places:
        try:
            tokenizer = load_tokenizer(place.tokenizer, trust_remote_code=trust_remote_code)
        except ValueError as error:
            raise _unloadable(place, error) from error
        tokenizers.append(tokenizer)
    first, *others = [DocumentTokenizer(tokenizer).fingerprint() for tokenizer in tokenizers]
    for place, other in zip(places[1:], others):
        if other != first:
            raise ValueError(
                f"models {places[0].name!r} and {place.name!r} have different tokenizers "
                f"({places[0].tokenizer}, {place.tokenizer}), and likelihoods per token cannot be "
                "compared then: evaluate them in separate runs"
            )
    return tokenizers[0]


def load(place: Place, options: LoadOptions) -> PerturbedLM:
    """Load a model in eval mode; a plain one gets a transform that perturbs nothing."""
    base = _base(place, options)
    for option, tokens in options.lengths.items():
        check_positions(place.name, base, tokens, option)
    if place.checkpoint is not None:
        lm = load_checkpoint(base, place.checkpoint)
    else:
        lm = wrap(base, PerturbConfig(transform="diagonal", num_samples=1))
        nn.init.zeros_(lm.transform.get_parameter("s"))
    return lm.to(runs.torch_device(options.device)).eval()


def autocast(lm: PerturbedLM, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Return the autocast context under which a model of this precision is scored."""
    device = lm.transform.embed_rms.device.type
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def _base(place: Place, options: LoadOptions) -> nn.Module:
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    try:
        return load_causal_lm(place.base, dtype=dtype, trust_remote_code=options.trust_remote_code)
    except ValueError as error:
        raise _unloadable(place, error) from error


def _unloadable(place: Place, error: Exception) -> ValueError:
    advice = "" if place.checkpoint is None else ". If its base model was moved, set base"
    return ValueError(f"model {place.name!r}: {error}{advice}")
