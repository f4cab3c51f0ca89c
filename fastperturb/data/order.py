"""The order in which a run sees its blocks: shuffled anew each epoch, and resumed exactly.

Every random choice is a function of the seed, the epoch and the number of blocks drawn before. So
there is no generator to save, and all processes see the same order.
"""

from __future__ import annotations

import abc
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastperturb.data.documents import DocumentTokenizer
from fastperturb.data.packing import Block, Layout, PackedDocuments, Span, Tokens
from fastperturb.data.sources import Source, no_text_error

Identity = Mapping[str, int | str]


class TrainingData(abc.ABC):
    """The blocks of a run, epoch after epoch.

    epoch: the number of completed epochs.
    blocks_per_epoch: None where that is not known beforehand.
    identity: the facts that a saved state must agree on for the sequence to continue.
    """

    blocks_per_epoch: int | None

    def __init__(self, identity: Identity, *, seed: int) -> None:
        if seed < 0:
            raise ValueError(f"seed must be 0 or above, got {seed}")
        self.epoch = 0
        self._seed = seed
        self._identity = {**identity, "seed": seed}

    @abc.abstractmethod
    def next_blocks(self, count: int) -> list[Block]:
        """Return the next `count` blocks, or fewer at the end of an epoch, but at least one."""

    def state(self) -> tuple[dict[str, int | str], dict[str, Tensor]]:
        """Return the position in the sequence, as JSON values and as tensors."""
        position, tensors = self._position()
        return {**self._identity, "epoch": self.epoch, **position}, tensors

    def restore(self, values: Mapping[str, int | str], tensors: Mapping[str, Tensor]) -> None:
        """Continue where `state` was called; raise ValueError if that was on other data."""
        for name, value in self._identity.items():
            if values.get(name) != value:
                raise ValueError(
                    f"the state is of other data: its {name} was {values.get(name)!r} and is now "
                    f"{value!r}; resume with the data and options of the first run, or start anew"
                )
        self.epoch = int(values["epoch"])
        self._seek(values, tensors)

    @abc.abstractmethod
    def _position(self) -> tuple[dict[str, int | str], dict[str, Tensor]]: ...

    @abc.abstractmethod
    def _seek(self, values: Mapping[str, int | str], tensors: Mapping[str, Tensor]) -> None: ...


class ShuffledData(TrainingData):
    """Packed documents, permuted anew in each epoch."""

    def __init__(self, blocks: PackedDocuments, identity: Identity, *, seed: int) -> None:
        super().__init__(
            {**identity, "documents": blocks.fingerprint, "tokens": blocks.token_count}, seed=seed
        )
        self.blocks_per_epoch = len(blocks)
        self._blocks = blocks
        self._drawn = 0
        self._permute()

    def next_blocks(self, count: int) -> list[Block]:
        numbers = self._order[self._drawn : self._drawn + count]
        self._drawn += len(numbers)
        if self._drawn == len(self._order):
            self.epoch, self._drawn = self.epoch + 1, 0
            self._permute()
        return [self._blocks[number] for number in numbers.tolist()]

    def _permute(self) -> None:
        random = np.random.default_rng([self._seed, self.epoch])
        self._order = random.permutation(len(self._blocks))

    def _position(self) -> tuple[dict[str, int | str], dict[str, Tensor]]:
        return {"drawn": self._drawn}, {}

    def _seek(self, values: Mapping[str, int | str], tensors: Mapping[str, Tensor]) -> None:
        self._drawn = int(values["drawn"])
        self._permute()


class StreamedData(TrainingData):
    """Documents packed as they are read, the blocks shuffled through a buffer.

    Documents come in the order of their sources, and each block is drawn at random from the next
    `buffer_size`: sources that differ should be mixed beforehand. Every process reads everything.
    The state holds the buffer and the tokens that are read but not in a block yet. A resumed
    reader skips the part of a file that it had read.
    """

    blocks_per_epoch = None

    def __init__(
        self,
        sources: Sequence[Source],
        tokenize: DocumentTokenizer,
        layout: Layout,
        identity: Identity,
        *,
        seed: int,
        buffer_size: int,
        max_tokens: int | None,
    ) -> None:
        super().__init__(identity, seed=seed)
        self._sources = sources
        self._tokenize = tokenize
        self._layout = layout
        self._buffer_size = buffer_size
        self._max_tokens = max_tokens
        self._starts = [source.rows.state_dict() for source in sources]
        self._begin()

    def _begin(self) -> None:
        """Go to the start of an epoch."""
        self._reading = 0  # index of the source that is being read
        self._position_in_source: dict[str, Any] | None = None
        self._documents = self._read()
        # The tokens that are read and in no block yet.
        self._rest = Span(0, np.empty(0, np.int32), np.empty(0, np.bool_))
        self._buffer: list[Span] = []

    def next_blocks(self, count: int) -> list[Block]:
        self._fill()
        if not self._buffer:
            raise no_text_error(self._sources)
        blocks: list[Block] = []
        while self._buffer and len(blocks) < count:
            blocks.append(self._layout.block(self._draw()))
            self._fill()  # now, to know whether the epoch ends here
        if not self._buffer:
            self.epoch += 1
            self._begin()
        return blocks

    def _draw(self) -> Span:
        """Take a random span out of the buffer."""
        drawn = self._rest.number - len(self._buffer)
        random = np.random.default_rng([self._seed, self.epoch, drawn])
        chosen = random.integers(len(self._buffer))
        self._buffer[chosen], self._buffer[-1] = self._buffer[-1], self._buffer[chosen]
        return self._buffer.pop()

    def _fill(self) -> None:
        """Read on until the buffer is full or the epoch is read to its end."""
        while len(self._buffer) < self._buffer_size:
            if len(self._rest.tokens) < self._layout.block_size and self._extend():
                continue
            if not len(self._rest.tokens):
                return
            number, tokens, starts = self._rest
            size = self._layout.block_size
            self._buffer.append(Span(number, tokens[:size], starts[:size]))
            self._rest = Span(number + 1, tokens[size:], starts[size:])

    def _extend(self) -> bool:
        """Read one more batch of documents; False at their end or at max_tokens."""
        number, tokens, starts = self._rest
        room = None
        if self._max_tokens is not None:
            room = self._max_tokens - number * self._layout.block_size
            if len(tokens) >= room:
                return False
        documents = next(self._documents, None)
        if documents is None:
            return False
        new_starts = [np.arange(len(document)) == 0 for document in documents]
        tokens = np.concatenate([tokens, *documents])[:room]
        self._rest = Span(number, tokens, np.concatenate([starts, *new_starts])[:room])
        return True

    def _read(self) -> Iterator[list[Tokens]]:
        """Yield documents from the current position on, keeping that position up to date."""
        while self._reading < len(self._sources):
            source, start = self._sources[self._reading], self._starts[self._reading]
            source.rows.load_state_dict(self._position_in_source or start)
            for texts in source.batches():
                self._position_in_source = source.rows.state_dict()
                yield self._tokenize(texts)
            self._reading, self._position_in_source = self._reading + 1, None

    def _position(self) -> tuple[dict[str, int | str], dict[str, Tensor]]:
        reader = json.dumps(self._position_in_source)
        spans = [*self._buffer, self._rest]
        return {"reading": self._reading, "reader": reader}, {
            "numbers": torch.tensor([span.number for span in spans]),
            "lengths": torch.tensor([len(span.tokens) for span in spans]),
            "tokens": torch.from_numpy(np.concatenate([span.tokens for span in spans])),
            "starts": torch.from_numpy(np.concatenate([span.starts for span in spans])),
        }

    def _seek(self, values: Mapping[str, int | str], tensors: Mapping[str, Tensor]) -> None:
        self._begin()
        self._reading = int(values["reading"])
        self._position_in_source = json.loads(str(values["reader"]))
        ends = tensors["lengths"].cumsum(0)[:-1].numpy()
        parts = (np.split(tensors[name].numpy(), ends) for name in ("tokens", "starts"))
        *self._buffer, self._rest = map(Span, tensors["numbers"].tolist(), *parts)
