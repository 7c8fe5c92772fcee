"""When the next call of a provider's account may start, whether any may, and whether there is money for it.

An account is a provider's scheme, host and port, with a key: what providers count limits by. What is in here is told
what becomes of each call, under the workers' lock. Times are in seconds, by ``time.monotonic()``.
"""

import logging
import math
import time
from collections import OrderedDict, deque
from typing import Any, Deque, List, NamedTuple, Optional, Tuple

from .._estimates import output_limit, prompt_characters, to_tokens
from .provider import CallPolicy, Kind, Outcome, Told
from .store import batch_number

logger: logging.Logger = logging.getLogger(__name__)

#: So many calls in a row with no answer: the provider is away. So many denied: there is no account.
_AWAY_AFTER = _DENIED_AFTER = 5
#: One that had answered is asked at least so often whether it is back, for so long.
_LONGEST_PROBE_PAUSE = 60.0
#: A rate is tried again 30 % higher after so many calls: few when it was measured once, more with each
#: measure that says the same.
_FIRST_PATIENCE, _LONGEST_PATIENCE = 5, 500
#: Who has to wait for longer, in seconds, or is refused so many times in a row with no word of how long to wait,
#: is counted by the minute.
_LONG_WAIT, _LONG_REFUSED = 10.0, 4
#: One call more in a minute is tried soon; if it is refused, later, and then after three times as long. When so many
#: were let through, none too long after the other, calls are not counted by the minute. Pauses are in minutes.
_SOON, _LATER, _ENOUGH_TRIES, _LONGEST_BETWEEN = 0.1, 2.5, 3, 0.7
#: How far below what a provider says of its limit.
_MARGIN = 0.98
#: What threads that wake late may make up for.
_CATCH_UP = 0.1
#: Output tokens of a call that sets no limit, for the budget; more where more were seen.
_LEAST_OUTPUT = 1000
#: How much of a provider's error goes into those of tasks that were not called, in characters.
_WORDS = 300


class Limits(NamedTuple):
    """What the user allows: calls and tokens a minute for each account, and money for all; prices are per million."""

    rpm: Optional[float] = None
    tpm: Optional[float] = None
    max_cost: Optional[float] = None
    input_cost: float = 0.0
    output_cost: float = 0.0

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """What so many tokens cost."""
        return (prompt_tokens * self.input_cost + completion_tokens * self.output_cost) / 1e6


class Estimate(NamedTuple):
    """What a call may take."""

    prompt_tokens: int = 0
    #: The most tokens that its body allows to answer with; None where it does not say.
    output_limit: Optional[int] = None


class Call(NamedTuple):
    """A call that is running: since when, what it takes of the account's calls and tokens, and of the budget."""

    started_at: float
    request: List[float]
    tokens: List[float]
    cost: float
    #: Its task failed, and others were answered since: if it fails again, the provider is not to blame.
    is_suspect: bool


class _Turns:
    """What waits, by batch; batches take turns."""

    def __init__(self) -> None:
        self._batches: OrderedDict[int, Deque[Any]] = OrderedDict()

    def append(self, task: Any) -> None:
        self._batches.setdefault(batch_number(task.id), deque()).append(task)

    def first(self) -> Any:
        """The next one; None where nothing waits."""
        return next(iter(self._batches.values()))[0] if self._batches else None

    def pop(self) -> None:
        batch, tasks = self._batches.popitem(last=False)
        tasks.popleft()
        if tasks:
            self._batches[batch] = tasks


class _Window:
    """At most so much in any minute: what a provider lets through, whichever way it counts."""

    def __init__(self, limit: Optional[float], length: float) -> None:
        self._limit = math.inf if limit is None else limit
        self._length = length
        self._entries: Deque[List[float]] = deque()  # when, how much
        self.taken = 0.0

    def add(self, amount: float, now: float) -> List[float]:
        entry = [now, amount]
        self._entries.append(entry)
        self.taken += amount
        return entry

    def correct(self, entry: List[float], amount: float) -> None:
        if self._entries and entry[0] >= self._entries[0][0]:  # it still counts
            self.taken += amount - entry[1]
            entry[1] = amount

    def delay(self, amount: float, now: float, limit: float = math.inf) -> float:
        """How long until there is room for so much, under its own limit and this one."""
        entries, limit = self._entries, min(limit, self._limit)
        while entries and entries[0][0] <= now - self._length:
            self.taken -= entries.popleft()[1]
        excess = min(amount, limit) - limit + self.taken
        free_at = now
        for started_at, taken in entries:
            if excess <= 1e-6:  # what adding and taking away leaves of nothing
                break
            excess -= taken
            free_at = started_at + self._length
        return free_at - now


class Account:
    """The pace of one account's calls.

    A rate is not known before the provider refuses, or says that its limit is near. Then it is what was let through
    from one refusal to the next, and grows with the calls that are answered: fast while one measure differs from
    the next, slowly when they agree. A provider that refuses for long counts calls by the minute: then as many are
    made in any minute as were let through in that before the refusal.

    Its name, for messages, is the provider's host; never the key.
    """

    def __init__(self, name: str, policy: CallPolicy, limits: Limits) -> None:
        self.name = name
        #: Why its tasks are not called any more; None while they are.
        self.verdict: Optional[str] = None
        #: How often it was tried since it last answered; calls that run at the same time are one try.
        self.rounds: int = 0
        self.waiting: _Turns = _Turns()
        self._policy = policy
        self._is_counted = limits.tpm is not None or limits.max_cost is not None
        self._requests = _Window(limits.rpm, policy.window)
        self._tokens = _Window(limits.tpm, policy.window)
        self._running = 0
        self._mean_tokens = 0.0
        #: When the next call may start; until when none does, since when not, and why.
        self._next_at = self._paused_until = self._trouble_since = -math.inf
        self._trouble = ""
        #: Whether the words of the refusal that goes on were logged.
        self._is_logged = False
        #: While it is not known whether calls are taken again, one at a time: that one.
        self._is_probing = False
        self._probe: Optional[Call] = None
        #: Calls a second; infinite for any.
        self._rate = math.inf
        self._patience = _FIRST_PATIENCE
        #: Since the rate was set: what was sent, and what was answered.
        self._sent = self._answered = 0
        #: What is let through in a minute; infinite for a provider that is not known to count so. When one more is
        #: tried, how many minutes after a refusal, and how many were since.
        self._per_minute = math.inf
        self._try_at, self._try_after, self._tries = math.inf, 0.0, 0
        self._counted_from = self._ended_at = -math.inf
        #: What calls that started before this say is known already.
        self._refused_at = self._failed_at = -math.inf
        self._answered_at = -math.inf
        self._failed = self._refused = self._denied = 0

    @property
    def is_away(self) -> bool:
        """Whether several calls in a row had no answer; one at a time finds out when it is back."""
        return self._failed >= _AWAY_AFTER

    def estimate(self, body: Any) -> Estimate:
        """What a call may take, as far as anybody wants to know."""
        return Estimate(to_tokens(prompt_characters(body)), output_limit(body)) if self._is_counted else Estimate()

    def delay(self, estimate: Estimate, now: float) -> float:
        """How long until a call may start; infinite while that depends on one that is running."""
        if self.verdict is not None:
            return 0.0
        if self._probe is not None:
            return math.inf
        one_more = max(self._requests.delay(1, now, self._per_minute + 1), self._try_at - now)
        delay = min(self._requests.delay(1, now, self._per_minute), one_more)
        return max(delay, self._tokens.delay(self._tokens_of(estimate), now), self._next_at - now)

    def start(self, estimate: Estimate, cost: float, now: float, failed_at: float = math.inf) -> Call:
        """A call starts, of a task that first failed then, if it did."""
        tokens = self._tokens.add(self._tokens_of(estimate), now)
        call = Call(now, self._requests.add(1, now), tokens, cost, failed_at < self._answered_at)
        if not self._running and now - max(self._ended_at, self._next_at) > self._policy.window:  # it was idle
            self._set_rate(self._rate, self._patience, now)
        self._running += 1
        self._sent += 1
        if self._is_probing:
            self._probe = call
        if self._requests.taken > self._per_minute:
            self._count_try(now)
        self._next_at = max(self._next_at, now - _CATCH_UP) + 1 / self._grown_rate()
        return call

    def ended(self, call: Call, outcome: Outcome, now: float) -> None:
        """A call has ended: learn from it."""
        self._running -= 1
        self._ended_at = now
        if self._probe is call:
            self._probe = None
        if outcome.result is not None and outcome.result.total_tokens:
            self._mean_tokens += (outcome.result.total_tokens - self._mean_tokens) / (8 if self._mean_tokens else 1)
            self._tokens.correct(call.tokens, outcome.result.total_tokens)
        if outcome.kind is Kind.REFUSED:
            self._refuse(call, outcome, now)
        elif outcome.kind is Kind.FAILED:
            self._fail(call, outcome, now)
        else:
            self._answer(call, outcome, now)
        for told in outcome.told:
            self._heed(told, now)

    def trouble(self, now: float) -> Optional[str]:
        """What is wrong, since when, and until when nothing is called; None where all is well."""
        is_waiting = self.waiting.first() is not None
        if self.verdict is not None or not (self._running or is_waiting):
            return None
        if not (self._is_probing or now < self._paused_until):
            is_far = is_waiting and self._next_at - now > self._policy.window  # a limit by the minute is no news
            return f"{self.name} is near its limit: no call before {clock(self._next_at)}" if is_far else None
        until = f"no call before {clock(self._paused_until)}" if now < self._paused_until else "a call tries it again"
        return f"{self.name} {self._trouble} since {clock(self._trouble_since)}: {until}"

    def reopen(self) -> None:
        """More tasks have come: perhaps the account is in order by now."""
        if self.verdict is not None:
            self.verdict = None
            self._failed = self._denied = self.rounds = 0
            self._is_probing = False

    def _tokens_of(self, estimate: Estimate) -> float:
        prompt, limit = estimate
        return max(prompt, self._mean_tokens) if limit is None else prompt + limit

    def _grown_rate(self) -> float:
        return self._rate * (1 + 0.3 * (self._answered / self._patience) ** 2)

    def _set_rate(self, rate: float, patience: int, now: float) -> None:
        self._rate, self._patience, self._counted_from = rate, patience, now
        self._sent = self._answered = 0

    def _answer(self, call: Call, outcome: Outcome, now: float) -> None:
        self._answered_at = now
        self._failed = self.rounds = 0
        if call.started_at > self._refused_at:
            self._answered += 1
            self._refused = 0
        if call.started_at > max(self._refused_at, self._failed_at):
            self._is_probing = False
        self._denied = self._denied + 1 if outcome.kind is Kind.DENIED else 0
        if self._denied == _DENIED_AFTER:
            self.verdict = f"{self.name} has denied {self._denied} calls in a row; the last: {outcome.error[:_WORDS]}"

    def _refuse(self, call: Call, outcome: Outcome, now: float) -> None:
        retry_after = outcome.retry_after
        self._failed = self.rounds = 0
        self._requests.correct(call.request, 0)
        self._tokens.correct(call.tokens, 0)
        if call.started_at <= self._refused_at:
            if self._per_minute < math.inf:
                self._count_minute()
            self._pause("refuses calls", now, retry_after)
            return
        if not self._refused:
            self._trouble_since, self._is_logged = now, False
        self._refused += 1
        self._refused_at = now
        if not self._is_logged and (self._refused >= _LONG_REFUSED or retry_after > self._policy.longest_pause):
            self._is_logged = True  # and not in `trouble`, which anybody may ask for: the words may hold the prompt
            logger.warning("%s refuses calls: %s", self.name, outcome.error[:_WORDS])
        wait = self._policy.pause(self._refused, retry_after)
        is_long = retry_after > _LONG_WAIT if retry_after else self._refused >= _LONG_REFUSED
        is_known = self._per_minute < math.inf
        if is_known or (is_long and self._requests.taken):
            if not is_known or self._refused == 1:  # else nothing was let through since
                self._try_after = max(3 * self._try_after, _LATER) if is_known else _SOON
                self._count_minute()
            wait = max(wait, self._requests.delay(1, now, self._per_minute))
        elif self._rate < math.inf and self._answered:
            self._measure(now + wait)
        elif self._rate == math.inf and self._requests.taken:  # which may have been saved up
            self._set_rate(1 / wait, _FIRST_PATIENCE, now + wait)
        self._pause("refuses calls", now, wait)

    def _count_minute(self) -> None:
        """Let as many calls start in a minute as were let through in the one before the refusal."""
        self._per_minute, self._rate = self._requests.taken or self._per_minute, math.inf
        self._try_at, self._tries = self._refused_at + (1 + self._try_after) * self._policy.window, 0

    def _count_try(self, now: float) -> None:
        """One more than was known to be let through in a minute has started; if it is refused, all is as before."""
        self._per_minute, self._tries = self._requests.taken, self._tries + 1
        self._try_at = now + min(self._try_after, _LONGEST_BETWEEN) * self._policy.window
        if self._tries == _ENOUGH_TRIES:
            self._set_rate(self._per_minute / self._policy.window, _FIRST_PATIENCE, now)
            self._per_minute = math.inf

    def _measure(self, until: float) -> None:
        """Set the rate to what was let through since it was set."""
        before, seconds = self._rate, until - self._counted_from
        rate, patience = self._answered / seconds, _FIRST_PATIENCE
        if 0.1 * self._answered**3 > 0.25 * self._patience**2:  # by so many calls was the rate exceeded
            if 0.75 < rate / before < 1.33:
                patience = min(4 * self._patience, _LONGEST_PATIENCE)
        elif self._sent > 0.75 * before * seconds:  # no more than before: calls are refused whatever the rate
            rate = 2 * before
        self._set_rate(max(rate, 1 / self._policy.window), patience, until)

    def _fail(self, call: Call, outcome: Outcome, now: float) -> None:
        if call.is_suspect and outcome.is_reached and not self.is_away:
            return
        policy, is_news, has_answered = self._policy, call.started_at > self._failed_at, self._answered_at > -math.inf
        self._failed += 1
        if is_news:
            self._failed_at = now
            self.rounds += 1
        if self._failed == _AWAY_AFTER:
            self._trouble_since, is_news = now, True
        if self.is_away and is_news:
            pause = policy.pause(self.rounds, outcome.retry_after)
            self._pause("is away", now, min(pause, _LONGEST_PROBE_PAUSE) if has_answered else pause)
        is_over = not has_answered or now - self._trouble_since > policy.given_up_after
        if is_over and self.is_away and self.rounds > policy.retries:
            has_ended = "no longer answers" if has_answered else "has never answered"
            tried = f"tried {self.rounds} times since {clock(self._trouble_since)}"
            self.verdict = f"{self.name} {has_ended}, {tried}; the last: {outcome.error[:_WORDS]}"

    def _pause(self, why: str, now: float, seconds: float) -> None:
        self._trouble, self._is_probing = why, True
        self._paused_until = max(self._paused_until, now + seconds)
        self._next_at = max(self._next_at, self._paused_until)

    def _heed(self, told: Told, now: float) -> None:
        """Slow down to what a provider says of its limit, when that is near."""
        per_call = 1.0 if told.of == "requests" else self._mean_tokens
        if not per_call or told.remaining > per_call * (self._running + 1):
            return
        rate = _MARGIN * (told.limit - told.remaining) / told.full_in / per_call
        if 0 < rate < self._grown_rate():
            self._set_rate(rate, _LONGEST_PATIENCE, now)


class Budget:
    """What was spent, at first on so many tokens, what the calls that run may still cost, and whether there is room."""

    def __init__(self, limits: Limits, prompt_tokens: int, completion_tokens: int) -> None:
        self.cap: Optional[float] = limits.max_cost
        self.spent: float = limits.cost(prompt_tokens, completion_tokens)
        self._limits = limits
        self._largest_output = _LEAST_OUTPUT
        #: What the calls that run may cost, each.
        self.running: List[float] = []

    def tokens(self, estimate: Estimate) -> Tuple[int, int]:
        """What a call may use, of the prompt and the output, as far as is known when it starts."""
        prompt, limit = estimate
        return prompt, self._largest_output if limit is None else limit

    def reserve(self, estimate: Estimate) -> Optional[float]:
        """Put aside what a call may cost: so much, or None if there is no room for it."""
        cost = self._limits.cost(*self.tokens(estimate))
        if self.cap is not None and self.spent + sum(self.running) + cost > self.cap * (1 + 1e-9):
            return None
        self.running.append(cost)
        return cost

    def ended(self, cost: float, outcome: Outcome) -> None:
        """A call has ended, for which so much was put aside; one that does not tell its tokens cost that."""
        self.running.remove(cost)
        result = outcome.result
        if result is not None:
            self._largest_output = max(self._largest_output, result.completion_tokens)
            used = self._limits.cost(result.prompt_tokens, result.completion_tokens)
            self.spent += used if result.total_tokens else cost


def clock(moment: float) -> str:
    """The time of day, and the date, at a moment by ``time.monotonic()``."""
    seconds = min(time.time() + moment - time.monotonic(), 32503680000)  # in the year 3000: some can say no later one
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
