"""A chat on a terminal: several lines by a backslash or three quotes, Ctrl-C stops an answer, not the chat."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from m27quant.cli.output import Output
from m27quant.cli.run_one import chat_request, message_document, stream_answer
from m27quant.cli.run_stats import stats_table
from m27quant.cli.run_view import AnswerView
from m27quant.errors import Interrupted, M27Error

if TYPE_CHECKING:
    from m27quant.cli.run_input import Conversation
    from m27quant.runtime.api import LLM, GenerateResult
    from m27quant.runtime.generation import SamplingParams

HELP = """\
/stats  figures of the last answer      /reset  begin a new chat
/help   this                            /exit   leave (also Ctrl-D)
A line that ends with \\ goes on; \"\"\" begins and ends a text of several lines. Ctrl-C stops an answer."""
QUOTES = '"""'


def talk(
    output: Output, llm: LLM, params: SamplingParams, conversation: Conversation, *, show_drafts: bool
) -> None:
    """Ask and answer until the user leaves."""
    with contextlib.suppress(ImportError):  # line editing and history; not on every system
        import readline  # noqa: F401
    output.status("type /help for help")
    turns: list[dict[str, Any]] = []
    last: GenerateResult | None = None
    while (text := _read_message()) is not None:
        command = text.strip()
        if command == "/exit":
            return
        if command == "/help":
            output.status(HELP)
        elif command == "/reset":
            turns.clear()
            output.status("a new chat")
        elif command == "/stats":
            if last is None:
                output.status("nothing was answered yet")
            else:
                output.aside(stats_table(llm, last))
        elif command.startswith("/") and "\n" not in command and " " not in command:
            output.warning(f"no command {command}", hint="/help tells them; begin with a space to say it")
        elif command:
            turns.append({"role": "user", "content": text})
            answered = _answer(output, llm, params, conversation, turns, show_drafts=show_drafts)
            last = answered or last


def _answer(
    output: Output,
    llm: LLM,
    params: SamplingParams,
    conversation: Conversation,
    turns: list[dict[str, Any]],
    *,
    show_drafts: bool,
) -> GenerateResult | None:
    """Answer the last turn; it is taken back where no answer came about."""
    try:
        prompt, parser = chat_request(llm, conversation, conversation.with_system(turns))
    except M27Error as fault:
        turns.pop()
        output.warning(fault.message, hint=fault.hint)
        return None
    result = None
    try:
        result = stream_answer(llm, prompt, params, parser, AnswerView(output, show_drafts=show_drafts))
    except Interrupted as stopped:
        output.status(stopped.message)
    if result is not None and result.error is not None:
        turns.pop()
        output.warning(result.error, hint="/reset begins a new chat")
        return None
    message = message_document(parser.reply)
    message.pop("problems", None)
    turns.append(message)
    return result


def _read_message() -> str | None:
    """What the user says next; None at the end of input."""
    try:
        line = input(">>> ")
        lines = []
        if line.lstrip().startswith(QUOTES):
            line = line.lstrip()[len(QUOTES) :]
            while not line.rstrip().endswith(QUOTES):
                lines.append(line)
                line = input("... ")
            lines.append(line.rstrip()[: -len(QUOTES)])
        else:
            while line.endswith("\\"):
                lines.append(line[:-1])
                line = input("... ")
            lines.append(line)
        return "\n".join(lines)
    except EOFError:
        print()  # noqa: T201 - the shell's prompt begins on a line of its own
        return None
    except KeyboardInterrupt:
        print()  # noqa: T201
        return ""
