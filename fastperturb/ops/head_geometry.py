"""The sizes of a head's blocks: how many rows, vocabulary entries and bytes, on one device.

On a CPU a block stays in the last level of cache, so that both matrix products and the row pass
between them find it there. On a GPU

* the second product, with a result of [rows, D], has enough tiles for five waves of the
  multiprocessors or more: the last wave is part empty;
* its sum [rows, D], read and written once a block, costs little beside a block that is wide, and
  rows of up to 16,384 entries stay in the registers of one program;
* rows start at multiples of 128 bytes and matrix sides are multiples of 64, whatever the size of
  the vocabulary, so that cuBLAS and the row passes move 16 bytes at a time.

None of the GPU's numbers has been measured yet.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

_MIB = 2**20
_TILE = 128 * 256  # of the result of a 16-bit product on a tensor core
_WAVES = 5


@dataclass(frozen=True)
class Geometry:
    """The sizes of blocks on one device, for hidden states of one width."""

    block_bytes: int  # of a block's products, in fp32
    most_rows: int  # of a block
    most_entries: int  # of a block whose rows stay in registers; held blocks are read in tiles
    held_bytes: int  # of the products that the quadratic estimator holds: all M samples and entries
    gathered_rows: int  # most rows whose gradients of logits are kept for one product; 0: no such
    padding: int  # blocks are padded to multiples of so many entries
    narrow: bool  # products take 16-bit inputs as they are

    @classmethod
    def of(cls, device: torch.device, dim: int) -> Geometry:
        if device.type == "cpu":
            return CPU
        return cls.of_gpu(*_processors_and_bytes(device), dim)

    @classmethod
    def of_gpu(cls, processors: int, memory: int, dim: int) -> Geometry:
        rows = _WAVES * processors * _TILE // max(1, dim)  # a part has at least half its most rows
        return cls(
            block_bytes=_clamp(memory // 200, 128 * _MIB, 512 * _MIB),
            most_rows=_clamp(2 * rows // 128 * 128, 12288, 24576),
            most_entries=16384,
            held_bytes=_clamp(memory // 48, 384 * _MIB, 2048 * _MIB),
            gathered_rows=65536,
            padding=64,
            narrow=True,
        )

    def row_parts(self, rows: int) -> list[slice]:
        return even_parts(rows, self.most_rows, multiple=16)

    def token_parts(self, samples: int, tokens: int) -> list[slice]:
        """Cut the tokens into parts whose rows, all samples of each, make a block."""
        return even_parts(tokens, self.most_rows // samples, multiple=1)

    def held_parts(self, samples: int, tokens: int, vocab: int) -> list[slice]:
        """Cut the tokens into parts whose logits can be held over the whole vocabulary."""
        return even_parts(tokens, self.held_bytes // (4 * vocab * samples), multiple=1)

    def groups(self, samples: int, tokens: int) -> list[list[slice]]:
        """Cut the tokens into groups, and each of those into parts.

        The rows of a group, all samples of each token, go through the products of the gradients
        together. Those of a part make a block of fp32 products.
        """
        groups = []
        for group in even_parts(tokens, self.gathered_rows // samples, multiple=1):
            size = group.stop - group.start
            most_rows = self.block_bytes // (4 * self.gathered_entries(samples * size))
            parts = even_parts(size, most_rows // samples, multiple=1)
            groups.append([slice(group.start + p.start, group.start + p.stop) for p in parts])
        return groups

    def gathered_entries(self, rows: int) -> int:
        """Return the width of a block of which 16 bits are kept for so many rows."""
        return min(self.most_entries, self._padded_down(self.block_bytes // max(1, rows)))

    def entries(self, rows: int) -> int:
        """Return the width of a block whose products for so many rows keep to the budget."""
        return min(self.most_entries, self.held_entries(rows))

    def held_entries(self, rows: int) -> int:
        return self._padded_down(self.block_bytes // (4 * max(1, rows)))

    def _padded_down(self, entries: int) -> int:
        return max(self.padding, entries // self.padding * self.padding)

    def padded(self, entries: int) -> int:
        return -(-entries // self.padding) * self.padding


CPU = Geometry(
    block_bytes=2 * _MIB,
    most_rows=1024,
    most_entries=2**62,
    held_bytes=96 * _MIB,
    gathered_rows=0,
    padding=1,
    narrow=False,
)


def even_parts(count: int, most: int, *, multiple: int) -> list[slice]:
    """Cut [0, count) into even parts of at most `most`, or of one `multiple` if that is more."""
    number = max(1, -(-count // max(1, most)))
    step = max(1, -(-count // number))
    step = -(-step // multiple) * multiple
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


@functools.cache
def _processors_and_bytes(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.total_memory


def _clamp(value: int, least: int, most: int) -> int:
    return max(least, min(value, most))
