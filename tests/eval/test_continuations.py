"""Continuations: what is compared with what, and that writing is repeatable."""

import numpy as np
import pytest
import tiny_run
import torch
import transformers

from fastperturb import EditConfig, PerturbConfig, edit, wrap
from fastperturb.data import domains
from fastperturb.data.domains import DomainOptions
from fastperturb.eval.continuations import Mauve, Words, diversity, generate, prompts_of, rouge1

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


def test_prompts_and_truths_are_what_long_documents_begin_with(domain, prompts):
    long = [(n, each) for n, each in enumerate(domain.tokens()) if len(each) >= 12][:6]
    assert prompts.documents == [n for n, _ in long]
    for (_, document), prompt, truth in zip(long, prompts.tokens, prompts.truths):
        assert document[:12].tolist() == [*prompt, *truth]
        assert (len(prompt), len(truth)) == (5, 7)


def test_a_domain_without_long_documents_is_refused(domain):
    with pytest.raises(ValueError, match="'text' has no document of .* = 300 tokens to continue"):
        prompts_of(domain, documents=2, prompt_tokens=200, continuation_tokens=100)


def test_writing_depends_on_the_seed_alone(folder, prompts, tokenizer):
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
        lm.base.model.norm.weight *= 1e4  # logits so sharp that one draw leaves nothing to choose
    how = WRITE | {"mode": "sequence"}
    found = [generate(lm, prompts, tokenizer, **how | {"batch_size": size}) for size in (2, 6)]
    assert found[0] == found[1]
    assert generate(lm, prompts, tokenizer, **how | {"seed": 4}) != found[0]


def test_every_mode_writes_by_its_own_noise(folder, prompts, tokenizer):
    lm = perturbed(folder)
    modes = ("mixture", "sequence", "token")
    found = [generate(lm, prompts, tokenizer, **WRITE | {"mode": mode}) for mode in modes]
    assert found[0] != found[1] != found[2] != found[0]


def test_edited_models_write_too(folder, prompts, tokenizer):
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    lm = edit(base, EditConfig(rate=0.3, num_samples=4)).eval()
    assert len(generate(lm, prompts, tokenizer, **WRITE)) == 6


def plainly_sampled(base, prompts, tokenizer):
    """By transformers' own loop."""
    base.generation_config = transformers.GenerationConfig()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        found = []
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
            found += tokenizer.batch_decode(ids[:, 5:], skip_special_tokens=True)
    return found


def test_an_exact_model_samples_plainly_whatever_its_generation_config_prefers(
    folder, prompts, tokenizer
):
    still = perturbed(folder)
    torch.nn.init.zeros_(still.transform.U)
    still.base.generation_config.update(do_sample=True, top_k=1, temperature=0.2)
    found = generate(still, prompts, tokenizer, **WRITE)
    assert found == plainly_sampled(still.base, prompts, tokenizer)


def test_a_deterministic_model_writes_by_its_one_draw(folder, prompts, tokenizer):
    lm = perturbed(folder, deterministic=True)
    found = [generate(lm, prompts, tokenizer, **WRITE | {"num_samples": m}) for m in (2, 4)]
    assert found[0] == found[1]
    assert found[0] != generate(perturbed(folder), prompts, tokenizer, **WRITE)


def test_what_follows_the_end_of_a_text_does_not_count(folder, prompts, tokenizer):
    lm = perturbed(folder)
    with torch.no_grad():  # the end token, 2, becomes by far the likeliest
        row = torch.zeros_like(lm.base.model.norm.weight)
        row[0] = 50.0
        lm.base.model.embed_tokens.weight[2] = row
        lm.base.model.norm.weight.mul_(0).add_(1.0)
    written = generate(lm, prompts, tokenizer, **WRITE)
    assert all("</s>" not in each for each in written)
    assert min(len(each.split()) for each in written) < 7


def test_rouge_1_is_the_mean_overlap_in_words():
    found = rouge1(["a b x", "nothing"], ["a b c d", "in common"])
    # 2 of 3 and 2 of 4 words: F1 is 4/7; and none.
    assert found.estimate == pytest.approx((4 / 7 + 0) / 2)
    assert (found.low, found.high, found.documents) == (0.0, pytest.approx(4 / 7), 2)


def test_words_of_any_script_count():
    assert Words().tokenize("Über naïve Öl-Preise, 東京 x_1!") == [
        *("über", "naïve", "öl", "preise", "東京", "x_1"),
    ]
    assert rouge1(["добрый день"], ["Добрый вечер"]).estimate == pytest.approx(0.5)


def test_diversity_counts_different_grams_and_what_a_text_says_again():
    found = diversity(["a b a b a b", "a b"])
    assert found["distinct1"] == 2 / 8
    assert found["distinct2"] == 2 / 6  # ab ba ab ba ab, ab
    assert found["distinct3"] == 2 / 4  # aba bab aba bab
    assert found["repetition"] == pytest.approx(1 / 3)  # abab baba abab
    long = " ".join(map(str, range(50)))
    assert diversity([long, long])["repetition"] == 0.0  # of another text, not of its own


def test_texts_too_short_for_grams_have_no_diversity():
    assert diversity(["", "a"]) == {
        "distinct1": 1.0,
        "distinct2": None,
        "distinct3": None,
        "repetition": None,
    }


def test_features_are_the_last_hidden_state_at_the_last_token(folder, tokenizer):
    found = Mauve(folder / "base", device=torch.device("cpu")).features(["w1 w2 w3", "w4"])
    model = transformers.AutoModel.from_pretrained(folder / "base")
    with torch.no_grad():
        expected = [model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in ([4, 5, 6], [7])]
    np.testing.assert_allclose(found, torch.stack(expected).numpy(), rtol=1e-5, atol=1e-6)


def test_mauve_is_near_one_for_the_same_law_and_low_for_another(folder):
    pytest.importorskip("mauve", reason="mauve-text is an extra")
    mauve = Mauve(folder / "base", device=torch.device("cpu"))
    random = np.random.default_rng(0)
    one, again, other = random.normal(size=(3, 400, 8)).astype(np.float32)
    assert mauve.score(one, again, seed=1) > 0.9
    assert mauve.score(one, other + 5, seed=1) < 0.1
