"""Whether the Hugging Face hub, or another place of the network, can be reached."""

import functools
import threading
import time
from contextlib import suppress

PATIENCE = 5.0  # seconds in which the hub must answer
_KEPT = 60.0  # seconds for which its answer counts


def is_hub_silent() -> bool:
    """Whether the hub gives no answer within PATIENCE seconds; not asked in offline mode, which needs none.

    The hub's own client waits for the operating system to give up, for minutes where packets are dropped.
    """
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and is_silent(constants.ENDPOINT)


def is_silent(address: str) -> bool:
    """Whether a server gives no answer within PATIENCE seconds."""
    return not _answers(address, int(time.monotonic() // _KEPT))


@functools.lru_cache(maxsize=4)
def _answers(address: str, now: int) -> bool:
    """Whether a server answers; in a thread, as no timeout bounds the look-up of its address.

    Args:
      now: the time in units of _KEPT, so that a later call asks again.
    """
    from huggingface_hub import get_session

    answers: list[bool] = []

    def ask() -> None:
        with suppress(Exception):  # of whichever library the hub's client uses: no answer
            get_session().head(address, timeout=PATIENCE)
            answers.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return bool(answers)
