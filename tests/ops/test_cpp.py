"""The C++ kernels draw the contract's noise and agree with the oracle."""

import itertools
from types import ModuleType
from typing import Any

import pytest
import torch
from philox_vectors import KNOWN_ANSWERS
from torch import Tensor

from fastperturb import noise
from fastperturb.config import LATENTS, PerturbConfig
from fastperturb.ops import dispatch, reference
from fastperturb.ops.calls import EmbedCall
from fastperturb.ops.cpp import build
from fastperturb.ops.cpp import embed as cpp_embed
from fastperturb.ops.torch import embed as torch_embed
from fastperturb.transforms import FAMILIES, Transform, make_transform

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    try:
        build.compiler_command()
    except RuntimeError as error:
        pytest.skip(str(error))
    assert build.prepare(), build.availability()


def words_of(counters: Tensor, seed: Tensor) -> Tensor:
    words = torch.empty_like(counters)
    torch.ops.fastperturb_cpp.philox(words, counters, seed)
    return words


def test_philox_words_are_those_of_the_published_test_vectors() -> None:
    for counter, (low, high), words in KNOWN_ANSWERS:
        seed = noise.seed_tensor(high << 32 | low, torch.device("cpu"))
        assert words_of(torch.tensor([counter]), seed).tolist() == [list(words)]


def test_philox_words_are_those_of_the_contract_bit_for_bit() -> None:
    counters = torch.randint(2**32, (100_003, 4))
    for seed in (0, 1, -5, 2**62 + 12345):
        key = torch.tensor([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF])
        assert torch.equal(words_of(counters, torch.tensor(seed)), noise.philox(counters, key))


@pytest.mark.parametrize("latent", LATENTS)
def test_latents_of_philox_words_are_those_of_the_contract(latent: str) -> None:
    edges = [0, 1, 2, 3, 255, 2**24, 2**30, 2**31 - 1, 2**31, 2**31 + 1, 3 * 2**30]
    edges += [2**32 - word for word in (1, 2, 3, 129, 2**20)]
    extreme = torch.cartesian_prod(torch.tensor(edges), torch.tensor(edges)).repeat(1, 2)
    words = torch.cat([torch.randint(2**32, (250_000, 4)), extreme])
    z = torch.empty(words.shape)
    torch.ops.fastperturb_cpp.latents(z, words, latent)
    expected = torch.stack(noise._DISTRIBUTIONS[latent](list(words.unbind(-1))), dim=-1)
    assert z.isfinite().all()
    assert (z - expected).abs().max() <= (4e-6 if latent == "gaussian" else 2e-7)


@pytest.mark.parametrize("scope", ["token", "sequence"])
@pytest.mark.parametrize("antithetic", [False, True])
def test_the_kernel_gives_each_element_the_latent_of_its_numbers(
    scope: str, antithetic: bool
) -> None:
    M, B, T, D = 4, 3, 5, 37
    transform = make_transform(PerturbConfig(transform="diagonal", scope=scope), D)
    numbers = {
        "samples": torch.tensor([[0, 7, 2**33 + 1], [1, 6, 2**33], [12, 2, 4], [13, 3, 5]]),
        "rows": torch.randint(2**40, (B, T)),
        "positions": torch.randint(2**40, (B, T)),
    }
    call = make_call(transform, None, torch.zeros(B, T, D), antithetic=antithetic, **numbers)
    call = call._replace(parameters=[torch.ones(D)])
    z = noise.latent(call.seed, (M, B, T, D), scope=scope, antithetic=antithetic, **numbers)
    assert (cpp_embed.perturb_embed(call, False).out - z).abs().max() <= 4e-6


def make_call(
    transform: Transform,
    ids: Tensor | None,
    table: Tensor,
    *,
    samples: int | Tensor = 4,
    rows: Tensor | None = None,
    positions: Tensor | None = None,
    antithetic: bool = False,
    strata: int = 1,
    mask: Tensor | None = None,
    mean: Tensor | None = None,
    std: float = 1.0,
) -> EmbedCall:
    shape = table.shape[:2] if ids is None else ids.shape
    numbers = noise.counters(
        samples,
        rows,
        positions,
        tuple(shape),
        antithetic=antithetic,
        strata=strata,
        device=table.device,
    )
    scale = None
    if transform.family == "context":
        scale = 2 * torch.rand(*shape, transform.latent_dim)
    return EmbedCall(
        ids,
        table,
        [value.detach() for value in transform.op_parameters()],
        transform.embed_rms,
        torch.tensor(2**40 + 17),
        *numbers,
        mask,
        mean,
        scale,
        transform.family,
        transform.latent,
        transform.scope,
        antithetic,
        strata,
        std,
    )


def random_transform(family: str, D: int, R: int, H: int, **options: Any) -> Transform:
    """Make a transform away from its start, where some gradients vanish."""
    config = PerturbConfig(transform=family, latent_dim=R, hidden_dim=H, **options)
    transform = make_transform(config, D, embed_rms=0.7)
    for parameter in transform.parameters():
        parameter.data = torch.randn_like(parameter) / 4
    return transform


def truth(call: EmbedCall, transform: Transform, grad: Tensor) -> list[Tensor]:
    """Return output, shifts and gradients in fp64, by autograd through the oracle."""
    table = call.table.double().requires_grad_()
    exact = transform.double()
    scale = None if call.latent_scale is None else call.latent_scale.double().requires_grad_()
    perturbed = reference.perturb_embed(
        table if call.ids is None else call.ids,
        None if call.ids is None else table,
        exact,
        call.seed,
        call.samples,
        rows=call.rows,
        positions=call.positions,
        antithetic=call.antithetic,
        strata=call.strata,
        latent_mean=call.latent_mean,
        latent_std=call.latent_std,
        latent_scale=scale,
        perturb_mask=call.mask,
    )
    names = [name for name in exact.parameter_names if name not in exact.context_parameters]
    parameters = [getattr(exact, name) for name in names]
    parameters += [] if scale is None else [scale]
    grads = torch.autograd.grad(perturbed, [table, *parameters], grad.double())
    transform.float()
    embeddings = table if call.ids is None else table[call.ids]
    return [perturbed.detach(), (perturbed - embeddings).norm(dim=-1).detach(), *grads]


def error(value: Tensor, exact: Tensor) -> float:
    assert value.shape == exact.shape
    assert value.isfinite().all()
    return ((value.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()


def check(call: EmbedCall, transform: Transform, grad: Tensor) -> None:
    """Check an error of at most twice torch's in the same dtype, plus an epsilon."""
    exact = truth(call, transform, grad)
    ours, theirs = (results(module, call, grad) for module in (cpp_embed, torch_embed))
    for value, other, right in zip(ours, theirs, exact, strict=True):
        assert value.dtype == other.dtype
        assert error(value, right) <= 2 * error(other, right) + 2e-6


def results(module: ModuleType, call: EmbedCall, grad: Tensor) -> list[Tensor]:
    """Return an implementation's output, shifts and gradients."""
    out, squared_shift, projected = module.perturb_embed(call, True)
    grads = module.perturb_embed_backward(grad, call, projected, True)
    return [out, squared_shift.sqrt(), *grads]


def run_case(
    family: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int, int, int],
    scope: str,
    latent: str,
    antithetic: bool,
    masked: bool,
    with_ids: bool,
) -> None:
    M, B, T, D, R, H = shape
    torch.manual_seed(0)
    transform = random_transform(family, D, R, H, scope=scope, latent=latent)
    ids = torch.randint(11, (B, T)) if with_ids else None
    table = torch.randn((11, D) if with_ids else (B, T, D)).to(dtype)
    mask = torch.rand(B, T) < 0.6 if masked else None
    call = make_call(transform, ids, table, samples=M, antithetic=antithetic, mask=mask)
    check(call, transform, torch.randn(M, B, T, D).to(dtype))


#         M  B  T   D   R  H   scope       latent        antithetic masked with_ids
CASES = [
    ((4, 2, 19, 75, 7, 21), "token", "gaussian", False, False, True),
    ((2, 3, 33, 64, 16, 64), "token", "uniform", True, True, True),
    ((3, 2, 1, 33, 1, 1), "sequence", "rademacher", False, False, False),
    ((1, 1, 70, 128, 4, 32), "token", "gaussian", False, True, False),
    ((18, 2, 5, 31, 9, 40), "sequence", "gaussian", True, True, True),
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "x".join(map(str, case[0])))
def test_output_and_gradients_are_the_oracles(family: str, dtype: torch.dtype, case: Any) -> None:
    run_case(family, dtype, *case)


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_output_and_gradients_are_the_oracles_over_the_whole_grid(
    family: str, dtype: torch.dtype
) -> None:
    shapes = [(4, 2, 19, 75, 7, 21), (2, 1, 130, 16, 3, 5), (10, 3, 2, 257, 33, 17)]
    flags = itertools.product(("token", "sequence"), LATENTS, *[(False, True)] * 3)
    for shape, (scope, latent, *options) in itertools.product(shapes, flags):
        run_case(family, dtype, shape, scope, latent, *options)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("scope", ["token", "sequence"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stratified_output_and_gradients_are_the_oracles(family: str, scope: str) -> None:
    M, B, T, D = 8, 2, 19, 37
    transform = random_transform(family, D, 7, 10, scope=scope)
    mask, grad = torch.rand(B, T) < 0.6, torch.randn(M, B, T, D)
    for strata in (2, 8):
        call = make_call(transform, None, torch.randn(B, T, D), samples=M, strata=strata, mask=mask)
        check(call, transform, grad)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("scope", ["token", "sequence"])
@pytest.mark.parametrize("family", FAMILIES)
def test_latents_with_a_mean_and_a_spread_give_the_oracles_results(family: str, scope: str) -> None:
    M, B, T, D = 4, 2, 9, 37
    transform = random_transform(family, D, 7, 10, scope=scope)
    R = transform.latent_dim
    grad, embeddings = torch.randn(M, B, T, D), torch.randn(B, T, D)
    means = [torch.randn(B, T, R), torch.randn(B, 1, R).expand(B, T, R), None]
    means.append(torch.randn(R, T, B).permute(2, 1, 0))
    for mean, strata in zip(means, (1, 4, 2, 1), strict=True):
        call = make_call(transform, None, embeddings, strata=strata, mean=mean, std=0.8)
        check(call, transform, grad)


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("strata", [2**k for k in range(1, 9)])
def test_stratified_latents_are_torchs_whatever_samples_are_drawn(strata: int, latent: str) -> None:
    """diagonal with s = 1 and rho = 1 on zero embeddings returns the latents themselves."""
    D, B, T = 21, 2, 3
    transform = random_transform("diagonal", D, D, 1, latent=latent)
    transform.s.data.fill_(1.0)
    transform.embed_rms.fill_(1.0)
    some = torch.tensor([[0, 5], [3, 3], [300, 4], [301, 2], [1, 2**33 + 1]])
    for samples in (strata, some):
        call = make_call(transform, None, torch.zeros(B, T, D), samples=samples, strata=strata)
        ours, theirs = (
            module.perturb_embed(call, False).out for module in (cpp_embed, torch_embed)
        )
        assert (ours - theirs).abs().max() < 4e-6
        assert torch.equal(ours.sign(), theirs.sign())


@pytest.mark.parametrize("family", FAMILIES)
def test_strided_tables_gradients_and_counters_change_nothing(family: str) -> None:
    M, B, T, D = 4, 2, 9, 40
    transform = random_transform(family, D, 6, 10)
    ids = torch.randint(11, (T, B)).T
    rows, positions = torch.arange(B)[:, None].expand(B, T), torch.arange(T).expand(B, T)
    mask = (torch.rand(T, B) < 0.7).T
    grad = torch.randn(B, T, M, D).permute(2, 0, 1, 3)
    tables = [torch.randn(11, 2 * D)[:, :D], torch.randn(D, 11).T, torch.randn(11, D)[::1]]
    grads = [grad, grad[..., :1].expand(M, B, T, D), torch.ones(()).expand(M, B, T, D)]
    for table, upstream in zip(tables, grads, strict=True):
        call = make_call(transform, ids, table, rows=rows, positions=positions, mask=mask)
        check(call, transform, upstream)
    embeddings = torch.randn(T, B, D).transpose(0, 1)
    check(make_call(transform, None, embeddings, mask=mask), transform, grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_output_too_big_for_the_cache_is_right(family: str) -> None:
    M, B, T, D = 8, 1, 300, 1024
    transform = random_transform(family, D, 5, 9)
    table, ids = torch.randn(20, D), torch.randint(20, (B, T))
    call = make_call(transform, ids, table, samples=M, mask=torch.rand(B, T) < 0.8)
    ours, theirs = (module.perturb_embed(call, True) for module in (cpp_embed, torch_embed))
    torch.testing.assert_close(ours.out, theirs.out, rtol=1e-5, atol=1e-5)
    # The shift may err by as much as all of its D elements together.
    shift, expected = ours.squared_shift.sqrt(), theirs.squared_shift.sqrt()
    torch.testing.assert_close(shift, expected, rtol=1e-5, atol=1e-5 * D**0.5)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [(0, 7), (2, 0)], ids=["rows", "positions"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_tokens_outputs_are_empty_and_gradients_zero(
    family: str, shape: tuple[int, int]
) -> None:
    transform = random_transform(family, 12, 3, 4)
    ids, table = torch.zeros(shape, dtype=torch.int64), torch.randn(5, 12)
    call, grad = make_call(transform, ids, table), torch.zeros(4, *shape, 12)
    out, squared_shift, projected = cpp_embed.perturb_embed(call, True)
    assert out.shape == grad.shape and squared_shift.shape == grad.shape[:3]
    grads = cpp_embed.perturb_embed_backward(grad, call, projected, True)
    scales = [] if call.latent_scale is None else [call.latent_scale]  # [B, T, R]
    for value, like in zip(grads, [table, *call.parameters, *scales], strict=True):
        assert torch.equal(value, torch.zeros_like(like))
    psi = cpp_embed.perturb_embed_per_sample_grad(grad, call)
    shapes = [(shape[0], *value.shape) for value in call.parameters]
    shapes += [scale.shape for scale in scales]
    for value, expected in zip(psi, shapes, strict=True):
        assert torch.equal(value, torch.zeros(4, *expected))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("family", FAMILIES)
def test_per_sample_gradients_are_those_of_each_sample_and_row_and_sum_to_the_gradient(
    family: str,
) -> None:
    M, B, T, D = 4, 3, 21, 50
    transform = random_transform(family, D, 6, 10)
    ids, table = torch.randint(11, (B, T)), torch.randn(11, D)
    mask = torch.rand(B, T) < 0.7
    call = make_call(transform, ids, table, antithetic=True, mask=mask)
    grad = torch.randn(M, B, T, D)
    psi = cpp_embed.perturb_embed_per_sample_grad(grad, call)
    expected = torch_embed.perturb_embed_per_sample_grad(grad, call)
    projected = cpp_embed.perturb_embed(call, False).projected
    _, *total = cpp_embed.perturb_embed_backward(grad, call, projected, False)
    for ours, theirs, summed in zip(psi, expected, total, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        parts = ours.flatten(0, ours.ndim - summed.ndim - 1)  # a scale has rows of its own
        torch.testing.assert_close(parts.sum(0), summed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits_come_out_every_time_and_for_any_number_of_threads(family: str) -> None:
    M, B, T, D = 4, 2, 200, 70
    transform = random_transform(family, D, 6, 10)
    ids, table = torch.randint(11, (B, T)), torch.randn(11, D)
    call, grad = make_call(transform, ids, table), torch.randn(M, B, T, D)

    def run() -> list[Tensor]:
        return results(cpp_embed, call, grad)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first, again = run(), run()
        torch.set_num_threads(3)
        threaded, threaded_again = run(), run()
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, first, again))
    assert all(map(torch.equal, threaded, threaded_again))
    if family not in ("gated", "mlp"):  # their projections are torch's GEMMs
        assert all(map(torch.equal, first, threaded))


@pytest.mark.parametrize("D", [70, 1024], ids=["ragged", "streamed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_has_the_same_bits_with_the_shift_and_without(
    family: str, dtype: torch.dtype, D: int
) -> None:
    B, T = 2, 300
    transform = random_transform(family, D, 6, 10)
    table, ids = torch.randn(20, D).to(dtype), torch.randint(20, (B, T))
    call = make_call(transform, ids, table, samples=8, mask=torch.rand(B, T) < 0.8)
    plain, measured = (cpp_embed.perturb_embed(call, want) for want in (False, True))
    assert plain.squared_shift is None
    assert torch.equal(plain.out, measured.out)


def test_fp64_runs_in_torch() -> None:
    run = dispatch.implementation("perturb_embed", torch.device("cpu"), torch.float64)
    assert run is torch_embed
