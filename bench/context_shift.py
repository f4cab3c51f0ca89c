"""`python -m bench.context_shift MODEL TEXT`: where a trained context transform moves most.

MODEL is a folder that training wrote, as that of a study's run; TEXT has a JSON line a document.
A token's shift is sqrt(E_z |T(e, z) - e|^2) over the embeddings' root length, from its scale s:
sqrt(sum_r s_r^2 |U_r|^2 / D). Written are results.json and two pictures: that, and what each
family can express.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastperturb
from fastperturb import PerturbConfig, noise, ops, runs
from fastperturb.config import TRANSFORMS
from fastperturb.report.figures import BLUE, FAINT, GREEN, INK, VERMILION, plain, title
from fastperturb.transforms import Context, make_transform

LENGTH = 256  # of a document, in tokens
# A token or a pair that is rarer says little.
COMMON, COMMON_PAIR = 30, 8
SHOWN = 8


@torch.no_grad()
def shifts(transform: Context, embed: Any, documents: Sequence[Tensor]) -> list[Tensor]:
    """Return each document's shifts [T]."""
    (U,) = transform.op_parameters()
    of_latents = U.square().sum(1) / transform.embed_dim
    scales = (ops.context_scale(transform, embed(ids[None]))[0] for ids in documents)
    return [(scale.square() @ of_latents).sqrt() for scale in scales]


def measured(
    transform: Context, tokenizer: Any, embed: Any, texts: Sequence[str]
) -> dict[str, Any]:
    """Return shifts by token, by the token before a common token, and by position."""
    encoded = (tokenizer(text, return_tensors="pt").input_ids[0, :LENGTH] for text in texts)
    documents = [ids for ids in encoded if len(ids) >= LENGTH // 2]
    by_token: dict[int, list[float]] = defaultdict(list)
    by_pair: dict[tuple[int, int], list[float]] = defaultdict(list)
    by_position: list[list[float]] = [[] for _ in range(LENGTH)]
    for ids, values in zip(documents, shifts(transform, embed, documents), strict=True):
        for t, (token, value) in enumerate(zip(ids.tolist(), values.tolist(), strict=True)):
            by_position[t].append(value)
            by_token[token].append(value)
            if t:
                by_pair[int(ids[t - 1]), token].append(value)
    means = {token: float(np.mean(x)) for token, x in by_token.items() if len(x) >= COMMON}
    before: dict[int, dict[int, float]] = defaultdict(dict)  # by a token and the one before it
    for (first, second), values in by_pair.items():
        if len(values) >= COMMON_PAIR:
            before[second][first] = float(np.mean(values))
    known = [token for token in means if len(before[token]) >= SHOWN]
    widest = max(known, key=lambda token: float(np.std(by_token[token])))

    def named(values: dict[int, float]) -> list[list[Any]]:
        ordered = sorted(values.items(), key=lambda item: item[1])
        chosen = ordered[:SHOWN] + ordered[-SHOWN:] if len(ordered) > 2 * SHOWN else ordered
        return [[shown(tokenizer, token), round(value, 4)] for token, value in chosen]

    every = np.concatenate([np.array(values) for values in by_token.values()])
    within = np.concatenate([np.array(x) - np.mean(x) for x in by_token.values()])
    return {
        "documents": len(documents),
        "tokens": len(every),
        "mean": round(float(every.mean()), 4),
        "sd": round(float(every.std()), 4),
        "sd_within_a_token": round(float(within.std()), 4),
        "by_token": named(means),
        "widest_token": shown(tokenizer, widest),
        "by_token_before_it": named(before[widest]),
        "by_position": [round(float(np.mean(values)), 4) for values in by_position if values],
    }


def shown(tokenizer: Any, token: int) -> str:
    """Return a token as a reader sees it, its space as an underscore."""
    text = tokenizer.convert_ids_to_tokens(token)
    return text.replace("\u2581", "_").replace("\u0120", "_").replace("<0x0A>", "newline")


def draw(results: dict[str, Any], path: Path) -> None:
    """Write the picture of the shifts by token, by the token before, and by position."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    bars, before, line = figure.subplots(1, 3)
    for axes, values, heading, below in (
        (bars, results["by_token"], "By token", "the least and the most moved of the common ones"),
        (
            before,
            results["by_token_before_it"],
            f"{results['widest_token']} by what precedes it",
            "the token whose shift depends most on context",
        ),
    ):
        names, sizes = zip(*values, strict=True)
        place = np.arange(len(names))
        axes.barh(place, sizes, color=[BLUE if x < results["mean"] else VERMILION for x in sizes])
        axes.axvline(results["mean"], color=INK, linewidth=0.8)
        axes.set_yticks(place, names, family="monospace", fontsize=8)
        plain(axes)
        title(axes, heading, below)
        axes.set_xlabel("shift / root length of embeddings")
    line.plot(results["by_position"], color=BLUE)
    plain(line, grid="y")
    line.set_xlabel("position in the document")
    line.set_ylim(bottom=0)
    title(line, "By position", "means over documents")
    figure.savefig(path, dpi=150)


def draw_families(path: Path) -> None:
    """Write a picture of what each family can express, for embeddings of two entries.

    Parameters are random. Three embeddings follow each other as one document; each is shown with
    400 samples of its perturbed embedding.
    """
    embeddings = torch.tensor([[[-1.6, 0.9], [0.1, -0.2], [1.5, 1.1]]])
    figure = Figure(figsize=(12, 7.2), layout="constrained")
    for axes, family in zip(
        figure.subplots(2, 3, sharex=True, sharey=True).flat, TRANSFORMS, strict=True
    ):
        torch.manual_seed(7)
        config = PerturbConfig(
            transform=family, latent_dim=1 if family != "mlp" else 2, hidden_dim=4, init_scale=0.35
        )
        transform = make_transform(config, 2)
        with torch.no_grad():
            if family in _GATES:
                getattr(transform, _GATES[family]).normal_(0, 1.5)
            z = noise.latent(3, (400, 1, 3, transform.latent_dim))
            cloud = transform(embeddings, z)[:, 0]
        for index, colour in enumerate((BLUE, VERMILION, GREEN)):
            axes.scatter(*cloud[:, index].T, s=4, color=colour, alpha=0.35, linewidths=0)
            axes.scatter(*embeddings[0, index], s=40, color=INK, zorder=3)
        plain(axes)
        axes.set(xlim=(-2.6, 2.6), ylim=(-1.4, 2.2))
        title(axes, family, _EXPRESSED[family])
        axes.tick_params(labelbottom=False, labelleft=False, length=0)
    figure.supxlabel("one entry of an embedding", color=FAINT)
    figure.supylabel("another", color=FAINT)
    figure.savefig(path, dpi=150)


# The parameters that start at zero, where the family could show nothing.
_GATES = {"gated": "C", "context": "G"}
_EXPRESSED = {
    "diagonal": "every entry by itself, alike for all tokens",
    "lowrank": "a few directions, alike for all tokens",
    "gated": "entries scaled by the token",
    "affine": "directions and sizes by the token",
    "mlp": "curved, and by the token",
    "context": "directions alike, sizes by the tokens so far",
}


def run(model: Path, text: Path, folder: Path) -> None:
    config = json.loads((model / "adapter_config.json").read_text(encoding="utf-8"))
    name = config["base_model_name_or_path"]
    lm = fastperturb.load(AutoModelForCausalLM.from_pretrained(name), model).eval()
    if not isinstance(lm.transform, Context) or lm.transform.context_source != "embedding":
        raise ValueError(f"{model} holds no transform='context' of embeddings: give one that does")
    lines = text.read_text(encoding="utf-8").splitlines()
    results = {
        **measured(
            lm.transform,
            AutoTokenizer.from_pretrained(name),
            lm.base.get_input_embeddings(),
            [json.loads(line)["text"] for line in lines],
        ),
        "text": text.name,
        **runs.provenance(),
        "device": runs.cpu_model(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    runs.write_json(folder / "results.json", results)
    draw(results, folder / "shift.png")
    draw_families(folder / "families.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/context_shift"))
    options = parser.parse_args()
    run(options.model, options.text, options.output_dir)
