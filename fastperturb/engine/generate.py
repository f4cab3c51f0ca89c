"""Decoding under the noise, inside the model's own `generate`.

    sequence   one sample for the whole sequence, z advancing with the position: text of the
               sequence marginal E_z prod_t pi(y_t | T(x_<t, z))
    token      a fresh sample for the whole prefix at every step: text of the token marginal
               prod_t E_z pi(y_t | T(x_<t, z))
    mixture    M samples side by side, held over all steps; the next token comes from the mean of
               their probabilities: text of E_z1..zM prod_t mean_m pi(y_t | T(x_<t, z_m)), which is
               the sequence marginal at M = 1, tends to the token marginal, and between is neither

transformers prepares what it always does (generation config, logits processors, stopping
criteria, cache) and then runs the loop below, which differs from its own in where logits come
from. Of the S sequences returned for a row, number s takes sample s (sequence),
sample k S + s at step k (token), or samples s M .. s M + M - 1 (mixture).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache, StoppingCriteriaList, StopStringCriteria
from transformers.generation import GenerationMode

from fastperturb import noise
from fastperturb.config import suggestion
from fastperturb.engine import validate
from fastperturb.engine.protocol import WrappedModel
from fastperturb.engine.sequences import Encoded, Sequences

MODES = ("sequence", "token", "mixture")

# Greedy decoding without a seed, as without noise, gives the same text at every call.
_GREEDY_SEED = 0

# Arguments of transformers' generate that are not supported, and why.
_ARGUMENTS = {
    "inputs": "give the prompt as input_ids",
    "inputs_embeds": "give the prompt as input_ids",
    "position_ids": "positions count the real tokens of attention_mask",
    "past_key_values": "give the whole prefix, which is encoded under the noise of this call",
    "assistant_model": "its candidates would come without the noise",
    "custom_generate": "mode= chooses the decoding loop",
    "synced_gpus": "every rank must hold the whole model",
}
# Settings of the generation config that are not supported: the value that turns each off, and why.
_SETTINGS = {
    "guidance_scale": (1, "its second pass would come without the noise"),
    "return_dict_in_generate": (False, "it returns token ids"),
    "prefill_chunk_size": (None, "the prompt is encoded in one piece"),
}


def generate(
    lm: WrappedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    *,
    mode: str,
    num_samples: int | None,
    seed: int | Tensor | None,
    rows: Tensor | None,
    perturb_mask: Tensor | None,
    streamer: Any = None,
    **options: Any,
) -> Tensor:
    """`PerturbedLM.generate` outside of `exact()`; its arguments are documented there."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}{suggestion(str(mode), MODES)}")
    for name, why in _ARGUMENTS.items():
        if options.get(name) is not None:
            raise ValueError(f"{name} is not supported by generate under noise: {why}")
    base: Any = lm.base
    validate.tensor("input_ids", input_ids, "[B, T]", (torch.int64,))
    validate.range("input_ids", input_ids, base.get_input_embeddings().weight.shape[0])
    validate.like(input_ids, "attention_mask", attention_mask, validate.MASKS)
    validate.like(input_ids, "perturb_mask", perturb_mask, (torch.bool,))
    decoder = Decoder(
        lm,
        samples=_sample_count(lm, mode, num_samples),
        fresh_samples=mode == "token",
        seed=None if seed is None else noise.seed_tensor(seed, input_ids.device),
        rows=_rows(rows, input_ids),
        perturb_mask=perturb_mask,
        streamer=streamer,
    )
    return base.generate(
        input_ids=input_ids,
        attention_mask=None if attention_mask is None else attention_mask.long(),
        custom_generate=decoder,
        **_with_stop_strings(base, options),
    )


@dataclass(frozen=True)
class Decoder:
    """The decoding loop, as the `custom_generate` callable that transformers runs."""

    lm: WrappedModel
    samples: int  # M
    fresh_samples: bool  # each step has samples of its own
    seed: Tensor | None  # None: drawn where tokens are sampled, fixed where they are not
    rows: Tensor  # [B]
    perturb_mask: Tensor | None  # [B, T]
    streamer: Any

    # transformers withholds an argument that its own loop does not name, so the mask and the cache
    # are taken from **model_kwargs.
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,  # [N, T], a row's S sequences side by side
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor:
        _check_settings(generation_config)
        per_row = len(input_ids) // len(self.rows)
        sequences = self._prompt(input_ids, model_kwargs.get("attention_mask"), per_row)
        seed = self._seed(generation_config, input_ids.device)
        keeps_prefix = self.lm.perturbation.keeps_prefix and not self.fresh_samples
        cached = model_kwargs["use_cache"] and keeps_prefix
        encoded = Encoded(model_kwargs["past_key_values"]) if cached else None
        if self.samples > 1 and encoded and isinstance(encoded.cache, StaticCache):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} has no room for "
                f"the {self.samples} streams of mode='mixture'; leave it None"
            )
        pad = _padding(generation_config, stopping_criteria)
        unfinished = torch.ones_like(sequences.rows, dtype=torch.bool)
        self._stream(input_ids)
        while unfinished.any():
            if encoded is not None:
                logits = self._next_logits(model, seed, sequences, encoded)
            else:  # a finished sequence gets only padding, so it is not encoded
                live = unfinished | (pad is None)
                live_logits = self._next_logits(model, seed, sequences.select(live))
                logits = live_logits.new_zeros(len(live), live_logits.shape[-1])
                logits[live] = live_logits
            scores = logits_processor(sequences.ids, logits)
            if generation_config.do_sample:
                tokens = torch.multinomial(scores.softmax(-1), 1)[:, 0]
            else:
                tokens = scores.argmax(-1)
            if pad is not None:
                tokens = tokens.where(unfinished, pad)
            self._stream(tokens)
            sequences = sequences.append(tokens)
            if self.fresh_samples:
                sequences = sequences._replace(samples=sequences.samples + per_row)
            unfinished = unfinished & ~stopping_criteria(sequences.ids, None)
        if self.streamer is not None:
            self.streamer.end()
        return sequences.ids

    def _seed(self, generation_config: Any, device: torch.device) -> Tensor:
        if self.seed is not None:
            return self.seed
        drawn = noise.drawn_seed() if generation_config.do_sample else _GREEDY_SEED
        return noise.seed_tensor(drawn, device)

    def _prompt(self, ids: Tensor, mask: Tensor | None, per_row: int) -> Sequences:
        mask = torch.ones_like(ids) if mask is None else mask
        if (mask[:, -1] == 0).any() or (mask.diff(dim=1) < 0).any():
            raise ValueError(
                "attention_mask must pad on the left, so that every row ends in its last real "
                "token; set the tokenizer's padding_side='left'"
            )
        perturbed = mask.bool()
        if self.perturb_mask is not None:
            perturbed = perturbed & self.perturb_mask.repeat_interleave(per_row, 0)
        numbers = torch.arange(per_row * self.samples, device=ids.device)
        return Sequences(
            ids,
            mask,
            perturbed,
            rows=self.rows.repeat_interleave(per_row),
            samples=numbers.view(per_row, self.samples).repeat(len(self.rows), 1),
        )

    def _next_logits(
        self, model: Any, seed: Tensor, sequences: Sequences, encoded: Encoded | None = None
    ) -> Tensor:
        """Return the model's logits [N, V] if M = 1, else the logs of the mean probabilities."""
        logits = self.lm.perturbation.next_logits(self.lm, model, sequences, seed, encoded)
        logits = logits.float()
        if self.samples == 1:
            return logits
        log_probs = logits.log_softmax(-1).unflatten(0, (self.samples, -1))
        return log_probs.logsumexp(0) - math.log(self.samples)

    def _stream(self, tokens: Tensor) -> None:
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())


def _sample_count(lm: WrappedModel, mode: str, num_samples: int | None) -> int:
    """Return M, which is 1 in all modes but the mixture."""
    if mode != "mixture":
        if num_samples is not None:
            raise ValueError(
                f"num_samples is for mode='mixture', and mode={mode!r} takes one sample; "
                "leave it None"
            )
        return 1
    count = lm.config.num_samples if num_samples is None else num_samples
    lm.config.strata_of_mean(count)  # raises for a number that does not split into groups
    return count


def _rows(rows: Tensor | None, input_ids: Tensor) -> Tensor:
    batch, device = len(input_ids), input_ids.device
    if rows is None:
        return torch.arange(batch, device=device)
    validate.tensor("rows", rows, "[B]", (torch.int64,))
    if len(rows) != batch or rows.device != device:
        raise ValueError(
            f"rows must be [B] = [{batch}] on {device}, got {list(rows.shape)} on {rows.device}"
        )
    return rows


def _with_stop_strings(base: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options with their stop strings as a stopping criterion.

    transformers drops the tokenizer that it needs for them when the loop is not its own.
    """
    tokenizer = options.pop("tokenizer", None)
    configs = (options.get("generation_config"), base.generation_config)
    settings = (
        options.get("stop_strings"),
        *(getattr(config, "stop_strings", None) for config in configs),
    )
    strings = next((value for value in settings if value is not None), None)
    if strings is None:
        return options
    if tokenizer is None:
        raise ValueError("stop_strings need tokenizer=, the tokenizer of the model")
    criteria = StoppingCriteriaList(options.get("stopping_criteria") or [])
    criteria.append(StopStringCriteria(tokenizer, strings))
    return {**options, "stop_strings": None, "stopping_criteria": criteria}


def _check_settings(config: Any) -> None:
    strategy = config.get_generation_mode()
    if strategy not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"generate under noise is greedy or samples, and the generation config asks for "
            f"{strategy.value}, which reorders sequences among the rows that key the noise; "
            "use num_beams=1 and no assistant"
        )
    for name, (off, why) in _SETTINGS.items():
        value = getattr(config, name, None)
        if value is not None and value != off:
            raise ValueError(f"{name}={value!r} is not supported by generate under noise: {why}")


def _padding(config: Any, criteria: Any) -> int | None:
    """Return the token that fills finished sequences, chosen as transformers does."""
    if not any(hasattr(criterion, "eos_token_id") for criterion in criteria):
        return None
    if config.pad_token_id is not None:
        return config.pad_token_id
    ends = config.eos_token_id
    return ends if isinstance(ends, int) else ends[0]
