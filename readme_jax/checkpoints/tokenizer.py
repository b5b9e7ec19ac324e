"""Text to token ids and back, and the chat template that comes with a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from readme_jax.checkpoints.chat import render
from readme_jax.errors import CheckpointError
from readme_jax.files import write_text


class Tokenizer:
    """A `tokenizers.Tokenizer` with the ids and the chat template that a model folder keeps beside it."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        chat_template: str | None = None,
    ) -> None:
        self.backend = backend
        self.bos_id = bos_id
        self.eos_ids = tuple(eos_ids)
        self.chat_template = chat_template
        backend.no_padding()
        backend.no_truncation()

    @property
    def document_end(self) -> int | None:
        """What closes a document in packed text: end-of-text as in pretraining, or else the first EOS.

        A chat model's EOS ends a turn; between documents it would teach the model to answer nothing.
        """
        for name in ("<|endoftext|>", "<|end_of_text|>"):
            if (found := self.backend.token_to_id(name)) is not None:
                return int(found)
        return self.eos_ids[0] if self.eos_ids else None

    @property
    def vocab_size(self) -> int:
        """Entries, added tokens included. The model's vocabulary may be padded beyond it."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that decides which ids a text gets: equal tokenizers have equal ones."""
        parts = json.dumps([self.backend.to_str(), self.bos_id, self.eos_ids])
        return hashlib.sha256(parts.encode()).hexdigest()

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text. `special` adds what the tokenizer puts around it (BOS, where it has one).

        Text from `chat` already holds its special tokens: encode it with `special=False`.
        """
        return self.backend.encode(text, add_special_tokens=special).ids

    def encode_batch(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """Token ids of many texts, tokenised by several threads."""
        return [e.ids for e in self.backend.encode_batch(list(texts), add_special_tokens=special)]

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """Text of token ids; special tokens are shown when `special`."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=not special)

    def chat(self, messages: Sequence[Mapping[str, Any]], reply: bool = True) -> str | None:
        """Messages ({role, content}) as one text, ending where the `reply` starts; None without a chat template.

        Raises CheckpointError when the template rejects the messages (for instance an unknown role).
        """
        if self.chat_template is None:
            return None
        eos = self.backend.id_to_token(self.eos_ids[0]) if self.eos_ids else ""
        bos = self.backend.id_to_token(self.bos_id) if self.bos_id is not None else ""
        return render(
            self.chat_template, messages=messages, add_generation_prompt=reply, bos_token=bos or "", eos_token=eos or ""
        )

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and generation_config.json, as Hugging Face reads them."""
        folder = Path(folder)
        token = self.backend.id_to_token
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        generation: dict[str, Any] = {}
        if self.bos_id is not None:
            settings["bos_token"] = token(self.bos_id)
            generation["bos_token_id"] = self.bos_id
        if self.eos_ids:
            settings["eos_token"] = token(self.eos_ids[0])
            generation["eos_token_id"] = list(self.eos_ids)
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        write_text(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False))
        write_text(folder / "generation_config.json", json.dumps(generation, indent=2))

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer | None:
        """The tokenizer of a model folder; None when it has no tokenizer.json. Raises CheckpointError on broken files.

        The end-of-text ids are those of generation_config.json and tokenizer_config.json together.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the library raises bare Exception
            raise CheckpointError(f"{path}: not a tokenizer ({e}); fetch it again") from e
        settings, generation = read_json(folder / "tokenizer_config.json"), read_json(folder / "generation_config.json")
        model = read_json(folder / "config.json")
        bos = _token_id(backend, settings, "bos_token", path)
        if bos is None:
            bos = model.get("bos_token_id")
        eos = _ids(generation.get("eos_token_id"))
        named = _token_id(backend, settings, "eos_token", path)
        if named is not None and named not in eos:
            eos.append(named)
        return cls(
            backend,
            bos_id=bos,
            eos_ids=eos or _ids(model.get("eos_token_id")),
            chat_template=_chat_template(folder, settings),
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty when the file is absent. Raises CheckpointError when it is not one."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise CheckpointError(f"{path}: not JSON ({e}); fetch it again") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _ids(value: Any) -> list[int]:
    return [] if value is None else [int(v) for v in value] if isinstance(value, list) else [int(value)]


def _token_id(backend: tokenizers.Tokenizer, settings: Mapping[str, Any], key: str, path: Path) -> int | None:
    """Id of a special token that tokenizer_config.json names, as text or as {content: text}."""
    token = settings.get(key)
    if isinstance(token, Mapping):
        token = token.get("content")
    if token is None:
        return None
    found = backend.token_to_id(token)
    if found is None:
        raise CheckpointError(f"{path}: tokenizer_config.json names {key} {token!r}, which is not in the vocabulary")
    return found


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named templates
        template = {t["name"]: t["template"] for t in template}.get("default")
    return template
