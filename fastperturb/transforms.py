"""The learned transforms T(e, z) = e + rho * shift, as modules that hold their parameters.

`rho` (the buffer `embed_rms`) is the root mean square of the embedding table's entries, so the
parameters live in relative units and one learning rate fits every model. Each family's shift is
linear in its outer parameters (`outer`), is zero at z = 0, and starts with root mean square
`init_scale`. Three choices are ours: gated starts ungated (C = 0), affine splits its variance
evenly, and the scale of affine, gated, mlp and context, which depends on the embeddings, is taken
over embeddings with independent normal entries of that root mean square, for context as a document.

`min_scale` floors the scale by multiplying the outer parameters: `effective_parameters` are
what the kernels see, so no kernel knows of the floor and the gradient flows through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastperturb import noise
from fastperturb.config import PerturbConfig

# Enough probes to know a scale to a few percent, few enough to forget their cost.
_PROBE_TOKENS = 256
# A state halves in this many tokens at most, at the start of training.
_LONGEST_REACH = 64
# The floor amplifies a shift by no more than this: one that is exactly zero has no direction to
# lift, and stays zero until a gradient gives it one.
_MOST_LIFT = 1e3


def diagonal(e: Tensor, z: Tensor, rho: Tensor, s: Tensor) -> Tensor:
    return e + rho * s * z


def lowrank(e: Tensor, z: Tensor, rho: Tensor, U: Tensor) -> Tensor:
    return e + rho * (z @ U)


def gated(e: Tensor, z: Tensor, rho: Tensor, U: Tensor, A: Tensor, C: Tensor) -> Tensor:
    return e + rho * (1 + torch.tanh((e / rho) @ A @ C)) * (z @ U)


def affine(e: Tensor, z: Tensor, rho: Tensor, Ua: Tensor, Ub: Tensor) -> Tensor:
    return e + (z @ Ua) * e + rho * (z @ Ub)


def mlp(e: Tensor, z: Tensor, rho: Tensor, A: Tensor, B: Tensor, b: Tensor, C: Tensor) -> Tensor:
    rest = (e / rho) @ A + b
    return e + rho * ((F.gelu(rest + z @ B) - F.gelu(rest)) @ C)


def context(
    e: Tensor, z: Tensor, rho: Tensor, U: Tensor, A: Tensor, G: Tensor, decay: Tensor
) -> Tensor:
    """Perturb documents e [..., T, D], one a row."""
    states = context_states((e / rho) @ A, torch.sigmoid(decay))
    return e + rho * ((z * scale_of_states(states, G)) @ U)


def scale_of_states(states: Tensor, G: Tensor) -> Tensor:
    """Return s = 1 + tanh(h G) [..., R], what a context multiplies latents by."""
    return 1 + torch.tanh(states @ G)


def context_states(
    inputs: Tensor,  # [..., T, H]
    retain: Tensor,  # a [H]
    starts: Tensor | None = None,  # [..., T] bool, where documents start; None: nowhere
    real: Tensor | None = None,  # [..., T] bool; None: all
    initial: Tensor | None = None,  # [..., H], before the first position; None: 0
) -> Tensor:
    """Return h_t = a h_(t-1) + (1 - a) inputs_t.

    h_(t-1) counts as 0 where a document starts. Where there is no real token h stays as it is.
    """
    kept, added = retain.expand_as(inputs), (1 - retain) * inputs
    if starts is not None:
        kept = kept.masked_fill(starts[..., None], 0.0)
    if real is not None:
        kept = kept.masked_fill(~real[..., None], 1.0)
        added = added.masked_fill(~real[..., None], 0.0)
    return linear_scan(kept, added, initial)


def linear_scan(kept: Tensor, added: Tensor, initial: Tensor | None = None) -> Tensor:
    """Return h_t = kept_t h_(t-1) + added_t [..., T, H], in log2 T steps.

    initial: h [..., H] before the first; default 0.
    """
    span = 1
    while span < added.shape[-2]:
        # Each position joins the span before it to its own.
        added = added + kept * F.pad(added, (0, 0, span, 0))[..., :-span, :]
        kept = kept * F.pad(kept, (0, 0, span, 0), value=1.0)[..., :-span, :]
        span *= 2
    return added if initial is None else added + kept * initial[..., None, :]


class Transform(nn.Module):
    """One family: its formula, its parameters, and the distribution of its latent."""

    family: str
    formula: Callable[..., Tensor]
    parameter_names: tuple[str, ...]
    outer: tuple[str, ...]
    latent_parameter: int  # the index of the parameter that has a row for each entry of the latent
    rotated: tuple[str, ...] = ()  # those that z enters through, as z @ parameter, and no other way
    context_parameters: tuple[str, ...] = ()  # those of the scale that a context gives to latents

    embed_rms: Tensor

    def __init__(self, config: PerturbConfig, embed_dim: int, embed_rms: float) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.latent_dim = embed_dim if self.family == "diagonal" else config.latent_dim
        self.hidden_dim = config.hidden_dim
        self.latent = config.latent
        self.scope = config.scope
        self.init_scale = config.init_scale
        self.min_scale = config.min_scale
        self.context_source = config.context_source
        self.register_buffer("embed_rms", torch.tensor(embed_rms, dtype=torch.float32))
        for name, value in zip(self.parameter_names, self._initial(), strict=True):
            self.register_parameter(name, nn.Parameter(value.float()))
        with torch.no_grad():
            correction = self.init_scale / self.scale()
            for name in self.outer:
                getattr(self, name).mul_(correction)

    def _initial(self) -> Sequence[Tensor]:
        """Starting values in `parameter_names`' order; outer ones up to a common factor."""
        raise NotImplementedError

    def forward(self, embeddings: Tensor, latent: Tensor, scale: Tensor | None = None) -> Tensor:
        """T(e, z): embeddings [..., D] and latent [..., R] broadcast to [..., D].

        scale: [..., R] of context; without it embeddings are documents [..., T, D].
        """
        return type(self).formula(embeddings, latent, self.embed_rms, *self.effective_parameters())

    def effective_parameters(self) -> list[Tensor]:
        """The parameters with the floor of `min_scale` applied, in `parameter_names`' order."""
        parameters = [getattr(self, name) for name in self.parameter_names]
        if self.min_scale == 0:
            return parameters
        lift = (self.min_scale / self.scale()).clamp(1.0, _MOST_LIFT)
        return [
            value * lift if name in self.outer else value
            for name, value in zip(self.parameter_names, parameters, strict=True)
        ]

    def op_parameters(self) -> list[Tensor]:
        """The effective parameters that `ops.perturb_embed` takes: all but the context's."""
        named = zip(self.parameter_names, self.effective_parameters(), strict=True)
        return [value for name, value in named if name not in self.context_parameters]

    def scale(self) -> Tensor:
        """sqrt(E |T(e, z) - e|^2 / D) / rho of the stored parameters, before any floor."""
        squares = sum(getattr(self, name).square().sum() for name in self.outer)
        return _root(squares / self.embed_dim)

    def _probe(self, width: int, *, row: int, latent: str = "gaussian") -> Tensor:
        """Draw fixed samples [probes, width], to average over where there is no closed form."""
        like = self.get_parameter(self.outer[0])
        rows = torch.full((1,), row, device=like.device)  # a copy from the host would wait
        z = noise.latent(0, (1, 1, _PROBE_TOKENS, width), latent=latent, rows=rows)
        return z[0, 0].to(like)

    def extra_repr(self) -> str:
        sizes = ", ".join(f"{n}={list(getattr(self, n).shape)}" for n in self.parameter_names)
        floor = f", min_scale={self.min_scale:g}" if self.min_scale else ""
        return (
            f"{sizes}, latent={self.latent}, scope={self.scope}, "
            f"scale={self.scale().item():.3g}{floor}, embed_rms={self.embed_rms.item():.3g}"
        )


class Diagonal(Transform):
    family, formula = "diagonal", staticmethod(diagonal)
    parameter_names = outer = ("s",)
    latent_parameter = 0
    s: Tensor

    def _initial(self) -> Sequence[Tensor]:
        return [torch.ones(self.embed_dim)]


class LowRank(Transform):
    family, formula = "lowrank", staticmethod(lowrank)
    parameter_names = outer = ("U",)
    latent_parameter = 0
    rotated = ("U",)
    U: Tensor

    def _initial(self) -> Sequence[Tensor]:
        return [torch.randn(self.latent_dim, self.embed_dim)]


class Gated(Transform):
    family, formula = "gated", staticmethod(gated)
    parameter_names = ("U", "A", "C")
    outer = ("U",)
    latent_parameter = 0
    rotated = ("U",)
    U: Tensor
    A: Tensor
    C: Tensor

    def _initial(self) -> Sequence[Tensor]:
        D, H = self.embed_dim, self.hidden_dim
        return [
            torch.randn(self.latent_dim, D),
            torch.randn(D, H) / math.sqrt(D),
            torch.zeros(H, D),
        ]

    def scale(self) -> Tensor:
        gain = 1 + torch.tanh(self._probe(self.embed_dim, row=0) @ self.A @ self.C)
        return _root(gain.square().mean(0) @ self.U.square().sum(0) / self.embed_dim)


class Affine(Transform):
    family, formula = "affine", staticmethod(affine)
    parameter_names = outer = ("Ua", "Ub")
    latent_parameter = 0
    rotated = ("Ua", "Ub")
    Ua: Tensor
    Ub: Tensor

    def _initial(self) -> Sequence[Tensor]:
        return [torch.randn(self.latent_dim, self.embed_dim) for _ in range(2)]


class MLP(Transform):
    family, formula = "mlp", staticmethod(mlp)
    parameter_names = ("A", "B", "b", "C")
    outer = ("C",)
    latent_parameter = 1
    rotated = ("B",)
    A: Tensor
    B: Tensor
    b: Tensor
    C: Tensor

    def _initial(self) -> Sequence[Tensor]:
        D, R, H = self.embed_dim, self.latent_dim, self.hidden_dim
        return [
            torch.randn(D, H) / math.sqrt(D),
            torch.randn(R, H) / math.sqrt(R),
            torch.zeros(H),
            torch.randn(H, D),
        ]

    def scale(self) -> Tensor:
        x = self._probe(self.embed_dim, row=0)
        z = self._probe(self.latent_dim, row=1, latent=self.latent)
        unit_rms = torch.ones_like(self.embed_rms)
        return _root((mlp(x, z, unit_rms, self.A, self.B, self.b, self.C) - x).square().mean())


class Context(Transform):
    """lowrank, whose latents are scaled by what came before: s_t = 1 + tanh(h_t G)."""

    family, formula = "context", staticmethod(context)
    parameter_names = ("U", "A", "G", "decay")
    outer = ("U",)
    latent_parameter = 0
    context_parameters = ("A", "G", "decay")
    U: Tensor
    A: Tensor
    G: Tensor
    decay: Tensor

    def forward(self, embeddings: Tensor, latent: Tensor, scale: Tensor | None = None) -> Tensor:
        if scale is None:
            return super().forward(embeddings, latent)
        (U,) = self.op_parameters()
        return lowrank(embeddings, latent * scale, self.embed_rms, U)

    def _initial(self) -> Sequence[Tensor]:
        D, R, H = self.embed_dim, self.latent_dim, self.hidden_dim
        reach = torch.logspace(0, math.log2(_LONGEST_REACH), H, base=2, dtype=torch.float64)
        return [
            torch.randn(R, D),
            torch.randn(D, H) / math.sqrt(D),
            torch.zeros(H, R),
            torch.logit(0.5 ** (1 / reach)),
        ]

    def scale(self) -> Tensor:
        """The scale over a document of the probes' length."""
        states = context_states(self._probe(self.embed_dim, row=0) @ self.A, self.retain())
        per_latent = scale_of_states(states, self.G).square().mean(0)
        return _root(per_latent @ self.U.square().sum(1) / self.embed_dim)

    def retain(self) -> Tensor:
        """Return a [H], the share of a state that is kept from one token to the next."""
        return torch.sigmoid(self.decay)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, context_source={self.context_source}"


def _root(mean_square: Tensor) -> Tensor:
    """A root whose gradient at 0 is 0 and not infinite."""
    return mean_square.clamp_min(1e-24).sqrt()


FAMILIES = {family.family: family for family in (Diagonal, LowRank, Gated, Affine, MLP, Context)}


def make_transform(
    config: PerturbConfig, embed_dim: int, *, embed_rms: float | Tensor = 1.0
) -> Transform:
    """The transform of `config.transform` for embeddings `embed_dim` wide."""
    if not isinstance(config, PerturbConfig):
        raise TypeError(f"config must be a PerturbConfig, got {type(config).__name__}")
    if isinstance(embed_dim, bool) or not isinstance(embed_dim, int) or embed_dim < 1:
        raise ValueError(f"embed_dim must be a positive int, got {embed_dim!r}")
    rms = float(embed_rms)
    if not math.isfinite(rms) or rms <= 0:
        raise ValueError(f"embed_rms must be a finite number above 0, got {embed_rms!r}")
    return FAMILIES[config.transform](config, embed_dim, rms)
