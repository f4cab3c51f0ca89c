"""Training runs as processes: killed and resumed, launched by torchrun, measured."""

import dataclasses
import json
import multiprocessing
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import tiny_run
import torch

from fastperturb import PerturbConfig
from fastperturb.train import LoraOptions
from fastperturb.train import run as command

pytestmark = pytest.mark.slow

TRIALS = 20
CHANGING = ("tokens_per_second",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    tiny_run.model_folder(folder / "base")
    tiny_run.text_file(folder / "train.txt")
    tiny_run.text_file(folder / "held_out.txt", documents=6, seed=1)
    return folder


def started(options):
    """A process that runs the command, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastperturb.train.loop", "fastperturb.train.curves", "peft"])
    process = context.Process(target=quietly, args=(options,))
    process.start()
    return process


def quietly(options):
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    command(options)


def tensors_of(model):
    return {
        f"{path.name}:{name}": value
        for path in sorted(model.glob("*.safetensors"))
        for name, value in safetensors.torch.load_file(path).items()
    }


def results_of(folder):
    """The tensors and metrics of a run, which must not depend on how often it was killed."""
    # Tensors, not files: safetensors writes its metadata in any order.
    tensors = {
        f"{name}/{key}": value.numpy().tobytes()
        for name in ("model", "best")
        for key, value in tensors_of(folder / name).items()
    }
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for name in CHANGING:
            line.pop(name, None)
    return tensors, lines


def test_a_run_killed_at_a_random_moment_and_resumed_ends_with_the_same_bits(folder, tmp_path):
    options = tiny_run.options(
        folder,
        output_dir=tmp_path / "whole",
        max_steps=12,
        save_every=1,  # so that many are killed while they write a checkpoint
        eval_every=4,
        eval_data=(str(folder / "held_out.txt"),),
        lora=LoraOptions(rank=2, dropout=0.1),
    )
    whole = started(options)
    begun = time.monotonic()
    whole.join()
    duration = time.monotonic() - begun
    assert whole.exitcode == 0
    expected = results_of(tmp_path / "whole")
    assert len(expected[1]) == 12 + 4
    generator = random.Random(0)
    for trial in range(TRIALS):
        resumed = dataclasses.replace(
            options, output_dir=tmp_path / f"trial-{trial}", resume="auto"
        )
        killed = started(resumed)
        time.sleep(generator.uniform(0, duration))
        killed.kill()
        killed.join()
        again = started(resumed)
        again.join()
        assert again.exitcode == 0
        assert results_of(resumed.output_dir) == expected, f"trial {trial}"


def by_torchrun(processes, config, **flags):
    """`fastperturb train` under torchrun, with options from a YAML file."""
    arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
            *("-m", "fastperturb", "train", "--config", str(config), *arguments),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_two_processes_of_torchrun_train_the_parameters_of_one(folder, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {folder / 'base'}\n"
        f"data: [{folder / 'train.txt'}]\n"
        f"eval_data: [{folder / 'held_out.txt'}]\n"
        "device: cpu\nblock_size: 16\nbatch_size: 3\nmax_steps: 4\nsave_every: 2\n"
        "learning_rate: 1e-2\neval_samples: 8\n"
        "perturb: {num_samples: 4, latent_dim: 4}\nlora: {rank: 2}\n"
    )
    methods = {
        "learned": {
            "ddp": {},  # three blocks over two processes: one of them has one less
            "fsdp": {"parallel": "fsdp"},
            "mc": {"mc": 2},
        },
        "neftune": {"fsdp": {"parallel": "fsdp"}},  # its noise is off while it is judged
    }
    for method, ways in methods.items():
        one = tmp_path / method
        by_torchrun(1, config, **{"output-dir": one, "method": method})
        expected = tensors_of(one / "model")
        results = json.loads((one / "results.json").read_text())
        for name, flags in ways.items():
            run = tmp_path / f"{method}-{name}"
            by_torchrun(2, config, **{"output-dir": run, "method": method}, **flags)
            tensors = tensors_of(run / "model")
            assert tensors.keys() == expected.keys()
            for key, value in tensors.items():
                torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5, msg=key)
            evaluations = json.loads((run / "results.json").read_text())["evaluations"]
            for ours, reference in zip(evaluations, results["evaluations"], strict=True):
                assert ours["nll"] == pytest.approx(reference["nll"], rel=1e-6)


@pytest.mark.parametrize("plan", ["batched", "chunked"])
def test_the_memory_estimate_is_within_a_fifth_of_what_the_run_takes(plan, folder, tmp_path):
    perturb = PerturbConfig(num_samples=32, plan=plan, chunk_size=8 if plan == "chunked" else None)
    changes = {"perturb": perturb, "batch_size": 16, "max_steps": 3, "block_size": 256}
    options = tiny_run.options(folder, output_dir=tmp_path / "run", **changes)
    text = measured(dataclasses.replace(options, dry_run=True))[0]
    estimate = int(re.search(r"about ([\d,]+) MiB", text)[1].replace(",", ""))
    peak = measured(options)[1] / 1024
    assert 0.8 * peak < estimate < 1.2 * peak


def measured(options):
    """Return the output of a run in a fresh process, and its peak resident memory in KiB."""
    script = (
        "import pickle, re, sys, torch\n"
        "torch.set_num_threads(1)\n"
        "from fastperturb.train import run\n"
        "run(pickle.load(sys.stdin.buffer))\n"
        # Not ru_maxrss, which begins with the peak of the process that starts this one.
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input=pickle.dumps(options), capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    printed = done.stdout.decode()
    return printed, int(printed.split()[-1])


def test_a_run_ended_by_ctrl_c_fails_and_leaves_a_checkpoint(folder, tmp_path):
    options = tiny_run.options(folder, output_dir=tmp_path / "run", max_steps=500, save_every=1)
    process = started(options)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "run" / "checkpoints").glob("step-*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode != 0
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
