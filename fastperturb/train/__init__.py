"""`fastperturb train`: adapt a base model to text."""

from fastperturb.train.command import held_out_blocks, run
from fastperturb.train.options import LoraOptions, TrainOptions

__all__ = ["LoraOptions", "TrainOptions", "held_out_blocks", "run"]
