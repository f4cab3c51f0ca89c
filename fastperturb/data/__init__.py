"""Texts: reading, tokenising, packing and ordering them."""

from fastperturb.data.blocks import evaluation_blocks, training_data
from fastperturb.data.options import DataOptions
from fastperturb.data.order import TrainingData
from fastperturb.data.packing import Block, collate

__all__ = [
    "Block",
    "DataOptions",
    "TrainingData",
    "collate",
    "evaluation_blocks",
    "training_data",
]
