"""The likelihood of a text, and the precision of the numbers: `python -m examples.score`.

Two errors that are easily confused: the Monte-Carlo error of a score, which more samples of the
latent reduce, and the standard errors of the transform's parameters, which more text reduces.
"""

from pathlib import Path

import tyro
from torch.utils.data import DataLoader

from examples import tiny
from fastperturb.diagnostics.score import Score
from fastperturb.diagnostics.standard_errors import StandardErrors


def main(
    *,
    model: str | None = None,
    text: Path | None = None,
    num_samples: int = 64,
    blocks: int = 64,
    batch_size: int = 8,
) -> tuple[Score, StandardErrors]:
    """Score the first blocks of a text, then the transform on them."""
    lm, tokenizer = tiny.perturbed_and_tokenizer(model)
    lm.eval()
    data = tiny.examples(tiny.text(text), tokenizer)[:blocks]

    (batch,) = DataLoader(data, batch_size=len(data))
    score = lm.score(**batch, num_samples=num_samples, seed=0)
    print(
        f"nll {score.nll:.4f} ± {score.nll_standard_error:.4f} a token, from {num_samples} samples"
    )
    with lm.exact():
        print(f"nll {lm.score(**batch).nll:.4f} on the exact text, without perturbation")
    print("samples  nll     jackknife (where the nll still falls, take more samples)")
    for count, nll, jackknife in zip(*score.curve, strict=True):
        print(f"{count:7d}  {nll:.4f}  {jackknife:.4f}")

    errors = lm.standard_errors(DataLoader(data, batch_size=batch_size), bread="outer", seed=0)
    print(f"standard errors of the transform, from {errors.examples} examples ({errors.bread}):")
    for name, parameter in lm.transform.named_parameters():
        size, error = (x.square().mean().sqrt() for x in (parameter, errors.errors[name]))
        print(f"  {name} {list(parameter.shape)}: {size:.3f} ± {error:.3f} (root mean squares)")
    print(f"largest Newton step: {errors.newton_step:.2g} standard errors (below 1 at a solution)")
    return score, errors


if __name__ == "__main__":
    tyro.cli(main)
