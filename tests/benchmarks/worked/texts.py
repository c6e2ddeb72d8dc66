"""Texts written for the worked examples, in the form of three public data sets, with lines that do not belong.

Nothing is taken from the data sets: only their form (`<<6*4=24>>` annotations, `####` before the answer, a docstring to
complete, an abstract with a conclusion and a decision), because the base model that reads them has learnt that form.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.benchmarks.real_text.records import Record

FOREIGN = "~"  # begins a line that was planted; the mark itself is taken away


@dataclass(frozen=True)
class Example:
    """One own text: what the model is given, and which of the completion's lines do not belong.

    Args:
        name: by which a page calls it.
        shows: what is to be seen in it, in a few words.
    """

    name: str
    shows: str
    record: Record
    foreign: tuple[tuple[int, int], ...]  # where planted lines are, as (begin, end) in the completion


def example(name: str, shows: str, head: str, tail: str, text: str) -> Example:
    """From a completion in which planted lines begin with FOREIGN."""
    lines, foreign, at = [], [], 0
    for line in text.splitlines(keepends=True):
        planted = line.lstrip(" ").startswith(FOREIGN)
        line = line.replace(FOREIGN, "", 1) if planted else line
        if planted:
            foreign.append((at, at + len(line)))
        lines.append(line)
        at += len(line)
    completion = "".join(lines)
    return Example(name, shows, Record(head, tail, completion, at, at), tuple(foreign))


def problem(name: str, shows: str, question: str, text: str) -> Example:
    """A word problem with its solution."""
    return example(name, shows, f"Question: {question}", "\nAnswer:\n", text)


def function(name: str, shows: str, head: str, text: str) -> Example:
    """A function to complete."""
    return example(name, shows, head, "", text)


def study(name: str, shows: str, question: str, context: str, text: str) -> Example:
    """A research question with an abstract and its conclusion."""
    return example(name, shows, f"Question: {question}\nContext: {context}", "\nAnswer:\n", text)


MATH = (
    problem(
        "rolls",
        "a chatty opening and a chatty end",
        "A bakery packs 6 rolls in a bag. Mara buys 4 bags and eats 5 rolls on her way home. How many rolls are left?",
        """\
~Sure! I would be happy to help you with this one.
Mara buys 4 bags * 6 rolls = <<4*6=24>>24 rolls.
After her way home there are 24 - 5 = <<24-5=19>>19 rolls left.
~I hope this helps! Feel free to ask if anything is unclear.
#### 19""",
    ),
    problem(
        "kites",
        "remains of a web page, and a remark off the topic",
        "Jonas makes 3 kites a day for 5 days and sells them for $7 each. How much money does he get?",
        """\
Jonas makes 3 * 5 = <<3*5=15>>15 kites.
~<div class="ad">&nbsp;Share | Tweet | Print&nbsp;</div>
~Kites were flown in China long before anyone in Europe had seen paper.
He gets 15 * 7 = $<<15*7=105>>105.
#### 105""",
    ),
    problem(
        "marbles",
        "one wrong number among right ones",
        "Lena has 18 marbles. She gives half of them to her brother and then finds 4 more. How many does she have?",
        """\
Lena gives her brother 18 / 2 = <<18/2=9>>9 marbles.
So she has 18 - 9 = <<18-9=9>>6 marbles left.
Then she has 9 + 4 = <<9+4=13>>13 marbles.
#### 13""",
    ),
    problem(
        "bus",
        "nothing: a clean solution",
        "A bus has 40 seats. 12 people get on at the first stop and twice as many at the second. How many seats "
        "are free?",
        """\
At the second stop 12 * 2 = <<12*2=24>>24 people get on.
Then there are 12 + 24 = <<12+24=36>>36 people on the bus.
So 40 - 36 = <<40-36=4>>4 seats are free.
#### 4""",
    ),
)

CODE = (
    function(
        "running_total",
        "a remark to the reader, and a licence line",
        '''def running_total(numbers: list) -> list:
    """ Return the sum of all numbers up to each place.
    >>> running_total([1, 2, 3])
    [1, 3, 6]
    """
''',
        """\
    ~# Here is the solution, as you asked. Let me know if it works for you!
    ~# (c) 2019 Contoso Ltd. All rights reserved. Do not copy.
    result = []
    total = 0
    for number in numbers:
        total += number
        result.append(total)
    return result
""",
    ),
    function(
        "count_vowels",
        "what was left behind while debugging",
        '''def count_vowels(text: str) -> int:
    """ Count the vowels in a text, large and small ones.
    >>> count_vowels("Apple")
    2
    """
''',
        """\
    ~print("XXXX HERE 1", file=sys.stderr)  # TODO remove!!
    count = 0
    for letter in text.lower():
        if letter in "aeiou":
            count += 1
    return count
""",
    ),
    function(
        "is_sorted",
        "nothing: clean code",
        '''def is_sorted(values: list) -> bool:
    """ Return True if no value is smaller than the one before it.
    >>> is_sorted([1, 2, 2])
    True
    """
''',
        """\
    for i in range(len(values) - 1):
        if values[i] > values[i + 1]:
            return False
    return True
""",
    ),
)

REMINDERS = (
    "Do text message reminders improve adherence to blood pressure tablets?",
    "Many patients stop taking their tablets within a year. We randomised 214 adults with hypertension to weekly "
    "text messages or usual care. After six months adherence was 78% in the message group and 61% in the control "
    "group (P = 0.01).",
    """\
~As an AI language model I cannot give medical advice, so ask your doctor.
Weekly text messages improved adherence to antihypertensive treatment in this study. The effect on blood pressure \
should be evaluated in larger trials.
~Subscribe to our newsletter! 20% off your first order.
Decision: yes""",
)

MEDICINE = (
    study("reminders", "a disclaimer, and a line of the page it was taken from", *REMINDERS),
    study("reminders_bare", "the same without the disclaimer", *REMINDERS[:2], REMINDERS[2].split("\n", 1)[1]),
    study(
        "walking",
        "a sentence from another article",
        "Is walking speed associated with mortality in older patients with heart failure?",
        "Gait speed is simple to measure. In 331 patients aged 70 years or older we measured gait speed over 4 metres. "
        "During two years 64 patients died; mortality was higher in the slowest third (hazard ratio 2.1).",
        """\
Slow gait speed was associated with higher mortality in older patients with heart failure.
~The quarterly report of the bank was better than analysts had expected.
Gait speed may be useful to identify patients at risk.
Decision: yes""",
    ),
    study(
        "vitamin",
        "nothing: a clean conclusion",
        "Does vitamin D reduce pain after knee surgery?",
        "Vitamin D deficiency is common. 120 patients received vitamin D or placebo before surgery. Pain scores after "
        "three months did not differ between the groups.",
        """\
Vitamin D given before knee surgery did not reduce pain after three months. Routine use cannot be recommended.
Decision: no""",
    ),
)

EXAMPLES = {"GSM8K": MATH, "HumanEval": CODE, "PubMedQA": MEDICINE}
