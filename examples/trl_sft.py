"""TRL's SFTTrainer on a perturbed model: `python -m examples.trl_sft`.

SFTTrainer prepares the data (chat templates, completion-only labels, truncation, packing);
PerturbTrainer, named before it, brings the loss, the noise, the optimizer, evaluation and
checkpoints. TRL's own losses, entropy and token accuracy need logits, and are not there.
"""

from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import trl
import tyro

from examples import tiny
from fastperturb import PerturbConfig, PerturbTrainer, wrap

# TRL's collator adds these to packed batches for kernels that cannot read position_ids.
FOR_KERNELS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


class PerturbSFTTrainer(PerturbTrainer, trl.SFTTrainer):
    """SFTTrainer for a PerturbedLM; the adapter is put on before wrapping, not by peft_config."""

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        return {name: value for name, value in inputs.items() if name not in FOR_KERNELS}


def main(
    *,
    output_dir: Path = Path("runs/trl_sft"),
    model: str | None = None,
    text: Path | None = None,
    steps: int = 20,
    packing: bool = False,
    learning_rate: float = 1e-3,
) -> PerturbSFTTrainer:
    """Train on the paragraphs of a text and return the trainer."""
    base, tokenizer = tiny.base_and_tokenizer(model)
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear"))
    paragraphs = [part for part in tiny.text(text).split("\n\n") if part.strip()]
    held_out = max(1, len(paragraphs) // 10)
    trainer = PerturbSFTTrainer(
        wrap(adapted, PerturbConfig(num_samples=4)),
        args=trl.SFTConfig(
            output_dir=str(output_dir),
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=learning_rate,
            max_length=64,
            packing=packing,
            eval_strategy="steps",
            eval_steps=steps,
            save_steps=steps,
            logging_steps=1,
            # TRL turns both on; here the device decides.
            bf16=torch.cuda.is_available(),
            activation_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=datasets.Dataset.from_dict({"text": paragraphs[held_out:]}),
        eval_dataset=datasets.Dataset.from_dict({"text": paragraphs[:held_out]}),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    tyro.cli(main)
