"""Results on a CUDA device are those of the CPU. `make gpu` runs these tests."""

import json

import pytest
import tiny
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.memory import PLANS
from fastperturb import EditConfig, PerturbConfig, edit, noise, ops, wrap
from fastperturb.cli import doctor
from fastperturb.config import LATENTS, TRANSFORMS
from fastperturb.engine.trunk import TrunkInputs
from fastperturb.ops import reference
from fastperturb.transforms import make_transform

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("latent", LATENTS)
def test_noise_is_the_same_on_both_devices(latent):
    seed = torch.tensor(-9)
    on_cpu = noise.latent(seed, (4, 3, 33, 10), latent=latent)
    on_gpu = noise.latent(seed.cuda(), (4, 3, 33, 10), latent=latent).cpu()
    torch.testing.assert_close(on_gpu, on_cpu, rtol=0, atol=4e-6)


def test_philox_gives_the_same_bits_on_both_devices():
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
    ours, shift = ops.perturb_embed(ids, table, transform, 5, 4, return_shift=True)
    upstream = torch.randn_like(ours)
    results = [ours, shift, *torch.autograd.grad(ours, leaves, upstream)]
    exact = make_transform(config, 136).cuda().double()
    exact.load_state_dict(transform.state_dict())
    exact_table = table.detach().double().requires_grad_()
    value = reference.perturb_embed(ids, exact_table, exact, 5, 4)
    leaves = [exact_table, *exact.parameters()]
    distances = (value - exact_table[ids]).norm(dim=-1)
    expected = [value, distances, *torch.autograd.grad(value, leaves, upstream.double())]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for result, truth in zip(results, expected, strict=True):
        assert (result - truth).norm() <= tolerance * truth.norm()


@pytest.mark.parametrize("length", [1000, 4000])  # another kernel sums few tokens
def test_the_gradient_of_a_frequent_token_is_summed_in_fp32(length):
    transform = make_transform(PerturbConfig(latent_dim=6), 136).cuda()
    table = torch.randn(3, 136, device="cuda").bfloat16().requires_grad_()
    ids = torch.randint(3, (2, length), device="cuda")
    grad = torch.rand(2, 2, length, 136, device="cuda").bfloat16()
    out = ops.perturb_embed(ids, table, transform, 5, 2)
    first, again = (torch.autograd.grad(out, table, grad, retain_graph=True)[0] for _ in range(2))
    expected = torch.zeros(3, 136, dtype=torch.float64, device="cuda")
    expected.index_add_(0, ids.flatten(), grad.double().sum(0).flatten(0, 1))
    torch.testing.assert_close(first.double(), expected, rtol=8e-3, atol=0)
    assert torch.equal(first, again)


def test_positions_that_share_a_source_add_up_their_gradients_in_a_fixed_order():
    values = torch.randn(4, 2, 256, 48, device="cuda", requires_grad=True)
    source = torch.randint(256, (4, 2, 256), device="cuda")
    inputs = TrunkInputs(values, None, None, source)
    upstream = torch.randn_like(values)
    first, again = (
        torch.autograd.grad(inputs.at_source(values), values, upstream)[0] for _ in range(2)
    )
    expected = torch.zeros_like(values, dtype=torch.float64)
    expected.scatter_add_(2, source[..., None].expand_as(values), upstream.double())
    torch.testing.assert_close(first.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(first, again)


@pytest.mark.parametrize("size", [(40, 64, 300), (300, 1024, 32000)], ids=["small", "real"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_heads_match_the_oracle(dtype, frozen, size):
    tokens, dim, vocab = size
    hidden = torch.randn(3, tokens, dim, device="cuda").to(dtype)
    weight = (4 * torch.randn(vocab, dim, device="cuda") / dim**0.5).to(dtype)
    bias = torch.randn(vocab, device="cuda").to(dtype)
    target = torch.randint(vocab - 9, (tokens,), device="cuda")
    target[::5] = -100
    options = {"logit_scale": 0.9, "softcap": 20.0, "valid_vocab": vocab - 7}
    for op, oracle, inputs in (
        (ops.linear_logprob, reference.linear_logprob, hidden[0]),
        (ops.linear_quadratic, reference.linear_quadratic, hidden),
    ):
        leaves = [inputs.clone().requires_grad_()]
        leaves += [value.clone().requires_grad_(not frozen) for value in (weight, bias)]
        value = op(*leaves[:2], target, bias=leaves[2], **options)
        upstream = torch.randn_like(value)
        wanted = leaves[:1] if frozen else leaves
        results = [value, *torch.autograd.grad(value, wanted, upstream)]
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        exact_value = oracle(*exact[:2], target, bias=exact[2], **options)
        gradients = torch.autograd.grad(exact_value, exact[: len(wanted)], upstream.double())
        tolerance = 1e-4 if dtype == torch.float32 else 1e-2
        for result, truth in zip(results, [exact_value, *gradients], strict=True):
            assert (result - truth).norm() <= tolerance * truth.norm()


def test_under_autocast_the_heads_multiply_in_16_bits_and_return_fp32():
    hidden = torch.randn(64, 128, device="cuda", requires_grad=True)
    weight, target = torch.randn(500, 128, device="cuda"), torch.arange(64, device="cuda")
    rounded = hidden.bfloat16().float(), weight.bfloat16().float()
    expected = reference.linear_logprob(*rounded, target)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        value = ops.linear_logprob(hidden, weight, target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-3)
    value.sum().backward()
    assert hidden.grad.dtype == torch.float32 and torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("estimator", ["jensen", "iwae", "jvi_clip"])
@pytest.mark.parametrize("marginal", ["token", "sequence"])
def test_combine_is_the_same_on_both_devices(estimator, marginal):
    log_probs, mask = 3 * torch.randn(8, 5, 70) - 9, torch.rand(5, 70) < 0.8
    expected = ops.combine(log_probs.double(), mask, estimator, marginal=marginal)
    results = ops.combine(log_probs.cuda(), mask.cuda(), estimator, marginal=marginal)
    for result, truth in zip(results, expected, strict=True):
        torch.testing.assert_close(result.cpu().double(), truth, rtol=1e-4, atol=1e-5)


def test_an_out_of_range_target_gives_nan_and_no_error():
    hidden, weight = torch.randn(3, 8, device="cuda"), torch.randn(10, 8, device="cuda")
    value = ops.linear_logprob(hidden, weight, torch.tensor([1, 10, -100], device="cuda"))
    assert value.isnan().tolist() == [False, True, False]
    assert value[2] == 0


@pytest.mark.parametrize(
    ("plan", "chunk_size"), [("auto", None), ("batched", None), ("chunked", 3), ("resample", None)]
)
def test_a_wrapped_model_gives_the_loss_and_gradient_it_gives_on_the_cpu(plan, chunk_size):
    options = {"backward_samples": 2} if plan == "resample" else {"chunk_size": chunk_size}
    lm = wrap(tiny.llama().train(), PerturbConfig(plan=plan, **options))
    ids = torch.randint(97, (2, 12))
    on_cpu = lm(input_ids=ids, labels=ids, seed=5).loss
    expected = torch.autograd.grad(on_cpu, lm.transform.U)[0]
    lm = lm.cuda()
    on_gpu = lm(input_ids=ids.cuda(), labels=ids.cuda(), seed=5).loss
    gradient = torch.autograd.grad(on_gpu, lm.transform.U)[0].cpu()
    assert on_gpu.item() == pytest.approx(on_cpu.item(), rel=1e-4)
    assert (gradient - expected).norm() < 2e-3 * expected.norm()


STEPS = {
    "chunked": {"plan": "chunked", "chunk_size": 3},
    "resample": {"plan": "resample", "backward_samples": 3},
    "mlmc": {"estimator": "mlmc"},
    "quadratic": {"estimator": "quadratic"},
    "edits": {"rate": 0.5},
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS)
def test_a_step_gives_the_same_bits_again_and_may_be_told_to(options, strict):
    """`strict`: torch raises for what has no fixed order."""
    base = tiny.llama().train()
    kind = (edit, EditConfig) if "rate" in options else (wrap, PerturbConfig)
    lm = kind[0](base, kind[1](num_samples=4, **options)).cuda()
    ids = torch.randint(97, (2, 12)).cuda()
    results = []
    torch.use_deterministic_algorithms(strict)
    try:
        for _ in range(2):
            lm.zero_grad()
            with sdpa_kernel(SDPBackend.MATH):  # others are torch's, and have no fixed order
                loss = lm(input_ids=ids, labels=ids, seed=5).loss
                loss.backward()
            grads = [value.grad for value in lm.parameters() if value.grad is not None]
            results.append([loss.detach(), *grads])
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(results[0]) > 10
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("method", ["exact", "neftune", "fixed", "discrete", "learned"])
def test_a_training_run_gives_the_model_that_it_gives_on_the_cpu(method, tmp_path, monkeypatch):
    for package in ("datasets", "tyro", "matplotlib"):  # a GPU machine may have no network
        pytest.importorskip(package)
    import tiny_run

    from fastperturb import train

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    tiny_run.model_folder(tmp_path / "base")
    tiny_run.text_file(tmp_path / "train.txt")
    held_out = str(tiny_run.text_file(tmp_path / "held_out.txt", documents=6, seed=1))
    evaluations = []
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        changes = {"method": method, "device": device, "eval_data": (held_out,)}
        assert train.run(tiny_run.options(tmp_path, output_dir=folder, **changes)) == 0
        evaluations.append(json.loads((folder / "results.json").read_text())["evaluations"])
    for on_cpu, on_gpu in zip(*evaluations, strict=True):
        assert on_gpu["nll"] == pytest.approx(on_cpu["nll"], rel=1e-3)


@pytest.mark.parametrize("config", [PerturbConfig(), PerturbConfig(deterministic=True)])
def test_a_score_at_a_temperature_is_the_same_on_both_devices(config):
    lm = wrap(tiny.llama(), config).eval()
    ids = torch.randint(97, (2, 12))
    on_cpu, on_gpu = (
        lm.to(device).score(ids.to(device), num_samples=8, seed=3, temperature=1.4)
        for device in ("cpu", "cuda")
    )
    torch.testing.assert_close(on_gpu.log_marginal.cpu(), on_cpu.log_marginal, rtol=1e-3, atol=1e-3)


def test_an_evaluation_measures_what_it_measures_on_the_cpu(tmp_path, monkeypatch):
    for package in ("datasets", "matplotlib", "scipy", "tyro"):
        pytest.importorskip(package)
    import tiny_run

    from fastperturb.cli import main as cli

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    tiny_run.model_folder(tmp_path / "base")
    text = str(tiny_run.text_file(tmp_path / "text.txt"))
    other = str(tiny_run.text_file(tmp_path / "other.txt", seed=1))
    wrap(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), PerturbConfig()
    ).save_pretrained(tmp_path / "perturbed")
    measurements = []
    for device in ("cpu", "cuda"):
        flags = {
            "models": str(tmp_path / "perturbed"),
            "domains": text,
            "tune-on": other,
            "base": str(tmp_path / "base"),
            "block-size": "16",
            "device": device,
            "output-dir": str(tmp_path / device),
        }
        arguments = [text for name, value in flags.items() for text in (f"--{name}", value)]
        assert cli.main(["eval", *arguments]) == 0
        results = json.loads((tmp_path / device / "results.json").read_text())
        measurements.append(results["measurements"])
    for on_cpu, on_gpu in zip(*measurements, strict=True):
        assert on_gpu["temperature"] == pytest.approx(on_cpu["temperature"], rel=2e-2)
        for name, domain in on_gpu["domains"].items():
            assert domain["nll"] == pytest.approx(on_cpu["domains"][name]["nll"], rel=1e-3)


@pytest.mark.parametrize("perturbed", [False, True])
def test_logits_and_their_combinations_are_the_same_on_both_devices(perturbed):
    from fastperturb.rank import ModelOracle
    from fastperturb.rank.combine.streams import open_streams

    model = tiny.llama()
    if perturbed:
        model = wrap(model, PerturbConfig(latent_dim=4)).eval()
    histories, futures = [(5, 6, 7), (8, 9)], [(), (4,), (4, 5, 6)]
    weights, written = torch.randn(2, 2).numpy(), torch.tensor([[4, 5], [6, 7]])
    results = []
    for device in ("cpu", "cuda"):
        oracle = ModelOracle(model.to(device), prompt=(1,), num_samples=4)
        streams = open_streams(oracle, histories, weights, copies=2)
        log_probs, advanced = oracle.log_probs(histories, futures), streams.advance(written)
        results.append((log_probs.cpu(), advanced.cpu()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("plan", PLANS)
def test_attention_over_all_samples_takes_the_flash_kernel(plan):
    base = tiny.llama(hidden_size=128, head_dim=32).train()
    lm = wrap(base, PerturbConfig(plan=plan, **PLANS[plan])).cuda().bfloat16()
    ids = torch.randint(97, (2, 64), device="cuda")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # there is no other to fall back to
        lm(input_ids=ids, labels=ids).loss.backward()
    assert torch.isfinite(lm.transform.U.grad).all()


@pytest.mark.parametrize("plan", ["chunked", "resample"])
def test_memory_does_not_grow_with_the_samples(plan):
    sizes = {"hidden_size": 256, "head_dim": 64, "vocab_size": 32000}
    base = tiny.llama(**sizes, max_position_embeddings=256).train().cuda()
    ids = torch.randint(32000, (2, 256), device="cuda")
    peaks = []
    for samples in (4, 4, 64):  # the first also loads the kernels
        lm = wrap(base, PerturbConfig(num_samples=samples, plan=plan, **PLANS[plan]))
        lm.requires_grad_(False).transform.requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        lm(input_ids=ids, labels=ids).loss.backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[2] < 1.1 * peaks[1]


def test_packed_documents_under_flash_attention_2_give_what_sdpa_gives():
    pytest.importorskip("flash_attn")
    base = tiny.llama(hidden_size=64, num_attention_heads=2, head_dim=32).train()
    lm = wrap(base, PerturbConfig()).cuda()
    ids = torch.randint(97, (2, 9), device="cuda")
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 0, 1, 2, 3, 4]]).cuda()
    packed = {"input_ids": ids, "labels": ids, "position_ids": positions, "seed": 4}
    log_probs = {}
    for attention in ("sdpa", "flash_attention_2"):
        lm.base.set_attn_implementation(attention)
        with torch.autocast("cuda", torch.bfloat16):
            log_probs[attention] = lm(**packed).log_probs
    torch.testing.assert_close(*log_probs.values(), rtol=0.05, atol=0.05)


def test_the_doctor_reports_flash_attention():
    report = doctor.describe(torch.device("cuda", 0))
    assert "flash" in report["sdpa"]
