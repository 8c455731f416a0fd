"""A grader behind any OpenAI-compatible endpoint, with a cache of replies on disk.

The calls of a batch run concurrently. What went wrong decides what follows:
- no answer in time, a lost connection, status 408, 409, 429 or 5xx, or a reply that is no chat completion: tried again after a growing
  pause with jitter (or the pause that the server asks for);
- another 4xx, an empty reply, or one without a yes or a no: this item is ungraded, as is one whose tries are used up;
- an outage, which is when nobody gets a reply (no connection, 429, 502, 503, 504): it is waited for, `grade.patience` seconds, so that a
  server which is started anew costs time and no verdict. Then the run stops with `SealError`, and may go on later;
- a refused key (401, 403) or an unknown model or address (404): nothing could ever be graded, so the run stops too.
A thread makes the calls: whoever asked may go on with other work (`EndpointGrader.begin`).

A run asks once for nothing, before it computes anything (`check`): a server that is not there, or refuses that, is an error too, which
later it is not. What may pass (429, 5xx, no answer in time) is only told of. This is asked also where all replies are in the cache.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import itertools
import json
import logging
import math
import os
import pathlib
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import diskcache
import openai

from seal_jax.config import GradeConfig
from seal_jax.errors import SealError
from seal_jax.grade.base import GradeItem, item_prompt, verdict_of
from seal_jax.models.embedded import cache_folder

log = logging.getLogger(__name__)

DEFAULT_URL = "https://api.openai.com/v1"
MAX_TOKENS = 512  # bounds a model that talks on; one that obeys says a single word
FIRST_PAUSE = 0.5  # seconds before the second try; doubles from try to try
LONGEST_PAUSE = 30.0  # seconds
RETRIED = (408, 409, 429)  # and 5xx
AWAY = (429, 502, 503, 504)  # those of them that no prompt is to blame for
OUTAGES = 3  # that one prompt may meet: it may be what brings the server down
CONNECTIONS = 3  # tries of `check` to reach the server
PROBE = GradeItem("Colours", "Which colour is a ripe tomato?", "red", "red")


@dataclasses.dataclass(frozen=True)
class _Failed:
    """Why a prompt stays without a usable reply."""

    reason: str
    away: bool = False  # the server is to blame, no prompt


class _TryAgain(Exception):
    """This try failed in a way that may pass. `pause` is the server's own wish in seconds, if it has one. `away`: no prompt is to blame."""

    def __init__(self, reason: str, pause: float | None = None, away: bool = False):
        super().__init__(reason)
        self.pause = pause
        self.away = away


class _NoConnection(_TryAgain):
    """There is no server at that address, or it hung up."""

    def __init__(self, reason: str):
        super().__init__(reason, away=True)


class EndpointGrader:
    """Asks a model behind `config.base_url` (or OPENAI_BASE_URL, or OpenAI's own), with the key in OPENAI_API_KEY.

    `failures` counts the items left ungraded over the grader's life, and `requests` the tries sent to the server. Raises `SealError` for
    a missing key, a malformed address or a cache folder that cannot be used.
    """

    name = "endpoint"

    def __init__(self, config: GradeConfig):
        url = config.base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_URL
        if not url.startswith(("http://", "https://")):
            raise SealError(f"grade.base_url={url!r}: expected an address that starts with http:// or https://")
        self.base_url = url.rstrip("/")
        self.model = config.model
        self.concurrency = config.concurrency
        self.retries = config.retries
        self.timeout = config.timeout
        self.patience = config.patience
        self._back = -math.inf  # when the last outage ended, by `time.monotonic`
        self._key = os.environ.get("OPENAI_API_KEY") or ""
        if not self._key:
            if self.base_url == DEFAULT_URL:
                raise SealError("grade.name=endpoint: no key; set OPENAI_API_KEY, or grade.base_url for a server that needs none")
            self._key = "none"  # the client insists on one; local servers ignore it
        if self.timeout <= 0:
            raise SealError(f"grade.timeout={self.timeout}: expected a number of seconds above 0")
        self.failures = 0
        self.requests = 0
        self._asking = threading.Lock()  # by one batch at a time, or there would be more calls in flight than `concurrency`
        self._cache = _open_cache(pathlib.Path(config.cache) if config.cache else cache_folder() / "grade")

    def check(self) -> None:
        """One small request, whose answer does not matter. Raises `SealError` if the server cannot be reached, or refuses it for good."""
        try:
            _apart(lambda: asyncio.run(self._probe())).result()
        except _NoConnection as problem:
            raise SealError(
                f"grade.name=endpoint: {self.base_url} cannot be reached ({problem}); start the server, or check grade.base_url"
            ) from None
        except _TryAgain as problem:
            log.warning("%s did not grade a first question (%s); it is asked again when there are answers", self.base_url, problem)
        except openai.APIStatusError as error:
            raise SealError(
                f"{self.base_url}: refuses to grade (status {error.status_code}): {_message(error)}; check grade.model and grade.base_url"
            ) from None

    async def _probe(self) -> None:
        async with self._client() as client:
            for attempt in range(CONNECTIONS):
                try:
                    await self._try_once(client, item_prompt(PROBE))
                    return
                except _NoConnection:
                    if attempt == CONNECTIONS - 1:
                        raise
                    await asyncio.sleep(FIRST_PAUSE * 2**attempt)

    def grade(self, items: Sequence[GradeItem]) -> list[bool | None]:
        return self.begin(items)()

    def begin(self, items: Sequence[GradeItem]) -> Callable[[], list[bool | None]]:
        """Has `grade(items)` begin; what is returned waits for it. Batches are asked for one after another."""
        prompts = {i: item_prompt(item) for i, item in enumerate(items) if not item.blank}
        replies = _apart(lambda: self._replies(list(dict.fromkeys(prompts.values()))))
        return lambda: self._verdicts(len(items), prompts, replies.result())

    def _replies(self, prompts: Sequence[str]) -> dict[str, str | _Failed]:
        with self._asking:
            replies = {prompt: cached for prompt in prompts if (cached := self._cached(prompt)) is not None}
            missing = [prompt for prompt in prompts if prompt not in replies]
            return {**replies, **(asyncio.run(self._ask_all(missing)) if missing else {})}

    def _verdicts(self, count: int, prompts: Mapping[int, str], replies: Mapping[str, str | _Failed]) -> list[bool | None]:
        """The verdicts on so many items, of which those with `prompts` had to be asked for."""
        verdicts: list[bool | None] = [False] * count
        failed = []
        for i, prompt in prompts.items():
            reply = replies[prompt]
            verdicts[i] = verdict_of(reply) if isinstance(reply, str) else None
            if isinstance(reply, _Failed):
                failed.append(reply.reason)
        if failed:
            self.failures += len(failed)
            log.warning("%d of %d answers stay ungraded by %s; the last one: %s", len(failed), count, self.base_url, failed[-1])
        return verdicts

    def _client(self) -> openai.AsyncOpenAI:
        # Our own retries: the client's deadline is between two packets, so that a server which dribbles could hold a try for ever.
        return openai.AsyncOpenAI(base_url=self.base_url, api_key=self._key, max_retries=0, timeout=self.timeout)

    async def _ask_all(self, prompts: Sequence[str]) -> dict[str, str | _Failed]:
        """A usable reply, or why there is none, for each prompt; at most `concurrency` in flight."""
        replies: dict[str, str | _Failed] = {}
        todo = iter(prompts)
        self._waiting = asyncio.Lock()  # of this event loop
        async with self._client() as client:

            async def work() -> None:
                for prompt in todo:
                    reply = await self._ask(client, prompt)
                    if isinstance(reply, str):
                        self._store(prompt, reply)  # at once, so that an interruption loses nothing that was paid for
                    replies[prompt] = reply

            tasks = [asyncio.create_task(work()) for _ in range(min(self.concurrency, len(prompts)))]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        return replies

    async def _ask(self, client: openai.AsyncOpenAI, prompt: str) -> str | _Failed:
        """One prompt through all its tries, and anew after an outage."""
        for _ in range(1 + OUTAGES):
            asked = time.monotonic()
            reply = await self._tries(client, prompt)
            if isinstance(reply, str) or not reply.away or not await self._outlasted(client, asked, reply.reason):
                break
        return reply

    async def _tries(self, client: openai.AsyncOpenAI, prompt: str) -> str | _Failed:
        for attempt in range(self.retries + 1):
            try:
                text = await self._try_once(client, prompt)
            except _TryAgain as problem:
                if attempt == self.retries:
                    tries = f"{attempt + 1} tries" if attempt else "1 try"
                    return _Failed(f"{problem} ({tries})", problem.away)
                pause = FIRST_PAUSE * 2**attempt if problem.pause is None else problem.pause
                # Jitter spreads the calls that failed together.
                await asyncio.sleep(min(pause, LONGEST_PAUSE) * random.uniform(0.75, 1.25))
            except openai.APIStatusError as error:
                return _Failed(f"status {error.status_code}: {_message(error)}")
            else:
                if verdict_of(text) is None:
                    return _Failed(f"no yes or no in the reply {_short(text)!r}")
                return text
        raise AssertionError("unreachable: the last try returns")

    async def _outlasted(self, client: openai.AsyncOpenAI, asked: float, reason: str) -> bool:
        """Waits for a server that answers nobody; whether that is what became of a prompt first tried at `asked`, by `time.monotonic`.

        Raises `SealError` if the server is away for longer than `patience`.
        """
        if not self.patience:
            return False
        async with self._waiting:  # one asks for all
            began = time.monotonic()
            for attempt in itertools.count():
                if self._back >= asked or await self._answers(client):
                    break
                if attempt == 0:
                    log.warning("%s answers nobody (%s); waiting for it, at most %g s", self.base_url, reason, self.patience)
                if (waited := time.monotonic() - began) > self.patience:
                    raise SealError(
                        f"{self.base_url}: has answered nobody for {waited:.0f} s ({reason}); see to the server, and give the same command "
                        "again (grade.patience: how long it is waited for)"
                    )
                await asyncio.sleep(min(FIRST_PAUSE * 2 ** min(attempt, 10), LONGEST_PAUSE, self.patience))
            if attempt:
                self._back = time.monotonic()
                log.warning("%s answers again, after %.0f s", self.base_url, self._back - began)
        return self._back >= asked

    async def _answers(self, client: openai.AsyncOpenAI) -> bool:
        """Whether the server takes a question that nothing is wrong with, whatever it makes of it."""
        try:
            await self._try_once(client, item_prompt(PROBE))
        except _TryAgain as problem:
            return not problem.away
        except openai.APIStatusError:
            return True
        return True

    async def _try_once(self, client: openai.AsyncOpenAI, prompt: str) -> str:
        """The text of one reply. Raises `_TryAgain`, `SealError` (stop all) or `openai.APIStatusError` (give this prompt up)."""
        self.requests += 1
        try:
            completion = await asyncio.wait_for(
                client.chat.completions.create(
                    model=self.model, messages=[{"role": "user", "content": prompt}], temperature=0.0, max_tokens=MAX_TOKENS
                ),
                self.timeout,
            )
        except (TimeoutError, openai.APITimeoutError):
            raise _TryAgain(f"no reply within {self.timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise _NoConnection(f"connection failed: {_short(str(error.__cause__ or error))}") from None
        except openai.APIStatusError as error:
            status = error.status_code
            if status in (401, 403):
                raise SealError(f"{self.base_url}: key refused (status {status}): {_message(error)}; check OPENAI_API_KEY") from None
            if status == 404:
                raise SealError(
                    f"{self.base_url}: unknown model {self.model!r} or address (status 404): {_message(error)}; "
                    "check grade.model and grade.base_url"
                ) from None
            if status in RETRIED or status >= 500:
                raise _TryAgain(f"status {status}: {_message(error)}", _retry_after(error), status in AWAY) from None
            raise
        except (openai.OpenAIError, ValueError) as error:  # a body that is not JSON, or JSON of another form
            raise _TryAgain(f"not a chat completion: {_short(str(error))}") from None
        return _text_of(completion)

    def _entry(self, prompt: str) -> str:
        return hashlib.sha256(json.dumps([self.base_url, self.model, prompt]).encode()).hexdigest()

    def _cached(self, prompt: str) -> str | None:
        try:
            reply = self._cache.get(self._entry(prompt), retry=True)
        except (OSError, sqlite3.Error) as error:
            raise _cache_error(self._cache.directory, error) from None
        # Another version of this program may have stored what is no verdict to us.
        return reply if isinstance(reply, str) and verdict_of(reply) is not None else None

    def _store(self, prompt: str, reply: str) -> None:
        try:
            self._cache.set(self._entry(prompt), reply, retry=True)
        except (OSError, sqlite3.Error) as error:
            raise _cache_error(self._cache.directory, error) from None


def _text_of(completion: Any) -> str:
    """The text of a completion. The client checks nothing, so the reply may be anything, a plain `str` too."""
    try:
        text = completion.choices[0].message.content
    except (AttributeError, IndexError, TypeError, KeyError):
        raise _TryAgain(f"not a chat completion: {_short(str(completion))}") from None
    if text is not None and not isinstance(text, str):
        raise _TryAgain(f"not a chat completion: its content is {type(text).__name__}")
    return text or ""


def _apart(work: Callable[[], Any]) -> Future[Any]:
    """Begins `work` in a thread, one that does not keep an interrupted program from ending."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # for whoever waits
            future.set_exception(error)

    threading.Thread(target=run, name="grade", daemon=True).start()
    return future


def _retry_after(error: openai.APIStatusError) -> float | None:
    """The pause in seconds that the server asks for; None without one. Its other form, a date, is not read."""
    try:
        seconds = float(error.response.headers.get("retry-after", ""))
    except ValueError:
        return None
    return seconds if 0.0 <= seconds < float("inf") else None


def _short(text: str, most: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."


def _message(error: openai.APIStatusError) -> str:
    """The server's own words where it has some, else the client's."""
    body = error.body
    said = body.get("message") if isinstance(body, dict) else None
    return _short(said if isinstance(said, str) and said else error.message)


def _open_cache(folder: pathlib.Path) -> diskcache.Cache:
    """The reply cache. It is SQLite's, which serves several processes at once; nothing is ever thrown out of it."""
    try:
        # JSON, not diskcache's default pickle: a cache folder from elsewhere must not be able to run code.
        return diskcache.Cache(str(folder.expanduser()), disk=diskcache.JSONDisk, eviction_policy="none", disk_compress_level=1)
    except (OSError, sqlite3.Error, diskcache.Timeout) as error:
        raise _cache_error(folder, error) from None


def _cache_error(folder: str | os.PathLike[str], error: Exception) -> SealError:
    return SealError(f"{folder}: the cache of replies cannot be used: {_short(str(error))}; free space there or set grade.cache")
