"""`oxe-mix serve`: a checkpoint behind a socket, for robots that are elsewhere."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oxe_mix.errors import UserError
from oxe_mix.text import complain, say
from train_llava.acting.gate import Gate
from train_llava.acting.incoming import Caps
from train_llava.acting.load import Loading, codec_of, load_policy
from train_llava.acting.obs_keys import obs_keys
from train_llava.acting.service import Terms
from train_llava.acting.validator import ActionValidator, OnViolation, validator_of

if TYPE_CHECKING:
    from train_llava.acting.policy import Policy

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What a user asked for."""

    checkpoint: Path
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    allow_origins: tuple[str, ...] = ()
    obs_keys: Path | None = None
    max_batch: int = 1
    limits: Path | None = None
    on_violation: OnViolation = "clamp"
    caps: Caps = field(default_factory=Caps)
    loading: Loading = field(default_factory=Loading)


def run_serve(options: ServeOptions) -> int:
    """Serve until SIGTERM or Ctrl-C. What is in hand then is answered first; a second signal ends at once.

    Returns: 128 + the signal, as other commands that are stopped: 143 or 130.
    Raises: UserError for what the user can mend, before the weights are read.
    """
    codec = codec_of(options.checkpoint)
    gate = Gate(options.token, options.allow_origins)
    gate.check_host(options.host)
    terms = Terms(gate, obs_keys(codec.asking, options.obs_keys), options.caps, options.max_batch)
    validator = validator_of(codec, options.limits, options.on_violation)
    with _bound(options.host, options.port) as listener:
        start = time.monotonic()
        policy = load_policy(options.checkpoint, options.loading)
        say(f"{options.checkpoint}: loaded in {time.monotonic() - start:.0f} s; {_what(policy)}")
        return asyncio.run(_serve(policy, validator, terms, (options.checkpoint, listener)))


async def _serve(
    policy: Policy, validator: ActionValidator, terms: Terms, where: tuple[Path, socket.socket]
) -> int:
    from train_llava.acting.handshake import metadata
    from train_llava.acting.server import PolicyServer

    checkpoint, listener = where
    about = metadata(checkpoint, policy, terms.keys)
    server = PolicyServer(policy, validator, terms, about)
    asked = _asked_to_stop()
    host, port = listener.getsockname()[:2]
    try:
        await server.start(listener)
    except OSError as error:  # two programs can bind a port; the second that listens is refused
        raise _busy(host, port, error) from error
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    say(f"robots: {', '.join(_robots(about))}")
    if about["ignored_fields"]:
        say(f"ignored in requests: {', '.join(about['ignored_fields'])}")
    say(f"listening on ws://{address} for openpi-client, and on http://{address}/act")
    say("Ctrl-C or SIGTERM stops it; what is in hand is answered first")
    number = await asked
    say(f"{signal.Signals(number).name}: stopping")
    is_done = await server.stop()
    say(server.tally.summary())
    if not is_done:
        complain("the model hangs; ended without its answer")
        os._exit(128 + number)  # its thread would be waited for
    return 128 + number


def _asked_to_stop() -> asyncio.Future[int]:
    """Done with the signal's number at the first SIGTERM or SIGINT. The second has its usual effect."""
    loop = asyncio.get_running_loop()
    asked: asyncio.Future[int] = loop.create_future()

    def stop(number: int) -> None:
        if asked.done():  # both came before the loop looked
            signal.raise_signal(number)
        for one in _SIGNALS:
            loop.remove_signal_handler(one)
            signal.signal(one, signal.SIG_DFL)
        asked.set_result(number)

    for number in _SIGNALS:
        loop.add_signal_handler(number, stop, number)
    return asked


def _bound(host: str, port: int) -> socket.socket:
    """A socket that nobody else has; taken before the weights are read, since that can take minutes.

    Raises: UserError for an address that is in use or not this machine's.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
    except (OSError, UnicodeError) as error:  # the latter for what cannot be a name
        raise UserError(f"--host {host}: {getattr(error, 'strerror', None) or error}") from error
    try:
        # A server that ended a moment ago must not keep its port.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _busy(host, port, error) from error
    return listener


def _busy(host: str, port: int, error: OSError) -> UserError:
    return UserError(
        f"--port {port}: cannot be had on {host} ({error.strerror}); choose another, or 0 for any"
    )


def _what(policy: Policy) -> str:
    height, width = policy.image_size
    codec = policy.codec
    how = "all tokens at once" if policy.is_parallel else "token by token"
    state = " and the robot's state" if codec.asking.state else ""
    return (
        f"{', '.join(policy.cameras)} at {height}x{width}{state} in, chunks of {codec.chunk} x "
        f"{codec.action_dim} out, {how}"
    )


def _robots(about: dict[str, Any]) -> list[str]:
    """Each unnorm_key with what is known of its robot."""
    return [
        f"{key} ({own['robot']}, {own['control_hz']} Hz)" if own["robot"] != "unknown" else f"{key} (no card)"
        for key, own in about["robots"].items()
    ]
