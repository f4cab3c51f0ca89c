"""Training and judging a run."""

import math

import pytest
import transformers

from fastperturb import PerturbConfig, wrap
from fastperturb.study import runner


def test_isotropic_noise_shifts_the_shortest_embeddings_most(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    lm = wrap(model, PerturbConfig(transform="diagonal", init_scale=0.3))
    scales = runner.token_scales(lm, tokenizer)
    lengths = model.get_input_embeddings().weight.detach().norm(dim=1)
    lengths_of_words = lengths[3:]  # the first three are special
    shortest = tokenizer.convert_ids_to_tokens((lengths_of_words.argsort() + 3).tolist())
    assert {name for name, _ in scales["most"]} & set(shortest[:14]) >= set(shortest[:8])
    assert {name for name, _ in scales["least"]} & set(shortest[-14:]) >= set(shortest[-8:])
    # E|z| of 32 gaussians is sqrt(32) (1 - 1/128).
    expected = 0.3 * lm.transform.embed_rms * math.sqrt(32) * (1 - 1 / 128) / lengths_of_words.min()
    assert scales["most"][0][1] == pytest.approx(expected.item(), rel=0.08)
    assert [scale for _, scale in scales["most"]] == sorted(
        (scale for _, scale in scales["most"]), reverse=True
    )
