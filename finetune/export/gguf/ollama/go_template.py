"""Translates a Jinja chat template into Ollama's Go syntax, learned from rendered conversations and proved on them.

Ollama renders conversations by Go's text/template, not Jinja, for a model with a `TEMPLATE`. No template is known here
by name. A set of conversations is rendered by Jinja; the texts before and after each role's text, the place of the
system text and what is trimmed make a `Scheme`, and the scheme must give the same text for all of them.

What Ollama does with a conversation before it renders it (template/template.go, server/prompt.go and server/routes.go
of 2024 to 2026), and how the translation handles it:

- Neighbours of the same role become one message, joined by an empty line; only tool results stay apart.
- `.Messages` still holds the system messages. `.System` is the text of all of them, joined by an empty line. Where the
  trained template knows a system message only in front, `.System` stands there, so a later one is not lost.
- The Modelfile's `SYSTEM` comes in front of a conversation that does not begin with a system message.
- What exceeds `num_ctx` is dropped from the front, but never a system message; so a conversation may then begin with an
  answer. A trained template that demands a question first would fail; this one goes on.
- A conversation that ends with an assistant's message is to be continued: no end of turn, no generation prompt.
- Tokenising adds a BOS where the GGUF file says so, whether or not one is there already: the template has none then.

There is no function that trims, but a template may call itself with a slice of a text, which is enough to trim all that
Python's `str.strip` does. Go's text/template gives up at a depth of 100,000, so at that many blanks in a row. What a
template trims together with another text is trimmed apart here; the two differ where one of them is nothing but blanks
(a system text folded into a question by `model.system_role: fold`).

Tools are left out, because Go writes JSON differently from Jinja. Ollama then refuses requests with tools.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from finetune.data.turns import Message, Render
from finetune.system.errors import OllamaError, reworded

Side = Literal["none", "right", "both"]


# Letters only, so that no filter changes them, and none is part of another.
_USER, _ANSWER, _SYSTEM, _AGAIN = "qjxvzwuser", "wqvkjzanswer", "zkqxwjrules", "kvzqjwagain"
_PADDED = " \nYes \n"
# The characters that Python's `str.strip` removes, and Jinja's `trim` with it.
BLANKS = "".join(c for c in map(chr, range(0x3001)) if c.isspace())
_NO_SYSTEM = "the chat template of this model takes no system message"
_NO_ROLE = "the chat template of this model has no turn for a message of this role"


@dataclass(frozen=True)
class Scheme:
    """A chat template as pieces of text around each message's own text, without the BOS that the tokenizer adds."""

    user: tuple[str, str]
    """Before and after a user's text."""
    answer: tuple[str, str]
    prompt: str
    """The generation prompt."""
    bare: str
    """The beginning of a conversation without a system message in front."""
    trims: frozenset[str]
    """The roles whose texts are trimmed."""
    place: Literal["refused", "front", "inside", "anywhere"] = "refused"
    """The place of the system text: none; before the first turn; in the first user turn; a turn of its own anywhere."""
    start: str = ""
    """The text before the system text: from the beginning, or within the user turn."""
    after: str = ""
    """The text after the system text, up to the next turn or the user's text."""
    later: str = ""
    """The text before a system text that is not in front."""
    blank_counts: bool = True
    """An empty system text is written like any other; else the conversation is rendered as if it had none."""
    beside: Side = "none"
    """The side on which the user's text is trimmed that shares its turn with the system text."""


def learn_scheme(render: Render, bos: str = "", added: bool = False) -> Scheme:
    """The scheme of a chat template, proved: it renders every conversation that was tried as the template does.

    Args:
        render: The template.
        bos: The BOS token's text.
        added: The tokenizer adds a BOS to a prompt.

    Raises:
        OllamaError: There is no such scheme, or the template writes no BOS though the tokenizer adds one.
    """

    def whole(messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        text = render(messages, add_generation_prompt)
        if not added:
            return text
        if not bos or not text.startswith(bos):
            raise OllamaError(
                f"the chat template begins with {text[:20]!r}, not with the BOS token {bos!r} that the GGUF file adds"
            )
        return text[len(bos) :]

    with reworded(OllamaError, "the chat template fails on a plain conversation", Exception):
        scheme = _scheme_of_turns(whole)
    tried = _conversations("user", "assistant", "user", "assistant", "user")
    if scheme.place != "refused":
        tried += _conversations("system", "user", "assistant", "user") + _conversations("system", "user")
        tried.append([_message("system", ""), _message("user", "Hi")])
    if scheme.place == "anywhere":
        tried += _conversations("user", "assistant", "system", "user")
    for messages in tried:
        with reworded(OllamaError, f"the chat template fails on {_roles_of(messages)}", Exception):
            trained = whole(messages)
        _check_equal(render_scheme(scheme, messages), trained, messages)
    return scheme


def render_scheme(scheme: Scheme, messages: Sequence[Message]) -> str:
    """The text that `go_template` of this scheme renders for messages of which no two neighbours have one role."""
    given = [message["content"] for message in messages if message["role"] == "system"]
    system = "\n\n".join(given)
    if "system" in scheme.trims:
        system = system.strip()
    shown = bool(given) and (scheme.blank_counts or bool(system))
    inside = shown and scheme.place == "inside"
    if scheme.place == "anywhere":
        first = messages[0]["role"] == "system"
        text = scheme.start.removesuffix(scheme.later) if first else scheme.bare
    else:
        text = scheme.bare
        if shown and scheme.place == "front":
            text = scheme.start + system + scheme.after
    for i, message in enumerate(messages):
        role, content = message["role"], message["content"]
        trimmed = content.strip() if role in scheme.trims else content
        if role == "user":
            if inside:
                trimmed = {"none": content, "right": content.rstrip(), "both": content.strip()}[scheme.beside]
                trimmed = scheme.start + system + scheme.after + trimmed
                inside = False
            text += scheme.user[0] + trimmed + scheme.user[1]
        elif role == "assistant":
            last = i + 1 == len(messages)
            text += scheme.answer[0] + trimmed + ("" if last else scheme.answer[1])
        elif scheme.place == "anywhere":
            text += scheme.later + trimmed + scheme.after
    return text + (scheme.prompt if messages[-1]["role"] != "assistant" else "")


def go_template(scheme: Scheme, system: str = "") -> str:
    """The scheme in Go's syntax. Every text is a quoted string; line breaks between the actions render nothing.

    Args:
        scheme: The scheme.
        system: The system text for conversations without one, where `SYSTEM` of the Modelfile cannot hold it.
    """
    if system and scheme.place == "anywhere":
        scheme = replace(scheme, place="front")
    place = scheme.place
    # The text before the system text, without what stands there in any conversation.
    extends = place == "front" and scheme.start.startswith(scheme.bare)
    start = scheme.start.removeprefix(scheme.bare) if extends else scheme.start
    lines = _trimmers() if scheme.trims or scheme.beside != "none" else []
    given = _text(start) + _value("$text", "system" in scheme.trims) + _text(scheme.after)
    if "system" in scheme.trims and not scheme.blank_counts:
        lines.append(_trimmer("system", "{{ else if . }}" + _text(start) + _TRIM_RIGHT + _text(scheme.after)))
        given = '{{ template "system" $text }}'
    lines.append("{{ $ask := true }}")
    if place in ("front", "inside"):
        lines += [
            "{{ $text := .System }}{{ $system := false }}",
            '{{ range .Messages }}{{ if eq .Role "system" }}{{ $system = true }}{{ end }}{{ end }}',
        ]
    if system:
        default = "{{ $system = true }}{{ $text = " + go_string(system) + " }}"
        lines.append("{{ if not $system }}" + default + "{{ end }}")
    if not scheme.blank_counts:
        lines.append('{{ $system = ne $text "" }}')
    lines += [*_beginning(scheme, given, extends), *_turns(scheme, given)]
    return "\n".join(line.replace("{{", "{{-", 1) for line in lines if line)


def _beginning(scheme: Scheme, given: str, extends: bool) -> list[str]:
    """The actions for the text before the first turn.

    Args:
        scheme: The scheme.
        given: The actions for a system text that is there.
        extends: A system text comes after the text of a conversation without one, and does not replace it.
    """
    bare, lead = _text(scheme.bare), _text(scheme.start.removesuffix(scheme.later))
    if scheme.place == "front" and extends:
        return [bare, "{{ if $system }}" + given + "{{ end }}"]
    if scheme.place == "front":
        return ["{{ if $system }}" + given + "{{ else }}" + bare + "{{ end }}"]
    if scheme.place == "anywhere" and lead != bare:
        first = '{{ if eq (index .Messages 0).Role "system" }}'
        return [first + lead + "{{ else }}" + bare + "{{ end }}"]
    if scheme.place == "refused":
        return ["{{ if .System }}{{ template " + go_string(_NO_SYSTEM) + " . }}{{ end }}", bare]
    return [bare]


def _turns(scheme: Scheme, given: str) -> list[str]:
    """The actions for all turns and the generation prompt; `given` are those for a system text in a user turn."""
    question = _value(".Content", "user" in scheme.trims)
    if scheme.place == "inside":
        shared = given + _value(".Content", scheme.beside == "both", scheme.beside == "right")
        question = "{{ if $system }}{{ $system = false }}" + shared + "{{ else }}" + question + "{{ end }}"
    answer = _text(scheme.answer[0]) + _value(".Content", "assistant" in scheme.trims)
    last = "{{ if eq (len (slice $.Messages $i)) 1 }}{{ $ask = false }}{{ else }}"
    system = _text(scheme.later) + _value(".Content", "system" in scheme.trims) + _text(scheme.after)
    return [
        "{{ range $i, $_ := .Messages }}",
        '{{ if eq .Role "user" }}' + _text(scheme.user[0]) + question + _text(scheme.user[1]),
        '{{ else if eq .Role "assistant" }}' + answer + last + _text(scheme.answer[1]) + "{{ end }}",
        '{{ else if eq .Role "system" }}' + (system if scheme.place == "anywhere" else ""),
        "{{ else }}{{ template " + go_string(_NO_ROLE) + " . }}{{ end }}",
        "{{ end }}",
        "{{ if $ask }}" + _text(scheme.prompt) + "{{ end }}",
    ]


def go_string(text: str) -> str:
    """A Go string literal of printable characters alone; Ollama drops others when it reads a Modelfile."""
    named = {"\n": "\\n", "\r": "\\r", "\t": "\\t", '"': '\\"', "\\": "\\\\"}

    def sign(c: str) -> str:
        if c in named or c.isprintable():
            return named.get(c, c)
        return rf"\x{ord(c):02x}" if c < "\x80" else rf"\u{ord(c):04x}" if c <= "\uffff" else rf"\U{ord(c):08x}"

    return '"' + "".join(map(sign, text)) + '"'


def _text(text: str) -> str:
    return "{{ " + go_string(text) + " }}" if text else ""


def _value(value: str, trimmed: bool, right: bool = False) -> str:
    if trimmed or right:
        return '{{ template "' + ("trim" if trimmed else "trim_right") + f'" {value} }}}}'
    return f"{{{{ {value} }}}}"


_TRIM_RIGHT = '{{ template "trim_right" . }}'


def _trimmers() -> list[str]:
    """Definitions of templates that write a text without trailing blanks, and without surrounding blanks."""
    return [_trimmer("trim_right", "{{ else }}{{ . }}", right=True), _trimmer("trim", "{{ else }}" + _TRIM_RIGHT)]


def _trimmer(name: str, rest: str, right: bool = False) -> str:
    """A template that removes a blank from the start or end of its text and calls itself, until there is none.

    Go slices bytes, so blanks are looked for by the length of their UTF-8, in which no character is the end of another.
    There is no subtraction: the place n bytes before the end of a text is the length of it without its first n bytes.
    """
    text = "{{ define " + go_string(name) + " }}"
    for n in (1, 2, 3):
        end = f"(len (slice . {n}))"
        piece, other = (f"slice . {end}", f"slice . 0 {end}") if right else (f"slice . 0 {n}", f"slice . {n}")
        blanks = " ".join(go_string(c) for c in BLANKS if len(c.encode()) == n)
        text += "{{ " + ("" if n == 1 else "else ") + f"if and (ge (len .) {n}) (eq ({piece}) {blanks})" + " }}"
        text += "{{ template " + go_string(name) + f" ({other})" + " }}"
    return text + rest + "{{ end }}{{ end }}"


# ---------------------------------------------------------------------------------------------------------------
# From what Jinja renders to the pieces


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _conversations(*roles: str) -> list[list[Message]]:
    """Conversations of these roles: plain; with line breaks and signs that mean something to Go; with blanks around."""
    plain = {"system": "Be brief.", "user": "Hello there", "assistant": "Good day"}
    odd = 'a {{ .System }} b\n\n"""\tc\\n `d` <e> & \'é\' 日本語。\u200b\r\n'
    found = [[_message(role, f"{plain[role]} {i}") for i, role in enumerate(roles)]]
    found.append([_message(role, f"{odd}{plain[role]}{i}{odd}.") for i, role in enumerate(roles)])
    # Blanks around one text at a time, and around all.
    for chosen in (*range(len(roles)), None):
        padded = [
            f"{BLANKS}{text}{BLANKS}" if chosen in (i, None) else text
            for i, text in enumerate(plain[role] for role in roles)
        ]
        found.append([_message(role, text) for role, text in zip(roles, padded, strict=True)])
    return found


def _roles_of(messages: Sequence[Message]) -> str:
    return f"a conversation of {', '.join(message['role'] for message in messages)}"


def _check_equal(rendered: str, trained: str, messages: Sequence[Message]) -> None:
    if rendered == trained:
        return
    at = next((i for i, (a, b) in enumerate(zip(rendered, trained, strict=False)) if a != b), len(trained))
    at = min(at, len(rendered), len(trained))
    raise OllamaError(
        f"the chat template writes {_roles_of(messages)} in a way that cannot be put in Go's syntax: after "
        f"{trained[max(0, at - 30) : at]!r} comes {trained[at : at + 30]!r}, expected {rendered[at : at + 30]!r}"
    )


def _split_at(text: str, *texts: str) -> list[str]:
    """The pieces before, between and after texts that each occur once, in this order."""
    places = re.fullmatch("(.*)" + "".join(f"{re.escape(part)}(.*)" for part in texts), text, re.DOTALL)
    if places is None or any(text.count(part) != 1 for part in texts):
        raise OllamaError("the chat template leaves out, repeats or moves the text of a message")
    return list(places.groups())


def _without(text: str, known: str, what: str, behind: bool = False) -> str:
    """The text without its known beginning, or its known end."""
    if not (text.endswith(known) if behind else text.startswith(known)):
        raise OllamaError(f"the chat template writes {what}: {text!r} where {known!r} was expected")
    return text.removesuffix(known) if behind else text.removeprefix(known)


def _scheme_of_turns(whole: Render) -> Scheme:
    user, answer, again = _message("user", _USER), _message("assistant", _ANSWER), _message("user", _AGAIN)
    _, user_after = _split_at(whole([user], False), _USER)
    first, asked = _split_at(whole([user], True), _USER)
    *_, answer_after = _split_at(whole([user, answer], False), _USER, _ANSWER)
    _, answered, between, _ = _split_at(whole([user, answer, again], True), _USER, _ANSWER, _AGAIN)
    padded = [_message("user", _PADDED), _message("assistant", _PADDED.replace("Yes", "No")), again]
    blanks = whole(padded, True)
    prompt = _without(asked, user_after, "the end of a question otherwise before an answer")
    answer_before = _without(answered, user_after, "the end of a question otherwise before an answer")
    user_before = _without(between, answer_after, "the end of an answer otherwise before a question")
    bare = _without(first, user_before, "the first user turn otherwise than later ones", behind=True)
    trims = frozenset(m["role"] for m in padded if m["content"] not in blanks)
    scheme = Scheme((user_before, user_after), (answer_before, answer_after), prompt, bare, trims)
    return _with_system_text(scheme, whole)


def _with_system_text(scheme: Scheme, whole: Render) -> Scheme:
    """The scheme and where the system text goes."""
    user, answer = _message("user", _USER), _message("assistant", _ANSWER)
    system, again = _message("system", _SYSTEM), _message("user", _AGAIN)
    try:
        text = whole([system, user], True)
    except OllamaError:
        raise
    except Exception:  # the template refuses it, or breaks
        return scheme
    start, after, _ = _split_at(text, _SYSTEM, _USER)
    trimmed = _PADDED not in whole([_message("system", _PADDED), user], True)
    scheme = replace(
        scheme,
        trims=scheme.trims | {"system"} if trimmed else scheme.trims,
        blank_counts=whole([_message("system", ""), user], True) == text.replace(_SYSTEM, ""),
        after=after,
    )
    before = scheme.user[0]
    if not after.endswith(before) and start.startswith(scheme.bare + before):
        shared = whole([system, _message("user", _PADDED)], True)
        beside: Side = "none" if _PADDED in shared else "right" if _PADDED.rstrip() in shared else "both"
        return replace(scheme, place="inside", start=start[len(scheme.bare + before) :], beside=beside)
    after = _without(after, before, "no user turn behind the system text", behind=True)
    scheme = replace(scheme, place="front", start=start, after=after)
    if not (scheme.blank_counts or start.startswith(scheme.bare)):
        raise OllamaError("the chat template has a system text of its own in place of an empty one")
    try:
        *_, middle, behind, _ = _split_at(whole([user, answer, system, again], True), _USER, _ANSWER, _SYSTEM, _AGAIN)
    except Exception:  # refused there, or left out: `.System` has all system texts
        return scheme
    later = middle.removeprefix(scheme.answer[1])
    alike = middle.startswith(scheme.answer[1]) and start.endswith(later) and behind == after + before
    if alike and scheme.blank_counts:
        return replace(scheme, place="anywhere", later=later)
    return scheme
