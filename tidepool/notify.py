"""Tells people how a run went, by Apprise: Slack, mail, or any of its other targets.

The targets are the setting `TIDEPOOL_NOTIFY_URLS`. A message is a courtesy: a target that fails is logged, and never
fails the run. The URLs hold secrets, so that the log names a target by its service and its place in the setting.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from tidepool.settings import settings

if TYPE_CHECKING:
    from logging import Logger, LoggerAdapter

Kind = Literal["info", "success", "warning", "failure"]

# Slack takes 3,000 characters in one block, and nobody reads more on a phone.
_LIMIT_CHARACTERS = 2500


def send(log: Logger | LoggerAdapter[Any], title: str, body: str, kind: Kind = "info") -> int:
    """Sends a message to every configured target.

    Args:
        log: Where it is said who was told and who could not be; usually the run's logger.
        title: What happened, in one line: it is what a phone shows.
        body: Markdown; cut after 2,500 characters.
        kind: Sets the colour or the icon.

    Returns:
        How many targets took the message.
    """
    urls = settings().notify.urls.get_secret_value().split()
    if not urls:
        log.info("Nobody is told (%r): TIDEPOOL_NOTIFY_URLS is empty", title)
        return 0
    told = 0
    for place, url in enumerate(urls, start=1):
        name = f"target {place} of {len(urls)} in TIDEPOOL_NOTIFY_URLS"
        problem = _problem(url, title, _cut(body), kind)
        if problem is None:
            log.info("Told %s: %r", name, title)
            told += 1
        else:
            log.error("Could not tell %s (%s): %r; the run goes on", name, problem, title)
    return told


def _problem(url: str, title: str, body: str, kind: Kind) -> str | None:
    """Sends one message; what is wrong with the target, or None when it took the message."""
    import apprise

    target = apprise.Apprise.instantiate(url, suppress_exceptions=True)
    if target is None:
        return "no Apprise URL, such as slack://TokenA/TokenB/TokenC"
    target.socket_connect_timeout = target.socket_read_timeout = settings().notify.timeout_seconds
    messenger = apprise.Apprise()
    messenger.add(target)
    # Apprise answers False to whatever goes wrong on the way, and logs the details without the URL's secrets.
    if messenger.notify(body=body, title=title, notify_type=kind, body_format=apprise.NotifyFormat.MARKDOWN):
        return None
    return f"{target.service_name} did not take it"


def _cut(body: str) -> str:
    return body if len(body) <= _LIMIT_CHARACTERS else f"{body[:_LIMIT_CHARACTERS]} …"
