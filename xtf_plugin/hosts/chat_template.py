"""What a recipe's chat template does to its data: whether it renders it, and which ends of turns are trained.

The template is rendered by transformers' own function, which loads neither a model nor a tokenizer, and is imported
for chats alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

from ..data.turns import TurnTexts, rendered
from .hub import folder_of
from .model_files import TILDE, facts

Row = Mapping[str, Any]
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
_PROBE = [
    {"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "xtf-answer"), ("user", "Hi"))
]


@dataclass(frozen=True)
class Template:
    """A chat template and the special tokens that it may write.

    Args:
        text: in Jinja.
        special: names of special tokens and the tokens.
    """

    text: str
    special: Mapping[str, str]

    def apply_chat_template(self, messages: Any, tokenize: bool = False, add_generation_prompt: bool = False) -> str:
        """Equals the method of a tokenizer with `tokenize=False`."""
        return self._render(messages, add_generation_prompt)[0]

    def trained(self) -> str:
        """What `assistant_only_loss` trains of an answer that another turn follows."""
        text, spans = self._render(_PROBE, False)
        return "".join(text[start:stop] for start, stop in spans)

    def _render(self, messages: Any, prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, spans = render_jinja_template(
            conversations=[messages],
            chat_template=self.text,
            return_assistant_tokens_mask=self.marked,
            add_generation_prompt=prompt,
            **self.special,
        )
        return texts[0], (spans or [[]])[0]

    @property
    def marked(self) -> bool:
        """Whether it marks answers by `{% generation %}`."""
        return bool(re.search(r"\{%-?\s*generation", self.text))


def template_of(data: Mapping[str, Any], folder: Path | None, env: Mapping[str, str]) -> tuple[Template | None, str]:
    """The template that TRL would use, and what is wrong with it; neither: it is not known here."""
    given, source = data.get("chat_template_path"), folder
    text: Any = None
    if given and os.path.isfile(str(given)):
        if not str(given).endswith((".jinja", ".j2")):
            return None, f"chat_template_path: {given} is no .jinja file, which TRL tells by its name. Rename it."
        text = Path(str(given)).read_text(encoding="utf-8", errors="replace")
    elif given:
        source = folder_of(str(given), None, env)
        if source is None and str(given).startswith((".", "/", "~")):
            next_ = TILDE if str(given).startswith("~") else "Correct the path"
            return None, f"chat_template_path: there is no {given}. {next_}."
    if text is None:
        if source is None or not any(source.glob("tokenizer*")):
            return None, ""  # on the hub, or not completely here
        text = text_of(source)
    given = {"eos_token": str(data["eos_token"])} if data.get("eos_token") else {}
    return (Template(text, {**special_tokens(source or folder), **given}), "") if text else (None, "none")


def text_of(folder: Path) -> str:
    """The chat template of a tokenizer's folder; empty if it has none."""
    file = folder / "chat_template.jinja"
    text: Any = file.read_text(encoding="utf-8") if file.is_file() else None
    text = text or facts(folder, "chat_template.json").get("chat_template")
    text = text or facts(folder, "tokenizer_config.json").get("chat_template")
    if isinstance(text, list):  # older tokenizers name several
        text = {each.get("name"): each.get("template") for each in text}.get("default")
    return str(text or "")


def special_tokens(folder: Path | None) -> dict[str, str]:
    """The special tokens of a tokenizer's folder, by name."""
    about = facts(folder, "tokenizer_config.json")
    tokens = {name: about.get(name) for name in _SPECIAL}
    return {name: str(t.get("content") if isinstance(t, dict) else t) for name, t in tokens.items() if t}


def is_chat(row: Row) -> bool:
    """Whether a row holds messages."""
    return any(isinstance(row.get(name), list) for name in ("messages", "conversations", "prompt", "completion"))


def of_template(data: Mapping[str, Any], template: Template | None, why: str, rows: Sequence[Row]) -> Iterator[str]:
    """Problems of the chat template of a TRL recipe, with the results of `template_of`."""
    if why not in ("", "none"):
        yield why
        return
    if not any(is_chat(row) for row in rows):
        return
    if why == "none":
        yield "the data is chat, and the tokenizer has no chat template. Set chat_template_path."
    elif template and data.get("assistant_only_loss") is True and not template.marked and not _known(template):
        yield (
            "assistant_only_loss needs a chat template with {% generation %} around the answers, and this one has "
            "none. Set chat_template_path to one that has it."
        )
    elif template and (why := _unrendered(template, next(row for row in rows if is_chat(row)))):
        yield f"the chat template does not render the data: {why}. Correct the template or the data."


def _unrendered(template: Template, row: Row) -> str:
    """Why a template does not render a row; empty: it does, or it takes what is not known here."""
    from jinja2 import TemplateError, TemplateSyntaxError, UndefinedError

    prompt, answer = row.get("prompt"), row.get("completion")
    messages = row.get("messages") or row.get("conversations")
    if isinstance(prompt, list):
        messages = prompt + (answer if isinstance(answer, list) else [])
    found = [each for each in messages if isinstance(each, dict)] if isinstance(messages, list) else []
    found = [
        {**each, "role": each.get("role", each.get("from")), "content": each.get("content", each.get("value"))}
        for each in found
    ]
    whole = bool(found) and not {"tools", "chat_template_kwargs"} & set(row)
    try:
        template.apply_chat_template(found if whole else _PROBE)
    except UndefinedError:
        return ""  # perhaps a token that the tokenizer's class gives
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if whole or isinstance(error, TemplateSyntaxError):
            return " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return ""


def _known(template: Template) -> bool:
    """Whether TRL has marks for a template."""
    spec = util.find_spec("trl")
    roots = spec.submodule_search_locations or [] if spec else []
    known = (file for root in roots for file in Path(root).rglob("*.jinja"))
    return any(file.read_text(encoding="utf-8").strip() == template.text.strip() for file in known)


def notes(data: Mapping[str, Any], template: Template | None, rows: Sequence[Row]) -> Iterator[str]:
    """What a TRL run of chats does to ends of turns, where that is seldom meant."""
    chats = [row for row in rows if is_chat(row)]
    if template is None or not chats:
        return
    alone = data.get("assistant_only_loss") is True
    if alone and not template.marked:
        return  # TRL puts a template of its own in its place
    texts = TurnTexts.of(template)
    trained = rendered(template.trained) if alone else None
    if texts.known and not texts.ends:
        yield (
            "no end of turn is trained, so the model does not learn to stop: the chat template writes nothing after an "
            "answer. Let it write one, such as the eos token."
        )
    if texts.ends and trained is not None and not any(end in trained for end in texts.ends):
        yield (
            "no end of turn is trained, so the model does not learn to stop: the chat template writes "
            f"{texts.ends[-1]!r} outside {{% generation %}}. Move it inside."
        )
    if texts.inserted and (trained is None or trained.strip().startswith(texts.inserted)):
        opening = texts.inserted.split()[0]
        if not any(opening in str(row) for row in chats):
            yield (
                f"the chat template inserts {texts.inserted!r} before an answer that has none of its own, and it is "
                "trained: the model learns to write it always. Use another template if that is not meant."
            )
