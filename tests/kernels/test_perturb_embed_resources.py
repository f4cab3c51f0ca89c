"""The compiled kernels of `perturb_embed`, for a model's real sizes and without a GPU."""

import argparse
import itertools
from pathlib import Path

import pytest
import torch

from bench import ahead_of_time
from fastperturb import noise
from fastperturb.config import SCOPES, TRANSFORMS, PerturbConfig
from fastperturb.kernels import perturb_embed
from fastperturb.ops.calls import EmbedCall
from fastperturb.transforms import make_transform

# These draw latents in registers, or (lowrank) to the buffer that the other families read too.
DRAWING = ("diagonal", "lowrank", "mlp")


def compiled(*options):
    return ahead_of_time.compiled(__file__, *options)


def check(rows, families=TRANSFORMS):
    assert {row["family"] for row in rows} == set(families)
    for row in rows:
        if row["kernel"] != "draw_kernel":  # it only writes
            assert row["wide_loads"] > 0, row
        if row["kernel"] != "diagonal_backward_kernel":  # it stores a row of s a program
            assert row["wide_stores"] > 0, row
        # Past H = 64 mlp's forward holds two blocks of C, too much memory for two of it on Ampere.
        ahead_of_time.assert_fits([row], warps_per_sm=8 if row["size"] == "16x64" else 4)


def test_no_kernel_spills_and_every_kernel_moves_16_bytes_at_once():
    rows = compiled("--dtype", "bfloat16", "--cc", "80", "90", "100")
    check(rows)
    products = {"forward_kernel", "outer_kernel", "through_C_kernel", "project_kernel"}
    rows = [row for row in rows if row["kernel"] in products]
    assert all("wgmma.mma_async" in row["mma"] for row in rows if row["cc"] == 90)
    assert all("tcgen05.mma" in row["mma"] for row in rows if row["cc"] == 100)


def test_the_widest_backwards_do_not_spill_for_few_or_many_latents_and_hidden_units():
    families = ("gated", "affine", "mlp")
    options = ["--families", *families, "--directions", "backward", "--sizes", "4x32", "64x128"]
    check(compiled(*options, "--dtype", "bfloat16", "--cc", "90"), families)


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--antithetic"], ["--scope", "sequence"]], ids=str)
def test_diagonal_does_not_spill_where_samples_or_tokens_share_their_latents(options):
    check(compiled("--families", "diagonal", "--cc", "80", "90", "100", *options), ["diagonal"])


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--strata", "8"], ["--strata", "256", "--mean"]], ids=str)
def test_no_kernel_spills_that_draws_stratified_latents_or_moves_them_to_a_mean(options):
    check(compiled("--families", *DRAWING, "--cc", "80", "90", "100", *options), DRAWING)


@pytest.mark.slow
@pytest.mark.parametrize("upstream", ["float32", "float16"])
def test_per_sample_gradients_compile_for_an_upstream_gradient_of_another_dtype(upstream):
    rows = compiled("--dtype", "bfloat16", "--upstream", upstream, "--directions", "per sample")
    check(rows)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_no_kernel_spills_with_the_embeddings_gradient_or_in_another_dtype(dtype):
    check(compiled("--dtype", dtype, "--want-table", "--cc", "80", "90", "100"))
    if dtype != "bfloat16":
        check(compiled("--dtype", dtype, "--cc", "80", "90", "100"))


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--want-table"]], ids=["frozen", "with the table"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_kernel_spills_for_any_number_of_latents_and_hidden_units(dtype, options):
    families = [family for family in TRANSFORMS if family != "diagonal"]  # it has neither
    sizes = ["--sizes", "8x16", "32x256", "128x128"]
    rows = compiled(
        "--families", *families, *sizes, "--dtype", dtype, "--cc", "80", "90", "100", *options
    )
    check(rows, families)


def call_of(family, dtype, *, M, B, T, D, R, H):
    """A call of these sizes with no memory behind it."""
    stand_in = R + H  # for D, and neither R nor H
    config = PerturbConfig(transform=family, latent_dim=R, hidden_dim=H)
    parameters = [
        torch.empty([D if n == stand_in else n for n in value.shape], device="meta")
        for value in make_transform(config, stand_in).op_parameters()
    ]
    numbers = noise.counters(M, None, None, (B, T), antithetic=False, device=torch.device("meta"))
    return EmbedCall(
        ids=torch.empty(B, T, dtype=torch.int64, device="meta"),
        table=torch.empty(32000, D, dtype=dtype, device="meta"),
        parameters=parameters,
        embed_rms=torch.empty((), device="meta"),
        seed=torch.empty((), dtype=torch.int64, device="meta"),
        samples=numbers[0],
        rows=numbers[1],
        positions=numbers[2],
        mask=torch.empty(B, T, dtype=torch.bool, device="meta"),
        latent_mean=None,
        latent_scale=torch.empty(B, T, R, device="meta") if family == "context" else None,
        family=family,
        latent="gaussian",
        scope="token",
        antithetic=False,
        strata=1,
        latent_std=1.0,
    )


def launches(call, want_table, cc, upstream=None, want_shift=True):
    """(direction, launch) of every kernel: forward, backward and, from `upstream`, per sample."""
    with ahead_of_time.recorded(cc) as forward:
        out, _, projected = perturb_embed.perturb_embed(call, want_shift)
    with ahead_of_time.recorded(cc) as backward:
        grad = torch.empty_like(out)
        perturb_embed.perturb_embed_backward(grad, call, projected, want_table)
    with ahead_of_time.recorded(cc) as per_sample:
        if upstream is not None:
            perturb_embed.perturb_embed_per_sample_grad(out.to(upstream), call)
    passes = {"forward": forward, "backward": backward, "per sample": per_sample}
    return [(direction, launched) for direction in passes for launched in passes[direction]]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", default=TRANSFORMS)
    parser.add_argument("--cc", nargs="+", type=int, default=[90])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--upstream", help="dtype of a per-sample gradient's upstream one")
    parser.add_argument("--want-table", action="store_true")
    parser.add_argument("--antithetic", action="store_true")
    parser.add_argument("--strata", type=int, default=1)
    parser.add_argument("--mean", action="store_true", help="latents with a mean of their own")
    parser.add_argument("--scope", default="token", choices=SCOPES)
    parser.add_argument("--directions", nargs="+", default=["forward", "backward"])
    parser.add_argument("--sizes", nargs="+", default=["16x64"], help="R x H")
    parser.add_argument("--dump", type=Path, help="folder for ttgir, ptx and cubin")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    for family, cc, size in itertools.product(options.families, options.cc, options.sizes):
        R, H = map(int, size.split("x"))
        call = call_of(family, dtype, M=8, B=8, T=1024, D=4096, R=R, H=H)
        call = call._replace(
            scope=options.scope, antithetic=options.antithetic, strata=options.strata
        )
        if options.mean:
            latent_dim = R if family != "diagonal" else 4096
            mean = torch.empty(*call.positions.shape, latent_dim, device="meta")
            call = call._replace(latent_mean=mean)
        upstream = getattr(torch, options.upstream) if options.upstream else None
        for direction, launched in launches(call, options.want_table, cc, upstream):
            if direction not in options.directions:
                continue
            tile = [launched.arguments.get(size) for size in ("BT", "BD", "BK", "BH")]
            about = {"family": family, "direction": direction, "size": size, "tile": tile}
            kernel = ahead_of_time.print_resources(launched, cc, **about)
            if options.dump:
                name = f"{family}-{direction}-{launched.kernel.fn.__name__}-{cc}-{size}"
                dump(kernel, options.dump, name)


def dump(kernel, folder, name):
    folder.mkdir(exist_ok=True, parents=True)
    for kind in ("ttgir", "ptx", "cubin"):
        data = kernel.asm[kind]
        (folder / f"{name}.{kind}").write_bytes(data if isinstance(data, bytes) else data.encode())


if __name__ == "__main__":
    main()
