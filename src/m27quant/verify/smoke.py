"""Does the model still answer: prose, a tool call that parses, closed thoughts.  The test of its own model card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m27quant.errors import UsageError
from m27quant.runtime.answers import PromptRow, read_prompts
from m27quant.runtime.api import LLM, GenerateResult
from m27quant.runtime.chat import chat_prompt
from m27quant.runtime.generation import SamplingParams
from m27quant.runtime.reply import Reply, ReplyParser

MIN_PROSE_WORDS = 5

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CONTINUED = (
    "The file README.md says how to build the project, and docs/SPEC.md",
    "import os\nimport sys\n\n\ndef read_lines(path):\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    'def parse_version(text):\n    """Return a tuple of integers."""\n',
)
"""Texts to go on with, for their health: prose, file names, code."""


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt and what its answer must hold."""

    name: str
    token_ids: list[int]
    is_chat: bool = False
    thinking: bool = False
    """The reply begins inside of the thoughts."""
    tools: list[dict[str, Any]] | None = None
    wants: tuple[str, ...] = ()
    """Of prose, tool call, closed thoughts."""


@dataclass(slots=True)
class Answer:
    """What came of a question."""

    question: Question
    result: GenerateResult
    reply: Reply | None
    failed: list[str] = field(default_factory=list)
    """Which of the wants were not met."""


def questions(llm: LLM, prompts: Path | None) -> list[Question]:
    """The built-in ones, or those of a prompts file in the form that `run --input` takes.

    Raises:
        UsageError: no tokenizer, or a file without prompts.
        CheckpointError: a row that is none.
    """
    if llm.tokenizer is None:
        raise UsageError("the checkpoint has no tokenizer.json, so it cannot be asked anything")
    if prompts is not None:
        return [_from_row(llm, row) for row in read_prompts(prompts)]
    asked = [Question(f"text {number}", llm.encode(text)) for number, text in enumerate(CONTINUED, 1)]
    if not llm.tokenizer.has_chat_template:
        return asked
    prose = [{"role": "user", "content": "In two sentences: why is the sky blue?"}]
    tool = [{"role": "user", "content": "What will the weather be in Paris for the next 3 days?"}]
    return [
        *asked,
        _chat(llm, "prose", prose, None, wants=("prose", "closed thoughts")),
        _chat(llm, "tool call", tool, [WEATHER], wants=("tool call", "closed thoughts")),
    ]


def ask(llm: LLM, asked: Sequence[Question], max_tokens: int) -> list[Answer]:
    """Answer all questions greedily."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, repetition_penalty=1.0)
    results = llm.generate([question.token_ids for question in asked], params)
    return [_judge(question, result) for question, result in zip(asked, results, strict=True)]


def _judge(question: Question, result: GenerateResult) -> Answer:
    if not question.is_chat:
        return Answer(question, result, None)
    parser = ReplyParser(question.tools, thinking=question.thinking)
    parser.feed(result.text)
    parser.finish()
    reply = parser.reply
    met = {
        "prose": len(reply.content.split()) >= MIN_PROSE_WORDS,
        "tool call": len(reply.tool_calls) == 1 and _is_right(reply),
        "closed thoughts": not any("not closed" in problem.message for problem in reply.problems),
    }
    return Answer(question, result, reply, [want for want in question.wants if not met[want]])


def _is_right(reply: Reply) -> bool:
    call = reply.tool_calls[0]
    return call.name == "get_weather" and isinstance(call.arguments.get("city"), str) and not reply.problems


def _from_row(llm: LLM, row: PromptRow) -> Question:
    if row.messages is None:
        return Question(row.where, llm.encode(row.prompt or ""))
    return _chat(llm, row.where, row.messages, row.tools, wants=("closed thoughts",))


def _chat(
    llm: LLM,
    name: str,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    wants: tuple[str, ...],
) -> Question:
    assert llm.tokenizer is not None
    prompt = chat_prompt(llm.tokenizer, messages, tools=tools)
    return Question(name, prompt.token_ids, True, prompt.thinking, tools, wants)
