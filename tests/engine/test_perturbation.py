"""A new kind of perturbation is one class: every other part of the engine takes it as it is."""

from dataclasses import dataclass

import pytest
import tiny
import torch
from torch import nn

from fastperturb import EditConfig, EditedLM, PerturbConfig, PerturbedLM, edit, load, noise, wrap
from fastperturb.engine.architectures import embedding_rms
from fastperturb.engine.hybrid import HybridConfig
from fastperturb.engine.perturbations import PERTURBATIONS
from fastperturb.engine.protocol import Perturbation
from fastperturb.engine.trunk import TrunkInputs, repeated


@dataclass(frozen=True, kw_only=True)
class ScaleConfig(EditConfig):
    """Estimation as for edits; nothing else to configure."""


class RandomScale(Perturbation):
    """Sample m multiplies all embeddings of row b by 1 + s z[m, b], with a learned s."""

    config_class = ScaleConfig
    described_by = ()
    keeps_prefix = False

    def make_transform(self, parts, config):
        transform = nn.Module()
        transform.s = nn.Parameter(torch.tensor(0.3))
        rms, transform.embed_dim = embedding_rms(parts.embed)
        transform.register_buffer("embed_rms", rms)
        return transform

    def transform_shapes(self, config, embed_dim):
        return {"s": [], "embed_rms": []}

    def check_inputs(self, lm, input_ids, inputs_embeds):
        pass

    def trunk_inputs(self, lm, batch, samples):
        e, sampling = batch.embeddings, batch.sampling
        shape = (len(samples), len(e), 1, 1)
        z = noise.latent(sampling.seed, shape, samples=samples, rows=sampling.rows)
        scaled = e * (1 + lm.transform.s * z)
        mask, places = batch.attention_mask, batch.positions
        return TrunkInputs(scaled, repeated(mask, len(z)), repeated(places, len(z)))

    def next_logits(self, lm, model, sequences, seed, cache):
        e = model.get_input_embeddings()(sequences.ids)
        samples = sequences.samples.T
        shape = (len(samples), len(e), 1, 1)
        z = noise.latent(seed, shape, samples=samples, rows=sequences.rows)
        scaled = (e * (1 + lm.transform.s * z)).flatten(0, 1)
        return model(inputs_embeds=scaled).logits[:, -1]


def scaled_llama(**options):
    return PerturbedLM(tiny.llama(), ScaleConfig(num_samples=4, **options), RandomScale())


def naive_loss(lm, ids, seed):
    e, z = lm.base.get_input_embeddings()(ids), noise.latent(seed, (4, len(ids), 1, 1))
    log_probs = torch.stack(
        [
            lm.base(inputs_embeds=e * (1 + lm.transform.s * sample))
            .logits[:, :-1]
            .log_softmax(-1)
            .gather(-1, ids[:, 1:, None])[..., 0]
            for sample in z
        ]
    )
    return -(log_probs.logsumexp(0) - torch.tensor(4.0).log()).mean()


@pytest.fixture
def ids():
    torch.manual_seed(1)
    return torch.randint(3, 97, (2, 8))


@pytest.mark.parametrize("plan", ["batched", "chunked"])
def test_loss_gradient_and_shift_of_a_new_perturbation_are_those_of_the_naive_loop(plan, ids):
    lm = scaled_llama(plan=plan)
    out = lm(input_ids=ids, labels=ids, seed=5)
    loss, expected = out.loss, naive_loss(lm, ids, seed=5)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    z = noise.latent(5, (4, len(ids), 1, 1))
    torch.testing.assert_close(out.shift, (lm.transform.s * z).abs().mean().detach())
    (ours,) = torch.autograd.grad(loss, lm.transform.s)
    (naive,) = torch.autograd.grad(expected, lm.transform.s)
    torch.testing.assert_close(ours, naive, rtol=1e-4, atol=1e-6)


def test_a_new_perturbation_scores_and_decodes(ids):
    lm = scaled_llama().eval()
    score = lm.score(ids, num_samples=4, seed=5)
    assert score.nll.item() == pytest.approx(naive_loss(lm, ids, seed=5).item(), rel=1e-5)
    text = lm.generate(ids, mode="mixture", seed=5, do_sample=False, max_new_tokens=2)
    assert text.shape == (2, 10)
    z = noise.latent(5, (4, 2, 1, 1))
    e = lm.base.get_input_embeddings()(ids)
    probabilities = [
        lm.base(inputs_embeds=e * (1 + lm.transform.s * sample)).logits[:, -1].softmax(-1)
        for sample in z
    ]
    assert torch.equal(text[:, 8], torch.stack(probabilities).mean(0).argmax(-1))


def test_a_new_perturbation_in_the_table_is_saved_and_loaded(monkeypatch, tmp_path, ids):
    monkeypatch.setitem(PERTURBATIONS, "ScaleConfig", RandomScale())
    lm = scaled_llama().eval()
    with torch.no_grad():
        lm.transform.s.fill_(0.7)
    lm.save_pretrained(tmp_path)
    loaded = load(tiny.llama(), tmp_path)
    assert type(loaded.perturbation) is RandomScale and loaded.config == lm.config
    ours, expected = (model(input_ids=ids, labels=ids, seed=5).loss for model in (loaded, lm))
    assert torch.equal(ours, expected)


def test_perturbing_tokens_offers_no_perturbed_embeddings(ids):
    lm = scaled_llama()
    e = lm.base.get_input_embeddings()(ids)
    with pytest.raises(TypeError, match="RandomScale perturbs tokens, not embeddings"):
        lm.perturb(e, torch.tensor(5), torch.arange(2), rows=torch.arange(2))


def test_every_kind_in_the_table_is_found_by_the_name_of_its_config():
    assert set(PERTURBATIONS) == {"PerturbConfig", "EditConfig", "HybridConfig"}
    for name, kind in PERTURBATIONS.items():
        assert kind.config_class.__name__ == name
    shapes = PERTURBATIONS["PerturbConfig"].transform_shapes(PerturbConfig(latent_dim=3), 7)
    assert shapes == {"U": [3, 7], "embed_rms": []}
    hybrid = HybridConfig(latent_dim=3)
    shapes = PERTURBATIONS["HybridConfig"].transform_shapes(hybrid, 7)
    assert shapes == {"U": [3, 7], "embed_rms": [], "edits.embed_rms": []}


@pytest.mark.parametrize(
    ("kind", "make", "config"),
    [
        pytest.param(PerturbedLM, wrap, PerturbConfig(num_samples=2), id="continuous"),
        pytest.param(EditedLM, edit, EditConfig(num_samples=2, rate=0.5), id="edits"),
    ],
)
def test_class_called_with_a_config_makes_the_same_model_as_its_function(kind, make, config):
    ids = torch.arange(3, 13)[None]
    losses = []
    for make_model in (kind, make):
        torch.manual_seed(1)
        lm = make_model(tiny.llama(), config)
        assert type(lm) is kind
        losses.append(lm(ids, labels=ids, seed=0).loss)
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
