"""A training loop of one's own, on one device or many: `python -m examples.plain_accelerate`.

What a loop must get right: the loss is over the tokens of the global batch, the noise is keyed by
step and example, the transform has a learning rate of its own, and a run that is started again
goes on from its checkpoint.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import peft
import torch
import tyro
from torch.utils.data import DataLoader

import fastperturb
from examples import tiny
from fastperturb import PerturbConfig, noise


def main(
    *,
    output_dir: Path = Path("runs/plain_accelerate"),
    model: str | None = None,
    text: Path | None = None,
    steps: int = 20,
    batch_size: int = 2,
    accumulate: int = 2,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> list[float]:
    """Train up to step `steps` and return the losses of the steps taken by this call."""
    accelerator = accelerate.Accelerator()
    base, tokenizer = tiny.base_and_tokenizer(model)
    torch.manual_seed(seed)
    done, state = 0, output_dir / "training_state.pt"
    if state.exists():
        lm = fastperturb.load(base, output_dir, is_trainable=True).train()
    else:
        adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear"))
        lm = fastperturb.wrap(adapted, PerturbConfig(num_samples=4))
    adapter = [value for value in lm.base.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": adapter, "lr": learning_rate},
            {"params": lm.transform.parameters(), "lr": 5 * learning_rate, "weight_decay": 0.0},
        ]
    )
    if state.exists():
        saved = torch.load(state, weights_only=True)
        done = saved["step"]
        optimizer.load_state_dict(saved["optimizer"])
    data = tiny.examples(tiny.text(text), tokenizer)
    loader = DataLoader(data, batch_size=batch_size, drop_last=True)
    trained, optimizer, loader = accelerator.prepare(lm, optimizer, loader)

    batches, losses = endless(loader, skip=done * accumulate), []
    for step in range(done, steps):
        parts = [next(batches) for _ in range(accumulate)]
        tokens = sum((part["labels"][:, 1:] != -100).sum() for part in parts)
        tokens = accelerator.reduce(tokens)  # of the global batch
        total = torch.zeros((), device=accelerator.device)
        for part in parts:
            more_to_come = part is not parts[-1]
            with accelerator.no_sync(trained) if more_to_come else contextlib.nullcontext():
                seed_of_step = noise.fold_in(seed, step)
                out = trained(**part, seed=seed_of_step, num_items_in_batch=tokens)
                # DDP takes the mean over processes of what is to be a sum.
                accelerator.backward(accelerator.num_processes * out.loss)
            total += out.loss.detach()
        accelerator.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(total).item())
        accelerator.print(f"step {step + 1}: loss {losses[-1]:.4f}, ess {out.ess:.2f}")

    lm.save_pretrained(output_dir, is_main_process=accelerator.is_main_process)
    accelerator.save({"step": steps, "optimizer": optimizer.state_dict()}, state)
    return losses


def endless(loader: Any, *, skip: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield micro-batches, epoch after epoch, after the first `skip` of them."""
    yield from accelerate.skip_first_batches(loader, skip % len(loader))
    while True:
        yield from loader


if __name__ == "__main__":
    tyro.cli(main)
