"""The two sides of a wrapped model: the module, and the perturbation that it is given.

`WrappedModel` is the part of a wrapper that the engine, the diagnostics and checkpoints use; people
call `model.PerturbedLM`, which adds the public methods. A kind of perturbation is one file with one
subclass of `Perturbation`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor, nn

from fastperturb.config import check_keys
from fastperturb.engine.architectures import CausalLM, understand
from fastperturb.engine.batch import Batch
from fastperturb.engine.sample_split import SampleSplit
from fastperturb.engine.sequences import Encoded, Sequences
from fastperturb.engine.state import CallState
from fastperturb.engine.trunk import TrunkInputs


class Perturbation(ABC):
    """A kind of perturbation: the rule by which samples of a prefix differ from it."""

    config_class: ClassVar[type]
    # Keys of the config that describe the transform, beside the shapes of its parameters.
    described_by: ClassVar[tuple[str, ...]]
    # True if appended tokens leave the encoding of a prefix as it is, so that a cache can hold it.
    keeps_prefix: ClassVar[bool]

    @abstractmethod
    def make_transform(self, parts: CausalLM, config: Any) -> nn.Module:
        """Return the module with the perturbation's parameters, which becomes `lm.transform`.

        It has an attribute embed_dim and a buffer embed_rms, the width and the root mean square of
        the embeddings, by which a checkpoint recognises its base.
        """

    @abstractmethod
    def transform_shapes(self, config: Any, embed_dim: int) -> dict[str, list[int]]:
        """Return the shape of each tensor of the transform's state, allocating nothing."""

    @abstractmethod
    def check_inputs(
        self, lm: WrappedModel, input_ids: Tensor | None, inputs_embeds: Tensor | None
    ) -> None:
        """Raise on inputs of a call that this kind of perturbation cannot take."""

    def prepare(self, lm: WrappedModel, batch: Batch) -> Batch:
        """Return the batch with what all its samples share; by default they share no more."""
        return batch

    @abstractmethod
    def trunk_inputs(self, lm: WrappedModel, batch: Batch, samples: Tensor) -> TrunkInputs:
        """Return the trunk's inputs for the samples with these numbers, [m] or [m, B]."""

    @abstractmethod
    def next_logits(
        self,
        lm: WrappedModel,
        model: Any,
        sequences: Sequences,
        seed: Tensor,
        encoded: Encoded | None,
    ) -> Tensor:  # [M N, V]
        """Return each sample's logits of the next token.

        The tokens after those that are `encoded` are encoded, and added to it.
        """

    def perturb(self, lm: WrappedModel, embeddings: Tensor, **noise: Any) -> Tensor:
        """Return perturbed embeddings [M, B, T, D], where the perturbation is of embeddings."""
        raise TypeError(f"{type(self).__name__} perturbs tokens, not embeddings")

    def watch(self, lm: WrappedModel, shift: Tensor) -> None:
        """Warn if the shift of a training step shows that training has removed the perturbation.

        By default never: only a perturbation that is learned can vanish.
        """
        return


class WrappedModel(nn.Module):
    """A base model, a config, a perturbation and the state between calls."""

    base: nn.Module
    transform: Any  # a Transform, or the module of another perturbation

    def __init__(self, model: nn.Module, config: Any, perturbation: Perturbation) -> None:
        super().__init__()
        parts = understand(model)
        self.base = model
        self.config: Any = config
        self.perturbation = perturbation
        self.transform = perturbation.make_transform(parts, config)
        self.state = CallState()

    @property
    def is_exact(self) -> bool:
        """True within `exact()`: nothing is perturbed."""
        return self.state.exact

    @property
    def has_one_draw(self) -> bool:
        """True if all samples of a call would be the same."""
        return self.state.exact or self.config.deterministic

    @contextlib.contextmanager
    def at_temperature(self, temperature: float) -> Iterator[None]:
        """Divide every sample's logits by a temperature within the body."""
        before, self.state.temperature = self.state.temperature, temperature
        try:
            yield
        finally:
            self.state.temperature = before

    @contextlib.contextmanager
    def overriding(self, **changes: Any) -> Iterator[None]:
        """Replace these keys of the config within the body."""
        check_keys(type(self.config), changes)
        if "sampling" in changes:
            changes = {"antithetic": False, **changes}  # its old spelling, which would win
        before, self.config = self.config, dataclasses.replace(self.config, **changes)
        try:
            yield
        finally:
            self.config = before

    @contextlib.contextmanager
    def unsplit(self) -> Iterator[None]:
        """Run all samples in this process within the body."""
        before, self.state.split = self.state.split, SampleSplit()
        try:
            yield
        finally:
            self.state.split = before

    def perturb(
        self,
        embeddings: Tensor,
        seed: Tensor,
        samples: Tensor | int,
        *,
        rows: Tensor,
        ids: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        antithetic: bool | None = None,
        strata: int | None = None,
        perturb_mask: Tensor | None = None,
    ) -> Tensor:
        """Perturb embeddings [B, T, D], once for each of these sample numbers: [M, B, T, D].

        ids: the tokens [B, T] of the embeddings, which key the latents of `deterministic`.
        attention_mask: [B, T], 0 at padding, which a context leaves out.
        antithetic: whether samples come in pairs; default as the config says.
        strata: number of samples in a stratified group; default as the config says of M samples, or
            where `samples` are numbers, which may be a part of M, of its own num_samples.
        The other arguments are those of `ops.perturb_embed`.
        """
        if strata is None:
            counted = isinstance(samples, int)
            strata = self.config.strata_of_mean(samples) if counted else self.config.strata()
        return self.perturbation.perturb(
            self,
            embeddings,
            ids=ids,
            seed=seed,
            samples=samples,
            rows=rows,
            positions=positions,
            attention_mask=attention_mask,
            antithetic=self.config.draws_pairs if antithetic is None else antithetic,
            strata=strata,
            perturb_mask=perturb_mask,
        )

    def samples_at_once(self) -> int:
        """Return how many samples a pass without gradient runs at a time, as in training."""
        config = self.config
        if config.chunk_size is not None:
            return config.chunk_size
        return self.state.planner.limited(1 if config.plan == "chunked" else config.num_samples)
