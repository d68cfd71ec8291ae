"""What is read from the cards of other models, which anybody may have written."""

import huggingface_hub
import pytest

from jaxdistill.models.model_card import card_facts, is_hub_name


@pytest.mark.parametrize(
    ("head", "licence", "bases"),
    [
        ("license: mit\nbase_model: user/model", {"license": "mit"}, ("user/model",)),
        ("license: other\nlicense_name: own\nlicense_link: LICENSE", {"license": "other", "license_name": "own",
         "license_link": "LICENSE"}, ()),
        ("base_model:\n- user/one\n- gpt2\n- 3\n- ../folder", {}, ("user/one", "gpt2")),
        ("license: [mit, apache-2.0]\nbase_model: {a: b}", {}, ()),
        ("tags: x", {}, ()),
        ("license: [", {}, ()),
        ("- license", {}, ()),
    ],
)  # fmt: skip
def test_the_head_of_a_card(tmp_path, head, licence, bases):
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n\n# Model\n")
    assert card_facts(str(tmp_path)) == (licence, bases)


@pytest.mark.parametrize("content", [None, b"", b"# Model\nlicense: mit\n", b"---\n", b"\xff\xfe\x00---\nlicense: mit"])
def test_no_head_says_nothing(tmp_path, content):
    if content is not None:
        (tmp_path / "README.md").write_bytes(content)
    assert card_facts(str(tmp_path)) == ({}, ())


def test_a_model_of_the_hub(tmp_path, monkeypatch):
    def hf_hub_download(name, file, *, revision, etag_timeout):
        assert (name, file, revision) == ("user/model", "README.md", "v1")
        (tmp_path / "card.md").write_text("---\nlicense: mit\n---\n")
        return str(tmp_path / "card.md")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    assert card_facts("user/model", revision="v1").licence == {"license": "mit"}
    assert card_facts("user/other") == ({}, ())  # a card that cannot be fetched is no reason to stop


def test_names_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert is_hub_name("gpt2") and is_hub_name("user/model-1.0")
    assert not any(map(is_hub_name, ("folder", "./x", "/x/y", "~/x", "a/b/c", "", "a b", "user/", "user/../x")))
