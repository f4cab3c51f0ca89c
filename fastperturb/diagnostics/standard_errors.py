"""Standard errors of the transform's parameters, by the sandwich of the estimating equation.

Training solves sum_i psi_i(theta) = 0, with psi_i the gradient of the estimator's value summed
over the labels of example i (a row of a batch). At the solution its covariance is about

    information    A^-1 B A^-1,   A = -sum_i dpsi_i / dtheta,   B = sum_i psi_i psi_i^T
    outer          B^-1

`information` is the sandwich, right for every estimator and whether or not the model is true;
A is the observed information, by central differences of sum_i psi_i: 2P passes over the data.
`outer` takes outer products for the information, which holds where the value is the log-likelihood
of a true model: for iwae and jvi with many samples. One pass; with few samples it is too small.

The samples are held (one seed, examples numbered through), so the noise of M samples in psi counts
as variance. Training that draws new samples every step averages some of it out, and errors here are
then too large rather than too small; more samples close the gap. The base and its adapters are
fixed at their values.

Some directions are not identified. The data may have no information about them: fewer examples than
parameters, or a base that ignores a direction of its embeddings. And a rotation of gaussian latents
leaves the model the same, though held samples see a difference. Neither has a variance.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastperturb import noise, ops
from fastperturb.config import suggestion
from fastperturb.engine import context
from fastperturb.engine.architectures import reject_dropout, understand
from fastperturb.engine.hybrid import Copies, Hybrid
from fastperturb.engine.positions import perturbed_positions
from fastperturb.engine.protocol import WrappedModel

BREADS = ("auto", "information", "outer")
# P x P in fp64: half a GB, and minutes for its eigenvalues.
_MOST_PARAMETERS = 8192
# Beyond this the 2P passes of the differences are not asked for by default.
_MOST_DIFFERENCED = 256
# A parameter changes by this share of its tensor's root mean square, or of 0.1 if that is larger.
_STEP = 1e-2
# Directions whose information is below this share of the largest are not identified.
_IDENTIFIED = 1e-4
# The information's own error is below this share of the largest. Measured on tiny models: 0.7e-5 to
# 9.2e-5 for differences, by their asymmetry; 1.3e-7 to 3.1e-6 for outer products, against fp64.
_NOISE = {"information": 1e-4, "outer": 1e-5}


@dataclass(frozen=True, eq=False)
class StandardErrors:
    """The result of `PerturbedLM.standard_errors`, in fp64.

    errors: {parameter: its standard errors, shaped like it}; infinite for entries that the data do
        not identify.
    covariance: [P, P], the parameters flattened one after the other in the order of `errors`; a
        function g of them has variance grad g^T covariance grad g, if the data identify g: of
        directions that they do not it knows nothing, and gives them 0.
    bread: "information" or "outer". examples: how many rows there were.
    newton_step: the largest step, in standard errors, that Newton's method would take from here.
        Well below 1 at a solution; above, the errors are those of no solution.
    """

    errors: dict[str, Tensor]
    covariance: Tensor
    bread: str
    examples: int
    newton_step: float


def standard_errors(
    lm: WrappedModel,
    dataloader: Iterable[Mapping[str, Tensor]],
    parameters: Sequence[str] | None,
    bread: str,
    num_samples: int | None,
    seed: int | Tensor | None,
) -> StandardErrors:
    """Compute standard errors; `PerturbedLM.standard_errors` describes the arguments."""
    chosen = _chosen(lm, parameters)
    count = sum(value.numel() for value in chosen.values())
    if count > _MOST_PARAMETERS:
        sizes = {name: value.numel() for name, value in lm.transform.named_parameters()}
        raise ValueError(
            f"{count} parameters have a covariance of {count} x {count}, and at most "
            f"{_MOST_PARAMETERS} are supported; choose some with parameters=[...] of {sizes}"
        )
    estimator = lm.config.estimator
    if estimator in ("resample", "sumo", "mlmc"):  # which estimate iwae's gradient
        estimator = "iwae"
    bread = _bread(bread, estimator, count)
    _check_model(lm)
    if seed is None:
        seed = int(noise.drawn_seed())
    with lm.unsplit(), lm.overriding(estimator=estimator, plan="batched", chunk_size=None):
        batches = _numbered(dataloader, lm)
        equation = _Equation(lm, batches, chosen, num_samples, seed, bread)
        meat, total = equation.outer_products()
        information = meat if bread == "outer" else -equation.jacobian()
    information = _without(_rotations(lm, chosen), (information + information.T) / 2)
    inverse, unidentified = _inverse(information, _NOISE[bread])
    covariance = inverse if bread == "outer" else inverse @ meat @ inverse
    variances = covariance.diagonal().clamp_min(0)
    step = (inverse @ total).abs() / variances.sqrt()
    errors = variances.sqrt().masked_fill(unidentified, torch.inf)
    split = errors.split([value.numel() for value in chosen.values()])
    return StandardErrors(
        errors={n: e.view_as(v) for (n, v), e in zip(chosen.items(), split, strict=True)},
        covariance=covariance,
        bread=bread,
        examples=sum(len(batch["labels"]) for batch in batches),
        newton_step=float(step.nan_to_num().max()),
    )


@dataclass(frozen=True)
class _Equation:
    """The estimating equation over all the data, with its samples held."""

    lm: WrappedModel
    batches: list[dict[str, Tensor]]
    parameters: dict[str, nn.Parameter]
    num_samples: int | None
    seed: int | Tensor
    bread: str

    def total(self) -> Tensor:
        """Return sum psi [P]."""
        return torch.stack([self.psi(batch).sum(0) for batch in self.batches]).sum(0)

    def outer_products(self) -> tuple[Tensor, Tensor]:
        """Return sum psi psi^T [P, P], and sum psi [P]."""
        total = sum(value.numel() for value in self.parameters.values())
        device = self.lm.transform.embed_rms.device
        sums = torch.zeros(total + 1, total, dtype=torch.float64, device=device)
        for batch in self.batches:
            psi = self.psi(batch)
            sums[:-1].addmm_(psi.T, psi)
            sums[-1] += psi.sum(0)
        return sums[:-1], sums[-1]

    @torch.no_grad()
    def jacobian(self) -> Tensor:
        """Return d sum psi / d theta [P, P], by central differences."""
        columns = []
        for value in self.parameters.values():
            step = _STEP * max(float(value.square().mean().sqrt()), 0.1)
            flat = value.view(-1)
            for index, before in enumerate(flat.tolist()):
                ends = []
                try:
                    for end in (before - step, before + step):
                        flat[index] = end
                        ends.append((float(flat[index]), self.total()))
                finally:
                    flat[index] = before
                (low, left), (high, right) = ends
                columns.append((right - left) / (high - low))
        return torch.stack(columns, dim=1)

    def psi(self, batch: dict[str, Tensor]) -> Tensor:
        """Return each row's gradient of its own value [B, P], by one backward to the embeddings."""
        lm, parts = self.lm, understand(self.lm.base)
        leaves: list[Tensor] = []

        def catch(trunk: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
            if self.bread == "information":
                _reject_rounding(kwargs["inputs_embeds"])
            leaves.append(kwargs["inputs_embeds"].detach().requires_grad_())
            return args, {**kwargs, "inputs_embeds": leaves[-1]}

        hook = parts.trunk.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            with torch.enable_grad():
                sampling: dict[str, Any] = {"num_samples": self.num_samples, "seed": self.seed}
                loss = lm(**batch, **sampling, num_items_in_batch=1).loss
                # The samples' pass is the last one; a shared prefix is encoded before.
                (upstream,) = torch.autograd.grad(-loss, leaves[-1])
        finally:
            hook.remove()
        size = len(batch["labels"])
        embeddings, mask, keys = self._perturbed(batch, len(upstream) // size)
        upstream = upstream.unflatten(0, (-1, len(embeddings)))
        prefix = embeddings.shape[1] - upstream.shape[2]
        upstream = F.pad(upstream, (0, 0, prefix, 0))  # (M, B, T, D)
        transform = copy.deepcopy(lm.transform).requires_grad_()  # the model's may be frozen
        with torch.enable_grad():
            scale = context.latent_scale(
                transform, parts.trunk, embeddings, mask, keys["positions"], keys["rows"]
            )
        grads = ops.perturb_embed_per_sample_grad(
            upstream,
            embeddings,
            None,
            transform,
            self.seed,
            **keys,
            antithetic=lm.config.draws_pairs,
            strata=lm.config.strata(len(upstream.flatten(0, 1)) // size),
            latent_scale=scale,
        )
        of_rows = (grads[name].double().flatten(0, 1) for name in self.parameters)
        of_rows = (grad.unflatten(0, (-1, size)).sum(0).flatten(1) for grad in of_rows)
        return torch.cat(list(of_rows), dim=1)

    def _perturbed(
        self, batch: dict[str, Tensor], count: int
    ) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        """Return the embeddings that `count` samples perturb, their mask, and their noise's keys.

        Edited copies are rows of one sample.
        """
        lm, embed = self.lm, understand(self.lm.base).embed
        mask, rows = batch.get("attention_mask"), batch["rows"]
        perturbed, positions = perturbed_positions(
            mask, batch.get("position_ids"), batch.get("perturb_mask")
        )
        samples = torch.arange(count, device=rows.device)
        if isinstance(lm.perturbation, Hybrid):
            edited = lm.transform.edits(
                embed.weight,
                batch["input_ids"],
                noise.seed_tensor(self.seed, rows.device),
                samples,
                rows=rows,
                positions=positions,
                editable=perturbed,
                attention_mask=mask,
                position_ids=positions,
            )
            ids, mask, *numbers = Copies.of(edited, samples, rows, perturbed)
            return embed(ids), mask, dict(zip(Copies._fields[2:], numbers, strict=True))
        embeddings = batch.get("inputs_embeds")
        if embeddings is None:
            embeddings = embed(batch["input_ids"])
        keys = {"samples": samples, "rows": rows, "positions": positions, "perturb_mask": perturbed}
        return embeddings, mask, keys


def _rotations(lm: WrappedModel, chosen: Mapping[str, Tensor]) -> Tensor:
    """Return the directions [n, P] of the chosen parameters that only rotate gaussian latents."""
    transform, width = lm.transform, sum(value.numel() for value in chosen.values())
    rotated = set(transform.rotated) if transform.latent == "gaussian" else set()
    if not rotated or not rotated <= chosen.keys():
        return transform.embed_rms.new_zeros(0, width, dtype=torch.float64)
    # Row i of the parameters changes by row j, and row j by minus row i.
    first, second = torch.triu_indices(transform.latent_dim, transform.latent_dim, 1)
    pair, parts = torch.arange(len(first)), []
    for name, value in chosen.items():
        change = value.new_zeros(len(first), *value.shape, dtype=torch.float64)
        if name in rotated:
            rows = value.detach().double()
            change[pair, first], change[pair, second] = rows[second], -rows[first]
        parts.append(change.flatten(1))
    return torch.cat(parts, dim=1)


def _without(directions: Tensor, information: Tensor) -> Tensor:
    """Return the information [P, P] with that about some directions [n, P] removed."""
    if not len(directions):
        return information
    _, lengths, basis = torch.linalg.svd(directions, full_matrices=False)
    basis = basis[lengths > 1e-6 * lengths[0]]  # rotations may coincide: more rows than columns
    kept = torch.eye(len(information)).to(information) - basis.T @ basis
    return kept @ information @ kept


def _inverse(information: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Return the inverse on the identified directions, and which parameters [P] have others."""
    values, vectors = torch.linalg.eigh(information)
    identified = values > _IDENTIFIED * values[-1]
    lost = int((~identified).sum())
    if lost:
        warnings.warn(
            f"the information about {lost} of {len(values)} directions of the parameters is zero "
            "or negative: the errors of parameters that they mix are infinite. The fit is not at a "
            "maximum, there are fewer examples than parameters, or the parameters are not "
            "identified (gaussian latents: any rotation of U's rows is the same model)",
            stacklevel=4,
        )
    kept = vectors[:, identified] / values[identified]
    inverse = kept @ vectors[:, identified].T
    # Noise mixes a share (noise / value)^2 of a kept direction with those left out.
    mixed = (noise * values[-1] * kept).square().sum(1)
    return inverse, vectors[:, ~identified].square().sum(1) > mixed


def _chosen(lm: WrappedModel, names: Sequence[str] | None) -> dict[str, nn.Parameter]:
    known = dict(lm.transform.named_parameters())
    if not known:
        raise ValueError("edits have no parameters, and so no standard errors")
    if names is None:
        return known
    for name in names:
        if name not in known:
            hint = suggestion(name, known)
            raise ValueError(f"parameters must be of {list(known)}, got {name!r}{hint}")
    if not names or isinstance(names, str):
        raise ValueError(f"parameters must be a list of names of {list(known)}, got {names!r}")
    return {name: known[name] for name in names}


def _bread(bread: str, estimator: str | Mapping[str, float], count: int) -> str:
    if bread not in BREADS:
        raise ValueError(f"bread must be one of {BREADS}, got {bread!r}")
    likelihood = estimator in ("iwae", "jvi", "jvi_clip")
    if bread == "outer" and not likelihood:
        raise ValueError(
            f"bread='outer' takes the value for a log-likelihood, which {estimator!r} is not; "
            "use bread='information'"
        )
    if bread != "auto":
        return bread
    if count > _MOST_DIFFERENCED and not likelihood:
        raise ValueError(
            f"estimator={estimator!r} has no bread='outer', and bread='information' runs the data "
            f"{2 * count} times for {count} parameters: ask for it, or choose parameters=[...]"
        )
    return "information" if count <= _MOST_DIFFERENCED else "outer"


def _check_model(lm: WrappedModel) -> None:
    if lm.is_exact:
        raise ValueError("lm.exact() perturbs nothing, so its transform has no standard errors")
    if lm.config.deterministic:
        raise ValueError("deterministic=True has one sample, so its score has no randomness")
    if lm.config.proposal != "prior":
        raise ValueError(
            f"proposal={lm.config.proposal!r} moves the latents by the labels, and standard errors "
            "are of samples from the prior; use lm.overriding(proposal='prior')"
        )
    reject_dropout(lm.base, "would add its own noise")


def _reject_rounding(embeddings: Tensor) -> None:
    """Raise in half precision; called inside the forward, where Accelerate's autocast is on."""
    device, dtype = embeddings.device.type, embeddings.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if dtype in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"the differences of bread='information' drown in the rounding of {dtype}: give the "
            "base in fp32 (lm.float()), outside of torch.autocast (of Accelerate: "
            "accelerator.unwrap_model(lm, keep_fp32_wrapper=False)), or use bread='outer'"
        )


def _numbered(
    dataloader: Iterable[Mapping[str, Tensor]], lm: WrappedModel
) -> list[dict[str, Tensor]]:
    """Return the batches on the model's device, with row ids where they have none."""
    device, batches, start = lm.transform.embed_rms.device, [], 0
    for inputs in dataloader:
        batch = {name: value.to(device) for name, value in inputs.items()}
        if "labels" not in batch:
            raise ValueError(f"every batch needs labels, got a batch of {list(batch)}")
        size = len(batch["labels"])
        batch.setdefault("rows", torch.arange(start, start + size, device=device))
        start += size
        batches.append(batch)
    if not batches:
        raise ValueError("dataloader yielded no batch")
    return batches
