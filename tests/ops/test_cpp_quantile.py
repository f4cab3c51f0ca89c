"""Stratified gaussians of the C++ kernels are the contract's, on every kind of CPU."""

import ctypes
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastperturb import noise
from fastperturb.config import GROUP_SIZES
from fastperturb.ops.cpp import build

SOURCES = Path(__file__).resolve().parents[2] / "csrc"
EXTREME_WORDS = (0, 1, 2, 3, 255, 2**20, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1)
# The gaussians of words in strata, for a multiple of 64.
DRAW = """
#include "latents.h"
using namespace fastperturb;

extern "C" __attribute__((visibility("default"))) void draw(
    const uint32_t* strata, const uint32_t* words, float* z, uint32_t degree, int64_t count) {
  for (int64_t start = 0; start < count; start += 4 * LANES) {
    Words place, word;
    Latents latents;
    for (int lane = 0; lane < 4; ++lane) {
      word[lane] = load_words(words + start + lane * LANES);
      place[lane] = load_words(strata + start + lane * LANES) << (32 - degree);
      place[lane] |= word[lane] >> degree;
    }
    to_stratified<Distribution::gaussian>(place, word, {1u << degree, degree}, latents);
    for (int lane = 0; lane < 4; ++lane) store(z + start + lane * LANES, latents[lane]);
  }
}
"""
# Flags for kinds of CPU, which differ in how they compute a quantile.
CPUS = {"this CPU": [], "without AVX-512": ["-mno-avx512f"], "without AVX2": ["-mno-avx2"]}

Draw = Callable[[Tensor, Tensor, int], Tensor]


@pytest.fixture(scope="module", params=CPUS)
def draw(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Draw:
    """Compile the kernels' gaussians for a kind of CPU: z of strata, words and the group's size."""
    if request.param != "this CPU" and platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("its compiler flags exist on x86 alone, and this CPU is another")
    folder = tmp_path_factory.mktemp("draw")
    source, library = folder / "draw.cpp", folder / "draw.so"
    source.write_text(DRAW)
    try:
        compiler = build.compiler_command()
    except RuntimeError as error:
        pytest.skip(f"this test compiles C++, and the machine has no compiler: {error}")
    flags = [*build._flags(), *CPUS[request.param], "-shared", "-I", str(SOURCES)]
    subprocess.run([*compiler, *flags, str(source), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).draw

    def run(strata: Tensor, words: Tensor, group_size: int) -> Tensor:
        count = len(words)
        assert count % 64 == 0
        inputs = [value.numpy().astype(np.uint32) for value in (strata, words)]
        z = np.empty(count, np.float32)
        pointers = [ctypes.c_void_p(value.ctypes.data) for value in (*inputs, z)]
        degree = group_size.bit_length() - 1
        function(*pointers, ctypes.c_uint32(degree), ctypes.c_int64(count))
        return torch.from_numpy(z)

    return run


def dense_points(group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return strata, words and the exact gaussians, in the order of their size |z|.

    All strata have the extreme words and random ones. The outer two have, in even steps of its
    logarithm, all distances from the end of (0, 1) as well.
    """
    last_stratum, last_word = group_size - 1, 2**32 - 1
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(2**32, (2**15 // group_size,), generator=generator)
    words = torch.cat([torch.tensor(EXTREME_WORDS), words])
    tail = torch.linspace(0, 32, 2**13, dtype=torch.float64).exp2().long() - 1
    stratum, word = torch.cartesian_prod(torch.arange(group_size), words).T
    stratum = torch.cat([stratum, torch.zeros_like(tail), torch.full_like(tail, last_stratum)])
    word = torch.cat([word, tail, last_word - tail])
    upper = stratum >= group_size // 2
    from_end = torch.where(upper, last_stratum - stratum, stratum)
    below = torch.where(upper, last_word - word, word)
    v = (from_end + (below.double() + 0.5) / 2**32) / group_size
    order = v.argsort()
    order = torch.cat([order, order[: -len(v) % 64]])
    exact = torch.special.ndtri(v) * torch.where(upper, -1, 1)
    return stratum[order], word[order], exact[order]


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_stratified_gaussians_are_quantiles_in_every_stratum_and_at_every_size(
    draw: Draw, group_size: int
) -> None:
    strata, words, exact = dense_points(group_size)
    z = draw(strata, words, group_size)
    # The contract allows 4e-6 between backends.
    assert (z - exact).abs().max() < 3e-6
    assert (z - noise._stratified_gaussian(strata, words, group_size)).abs().max() < 4e-6
    assert torch.equal(z.signbit(), exact.signbit())
    assert (z - exact)[exact.abs() < 1e-3].abs().max() < 2e-7


@pytest.mark.parametrize("group_size", [2, 8, 256])
def test_a_stratified_gaussian_is_the_same_bits_whatever_is_drawn_beside_it(
    draw: Draw, group_size: int
) -> None:
    strata, words, _ = dense_points(group_size)
    shuffled = torch.randperm(len(words), generator=torch.Generator().manual_seed(1))
    together = draw(strata[shuffled], words[shuffled], group_size)
    assert torch.equal(together, draw(strata, words, group_size)[shuffled])
