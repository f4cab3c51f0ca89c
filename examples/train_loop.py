"""Wrap a model and train it in plain torch: `python -m examples.train_loop`."""

from pathlib import Path

import torch
import tyro
from torch.utils.data import DataLoader

from examples import tiny
from fastperturb import PerturbConfig, noise, wrap


def main(
    *,
    output_dir: Path = Path("runs/train_loop"),
    model: str | None = None,
    text: Path | None = None,
    steps: int = 200,
    batch_size: int = 8,
    learning_rate: float = 3e-3,
) -> list[float]:
    """Train the base and the transform together, save both, and return every step's loss."""
    base, tokenizer = tiny.base_and_tokenizer(model)
    torch.manual_seed(0)
    lm = wrap(base, PerturbConfig(transform="diagonal", num_samples=8)).train()
    groups = [
        {"params": lm.base.parameters()},
        {"params": lm.transform.parameters(), "lr": 5 * learning_rate, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate)
    data = tiny.examples(tiny.text(text), tokenizer)
    loader, losses = DataLoader(data, batch_size=batch_size, shuffle=True), []
    while len(losses) < steps:
        for batch in loader:
            # A seed for each step makes a run repeatable; without one, torch's generator draws it.
            out = lm(**batch, seed=noise.fold_in(0, len(losses)))
            out.loss.backward()  # through the base and the transform, for all samples at once
            for part in (lm.base, lm.transform):  # whose gradients differ in scale
                torch.nn.utils.clip_grad_norm_(part.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(out.loss.item())
            if len(losses) % 20 == 0:
                print(f"step {len(losses)}: loss {losses[-1]:.3f}, shift {out.shift:.3f}")
            if len(losses) == steps:
                break
    lm.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    print(f"saved to {output_dir}: give it as --model to score.py and generate.py")
    return losses


if __name__ == "__main__":
    tyro.cli(main)
