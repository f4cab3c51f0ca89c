"""Edited models, batches of every layout, and a loop that edits one prefix at a time."""

import math

import tiny
import torch
from batches import IGNORED, positions_of
from torch.nn import functional as F

from fastperturb import EditConfig, EditedLM, PerturbConfig, edit, noise, wrap
from fastperturb.engine.edit_layout import KINDS

V, SEED = 29, 5
BOS, EOS, PAD = SPECIAL = (1, 2, 0)
TOKENS = {"vocab_size": V, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
# The name of its config for the longest sequence.
ARCHITECTURES = {"Llama": "max_position_embeddings", "GPT2": "n_positions"}


EDITS = {"rate": 0.6, "neighbors": 3, "kinds": KINDS}


def base_model(architecture="Llama", *, positions=64, **changes):
    """Return a tiny model whose embeddings are far apart."""
    limit = {ARCHITECTURES[architecture]: positions, "initializer_range": 0.3}
    return tiny.base_model(architecture, **TOKENS | limit | changes)


def edited_lm(architecture="Llama", *, positions=64, **options):
    """Return a tiny model with random edits; `options` are those of EditConfig."""
    base = base_model(architecture, positions=positions)
    return edit(base, EditConfig(**EDITS | {"num_samples": 4} | options))


def hybrid_lm(architecture="Llama", *, base=None, edits=EDITS, **options):
    """Return a tiny model with random edits and noise; `options` are those of PerturbConfig."""
    torch.manual_seed(3)
    defaults = {"num_samples": 4, "latent_dim": 3, "init_scale": 0.7}
    base = base_model(architecture) if base is None else base
    return wrap(base, PerturbConfig(**defaults | options), edits=EditConfig(**EDITS | edits))


def some_tokens(size=3, length=11):
    """Return token ids [B, T] in which special ones occur."""
    return torch.randint(V, (size, length), generator=torch.Generator().manual_seed(1))


def with_labels(**inputs):
    """Add labels that are not the tokens of the input."""
    ids = inputs["input_ids"]
    labels = torch.randint(V, ids.shape, generator=torch.Generator().manual_seed(2))
    if "attention_mask" in inputs:
        real = inputs["attention_mask"].bool()
        labels = labels.masked_fill(~(real & real.roll(1, 1)), IGNORED)
    if "position_ids" in inputs:
        labels = labels.masked_fill(inputs["position_ids"] == 0, IGNORED)
    return {**inputs, "labels": labels}


def plain():
    return with_labels(input_ids=some_tokens())


def right_padded():
    ids, mask = some_tokens(), torch.ones(3, 11, dtype=torch.long)
    mask[1, 6:] = 0
    return with_labels(input_ids=ids, attention_mask=mask)


def left_padded():
    ids, mask = some_tokens(), torch.ones(3, 11, dtype=torch.long)
    mask[1, :4] = 0
    return with_labels(input_ids=ids, attention_mask=mask)


def left_padded_from_zero():
    inputs = left_padded()
    inputs["position_ids"] = positions_of(inputs["attention_mask"])
    return inputs


def packed():
    lengths = [[4, 7], [1, 5, 5], [11]]
    numbers = iter(range(100, 110))
    rows = [torch.cat([torch.full((n,), next(numbers)) for n in row]) for row in lengths]
    positions = [torch.cat([torch.arange(n) for n in row]) for row in lengths]
    return with_labels(
        input_ids=some_tokens(), position_ids=torch.stack(positions), rows=torch.stack(rows)
    )


def half_editable():
    mask = torch.ones(3, 11, dtype=torch.bool)
    mask[:, :3] = mask[1, 5:7] = mask[2, 8] = False
    return {**plain(), "perturb_mask": mask}


LAYOUTS = (plain, right_padded, left_padded, left_padded_from_zero, packed, half_editable)


def naive_prefix(lm, tokens, random_numbers, editable, room):
    """Return the edited tokens x_0 .. x_t of a document that precede label t + 1.

    Each comes with the index of the token at which it was laid down.
    """
    config = getattr(lm.config, "edits", lm.config)
    table = lm.base.get_input_embeddings().weight
    drawable = [token for token in range(len(table)) if token not in SPECIAL]
    out, insertions, deletions, t = [], 0, 0, 0
    while t < len(tokens):
        token, (edited, kind, choice, _) = tokens[t], random_numbers[t]
        kind = config.kinds[kind * len(config.kinds) >> 32]
        if edited >= config.rate * 2**32 or token in SPECIAL or not editable[t]:
            kind = None
        if t == 0 and kind in ("delete", "swap"):
            kind = None
        if kind == "swap" and t + 1 < len(editable) and not editable[t + 1]:
            kind = None  # the last token that may be edited stays with its label
        if kind == "swap":
            if t + 1 == len(tokens):  # x_t waits for x_{t + 1}, which is the label
                break
            pair = [token, tokens[t + 1]]
            if pair[1] not in SPECIAL:
                pair.reverse()
            out += zip(pair, (t, t + 1))
            t += 2
            continue
        if kind == "replace":
            cosines = F.cosine_similarity(table[token], table[drawable], dim=-1)
            order = [drawable[i] for i in cosines.argsort(descending=True)]
            near = [other for other in order if other != token][: config.neighbors]
            token = near[choice * len(near) >> 32]
        if kind == "insert":
            insertions += 1
            if insertions <= room + deletions:
                out.append((drawable[choice * len(drawable) >> 32], t))
        if kind == "delete":
            deletions += 1
        else:
            out.append((token, t))
        t += 1
    return out


def naive_noise(lm, embeddings, perturbable, sample, count, row, places):
    """Return the embeddings [1, n, D] of a copy, perturbed as sample number `sample` of `count`."""
    config = lm.config
    z = noise.latent(
        SEED,
        (1, 1, len(perturbable), lm.transform.latent_dim),
        latent=config.latent,
        scope=config.scope,
        samples=torch.tensor([sample]),
        rows=row.view(1),
        positions=places,
        antithetic=config.draws_pairs and count > 1,
        strata=config.strata_of_mean(count) if count > 1 else 1,
    )
    return torch.where(perturbable[:, None], lm.transform(embeddings, z[0]), embeddings)


def naive_logits(lm, inputs, samples, positions_in_model=64):
    """Return next-token log-probs [M, B, T, V], one edited prefix at a time; NaN at padding."""
    ids = inputs["input_ids"]
    size, length = ids.shape
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    positions = inputs.get("position_ids")
    if positions is None:
        positions = real.cumsum(1) - 1
    rows = inputs.get("rows", torch.arange(size))
    rows = rows if rows.ndim == 2 else rows[:, None].expand(-1, length)
    editable = inputs.get("perturb_mask", torch.ones_like(real))
    key = torch.tensor([SEED, 0])
    log_probs = torch.full((len(samples), size, length, V), math.nan)
    embed = lm.base.get_input_embeddings()
    for b in range(size):
        present = [t for t in range(length) if real[b, t]]
        starts = [
            t for t in present if t == present[0] or positions[b, t] != positions[b, t - 1] + 1
        ]
        for start, stop in zip(starts, [*starts[1:], present[-1] + 1]):
            tokens = ids[b, start:stop].tolist()
            room = positions_in_model - 1 - int(positions[b, stop - 1])
            for m, sample in enumerate(samples):
                counter = [
                    [0xFFFFFFFF, int(positions[b, t]), sample, int(rows[b, t])]
                    for t in range(start, stop)
                ]
                random_numbers = noise.philox(torch.tensor(counter), key).tolist()
                for t in range(start, stop):
                    n = t + 1 - start
                    mask = editable[b, start:stop].tolist()
                    prefix = naive_prefix(lm, tokens[:n], random_numbers, mask, room)
                    copy, origin = (torch.tensor(part) for part in zip(*prefix))
                    embeddings, places = embed(copy)[None], torch.arange(len(copy))[None]
                    places = places + positions[b, start]
                    if not isinstance(lm, EditedLM):
                        may = editable[b, start:stop][origin]
                        embeddings = naive_noise(
                            lm, embeddings, may, sample, len(samples), rows[b, t], places
                        )
                    logits = lm.base(inputs_embeds=embeddings, position_ids=places).logits
                    log_probs[m, b, t] = logits[0, -1].log_softmax(-1)
    return log_probs


def naive_log_probs(lm, inputs, positions_in_model=64):
    """Return the labels' log-probs [M, B, T - 1] of four samples."""
    labels = inputs["labels"][:, 1:]
    kept = labels != IGNORED
    logits = naive_logits(lm, inputs, range(4), positions_in_model)[:, :, :-1]
    index = labels.where(kept, 0).expand(4, -1, -1)[..., None]
    return logits.gather(-1, index)[..., 0].where(kept, 0.0)


def edits_of(lm, ids, count, **layout):
    """Return the edited tokens of `count` samples."""
    empty = dict.fromkeys(("positions", "editable", "attention_mask", "position_ids"))
    return lm.transform(
        lm.base.get_input_embeddings().weight,
        ids,
        torch.tensor(SEED),
        torch.arange(count),
        rows=torch.arange(len(ids)),
        **{**empty, **layout},
    )


def naive_greedy(lm, ids, mask, samples_of, steps):
    """Return the prompts followed by the likeliest tokens, every prefix edited anew."""
    for step in range(steps):
        inputs = {"input_ids": ids, "attention_mask": mask}
        inputs["position_ids"] = positions_of(mask)
        logits = naive_logits(lm, inputs, samples_of(step))[:, :, -1]
        ids = torch.cat([ids, logits.logsumexp(0).argmax(-1, keepdim=True)], dim=1)
        mask = F.pad(mask, (0, 1), value=1)
    return ids


# The sample numbers of each step.
MODES = {
    "sequence": lambda step: [0],
    "token": lambda step: [step],
    "mixture": lambda step: [0, 1, 2, 3],
}
