"""The wrapper: any supported causal LM, run on M perturbed copies of its prefix embeddings.

    embed -> perturb_embed -> trunk -> head op -> estimator -> loss

Everything happens inside one forward of one nn.Module, with one ordinary backward after it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from fastperturb import estimators, noise, ops
from fastperturb.config import PerturbConfig, check_draws
from fastperturb.engine import architectures, plans, sample_split, sharding, validate
from fastperturb.engine.architectures import CausalLM, understand
from fastperturb.engine.batch import (
    IGNORED,
    Batch,
    Copies,
    Draws,
    Live,
    label_count,
    log_sum_of,
    repeated,
    travelled,
    variance_over_samples,
)
from fastperturb.engine.generate import Decoder, generate
from fastperturb.engine.positions import documents_apart, moving_positions
from fastperturb.engine.shared_prefix import Prefix
from fastperturb.ops.combine import COMBINABLE
from fastperturb.transforms import Transform, make_transform

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from fastperturb.diagnostics.gradient_noise import GradientNoise
    from fastperturb.diagnostics.score import Score
    from fastperturb.diagnostics.standard_errors import StandardErrors

# A shift below this share of where it began is a collapse; how often a GPU's is looked at.
_COLLAPSED, _WATCHED_STEPS = 0.01, 100


@dataclass
class PerturbedOutput(ModelOutput):
    """What a perturbed forward yields; entry t of a [.., T-1] tensor is about label t + 1.

    loss: minus the sum of the estimator's value over the number of labelled tokens.
    log_marginal: log mean_m of the samples' probabilities, [B, T-1] (token marginal) or [B].
    log_probs: each sample's log-prob of each label, [M, B, T-1], 0 where there is no label.
    ess: effective samples, the mean over labelled outcomes of 1 / sum_m w[m]^2.
    shift: mean of |T(e) - e| / |e| over samples and perturbed positions.
    log_prob_variance: over samples, the mean of it over labelled outcomes.
    logits: log of the mean probability over samples, [B, T, V], on request.
    """

    loss: Tensor | None = None
    log_marginal: Tensor | None = None
    log_probs: Tensor | None = None
    ess: Tensor | None = None
    shift: Tensor | None = None
    log_prob_variance: Tensor | None = None
    logits: Tensor | None = None


def wrap(model: nn.Module, config: PerturbConfig) -> PerturbedLM:
    """Wrap a Hugging Face causal LM, plain or PEFT, with a learned perturbation."""
    return PerturbedLM(model, config)


class PerturbedLM(nn.Module):
    """A causal LM whose prefix embeddings are moved by a learned random transform.

    base: the model as given, its parameters and adapters untouched; config: the
    PerturbConfig; transform: the learned T(e, z), in fp32 beside the embedding.
    """

    # For Hugging Face's Trainer: the loss divides by num_items_in_batch itself, and that count
    # is of shifted labels. (Its plain class still fails, since it writes to model.config.)
    accepts_loss_kwargs = True
    loss_type = "ForCausalLM"
    decoder = Decoder

    def __init__(self, model: nn.Module, config: PerturbConfig) -> None:
        super().__init__()
        parts = understand(model)
        self.base = model
        self.config = config
        self.transform = self._make_transform(parts, config)
        self._exact = False
        self._temperature = 1.0
        self._steps, self._collapsed = 0, False
        self._planner = plans.Planner()
        self._split = sample_split.Split()
        self._report: plans.PlanReport | None = None
        self._draw_noise: float | None = None  # of resample, where measured

    def _make_transform(self, parts: CausalLM, config: PerturbConfig) -> Transform:
        if not isinstance(config, PerturbConfig):
            raise TypeError(f"config must be a PerturbConfig, got {type(config).__name__}")
        rms, embed_dim = embedding_rms(parts.embed)
        return make_transform(config, embed_dim, embed_rms=rms).to(rms.device)

    @contextlib.contextmanager
    def exact(self) -> Iterator[PerturbedLM]:
        """Within it the model is the base on exact prefixes: one sample, nothing moved."""
        before, self._exact = self._exact, True
        try:
            yield self
        finally:
            self._exact = before

    @contextlib.contextmanager
    def _at_temperature(self, temperature: float) -> Iterator[None]:
        """Within it every draw's probabilities are those of its logits / temperature."""
        before, self._temperature = self._temperature, temperature
        try:
            yield
        finally:
            self._temperature = before

    @property
    def has_one_draw(self) -> bool:
        """Whether all draws would be the same."""
        return self._exact or self.config.deterministic

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        perturb_mask: Tensor | None = None,
        num_samples: int | None = None,
        rows: Tensor | None = None,
        seed: int | Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        return_logits: bool = False,
    ) -> PerturbedOutput:
        """Run M perturbed copies; with labels [B, T], estimate the loss.

        input_ids [B, T] or inputs_embeds [B, T, D]; attention_mask [B, T] (1 = real token).
        position_ids: [B, T], beginning anew with each packed document; by default they count real
            tokens, as `generate` does, so that padding changes nothing on either side.
        perturb_mask: bool [B, T], which positions move; default every real token.
        num_samples: M for this call. rows: global example numbers [B], or [B, T] for packed
            documents, that key the noise; default 0..B-1.
        seed: keys the noise; default drawn from torch's generator.
        num_items_in_batch: the labelled tokens of the global batch, which divide the loss.
        """
        parts = understand(self.base).at_temperature(self._temperature)
        embeddings = self._embeddings(parts.embed, input_ids, inputs_embeds)
        validate.like(embeddings, "attention_mask", attention_mask, validate.MASKS)
        validate.like(embeddings, "position_ids", position_ids, (torch.int64,))
        validate.like(embeddings, "labels", labels, (torch.int64,))
        validate.like(embeddings, "perturb_mask", perturb_mask, (torch.bool,))
        if labels is not None:
            vocab = parts.head.weight.shape[0]
            if labels.device.type == "cpu":  # where looking at them costs no sync
                given = labels[labels != IGNORED]
                validate.range("labels", given, vocab, f"be {IGNORED} (no label) or ")
        # A chunk that runs again in the backward must meet what it met, whatever became of these.
        attention_mask, position_ids, labels, perturb_mask, rows, input_ids = (
            None if given is None else given.clone()
            for given in (attention_mask, position_ids, labels, perturb_mask, rows, input_ids)
        )
        marginal = self.config.marginal
        attention_mask = documents_apart(attention_mask, position_ids, rows, marginal)
        draws = self._draw(seed, rows, num_samples, embeddings)
        moving, positions = moving_positions(attention_mask, position_ids, perturb_mask)
        prefix = None
        if perturb_mask is not None and moving is not None and position_ids is None:
            prefix = self._prefix(parts, embeddings, attention_mask, moving, draws)
        batch = Batch(
            parts,
            embeddings,
            attention_mask,
            moving,
            positions,
            labels,
            draws,
            self._exact,
            return_logits,
            marginal,
            prefix,
            input_ids,
        )
        scored, live = self._samples(batch)
        found: dict[str, Tensor | None] = {}
        if labels is not None:
            found = self._estimate(batch, scored, live, num_items_in_batch)
        if scored.log_sum is not None:
            found["logits"] = scored.log_sum - math.log(draws.count)
        shift = batch.shift(scored.travelled)
        self._watch(shift)
        return PerturbedOutput(**found, shift=shift)

    def _watch(self, shift: Tensor) -> None:
        """Warn, once, when training has all but stopped the embeddings from moving."""
        if self._exact or not self.training or self._collapsed:
            return
        self._steps += 1
        if shift.device.type != "cpu" and self._steps % _WATCHED_STEPS:
            return  # to look at it costs a GPU a synchronisation
        self._collapsed = bool(0 < shift < _COLLAPSED * self.config.init_scale)
        if self._collapsed:
            warnings.warn(
                f"the perturbation has collapsed: embeddings move by {float(shift):.1e} of their "
                f"length, below {_COLLAPSED:.0%} of init_scale={self.config.init_scale}, which is "
                "exact-prefix training again; use more samples, an equation that is unbiased with "
                "few (quadratic, jvi_clip), or a floor (min_scale)",
                RuntimeWarning,
                stacklevel=4,
            )

    def split_samples(self, group: DeviceMesh | ProcessGroup) -> None:
        """From now on each of these processes runs its share of every call's samples.

        group: one dimension of a mesh, as mesh["mc"]. Its processes call with the same arguments,
        and all get what one process would: loss, log-probs and all else of all M samples. Their
        gradients are for averaging over processes, as DDP and FSDP2 do. `generate`,
        `gradient_noise` and `standard_errors` stay whole in every process.
        """
        self._split = sample_split.Split.over(group)

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """Within it this process runs all samples."""
        before, self._split = self._split, sample_split.Split()
        try:
            yield
        finally:
            self._split = before

    def plan_report(self) -> plans.PlanReport:
        """Which plan the last forward took, and why."""
        if self._report is None:
            raise RuntimeError("there is no plan to report before the first forward")
        return self._report

    def samples_at_once(self) -> int:
        """How many samples of a pass without gradient to run at a time: as many as in training."""
        config = self.config
        if config.chunk_size is not None:
            return config.chunk_size
        return self._planner.limited(1 if config.plan == "chunked" else config.num_samples)

    def step_down(self) -> bool:
        """After running out of memory: half as many samples at a time from now on.

        False where the plan is the config's own word, or takes one sample at a time already. The
        same step run again with the same seed meets the same noise.
        """
        config, last = self.config, self._report
        if last is None or config.plan == "batched" or config.chunk_size is not None:
            return False
        return self._planner.step_down(last)

    def _embeddings(
        self, embed: nn.Module, input_ids: Tensor | None, inputs_embeds: Tensor | None
    ) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"give either input_ids or inputs_embeds, got {given}")
        if input_ids is not None:
            validate.tensor("input_ids", input_ids, "[B, T]", (torch.int64, torch.int32))
            table: Any = embed.weight
            validate.range("input_ids", input_ids, table.shape[0])
            return embed(input_ids)
        assert inputs_embeds is not None
        floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        validate.tensor("inputs_embeds", inputs_embeds, "[B, T, D]", floats)
        if inputs_embeds.shape[-1] != self.transform.embed_dim:
            raise ValueError(
                f"inputs_embeds must be {self.transform.embed_dim} wide, as the model's "
                f"embeddings are, got {list(inputs_embeds.shape)}"
            )
        return inputs_embeds.clone()

    def _draw(
        self,
        seed: int | Tensor | None,
        rows: Tensor | None,
        num_samples: int | None,
        embeddings: Tensor,
    ) -> Draws:
        """The noise of a call, and how many samples the estimator takes of it."""
        equations = {"iwae": 1.0} if self.has_one_draw else self.config.equations
        if "jvi" in equations and self.training and torch.is_grad_enabled():
            raise ValueError(
                "estimator='jvi' is for evaluation: its weights can be negative and training "
                "with them diverged; use estimator='jvi_clip', whose weights are clipped"
            )
        device = embeddings.device
        if seed is None:
            drawn = torch.randint(2**63 - 1, (), dtype=torch.int64)
            seed = self._split.agreed(drawn.to(device, non_blocking=True))
        seed = noise.seed_tensor(seed, device).clone()  # its owner may count it on
        if rows is None:
            rows = torch.arange(len(embeddings), device=device)
        if self.has_one_draw:
            return Draws(seed, rows, 1, equations)
        wanted = self.config.num_samples if num_samples is None else num_samples
        for name in equations:
            check_draws(name, wanted, antithetic=self.config.antithetic)
        first = next(iter(equations))
        if first not in ("sumo", "mlmc"):
            return Draws(seed, rows, wanted, equations, draw_noise=self._draw_noise)
        telescope = estimators.Telescope(first, wanted)
        # One level for the whole step: every row and micro-batch agrees on it, and every rank
        # whose passes gather the shards of the others.
        one_row = torch.zeros(1, dtype=torch.int64, device=device)
        uniform = noise.auxiliary_uniforms(sharding.agreed(self, seed), 1, one_row)
        level = telescope.sample(uniform.reshape(()))
        return Draws(seed, rows, int(telescope.draws(level)), equations, telescope, level)

    def _prefix(
        self,
        parts: CausalLM,
        embeddings: Tensor,
        attention_mask: Tensor | None,
        moving: Tensor,
        draws: Draws,
    ) -> Prefix | None:
        """The leading positions that no sample moves, encoded; dropout would tie samples there."""
        # Where parameters are sharded, all processes must run the trunk equally often.
        if (
            draws.count == 1
            or architectures.dropout_sources(self.base)
            or sharding.is_sharded(self)
        ):
            return None
        return Prefix.of(parts.trunk, embeddings, attention_mask, moving)

    def _samples(self, batch: Batch) -> tuple[plans.Pass, Live | None]:
        """Run the draws by the configured plan: all M scored, and what resample runs again."""
        draws, config, split = batch.draws, self.config, self._split
        run = functools.partial(self._run, batch)
        samples = torch.arange(draws.count, device=batch.embeddings.device)
        by_default = "resample" in draws.equations and config.plan == "auto"
        resampling = torch.is_grad_enabled() and (by_default or config.plan == "resample")
        if self.has_one_draw or batch.labels is None or not resampling:
            self._report = report = self._choose(batch, run, samples[: split.most(draws.count)])
            size = None if report.plan == "batched" else report.chunk_size
            return split.run(run, samples, size), None
        sources = architectures.dropout_sources(self.base)
        if sources:
            raise ValueError(
                f"plan='resample' runs the model twice, and dropout would differ between: "
                f"{', '.join(sources[:3])}; set it to 0, or use another estimator and plan"
            )
        kept = draws.backward_samples(config)
        share = split.most(kept)
        size = min(config.chunk_size or self._planner.limited(share), split.most(draws.count))
        reason = f"{draws.count} samples scored without gradient, {kept} of them run again with it"
        if config.backward_samples is None and draws.draw_noise is not None:
            reason += ", which is the best number at the measured gradient noise"
        self._report = plans.PlanReport("resample", size, reason)
        with torch.no_grad():
            scored = split.run(run, samples, size)
        resampled = draws.resample(batch.outcomes(scored.log_probs), batch.outcome_mask(), config)
        live = split.run(run, resampled.drawn, size if size < share else None)
        return scored, Live(resampled, live)

    def _choose(self, batch: Batch, run: plans.Run, samples: Tensor) -> plans.PlanReport:
        config, count = self.config, len(samples)
        if config.plan == "batched":
            return plans.PlanReport("batched", count, "as configured")
        if config.plan == "chunked" or config.chunk_size is not None:
            size = min(config.chunk_size or 1, count)
            return plans.PlanReport("chunked", size, "as configured")
        kind = (
            *(batch.embeddings.shape, batch.embeddings.dtype, batch.return_logits),
            *(batch.labels is None, batch.prefix and batch.prefix.hidden.shape[1]),
            *(self.training, tuple(batch.draws.equations)),
            *(samples.device, torch.is_autocast_enabled(samples.device.type)),
            sum(value.requires_grad for value in self.parameters()),
            any(getattr(each, "gradient_checkpointing", False) for each in self.base.modules()),
        )
        return self._planner.choose(run, samples, kind, self, samples.device)

    def _run(self, batch: Batch, samples: Tensor) -> plans.Pass:
        """Some samples, numbered [m] or [m, B], through perturbation, trunk and head."""
        draws, parts = batch.draws, batch.parts
        copies = self._copies(batch, samples)
        hidden = copies.hidden_states(parts.trunk, batch.prefix)  # (m, B, T, D)
        log_probs = log_sum = None
        weight, options = parts.head.weight, parts.head_options
        if batch.labels is not None and set(draws.equations) != {"quadratic"}:
            target = batch.target().repeat(len(samples))
            log_probs = ops.linear_logprob(hidden.flatten(0, 2), weight, target, **options)
            # No view: FSDP2 hooks what a module returns.
            log_probs = log_probs.view(hidden.shape[:-1])[:, :, :-1].contiguous()
        if batch.return_logits:
            log_sum = log_sum_of(hidden, weight, options)
        kept = hidden if "quadratic" in draws.equations else None
        moved = copies.at_source(copies.embeddings.detach())
        return plans.Pass(travelled(moved, batch.embeddings), log_probs, kept, log_sum)

    def _copies(self, batch: Batch, samples: Tensor) -> Copies:
        moved, count = batch.embeddings[None], len(samples)
        if not batch.exact:
            moved = self._moved(
                batch.embeddings,
                batch.draws.seed,
                samples,
                rows=batch.draws.rows,
                positions=batch.positions,
                antithetic=self.config.antithetic,
                perturb_mask=batch.moving,
            )
        attention_mask = repeated(batch.attention_mask, count)
        return Copies(moved, attention_mask, repeated(batch.positions, count))

    def _moved(
        self,
        embeddings: Tensor,  # [B, T, D]
        seed: Tensor,
        samples: Tensor,
        *,
        rows: Tensor,
        positions: Tensor | None,
        antithetic: bool,
        perturb_mask: Tensor | None,
    ) -> Tensor:
        """The copies with these sample numbers [M, B, T, D]."""
        if self.config.deterministic:
            positions = torch.zeros(embeddings.shape[:2], dtype=torch.int64, device=rows.device)
            seed, samples, rows = map(torch.zeros_like, (seed, samples, rows))
        return ops.perturb_embed(
            embeddings,
            None,
            self.transform,
            seed,
            samples,
            rows=rows,
            positions=positions,
            antithetic=antithetic,
            perturb_mask=perturb_mask,
        )

    def _estimate(
        self,
        batch: Batch,
        scored: plans.Pass,
        live: Live | None,
        num_items_in_batch: int | Tensor | None,
    ) -> dict[str, Tensor | None]:
        """The loss, and what is known about the samples."""
        draws, marginal, mask = batch.draws, self.config.marginal, batch.mask()
        log_probs = scored.log_probs
        values = {}
        if scored.hidden is not None:
            M, size, length, _ = scored.hidden.shape
            values["quadratic"], each = ops.linear_quadratic(
                scored.hidden.flatten(1, 2),
                batch.parts.head.weight,
                batch.target(),
                **batch.parts.head_options,
                return_log_probs=True,
            )
            if log_probs is None:
                log_probs = each.detach().view(M, size, length)[:, :, :-1].contiguous()
        assert log_probs is not None
        combined = {
            name: ops.combine(log_probs, mask, name, marginal=marginal)
            for name in draws.equations
            if name in COMBINABLE
        }
        values |= {name: each.value for name, each in combined.items()}
        if live is not None:
            values = {
                name: live.resampled.estimate(batch.outcomes(live.found.log_probs))
                for name in draws.equations
            }
        elif "resample" in draws.equations or draws.telescope is not None:
            (name,) = draws.equations
            values[name] = draws.combine(
                batch.outcomes(scored.log_probs), batch.outcome_mask(), self.config
            )
        terms = [weight * values[name].sum() for name, weight in draws.equations.items()]
        total = torch.stack(terms).sum()
        combined["iwae"] = combined.get("iwae") or ops.combine(
            log_probs.detach(), mask, "iwae", marginal=marginal
        )
        labelled = batch.outcome_mask()
        return {
            "loss": -total.to(log_probs.dtype) / label_count(mask, num_items_in_batch),
            "log_marginal": combined["iwae"].log_marginal,
            "log_probs": log_probs,
            "log_prob_variance": variance_over_samples(batch.outcomes(log_probs), labelled),
            "ess": combined["iwae"].effective_samples.sum() / labelled.sum().clamp_min(1),
        }

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        mode: str = "sequence",
        num_samples: int | None = None,
        seed: int | Tensor | None = None,
        rows: Tensor | None = None,
        perturb_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Decode under the noise: token ids [B * num_return_sequences, L], prompts included.

        input_ids [B, T] and attention_mask [B, T], padded on the left.
        mode: "sequence", one draw for a whole sequence, decoded with a cache; "token", a fresh
            draw for the whole prefix at every step, which with do_sample=True and no temperature
            or truncation samples the token marginal exactly; "mixture", the mean of num_samples
            draws' probabilities at every step, with a cache.
        num_samples: M of mode="mixture", default the config's.
        seed, rows: key the noise as in `forward`; the choice of tokens takes torch's generator.
        perturb_mask: bool [B, T], which positions of the prompt move; generated ones always do.
        options: as transformers' `generate` takes them: max_new_tokens, do_sample, top_p,
            generation_config, logits_processor, stop_strings with tokenizer, streamer, ...
        """
        if self._exact:
            base: Any = self.base
            return base.generate(input_ids=input_ids, attention_mask=attention_mask, **options)
        return generate(
            self,
            input_ids,
            attention_mask,
            mode=mode,
            num_samples=num_samples,
            seed=seed,
            rows=rows,
            perturb_mask=perturb_mask,
            **options,
        )

    def score(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        perturb_mask: Tensor | None = None,
        *,
        num_samples: int = 64,
        chunk_size: int | None = None,
        rows: Tensor | None = None,
        seed: int | Tensor | None = None,
        temperature: float = 1.0,
    ) -> Score:
        """Marginal log-likelihood, its Monte-Carlo error, jackknife and M-curve; no gradient.

        Arguments are those of a call, but for
        labels: by default every token that follows a real token of its document.
        num_samples: M; `chunk_size` of them at a time (default: as many as a training step has),
            so that memory grows with M by some 30 bytes a token and draw, and no more.
        temperature: probabilities are each draw's softmax(logits / temperature).
        """
        from fastperturb.diagnostics.score import score

        inputs = {
            "input_ids": input_ids,
            "labels": labels,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "perturb_mask": perturb_mask,
        }
        draws = {"num_samples": num_samples, "rows": rows, "seed": seed}
        return score(self, inputs, draws, chunk_size, temperature)

    def gradient_noise(
        self,
        *,
        repeats: int = 8,
        estimators: Sequence[str | Mapping[str, float]] | None = None,
        parameters: str = "transform",
        seed: int | Tensor | None = None,
        **inputs: Any,
    ) -> GradientNoise:
        """Signal-to-noise of a batch's gradient, by estimator and at equal flops.

        From now on resample takes the K that is best by it, unless the config names one.

        inputs: a call's arguments, with labels. repeats: how many seeds.
        estimators: to compare with iwae and resample, which are always measured; default the
            config's and jvi_clip.
        parameters: the gradient is that of the "transform" or of all "trainable" ones.
        seed: of the seeds; default torch's generator, which is left as it was.
        """
        from fastperturb.diagnostics.gradient_noise import gradient_noise

        with self._whole():
            found = gradient_noise(
                self,
                inputs,
                repeats=repeats,
                compared=estimators,
                parameters=parameters,
                seed=seed,
            )
        draw_noise = torch.tensor(found.draw_noise, device=self.transform.embed_rms.device)
        self._draw_noise = float(self._split.agreed(draw_noise))
        return found

    def standard_errors(
        self,
        dataloader: Iterable[Mapping[str, Tensor]],
        *,
        parameters: Sequence[str] | None = None,
        bread: str = "auto",
        num_samples: int | None = None,
        seed: int | Tensor | None = None,
    ) -> StandardErrors:
        """Standard errors of the transform's parameters at a solution of the estimating equation.

        dataloader: batches of a call's arguments, with labels; all are kept. An example is a row;
            those without a number in "rows" are numbered through.
        parameters: names, as ["U"]; the others are held. Default: all of the transform's.
        bread: "information", the sandwich, which runs the data 2P times; "outer", the inverse of
            the scores' outer products, once; "auto", information for up to 256 parameters.
        num_samples: M of the equation; default the config's.
        """
        from fastperturb.diagnostics.standard_errors import standard_errors

        with self._whole():
            return standard_errors(
                self,
                dataloader,
                parameters=parameters,
                bread=bread,
                num_samples=num_samples,
                seed=seed,
            )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        save_base: bool | None = None,
        is_main_process: bool = True,
    ) -> None:
        """Write everything that trained into a folder that `fastperturb.load` reads.

        The transform, and the adapter by PEFT. save_base: whether to write a base without
        adapters too; None is whether any of its parameters requires a gradient.
        is_main_process: the other processes of a distributed run write nothing. Under FSDP2 all of
            them must call: the first one writes, and gathers the model in its CPU memory for it.
        """
        from fastperturb.checkpoint import save

        save.save_pretrained(
            self, save_directory, save_base=save_base, is_main_process=is_main_process
        )

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload what save_pretrained writes to the Hugging Face Hub, as one commit.

        options: private, token, save_base, commit_message, and those of `upload_folder`.
        """
        from fastperturb.checkpoint import save

        return save.push_to_hub(self, repo_id, **options)

    @contextlib.contextmanager
    def _configured(self, **changes: Any) -> Iterator[None]:
        """Within it these keys of the config are others."""
        before, self.config = self.config, dataclasses.replace(self.config, **changes)
        try:
            yield
        finally:
            self.config = before


@torch.no_grad()
def embedding_rms(embed: Any) -> tuple[Tensor, int]:
    """Root mean square over all that the embedding puts out, scaling included; and its width."""
    if embed.weight.is_meta:
        raise ValueError("model is on the meta device: load its weights before wrapping it")
    total, count, width = torch.zeros((), device=embed.weight.device), 0, 0
    for ids in torch.arange(embed.weight.shape[0], device=embed.weight.device).split(4096):
        chunk = embed(ids).float()
        total += chunk.square().sum()
        count += chunk.numel()
        width = chunk.shape[-1]
    return (total / count).sqrt(), width
