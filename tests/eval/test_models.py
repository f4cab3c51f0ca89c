"""Finding and loading models."""

import pytest
import tiny_run
import tokenizers
import torch
from eval_cases import options_of

from fastperturb.eval import likelihood, models


def test_a_training_folder_is_read_as_its_best_model_or_else_its_last(folder):
    assert models.find("m", str(folder / "learned"), None).checkpoint == folder / "learned" / "best"
    assert models.find("m", str(folder / "exact"), None).checkpoint == folder / "exact" / "model"
    inner = folder / "learned" / "model"
    assert models.find("m", str(inner), None).checkpoint == inner


def test_the_base_is_the_one_in_the_checkpoint_or_the_one_it_names(folder):
    assert models.find("m", str(folder / "learned"), None).base == str(folder / "base")
    assert models.find("m", str(folder / "learned"), "elsewhere").base == "elsewhere"
    whole = folder / "whole" / "model"
    assert models.find("m", str(folder / "whole"), "elsewhere").base == str(whole)


def test_a_plain_model_is_scored_unperturbed(folder, tmp_path):
    options = options_of(folder, tmp_path)
    lm = models.load(models.find("m", str(folder / "base"), None), options)
    ids = torch.tensor([[5, 8, 13, 21, 34]])
    expected = lm.base(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])
    score = lm.score(ids, num_samples=1)
    torch.testing.assert_close(score.log_marginal, expected[..., 0])
    assert not likelihood.perturbs(lm)


def test_a_base_at_another_place_can_be_named(folder, tmp_path):
    copied = tmp_path / "learned"
    for file in (folder / "learned" / "best").iterdir():
        if not file.name.startswith("token"):
            copied.mkdir(exist_ok=True)
            (copied / file.name).write_bytes(file.read_bytes())
    place = models.Place("learned", copied, str(tmp_path / "gone"), str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="cannot be loaded: .* was moved, set base"):
        models.load(place, options_of(folder, tmp_path))
    place = models.find("learned", str(copied), str(folder / "base"))
    assert place.tokenizer == str(folder / "base")
    assert models.load(place, options_of(folder, tmp_path)).config.num_samples == 4


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("./nowhere", "model 'm': there is no folder ./nowhere"),
        ("a/b/c", "there is no folder a/b/c"),
        ("{folder}", "holds no perturbation_config.json, .* Has its training run finished"),
    ],
)
def test_a_missing_model_is_reported_by_name(where, message, folder):
    with pytest.raises(ValueError, match=message):
        models.find("m", where.format(folder=folder), None)


def test_models_with_different_tokenizers_are_rejected(folder, tmp_path):
    other = tiny_run.model_folder(tmp_path / "other")
    words = tokenizers.Tokenizer.from_file(str(other / "tokenizer.json"))
    words.add_tokens(["w99"])
    words.save(str(other / "tokenizer.json"))
    places = [
        models.find(name, str(path), None) for name, path in (("a", folder / "base"), ("b", other))
    ]
    with pytest.raises(ValueError, match="models 'a' and 'b' have different tokenizers"):
        models.common_tokenizer(places, trust_remote_code=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 4096}, "block_size = 4096 is more than the 2048 positions that model 'm'"),
        (
            {"continuations": 2, "prompt_tokens": 4, "continuation_tokens": 3000},
            "prompt_tokens . continuation_tokens = 3004 is more than the 2048 positions",
        ),
    ],
)
def test_texts_longer_than_the_positions_of_a_model_are_rejected(
    changes, message, folder, tmp_path
):
    place = models.find("m", str(folder / "base"), None)
    with pytest.raises(ValueError, match=message):
        models.load(place, options_of(folder, tmp_path, **changes))
