import dataclasses

import pytest
import tiny

from fastperturb import PerturbConfig


def test_round_trip_through_plain_data_gives_an_equal_config():
    config = PerturbConfig(transform="mlp", num_samples=6, min_scale=0.1, backward_samples=2)
    assert PerturbConfig.from_dict(config.to_dict()) == config


def test_every_field_survives_the_round_trip():
    assert set(PerturbConfig().to_dict()) == {f.name for f in dataclasses.fields(PerturbConfig)}


def test_a_key_with_a_typo_raises_and_suggests_the_right_one():
    with pytest.raises(ValueError, match=r"no key 'num_sample' \(did you mean 'num_samples'\?\)"):
        PerturbConfig.from_dict({"num_sample": 4})


def test_fields_cannot_be_given_by_position_or_changed():
    with pytest.raises(TypeError):
        PerturbConfig("lowrank")  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        PerturbConfig().transform = "mlp"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value", "choice"),
    [
        ("transform", "low_rank", "'lowrank'"),
        ("latent", "normal", "'gaussian'"),
        ("scope", "word", "'token'"),
        ("marginal", "document", "'sequence'"),
        ("estimator", "iwea", "'iwae'"),
        ("plan", "batch", "'batched'"),
    ],
)
def test_a_wrong_choice_raises_with_field_value_and_choices(field, value, choice):
    with pytest.raises(ValueError, match=f"{field} must be one of .*{choice}.*got '{value}'"):
        PerturbConfig(**{field: value})


@pytest.mark.parametrize("field", ["latent_dim", "hidden_dim", "num_samples", "chunk_size"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_count_below_one_raises_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field} must be a positive int.*got {value}"):
        PerturbConfig(**{field: value})


@pytest.mark.parametrize("value", [2.0, "8", True])
def test_a_count_that_is_no_int_raises(value):
    with pytest.raises(TypeError, match="num_samples must be a positive int"):
        PerturbConfig(num_samples=value)


@pytest.mark.parametrize("value", [0.0, -0.1, float("nan"), float("inf")])
def test_an_invalid_init_scale_raises(value):
    with pytest.raises(ValueError, match="init_scale must be a finite number above 0"):
        PerturbConfig(init_scale=value)


def test_an_odd_number_of_antithetic_samples_raises():
    message = "num_samples must be even with sampling='antithetic'.*got 5"
    with pytest.raises(ValueError, match=message):
        PerturbConfig(antithetic=True, num_samples=5)


@pytest.mark.parametrize("estimator", ["quadratic", "jvi", "jvi_clip", "sumo", "mlmc"])
def test_estimators_of_independent_samples_reject_antithetic_ones(estimator):
    with pytest.raises(ValueError, match=f"estimator='{estimator}' needs independent"):
        PerturbConfig(antithetic=True, estimator=estimator)


@pytest.mark.parametrize("estimator", ["quadratic", "jvi", "jvi_clip", "mlmc"])
def test_estimators_that_compare_samples_reject_a_single_one(estimator):
    with pytest.raises(ValueError, match="num_samples must be at least 2"):
        PerturbConfig(estimator=estimator, num_samples=1)


def test_the_quadratic_estimator_rejects_the_sequence_marginal():
    with pytest.raises(ValueError, match="marginal='sequence' has no estimator='quadratic'"):
        PerturbConfig(estimator="quadratic", marginal="sequence")


def test_the_resample_plan_rejects_estimators_other_than_iwae():
    with pytest.raises(ValueError, match="plan='resample' estimates the iwae gradient"):
        PerturbConfig(plan="resample", estimator="jensen")


def test_more_backward_samples_than_samples_raise():
    with pytest.raises(ValueError, match="backward_samples must not exceed num_samples=4, got 5"):
        PerturbConfig(num_samples=4, backward_samples=5)


def test_a_mixture_of_estimators_is_checked_and_survives_the_round_trip():
    config = PerturbConfig(estimator={"iwae": 1, "quadratic": 0.1})
    assert config.equations == {"iwae": 1, "quadratic": 0.1}
    assert PerturbConfig.from_dict(config.to_dict()) == config
    assert PerturbConfig().equations == {"iwae": 1.0}
    for estimator, message in [
        ({}, "must name at least one of"),
        ({"resample": 1.0}, "mixes 'resample'; a mixture can have"),
        ({"iwae": 0.0}, "the weight of 'iwae' in estimator must be a finite number above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            PerturbConfig(estimator=estimator)
    with pytest.raises(ValueError, match="quadratic estimator sums over every possible label"):
        PerturbConfig(estimator={"iwae": 1.0, "quadratic": 0.1}, marginal="sequence")
    with pytest.raises(ValueError, match="sampling='antithetic' pairs the samples"):
        PerturbConfig(estimator={"iwae": 1.0, "quadratic": 0.1}, antithetic=True)


@pytest.mark.parametrize(
    ("num_samples", "estimator", "strata"),
    [(8, "iwae", 8), (12, "iwae", 4), (512, "iwae", 256), (8, "quadratic", 4), (4, "mlmc", 2)],
)
def test_a_stratified_group_is_the_largest_that_leaves_the_estimator_its_groups(
    num_samples, estimator, strata
):
    config = PerturbConfig(sampling="stratified", num_samples=num_samples, estimator=estimator)
    assert config.strata() == strata
    assert PerturbConfig.from_dict(config.to_dict()) == config


def test_a_group_size_that_is_given_is_kept_for_calls_with_other_numbers_of_samples():
    config = PerturbConfig(sampling="stratified", num_samples=8, group_size=2)
    assert [config.strata(), config.strata(16), config.strata_of_mean(4, 2)] == [2, 2, 2]
    with pytest.raises(ValueError, match="multiple of group_size=2 .* got 5"):
        config.strata(5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 5}, "num_samples must be even with sampling='stratified'; got 5"),
        ({"num_samples": 12, "group_size": 8}, "multiple of group_size=8 .*got 12"),
        ({"num_samples": 2, "estimator": "quadratic"}, "at least 4 for 2 groups.*got 2"),
        ({"group_size": 8, "estimator": "jvi_clip"}, "at least 16 for 2 groups.*got 8"),
        ({"group_size": 3}, "group_size must be one of .*got 3"),
        ({"group_size": 4.0}, "group_size must be one of .*got 4.0"),
        ({"group_size": 512}, "group_size must be one of .*got 512"),
        ({"deterministic": True}, "deterministic=True has only one"),
        ({"sampling": "independent", "group_size": 4}, "set sampling='stratified', or leave group"),
        ({"sampling": "strata"}, "sampling must be one of .*did you mean 'stratified'"),
        ({"antithetic": True}, "antithetic=True is the old spelling of sampling='antithetic'"),
    ],
)
def test_a_sampling_that_cannot_be_is_named_with_what_to_change(options, message):
    with pytest.raises(ValueError, match=message):
        PerturbConfig(**{"sampling": "stratified", **options})


def test_antithetic_is_the_old_spelling_of_a_sampling():
    old, new = PerturbConfig(antithetic=True), PerturbConfig(sampling="antithetic")
    assert old.sampling == new.sampling == "antithetic" and old.draws_pairs and new.draws_pairs
    assert PerturbConfig.from_dict(old.to_dict()) == old
    for old in ({"antithetic": False}, {"antithetic": None}, {}):
        assert PerturbConfig.from_dict(old) == PerturbConfig(sampling="independent")
    assert PerturbConfig().antithetic is False
    with pytest.raises(TypeError, match="antithetic must be True or False"):
        PerturbConfig(antithetic="yes")


def test_the_sampling_of_a_config_can_be_replaced():
    plain = PerturbConfig()
    assert dataclasses.replace(plain, sampling="antithetic").draws_pairs
    assert dataclasses.replace(plain, sampling="stratified").strata() == 8
    pairs = dataclasses.replace(plain, sampling="antithetic")
    assert not dataclasses.replace(pairs, sampling="independent").draws_pairs
    with pytest.raises(ValueError, match="leave antithetic unset"):
        dataclasses.replace(PerturbConfig(antithetic=True), sampling="stratified")


def test_a_model_takes_another_sampling_for_a_while_whatever_its_spelling():
    lm = tiny.perturbed(tiny.llama(), antithetic=True)
    with lm.overriding(sampling="independent"):
        assert not lm.config.draws_pairs
    with lm.overriding(sampling="stratified"):
        assert lm.config.strata() == 8
    assert lm.config.draws_pairs
    with (
        pytest.raises(ValueError, match="no key 'sampler' .did you mean 'sampling'"),
        lm.overriding(sampler="stratified"),
    ):
        pass
