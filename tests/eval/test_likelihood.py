"""Likelihoods of documents: against the plain model, against loops, and over seeds."""

import json
import math
import statistics

import numpy as np
import pytest
import tiny_run
import torch
import transformers

from fastperturb import EditConfig, PerturbConfig, edit, wrap
from fastperturb.data import domains
from fastperturb.data.domains import Domain, DomainOptions
from fastperturb.data.packing import Layout, Span, collate
from fastperturb.engine.batch import IGNORED
from fastperturb.eval import likelihood
from fastperturb.eval.likelihood import Likelihood, measure

SETTINGS = {"num_samples": 8, "seed": 5, "batch_size": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("likelihood")
    tiny_run.model_folder(folder / "base")
    tiny_run.model_folder(folder / "dropout", kind="gpt2")
    tiny_run.text_file(folder / "text.txt", documents=12)
    return folder


def base_of(folder, kind="base"):
    return transformers.AutoModelForCausalLM.from_pretrained(folder / kind)


def perturbed(folder, **changes):
    torch.manual_seed(0)
    options = {"num_samples": 8, "latent_dim": 4, "init_scale": 0.5}
    return wrap(base_of(folder), PerturbConfig(**options | changes)).eval()


@pytest.fixture(scope="module")
def domain(folder):
    """Twelve documents in blocks of 16, which cut most of them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    options = DomainOptions(block_size=16, document_separator="\n\n")
    return domains.read("d", str(folder / "text.txt"), options, tokenizer)


def whole_documents(documents, eos=2):
    """Return a domain whose documents have a block each."""
    size = max(map(len, documents))
    layout = Layout(size, "documents", eos)
    blocks = [
        layout.block(Span(number, np.asarray(tokens, np.int32), np.arange(len(tokens)) == 0))
        for number, tokens in enumerate(documents)
    ]
    owners = [np.where(np.arange(size) < len(tokens), n, -1) for n, tokens in enumerate(documents)]
    return Domain("d", blocks, owners)


def summed_by_document(domain, values):  # values [B, T-1], 0 where there is no label
    sums = [0.0] * domain.document_count
    for row, documents in zip(values.tolist(), domain.documents):
        for value, document in zip(row, documents[1:]):
            if document >= 0:
                sums[document] += value
    return sums


@pytest.mark.parametrize("marginal", ["token", "sequence"])
def test_stratified_models_are_measured_by_groups(folder, domain, marginal):
    lm = perturbed(folder, sampling="stratified", marginal=marginal)
    measured = measure(lm, domain, **SETTINGS | {"num_samples": 16, "marginal": marginal})
    assert measured.num_samples == 16 and measured.standard_error > 0
    assert measured.curve["num_samples"] == [2, 4, 8, 16]  # eight groups of two
    assert measured.curve["nll"][-1] == pytest.approx(measured.nll)
    with lm.overriding(group_size=2):
        same = measure(lm, domain, **SETTINGS | {"num_samples": 16, "marginal": marginal})
    assert same.nll_sums == measured.nll_sums


def test_an_exact_model_gives_the_loss_of_the_plain_model_for_each_document(folder, domain):
    lm = perturbed(folder)
    with lm.exact():
        measured = measure(lm, domain, **SETTINGS)
    # By the model alone, on each piece of a document alone.
    expected, counts = [0.0] * domain.document_count, [0] * domain.document_count
    for block, documents in zip(domain.blocks, domain.documents):
        for document in np.unique(documents[documents >= 0]):
            piece = torch.from_numpy(block.tokens[documents == document])[None]
            with torch.no_grad():
                log_probs = lm.base(piece).logits.log_softmax(-1)
            picked = log_probs[:, :-1].gather(-1, piece[:, 1:, None])
            expected[document] -= float(picked.sum())
            counts[document] += piece.shape[1] - 1
    torch.testing.assert_close(measured.nll_sums, expected, rtol=1e-5, atol=1e-4)
    assert measured.counts == counts
    assert measured.nll == pytest.approx(sum(expected) / sum(counts), rel=1e-5)
    assert measured.perplexity == pytest.approx(math.exp(measured.nll))


@pytest.mark.parametrize("antithetic", [False, True])
def test_sums_errors_and_curve_equal_those_of_one_score_of_all_blocks(antithetic, folder, domain):
    lm = perturbed(folder, antithetic=antithetic)
    measured = measure(lm, domain, **SETTINGS)
    whole = lm.score(**collate(domain.blocks[:]), num_samples=8, seed=5)
    close = {"rtol": 1e-5, "atol": 1e-5}
    nll = summed_by_document(domain, -whole.log_marginal)
    torch.testing.assert_close(measured.nll_sums, nll, **close)
    jackknife = summed_by_document(domain, -whole.jackknife)
    torch.testing.assert_close(measured.jackknife_sums, jackknife, **close)
    assert measured.nll == pytest.approx(float(whole.nll), rel=1e-6)
    assert measured.jackknife == pytest.approx(sum(jackknife) / sum(measured.counts), rel=1e-6)
    assert measured.standard_error == pytest.approx(float(whole.nll_standard_error), rel=1e-4)
    assert measured.ess == pytest.approx(float(whole.ess.sum() / (whole.ess > 0).sum()), rel=1e-5)
    assert measured.curve["num_samples"] == whole.curve.num_samples
    torch.testing.assert_close(measured.curve["nll"], whole.curve.nll.tolist(), **close)
    assert measured.curve["jackknife"][0] is None
    torch.testing.assert_close(
        measured.curve["jackknife"][1:], whole.curve.jackknife[1:].tolist(), **close
    )


def test_the_batch_size_changes_nothing(folder, domain):
    lm = perturbed(folder)
    one, many = (measure(lm, domain, **SETTINGS | {"batch_size": size}) for size in (1, 5))
    torch.testing.assert_close(one.nll_sums, many.nll_sums, rtol=1e-5, atol=1e-5)
    assert one.standard_error == pytest.approx(many.standard_error, rel=1e-4)
    torch.testing.assert_close(one.curve["nll"], many.curve["nll"], rtol=1e-5, atol=1e-5)


def test_the_standard_error_is_the_spread_over_seeds(folder, domain):
    lm = perturbed(folder)
    settings = SETTINGS | {"num_samples": 32, "batch_size": 40}
    measured = [measure(lm, domain, **settings | {"seed": seed}) for seed in range(40)]
    spread = statistics.stdev(one.nll for one in measured)
    # A spread over 40 seeds is known to 11%; three times that.
    assert spread == pytest.approx(
        statistics.mean(one.standard_error for one in measured), rel=0.34
    )


def models_without_randomness(folder):
    unperturbed = perturbed(folder, antithetic=True)
    torch.nn.init.zeros_(unperturbed.transform.U)
    return {
        "transform of scale zero": unperturbed,
        "deterministic": perturbed(folder, deterministic=True),
    }


@pytest.mark.parametrize("kind", ["transform of scale zero", "deterministic"])
def test_a_model_without_randomness_takes_one_sample_and_has_no_nan(kind, folder, domain):
    lm = models_without_randomness(folder)[kind]
    measured = measure(lm, domain, **SETTINGS)
    assert measured.num_samples == 1
    assert measured.standard_error is None and measured.ess is None
    assert measured.jackknife_sums == measured.nll_sums
    assert measured.curve == {
        "num_samples": [1],
        "nll": [pytest.approx(measured.nll)],
        "jackknife": [None],
    }
    assert (
        Likelihood.from_dict(json.loads(json.dumps(measured.to_dict(), allow_nan=False)))
        == measured
    )


def test_one_sample_of_a_random_model_has_no_error(folder, domain):
    measured = measure(perturbed(folder), domain, **SETTINGS | {"num_samples": 1})
    assert (measured.num_samples, measured.standard_error) == (1, None)
    json.dumps(measured.to_dict(), allow_nan=False)


def test_a_transform_of_scale_zero_is_the_exact_model_and_any_other_is_not(folder, domain):
    unperturbed, random = (
        models_without_randomness(folder)["transform of scale zero"],
        perturbed(folder),
    )
    with random.exact():
        exact = measure(random, domain, **SETTINGS)
    assert measure(unperturbed, domain, **SETTINGS).nll_sums == exact.nll_sums
    assert measure(random, domain, **SETTINGS).nll_sums != exact.nll_sums


@pytest.mark.parametrize("noise", [None, PerturbConfig(num_samples=8)], ids=["edits", "hybrid"])
def test_models_with_edits_are_measured_like_those_with_noise(folder, domain, noise):
    base, edits = base_of(folder), EditConfig(rate=0.3, num_samples=8)
    lm = edit(base, edits) if noise is None else wrap(base, noise, edits=edits)
    lm.eval().transform.requires_grad_(False)
    for parameter in lm.transform.parameters():
        parameter.zero_()  # edits remain
    measured = measure(lm, domain, **SETTINGS)
    whole = lm.score(**collate(domain.blocks[:]), num_samples=8, seed=5)
    torch.testing.assert_close(
        measured.nll_sums, summed_by_document(domain, -whole.log_marginal), rtol=1e-5, atol=1e-5
    )


def test_a_model_of_the_sequence_marginal_is_measured_by_the_token_marginal(folder, domain):
    by_token = measure(perturbed(folder), domain, **SETTINGS)
    lm = perturbed(folder, marginal="sequence")
    assert measure(lm, domain, **SETTINGS).nll_sums == by_token.nll_sums
    assert lm.config.marginal == "sequence"


def test_the_sequence_marginal_is_that_of_each_document_part_scored_alone(folder, domain):
    lm = perturbed(folder, marginal="sequence")
    measured = measure(lm, domain, **SETTINGS, marginal="sequence")
    sums, squares, ess, curves = [0.0] * domain.document_count, 0.0, [], []
    counts = [0] * domain.document_count
    for block, documents in zip(domain.blocks, domain.documents):
        for row in np.unique(block.rows[documents >= 0]):
            piece = block.rows == row
            ids, [document] = torch.from_numpy(block.tokens[piece])[None], set(documents[piece])
            if ids.shape[1] == 1:
                continue
            score = lm.score(ids, rows=torch.tensor([row]), num_samples=8, seed=5)
            sums[document] -= float(score.log_marginal)
            counts[document] += ids.shape[1] - 1
            squares += float(score.nll_standard_error * score.count) ** 2
            ess.append(float(score.ess))
            curves.append(score.curve.nll * score.count)
    torch.testing.assert_close(measured.nll_sums, sums, rtol=1e-5, atol=1e-4)
    assert measured.counts == counts
    assert measured.standard_error == pytest.approx(math.sqrt(squares) / sum(counts), rel=1e-4)
    assert measured.ess == pytest.approx(statistics.mean(ess), rel=1e-4)
    curve = (torch.stack(curves).sum(0) / sum(counts)).tolist()
    torch.testing.assert_close(measured.curve["nll"], curve, rtol=1e-5, atol=1e-5)
    assert measured.nll != pytest.approx(measure(lm, domain, **SETTINGS).nll, rel=1e-3)
    assert lm.config.marginal == "sequence"


def test_both_marginals_see_the_same_noise(folder, domain):
    lm, one = perturbed(folder, marginal="sequence"), SETTINGS | {"num_samples": 1}
    by_token, by_sequence = (
        measure(lm, domain, **one, marginal=marginal) for marginal in ("token", "sequence")
    )
    torch.testing.assert_close(by_sequence.nll_sums, by_token.nll_sums, rtol=1e-5, atol=1e-4)


def test_only_a_random_model_of_the_sequence_marginal_has_its_own(folder):
    lm = perturbed(folder, marginal="sequence")
    assert likelihood.has_own_marginal(lm)
    with lm.exact():
        assert not likelihood.has_own_marginal(lm)
    assert not likelihood.has_own_marginal(perturbed(folder))
    assert not likelihood.has_own_marginal(
        perturbed(folder, marginal="sequence", deterministic=True)
    )
    torch.nn.init.zeros_(lm.transform.U)
    assert not likelihood.has_own_marginal(lm)


def test_a_model_in_train_mode_is_measured_without_dropout_and_stays_in_train_mode(folder, domain):
    lm = wrap(base_of(folder, "dropout"), PerturbConfig(num_samples=8, latent_dim=4))
    expected = measure(lm.eval(), domain, **SETTINGS)
    lm.train()
    assert measure(lm, domain, **SETTINGS).nll_sums == expected.nll_sums
    assert lm.training and lm.base.training


def test_a_temperature_divides_the_logits_of_every_sample(folder, domain):
    lm, cooled = perturbed(folder), perturbed(folder)
    with torch.no_grad():
        cooled.base.model.norm.weight /= 1.7  # of which the logits are a multiple
    measured = measure(lm, domain, **SETTINGS, temperature=1.7)
    assert measured.temperature == 1.7
    expected = measure(cooled, domain, **SETTINGS)
    torch.testing.assert_close(measured.nll_sums, expected.nll_sums, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def sampled(model, count, length):
    """Sample sequences from a model."""
    torch.manual_seed(0)
    tokens = torch.randint(3, model.config.vocab_size, (count, 1))
    while tokens.shape[1] < length:
        drawn = torch.multinomial(model(tokens).logits[:, -1].softmax(-1), 1)
        tokens = torch.cat([tokens, drawn], dim=1)
    return tokens


def test_tuning_recovers_the_factor_of_scaled_logits(folder):
    lm = perturbed(folder, init_scale=0.05)
    own = whole_documents(sampled(lm.base, 40, 24))
    tune = {"num_samples": 4, "seed": 0, "batch_size": 40}
    with lm.exact():  # whose text it is
        assert likelihood.tuned_temperature(lm, own, **tune) == pytest.approx(1.0, abs=0.1)
    before = likelihood.tuned_temperature(lm, own, **tune)
    with torch.no_grad():
        lm.base.model.norm.weight *= 1.5
    assert likelihood.tuned_temperature(lm, own, **tune) == pytest.approx(1.5 * before, rel=0.01)


def test_the_tuned_temperature_is_better_than_its_neighbours(folder):
    lm = perturbed(folder)
    own = whole_documents(sampled(lm.base, 20, 16))
    tune = {"num_samples": 4, "seed": 0, "batch_size": 20}
    best = likelihood.tuned_temperature(lm, own, **tune)
    nll = {scale: measure(lm, own, **tune, temperature=best * scale).nll for scale in (0.9, 1, 1.1)}
    assert nll[1] < nll[0.9] and nll[1] < nll[1.1]


def test_a_unigram_predicts_by_counts_with_one_added(domain):
    counts = np.arange(63)
    measured = likelihood.unigram(domain, counts)
    expected = [0.0] * domain.document_count
    for block, documents in zip(domain.blocks, domain.documents):
        for label, document in zip(block.labels, documents):
            if label != IGNORED:
                expected[document] -= math.log((counts[label] + 1) / (counts.sum() + 63))
    assert measured.nll_sums == pytest.approx(expected)
    labelled = np.concatenate([block.labels for block in domain.blocks]) != IGNORED
    assert sum(measured.counts) == labelled.sum()


def test_a_unigram_of_the_texts_own_counts_has_the_entropy_of_its_tokens(domain):
    labels = np.concatenate([block.labels for block in domain.blocks])
    counts = likelihood.label_counts(domain.blocks, 63)
    assert counts.tolist() == [(labels == token).sum() for token in range(63)]
    shares = counts[counts > 0] / counts.sum()
    own = likelihood.unigram(domain, counts, smoothing=0.0)
    assert own.nll == pytest.approx(-(shares * np.log(shares)).sum())
    assert own.nll < likelihood.unigram(domain, counts).nll


def test_a_unigram_without_a_token_of_the_text_is_rejected(domain):
    with pytest.raises(ValueError, match="domain 'd' has tokens whose count is 0"):
        likelihood.unigram(domain, np.eye(1, 63, dtype=int)[0], smoothing=0.0)


def test_a_likelihood_survives_json(folder, domain):
    measured = measure(perturbed(folder), domain, **SETTINGS)
    kept = json.loads(json.dumps(measured.to_dict(), allow_nan=False))
    assert Likelihood.from_dict(kept) == measured
    assert kept["nll"] == measured.nll and kept["perplexity"] == measured.perplexity


def test_the_tiny_pretrained_model_has_the_loss_of_its_readme(data_dir, tmp_path):
    """Whole stories after a begin token; it never met the end token that documents have here."""
    base = data_dir / "models" / "stories260K-hf"
    text = (data_dir / "extra_tinystories" / "sample.txt").read_text(encoding="utf-8")
    stories = [{"text": story.strip()} for story in text.split("<|endoftext|>")]
    (tmp_path / "stories.json").write_text(json.dumps(stories))
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    read = domains.read("s", str(tmp_path / "stories.json"), DomainOptions(), tokenizer)
    whole = whole_documents([tokens[:-1] for tokens in read.tokens()])
    lm = wrap(transformers.AutoModelForCausalLM.from_pretrained(base), PerturbConfig())
    with lm.exact():
        measured = measure(lm, whole, num_samples=1, seed=0, batch_size=8)
    assert measured.nll == pytest.approx(1.266, abs=5e-4)
