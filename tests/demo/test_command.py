"""The demo: its language, its model, its bookkeeping, and the claim that it makes."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastperturb.demo import command as demo
from fastperturb.demo import language, picture, training
from fastperturb.demo.methods import METHODS, SWEEP
from fastperturb.estimators import Telescope

REGIONS = ("in_support", "band1", "band2")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def all_prefixes() -> Tensor:
    tokens = torch.arange(language.VOCAB)
    return torch.cartesian_prod(tokens, tokens)


@pytest.fixture(scope="module")
def world() -> language.Language:
    return language.make_language(seeded())


def make_model(world: language.Language, method: str) -> training.Model:
    torch.manual_seed(0)
    return training.Model(world.embeddings, METHODS[method])


def test_truth_sums_to_one() -> None:
    sums = language.truth(all_prefixes()).sum(1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


# One token of each kind: far in support, at its edge (where g has its kink), in either band.
@pytest.mark.parametrize("columns", [(0, 3), (6, 6), (6, 7), (9, 10)])
def test_truth_is_what_the_generating_process_gives(columns: tuple[int, int]) -> None:
    draws, rng = 200_000, np.random.default_rng(0)
    grid = np.linspace(-1, 1, 12)
    u, v = (np.array([grid[column], grid[row]]) for column, row in zip(columns, (2, 9)))
    s = (u[0] + rng.normal(0, 0.3, draws) + v[0] + rng.normal(0, 0.3, draws)) / 2
    centre = 0.9 * np.clip(np.where(s < 0, 0.3 * s, 1.2 * s), -1, 1)
    weight = np.exp(-((grid - centre[:, None]) ** 2) / (2 * 0.09**2))
    p_a = weight / weight.sum(1, keepdims=True)  # (draws, 12)
    weight = np.exp(-((grid - (u[1] + v[1]) / 2) ** 2) / (2 * 0.09**2))
    p_b = weight / weight.sum()
    standard_error = np.outer(p_a.std(0), p_b) / math.sqrt(draws)

    prefix = torch.tensor([[columns[0] * 12 + 2, columns[1] * 12 + 9]])
    found = language.truth(prefix)[0].reshape(12, 12).numpy()
    assert (abs(found - np.outer(p_a.mean(0), p_b)) < 5 * standard_error + 1e-6).all()


def test_samples_follow_the_truth() -> None:
    prefix, count = torch.tensor([[80, 91]]), 100_000
    found = language.sample(prefix.expand(count, 2), seeded()).bincount(minlength=language.VOCAB)
    expected = language.truth(prefix)[0] * count
    common = expected > 5
    chi_square = ((found - expected).square() / expected)[common].sum().item()
    assert chi_square < common.sum() + 5 * math.sqrt(2 * common.sum())
    assert found[~common].sum() < expected[~common].sum() + 30


def test_embeddings_are_grid_positions_on_two_orthonormal_axes_plus_small_ids(
    world: language.Language,
) -> None:
    torch.testing.assert_close(world.axes @ world.axes.T, torch.eye(2), atol=1e-5, rtol=0)
    positions = torch.cartesian_prod(language.grid(), language.grid()).float()
    ids = world.embeddings - positions @ world.axes
    assert ids.std().item() == pytest.approx(0.03, rel=0.05)
    assert (world.embeddings @ world.axes.T - positions).abs().max() < 0.15


def test_another_seed_makes_another_language(world: language.Language) -> None:
    other = language.make_language(seeded(1))
    assert (world.axes @ other.axes.T).abs().max() < 0.95
    assert not torch.equal(world.embeddings, other.embeddings)


def test_bands_share_no_token_with_the_support_and_lie_beyond_it() -> None:
    support, *bands = (
        set(language.tokens_between(*ends).tolist()) for ends in language.REGIONS.values()
    )
    assert max(support) < min(bands[0]) <= max(bands[0]) < min(bands[1])
    assert [len(tokens) // language.SIDE for tokens in (support, *bands)] == [7, 1, 2]


def test_divergence_of_the_truth_from_itself_is_zero_and_from_uniform_is_the_missing_entropy() -> (
    None
):
    law = language.truth(all_prefixes()[::97])
    assert training.divergence(law, law.log()).abs().max() < 1e-12
    uniform = torch.full_like(law, -math.log(language.VOCAB))
    entropy = torch.distributions.Categorical(law).entropy()
    torch.testing.assert_close(
        training.divergence(law, uniform), math.log(language.VOCAB) - entropy, atol=1e-9, rtol=0
    )


def test_a_token_scores_by_its_squared_distance_from_the_nets_answer(
    world: language.Language,
) -> None:
    model = make_model(world, "exact")
    prefixes, targets = all_prefixes()[::500], torch.arange(42)
    answer = model.net(world.embeddings[prefixes].flatten(1))  # (B, D)
    distances = torch.cdist(answer, world.embeddings).square()
    expected = torch.log_softmax(-model.log_sharpness.exp() * distances, dim=-1)
    found = model.log_probs(prefixes, targets, 0, 1)
    torch.testing.assert_close(found[0], expected[torch.arange(42), targets], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.log_marginal(prefixes), expected, atol=1e-4, rtol=1e-4)


def test_the_marginal_is_the_mean_probability_over_draws(world: language.Language) -> None:
    model = make_model(world, "learned")
    prefixes = torch.tensor([[3, 130], [77, 5]])
    marginal = model.log_marginal(prefixes, draws=64)
    for target in (0, 70, 143):
        each = model.log_probs(prefixes, torch.full((2,), target), 0, 64)  # (64, 2)
        torch.testing.assert_close(marginal[:, target], each.logsumexp(0) - math.log(64))


def test_methods_of_a_seed_start_from_the_same_net(world: language.Language) -> None:
    nets = [make_model(world, name).net.state_dict() for name in METHODS]
    for net in nets[1:]:
        for name, value in net.items():
            torch.testing.assert_close(value, nets[0][name], atol=0, rtol=0)


def test_listing_the_draws_of_a_telescope_changes_neither_value_nor_gradient(
    world: language.Language,
) -> None:
    model = make_model(world, "learned_mlmc")
    prefixes, targets = all_prefixes()[::650], torch.arange(32)
    telescope = Telescope("mlmc", 16)
    level = torch.arange(32) % 5
    seed = torch.tensor(11)

    listed, draws = training.telescoped(model, telescope, level, prefixes, targets, seed)
    full, _ = telescope.combine(model.log_probs(prefixes, targets, seed, 16), level)
    assert draws == telescope.draws(level).sum()
    torch.testing.assert_close(listed, full, atol=1e-4, rtol=1e-4)

    upstream = torch.randn(32, generator=seeded())
    parameters = [*model.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(listed, parameters, upstream),
        torch.autograd.grad(full, parameters, upstream),
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-3 * theirs.abs().max().item(), rtol=1e-3)


def test_fixed_noise_keeps_its_scale_along_both_axes_and_learned_noise_does_not() -> None:
    fixed = training.run_job(0, METHODS["jensen"], steps=3).movement
    learned = training.run_job(0, METHODS["learned"], steps=3).movement
    assert fixed == {axis: pytest.approx(0.15, rel=0.02) for axis in ("noisy", "precise")}
    first = training.run_job(0, METHODS["learned"], steps=1).movement
    assert learned is not None and first is not None
    assert learned["noisy"] != pytest.approx(first["noisy"], rel=1e-2)


@pytest.mark.parametrize("method", ["learned_quadratic_m2", "learned_mlmc"])
def test_a_seed_settles_everything(method: str) -> None:
    first, again, other = (training.run_job(s, METHODS[method], steps=3) for s in (4, 4, 5))
    assert first == again
    assert first.kl != other.kl


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of almost no steps."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    methods = ("exact", "fixed", "learned_mlmc")
    options = demo.DemoOptions(output_dir=folder, seeds=(0, 3), steps=2, methods=methods, workers=2)
    assert demo.run(options) == 0
    return folder


def test_results_hold_one_row_a_method(tiny: Path) -> None:
    results = json.loads((tiny / "results.json").read_text())
    rows = {row["method"]: row for row in results["rows"]}
    assert list(rows) == ["exact", "fixed", "learned_mlmc"]
    for row in rows.values():
        assert set(row["kl"]) == set(row["kl_std"]) == set(REGIONS)
        assert all(value > 0 for value in [*row["kl"].values(), *row["kl_std"].values()])
        assert len(row["curve"]) == len(results["positions"]) == 12
    assert "movement" not in rows["exact"]
    assert set(rows["learned_mlmc"]["movement"]) == {"noisy", "precise"}
    assert rows["exact"]["samples"] == 1
    assert rows["fixed"]["samples"] == 16
    assert 1 < rows["learned_mlmc"]["samples"] < 3
    assert results["versions"]["torch"] == torch.__version__
    assert results["seconds"] > 0
    assert "2 processes" in results["device"]
    assert {"commit", "seeds", "steps"} <= set(results)


def test_fixed_noise_is_the_scale_that_is_best_out_of_support(tiny: Path) -> None:
    results = json.loads((tiny / "results.json").read_text())
    assert [row["scale"] for row in results["sweep"]] == list(SWEEP)
    (fixed,) = (row for row in results["rows"] if row["method"] == "fixed")
    assert fixed in results["sweep"]
    assert all(
        fixed["kl"]["band1"] + fixed["kl"]["band2"] <= row["kl"]["band1"] + row["kl"]["band2"]
        for row in results["sweep"]
    )


def test_the_picture_is_a_png_of_both_panels(tiny: Path) -> None:
    content = (tiny / "extrapolation.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = (int.from_bytes(content[start : start + 4]) for start in (16, 20))
    assert width > 1.5 * height > 1000


def test_a_folder_with_files_is_refused_before_training(tiny: Path) -> None:
    before = (tiny / "results.json").read_bytes()
    with pytest.raises(FileExistsError, match="overwrite"):
        demo.run(demo.DemoOptions(output_dir=tiny, steps=10**9))
    assert (tiny / "results.json").read_bytes() == before


def test_missing_matplotlib_is_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert demo.run(demo.DemoOptions(output_dir=tmp_path / "run", steps=10**9)) == 2
    assert "pip install 'fastperturb[train]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": ()}, "seeds must be"),
        ({"seeds": (1, 1)}, r"got \(1, 1\)"),
        ({"seeds": (-1,)}, ">= 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"methods": ("exact", "learnt")}, "among .*'learned'.*, got 'learnt'"),
        ({"methods": ()}, "methods must be one or more"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        demo.DemoOptions(**options)  # type: ignore[arg-type]


def test_crowded_labels_are_moved_apart_around_their_middle_and_others_stay() -> None:
    found = picture.spread_out([0.1, 0.5, 0.51, 0.52, 0.9], gap=0.1)
    assert found == pytest.approx([0.1, 0.41, 0.51, 0.61, 0.9])


def test_headlines_compare_learned_with_the_rivals_that_were_trained() -> None:
    kl = {"learned": (0.05, 0.2, 0.5), "fixed": (0.1, 0.4, 1.0)}
    rows = [{"method": name, "kl": dict(zip(REGIONS, values))} for name, values in kl.items()]
    (line,) = demo.headlines(rows)
    assert line.endswith("over fixed: 0.50 in support, 0.50 in band 1, 0.50 in band 2")
    assert demo.headlines(rows[1:]) == []


@pytest.mark.slow
def test_learned_noise_beats_fixed_noise_beats_none_out_of_support(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "SWEEP", (0.1,))  # what the whole sweep chooses
    methods = ("exact", "fixed", "learned", "learned_iwae_m4", "learned_quadratic_m2")
    demo.run(demo.DemoOptions(output_dir=tmp_path, seeds=(0, 1), steps=1000, methods=methods))
    results = json.loads((tmp_path / "results.json").read_text())
    kl = {row["method"]: row["kl"] for row in results["rows"]}
    movement = {row["method"]: row.get("movement") for row in results["rows"]}
    for region in REGIONS:
        assert kl["learned"][region] < kl["fixed"][region]
    for band, share in (("band1", 0.5), ("band2", 0.35)):
        assert kl["fixed"][band] < kl["exact"][band]
        assert kl["learned"][band] < share * kl["exact"][band]
        assert kl["learned_quadratic_m2"][band] < 0.7 * kl["learned_iwae_m4"][band]
    assert movement["learned"]["noisy"] > 2 * movement["learned"]["precise"]
    assert movement["learned_iwae_m4"]["noisy"] < 0.6 * movement["learned"]["noisy"]
