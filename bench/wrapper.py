"""A training step of the wrapper, by plan, against naive torch.

A GPT-2-like model (frozen, with LoRA), embeddings perturbed by lowrank, the iwae loss:

    naive         M copies through the model's own forward at once, all logits, autograd
    loop          the same, a sample at a time
    checkpointed  the loop, each sample's log-probs under torch.utils.checkpoint
    batched, chunked, resample   our plans; chunked two samples at a time, resample sends one back
    one_sample    batched with a single sample, for its memory
    trunk         what batched spends outside of our ops: the trunk forward and backward, and the
                  head's two GEMMs as torch.mm does them
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import peft
import torch
import transformers
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.harness import Row, Variant, measure
from fastperturb import PerturbConfig, wrap


@dataclass(frozen=True)
class Case:
    """One model and batch: B sequences of T tokens, M samples."""

    layers: int
    D: int
    V: int
    M: int
    B: int
    T: int
    dtype: str


CPU_CASES = (Case(4, 256, 50257, 8, 2, 128, "float32"),)
GPU_CASES = (Case(16, 2048, 128256, 16, 1, 1024, "bfloat16"),)


def rows(device: torch.device, *, repeats: int) -> Iterator[list[Row]]:
    for case in GPU_CASES if device.type == "cuda" else CPU_CASES:
        parameters = 12 * case.layers * case.D**2 + case.V * case.D
        least = parameters * getattr(torch, case.dtype).itemsize
        yield measure(
            "step",
            variants(case, device),
            x=asdict(case),
            least_bytes={"full": least},
            device=device,
            repeats=repeats,
        )


def model_of(case: Case, device: torch.device) -> Any:
    """GPT-2's architecture on a CPU, Llama's (1B-class) on a GPU; frozen, with LoRA."""
    torch.manual_seed(0)
    if device.type == "cuda":
        config = transformers.LlamaConfig(
            vocab_size=case.V,
            hidden_size=case.D,
            intermediate_size=4 * case.D,
            num_hidden_layers=case.layers,
            num_attention_heads=case.D // 64,
            num_key_value_heads=8,
        )
        with device:  # a billion random numbers take a CPU a while
            model: Any = transformers.LlamaForCausalLM(config)
        targets = ["q_proj", "v_proj"]
    else:
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=case.V,
                n_embd=case.D,
                n_layer=case.layers,
                n_head=4,
                n_positions=case.T,
                attn_pdrop=0.0,
                embd_pdrop=0.0,
                resid_pdrop=0.0,
            )
        )
        targets = ["c_attn"]
    model = model.to(device, getattr(torch, case.dtype)).requires_grad_(False)
    is_conv = device.type != "cuda"
    return peft.get_peft_model(
        model, peft.LoraConfig(r=8, target_modules=targets, fan_in_fan_out=is_conv)
    )


def variants(case: Case, device: torch.device) -> list[Variant]:
    base = model_of(case, device)
    ids = torch.randint(case.V, (case.B, case.T), device=device)

    def step(plan: str, samples: int = case.M, **options: Any) -> Callable[[], Any]:
        lm = wrap(base, PerturbConfig(num_samples=samples, plan=plan, **options))

        def run() -> None:
            lm.zero_grad()
            lm(input_ids=ids, labels=ids, seed=5).loss.backward()

        return run

    plain = wrap(base, PerturbConfig(num_samples=case.M))
    runs = {
        "batched": step("batched"),
        "chunked": step("chunked", chunk_size=2),
        "resample": step("resample", backward_samples=1),
        "naive": functools.partial(_naive, plain, ids, case.M),
        "loop": functools.partial(_loop, plain, ids, case.M),
        "checkpointed": functools.partial(_loop, plain, ids, case.M, checkpointed=True),
        "trunk": functools.partial(_floor, plain, ids, case.M),
    }
    return [Variant(name, "full", run, opaque=True) for name, run in runs.items()] + [
        Variant("one_sample", "single", step("batched", samples=1), opaque=True)
    ]


def _log_probs(lm: Any, ids: Tensor, count: int) -> Tensor:
    """The log-probs [m, B, T-1] of `count` samples as a user would write them."""
    e = lm.base.get_input_embeddings()(ids)
    z = torch.randn(count, *ids.shape, lm.transform.latent_dim, device=ids.device)
    perturbed = lm.transform(e, z).to(e.dtype)
    logits = lm.base(inputs_embeds=perturbed.flatten(0, 1)).logits[:, :-1]
    target = ids[:, 1:].repeat(count, 1)[..., None]
    log_probs = logits.float().log_softmax(-1).gather(2, target)[..., 0]
    return log_probs.unflatten(0, (count, -1))


def _naive(lm: Any, ids: Tensor, M: int) -> None:
    lm.zero_grad()
    (-_log_probs(lm, ids, M).logsumexp(0).mean()).backward()


def _loop(lm: Any, ids: Tensor, M: int, *, checkpointed: bool = False) -> None:
    lm.zero_grad()
    sample = functools.partial(_log_probs, lm, ids, 1)
    run = functools.partial(checkpoint, sample, use_reentrant=False) if checkpointed else sample
    log_probs = torch.cat([run() for _ in range(M)])
    (-log_probs.logsumexp(0).mean()).backward()


def _floor(lm: Any, ids: Tensor, M: int) -> None:
    lm.zero_grad()
    base = lm.base.get_base_model()
    e = base.get_input_embeddings()(ids).repeat(M, 1, 1).requires_grad_()
    hidden = base.base_model(inputs_embeds=e).last_hidden_state
    weight = base.get_output_embeddings().weight
    rows = hidden.detach().flatten(0, 1)
    grad_hidden = torch.mm(torch.mm(rows, weight.T), weight)
    hidden.backward(grad_hidden.view_as(hidden))
