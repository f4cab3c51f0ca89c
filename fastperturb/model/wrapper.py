"""The wrapper that people call: any supported causal LM, run on M perturbed samples of its prefix.

Each method states its arguments and hands them on: `engine` runs calls and decoding, `diagnostics`
measures, `checkpoint` saves.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastperturb.checkpoint import save
from fastperturb.config import PerturbConfig
from fastperturb.diagnostics.gradient_noise import GradientNoise, gradient_noise
from fastperturb.diagnostics.score import Score, score
from fastperturb.diagnostics.standard_errors import StandardErrors, standard_errors
from fastperturb.engine import forward
from fastperturb.engine.continuous import Continuous
from fastperturb.engine.edits import EditConfig, TokenEdits
from fastperturb.engine.forward import PerturbedOutput
from fastperturb.engine.generate import generate
from fastperturb.engine.hybrid import Hybrid, HybridConfig
from fastperturb.engine.planner import PlanReport
from fastperturb.engine.protocol import Perturbation, WrappedModel
from fastperturb.engine.sample_split import SampleSplit

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


def wrap(
    model: nn.Module, config: PerturbConfig, *, edits: EditConfig | None = None
) -> PerturbedLM:
    """Wrap a Hugging Face causal LM, plain or PEFT, with a learned perturbation.

    edits: random edits of the tokens, which come first: the copies' embeddings are perturbed. Only
        its rate, kinds, neighbors, learn_rates and rate_limits count; `engine.hybrid` describes
        the two together.
    """
    if edits is not None:
        config = HybridConfig.of(config, edits)
    return PerturbedLM(model, config)


def edit(model: nn.Module, config: EditConfig) -> EditedLM:
    """Wrap a Hugging Face causal LM, plain or PEFT, with random edits of its prefix."""
    return EditedLM(model, config)


class PerturbedLM(WrappedModel):
    """A causal LM whose prefixes are perturbed at random, in training and in use.

    base: the model that was wrapped, its parameters and adapters untouched.
    config: a PerturbConfig, or the config of another kind of perturbation.
    perturbation: the kind of it; default `Continuous`, a transform of embeddings, or `Hybrid`.
    transform: the module with the perturbation's parameters; the learned T(e, z).
    """

    # For Hugging Face's Trainer: the loss divides by num_items_in_batch itself, and that count
    # is of shifted labels. (Its plain class fails all the same, since it writes to model.config.)
    accepts_loss_kwargs = True
    loss_type = "ForCausalLM"

    def __init__(self, model: nn.Module, config: Any, kind: Perturbation | None = None) -> None:
        default = Hybrid() if isinstance(config, HybridConfig) else Continuous()
        super().__init__(model, config, kind or default)

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
        """Run M perturbed samples; with labels [B, T], estimate the loss.

        input_ids [B, T] or inputs_embeds [B, T, D]; attention_mask [B, T] (1 = real token).
        labels: [B, T], -100 where there is none. The first real token after padding on the left
            should have none, since it would be predicted from padding.
        position_ids: [B, T], beginning anew with each packed document; by default they count real
            tokens, as `generate` does, so that padding changes nothing on either side.
        perturb_mask: bool [B, T], the positions to perturb; default every real token.
        num_samples: M for this call.
        rows: row ids that key the noise, [B], or [B, T] for packed documents; default 0..B-1.
        seed: keys the noise; default drawn from torch's generator.
        num_items_in_batch: number of labelled tokens in the global batch, which divides the loss.
        """
        if torch.compiler.is_compiling():
            torch._dynamo.skip_frame()  # in a graph an int would be a condition
        return forward.run(
            self,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            labels=labels,
            perturb_mask=perturb_mask,
            num_samples=num_samples,
            rows=rows,
            seed=seed,
            num_items_in_batch=num_items_in_batch,
            return_logits=return_logits,
        )

    @contextlib.contextmanager
    def exact(self) -> Iterator[PerturbedLM]:
        """Make the model the base on exact prefixes within the body: nothing is perturbed."""
        before, self.state.exact = self.state.exact, True
        try:
            yield self
        finally:
            self.state.exact = before

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
        mode: "sequence", one sample for a whole sequence, decoded with a cache; "token", a fresh
            sample for the whole prefix at every step, which with do_sample=True and no temperature
            or truncation samples the token marginal exactly; "mixture", the mean of num_samples
            samples' probabilities at every step, with a cache. Its samples are the same at all
            steps, so its text follows the sequence marginal at num_samples=1, tends to the token
            marginal as num_samples grows, and follows neither between.
        num_samples: M of mode="mixture", default the config's.
        seed, rows: key the noise as in `forward`; the choice of tokens takes torch's generator.
            Without a seed, greedy decoding takes 0 and sampling draws one.
        perturb_mask: bool [B, T], the prompt's positions to perturb; generated ones always are.
        options: as transformers' `generate` takes them: max_new_tokens, do_sample, top_p,
            generation_config, logits_processor, stop_strings with tokenizer, streamer, ...
        """
        if self.is_exact:
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
            so that memory grows with M by some 30 bytes a token and sample, and no more.
        temperature: probabilities are each sample's softmax(logits / temperature).
        """
        inputs = {
            "input_ids": input_ids,
            "labels": labels,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "perturb_mask": perturb_mask,
        }
        sampling = {"num_samples": num_samples, "rows": rows, "seed": seed}
        return score(self, inputs, sampling, chunk_size, temperature)

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

        The K that it finds best for `resample` is its `backward_samples`, for you to set:
        `lm.config = dataclasses.replace(lm.config, backward_samples=K)`.

        inputs: a call's arguments, with labels. repeats: how many seeds.
        estimators: to compare with iwae and resample, which are always measured; default the
            config's, and jvi_clip where it can use the samples. Each has samples as the config
            draws them for it: stratified, one group for iwae is two for jvi_clip.
        parameters: the gradient is that of the "transform" or of all "trainable" ones.
        seed: of the seeds; default torch's generator, which is left as it was.
        """
        return gradient_noise(
            self,
            inputs,
            repeats=repeats,
            compared=estimators,
            parameters=parameters,
            seed=seed,
        )

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
            batches without "rows" are numbered through.
        parameters: names, as ["U"]; the others are held. Default: all of the transform's.
        bread: "information", the sandwich, which runs the data 2P times; "outer", the inverse of
            the scores' outer products, once; "auto", information for up to 256 parameters.
        num_samples: M of the estimator; default the config's.
        """
        return standard_errors(
            self,
            dataloader,
            parameters=parameters,
            bread=bread,
            num_samples=num_samples,
            seed=seed,
        )

    def plan_report(self) -> PlanReport:
        """Return the plan that the last forward took, and why."""
        if self.state.report is None:
            raise RuntimeError("there is no plan to report before the first forward")
        return self.state.report

    def step_down(self) -> bool:
        """Halve the samples at a time after running out of memory; return False if impossible.

        It is impossible where the config itself fixes the plan, or at one sample at a time. The
        same step run again with the same seed sees the same noise.
        """
        last = self.state.report
        if last is None or self.config.plan == "batched" or self.config.chunk_size is not None:
            return False
        return self.state.planner.step_down(last)

    def split_samples(self, group: DeviceMesh | ProcessGroup) -> None:
        """Run in each of these processes, from now on, a share of every call's samples.

        group: one dimension of a mesh, as mesh["mc"]. Its processes call with the same arguments,
        and each gets the result of a single process: loss, log-probs and all else of all M samples.
        Their gradients are for averaging over processes, as DDP and FSDP2 do. `generate`,
        `gradient_noise` and `standard_errors` run all samples in every process.
        """
        self.state.split = SampleSplit.over(group)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        save_base: bool | None = None,
        is_main_process: bool = True,
    ) -> None:
        """Write everything that trained into a folder that `fastperturb.load` reads.

        The files are the transform's, and the adapter's by PEFT.

        save_base: whether to write a base without adapters too, by its own save_pretrained; None
            is whether any of its parameters requires a gradient.
        is_main_process: the other processes of a distributed run write nothing. Under FSDP2 all of
            them must call: the first one writes, and gathers the model in its CPU memory for it.
        """
        save.save_pretrained(
            self, save_directory, save_base=save_base, is_main_process=is_main_process
        )

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload the files of save_pretrained to the Hugging Face Hub, as one commit.

        options: private, token, save_base, commit_message, and those of `upload_folder`.
        """
        return save.push_to_hub(self, repo_id, **options)


class EditedLM(PerturbedLM):
    """A causal LM whose samples are random edits of the prefix; `engine.edits` describes them."""

    def __init__(self, model: nn.Module, config: EditConfig) -> None:
        super().__init__(model, config, TokenEdits())
