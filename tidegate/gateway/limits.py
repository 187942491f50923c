"""Every bound of a gateway, with its unit."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GatewayLimits:
    """Milliseconds, bytes and counts; `assemble` sets those that are configured, the others stay as they are here."""

    # What a client sends. `upload_ms_max` is for the body of a file upload, which is not held in memory.
    body_bytes_max: int = 8 << 20
    body_ms_max: int = 30_000
    upload_ms_max: int = 1_800_000
    head_bytes_max: int = 64 << 10
    head_fields_max: int = 100
    head_ms_max: int = 10_000

    # What a client is sent: how long it may leave that unread, and how long its connection may be idle. Beyond
    # `connections_max` one that asks nothing goes for each that comes.
    client_stall_ms_max: int = 60_000
    keep_alive_ms_max: int = 75_000
    connections_max: int = 8_192

    # The waiting room: these cap what an endpoint's own limits may be. A held stream is silent for
    # `hold_quiet_ms_max`, then a comment every `hold_comment_ms` keeps it open.
    hold_ms_max: int = 150_000
    queued_max: int = 512
    hold_quiet_ms_max: int = 2_000
    hold_comment_ms: int = 5_000

    # Engines: `engine_first_byte_ms_max` bounds a prefill or a whole unary answer, `engine_silence_ms_max` the pause
    # between two events of a stream; `batch_silence_ms_max` is both for batch lines, whose engine stands still while
    # others work. Idle connections are counted by engine.
    engine_connect_ms_max: int = 2_000
    engine_first_byte_ms_max: int = 600_000
    engine_silence_ms_max: int = 120_000
    batch_silence_ms_max: int = 3_600_000
    idle_connections_max: int = 256
    idle_connection_ms_max: int = 30_000
    answer_bytes_max: int = 64 << 20
    event_bytes_max: int = 1 << 20

    # The usage journal: how often a running stream leaves a checkpoint. A gateway that is killed loses so much of it.
    checkpoint_ms: int = 800

    # Control: demand that is not urgent gathers for `demand_ms`. A gateway that starts takes no connection for
    # `first_word_ms_max` while it has not heard from control; after that it answers 503 not_ready.
    demand_ms: int = 100
    reconnect_ms_min: int = 50
    reconnect_ms_max: int = 2_000
    first_word_ms_max: int = 3_000
    admin_metrics_ms_max: int = 1_000
    shutdown_ms_max: int = 5_000

    # Text sessions: so many of one tenant. One ends when nothing was asked in it for `session_idle_ms_max`, and after
    # `session_ms_max` in any case; its conversation and each message of its client have their bounds in memory.
    sessions_max: int = 64
    session_idle_ms_max: int = 300_000
    session_ms_max: int = 3_600_000
    session_bytes_max: int = 4 << 20
    session_event_bytes_max: int = 1 << 20
