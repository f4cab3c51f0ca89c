"""The options of studies, and the runs that follow from them."""

import math

import pytest
import tiny_run

from fastperturb.estimators import Telescope
from fastperturb.study.options import DEFAULT_METHODS, StudyOptions, planned_runs
from fastperturb.train import TrainOptions


def study_options(folder, **changes):
    shared = {
        "output_dir": TrainOptions.output_dir,
        "eval_data": (str(folder / "valid.txt"),),
        "document_separator": "\n\n",
        "eval_samples": 4,
        "eval_every": 2,
        "max_steps": 4,
    }
    options = {
        "train": tiny_run.options(folder, **{**shared, **changes.pop("train", {})}),
        "domains": {"same": str(folder / "test.txt"), "other": str(folder / "other.txt")},
        "in_domain": "same",
        "seeds": (0,),
    }
    return StudyOptions(**{**options, **changes})


def test_every_method_and_every_control_runs_with_every_seed(folder):
    methods = {
        "exact": {"method": "exact"},
        "noise": {"method": "fixed", "perturb": {"num_samples": 2}},
        "ours": {"method": "learned", "perturb": {"transform": "mlp"}},
    }
    planned = planned_runs(study_options(folder, methods=methods, seeds=(0, 7)))
    names = [(run.method, run.control, run.of) for run in planned if run.seed == 7]
    assert names == [
        ("exact", None, None),
        ("noise", None, None),
        ("ours", None, None),
        ("exact, rate x 0.5", "learning_rate", "exact"),
        ("exact, rate x 2", "learning_rate", "exact"),
        ("exact, compute x 2", "equal_compute", "exact"),
        ("exact, compute x 4", "equal_compute", "exact"),
        ("ours, deterministic", "deterministic", "ours"),
    ]
    by_name = {run.method: run for run in planned if run.seed == 7}
    assert by_name["noise"].options.perturb.num_samples == 2
    assert by_name["noise"].options.perturb.latent_dim == 4  # the other options of the group stay
    rates = [by_name[f"exact{end}"].options.learning_rate for end in ("", ", rate x 2")]
    assert rates[1] == 2 * rates[0]
    compute = [
        run.num_samples * run.options.max_steps
        for run in (by_name["exact, compute x 4"], by_name["ours"])
    ]
    assert compute[0] == compute[1]
    twin = by_name["ours, deterministic"]
    assert twin.options.perturb.deterministic and twin.options.perturb.transform == "mlp"
    assert (twin.num_samples, twin.options.max_steps) == (1, by_name["ours"].options.max_steps)
    assert len({run.key for run in planned}) == len(planned)


def test_runs_with_the_same_results_have_the_same_key(folder):
    methods = {
        "exact": {"method": "exact"},
        "a": {"method": "learned"},
        "b": {"method": "learned", "perturb": {"scope": "sequence", "num_samples": 8}},
    }
    planned = {run.method: run for run in planned_runs(study_options(folder, methods=methods))}
    assert planned["a"].key != planned["b"].key
    assert planned["a, deterministic"].key == planned["b, deterministic"].key


def test_equal_compute_lengthens_epochs_where_there_are_no_steps(folder):
    planned = planned_runs(study_options(folder, train={"max_steps": None, "epochs": 3}))
    longer = next(run for run in planned if run.control == "equal_compute").options
    assert (longer.epochs, longer.eval_every) == (
        12,
        2,
    )  # evaluated at the same steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_domain": "elsewhere"}, "in_domain must be one of domains"),
        ({"domains": {"same": "x"}}, "to extrapolate to"),
        ({"baseline": "plain"}, "baseline must be one of methods"),
        ({"baseline": "learned"}, "perturbed after its training"),
        ({"seeds": ()}, "seeds must be one or more"),
        ({"learning_rate_factors": (1.0,)}, "other than 1"),
        ({"draws": 1}, "draws and tuning_draws must be at least 2"),
        ({"noise_scale": 0.0}, "noise_scale must be above 0"),
        ({"train": {"eval_data": ()}}, "train.eval_data must name"),
        ({"train": {"seed": 3}}, "a study sets it for each run"),
        ({"methods": {"exact": {"method": "exact", "sed": 1}}}, "no option 'sed'"),
        ({"methods": {"exact": {"method": "exact", "seed": 1}}}, "all runs of a study share it"),
        ({"methods": {"exact": {"method": "exact", "data": ["x"]}}}, "all runs of a study share"),
        ({"methods": {"exact": {"method": "exact", "perturb": {"m": 1}}}}, "unknown option 'm'"),
        ({"methods": {"exact": {"method": "exact"}, "x": {"method": "y"}}}, "expected one of"),
    ],
)
def test_options_that_make_no_study_are_rejected_before_anything_runs(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        study_options(folder, **changes)


def test_the_default_methods_are_the_five_of_train():
    assert list(DEFAULT_METHODS) == [
        "exact",
        "neftune",
        "fixed",
        "discrete",
        "learned",
    ]


def test_a_telescope_is_charged_the_samples_that_it_takes_on_average(folder):
    methods = {
        "exact": {"method": "exact"},
        "mlmc": {"method": "learned", "perturb": {"estimator": "mlmc", "num_samples": 16}},
    }
    study = study_options(folder, methods=methods, train={"block_size": 256, "max_grad_norm": None})
    planned = {run.method: run for run in planned_runs(study)}
    samples = Telescope("mlmc", 16).expected_draws  # 1.83
    assert planned["mlmc"].num_samples == pytest.approx(samples)
    longer = planned["exact, compute x 1.83"].options
    assert longer.max_steps == math.ceil(samples * planned["exact"].options.max_steps)
