"""The format of a checkpoint folder, and the checks that its files belong together.

    perturbation_config.json   the config, the base it was saved over, every file's SHA-256
    perturbation.safetensors   the transform's parameters and embed_rms, in fp32
    adapter_config.json, adapter_model.safetensors    PEFT's own, where there is an adapter

The config carries a digest of itself too. So a folder whose files are damaged, changed or of two
saves is rejected. Nothing is unpickled, nothing is allocated before its size is known to be right,
and no path that stands in a file is followed.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastperturb.checkpoint.atomic import (
    digest,
    open_tensors,
    read_json,
    read_tensors,
    require_file,
    sha256,
)
from fastperturb.engine.adapters import unadapted
from fastperturb.engine.architectures import understand
from fastperturb.engine.perturbations import PERTURBATIONS
from fastperturb.engine.protocol import Perturbation
from fastperturb.version import __version__

FORMAT_VERSION = 1
CONFIG_NAME = "perturbation_config.json"
TENSORS_NAME = "perturbation.safetensors"
ADAPTER_NAMES = ("adapter_config.json", "adapter_model.safetensors")

# Far above the size of any checkpoint's config and header, and small enough to read into memory.
_MOST_CONFIG_BYTES = 1 << 20
_MOST_HEADER_BYTES = 1 << 16
# Casting a table to another dtype changes its root mean square by much less than this, another
# model's table by much more.
_RMS_TOLERANCE = 0.01
# A PEFT config can name files and modules for PEFT to load; a checkpoint stays in its folder.
_REACHING_OUT = ("adapters", "megatron_config", "tokenizer_name_or_path")


@dataclass(frozen=True)
class Base:
    """The base that a checkpoint was saved over: enough to notice another model."""

    model: str
    name: str
    embedding: list[int]
    embed_rms: float
    dtypes: list[str]
    sample: str  # SHA-256 of a few entries of every weight

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, embed_rms: Tensor) -> Base:
        base = unadapted(model)
        embed: Any = understand(model).embed
        weights = [weight for weight in model.parameters() if not weight.is_meta]
        entries = [w.flatten()[:: max(1, w.numel() // 16)][:16].double().cpu() for w in weights]
        return cls(
            model=type(base).__name__,
            name=str(getattr(base, "name_or_path", "")),
            embedding=list(embed.weight.shape),
            embed_rms=float(embed_rms),
            dtypes=sorted({str(weight.dtype) for weight in weights}),
            sample=hashlib.sha256(torch.cat(entries).numpy().tobytes()).hexdigest(),
        )

    def __str__(self) -> str:
        name = f" {self.name!r}" if self.name else ""
        return f"{self.model}{name} with embeddings {self.embedding}, rms {self.embed_rms:.4g}"

    def check(self, here: Base, folder: Path) -> None:
        """Raise on embeddings of another scale, and warn of other weights."""
        if not abs(here.embed_rms / self.embed_rms - 1) <= _RMS_TOLERANCE:
            raise ValueError(
                f"{folder} was saved over {self}, and this is {here}: another base, whose "
                "embeddings it was not trained for; load the base that it was saved over (to try "
                f"it on this one, wrap() the model and load {TENSORS_NAME} into its transform)"
            )
        if here.dtypes == self.dtypes and here.sample != self.sample:
            warnings.warn(
                f"this {here.model} does not have the weights that {folder} was saved over, "
                f"those of {self}, so its results will differ. Was one of them "
                "fine-tuned, or an adapter merged into it?",
                stacklevel=4,
            )


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose files are those that were saved together."""

    folder: Path
    config: Any  # a PerturbConfig, or the config of another perturbation
    embed_dim: int
    base: Base
    files: dict[str, str]  # the SHA-256 of every file
    perturbation: Perturbation

    @classmethod
    def read(cls, folder: Path) -> Checkpoint:
        """Read the config, and check every other file against it."""
        path = folder / CONFIG_NAME
        values = _read_manifest(path)
        try:
            kind = PERTURBATIONS[values.get("config_class", "PerturbConfig")]
            config_class: Any = kind.config_class
            config = config_class.from_dict(_as_now(values["config"]))
            embed_dim = values["embed_dim"]
            shapes = kind.transform_shapes(config, embed_dim)
            base, files = Base(**values["base"]), values["files"]
            float(base.embed_rms)
            if set(files) not in ({TENSORS_NAME}, {TENSORS_NAME, *ADAPTER_NAMES}):
                raise ValueError(f"its files are {list(files)}")
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(
                f"{path} is not understood by fastperturb {__version__}, and was written by "
                f"{values.get('fastperturb_version')}: {error}; use that version, or save again"
            ) from error
        _check_header(folder / TENSORS_NAME, shapes)
        for name, expected in files.items():
            require_file(folder / name)
            if sha256(folder / name) != expected:
                raise ValueError(
                    f"{folder / name} is not the file that {CONFIG_NAME} was saved with: it is "
                    "damaged, was changed, or is of another save that did not finish; copy the "
                    "whole checkpoint again, or save again"
                )
        saved = cls(folder, config, embed_dim, base, files, kind)
        if saved.has_adapter:
            _check_adapter_config(folder / ADAPTER_NAMES[0])
        return saved

    @property
    def has_adapter(self) -> bool:
        return ADAPTER_NAMES[0] in self.files

    def transform_tensors(self) -> dict[str, Tensor]:
        """Read the transform's state."""
        path = self.folder / TENSORS_NAME
        tensors = read_tensors(path)
        reject_non_finite(tensors, f"{path} cannot be used")
        if tensors["embed_rms"] <= 0:
            raise ValueError(f"{path} holds embed_rms={tensors['embed_rms']}, not above 0")
        return tensors

    def adapter_tensors(self) -> dict[str, Tensor]:
        return read_tensors(self.folder / ADAPTER_NAMES[1])


def write_manifest(
    folder: Path,
    *,
    config: Any,
    embed_dim: int,
    base: Base,
    names: tuple[str, ...],
) -> None:
    """Write the config that holds the digests of the folder's other files."""
    manifest = {
        "format_version": FORMAT_VERSION,
        "fastperturb_version": __version__,
        "embed_dim": embed_dim,
        "config_class": type(config).__name__,
        "config": config.to_dict(),
        "base": vars(base),
        "files": {name: sha256(folder / name) for name in names},
    }
    manifest["sha256"] = digest(manifest)
    text = json.dumps(manifest, indent=2, allow_nan=False)
    (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def reject_non_finite(tensors: Mapping[str, Tensor], consequence: str) -> None:
    """Raise on NaN or infinity, in a message that begins with the consequence."""
    for name, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(
                f"{consequence}: {name} holds nan or inf; go back to an older checkpoint"
            )


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(
            f"there is no {path}: the folder is not a FastPerturb checkpoint, or one whose save "
            "did not finish; save again by lm.save_pretrained"
        )
    values = read_json(path, most_bytes=_MOST_CONFIG_BYTES)
    version = values.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format {version}, newer than format {FORMAT_VERSION} of fastperturb "
            f"{__version__}; upgrade fastperturb"
        )
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} was not written by fastperturb: it has format {version!r}")
    if values.pop("sha256", None) != digest(values):
        raise ValueError(
            f"{path} was changed after it was saved, or is damaged; copy the checkpoint again, "
            "or change options of the loaded model: lm.config = dataclasses.replace(lm.config, ...)"
        )
    return values


def _as_now(config: Any) -> Any:
    """Return the values of a saved config under the present meaning of their keys.

    Up to 0.2.0, before `sampling` was a key, `deterministic` had one latent for all tokens,
    whatever the scope.
    """
    if isinstance(config, dict) and config.get("deterministic") and "sampling" not in config:
        return {**config, "scope": "sequence"}
    return config


def _check_header(path: Path, shapes: dict[str, list[int]]) -> None:
    """Check names, shapes and dtypes before any tensor is allocated."""
    require_file(path)
    data_bytes = sum(4 * torch.Size(shape).numel() for shape in shapes.values())
    size, most = path.stat().st_size, data_bytes + _MOST_HEADER_BYTES
    if not data_bytes < size <= most:
        raise ValueError(
            f"{path} has {size} bytes, and the tensors of its config take between {data_bytes} "
            f"and {most}: it is truncated, or not the file saved with {CONFIG_NAME}; copy the "
            "whole checkpoint again"
        )
    with open_tensors(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        stored = {name: (s.get_dtype(), s.get_shape()) for name, s in slices.items()}
    wanted = {name: ("F32", shape) for name, shape in shapes.items()}
    for name in sorted(stored.keys() | wanted.keys()):
        if stored.get(name) != wanted.get(name):
            raise ValueError(
                f"{path} must hold {wanted.get(name, 'nothing')} as {name!r} and holds "
                f"{stored.get(name, 'nothing')}: it is not the file saved with {CONFIG_NAME}; "
                "copy the whole checkpoint again"
            )


def _check_adapter_config(path: Path) -> None:
    values = read_json(path, most_bytes=_MOST_CONFIG_BYTES)
    reaching = [key for key in _REACHING_OUT if values.get(key)]
    if reaching:
        raise ValueError(
            f"{path} sets {', '.join(reaching)}, which would load something from outside the "
            "folder; put that adapter on the model yourself, by PEFT"
        )
