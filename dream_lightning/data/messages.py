"""Chats as files hold them → the turns before the response, and the response."""

import re
from typing import Any

from dream_lightning.batch import Message
from dream_lightning.errors import UserError

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_THINKING = re.compile(r"\s*<think>\n?(.*?)\n?</think>\s*(.*)", re.DOTALL)


def turns_of(chat: Any, origin: str) -> tuple[list[Message], str]:
    """The turns of `[{role, content}]` or `[{from, value}]` and the last assistant turn ("" if the user spoke last).

    Raises:
        UserError: not such a list, an unknown role, text missing, no user's turn before the response.
    """
    if not isinstance(chat, list) or not chat or not all(isinstance(turn, dict) for turn in chat):
        raise UserError(f"{origin}: the chat is not a list of turns; wanted [{{'role': …, 'content': …}}, …]")
    turns = [_turn(turn, number, origin) for number, turn in enumerate(chat, 1)]
    response = turns.pop()["content"] if turns[-1]["role"] == "assistant" else ""
    if not turns or turns[-1]["role"] != "user":
        raise UserError(
            f"{origin}: no user's turn before the response, the roles are {', '.join(_role(turn) for turn in chat)}; "
            "a chat ends with user, assistant (or user alone, to be answered): correct or delete that row"
        )
    return turns, response


def split_thinking(response: str) -> tuple[str | None, str]:
    """`<think>trace</think>answer` → (trace, answer); anything else → (None, response)."""
    found = _THINKING.fullmatch(response)
    return (found[1] or None, found[2]) if found else (None, response)


def _turn(turn: dict[str, Any], number: int, origin: str) -> Message:
    role, content = _role(turn), turn.get("content", turn.get("value"))
    if role not in _ROLES:
        raise UserError(
            f"{origin}, turn {number} has the role {role!r}, wanted system, user or assistant (or system, human, gpt): "
            "rename it or delete that row"
        )
    if not isinstance(content, str):
        raise UserError(f"{origin}, turn {number} has no text ({type(content).__name__}): correct or delete that row")
    return Message(role=_ROLES[role], content=content)


def _role(turn: dict[str, Any]) -> str:
    return str(turn.get("role", turn.get("from")))
