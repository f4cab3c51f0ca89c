"""The order in which a run sees its blocks: shuffled anew each epoch, and resumed exactly.

Every random choice is a function of the seed, the epoch and how many blocks went before, so no
generator has to be saved, and every process that asks sees the same.
"""

from __future__ import annotations

import abc
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastperturb.data.documents import DocumentTokenizer, Source, no_text
from fastperturb.data.packing import Block, Cut, Layout, PackedDocuments, Tokens

Identity = Mapping[str, int | str]


class TrainingData(abc.ABC):
    """The blocks of a run, epoch after epoch.

    epoch: how many are completed. blocks_per_epoch: None where that is not known beforehand.
    identity: what a saved state must agree on for the sequence to continue.
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
        """The next `count` blocks, or what is left of the epoch: at least one."""

    def state(self) -> tuple[dict[str, int | str], dict[str, Tensor]]:
        """Where the sequence stands, as JSON values and as tensors."""
        position, tensors = self._position()
        return {**self._identity, "epoch": self.epoch, **position}, tensors

    def restore(self, values: Mapping[str, int | str], tensors: Mapping[str, Tensor]) -> None:
        """Continue where the `state` was taken, which other data refuse."""
        for name, here in self._identity.items():
            if values.get(name) != here:
                raise ValueError(
                    f"the state is of other data: its {name} was {values.get(name)!r} and is now "
                    f"{here!r}; resume with the data and options of the first run, or start anew"
                )
        self.epoch = int(values["epoch"])
        self._seek(values, tensors)

    @abc.abstractmethod
    def _position(self) -> tuple[dict[str, int | str], dict[str, Tensor]]: ...

    @abc.abstractmethod
    def _seek(self, values: Mapping[str, int | str], tensors: Mapping[str, Tensor]) -> None: ...


class ShuffledData(TrainingData):
    """Packed documents in the order of a permutation for each epoch."""

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

    Documents come in the order of their sources. A block is drawn at random from the next
    `buffer_size` of them, so sources that differ are better mixed before they are given. Every
    process reads everything. The state holds the buffer and what is read but not yet cut; a
    resumed reader skips what it had read of the file it stood in.
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
        """Stand at the start of an epoch."""
        self._reading = 0  # which source is being read
        self._position_in_source: dict[str, Any] | None = None
        self._documents = self._read()
        self._rest = Cut(0, np.empty(0, np.int32), np.empty(0, np.bool_))  # of what is read
        self._buffer: list[Cut] = []

    def next_blocks(self, count: int) -> list[Block]:
        self._fill()
        if not self._buffer:
            raise no_text(self._sources)
        blocks: list[Block] = []
        while self._buffer and len(blocks) < count:
            blocks.append(self._layout.block(self._draw()))
            self._fill()  # now, to know whether the epoch ends here
        if not self._buffer:
            self.epoch += 1
            self._begin()
        return blocks

    def _draw(self) -> Cut:
        drawn = self._rest.number - len(self._buffer)
        random = np.random.default_rng([self._seed, self.epoch, drawn])
        chosen = random.integers(len(self._buffer))
        self._buffer[chosen], self._buffer[-1] = self._buffer[-1], self._buffer[chosen]
        return self._buffer.pop()

    def _fill(self) -> None:
        while len(self._buffer) < self._buffer_size:
            if len(self._rest.tokens) < self._layout.block_size and self._extend():
                continue
            if not len(self._rest.tokens):
                return
            number, tokens, starts = self._rest
            size = self._layout.block_size
            self._buffer.append(Cut(number, tokens[:size], starts[:size]))
            self._rest = Cut(number + 1, tokens[size:], starts[size:])

    def _extend(self) -> bool:
        """Read on; False at the end of the documents or at max_tokens."""
        number, tokens, starts = self._rest
        room = None
        if self._max_tokens is not None:
            room = self._max_tokens - number * self._layout.block_size
            if len(tokens) >= room:
                return False
        documents = next(self._documents, None)
        if documents is None:
            return False
        first = [np.arange(len(document)) == 0 for document in documents]
        tokens = np.concatenate([tokens, *documents])[:room]
        self._rest = Cut(number, tokens, np.concatenate([starts, *first])[:room])
        return True

    def _read(self) -> Iterator[list[Tokens]]:
        while self._reading < len(self._sources):
            source, start = self._sources[self._reading], self._starts[self._reading]
            source.rows.load_state_dict(self._position_in_source or start)
            for texts in source.batches():
                self._position_in_source = source.rows.state_dict()
                yield self._tokenize(texts)
            self._reading, self._position_in_source = self._reading + 1, None

    def _position(self) -> tuple[dict[str, int | str], dict[str, Tensor]]:
        reader = json.dumps(self._position_in_source)
        cuts = [*self._buffer, self._rest]
        return {"reading": self._reading, "reader": reader}, {
            "numbers": torch.tensor([cut.number for cut in cuts]),
            "lengths": torch.tensor([len(cut.tokens) for cut in cuts]),
            "tokens": torch.from_numpy(np.concatenate([cut.tokens for cut in cuts])),
            "starts": torch.from_numpy(np.concatenate([cut.starts for cut in cuts])),
        }

    def _seek(self, values: Mapping[str, int | str], tensors: Mapping[str, Tensor]) -> None:
        self._begin()
        self._reading = int(values["reading"])
        self._position_in_source = json.loads(str(values["reader"]))
        ends = tensors["lengths"].cumsum(0)[:-1].numpy()
        parts = (np.split(tensors[name].numpy(), ends) for name in ("tokens", "starts"))
        *self._buffer, self._rest = map(Cut, tensors["numbers"].tolist(), *parts)
