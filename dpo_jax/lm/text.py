"""Text and tokens: a tokenizer, and the template that makes a prompt of a chat."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

Prompt = str | Sequence[Mapping[str, Any]]
"""Text, or the messages of a chat: `{"role": "user", "content": "..."}`."""

TOKENIZER, OPTIONS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"


class Text:
    """A tokenizer with its special tokens and chat template.

    What is scored of a response: its tokens behind the prompt, and then one end token, the last special token that the
    template writes after a message (`<|im_end|>`); white space behind it is dropped, since generation stops there.
    Text without a chat gets the tokenizer's end token.

    Attributes:
      tokenizer: of the library `tokenizers`.
      special: the texts of special tokens, as templates use them: `eos_token`, `bos_token`, ...
      template: source of the chat template; `None` if there is none.
    """

    def __init__(self, tokenizer: Any, special: Mapping[str, str], template: str | None = None):
        self.tokenizer, self.special, self.template = tokenizer, dict(special), template

    @classmethod
    def load(cls, folder: str | Path) -> Text:
        """Reads `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` of a folder.

        Raises:
          OSError: a file cannot be read.
          ValueError: a file is damaged.
        """
        from tokenizers import Tokenizer

        folder = Path(folder)
        try:
            tokenizer = Tokenizer.from_str((folder / TOKENIZER).read_text(encoding="utf-8"))
        except OSError:
            raise
        except Exception as problem:  # tokenizers has no type of its own for it
            raise ValueError(f"{folder / TOKENIZER}: {problem}") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        options = read_object(folder / OPTIONS) if (folder / OPTIONS).exists() else {}
        special = {name: _content(value) for name, value in options.items() if name.endswith("_token")}
        template = options.get("chat_template")
        if (folder / TEMPLATE).exists():
            template = (folder / TEMPLATE).read_text(encoding="utf-8")
        elif isinstance(template, list):
            template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
        text = cls(tokenizer, {name: value for name, value in special.items() if value is not None}, template)
        for name, token in text.special.items():
            if tokenizer.token_to_id(token) is None:
                raise ValueError(f"{folder / OPTIONS}: the {name} {token!r} is not among the tokens of {TOKENIZER}")
        return text

    @property
    def size(self) -> int:
        """The number of ids: one more than the largest."""
        return int(max(self.tokenizer.get_vocab(with_added_tokens=True).values())) + 1

    @property
    def end(self) -> int | None:
        """The id of the end token, if there is one."""
        token = self.special.get("eos_token")
        return None if token is None else self.tokenizer.token_to_id(token)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of special tokens."""
        return frozenset(i for i, t in self.tokenizer.get_added_tokens_decoder().items() if t.special)

    @cached_property
    def stops(self) -> frozenset[int]:
        """Ids that end a response when tokens are generated."""
        ends = {self.end} if self.end is not None else set()
        if self.template is not None:
            ends.add(self.encode([{"role": "user", "content": "a"}], "a")[1][-1])
        return frozenset(ends)

    def prompt(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt, up to the place where the response begins.

        Raises:
          ValueError: it is a chat, and there is no template, or the template refuses it.
        """
        if isinstance(prompt, str):
            return self._ids(prompt, plain=True)
        return self._ids(self.render(prompt, add_generation_prompt=True))

    def encode(self, prompt: Prompt, response: str) -> tuple[list[int], list[int]]:
        """The tokens of a prompt and of a response to it, with its end token.

        Raises:
          ValueError: the last token of the prompt merges with the first of the response; or as for `prompt`.
        """
        first = self.prompt(prompt)
        if isinstance(prompt, str):
            both = self._ids(prompt + response, plain=True)
        else:
            both = self._ids(self.render([*prompt, {"role": "assistant", "content": response}]))
        if both[: len(first)] != first:
            raise ValueError(_merged(self, first, both, isinstance(prompt, str)))
        return first, self._ended(both[len(first) :], cut=not isinstance(prompt, str))

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=skip_special))

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
        """The text that the template makes of messages, in a sandbox.

        Raises:
          ValueError: there is no template; a message has no role or text; or the template refuses the messages.
        """
        from jinja2.exceptions import SecurityError, TemplateError

        for message in messages:
            if not isinstance(message, Mapping) or not all(
                isinstance(message.get(k), str) for k in ("role", "content")
            ):
                raise ValueError(f"a message must have a role and a content, both text, got {message!r:.100}")
        if self._compiled is None:
            raise ValueError(
                f"there is no chat template: give prompts and responses as text, or add {TEMPLATE} to the folder"
            )
        try:
            return str(
                self._compiled.render(
                    messages=[dict(message) for message in messages],
                    add_generation_prompt=add_generation_prompt,
                    tools=None,
                    documents=None,
                    **self.special,
                )
            )
        except (TemplateError, SecurityError, TypeError, ValueError, OverflowError) as problem:
            raise ValueError(f"the chat template refuses these messages: {problem}") from None

    @cached_property
    def _compiled(self) -> Any:
        """The template, ready to run; `None` without one."""
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if self.template is None:
            return None
        world = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        world.globals["raise_exception"] = _refuse
        world.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        try:
            return world.from_string(self.template)
        except TemplateError as problem:
            raise ValueError(f"the chat template cannot be read: {problem}") from None

    def _ids(self, text: str, *, plain: bool = False) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=plain).ids)

    def _ended(self, ids: list[int], *, cut: bool) -> list[int]:
        """A response that ends with one end token."""
        if cut and (ends := [place for place, token in enumerate(ids) if token in self.special_ids]):
            return ids[: ends[-1] + 1]
        if self.end is None:
            raise ValueError(f"the tokenizer has no end token: name one as eos_token in {OPTIONS}")
        return ids if ids and ids[-1] == self.end else [*ids, self.end]


def _merged(text: Text, first: list[int], both: list[int], plain: bool) -> str:
    same = next((i for i, (a, b) in enumerate(zip(first, both, strict=False)) if a != b), min(len(first), len(both)))
    there, here = text.decode(both[same : same + 1]), text.decode(first[same:])
    remedy = (
        "end the prompt without white space, and begin the response with it"
        if plain
        else "the chat template must write a prompt alone as it writes it before a response"
    )
    return f"the end of the prompt, {here!r}, becomes {there!r} when a response follows: {remedy}"


def _refuse(message: str) -> None:
    from jinja2.exceptions import TemplateError

    raise TemplateError(message)


def read_object(path: Path) -> dict[str, Any]:
    """An object in a JSON file.

    Raises:
      OSError: it cannot be read.
      ValueError: it is something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as problem:
        raise ValueError(f"{path}: not JSON ({problem})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object")
    return content


def _content(token: Any) -> str | None:
    """The text of a special token, which older files wrap in an object."""
    return token.get("content") if isinstance(token, dict) else token
