"""Dropout and other randomness of a model's own in train mode: found, named, or rejected."""

import pytest
import torch
from batches import batch
from tiny import CONFIGS, base_model, perturbed, with_lora
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from fastperturb.engine.architectures import dropout_sources

# peft 0.18 takes every model that can tie its head for one that does.
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")


def test_dropout_differs_between_samples_in_train_mode_and_is_off_in_eval_mode():
    unperturbed = {**batch(), "perturb_mask": torch.zeros(3, 9, dtype=torch.bool)}
    models = [base_model("GPT2", embd_pdrop=0.5), with_lora(base_model(), lora_dropout=0.5)]
    for model in models:
        lm = perturbed(model, num_samples=3).train()
        one, other, _ = lm(**unperturbed).log_probs
        assert (one != other).any()
        one, other, _ = lm.eval()(**unperturbed).log_probs
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("make", "sources"),
    [
        (lambda: base_model("GPT2", embd_pdrop=0.5), ["transformer.drop (p=0.5)"]),
        (
            lambda: base_model(attention_dropout=0.25, num_hidden_layers=1),
            ["model.layers.0.self_attn (attention_dropout=0.25)"],
        ),
        (
            lambda: base_model("Mixtral", router_jitter_noise=0.1, num_hidden_layers=1),
            ["model.layers.0.mlp (jitter_noise=0.1)"],
        ),
        (
            lambda: with_lora(base_model(num_hidden_layers=1), lora_dropout=0.05),
            [
                f"base_model.model.model.layers.0.self_attn.{name}.lora_dropout.default (p=0.05)"
                for name in ("q_proj", "v_proj")
            ],
        ),
        (base_model, []),
    ],
    ids=["embedding", "attention", "router", "lora", "none"],
)
def test_active_dropout_is_named_with_its_rate(make, sources):
    model = make().eval()
    assert dropout_sources(model) == []
    assert dropout_sources(model.train()) == sources
    assert [f"base.{source}" for source in sources] == dropout_sources(perturbed(model).train())


def test_dropout_rates_inside_an_adapter_are_found():
    peft = pytest.importorskip("peft", reason="LoHa needs peft")
    config = peft.LoHaConfig(target_modules=["q_proj"], module_dropout=0.3)
    sources = dropout_sources(peft.get_peft_model(base_model(), config).train())
    assert len(sources) == 2 and all("q_proj (module_dropout=0.3)" in source for source in sources)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_sources_are_named_exactly_where_two_passes_differ(architecture):
    """Set every rate of the configuration by itself."""
    config = base_model(architecture).config
    rates = [name for name in config.to_dict() if "drop" in name or "jitter" in name]
    assert rates
    for rate in [None, *rates]:
        model = base_model(architecture, **({rate: 0.5} if rate else {})).train()
        ids = batch()["input_ids"]
        one, other = model(ids).logits, model(ids).logits
        assert (one != other).any() == bool(dropout_sources(model)), rate


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_neftune_is_rejected_in_train_mode_only(lora):
    model = with_lora(base_model()) if lora else base_model()
    lm = perturbed(model)
    handle = activate_neftune(model, 5.0)
    lm(**batch())  # in eval mode it adds nothing
    with pytest.raises(ValueError, match="NEFTune is switched on for the input embedding of Llama"):
        lm.train()(**batch())
    deactivate_neftune(model, handle)
    lm(**batch())


def test_neftune_copied_into_an_adapter_is_rejected():
    model = base_model()
    activate_neftune(model, 5.0)
    with pytest.raises(ValueError, match="leave it unset"):
        perturbed(with_lora(model, modules_to_save=["embed_tokens"]).train())
