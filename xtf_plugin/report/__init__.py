"""What a run reports: summary.json, the score table, report.html, lines in the terminal.

Read `score_table.py` first: its arrays are what statistics, page and terminal are made from.
"""
