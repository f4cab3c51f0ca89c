"""Continuations: their prompts and truths, their sampling, and how they are compared."""

import numpy as np
import pytest
import tiny_run
import torch
import transformers

from fastperturb import EditConfig, PerturbConfig, edit, wrap
from fastperturb.data import domains
from fastperturb.data.domains import DomainOptions
from fastperturb.eval.continuations import (
    Mauve,
    WordTokenizer,
    diversity,
    generate,
    prompts_of,
    rouge1,
)

WRITE = {"mode": "mixture", "num_samples": 4, "seed": 3, "batch_size": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("continuations")
    tiny_run.model_folder(folder / "base")
    tiny_run.text_file(folder / "text.txt", documents=12)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder / "base")


@pytest.fixture(scope="module")
def domain(folder, tokenizer):
    options = DomainOptions(block_size=8, document_separator="\n\n")
    return domains.read("text", str(folder / "text.txt"), options, tokenizer)


@pytest.fixture
def prompts(domain):
    return prompts_of(domain, documents=6, prompt_tokens=5, continuation_tokens=7)


def perturbed(folder, **changes):
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    options = {"num_samples": 4, "latent_dim": 4, "init_scale": 0.5}
    return wrap(base, PerturbConfig(**options | changes)).eval()


def test_prompts_and_truths_are_the_beginnings_of_long_documents(domain, prompts):
    numbered = enumerate(domain.tokens())
    long = [(n, tokens) for n, tokens in numbered if len(tokens) >= 12][:6]
    assert prompts.documents == [n for n, _ in long]
    for (_, document), prompt, truth in zip(long, prompts.tokens, prompts.truths):
        assert document[:12].tolist() == [*prompt, *truth]
        assert (len(prompt), len(truth)) == (5, 7)


def test_a_domain_without_long_documents_is_rejected(domain):
    with pytest.raises(ValueError, match="'text' has no document of .* = 300 tokens to continue"):
        prompts_of(domain, documents=2, prompt_tokens=200, continuation_tokens=100)


def test_continuations_depend_on_the_seed_and_on_no_other_generator(folder, prompts, tokenizer):
    lm = perturbed(folder)
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    first = generate(lm, prompts, tokenizer, **WRITE)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(12)
    assert generate(lm, prompts, tokenizer, **WRITE) == first
    assert generate(lm, prompts, tokenizer, **WRITE | {"seed": 4}) != first
    assert len(first) == 6


def test_the_noise_of_a_document_does_not_depend_on_its_batch(folder, prompts, tokenizer):
    lm = perturbed(folder)
    with torch.no_grad():
        lm.base.model.norm.weight *= 1e4  # logits so sharp that a sample leaves no choice
    settings = WRITE | {"mode": "sequence"}
    written = [
        generate(lm, prompts, tokenizer, **settings | {"batch_size": size}) for size in (2, 6)
    ]
    assert written[0] == written[1]
    assert generate(lm, prompts, tokenizer, **settings | {"seed": 4}) != written[0]


def test_every_mode_writes_another_continuation(folder, prompts, tokenizer):
    lm = perturbed(folder)
    modes = ("mixture", "sequence", "token")
    written = [generate(lm, prompts, tokenizer, **WRITE | {"mode": mode}) for mode in modes]
    assert written[0] != written[1] != written[2] != written[0]


def test_models_with_edits_write_continuations(folder, prompts, tokenizer):
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    lm = edit(base, EditConfig(rate=0.3, num_samples=4)).eval()
    assert len(generate(lm, prompts, tokenizer, **WRITE)) == 6


def plainly_sampled(base, prompts, tokenizer):
    """By transformers' own loop."""
    base.generation_config = transformers.GenerationConfig()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        written = []
        for first in (0, 4):
            tokens = torch.from_numpy(prompts.tokens[first : first + 4])
            ids = base.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=True,
                top_k=0,
                max_new_tokens=7,
                eos_token_id=2,
                pad_token_id=2,
            )
            written += tokenizer.batch_decode(ids[:, 5:], skip_special_tokens=True)
    return written


def test_an_exact_model_samples_plainly_whatever_its_generation_config_says(
    folder, prompts, tokenizer
):
    exact = perturbed(folder)
    torch.nn.init.zeros_(exact.transform.U)
    exact.base.generation_config.update(do_sample=True, top_k=1, temperature=0.2)
    written = generate(exact, prompts, tokenizer, **WRITE)
    assert written == plainly_sampled(exact.base, prompts, tokenizer)


def test_a_deterministic_model_ignores_the_number_of_samples(folder, prompts, tokenizer):
    lm = perturbed(folder, deterministic=True)
    written = [generate(lm, prompts, tokenizer, **WRITE | {"num_samples": m}) for m in (2, 4)]
    assert written[0] == written[1]
    assert written[0] != generate(perturbed(folder), prompts, tokenizer, **WRITE)


def test_tokens_after_the_end_of_a_text_are_dropped(folder, prompts, tokenizer):
    lm = perturbed(folder)
    with torch.no_grad():  # the end token, 2, becomes by far the likeliest
        row = torch.zeros_like(lm.base.model.norm.weight)
        row[0] = 50.0
        lm.base.model.embed_tokens.weight[2] = row
        lm.base.model.norm.weight.mul_(0).add_(1.0)
    written = generate(lm, prompts, tokenizer, **WRITE)
    assert all("</s>" not in text for text in written)
    assert min(len(text.split()) for text in written) < 7


def test_rouge_1_is_the_mean_overlap_in_words():
    overlap = rouge1(["a b x", "nothing"], ["a b c d", "in common"])
    # 2 of 3 and 2 of 4 words: F1 is 4/7; and none.
    assert overlap.estimate == pytest.approx((4 / 7 + 0) / 2)
    assert (overlap.low, overlap.high, overlap.documents) == (0.0, pytest.approx(4 / 7), 2)


def test_words_may_be_of_any_script():
    assert WordTokenizer().tokenize("Über naïve Öl-Preise, 東京 x_1!") == [
        *("über", "naïve", "öl", "preise", "東京", "x_1"),
    ]
    assert rouge1(["добрый день"], ["Добрый вечер"]).estimate == pytest.approx(0.5)


def test_diversity_counts_different_n_grams_and_repeated_ones():
    shares = diversity(["a b a b a b", "a b"])
    assert shares["distinct1"] == 2 / 8
    assert shares["distinct2"] == 2 / 6  # ab ba ab ba ab, ab
    assert shares["distinct3"] == 2 / 4  # aba bab aba bab
    assert shares["repetition"] == pytest.approx(1 / 3)  # abab baba abab
    long = " ".join(map(str, range(50)))
    assert diversity([long, long])["repetition"] == 0.0  # repeated in another text, not within one


def test_texts_too_short_for_grams_have_no_diversity():
    assert diversity(["", "a"]) == {
        "distinct1": 1.0,
        "distinct2": None,
        "distinct3": None,
        "repetition": None,
    }


def test_features_are_the_last_hidden_state_at_the_last_token(folder, tokenizer):
    features = Mauve(folder / "base", device=torch.device("cpu")).features(["w1 w2 w3", "w4"])
    model = transformers.AutoModel.from_pretrained(folder / "base")
    with torch.no_grad():
        expected = [model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in ([4, 5, 6], [7])]
    np.testing.assert_allclose(features, torch.stack(expected).numpy(), rtol=1e-5, atol=1e-6)


def test_mauve_is_near_one_for_the_same_distribution_and_low_for_another(folder):
    pytest.importorskip("mauve", reason="mauve-text is an extra")
    mauve = Mauve(folder / "base", device=torch.device("cpu"))
    random = np.random.default_rng(0)
    one, again, other = random.normal(size=(3, 400, 8)).astype(np.float32)
    assert mauve.score(one, again, seed=1) > 0.9
    assert mauve.score(one, other + 5, seed=1) < 0.1
