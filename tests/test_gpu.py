"""On a CUDA device everything is what it is on the CPU. Run by `make gpu`."""

import pytest
import torch
import transformers

from fastperturb import PerturbConfig, noise, ops, wrap
from fastperturb.config import LATENTS, TRANSFORMS
from fastperturb.ops import reference
from fastperturb.transforms import make_transform

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("latent", LATENTS)
def test_noise_is_the_same_on_both_devices(latent):
    seed = torch.tensor(-9)
    on_cpu = noise.latent(seed, (4, 3, 33, 10), latent=latent)
    on_gpu = noise.latent(seed.cuda(), (4, 3, 33, 10), latent=latent).cpu()
    torch.testing.assert_close(on_gpu, on_cpu, rtol=0, atol=4e-6)


def test_philox_words_are_the_same_bits_on_both_devices():
    counter, key = torch.randint(2**32, (1000, 4)), torch.randint(2**32, (1000, 2))
    on_gpu = noise.philox(counter.cuda(), key.cuda()).cpu()
    assert torch.equal(on_gpu, noise.philox(counter, key))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", TRANSFORMS)
def test_perturb_embed_matches_the_oracle(family, dtype):
    torch.manual_seed(0)
    config = PerturbConfig(transform=family, latent_dim=6, hidden_dim=20)
    transform = make_transform(config, 136).cuda()
    with torch.no_grad():
        for value in transform.parameters():
            value += 0.1 * torch.randn_like(value)
    table = torch.randn(50, 136, device="cuda").to(dtype).requires_grad_()
    ids = torch.randint(50, (3, 21), device="cuda")
    leaves = [table, *transform.parameters()]
    ours = ops.perturb_embed(ids, table, transform, 5, 4)
    upstream = torch.randn_like(ours)
    results = [ours, *torch.autograd.grad(ours, leaves, upstream)]
    exact = make_transform(config, 136).cuda().double()
    exact.load_state_dict(transform.state_dict())
    exact_table = table.detach().double().requires_grad_()
    right = reference.perturb_embed(ids, exact_table, exact, 5, 4)
    leaves = [exact_table, *exact.parameters()]
    expected = [right, *torch.autograd.grad(right, leaves, upstream.double())]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for got, want in zip(results, expected, strict=True):
        assert (got - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_heads_match_the_oracle(dtype):
    hidden = torch.randn(3, 40, 64, device="cuda").to(dtype)
    weight = torch.randn(300, 64, device="cuda").to(dtype)
    target = torch.randint(300, (40,), device="cuda")
    target[::5] = -100
    for ours, right, inputs in (
        (ops.linear_logprob, reference.linear_logprob, hidden[0]),
        (ops.linear_quadratic, reference.linear_quadratic, hidden),
    ):
        leaves = [inputs.clone().requires_grad_(), weight.clone().requires_grad_()]
        value = ours(*leaves, target)
        upstream = torch.randn_like(value)
        results = [value, *torch.autograd.grad(value, leaves, upstream)]
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        truth = right(*exact, target)
        expected = [truth, *torch.autograd.grad(truth, exact, upstream.double())]
        tolerance = 1e-4 if dtype == torch.float32 else 1e-2
        for got, want in zip(results, expected, strict=True):
            assert (got - want).norm() <= tolerance * want.norm()


def test_an_out_of_range_target_is_nan_and_stops_nobody():
    hidden, weight = torch.randn(3, 8, device="cuda"), torch.randn(10, 8, device="cuda")
    value = ops.linear_logprob(hidden, weight, torch.tensor([1, 10, -100], device="cuda"))
    assert value.isnan().tolist() == [False, True, False]
    assert value[2] == 0


def test_a_wrapped_model_gives_the_loss_and_gradient_it_gives_on_the_cpu():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
    )
    lm = wrap(transformers.LlamaForCausalLM(config), PerturbConfig())
    ids = torch.randint(97, (2, 12))
    on_cpu = lm(input_ids=ids, labels=ids, seed=5).loss
    expected = torch.autograd.grad(on_cpu, lm.transform.U)[0]
    lm = lm.cuda()
    on_gpu = lm(input_ids=ids.cuda(), labels=ids.cuda(), seed=5).loss
    gradient = torch.autograd.grad(on_gpu, lm.transform.U)[0].cpu()
    assert on_gpu.item() == pytest.approx(on_cpu.item(), rel=1e-4)
    assert (gradient - expected).norm() < 2e-3 * expected.norm()
