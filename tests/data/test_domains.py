"""Domains: the tokens that training would see, and the number of each token's document."""

import json

import datasets
import letters
import numpy as np
import pytest
import tiny_run
import transformers

from fastperturb.data import DataOptions, domains, evaluation_blocks
from fastperturb.data.domains import DomainOptions

TEXTS = [
    " ".join(tiny_run.WORDS[i : i + n]) for i, n in ((0, 3), (5, 12), (20, 7), (30, 16), (9, 1))
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tiny_run.model_folder(tmp_path_factory.mktemp("base"))
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def ids(tokenizer, text):
    return [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize("block_size", [4, 8, 64])
def test_domain_tokens_are_those_of_each_document(block_size, jsonl, tokenizer):
    domain = domains.read("d", str(jsonl), DomainOptions(block_size=block_size), tokenizer)
    assert domain.document_count == len(TEXTS)
    assert [document.tolist() for document in domain.tokens()] == [ids(tokenizer, t) for t in TEXTS]


def test_documents_numbers_each_token_and_padding_is_minus_one(jsonl, tokenizer):
    domain = domains.read("d", str(jsonl), DomainOptions(block_size=8), tokenizer)
    numbers = [n for n, text in enumerate(TEXTS) for _ in ids(tokenizer, text)]
    numbers += [-1] * (-len(numbers) % 8)
    assert np.concatenate(domain.documents).tolist() == numbers


def test_a_domain_has_the_blocks_that_training_would_evaluate_on(jsonl, tokenizer, tmp_path):
    text = tiny_run.text_file(tmp_path / "a.txt")
    folder = tmp_path / "folder"
    folder.mkdir()
    tiny_run.text_file(folder / "b.txt", seed=1)
    tiny_run.text_file(folder / "c.txt", seed=2)
    saved = tmp_path / "saved"
    datasets.DatasetDict(test=datasets.Dataset.from_dict({"text": TEXTS})).save_to_disk(saved)
    for place in map(str, (jsonl, text, folder, saved)):
        options = {"block_size": 16, "split": "test", "document_separator": "\n\n"}
        domain = domains.read("d", place, DomainOptions(**options), tokenizer)
        expected = evaluation_blocks([place], DataOptions(data=(place,), **options), tokenizer)
        letters.assert_equal(list(domain.blocks), list(expected))


def test_a_domain_of_several_files_holds_their_documents_in_order(jsonl, tokenizer):
    domain = domains.read("d", [str(jsonl), str(jsonl)], DomainOptions(block_size=8), tokenizer)
    assert [document.tolist() for document in domain.tokens()] == [
        ids(tokenizer, t) for t in TEXTS * 2
    ]


def test_the_first_documents_and_the_first_tokens_of_each_are_kept(jsonl, tokenizer):
    options = DomainOptions(block_size=8, max_documents=3, document_tokens=6)
    domain = domains.read("d", str(jsonl), options, tokenizer)
    assert [document.tolist() for document in domain.tokens()] == [
        ids(tokenizer, t)[:6] for t in TEXTS[:3]
    ]


@pytest.fixture
def hub(monkeypatch):
    """A hub that gives every dataset the same rows; the calls that asked it."""
    calls = []

    def load(repository, config, *, split, streaming):
        calls.append((repository, config, split, streaming))
        lines = [" = A title = \n", "", " w1 w2 \n", " = = A section = = \n", " w3 \n"]
        lines += [" = Another title = \n", " w4 w5 \n"]
        rows = datasets.Dataset.from_dict({"text": lines, "story": lines, "content": lines})
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


def test_a_known_name_is_a_place_on_the_hub_with_its_own_field_and_split(hub, tokenizer):
    for name in domains.KNOWN:
        domains.read("d", name, DomainOptions(text_field="other", split="other"), tokenizer)
    assert ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", False) in hub
    assert ("codeparrot/codeparrot-clean-valid", None, "train", False) in hub
    assert len(hub) == len(domains.KNOWN)


def test_the_lines_of_wikitext_are_joined_into_articles(hub, tokenizer):
    domain = domains.read("d", "wikitext2", DomainOptions(), tokenizer)
    texts = [
        " = A title = \n w1 w2 \n = = A section = = \n w3 \n",
        " = Another title = \n w4 w5 \n",
    ]
    assert [document.tolist() for document in domain.tokens()] == [ids(tokenizer, t) for t in texts]


def test_max_documents_of_a_hub_text_are_streamed(hub, tokenizer):
    domain = domains.read("d", "openwebtext", DomainOptions(max_documents=2), tokenizer)
    assert hub[-1] == ("Elriggs/openwebtext-100k", None, "train", True)
    assert domain.document_count == 2


def test_a_local_folder_with_a_known_name_is_read_instead_of_the_hub(
    hub, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "a.txt").write_text("w1 w2 w3")
    domain = domains.read("d", "wikitext2", DomainOptions(), tokenizer)
    assert [document.tolist() for document in domain.tokens()] == [ids(tokenizer, "w1 w2 w3")]
    assert not hub


def test_a_known_name_without_a_network_raises_with_advice(tokenizer, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        ValueError, match="hub does not give it .* Without a network, give a folder"
    ):
        domains.read("d", "germanquad", DomainOptions(), tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_documents": 0}, "max_documents must be at least 1, got 0"),
        ({"document_tokens": 1}, "document_tokens must be at least 2 to predict, got 1"),
        ({"block_size": 1}, "block_size must be at least 2"),
    ],
)
def test_an_invalid_option_raises(changes, message):
    with pytest.raises(ValueError, match=message):
        DomainOptions(**changes)


def test_a_text_without_documents_raises(tokenizer, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="has no text"):
        domains.read("d", str(tmp_path / "empty.txt"), DomainOptions(), tokenizer)
