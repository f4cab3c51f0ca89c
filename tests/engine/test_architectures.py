"""Each architecture against a naive loop through its own forward; what is refused, and how."""

import math

import pytest
import torch
import transformers
from tiny import CONFIGS, LORA_TARGETS, SMALL, base_model, class_name, with_lora
from torch import nn
from torch.nn.utils import parametrize
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from fastperturb import PerturbConfig, noise, wrap
from fastperturb.engine.architectures import _HEADS, dropout_sources, understand

# peft 0.18 takes every model that can tie its head for one that does.
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")

IGNORED = -100


def batch():
    """One row whole, one padded on the right, one on the left; a gap in the labels."""
    torch.manual_seed(1)
    ids = torch.randint(3, 97, (3, 8))
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    mask[2, :2] = 0
    labels = ids.where(mask.bool(), IGNORED)
    labels[0, :3] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def perturbed(model, **options):
    torch.manual_seed(2)
    return wrap(model, PerturbConfig(num_samples=3, latent_dim=4, **options))


def naive_log_probs(lm, inputs, *, seed, num_samples):
    """Each sample's log-probs [M, B, T-1], one forward of the base model at a time."""
    ids, mask, labels = inputs.values()
    e, real = lm.base.get_input_embeddings()(ids), mask.bool()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    z = noise.latent(seed, (num_samples, *ids.shape, 4), positions=positions)
    logits = torch.stack(
        [
            lm.base(
                inputs_embeds=torch.where(real[..., None], lm.transform(e, sample), e),
                attention_mask=mask,
                position_ids=positions,  # as `generate` counts them
            ).logits
            for sample in z
        ]
    )
    kept = labels[:, 1:] != IGNORED
    index = labels[:, 1:].where(kept, 0).expand(num_samples, -1, -1)[..., None]
    log_probs = logits[:, :, :-1].log_softmax(-1).gather(-1, index)[..., 0]
    return log_probs.where(kept, 0.0), kept


def assert_is_the_naive_loop(lm):
    """The loss, each log-prob and the gradient of every trained parameter."""
    inputs = batch()
    out = lm(**inputs, seed=5)
    log_probs, kept = naive_log_probs(lm, inputs, seed=5, num_samples=3)
    loss = -(log_probs.logsumexp(0) - math.log(3))[kept].mean()
    torch.testing.assert_close(out.log_probs, log_probs, rtol=1e-4, atol=1e-4)
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    trained = {name: p for name, p in lm.named_parameters() if p.requires_grad}
    ours = torch.autograd.grad(out.loss, trained.values(), allow_unused=True)
    naive = torch.autograd.grad(loss, trained.values(), allow_unused=True)
    for name, mine, theirs in zip(trained, ours, naive, strict=True):
        assert (mine is None) == (theirs is None), name
        if theirs is not None:
            assert (mine - theirs).norm() <= 1e-3 * theirs.norm() + 1e-7, name
    used = {name for name, grad in zip(trained, naive) if grad is not None and grad.norm() > 0}
    assert "transform.U" in used
    return used


# --- what is supported ----------------------------------------------------------------------


def test_every_supported_architecture_is_tested():
    assert {class_name(architecture) for architecture in CONFIGS} == set(_HEADS)


@pytest.mark.parametrize("still", [False, True], ids=["", "prefix"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_padding_on_the_left_changes_nothing(architecture, still):
    lm = perturbed(base_model(architecture))
    ids = batch()["input_ids"][:2]
    alone = {"input_ids": ids, "labels": ids}
    if still:
        alone["perturb_mask"] = torch.tensor([[False] * 3 + [True] * 5] * 2)
    expected = lm(**alone, seed=5).log_probs
    padded = {**alone, "attention_mask": torch.ones_like(ids)}
    for name, value in padded.items():  # by 4 and by 1
        rows = [nn.functional.pad(row, (left, 4 - left)) for row, left in zip(value, (4, 1))]
        padded[name] = torch.stack(rows)
    ours = lm(**padded, seed=5).log_probs
    for row, left in enumerate((4, 1)):
        found = ours[:, row, left : left + 7]
        torch.testing.assert_close(found, expected[:, row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_without_noise_the_logits_are_the_models_own(architecture):
    lm = perturbed(base_model(architecture))
    inputs = batch()
    real = inputs["attention_mask"].bool()
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    expected = lm.base(**inputs, position_ids=positions)
    with lm.exact():
        exact = lm(**inputs, return_logits=True)
    still = lm(**inputs, return_logits=True, perturb_mask=torch.zeros_like(real))
    for out in (exact, still):
        log_probs = expected.logits.log_softmax(-1)
        torch.testing.assert_close(out.logits[real], log_probs[real], rtol=1e-4, atol=1e-4)
    assert exact.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_loss_and_lora_gradients_are_those_of_a_naive_loop(architecture):
    model = with_lora(base_model(architecture), architecture)
    used = assert_is_the_naive_loop(perturbed(model.train()))
    assert sum("lora_" in name for name in used) == 4 * len(
        LORA_TARGETS.get(architecture, ["q_proj", "v_proj"])
    )


@pytest.mark.parametrize("architecture", CONFIGS)
def test_loss_and_gradients_of_the_whole_model_are_those_of_a_naive_loop(architecture):
    lm = perturbed(base_model(architecture).train())
    used = assert_is_the_naive_loop(lm)
    tables = {id(lm.base.get_input_embeddings().weight), id(lm.base.get_output_embeddings().weight)}
    assert tables <= {id(p) for name, p in lm.named_parameters() if name in used}


@pytest.mark.parametrize("architecture", ["Cohere", "GPT2", "GPTNeoX", "Gemma3", "Llama", "Olmoe"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_tied_head_collects_the_gradients_of_both_its_uses(architecture, tied):
    model = base_model(architecture, tie_word_embeddings=tied).train()
    head, embed = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embed.weight) == tied
    assert_is_the_naive_loop(perturbed(model))


def test_the_quadratic_equation_sees_scaled_logits():
    """Its vocabulary-wide term goes through the head options too."""
    inputs = batch()
    for architecture in ("Cohere", "Granite", "Gemma3"):
        lm = perturbed(base_model(architecture), estimator="quadratic")
        out = lm(**inputs, perturb_mask=torch.zeros(3, 8, dtype=torch.bool))
        kept = inputs["labels"][:, 1:] != IGNORED
        p = lm.base(**inputs).logits[:, :-1].softmax(-1)
        hit = p.gather(-1, inputs["labels"][:, 1:].clamp_min(0)[..., None])[..., 0]
        brier = (2 * hit - p.square().sum(-1))[kept].mean()
        assert out.loss.item() == pytest.approx(-brier.item(), rel=1e-4)


def test_a_head_with_a_bias_is_supported():
    model = base_model()
    model.lm_head = nn.Linear(32, 97)
    assert "base.lm_head.bias" in assert_is_the_naive_loop(perturbed(model))


class RelabelledLlama(transformers.LlamaForCausalLM):
    """A subclass that leaves the forward alone is as well understood as its parent."""


def test_a_subclass_with_its_parents_forward_is_supported():
    assert_is_the_naive_loop(perturbed(RelabelledLlama(transformers.LlamaConfig(**SMALL))))


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
def test_adapters_off_the_linear_head_are_run_as_peft_runs_them(changes, trained):
    model = with_lora(base_model(), **changes)
    lm = perturbed(model)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if parameter.requires_grad and "transform" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    used = assert_is_the_naive_loop(lm)
    assert any(name.endswith(trained) for name in used)
    with model.disable_adapter(), lm.exact():
        plain = lm(**batch()).loss.item()
    assert plain == pytest.approx(base_model()(**batch()).loss.item(), rel=1e-5)


def test_the_hook_that_checkpointing_puts_on_a_frozen_embedding_is_no_noise():
    model = base_model()
    model.enable_input_require_grads()
    assert_is_the_naive_loop(perturbed(with_lora(model).train()))


def test_a_parametrized_embedding_is_used_as_it_computes_itself():
    model = base_model()
    parametrize.register_parametrization(model.model.embed_tokens, "weight", Doubled())
    used = assert_is_the_naive_loop(perturbed(model))
    assert "base.model.embed_tokens.parametrizations.weight.original" in used


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


# --- dropout and other noise in train mode --------------------------------------------------


def test_dropout_is_drawn_for_each_copy_in_train_mode_and_off_in_eval_mode():
    still = torch.zeros(3, 8, dtype=torch.bool)
    models = [base_model("GPT2", embd_pdrop=0.5), with_lora(base_model(), lora_dropout=0.5)]
    for model in models:
        lm = perturbed(model).train()
        one, other, _ = lm(**batch(), perturb_mask=still).log_probs
        assert (one != other).any()
        one, other, _ = lm.eval()(**batch(), perturb_mask=still).log_probs
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
def test_active_dropout_is_named(make, sources):
    model = make().eval()
    assert dropout_sources(model) == []
    assert dropout_sources(model.train()) == sources
    assert [f"base.{source}" for source in sources] == dropout_sources(perturbed(model).train())


def test_rates_that_an_adapter_keeps_by_name_are_seen():
    peft = pytest.importorskip("peft", reason="LoHa needs peft")
    config = peft.LoHaConfig(target_modules=["q_proj"], module_dropout=0.3)
    found = dropout_sources(peft.get_peft_model(base_model(), config).train())
    assert len(found) == 2 and all("q_proj (module_dropout=0.3)" in source for source in found)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_what_makes_a_pass_random_is_never_missed(architecture):
    """Every rate of the configuration alone: two passes differ exactly where sources are named."""
    config = base_model(architecture).config
    rates = [name for name in config.to_dict() if "drop" in name or "jitter" in name]
    assert rates
    for rate in [None, *rates]:
        model = base_model(architecture, **({rate: 0.5} if rate else {})).train()
        ids = batch()["input_ids"]
        one, other = model(ids).logits, model(ids).logits
        assert (one != other).any() == bool(dropout_sources(model)), rate


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_neftune_is_refused_in_train_mode_only(lora):
    model = with_lora(base_model()) if lora else base_model()
    lm = perturbed(model)
    handle = activate_neftune(model, 5.0)
    lm(**batch())  # in eval mode it adds nothing
    with pytest.raises(ValueError, match="NEFTune is switched on for the input embedding of Llama"):
        lm.train()(**batch())
    deactivate_neftune(model, handle)
    lm(**batch())


def test_neftune_copied_into_an_adapter_is_refused():
    model = base_model()
    activate_neftune(model, 5.0)
    with pytest.raises(ValueError, match="leave it unset"):
        perturbed(with_lora(model, modules_to_save=["embed_tokens"]).train())


# --- what is refused ------------------------------------------------------------------------


class RetouchedLlama(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Linear4bit(nn.Linear):
    """Stands in for bitsandbytes' layers, which are subclasses too."""


class PackedWeight(torch.Tensor):
    """Stands in for torchao's weights: a floating dtype outside, something else inside."""


def with_head(head):
    model = base_model()
    model.lm_head = head
    return model


def head_with_weight(weight):
    head = nn.Linear(32, 97, bias=False)
    head.weight = nn.Parameter(weight, requires_grad=False)
    return with_head(head)


def embedding_with_weight(weight):
    model = base_model()
    model.model.embed_tokens.weight = nn.Parameter(weight, requires_grad=False)
    return model


def hooked(find, register="register_forward_hook"):
    model = base_model()
    getattr(find(model), register)(lambda *args: None)
    return model


def parametrized_head():
    model = base_model()
    parametrize.register_parametrization(model.lm_head, "weight", Doubled())
    return model


def changed_instance():
    model = base_model()
    model.forward = lambda *args, **kwargs: None
    return model


def head_with_a_forward():
    model = base_model()
    model.lm_head.forward = lambda hidden: hidden
    return model


def with_adapter(make_config, **options):
    peft = pytest.importorskip("peft", reason="PEFT tests need peft")
    return peft.get_peft_model(base_model(), make_config(peft), **options)


def adalora(peft):
    return peft.AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=4, target_r=2, total_step=10, target_modules=["q_proj"]
    )


REFUSED = {
    "opt": (
        lambda: transformers.OPTForCausalLM(
            transformers.OPTConfig(
                vocab_size=97, hidden_size=32, num_attention_heads=4, num_hidden_layers=1
            )
        ),
        "model OPTForCausalLM is not supported.*LlamaForCausalLM",
    ),
    "classifier": (
        lambda: transformers.LlamaForSequenceClassification(
            transformers.LlamaConfig(**SMALL, num_labels=2)
        ),
        "model LlamaForSequenceClassification is not supported",
    ),
    "trunk": (lambda: base_model().model, "model LlamaModel is not supported"),
    "no lm": (lambda: nn.Linear(3, 3), "model Linear is not supported"),
    "compiled": (
        lambda: torch.compile(base_model()),
        "OptimizedModule holds a LlamaForCausalLM: wrap that one, then compile or distribute",
    ),
    "parallel": (lambda: nn.DataParallel(base_model()), "DataParallel holds a LlamaForCausalLM"),
    "overridden": (
        lambda: RetouchedLlama(transformers.LlamaConfig(**SMALL)),
        "RetouchedLlama overrides the forward of LlamaForCausalLM",
    ),
    "changed instance": (changed_instance, "LlamaForCausalLM overrides the forward.*Liger"),
    "hooked model": (
        lambda: hooked(lambda model: model),
        "model LlamaForCausalLM carries hooks .*hook or shard the wrapper",
    ),
    "router loss": (
        lambda: base_model("Mixtral", output_router_logits=True),
        "MixtralForCausalLM has config.output_router_logits=True.*set it to False",
    ),
    "bidirectional": (
        lambda: base_model("Gemma3", use_bidirectional_attention=True),
        "Gemma3ForCausalLM is configured to attend to later tokens",
    ),
    "not causal": (lambda: base_model(is_causal=False), "is configured to attend to later tokens"),
    "prompt tuning": (
        lambda: with_adapter(
            lambda peft: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        ),
        "PROMPT_TUNING adds virtual tokens",
    ),
    "adalora": (lambda: with_adapter(adalora), "PEFT type ADALORA adds to .*the loss"),
    "alora": (
        lambda: with_adapter(
            lambda peft: peft.LoraConfig(
                task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5]
            )
        ),
        "PEFT type LORA looks for alora_invocation_tokens",
    ),
    "mixed adapters": (
        lambda: with_adapter(lambda peft: peft.LoraConfig(target_modules=["q_proj"]), mixed=True),
        "PeftMixedModel is not supported; wrap a PeftModel",
    ),
    "lora head": (
        lambda: with_lora(base_model(), target_modules=["lm_head"]),
        r"LM head of LlamaForCausalLM is a peft\..*Linear.*modules_to_save=\['lm_head'\]",
    ),
    "hooked head": (
        lambda: hooked(lambda model: model.lm_head),
        "LM head of LlamaForCausalLM carries hooks .*remove them",
    ),
    "head with a pre-hook": (
        lambda: hooked(lambda model: model.lm_head, "register_forward_pre_hook"),
        "LM head of LlamaForCausalLM carries hooks",
    ),
    "head with a backward hook": (
        lambda: hooked(lambda model: model.lm_head, "register_full_backward_hook"),
        "LM head of LlamaForCausalLM carries hooks",
    ),
    "hooked copy of the head": (
        lambda: hooked(
            lambda model: with_lora(model, modules_to_save=["lm_head"]).base_model.model.lm_head
        ),
        "LM head of LlamaForCausalLM carries hooks",
    ),
    "head with a forward": (head_with_a_forward, "LM head .* carries hooks or a forward"),
    "parametrized head": (
        parametrized_head,
        "LM head .*ParametrizedLinear, not a plain .*remove_parametrizations makes it one",
    ),
    "4-bit head": (
        lambda: with_head(Linear4bit(32, 97)),
        "LM head .*Linear4bit, not a plain .*llm_int8_skip_modules",
    ),
    "int8 head": (
        lambda: head_with_weight(torch.zeros(97, 32, dtype=torch.int8)),
        r"LM head .* weight of Parameter torch.int8 \[97, 32\].*keep quantisation off the head",
    ),
    "float8 head": (
        lambda: head_with_weight(torch.zeros(97, 32, dtype=torch.float8_e4m3fn)),
        "LM head .* weight of Parameter torch.float8_e4m3fn",
    ),
    "packed head": (
        lambda: head_with_weight(torch.zeros(97, 32).as_subclass(PackedWeight)),
        "LM head .* weight of PackedWeight torch.float32",
    ),
    "int8 embedding": (
        lambda: embedding_with_weight(torch.zeros(97, 32, dtype=torch.int8)),
        "input embedding of LlamaForCausalLM .*torch.int8.*keep quantisation off it",
    ),
    "packed embedding": (
        lambda: embedding_with_weight(torch.zeros(97, 32).as_subclass(PackedWeight)),
        "input embedding of LlamaForCausalLM .*PackedWeight",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_a_model_that_is_not_understood_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        wrap(make(), PerturbConfig())


def test_a_forward_patched_into_its_class_is_refused(monkeypatch):
    model = base_model()
    monkeypatch.setattr(type(model), "forward", lambda self, **inputs: None)
    with pytest.raises(ValueError, match="LlamaForCausalLM overrides the forward"):
        understand(model)


def test_an_offloaded_model_is_refused():
    accelerate = pytest.importorskip("accelerate", reason="dispatching needs accelerate")
    model = accelerate.cpu_offload(base_model(), execution_device="cpu")
    with pytest.raises(ValueError, match="carries hooks .*device_map.*load it on one device"):
        understand(model)


def test_what_is_changed_after_wrapping_is_refused_by_the_next_forward():
    lm = perturbed(base_model())
    lm(**batch())
    lm.base.lm_head.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="carries hooks"):
        lm(**batch())


# --- quantised and sharded bases ------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_trunk_under_lora_is_that_of_a_naive_loop(bits):
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
    assert_is_the_naive_loop(perturbed(with_lora(model)))


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")
def test_a_sharded_wrapper_is_supported(one_rank):
    from torch.distributed.fsdp import fully_shard

    plain, sharded = (perturbed(base_model(), plan="batched") for _ in range(2))
    for layer in sharded.base.model.layers:
        fully_shard(layer, mesh=one_rank)
    fully_shard(sharded, mesh=one_rank)
    out, expected = sharded(**batch(), seed=5), plain(**batch(), seed=5)
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    out.loss.backward()
    expected.loss.backward()
    for name, parameter in sharded.named_parameters():
        grad = parameter.grad.full_tensor()
        torch.testing.assert_close(grad, plain.get_parameter(name).grad, msg=name)


def test_a_base_sharded_in_place_of_its_wrapper_is_refused(one_rank):
    from torch.distributed.fsdp import fully_shard

    model = with_lora(base_model())
    fully_shard(model, mesh=one_rank)
    with pytest.raises(ValueError, match="carries hooks .*FSDP.*shard the wrapper"):
        understand(model)


def test_a_head_sharded_by_itself_is_refused(one_rank):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    model = base_model()
    fully_shard(model.lm_head, mesh=one_rank)
    with pytest.raises(ValueError, match="FSDPLinear.* make no unit of the head"):
        understand(model)
    model = base_model()
    model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.data, one_rank))
    with pytest.raises(ValueError, match="weight sharded by itself .*shard the wrapper"):
        understand(model)
