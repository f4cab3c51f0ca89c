"""The matrix of logits: against its definition, in blocks, in files, and of chosen tokens."""

import gc
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from rank_cases import FUTURES, HISTORIES, log_probs_one_by_one, perturbed, token_sequences
from tiny import base_model

from fastperturb.rank import FunctionOracle, Metered, ModelOracle, QueryBudgetSpent, logit_matrix
from fastperturb.rank.measure import distinct_contexts
from fastperturb.rank.measure import matrix as module

VOCAB = 11


def logits_of(context):
    """Random logits that are a function of the context, up to a constant that grows with it."""
    generator = random.Random(str(context))
    return [generator.uniform(-4, 4) + 10 * len(context) for _ in range(VOCAB)]


def oracle():
    return FunctionOracle(logits_of, VOCAB)


def centred_logits(histories, futures):
    logits = np.array([[logits_of(h + f) for f in futures] for h in histories])
    return logits - logits.mean(-1, keepdims=True)


def texts(count, longest, *, seed=0):
    """Random sequences of up to `longest` tokens below VOCAB."""
    return [
        tuple(token % VOCAB for token in sequence)
        for sequence in token_sequences(count, 0, longest, seed=seed)
    ]


@pytest.mark.parametrize("architecture", ["GPT2", "Gemma2", "Llama"])
def test_matrix_values_are_the_logits_of_a_model_less_their_mean(architecture):
    model = base_model(architecture)
    matrix = logit_matrix(ModelOracle(model, prompt=(1,)), HISTORIES, FUTURES)
    logits = log_probs_one_by_one(model, HISTORIES, FUTURES)
    expected = logits - logits.mean(-1, keepdim=True)
    np.testing.assert_allclose(matrix.values, expected, atol=2e-5)
    assert matrix.values.dtype == np.float32 and matrix.tokens is None
    assert matrix.histories == tuple(HISTORIES) and matrix.futures == tuple(FUTURES)


def test_a_model_is_asked_as_a_model_oracle_with_its_defaults():
    lm = perturbed(base_model())
    matrix = logit_matrix(lm, [[4, 5], np.array([6])], torch.tensor([[7], [8]]))
    assert matrix.histories == ((4, 5), (6,)) and matrix.futures == ((7,), (8,))
    expected = logit_matrix(ModelOracle(lm), matrix.histories, matrix.futures)
    assert np.array_equal(matrix.values, expected.values)


@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("block", [1, 3 * VOCAB, 40 * VOCAB])
def test_the_values_do_not_depend_on_the_size_of_blocks(block, top_k, monkeypatch):
    histories, futures = texts(9, 4), texts(7, 3, seed=1)
    whole = logit_matrix(oracle(), histories, futures, top_k=top_k)
    monkeypatch.setattr(module, "_BLOCK", block)
    sizes = []

    class Watched:
        vocab_size = VOCAB

        def log_probs(self, histories, futures):
            sizes.append(len(histories) * len(futures) * VOCAB)
            return oracle().log_probs(histories, futures)

    matrix = logit_matrix(Watched(), histories, futures, top_k=top_k)
    assert np.array_equal(matrix.values, whole.values)
    assert max(sizes) <= max(block, VOCAB)
    np.testing.assert_array_equal(matrix.tokens, whole.tokens)


def test_a_context_without_finite_log_probs_is_named():
    impossible = FunctionOracle(lambda context: [0.0, -np.inf if len(context) > 2 else 0.0], 2)
    with pytest.raises(ValueError, match=r"must be finite .* histories\[1\] and futures\[2\]"):
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
def test_errors_of_logit_matrix_name_the_wrong_argument(arguments, options, error, message):
    with pytest.raises(error, match=message):
        logit_matrix(oracle(), *arguments, **options)


def test_top_k_keeps_the_most_probable_tokens_over_histories_in_their_order():
    histories, futures = texts(30, 5), texts(6, 3, seed=1)
    matrix = logit_matrix(oracle(), histories, futures, top_k=4)
    logits = centred_logits(histories, futures)
    probability = np.exp(logits)
    probability /= probability.sum(-1, keepdims=True)
    order = np.argsort(-probability.mean(0), axis=-1)[:, :4]
    assert np.array_equal(matrix.tokens, order)
    expected = np.take_along_axis(logits, order[None], axis=-1)
    np.testing.assert_allclose(matrix.values, expected, atol=1e-5)


def test_top_k_is_chosen_on_a_pilot_of_64_histories_spread_over_all():
    """Every third history has other logits, and the pilot consists of just these."""
    contexts = []

    def logits(context):
        contexts.append(context)
        return [1.0, 2.0, 3.0] if context[0] % 3 else [3.0, 2.0, 1.0]

    histories = [(number % 3, number // 3) for number in range(3 * 64)]
    function = FunctionOracle(lambda context: [*logits(context), *[0.0] * 61], 64)
    matrix = logit_matrix(function, histories, [()], top_k=3)
    assert contexts[:64] == histories[::3]
    assert matrix.tokens.tolist() == [[0, 1, 2]]


def test_top_k_may_be_the_tokens_of_another_matrix():
    histories, futures = texts(5, 4), texts(6, 3, seed=1)
    first = logit_matrix(oracle(), histories, futures, top_k=3)
    others = texts(8, 4, seed=2)
    matrix = logit_matrix(oracle(), others, futures, top_k=first.tokens)
    expected = np.take_along_axis(centred_logits(others, futures), first.tokens[None], axis=-1)
    np.testing.assert_allclose(matrix.values, expected, atol=1e-5)


def test_distinct_contexts_are_counted_as_a_set_of_all_would_be():
    generator = random.Random(0)
    for _ in range(300):
        histories, futures = (
            [
                tuple(generator.randrange(2) for _ in range(generator.randint(0, 4)))
                for _ in range(generator.randint(1, 8))
            ]
            for _ in range(2)
        )
        contexts = {history + future for history in histories for future in futures}
        assert distinct_contexts(histories, futures) == len(contexts)


@pytest.mark.parametrize("top_k", [None, 2])
def test_no_context_is_asked_twice(top_k):
    meter = Metered(oracle())
    histories = [(number // VOCAB, number % VOCAB) for number in range(100)]
    matrix = logit_matrix(meter, histories, texts(5, 3), top_k=top_k)
    assert meter.queries == matrix.queries == distinct_contexts(histories, texts(5, 3))
    with pytest.raises(QueryBudgetSpent):
        logit_matrix(Metered(oracle(), budget=matrix.queries - 1), histories, texts(5, 3))


def test_a_selection_is_the_matrix_of_its_histories_and_futures():
    histories, futures = texts(8, 4), texts(6, 3, seed=1)
    whole = logit_matrix(oracle(), histories, futures, top_k=5)
    for rows, columns in ((slice(0, 4), slice(1, None, 2)), ([6, 0, 2], np.array([5, 1]))):
        part = whole.select(histories=rows, futures=columns)
        kept_histories = [histories[row] for row in np.arange(8)[rows]]
        kept_futures = [futures[column] for column in np.arange(6)[columns]]
        expected = logit_matrix(oracle(), kept_histories, kept_futures, top_k=part.tokens)
        assert np.array_equal(part.values, expected.values)
        assert (part.histories, part.futures) == (expected.histories, expected.futures)
        assert part.queries == expected.queries
    assert np.shares_memory(whole.select(slice(2), slice(3)).values, whole.values)


def test_a_path_is_written_whole_and_mapped(tmp_path):
    histories, futures = texts(8, 4), texts(6, 3, seed=1)
    plain = logit_matrix(oracle(), histories, futures)
    path = tmp_path / "matrix.npy"
    matrix = logit_matrix(oracle(), histories, futures, path=path)
    assert isinstance(matrix.values, np.memmap) and not matrix.values.flags.writeable
    assert np.array_equal(matrix.values, plain.values)
    assert np.array_equal(np.load(path), plain.values)
    with pytest.raises(FileExistsError, match="matrix.npy exists: name another, or set overwrite"):
        logit_matrix(oracle(), histories, futures, path=path)
    again = logit_matrix(oracle(), histories[:2], futures, path=path, overwrite=True)
    assert np.array_equal(again.values, plain.values[:2])
    assert [file.name for file in tmp_path.iterdir()] == ["matrix.npy"]


def test_a_matrix_that_cannot_be_finished_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 1)
    meter = Metered(oracle(), budget=5)
    with pytest.raises(QueryBudgetSpent):
        logit_matrix(meter, [(1,), (2,)], [(1,), (2,), (3,)], path=tmp_path / "matrix.npy")
    assert meter.queries == 5 and not list(tmp_path.iterdir())


def test_a_large_matrix_is_mapped_from_a_file_without_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    histories, futures = texts(8, 4), texts(6, 3, seed=1)
    plain = logit_matrix(oracle(), histories, futures, top_k=3)
    assert not isinstance(plain.values, np.memmap)
    monkeypatch.setattr(module, "IN_MEMORY_BYTES", plain.values.nbytes - 1)
    matrix = logit_matrix(oracle(), histories, futures, top_k=3)
    assert isinstance(matrix.values, np.memmap) and not list(tmp_path.iterdir())
    assert np.array_equal(matrix.values, plain.values)
    assert np.array_equal(matrix.tokens, plain.tokens)


class Uniform:
    vocab_size = 4096

    def log_probs(self, histories, futures):
        return torch.zeros(len(histories), len(futures), self.vocab_size).log_softmax(-1)


def test_memory_does_not_grow_with_the_number_of_histories(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 2**20)
    futures = [(number,) for number in range(32)]

    def peak(count):
        """The peak of memory in MiB above what was held before, and the size of the matrix."""
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = status("VmRSS")
        histories = [(number,) for number in range(count)]
        matrix = logit_matrix(Uniform(), histories, futures, path=tmp_path / f"{count}.npy")
        return (status("VmHWM") - before) / 1024, matrix.values.nbytes / 2**20

    peak(16)
    used, size = peak(512)
    assert used < size / 4 == 64


def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name + ":")).split()[1])


def test_a_real_models_matrix_is_that_of_its_passes_and_of_its_score_under_noise(data_dir):
    folder = data_dir / "models" / "stories260K-hf"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    histories, futures = token_sequences(6, 10, 30), [(), *token_sequences(5, 1, 6, seed=1)]
    logits = log_probs_one_by_one(model, histories, futures, prompt=())
    expected = logits - logits.mean(-1, keepdim=True)
    matrix = logit_matrix(model, histories, futures)
    np.testing.assert_allclose(matrix.values, expected, atol=1e-4)
    lm = perturbed(model, init_scale=0.2)
    under_noise = logit_matrix(ModelOracle(lm, num_samples=8, seed=3), histories, futures)
    continued = torch.tensor([histories[0] + futures[1] + (token,) for token in range(16)])
    score = lm.score(continued, num_samples=8, seed=3, rows=torch.zeros(16, dtype=torch.int64))
    log_probs, values = score.log_marginal[:, -1], under_noise.values[0, 1, :16]
    np.testing.assert_allclose(values - values[0], log_probs - log_probs[0], atol=1e-4)
