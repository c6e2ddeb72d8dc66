"""Faults of the commands: `xtf show`, `xtf tune` and `xtf init`."""

from __future__ import annotations

from tests.faults import fault

COMMANDS = [
    fault(
        "reason-shows-what-protection-kept",
        "report/terminal.py",
        ' and (not token.kept or reason in ("protected", "floor"))',
        "",
        "test_terminal.py",
    ),
    fault(
        "show-begins-with-what-loses-least",
        "report/terminal.py",
        "key=lambda each: each[0], reverse=True)",
        "key=lambda each: each[0])",
        "test_terminal.py",
    ),
    fault(
        "show-repeats-a-document",
        "report/terminal.py",
        "if (len(best) == n and rank < best[0][0]) or part.key in held:",
        "if len(best) == n and rank < best[0][0]:",
        "test_terminal.py",
    ),
    fault(
        "rescored-counts-are-called-exact",
        "report/tune.py",
        'part.scorer == "explained" and name in changed',
        "False",
        "test_tune.py",
    ),
    fault(
        "more-and-less-are-exchanged",
        "report/tune.py",
        "share(each.dropped & ~base.dropped), share(base.dropped & ~each.dropped)",
        "share(base.dropped & ~each.dropped), share(each.dropped & ~base.dropped)",
        "test_tune.py",
    ),
    fault(
        "settings-are-drawn-at-random",
        "report/tune.py",
        'config.model_copy(update={"control": None})',
        "config",
        "test_tune.py",
    ),
    fault(
        "milder-is-stronger",
        "report/tune.py",
        '(shares[value] < now if word == "milder" else shares[value] > now)',
        "shares[value] > now",
        "test_tune.py",
    ),
    fault(
        "later-answers-lose-what-was-said-before",
        "hosts/init_data.py",
        "yield messages[:at], message",
        "yield messages[at - 1 : at], message",
        "test_init.py",
    ),
    fault(
        "users-are-trained-without-marks",
        "hosts/init_recipe.py",
        "            found = _problems(output)\n",
        "            found = []\n",
        "test_init.py",
    ),
    fault(
        "data-is-left-behind-by-a-refusal",
        "hosts/init_recipe.py",
        "shutil.rmtree(folder, ignore_errors=True)",
        "pass",
        "test_init.py",
    ),
]
