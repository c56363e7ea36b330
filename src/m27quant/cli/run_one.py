"""One prompt, one answer: streamed on a terminal, whole anywhere else."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from m27quant.cli.output import Mode, Output
from m27quant.cli.run_stats import (
    comparison_document,
    comparison_line,
    memory_document,
    stats_document,
    stats_table,
)
from m27quant.cli.run_view import AnswerView, drafted_parts
from m27quant.errors import EnvironmentFault, FindingsError, Interrupted, UsageError

if TYPE_CHECKING:
    from m27quant.cli.run_input import Conversation
    from m27quant.runtime.api import LLM, GenerateResult, Prompt, StreamEvent
    from m27quant.runtime.generation import SamplingParams
    from m27quant.runtime.lossless import Comparison
    from m27quant.runtime.reply import Reply, ReplyParser


def answer_one(
    output: Output,
    llm: LLM,
    params: SamplingParams,
    text: str | None,
    conversation: Conversation,
    notes: list[str],
    *,
    stats: bool,
    check_lossless: bool,
    show_drafts: bool,
) -> None:
    """Answer and show; compares with plain decoding where that is asked for.

    Raises:
        UsageError: a prompt that cannot be answered.
        FindingsError: `check_lossless`, and the answers differ.
        Interrupted: Ctrl-C; what there was of the answer has been shown.
    """
    from m27quant.runtime.lossless import compare_with_plain, with_seeds

    prompt, parser = to_prompt(llm, text, conversation)
    (params,) = with_seeds([params], llm.options.seed)
    view = AnswerView(output, show_drafts=show_drafts)
    result = stream_answer(llm, prompt, params, parser, view)
    if result.finish_reason == "error":
        if result.num_prompt_tokens and result.token_ids:
            raise EnvironmentFault(result.error or "no answer", hint="m27quant verify tells what is wrong")
        raise UsageError(result.error or "no answer", hint="see --max-model-len and --max-memory")
    comparison = None
    if llm.engine.drafter is not None and (check_lossless or stats):
        comparison = compare_with_plain(llm, [prompt], [params], [result])
    reply = parser.reply if parser else None
    _show(output, llm, result, reply, comparison, notes, view, stats=stats, checked=check_lossless)
    if check_lossless and comparison is not None and not comparison.is_lossless:
        raise FindingsError(
            comparison_line(comparison),
            hint="--invariant makes drafted and plain output the same, bit for bit",
        )


def to_prompt(llm: LLM, text: str | None, conversation: Conversation) -> tuple[Prompt, ReplyParser | None]:
    """What to answer, and a parser where the answer is a turn of a chat."""
    if not conversation.is_chat:
        return text or "", None
    turns = conversation.turns if text is None else [{"role": "user", "content": text}]
    return chat_request(llm, conversation, conversation.with_system(turns or []))


def chat_request(
    llm: LLM,
    conversation: Conversation,
    turns: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
) -> tuple[Prompt, ReplyParser]:
    """Messages as token ids, and the parser of the answer to them."""
    from m27quant.runtime.chat import chat_prompt
    from m27quant.runtime.reply import ReplyParser

    if llm.tokenizer is None:
        raise UsageError("the checkpoint has no tokenizer.json, so there is no chat")
    functions = conversation.tools if tools is None else tools
    prompt = chat_prompt(llm.tokenizer, turns, tools=functions, thinking=conversation.thinking)
    return prompt.token_ids, ReplyParser(functions, thinking=prompt.thinking)


def stream_answer(
    llm: LLM, prompt: Prompt, params: SamplingParams, parser: ReplyParser | None, view: AnswerView
) -> GenerateResult:
    """Generate and show one answer.

    Raises:
        Interrupted: Ctrl-C.
    """
    result: GenerateResult | None = None
    with contextlib.closing(llm.stream([prompt], params)) as events:
        try:
            for event in events:
                for text, drafted in drafted_parts(event.text, _own_text(llm, event), event.num_accepted):
                    if parser is None:
                        view.text(text, drafted=drafted)
                    else:
                        for piece in parser.feed(text):
                            view.event(piece, drafted=drafted)
                result = event.result
        except KeyboardInterrupt:
            raise Interrupted("stopped; the answer is not complete") from None
        finally:
            if parser is not None:
                for piece in parser.finish():
                    view.event(piece)
            view.end()
    assert result is not None
    return result


def _own_text(llm: LLM, event: StreamEvent) -> str:
    """The text of the target's own token at the end of a step."""
    if llm.tokenizer is None or not event.num_accepted or len(event.token_ids) <= event.num_accepted:
        return ""
    return llm.tokenizer.decode(event.token_ids[-1:])


def _show(
    output: Output,
    llm: LLM,
    result: GenerateResult,
    reply: Reply | None,
    comparison: Comparison | None,
    notes: list[str],
    view: AnswerView,
    *,
    stats: bool,
    checked: bool,
) -> None:
    acceptance = result.stats.acceptance
    answer = result.text if reply is None else reply.content
    if output.mode is Mode.JSON:
        document: dict[str, Any] = {
            "text": result.text,
            "token_ids": result.token_ids,
            "finish_reason": result.finish_reason,
            "usage": result.usage,
            "tau": acceptance.tau,
            "m_accept": acceptance.m_accept,
            "c_k": acceptance.c_k,
            "seed": result.seed,
            "logprobs": result.logprobs,
            "stats": stats_document(result),
            "memory": memory_document(llm),
            "notes": notes,
        }
        if reply is not None:
            document["message"] = message_document(reply)
        if comparison is not None:
            document["comparison"] = comparison_document(comparison, checked=checked)
        output.result(document)
        return
    if not view.is_live:
        output.stdout.write(answer if answer.endswith("\n") or not answer else answer + "\n")
        output.stdout.flush()
        for call in reply.tool_calls if reply else ():
            output.result({"name": call.name, "arguments": call.arguments})
    if stats:
        output.aside(stats_table(llm, result, comparison))
    if comparison is not None and checked:
        output.status(comparison_line(comparison))


def message_document(reply: Reply) -> dict[str, Any]:
    """A chat's answer in OpenAI's form."""
    import json

    document: dict[str, Any] = {"role": "assistant", "content": reply.content}
    if reply.thinking:
        document["reasoning_content"] = reply.thinking
    if reply.tool_calls:
        document["tool_calls"] = [
            {
                "id": f"call_{index}",
                "type": "function",
                "function": {"name": c.name, "arguments": json.dumps(c.arguments, ensure_ascii=False)},
            }
            for index, c in enumerate(reply.tool_calls)
        ]
    if reply.problems:
        document["problems"] = [{"message": p.message, "text": p.text} for p in reply.problems]
    return document
