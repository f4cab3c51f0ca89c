"""Benchmarks on a CPU: the ops and a training step beside naive code, and the README's summary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from docs.tables import studies, synthetic
from docs.tables.cells import ratio, read, table

# (file, what memory it was measured in)
_EMBED = (
    ("perturb_embed_cpu.json", "reused"),
    ("perturb_embed_cpu_fresh_memory.json", "fresh"),
)
_EMBED_SHAPE = {"M": 8, "B": 1, "T": 512, "D": 1024, "R": 16}
_HEADS = (
    ("linear_logprob", True, "float32"),
    ("linear_logprob", True, "bfloat16"),
    ("linear_logprob", False, "float32"),
    ("linear_quadratic", True, "float32"),
)
_PLANS = ("batched", "chunked", "resample")
_RIVALS = ("naive", "loop", "checkpointed")


def median(results: dict[str, Any], provider: str, metric: str, **where: Any) -> float:
    """Return the median of the one row of a benchmark that is of this provider, metric and x."""
    [row] = [
        row
        for row in results["rows"]
        if (row["provider"], row["metric"]) == (provider, metric)
        and row["mode"] == "full"
        and all(row["x"].get(key, row.get(key)) == value for key, value in where.items())
    ]
    return row["p50"]


def perturb_embed() -> str:
    files = [(read(name), memory) for name, memory in _EMBED]
    header = ["transform"]
    for _, memory in files:
        header += [f"naive / ours, {memory} memory", f"ours / floor, {memory} memory"]
    rows = []
    for family in dict.fromkeys(row["x"]["family"] for row in files[0][0]["rows"]):
        cells = [f"`{family}`"]
        for results, _ in files:
            where = {"family": family, **_EMBED_SHAPE}
            ours, naive, floor = (
                median(results, provider, "milliseconds", **where)
                for provider in ("cpp", "naive", "floor")
            )
            cells += [ratio(naive / ours), ratio(ours / floor)]
        rows.append(cells)
    return table(header, rows, *(name for name, _ in _EMBED))


def heads() -> str:
    results = read("heads_cpu.json")
    header = ["head", "weights", "dtype", "naive / ours", "torch.compile / ours", "ours / GEMMs"]
    header += ["extra MiB, naive", "extra MiB, ours"]
    rows = []
    for op, frozen, dtype in _HEADS:
        where = {"op": op, "frozen": frozen, "dtype": dtype}
        times = {
            provider: median(results, provider, "milliseconds", **where)
            for provider in ("cpp", "naive", "compiled", "floor")
        }
        memory = [median(results, name, "extra_mib", **where) for name in ("naive", "cpp")]
        rows.append(
            [
                f"`{op}`",
                "frozen" if frozen else "trained",
                dtype,
                ratio(times["naive"] / times["cpp"]),
                ratio(times["compiled"] / times["cpp"]),
                ratio(times["cpp"] / times["floor"]),
                *(f"{mib:,.0f}" for mib in memory),
            ]
        )
    return table(header, rows, "heads_cpu.json")


def step() -> str:
    results = read("step_cpu.json")
    header = ["plan", "naive / ours", "loop / ours", "checkpointed loop / ours", "ms", "extra MiB"]
    rows = []
    for plan in _PLANS:
        ours = median(results, plan, "milliseconds")
        faster = [ratio(median(results, rival, "milliseconds") / ours) for rival in _RIVALS]
        extra = median(results, plan, "extra_mib")
        rows.append([f"`{plan}`", *faster, f"{ours:,.0f}", f"{extra:,.0f}"])
    for rival in _RIVALS:
        taken, extra = (median(results, rival, metric) for metric in ("milliseconds", "extra_mib"))
        rows.append([rival, "", "", "", f"{taken:,.0f}", f"{extra:,.0f}"])
    return table(header, rows, "step_cpu.json")


def step_memory() -> str:
    growth = read("step_cpu.json")["growth"]
    counts = list(growth[0]["extra_mib"])
    header = ["plan", *(f"MiB above the model, M = {count}" for count in counts), "ratio"]
    rows = [
        [
            f"`{row['plan']}`",
            *(f"{row['extra_mib'][count]:,.1f}" for count in counts),
            ratio(row["ratio"]),
        ]
        for row in growth
    ]
    return table(header, rows, "step_cpu.json")


def split_samples() -> str:
    results = read("split_samples_cpu.json")
    alone, shared = (median(results, name, "milliseconds") for name in ("one", "mc=2"))
    rows = [
        ["1", f"{alone:,.0f}", "1", f"{median(results, 'one', 'extra_mib'):,.0f}"],
        [
            "2",
            f"{shared:,.0f}",
            ratio(shared / alone),
            f"{median(results, 'mc=2', 'extra_mib'):,.0f}",
        ],
    ]
    header = ["processes that share the samples", "ms a step", "ratio", "extra MiB in each"]
    return table(header, rows, "split_samples_cpu.json")


def train_methods() -> str:
    name = "train_stories_cpu.json"
    rows = read(name)["rows"]
    header = ["held-out nll a token", *(f"`{row['method']}`" for row in rows)]
    lines = [
        ["before", *(f"{row['evaluations'][0]['nll']:.3f}" for row in rows)],
        ["after", *(f"{row['evaluations'][-1]['nll']:.3f}" for row in rows)],
    ]
    return table(header, lines, name)


def highlights() -> str:
    """Return the README's table: five rows, good news and bad."""
    speeds, heads_of = read("step_cpu.json"), read("heads_cpu.json")
    faster = median(speeds, "naive", "milliseconds") / median(speeds, "batched", "milliseconds")
    [grown] = [row["extra_mib"] for row in speeds["growth"] if row["plan"] == "chunked"]
    (few, low), (many, high) = grown.items()
    where = {"op": "linear_logprob", "frozen": True, "dtype": "float32"}
    head_faster = median(heads_of, "naive", "milliseconds", **where) / median(
        heads_of, "cpp", "milliseconds", **where
    )
    mib = [median(heads_of, name, "extra_mib", **where) for name in ("naive", "cpp")]
    distances = synthetic.out_of_support()
    rows = [
        [
            "synthetic language, far out of support: KL to the truth",
            f"exact prefix {distances['exact']:.2f}, best fixed noise {distances['fixed']:.2f}, "
            f"**learned {distances['learned']:.2f}**",
        ],
        [
            "real text, four settings, beside a tuned temperature and other controls",
            f"**a gain in {studies.gains()} of {len(studies.STUDIES)}**",
        ],
        [
            "a training step at M = 8 beside naive PyTorch",
            f"{ratio(faster)} times faster (`batched`)",
        ],
        [
            f"memory above the model from M = {few} to M = {many}, plan `chunked`",
            f"{low:.0f} MiB to {high:.0f} MiB",
        ],
        [
            "vocabulary head (frozen, fp32) beside naive PyTorch",
            f"{ratio(head_faster)} times faster, {mib[1]:,.0f} MiB instead of {mib[0]:,.0f}",
        ],
    ]
    header = f"| measured on a CPU ({_processors()}) | result |"
    return "\n".join([header, "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])


def _processors() -> str:
    """Return the names of the processors that the highlights were measured on."""
    files = ["step_cpu.json", "heads_cpu.json", *synthetic.FILES, *studies.FILES]
    return " and ".join(dict.fromkeys(read(name)["device"].split(",")[0] for name in files))


TABLES: dict[str, Callable[[], str]] = {
    "perturb-embed": perturb_embed,
    "heads": heads,
    "step": step,
    "step-memory": step_memory,
    "split-samples": split_samples,
    "train-methods": train_methods,
    "highlights": highlights,
}
