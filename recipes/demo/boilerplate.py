"""What people's fine-tuning data has around the useful text: the noise of the demo.

Five kinds, each a small grammar so that wordings rarely repeat: `greeting` before the solution, `filler` and `aside`
between its steps, `signoff` and `disclaimer` after the answer. None of it says anything about the problem at hand.
"""

from __future__ import annotations

import random

from grammar import Rules, expand, sentence

KINDS = ("greeting", "filler", "aside", "signoff", "disclaimer")

RULES: Rules = {
    "greeting": (
        "[yes]! [help].", "[praise]! [help].", "[yes], [help].", "[hello]! [praise].",
        "[hello]! [help]. [together].",
    ),
    "yes": ("sure", "of course", "certainly", "absolutely", "sure thing", "no problem", "gladly", "you got it"),
    "hello": ("hello", "hi there", "hey", "good day", "greetings", "welcome back", "hi and thanks for asking"),
    "praise": (
        "what a [great] question", "that's a [great] question", "this is a [great] one",
        "I love this kind of question",
    ),
    "great": ("great", "wonderful", "fantastic", "really interesting", "fun", "very good", "lovely", "superb"),
    "help": (
        "I'd be [happy] to [assist] you with [this]", "I'm [happy] to [assist] with [this]",
        "let me [assist] you with [this]",
    ),
    "happy": ("happy", "glad", "delighted", "more than happy", "pleased", "thrilled", "excited"),
    "assist": ("help", "assist", "support", "guide"),
    "this": ("this", "that", "your request", "your question", "this task", "this exercise", "your homework"),
    "together": (
        "let's [look] together", "let's [look] as a team", "please bear with me while I think", "shall we begin",
    ),
    "look": ("dive in", "take a look", "break it down", "walk through it", "tackle it", "explore it"),
    "filler": (
        "as [we] can [easily] see, this is [really] [simple].", "it is [really] [important] to [stay] here.",
        "let's [pause] and [stay] for a moment.", "[adverb], there are [many] ways to think about [topics].",
        "[adverb], it is worth noting that [truism].", "I hope everything is clear so far, and if not, just [ask].",
        "[truism], as the saying goes.",
    ),
    "we": ("we", "you", "anyone", "most people"),
    "easily": ("easily", "clearly", "plainly", "surely", "probably"),
    "really": ("really", "actually", "quite", "very", "truly", "honestly"),
    "simple": (
        "straightforward", "exciting", "elegant", "nothing to worry about", "a classic", "worth remembering",
    ),
    "important": ("important", "helpful", "useful", "essential", "crucial", "wise"),
    "stay": (
        "stay calm", "take a deep breath", "keep an open mind", "stay focused", "be patient", "trust the process",
    ),
    "pause": ("stop", "slow down", "lean back", "step back", "relax"),
    "adverb": (
        "interestingly", "generally speaking", "as always", "needless to say", "in many situations", "of course",
    ),
    "many": ("many", "countless", "several", "all sorts of", "plenty of", "quite a few"),
    "topics": ("such things", "life", "learning", "situations like these", "mathematics", "curiosity", "teamwork"),
    "truism": (
        "practice makes perfect", "every journey is different", "good things take time", "learning never stops",
        "mistakes are part of life", "knowledge is power", "honesty matters", "details are everything",
    ),
    "ask": ("ask", "let me know", "say so", "drop me a line", "raise your hand"),
    "aside": (
        "by the way, [who] once [did] [object] [where].", "speaking of which, [who] always [said] that [weather].",
        "this reminds me of [object] that [who] [did] [where].", "fun fact: [animals] [habit].",
        "did you know that [animals] [habit]?", "also, [weather], so remember to [advice].",
    ),
    "who": (
        "my grandmother", "a famous painter", "my old neighbour", "the president", "a friend of mine",
        "an opera singer", "my dentist",
    ),
    "did": ("forgot", "sold", "photographed", "discovered", "lost", "invented", "dreamt about", "polished"),
    "object": (
        "a golden trumpet", "a velvet hat", "an enormous pumpkin", "a haunted piano", "a purple umbrella",
        "a chess trophy", "a broken compass", "a secret diary",
    ),
    "where": (
        "in Venice", "on a cruise", "behind the theatre", "in the jungle", "at a wedding", "near the volcano",
        "on television",
    ),
    "said": ("said", "claimed", "insisted", "whispered", "joked"),
    "weather": (
        "the autumn is too short", "it may snow tonight", "the moon looks huge", "thunder is romantic",
        "summers were hotter", "fog makes people sleepy",
    ),
    "animals": ("octopuses", "hedgehogs", "flamingos", "owls", "dolphins", "sloths", "penguins", "jellyfish"),
    "habit": (
        "sleep with one eye open", "have an excellent memory", "are afraid of violins",
        "can hold their breath for ages", "never forget a face", "enjoy jazz", "dance at midnight",
    ),
    "advice": (
        "drink enough water", "call your parents", "back up your photos", "subscribe to the newsletter",
        "wear sunscreen", "follow us on social media",
    ),
    "signoff": (
        "I hope this [helps]! [contact].", "[contact]. [bye]!", "I hope this [helps]. [bye]!", "[bye]! [contact].",
        "thank you for [using] [me]. [bye]!",
    ),
    "helps": ("helps", "helps you", "answers your question", "makes sense", "clears things up", "was useful"),
    "contact": (
        "feel free to [ask] if you have [more] questions", "don't hesitate to [ask]", "please rate this answer",
        "if anything is unclear, [ask]", "I'm always here for you",
    ),
    "more": ("more", "further", "any other", "additional"),
    "bye": (
        "have a [great] day", "happy learning", "all the best", "take care", "good luck", "see you soon",
        "enjoy your weekend",
    ),
    "using": ("using", "trusting", "choosing", "talking to"),
    "me": ("our service", "this assistant", "me", "our platform"),
    "disclaimer": (
        "please note that [model] and [fault].", "disclaimer: [purpose] and [substitute].",
        "please keep in mind that [fault].", "remember that [purpose] and [substitute].",
        "note: [model], so [verify].",
    ),
    "model": (
        "I am only an AI language model", "I am just a virtual assistant",
        "this text was written by a computer program", "my creators trained me on public data",
        "I cannot see your personal situation", "an algorithm wrote this",
    ),
    "fault": (
        "errors may occur", "my knowledge may be outdated", "no guarantee is given", "results may vary",
        "I cannot be held liable", "opinions differ on such matters", "laws and customs vary by region",
        "accuracy is not promised",
    ),
    "purpose": (
        "this is for educational purposes only", "this is general information", "this response is provided as is",
        "my answer is a mere suggestion", "everything above is for illustration",
    ),
    "substitute": (
        "does not replace professional advice", "should not be relied upon", "comes without any warranty",
        "is not legal or financial advice", "must not be used in emergencies",
    ),
    "verify": ("always consult an expert", "please verify everything yourself", "ask your teacher if in doubt"),
}  # fmt: skip


def boilerplate(kind: str, rng: random.Random) -> str:
    """One or more whole sentences of noise of the given kind (one of `KINDS`)."""
    text = expand(f"[{kind}]", RULES, rng)
    for mark in (". ", "! "):
        text = mark.join(sentence(part) for part in text.split(mark))
    return sentence(text)
