"""The files around the package agree with it and with each other."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from fastperturb.version import __version__

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = [
    file
    for file in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    if file.name != "config.yml"
]


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def requirements():
    """Return {package: requirement} over the dependencies and every extra."""
    extras = PROJECT["project"]["optional-dependencies"].values()
    listed = [*PROJECT["project"]["dependencies"], *(line for extra in extras for line in extra)]
    return {re.match(r"[\w.-]+", line)[0]: line.split(";")[0].strip() for line in listed}


def pins(name):
    """Return {package: version} of a constraints file."""
    lines = [line.split("#")[0].strip() for line in text(name).splitlines()]
    return dict(line.split("==") for line in lines if "==" in line)


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_the_version_is_the_same_in_the_citation_and_heads_the_changelog():
    assert yaml.safe_load(text("CITATION.cff"))["version"] == __version__
    versions = re.findall(r"^## \[(\S+)\] - (\S+)$", text("CHANGELOG.md"), re.MULTILINE)
    assert versions[0][0] == __version__
    assert versions == sorted(versions, reverse=True)
    links = re.findall(r"^\[(\S+)\]: http", text("CHANGELOG.md"), re.MULTILINE)
    assert links == [version for version, _ in versions]


def test_the_changelog_names_modules_that_exist():
    table = re.findall(r"^  \| `[^|]*\| (`[^|]*) \|$", text("CHANGELOG.md"), re.MULTILINE)
    modules = [name.removesuffix(".*") for row in table for name in re.findall(r"`(\S+)`", row)]
    assert len(modules) > 30
    paths = {name: ROOT / "fastperturb" / name.replace(".", "/") for name in modules}
    gone = [
        name
        for name, path in paths.items()
        if not path.with_suffix(".py").is_file() and not (path / "__init__.py").is_file()
    ]
    assert gone == []


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_a_page_names_files_and_folders_that_exist(page):
    tops = [path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "runs"]
    named = re.findall(rf"`((?:{'|'.join(map(re.escape, tops))})/[\w./*-]*)`", text(page))
    linked = re.findall(r"\]\((?!http)([^)#]+)\)", text(page))
    # The recipes of 0.1.0, which the changelog tells of.
    names = {*named, *linked} - {"bench/recipes"}
    assert [name for name in names if not list(ROOT.glob(name))] == []


@pytest.mark.parametrize("package", ["torch", "triton", "transformers", "peft"])
def test_the_oldest_versions_that_are_tested_are_those_that_are_supported(package):
    floor = requirements()[package].removeprefix(f"{package}>=")
    oldest = pins("constraints-oldest.txt")[package]
    assert (oldest + ".0").startswith(floor + ".")


def test_the_newest_versions_that_are_tested_cover_what_the_extras_need():
    newest = {name.lower().replace("_", "-") for name in pins("constraints.txt")}
    hardware = {"flash-attn", "mauve-text", "tensorboard", "wandb", "trackio", "fastperturb"}
    needed = {name.lower().replace("_", "-") for name in requirements()} - hardware
    assert needed - newest == set()


def test_the_python_versions_of_classifiers_are_those_that_run_the_tests():
    workflow = yaml.safe_load(text(".github/workflows/ci.yml"))
    matrix = workflow["jobs"]["tests"]["strategy"]["matrix"]["include"]
    classifiers = PROJECT["project"]["classifiers"]
    named = [
        line.split(" :: ")[-1] for line in classifiers if re.search(r"Python :: 3\.\d+$", line)
    ]
    assert sorted({entry["python"] for entry in matrix}) == named
    assert PROJECT["project"]["requires-python"] == f">={named[0]}"
    assert all((ROOT / entry["constraints"]).is_file() for entry in matrix)


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_reads_only_cancels_older_runs_and_names_actions_by_major_version(file):
    workflow = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["cancel-in-progress"] is True
    assert all("timeout-minutes" in job for job in workflow["jobs"].values())
    actions = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert actions and all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in actions)


@pytest.mark.parametrize("file", [*WORKFLOWS, ROOT / ".ci" / "run"], ids=lambda file: file.name)
def test_continuous_integration_runs_targets_that_make_has(file):
    targets = re.search(r"^\.PHONY: (.*)$", text("Makefile"), re.MULTILINE)[1].split()
    used = re.findall(r"^(?:\s*- run: )?make (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    names = [name for line in used for name in line.split()]
    assert names and set(names) <= set(targets)


@pytest.mark.parametrize("file", FORMS, ids=lambda file: file.stem)
def test_an_issue_form_has_what_github_asks_of_it(file):
    form = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert form["name"] and form["description"] and form["labels"]
    kinds = {"textarea", "input", "checkboxes", "dropdown", "markdown"}
    assert {field["type"] for field in form["body"]} <= kinds
    assert all(field["attributes"]["label"] for field in form["body"])
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)


def test_hooks_are_local_and_run_what_make_lint_runs():
    (repository,) = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
    assert repository["repo"] == "local"
    entries = [hook["entry"] for hook in repository["hooks"] if hook["language"] == "system"]
    assert all(entry.startswith(".venv/bin/") for entry in entries)
    for tool in ("ruff check", "ruff format", "mypy", "lint-imports"):
        assert tool in text("Makefile")
        assert any(tool in entry for entry in entries)


def test_contributing_names_the_tables_that_a_new_estimator_or_transform_goes_into():
    config = text("fastperturb/config.py")
    for table in ("ESTIMATORS", "TRANSFORMS"):
        assert f"`{table}`" in text("CONTRIBUTING.md") and f"\n{table} = " in config
    assert "\n_EQUATIONS = " in text("fastperturb/estimators.py")
    assert "\nFAMILIES = " in text("fastperturb/transforms.py")
    assert "\nCONFIGS = " in text("tests/tiny.py")
