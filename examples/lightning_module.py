"""Lightning: `python -m examples.lightning_module`.

The loss is over the tokens of all processes. Lightning's accumulate_grad_batches takes the mean of
micro-batches' means. That is the mean over all tokens only where each micro-batch has as many, as
these blocks do.
"""

from pathlib import Path

import lightning
import peft
import torch
import tyro
from torch import Tensor
from torch.utils.data import DataLoader

from examples import tiny
from fastperturb import PerturbConfig, PerturbedLM, noise, wrap


class PerturbModule(lightning.LightningModule):
    """Train lm. Lightning's checkpoints hold all of it, lm.save_pretrained what trained."""

    def __init__(self, lm: PerturbedLM, *, learning_rate: float = 1e-3, seed: int = 0) -> None:
        super().__init__()
        self.lm, self.learning_rate, self.seed = lm, learning_rate, seed

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        tokens = (batch["labels"][:, 1:] != -100).sum()
        # DDP takes the mean over processes, so what divides their losses is a mean as well.
        tokens = self.all_gather(tokens).float().mean()
        seed = noise.fold_in(self.seed, self.global_step)
        out = self.lm(**batch, seed=seed, num_items_in_batch=tokens)
        self.log_dict({"loss": out.loss, "ess": out.ess, "shift": out.shift}, prog_bar=True)
        return out.loss

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        score = self.lm.score(**batch, num_samples=32, seed=noise.fold_in(self.seed, -1))
        # Lightning weighs by batch_size: the mean is one over tokens.
        self.log("val_nll", score.nll.float(), batch_size=int(score.count), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        adapter = [value for value in self.lm.base.parameters() if value.requires_grad]
        rate, transform = self.learning_rate, self.lm.transform.parameters()
        return torch.optim.AdamW(
            [
                {"params": adapter, "lr": rate},
                {"params": transform, "lr": 5 * rate, "weight_decay": 0.0},
            ]
        )


def main(
    *,
    output_dir: Path = Path("runs/lightning"),
    model: str | None = None,
    text: Path | None = None,
    steps: int = 20,
    batch_size: int = 4,
    checkpoint: Path | None = None,
) -> lightning.Trainer:
    """Train up to step `steps`, from one of Lightning's checkpoints where it is given."""
    lightning.seed_everything(0)
    base, tokenizer = tiny.base_and_tokenizer(model)
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear"))
    module = PerturbModule(wrap(adapted, PerturbConfig(num_samples=4)))
    data = tiny.examples(tiny.text(text), tokenizer)
    held_out = max(1, len(data) // 10)
    trainer = lightning.Trainer(
        default_root_dir=output_dir,
        max_steps=steps,
        log_every_n_steps=1,
        gradient_clip_val=1.0,
        val_check_interval=steps,
        check_val_every_n_epoch=None,
    )
    trainer.fit(
        module,
        DataLoader(data[held_out:], batch_size=batch_size),
        DataLoader(data[:held_out], batch_size=batch_size),
        ckpt_path=checkpoint,
        weights_only=True,
    )
    if trainer.is_global_zero:
        module.lm.save_pretrained(output_dir / "model")
    return trainer


if __name__ == "__main__":
    tyro.cli(main)
