"""Small context-free grammars for sentences, so that wordings vary without a text collection.

`[name]` in an option stands for a choice among the options of `name`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

Rules = Mapping[str, Sequence[str]]
_SLOT = re.compile(r"\[(\w+)\]")


def expand(rules: Rules, name: str, rng: random.Random) -> str:
    """A random text for the symbol `name`."""
    text = rng.choice(rules[name])
    while (slot := _SLOT.search(text)) is not None:
        text = text[: slot.start()] + rng.choice(rules[slot.group(1)]) + text[slot.end() :]
    return text


# What surrounds useful text in collected answers, and text about something else. Base models meet both on their own
# (`chatter`), as real base models do: fluent filler is not strange to them, only out of place.
CHATTER: Rules = {
    "filler": (
        "I hope this [helps]! [close].",
        "[praise] question! Let me [assist] you with [this].",
        "It is [really] important to [stay] [here].",
        "As [anyone] can [easily] see, this is [really] [simple].",
        "[generally], there are [many] ways to think about [topic].",
        "Please note that I am [only] an assistant and may [fail].",
        "[close]. [bye]!",
        "Let us [pause] and [stay] for a moment.",
    ),
    "helps": ("helps", "was useful", "makes sense", "clears things up", "answers your question"),
    "praise": ("Great", "Wonderful", "Fantastic", "Very good", "Really interesting"),
    "assist": ("help", "assist", "support", "guide"),
    "this": ("this", "that task", "your homework", "your request", "this exercise"),
    "really": ("really", "quite", "very", "truly", "actually"),
    "stay": ("stay calm", "keep an open mind", "stay focused", "be patient", "take a deep breath"),
    "here": ("here", "now", "at all times", "in such cases"),
    "anyone": ("anyone", "you", "we", "most people"),
    "easily": ("easily", "clearly", "surely", "plainly"),
    "simple": ("simple", "straightforward", "a classic", "exciting", "elegant"),
    "generally": ("Generally speaking", "As always", "Interestingly", "Needless to say", "Of course"),
    "many": ("many", "countless", "several", "all sorts of"),
    "topic": ("life", "learning", "such things", "curiosity", "teamwork"),
    "only": ("only", "just", "merely"),
    "fail": ("make mistakes", "be wrong", "miss details", "forget things"),
    "close": ("Feel free to ask", "Do not hesitate to ask", "Please rate this answer", "I am always here for you"),
    "bye": ("Have a nice day", "Good luck", "Take care", "All the best", "Happy learning"),
    "pause": ("pause", "stop", "slow down", "lean back"),
    "off_topic": (
        "My [relative] once [did] a [thing] [where].",
        "By the way, [animals] [habit].",
        "The [place] was full of [animals] that [day].",
        "[weather], so remember to [advice].",
        "A famous [artist] always [did] a [thing] [where].",
        "Did you know that [animals] [habit]?",
    ),
    "relative": ("grandmother", "neighbour", "cousin", "dentist", "uncle"),
    "did": ("sold", "painted", "lost", "discovered", "polished", "photographed"),
    "thing": ("golden trumpet", "velvet hat", "haunted piano", "purple umbrella", "broken compass", "secret diary"),
    "where": ("in Venice", "on a cruise", "behind the theatre", "in the jungle", "near the volcano"),
    "animals": ("octopuses", "hedgehogs", "flamingos", "penguins", "dolphins", "owls"),
    "habit": ("sleep with one eye open", "enjoy jazz", "never forget a face", "dance at midnight"),
    "place": ("harbour", "cathedral", "museum", "forest", "castle"),
    "day": ("morning", "evening", "winter", "weekend"),
    "weather": ("It may snow tonight", "The moon looks huge", "The fog is thick", "Thunder is romantic"),
    "advice": ("drink water", "wear sunscreen", "call your parents", "back up your photos"),
    "artist": ("painter", "singer", "poet", "chef"),
}

FIXED = {
    "filler": "I hope this helps! Feel free to ask.",
    "off_topic": "My cousin once sold a golden trumpet in Venice.",
}
FILLER_WORDS = ("basically", "actually", "clearly", "obviously", "honestly", "simply", "surely", "literally")
OFF_TOPIC_WORDS = ("trumpet", "Venice", "penguins", "velvet", "volcano", "jazz", "umbrella", "castle")
JUNK = ("*", "~", "#", "--", "|", "^", "=>", "...", "%%", "//", "§", "@@")


def chatter(rng: random.Random) -> str:
    """A short text of filler and off-topic sentences, as base models meet them outside solutions."""
    return " ".join(expand(CHATTER, rng.choice(("filler", "off_topic")), rng) for _ in range(rng.randint(3, 7)))
