"""Fixtures and markers that every test may use."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", metavar="I/N", help="Run every Nth test, from the Ith (0..N-1) on.")


def pytest_configure(config: pytest.Config) -> None:
    # Workers share the cores: more threads than one each only makes them wait for each other.
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if shard := config.getoption("shard", None):
        first, step = map(int, shard.split("/"))
        items[:] = items[first::step]
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Cache the datasets that a file's tests read in a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(params=["torch", "cpp"])
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run every op by each of a CPU's implementations; C++ needs a compiler."""
    from fastperturb.ops import dispatch
    from fastperturb.ops.cpp import build

    if request.param == "cpp" and not build.availability()[0]:
        pytest.skip(build.availability()[1])
    with dispatch.only(request.param):
        yield


@pytest.fixture
def one_process_mesh() -> Iterator[DeviceMesh]:
    """Start a process group of this process alone and give its mesh."""
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Find the real text and a tiny model, which are not part of the repository."""
    folder = Path(os.environ.get("FASTPERTURB_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}: set FASTPERTURB_DATA")
    return folder
