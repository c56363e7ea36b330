"""`tool_choice`: a call that has to come is prescribed, token by token, up to its function's name."""

from __future__ import annotations

from m27quant.checkpoint.tokenizer import Tokenizer
from m27quant.runtime.chat import THINK_END
from m27quant.runtime.generation import Prescription
from m27quant.runtime.reply import CALLS, CALLS_END
from m27quant.serve.errors import invalid
from m27quant.serve.protocol import ChatRequest, NamedChoice


def may_call(asked: ChatRequest) -> bool:
    """Whether the model hears of the tools."""
    return bool(asked.tools) and asked.tool_choice != "none"


def prescription(asked: ChatRequest, tokenizer: Tokenizer, *, thinking: bool) -> Prescription | None:
    """What makes the answer a call: of the function that was named, or of any; the model thinks before it as it likes.

    Its arguments are the model's own.  Where max_tokens comes before the call's end, that is the finish reason.

    Raises:
        ApiError: a call is wanted of no tool, or the tokenizer has no tokens that calls and thoughts end with.
    """
    names = [tool.function.name for tool in asked.tools or ()]
    if isinstance(asked.tool_choice, NamedChoice):
        wanted = asked.tool_choice.function.name
        if wanted not in names:
            raise invalid(f"tool_choice names '{wanted}', which is not among the tools", param="tool_choice")
        names = [wanted]
    elif asked.tool_choice != "required":
        return None
    elif not names:
        raise invalid("tool_choice is 'required', but there are no tools", param="tool_choice")
    after, until = tokenizer.token_id(THINK_END), tokenizer.token_id(CALLS_END)
    if until is None or after is None:
        raise invalid(
            f"the tokenizer has no token {CALLS_END}, so no call can be prescribed", param="tool_choice"
        )
    space = "\n\n" if thinking else ""
    runs = {tuple(tokenizer.rendered(f'{space}{CALLS}\n<invoke name="{name}">\n')) for name in names}
    return Prescription(choices=tuple(sorted(runs)), after=after if thinking else None, until=until)
