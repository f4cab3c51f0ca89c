"""The C++ kernels draw the contract's noise, agree with the oracle, and build when they can."""

import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastperturb import noise
from fastperturb.config import LATENTS, PerturbConfig
from fastperturb.ops import dispatch, reference
from fastperturb.ops.cpp import build
from fastperturb.ops.cpp import embed as cpp_embed
from fastperturb.ops.calls import EmbedCall
from fastperturb.ops.torch import embed as torch_embed
from fastperturb.transforms import FAMILIES, Transform, make_transform

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Counter, key and words published with Random123 (kat_vectors, philox4x32 10).
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    try:
        build._compiler()
    except RuntimeError as error:
        pytest.skip(str(error))
    assert build.prepare(), build.availability()


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory is NaN: what a kernel does not write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before)


def words_of(counters: Tensor, seed: int) -> Tensor:
    words = torch.empty_like(counters)
    torch.ops.fastperturb_cpp.philox(words, counters, torch.tensor(seed))
    return words


def test_words_are_the_known_answers() -> None:
    for counter, seed, words in KNOWN_ANSWERS:
        assert words_of(torch.tensor([counter]), seed).tolist() == [list(words)]


def test_words_are_the_contracts_bit_for_bit() -> None:
    counters = torch.randint(2**32, (100_003, 4))
    for seed in (0, 1, -5, 2**62 + 12345):
        key = torch.tensor([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF])
        assert torch.equal(words_of(counters, seed), noise.philox(counters, key))


@pytest.mark.parametrize("law", LATENTS)
def test_latents_of_words_are_the_contracts(law: str) -> None:
    edges = [0, 1, 2, 3, 255, 2**24, 2**30, 2**31 - 1, 2**31, 2**31 + 1, 3 * 2**30]
    edges += [2**32 - word for word in (1, 2, 3, 129, 2**20)]
    extreme = torch.cartesian_prod(torch.tensor(edges), torch.tensor(edges)).repeat(1, 2)
    words = torch.cat([torch.randint(2**32, (250_000, 4)), extreme])
    z = torch.empty(words.shape)
    torch.ops.fastperturb_cpp.latents(z, words, law)
    expected = torch.stack(noise._LAWS[law](list(words.unbind(-1))), dim=-1)
    assert z.isfinite().all()
    assert (z - expected).abs().max() <= (4e-6 if law == "gaussian" else 2e-7)


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
    assert (cpp_embed.perturb_embed(call) - z).abs().max() <= 4e-6


def make_call(
    transform: Transform,
    ids: Tensor | None,
    table: Tensor,
    *,
    samples: int | Tensor = 4,
    rows: Tensor | None = None,
    positions: Tensor | None = None,
    antithetic: bool = False,
    mask: Tensor | None = None,
) -> EmbedCall:
    shape = table.shape[:2] if ids is None else ids.shape
    numbers = noise.counters(
        samples, rows, positions, tuple(shape), antithetic=antithetic, device=table.device
    )
    return EmbedCall(
        ids,
        table,
        [value.detach() for value in transform.effective_parameters()],
        transform.embed_rms,
        torch.tensor(2**40 + 17),
        *numbers,
        mask,
        transform.family,
        transform.latent,
        transform.scope,
        antithetic,
    )


def random_transform(family: str, D: int, R: int, H: int, **options: Any) -> Transform:
    """Away from its start, where some gradients vanish."""
    config = PerturbConfig(transform=family, latent_dim=R, hidden_dim=H, **options)
    transform = make_transform(config, D, embed_rms=0.7)
    for parameter in transform.parameters():
        parameter.data = torch.randn_like(parameter) / 4
    return transform


def truth(call: EmbedCall, transform: Transform, grad: Tensor) -> list[Tensor]:
    """Output and gradients in fp64 by autograd through the oracle."""
    table = call.table.double().requires_grad_()
    exact = transform.double()
    moved = reference.perturb_embed(
        table if call.ids is None else call.ids,
        None if call.ids is None else table,
        exact,
        call.seed,
        call.samples,
        rows=call.rows,
        positions=call.positions,
        antithetic=call.antithetic,
        perturb_mask=call.mask,
    )
    parameters = [getattr(exact, name) for name in exact.parameter_names]
    grads = torch.autograd.grad(moved, [table, *parameters], grad.double())
    transform.float()
    return [moved.detach(), *grads]


def error(value: Tensor, exact: Tensor) -> float:
    assert value.shape == exact.shape
    assert value.isfinite().all()
    return ((value.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()


def check(call: EmbedCall, transform: Transform, grad: Tensor) -> None:
    """No more than twice the error of torch in the same dtype, plus an epsilon."""
    exact = truth(call, transform, grad)
    ours, theirs = (
        [module.perturb_embed(call), *module.perturb_embed_backward(grad, call, True)]
        for module in (cpp_embed, torch_embed)
    )
    for value, other, right in zip(ours, theirs, exact, strict=True):
        assert value.dtype == other.dtype
        assert error(value, right) <= 2 * error(other, right) + 2e-6


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
def test_an_output_too_big_for_the_cache_is_right_too(family: str) -> None:
    M, B, T, D = 8, 1, 300, 1024
    transform = random_transform(family, D, 5, 9)
    table, ids = torch.randn(20, D), torch.randint(20, (B, T))
    call = make_call(transform, ids, table, samples=M, mask=torch.rand(B, T) < 0.8)
    out, expected = cpp_embed.perturb_embed(call), torch_embed.perturb_embed(call)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [(0, 7), (2, 0)], ids=["rows", "positions"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_tokens_outputs_are_empty_and_gradients_zero(
    family: str, shape: tuple[int, int]
) -> None:
    transform = random_transform(family, 12, 3, 4)
    ids, table = torch.zeros(shape, dtype=torch.int64), torch.randn(5, 12)
    call, grad = make_call(transform, ids, table), torch.zeros(4, *shape, 12)
    assert cpp_embed.perturb_embed(call).shape == grad.shape
    grads = cpp_embed.perturb_embed_backward(grad, call, True)
    for value, like in zip(grads, [table, *call.parameters], strict=True):
        assert torch.equal(value, torch.zeros_like(like))
    psi = cpp_embed.perturb_embed_per_sample_grad(grad, call)
    for value, like in zip(psi, call.parameters, strict=True):
        assert torch.equal(value, torch.zeros(4, shape[0], *like.shape))


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
    each = torch_embed.perturb_embed_per_sample_grad(grad, call)
    _, *total = cpp_embed.perturb_embed_backward(grad, call, False)
    for ours, theirs, summed in zip(psi, each, total, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.sum((0, 1)), summed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits_come_out_every_time_and_for_any_number_of_threads(family: str) -> None:
    M, B, T, D = 4, 2, 200, 70
    transform = random_transform(family, D, 6, 10)
    ids, table = torch.randint(11, (B, T)), torch.randn(11, D)
    call, grad = make_call(transform, ids, table), torch.randn(M, B, T, D)

    def run() -> list[Tensor]:
        return [cpp_embed.perturb_embed(call), *cpp_embed.perturb_embed_backward(grad, call, True)]

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


def test_fp64_stays_with_torch() -> None:
    run = dispatch.implementation("perturb_embed", torch.device("cpu"), torch.float64)
    assert run is torch_embed


# Another process: what the kernels say of themselves, and whether they give torch's answer.
PROBE = """
import json, warnings, torch
from fastperturb import noise
from fastperturb.ops import dispatch
from fastperturb.ops.cpp import build
from fastperturb.ops.torch import embed as torch_embed
from fastperturb.ops.calls import EmbedCall
torch.set_num_threads(1)
before = build.availability()
numbers = noise.counters(2, None, None, (1, 3), antithetic=False, device=torch.device("cpu"))
call = EmbedCall(None, torch.randn(1, 3, 8), [torch.randn(2, 8)], torch.tensor(1.0),
                 torch.tensor(5), *numbers, None, "lowrank", "gaussian", "token", False)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(2):
        run = dispatch.implementation("perturb_embed", call.table.device, call.table.dtype)
    out = run.perturb_embed(call)
stand_in = torch_embed.perturb_embed(call)
print(json.dumps({
    "before": before,
    "after": build.availability(),
    "warnings": [str(each.message) for each in seen],
    "is_torchs": torch.equal(out, stand_in),
    "is_right": torch.allclose(out, stand_in, atol=1e-5),
}))
"""


def start(cache: Path, **environment: str) -> subprocess.Popen[str]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("CXX", "FASTPERTURB_EXT", "TORCH_EXTENSIONS_DIR")
    }
    chosen = {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", PROBE],
        env=inherited | chosen | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def report(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return json.loads(output)


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_two_processes_at_once_build_once_and_a_damaged_library_is_built_again(
    tmp_path: Path,
) -> None:
    log = tmp_path / "log"
    # Quick to compile, for it is only the building that matters here.
    compiler = script(tmp_path / "cxx", f'echo "$@" >> {log}\nexec c++ "$@" -O0')
    both = [start(tmp_path, CXX=compiler) for _ in range(2)]
    for found in map(report, both):
        assert found["before"] == [True, "not built yet: builds on first use"]
        assert found["after"] == [True, "built"]
        assert found["warnings"] == [] and found["is_right"]

    def links() -> int:
        return sum("-shared" in line for line in log.read_text().splitlines())

    assert links() == 1
    assert report(start(tmp_path, CXX=compiler))["before"] == [True, "built"]
    (library,) = tmp_path.glob("fastperturb/*.so")
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2])
    found = report(start(tmp_path, CXX=compiler))
    assert found["before"] == [True, "not built yet: builds on first use"]
    assert found["after"] == [True, "built"] and found["is_right"]
    assert links() == 2
    assert [file.suffix for file in sorted((tmp_path / "fastperturb").iterdir())] == [
        ".lock",
        ".so",
    ]


@pytest.mark.parametrize("how", ["CXX", "PATH"])
def test_without_a_compiler_torch_stands_in_with_one_warning(tmp_path: Path, how: str) -> None:
    missing = {how: "/nonexistent"}
    found = report(start(tmp_path, **missing))
    assert found["is_torchs"]
    (warning,) = found["warnings"]
    assert "no C++ compiler found" in warning
    assert found["before"][0] is found["after"][0] is False
    assert "no C++ compiler found" in found["before"][1]


def test_a_build_that_fails_leaves_torch_and_the_first_error(tmp_path: Path) -> None:
    compiler = script(
        tmp_path / "cxx",
        'case "$*" in *--version*) exit 0;; esac\necho "philox.h:1: error: too much noise"; exit 1',
    )
    found = report(start(tmp_path, CXX=compiler))
    assert found["is_torchs"]
    assert len(found["warnings"]) == 1
    assert found["after"] == [False, "build failed: philox.h:1: error: too much noise"]


def test_switched_off_the_kernels_are_neither_built_nor_missed(tmp_path: Path) -> None:
    found = report(start(tmp_path, FASTPERTURB_EXT="0"))
    assert found["is_torchs"] and found["warnings"] == []
    assert found["before"] == found["after"] == [False, "switched off by FASTPERTURB_EXT=0"]
    assert not (tmp_path / "fastperturb").exists()


def test_required_the_kernels_are_an_error_where_they_cannot_be(tmp_path: Path) -> None:
    process = start(tmp_path, FASTPERTURB_EXT="require", CXX="/nonexistent")
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "FASTPERTURB_EXT=require" in errors and "no C++ compiler found" in errors


def test_required_kernels_are_chosen_even_where_they_cannot_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "_load", functools.cache(lambda: "build failed: no space"))
    monkeypatch.setattr(build, "_warn", lambda failure: None)
    build._load()
    assert build.availability() == (False, "build failed: no space")
    assert not build.prepare()
    monkeypatch.setenv("FASTPERTURB_EXT", "require")
    assert build.availability() == (True, "build failed: no space")
    with pytest.raises(RuntimeError, match="build failed: no space"):
        build.prepare()


def test_a_wrong_switch_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPERTURB_EXT", "yes")
    with pytest.raises(ValueError, match=r"FASTPERTURB_EXT must be one of .*require.*'yes'"):
        build.availability()
