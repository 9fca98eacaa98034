"""Notifications about a run, by Apprise: to Slack, by mail, or to any of its other targets.

The targets are the setting `TIDEPOOL_NOTIFY_URLS`. A message is a courtesy: a target that fails is logged, and never
fails the run. The URLs contain secrets: the log names a target by its service and its position in the setting.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from tidepool.settings import settings

if TYPE_CHECKING:
    from logging import Logger, LoggerAdapter

Kind = Literal["info", "success", "warning", "failure"]

# Slack accepts 3,000 characters in one block, and a message is read on a phone.
_LIMIT_CHARACTERS = 2500


def send(log: Logger | LoggerAdapter[Any], title: str, body: str, kind: Kind = "info") -> int:
    """Send a message to every configured target.

    Args:
        log: Logger of which targets were notified and which could not be; usually the run's.
        title: The event in one line, as a phone shows it.
        body: Markdown; cut after 2,500 characters.
        kind: Sets the colour or the icon.

    Returns:
        The number of targets that accepted the message.
    """
    urls = settings().notify.urls.get_secret_value().split()
    if not urls:
        log.info("no notification sent (%r): TIDEPOOL_NOTIFY_URLS is empty", title)
        return 0
    if len(body) > _LIMIT_CHARACTERS:
        body = f"{body[:_LIMIT_CHARACTERS]} …"
    notified = 0
    for place, url in enumerate(urls, start=1):
        name = f"target {place} of {len(urls)} in TIDEPOOL_NOTIFY_URLS"
        if problem := _problem(url, title, body, kind):
            log.error("could not notify %s (%s): %r; the run continues", name, problem, title)
        else:
            log.info("notified %s: %r", name, title)
            notified += 1
    return notified


def _problem(url: str, title: str, body: str, kind: Kind) -> str | None:
    """Send one message; return the problem of the target, or None when it accepted the message."""
    import apprise

    target = apprise.Apprise.instantiate(url, suppress_exceptions=True)
    if target is None:
        return "not an Apprise URL, such as slack://TokenA/TokenB/TokenC"
    target.socket_connect_timeout = target.socket_read_timeout = settings().notify.timeout_seconds
    messenger = apprise.Apprise()
    messenger.add(target)
    # Apprise returns False for every kind of error, and logs the details without the URL's secrets.
    if messenger.notify(body=body, title=title, notify_type=kind, body_format=apprise.NotifyFormat.MARKDOWN):
        return None
    return f"{target.service_name} did not accept it"
