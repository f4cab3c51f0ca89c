"""The methods that one switch chooses among, all as a PerturbedLM, so that comparisons are fair.

    learned    T(e, z) with learned parameters, under the configured equation
    fixed      isotropic noise of the configured scale that is not learned, same equation
    discrete   random edits of the prefix instead of noise, same equation
    neftune    NEFTune (Jain et al., 2023): uniform noise of length alpha / sqrt(3) on the whole
               sequence, one draw, no marginal; none at evaluation
    exact      nothing moves: fine-tuning

The last two are what they are after training too: they are saved with a transform of scale zero,
so that whoever loads them computes the plain model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fastperturb.config import PerturbConfig
from fastperturb.engine import sharding
from fastperturb.engine.adapters import without_peft_deprecations
from fastperturb.model import PerturbedLM, wrap
from fastperturb.train.options import TrainOptions


def build(options: TrainOptions) -> PerturbedLM:
    """The base, its adapter and what moves its embeddings, in fp32 where it trains."""
    torch.manual_seed(options.seed)
    base = load_base(options)
    if options.lora.rank:
        base = _with_adapter(base, options)
    if options.gradient_checkpointing:
        inner: Any = base
        enable = "activation_checkpointing_enable"  # of which older transformers have the second
        name = enable if hasattr(inner, enable) else "gradient_checkpointing_enable"
        getattr(inner, name)({"use_reentrant": False})
    if options.method == "learned":
        return wrap(base, options.perturb)
    if options.method == "discrete":
        return _edited(base, options)
    return _isotropic(base, options)


@contextlib.contextmanager
def at_evaluation(lm: PerturbedLM, options: TrainOptions) -> Iterator[None]:
    """Within it the model is what its method makes of it after training."""
    if options.method != "neftune":
        yield
        return
    sharding.reshard(lm)  # what is written must be the parameter, and not a gathered copy of it
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
    from transformers import AutoModelForCausalLM

    frozen = options.lora.rank > 0
    dtype = torch.bfloat16 if options.precision == "bf16" and frozen else torch.float32
    more = {}
    if options.attn_implementation is not None:
        more["attn_implementation"] = options.attn_implementation
    try:
        return AutoModelForCausalLM.from_pretrained(
            options.model,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=options.trust_remote_code,
            **more,
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"model {options.model!r} cannot be loaded: {error}") from error


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
    from fastperturb.model import EditConfig, edit

    shared = {field.name for field in dataclasses.fields(EditConfig)}
    given = {k: v for k, v in options.perturb.to_dict().items() if k in shared}
    own = EditConfig(
        rate=options.edit_rate,
        kinds=options.edit_kinds,
        neighbors=options.edit_neighbors,
        **given,
    )
    return edit(base, own)
