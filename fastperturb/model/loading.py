"""Loading a saved perturbed model."""

from __future__ import annotations

import os

from torch import nn

from fastperturb.checkpoint import load as saved_files
from fastperturb.engine.edits import TokenEdits
from fastperturb.model.wrapper import PerturbedLM, edit


def load(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    is_trainable: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> PerturbedLM:
    """Wrap a model with a saved perturbation, and with the adapter saved beside it.

    model: the base that it was saved over, plain; or a PeftModel with that adapter on it. Where
        the base was saved too, `from_pretrained(directory)` makes it.
    directory: a folder, or the id of a repository on the Hugging Face Hub (`revision` and
        `token` are for it).
    is_trainable: continue training. By default, as in PEFT, the loaded parameters are frozen and
        the model is in eval mode.

    Raises ValueError or OSError on files that are missing, damaged, changed or made for another
    model, and leaves the model as it was.
    """
    saved = saved_files.read(model, saved_files.find(directory, revision, token))
    with saved_files.with_adapter(model, saved, is_trainable=is_trainable) as base:
        if isinstance(saved.perturbation, TokenEdits):
            lm: PerturbedLM = edit(base, saved.config)
        else:
            lm = PerturbedLM(base, saved.config, saved.perturbation)
        saved_files.restore(lm, saved)
        lm.transform.requires_grad_(is_trainable)
    return lm if is_trainable else lm.eval()
