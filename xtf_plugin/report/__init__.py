"""Reports of a run: summary.json, the score table, report.html, and lines in the terminal.

Read `score_table.py` first: statistics, page and terminal are made from its arrays.
"""
