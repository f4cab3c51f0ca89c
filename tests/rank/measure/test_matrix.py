"""The matrix of logits against its definition, in blocks, in files, and of chosen tokens."""

import gc
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from rank_cases import FUTURES, HISTORIES, one_by_one, perturbed, sequences
from tiny import base_model

from fastperturb.rank.ask.models import ModelOracle
from fastperturb.rank.ask.oracle import FunctionOracle, Metered, QueryBudgetSpent
from fastperturb.rank.measure import matrix
from fastperturb.rank.measure.matrix import distinct_contexts, logit_matrix

VOCAB = 11


def logits_of(context):
    """Of random size, level and order, and a function of the context."""
    draw = random.Random(str(context))
    return [draw.uniform(-4, 4) + 10 * len(context) for _ in range(VOCAB)]


def oracle():
    return FunctionOracle(logits_of, VOCAB)


def centred_logits(histories, futures):
    found = np.array([[logits_of(h + f) for f in futures] for h in histories])
    return found - found.mean(-1, keepdims=True)


def texts(count, longest, *, seed=0):
    return [
        tuple(token % VOCAB for token in each) for each in sequences(count, 0, longest, seed=seed)
    ]


# Its values


@pytest.mark.parametrize("architecture", ["GPT2", "Gemma2", "Llama"])
def test_values_are_a_models_logits_less_their_mean(architecture):
    model = base_model(architecture)
    found = logit_matrix(ModelOracle(model, prompt=(1,)), HISTORIES, FUTURES)
    logits = one_by_one(model, HISTORIES, FUTURES)
    expected = logits - logits.mean(-1, keepdim=True)
    np.testing.assert_allclose(found.values, expected, atol=2e-5)
    assert found.values.dtype == np.float32 and found.tokens is None
    assert found.histories == tuple(HISTORIES) and found.futures == tuple(FUTURES)


def test_a_model_is_asked_as_an_oracle_with_its_defaults():
    lm = perturbed(base_model())
    found = logit_matrix(lm, [[4, 5], np.array([6])], torch.tensor([[7], [8]]))
    assert found.histories == ((4, 5), (6,)) and found.futures == ((7,), (8,))
    same = logit_matrix(ModelOracle(lm), *(found.histories, found.futures))
    assert np.array_equal(found.values, same.values)


@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("block", [1, 3 * VOCAB, 40 * VOCAB])
def test_blocks_leave_no_trace(block, top_k, monkeypatch):
    histories, futures = texts(9, 4), texts(7, 3, seed=1)
    whole = logit_matrix(oracle(), histories, futures, top_k=top_k)
    monkeypatch.setattr(matrix, "_BLOCK", block)
    asked = []

    class Watched:
        vocab_size = VOCAB

        def log_probs(self, histories, futures):
            asked.append(len(histories) * len(futures) * VOCAB)
            return oracle().log_probs(histories, futures)

    found = logit_matrix(Watched(), histories, futures, top_k=top_k)
    assert np.array_equal(found.values, whole.values)
    assert max(asked) <= max(block, VOCAB)
    np.testing.assert_array_equal(found.tokens, whole.tokens)


def test_an_oracle_without_a_probability_is_named():
    impossible = FunctionOracle(lambda context: [0.0, -np.inf if len(context) > 2 else 0.0], 2)
    with pytest.raises(ValueError, match=r"histories\[1\] and futures\[2\] .* must be finite"):
        logit_matrix(impossible, [(), (1,)], [(), (0,), (1, 1)])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([], [()]), {}, ValueError, "histories must hold at least one"),
        (([()], []), {}, ValueError, "futures must hold at least one"),
        (([1, 2], [()]), {}, TypeError, "histories must be a sequence of sequences"),
        (([()], [(1.5,)]), {}, TypeError, "futures must be a sequence of sequences"),
        (([(0,), (11,)], [()]), {}, ValueError, r"histories .*\[0, 11\), got 11 .* numbered 1"),
        (([()], [(-1,)]), {}, ValueError, r"futures .*\[0, 11\), got -1"),
        (
            ([()], [()]),
            {"top_k": 0},
            ValueError,
            "top_k .* from 1 to the vocabulary's 11, or an array of tokens, got 0",
        ),
        (([()], [()]), {"top_k": 12}, ValueError, "top_k .*got 12"),
        (([()], [()]), {"top_k": np.array([1])}, ValueError, r"tokens \[F, K\] .*F = 1 .*\[1\]"),
        (([()], [()]), {"top_k": np.array([[11]])}, ValueError, r"top_k .*\[0, 11\), got 11"),
    ],
)
def test_wrong_arguments_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        logit_matrix(oracle(), *arguments, **options)


# Chosen tokens


def test_top_k_keeps_the_most_probable_tokens_over_histories_in_their_order():
    histories, futures = texts(30, 5), texts(6, 3, seed=1)
    found = logit_matrix(oracle(), histories, futures, top_k=4)
    everything = centred_logits(histories, futures)
    probability = np.exp(everything)
    probability /= probability.sum(-1, keepdims=True)
    order = np.argsort(-probability.mean(0), axis=-1)[:, :4]
    assert np.array_equal(found.tokens, order)
    expected = np.take_along_axis(everything, order[None], axis=-1)
    np.testing.assert_allclose(found.values, expected, atol=1e-5)


def test_top_k_is_chosen_on_a_pilot_of_64_histories_spread_over_all():
    """Every third history is of a kind that says otherwise, and the pilot is of that kind."""
    asked = []

    def logits(context):
        asked.append(context)
        return [1.0, 2.0, 3.0] if context[0] % 3 else [3.0, 2.0, 1.0]

    histories = [(number % 3, number // 3) for number in range(3 * 64)]
    function = FunctionOracle(lambda context: [*logits(context), *[0.0] * 61], 64)
    found = logit_matrix(function, histories, [()], top_k=3)
    assert asked[:64] == histories[::3]
    assert found.tokens.tolist() == [[0, 1, 2]]


def test_the_columns_may_be_those_of_another_matrix():
    histories, futures = texts(5, 4), texts(6, 3, seed=1)
    first = logit_matrix(oracle(), histories, futures, top_k=3)
    others = texts(8, 4, seed=2)
    found = logit_matrix(oracle(), others, futures, top_k=first.tokens)
    everything = centred_logits(others, futures)
    expected = np.take_along_axis(everything, first.tokens[None], axis=-1)
    np.testing.assert_allclose(found.values, expected, atol=1e-5)


# Queries


def test_queries_are_the_different_contexts():
    draw = random.Random(0)
    for _ in range(300):
        histories, futures = (
            [
                tuple(draw.randrange(2) for _ in range(draw.randint(0, 4)))
                for _ in range(draw.randint(1, 8))
            ]
            for _ in range(2)
        )
        contexts = {history + future for history in histories for future in futures}
        assert distinct_contexts(histories, futures) == len(contexts)


@pytest.mark.parametrize("top_k", [None, 2])
def test_nothing_is_asked_twice(top_k):
    meter = Metered(oracle())
    histories = [(number // VOCAB, number % VOCAB) for number in range(100)]
    found = logit_matrix(meter, histories, texts(5, 3), top_k=top_k)
    assert meter.queries == found.queries == distinct_contexts(histories, texts(5, 3))
    with pytest.raises(QueryBudgetSpent):
        logit_matrix(Metered(oracle(), budget=found.queries - 1), histories, texts(5, 3))


# Parts


def test_parts_are_the_matrices_of_their_histories_and_futures():
    histories, futures = texts(8, 4), texts(6, 3, seed=1)
    whole = logit_matrix(oracle(), histories, futures, top_k=5)
    for rows, columns in ((slice(0, 4), slice(1, None, 2)), ([6, 0, 2], np.array([5, 1]))):
        part = whole.select(histories=rows, futures=columns)
        kept = [histories[row] for row in np.arange(8)[rows]]
        runs = [futures[column] for column in np.arange(6)[columns]]
        same = logit_matrix(oracle(), kept, runs, top_k=part.tokens)
        assert np.array_equal(part.values, same.values)
        assert (part.histories, part.futures) == (same.histories, same.futures)
        assert part.queries == same.queries
    assert np.shares_memory(whole.select(slice(2), slice(3)).values, whole.values)


# Files


def test_a_path_is_written_whole_and_mapped(tmp_path):
    histories, futures = texts(8, 4), texts(6, 3, seed=1)
    plain = logit_matrix(oracle(), histories, futures)
    path = tmp_path / "matrix.npy"
    found = logit_matrix(oracle(), histories, futures, path=path)
    assert isinstance(found.values, np.memmap) and not found.values.flags.writeable
    assert np.array_equal(found.values, plain.values)
    assert np.array_equal(np.load(path), plain.values)
    with pytest.raises(FileExistsError, match="matrix.npy exists: name another, or set overwrite"):
        logit_matrix(oracle(), histories, futures, path=path)
    again = logit_matrix(oracle(), histories[:2], futures, path=path, overwrite=True)
    assert np.array_equal(again.values, plain.values[:2])
    assert [each.name for each in tmp_path.iterdir()] == ["matrix.npy"]


def test_a_question_that_fails_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "_BLOCK", 1)
    meter = Metered(oracle(), budget=5)
    with pytest.raises(QueryBudgetSpent):
        logit_matrix(meter, [(1,), (2,)], [(1,), (2,), (3,)], path=tmp_path / "matrix.npy")
    assert meter.queries == 5 and not list(tmp_path.iterdir())


def test_a_large_matrix_is_mapped_from_a_file_without_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    histories, futures = texts(8, 4), texts(6, 3, seed=1)
    plain = logit_matrix(oracle(), histories, futures, top_k=3)
    assert not isinstance(plain.values, np.memmap)
    monkeypatch.setattr(matrix, "IN_MEMORY_BYTES", plain.values.nbytes - 1)
    found = logit_matrix(oracle(), histories, futures, top_k=3)
    assert isinstance(found.values, np.memmap) and not list(tmp_path.iterdir())
    assert np.array_equal(found.values, plain.values)
    assert np.array_equal(found.tokens, plain.tokens)


class Uniform:
    vocab_size = 4096

    def log_probs(self, histories, futures):
        return torch.zeros(len(histories), len(futures), self.vocab_size).log_softmax(-1)


def test_memory_does_not_grow_with_the_number_of_histories(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "_BLOCK", 2**20)
    futures = [(number,) for number in range(32)]

    def peak(count):
        """In MiB, above what was held before."""
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
        before = status("VmRSS")
        histories = [(number,) for number in range(count)]
        found = logit_matrix(Uniform(), histories, futures, path=tmp_path / f"{count}.npy")
        return (status("VmHWM") - before) / 1024, found.values.nbytes / 2**20

    peak(16)
    held, size = peak(512)
    assert held < size / 4 == 64


def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name + ":")).split()[1])


# A real model


def test_a_real_model_under_noise_and_without(data_dir):
    folder = data_dir / "models" / "stories260K-hf"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    histories, futures = sequences(6, 10, 30), [(), *sequences(5, 1, 6, seed=1)]
    logits = one_by_one(model, histories, futures, prompt=())
    expected = logits - logits.mean(-1, keepdim=True)
    found = logit_matrix(model, histories, futures)
    np.testing.assert_allclose(found.values, expected, atol=1e-4)
    lm = perturbed(model, init_scale=0.2)
    under_noise = logit_matrix(ModelOracle(lm, num_samples=8, seed=3), histories, futures)
    continued = torch.tensor([histories[0] + futures[1] + (token,) for token in range(16)])
    score = lm.score(continued, num_samples=8, seed=3, rows=torch.zeros(16, dtype=torch.int64))
    told, values = score.log_marginal[:, -1], under_noise.values[0, 1, :16]
    np.testing.assert_allclose(values - values[0], told - told[0], atol=1e-4)
