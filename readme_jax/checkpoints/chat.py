"""Chat templates: Jinja from an untrusted source, so rendered in a sandbox, with the helpers templates expect."""

from __future__ import annotations

import json
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from readme_jax.errors import CheckpointError


class Generation(Extension):
    """`{% generation %}` marks the assistant's words for trainers; here its content is rendered as it is."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson  # Jinja's own escapes HTML
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment.from_string(template)


def render(template: str, **values: Any) -> str:
    """Render a chat template. Raises CheckpointError when it is broken, unsafe or rejects the messages."""
    try:
        return _compiled(template).render(**values)
    except jinja2.TemplateError as e:
        reason = " ".join(str(e).split())
        raise CheckpointError(f"the chat template failed: {reason}") from e
    except (TypeError, KeyError, ValueError) as e:
        raise CheckpointError(f"the chat template cannot render these messages: {e}") from e
