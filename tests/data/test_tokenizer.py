"""The byte tokenizer, Hugging Face files, and that what we save is what transformers loads."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moetrain.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer, save_tokenizer

TEXTS = [
    "",
    "hello  world\n\n\tx ",
    "héllo 😀👩‍👩‍👧 日本語 \ufeff\u2028",
    "".join(map(chr, range(0x300))),
    "don't . , !  it 's",
    "a\r\nb\x00\x7f",
    "</s> <|endoftext|>",
]


@pytest.fixture
def folder(tmp_path):
    """A small BPE tokenizer with an eos, that carries truncation and padding from a training run."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "</s>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, the dog on the log"] * 5, trainer)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    path = tmp_path / "hf"
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "eos_token": {"__type": "AddedToken", "content": "</s>"},
                "tokenizer_class": "PreTrainedTokenizerFast",
            }
        )
    )
    return path


@settings(deadline=None)
@given(st.text())
def test_byte_round_trip(text):
    """Any valid text comes back, and its ids are its UTF-8 bytes."""
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode([256, *ids, 257, 258]) == text


def test_byte_refuses_what_it_cannot_hold():
    """Lone surrogates and ids outside the vocabulary are ValueErrors; cut UTF-8 is shown, not raised."""
    with pytest.raises(ValueError, match="surrogates"):
        ByteTokenizer().encode("\ud800")
    with pytest.raises(ValueError, match=r"0\.\.258, found 7\.\.259"):
        ByteTokenizer().decode([7, 259])
    assert ByteTokenizer().decode([0xE2, 0x82]) == "\ufffd"


@pytest.mark.parametrize(
    "model_type", [None, "llama", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3"]
)
def test_saved_byte_tokenizer_in_transformers(tmp_path, model_type):
    """AutoTokenizer encodes and decodes like ours, also beside a config.json whose model type has its own
    tokenizer.
    """
    transformers = pytest.importorskip("transformers")
    ours = ByteTokenizer()
    save_tokenizer(ours, tmp_path)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (256, 257, 258)
    assert len(theirs) == ours.vocab_size
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text).tolist()
        assert theirs.decode(ours.encode(text)) == text


def test_saved_byte_tokenizer_reads_back_as_hugging_face(tmp_path):
    """Our own reader of tokenizer.json sees the same ids; special text is text unless asked for."""
    save_tokenizer(ByteTokenizer(), tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert (again.vocab_size, again.bos_id, again.eos_id, again.pad_id) == (259, 256, 257, 258)
    for text in [*TEXTS, "x<|eos|>"]:
        assert again.encode(text).tolist() == list(text.encode())
        assert again.decode(again.encode(text)) == text
    assert load_tokenizer(str(tmp_path), parse_special=True).encode("x<|eos|>").tolist() == [ord("x"), 257]


def test_hugging_face_neither_cuts_nor_pads(folder):
    """Truncation and padding stored in tokenizer.json are switched off, and equal an AutoTokenizer's full
    encoding.
    """
    transformers = pytest.importorskip("transformers")
    text = "the cat sat on the log " * 20
    ours = load_tokenizer(str(folder))
    ids = ours.encode(text)
    assert ids.dtype == np.int32 and ids.size > 20 and ours.decode(ids) == text
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert (
        ids.tolist() == theirs(text, add_special_tokens=False, truncation=False, padding=False)["input_ids"]
    )
    assert (ours.eos_id, ours.bos_id) == (1, None)
    assert load_tokenizer(str(folder / "tokenizer.json")).encode(text).tolist() == ids.tolist()
    with pytest.raises(ValueError, match="surrogates"):
        ours.encode("\ud800")


def test_vocab_size_covers_holes(folder):
    """vocab_size is the largest id + 1: the count of tokens would be too small for an embedding."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    token = next(iter(sorted(raw["model"]["vocab"], key=raw["model"]["vocab"].get, reverse=True)))
    raw["model"]["vocab"][token] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    assert load_tokenizer(str(folder)).vocab_size == 5001


def test_eos_is_found_or_asked_for(folder):
    """eos comes from any of the files transformers writes, or by hand; else the error says what to do."""
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="names no eos token"):
        load_tokenizer(str(folder))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [2, 1], "bos_token_id": None}))
    assert load_tokenizer(str(folder)).eos_id == 2
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    assert load_tokenizer(str(folder)).eos_id == 1
    assert load_tokenizer(str(folder), eos="<s>").eos_id == 2
    assert load_tokenizer(str(folder), eos=0).eos_id == 0
    with pytest.raises(ValueError, match="'<nope>' is not a token"):
        load_tokenizer(str(folder), eos="<nope>")
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<gone>"}))
    with pytest.raises(ValueError, match="'<gone>'.*special_tokens_map"):
        load_tokenizer(str(folder))


def test_save_copies_and_keeps_a_given_eos(folder, tmp_path):
    """A saved Hugging Face tokenizer encodes alike, and an eos given by hand survives."""
    (folder / "tokenizer_config.json").unlink()
    ours = load_tokenizer(str(folder / "tokenizer.json"), eos="<s>")
    save_tokenizer(ours, tmp_path / "copy")
    again = load_tokenizer(str(tmp_path / "copy"))
    assert again.eos_id == 2
    assert again.encode("the cat").tolist() == ours.encode("the cat").tolist()
    save_tokenizer(again, tmp_path / "copy")  # onto itself
    assert load_tokenizer(str(tmp_path / "copy")).eos_id == 2


def test_fingerprint_follows_content_not_place(folder, tmp_path):
    """Layout of the JSON and the folder's name do not matter; the vocabulary, the eos and the options do."""
    first = load_tokenizer(str(folder)).to_dict()
    save_tokenizer(load_tokenizer(str(folder)), tmp_path / "copy")
    path = tmp_path / "copy" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=4))
    second = load_tokenizer(str(tmp_path / "copy")).to_dict()
    assert first["fingerprint"] == second["fingerprint"] and first["spec"] != second["spec"]
    prints = {
        first["fingerprint"],
        load_tokenizer("byte").to_dict()["fingerprint"],
        load_tokenizer(str(folder), eos="<s>").to_dict()["fingerprint"],
        load_tokenizer(str(folder), parse_special=True).to_dict()["fingerprint"],
    }
    raw = json.loads(path.read_text())
    raw["model"]["merges"].pop()
    path.write_text(json.dumps(raw))
    prints.add(load_tokenizer(str(tmp_path / "copy")).to_dict()["fingerprint"])
    assert len(prints) == 5
    json.dumps(first)


def test_unreadable_specs(tmp_path):
    """A wrong path, a broken file and options the byte tokenizer has not are clear errors."""
    with pytest.raises(ValueError, match="does not exist; give 'byte'"):
        load_tokenizer(str(tmp_path / "none"))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="can't be read"):
        HuggingFaceTokenizer(str(tmp_path))
    with pytest.raises(ValueError, match="fixed eos"):
        load_tokenizer("byte", eos=3)


@pytest.fixture(scope="module")
def saved_byte(tmp_path_factory):
    path = tmp_path_factory.mktemp("byte")
    save_tokenizer(ByteTokenizer(), path)
    return load_tokenizer(str(path))


@settings(deadline=None)
@given(text=st.text())
def test_byte_level_file_equals_byte_tokenizer(saved_byte, text):
    """Property: the saved ByteLevel model gives the byte ids for any text without special tokens."""
    assert saved_byte.encode(text).tolist() == list(text.encode())
