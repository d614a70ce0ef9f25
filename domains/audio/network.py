"""One short question to the network before anything waits for it."""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.request

SECONDS = 3.0
"""Longest wait for an answer."""


def reachable(url: str, seconds: float = SECONDS) -> bool:
    """Whether ``url``'s server answers within ``seconds``; looking up its name counts towards them.

    Never, where the environment says ``HF_HUB_OFFLINE=1``.
    """
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in {"1", "true", "yes", "on"}:
        return False
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
            answered.set()
        except urllib.error.HTTPError as error:
            if error.code < 500:  # it speaks to us: 401, 404, 405 are answers
                answered.set()
        except (OSError, ValueError):
            pass
        finally:
            done.set()

    done = threading.Event()
    threading.Thread(target=ask, daemon=True).start()  # a thread, since a name's look-up has no time limit of its own
    done.wait(seconds)
    return answered.is_set()
