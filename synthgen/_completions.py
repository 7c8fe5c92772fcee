"""What the answer of a provider says, whichever API it is of.

Known are chat and text completions, OpenAI's Responses, Anthropic's Messages, Gemini's generateContent, and embeddings.
An answer can be any JSON: of one that has another shape nothing is known, which is no error.
"""

import re
from typing import Any, Dict, Iterator, Optional, Tuple

_CUT_OFF = re.compile("(?i)length|max_tokens|max_output_tokens|model_length|model_context_window_exceeded")
_FILTERED = re.compile("(?i)content_filter|refusal|sensitive|blocklist|spii|.*(safety|recitation|prohibited_content)")
_BESIDE_CONTENT = ("refusal", "tool_calls", "function_call", "audio", "images")
_THOUGHTS = {"thought", "thinking", "redacted_thinking", "reasoning"}
#: The names of input and of output tokens. A gateway may send more than one of these: the first is taken.
_COUNTS = (
    (("prompt_tokens",), ("completion_tokens",)),
    (("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens"), ("output_tokens",)),
    (("promptTokenCount", "toolUsePromptTokenCount"), ("candidatesTokenCount", "thoughtsTokenCount")),
)


def at(container: Any, *path: Any) -> Any:
    """What is found under these keys, one in the other; None where there is none."""
    for key in path:
        if isinstance(container, dict):
            container = container.get(key)
        elif isinstance(container, list) and container and key == 0:
            container = container[0]
        else:
            return None
    return container


def text(completions: Any) -> Optional[str]:
    """The text of the first choice, without what was thought; None where there is none."""
    texts = [said for kind, said in _parts(completions) if kind == "text"]
    return "".join(texts) if texts else None


def finish_reason(completions: Any) -> Optional[str]:
    """Why the first choice ends where it does, in the provider's own word; None where it does not say."""
    reason = (
        at(completions, "choices", 0, "finish_reason")
        or at(completions, "stop_reason")
        or at(completions, "candidates", 0, "finishReason")
        or at(completions, "promptFeedback", "blockReason")
        or at(completions, "incomplete_details", "reason")
        or (at(completions, "output") is not None and at(completions, "status"))
    )
    return reason if reason and isinstance(reason, str) else None


def is_cut_off(completions: Any) -> bool:
    """Whether the token limit, or the end of the model's context, ended the answer."""
    return _CUT_OFF.fullmatch(finish_reason(completions) or "") is not None


def is_filtered(completions: Any) -> bool:
    """Whether the provider held back the answer, or a part of it, or the model refused to give one."""
    if _FILTERED.fullmatch(finish_reason(completions) or "") or at(completions, "promptFeedback", "blockReason"):
        return True
    return any(kind == "refusal" for kind, _ in _parts(completions))


def is_usable(completions: Any) -> bool:
    """Whether an answer holds a text, a call or the like, unfiltered, so that it may serve an identical task."""
    if not completions or is_filtered(completions):
        return False
    if all(at(completions, name) is None for name in ("choices", "output", "candidates", "content")):
        return True  # embeddings, or what is not known here
    return any(said.strip() if kind == "text" else kind not in _THOUGHTS for kind, said in _parts(completions))


def usage(completions: Any) -> Optional[Dict[str, Any]]:
    """What the provider says of tokens, under chat completions' names too; None where it does not say."""
    said = at(completions, "usage") or at(completions, "usageMetadata")
    if not isinstance(said, dict):
        return None
    total = _sum(said, ("total_tokens",)) or _sum(said, ("totalTokenCount",))
    pairs = ((_sum(said, inputs), _sum(said, outputs)) for inputs, outputs in _COUNTS)
    prompt, completion = next((pair for pair in pairs if any(pair)), (total, 0))  # embeddings may have a total alone
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total or prompt + completion}
    return {**said, **counts}


def _sum(counts: Dict[str, Any], names: Tuple[str, ...]) -> int:
    found = [counts.get(name) for name in names]
    return sum(int(count) for count in found if isinstance(count, (int, float)) and 0 <= count < 1 << 40)


def _parts(completions: Any) -> Iterator[Tuple[str, str]]:
    """What the first choice is made of: the kind of each part, and its text where the kind is ``text``."""
    choice, output = at(completions, "choices", 0), at(completions, "output")
    message = at(choice, "message")
    content = at(message, "content")
    yield from _split(at(choice, "text") if content is None else content)
    yield from ((kind, "") for kind in _BESIDE_CONTENT if at(message, kind))
    if choice is not None:
        return
    for item in output if isinstance(output, list) else ():  # Responses
        yield from _split(at(item, "content") if at(item, "type") == "message" else [item])
    yield from _split(at(completions, "content"))  # Messages
    yield from _split(at(completions, "candidates", 0, "content", "parts"))  # Gemini


def _split(content: Any) -> Iterator[Tuple[str, str]]:
    if isinstance(content, str):
        yield "text", content
    for part in content if isinstance(content, list) else ():
        said = at(part, "text")
        kind = "thought" if at(part, "thought") else at(part, "type") or ("other" if said is None else "text")
        is_text = kind in ("text", "output_text") and isinstance(said, str)
        yield ("text", said) if is_text else (str(kind), "")
