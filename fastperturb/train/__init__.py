"""`fastperturb train`: adapt a base model to text."""

from fastperturb.train.command import held_out_blocks, run
from fastperturb.train.options import EditOptions, LoraOptions, TrainOptions

__all__ = ["EditOptions", "LoraOptions", "TrainOptions", "held_out_blocks", "run"]
