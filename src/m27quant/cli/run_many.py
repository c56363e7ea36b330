"""Many prompts from a file: all at once through the engine, every answer durable as soon as it is there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m27quant.cli.output import Output
from m27quant.cli.progress import show
from m27quant.cli.run_one import chat_request, message_document
from m27quant.cli.stopping import graceful, resume_command
from m27quant.errors import FindingsError, M27Error, UsageError
from m27quant.progress import Progress

if TYPE_CHECKING:
    from m27quant.cli.run_input import Conversation
    from m27quant.runtime.answers import PromptRow
    from m27quant.runtime.api import LLM
    from m27quant.runtime.generation import SamplingParams
    from m27quant.runtime.sequence import Sequence


def answer_file(
    output: Output,
    llm: LLM,
    params: SamplingParams,
    source: Path,
    target: Path,
    conversation: Conversation,
    *,
    resume: bool,
    overwrite: bool,
    identity: dict[str, Any],
    no_progress: bool,
) -> None:
    """Answer all rows of `source` to `target`.

    Raises:
        FindingsError: rows without an answer; what is wrong stands in their lines.
        M27Error: as `AnswerFile` and `read_prompts`.
        Interrupted: stopped by a signal; can be resumed.
    """
    import dataclasses

    from m27quant.runtime.answers import AnswerFile, read_prompts
    from m27quant.runtime.statistics import total_acceptance

    rows = read_prompts(source)
    settings = {
        **identity, **dataclasses.asdict(params), "seed": llm.options.seed, "chat": conversation.is_chat,
        "system": conversation.system, "tools": conversation.tools, "thinking": conversation.thinking,
        "activations": llm.options.activations,
    }  # fmt: skip
    failed, finished = 0, []
    with (
        AnswerFile(target, source, settings, len(rows), resume=resume, overwrite=overwrite) as answers,
        graceful(output, resume_command()) as stop,
        show(output, enabled=not no_progress) as progress,
    ):
        missing = answers.missing()
        done = len(rows) - len(missing)
        waiting: dict[int, tuple[int, Sequence, Any]] = {}
        for row in missing:
            try:
                prompt, parser = _request(llm, rows[row], conversation)
                sequence = llm.submit(prompt, replace(params, seed=_seed(llm, row)))
            except M27Error as fault:
                raise type(fault)(f"{rows[row].where}: {fault.message}", hint=fault.hint) from None
            waiting[sequence.number] = row, sequence, parser
        while waiting:
            stop()
            llm.step()
            for number in [n for n, (_, s, _) in waiting.items() if s.finish_reason is not None]:
                row, sequence, parser = waiting.pop(number)
                answers.add(row, _answer(llm, sequence, parser))
                finished.append(sequence.timing)
                failed += sequence.finish_reason == "error"
                done += 1
            progress(Progress(stage="answers", fraction=done / len(rows)))
        answers.finish()
    document: dict[str, Any] = {
        "output": str(target),
        "rows": len(rows),
        "answered_now": len(missing),
        "failed": failed,
    }
    if llm.engine.drafter is not None and finished:
        acceptance = total_acceptance(finished)
        document |= {"tau": acceptance.tau, "m_accept": acceptance.m_accept, "c_k": acceptance.c_k}
    output.result(document, quiet=target)
    if failed:
        raise FindingsError(f"{failed} of {len(rows)} rows have no answer; `error` in their lines says why")


def _request(llm: LLM, row: PromptRow, conversation: Conversation) -> tuple[Any, Any]:
    if row.messages is not None:
        turns: list[Any] = row.messages  # whatever the file holds
        has_system = bool(turns) and isinstance(turns[0], dict) and turns[0].get("role") == "system"
        return chat_request(
            llm, conversation, turns if has_system else conversation.with_system(turns), row.tools
        )
    if conversation.is_chat:
        turn = {"role": "user", "content": row.prompt}
        return chat_request(llm, conversation, conversation.with_system([turn]), row.tools)
    if row.tools is not None:
        raise UsageError("tools are for messages", hint="add --chat, or write messages")
    return row.prompt, None


def _seed(llm: LLM, row: int) -> int:
    """A row's draws depend on its place alone: a run that was interrupted goes on as if it had not been."""
    from m27quant.runtime.generation import derived_seed

    return derived_seed(llm.options.seed, row)


def _answer(llm: LLM, sequence: Sequence, parser: Any) -> dict[str, Any]:
    result = llm.result(sequence)
    answer: dict[str, Any] = {
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "usage": result.usage,
    }
    if parser is not None:
        parser.feed(result.text)
        parser.finish()
        answer["message"] = message_document(parser.reply)
    if result.error is not None:
        answer["error"] = result.error
    return answer
