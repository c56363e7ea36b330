"""POST /v1/chat/completions: messages to a prompt, and the model's text to thoughts, content and tool calls."""

from __future__ import annotations

import inspect
import json
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from m27quant.errors import M27Error
from m27quant.runtime.api import LLM
from m27quant.runtime.chat import THINK_END, ChatPrompt, chat_prompt
from m27quant.runtime.reply import Delta, Event, Problem, ReplyParser, ToolCall
from m27quant.runtime.sequence import Sequence as Running
from m27quant.serve.errors import from_fault, invalid
from m27quant.serve.forms import Form, choice_json, to_json
from m27quant.serve.logprobs import chat_logprobs
from m27quant.serve.protocol import ChatRequest
from m27quant.serve.tools import may_call
from m27quant.serve.worker import Piece

FIELDS = {"thinking": "reasoning_content", "content": "content"}
"""What vLLM and SGLang call the parts of a reply."""


def prompt_of(llm: LLM, asked: ChatRequest, raw: Mapping[str, Any]) -> ChatPrompt:
    """The conversation as the model reads it.

    Messages and tools are handed to the template as they were sent: their order of keys is part of the prompt.

    Raises:
        ApiError: a conversation that the template refuses, or a checkpoint that has none.
    """
    if llm.tokenizer is None:
        raise invalid(
            "the checkpoint has no tokenizer, so there is no chat: use /v1/completions with token ids"
        )
    arguments = dict(asked.chat_template_kwargs or {})
    thinking = arguments.pop("enable_thinking", asked.reasoning_effort != "none")
    if not isinstance(thinking, bool):
        raise invalid("enable_thinking must be true or false", param="chat_template_kwargs")
    for name in arguments:
        if not name.isidentifier() or name in _own_arguments():
            raise invalid(
                "chat_template_kwargs has a name that is not the template's", param="chat_template_kwargs"
            )
    messages = [_turn(message) for message in raw["messages"]]
    tools = raw.get("tools") if may_call(asked) else None
    try:
        return chat_prompt(
            llm.tokenizer, messages, tools=tools or None, thinking=thinking, template_arguments=arguments
        )
    except M27Error as fault:
        raise from_fault(fault, param="messages") from None


def _own_arguments() -> frozenset[str]:
    """Names that the rendering function has for itself."""
    from transformers.utils.chat_template_utils import render_jinja_template

    return frozenset({*inspect.signature(render_jinja_template).parameters, "messages", "tools", "self"})


def _turn(message: Mapping[str, Any]) -> dict[str, Any]:
    """Other services' names for what M2's template knows."""
    turn = dict(message)
    if turn["role"] == "developer":
        turn["role"] = "system"
    if turn.get("reasoning_content") is None and turn.get("reasoning") is not None:
        turn["reasoning_content"] = turn["reasoning"]
    if turn.get("tool_calls") is None:
        turn.pop("tool_calls", None)
    return turn


class ChatForm(Form):
    """A chat's answer."""

    kind, id_prefix = "chat.completion", "chatcmpl"

    def __init__(
        self, llm: LLM, asked: ChatRequest, raw: Mapping[str, Any], prompt: ChatPrompt, model: str
    ) -> None:
        super().__init__(asked, model, asked.n or 1)
        self._tokenizer, self._thinking = llm.tokenizer, prompt.thinking
        self._asked = asked
        tools = raw.get("tools") if may_call(asked) else None
        self._replies = [
            _Reply(ReplyParser(tools, thinking=prompt.thinking, calls=bool(tools)), asked)
            for _ in range(self.num_choices)
        ]
        self._prompt_ids = prompt.token_ids if asked.return_token_ids else None
        self._think_end = llm.tokenizer.token_id(THINK_END) if llm.tokenizer else None

    @property
    def chunk_kind(self) -> str:
        return "chat.completion.chunk"

    def choices(self, piece: Piece) -> Iterable[str]:
        index = piece.ticket.index
        reply = self._replies[index]
        logprobs = "null"
        if piece.logprobs:
            logprobs = to_json(chat_logprobs(self._tokenizer, piece.logprobs))
        more = f',"token_ids":{to_json(piece.token_ids)}' if self._prompt_ids is not None else ""
        deltas = reply.deltas(piece)
        if not deltas and (piece.logprobs or more):
            deltas = ["{}"]
        for delta in deltas:
            yield choice_json(index, "delta", delta, logprobs, None, more)
            logprobs, more = "null", ""  # they belong to all of them, and come with the first
        if piece.finished is not None:
            yield choice_json(index, "delta", "{}", "null", reply.finish_reason(piece.finished))

    def choice(self, piece: Piece) -> dict[str, Any]:
        assert piece.finished is not None
        reply = self._replies[piece.ticket.index]
        message = reply.message(piece)
        found: dict[str, Any] = {"index": piece.ticket.index, "message": message}
        found["logprobs"] = chat_logprobs(self._tokenizer, piece.logprobs) if self._asked.logprobs else None
        found["finish_reason"] = reply.finish_reason(piece.finished)
        if self._prompt_ids is not None:
            found["token_ids"] = piece.token_ids
        return found

    def document(self, pieces: Any) -> dict[str, Any]:
        found = super().document(pieces)
        if self._prompt_ids is not None:
            found["prompt_token_ids"] = self._prompt_ids
        return found

    def num_reasoning_tokens(self, sequence: Running) -> int:
        if not self._thinking:
            return 0
        output = sequence.tokens[sequence.num_prompt :]
        return output.index(self._think_end) if self._think_end in output else len(output)


class _Reply:
    """One choice on its way through the parser."""

    def __init__(self, parser: ReplyParser, asked: ChatRequest) -> None:
        self._parser, self._asked = parser, asked
        self.has_begun = False
        self._num_calls = 0

    def deltas(self, piece: Piece) -> list[str]:
        """What a piece adds to the message, as JSON."""
        found = [] if self.has_begun else ['{"role":"assistant","content":""}']
        self.has_begun = True
        for event in self._events(piece):
            if isinstance(event, Delta):
                if event.kind == "content" or self._asked.include_reasoning is not False:
                    found.append(f'{{"{FIELDS[event.kind]}":{to_json(event.text)}}}')
            elif isinstance(event, ToolCall):
                call = {"index": self._num_calls, **call_document(event)}
                self._num_calls += 1
                if self._num_calls == 1 or self._asked.parallel_tool_calls is not False:
                    found.append(f'{{"tool_calls":[{to_json(call)}]}}')
            elif event.text:
                found.append(f'{{"problems":[{to_json(problem_document(event))}]}}')
        return found

    def message(self, piece: Piece) -> dict[str, Any]:
        """The whole message."""
        self._events(piece)
        reply = self._parser.reply
        calls = reply.tool_calls[: 1 if self._asked.parallel_tool_calls is False else None]
        self._num_calls = len(calls)
        message: dict[str, Any] = {"role": "assistant", "content": reply.content or (None if calls else "")}
        if reply.thinking and self._asked.include_reasoning is not False:
            message["reasoning_content"] = reply.thinking
        if calls:
            message["tool_calls"] = [call_document(call) for call in calls]
        if problems := [problem_document(problem) for problem in reply.problems if problem.text]:
            message["problems"] = problems
        return message

    def finish_reason(self, sequence: Running) -> str:
        if sequence.finish_reason == "stop" and self._num_calls:
            return "tool_calls"
        return sequence.finish_reason or "stop"

    def _events(self, piece: Piece) -> list[Event]:
        events = self._parser.feed(piece.text) if piece.text else []
        return events + self._parser.finish() if piece.finished is not None else events


def call_document(call: ToolCall) -> dict[str, Any]:
    """A call in OpenAI's form."""
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }


def problem_document(problem: Problem) -> dict[str, str]:
    """What is not as M2's format says: nothing that the model wrote is lost."""
    return {"message": problem.message, "text": problem.text}
