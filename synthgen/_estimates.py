"""What a call will take, as far as its body tells: before it is made, nobody counts its tokens."""

import json
from collections import Counter, defaultdict
from hashlib import blake2b
from typing import Any, Dict, Iterable, List, Optional, Set, Tuple
from urllib.parse import urlsplit

from ._completions import at
from ._progress import duration, money
from .models import Task

_CHARACTERS_PER_TOKEN = 4
_PROMPTS = ("messages", "prompt", "input", "contents", "system", "instructions", "systemInstruction", "tools")
_OUTPUT_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


def prompt_characters(body: Any) -> int:
    """The length of all texts of a prompt. Images and files in it are left out: they have prices of their own."""
    return sum(_characters(body[name]) for name in _PROMPTS if name in body)


def to_tokens(characters: int) -> int:
    """About how many tokens so many characters are."""
    return -(-characters // _CHARACTERS_PER_TOKEN)


def output_limit(body: Any) -> Optional[int]:
    """The most tokens that a body allows to answer with; None where it does not say."""
    limits = [*(body.get(name) for name in _OUTPUT_LIMITS), at(body, "generationConfig", "maxOutputTokens")]
    answers = [body.get("n"), body.get("best_of"), at(body, "generationConfig", "candidateCount")]
    count = max([1, *(number for number in answers if isinstance(number, int) and number < 1 << 20)])
    limit = next((limit for limit in limits if isinstance(limit, (int, float)) and 0 < limit < 1 << 40), None)
    return None if limit is None else int(limit) * count


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return 0 if value.startswith("data:") else len(value)
    if isinstance(value, dict):
        return sum(_characters(item) for name, item in value.items() if name != "data")
    return sum(map(_characters, value)) if isinstance(value, list) else 0


def plan(
    tasks: Iterable[Task], input_cost: float, output_cost: float, rpm: Optional[float], tpm: Optional[float]
) -> List[Tuple[str, str]]:
    """What a run would send, as labels and texts; of each task only a digest is kept.

    Args:
        tasks: Read once.
        input_cost: The price of a million prompt tokens.
        output_cost: The price of a million output tokens.
        rpm: How many calls a minute a provider allows for a key; None for any.
        tpm: How many tokens a minute.
    """
    count = characters = unlimited = 0
    seen: Set[bytes] = set()
    models: Dict[str, Counter[str]] = defaultdict(Counter)
    accounts: Dict[Tuple[str, Optional[str]], Counter[str]] = defaultdict(Counter)
    for count, task in enumerate(tasks, 1):
        call = f"{task.method} {task.url}\n{task.api_key}\n{json.dumps(task.body, sort_keys=True)}"
        digest = blake2b(call.encode(), digest_size=12).digest()
        if task.use_cache:
            if digest in seen:
                continue
            seen.add(digest)
        length, limit = prompt_characters(task.body), output_limit(task.body)
        host = urlsplit(task.url).netloc.rpartition("@")[2]
        characters += length
        unlimited += limit is None
        for group in (models[f"{host} {task.body.get('model', '')}"], accounts[host, task.api_key]):
            group.update(calls=1, prompt=to_tokens(length), output=limit or 0)
    called, prompt, output = (sum(group[name] for group in models.values()) for name in ("calls", "prompt", "output"))
    rows = [("tasks", f"{count:,}: {called:,} to be called, {count - called:,} identical to one of those")]
    rows += [("", f"{group['calls']:,} x {name.strip()}") for name, group in models.items()]
    more = f", and what {unlimited:,} without a limit may answer" if unlimited else ""
    rows.append(("prompts", f"{characters:,} characters, about {prompt:,} tokens"))
    lowest = prompt * input_cost / 1e6
    answers = f"at most {output:,} tokens{more}"
    cost = f"from {money(lowest)} to {money(lowest + output * output_cost / 1e6)}{more}"
    if unlimited == called:
        answers, cost = f"of any length: none of {called:,} has a limit", f"{money(lowest)} for the prompts{more}"
    rows.append(("answers", answers))
    if input_cost or output_cost:
        rows.append(("cost", cost))
    if rpm or tpm:
        minutes = [(group["calls"] - 1) // rpm for group in accounts.values() if rpm]
        minutes += [(group["prompt"] - 1) // tpm for group in accounts.values() if tpm]
        rows.append(("time", f"at least {duration(60 * max(0, *minutes))}"))
    return rows
