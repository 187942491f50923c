"""Every bound of a gateway, with its unit."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GatewayLimits:
    """Milliseconds and bytes.

    `upload_ms_max` is for the body of a file upload, which is not held in memory. `hold_ms_max` and `queued_max` cap
    what an endpoint's own limits may be. `engine_first_byte_ms_max` bounds a prefill or a whole unary answer,
    `engine_silence_ms_max` the pause between two events of a stream. `client_stall_ms_max` is how long a client may
    leave what it was sent unread. `first_word_ms_max` is how long a new gateway takes no connection while it has not
    heard from control; after that it answers 503 not_ready. `sessions_max` is for one tenant; a session ends once
    nothing was asked in it for `session_idle_ms_max`, and after `session_ms_max` in any case. `session_bytes_max` is
    what its conversation may hold in memory, `session_event_bytes_max` one message of its client.
    """

    body_bytes_max: int = 8 << 20
    body_ms_max: int = 30_000
    upload_ms_max: int = 1_800_000
    head_bytes_max: int = 64 << 10
    head_fields_max: int = 100
    head_ms_max: int = 10_000
    answer_bytes_max: int = 64 << 20
    event_bytes_max: int = 1 << 20
    hold_ms_max: int = 150_000
    queued_max: int = 512
    hold_quiet_ms_max: int = 2_000
    hold_comment_ms: int = 5_000
    engine_connect_ms_max: int = 2_000
    engine_first_byte_ms_max: int = 600_000
    engine_silence_ms_max: int = 120_000
    client_stall_ms_max: int = 60_000
    keep_alive_ms_max: int = 75_000
    idle_connections_max: int = 256
    idle_connection_ms_max: int = 30_000
    checkpoint_ms: int = 800
    demand_ms: int = 100
    reconnect_ms_min: int = 50
    reconnect_ms_max: int = 2_000
    first_word_ms_max: int = 3_000
    admin_metrics_ms_max: int = 1_000
    shutdown_ms_max: int = 5_000
    sessions_max: int = 64
    session_idle_ms_max: int = 300_000
    session_ms_max: int = 3_600_000
    session_bytes_max: int = 4 << 20
    session_event_bytes_max: int = 1 << 20
