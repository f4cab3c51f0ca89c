"""Each supported architecture and adapter against a naive loop through the model's own forward."""

import math

import pytest
import torch
import transformers
from batches import batch, labelled, positions_of
from oracles import assert_same_gradients, label_log_probs, sample_logits
from tiny import CONFIGS, LORA_TARGETS, SMALL, Doubled, base_model, class_name, perturbed, with_lora
from torch import nn
from torch.nn.utils import parametrize

from fastperturb.engine.architectures import _HEADS

# peft 0.18 takes every model that can tie its head for one that does.
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")


def padded_both_ways():
    """One row whole, one padded on the right, one on the left; a gap in the labels."""
    return batch(length=8, left=2, unlabelled=3)


def few_samples(model, **options):
    return perturbed(model, num_samples=3, latent_dim=4, **options)


def assert_matches_naive_loop(lm):
    """Compare the loss, each log-prob and the gradient of every trained parameter.

    Return the names of the parameters that have a gradient.
    """
    inputs = padded_both_ways()
    out = lm(**inputs, seed=5)
    logits = sample_logits(lm, inputs, seed=5, num_samples=3)
    log_probs, kept = label_log_probs(logits, inputs["labels"])
    loss = -(log_probs.logsumexp(0) - math.log(3))[kept].mean()
    torch.testing.assert_close(out.log_probs, log_probs, rtol=1e-4, atol=1e-4)
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    trained = {name: p for name, p in lm.named_parameters() if p.requires_grad}
    ours = torch.autograd.grad(out.loss, trained.values(), allow_unused=True)
    naive = torch.autograd.grad(loss, trained.values(), allow_unused=True)
    assert_same_gradients(ours, naive, rel=1e-3, floor=1e-7, names=trained)
    used = {name for name, grad in zip(trained, naive) if grad is not None and grad.norm() > 0}
    assert "transform.U" in used
    return used


def test_every_supported_architecture_is_tested():
    assert {class_name(architecture) for architecture in CONFIGS} == set(_HEADS)


@pytest.mark.parametrize("unperturbed_prefix", [False, True], ids=["", "prefix"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_left_padding_changes_no_log_prob(architecture, unperturbed_prefix):
    lm = few_samples(base_model(architecture))
    ids = padded_both_ways()["input_ids"][:2]
    alone = {"input_ids": ids, "labels": ids}
    if unperturbed_prefix:
        alone["perturb_mask"] = torch.tensor([[False] * 3 + [True] * 5] * 2)
    expected = lm(**alone, seed=5).log_probs
    padded = {**alone, "attention_mask": torch.ones_like(ids)}
    for name, value in padded.items():  # by 4 and by 1
        rows = [nn.functional.pad(row, (left, 4 - left)) for row, left in zip(value, (4, 1))]
        padded[name] = torch.stack(rows)
    ours = lm(**padded, seed=5).log_probs
    for row, left in enumerate((4, 1)):
        real = ours[:, row, left : left + 7]
        torch.testing.assert_close(real, expected[:, row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_unperturbed_logits_are_those_of_the_base_model(architecture):
    lm = few_samples(base_model(architecture))
    inputs = padded_both_ways()
    real = inputs["attention_mask"].bool()
    expected = lm.base(**inputs, position_ids=positions_of(inputs["attention_mask"]))
    with lm.exact():
        exact = lm(**inputs, return_logits=True)
    unperturbed = lm(**inputs, return_logits=True, perturb_mask=torch.zeros_like(real))
    for out in (exact, unperturbed):
        log_probs = expected.logits.log_softmax(-1)
        torch.testing.assert_close(out.logits[real], log_probs[real], rtol=1e-4, atol=1e-4)
    assert exact.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_loss_and_lora_gradients_match_a_naive_loop(architecture):
    model = with_lora(base_model(architecture), architecture)
    used = assert_matches_naive_loop(few_samples(model.train()))
    assert sum("lora_" in name for name in used) == 4 * len(
        LORA_TARGETS.get(architecture, ["q_proj", "v_proj"])
    )


@pytest.mark.parametrize("architecture", CONFIGS)
def test_loss_and_full_gradients_match_a_naive_loop(architecture):
    lm = few_samples(base_model(architecture).train())
    used = assert_matches_naive_loop(lm)
    tables = {id(lm.base.get_input_embeddings().weight), id(lm.base.get_output_embeddings().weight)}
    assert tables <= {id(p) for name, p in lm.named_parameters() if name in used}


@pytest.mark.parametrize("architecture", ["Cohere", "GPT2", "GPTNeoX", "Gemma3", "Llama", "Olmoe"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_tied_and_untied_heads_match_a_naive_loop(architecture, tied):
    model = base_model(architecture, tie_word_embeddings=tied).train()
    head, embed = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embed.weight) == tied
    assert_matches_naive_loop(few_samples(model))


def test_quadratic_estimator_sees_scaled_logits():
    """The vocabulary-wide term goes through the head options too."""
    inputs = padded_both_ways()
    for architecture in ("Cohere", "Granite", "Gemma3"):
        lm = few_samples(base_model(architecture), estimator="quadratic")
        out = lm(**inputs, perturb_mask=torch.zeros(3, 8, dtype=torch.bool))
        p = lm.base(**inputs).logits[:, :-1].softmax(-1)
        hit = p.gather(-1, inputs["labels"][:, 1:].clamp_min(0)[..., None])[..., 0]
        brier = (2 * hit - p.square().sum(-1))[labelled(inputs)].mean()
        assert out.loss.item() == pytest.approx(-brier.item(), rel=1e-4)


def test_head_with_a_bias_is_supported():
    model = base_model()
    model.lm_head = nn.Linear(32, 97)
    assert "base.lm_head.bias" in assert_matches_naive_loop(few_samples(model))


class SubclassedLlama(transformers.LlamaForCausalLM):
    """A subclass that leaves the forward alone."""


def test_subclass_that_keeps_the_forward_is_supported():
    assert_matches_naive_loop(few_samples(SubclassedLlama(transformers.LlamaConfig(**SMALL))))


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        ({"modules_to_save": ["lm_head"]}, "lm_head.modules_to_save.default.weight"),
        ({"modules_to_save": ["embed_tokens"]}, "embed_tokens.modules_to_save.default.weight"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens.lora_embedding_A.default"),
        ({"trainable_token_indices": [14, 50]}, "trainable_tokens_delta.default"),
        ({"use_dora": True}, "q_proj.lora_magnitude_vector.default.weight"),
    ],
    ids=["head copy", "embedding copy", "embedding", "some tokens", "dora"],
)
def test_adapters_and_copied_modules_run_as_in_peft(changes, trained):
    model = with_lora(base_model(), **changes)
    lm = few_samples(model)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if parameter.requires_grad and "transform" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    used = assert_matches_naive_loop(lm)
    assert any(name.endswith(trained) for name in used)
    with model.disable_adapter(), lm.exact():
        plain = lm(**padded_both_ways()).loss.item()
    assert plain == pytest.approx(base_model()(**padded_both_ways()).loss.item(), rel=1e-5)


def test_input_gradient_hook_of_checkpointing_is_supported():
    model = base_model()
    model.enable_input_require_grads()
    assert_matches_naive_loop(few_samples(with_lora(model).train()))


def test_parametrized_embedding_is_supported():
    model = base_model()
    parametrize.register_parametrization(model.model.embed_tokens, "weight", Doubled())
    used = assert_matches_naive_loop(few_samples(model))
    assert "base.model.embed_tokens.parametrizations.weight.original" in used


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_trunk_under_lora_matches_a_naive_loop(bits):
    bnb = pytest.importorskip("bitsandbytes", reason="quantised layers need bitsandbytes")
    model = base_model()
    for layer in model.model.layers:
        for name, linear in list(layer.self_attn.named_children()):
            if bits == 4:
                packed = bnb.nn.Linear4bit(*linear.weight.T.shape, bias=False)
            else:
                # With a threshold, outliers are looked for over the batch: rows see each other.
                options = {"has_fp16_weights": False, "threshold": 0.0}
                packed = bnb.nn.Linear8bitLt(*linear.weight.T.shape, bias=False, **options)
            packed.load_state_dict(linear.state_dict())
            setattr(layer.self_attn, name, packed)
    model.to("cpu")  # packs the weights
    assert not model.model.layers[0].self_attn.q_proj.weight.is_floating_point()
    assert_matches_naive_loop(few_samples(with_lora(model)))


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")
def test_sharded_wrapper_has_the_gradients_of_a_plain_one(one_process_mesh):
    from torch.distributed.fsdp import fully_shard

    plain, sharded = (few_samples(base_model(), plan="batched") for _ in range(2))
    for layer in sharded.base.model.layers:
        fully_shard(layer, mesh=one_process_mesh)
    fully_shard(sharded, mesh=one_process_mesh)
    out, expected = (
        sharded(**padded_both_ways(), seed=5),
        plain(**padded_both_ways(), seed=5),
    )
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    out.loss.backward()
    expected.loss.backward()
    for name, parameter in sharded.named_parameters():
        grad = parameter.grad.full_tensor()
        torch.testing.assert_close(grad, plain.get_parameter(name).grad, msg=name)
