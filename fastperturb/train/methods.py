"""The training methods, all as a PerturbedLM, so that comparisons are fair.

    learned    T(e, z) with learned parameters, under the configured estimator
    fixed      isotropic noise of the configured scale that is not learned, same estimator
    discrete   random edits of the prefix instead of noise, same estimator
    hybrid     random edits of the prefix, then the noise of learned, same estimator
    neftune    NEFTune (Jain et al., 2023): uniform noise of length alpha / sqrt(3) on the whole
               sequence, one sample, no marginal; none at evaluation
    exact      no perturbation: fine-tuning

The last two are saved with a transform of scale zero, so that loading them gives the plain model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fastperturb.checkpoint.pretrained import load_causal_lm
from fastperturb.config import PerturbConfig
from fastperturb.engine import sharding
from fastperturb.engine.adapters import without_peft_deprecations
from fastperturb.model import EditConfig, PerturbedLM, edit, wrap
from fastperturb.train.options import TrainOptions


def build(options: TrainOptions) -> PerturbedLM:
    """Return the base model with its adapter and perturbation; trainable parameters are in fp32."""
    torch.manual_seed(options.seed)
    base = load_base(options)
    if options.lora.rank:
        base = _with_adapter(base, options)
    if options.gradient_checkpointing:
        inner: Any = base
        enable = "activation_checkpointing_enable"  # older transformers have the other name
        name = enable if hasattr(inner, enable) else "gradient_checkpointing_enable"
        getattr(inner, name)({"use_reentrant": False})
    if options.method == "learned":
        return wrap(base, options.perturb)
    if options.method == "hybrid":
        return wrap(base, options.perturb, edits=EditConfig(**dataclasses.asdict(options.edits)))
    if options.method == "discrete":
        return _edited(base, options)
    return _isotropic(base, options)


@contextlib.contextmanager
def at_evaluation(lm: PerturbedLM, options: TrainOptions) -> Iterator[None]:
    """Give the model the scale that its method has after training: 0 for neftune."""
    if options.method != "neftune":
        yield
        return
    sharding.reshard(lm)  # so that the parameter itself is written, not a gathered copy of it
    scale: Any = lm.transform.s
    before = scale.detach().clone()
    with torch.no_grad():
        scale.zero_()
    try:
        yield
    finally:
        sharding.reshard(lm)
        with torch.no_grad():
            scale.copy_(before)


def load_base(options: TrainOptions) -> nn.Module:
    """Load the base model, in bf16 only where it is frozen."""
    is_frozen = options.lora.rank > 0
    return load_causal_lm(
        options.model,
        dtype=torch.bfloat16 if options.precision == "bf16" and is_frozen else torch.float32,
        trust_remote_code=options.trust_remote_code,
        attn_implementation=options.attn_implementation,
    )


def _with_adapter(base: nn.Module, options: TrainOptions) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    lora = options.lora
    targets = list(lora.targets)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in base.modules()),
        task_type="CAUSAL_LM",
    )
    try:
        with without_peft_deprecations():
            return get_peft_model(base, config)
    except ValueError as error:
        raise ValueError(f"lora.targets={lora.targets} does not fit the model: {error}") from error


def _isotropic(base: nn.Module, options: TrainOptions) -> PerturbedLM:
    """Wrap the base for fixed, neftune or exact: a diagonal transform that is not learned."""
    config = dataclasses.replace(options.perturb, transform="diagonal")
    if options.method != "fixed":
        config = PerturbConfig(
            transform="diagonal", latent="uniform", estimator="jensen", num_samples=1
        )
    lm = wrap(base, config)
    scale: Any = lm.transform.s
    scale.requires_grad_(False)
    if options.method != "fixed":
        rho = float(lm.transform.embed_rms)
        # NEFTune's entries are alpha / sqrt(T D) times a uniform number on (-1, 1).
        deviation = options.neftune_alpha / math.sqrt(3 * options.block_size * len(scale))
        scale.data.fill_(deviation / rho if options.method == "neftune" else 0.0)
    return lm


def _edited(base: nn.Module, options: TrainOptions) -> PerturbedLM:
    names = {field.name for field in dataclasses.fields(EditConfig)}
    estimation = {k: v for k, v in options.perturb.to_dict().items() if k in names}
    return edit(base, EditConfig(**dataclasses.asdict(options.edits), **estimation))
