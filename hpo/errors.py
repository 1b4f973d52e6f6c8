"""The one base of our exceptions. It imports nothing, so that every part of the project may raise and know them."""

from __future__ import annotations

SHOWN_MOST = 1_000  # characters of a message that quotes what somebody else has written
_JOINERS = "\u200c\u200d"  # unseen, but letters of Persian and parts of emoji


def legible(text: str, most: int = SHOWN_MOST) -> str:
    """The text in one line of at most so many characters, and in letters that a terminal only shows.

    Line ends, escape codes, marks that turn the direction of writing and the like become what Python writes for them,
    as \\n or \\x1b; of a longer text the middle is left out.
    """
    if len(text) > most:
        text = f"{text[: most - 300]} … {text[-250:]}"
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter in _JOINERS else letter.encode("unicode_escape").decode()
        for letter in text
    )


class HpoError(Exception):
    """What a user can act on: the message states the rule, the value and the way out.

    The command line turns these, and only these and the operating system's errors, into one line and an exit status.
    Whatever else is raised is a defect of ours and shows its traceback.
    """

    exit_status = 1


class StudyFault(HpoError):
    """One study cannot be worked on: its data, its plan, its model, or the store under it. Others can.

    A standing worker quarantines such a study, with backoff, and goes on with the others.
    """


class WorkerFault(HpoError):
    """This process can do no more work, as its device does not answer it any more, or no thread. Another process can.

    What it holds is free for others at once, and counts as lost: whatever brought the device down may do so again.
    """
