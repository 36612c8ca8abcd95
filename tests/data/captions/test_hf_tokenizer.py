"""Tokenizers of transformers, read from folders, behind the interface of CLIP's."""

import pickle

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from data.captions.hf_tokenizer import HfTokenizer
from data.captions.mlm import mask_tokens
from data.errors import DataError
from data.rng import keyed_rng
from tests.models.hugging_face import VOCAB_SIZE, save_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_ids_equal_transformers_and_never_exceed_the_context(folder):
    tokenizer, reference = HfTokenizer(folder, 8), transformers.AutoTokenizer.from_pretrained(folder)
    for caption in ("a red square", "", "a red square number 1 2 3 4 5", "Z\u00fcrich \ud800 \x00 [MASK] [SEP]"):
        clean = caption.encode("utf-8", errors="replace").decode("utf-8")
        assert tokenizer.encode(caption) == reference(clean, truncation=True, max_length=8)["input_ids"]
        assert len(tokenizer.encode(caption)) <= 8
    assert tokenizer.decode(tokenizer.encode("a red square")) == "a red square"
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.mask_id) == (VOCAB_SIZE, 0, 4)


def test_a_pickled_tokenizer_is_the_same_and_reads_nothing(folder, monkeypatch):
    tokenizer = HfTokenizer(folder, 12)
    data = pickle.dumps(tokenizer)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", None)
    other = pickle.loads(data)
    assert other.hash == tokenizer.hash and other.encode("a blue bar") == tokenizer.encode("a blue bar")


def test_the_hash_tells_context_lengths_apart(folder):
    assert HfTokenizer(folder, 12).hash != HfTokenizer(folder, 13).hash


def test_masking_touches_text_only(folder):
    tokenizer = HfTokenizer(folder, 16)
    ids = tokenizer.encode("a red square number 1 2 3")
    drawn = set()
    for sample in range(300):
        masked = mask_tokens(ids, keyed_rng(0, sample), mask_id=tokenizer.mask_id, text_ids=tokenizer.text_ids)
        assert masked.token_ids[0] == ids[0] and masked.token_ids[-1] == ids[-1]
        assert all(0 < position < len(ids) - 1 for position in masked.positions)
        assert masked.targets == [ids[position] for position in masked.positions]
        drawn |= set(masked.token_ids) - set(ids)
    assert tokenizer.mask_id in drawn
    assert not (drawn - {tokenizer.mask_id}) & set(tokenizer.special_ids) and len(drawn) > 10
    assert np.array_equal(tokenizer.text_ids, np.arange(5, VOCAB_SIZE))


def test_captions_end_with_end_of_text_where_there_is_one(tmp_path):
    vocabulary = {"<|end|>": 0, "a": 1, "b": 2}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>").save_pretrained(tmp_path)
    tokenizer = HfTokenizer(str(tmp_path), 4)
    assert tokenizer.encode("a b") == [1, 2, 0]
    assert tokenizer.encode("a b a b a b") == [1, 2, 1, 0]
    assert tokenizer.encode("") == [0]
    assert tokenizer.mask_id is None


def test_mistakes_are_named(folder, tmp_path):
    with pytest.raises(DataError, match="gives no tokenizer"):
        HfTokenizer(str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"context_length is 2; .* needs 3"):
        HfTokenizer(folder, 2)
