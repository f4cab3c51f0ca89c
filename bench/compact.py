"""`python -m bench.compact FILES`: rewrite results as small as the repository keeps them.

Commands write JSON that is indented, with every digit. What is committed under bench/results has
a record a line and eight significant digits, which is more than any table, picture or verdict
shows: a sum of 5000 nats is kept to a ten-thousandth of a nat.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

DIGITS = 8


def rounded(value: Any) -> Any:
    """Round every float inside `value` to DIGITS significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def compact(results: dict[str, Any]) -> str:
    """Return JSON with a line for every key, and for every record that a key holds."""
    lines = [f"{_line(key)}: {_records(value)}" for key, value in rounded(results).items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _records(value: Any) -> str:
    if isinstance(value, list) and _holds_containers(value):
        return "[\n" + ",\n".join(map(_line, value)) + "\n]"
    if isinstance(value, dict) and _holds_containers(value.values()):
        entries = [f"{_line(key)}: {_line(item)}" for key, item in value.items()]
        return "{\n" + ",\n".join(entries) + "\n}"
    return _line(value)


def _holds_containers(values: Any) -> bool:
    return any(isinstance(value, dict | list) for value in values)


def _line(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def main(files: list[Path], *, check: bool) -> int:
    """Rewrite the files, or with `check` name those that are not compact; 1 if there are any."""
    large = 0
    for file in files:
        text = file.read_text(encoding="utf-8")
        smaller = compact(json.loads(text))
        if smaller != text:
            large += 1
            print(f"{file}: {len(text):,} characters, {len(smaller):,} when compact")
            if not check:
                file.write_text(smaller, encoding="utf-8")
    return 1 if check and large else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.compact", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if any is large")
    options = parser.parse_args()
    sys.exit(main(options.files, check=options.check))
