"""Settings of a server."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

MAX_TOP_K = 200  # labels of a text
MAX_EXPLAINED = 16  # texts of a request whose predictions are explained
MAX_LISTED = 1000  # labels in an answer of `GET /labels`
MAX_WAITING = 1024  # requests that wait for the model


@dataclass(frozen=True)
class ServerSettings:
    """Settings of a server.

    Args:
        name: Name of the model in answers, and the id of the project in the API of Annif.
        language: Language of the labels, as the API of Annif states it.
        max_texts: Maximum number of texts in a request.
        max_characters: Maximum number of characters of a text.
        max_body_bytes: Maximum size of a request.
        max_body_seconds: Maximum time that a request takes to arrive.
        batch_size: Number of texts from which on a batch takes no further requests.
        batch_wait_ms: Time that a request waits for others to share its batch, in milliseconds.
        log_texts: Whether log lines hold the texts of requests.
        token: Token that clients send as ``Authorization: Bearer``; ``None`` to admit all clients.

    Raises:
        ValueError: if a number is out of range, or the token is blank.
    """

    name: str = "model"
    language: str = "en"
    max_texts: int = 1000
    max_characters: int = 100_000
    max_body_bytes: int = 10_000_000
    max_body_seconds: float = 60
    batch_size: int = 256
    batch_wait_ms: float = 2.0
    log_texts: bool = False
    token: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_texts", "max_characters", "max_body_bytes", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not self.max_body_seconds > 0:
            raise ValueError(f"`max_body_seconds` must be positive, got {self.max_body_seconds}.")
        if not 0 <= self.batch_wait_ms <= 60_000:
            raise ValueError(f"`batch_wait_ms` must be from 0 to 60000, got {self.batch_wait_ms}.")
        if self.token is not None and not self.token.strip():
            raise ValueError("HF_XMC_TOKEN must be a token, got blank text. Unset it to admit all clients.")

    def to_json(self) -> str:
        """Return the settings without the token, which stays in its own variable."""
        return json.dumps({name: value for name, value in asdict(self).items() if name != "token"})
