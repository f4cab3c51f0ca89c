"""Every code block of README.md and docs/ runs, or is said not to and why."""

import ast
import contextlib
import importlib.util
import io
import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import tokenizers
import torch
import transformers

from fastperturb.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+?) -->\n)?"
    r"^```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<code>.*?)^```$",
    re.M | re.S,
)


@dataclass(frozen=True)
class CodeBlock:
    language: str
    title: str | None
    code: str
    line: int
    not_run: str | None


def blocks(page: Path) -> list[CodeBlock]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        CodeBlock(
            match["language"],
            match["title"],
            match["code"],
            text.count("\n", 0, match.start("code")) + 1,
            match["reason"],
        )
        for match in _FENCE.finditer(text)
    ]


def pages_with(language: str) -> list[Path]:
    return [page for page in PAGES if any(block.language == language for block in blocks(page))]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny GPT-2 of bytes under the name `gpt2`, and texts by the pages' names."""
    folder = tmp_path_factory.mktemp("here")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<|endoftext|>", *alphabet])}
    letters = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges=[]))
    letters.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ).save_pretrained(folder / "gpt2")
    model = tiny.gpt2(vocab_size=len(vocabulary), n_positions=256, bos_token_id=0, eos_token_id=0)
    model.save_pretrained(folder / "gpt2")
    for name in ("my_text.txt", "held_out.txt", "test.txt", "valid.txt"):
        (folder / name).write_text(f"A text that is called {name}.\n")
    return folder


@pytest.mark.parametrize("page", pages_with("python"), ids=name_of)
# As docs/scoring.md says: layer norms remove one direction.
@pytest.mark.filterwarnings("ignore:the information about 1 of:UserWarning")
def test_python_blocks_run_in_order(page, models, monkeypatch):
    """Offline, in one namespace a page, where "gpt2" is a tiny model in the working folder."""
    monkeypatch.chdir(models)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        if block.language != "python":
            continue
        source = "\n" * (block.line - 1) + block.code
        compiled = compile(source, name_of(page), "exec")
        if block.not_run is None:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compiled, namespace)


@pytest.mark.parametrize("page", pages_with("bash"), ids=name_of)
def test_commands_are_ones_that_exist_with_options_that_exist(page, models, monkeypatch):
    monkeypatch.chdir(models)
    for name, content in option_files().items():
        (models / name).write_text(content)
    for block in blocks(page):
        if block.language == "bash":
            for line in block.code.splitlines():
                check_command(line)


def option_files() -> dict[str, str]:
    """The YAML files that pages show, by title."""
    shown = [block for page in PAGES for block in blocks(page) if block.language == "yaml"]
    return {block.title: block.code for block in shown if block.title is not None}


def check_command(line: str) -> None:
    words = shlex.split(line, comments=True)
    match words:
        case []:
            return
        case ["make", target, *_]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), line
        case ["pip", "install", *_]:
            return
        case ["fastperturb", command, *arguments]:
            check_options(command, arguments)
        case ["torchrun", *_]:
            module, *arguments = words[words.index("-m") + 1 :]
            if module == "fastperturb":
                check_options(arguments[0], arguments[1:])
            else:
                assert importlib.util.find_spec(module), line
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module), line
        case _:
            pytest.fail(f"no check is known for the command: {line}")


def check_options(command: str, arguments: list[str]) -> None:
    """Raise unless the command's own parser takes the arguments, validation included."""
    module, _, name = main.COMMANDS[command][0].partition(":")
    options_class = getattr(importlib.import_module(module), name)
    main.parse(options_class, arguments, prog=f"fastperturb {command}")


def test_every_block_says_its_language_and_every_yaml_block_its_file():
    for page in PAGES:
        for block in blocks(page):
            where = f"{name_of(page)}, line {block.line}"
            assert block.language in ("python", "bash", "yaml", "text"), where
            assert block.language != "yaml" or block.title, where


def test_an_option_that_does_not_exist_is_noticed(models, monkeypatch, capsys):
    monkeypatch.chdir(models)
    with pytest.raises(SystemExit):
        check_command("fastperturb train --model gpt2 --data my_text.txt --no-such-option 1")
    assert "no-such-option" in capsys.readouterr().err


def test_quoted_messages_are_ones_that_the_code_has():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("|")]
    quoted = [message for row in rows for message in re.findall(r'"([^"]+)"', row)]
    texts = "\n".join(messages(path) for path in (ROOT / "fastperturb").rglob("*.py"))
    assert len(quoted) > 30
    assert [message for message in quoted if message not in texts] == []


def messages(path: Path) -> str:
    """The strings of a file, a line each, their placeholders left out."""
    lines = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "" for part in node.values]
            lines.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            lines.append(node.value)
    return "\n".join(lines)


def test_relative_links_lead_to_files():
    for page in PAGES:
        text = _FENCE.sub("", page.read_text(encoding="utf-8"))
        for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{name_of(page)} links {target}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 220


def test_indented_blocks_of_the_readme_are_commands_or_no_code():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for line in re.findall(r"^    (make .*)$", text, re.M):
        check_command(textwrap.dedent(line))
