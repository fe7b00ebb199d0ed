"""What a server permits and how long it waits; every default stands here."""

from __future__ import annotations

from dataclasses import dataclass, field

from dmax.params import check_fields, number, whole

MIB = 2**20


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Limits of a server. Whatever goes beyond one gets an error that names it.

    Attributes:
        max_batch_size: sequences that a model decodes at once, its slots.
        max_queue: requests of a model that wait for a slot; one more gets 429.
        max_prompt_tokens: of one request; None: as many as the context holds.
        max_new_tokens: of one request; None: as many as the context holds.
        max_total_tokens: prompt and new tokens of all requests of a model in progress; one more
            gets 429. None: no limit.
        max_choices: `n` of one request, and prompts of one completion request.
        max_seconds: after which a request ends with what it has.
        max_body_bytes: of one request.
        max_json_depth: of one request.
        max_connections: open at once.
        max_buffered_bytes: of a stream that its client does not read; then it is cancelled.
        header_seconds: for a client to send its headers.
        body_seconds: for a client to send its body.
        shutdown_seconds: for requests in progress to finish once the server is told to stop.
        api_keys: any of which a request must carry; empty: none is needed.
        cors_origins: web pages of other hosts that may call; "*" permits all.
        allowed_hosts: names besides loopback's own that requests may address; empty: on a loopback
            address only loopback's own, elsewhere any.
    """

    max_batch_size: int = whole(16, low=1, high=2**16)
    max_queue: int = whole(256)
    max_prompt_tokens: int | None = whole(None, low=1, optional=True)
    max_new_tokens: int | None = whole(None, low=1, optional=True)
    max_total_tokens: int | None = whole(None, low=1, optional=True)
    max_choices: int = whole(16, low=1, high=1024)
    max_seconds: float = number(600.0, above_low=True)
    max_body_bytes: int = whole(2 * MIB, low=1)
    max_json_depth: int = whole(32, low=1, high=512)
    max_connections: int = whole(1024, low=1)
    max_buffered_bytes: int = whole(MIB, low=1)
    header_seconds: float = number(10.0, above_low=True)
    body_seconds: float = number(30.0, above_low=True)
    shutdown_seconds: float = number(30.0)
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
