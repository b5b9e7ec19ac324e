"""Tokenizers: from GGUF metadata and from folders, against transformers and SentencePiece; chat templates."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

from readme_jax.checkpoints.gguf_tokenizer import tokenizer_from_metadata
from readme_jax.checkpoints.hf import Dense
from readme_jax.checkpoints.tokenizer import Tokenizer
from readme_jax.errors import CheckpointError

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces\n\n\tand a tab \r\n",
    "It's what they'd've said: WE'LL SEE, DON'T",
    "Digits 1 23  456 7890 and ½ ² ٣ 3.14e-10",
    "naïve café — “quoted” … ¿qué?",
    "日本語のテキスト、한국어 그리고 中文",
    "emoji 🙂👩‍👩‍👧‍👦 and \U0001f1eb\U0001f1f7",
    "def f(x):\n    return x**2  # squared\n",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "https://example.org/a?b=c&d=%20#e",
    "\x00\x7f\u200b\ufeff control",
]


@pytest.fixture(scope="module")
def theirs(smollm2_file: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(smollm2_file.parent, gguf_file=smollm2_file.name)


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_equals_transformers(smollm2: Dense, theirs: Any, text: str) -> None:
    """transformers builds a plain GPT-2 tokenizer, without SmolLM's cut around every digit: that is put in first."""
    backend = theirs.backend_tokenizer
    digits = pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer = smollm2.tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode(text)
    assert ids == theirs(text).input_ids
    assert tokenizer.decode(ids, special=True) == text
    assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs", "Cc"]), max_size=60))
def test_smollm2_decodes_what_it_encodes(smollm2: Dense, text: str) -> None:
    """Its vocabulary lacks some bytes: control characters, and those of unassigned planes."""
    assert smollm2.tokenizer is not None
    assert smollm2.tokenizer.decode(smollm2.tokenizer.encode(text), special=True) == text


def test_smollm2_chat_equals_transformers(smollm2: Dense, theirs: Any) -> None:
    tokenizer = smollm2.tokenizer
    assert tokenizer is not None
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": 'And <of> "Spain"?'},
    ]
    for part in (messages, messages[1:2]):
        for reply in (True, False):
            theirs_text = theirs.apply_chat_template(part, tokenize=False, add_generation_prompt=reply)
            assert tokenizer.chat(part, reply=reply) == theirs_text
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, (2,), 49152)
    assert tokenizer.decode([tokenizer.document_end], special=True) == "<|endoftext|>"  # not the end of a chat turn


def test_saved_and_loaded_again(smollm2: Dense, theirs: Any, tmp_path: Path) -> None:
    tokenizer = smollm2.tokenizer
    assert tokenizer is not None
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again is not None
    assert (again.bos_id, again.eos_ids, again.chat_template) == (
        tokenizer.bos_id,
        tokenizer.eos_ids,
        tokenizer.chat_template,
    )
    assert again.fingerprint == tokenizer.fingerprint
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (hf.bos_token_id, hf.eos_token_id) == (1, 2)
    assert hf.chat_template == tokenizer.chat_template
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text) == hf(text).input_ids
    assert again.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def small(special: bool = True) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<turn>"],
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    if special:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend


def test_folder_with_every_source_of_settings(tmp_path: Path) -> None:
    """BOS by the post-processor, several ends of text, a template of its own file, tokens given as objects."""
    small().save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>", "special": True}, "eos_token": "</s>", "chat_template": "unused"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer is not None
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (0, (2, 1))
    assert tokenizer.encode("hi") == [0, *tokenizer.encode("hi", special=False)]
    assert tokenizer.chat([{"role": "user", "content": "hi"}]) == "<s>hi<turn>"
    tokenizer.save(tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again")
    assert again is not None and (again.bos_id, again.eos_ids) == (0, (2, 1))
    assert again.fingerprint == tokenizer.fingerprint


def test_padding_and_truncation_of_the_file_do_not_leak(tmp_path: Path) -> None:
    backend = small()
    backend.enable_padding(length=64)
    backend.enable_truncation(4)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode(TEXTS[2])) == TEXTS[2]


def test_broken_tokenizer_files(tmp_path: Path) -> None:
    assert Tokenizer.load(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.load(tmp_path)
    small().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<nowhere>"}')
    with pytest.raises(CheckpointError, match="eos_token '<nowhere>', which is not in the vocabulary"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object, found list"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}\n  {% if loop.first %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}", "a<b>\n"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "a<b>"}]'),
        ("{% for m in [1, 2, 3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}", "1"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "a<b>!"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ add_generation_prompt }}", "True"),
    ],
)
def test_templates_render_as_in_the_field(template: str, expected: str) -> None:
    tokenizer = Tokenizer(small(), chat_template=template)
    assert tokenizer.chat([{"role": "user", "content": "a<b>"}]) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "the chat template failed"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0]['content'] + 1 }}", "cannot render these messages"),
    ],
)
def test_templates_that_fail_or_escape(template: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer(small(), chat_template=template).chat([{"role": "user", "content": "hi"}])
    assert "\n" not in str(caught.value)


def test_no_template() -> None:
    assert Tokenizer(small()).chat([{"role": "user", "content": "hi"}]) is None


def metadata(values: dict[str, Any]) -> Callable[..., Any]:
    return lambda key, default=None: values.get(key, default)


def byte_level_metadata(pre: str) -> dict[str, Any]:
    backend = json.loads(small(special=False).to_str())
    tokens = sorted(backend["model"]["vocab"], key=backend["model"]["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in backend["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 2,
    }


@pytest.mark.parametrize("pre", ["llama-bpe", "tekken", "gpt-2"])
def test_pre_tokenizers_equal_transformers(tmp_path: Path, pre: str) -> None:
    values = byte_level_metadata(pre)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    for key, value in values.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="t.gguf")
    ours = tokenizer_from_metadata(tmp_path, metadata(values))
    assert ours.eos_ids == (1, 2)
    for text in TEXTS:
        if "<|endoftext|>" in text:  # transformers adds it to any such vocabulary
            continue
        assert ours.encode(text, special=False) == theirs(text, add_special_tokens=False).input_ids
        assert ours.decode(ours.encode(text), special=False) == text
    # llama.cpp puts BOS before Llama 3 and Mistral texts unless told otherwise, before GPT-2 texts when told so
    assert ours.encode("hi")[0] == 0 or pre == "gpt-2"
    told = {"tokenizer.ggml.add_bos_token": pre == "gpt-2", "tokenizer.ggml.add_eos_token": True}
    ids = tokenizer_from_metadata(tmp_path, metadata(values | told)).encode("hi")
    assert (ids[0] == 0, ids[-1]) == (pre == "gpt-2", 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.pre": "martian"}, "unsupported pre-tokenizer 'martian'"),
        ({"tokenizer.ggml.model": "t5"}, "unsupported tokenizer 't5'"),
        ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges is missing"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.scores is missing"),
    ],
)
def test_metadata_that_cannot_be_read(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        tokenizer_from_metadata(tmp_path, metadata(byte_level_metadata("gpt-2") | changes))


def test_sentencepiece_equals_the_library(tmp_path: Path) -> None:
    """A Llama-2-style vocabulary, trained here: BPE with byte fallback, digits apart, a space put before the text."""
    model = io.BytesIO()
    source = Path(sentencepiece.__file__).read_text(encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(source.splitlines() + TEXTS),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    reference = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(reference.get_piece_size())

    def kind(i: int) -> int:
        if reference.is_unknown(i):
            return 2
        return 3 if reference.is_control(i) else 6 if reference.is_byte(i) else 1

    values = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [reference.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [reference.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [kind(i) for i in ids],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    ours = tokenizer_from_metadata(tmp_path, metadata(values))
    texts = [t for t in TEXTS if t and "\x00" not in t] + source.splitlines()[:200]
    for text in filter(None, texts):
        expected = reference.encode(text)
        assert ours.encode(text) == [1, *expected], text
        assert ours.decode(ours.encode(text)) == reference.decode(expected) == text
