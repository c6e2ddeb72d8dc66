"""The story kinds of the demo's word problems.

Each function draws its numbers first, so that the wording can never disagree with the arithmetic, tells the story,
and then takes the steps that solve it. All text was written for this project.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from problems import NAMES, Draft, Problem

GOODS = (
    "apples pears lemons rolls bagels candles notebooks pencils brushes mugs plates stickers postcards batteries "
    "tulips scarves socks bowls spoons lamps ropes hinges buckets seeds towels magnets marbles"
).split()
PLACES = (
    "market",
    "corner shop",
    "bakery",
    "hardware store",
    "school fair",
    "garden centre",
    "station kiosk",
    "museum shop",
)
HELPERS = ("friends", "cousins", "neighbours", "classmates", "children", "teammates", "guests")
CHORES = (
    "washing the dishes", "painting the fence", "sorting the mail", "practising the violin", "watering the plants",
    "cleaning the garage", "writing a letter", "feeding the horses", "repairing a bicycle", "folding the laundry",
)  # fmt: skip
VEHICLES = ("a van", "a bus", "an old car", "a slow train", "a truck", "a scooter", "a tractor", "a ferry")
DOUGHS = ("rolls", "pancakes", "dumplings", "waffles", "muffins", "flatbreads", "scones")
POWDERS = ("flour", "sugar", "oat flakes", "corn meal", "rice flour")
BANDS = ("ribbon", "rope", "copper wire", "garden hose", "wooden beam", "strip of cloth")
JOBS = (
    "in a library",
    "on a farm",
    "in a bike shop",
    "at a café",
    "in a warehouse",
    "at the harbour",
    "in a flower shop",
)
WISHES = ("a tent", "a guitar", "a winter coat", "a camera", "a telescope", "a sewing machine", "train tickets")


def shopping(rng: random.Random) -> Problem:
    """Two kinds of goods, perhaps a voucher, perhaps change from a note."""
    d = Draft(rng, "shopping")
    name, (one, two), place = rng.choice(NAMES), rng.sample(GOODS, 2), rng.choice(PLACES)
    a, b, p, q = d.number(2, 9), d.number(2, 9), d.number(2, 12), d.number(2, 9)
    total, voucher = a * p + b * q, d.number(2, 6)
    d.tell(
        f"{name} buys {a} {one} for {p} dollars each and {b} {two} for {q} dollars each at the {place}.",
        f"At the {place}, {name} picks {a} {one} and {b} {two}. "
        f"One of the {one} costs {p} dollars, one of the {two} {q} dollars.",
        f"{name} needs {a} {one} and {b} {two}. "
        f"The {place} sells {one} at {p} dollars a piece and {two} at {q} dollars a piece.",
    )
    with_voucher = d.maybe(0.35)
    if with_voucher:
        d.tell(f"A voucher takes {voucher} dollars off the bill.", f"{name} also has a voucher for {voucher} dollars.")
    note = (total // 50 + 1) * 50
    with_note = not with_voucher and d.maybe(0.5)
    if with_note:
        d.tell(
            f"{name} pays with {note} dollars. How much change does {name} get?", f"How much is left of {note} dollars?"
        )
    else:
        d.tell(
            f"How much does {name} pay?", f"What does {name} have to pay in all?", "How many dollars is that in total?"
        )
    first = d.step(f"the price of the {one}", a, "*", p, "dollars")
    second = d.step(f"the price of the {two}", b, "*", q, "dollars")
    bill = d.step(d.pick("the bill", "the total price", "the sum of both"), first, "+", second, "dollars")
    if with_voucher:
        d.step("the price after the voucher", bill, "-", voucher, "dollars")
    if with_note:
        d.step("the change", note, "-", bill, "dollars")
    return d.finish()


def time(rng: random.Random) -> Problem:
    """Two chores of related length, perhaps a break, perhaps repeated on several days."""
    d = Draft(rng, "time")
    name, (one, two) = rng.choice(NAMES), rng.sample(CHORES, 2)
    minutes, factor, pause, days = d.number(5, 30), d.number(2, 4), d.number(3, 15), d.number(2, 6)
    d.tell(
        f"{name} spends {minutes} minutes {one} and then {factor} times as long {two}.",
        f"{name} needs {minutes} minutes for {one}. For {two}, {name} needs {factor} times as long.",
        f"On Saturday {name} is {one} for {minutes} minutes and {two} for {factor} times as many minutes.",
    )
    rests, repeats = d.maybe(0.5), d.maybe(0.4)
    if rests:
        d.tell(
            f"In between there is a break of {pause} minutes.",
            f"{name} rests for {pause} minutes before the second task.",
        )
    if repeats:
        d.tell(
            f"The same happens on {days} days. How many minutes is that?",
            f"How many minutes is that over {days} such days?",
        )
    else:
        d.tell(
            "How many minutes does it take altogether?",
            f"For how many minutes is {name} busy?",
            "How many minutes pass?",
        )
    longer = d.step(d.pick("the time for the second task", f"the time for {two}"), minutes, "*", factor, "minutes")
    total = d.step(d.pick("the time for both tasks", "the working time"), minutes, "+", longer, "minutes")
    if rests:
        total = d.step("the time with the break", total, "+", pause, "minutes")
    if repeats:
        d.step(f"the time over {days} days", total, "*", days, "minutes")
    return d.finish()


def distance(rng: random.Random) -> Problem:
    """A journey in two legs, perhaps with the way that is left."""
    d = Draft(rng, "distance")
    name, vehicle = rng.choice(NAMES), rng.choice(VEHICLES)
    v, h, u, g = d.number(8, 40), d.number(2, 5), d.number(8, 30), d.number(2, 4)
    goal, left = v * h + u * g + d.number(5, 60), d.maybe(0.5)
    d.tell(
        f"{name} travels by {vehicle.split(' ', 1)[1]} at {v} kilometres per hour for {h} hours.",
        f"{name} takes {vehicle} that goes {v} kilometres per hour and is on the way for {h} hours.",
    )
    d.tell(
        f"After a rest the journey goes on for {g} hours at {u} kilometres per hour.",
        f"Then the speed changes to {u} kilometres per hour for the next {g} hours.",
    )
    if left:
        d.tell(
            f"The whole way is {goal} kilometres long. How many kilometres are left?",
            f"How far is it still, if the goal is {goal} kilometres from the start?",
        )
    else:
        d.tell(f"How far does {name} get?", "How many kilometres is that in all?", "How long is the way?")
    first = d.step(d.pick("the first distance", "the distance of the first leg"), v, "*", h, "kilometres")
    second = d.step(d.pick("the second distance", "the distance of the second leg"), u, "*", g, "kilometres")
    done = d.step(d.pick("the whole distance", "the distance so far"), first, "+", second, "kilometres")
    if left:
        d.step("the way that is left", goal, "-", done, "kilometres")
    return d.finish()


def sharing(rng: random.Random) -> Problem:
    """Bags of goods, some kept, the rest shared equally."""
    d = Draft(rng, "sharing")
    name, goods, people = rng.choice(NAMES), rng.choice(GOODS), rng.choice(HELPERS)
    share, heads, bags = d.number(2, 12), d.number(2, 9), d.number(2, 8)
    kept = -(share * heads) % bags + bags * d.number(0, 2)
    each = (share * heads + kept) // bags
    d.tell(
        f"{name} has {bags} bags with {each} {goods} in each of them.",
        f"There are {bags} boxes, each with {each} {goods}, and all of them belong to {name}.",
        f"{name} finds {bags} baskets. Every basket holds {each} {goods}.",
    )
    if kept:
        d.tell(f"{name} keeps {kept} of the {goods}.", f"{name} puts {kept} of them aside.")
    d.tell(
        f"{heads} {people} share the rest equally. How many {goods} does each one get?",
        f"The others go to {heads} {people} in equal parts. How many does each of the {people} receive?",
    )
    total = d.step(d.pick(f"the number of {goods}", "the number in all"), bags, "*", each, "")
    if kept:
        total = d.step(d.pick("the number to share", "what remains"), total, "-", kept, "")
    d.step(d.pick("the share of each one", f"the share of one of the {heads}"), total, "/", heads, goods)
    return d.finish()


def measuring(rng: random.Random) -> Problem:
    """A length in metres, cut into pieces in centimetres."""
    d = Draft(rng, "measuring")
    name, band = rng.choice(NAMES), rng.choice(BANDS)
    metres, pieces = d.number(2, 9), d.number(2, 8)
    size = d.number(4, (metres * 100 - 20) // pieces)
    d.tell(
        f"A {band} is {metres} metres long.",
        f"{name} owns a {band} of {metres} metres.",
        f"{name} buys {metres} metres of {band}.",
    )
    d.tell(
        f"{name} cuts off {pieces} pieces of {size} centimetres. How many centimetres are left?",
        f"How many centimetres remain after {name} has cut {pieces} pieces, each {size} centimetres long?",
    )
    length = d.step(f"the length of the {band}", metres, "*", 100, "centimetres")
    cut = d.step(d.pick("the length of the pieces", "the part that is cut off"), pieces, "*", size, "centimetres")
    d.step(d.pick("the rest", "the remaining length"), length, "-", cut, "centimetres")
    return d.finish()


def earning(rng: random.Random) -> Problem:
    """Wages over some days, a purchase or money that was there before."""
    d = Draft(rng, "earning")
    name, job, wish = rng.choice(NAMES), rng.choice(JOBS), rng.choice(WISHES)
    wage, hours, days = d.number(6, 19), d.number(2, 8), d.number(2, 6)
    total = wage * hours * days
    saved, price, spends = d.number(10, 90), d.number(10, total - 1), d.maybe(0.5)
    d.tell(
        f"{name} works {job} for {wage} dollars an hour, {hours} hours a day, on {days} days.",
        f"{name} has a job {job} that pays {wage} dollars per hour, and works {hours} hours on each of {days} days.",
    )
    if spends:
        d.tell(
            f"Then {name} buys {wish} for {price} dollars. How much money is left?",
            f"After paying {price} dollars for {wish}, how much is left?",
        )
    else:
        d.tell(
            f"{name} already had {saved} dollars. How much money is there now?",
            f"Together with {saved} dollars from before, how much is it?",
        )
    a_day = d.step(d.pick("the pay for a day", "the pay of one day"), wage, "*", hours, "dollars")
    pay = d.step(d.pick("the whole pay", f"the pay for {days} days"), a_day, "*", days, "dollars")
    d.step(
        "the money that is left" if spends else "the money in the end",
        pay,
        "-" if spends else "+",
        price if spends else saved,
        "dollars",
    )
    return d.finish()


def baking(rng: random.Random) -> Problem:
    """A recipe scaled up from its own number of pieces."""
    d = Draft(rng, "baking")
    name, dough, powder = rng.choice(NAMES), rng.choice(DOUGHS), rng.choice(POWDERS)
    base, grams, factor, bag = d.number(4, 15), d.number(4, 60) * 10, d.number(2, 6), d.number(1, 3)
    many, limit = base * factor, bag * 1000 > grams * factor and d.maybe(0.6)
    d.tell(
        f"A recipe for {base} {dough} asks for {grams} grams of {powder}.",
        f"For {base} {dough}, {name} uses {grams} grams of {powder}.",
    )
    d.tell(
        f"{name} wants to make {many} {dough}.",
        f"This time {many} {dough} are needed.",
        f"{name} has to bake {many} {dough} for a party.",
    )
    if limit:
        d.tell(
            f"The bag holds {bag * 1000} grams. How many grams are left in it?",
            f"How much {powder} is left of {bag * 1000} grams?",
        )
    else:
        d.tell(f"How many grams of {powder} does {name} need?", f"How much {powder} does that take?")
    times = d.step(d.pick("the number of batches", "the factor"), many, "/", base, "")
    need = d.step(d.pick(f"the amount of {powder}", "the amount for all of them"), grams, "*", times, "grams")
    if limit:
        d.step("the rest in the bag", bag * 1000, "-", need, "grams")
    return d.finish()


STORIES: tuple[Callable[[random.Random], Problem], ...] = (
    shopping,
    time,
    distance,
    sharing,
    measuring,
    earning,
    baking,
)


def random_problem(rng: random.Random) -> Problem:
    """A problem of a random kind."""
    return rng.choice(STORIES)(rng)
